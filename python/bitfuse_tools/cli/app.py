"""What every command shares: the app, and how a command fails."""

from __future__ import annotations

import os
from typing import Annotated, Any, NoReturn

import typer
from bitfuse._version import __version__


class _Commands(typer.core.TyperGroup):
    """The commands; what BITFUSE_BACKEND asks for and this machine can't do ends any of them in a line."""

    def invoke(self, ctx: Any) -> Any:
        from bitfuse.core.backends import BackendError

        asked = os.environ.get("BITFUSE_BACKEND")
        try:
            return super().invoke(ctx)
        except BackendError as error:
            fail(ctx.invoked_subcommand, f"{error} (BITFUSE_BACKEND is {asked!r})" if asked else error)
        except ValueError as error:
            if not str(error).startswith("BITFUSE_BACKEND is "):
                raise
            fail(ctx.invoked_subcommand, error)
        except KeyboardInterrupt:  # of a command that keeps nothing
            typer.echo(f"bitfuse {ctx.invoked_subcommand}: interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="bitfuse",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in the help are brackets, and a wrong option is told in a line
    context_settings={"help_option_names": ["-h", "--help"]},
)


def fail(command: str, message: object) -> NoReturn:
    """End with one line on stderr and exit code 2."""
    typer.echo(f"bitfuse {command}: {message}", err=True)
    raise typer.Exit(2)


def refuse_asked_backend(command: str) -> None:
    """For commands that try every backend in turn.

    Raises:
        typer.Exit: BITFUSE_BACKEND is set, which would decide for every call.
    """
    from bitfuse.core.backends import asked_backend

    if (asked := asked_backend()) is not None:
        fail(command, f"BITFUSE_BACKEND is {asked!r}, which would decide for every call: unset it")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _bitfuse(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Few-bit weights for torch: see what they save on a real model, train adapters over them, and see what
    works on this machine.

    Start with `bitfuse demo`; `bitfuse finetune` trains LoRA over few-bit weights.
    If something is wrong or slow, `bitfuse info` says which kernels are alive here
    and why the others are not; paste it into a bug report. In Python, `bitfuse.quantize_(model, "int4")`
    replaces the linear layers of a model.
    """

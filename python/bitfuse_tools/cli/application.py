"""What every command shares: the app, and how a command begins and fails."""

from __future__ import annotations

import importlib.util
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
import typer.core

F = TypeVar("F", bound=Callable[..., None])
# what commands import that the library does not need
EXTRA = ("jinja2", "rich", "tqdm")


class Command(typer.core.TyperCommand):
    """A command. bitfuse, and torch with it, is imported when the options are read and right."""

    def invoke(self, ctx: Any) -> Any:
        from bitfuse._interrupt import imported
        from bitfuse.core.backends import BackendError

        imported()
        name, asked = str(ctx.info_name), os.environ.get("BITFUSE_BACKEND")
        try:
            return super().invoke(ctx)
        except BackendError as error:  # what BITFUSE_BACKEND asks for and this machine can't do
            fail(name, f"{error} (BITFUSE_BACKEND is {asked!r})" if asked else error)
        except ValueError as error:
            if not str(error).startswith(("BITFUSE_BACKEND is ", "BITFUSE_WITHOUT is ")):
                raise
            fail(name, error)
        except ModuleNotFoundError as missing:
            package = (missing.name or "").partition(".")[0]
            if package not in EXTRA:
                raise
            fail(name, f"this needs {package}: pip install 'bitfuse[cli]'")
        except KeyboardInterrupt:  # of a command that keeps nothing
            typer.echo(f"bitfuse {name}: interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="bitfuse",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in the help are brackets, and a wrong option is told in a line
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(function: F) -> F:
    """A command of the app, by the function's name."""
    return app.command(cls=Command)(function)


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
        # read where it is written: bitfuse itself would bring torch
        spec = importlib.util.find_spec("bitfuse")
        assert spec is not None and spec.origin is not None
        typer.echo(runpy.run_path(str(Path(spec.origin).with_name("_version.py")))["__version__"])
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

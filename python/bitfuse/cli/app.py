"""What every command shares: the app, and how a command fails."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

from .._version import __version__

app = typer.Typer(
    name="bitfuse",
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

"""`bitfuse info`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .application import command


@command
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """What is installed and which backends work, to paste.

    Runs one small real lowbit_linear a format on every backend and compares it with float64. The exit code is
    1 when a backend that serves a call gives wrong numbers, or BITFUSE_BACKEND asks for one that serves none
    here, so that every call fails.
    """
    from ..info import as_text, collect

    facts = collect()
    typer.echo(json.dumps(facts, indent=1) if as_json else as_text(facts))
    if facts["asked_backend"] or not all(backend["right"] for backend in facts["backends"]):
        raise typer.Exit(1)

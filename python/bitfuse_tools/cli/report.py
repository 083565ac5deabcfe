"""`bitfuse report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import command, fail


@command
def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RESULTS]...",
            help="Files or folders of results; without any, benchmarks/results.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page: report.html, or none with --readme.", show_default=False
        ),
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A README whose tables to make anew: what stands between <!-- bitfuse:figures NAME --> and "
            "<!-- /bitfuse:figures -->, and between <!-- bitfuse:ops --> and <!-- /bitfuse:ops -->.",
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this device, by a part of its name; may be given again."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
) -> None:
    """What `bitfuse bench` measured, as one HTML page: rooflines, speed-ups, latencies, tables.

    The page is a file on its own: it fetches nothing, reads on a phone and in the dark, and prints.
    For example:

    \b
        bitfuse report --open
        bitfuse report benchmarks/results/nvidia-h100-80gb-hbm3 --out h100.html
        bitfuse report --readme README.md
    """
    from ..report import ResultsError, default_folder, load, render, rewrite
    from ..report.files import read, write

    page = out if out is not None or (readme is not None and not open_page) else Path("report.html")
    try:
        devices = load(results or [default_folder()], device or ())
        made: dict[Path, str] = {}
        if page is not None:
            made[page] = render(devices)
        if readme is not None:
            made[readme] = rewrite(read(readme), devices)
        write(made)
    except ResultsError as error:
        fail("report", error)
    for path, text in made.items():
        typer.echo(f"{path}: {len(text.encode()) / 1e3:.0f} kB")
    if open_page and page is not None:
        typer.launch(str(page.resolve()))

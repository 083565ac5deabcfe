"""What is shown to people: by rich and tqdm where they are installed, plainly where they are not."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], last: Sequence[str], numbers: int) -> str:
    """A table with a last row below a line.

    Args:
        headings: one a column.
        rows, last: as many words each.
        numbers: how many of the last columns are set to the right.
    """
    rows = list(rows)
    justify = ["left"] * (len(headings) - numbers) + ["right"] * numbers
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return _plain(headings, rows, last, justify)
    made = Table()
    for heading, side in zip(headings, justify, strict=True):
        made.add_column(heading, justify=side)  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*row)
    made.add_section()
    made.add_row(*last)
    out = io.StringIO()
    Console(file=out, width=120).print(made)
    return out.getvalue()


def _plain(
    headings: Sequence[str], rows: Sequence[Sequence[str]], last: Sequence[str], justify: Sequence[str]
) -> str:
    """As rich draws it, but as wide as it is: no line is broken."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, last, strict=True)]

    def line(words: Sequence[str], edge: str) -> str:
        cells = (
            word.rjust(width) if side == "right" else word.ljust(width)
            for word, width, side in zip(words, widths, justify, strict=True)
        )
        return f"{edge} " + f" {edge} ".join(cells) + f" {edge}\n"

    def rule(left: str, dash: str, cross: str, right: str) -> str:
        return left + cross.join(dash * (width + 2) for width in widths) + right + "\n"

    drawn = rule("┏", "━", "┳", "┓") + line(headings, "┃") + rule("┡", "━", "╇", "┩")
    drawn += "".join(line(row, "│") for row in rows) + (rule("├", "─", "┼", "┤") if rows else "")
    return drawn + line(last, "│") + rule("└", "─", "┴", "┘")


class _NoBar:
    def update(self) -> None:
        pass

    def close(self) -> None:
        pass


def progress_bar(what: str, total: int, unit: str, shown: bool) -> Any:
    """tqdm's, with `update` and `close`; without tqdm, or if not `shown`, one that shows nothing."""
    if not shown:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, desc=what, unit=unit, leave=False)

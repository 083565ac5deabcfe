"""What compiled kernels take of a multiprocessor, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from .build import Kernel

_COLUMNS = (
    ("kernel", "left"), ("arch", "left"), ("variants", "right"), ("registers", "right"), ("local B", "right"),
    ("shared KiB", "right"), ("threads", "right"), ("blocks/SM", "right"), ("warps/SM", "right"),
    ("limit", "left"), ("instructions", "left"), ("code KiB", "right"), ("", "left"),
)  # fmt: skip


def span(values: Iterable[float]) -> str:
    """ "8" or "8-64"."""
    low, high = min(found := list(values)), max(found)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def shared_kib(kernel: Kernel) -> float:
    return round((kernel.static_shared + (kernel.dynamic_shared or 0)) / 1024, 1)


def row(group: Sequence[Kernel], name: str) -> tuple[str, ...]:
    """A line for kernels of one architecture: their spans, and what is wrong with some."""
    mixes = [kernel.mix for kernel in group if kernel.mix is not None]
    names = list(dict.fromkeys(n for mix in mixes for n in mix))
    mix = ", ".join(f"{n} {span(mix.get(n, 0) for mix in mixes)}" for n in names) if mixes else "no nvdisasm"
    wrong = []
    if spilling := sum(kernel.spills for kernel in group):
        wrong.append(f"{spilling} use local memory" if len(group) > 1 else "local memory")
    if short := sum(not kernel.fits for kernel in group):
        wrong.append(f"{short} do not fit" if len(group) > 1 else "does not fit")
    at_launch = group[0].dynamic_shared is None
    return (
        name, group[0].arch, str(len(group)), span(k.registers for k in group), span(k.local for k in group),
        span(map(shared_kib, group)) + ("+launch's" if at_launch else ""), span(k.threads for k in group),
        ("to " if at_launch else "") + span(k.blocks for k in group),
        ("to " if at_launch else "") + span(k.warps for k in group),
        ", ".join(dict.fromkeys(k.limit for k in group)), mix, span(round(k.code / 1024, 1) for k in group),
        ", ".join(wrong),
    )  # fmt: skip


def rows(kernels: Iterable[Kernel], each: bool) -> list[tuple[str, ...]]:
    """A line a kernel with `each`, else one for all variants of a function on an architecture."""
    if each:
        return [row([kernel], f"{kernel.name} {kernel.call}".strip()) for kernel in kernels]
    groups: dict[tuple[str, str, str], list[Kernel]] = {}
    for kernel in kernels:
        function = kernel.name.partition("<")[0]
        groups.setdefault((kernel.backend, function, kernel.arch), []).append(kernel)
    return [row(group, f"{function} ({backend})") for (backend, function, _), group in groups.items()]


def show(kernels: Iterable[Kernel], each: bool = False) -> None:
    """Print it; where stdout is no terminal, as wide as it gets."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in _COLUMNS:
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for cells in rows(kernels, each):
        table.add_row(*cells, style="red" if cells[-1] else "")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)
    console.print(table)

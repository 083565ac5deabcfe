"""The table of ops x backends, from what the ops declare."""

from __future__ import annotations

import itertools

from bitfuse.core.declaration import Declaration, Part

from ..hypothetical import EVERY

COLUMNS = {"reference": "reference", "cpp": "C++ on the CPU", "triton": "Triton", "cuda": "CUDA C++"}
# what a cell's "yes" stands for, and what its words come in addition to
USUAL = (
    "The reference runs on any device, C++ on any CPU (AVX-512 BF16, AVX-512, AVX2, NEON, portable), Triton "
    "and CUDA C++ on sm_80 and later. A cell with words asks for that too."
)


def head() -> list[str]:
    return ["op", *COLUMNS.values()]


def lines() -> list[list[str]]:
    """A line for each kernel of each op; neighbours of a family that say the same share one."""
    parts = [(declaration, part) for declaration in EVERY.values() for part in declaration.parts]

    def said(each: tuple[Declaration, Part]) -> tuple[str, str, list[str]]:
        declaration, part = each
        return declaration.family, part.what, [_cell(part, backend) for backend in COLUMNS]

    made = []
    for (_, what, cells), alike in itertools.groupby(parts, said):
        names = [name for declaration, _ in alike for name in _called(declaration)]
        made.append([", ".join(names) + (what and f", {what}"), *cells])
    return made


def _called(declaration: Declaration) -> list[str]:
    """An op, and those that call its kernels in another way."""
    callers = [each for each in EVERY.values() if declaration.name in (each.name, each.like)]
    return [f"`{each.called or each.name}`" for each in callers]


def _cell(part: Part, backend: str) -> str:
    if backend in {each.name for each in part.op.backends}:
        return part.cells.get(backend, "yes")
    return "torch serves it" if part.op.plain else "Triton serves it"

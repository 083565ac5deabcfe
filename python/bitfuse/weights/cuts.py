"""Where a few-bit weight can be cut, and its shards."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.limits import NESTED_BLOCK

if TYPE_CHECKING:
    from .weight import LowBitWeight


def cut_multiple(w: LowBitWeight, dim: int) -> int:
    """`LowBitWeight.cut_multiple`."""
    return _cut(w, _place(w, dim))[0]


def shard(w: LowBitWeight, dim: int, start: int, length: int) -> LowBitWeight:
    """`LowBitWeight.shard`."""
    dim = _place(w, dim)
    size, end = w.shape[dim], start + length
    if not (start >= 0 and length >= 0 and end <= size):
        raise ValueError(
            f"start is {start} and length {length}, expected a part of the {size} of dimension {dim}"
        )
    multiple, why = _cut(w, dim)
    for name, at in (("start", start), ("start + length", end)):
        if at % multiple and at != size:
            raise ValueError(
                f"{name} is {at}, expected a multiple of {multiple} in dimension {dim} of {w!r}{why}"
            )
    if dim == len(w.shape) - 1 and (start, end) == (0, size):
        return w
    if dim == len(w.shape) - 1 and not length:
        raise ValueError(f"length is 0, expected some of the {size} columns")
    parts: dict[str, Any] = w.tensors()
    lead, rows = len(w.shape) - 2, w.format.scale_rows
    of_groups = ("scales", "zeros", "offsets")
    if dim < lead:
        parts = {name: t.narrow(dim, start, length) for name, t in parts.items()}
    elif dim == lead:
        first, last = start // rows, -(-end // rows)
        parts["qweight"] = w.qweight.narrow(dim, start, length)
        for name in of_groups:
            if name in parts:
                parts[name] = parts[name].narrow(dim, first, last - first)
        if w.format.nested:
            groups = w.scales.shape[-1]
            first, last = first * groups // NESTED_BLOCK, -(-last * groups // NESTED_BLOCK)
            parts["scale_scales"] = parts["scale_scales"].narrow(-1, first, last - first)
    else:
        bits = w.format.bits
        parts["qweight"] = w.qweight.narrow(dim, start * bits // 8, length * bits // 8).contiguous()
        if w.format.group_size != -1:
            first, groups = start // w.group_size, length // w.group_size
            for name in of_groups:
                if name in parts:
                    parts[name] = parts[name].narrow(dim, first, groups).contiguous()
    shape = (*w.shape[:dim], length, *w.shape[dim + 1 :])
    perm = w.perm
    if perm is None:
        return replace(w, shape=shape, **parts)
    g_idx = parts.pop("g_idx")
    made = replace(w, shape=shape, perm=None, g_idx=None, **parts)
    return made.ordered(g_idx, perm.narrow(dim, start, length) if dim < lead else perm)


def _place(w: LowBitWeight, dim: int) -> int:
    dims = len(w.shape)
    if not -dims <= dim < dims:
        raise IndexError(f"dim is {dim}, expected {-dims} to {dims - 1}")
    return dim % dims


def _cut(w: LowBitWeight, dim: int) -> tuple[int, str]:
    """The multiple, and what of the weight makes it so."""
    size, groups = max(w.shape[dim], 1), w.scales.shape[-1]
    if dim < len(w.shape) - 2:
        return 1, ""
    if dim == len(w.shape) - 2:
        rows = w.format.scale_rows
        if not w.format.nested:
            return rows, f", where {rows} rows share their scales" if rows > 1 else ""
        blocks = NESTED_BLOCK // math.gcd(NESTED_BLOCK, groups)  # rows of scales that fill whole blocks
        return rows * blocks, f", whose scales are nested in blocks of {NESTED_BLOCK}"
    if w.g_idx is not None:
        return size, ", whose columns are sorted by group (g_idx)"
    if w.format.group_size == -1:
        return 8, ", whose codes are packed by 8"
    if w.format.nested and groups > 1:
        return size, f", whose scales are nested in blocks of {NESTED_BLOCK}, row after row"
    return w.group_size, ", whose groups are whole"

"""merge_attention in Triton: two outputs weighed by their shares of the sum of exponentials.

A program has TileR rows, a row being one head of one query, and their TileD channels. Bound by bytes: both
outputs are read and one is written.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ...core.device import Device, device_of
from ..core.launch import Plan, alignment_of, jit, planned, refuse, tl
from .layouts import FARTHEST, LONGEST, layout, padded, vector


class Tiles(NamedTuple):
    """The width of a row and what strides are divided by; rows of a program, and their padded width;
    constants."""

    Dim: int
    Align: int
    R: int
    D: int


_INTEGERS = ["rows", "heads", "S", "batch1", "row1", "head1", "batch2", "row2", "head2"]


@jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=["lse1", "lse2", "lse"])
def _kernel(
    o1, lse1, o2, lse2, out, lse, rows, heads, S, batch1, row1, head1, batch2, row2, head2, Tile
):  # fmt: skip
    """out [batch, S, heads, Dim] and lse [batch, heads, S]; strides are in multiples of Align elements."""
    r = tl.program_id(0).to(tl.int64) * Tile.R + tl.arange(0, Tile.R)
    d = tl.arange(0, Tile.D)
    inside = r < rows
    head, b, i = r % heads, r // heads // S, r // heads % S
    line = (b * heads + head) * S + i
    one = tl.load(lse1 + line, mask=inside, other=0.0)
    two = tl.load(lse2 + line, mask=inside, other=0.0)
    top = tl.maximum(one, two)
    from_zero = tl.where(top == float("-inf"), 0.0, top)  # nothing in either set
    w1, w2 = tl.exp(one - from_zero), tl.exp(two - from_zero)
    total = w1 + w2
    tl.store(lse + line, top + tl.log(total), mask=inside)
    factor = tl.where(top == float("-inf"), 0.0, 1.0 / total)
    there = inside[:, None] & (d < Tile.Dim)[None, :]
    # what a set without keys has as output is not looked at: it may never have been written
    some1, some2 = (one != float("-inf"))[:, None] & there, (two != float("-inf"))[:, None] & there
    first = tl.load(
        o1 + ((b * batch1 + i * row1 + head * head1) * Tile.Align)[:, None] + d[None, :],
        mask=some1,
        other=0.0,
    )
    second = tl.load(
        o2 + ((b * batch2 + i * row2 + head * head2) * Tile.Align)[:, None] + d[None, :],
        mask=some2,
        other=0.0,
    )
    w1, w2 = (w1 * factor)[:, None], (w2 * factor)[:, None]
    both = first.to(tl.float32) * w1 + second.to(tl.float32) * w2
    tl.store(out + r[:, None] * Tile.Dim + d[None, :], both.to(out.dtype.element_ty), mask=there)


ELEMENTS = 4096  # of a program


@functools.lru_cache(maxsize=1024)
def _plan(device: Device, rows: int, dim: int, align: int, kind: tuple[Any, ...]) -> Plan:
    width = padded(dim)
    tile = Tiles(dim, align, max(1, ELEMENTS // width), width)
    programs = -(-rows // tile.R)
    return planned(device, _kernel, (programs, 1, 1), (), (tile,), kind, num_warps=4, enable_fp_fusion=True)


def supports(o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if (reason := refuse(o1.device)) is not None:
        return reason
    if not 1 <= o1.shape[3] <= ELEMENTS:
        return f"head_dim is {o1.shape[3]}, not 1 to {ELEMENTS}"
    if o1.shape[1] >= LONGEST or o1.shape[2] * o1.shape[3] >= FARTHEST:
        return f"{o1.shape[1]} queries of {o1.shape[2]} heads are too many"
    return None


def run(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and lse. The arguments have passed the op's check."""
    if o1.is_cuda and o1.device.index != torch.cuda.current_device():
        with torch.cuda.device(o1.device):
            return run(o1, lse1, o2, lse2)
    batch, seq, heads, dim = o1.shape
    out = torch.empty(o1.shape, dtype=o1.dtype, device=o1.device)
    lse = torch.empty(lse1.shape, dtype=torch.float32, device=o1.device)
    if out.numel():
        both = (layout(o1), layout(o2))
        align = vector(both)
        strides = tuple(s // align for x in both for s in x[1:])
        rows = batch * seq * heads
        kind = (o1.dtype, *(n >= 2**31 for n in (rows, *strides)))
        plan = _plan(device_of(o1.device), rows, dim, align, kind)
        inputs = (both[0].tensor, lse1.contiguous(), both[1].tensor, lse2.contiguous(), out, lse)
        plan.launch((*inputs, rows, heads, seq, *strides), alignment_of(both[0].tensor, both[1].tensor))
    return out, lse

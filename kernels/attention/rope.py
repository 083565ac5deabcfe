"""rope in Triton: pairs of channels turned by a token's position (RoFormer: Su et al., 2021).

A program has TileR rows, a row being one head of one token, and their TileD channels: each thread loads up to
16 bytes of a row and, where pairs lie rotary_dim / 2 apart, the 16 bytes of their partners, which come from
L1; interleaved pairs are one thread's already. cos and sin are shared by a token's heads, which are
neighbours. Bound by bytes: x is read once and written once, some 8 instructions an element between.

Products are rounded before they are added, as torch does: the same bits whoever rotates.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ...core.device import Device, device_of
from ...ops.attention.kv_cache import Rotary
from ..core.launch import Plan, alignment_of, contiguous, jit, planned, refuse, tl
from .layouts import FARTHEST, LONGEST, layout, padded, vector


@jit
def turned(
    rows, inside, d, cos, sin, at, known, Dim: tl.constexpr, Half: tl.constexpr, Interleaved: tl.constexpr,
    Inverse: tl.constexpr,
):  # fmt: skip
    """The rows at `rows` [R] where `inside`, their channels d, of their dtype: rotated by cos and sin's rows
    `at` [R], to NaN where that row is not `known`; Half is 0 where nothing is rotated."""
    R: tl.constexpr = rows.shape[0]
    TileD: tl.constexpr = d.shape[0]
    there = inside[:, None] & (d < Dim)[None, :]
    x = tl.load(rows[:, None] + d[None, :], mask=there, other=0.0)
    if Half == 0:
        return x
    else:
        line = at.to(tl.int64)[:, None] * Half
        known = known[:, None]
        if Interleaved:
            even, odd = tl.split(x.reshape(R, TileD // 2, 2))
            partner = tl.join(odd, even).reshape(R, TileD)
            h = tl.arange(0, TileD // 2)
            mask = known & (h < Half)[None, :]
            c = tl.load(cos + line + h[None, :], mask=mask, other=float("nan"))
            s = tl.load(sin + line + h[None, :], mask=mask, other=float("nan"))
            c, s = tl.join(c, c).reshape(R, TileD), tl.join(s, s).reshape(R, TileD)
            first = d % 2 == 0
        else:
            other = (d + Half) % (2 * Half)
            partner = tl.load(rows[:, None] + other[None, :], mask=there & (d < 2 * Half)[None, :], other=0.0)
            h = d % Half
            mask = known & (d < 2 * Half)[None, :]
            c = tl.load(cos + line + h[None, :], mask=mask, other=float("nan"))
            s = tl.load(sin + line + h[None, :], mask=mask, other=float("nan"))
            first = d < Half
        s = s.to(tl.float32)
        s = tl.where(first[None, :] != Inverse, -s, s)
        whole = x.to(tl.float32) * c.to(tl.float32) + partner.to(tl.float32) * s
        return tl.where((d < 2 * Half)[None, :], whole.to(x.dtype), x)


class Turn(NamedTuple):
    """What is done to rows, and by a program; constants.

    Attributes:
        Dim, Align: the width of a row; what strides are divided by.
        Half, Interleaved: half of the channels that turn; whether pairs are neighbours.
        Inverse: whether they turn back.
        R, D: rows of a program, and their padded width.
    """

    Dim: int
    Align: int
    Half: int
    Interleaved: bool
    Inverse: bool
    R: int
    D: int


_INTEGERS = ["rows", "heads", "S", "count", "at_batch", "x_batch", "x_row", "x_head"]


@jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=["positions"])
def _kernel(
    x, cos, sin, positions, out, rows, heads, S, count, at_batch, x_batch, x_row, x_head, Fixed
):  # fmt: skip
    """out [batch, S, heads, Dim] of x, whose strides are in multiples of Align elements; positions [.., S]
    have at_batch elements a batch."""
    r = tl.program_id(0).to(tl.int64) * Fixed.R + tl.arange(0, Fixed.R)
    d = tl.arange(0, Fixed.D)
    inside = r < rows
    head, token = r % heads, r // heads
    b, i = token // S, token % S
    place = x + (b * x_batch + i * x_row + head * x_head) * Fixed.Align
    at = i
    if positions is not None:
        at = tl.load(positions + b * at_batch + i, mask=inside, other=0)
    known = (at >= 0) & (at < count)
    y = turned(
        place,
        inside,
        d,
        cos,
        sin,
        at,
        known & inside,
        Fixed.Dim,
        Fixed.Half,
        Fixed.Interleaved,
        Fixed.Inverse,
    )
    tl.store(out + r[:, None] * Fixed.Dim + d[None, :], y, mask=inside[:, None] & (d < Fixed.Dim)[None, :])


ELEMENTS = 4096  # of a program


@functools.lru_cache(maxsize=1024)
def _plan(device: Device, rows: int, fixed: Turn, kind: tuple[Any, ...]) -> Plan:
    programs = -(-rows // fixed.R)
    return planned(device, _kernel, (programs, 1, 1), (), (fixed,), kind, num_warps=4, enable_fp_fusion=False)


def rotary_tensors(rotary: Rotary) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """cos, sin and positions, dense."""
    return contiguous(rotary.cos), contiguous(rotary.sin), contiguous(rotary.positions)


def rotary_numbers(rotary: Rotary) -> tuple[int, int]:
    """Rows of cos, and elements of positions a batch."""
    positions = rotary.positions
    a_batch = 0 if positions is None or positions.shape[0] == 1 else positions.shape[1]
    return 0 if rotary.cos is None else rotary.cos.shape[0], a_batch


def supports(x: torch.Tensor, rotary: Rotary, inverse: bool) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if (reason := refuse(x.device)) is not None:
        return reason
    if not 1 <= x.shape[3] <= ELEMENTS:
        return f"head_dim is {x.shape[3]}, not 1 to {ELEMENTS}"
    if x.shape[1] >= LONGEST or x.shape[2] * x.shape[3] >= FARTHEST:
        return f"{x.shape[1]} tokens of {x.shape[2]} heads are too many"
    return None


def run(x: torch.Tensor, rotary: Rotary, inverse: bool) -> torch.Tensor:
    """x rotated, NaN at a position that cos does not have. The arguments have passed the op's check."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return run(x, rotary, inverse)
    assert rotary.cos is not None
    batch, seq, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        of = layout(x)
        align = vector((of,))
        strides = tuple(s // align for s in of[1:])
        cos, sin, positions = rotary_tensors(rotary)
        width = padded(dim)
        half = rotary.cos.shape[1]
        fixed = Turn(dim, align, half, rotary.interleaved, inverse, ELEMENTS // width, width)
        rows = batch * seq * heads
        wide = tuple(n >= 2**31 for n in (rows, *strides))
        kind = (x.dtype, rotary.cos.dtype, positions is None, wide)
        plan = _plan(device_of(x.device), rows, fixed, kind)
        numbers = (rows, heads, seq, *rotary_numbers(rotary), *strides)
        plan.launch((of.tensor, cos, sin, positions, out, *numbers), alignment_of(of.tensor, cos, sin, out))
    return out

"""bottleneck_adapter in Triton: y = x + act(x D^T + c) U^T + b in one kernel.

A program owns TileM rows. It walks the columns of x for h = x D^T + c, whose [TileM, TileR] stay in registers
(h is stored too, R numbers a row: the backward wants it), applies the activation in float32, and walks the
columns of y with act(h) as the one operand of R-deep products; x, which it read a moment ago, comes from L2.
So x is read and y written once in memory, which is what bounds it: 134 MB at 8192 rows of 4096 in 16 bits.
TileM is the tallest that fills the machine; at 32 rows the x of all running programs is 35 MB, what L2 holds.
Ranks up to MOST_RANK: what fits the registers.

Products as in `lora_linear`: D as exact as it is given; act(h) and U in x's dtype.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ...core.device import Device, device_of
from ..core.launch import Plan, alignment_of, as_matrix, contiguous, dtypes_of, jit, planned, refuse, tl
from .gated_activation import value_and_slope
from .lora_linear_passes import dot_exactly, pieces, pieces_of_x


class Aligned(NamedTuple):
    """By what K, N, R and the stride of x are divided on their way to the kernel; constants."""

    K: int
    N: int
    R: int
    Stride: int


class Formula(NamedTuple):
    """What is computed; constants.

    Attributes:
        Residual: whether x is added.
        Activation: which.
        XPieces, Pieces: pieces of bfloat16 that x and D are multiplied in; 0 for D: in x's dtype.
    """

    Residual: bool
    Activation: str
    XPieces: int
    Pieces: int


class Tiles(NamedTuple):
    """Rows and ranks of a program, and columns of x and of y at a time; constants."""

    M: int
    R: int
    K: int
    N: int


@jit(do_not_specialize=["M", "K", "N", "R", "stride"])
def _kernel(
    x, down, down_bias, up, up_bias, out, h, M, K, N, R, stride, Align, Form, Tile
):  # fmt: skip
    """x [M, K] in rows of `stride` elements, down [R, K], up [N, R]; out [M, N], h float32 [M, R]."""
    K *= Align.K
    N *= Align.N
    R *= Align.R
    Float: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(0) * Tile.M + tl.arange(0, Tile.M)
    rank = tl.arange(0, Tile.R)
    there = rank < R
    x_row = x + m.to(tl.int64)[:, None] * (stride.to(tl.int64) * Align.Stride)
    column = tl.arange(0, Tile.K)
    down_at = down + rank.to(tl.int64)[:, None] * K + column[None, :]
    acc = tl.zeros((Tile.M, Tile.R), tl.float32)
    for k in range(0, K, Tile.K):
        tile = tl.load(
            x_row + (k + column)[None, :], mask=(m < M)[:, None] & (column < K - k)[None, :], other=0.0
        )
        d = tl.load(down_at + k, mask=there[:, None] & (column < K - k)[None, :], other=0.0)
        acc = dot_exactly(tile, d.T, acc, Float, Form.XPieces, Form.Pieces)
    if down_bias is not None:
        acc += tl.load(down_bias + rank, mask=there, other=0.0).to(tl.float32)[None, :]
    mask = (m < M)[:, None] & there[None, :]
    tl.store(h + m.to(tl.int64)[:, None] * R + rank[None, :], acc, mask=mask)
    middle, _ = value_and_slope(acc, Form.Activation, Float == tl.float32)
    middle = middle.to(Float)
    n = tl.arange(0, Tile.N)
    up_at = up + n.to(tl.int64)[:, None] * R + rank[None, :]
    out_row = out + m.to(tl.int64)[:, None] * N
    for at in tl.range(0, N, Tile.N):
        inside = n < N - at
        u = tl.load(up_at + at.to(tl.int64) * R, mask=inside[:, None] & there[None, :], other=0.0)
        y = tl.dot(middle, u.to(Float).T, input_precision="ieee")
        mask_y = (m < M)[:, None] & inside[None, :]
        if up_bias is not None:
            y += tl.load(up_bias + at + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        if Form.Residual:
            y += tl.load(x_row + (at + n)[None, :], mask=mask_y, other=0.0).to(tl.float32)
        tl.store(out_row + (at + n)[None, :], y.to(Float), mask=mask_y)


MOST_RANK = 256


@functools.lru_cache(maxsize=1024)
def _plan(
    device: Device,
    m: int,
    k: int,
    n: int,
    rank: int,
    stride: int,
    dtypes: tuple[torch.dtype | None, ...],
    activation: str,
    residual: bool,
) -> Plan:
    """`dtypes`: of x, down, down_bias, up and up_bias."""
    dtype, down, _, up, _ = dtypes
    assert dtype is not None and down is not None and up is not None
    tile_r = max(16, 1 << (rank - 1).bit_length())
    tile_m = 32 if m >= 24 * device.multiprocessors else 16
    if dtype == torch.float32:
        tile_k, tile_n, stages = 16, 32, 2
    else:
        # stages of a matrix's tile that fit the 99 KB of a program on compute capability 8.6
        row = tile_r * max(down.itemsize, up.itemsize)
        tile_k = tile_n = 128 if row <= 128 else 64
        stages = 4 if row <= 128 else 3 if row <= 256 else 2
    # sums [TileM, TileR] in registers, and no warp without sums of its own
    warps = 8 if tile_r > 128 else min(4, tile_m * tile_r // 128)
    align = Aligned(*(math.gcd(size, 8) for size in (k, n, rank, stride)))
    return planned(
        device,
        _kernel,
        (-(-m // tile_m), 1, 1),
        (m, k // align.K, n // align.N, rank // align.R, stride // align.Stride),
        (
            align,
            Formula(residual, activation, pieces_of_x(dtype), pieces(dtype, (down,))),
            Tiles(tile_m, tile_r, tile_k, tile_n),
        ),
        dtypes,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )


def supports(
    x: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str,
    residual: bool,
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if (reason := refuse(x.device)) is not None:
        return reason
    rank, k = down.shape
    if not 0 < rank <= MOST_RANK:
        return f"the bottleneck is {rank}, it takes 1 to {MOST_RANK}"
    if 0 in (k, up.shape[0]):
        return f"down has shape {list(down.shape)} and up {list(up.shape)}, which leaves nothing to do"
    if x.numel() // k >= 2**31:
        return f"{x.numel() // k} rows are more than 2**31 - 1"
    return None


def run(
    x: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str,
    residual: bool,
) -> list[torch.Tensor]:
    """y, of x's dtype and leading shape, and h = x D^T + c, float32 [rows, r]."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return run(x, down, down_bias, up, up_bias, activation, residual)
    n, (rank, k) = up.shape[0], down.shape
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    rows = as_matrix(x)
    m = rows.shape[0]
    h = torch.empty(m, rank, dtype=torch.float32, device=x.device)
    if m:
        given = (rows, down, down_bias, up, up_bias)
        weights = [contiguous(t) for t in given[1:]]
        plan = _plan(
            device_of(x.device), m, k, n, rank, rows.stride(0) if m > 1 else k,
            dtypes_of(given), activation, residual,
        )  # fmt: skip
        plan.launch((rows, *weights, out, h), alignment_of(rows, *weights))
    return [out, h]

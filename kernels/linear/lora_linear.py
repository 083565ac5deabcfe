"""lora_linear in Triton: y = x W^T + s drop(x) A^T B^T and its gradients, rank first.

Split-fused (LoRAFusion, Zhu et al., 2025): what reads x or a gradient whole only to shrink it to R columns
is a kernel bound by those bytes; what widens R columns again rides in the product with W as R more steps of
the contraction (`lowbit_linear.LowRank`), so nothing of the size of y or of x is written but y and dX.

- forward: h = drop(x) A^T (shrink: x read once for all its projections); y = x W^T + s h B^T, written once.
- backward: one pass over dY for GB = s dY B and dB = s dY^T h together (column sums), whose partial sums are
  half the bytes of a second pass at rank 16; beyond, a pass for each. dX = dY W + drop'(GB A), written once,
  or added to where several projections share x. One pass over x for dA = GB^T drop(x) of all of them.

A dense W is cuBLAS's: the widening kernel writes the low-rank term (and bias) first, and the matrix product
adds to it in its epilogue, which overlaps its reads with arithmetic.

Bytes at M = 8192, K = N = 4096, rank 16, bfloat16: the forward's product has 275 GFLOP (0.4 to 0.6 ms on an
H100); the shrink reads 67 MB (22 us at 3 TB/s), and h is 0.5 MB. The backward's product is as large; the pass
over dY is 67 MB and 36 MB of partial sums written and read again, mostly in L2; that over x is 67 MB: 57 us.

What fits where:
- shrink: a program owns TileM rows and TileR ranks and walks the columns, 4 stages of [TileM, TileK] of x and
  [TileR, TileK] of each A on their way; 64 rows where that fills the machine, which puts 48 KB in flight on
  each multiprocessor. Sums stay in registers; there is no second kernel. From Hopper on the product with W
  begins as soon as all its programs run, on what they leave of each multiprocessor.
- column sums: a program owns TileC columns and a share of the rows, TileM = 32 at a time, 4 stages; what it
  holds is the sums [TileR, TileC] of each projection, and for GB its columns of B. Shares are added in a
  fixed order by a second kernel: no atomics, the same bits every time.

Precision: a 16-bit adapter of x's dtype is multiplied as it is, h and GB rounded to that dtype, as plain
PyTorch has them. Another adapter is kept to its own precision: it (and what is float32 in h and GB) is cut
into pieces of bfloat16, whose products tensor cores sum exactly: three for float32, two for float16; x in
float16 is two. A step's sum is added to the total as float32: a chain through the tensor cores'
accumulators loses digits with its length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ...core import dropout
from ...core.device import Device, device_of
from ...ops.linear.lora_args import LoraArgs
from ...weights.weight import WeightTensors
from ..core.dropout import keep, row_keys
from ..core.launch import HANDLES, Plan, alignment_of, as_matrix, jit, refuse, tl
from . import lowbit_linear
from .lowbit_linear import LowRank, add_low_rank, tile_r

# kernels


@jit
def _piece(a, Index: tl.constexpr):
    """The Index-th bfloat16 of a: of what those before it leave."""
    a = a.to(tl.float32)
    for _ in tl.static_range(Index):
        a -= a.to(tl.bfloat16).to(tl.float32)
    return a.to(tl.bfloat16)


@jit
def dot_exactly(a, b, acc, Float: tl.constexpr, APieces: tl.constexpr, BPieces: tl.constexpr):
    """acc + a b in pieces of bfloat16; if either has none, in Float, the dtype of x."""
    if Float == tl.float32:
        # `acc + dot` would become one chain
        acc -= tl.dot(a.to(Float), -b.to(Float), input_precision="ieee")
    elif APieces == 0 or BPieces == 0:
        acc = tl.dot(a.to(Float), b.to(Float), acc)
    else:
        part = tl.zeros(acc.shape, tl.float32)
        for i in tl.static_range(APieces):
            for j in tl.static_range(BPieces):
                # small products first; those below float32's last place are left out
                if APieces - 1 - i + BPieces - 1 - j < 3:
                    part = tl.dot(_piece(a, APieces - 1 - i), _piece(b, BPieces - 1 - j), part)
        acc += part
    return acc


@jit
def _shrink(
    acc, tile, first, second, seed, threshold, factor, column, rank, K, R, k,
    Across: tl.constexpr, XPieces: tl.constexpr, Pieces: tl.constexpr,
):  # fmt: skip
    """acc + drop(tile) factor^T for the columns from k on; factor [R, K], or [K, R] if Across."""
    there = column < K - k
    if Across:
        at = (k + column).to(tl.int64)[:, None] * R + rank[None, :]
        f = tl.load(factor + at, mask=there[:, None] & (rank < R)[None, :], other=0.0)
    else:
        at = rank.to(tl.int64)[:, None] * K + (k + column)[None, :]
        f = tl.load(factor + at, mask=(rank < R)[:, None] & there[None, :], other=0.0).T
    if seed is not None:
        tile = tl.where(keep(first[:, None], second[:, None], (k + column)[None, :], threshold), tile, 0.0)
    return dot_exactly(tile, f, acc, tile.dtype, XPieces, Pieces)


@jit
def _store_h(acc, out, scaling, scale_by, m, rank, M, R):
    if scale_by is not None:
        scaling *= tl.load(scale_by)
    mask = (m < M)[:, None] & (rank < R)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * R + rank[None, :], acc * scaling, mask=mask)


_INTEGERS = ["threshold", "M", "C", "stride", "R0", "R1", "R2", "rank_tiles", "steps", "splits", "size"]


@jit(do_not_specialize=_INTEGERS)
def _shrink_kernel(
    x, factor0, factor1, factor2, seed0, seed1, seed2, scale_by, out0, out1, out2,
    scaling, threshold, M, C, stride, R0, R1, R2, rank_tiles,
    CAlign: tl.constexpr, StrideAlign: tl.constexpr, RAlign: tl.constexpr, Across: tl.constexpr,
    XPieces: tl.constexpr, Pieces: tl.constexpr, Overlap: tl.constexpr, TileM: tl.constexpr,
    TileR: tl.constexpr, TileK: tl.constexpr,
):  # fmt: skip
    """out = scaling drop(x) factor^T, float32 [M, R], of up to three factors and masks; x is [M, C].

    Programs next to one another have the same rows, so that x is read from memory once for all ranks.
    """
    C *= CAlign
    R0 *= RAlign
    R1 *= RAlign
    R2 *= RAlign
    if Overlap:
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(0) // rank_tiles * TileM + tl.arange(0, TileM)
    rank = tl.program_id(0) % rank_tiles * TileR + tl.arange(0, TileR)
    column = tl.arange(0, TileK)
    x_at = x + m.to(tl.int64)[:, None] * (stride.to(tl.int64) * StrideAlign) + column[None, :]
    first0, second0 = row_keys(seed0, m)
    first1, second1 = row_keys(seed1, m)
    first2, second2 = row_keys(seed2, m)
    acc0 = tl.zeros((TileM, TileR), tl.float32)
    acc1 = acc0
    acc2 = acc0
    for k in range(0, C, TileK):
        tile = tl.load(x_at + k, mask=(m < M)[:, None] & (column < C - k)[None, :], other=0.0)
        acc0 = _shrink(
            acc0, tile, first0, second0, seed0, threshold, factor0, column, rank, C, R0, k,
            Across, XPieces, Pieces,
        )  # fmt: skip
        if factor1 is not None:
            acc1 = _shrink(
                acc1, tile, first1, second1, seed1, threshold, factor1, column, rank, C, R1, k,
                Across, XPieces, Pieces,
            )  # fmt: skip
        if factor2 is not None:
            acc2 = _shrink(
                acc2, tile, first2, second2, seed2, threshold, factor2, column, rank, C, R2, k,
                Across, XPieces, Pieces,
            )  # fmt: skip
    _store_h(acc0, out0, scaling, scale_by, m, rank, M, R0)
    if factor1 is not None:
        _store_h(acc1, out1, scaling, scale_by, m, rank, M, R1)
    if factor2 is not None:
        _store_h(acc2, out2, scaling, scale_by, m, rank, M, R2)


@jit
def _column_sum(
    acc, tile, h, seed, threshold, row, column, rank, M, R, XPieces: tl.constexpr, Pieces: tl.constexpr
):  # fmt: skip
    """acc [TileR, TileC] + h^T drop(tile), h float32 [M, R]."""
    mask = (row < M)[:, None] & (rank < R)[None, :]
    low = tl.load(h + row.to(tl.int64)[:, None] * R + rank[None, :], mask=mask, other=0.0)
    if seed is not None:
        first, second = row_keys(seed, row)
        tile = tl.where(keep(first[:, None], second[:, None], column[None, :], threshold), tile, 0.0)
    return dot_exactly(low.T, tile, acc, tile.dtype, Pieces, XPieces)


@jit
def _store_sums(acc, out, scaling, column, rank, C, R, Across: tl.constexpr):
    """acc [TileR, TileC] to this share's [R, C] of out, or to its [C, R] if Across."""
    out += tl.program_id(2).to(tl.int64) * C * R
    acc *= scaling
    if Across:
        at = column.to(tl.int64)[:, None] * R + rank[None, :]
        tl.store(out + at, acc.T, mask=(column < C)[:, None] & (rank < R)[None, :])
    else:
        at = rank.to(tl.int64)[:, None] * C + column[None, :]
        tl.store(out + at, acc, mask=(rank < R)[:, None] & (column < C)[None, :])


@jit(do_not_specialize=_INTEGERS)
def _column_sums_kernel(
    x, h0, h1, h2, seed0, seed1, seed2, scale_by, factor, out0, out1, out2, product,
    scaling, threshold, M, C, stride, R0, R1, R2, steps,
    CAlign: tl.constexpr, StrideAlign: tl.constexpr, RAlign: tl.constexpr, Across: tl.constexpr,
    XPieces: tl.constexpr, Pieces: tl.constexpr, FactorPieces: tl.constexpr, TileM: tl.constexpr,
    TileR: tl.constexpr, TileC: tl.constexpr,
):  # fmt: skip
    """out = scaling drop(x)^T h of up to three h and masks, float32, over the program's `steps` steps of
    TileM rows of x [M, C]: [shares, C, R] if Across, else [shares, R, C].

    With a factor [C, R] also the part of scaling x factor that these columns give: product [column tiles, M,
    R].
    """
    C *= CAlign
    R0 *= RAlign
    R1 *= RAlign
    R2 *= RAlign
    rank = tl.program_id(0) * TileR + tl.arange(0, TileR)
    column = tl.program_id(1) * TileC + tl.arange(0, TileC)
    begin = tl.program_id(2) * steps * TileM
    end = tl.minimum(begin + steps * TileM, M)
    row = tl.arange(0, TileM)
    x_at = x + column[None, :]
    row_stride = stride.to(tl.int64) * StrideAlign
    if scale_by is not None:
        scaling *= tl.load(scale_by)
    if factor is not None:
        f_mask = (column < C)[:, None] & (rank < R0)[None, :]
        f = tl.load(factor + column.to(tl.int64)[:, None] * R0 + rank[None, :], mask=f_mask, other=0.0)
        product += tl.program_id(1).to(tl.int64) * M * R0
    acc0 = tl.zeros((TileR, TileC), tl.float32)
    acc1 = acc0
    acc2 = acc0
    for at in range(begin, end, TileM):
        m = at + row
        mask = (m < M)[:, None] & (column < C)[None, :]
        tile = tl.load(x_at + m.to(tl.int64)[:, None] * row_stride, mask=mask, other=0.0)
        if h0 is not None:
            acc0 = _column_sum(acc0, tile, h0, seed0, threshold, m, column, rank, M, R0, XPieces, Pieces)
        if h1 is not None:
            acc1 = _column_sum(acc1, tile, h1, seed1, threshold, m, column, rank, M, R1, XPieces, Pieces)
        if h2 is not None:
            acc2 = _column_sum(acc2, tile, h2, seed2, threshold, m, column, rank, M, R2, XPieces, Pieces)
        if factor is not None:
            part = tl.zeros((TileM, TileR), tl.float32)
            part = dot_exactly(tile, f, part, tile.dtype, XPieces, FactorPieces)
            part_mask = (m < M)[:, None] & (rank < R0)[None, :]
            tl.store(product + m.to(tl.int64)[:, None] * R0 + rank[None, :], part * scaling, mask=part_mask)
    if h0 is not None:
        _store_sums(acc0, out0, scaling, column, rank, C, R0, Across)
    if h1 is not None:
        _store_sums(acc1, out1, scaling, column, rank, C, R1, Across)
    if h2 is not None:
        _store_sums(acc2, out2, scaling, column, rank, C, R2, Across)


@jit(do_not_specialize=_INTEGERS)
def _sum_kernel(partial, out, size, splits, Align: tl.constexpr, Width: tl.constexpr):
    """out [size] = the sum of partial [splits, size], in order."""
    size *= Align
    at = tl.program_id(0).to(tl.int64) * Width + tl.arange(0, Width)
    acc = tl.zeros((Width,), tl.float32)
    for split in range(splits):
        acc += tl.load(partial + split * size.to(tl.int64) + at, mask=at < size, other=0.0)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < size)


@jit(do_not_specialize=["threshold", "M", "N", "R"])
def _widen_kernel(
    h, factor, scale_by, seed, previous, out_scale, bias, out, scaling, threshold, M, N, R,
    NAlign: tl.constexpr, RAlign: tl.constexpr, Wide: tl.constexpr, TileM: tl.constexpr, TileN: tl.constexpr,
    TileR: tl.constexpr,
):  # fmt: skip
    """out [M, N] = out_scale (previous + scaling drop'(h factor)) + bias; factor [R, N] if Wide, else [N, R].

    A program has a tile [TileM, TileN] of out; what it writes bounds it.
    """
    N *= NAlign
    R *= RAlign
    m = tl.program_id(0) * TileM + tl.arange(0, TileM)
    n = tl.program_id(1) * TileN + tl.arange(0, TileN)
    Float: tl.constexpr = out.dtype.element_ty
    if scale_by is not None:
        scaling *= tl.load(scale_by)
    acc = tl.zeros((TileM, TileN), tl.float32)
    if h is not None:
        acc = add_low_rank(acc, h, factor, scaling, m, n, M, N, R, Float, Wide, TileR)
    if seed is not None:
        first, second = row_keys(seed, m)
        acc = tl.where(keep(first[:, None], second[:, None], n[None, :], threshold), acc, 0.0)
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if previous is not None:
        acc += tl.load(previous + at, mask=mask, other=0.0).to(tl.float32)
    if out_scale is not None:
        acc *= tl.load(out_scale + n, mask=n < N, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, acc.to(Float), mask=mask)


# launchers

JOINT = 3  # projections of one x in one pass
MOST_JOINT = 96  # and of all projections of a pass together: sums that fit the registers
MOST_FUSED = 16  # rank up to which GB's partial sums are half the bytes of a second pass over dY
SUM_WIDTH = 512
_PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def _stage(device: Device) -> int:
    """Bytes of a stage of a shrink of which four fit a program; on the way, they hide memory's latency."""
    return (32 if device.arch.roomy else 20) << 10


def _in_halves(x: torch.dtype, other: torch.dtype) -> bool:
    """Whether x itself is multiplied in pieces; they leave no registers for two products."""
    return x == torch.float16 and other != x


def pieces(x: torch.dtype, others: tuple[torch.dtype, ...]) -> int:
    """In how many pieces of bfloat16 an operand beside x is multiplied; 0: in x's dtype."""
    if x == torch.float32 or all(other == x for other in others):
        return 0
    return max(_PIECES[other] for other in others)


@functools.lru_cache(maxsize=4096)
def _shrink_plan(
    device: Device,
    m: int,
    c: int,
    stride: int,
    dtype: torch.dtype,
    ranks: tuple[int, ...],
    factors: tuple[torch.dtype, ...],
    across: bool,
    scale_by: bool,
    dropped: bool,
) -> Plan:
    tile_r = tile_r(max(ranks))
    rank_tiles = -(-max(ranks) // tile_r)
    # the tallest tile that still gives most multiprocessors one
    enough = 3 * device.multiprocessors // 4
    tile_m = next((t for t in (64, 32) if -(-m // t) * rank_tiles >= enough), 16)
    if dtype == torch.float32:
        tile_k, stages = 16, 3
    else:
        column = tile_m * dtype.itemsize + tile_r * sum(f.itemsize for f in factors)
        tile_k, stages = min(512, max(32, 1 << (_stage(device) // column).bit_length() - 1)), 4
    c_align, stride_align = math.gcd(c, 8), math.gcd(stride, 8)
    r_align = math.gcd(*ranks, 8)
    constants = (
        c_align, stride_align, r_align, across, 2 if dtype == torch.float16 else 1, pieces(dtype, factors),
        device.arch.overlaps and not across, tile_m, tile_r, tile_k,
    )  # fmt: skip
    padded = (*(r // r_align for r in ranks), 0, 0)[:JOINT]
    return Plan(
        _shrink_kernel,
        (rank_tiles * -(-m // tile_m), 1, 1),
        (m, c // c_align, stride // stride_align, *padded, rank_tiles, *constants),
        # no more warps than have sums of their own
        dict(num_warps=min(4, tile_m * tile_r // 128), num_stages=stages, enable_fp_fusion=True),
        HANDLES.setdefault(
            (device.number, "shrink", dtype, factors, len(ranks), scale_by, dropped, constants), {}
        ),
    )


def _three(items: Sequence[Any]) -> tuple[Any, ...]:
    return (*items, *(None,) * (JOINT - len(items)))


def _passes(count: int, rank: int) -> list[range]:
    """The projections that go together, pass by pass."""
    together = max(1, min(JOINT, MOST_JOINT // tile_r(rank)))
    return [range(i, min(i + together, count)) for i in range(0, count, together)]


def _shrink_all(
    x: torch.Tensor,
    factors: Sequence[torch.Tensor],
    seeds: Sequence[torch.Tensor | None],
    across: bool,
    scaling: float,
    scale_by: torch.Tensor | None,
    threshold: int,
) -> list[torch.Tensor]:
    """scaling drop(x) factor^T of each factor, float32 [M, R]; ranks at least 1."""
    m, c = x.shape
    ranks = [f.shape[1 if across else 0] for f in factors]
    outs = [torch.empty(m, r, dtype=torch.float32, device=x.device) for r in ranks]
    for together in _passes(len(factors), max(ranks, default=1)):
        own, results = [factors[i] for i in together], [outs[i] for i in together]
        masks = [seeds[i] for i in together]
        plan = _shrink_plan(
            device_of(x.device), m, c, x.stride(0) if m > 1 else c, x.dtype,
            tuple(ranks[i] for i in together),
            tuple(f.dtype for f in own), across, scale_by is not None, masks[0] is not None,
        )  # fmt: skip
        plan.launch(
            (x, *_three(own), *_three(masks), scale_by, *_three(results), scaling, threshold),
            alignment_of(x, *own, *masks, scale_by),
        )
    return outs


@functools.lru_cache(maxsize=4096)
def _column_sums_plan(
    device: Device,
    m: int,
    c: int,
    stride: int,
    dtype: torch.dtype,
    ranks: tuple[int, ...],
    outs: tuple[torch.dtype, ...],
    factor: torch.dtype | None,
    across: bool,
    scale_by: bool,
    dropped: bool,
) -> tuple[Plan, int, int]:
    """The plan, the shares of rows, and the column tiles."""
    tile_r = tile_r(max(ranks))
    rank_tiles = -(-max(ranks) // tile_r)
    if dtype == torch.float32:
        tile_m, tile_c, warps, stages = 16, 64, 4, 3
    else:
        tile_m, tile_c, warps, stages = 32, 128, 8 if tile_r * len(ranks) > 32 else 4, 4
    column_tiles = -(-c // tile_c)
    # two programs to a multiprocessor, of four steps at least
    splits = max(1, min(m // (4 * tile_m), 2 * device.multiprocessors // (rank_tiles * column_tiles)))
    steps = -(-m // (splits * tile_m))
    splits = -(-m // (steps * tile_m))
    c_align, stride_align = math.gcd(c, 8), math.gcd(stride, 8)
    r_align = math.gcd(*ranks, 8)
    constants = (
        c_align, stride_align, r_align, across, 2 if dtype == torch.float16 else 1, pieces(dtype, outs),
        0 if factor is None else pieces(dtype, (factor,)), tile_m, tile_r, tile_c,
    )  # fmt: skip
    padded = (*(r // r_align for r in ranks), 0, 0)[:JOINT]
    key = (device.number, "column sums", dtype, len(outs), factor, scale_by, dropped, constants)
    plan = Plan(
        _column_sums_kernel,
        (rank_tiles, column_tiles, splits),
        (m, c // c_align, stride // stride_align, *padded, steps, *constants),
        dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True),
        HANDLES.setdefault(key, {}),
    )
    return plan, splits, column_tiles


@functools.lru_cache(maxsize=4096)
def _sum_plan(device: Device, size: int, splits: int, dtype: torch.dtype) -> Plan:
    align = math.gcd(size, 8)
    return Plan(
        _sum_kernel,
        (-(-size // SUM_WIDTH), 1, 1),
        (size // align, splits, align, SUM_WIDTH),
        dict(num_warps=4, enable_fp_fusion=True),
        HANDLES.setdefault((device.number, "sum", dtype, align), {}),
    )


def _summed(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum over the first dimension, in order."""
    if partial.shape[0] == 1 and dtype == partial.dtype:
        return partial[0]
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    plan = _sum_plan(device_of(partial.device), out.numel(), partial.shape[0], dtype)
    plan.launch((partial, out), True)
    return out


def _column_sums(
    x: torch.Tensor,
    hs: Sequence[torch.Tensor | None],
    seeds: Sequence[torch.Tensor | None],
    dtypes: Sequence[torch.dtype],
    across: bool,
    scaling: float,
    scale_by: torch.Tensor | None,
    threshold: int,
    factor: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """scaling drop(x)^T h of each h, of these dtypes, [C, R] if across and else [R, C]; and, with a factor
    [C, R], scaling x factor, float32 [M, R]. With a factor there is one h, or None."""
    m, c = x.shape
    ranks = [factor.shape[1]] if factor is not None else [h.shape[1] for h in hs if h is not None]
    sums: list[torch.Tensor] = []
    product = None
    for together in _passes(len(hs), max(ranks, default=1)):
        own, masks = [hs[i] for i in together], [seeds[i] for i in together]
        kinds = () if own[0] is None else tuple(dtypes[i] for i in together)
        plan, splits, column_tiles = _column_sums_plan(
            device_of(x.device), m, c, x.stride(0) if m > 1 else c, x.dtype,
            tuple(ranks[i] for i in together),
            kinds, None if factor is None else factor.dtype, across, scale_by is not None,
            masks[0] is not None,
        )  # fmt: skip
        shapes = [(c, ranks[i]) if across else (ranks[i], c) for i in together][: len(kinds)]
        outs = [torch.empty(splits, *shape, dtype=torch.float32, device=x.device) for shape in shapes]
        if factor is not None:
            product = torch.empty(column_tiles, m, ranks[0], dtype=torch.float32, device=x.device)
        plan.launch(
            (
                x, *_three(own), *_three(masks), scale_by, factor, *_three(outs), product, scaling, threshold
            ),
            alignment_of(x, *own, *masks, scale_by, factor),
        )  # fmt: skip
        sums += [_summed(out, dtype) for out, dtype in zip(outs, kinds, strict=True)]
    return sums, None if product is None else _summed(product, torch.float32)


@functools.lru_cache(maxsize=4096)
def _widen_plan(
    device: Device,
    m: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    factor: torch.dtype | None,
    wide: bool,
    given: tuple[bool, ...],
) -> Plan:
    n_align, r_align = math.gcd(n, 8), math.gcd(rank, 8) or 8
    tile_m, tile_n = (64, 64) if dtype == torch.float32 else (16 if m <= 16 else 64, 128)
    constants = (n_align, r_align, wide, tile_m, tile_n, tile_r(rank or 1))
    return Plan(
        _widen_kernel,
        (-(-m // tile_m), -(-n // tile_n), 1),
        (m, n // n_align, rank // r_align, *constants),
        dict(num_warps=4, enable_fp_fusion=True),
        HANDLES.setdefault((device.number, "widen", dtype, factor, given, constants), {}),
    )


def _widen(
    term: LowRank | None,
    out: torch.Tensor,
    wide: bool,
    previous: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """out [M, N] = out_scale (previous + term) + bias; previous may be out itself."""
    m, n = out.shape
    h, factor, scaling, scale_by, seed, threshold = term or (None, None, 1.0, None, None, 0)
    tensors = (h, factor, scale_by, seed, previous, out_scale, bias)
    plan = _widen_plan(
        device_of(out.device), m, n, 0 if h is None else h.shape[1], out.dtype,
        None if factor is None else factor.dtype, wide, tuple(t is not None for t in tensors),
    )  # fmt: skip
    plan.launch((*tensors, out, scaling, threshold), alignment_of(*tensors))


# the backend


def supports(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if (reason := refuse(x.device)) is not None:
        return reason
    for p in projections:
        n, k, rank = p.shape
        if isinstance(p.weight, WeightTensors):
            if (reason := lowbit_linear.supports_grad_x(x, p.weight)) is not None:
                return reason
        elif x.numel() // max(1, x.shape[-1]) >= 2**31:
            return f"{x.numel() // x.shape[-1]} rows are more than 2**31 - 1"
        if 0 in (n, k):
            return f"w has shape {[n, k]}, which leaves nothing to do"
        if x.numel() // max(1, x.shape[-1]) * rank >= 2**31:
            return f"{x.numel() // x.shape[-1]} rows of rank {rank} are more than 2**31 - 1 numbers"
    return None


def supports_backward(
    grads: tuple[torch.Tensor, ...],
    x: torch.Tensor | None,
    projections: tuple[LoraArgs, ...],
    hs: tuple[torch.Tensor | None, ...],
    dropout_p: float,
    wanted: Any,
) -> str | None:
    """None when `run_backward` can serve the call, else the reason."""
    return supports(grads[0], projections, dropout_p)


def _threshold(dropout_p: float) -> int:
    """The unsigned threshold in an int32, the one type that Triton gives it whatever its value."""
    t = dropout.threshold(dropout_p) if dropout_p else 0
    return t - 2**32 if t >= 2**31 else t


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def run(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> list[torch.Tensor]:
    """The outputs, of x's dtype and leading shape, then each h = drop(x) A^T, float32 [rows, r]."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return run(x, projections, dropout_p)
    rows = as_matrix(x)
    m = rows.shape[0]
    active = [p for p in projections if p.shape[2] and m]
    found = _shrink_all(
        rows, [p.lora_A.contiguous() for p in active], [p.seed if dropout_p else None for p in active], False,
        1 / (1 - dropout_p), None, _threshold(dropout_p),
    )  # fmt: skip
    ys, hs = [], []
    for p in projections:
        if p.shape[2] and m:
            h = found.pop(0)
            term = LowRank(h, p.lora_B.contiguous(), p.scaling, p.scale_by)
        else:
            h, term = torch.empty(m, p.shape[2], dtype=torch.float32, device=x.device), None
        hs.append(h)
        if isinstance(p.weight, WeightTensors):
            ys.append(lowbit_linear.run(x, p.weight, p.bias, p.out_scale, term))
        else:
            ys.append(_dense_forward(rows, p, term).view(*x.shape[:-1], p.shape[0]))
    return ys + hs


def _dense_forward(x: torch.Tensor, p: LoraArgs, term: LowRank | None) -> torch.Tensor:
    assert isinstance(p.weight, torch.Tensor)
    bias, out_scale = _contiguous(p.bias), _contiguous(p.out_scale)
    if term is None and out_scale is None:
        return torch.nn.functional.linear(x, p.weight, bias)
    y = torch.empty(x.shape[0], p.weight.shape[0], dtype=x.dtype, device=x.device)
    if out_scale is None:
        _widen(term, y, False, bias=bias)
        return y.addmm_(x, p.weight.t())
    torch.mm(x, p.weight.t(), out=y)
    if y.numel():
        _widen(term, y, False, y, out_scale, bias)
    return y


def run_backward(
    grads: tuple[torch.Tensor, ...],
    x: torch.Tensor | None,
    projections: tuple[LoraArgs, ...],
    hs: tuple[torch.Tensor | None, ...],
    dropout_p: float,
    wanted: Any,
) -> list[torch.Tensor]:
    """The gradient of x, then of each projection lora_A's and lora_B's; empty for one not wanted."""
    like = grads[0]
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            return run_backward(grads, x, projections, hs, dropout_p, wanted)
    threshold, inverse = _threshold(dropout_p), 1 / (1 - dropout_p)
    rows = [as_matrix(g) for g in grads]
    m = rows[0].shape[0]
    seeds = [p.seed if dropout_p else None for p in projections]
    grad_x = like.new_empty(*like.shape[:-1], projections[0].shape[1]) if wanted.x and not m else None
    # zeros where there is nothing to sum; nothing, or not yet, else
    grad_a, grad_b = (
        [t.new_zeros(t.shape if w and (not m or 0 in t.shape) else 0) for t, w in zip(ts, wants, strict=True)]
        for ts, wants in (
            ([p.lora_A for p in projections], wanted.lora_A),
            ([p.lora_B for p in projections], wanted.lora_B),
        )
    )
    gbs: dict[int, torch.Tensor] = {}
    active = [i for i, p in enumerate(projections) if p.shape[2] and m]
    for i in active:
        p, lora_B = projections[i], projections[i].lora_B.contiguous()
        through = wanted.x or wanted.lora_A[i]
        # also where lora_B is not wanted: GB is the same, bit for bit, whatever is
        fused = through and p.shape[2] <= MOST_FUSED and not _in_halves(rows[i].dtype, lora_B.dtype)
        if wanted.lora_B[i] or fused:
            sums, gb = _column_sums(
                rows[i], [_contiguous(hs[i]) if wanted.lora_B[i] else None], [None], [lora_B.dtype], True,
                p.scaling, p.scale_by, 0, lora_B if fused else None,
            )  # fmt: skip
            grad_b[i : i + 1] = sums or grad_b[i : i + 1]
            if gb is not None:
                gbs[i] = gb
        if through and not fused:
            (gbs[i],) = _shrink_all(rows[i], [lora_B], [None], True, p.scaling, p.scale_by, 0)
    if learning := [i for i in active if wanted.lora_A[i]]:
        assert x is not None
        sums, _ = _column_sums(
            as_matrix(x), [gbs[i] for i in learning], [seeds[i] for i in learning],
            [projections[i].lora_A.dtype for i in learning], False, inverse, None, threshold,
        )  # fmt: skip
        for i, total in zip(learning, sums, strict=True):
            grad_a[i] = total
    if wanted.x and m:
        for i, p in enumerate(projections):
            term = None
            if i in gbs:
                term = LowRank(gbs[i], p.lora_A.contiguous(), inverse, None, seeds[i], threshold)
            if isinstance(p.weight, WeightTensors):
                grad_x = lowbit_linear.run_grad_x(rows[i], p.weight, term, grad_x)
            else:
                grad_x = _dense_grad_x(rows[i], p.weight, term, grad_x)
    found = [like.new_empty(0) if grad_x is None else grad_x.view(*like.shape[:-1], projections[0].shape[1])]
    for both in zip(grad_a, grad_b, strict=True):
        found += both
    return found


def _dense_grad_x(
    grad: torch.Tensor, weight: torch.Tensor, term: LowRank | None, previous: torch.Tensor | None
) -> torch.Tensor:
    """previous + grad W + term, in previous if there is one."""
    if term is None:
        return grad @ weight if previous is None else previous.addmm_(grad, weight)
    out = previous
    if out is None:
        out = torch.empty(grad.shape[0], weight.shape[1], dtype=grad.dtype, device=grad.device)
    _widen(term, out, True, previous)
    return out.addmm_(grad, weight)

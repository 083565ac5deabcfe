"""What lora_linear does in Triton beside the product with W: shrink, column sums and widen.

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
from typing import Any, NamedTuple

import torch

from ...core.device import Device, device_of
from ..core.dropout import keep, row_keys
from ..core.launch import Plan, alignment_of, dtype_of, jit, planned, tl
from .lowbit_linear import NO_TERM, LowRank, Stretch, Term, add_low_rank, tile_r

# what goes to a kernel together


class Three(NamedTuple):
    """What up to three projections of one x have, tensors; None from where there is none."""

    a: Any
    b: Any = None
    c: Any = None


class Aligned(NamedTuple):
    """By what C, the stride of x and the ranks are divided on their way to a kernel; constants."""

    C: int
    Stride: int
    R: int


class Products(NamedTuple):
    """How a pass multiplies; constants.

    Attributes:
        Across: whether a factor, or a sum, is [C, R] and not [R, C].
        XPieces, Pieces: pieces of bfloat16 of x, and of what it is multiplied with; 0: in x's dtype.
        FactorPieces: those of the factor of column sums.
    """

    Across: bool
    XPieces: int
    Pieces: int
    FactorPieces: int = 0


class ShrinkTiles(NamedTuple):
    """Rows, ranks and columns of a step of a shrink, and whether the product with W begins before it ends;
    constants."""

    M: int
    R: int
    K: int
    Overlap: bool


class SumTiles(NamedTuple):
    """Rows of a step of column sums, and ranks and columns of a program; constants."""

    M: int
    R: int
    C: int


class WidenTiles(NamedTuple):
    """A program's tile of a widening, and the ranks of a step; by what N and R are divided on their way to
    it; whether the factor is [R, N] (Wide) or [N, R]; constants."""

    M: int
    N: int
    R: int
    NAlign: int
    RAlign: int
    Wide: bool


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
    acc, tile, first, second, seed, threshold, factor, column, rank, K, R, k, Product
):  # fmt: skip
    """acc + drop(tile) factor^T for the columns from k on; factor [R, K], or [K, R] if Across."""
    there = column < K - k
    if Product.Across:
        at = (k + column).to(tl.int64)[:, None] * R + rank[None, :]
        f = tl.load(factor + at, mask=there[:, None] & (rank < R)[None, :], other=0.0)
    else:
        at = rank.to(tl.int64)[:, None] * K + (k + column)[None, :]
        f = tl.load(factor + at, mask=(rank < R)[:, None] & there[None, :], other=0.0).T
    if seed is not None:
        tile = tl.where(keep(first[:, None], second[:, None], (k + column)[None, :], threshold), tile, 0.0)
    return dot_exactly(tile, f, acc, tile.dtype, Product.XPieces, Product.Pieces)


@jit
def _store_h(acc, out, scaling, scale_by, m, rank, M, R):
    if scale_by is not None:
        scaling *= tl.load(scale_by)
    mask = (m < M)[:, None] & (rank < R)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * R + rank[None, :], acc * scaling, mask=mask)


_INTEGERS = ["threshold", "M", "C", "stride", "R0", "R1", "R2", "rank_tiles", "steps", "splits", "size"]


@jit(do_not_specialize=_INTEGERS)
def _shrink_kernel(
    x, factors, seeds, scale_by, outs, scaling, threshold, M, C, stride, R0, R1, R2, rank_tiles, Align,
    Product, Tile,
):  # fmt: skip
    """out = scaling drop(x) factor^T, float32 [M, R], of up to three factors and masks; x is [M, C].

    Programs next to one another have the same rows, so that x is read from memory once for all ranks.
    """
    C *= Align.C
    R0 *= Align.R
    R1 *= Align.R
    R2 *= Align.R
    if Tile.Overlap:
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(0) // rank_tiles * Tile.M + tl.arange(0, Tile.M)
    rank = tl.program_id(0) % rank_tiles * Tile.R + tl.arange(0, Tile.R)
    column = tl.arange(0, Tile.K)
    x_at = x + m.to(tl.int64)[:, None] * (stride.to(tl.int64) * Align.Stride) + column[None, :]
    first0, second0 = row_keys(seeds.a, m)
    first1, second1 = row_keys(seeds.b, m)
    first2, second2 = row_keys(seeds.c, m)
    acc0 = tl.zeros((Tile.M, Tile.R), tl.float32)
    acc1 = acc0
    acc2 = acc0
    for k in range(0, C, Tile.K):
        tile = tl.load(x_at + k, mask=(m < M)[:, None] & (column < C - k)[None, :], other=0.0)
        acc0 = _shrink(
            acc0, tile, first0, second0, seeds.a, threshold, factors.a, column, rank, C, R0, k, Product
        )  # fmt: skip
        if factors.b is not None:
            acc1 = _shrink(
                acc1, tile, first1, second1, seeds.b, threshold, factors.b, column, rank, C, R1, k, Product
            )  # fmt: skip
        if factors.c is not None:
            acc2 = _shrink(
                acc2, tile, first2, second2, seeds.c, threshold, factors.c, column, rank, C, R2, k, Product
            )  # fmt: skip
    _store_h(acc0, outs.a, scaling, scale_by, m, rank, M, R0)
    if factors.b is not None:
        _store_h(acc1, outs.b, scaling, scale_by, m, rank, M, R1)
    if factors.c is not None:
        _store_h(acc2, outs.c, scaling, scale_by, m, rank, M, R2)


@jit
def _column_sum(
    acc, tile, h, seed, threshold, row, column, rank, M, R, Product
):  # fmt: skip
    """acc [Tile.R, Tile.C] + h^T drop(tile), h float32 [M, R]."""
    mask = (row < M)[:, None] & (rank < R)[None, :]
    low = tl.load(h + row.to(tl.int64)[:, None] * R + rank[None, :], mask=mask, other=0.0)
    if seed is not None:
        first, second = row_keys(seed, row)
        tile = tl.where(keep(first[:, None], second[:, None], column[None, :], threshold), tile, 0.0)
    return dot_exactly(low.T, tile, acc, tile.dtype, Product.Pieces, Product.XPieces)


@jit
def _store_sums(acc, out, scaling, column, rank, C, R, Across: tl.constexpr):
    """acc [Tile.R, Tile.C] to this share's [R, C] of out, or to its [C, R] if Across."""
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
    x, hs, seeds, scale_by, factor, outs, product, scaling, threshold, M, C, stride, R0, R1, R2, steps, Align,
    Product, Tile,
):  # fmt: skip
    """out = scaling drop(x)^T h of up to three h and masks, float32, over the program's `steps` steps of
    Tile.M rows of x [M, C]: [shares, C, R] if Across, else [shares, R, C].

    With a factor [C, R] also the part of scaling x factor that these columns give: product [column tiles, M,
    R].
    """
    C *= Align.C
    R0 *= Align.R
    R1 *= Align.R
    R2 *= Align.R
    rank = tl.program_id(0) * Tile.R + tl.arange(0, Tile.R)
    column = tl.program_id(1) * Tile.C + tl.arange(0, Tile.C)
    begin = tl.program_id(2) * steps * Tile.M
    end = tl.minimum(begin + steps * Tile.M, M)
    row = tl.arange(0, Tile.M)
    x_at = x + column[None, :]
    row_stride = stride.to(tl.int64) * Align.Stride
    if scale_by is not None:
        scaling *= tl.load(scale_by)
    if factor is not None:
        f_mask = (column < C)[:, None] & (rank < R0)[None, :]
        f = tl.load(factor + column.to(tl.int64)[:, None] * R0 + rank[None, :], mask=f_mask, other=0.0)
        product += tl.program_id(1).to(tl.int64) * M * R0
    acc0 = tl.zeros((Tile.R, Tile.C), tl.float32)
    acc1 = acc0
    acc2 = acc0
    for at in range(begin, end, Tile.M):
        m = at + row
        mask = (m < M)[:, None] & (column < C)[None, :]
        tile = tl.load(x_at + m.to(tl.int64)[:, None] * row_stride, mask=mask, other=0.0)
        if hs.a is not None:
            acc0 = _column_sum(acc0, tile, hs.a, seeds.a, threshold, m, column, rank, M, R0, Product)
        if hs.b is not None:
            acc1 = _column_sum(acc1, tile, hs.b, seeds.b, threshold, m, column, rank, M, R1, Product)
        if hs.c is not None:
            acc2 = _column_sum(acc2, tile, hs.c, seeds.c, threshold, m, column, rank, M, R2, Product)
        if factor is not None:
            part = tl.zeros((Tile.M, Tile.R), tl.float32)
            part = dot_exactly(tile, f, part, tile.dtype, Product.XPieces, Product.FactorPieces)
            part_mask = (m < M)[:, None] & (rank < R0)[None, :]
            tl.store(product + m.to(tl.int64)[:, None] * R0 + rank[None, :], part * scaling, mask=part_mask)
    if hs.a is not None:
        _store_sums(acc0, outs.a, scaling, column, rank, C, R0, Product.Across)
    if hs.b is not None:
        _store_sums(acc1, outs.b, scaling, column, rank, C, R1, Product.Across)
    if hs.c is not None:
        _store_sums(acc2, outs.c, scaling, column, rank, C, R2, Product.Across)


@jit(do_not_specialize=_INTEGERS)
def _sum_kernel(partial, out, size, splits, Row):
    """out [size] = the sum of partial [splits, size], in order."""
    size *= Row.Align
    at = tl.program_id(0).to(tl.int64) * Row.Width + tl.arange(0, Row.Width)
    acc = tl.zeros((Row.Width,), tl.float32)
    for split in range(splits):
        acc += tl.load(partial + split * size.to(tl.int64) + at, mask=at < size, other=0.0)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < size)


@jit(do_not_specialize=["threshold", "M", "N", "R"])
def _widen_kernel(
    term, previous, out_scale, bias, out, scaling, threshold, M, N, R, Tile
):  # fmt: skip
    """out [M, N] = out_scale (previous + scaling drop'(h factor)) + bias; factor [R, N] if Wide, else [N, R].

    A program has a tile of out; what it writes bounds it.
    """
    N *= Tile.NAlign
    R *= Tile.RAlign
    m = tl.program_id(0) * Tile.M + tl.arange(0, Tile.M)
    n = tl.program_id(1) * Tile.N + tl.arange(0, Tile.N)
    Float: tl.constexpr = out.dtype.element_ty
    if term.scale_by is not None:
        scaling *= tl.load(term.scale_by)
    acc = tl.zeros((Tile.M, Tile.N), tl.float32)
    if term.h is not None:
        acc = add_low_rank(acc, term.h, term.factor, scaling, m, n, M, N, R, Float, Tile.Wide, Tile.R)
    if term.seed is not None:
        first, second = row_keys(term.seed, m)
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


# launches

JOINT = 3  # projections of one x in one pass
MOST_JOINT = 96  # ranks of all projections of a pass together: sums that fit the registers
MOST_FUSED = 16  # rank up to which GB's partial sums are half the bytes of a second pass over dY
SUM_WIDTH = 512
_PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def in_halves(x: torch.dtype, other: torch.dtype) -> bool:
    """Whether x itself is multiplied in pieces; they leave no registers for two products."""
    return x == torch.float16 and other != x


def pieces(x: torch.dtype, others: tuple[torch.dtype, ...]) -> int:
    """In how many pieces of bfloat16 an operand beside x is multiplied; 0: in x's dtype."""
    if x == torch.float32 or all(other == x for other in others):
        return 0
    return max(_PIECES[other] for other in others)


def pieces_of_x(x: torch.dtype) -> int:
    """In how many pieces x is multiplied, where it is."""
    return 2 if x == torch.float16 else 1


def _stage(device: Device) -> int:
    """Bytes of a stage of a shrink of which four fit a program; on the way, they hide memory's latency."""
    return (32 if device.arch.roomy else 20) << 10


def _ranks(ranks: tuple[int, ...], align: int) -> tuple[int, ...]:
    """R0, R1 and R2."""
    return (*(r // align for r in ranks), 0, 0)[:JOINT]


def _passes(count: int, rank: int) -> list[range]:
    """The projections that go together, pass by pass."""
    together = max(1, min(JOINT, MOST_JOINT // tile_r(rank)))
    return [range(i, min(i + together, count)) for i in range(0, count, together)]


class Pass(NamedTuple):
    """What the plan of a shrink, or of column sums, depends on.

    Attributes:
        m, c, stride, dtype: of x [m, c]; elements between its rows.
        ranks: of the projections.
        others: dtypes of a shrink's factors, or of the results of column sums; none where there are none.
        factor: of the factor of column sums, or None.
        across: see `Products`.
        scale_by, dropped: whether there is a scale on the device; whether there are masks.
    """

    m: int
    c: int
    stride: int
    dtype: torch.dtype
    ranks: tuple[int, ...]
    others: tuple[torch.dtype, ...]
    factor: torch.dtype | None
    across: bool
    scale_by: bool
    dropped: bool


@functools.lru_cache(maxsize=4096)
def _shrink_plan(device: Device, p: Pass) -> Plan:
    ranks = tile_r(max(p.ranks))
    rank_tiles = -(-max(p.ranks) // ranks)
    # the tallest tile that still gives most multiprocessors one
    enough = 3 * device.multiprocessors // 4
    tile_m = next((t for t in (64, 32) if -(-p.m // t) * rank_tiles >= enough), 16)
    if p.dtype == torch.float32:
        tile_k, stages = 16, 3
    else:
        column = tile_m * p.dtype.itemsize + ranks * sum(f.itemsize for f in p.others)
        tile_k, stages = min(512, max(32, 1 << (_stage(device) // column).bit_length() - 1)), 4
    align = Aligned(math.gcd(p.c, 8), math.gcd(p.stride, 8), math.gcd(*p.ranks, 8))
    return planned(
        device,
        _shrink_kernel,
        (rank_tiles * -(-p.m // tile_m), 1, 1),
        (p.m, p.c // align.C, p.stride // align.Stride, *_ranks(p.ranks, align.R), rank_tiles),
        (
            align,
            Products(p.across, pieces_of_x(p.dtype), pieces(p.dtype, p.others)),
            ShrinkTiles(tile_m, ranks, tile_k, device.arch.overlaps and not p.across),
        ),
        (p.dtype, p.others, p.scale_by, p.dropped),
        num_warps=min(4, tile_m * ranks // 128),  # no more than have sums of their own
        num_stages=stages,
        enable_fp_fusion=True,
    )


def shrink(
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
        own, masks = [factors[i] for i in together], [seeds[i] for i in together]
        p = Pass(
            m, c, x.stride(0) if m > 1 else c, x.dtype, tuple(ranks[i] for i in together),
            tuple(f.dtype for f in own), None, across, scale_by is not None, masks[0] is not None,
        )  # fmt: skip
        results = Three(*(outs[i] for i in together))
        _shrink_plan(device_of(x.device), p).launch(
            (x, Three(*own), Three(*masks), scale_by, results, scaling, threshold),
            alignment_of(x, *own, *masks, scale_by),
        )
    return outs


class SumPlan(NamedTuple):
    """The plan of column sums, the shares of rows, and the column tiles."""

    plan: Plan
    shares: int
    column_tiles: int


@functools.lru_cache(maxsize=4096)
def _column_sums_plan(device: Device, p: Pass) -> SumPlan:
    ranks = tile_r(max(p.ranks))
    rank_tiles = -(-max(p.ranks) // ranks)
    if p.dtype == torch.float32:
        tile, warps, stages = SumTiles(16, ranks, 64), 4, 3
    else:
        tile, warps, stages = SumTiles(32, ranks, 128), 8 if ranks * len(p.ranks) > 32 else 4, 4
    column_tiles = -(-p.c // tile.C)
    # two programs to a multiprocessor, of four steps at least
    shares = max(1, min(p.m // (4 * tile.M), 2 * device.multiprocessors // (rank_tiles * column_tiles)))
    steps = -(-p.m // (shares * tile.M))
    shares = -(-p.m // (steps * tile.M))
    align = Aligned(math.gcd(p.c, 8), math.gcd(p.stride, 8), math.gcd(*p.ranks, 8))
    of_factor = 0 if p.factor is None else pieces(p.dtype, (p.factor,))
    plan = planned(
        device,
        _column_sums_kernel,
        (rank_tiles, column_tiles, shares),
        (p.m, p.c // align.C, p.stride // align.Stride, *_ranks(p.ranks, align.R), steps),
        (align, Products(p.across, pieces_of_x(p.dtype), pieces(p.dtype, p.others), of_factor), tile),
        (p.dtype, len(p.others), p.factor, p.scale_by, p.dropped),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    return SumPlan(plan, shares, column_tiles)


@functools.lru_cache(maxsize=4096)
def _sum_plan(device: Device, size: int, splits: int, dtype: torch.dtype) -> Plan:
    row = Stretch(math.gcd(size, 8), SUM_WIDTH)
    return planned(
        device, _sum_kernel, (-(-size // row.Width), 1, 1), (size // row.Align, splits), (row,), dtype,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _summed(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum over the first dimension, in order."""
    if partial.shape[0] == 1 and dtype == partial.dtype:
        return partial[0]
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    plan = _sum_plan(device_of(partial.device), out.numel(), partial.shape[0], dtype)
    plan.launch((partial, out), True)
    return out


def column_sums(
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
        p = Pass(
            m, c, x.stride(0) if m > 1 else c, x.dtype, tuple(ranks[i] for i in together), kinds,
            dtype_of(factor), across, scale_by is not None, masks[0] is not None,
        )  # fmt: skip
        plan, shares, column_tiles = _column_sums_plan(device_of(x.device), p)
        shapes = [(c, ranks[i]) if across else (ranks[i], c) for i in together][: len(kinds)]
        outs = [torch.empty(shares, *shape, dtype=torch.float32, device=x.device) for shape in shapes]
        if factor is not None:
            product = torch.empty(column_tiles, m, ranks[0], dtype=torch.float32, device=x.device)
        results = Three(*outs) if outs else Three(None)
        plan.launch(
            (x, Three(*own), Three(*masks), scale_by, factor, results, product, scaling, threshold),
            alignment_of(x, *own, *masks, scale_by, factor),
        )
        sums += [_summed(out, dtype) for out, dtype in zip(outs, kinds, strict=True)]
    return sums, None if product is None else _summed(product, torch.float32)


@functools.lru_cache(maxsize=4096)
def _widen_plan(
    device: Device, m: int, n: int, rank: int, dtype: torch.dtype, wide: bool, kind: tuple[Any, ...]
) -> Plan:
    tile_m, tile_n = (64, 64) if dtype == torch.float32 else (16 if m <= 16 else 64, 128)
    tile = WidenTiles(tile_m, tile_n, tile_r(rank or 1), math.gcd(n, 8), math.gcd(rank, 8) or 8, wide)
    return planned(
        device,
        _widen_kernel,
        (-(-m // tile.M), -(-n // tile.N), 1),
        (m, n // tile.NAlign, rank // tile.RAlign),
        (tile,),
        (dtype, kind),
        num_warps=4,
        enable_fp_fusion=True,
    )


def widen(
    low_rank: LowRank | None,
    out: torch.Tensor,
    wide: bool,
    previous: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """out [M, N] = out_scale (previous + the low-rank term) + bias; previous may be out itself. The factor is
    [R, N] if wide, else [N, R]."""
    m, n = out.shape
    h, factor, scaling, scale_by, seed, threshold = low_rank or NO_TERM
    rank = 0 if h is None else h.shape[1]
    tensors = (h, factor, scale_by, seed, previous, out_scale, bias)
    kind = (dtype_of(factor), *(t is not None for t in tensors))
    plan = _widen_plan(device_of(out.device), m, n, rank, out.dtype, wide, kind)
    term = Term(h, factor, scale_by, seed)
    plan.launch((term, previous, out_scale, bias, out, scaling, threshold), alignment_of(*tensors))

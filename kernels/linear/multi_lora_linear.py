"""multi_lora_linear in Triton: y[m] += s (x[m] A^T) B^T, with A, B and s of the adapter that row m asks for.

Two kernels for up to FEW_ROWS rows, three beyond; all read ids, addresses, ranks and scales on the device, so
the launches depend on shapes alone. Rows of no adapter leave at once, having read their id.

Few rows (decode), in no order, on the FMA units:
- shrink: a program has one row, TileR ranks and one stretch of TileK columns, and waits for nothing but the
  row's id and address: of [TileR, TileK] of A each thread asks for 128 bytes at once, a warp for 512 bytes of
  a row. Sums go to partial [splits, M, R], float32, R being the largest rank.
- expand: a program has one row and TileN columns of y. [TileN, TileR] of B, 128 bytes a thread and one piece
  of memory where the rank is TileR, and y are on their way while the partial sums are added, in order.
Bound by the bytes of A and B, 2 r (K + N) a row in 16 bits. They are read once where rows ask for different
adapters; rows that share one find it in L2, so no mix takes longer than as many adapters as rows. At 64 rows
of rank 16, K = N = 4096, bfloat16: 16.8 MB beside the 33.6 MB of the base's W, 1.0 MB of y, read and written,
and 66 KB of partial sums a split, which stay in L2.

Many rows (prefill), on the tensor cores:
- sort: program e counts the rows of the adapters below e and of e, and writes the latter to its own slots of
  `order`, TileM rows a slot, the last padded with -1. Its first slot is begin // TileM + e, which leaves room
  for whatever padding those below need: no program waits for another, and M // TileM + E slots hold all.
- shrink: a program has a slot, TileR ranks and a share of K: gathered rows of x [TileM, TileK] and A [TileR,
  TileK], three stages of them.
- expand: a program has a slot and `strip` tiles of TileN columns: y += s h B^T on gathered rows of y.
Bound by reading and writing y, 4 N bytes a row in 16 bits, and reading x; the products are r (1 / N + 1 / K)
of the base's.

Precision: sums are float32. Few rows are multiplied in float32. Many are multiplied in 16 bits where x and
the adapters have one 16-bit dtype, h rounded to it as plain PyTorch has it; in float32 otherwise.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from ...core.device import Device, device_of
from ...ops.linear.multi_lora_args import Adapters, count_of, is_stacked, table
from ..core.launch import Plan, alignment_of, as_matrix, jit, planned, refuse, tl
from ..core.products import multiply_add
from .multi_lora_linear_tiles import FEW_ROWS, choose_few, choose_many, power

# what goes to a kernel together


class Matrices(NamedTuple):
    """A's or B's of all adapters: one tensor of them, or where each begins, int64 [E]; the other is None."""

    stacked: Any
    addresses: Any


class Aligned(NamedTuple):
    """By what K, N, the ranks and the stride of x are divided on their way to a kernel, and whether all
    adapters begin at multiples of 16 bytes; constants."""

    K: int
    N: int
    R: int
    Stride: int
    Adapters: bool


class ShrinkTiles(NamedTuple):
    """What a program of a shrink works on; constants.

    Attributes:
        M, K, R: rows of a slot, columns of a step, ranks.
        Even: whether every step is whole.
    """

    M: int
    K: int
    R: int
    Even: bool


class ExpandTiles(NamedTuple):
    """What a program of an expand works on; constants.

    Attributes:
        M, N, R: rows of a slot, columns of y, ranks at a time.
        Splits: partial sums of h.
        Single: whether no rank is above R.
    """

    M: int
    N: int
    R: int
    Splits: int
    Single: bool


class SortTiles(NamedTuple):
    """Rows of a slot, and rows that are looked at at a time; constants."""

    M: int
    Block: int


# kernels


@jit
def _matrix(matrices, e, elements, Align, Float: tl.constexpr):
    """The adapter e of stacked ones, or of those whose addresses these are."""
    if matrices.stacked is not None:
        return matrices.stacked + e * elements
    else:
        at = tl.load(matrices.addresses + e).to(tl.pointer_type(Float))
        if Align.Adapters:
            at = tl.multiple_of(at, 16)
        return at


@jit
def _rank(ranks, e, R, RAlign: tl.constexpr):
    """The rank of adapter e: R, that of all, or the e-th of ranks, of which R is the largest."""
    if ranks is None:
        return R
    else:
        return tl.multiple_of(tl.load(ranks + e).to(tl.int32), RAlign)


# a new length is no reason to compile: K, N, R and stride come divided by their Align
_INTEGERS = ["M", "N", "K", "R", "E", "stride", "steps", "strip", "slots"]


@jit(do_not_specialize=_INTEGERS)
def _few_shrink_kernel(
    x, lora_A, ranks, ids, partial, M, K, R, E, stride, Align, Tile, Float: tl.constexpr,
):  # fmt: skip
    """partial [splits, M, R] = x A^T over the columns of each split. Tile.Even: every split is whole."""
    R *= Align.R
    K *= Align.K
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    e = tl.load(ids + row).to(tl.int64)
    if (e < 0) | (e >= E):
        return
    rank = _rank(ranks, e, R, Align.R)
    r = tl.program_id(2) * Tile.R + tl.arange(0, Tile.R)
    if tl.program_id(2) * Tile.R >= rank:
        return
    a = _matrix(lora_A, e, rank.to(tl.int64) * K, Align, Float)
    k = split * Tile.K + tl.arange(0, Tile.K)
    a_at = a + r[:, None] * K + k[None, :]
    x_at = x + row * (stride.to(tl.int64) * Align.Stride) + k
    if Tile.Even:
        a_tile = tl.load(a_at, mask=(r < rank)[:, None], other=0.0)
        x_row = tl.load(x_at)
    else:
        a_tile = tl.load(a_at, mask=(r < rank)[:, None] & (k < K)[None, :], other=0.0)
        x_row = tl.load(x_at, mask=k < K, other=0.0)
    h = tl.sum(a_tile.to(tl.float32) * x_row.to(tl.float32)[None, :], axis=1)
    tl.store(partial + (split * M + row) * R + r, h, mask=r < rank)


@jit
def _products(b, partial, n, row, first, rank, M, N, R, TileR: tl.constexpr, Splits: tl.constexpr):
    """h times rows n of b, [TileN, TileR] float32, from rank `first` on."""
    r = first + tl.arange(0, TileR)
    b_tile = tl.load(
        b + n.to(tl.int64)[:, None] * rank + r[None, :],
        mask=(n < N)[:, None] & (r < rank)[None, :],
        other=0.0,
    )
    h = tl.zeros((TileR,), tl.float32)
    for split in tl.static_range(Splits):
        h += tl.load(partial + (M.to(tl.int64) * split + row) * R + r, mask=r < rank, other=0.0)
    return b_tile.to(tl.float32) * h[None, :]


@jit(do_not_specialize=_INTEGERS)
def _few_expand_kernel(
    y, lora_B, ranks, scaling, ids, partial, M, N, R, E, Align, Tile, Float: tl.constexpr,
):  # fmt: skip
    """y += s h B^T with h the sum of the partial ones."""
    R *= Align.R
    row = tl.program_id(0).to(tl.int64)
    e = tl.load(ids + row).to(tl.int64)
    if (e < 0) | (e >= E):
        return
    rank = _rank(ranks, e, R, Align.R)
    b = _matrix(lora_B, e, rank.to(tl.int64) * N, Align, Float)
    n = tl.program_id(1) * Tile.N + tl.arange(0, Tile.N)
    y_at = y + row * N + n
    before = tl.load(y_at, mask=n < N, other=0.0)
    scale = tl.load(scaling + e)
    # ranks are summed in the end, in the layout in which B is read
    products = _products(b, partial, n, row, 0, rank, M, N, R, Tile.R, Tile.Splits)
    if not Tile.Single:
        for first in range(Tile.R, rank, Tile.R):
            products += _products(b, partial, n, row, first, rank, M, N, R, Tile.R, Tile.Splits)
    acc = tl.sum(products, axis=1)
    tl.store(y_at, (before.to(tl.float32) + scale * acc).to(y.dtype.element_ty), mask=n < N)


@jit(do_not_specialize=_INTEGERS)
def _sort_kernel(ids, order, M, E, slots, Tile):
    """order [slots, Tile.M] = the rows of each adapter, in slots of its own, -1 where there is none."""
    e = tl.program_id(0)
    lane = tl.arange(0, Tile.Block)
    below = tl.zeros((Tile.Block,), tl.int32)
    own = tl.zeros((Tile.Block,), tl.int32)
    for at in range(0, M, Tile.Block):
        row = at + lane
        which = tl.load(ids + row, mask=row < M, other=-1)
        below += ((which >= 0) & (which < e)).to(tl.int32)
        own += (which == e).to(tl.int32)
    begin = tl.sum(below)
    place = (begin // Tile.M + e) * Tile.M
    end = ((begin + tl.sum(own)) // Tile.M + e + 1) * Tile.M
    end = tl.where(e == E - 1, slots * Tile.M, end)
    for at in range(0, M, Tile.Block):
        row = at + lane
        mine = (tl.load(ids + row, mask=row < M, other=-1) == e).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine) - 1, row, mask=mine != 0)
        place += tl.sum(mine)
    for at in range(place, end, Tile.Block):
        tl.store(order + at + lane, tl.full((Tile.Block,), -1, tl.int32), mask=at + lane < end)


@jit(do_not_specialize=_INTEGERS)
def _shrink_kernel(
    x, lora_A, ranks, ids, order, partial, M, K, R, stride, steps, Align, Tile, Float: tl.constexpr,
):  # fmt: skip
    """partial [splits, M, R] = x A^T for the rows of a slot."""
    R *= Align.R
    K *= Align.K
    slot = tl.program_id(0)
    any_row = tl.load(order + slot * Tile.M)
    if any_row < 0:
        return
    e = tl.load(ids + any_row).to(tl.int64)
    rank = _rank(ranks, e, R, Align.R)
    if tl.program_id(2) * Tile.R >= rank:
        return
    r = tl.program_id(2) * Tile.R + tl.arange(0, Tile.R)
    row = tl.load(order + slot * Tile.M + tl.arange(0, Tile.M))
    there = row >= 0
    row = tl.maximum(row, 0).to(tl.int64)
    column = tl.arange(0, Tile.K)
    a_at = _matrix(lora_A, e, rank.to(tl.int64) * K, Align, Float)
    a_at += r[:, None] * K + column[None, :]
    x_at = x + row[:, None] * (stride.to(tl.int64) * Align.Stride) + column[None, :]
    Product: tl.constexpr = Float if Float == x.dtype.element_ty else tl.float32
    begin = tl.program_id(1) * steps * Tile.K
    end = tl.minimum(begin + steps * Tile.K, K)
    acc = tl.zeros((Tile.M, Tile.R), tl.float32)
    for k in range(begin, end, Tile.K):
        if Tile.Even:
            x_tile = tl.load(x_at + k, mask=there[:, None], other=0.0)
            a_tile = tl.load(a_at + k, mask=(r < rank)[:, None], other=0.0)
        else:
            inside = (column < K - k)[None, :]
            x_tile = tl.load(x_at + k, mask=there[:, None] & inside, other=0.0)
            a_tile = tl.load(a_at + k, mask=(r < rank)[:, None] & inside, other=0.0)
        acc = multiply_add(x_tile.to(Product), a_tile.to(Product).T, acc)
    to = partial + (tl.program_id(1) * M + row)[:, None] * R + r[None, :]
    tl.store(to, acc, mask=there[:, None] & (r < rank)[None, :])


@jit
def _sums(partial, row, there, first, rank, M, R, TileR: tl.constexpr, Splits: tl.constexpr):
    """h [TileM, TileR] of these rows from rank `first` on: the partial sums, in order of the splits."""
    r = first + tl.arange(0, TileR)
    at = partial + row[:, None] * R + r[None, :]
    mask = there[:, None] & (r < rank)[None, :]
    h = tl.load(at, mask=mask, other=0.0)
    for split in tl.static_range(1, Splits):
        h += tl.load(at + M.to(tl.int64) * R * split, mask=mask, other=0.0)
    return h


@jit
def _times_b(h, b, n, first, rank, N, acc, Product: tl.constexpr, TileR: tl.constexpr):
    """acc + h times rows n of b, transposed, from rank `first` on."""
    r = first + tl.arange(0, TileR)
    b_tile = tl.load(
        b + n.to(tl.int64)[:, None] * rank + r[None, :],
        mask=(n < N)[:, None] & (r < rank)[None, :],
        other=0.0,
    )
    return multiply_add(h.to(Product), b_tile.to(Product).T, acc)


@jit(do_not_specialize=_INTEGERS)
def _expand_kernel(
    y, lora_B, ranks, scaling, ids, order, partial, M, N, R, strip, Align, Tile, Float: tl.constexpr,
):  # fmt: skip
    """y += s h B^T for the rows of a slot and `strip` tiles of columns, h the sum of the partial ones: where
    no rank is above Tile.R it stays in registers."""
    R *= Align.R
    N *= Align.N
    slot = tl.program_id(0)
    any_row = tl.load(order + slot * Tile.M)
    if any_row < 0:
        return
    e = tl.load(ids + any_row).to(tl.int64)
    rank = _rank(ranks, e, R, Align.R)
    scale = tl.load(scaling + e)
    row = tl.load(order + slot * Tile.M + tl.arange(0, Tile.M))
    there = row >= 0
    row = tl.maximum(row, 0).to(tl.int64)
    b = _matrix(lora_B, e, rank.to(tl.int64) * N, Align, Float)
    h = _sums(partial, row, there, 0, rank, M, R, Tile.R, Tile.Splits)
    Product: tl.constexpr = Float if Float == y.dtype.element_ty else tl.float32
    first_tile = tl.program_id(1) * strip
    for tile in range(first_tile, tl.minimum(first_tile + strip, tl.cdiv(N, Tile.N))):
        n = tile * Tile.N + tl.arange(0, Tile.N)
        y_at = y + row[:, None] * N + n[None, :]
        inside = there[:, None] & (n < N)[None, :]
        before = tl.load(y_at, mask=inside, other=0.0)
        acc = _times_b(h, b, n, 0, rank, N, tl.zeros((Tile.M, Tile.N), tl.float32), Product, Tile.R)
        if not Tile.Single:
            for first in range(Tile.R, rank, Tile.R):
                more = _sums(partial, row, there, first, rank, M, R, Tile.R, Tile.Splits)
                acc = _times_b(more, b, n, first, rank, N, acc, Product, Tile.R)
        tl.store(y_at, (before.to(tl.float32) + scale * acc).to(y.dtype.element_ty), mask=inside)


# the backend


def supports(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if (reason := refuse(x.device)) is not None:
        return reason
    for name, adapters in (("lora_A", lora_A), ("lora_B", lora_B)):
        for e, t in enumerate(adapters):
            if not t.is_contiguous():
                return f"{name}[{e}] is not contiguous"
    if y.numel() >= 2**31 and y.numel() // y.shape[-1] >= 2**31:
        return f"{y.numel() // y.shape[-1]} rows are more than 2**31 - 1"
    return None


class Stored(NamedTuple):
    """How adapters are stored: what a plan depends on.

    Attributes:
        adapters: how many.
        stacked: whether they are one tensor, not addresses.
        most, align: the largest rank, and what all ranks are multiples of.
        aligned: whether all begin at multiples of 16 bytes.
        a_dtype, b_dtype: of A and of B.
    """

    adapters: int
    stacked: bool
    most: int
    align: int
    aligned: bool
    a_dtype: torch.dtype
    b_dtype: torch.dtype


class Problem(NamedTuple):
    """What a plan depends on: x [m, k], whose rows are `stride` elements apart, y [m, n], the adapters, and
    the dtypes of x and of the ids."""

    m: int
    n: int
    k: int
    stride: int
    stored: Stored
    dtype: torch.dtype
    ids_dtype: torch.dtype


class Plans(NamedTuple):
    """The launches of a call, and the shapes of what they hand on."""

    sort: Plan | None
    shrink: Plan
    expand: Plan
    partial: tuple[int, int, int]
    order: tuple[int, int] | None


def _float(dtype: torch.dtype) -> Any:
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


@functools.lru_cache(maxsize=4096)
def _plans(device: Device, p: Problem) -> Plans:
    return _few_plans(device, p) if p.m <= FEW_ROWS else _many_plans(device, p)


def _aligned(p: Problem) -> Aligned:
    return Aligned(
        math.gcd(p.k, 8), math.gcd(p.n, 8), p.stored.align, math.gcd(p.stride, 8), p.stored.aligned
    )


def _few_plans(device: Device, p: Problem) -> Plans:
    most, align = p.stored.most, _aligned(p)
    few = choose_few(p.m, p.n, p.k, most, max(p.stored.a_dtype.itemsize, p.stored.b_dtype.itemsize))
    kind = (p.stored.stacked, p.dtype, p.ids_dtype)
    shrink = planned(
        device,
        _few_shrink_kernel,
        (p.m, few.splits, -(-most // few.shrink_r)),
        (p.m, p.k // align.K, most // align.R, p.stored.adapters, p.stride // align.Stride),
        (
            align._replace(N=1),
            ShrinkTiles(1, few.shrink_k, few.shrink_r, p.k % few.shrink_k == 0),
            _float(p.stored.a_dtype),
        ),
        kind,
        num_warps=few.shrink_warps,
        num_stages=3,
        enable_fp_fusion=True,
    )
    expand = planned(
        device,
        _few_expand_kernel,
        (p.m, -(-p.n // few.expand_n), 1),
        (p.m, p.n, most // align.R, p.stored.adapters),
        (
            align._replace(K=1, N=1, Stride=1),
            ExpandTiles(1, few.expand_n, few.expand_r, few.splits, most <= few.expand_r),
            _float(p.stored.b_dtype),
        ),
        kind,
        num_warps=few.expand_warps,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return Plans(None, shrink, expand, (few.splits, p.m, most), None)


def _many_plans(device: Device, p: Problem) -> Plans:
    stored, align = p.stored, _aligned(p)
    wide = max(p.dtype.itemsize, stored.a_dtype.itemsize, stored.b_dtype.itemsize)
    wide = wide if p.dtype == stored.a_dtype else 4
    many = choose_many(p.m, p.n, p.k, stored.adapters, stored.most, wide, device.multiprocessors)
    kind = (stored.stacked, p.dtype, p.ids_dtype)
    sort = planned(
        device, _sort_kernel, (stored.adapters, 1, 1), (p.m, stored.adapters, many.slots),
        (SortTiles(many.tile_m, power(p.m, 1024)),), p.ids_dtype,
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    shrink = planned(
        device,
        _shrink_kernel,
        (many.slots, many.splits, -(-stored.most // many.tile_r)),
        (p.m, p.k // align.K, stored.most // align.R, p.stride // align.Stride, many.steps),
        (
            align._replace(N=1),
            ShrinkTiles(many.tile_m, many.tile_k, many.tile_r, p.k % many.tile_k == 0),
            _float(stored.a_dtype),
        ),
        kind,
        num_warps=many.shrink_warps,
        num_stages=3,
        enable_fp_fusion=True,
    )
    expand = planned(
        device,
        _expand_kernel,
        (many.slots, -(-p.n // (many.tile_n * many.strip)), 1),
        (p.m, p.n // align.N, stored.most // align.R, many.strip),
        (
            align._replace(K=1, Stride=1),
            ExpandTiles(many.tile_m, many.tile_n, many.tile_r, many.splits, stored.most <= many.tile_r),
            _float(stored.b_dtype),
        ),
        kind,
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )
    return Plans(sort, shrink, expand, (many.splits, p.m, stored.most), (many.slots, many.tile_m))


def run(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
) -> None:
    """y += the adapters' part, in place. The arguments have passed the op's check and `supports`."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return run(y, x, lora_A, lora_B, scaling, adapter_ids)
    count, stacked = count_of(lora_A), is_stacked(lora_A)
    n, k = y.shape[-1], x.shape[-1]
    if y.numel() == 0 or count == 0 or k == 0:
        return None
    addresses_a = addresses_b = ranks = None
    if stacked:
        most = lora_A[0].shape[1]
        align, aligned = math.gcd(most, 16), True
    else:
        entries, most, align, aligned = table(lora_A, lora_B)
        addresses_a, addresses_b, ranks = entries
    if most == 0:
        return None
    x, ids, scaling = as_matrix(x), adapter_ids.reshape(-1).contiguous(), scaling.contiguous()
    m = x.shape[0]
    stored = Stored(count, stacked, most, align, aligned, lora_A[0].dtype, lora_B[0].dtype)
    problem = Problem(m, n, k, x.stride(0) if m > 1 else k, stored, x.dtype, ids.dtype)
    plans = _plans(device_of(x.device), problem)
    a = Matrices(lora_A[0] if stacked else None, addresses_a)
    b = Matrices(lora_B[0] if stacked else None, addresses_b)
    partial = torch.empty(plans.partial, dtype=torch.float32, device=x.device)
    order: tuple[torch.Tensor, ...] = ()
    if plans.sort is not None:
        assert plans.order is not None
        order = (torch.empty(plans.order, dtype=torch.int32, device=x.device),)
        plans.sort.launch((ids, *order), alignment_of(ids))
    plans.shrink.launch((x, a, ranks, ids, *order, partial), alignment_of(x, *a, ranks, ids))
    plans.expand.launch(
        (y, b, ranks, scaling, ids, *order, partial), alignment_of(y, *b, ranks, scaling, ids)
    )
    return None

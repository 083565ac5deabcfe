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
from ..core.launch import HANDLES, Plan, alignment_of, as_matrix, jit, refuse
from ..core.products import multiply_add

try:
    import triton.language as tl
except ImportError:  # supports() says why this backend is not used
    tl = None

FEW_ROWS = 64


@jit
def _matrix(stacked, addresses, e, elements, Float: tl.constexpr, Aligned: tl.constexpr):
    """The adapter e of stacked ones, or of those whose addresses these are."""
    if stacked is not None:
        return stacked + e * elements
    else:
        at = tl.load(addresses + e).to(tl.pointer_type(Float))
        if Aligned:
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
    x, lora_A, addresses, ranks, ids, partial, M, K, R, E, stride,
    Float: tl.constexpr, Aligned: tl.constexpr, KAlign: tl.constexpr, RAlign: tl.constexpr,
    StrideAlign: tl.constexpr, Even: tl.constexpr, TileK: tl.constexpr, TileR: tl.constexpr,
):  # fmt: skip
    """partial [splits, M, R] = x A^T over the columns of each split. Even: every split is whole."""
    R *= RAlign
    K *= KAlign
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    e = tl.load(ids + row).to(tl.int64)
    if (e < 0) | (e >= E):
        return
    rank = _rank(ranks, e, R, RAlign)
    r = tl.program_id(2) * TileR + tl.arange(0, TileR)
    if tl.program_id(2) * TileR >= rank:
        return
    a = _matrix(lora_A, addresses, e, rank.to(tl.int64) * K, Float, Aligned)
    k = split * TileK + tl.arange(0, TileK)
    a_at = a + r[:, None] * K + k[None, :]
    x_at = x + row * (stride.to(tl.int64) * StrideAlign) + k
    if Even:
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
    y, lora_B, addresses, ranks, scaling, ids, partial, M, N, R, E,
    Float: tl.constexpr, Aligned: tl.constexpr, RAlign: tl.constexpr, TileN: tl.constexpr,
    TileR: tl.constexpr, Splits: tl.constexpr, Single: tl.constexpr,
):  # fmt: skip
    """y += s h B^T with h the sum of the partial ones. Single: no rank is above TileR."""
    R *= RAlign
    row = tl.program_id(0).to(tl.int64)
    e = tl.load(ids + row).to(tl.int64)
    if (e < 0) | (e >= E):
        return
    rank = _rank(ranks, e, R, RAlign)
    b = _matrix(lora_B, addresses, e, rank.to(tl.int64) * N, Float, Aligned)
    n = tl.program_id(1) * TileN + tl.arange(0, TileN)
    y_at = y + row * N + n
    before = tl.load(y_at, mask=n < N, other=0.0)
    scale = tl.load(scaling + e)
    # ranks are summed in the end, in the layout in which B is read
    products = _products(b, partial, n, row, 0, rank, M, N, R, TileR, Splits)
    if not Single:
        for first in range(TileR, rank, TileR):
            products += _products(b, partial, n, row, first, rank, M, N, R, TileR, Splits)
    acc = tl.sum(products, axis=1)
    tl.store(y_at, (before.to(tl.float32) + scale * acc).to(y.dtype.element_ty), mask=n < N)


@jit(do_not_specialize=_INTEGERS)
def _sort_kernel(ids, order, M, E, slots, TileM: tl.constexpr, Block: tl.constexpr):
    """order [slots, TileM] = the rows of each adapter, in slots of its own, -1 where there is none."""
    e = tl.program_id(0)
    lane = tl.arange(0, Block)
    below = tl.zeros((Block,), tl.int32)
    own = tl.zeros((Block,), tl.int32)
    for at in range(0, M, Block):
        row = at + lane
        which = tl.load(ids + row, mask=row < M, other=-1)
        below += ((which >= 0) & (which < e)).to(tl.int32)
        own += (which == e).to(tl.int32)
    begin = tl.sum(below)
    place = (begin // TileM + e) * TileM
    end = ((begin + tl.sum(own)) // TileM + e + 1) * TileM
    end = tl.where(e == E - 1, slots * TileM, end)
    for at in range(0, M, Block):
        row = at + lane
        mine = (tl.load(ids + row, mask=row < M, other=-1) == e).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine) - 1, row, mask=mine != 0)
        place += tl.sum(mine)
    for at in range(place, end, Block):
        tl.store(order + at + lane, tl.full((Block,), -1, tl.int32), mask=at + lane < end)


@jit(do_not_specialize=_INTEGERS)
def _shrink_kernel(
    x, lora_A, addresses, ranks, ids, order, partial, M, K, R, stride, steps,
    Float: tl.constexpr, Aligned: tl.constexpr, Product: tl.constexpr, KAlign: tl.constexpr,
    RAlign: tl.constexpr, StrideAlign: tl.constexpr, Even: tl.constexpr, TileM: tl.constexpr,
    TileK: tl.constexpr, TileR: tl.constexpr,
):  # fmt: skip
    """partial [splits, M, R] = x A^T for the rows of a slot. Even: K is a multiple of TileK."""
    R *= RAlign
    K *= KAlign
    slot = tl.program_id(0)
    any_row = tl.load(order + slot * TileM)
    if any_row < 0:
        return
    e = tl.load(ids + any_row).to(tl.int64)
    rank = _rank(ranks, e, R, RAlign)
    if tl.program_id(2) * TileR >= rank:
        return
    r = tl.program_id(2) * TileR + tl.arange(0, TileR)
    row = tl.load(order + slot * TileM + tl.arange(0, TileM))
    there = row >= 0
    row = tl.maximum(row, 0).to(tl.int64)
    column = tl.arange(0, TileK)
    a_at = _matrix(lora_A, addresses, e, rank.to(tl.int64) * K, Float, Aligned)
    a_at += r[:, None] * K + column[None, :]
    x_at = x + row[:, None] * (stride.to(tl.int64) * StrideAlign) + column[None, :]
    begin = tl.program_id(1) * steps * TileK
    end = tl.minimum(begin + steps * TileK, K)
    acc = tl.zeros((TileM, TileR), tl.float32)
    for k in range(begin, end, TileK):
        if Even:
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
    y, lora_B, addresses, ranks, scaling, ids, order, partial, M, N, R, strip,
    Float: tl.constexpr, Aligned: tl.constexpr, Product: tl.constexpr, NAlign: tl.constexpr,
    RAlign: tl.constexpr, TileM: tl.constexpr, TileN: tl.constexpr, TileR: tl.constexpr,
    Splits: tl.constexpr, Single: tl.constexpr,
):  # fmt: skip
    """y += s h B^T for the rows of a slot and `strip` tiles of columns, h the sum of the partial ones.
    Single: no rank is above TileR, so h stays in registers."""
    R *= RAlign
    N *= NAlign
    slot = tl.program_id(0)
    any_row = tl.load(order + slot * TileM)
    if any_row < 0:
        return
    e = tl.load(ids + any_row).to(tl.int64)
    rank = _rank(ranks, e, R, RAlign)
    scale = tl.load(scaling + e)
    row = tl.load(order + slot * TileM + tl.arange(0, TileM))
    there = row >= 0
    row = tl.maximum(row, 0).to(tl.int64)
    b = _matrix(lora_B, addresses, e, rank.to(tl.int64) * N, Float, Aligned)
    h = _sums(partial, row, there, 0, rank, M, R, TileR, Splits)
    first_tile = tl.program_id(1) * strip
    for tile in range(first_tile, tl.minimum(first_tile + strip, tl.cdiv(N, TileN))):
        n = tile * TileN + tl.arange(0, TileN)
        y_at = y + row[:, None] * N + n[None, :]
        inside = there[:, None] & (n < N)[None, :]
        before = tl.load(y_at, mask=inside, other=0.0)
        acc = _times_b(h, b, n, 0, rank, N, tl.zeros((TileM, TileN), tl.float32), Product, TileR)
        if not Single:
            for first in range(TileR, rank, TileR):
                more = _sums(partial, row, there, first, rank, M, R, TileR, Splits)
                acc = _times_b(more, b, n, first, rank, N, acc, Product, TileR)
        tl.store(y_at, (before.to(tl.float32) + scale * acc).to(y.dtype.element_ty), mask=inside)


# which tiles


class Few(NamedTuple):
    """Of the two kernels for few rows: TileR and TileK of shrink, its splits and warps; TileR, TileN and
    warps of expand."""

    shrink_r: int
    shrink_k: int
    splits: int
    shrink_warps: int
    expand_r: int
    expand_n: int
    expand_warps: int


def _power(count: int, most: int) -> int:
    """The power of two that holds count, at most `most`."""
    return min(1 << (max(count, 1) - 1).bit_length(), most)


def choose_few(m: int, n: int, k: int, rank: int, float_bytes: int) -> Few:
    """A thread asks for 128 bytes of A or B at once. Programs are small where rows are few, to spread over
    the machine; where there are more rows, shrink's are large, so that there is less to hand on."""
    elements = (4096 if m <= 4 else 8192 if m <= 32 else 16384) * 2 // float_bytes
    shrink_r = _power(rank, 16)
    shrink_k = _power(k, min(elements // shrink_r, 2048))
    expand_r = _power(rank, 64)
    expand_n = _power(n, min(min(elements, 16384 // float_bytes) // expand_r, 512))
    warps = [_power(tile * float_bytes // 4096, 8) for tile in (shrink_r * shrink_k, expand_r * expand_n)]
    return Few(shrink_r, shrink_k, -(-k // shrink_k), warps[0], expand_r, expand_n, warps[1])


class Many(NamedTuple):
    """Of the three kernels for many rows; `strip` tiles of TileN columns are a program's."""

    tile_m: int
    tile_r: int
    tile_k: int
    splits: int
    steps: int
    shrink_warps: int
    tile_n: int
    strip: int
    slots: int


MIN_SPLIT = 512  # columns of x that a program sums at least


def choose_many(
    m: int, n: int, k: int, count: int, rank: int, float_bytes: int, multiprocessors: int
) -> Many:
    """Slots of 32 rows where adapters have as many on average, else of 16. K is split until two programs come
    to a multiprocessor. Columns of y go in strips, so that empty slots, of which there may be one an adapter,
    are few programs."""
    tile_m = 32 if m >= 32 * count and float_bytes == 2 else 16
    tile_r = max(16, _power(rank, 64))
    tile_k = 128 if float_bytes == 2 else 32
    tile_n = 128 if float_bytes == 2 else 64
    slots = m // tile_m + count
    programs = max(1, m // tile_m) * -(-rank // tile_r)
    splits = max(1, min(k // MIN_SPLIT, 2 * multiprocessors // programs))
    steps = max(1, -(-k // (tile_k * splits)))
    splits = max(1, -(-k // (tile_k * steps)))
    tiles = -(-n // tile_n)
    strip = max(1, min(tiles, slots * tiles // (8 * multiprocessors)))
    # a tensor core's instruction has 16 rows and 8 ranks: more warps would repeat one another
    warps = min(4, tile_m * tile_r // 128)
    return Many(tile_m, tile_r, tile_k, splits, steps, warps, tile_n, strip, slots)


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
    """How adapters are stored: what a plan depends on."""

    adapters: int
    stacked: bool
    most: int
    align: int
    aligned: bool
    a_dtype: torch.dtype
    b_dtype: torch.dtype


class Plans(NamedTuple):
    """The launches of a call, and the shapes of what they hand on."""

    sort: Plan | None
    shrink: Plan
    expand: Plan
    partial: tuple[int, int, int]
    order: tuple[int, int] | None


def _float(dtype: torch.dtype) -> Any:
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _product(dtype: torch.dtype, other: torch.dtype) -> Any:
    return _float(dtype if dtype == other else torch.float32)


def _plan(
    device: Device, name: str, kernel: Any, grid: tuple[int, int, int], integers: tuple[int, ...],
    constants: tuple[Any, ...], kind: tuple[Any, ...], warps: int = 4, stages: int = 3,
) -> Plan:  # fmt: skip
    handles = HANDLES.setdefault((device.number, "multi_lora", name, kind, constants, warps), {})
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)
    return Plan(kernel, grid, (*integers, *constants), options, handles)


@functools.lru_cache(maxsize=4096)
def _plans(
    device: Device,
    m: int,
    n: int,
    k: int,
    stride: int,
    stored: Stored,
    dtype: torch.dtype,
    ids_dtype: torch.dtype,
) -> Plans:
    count, stacked, most, align, aligned, a_dtype, b_dtype = stored
    kind = (stacked, dtype, ids_dtype)
    a_float, b_float = _float(a_dtype), _float(b_dtype)
    k_align, stride_align, n_align = math.gcd(k, 8), math.gcd(stride, 8), math.gcd(n, 8)
    rank = most // align
    if m <= FEW_ROWS:
        few = choose_few(m, n, k, most, max(a_dtype.itemsize, b_dtype.itemsize))
        shrink = _plan(
            device, "few_shrink", _few_shrink_kernel, (m, few.splits, -(-most // few.shrink_r)),
            (m, k // k_align, rank, count, stride // stride_align),
            (
                a_float, aligned, k_align, align, stride_align, k % few.shrink_k == 0, few.shrink_k,
                few.shrink_r,
            ),
            kind,
            few.shrink_warps,
        )  # fmt: skip
        expand = _plan(
            device, "few_expand", _few_expand_kernel, (m, -(-n // few.expand_n), 1),
            (m, n, rank, count),
            (b_float, aligned, align, few.expand_n, few.expand_r, few.splits, most <= few.expand_r),
            kind,
            few.expand_warps,
        )  # fmt: skip
        return Plans(None, shrink, expand, (few.splits, m, most), None)
    wide = max(dtype.itemsize, a_dtype.itemsize, b_dtype.itemsize)
    wide = 4 if len({dtype, a_dtype}) > 1 else wide
    many = choose_many(m, n, k, count, most, wide, device.multiprocessors)
    sort = _plan(
        device, "sort", _sort_kernel, (count, 1, 1), (m, count, many.slots),
        (many.tile_m, _power(m, 1024)), kind,
    )  # fmt: skip
    shrink = _plan(
        device, "shrink", _shrink_kernel, (many.slots, many.splits, -(-most // many.tile_r)),
        (m, k // k_align, rank, stride // stride_align, many.steps),
        (
            a_float, aligned, _product(dtype, a_dtype), k_align, align, stride_align, k % many.tile_k == 0,
            many.tile_m, many.tile_k, many.tile_r,
        ),
        kind,
        many.shrink_warps,
    )  # fmt: skip
    strips = -(-n // (many.tile_n * many.strip))
    expand = _plan(
        device, "expand", _expand_kernel, (many.slots, strips, 1),
        (m, n // n_align, rank, many.strip),
        (
            b_float, aligned, _product(dtype, b_dtype), n_align, align, many.tile_m, many.tile_n, many.tile_r,
            many.splits, most <= many.tile_r,
        ),
        kind,
        stages=2,
    )  # fmt: skip
    return Plans(sort, shrink, expand, (many.splits, m, most), (many.slots, many.tile_m))


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
    plans = _plans(
        device_of(x.device), m, n, k, x.stride(0) if m > 1 else k,
        Stored(count, stacked, most, align, aligned, lora_A[0].dtype, lora_B[0].dtype), x.dtype, ids.dtype,
    )  # fmt: skip
    a, b = (lora_A[0], lora_B[0]) if stacked else (None, None)
    partial = torch.empty(plans.partial, dtype=torch.float32, device=x.device)
    order: tuple[torch.Tensor, ...] = ()
    if plans.sort is not None:
        assert plans.order is not None
        order = (torch.empty(plans.order, dtype=torch.int32, device=x.device),)
        plans.sort.launch((ids, *order), alignment_of(ids))
    shrunk = (x, a, addresses_a, ranks, ids)
    plans.shrink.launch((*shrunk, *order, partial), alignment_of(*shrunk))
    expanded = (y, b, addresses_b, ranks, scaling, ids)
    plans.expand.launch((*expanded, *order, partial), alignment_of(*expanded))
    return None

"""decode_attention in Triton: a few queries of each sequence against its cache, split among all programs
(Flash-Decoding: Dao et al., 2023). New keys and values are written first, by append_kv's kernels.

Rows of a tile are the queries of one kv head: all its query heads and all query tokens, TileM at a time, so
that K and V are read from memory once. A program has a stretch of the tiles of TileN tokens of all sequences
of its kv head, one after the other: it finds from the lengths, on the device, where it begins and ends, and
every stretch has the same number of tiles, whatever the lengths. K and V of the next two tiles are on their
way to shared memory. Where a sequence ends, or the stretch does, the piece's sums, float32 [TileM, DimV], and
its row maxima and sums are written, and begin anew. Piece (program x, sequence b) is number x + b of its
head: both only grow along the tiles, so no two are the same. A second kernel adds the pieces of each row in
order: no bit depends on when a program ran.

Bound by bytes: 512 for a token of a kv head in bfloat16, dim 128. A tile of 64 tokens, 32 KB, is 2270 cycles
of a multiprocessor's share of an H100's bandwidth; two programs with two tiles each on their way are seven
times what the latency asks for. Counted for such a tile, with its sectors at their ideal: 1464 instructions
of all warps, 366 cycles to issue; in pages of 16, 2176 and 544, and 0.4% more sectors, the table's. e4m3:
3464, 866 cycles of 1130 that its bytes take. int8: 3400, 850 of 1190, and 1220 of shared memory, which
decoded keys and values pass once more; int4: 3930, 980 of 710, and 1060 of shared memory.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from ...core.device import Device, device_of
from ...core.limits import MAX_HEAD_SIZE
from ...ops.attention.kv_cache import BITS, CacheTensors, DecodeArgs, Rotary
from ..core.launch import Plan, alignment_of, contiguous, dtypes_of, jit, planned, tl
from . import append_kv
from .append_kv import as_bytes, page_of, page_tokens, slot_of, step, strides_of
from .attention_logits import (
    LN_2,
    Forms,
    Numbers,
    Window,
    dot,
    in_unit,
    left_scale,
    logits,
    power,
    product,
    unseen_hidden,
)
from .attention_problem import cap_kind
from .decode_attention_codes import (
    Cached,
    Reading,
    Stored,
    e4m3,
    from_e4m3,
    key_scales,
    located,
    reading,
    scaled,
    value_scales,
)
from .decode_attention_tiles import choose, splits_of
from .layouts import LONGEST, padded
from .rope import rotary_numbers, rotary_tensors, turned

# who has which tiles: the same on every program, from lengths, for one tile of rows, whose queries are those
# from `first` to `last`


class Call(NamedTuple):
    """Numbers that decide it: fields are the kernels' parameters, in their order.

    Attributes:
        batch: sequences; new: tokens of each that were appended; capacity: tokens that each has room for.
        SQ: queries of a sequence; left, right: the window.
        splits: programs of a tile of rows.
        kv_heads, group, m_tiles: heads of keys, query heads of each, and tiles of rows of each.
    """

    batch: Any
    new: Any
    capacity: Any
    SQ: Any
    left: Any
    right: Any
    splits: Any
    kv_heads: Any
    group: Any
    m_tiles: Any


@jit
def _length(seqlens, b, inside, call):
    """Tokens of a sequence with its new ones, held to what there is room for."""
    before = tl.minimum(tl.maximum(tl.load(seqlens + b, mask=inside, other=0), 0), call.capacity)
    return tl.minimum(before + call.new, call.capacity)


@jit
def _extent(length, first, last, call, Size: tl.constexpr, TileN: tl.constexpr):
    """(lo, end, tiles, late, hi, more): tiles of the keys from lo to end, and `more` of those of the tail,
    from late to hi, that the window meets."""
    shift = length - call.SQ
    lo = tl.maximum(first + shift - call.left, 0) // TileN * TileN
    hi = tl.minimum(tl.maximum(last + shift + call.right + 1, 0), length)
    end = hi
    late = hi
    if Size != 0:
        whole = length // Size * Size
        end = tl.minimum(hi, whole)
        late = tl.maximum(lo, whole)
    return (
        lo,
        end,
        tl.cdiv(tl.maximum(end - lo, 0), TileN),
        late,
        hi,
        tl.cdiv(tl.maximum(hi - late, 0), TileN),
    )


@jit
def _shares(
    seqlens, first, last, call, Size: tl.constexpr, TileN: tl.constexpr, TileB: tl.constexpr
):  # fmt: skip
    """The sequences, the tiles of each, those of all, and how many of them a program has."""
    b = tl.arange(0, TileB)
    length = _length(seqlens, b, b < call.batch, call)
    _, _, tiles, _, _, more = _extent(length, first, last, call, Size, TileN)
    tiles = tl.where(b < call.batch, tiles + more, 0)
    total = tl.sum(tiles, 0)
    return b, tiles, total, tl.maximum(tl.cdiv(total, call.splits), 1)


@jit
def _rows_of(m, group, SQ, TileM: tl.constexpr):
    """The first and the last query of a tile of rows."""
    return m * TileM // group, tl.minimum(m * TileM + TileM, SQ * group) // group


# the kernels


class Strides(NamedTuple):
    """Further numbers of the first kernel: fields are its parameters, in their order.

    Attributes:
        pages, most, page_size: pages, entries of the table a sequence, and tokens of a page.
        cos_rows, at_batch: rows of cos, and elements of positions a batch.
        tree_batch, slope_batch: elements of the tree and of the slopes a batch.
        q_batch, q_row, q_head: elements between batches, rows and heads of q.
        k_page, ..., v_head: of the cache, in multiples of its Align.
    """

    pages: int
    most: int
    page_size: int
    cos_rows: int
    at_batch: int
    tree_batch: int
    slope_batch: int
    q_batch: int
    q_row: int
    q_head: int
    k_page: int
    k_slot: int
    k_head: int
    v_page: int
    v_slot: int
    v_head: int


class Heads(NamedTuple):
    """Widths of K's and V's heads; half of the channels that turn, and whether pairs are neighbours;
    constants."""

    Dim: int
    DimV: int
    Half: int
    Interleaved: bool


class Tiles(NamedTuple):
    """Rows and keys of a tile, padded widths of K and V, and a power of two that holds the batch;
    constants."""

    M: int
    N: int
    D: int
    DV: int
    B: int


class MergeTiles(NamedTuple):
    """What the second kernel works on; constants.

    Attributes:
        Dim, D: the width of V, and padded.
        Natural: whether levels are natural.
        Size: tokens that share a scale of K, or 0.
        M, N, B: of the first kernel's `Tiles`.
        P: pieces at a time.
    """

    Dim: int
    D: int
    Natural: bool
    Size: int
    M: int
    N: int
    B: int
    P: int


_INTEGERS = [
    *Call._fields, *Strides._fields,
]  # fmt: skip
_SMALL = [
    "table", "seqlens", "cos", "sin", "positions", "tree", "slopes", "sinks", "levels", "lse",
]  # fmt: skip


@jit
def _halves(x):
    """[R, C] as two of C / 2."""
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@jit
def _scores(q, key):
    """q key^T; in float32 long rows are four sums: one chain loses digits with its length."""
    if q.dtype == tl.float32 and q.shape[1] >= 128:
        q_low, q_high = _halves(q)
        k_low, k_high = _halves(key)
        q0, q1 = _halves(q_low)
        k0, k1 = _halves(k_low)
        q2, q3 = _halves(q_high)
        k2, k3 = _halves(k_high)
        return dot(q0, k0.T, dot(q1, k1.T, dot(q2, k2.T, product(q3, k3.T))))
    else:
        return product(q, key.T)


@jit
def _attend(
    acc, total, top, q, key, value, j, seen, length, i, SQ, numbers, slope, window, tree, Form
):  # fmt: skip
    """Sums, row sums and row maxima, of scores, with the keys j [1, TileN], of which `seen` are there."""
    z, _, scale = logits(_scores(q, key), numbers, slope, None, window, i, j, SQ, length, Form)
    z = tl.where(seen, unseen_hidden(z, i, j, length, window, "window"), float("-inf"))
    if tree is not None:
        own = j - window.shift
        allowed = tl.load(tree + i * SQ + own, mask=(own >= 0) & seen & (i < SQ), other=1)
        z = tl.where(allowed != 0, z, float("-inf"))
    new = tl.maximum(top, tl.max(z, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    p = power((z - base[:, None]) * scale, Form.Natural)  # the largest's exponent is exactly 0
    shrink = power((top - base) * scale, Form.Natural)
    return dot(p.to(value.dtype), value, acc * shrink[:, None]), total * shrink + tl.sum(p, 1), new


@jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _decode_kernel(
    q, cache, table, seqlens, cos, sin, positions, tree, slopes, sums, levels, scale, cap,
    batch, new, capacity, SQ, left, right, splits, kv_heads, group, m_tiles, pages, most, page_size, cos_rows,
    at_batch, tree_batch, slope_batch, q_batch, q_row, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head,
    Head, Form, Cache, Tile,
):  # fmt: skip
    """sums [kv_heads, m_tiles, splits + batch - 1, TileM, DimV] and levels [.., 2, TileM], row maxima in the
    logits' unit and row sums: of piece x + b, what program x has seen of sequence b."""
    Page: tl.constexpr = Cache.Page
    Align: tl.constexpr = Cache.Align
    Bits: tl.constexpr = Cache.Bits
    Size: tl.constexpr = Cache.Size
    call = Call(batch, new, capacity, SQ, left, right, splits, kv_heads, group, m_tiles)
    Vector: tl.constexpr = Page != 0 and Page < Tile.N
    Float: tl.constexpr = q.dtype.element_ty
    m = tl.program_id(0) % m_tiles
    kv_head = tl.program_id(0) // m_tiles % kv_heads
    x = tl.program_id(0) // m_tiles // kv_heads
    first, last = _rows_of(m, group, SQ, Tile.M)
    bs, tiles, all_tiles, each = _shares(seqlens, first, last, call, Size, Tile.N, Tile.B)
    start = x * each
    stop = tl.minimum(start + each, all_tiles)
    if start >= stop:
        return
    ends = tl.cumsum(tiles, 0)
    b_first = tl.sum(((ends <= start) & (bs < batch)).to(tl.int32), 0)
    b_end = tl.sum(((ends - tiles < stop) & (bs < batch)).to(tl.int32), 0)

    wide = kv_head.to(tl.int64)
    row, column = tl.arange(0, Tile.M), tl.arange(0, Tile.N)
    r = m * Tile.M + row
    i, head = r // group, kv_head * group + r % group
    inside = r < SQ * group
    d, d_v = tl.arange(0, Tile.D), tl.arange(0, Tile.DV)
    byte = tl.arange(0, Tile.D * Bits // 8 if Bits else Tile.D)
    byte_v = tl.arange(0, Tile.DV * Bits // 8 if Bits else Tile.DV)
    k_there = (byte < (Head.Dim * Bits // 8 if Bits else Head.Dim))[None, :]
    v_there = (byte_v < (Head.DimV * Bits // 8 if Bits else Head.DimV))[None, :]
    k = cache.k + wide * k_head * Align
    v = cache.v + wide * v_head * Align
    k_rel, v_rel = byte[None, :], byte_v[None, :]
    if not Vector:
        k_rel = column[:, None] * (k_slot * Align) + byte[None, :]
        v_rel = column[:, None] * (v_slot * Align) + byte_v[None, :]
    k_strides, v_strides = (k_page, k_slot), (v_page, v_slot)
    of_value = 1.0
    if Bits == 8 and Size == 0:
        if cache.k_scales is not None:
            scale *= tl.load(cache.k_scales + kv_head)
        if cache.v_scales is not None:
            of_value = tl.load(cache.v_scales + kv_head)
    numbers = Numbers(scale, cap, 0, 0, 0, 0)
    of_codes = Numbers(scale * Cache.Unit, cap, 0, 0, 0, 0)

    for b in tl.range(b_first, b_end, num_stages=1):
        before = tl.sum(tl.where(bs < b, tiles, 0), 0)
        length = _length(seqlens, b, b < batch, call)
        lo, end, codes, late, hi, more = _extent(length, first, last, call, Size, Tile.N)
        t_first = tl.maximum(start - before, 0)
        t_end = tl.minimum(stop - before, codes + more)
        wide_b = b.to(tl.int64)
        shift = length - SQ
        window = Window(shift, left, right)
        at = tl.maximum(i + shift, 0)
        if positions is not None:
            at = tl.load(positions + wide_b * at_batch + i, mask=inside, other=0)
        q_rows = q + wide_b * q_batch + i.to(tl.int64) * q_row + head.to(tl.int64) * q_head
        known = inside & (at >= 0) & (at < cos_rows)
        q_tile = turned(q_rows, inside, d, cos, sin, at, known, Head.Dim, Head.Half, Head.Interleaved, False)
        slope = slopes
        if slopes is not None:
            slope = tl.load(slopes + wide_b * slope_batch + head, mask=inside, other=0.0)[:, None]
        own_tree = tree
        if tree is not None:
            own_tree = tree + wide_b * tree_batch
        top = tl.full((Tile.M,), float("-inf"), tl.float32)
        total = tl.zeros((Tile.M,), tl.float32)
        acc = tl.zeros((Tile.M, Tile.DV), tl.float32)
        for t in range(t_first, tl.minimum(t_end, codes)):
            n = lo + t * Tile.N
            j = n + column
            # the lines of the table that a page is read from stay in L1 for some tiles
            page, there = page_of(table, b, j if Vector else n, (j if Vector else n) < end, pages, most, Page)
            rows = there & (j < end)
            slot = slot_of(j, Page)
            mask = rows[:, None] & k_there
            key = tl.load(located(k, k_strides, page, n, slot, k_rel, Cache, Vector), mask=mask, other=0)
            mask = rows[:, None] & v_there
            value = tl.load(located(v, v_strides, page, n, slot, v_rel, Cache, Vector), mask=mask, other=0)
            if Size != 0:
                k_scale, k_offset = key_scales(
                    cache, table, b, n, end, kv_head, kv_heads, pages, most, page_size, d, Head.Dim,
                    Cache, Tile.N,
                )  # fmt: skip
                v_scale, v_offset = value_scales(
                    cache, page, slot, rows, kv_head, kv_heads, page_size, Head.DimV, Cache, Tile.DV
                )
                key = scaled(key, k_scale, k_offset, Cache, Float)
                value = scaled(value, v_scale, v_offset, Cache, Float)
            elif Bits == 8:
                key = from_e4m3(key, Cache.Decode, Float)
                value = from_e4m3(value, Cache.Decode, Float)
            acc, total, top = _attend(
                acc, total, top, q_tile, key, value, j[None, :], rows[None, :], end, i[:, None], SQ, of_codes,
                slope, window, own_tree, Form,
            )  # fmt: skip
        if Size != 0:
            acc *= Cache.Unit
            if Form.Positive and Form.Cap == "" and slopes is None:  # scores of codes are in their own unit
                top *= Cache.Unit
            for t in range(tl.maximum(t_first, codes), t_end):
                j = late + (t - codes) * Tile.N + column
                rows = j < hi
                place = ((wide_b * 2 * Size + j % (2 * Size)) * kv_heads + kv_head)[:, None]
                key = tl.load(
                    cache.k_tail + place * Head.Dim + d[None, :],
                    mask=rows[:, None] & (d < Head.Dim)[None, :],
                    other=0.0,
                )
                value = tl.load(
                    cache.v_tail + place * Head.DimV + d_v[None, :],
                    mask=rows[:, None] & (d_v < Head.DimV)[None, :],
                    other=0.0,
                )
                acc, total, top = _attend(
                    acc, total, top, q_tile, key, value, j[None, :], rows[None, :], hi, i[:, None], SQ,
                    numbers, slope, window, own_tree, Form,
                )  # fmt: skip
        piece = (wide * m_tiles + m) * (splits + batch - 1) + x + b
        sums_at = sums + piece * Tile.M * Head.DimV
        mask = inside[:, None] & (d_v < Head.DimV)[None, :]
        tl.store(sums_at + row[:, None] * Head.DimV + d_v[None, :], acc * of_value, mask=mask)
        top *= left_scale(numbers, slopes, None, Form)
        tl.store(levels + piece * 2 * Tile.M + row, top, mask=inside)
        tl.store(levels + (piece * 2 + 1) * Tile.M + row, total, mask=inside)


@jit(do_not_specialize=Call._fields, do_not_specialize_on_alignment=_SMALL)
def _merge_kernel(
    sums, levels, seqlens, sinks, out, lse, batch, new, capacity, SQ, left, right, splits, kv_heads, group,
    m_tiles, Tile,
):  # fmt: skip
    """out [batch, SQ, heads, Dim] and lse [batch, heads, SQ], natural log, of one row's pieces, Tile.P at a
    time, and its sink."""
    call = Call(batch, new, capacity, SQ, left, right, splits, kv_heads, group, m_tiles)
    pid = tl.program_id(0)
    heads = kv_heads * group
    head, i, b = pid % heads, pid // heads % SQ, pid // heads // SQ
    r = i * group + head % group
    m, row = r // Tile.M, r % Tile.M
    first, last = _rows_of(m, group, SQ, Tile.M)
    bs, tiles, _, each = _shares(seqlens, first, last, call, Tile.Size, Tile.N, Tile.B)
    before = tl.sum(tl.where(bs < b, tiles, 0), 0)
    mine = tl.sum(tl.where(bs == b, tiles, 0), 0)
    x = before // each
    count = tl.where(mine > 0, (before + mine - 1) // each + 1 - x, 0)
    piece = ((head // group).to(tl.int64) * m_tiles + m) * (splits + batch - 1) + x + b
    d, p = tl.arange(0, Tile.D), tl.arange(0, Tile.P)
    top, total = float("-inf"), 0.0
    if sinks is not None:
        top = in_unit(tl.load(sinks + head), Tile.Natural)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = tl.zeros((Tile.D,), tl.float32)
    for at in range(0, count, Tile.P):
        there = at + p < count
        which = piece + at + p
        of_top = tl.load(levels + which * 2 * Tile.M + row, mask=there, other=float("-inf"))
        of_total = tl.load(levels + (which * 2 + 1) * Tile.M + row, mask=there, other=0.0)
        mask = there[:, None] & (d < Tile.Dim)[None, :]
        of_sums = tl.load(
            sums + ((which * Tile.M + row) * Tile.Dim)[:, None] + d[None, :], mask=mask, other=0.0
        )
        highest = tl.maximum(top, tl.max(of_top, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = power(of_top - base, Tile.Natural)
        shrink = power(top - base, Tile.Natural)
        acc = acc * shrink + tl.sum(of_sums * weight[:, None], 0)
        total = total * shrink + tl.sum(of_total * weight, 0)
        top = highest
    empty = total == 0.0
    level = top + tl.log(total) if Tile.Natural else (top + tl.log2(total)) * LN_2
    tl.store(lse + (b.to(tl.int64) * heads + head) * SQ + i, tl.where(empty, float("-inf"), level))
    mean = acc * tl.where(empty, 0.0, 1.0 / total)
    tl.store(out + pid.to(tl.int64) * Tile.Dim + d, mean.to(out.dtype.element_ty), mask=d < Tile.Dim)


# the backend


def supports(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor,
    rotary: Rotary,
    a: DecodeArgs,
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if (reason := append_kv.refused(q.device, cache, q.shape[1] if k is None else k.shape[1])) is not None:
        return reason
    if max(q.shape[3], cache.head_dim_v) > MAX_HEAD_SIZE:
        dims = f"{q.shape[3]} and {cache.head_dim_v}"
        return f"head dims {dims} are more than the {MAX_HEAD_SIZE} that its tiles hold"
    if max(q.shape[0] * q.shape[1] * q.shape[2], q.shape[1] ** 2) >= 2**31:
        return f"{q.shape[0]} x {q.shape[1]} queries of {q.shape[2]} heads are too many"
    return None


FARTHEST_KEY = 2 * LONGEST - 1
PIECES = 16  # that the second kernel adds at a time


class Problem(NamedTuple):
    """What a plan depends on.

    Attributes:
        batch, queries, heads, kv_heads, dim, dim_v, dtype: of q and of the cache.
        capacity, format, group_size, channel_group: of the cache.
        page, align: tokens of a page, 0 for none; what the cache's strides are divided by.
        half, interleaved: of rotary embeddings; half is 0 without.
        positive, capped: whether the scale is above 0, and the same for all keys; whether there is a softcap.
        no_sinks: whether there are none.
        dtypes, wide: of all tensors; which numbers are beyond an int32.
    """

    batch: int
    queries: int
    heads: int
    kv_heads: int
    dim: int
    dim_v: int
    dtype: torch.dtype
    capacity: int
    format: str
    group_size: int
    channel_group: int
    page: int
    align: int
    half: int
    interleaved: bool
    positive: bool
    capped: bool
    no_sinks: bool
    dtypes: tuple[torch.dtype | None, ...]
    wide: tuple[bool, ...]


class Plans(NamedTuple):
    """The launches of a call; rows of a tile, tiles of a kv head, and programs of a tile."""

    decode: Plan
    merge: Plan
    tile_m: int
    m_tiles: int
    splits: int


@functools.lru_cache(maxsize=1024)
def _plans(device: Device, p: Problem) -> Plans:
    coded, e4m3s, natural = BITS.get(p.format), p.format == "fp8", p.dtype == torch.float32
    read = reading(coded, p.dtype) if coded else Reading()
    decode = e4m3(p.dtype, device.arch.converts_fp8) if e4m3s and not natural else ""
    bits = coded or (8 if e4m3s else 0)
    size, channels = (p.group_size, p.channel_group) if coded else (0, 0)
    stored = Stored(p.page, p.align, bits, size, channels, *read, decode)
    form = Forms(p.positive, cap_kind(p.dtype, p.capped), False, 0, False, False, natural)
    rows = p.queries * p.heads // p.kv_heads
    tile_d, tile_dv = padded(p.dim), padded(p.dim_v)
    config = choose(device, rows, tile_d, tile_dv, p.dtype.itemsize, bits, p.page)
    tile_m, tile_n, warps, stages, programs = config
    m_tiles = -(-rows // tile_m)
    splits = splits_of(
        p.kv_heads * m_tiles, device.multiprocessors * programs, p.batch * (p.capacity // tile_n + 2)
    )
    tile_b = next(n for n in (64, 512, 1 << (p.batch - 1).bit_length()) if n >= p.batch)
    tile = Tiles(tile_m, tile_n, tile_d, tile_dv, tile_b)
    decode_plan = planned(
        device,
        _decode_kernel,
        (splits * p.kv_heads * m_tiles, 1, 1),
        (),
        (Heads(p.dim, p.dim_v, p.half, p.interleaved), form, stored, tile),
        (p.dtypes, p.wide),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    merge = planned(
        device,
        _merge_kernel,
        (p.batch * p.queries * p.heads, 1, 1),
        (),
        (MergeTiles(p.dim_v, tile_dv, natural, size, tile_m, tile_n, tile_b, PIECES),),
        (p.dtype, p.no_sinks),
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return Plans(decode_plan, merge, tile_m, m_tiles, splits)


def run(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor,
    rotary: Rotary,
    a: DecodeArgs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and lse; the cache has the new keys and values. The arguments have passed the op's check."""
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return run(q, k, v, cache, cache_seqlens, rotary, a)
    batch, queries, heads, dim = q.shape
    dim_v, device, dtype = cache.head_dim_v, q.device, q.dtype
    kv_heads = cache.k.shape[2]
    new = 0
    if k is not None and v is not None:
        new = k.shape[1]
        append_kv.run(k, v, cache, cache_seqlens, rotary)
    out = torch.empty((batch, queries, heads, dim_v), dtype=dtype, device=device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=device)
    if not out.numel():
        return out, lse

    to_k, to_v = as_bytes(cache.k), as_bytes(cache.v)
    align, page = step(to_k, to_v), page_tokens(cache)
    unit = 1.0 if dtype == torch.float32 else math.log2(math.e)
    scale = a.softmax_scale / a.softcap if a.softcap else a.softmax_scale * unit
    left, right = (n if 0 <= n < FARTHEST_KEY else FARTHEST_KEY for n in (a.left, a.right))
    positive = scale > 0 and (cache.format != "fp8" or cache.k_scales is None)
    cos, sin, positions = rotary_tensors(rotary)
    tree = None if a.tree_mask is None else a.tree_mask.contiguous().view(torch.uint8)
    slopes, sinks = contiguous(a.alibi_slopes), contiguous(a.sinks)
    seqlens, table = cache_seqlens.contiguous(), cache.block_table
    q = q if q.stride(-1) == 1 or dim == 1 else q.contiguous()
    cached = Cached(
        to_k, to_v, cache.k_scales, cache.k_offsets, cache.v_scales, cache.v_offsets, cache.k_tail,
        cache.v_tail,
    )  # fmt: skip
    small = (table, seqlens, cos, sin, positions, tree, slopes)
    strides = Strides(
        to_k.shape[0], 0 if table is None else table.shape[1], to_k.shape[1], *rotary_numbers(rotary),
        0 if tree is None or tree.shape[0] == 1 else queries * queries,
        heads if slopes is not None and slopes.dim() == 2 else 0, *strides_of(q, 1),
        *strides_of(to_k, align), *strides_of(to_v, align),
    )  # fmt: skip
    problem = Problem(
        batch, queries, heads, kv_heads, dim, dim_v, dtype, cache.capacity, cache.format, cache.group_size,
        cache.channel_group, page, align, 0 if cos is None else cos.shape[1], rotary.interleaved, positive,
        bool(a.softcap), sinks is None, dtypes_of((q, *cached, *small)), tuple([n >= 2**31 for n in strides]),
    )  # fmt: skip
    decode, merge, tile_m, m_tiles, splits = _plans(device_of(device), problem)
    pieces = kv_heads * m_tiles * (splits + batch - 1)
    sums = torch.empty((pieces, tile_m, dim_v), dtype=torch.float32, device=device)
    levels = torch.empty((pieces, 2, tile_m), dtype=torch.float32, device=device)
    call = (
        batch, new, cache.capacity, queries, left, right, splits, kv_heads, heads // kv_heads, m_tiles
    )  # fmt: skip
    decode.launch(
        (q, cached, *small, sums, levels, scale, a.softcap * unit, *call, *strides),
        alignment_of(q, *cached, sums),
    )
    merge.launch((sums, levels, seqlens, sinks, out, lse, *call), alignment_of(sums, out))
    return out, lse

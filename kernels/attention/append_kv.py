"""append_kv and quantize_kv in Triton: rows of keys and values rotated, quantised and put in their places.

Elements and fp8: a program has TileT new tokens of one kv head, their TileD channels across lanes, 16 bytes a
load. Codes: a program has one group of tokens that share K's scales, of one kv head. If the new tokens make
it whole, it walks the group's tokens, TileT at a time, for the extremes of K's channels, walks them again for
the codes, and makes V's from each token as it passes: what was begun comes from the tail. The program of the
first group, which alone reads the tail, then writes what is left to it: a barrier is all the order there has
to be.

Bound by bytes: in a prefill a row is read once (the second walk hits L1) and written once; a decode step
writes some rows, and is the time of a launch. The arithmetic of codes is that of ops/attention/kv_cache.py,
operation for operation and never fused: no bit differs.

Nothing waits for the device: a token past the end of its cache, or whose page is not there, is left out.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from ...core.device import Device, device_of
from ...ops.attention.kv_cache import BITS, CacheTensors, Rotary
from ..core.launch import Plan, alignment_of, constexpr, dtypes_of, jit, planned, refuse, tl
from .layouts import FARTHEST, LONGEST, padded
from .rope import rotary_numbers, rotary_tensors, turned

FP8_LARGEST, HALF_LARGEST = constexpr(448.0), constexpr(65504.0)
INFINITE, HALF_NAN = constexpr(0x7F800000), constexpr(0x7E00)


@jit
def page_of(table, b, position, inside, pages, most, Page: tl.constexpr):
    """The page of a sequence's positions, and whether it is there; not where not `inside`. Page: tokens of
    one, 0 for a cache without pages."""
    if Page == 0:
        return position * 0 + b, inside
    else:
        page = tl.load(table + b.to(tl.int64) * most + position // Page, mask=inside, other=-1)
        return page, (page >= 0) & (page < pages)


@jit
def slot_of(position, Page: tl.constexpr):
    return position if Page == 0 else position % Page


@jit
def _begin(seqlens, b, capacity, T):
    """The first position and the one behind the last; none of a length that is not one."""
    if seqlens is None:
        return b * 0, b * 0 + T
    else:
        begin = tl.load(seqlens + b)
        end = tl.minimum(tl.minimum(begin, capacity) + T, capacity)
        return begin, tl.where(begin < 0, begin, end)


@jit
def _turn(positions, b, i, position, inside, cos_rows, at_batch):
    """The row of cos for token i, and whether it is there."""
    at = position
    if positions is not None:
        at = tl.load(positions + b.to(tl.int64) * at_batch + i, mask=inside, other=0)
    return at, inside & (at >= 0) & (at < cos_rows)


@jit
def to_e4m3(x):
    """The nearest e4m3, ties to even; past 448 saturates, NaN stays."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    a = magnitude.to(tl.float32, bitcast=True)
    # subnormal: a multiple of 2**-9, the last place of 2**14
    small = (a + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(a < 0.015625, small, normal)
    code = tl.where(a >= FP8_LARGEST, 0x7E, code)
    code = tl.where(magnitude > INFINITE, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


class Numbers(NamedTuple):
    """Numbers of a call: fields are the kernels' parameters, in their order.

    Attributes:
        T, kv_heads: new tokens of a sequence, and their heads.
        capacity: tokens that a sequence has room for.
        pages, most: pages, and entries of the table a sequence.
        cos_rows, at_batch: rows of cos, and elements of positions a batch.
        nk_batch, ..., nv_head: elements between batches, tokens and heads of the new rows, over NewAlign.
        k_page, ..., v_head: of the cache, over Align.
    """

    T: int
    kv_heads: int
    capacity: int
    pages: int
    most: int
    cos_rows: int
    at_batch: int
    nk_batch: int
    nk_row: int
    nk_head: int
    nv_batch: int
    nv_row: int
    nv_head: int
    k_page: int
    k_slot: int
    k_head: int
    v_page: int
    v_slot: int
    v_head: int


class Rows(NamedTuple):
    """Rows of keys and values, and where they go; constants.

    Attributes:
        Dim, DimV: widths of K's and V's.
        NewAlign, Align: what strides of the new rows, and of the cache, are divided by.
        Page: tokens of a page; 0 for no pages.
        Half, Interleaved: half of K's channels that turn; whether pairs are neighbours.
    """

    Dim: int
    DimV: int
    NewAlign: int
    Align: int
    Page: int
    Half: int
    Interleaved: bool


class Codes(NamedTuple):
    """Bits of a code, tokens that share a scale of K, channels that share one of V; constants."""

    Bits: int
    Size: int
    Channels: int


class DenseTiles(NamedTuple):
    """Tokens of a program, padded widths of K and V; constants."""

    T: int
    D: int
    DV: int


class CodeTiles(NamedTuple):
    """Tokens at a time, the padded width of K, and powers of two that hold V's groups and the channels of
    one; constants."""

    T: int
    D: int
    G: int
    C: int


_INTEGERS = [*Numbers._fields, "page_size"]
_SMALL = [
    "seqlens", "table", "positions", "k_scales", "k_offsets", "v_scales", "v_offsets", "k_tail",
    "v_tail",
]  # fmt: skip


@jit
def _put(to, x, scales, head, inside, d, Dim: tl.constexpr):
    if to.dtype.element_ty == tl.uint8:
        x = x.to(tl.float32)
        if scales is not None:
            x = tl.math.div_rn(x, tl.zeros(x.shape, tl.float32) + tl.load(scales + head))
        x = to_e4m3(x)
    tl.store(to[:, None] + d[None, :], x, mask=inside[:, None] & (d < Dim)[None, :])


@jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _dense_kernel(
    new_k, new_v, k, v, k_scales, v_scales, table, seqlens, cos, sin, positions, T, kv_heads, capacity, pages,
    most, cos_rows, at_batch, nk_batch, nk_row, nk_head, nv_batch, nv_row, nv_head, k_page, k_slot, k_head,
    v_page, v_slot, v_head, Row, Tile,
):  # fmt: skip
    """Rows of the queries' dtype, or e4m3 in uint8. Strides of new rows are in multiples of NewAlign
    elements, those of the cache of Align."""
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2)
    wide = b.to(tl.int64)
    begin, end = _begin(seqlens, b, capacity, T)
    i = tl.program_id(0) * Tile.T + tl.arange(0, Tile.T)
    position = begin + i
    inside = position < end
    at, known = _turn(positions, b, i, position, inside, cos_rows, at_batch)
    page, there = page_of(table, b, position, inside, pages, most, Row.Page)
    page, slot = page.to(tl.int64), slot_of(position, Row.Page).to(tl.int64)
    far = i.to(tl.int64)
    d, d_v = tl.arange(0, Tile.D), tl.arange(0, Tile.DV)
    rows = new_k + (wide * nk_batch + far * nk_row + head * nk_head) * Row.NewAlign
    x = turned(rows, there, d, cos, sin, at, known, Row.Dim, Row.Half, Row.Interleaved, False)
    _put(
        k + (page * k_page + slot * k_slot + head * k_head) * Row.Align, x, k_scales, head, there, d, Row.Dim
    )
    rows = new_v + (wide * nv_batch + far * nv_row + head * nv_head) * Row.NewAlign
    x = turned(rows, there, d_v, cos, sin, at, known, Row.DimV, 0, False, False)
    _put(
        v + (page * v_page + slot * v_slot + head * v_head) * Row.Align,
        x,
        v_scales,
        head,
        there,
        d_v,
        Row.DimV,
    )


# codes


@jit
def _not_finite(x):
    """1 where x is an infinity or NaN."""
    return ((x.to(tl.uint32, bitcast=True) & INFINITE) == INFINITE).to(tl.int32)


@jit
def _grid(low, high, bad, Levels: tl.constexpr):
    """Of groups: bits of their scales and offsets as halves, the offset in float32, and 1 / scale, or 0."""
    offset = tl.minimum(tl.maximum(low, -HALF_LARGEST), HALF_LARGEST).to(tl.float16)
    less = offset.to(tl.float32)
    levels = tl.full(low.shape, Levels, tl.float32)
    scale = tl.minimum(tl.maximum(tl.math.div_rn(high - less, levels), 0.0), HALF_LARGEST).to(tl.float16)
    wide = scale.to(tl.float32)
    wrong = (wide == 0.0) | (bad > 0)
    inverse = tl.math.div_rn(tl.full(low.shape, 1.0, tl.float32), tl.where(wrong, 1.0, wide))
    scales = tl.where(bad > 0, HALF_NAN, scale.to(tl.int16, bitcast=True))
    offsets = tl.where(bad > 0, HALF_NAN, offset.to(tl.int16, bitcast=True))
    return scales.to(tl.int16), offsets.to(tl.int16), less, tl.where(wrong, 0.0, inverse)


@jit
def _codes(x, offset, inverse, Levels: tl.constexpr):
    """round((x - offset) * inverse), ties to even: clamped before it is rounded, which gives the same;
    1.5 * 2**23, added, rounds to whole numbers."""
    code = tl.minimum(tl.maximum((x - offset) * inverse, 0.0), Levels)
    return ((code + 12582912.0) - 12582912.0).to(tl.int32).to(tl.uint8)


@jit
def _bytes(codes, Bits: tl.constexpr):
    """Codes of the last dimension packed."""
    if Bits == 8:
        return codes
    elif len(codes.shape) == 2:
        low, high = tl.split(codes.reshape(codes.shape[0], codes.shape[1] // 2, 2))
        return low | (high << 4)
    else:
        low, high = tl.split(codes.reshape(codes.shape[0], codes.shape[1], codes.shape[2] // 2, 2))
        return low | (high << 4)


@jit
def _rows(
    new, tail, b, position, begin, end, head, kv_heads, n_batch, n_row, n_head, Row, Size: tl.constexpr,
    Dim: tl.constexpr,
):  # fmt: skip
    """Where the rows of positions lie: those that are new, and those of the tail."""
    i = (position - begin).to(tl.int64)
    fresh = (position >= begin) & (position < end)
    rows = new + (b * n_batch + i * n_row + head * n_head) * Row.NewAlign
    late = rows
    if tail is not None:
        late = tail + ((b * 2 * Size + position % (2 * Size)) * kv_heads + head) * Dim
    return rows, fresh, late


@jit
def _keys(
    new_k, k_tail, cos, sin, positions, b, position, begin, end, head, kv_heads, d, cos_rows, at_batch,
    nk_batch, nk_row, nk_head, Row, Size: tl.constexpr,
):  # fmt: skip
    """K's rows of positions of a group that is whole."""
    rows, fresh, late = _rows(
        new_k, k_tail, b, position, begin, end, head, kv_heads, nk_batch, nk_row, nk_head, Row, Size, Row.Dim
    )
    at, known = _turn(positions, b, position - begin, position, fresh, cos_rows, at_batch)
    x = turned(rows, fresh, d, cos, sin, at, known, Row.Dim, Row.Half, Row.Interleaved, False).to(tl.float32)
    if k_tail is not None:
        mask = (position < begin)[:, None] & (d < Row.Dim)[None, :]
        old = tl.load(late[:, None] + d[None, :], mask=mask, other=0.0)
        x = tl.where(fresh[:, None], x, old.to(tl.float32))
    return x


@jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _codes_kernel(
    new_k, new_v, k, v, k_scales, k_offsets, v_scales, v_offsets, k_tail, v_tail, table, seqlens, cos, sin,
    positions, T, kv_heads, capacity, pages, most, cos_rows, at_batch, nk_batch, nk_row, nk_head, nv_batch,
    nv_row, nv_head, k_page, k_slot, k_head, v_page, v_slot, v_head, page_size, Row, Code, Tile,
):  # fmt: skip
    """Codes and scales of the groups that become whole, and the tail, where there is one; strides as
    `_dense_kernel` has them, in bytes for codes. V's channels are Tile.G groups of Channels."""
    Levels: tl.constexpr = 2**Code.Bits - 1
    Groups: tl.constexpr = (Row.DimV + Code.Channels - 1) // Code.Channels
    g, head, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin, end = _begin(seqlens, tl.program_id(2), capacity, T)
    if end <= begin:
        return
    first = begin // Code.Size * Code.Size + g * Code.Size
    whole = end // Code.Size * Code.Size
    token, d = tl.arange(0, Tile.T), tl.arange(0, Tile.D)
    group, channel = tl.arange(0, Tile.G), tl.arange(0, Tile.C)
    d_v = group[:, None] * Code.Channels + channel[None, :]
    of_v = ((channel < Code.Channels)[None, :] & (d_v < Row.DimV))[None, :, :]
    if first < whole:
        page, there = page_of(table, tl.program_id(2), first, first < whole, pages, most, Row.Page)
        page, slot = page.to(tl.int64), slot_of(first, Row.Page).to(tl.int64)
        low = tl.full((Tile.D,), float("inf"), tl.float32)
        high = tl.full((Tile.D,), float("-inf"), tl.float32)
        bad = tl.zeros((Tile.D,), tl.int32)
        for t in range(0, Code.Size, Tile.T):
            x = _keys(
                new_k, k_tail, cos, sin, positions, b, first + t + token, begin, end, head, kv_heads, d,
                cos_rows, at_batch, nk_batch, nk_row, nk_head, Row, Code.Size,
            )  # fmt: skip
            low = tl.minimum(low, tl.min(x, 0))
            high = tl.maximum(high, tl.max(x, 0))
            bad = tl.maximum(bad, tl.max(_not_finite(x), 0))
        scales, offsets, less, inverse = _grid(low, high, bad, Levels)
        line = ((page * (page_size // Code.Size) + slot // Code.Size) * kv_heads + head) * Row.Dim + d
        tl.store(k_scales + line, scales, mask=there & (d < Row.Dim))
        tl.store(k_offsets + line, offsets, mask=there & (d < Row.Dim))
        byte = tl.arange(0, Tile.D * Code.Bits // 8)
        for t in range(0, Code.Size, Tile.T):
            x = _keys(
                new_k, k_tail, cos, sin, positions, b, first + t + token, begin, end, head, kv_heads, d,
                cos_rows, at_batch, nk_batch, nk_row, nk_head, Row, Code.Size,
            )  # fmt: skip
            codes = _bytes(_codes(x, less[None, :], inverse[None, :], Levels), Code.Bits)
            to = k + (page * k_page + (slot + t + token) * k_slot + head * k_head) * Row.Align
            tl.store(
                to[:, None] + byte[None, :], codes, mask=there & (byte < Row.Dim * Code.Bits // 8)[None, :]
            )
        byte = tl.arange(0, Tile.C * Code.Bits // 8)
        byte_v = group[:, None] * (Code.Channels * Code.Bits // 8) + byte[None, :]
        of_byte = (byte < Code.Channels * Code.Bits // 8)[None, :] & (byte_v < Row.DimV * Code.Bits // 8)
        for t in range(0, Code.Size, Tile.T):
            position = first + t + token
            rows, fresh, late = _rows(
                new_v, v_tail, b, position, begin, end, head, kv_heads, nv_batch, nv_row, nv_head, Row,
                Code.Size, Row.DimV,
            )  # fmt: skip
            value = tl.load(
                rows[:, None, None] + d_v[None, :, :], mask=fresh[:, None, None] & of_v, other=0.0
            ).to(tl.float32)
            if v_tail is not None:
                old = tl.load(
                    late[:, None, None] + d_v[None, :, :], mask=(position < begin)[:, None, None] & of_v,
                    other=0.0,
                )  # fmt: skip
                value = tl.where(fresh[:, None, None], value, old.to(tl.float32))
            low_v = tl.min(tl.where(of_v, value, float("inf")), 2)
            high_v = tl.max(tl.where(of_v, value, float("-inf")), 2)
            of_scale, of_offset, lowest, step = _grid(low_v, high_v, tl.max(_not_finite(value), 2), Levels)
            line_v = ((page * page_size + slot + t + token) * kv_heads + head) * Groups
            line_v = line_v[:, None] + group[None, :]
            tl.store(v_scales + line_v, of_scale, mask=there & (group < Groups)[None, :])
            tl.store(v_offsets + line_v, of_offset, mask=there & (group < Groups)[None, :])
            codes_v = _bytes(_codes(value, lowest[:, :, None], step[:, :, None], Levels), Code.Bits)
            to_v = v + (page * v_page + (slot + t + token) * v_slot + head * v_head) * Row.Align
            tl.store(to_v[:, None, None] + byte_v[None, :, :], codes_v, mask=there & of_byte[None, :, :])
    if k_tail is not None:
        tl.debug_barrier()  # other lanes have read what is now overwritten
        if g == 0:
            for p in range(tl.maximum(begin, whole - Code.Size), end, Tile.T):
                position = p + token
                x = _keys(
                    new_k, None, cos, sin, positions, b, position, begin, end, head, kv_heads, d, cos_rows,
                    at_batch, nk_batch, nk_row, nk_head, Row, Code.Size,
                )  # fmt: skip
                slots = (b * 2 * Code.Size + position % (2 * Code.Size)) * kv_heads + head
                inside = position < end
                tl.store(
                    k_tail + slots[:, None] * Row.Dim + d[None, :], x.to(k_tail.dtype.element_ty),
                    mask=inside[:, None] & (d < Row.Dim)[None, :],
                )  # fmt: skip
                rows, _, _ = _rows(
                    new_v, None, b, position, begin, end, head, kv_heads, nv_batch, nv_row, nv_head, Row,
                    Code.Size, Row.DimV,
                )  # fmt: skip
                mask = inside[:, None, None] & of_v
                value = tl.load(rows[:, None, None] + d_v[None, :, :], mask=mask, other=0.0)
                tl.store(v_tail + slots[:, None, None] * Row.DimV + d_v[None, :, :], value, mask=mask)


# the backend


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    """float8 as uint8, which every capability reads."""
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


def step(*tensors: torch.Tensor) -> int:
    """How many elements all begin and all strides but the last are multiples of, up to 16 bytes' worth."""
    width = 16 // tensors[0].element_size()
    for t in tensors:
        strides = (s for s, n in zip(t.stride()[:-1], t.shape, strict=False) if n > 1)
        width = math.gcd(width, t.data_ptr() // t.element_size(), *strides)
    return width


def strides_of(t: torch.Tensor, align: int) -> tuple[int, int, int]:
    a, b, c = (s // align if n > 1 else 0 for s, n in zip(t.stride()[:3], t.shape, strict=False))
    return a, b, c


def dense(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def page_tokens(cache: CacheTensors) -> int:
    """Page, as the kernels take it; the one page of a table need not have a power of two."""
    return 0 if cache.block_table is None else 1 << (cache.k.shape[1] - 1).bit_length()


def refused(device: torch.device, cache: CacheTensors, tokens: int) -> str | None:
    """Why no kernel here can take such a cache; None where one can."""
    if (reason := refuse(device)) is not None:
        return reason
    if max(cache.capacity, tokens) >= LONGEST // 2:
        return f"{cache.capacity} tokens of capacity and {tokens} new ones are more than 2**28 - 1"
    if max(cache.k.stride(1), cache.v.stride(1)) >= FARTHEST and cache.k.shape[1] > 1:
        return f"tokens of the cache lie {cache.k.stride(1)} elements apart, which is too far"
    return None


def supports(
    k: torch.Tensor, v: torch.Tensor, cache: CacheTensors, cache_seqlens: torch.Tensor, rotary: Rotary
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return refused(k.device, cache, k.shape[1])


TILE = 4096  # elements


@functools.lru_cache(maxsize=1024)
def _plan(
    device: Device, tokens: int, heads: int, batch: int, row: Rows, code: Codes | None, kind: tuple[Any, ...]
) -> Plan:
    """code: None for rows that are written as they are, or as e4m3."""
    tile_d, tile_dv = padded(row.Dim), padded(row.DimV)
    width = max(tile_d, tile_dv)
    fixed: tuple[Any, ...]
    if code is None:
        tile_t = min(max(1, TILE // width), 1 << (tokens - 1).bit_length())
        fixed = (row, DenseTiles(tile_t, tile_d, tile_dv))
        programs, kernel = -(-tokens // tile_t), _dense_kernel
    else:
        groups, tile_c = -(-row.DimV // code.Channels), 1 << (code.Channels - 1).bit_length()
        tile_g = 1 << (groups - 1).bit_length()
        width = max(width, tile_g * tile_c)
        tile_t = min(code.Size, TILE // width)
        fixed = (row, code, CodeTiles(tile_t, tile_d, tile_g, tile_c))
        programs, kernel = -(-tokens // code.Size), _codes_kernel
    return planned(
        device, kernel, (programs, heads, batch), (), fixed, kind,
        num_warps=4 if tile_t * width >= 2048 else 1, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip


def run(
    k: torch.Tensor,
    v: torch.Tensor,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor | None,
    rotary: Rotary,
) -> None:
    """Write new keys and values, from position 0 on without lengths. The arguments have passed the op's
    check."""
    if k.is_cuda and k.device.index != torch.cuda.current_device():
        with torch.cuda.device(k.device):
            return run(k, v, cache, cache_seqlens, rotary)
    batch, tokens, heads, dim = k.shape
    dim_v, device = v.shape[3], k.device
    if not batch or not tokens:
        return None
    new_k, new_v = dense(k), dense(v)
    to_k, to_v = as_bytes(cache.k), as_bytes(cache.v)
    new_align, align = step(new_k, new_v), step(to_k, to_v)
    cos, sin, positions = rotary_tensors(rotary)
    half = 0 if rotary.cos is None else rotary.cos.shape[1]
    table = cache.block_table
    page = page_tokens(cache)
    codes = cache.format in BITS
    given = (
        (cache.k_scales, cache.k_offsets, cache.v_scales, cache.v_offsets, cache.k_tail, cache.v_tail)
        if codes
        else (cache.k_scales, cache.v_scales)
    )
    stored = tuple(
        t.view(torch.int16) if codes and i < 4 and t is not None else t for i, t in enumerate(given)
    )
    seqlens = None if cache_seqlens is None else cache_seqlens.contiguous()
    tensors = (new_k, new_v, to_k, to_v, *stored, table, seqlens, cos, sin, positions)
    numbers = Numbers(
        tokens, heads, cache.capacity, to_k.shape[0], 0 if table is None else table.shape[1],
        *rotary_numbers(rotary), *strides_of(new_k, new_align), *strides_of(new_v, new_align),
        *strides_of(to_k, align), *strides_of(to_v, align),
    )  # fmt: skip
    row = Rows(dim, dim_v, new_align, align, page, half, rotary.interleaved)
    code = Codes(BITS[cache.format], cache.group_size, cache.channel_group) if codes else None
    kind = (dtypes_of(tensors), tuple([n >= 2**31 for n in numbers]))
    plan = _plan(device_of(device), tokens, heads, batch, row, code, kind)
    page_size = (to_k.shape[1],) if codes else ()
    plan.launch((*tensors, *numbers, *page_size), alignment_of(new_k, new_v, to_k, to_v, cos, sin))
    return None

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

Few bits: the codes of a tile come as bytes to shared memory, and become elements of the queries' dtype in
registers: a byte permute puts a code into the mantissa of a float32, a multiply-add with the scale and what
is left of the offset makes the value, one instruction rounds two. float8's scales are a head's: K's go into
the logits' scale, V's into the sums. The tokens past the last whole group are read from the tail in tiles of
their own, after the others.

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
from ...core.gpus import arch_of
from ...ops.attention.kv_cache import BITS, CacheTensors, DecodeArgs, Rotary
from ..core.decoding import BFLOAT, HALF, decode16
from ..core.launch import HANDLES, Plan, alignment_of, jit
from . import append_kv
from .append_kv import as_bytes, page_of, page_tokens, slot_of, step, strides_of
from .attention_logits import LN_2, dot, in_unit, left_scale, logits, power, product, unseen_hidden
from .attention_problem import cap_kind
from .layouts import LONGEST, MAX_HEAD_DIM, padded
from .rope import rotary_numbers, rotary_tensors, turned

try:
    import triton.language as tl
except ImportError:  # supports() says why this backend is not used
    tl = None


# codes to floats


def _placed(bits: int, into: int, selector: str) -> str:
    """PTX from four bytes to float32: a code in the mantissa of what has the bits `into`."""
    if bits == 8:
        return "\n".join(f"prmt.b32 ${i}, $4, {into:#x}, {selector.format(i)};" for i in range(4))
    lines = ["{ .reg .b32 low, high;", "and.b32 low, $8, 0x0f0f0f0f;"]
    lines += ["shr.u32 high, $8, 4;", "and.b32 high, high, 0x0f0f0f0f;"]
    for i in range(4):
        lines += [f"prmt.b32 ${i}, low, {into:#x}, {selector.format(i)};"]
        lines += [f"prmt.b32 ${4 + i}, high, {into:#x}, {selector.format(i)};"]
    return "\n".join([*lines, "}"])


class Reading(NamedTuple):
    """How codes become numbers.

    Attributes:
        place: PTX from four bytes to codes as float32, times `factor`'s inverse, `base` added; "": as they
            are.
        base, factor: of those.
        unit: what the values of a tile of codes are to be multiplied with.
    """

    place: str = ""
    base: float = 0.0
    factor: float = 1.0
    unit: float = 1.0


def reading(bits: int, dtype: torch.dtype) -> Reading:
    """bfloat16: bits 16 to 23 of zero, the code times 2**-133: exact, and a byte permute with nothing but
    zeros needs no register for them. A scale, up to 2**16, times 2**109 is a float32; so the values are
    2**24 too small, which bfloat16 has room for. float16 has none: there a code of 8 bits counts by ones
    above 2**15, one of 4 above 2**7; that costs 2**-9 of a code's step, which float16's rounding hides.
    """
    if dtype == torch.bfloat16:
        return Reading(_placed(bits, 0, "0x4{}44"), 0.0, 2.0**109, 2.0**24)
    if dtype == torch.float16:
        return (
            Reading(_placed(8, 0x47000000, "0x74{}4"), 2.0**15)
            if bits == 8
            else Reading(_placed(4, 0x43000000, "0x7{}44"), 2.0**7)
        )
    return Reading()


@functools.cache
def _e4m3(dtype: torch.dtype, capability: int) -> str:
    """PTX from four bytes to two registers of two 16-bit floats, of e4m3.

    From capability 8.9 on an instruction makes two halves of two bytes. Before, exponent and mantissa go
    where the wider float has them, times 2**(its bias - 7). A NaN reads as 480 then, the only value past 448:
    times a number that leaves 448 finite it is infinite, and 0 times that is NaN.
    """
    if capability >= 89:
        lines = ["{ .reg .b16 low, high, h<4>; .reg .b32 two<2>; .reg .f32 f<4>; mov.b32 {low, high}, $2;"]
        names = ("$0", "$1") if dtype == torch.float16 else ("two0", "two1")
        lines += [f"cvt.rn.f16x2.e4m3x2 {names[0]}, low;", f"cvt.rn.f16x2.e4m3x2 {names[1]}, high;"]
        if dtype == torch.bfloat16:
            for i in range(2):
                lines += [f"mov.b32 {{h{2 * i}, h{2 * i + 1}}}, two{i};"]
                lines += [f"cvt.f32.f16 f{j}, h{j};" for j in (2 * i, 2 * i + 1)]
                lines += [f"cvt.rn.bf16x2.f32 ${i}, f{2 * i + 1}, f{2 * i};"]
        return "\n".join([*lines, "}"])
    to = HALF if dtype == torch.float16 else BFLOAT
    power = 2.0 ** (to.bias - 7)
    most = 140.0 if to is HALF else 2.0**119 * 1.1
    lines = ["{ .reg .b32 t, u, power, most, none, zero;", f"mov.b32 power, {to.two(power, power)};"]
    lines += [f"mov.b32 most, {to.two(most, most)};", f"mov.b32 none, {to.two(-0.0, -0.0)};"]
    lines += ["mov.b32 zero, 0;"]
    for i, pair in enumerate(("0x1404", "0x3424")):
        lines += [f"prmt.b32 t, $2, 0, {pair};", "and.b32 u, t, 0x7f007f00;"]
        lines += [f"shr.u32 u, u, {11 - to.mantissa};", "lop3.b32 t, t, 0x80008000, u, 0xea;"]
        lines += [f"{to.fma} t, t, power, none;", f"{to.fma} u, t, most, none;"]
        lines += [f"{to.fma} ${i}, u, zero, t;"]
    return "\n".join([*lines, "}"])


@jit
def _from_e4m3(codes, Decode: tl.constexpr, Float: tl.constexpr):
    if Float == tl.float32:
        bits = codes.to(tl.uint32)
        value = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
        return tl.where(bits > 0x7F, -value, value)
    else:
        return decode16(codes, Decode, 8, Float)


@jit
def _floats(codes, Place: tl.constexpr, Bits: tl.constexpr):
    """Bytes [R, C * Bits / 8] to float32 [R, C]: the codes, as a `Reading` places them."""
    R: tl.constexpr = codes.shape[0]
    C: tl.constexpr = codes.shape[1] * 8 // Bits
    if Bits == 4:
        if Place == "":
            low, high = (codes & 15).to(tl.float32), (codes >> 4).to(tl.float32)
        else:
            low, high = tl.inline_asm_elementwise(
                Place, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [codes], dtype=(tl.float32, tl.float32),
                is_pure=True, pack=4,
            )  # fmt: skip
        return tl.join(low, high).reshape(R, C)
    elif Place == "":
        return codes.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            Place, "=&r,=&r,=&r,=&r,r", [codes], dtype=tl.float32, is_pure=True, pack=4
        )


# Where tiles lie: Cache = (Page, Align, Bits, Size, Channels, *Reading, Decode), constants: tokens of a page
# (0: none), elements that strides are multiples of; Bits 0 for elements, 8 without a Size for e4m3; tokens
# and channels that share scales; how codes are read, and how e4m3 is.


@jit
def _located(at, strides, page, n, slot, rel, Cache: tl.constexpr, Vector: tl.constexpr):
    """Addresses of a tile [TileN, ..]: rows of page and slot from n on, or each of its own page."""
    if Vector:
        rows = page.to(tl.int64) * strides[0] + slot.to(tl.int64) * strides[1]
        return at + (rows * Cache[1])[:, None] + rel
    else:
        base = page.to(tl.int64) * strides[0] + slot_of(n, Cache[0]).to(tl.int64) * strides[1]
        return at + base * Cache[1] + rel


@jit
def _scaled(codes, scale, offset, Cache: tl.constexpr, Float: tl.constexpr):
    """Codes [R, C] with scales and offsets that broadcast to it, or to [R / n, n, C] or [R, C / n, n]."""
    Place: tl.constexpr = Cache[5]  # Triton 3.6 passes no element of a tuple on
    Bits: tl.constexpr = Cache[2]
    x = _floats(codes, Place, Bits)
    scale, offset = scale.to(tl.float32), offset.to(tl.float32)
    if Cache[6] != 0:
        offset -= scale * Cache[6]
    if Cache[8] != 1:
        scale *= Cache[7]
        offset *= 1 / Cache[8]
    if len(scale.shape) == 3:
        R: tl.constexpr = x.shape[0]
        C: tl.constexpr = x.shape[1]
        if scale.shape[1] == 1:
            x = x.reshape(scale.shape[0], R // scale.shape[0], C)
        else:
            x = x.reshape(R, scale.shape[1], C // scale.shape[1])
        return (x * scale + offset).to(Float).reshape(R, C)
    else:
        return (x * scale + offset).to(Float)


@jit
def _key_scales(
    scales, offsets, table, b, n, end, kv_head, kv_heads, pages, most, page_size, d, Dim: tl.constexpr,
    Cache: tl.constexpr, TileN: tl.constexpr,
):  # fmt: skip
    """Of a tile's groups: [1, TileD], or [groups, 1, TileD]."""
    Page: tl.constexpr = Cache[0]
    Size: tl.constexpr = Cache[3]
    Groups: tl.constexpr = TileN // Size if Size < TileN else 1
    if Groups == 1:
        page, there = page_of(table, b, n, n < end, pages, most, Page)
        line = page.to(tl.int64) * (page_size // Size) + slot_of(n, Page) // Size
        at = (line * kv_heads + kv_head) * Dim + d
        mask = there & (d < Dim)
        scale, offset = (
            tl.load(scales + at, mask=mask, other=0.0),
            tl.load(offsets + at, mask=mask, other=0.0),
        )
        # what no load gave keeps the compiler from reading codes in the order of a dot's operand, by bytes
        scale, offset = tl.where(d < Dim, scale, 0.0)[None, :], offset[None, :]
    else:
        position = n + tl.arange(0, Groups) * Size
        page, there = page_of(table, b, position, position < end, pages, most, Page)
        line = page.to(tl.int64) * (page_size // Size) + slot_of(position, Page) // Size
        at = ((line * kv_heads + kv_head) * Dim)[:, None] + d[None, :]
        mask = there[:, None] & (d < Dim)[None, :]
        scale, offset = (
            tl.load(scales + at, mask=mask, other=0.0),
            tl.load(offsets + at, mask=mask, other=0.0),
        )
        scale = tl.where((d < Dim)[None, :], scale, 0.0)
        scale, offset = scale[:, None, :], offset[:, None, :]
    return scale, offset


@jit
def _value_scales(
    scales, offsets, page, slot, inside, kv_head, kv_heads, page_size, DimV: tl.constexpr,
    Cache: tl.constexpr, TileDV: tl.constexpr,
):  # fmt: skip
    """Of a tile's tokens: [TileN, 1], [TileN, groups, 1] or, of groups that are no power of two, [TileN,
    TileDV]."""
    Channels: tl.constexpr = Cache[4]
    Groups: tl.constexpr = (DimV + Channels - 1) // Channels
    at = ((page.to(tl.int64) * page_size + slot) * kv_heads + kv_head) * Groups
    if Groups == 1:
        scale = tl.where(inside, tl.load(scales + at, mask=inside, other=0.0), 0.0)[:, None]
        offset = tl.load(offsets + at, mask=inside, other=0.0)[:, None]
    elif TileDV % Channels == 0:
        group = tl.arange(0, TileDV // Channels)
        mask = inside[:, None] & (group < Groups)[None, :]
        scale = tl.load(scales + at[:, None] + group[None, :], mask=mask, other=0.0)[:, :, None]
        offset = tl.load(offsets + at[:, None] + group[None, :], mask=mask, other=0.0)[:, :, None]
    else:
        d = tl.arange(0, TileDV)
        mask = inside[:, None] & (d < DimV)[None, :]
        scale = tl.load(scales + at[:, None] + d[None, :] // Channels, mask=mask, other=0.0)
        offset = tl.load(offsets + at[:, None] + d[None, :] // Channels, mask=mask, other=0.0)
    return scale, offset


# the plan: the same on every program, from lengths, of one tile of rows, from query `first` to `last`


@jit
def _length(seqlens, b, inside, new, capacity):
    """Tokens of a sequence with its new ones, held to what there is room for."""
    return tl.minimum(
        tl.minimum(tl.maximum(tl.load(seqlens + b, mask=inside, other=0), 0), capacity) + new, capacity
    )


@jit
def _extent(length, first, last, SQ, left, right, Size: tl.constexpr, TileN: tl.constexpr):
    """(lo, end, tiles, late, hi, more): tiles of the keys from lo to end, and `more` of those of the tail,
    from late to hi, that the window meets."""
    shift = length - SQ
    lo = tl.maximum(first + shift - left, 0) // TileN * TileN
    hi = tl.minimum(tl.maximum(last + shift + right + 1, 0), length)
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
    seqlens, batch, new, capacity, first, last, SQ, left, right, splits, Size: tl.constexpr,
    TileN: tl.constexpr, TileB: tl.constexpr,
):  # fmt: skip
    """The sequences, the tiles of each, those of all, and how many of them a program has."""
    b = tl.arange(0, TileB)
    length = _length(seqlens, b, b < batch, new, capacity)
    _, _, tiles, _, _, more = _extent(length, first, last, SQ, left, right, Size, TileN)
    tiles = tl.where(b < batch, tiles + more, 0)
    total = tl.sum(tiles, 0)
    return b, tiles, total, tl.maximum(tl.cdiv(total, splits), 1)


@jit
def _rows_of(m, group, SQ, TileM: tl.constexpr):
    """The first and the last query of a tile of rows."""
    return m * TileM // group, tl.minimum(m * TileM + TileM, SQ * group) // group


# the kernels

_PLAN = ["batch", "new", "capacity", "SQ", "left", "right", "splits", "kv_heads", "group", "m_tiles"]
_INTEGERS = [
    *_PLAN, "pages", "most", "page_size", "count", "at_batch", "tree_batch", "slope_batch", "q_batch",
    "q_row", "q_head", "k_page", "k_slot", "k_head", "v_page", "v_slot", "v_head",
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
    acc, total, top, q, key, value, j, seen, length, i, SQ, numbers, slope, window, tree, Form: tl.constexpr
):  # fmt: skip
    """Sums, row sums and row maxima, of scores, with the keys j [1, TileN], of which `seen` are there."""
    z, _, scale = logits(_scores(q, key), numbers, slope, None, window, i, j, SQ, length, Form)
    z = tl.where(seen, unseen_hidden(z, i, j, length, window, "window"), float("-inf"))
    if tree is not None:
        own = j - window[0]
        allowed = tl.load(tree + i * SQ + own, mask=(own >= 0) & seen & (i < SQ), other=1)
        z = tl.where(allowed != 0, z, float("-inf"))
    new = tl.maximum(top, tl.max(z, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    p = power((z - base[:, None]) * scale, Form[6])  # the largest's exponent is exactly 0
    shrink = power((top - base) * scale, Form[6])
    return dot(p.to(value.dtype), value, acc * shrink[:, None]), total * shrink + tl.sum(p, 1), new


@jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _decode_kernel(
    q, k, v, k_scales, k_offsets, v_scales, v_offsets, k_tail, v_tail, table, seqlens, cos, sin, positions,
    tree, slopes, sums, levels, scale, cap, batch, new, capacity, SQ, left, right, splits, kv_heads, group,
    m_tiles, pages, most, page_size, count, at_batch, tree_batch, slope_batch, q_batch, q_row, q_head,
    k_page, k_slot, k_head, v_page, v_slot, v_head,
    Dim: tl.constexpr, DimV: tl.constexpr, Half: tl.constexpr, Interleaved: tl.constexpr, Form: tl.constexpr,
    Cache: tl.constexpr, TileM: tl.constexpr, TileN: tl.constexpr, TileD: tl.constexpr,
    TileDV: tl.constexpr, TileB: tl.constexpr,
):  # fmt: skip
    """sums [kv_heads, m_tiles, splits + batch - 1, TileM, DimV] and levels [.., 2, TileM], row maxima in the
    logits' unit and row sums: of piece x + b, what program x has seen of sequence b. k and v as bytes where
    they are codes; their strides are in multiples of Cache's Align."""
    Page: tl.constexpr = Cache[0]
    Align: tl.constexpr = Cache[1]
    Bits: tl.constexpr = Cache[2]
    Size: tl.constexpr = Cache[3]
    Decode: tl.constexpr = Cache[9]
    Vector: tl.constexpr = Page != 0 and Page < TileN
    Float: tl.constexpr = q.dtype.element_ty
    m = tl.program_id(0) % m_tiles
    kv_head = tl.program_id(0) // m_tiles % kv_heads
    x = tl.program_id(0) // m_tiles // kv_heads
    first, last = _rows_of(m, group, SQ, TileM)
    bs, tiles, all_tiles, each = _shares(
        seqlens, batch, new, capacity, first, last, SQ, left, right, splits, Size, TileN, TileB
    )
    start = x * each
    stop = tl.minimum(start + each, all_tiles)
    if start >= stop:
        return
    ends = tl.cumsum(tiles, 0)
    b_first = tl.sum(((ends <= start) & (bs < batch)).to(tl.int32), 0)
    b_end = tl.sum(((ends - tiles < stop) & (bs < batch)).to(tl.int32), 0)

    wide = kv_head.to(tl.int64)
    row, column = tl.arange(0, TileM), tl.arange(0, TileN)
    r = m * TileM + row
    i, head = r // group, kv_head * group + r % group
    inside = r < SQ * group
    d, d_v = tl.arange(0, TileD), tl.arange(0, TileDV)
    byte = tl.arange(0, TileD * Bits // 8 if Bits else TileD)
    byte_v = tl.arange(0, TileDV * Bits // 8 if Bits else TileDV)
    k_there = (byte < (Dim * Bits // 8 if Bits else Dim))[None, :]
    v_there = (byte_v < (DimV * Bits // 8 if Bits else DimV))[None, :]
    k += wide * k_head * Align
    v += wide * v_head * Align
    k_rel, v_rel = byte[None, :], byte_v[None, :]
    if not Vector:
        k_rel = column[:, None] * (k_slot * Align) + byte[None, :]
        v_rel = column[:, None] * (v_slot * Align) + byte_v[None, :]
    k_strides, v_strides = (k_page, k_slot), (v_page, v_slot)
    of_value = 1.0
    if Bits == 8 and Size == 0:
        if k_scales is not None:
            scale *= tl.load(k_scales + kv_head)
        if v_scales is not None:
            of_value = tl.load(v_scales + kv_head)
    numbers = (scale, cap, 0, 0, 0, 0)
    of_codes = (scale * Cache[8], cap, 0, 0, 0, 0)

    for b in tl.range(b_first, b_end, num_stages=1):
        before = tl.sum(tl.where(bs < b, tiles, 0), 0)
        length = _length(seqlens, b, b < batch, new, capacity)
        lo, end, codes, late, hi, more = _extent(length, first, last, SQ, left, right, Size, TileN)
        t_first = tl.maximum(start - before, 0)
        t_end = tl.minimum(stop - before, codes + more)
        wide_b = b.to(tl.int64)
        shift = length - SQ
        window = (shift, left, right)
        at = tl.maximum(i + shift, 0)
        if positions is not None:
            at = tl.load(positions + wide_b * at_batch + i, mask=inside, other=0)
        q_rows = q + wide_b * q_batch + i.to(tl.int64) * q_row + head.to(tl.int64) * q_head
        known = inside & (at >= 0) & (at < count)
        q_tile = turned(q_rows, inside, d, cos, sin, at, known, Dim, Half, Interleaved, False)
        slope = slopes
        if slopes is not None:
            slope = tl.load(slopes + wide_b * slope_batch + head, mask=inside, other=0.0)[:, None]
        own_tree = tree
        if tree is not None:
            own_tree = tree + wide_b * tree_batch
        top = tl.full((TileM,), float("-inf"), tl.float32)
        total = tl.zeros((TileM,), tl.float32)
        acc = tl.zeros((TileM, TileDV), tl.float32)
        for t in range(t_first, tl.minimum(t_end, codes)):
            n = lo + t * TileN
            j = n + column
            # the lines of the table that a page is read from stay in L1 for some tiles
            page, there = page_of(table, b, j if Vector else n, (j if Vector else n) < end, pages, most, Page)
            rows = there & (j < end)
            slot = slot_of(j, Page)
            mask = rows[:, None] & k_there
            key = tl.load(_located(k, k_strides, page, n, slot, k_rel, Cache, Vector), mask=mask, other=0)
            mask = rows[:, None] & v_there
            value = tl.load(_located(v, v_strides, page, n, slot, v_rel, Cache, Vector), mask=mask, other=0)
            if Size != 0:
                k_scale, k_offset = _key_scales(
                    k_scales, k_offsets, table, b, n, end, kv_head, kv_heads, pages, most, page_size, d, Dim,
                    Cache, TileN,
                )  # fmt: skip
                v_scale, v_offset = _value_scales(
                    v_scales, v_offsets, page, slot, rows, kv_head, kv_heads, page_size, DimV, Cache, TileDV
                )
                key = _scaled(key, k_scale, k_offset, Cache, Float)
                value = _scaled(value, v_scale, v_offset, Cache, Float)
            elif Bits == 8:
                key = _from_e4m3(key, Decode, Float)
                value = _from_e4m3(value, Decode, Float)
            acc, total, top = _attend(
                acc, total, top, q_tile, key, value, j[None, :], rows[None, :], end, i[:, None], SQ, of_codes,
                slope, window, own_tree, Form,
            )  # fmt: skip
        if Size != 0:
            acc *= Cache[8]
            if Form[0] and Form[1] == "" and slopes is None:  # scores of codes are in units of their own
                top *= Cache[8]
            for t in range(tl.maximum(t_first, codes), t_end):
                j = late + (t - codes) * TileN + column
                rows = j < hi
                place = ((wide_b * 2 * Size + j % (2 * Size)) * kv_heads + kv_head)[:, None]
                key = tl.load(
                    k_tail + place * Dim + d[None, :], mask=rows[:, None] & (d < Dim)[None, :], other=0.0
                )
                value = tl.load(
                    v_tail + place * DimV + d_v[None, :],
                    mask=rows[:, None] & (d_v < DimV)[None, :],
                    other=0.0,
                )
                acc, total, top = _attend(
                    acc, total, top, q_tile, key, value, j[None, :], rows[None, :], hi, i[:, None], SQ,
                    numbers, slope, window, own_tree, Form,
                )  # fmt: skip
        piece = (wide * m_tiles + m) * (splits + batch - 1) + x + b
        sums_at = sums + piece * TileM * DimV
        mask = inside[:, None] & (d_v < DimV)[None, :]
        tl.store(sums_at + row[:, None] * DimV + d_v[None, :], acc * of_value, mask=mask)
        top *= left_scale(numbers, slopes, None, Form)
        tl.store(levels + piece * 2 * TileM + row, top, mask=inside)
        tl.store(levels + (piece * 2 + 1) * TileM + row, total, mask=inside)


@jit(do_not_specialize=_PLAN, do_not_specialize_on_alignment=_SMALL)
def _merge_kernel(
    sums, levels, seqlens, sinks, out, lse, batch, new, capacity, SQ, left, right, splits, kv_heads, group,
    m_tiles, Dim: tl.constexpr, Natural: tl.constexpr, Size: tl.constexpr, TileM: tl.constexpr,
    TileN: tl.constexpr, TileD: tl.constexpr, TileB: tl.constexpr, TileP: tl.constexpr,
):  # fmt: skip
    """out [batch, SQ, heads, Dim] and lse [batch, heads, SQ], natural log, of one row's pieces, TileP at a
    time, and its sink."""
    pid = tl.program_id(0)
    heads = kv_heads * group
    head, i, b = pid % heads, pid // heads % SQ, pid // heads // SQ
    r = i * group + head % group
    m, row = r // TileM, r % TileM
    first, last = _rows_of(m, group, SQ, TileM)
    bs, tiles, _, each = _shares(
        seqlens, batch, new, capacity, first, last, SQ, left, right, splits, Size, TileN, TileB
    )
    before = tl.sum(tl.where(bs < b, tiles, 0), 0)
    mine = tl.sum(tl.where(bs == b, tiles, 0), 0)
    x = before // each
    count = tl.where(mine > 0, (before + mine - 1) // each + 1 - x, 0)
    piece = ((head // group).to(tl.int64) * m_tiles + m) * (splits + batch - 1) + x + b
    d, p = tl.arange(0, TileD), tl.arange(0, TileP)
    top, total = float("-inf"), 0.0
    if sinks is not None:
        top = in_unit(tl.load(sinks + head), Natural)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = tl.zeros((TileD,), tl.float32)
    for at in range(0, count, TileP):
        there = at + p < count
        which = piece + at + p
        of_top = tl.load(levels + which * 2 * TileM + row, mask=there, other=float("-inf"))
        of_total = tl.load(levels + (which * 2 + 1) * TileM + row, mask=there, other=0.0)
        mask = there[:, None] & (d < Dim)[None, :]
        of_sums = tl.load(sums + ((which * TileM + row) * Dim)[:, None] + d[None, :], mask=mask, other=0.0)
        highest = tl.maximum(top, tl.max(of_top, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = power(of_top - base, Natural)
        shrink = power(top - base, Natural)
        acc = acc * shrink + tl.sum(of_sums * weight[:, None], 0)
        total = total * shrink + tl.sum(of_total * weight, 0)
        top = highest
    empty = total == 0.0
    level = top + tl.log(total) if Natural else (top + tl.log2(total)) * LN_2
    tl.store(lse + (b.to(tl.int64) * heads + head) * SQ + i, tl.where(empty, float("-inf"), level))
    mean = acc * tl.where(empty, 0.0, 1.0 / total)
    tl.store(out + pid.to(tl.int64) * Dim + d, mean.to(out.dtype.element_ty), mask=d < Dim)


# which tiles


class Config(NamedTuple):
    """What a launch fixes: tiles of rows and of keys, how they are worked, and programs that a multiprocessor
    has at a time."""

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    programs: int


@functools.lru_cache(maxsize=4096)
def choose(
    rows: int, dim: int, dim_v: int, float_bytes: int, bits: int, page: int, capability: int
) -> Config:
    """Tiles for `rows` rows of a kv head, of padded head dims, codes of `bits` bits and pages of `page`
    tokens, 0 for none.

    - float32 runs on the FMA units.
    - 64 keys, or half as many of heads wider than 128: two tiles of K and V are 64 KB, so that two programs
      fit even Ampere's shared memory.
    - Two tiles are on their way in three stages, or where a tile's rows have pages of their own in five, for
      these come first; but 8 bits and their scales in five take 134 KB, where some cards have 99.
    - A warp has 8 channels of V or more.
    - 4 bits are bound by instructions: of 32 keys, whose scales are one group's, and two warps it takes an
      eighth less.
    """
    wide = max(dim, dim_v)
    if float_bytes == 4:
        return Config(16 if rows <= 16 else 32, 32, 4, 2 if wide <= 128 else 1, 2)
    tile_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    four = bits == 4 and tile_m == 16 and wide <= 128
    tile_n = 32 if four or wide > 128 else 64
    warps = 2 if four or dim_v <= 16 else 4
    stages = 5 if 0 < page < tile_n and not (bits == 8 and not arch_of(capability).roomy) else 3
    return Config(tile_m, tile_n, warps, stages, 4 if four else 2)


def splits_of(heads: int, slots: int, most: int) -> int:
    """Programs of each of `heads` tiles of rows, for `slots` that run at once, `most` at most: one wave of
    them, or the fewest waves that are 90% full."""
    best = max(1, slots // heads)
    for splits in range(best, 8 * best):
        waves = -(-heads * splits // slots)
        if heads * splits >= 0.9 * waves * slots:
            best = splits
            break
    return max(1, min(best, most))


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
    if max(q.shape[3], cache.head_dim_v) > MAX_HEAD_DIM:
        dims = f"{q.shape[3]} and {cache.head_dim_v}"
        return f"head dims {dims} are more than the {MAX_HEAD_DIM} that its tiles hold"
    if max(q.shape[0] * q.shape[1] * q.shape[2], q.shape[1] ** 2) >= 2**31:
        return f"{q.shape[0]} x {q.shape[1]} queries of {q.shape[2]} heads are too many"
    return None


FARTHEST_KEY = 2 * LONGEST - 1


@functools.lru_cache(maxsize=1024)
def _plan(
    device: Device, batch: int, queries: int, heads: int, kv_heads: int, dim: int, dim_v: int,
    dtype: torch.dtype, bits: int, page: int, size: int, capacity: int, kind: tuple[Any, ...],
) -> tuple[Plan, Plan, Config, int]:  # fmt: skip
    """The plans of both kernels, and programs of a tile of rows."""
    rows = queries * heads // kv_heads
    tile_d, tile_dv = padded(dim), padded(dim_v)
    config = choose(rows, tile_d, tile_dv, dtype.itemsize, bits, page, device.capability)
    tile_m, tile_n, warps, stages, programs = config
    m_tiles = -(-rows // tile_m)
    splits = splits_of(
        kv_heads * m_tiles, device.multiprocessors * programs, batch * (capacity // tile_n + 2)
    )
    tile_b = next(n for n in (64, 512, 1 << (batch - 1).bit_length()) if n >= batch)
    natural = dtype == torch.float32
    tile_p = 16
    of_merge = (dim_v, natural, size, tile_m, tile_n, tile_dv, tile_b, tile_p)
    merge = Plan(
        _merge_kernel,
        (batch * queries * heads, 1, 1),
        of_merge,
        dict(num_warps=4, num_stages=1, enable_fp_fusion=True),
        HANDLES.setdefault((device.number, "merge pieces", dtype, kind[-1], of_merge), {}),
    )
    plan = Plan(
        _decode_kernel,
        (splits * kv_heads * m_tiles, 1, 1),
        (tile_m, tile_n, tile_d, tile_dv, tile_b),
        dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True),
        HANDLES.setdefault((device.number, "decode", kind, config, tile_b), {}),
    )
    return plan, merge, config, splits


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
    coded = BITS.get(cache.format)
    own = device_of(device)
    natural = dtype == torch.float32
    unit = 1.0 if natural else math.log2(math.e)
    scale = a.softmax_scale / a.softcap if a.softcap else a.softmax_scale * unit
    left, right = (n if 0 <= n < FARTHEST_KEY else FARTHEST_KEY for n in (a.left, a.right))
    positive = scale > 0 and (cache.format != "fp8" or cache.k_scales is None)
    form = (positive, cap_kind(dtype, a.softcap), False, 0, False, False, natural)
    read = reading(coded, dtype) if coded else Reading()
    decode = _e4m3(dtype, own.capability) if cache.format == "fp8" and not natural else ""
    bits = coded or (8 if cache.format == "fp8" else 0)
    size, channels = (cache.group_size, cache.channel_group) if coded else (0, 0)
    cos, sin, positions = rotary_tensors(rotary)
    half = 0 if cos is None else cos.shape[1]
    constants = (
        dim, dim_v, half, rotary.interleaved, form, (page, align, bits, size, channels, *read, decode)
    )  # fmt: skip
    tree = None if a.tree_mask is None else a.tree_mask.contiguous().view(torch.uint8)
    slopes, sinks = (None if t is None else t.contiguous() for t in (a.alibi_slopes, a.sinks))
    seqlens, table = cache_seqlens.contiguous(), cache.block_table
    inputs = (
        q if q.stride(-1) == 1 or dim == 1 else q.contiguous(), to_k, to_v, cache.k_scales, cache.k_offsets,
        cache.v_scales, cache.v_offsets, cache.k_tail, cache.v_tail, table, seqlens, cos, sin, positions,
        tree, slopes,
    )  # fmt: skip
    numbers = (
        to_k.shape[0], 0 if table is None else table.shape[1], to_k.shape[1], *rotary_numbers(rotary),
        0 if tree is None or tree.shape[0] == 1 else queries * queries,
        heads if slopes is not None and slopes.dim() == 2 else 0, *strides_of(inputs[0], 1),
        *strides_of(to_k, align), *strides_of(to_v, align),
    )  # fmt: skip
    kinds = tuple(None if t is None else t.dtype for t in inputs)
    kind = (constants, kinds, tuple(n >= 2**31 for n in numbers), sinks is None)
    plan, merge, config, splits = _plan(
        own, batch, queries, heads, kv_heads, dim, dim_v, dtype, bits, page, size,
        cache.capacity, kind,
    )  # fmt: skip
    group = heads // kv_heads
    m_tiles = -(-queries * group // config.tile_m)
    pieces = kv_heads * m_tiles * (splits + batch - 1)
    sums = torch.empty((pieces, config.tile_m, dim_v), dtype=torch.float32, device=device)
    levels = torch.empty((pieces, 2, config.tile_m), dtype=torch.float32, device=device)
    of_plan = (batch, new, cache.capacity, queries, left, right, splits, kv_heads, group, m_tiles)
    given: tuple[Any, ...] = (*inputs, sums, levels, scale, a.softcap * unit, *of_plan, *numbers, *constants)
    plan.launch(given, alignment_of(*inputs[:9], sums))
    merge.launch((sums, levels, seqlens, sinks, out, lse, *of_plan), alignment_of(sums, out))
    return out, lse

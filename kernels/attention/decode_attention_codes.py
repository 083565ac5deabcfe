"""How decode_attention in Triton reads a cache of few bits.

The codes of a tile come as bytes to shared memory, and become elements of the queries' dtype in
registers: a byte permute puts a code into the mantissa of a float32, a multiply-add with the scale and what
is left of the offset makes the value, one instruction rounds two. float8's scales are a head's: K's go into
the logits' scale, V's into the sums. The tokens past the last whole group are read from the tail in tiles of
their own, after the others.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ..core.decoding import BFLOAT, HALF, decode16
from ..core.launch import jit, tl
from .append_kv import page_of, slot_of


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


class Stored(NamedTuple):
    """How a cache lies, and how its codes become numbers; constants.

    Attributes:
        Page: tokens of a page; 0 for no pages.
        Align: what strides are divided by on their way to a kernel.
        Bits: of a code; 0 for elements of the queries' dtype; 8 without a Size for e4m3.
        Size, Channels: tokens that share a scale of K, and channels one of V; 0 without codes.
        Place, Base, Factor, Unit: a `Reading`.
        Decode: PTX from e4m3 to a 16-bit float.
    """

    Page: int
    Align: int
    Bits: int
    Size: int
    Channels: int
    Place: str
    Base: float
    Factor: float
    Unit: float
    Decode: str


class Cached(NamedTuple):
    """The tensors of a cache as the kernels take them: codes, and e4m3, as bytes."""

    k: Any
    v: Any
    k_scales: Any
    k_offsets: Any
    v_scales: Any
    v_offsets: Any
    k_tail: Any
    v_tail: Any


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
def e4m3(dtype: torch.dtype, converts: bool) -> str:
    """PTX from four bytes to two registers of two 16-bit floats, of e4m3.

    Where the GPU `converts`, an instruction makes two halves of two bytes. Elsewhere, exponent and mantissa
    go where the wider float has them, times 2**(its bias - 7). A NaN reads as 480 then, the only value past
    448: times a number that leaves 448 finite it is infinite, and 0 times that is NaN.
    """
    if converts:
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
def from_e4m3(codes, Decode: tl.constexpr, Float: tl.constexpr):
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


@jit
def located(at, strides, page, n, slot, rel, Cache, Vector: tl.constexpr):
    """Addresses of a tile [TileN, ..]: rows of page and slot from n on, or each of its own page."""
    if Vector:
        rows = page.to(tl.int64) * strides[0] + slot.to(tl.int64) * strides[1]
        return at + (rows * Cache.Align)[:, None] + rel
    else:
        base = page.to(tl.int64) * strides[0] + slot_of(n, Cache.Page).to(tl.int64) * strides[1]
        return at + base * Cache.Align + rel


@jit
def scaled(codes, scale, offset, Cache, Float: tl.constexpr):
    """Codes [R, C] with scales and offsets that broadcast to it, or to [R / n, n, C] or [R, C / n, n]."""
    x = _floats(codes, Cache.Place, Cache.Bits)
    scale, offset = scale.to(tl.float32), offset.to(tl.float32)
    if Cache.Base != 0:
        offset -= scale * Cache.Base
    if Cache.Unit != 1:
        scale *= Cache.Factor
        offset *= 1 / Cache.Unit
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
def key_scales(
    cache, table, b, n, end, kv_head, kv_heads, pages, most, page_size, d, Dim: tl.constexpr, Cache,
    TileN: tl.constexpr,
):  # fmt: skip
    """Of a tile's groups: [1, TileD], or [groups, 1, TileD]."""
    Size: tl.constexpr = Cache.Size
    Groups: tl.constexpr = TileN // Size if Size < TileN else 1
    if Groups == 1:
        page, there = page_of(table, b, n, n < end, pages, most, Cache.Page)
        line = page.to(tl.int64) * (page_size // Size) + slot_of(n, Cache.Page) // Size
        at = (line * kv_heads + kv_head) * Dim + d
        mask = there & (d < Dim)
        scale, offset = (
            tl.load(cache.k_scales + at, mask=mask, other=0.0),
            tl.load(cache.k_offsets + at, mask=mask, other=0.0),
        )
        # what no load gave keeps the compiler from reading codes in the order of a dot's operand, by bytes
        scale, offset = tl.where(d < Dim, scale, 0.0)[None, :], offset[None, :]
    else:
        position = n + tl.arange(0, Groups) * Size
        page, there = page_of(table, b, position, position < end, pages, most, Cache.Page)
        line = page.to(tl.int64) * (page_size // Size) + slot_of(position, Cache.Page) // Size
        at = ((line * kv_heads + kv_head) * Dim)[:, None] + d[None, :]
        mask = there[:, None] & (d < Dim)[None, :]
        scale, offset = (
            tl.load(cache.k_scales + at, mask=mask, other=0.0),
            tl.load(cache.k_offsets + at, mask=mask, other=0.0),
        )
        scale = tl.where((d < Dim)[None, :], scale, 0.0)
        scale, offset = scale[:, None, :], offset[:, None, :]
    return scale, offset


@jit
def value_scales(
    cache, page, slot, inside, kv_head, kv_heads, page_size, DimV: tl.constexpr, Cache, TileDV: tl.constexpr
):  # fmt: skip
    """Of a tile's tokens: [TileN, 1], [TileN, groups, 1] or, of groups that are no power of two, [TileN,
    TileDV]."""
    Channels: tl.constexpr = Cache.Channels
    Groups: tl.constexpr = (DimV + Channels - 1) // Channels
    at = ((page.to(tl.int64) * page_size + slot) * kv_heads + kv_head) * Groups
    if Groups == 1:
        scale = tl.where(inside, tl.load(cache.v_scales + at, mask=inside, other=0.0), 0.0)[:, None]
        offset = tl.load(cache.v_offsets + at, mask=inside, other=0.0)[:, None]
    elif TileDV % Channels == 0:
        group = tl.arange(0, TileDV // Channels)
        mask = inside[:, None] & (group < Groups)[None, :]
        scale = tl.load(cache.v_scales + at[:, None] + group[None, :], mask=mask, other=0.0)[:, :, None]
        offset = tl.load(cache.v_offsets + at[:, None] + group[None, :], mask=mask, other=0.0)[:, :, None]
    else:
        d = tl.arange(0, TileDV)
        mask = inside[:, None] & (d < DimV)[None, :]
        scale = tl.load(cache.v_scales + at[:, None] + d[None, :] // Channels, mask=mask, other=0.0)
        offset = tl.load(cache.v_offsets + at[:, None] + d[None, :] // Channels, mask=mask, other=0.0)
    return scale, offset

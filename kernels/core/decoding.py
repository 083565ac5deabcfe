"""From codes to floats: how the bytes of each format become values in registers, by PTX made once for each
format and 16-bit float."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...core.tensors import aside
from ...weights.codebook import unbiased_levels
from ...weights.formats import E2M1, NF4
from .launch import jit, tl

# decoding: PTX, made once for each format and 16-bit float


@dataclass(frozen=True)
class Wide:
    """A 16-bit float to decode to.

    Args:
        fma: its two-wide fused multiply-add.
        magic: the power of two from which its mantissa counts by ones. An integer put into the low bits of it
            is added to it, and one multiply-add takes it away again, with the center; all of that is exact.
        mantissa: bits of its mantissa.
        bias: of its exponent.
    """

    dtype: torch.dtype
    fma: str
    magic: float
    mantissa: int
    bias: int

    def two(self, low: float, high: float) -> str:
        """The register that holds two of it."""
        with aside():
            bits = torch.tensor([low, high], dtype=self.dtype, device="cpu").view(torch.int16).tolist()
        return f"{bits[0] & 0xFFFF | (bits[1] & 0xFFFF) << 16:#010x}"


HALF = Wide(torch.float16, "fma.rn.f16x2", 1024.0, 10, 15)
BFLOAT = Wide(torch.bfloat16, "fma.rn.bf16x2", 128.0, 7, 127)

# selectors of prmt(a, b): nibble i says which of the eight bytes of a, then b, becomes byte i of the result
_BOTH = (
    "0x0000",
    "0x1111",
    "0x2222",
    "0x3333",
    "0x4444",
    "0x5555",
    "0x6666",
    "0x7777",
)  # one byte everywhere
_EACH = ("0x4440", "0x5551", "0x6662", "0x7773")  # byte i of a in the low half, byte i of b in the high half
_PAIR = ("0x4140", "0x4342")  # bytes 2i and 2i+1 of a at the bottom of the halves, a byte of b over each
_TOP_PAIR = ("0x1404", "0x3424")  # the same on top, a byte of b under each


def _asm(registers: str, *lines: str) -> str:
    return "\n".join((f"{{\n.reg .b32 {registers};", *(f"{line};" for line in lines), "}"))


def _int2(to: Wide, center: int) -> str:
    """A byte's second pair is like its first once the byte is shifted; the second code of a pair counts by
    fours."""
    lines = [
        f"mov.b32 one, {to.two(1, 0.25)}",
        f"mov.b32 less, {to.two(-to.magic - center, -to.magic / 4 - center)}",
        f"mov.b32 magic, {to.two(to.magic, to.magic)}",
        "shr.u32 h, $8, 4",
    ]
    for i, both in enumerate(_BOTH):
        lines += [f"prmt.b32 t, $8, h, {both}", "lop3.b32 t, t, 0x000c0003, magic, 0xea"]
        lines += [f"{to.fma} ${i}, t, one, less"]
    return _asm("t, h, one, less, magic", *lines)


def _int4(to: Wide, center: int) -> str:
    """bfloat16's mantissa holds a nibble only at the bottom, so the high nibbles are shifted down."""
    lines = [
        f"mov.b32 one, {to.two(1, 1)}",
        f"mov.b32 less, {to.two(-to.magic - center, -to.magic - center)}",
        f"mov.b32 magic, {to.two(to.magic, to.magic)}",
        "shr.u32 h, $4, 4",
    ]
    for i, each in enumerate(_EACH):
        lines += [f"prmt.b32 t, $4, h, {each}", "lop3.b32 t, t, 0x000f000f, magic, 0xea"]
        lines += [f"{to.fma} ${i}, t, one, less"]
    return _asm("t, h, one, less, magic", *lines)


def _int8(to: Wide) -> str:
    return _int8_half() if to is HALF else _int8_bfloat()


def _int8_half() -> str:
    """1024 + byte: prmt puts the byte under 0x64, the top byte of 1024."""
    lines = [f"mov.b32 less, {HALF.two(1024 + 128, 1024 + 128)}"]
    for i, pair in enumerate(_PAIR):
        lines += [f"prmt.b32 t, $2, 0x64646464, {pair}", f"sub.f16x2 ${i}, t, less"]
    return _asm("t, less", *lines)


def _int8_bfloat() -> str:
    """7 bits of mantissa: 128 + the low 7 bits, less 128 where the top bit is set and 256 where it is not."""
    lines = [f"mov.b32 one, {BFLOAT.two(1, 1)}", f"mov.b32 magic, {BFLOAT.two(128, 128)}"]
    for i, pair in enumerate(_PAIR):
        lines += [f"prmt.b32 t, $2, 0, {pair}"]
        lines += [
            f"lop3.b32 less, t, 0x00800080, {BFLOAT.two(-256, -256)}, 0x6a"
        ]  # 128 and 256 differ in bit 7
        lines += ["lop3.b32 t, t, 0x007f007f, magic, 0xea", f"fma.rn.bf16x2 ${i}, t, one, less"]
    return _asm("t, less, one, magic", *lines)


def _e4m3(to: Wide) -> str:
    """Exponent and mantissa moved to where the wider float has them, then times 2**(its bias - 7); subnormals
    too.

    The code of a NaN reads as 480: no quantiser writes it, and `LowBitWeight.check_values` finds it.
    """
    power = 2.0 ** (to.bias - 7)
    lines = [f"mov.b32 power, {to.two(power, power)}", f"mov.b32 none, {to.two(-0.0, -0.0)}"]
    for i, pair in enumerate(_TOP_PAIR):
        lines += [
            f"prmt.b32 t, $2, 0, {pair}",
            "and.b32 u, t, 0x7f007f00",
            f"shr.u32 u, u, {11 - to.mantissa}",
        ]
        lines += ["lop3.b32 t, t, 0x80008000, u, 0xea", f"{to.fma} ${i}, t, power, none"]
    return _asm("t, u, power, none", *lines)


def _table(to: Wide, values: tuple[float, ...]) -> str:
    """A codebook of 16 as four words of its values' low bytes and four of their high bytes.

    prmt picks four of eight bytes by four 3-bit selectors, and four packed codes are just that: once on each
    half of the table, once more to take the half that each code's top bit names. No memory is touched.
    """
    rounded = unbiased_levels(torch.tensor(values, dtype=torch.float32, device="cpu"), to.dtype)
    bits = [word & 0xFFFF for word in rounded.view(torch.int16).tolist()]
    lines = [
        "and.b32 code, $4, 0x77777777",
        "shr.u32 top, $4, 1",
        "lop3.b32 top, top, 0x44444444, 0x32103210, 0xea",
    ]
    for out in (0, 2):
        for shift, name in ((0, "low"), (8, "high")):
            word = [
                f"{sum((bits[4 * quarter + i] >> shift & 0xFF) << 8 * i for i in range(4)):#010x}"
                for quarter in range(4)
            ]
            lines += [f"mov.b32 a, {word[0]}", f"mov.b32 b, {word[1]}", f"prmt.b32 {name}, a, b, code"]
            lines += [f"mov.b32 a, {word[2]}", f"mov.b32 b, {word[3]}", "prmt.b32 b, a, b, code"]
            lines += [f"prmt.b32 {name}, {name}, b, top"]
        lines += [f"prmt.b32 ${out}, low, high, 0x5140", f"prmt.b32 ${out + 1}, low, high, 0x7362"]
        if out == 0:
            lines += ["shr.u32 code, code, 16", "shr.u32 top, top, 16"]
    return _asm("code, top, low, high, a, b", *lines)


@dataclass(frozen=True)
class Code:
    """How the tensor-core kernels decode one format; float32 reads Format's own table instead.

    Args:
        bits: bits of a code: 2, 4 or 8.
        center: subtracted from the code by the decoding, so that integers come out small and exact; 0 for a
            codebook.
        decode: PTX from four bytes (the last operand) to a 16-bit float. 8 bit gives two registers of two
            weights; 4 bit a register for each byte, its two weights in the order of the row; 2 bit that for
            the first two weights of the four bytes, then that for the last two.
    """

    bits: int
    center: int
    decode: Callable[[Wide], str]


_E4M3 = Code(8, 0, _e4m3)
_NF4 = Code(4, 0, lambda to: _table(to, NF4))
_E2M1 = Code(4, 0, lambda to: _table(to, E2M1))
CODES = {
    "int8": Code(8, 128, _int8),
    "int4": Code(4, 8, lambda to: _int4(to, 8)),
    "int2": Code(2, 2, lambda to: _int2(to, 2)),
    "ternary": Code(2, 1, lambda to: _int2(to, 1)),
    "nf4": _NF4,
    "fp4": _E2M1,
    "mxfp4": _E2M1,
    "nvfp4": _E2M1,
    "fp8": _E4M3,
    "mxfp8": _E4M3,
}


@functools.cache
@aside()
def decoding(format: str, dtype: torch.dtype) -> str:
    """The PTX that decodes a format; none to float32, which reads Format's table."""
    wide = next((w for w in (HALF, BFLOAT) if w.dtype == dtype), None)
    return CODES[format].decode(wide) if wide else ""


@jit
def _first(pairs, Float: tl.constexpr):
    return (pairs & 0xFFFF).to(tl.uint16).to(Float, bitcast=True)


@jit
def _second(pairs, Float: tl.constexpr):
    return (pairs >> 16).to(tl.uint16).to(Float, bitcast=True)


@jit
def decode16(codes, Decode: tl.constexpr, Bits: tl.constexpr, Float: tl.constexpr):
    """Bytes [R, C * Bits / 8] to values [R, C] of a 16-bit dtype, less the format's center."""
    R: tl.constexpr = codes.shape[0]
    C: tl.constexpr = codes.shape[1] * 8 // Bits
    if Bits == 8:
        return tl.inline_asm_elementwise(
            Decode, "=&r,=&r,r", [codes], dtype=tl.uint16, is_pure=True, pack=4
        ).to(Float, bitcast=True)
    elif Bits == 4:
        pairs = tl.inline_asm_elementwise(
            Decode, "=&r,=&r,=&r,=&r,r", [codes], dtype=tl.uint32, is_pure=True, pack=4
        )
        return tl.join(_first(pairs, Float), _second(pairs, Float)).reshape(R, C)
    else:
        front, back = tl.inline_asm_elementwise(
            Decode, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [codes],
            dtype=(tl.uint32, tl.uint32), is_pure=True, pack=4,
        )  # fmt: skip
        even = tl.join(_first(front, Float), _first(back, Float))
        odd = tl.join(_second(front, Float), _second(back, Float))
        return tl.join(even, odd).reshape(R, C)


@jit
def decode32(codes, codebook, Bits: tl.constexpr, Center: tl.constexpr):
    """Bytes [R, C * Bits / 8] to float32 values [R, C], less Center."""
    R: tl.constexpr = codes.shape[0]
    C: tl.constexpr = codes.shape[1] * 8 // Bits
    if Bits == 4:
        codes = tl.join(codes & 15, codes >> 4).reshape(R, C)
    elif Bits == 2:
        even = tl.join(codes & 3, (codes >> 4) & 3)
        odd = tl.join((codes >> 2) & 3, codes >> 6)
        codes = tl.join(even, odd).reshape(R, C)
    return codes.to(tl.float32) - Center if codebook is None else tl.load(codebook + codes.to(tl.int32))


@jit
def times(w, scale, Float: tl.constexpr):
    """w times float32 scale, as if multiplied in float32 and rounded once to Float.

    bfloat16 has float32's range, so the scale is the sum of two of them, and a multiply-add of each rounds
    the product once (to 1/2 + 1/512 of the last place): two instructions for two weights instead of five. In
    float16 the second part would underflow.
    """
    if Float == tl.bfloat16:
        high = scale.to(tl.bfloat16)
        low = (scale - high.to(tl.float32)).to(tl.bfloat16)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, none; mov.b32 none, 0x80008000;"
            "fma.rn.bf16x2 t, $1, $3, none; fma.rn.bf16x2 $0, $1, $2, t; }",
            "=r,r,r,r", [w, high, low], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return (w.to(tl.float32) * scale).to(Float)


@jit
def times_less(w, scale, offset, Float: tl.constexpr):
    """w times scale, less offset, both float32: rounded to Float at the end alone."""
    return (w.to(tl.float32) * scale - offset).to(Float)

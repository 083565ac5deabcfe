"""lowbit_linear in Triton: y = x W^T + b and its gradient grad W, W decoded tile by tile from the canonical layout.

A program owns one [TileM, TileN] tile of the result and walks the contraction in steps of TileK. A step holds a tile of x
and the matching bytes of W, both brought to shared memory by `num_stages - 1` asynchronous copies in flight; the bytes
are read back in the order in which the tensor cores want their B operand, decoded in registers to x's dtype by a few
two-wide instructions (`Code`), and multiplied with float32 accumulators. Dense W exists nowhere else.

Where the scale goes:
- one scale a row (GroupSize 0): on the accumulator, once, after the loop;
- one scale a row and step, few tokens: on the step's partial product, TileM / TileK multiplications a weight, and the
  weight is never rounded;
- otherwise on the weight, in float32, then rounded to x's dtype, as `W.to(x.dtype)` would be. Sub is the largest run of
  columns in a step that shares a scale, so any group size that is a multiple of 8 is served by the same lines.

What bounds it: up to some 32 tokens the bytes of W, so programs split the contraction until the machine is full and a
second kernel adds their float32 partial sums in a fixed order; beyond, the tensor cores and the decoding, which TileM
tokens share.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from bitfuse.formats import FORMATS, NESTED_BLOCK, Format, nested_code
from bitfuse.op import simulated_gpu

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
except ImportError:  # the package is whole without Triton; supports() says why this backend is not used
    triton = tl = None  # type: ignore[assignment]

    def jit(function: Any = None, **options: Any) -> Any:
        return function if function is not None else jit


@dataclass(frozen=True)
class Code:
    """How the tensor-core kernels decode one format.

    Args:
        bits: bits of a code: 2, 4 or 8.
        center: subtracted from the code by the decoding, so that integers come out small and exact; 0 for a codebook.
        half: PTX from four bytes ($0.. out, the last operand in) to float16. 8 bit gives two registers of two weights;
            4 bit one register a byte, its two weights in the order of the row; 2 bit that for the first weights of the
            four bytes, then that for the last.
        bfloat: the same to bfloat16.
    """

    bits: int
    center: int
    half: str
    bfloat: str


def _each(lines: str, count: int, **fields: list[str]) -> str:
    """`lines` once for each output register i, with {i} and the i-th of each field put in."""
    return "\n".join(
        lines.format(i=i, **{name: values[i] for name, values in fields.items()}) for i in range(count)
    )


def _asm(registers: str, body: str) -> str:
    return f"{{\n.reg .b32 {registers};\n{body}\n}}"


# Integers: the code is put into the mantissa of a power of two (1024 in float16, 128 in bfloat16), which one fused
# multiply-add then takes away together with the center. Every value on the way is exact.
_BYTE = ["0x0000", "0x1111", "0x2222", "0x3333"]  # prmt: byte i to both halves
_PAIR = ["0x4140", "0x4342"]  # prmt: bytes 2i and 2i+1 to the low bytes of the two halves
_TOP_PAIR = ["0x1404", "0x3424"]  # prmt: the same, to the high bytes
# the low half takes the low nibble as it stands, the high half the high nibble, worth 16 times as much
_INT4_HALF = _asm(
    "t, one, less",
    "mov.b32 one, 0x2c003c00;\nmov.b32 less, 0xd480e408;\n"
    + _each(
        "prmt.b32 t, $4, 0, {byte};\nlop3.b32 t, t, 0x00f0000f, 0x64006400, 0xea;\nfma.rn.f16x2 ${i}, t, one, less;",
        4,
        byte=_BYTE,
    ),
)
# 7 bits of mantissa hold a nibble only at the bottom, so the high nibbles are shifted down first
_INT4_BFLOAT = _asm(
    "t, h, one, less",
    "mov.b32 one, 0x3f803f80;\nmov.b32 less, 0xc308c308;\nshr.u32 h, $4, 4;\n"
    + _each(
        "prmt.b32 t, $4, h, {byte};\nlop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;\nfma.rn.bf16x2 ${i}, t, one, less;",
        4,
        byte=["0x4440", "0x5551", "0x6662", "0x7773"],
    ),
)
_INT8_HALF = _asm(
    "t, less",
    "mov.b32 less, 0x64806480;\n"
    + _each("prmt.b32 t, $2, 0x64646464, {pair};\nsub.f16x2 ${i}, t, less;", 2, pair=_PAIR),
)
# low 7 bits over 128, less 128 where the top bit is set and 256 where it is not
_INT8_BFLOAT = _asm(
    "t, less, one",
    "mov.b32 one, 0x3f803f80;\n"
    + _each(
        "prmt.b32 t, $2, 0, {pair};\nlop3.b32 less, t, 0x00800080, 0xc380c380, 0x6a;\n"
        "lop3.b32 t, t, 0x007f007f, 0x43004300, 0xea;\nfma.rn.bf16x2 ${i}, t, one, less;",
        2,
        pair=_PAIR,
    ),
)


class _Float(NamedTuple):
    """What the decoding of integers has to know of a 16-bit float."""

    dtype: torch.dtype
    fma: str
    magic: float  # the power of two whose mantissa counts by ones


_HALF = _Float(torch.float16, "fma.rn.f16x2", 1024.0)
_BFLOAT = _Float(torch.bfloat16, "fma.rn.bf16x2", 128.0)


def _twice(low: float, high: float, dtype: torch.dtype) -> str:
    """The register that holds two floats."""
    bits = torch.tensor([low, high], dtype=dtype).view(torch.int16).tolist()
    return f"{bits[0] & 0xFFFF | (bits[1] & 0xFFFF) << 16:#010x}"


def _int2(to: _Float, center: int) -> str:
    """2 bit: the first pair of a byte in one register, worth 1 and 4; the second in another, from the byte shifted."""
    return _asm(
        "t, h, one, less, magic",
        f"mov.b32 one, {_twice(1, 0.25, to.dtype)};\nmov.b32 magic, {_twice(to.magic, to.magic, to.dtype)};\n"
        f"mov.b32 less, {_twice(-to.magic - center, -to.magic / 4 - center, to.dtype)};\nshr.u32 h, $8, 4;\n"
        + _each(
            f"prmt.b32 t, $8, h, {{byte}};\nlop3.b32 t, t, 0x000c0003, magic, 0xea;\n{to.fma} ${{i}}, t, one, less;",
            8,
            byte=[*_BYTE, "0x4444", "0x5555", "0x6666", "0x7777"],
        ),
    )


def _fp8(mantissa_bits: int, power: str, multiply: str) -> str:
    """e4m3: sign kept, exponent and mantissa moved to where the wider float has them, then times 2**(its bias - 7)."""
    return _asm(
        "t, s, power, none",
        f"mov.b32 power, {power};\nmov.b32 none, 0x80008000;\n"
        + _each(
            "prmt.b32 t, $2, 0, {pair};\nand.b32 s, t, 0x7f007f00;\n"
            f"shr.u32 s, s, {11 - mantissa_bits};\n"
            "lop3.b32 t, t, 0x80008000, s, 0xea;\n"
            f"{multiply} ${{i}}, t, power, none;",
            2,
            pair=_TOP_PAIR,
        ),
    )


_FP8 = Code(8, 0, _fp8(10, "0x5c005c00", "fma.rn.f16x2"), _fp8(7, "0x7b807b80", "fma.rn.bf16x2"))


def _table(values: tuple[float, ...], dtype: torch.dtype) -> str:
    """A codebook of 16 as four words of its values' low bytes and four of their high bytes.

    `prmt` picks four of eight bytes by four 3-bit selectors, and four packed codes are just that: once on each half of
    the table, once more to take the half that each code's top bit names. No memory is touched.
    """
    bits = [word & 0xFFFF for word in torch.tensor(values, dtype=dtype).view(torch.int16).tolist()]
    low, high = (
        [
            f"{sum((bits[4 * quarter + i] >> shift & 0xFF) << 8 * i for i in range(4)):#010x}"
            for quarter in range(4)
        ]
        for shift in (0, 8)
    )
    pick = "mov.b32 a, {0};\nmov.b32 b, {1};\nprmt.b32 {4}, a, b, low;\n"
    pick += "mov.b32 a, {2};\nmov.b32 b, {3};\nprmt.b32 t, a, b, low;\nprmt.b32 {4}, {4}, t, high;\n"
    four = pick.format(*low, "u") + pick.format(*high, "v")
    return _asm(
        "low, high, a, b, t, u, v",
        "and.b32 low, $4, 0x77777777;\nshr.u32 high, $4, 1;\nlop3.b32 high, high, 0x44444444, 0x32103210, 0xea;\n"
        f"{four}prmt.b32 $0, u, v, 0x5140;\nprmt.b32 $1, u, v, 0x7362;\n"
        "shr.u32 low, low, 16;\nshr.u32 high, high, 16;\n"
        f"{four}prmt.b32 $2, u, v, 0x5140;\nprmt.b32 $3, u, v, 0x7362;",
    )


def _codebook(format: Format) -> Code:
    values = format.codebook or ()
    return Code(4, 0, _table(values, torch.float16), _table(values, torch.bfloat16))


CODES = {
    "int4": Code(4, 8, _INT4_HALF, _INT4_BFLOAT),
    "int2": Code(2, 2, _int2(_HALF, 2), _int2(_BFLOAT, 2)),
    "ternary": Code(2, 1, _int2(_HALF, 1), _int2(_BFLOAT, 1)),
    "int8": Code(8, 128, _INT8_HALF, _INT8_BFLOAT),
    **dict.fromkeys(("fp8", "mxfp8"), _FP8),
    "nf4": _codebook(FORMATS["nf4"]),
    **dict.fromkeys(("fp4", "mxfp4", "nvfp4"), _codebook(FORMATS["fp4"])),
}


# ---------------------------------------------------------------------------------------------------------------- kernels


@jit
def _low(pairs, Float: tl.constexpr):
    return (pairs & 0xFFFF).to(tl.uint16).to(Float, bitcast=True)


@jit
def _high(pairs, Float: tl.constexpr):
    return (pairs >> 16).to(tl.uint16).to(Float, bitcast=True)


@jit
def _decode(
    codes, codebook, Decode: tl.constexpr, Bits: tl.constexpr, Center: tl.constexpr, Float: tl.constexpr
):
    """Bytes [R, C * Bits / 8] to values [R, C] of dtype Float, less Center."""
    R: tl.constexpr = codes.shape[0]
    C: tl.constexpr = codes.shape[1] * 8 // Bits
    if Float == tl.float32:
        if Bits == 4:
            codes = tl.join(codes & 15, codes >> 4).reshape(R, C)
        elif Bits == 2:
            even = tl.join(codes & 3, (codes >> 4) & 3)
            odd = tl.join((codes >> 2) & 3, codes >> 6)
            codes = tl.join(even, odd).reshape(R, C)
        if codebook is None:
            values = codes.to(tl.float32) - Center
        else:
            values = tl.load(codebook + codes.to(tl.int32))
    elif Bits == 8:
        words = tl.inline_asm_elementwise(Decode, "=&r,=&r,r", [codes], dtype=tl.uint16, is_pure=True, pack=4)
        values = words.to(Float, bitcast=True)
    elif Bits == 4:
        pairs = tl.inline_asm_elementwise(
            Decode, "=&r,=&r,=&r,=&r,r", [codes], dtype=tl.uint32, is_pure=True, pack=4
        )
        values = tl.join(_low(pairs, Float), _high(pairs, Float)).reshape(R, C)
    else:
        first, last = tl.inline_asm_elementwise(
            Decode,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=4,
        )
        even = tl.join(_low(first, Float), _low(last, Float))
        odd = tl.join(_high(first, Float), _high(last, Float))
        values = tl.join(even, odd).reshape(R, C)
    return values


@jit
def _group(scales, zeros, scale_scales, scale_offset, code, rows, k, groups, GroupSize: tl.constexpr,
           Sub: tl.constexpr, Count: tl.constexpr, Center: tl.constexpr, Block: tl.constexpr, Scale: tl.constexpr):  # fmt: skip
    """Scale (float32) and zero point less Center (float32) of the Count runs of Sub columns from k on, for each row.

    [R] when there is one run, [R, Count] else. Runs beyond the last group repeat it: what they scale is masked.
    """
    if GroupSize == 0:
        at = rows * groups
    elif Count == 1:
        at = rows * groups + tl.minimum(k // GroupSize, groups - 1)
    else:
        g = tl.minimum((k + tl.arange(0, Count) * Sub) // GroupSize, groups - 1)
        at = rows[:, None] * groups + g[None, :]
    scale = tl.load(scales + at)
    if Scale == "e8m0":
        # 2**(byte - 127); the lowest is a float32 without a leading one, the highest NaN
        bits = scale.to(tl.uint32) << 23
        scale = tl.where(bits == 0, 0x400000, tl.where(bits == 0x7F800000, 0x7FC00000, bits)).to(
            tl.float32, bitcast=True
        )
    elif Scale == "e4m3":
        # sign, exponent and mantissa to float32's places, times 2**(127 - 7)
        bits = (scale.to(tl.uint32) & 0x80) << 24 | (scale.to(tl.uint32) & 0x7F) << 20
        scale = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    if scale_offset is None:
        scale = scale.to(tl.float32)
        if scale_scales is not None:
            scale *= tl.load(scale_scales)
    else:
        block = tl.load(scale_scales + at // Block)
        scale = tl.load(code + scale.to(tl.int32)) * block + tl.load(scale_offset)
    if zeros is None:
        zero = scale
    else:
        zero = tl.load(zeros + at).to(tl.float32) - Center
    return scale, zero


@jit
def _spread(values, run, Count: tl.constexpr, Float: tl.constexpr, Subtract: tl.constexpr):
    """values [R, C] times (or minus) what its runs of C / Count columns share; products are float32, then rounded."""
    R: tl.constexpr = values.shape[0]
    C: tl.constexpr = values.shape[1]
    if Count == 1:
        if Subtract:
            values = values - run.to(Float)[:, None]
        else:
            values = _times(values, run[:, None], Float)
    else:
        values = values.reshape(R, Count, C // Count)
        if Subtract:
            values = values - run.to(Float)[:, :, None]
        else:
            values = _times(values, run[:, :, None], Float)
        values = values.reshape(R, C)
    return values


@jit
def _times(values, scale, Float: tl.constexpr):
    """values times float32 scale, as if multiplied in float32 and rounded once to Float.

    bfloat16 has float32's range, so the scale is the sum of two of them, and a fused multiply-add of each rounds the
    product once (to 1/2 + 1/512 of the last place): two instructions for two weights instead of five. In float16 the
    second part would underflow.
    """
    if Float == tl.bfloat16:
        high = scale.to(tl.bfloat16)
        low = (scale - high.to(tl.float32)).to(tl.bfloat16)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 t, $1, $3, zero; fma.rn.bf16x2 $0, $1, $2, t; }",
            "=r,r,r,r", [values, high, low], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    return (values.to(tl.float32) * scale).to(Float)


@jit
def _multiply_add(a, b, acc):
    """acc + a b. float32 sums each step by itself first: one long chain of additions loses digits with its length."""
    if a.dtype == tl.float32:
        acc = acc - tl.dot(a, -b, input_precision="ieee")  # a sum would be folded back into one chain
    else:
        acc = tl.dot(a, b, acc)
    return acc


@jit
def _tile(m_tiles, n_tiles, Band: tl.constexpr):
    """Tile of this program: down a band of Band row tiles, then to the next column, so that a wave shares W in L2."""
    program = tl.program_id(0)
    band = program // (Band * n_tiles)
    first = band * Band
    height = tl.minimum(m_tiles - first, Band)
    within = program - band * Band * n_tiles
    return first + within % height, within // height


@jit
def _store(acc, out, bias, m, n, M, N, Splits: tl.constexpr):
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if Splits > 1:
        at += tl.program_id(1).to(tl.int64) * M * N
    elif bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


# A new length is no reason to compile. N, K and stride come divided by their Align, which is all that a compiler needs:
# how wide a vector may be.
_INTEGERS = ["M", "N", "K", "stride", "steps"]


@jit(do_not_specialize=_INTEGERS)
def _forward_kernel(
    x, qweight, scales, zeros, scale_scales, scale_offset, code, codebook, bias, out, M, N, K, stride, steps,
    Decode: tl.constexpr, Bits: tl.constexpr, Center: tl.constexpr, GroupSize: tl.constexpr, Block: tl.constexpr,
    Scale: tl.constexpr, KAlign: tl.constexpr, NAlign: tl.constexpr, StrideAlign: tl.constexpr, Even: tl.constexpr,
    TileM: tl.constexpr, TileN: tl.constexpr, TileK: tl.constexpr, Sub: tl.constexpr, ScaleProduct: tl.constexpr,
    Splits: tl.constexpr, Band: tl.constexpr,
):  # fmt: skip
    """x [M, K] in rows of `stride` elements, times W^T: out [M, N], or with Splits float32 partial sums [Splits, M, N].

    Program (tile, split) takes `steps` steps of TileK columns.
    """
    K *= KAlign
    N *= NAlign
    stride = stride.to(tl.int64) * StrideAlign
    Float: tl.constexpr = x.dtype.element_ty
    Count: tl.constexpr = TileK // Sub
    Bytes: tl.constexpr = TileK * Bits // 8
    groups = 1 if GroupSize == 0 else K // GroupSize
    tile_m, tile_n = _tile(tl.cdiv(M, TileM), tl.cdiv(N, TileN), Band)
    m = tile_m * TileM + tl.arange(0, TileM)
    n = tile_n * TileN + tl.arange(0, TileN)
    rows = tl.minimum(n, N - 1).to(
        tl.int64
    )  # rows past the end repeat the last: their results are not stored
    column = tl.arange(0, TileK)
    byte = tl.arange(0, Bytes)
    x_at = x + m.to(tl.int64)[:, None] * stride + column[None, :]
    w_at = qweight + rows[:, None] * (K // 8 * Bits) + byte[None, :]
    begin = tl.program_id(1) * steps * TileK
    end = tl.minimum(begin + steps * TileK, K)
    scale, zero = _group(scales, zeros, scale_scales, scale_offset, code, rows, begin, groups, GroupSize, Sub, Count,
                         Center, Block, Scale)  # fmt: skip
    acc = tl.zeros((TileM, TileN), tl.float32)
    for k in range(begin, end, TileK):
        if Even:
            x_tile = tl.load(x_at + k, mask=(m < M)[:, None], other=0.0)
            codes = tl.load(w_at + k // 8 * Bits)
        else:
            x_tile = tl.load(x_at + k, mask=(m < M)[:, None] & (column < K - k)[None, :], other=0.0)
            codes = tl.load(w_at + k // 8 * Bits, mask=(byte < (K - k) // 8 * Bits)[None, :], other=0)
        w = _decode(codes, codebook, Decode, Bits, Center, Float)
        if zeros is not None:
            w = _spread(w, zero, Count, Float, True)
        if GroupSize == 0:
            acc = _multiply_add(x_tile, w.T, acc)
        else:
            if ScaleProduct:
                acc += tl.dot(x_tile, w.T, input_precision="ieee") * scale[None, :]
            else:
                acc = _multiply_add(x_tile, _spread(w, scale, Count, Float, False).T, acc)
            # asked for a step ahead: too narrow for an asynchronous copy, it would be waited for
            scale, zero = _group(scales, zeros, scale_scales, scale_offset, code, rows, k + TileK, groups, GroupSize,
                                 Sub, Count, Center, Block, Scale)  # fmt: skip
    if GroupSize == 0:
        acc *= scale[None, :]
    _store(acc, out, bias, m, n, M, N, Splits)


@jit(do_not_specialize=_INTEGERS)
def _grad_x_kernel(
    grad, qweight, scales, zeros, scale_scales, scale_offset, code, codebook, out, M, N, K, stride, steps,
    Decode: tl.constexpr, Bits: tl.constexpr, Center: tl.constexpr, GroupSize: tl.constexpr, Block: tl.constexpr,
    Scale: tl.constexpr, KAlign: tl.constexpr, NAlign: tl.constexpr, StrideAlign: tl.constexpr, Even: tl.constexpr,
    TileM: tl.constexpr, TileN: tl.constexpr, TileK: tl.constexpr, Sub: tl.constexpr,
    Splits: tl.constexpr, Band: tl.constexpr,
):  # fmt: skip
    """grad [M, N] in rows of `stride` elements, times W: out [M, K], or with Splits partial sums [Splits, M, K].

    The tile is [TileM, TileN] of out, TileN columns of W; a step contracts TileK of W's rows. A scale belongs to a row
    that is summed over, so it always goes on the weight.
    """
    K *= KAlign
    N *= NAlign
    stride = stride.to(tl.int64) * StrideAlign
    Float: tl.constexpr = grad.dtype.element_ty
    Count: tl.constexpr = TileN // Sub
    Bytes: tl.constexpr = TileN * Bits // 8
    groups = 1 if GroupSize == 0 else K // GroupSize
    tile_m, tile_k = _tile(tl.cdiv(M, TileM), tl.cdiv(K, TileN), Band)
    m = tile_m * TileM + tl.arange(0, TileM)
    k = tile_k * TileN + tl.arange(0, TileN)
    byte = tile_k * Bytes + tl.arange(0, Bytes)
    row = tl.arange(0, TileK)
    grad_at = grad + m.to(tl.int64)[:, None] * stride + row[None, :]
    width = K // 8 * Bits
    begin = tl.program_id(1) * steps * TileK
    end = tl.minimum(begin + steps * TileK, N)
    acc = tl.zeros((TileM, TileN), tl.float32)
    for n in range(begin, end, TileK):
        rows = tl.minimum(n + row, N - 1).to(tl.int64)
        grad_tile = tl.load(grad_at + n, mask=(m < M)[:, None] & (row < N - n)[None, :], other=0.0)
        if Even:
            codes = tl.load(qweight + rows[:, None] * width + byte[None, :])
        else:
            codes = tl.load(
                qweight + rows[:, None] * width + byte[None, :], mask=(byte < width)[None, :], other=0
            )
        scale, zero = _group(scales, zeros, scale_scales, scale_offset, code, rows, tile_k * TileN, groups, GroupSize,
                             Sub, Count, Center, Block, Scale)  # fmt: skip
        w = _decode(codes, codebook, Decode, Bits, Center, Float)
        if zeros is not None:
            w = _spread(w, zero, Count, Float, True)
        w = _spread(w, scale, Count, Float, False)
        acc = _multiply_add(grad_tile, w, acc)
    _store(acc, out, None, m, k, M, K, Splits)


@jit(do_not_specialize=["M", "N", "splits"])
def _reduce_kernel(partial, bias, out, M, N, splits, NAlign: tl.constexpr, Width: tl.constexpr):
    """out = bias + the sum of partial [splits, M, N] over its first dimension, in order; a program has a stretch of a row."""
    N *= NAlign
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * Width + tl.arange(0, Width)
    mask = n < N
    acc = tl.zeros((Width,), tl.float32)
    for split in range(splits):
        acc += tl.load(partial + (split * M + row) * N + n, mask=mask, other=0.0)
    if bias is not None:
        acc += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, acc.to(out.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------------------- policy


class Config(NamedTuple):
    """What a launch fixes at compile time, and how it divides the contraction (see `choose`)."""

    tile_m: int
    tile_n: int
    tile_k: int
    sub: int
    scale_product: bool
    splits: int
    steps: int
    warps: int
    stages: int
    registers: int | None


MIN_SPLIT = (
    512  # contracted at least by a program: for less, partial sums cost more than the weights they stand for
)
BAND = 8  # row tiles that go through W together
REDUCE_WIDTH = 512


@functools.lru_cache(maxsize=4096)
def choose(
    m: int,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    float_bytes: int,
    capability: int,
    multiprocessors: int,
    grad_x: bool = False,
) -> Config:
    """Tiles for a result [m, n] contracted over k; group_size 0 is one scale a row of W.

    - Up to 32 tokens bytes are the bound: enough programs that some 24 KB of W are in flight on each multiprocessor, got
      by splitting the contraction, and as few instructions a weight as may be: a program decodes 128 rows, so that each
      x fragment is read for 32 of them a warp, in steps of a whole group where that is 64 or 128, so that products are
      scaled instead of weights.
    - Then decoding and tensor cores are: a decoded weight serves TileM = 64, then 128 tokens. At 128 x 128 eight warps
      hold the accumulators in 64 registers each, so that two programs fit a multiprocessor (128 registers, 74 to 82 KB)
      and one decodes while the other multiplies. The contraction is split only where tiles are fewer than
      multiprocessors.
    - float32 runs on the FMA units: the largest tiles whose operands fit the registers.
    """
    warps, stages = 4, 4
    if float_bytes == 4:
        tile_m, tile_n, tile_k, stages = (16, 32, 32, 2) if m <= 16 else (64, 64, 16, 2)
    elif m <= 32:
        tile_m, tile_n, tile_k = 16 if m <= 16 else 32, 128, 128
        if grad_x or (group_size % 128 and not group_size % 64):
            tile_k = 64
        if -(-n // tile_n) * max(1, k // MIN_SPLIT) * 2 < 3 * multiprocessors:
            tile_n = 64
    elif m <= 64:
        # the longer step needs 98 KB, twice, and accumulators that wgmma leaves room for
        tile_m, tile_n, tile_k, stages = 64, 128, 128 if bits == 4 and capability in (90, 100) else 64, 3
    else:
        tile_m, tile_n, tile_k, warps, stages = 128, 128, 64, 8, 3
    run = tile_n if grad_x else tile_k
    sub = math.gcd(group_size, run) if group_size else run
    scale_product = not grad_x and group_size > 0 and sub == run and (tile_m <= 32 or float_bytes == 4)
    tiles = -(-m // tile_m) * -(-n // tile_n)
    total = -(-k // tile_k)
    most = max(1, k // MIN_SPLIT)
    if m <= 32:
        splits = _fewest_splits(tiles, min(most, max(1, 4 * multiprocessors // tiles)), multiprocessors)
    else:
        splits = max(1, min(most, multiprocessors // tiles))
    steps = -(-total // splits)
    registers = 128 if tile_m == 128 and capability in (90, 100) else None
    splits = -(-total // steps)
    return Config(tile_m, tile_n, tile_k, sub, scale_product, splits, steps, warps, stages, registers)


def _fewest_splits(tiles: int, most: int, multiprocessors: int) -> int:
    """The fewest splits that fill the last wave as well as 85% of the best, with three programs to two multiprocessors
    or as near to that as `most` splits come."""
    counts = [s for s in range(1, most + 1) if 2 * tiles * s >= 3 * multiprocessors] or [most]
    filled = [tiles * s / (multiprocessors * -(-tiles * s // multiprocessors)) for s in counts]
    return next(s for s, f in zip(counts, filled, strict=True) if f >= 0.85 * max(filled))


# ----------------------------------------------------------------------------------------------------------------- launch


def _index(device: torch.device) -> int:
    """A device's number; for the simulator, which can change between calls, less its compute capability."""
    return (
        device.index if device.index is not None else -triton.runtime.driver.active.get_current_target().arch
    )


@functools.lru_cache(maxsize=64)
def _device(index: int) -> tuple[int, int]:
    """Compute capability (80 is 8.0) and multiprocessors of a device (see `_index`)."""
    if index < 0:
        return -index, triton.runtime.driver.active.utils.get_device_properties(0)["multiprocessor_count"]
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


_SCALES = {
    torch.float32: "float",
    torch.float16: "float",
    torch.bfloat16: "float",
    torch.uint8: "nested",
    torch.float8_e8m0fnu: "e8m0",
    torch.float8_e4m3fn: "e4m3",
}
_served: set[torch.device] = set()


def _refuse_device(device: torch.device) -> str | None:
    if device in _served:
        return None
    if triton is None:
        return "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and simulated_gpu()):
        return f"it runs on cuda, the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "its decoding is PTX, which only NVIDIA GPUs run"
    if (capability := _device(_index(device))[0]) < 80:
        return f"it needs compute capability 8.0, {device} has {capability / 10}"
    _served.add(device)
    return None


def supports(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    group_size: int,
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return supports_grad_x(x, qweight, scales, zeros, scale_scales, scale_offset, format, group_size)


def supports_grad_x(
    grad: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    format: str,
    group_size: int,
) -> str | None:
    """None when `run_grad_x` can serve the call, else the reason."""
    if (reason := _refuse_device(qweight.device)) is not None:
        return reason
    if format not in CODES:
        return f"format {format!r} is none of {', '.join(CODES)}"
    if scales.dtype not in _SCALES:
        return f"scales are {scales.dtype}"
    if group_size % 8:
        return f"group_size {group_size} is not a multiple of 8"
    if grad.numel() >= 2**31 and grad.numel() // grad.shape[-1] >= 2**31:
        return f"{grad.numel() // grad.shape[-1]} rows are more than 2**31 - 1"
    if not (qweight.is_contiguous() and scales.is_contiguous() and (zeros is None or zeros.is_contiguous())):
        return "qweight, scales or zeros is not contiguous"
    return None


def run(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    group_size: int,
) -> torch.Tensor:
    """y = x W^T + bias, of x's dtype and leading shape."""
    n, k = qweight.shape[0], x.shape[-1]
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    _run(
        _rows(x),
        out,
        n,
        k,
        qweight,
        scales,
        zeros,
        scale_scales,
        scale_offset,
        bias,
        format,
        group_size,
        False,
    )
    return out


def run_grad_x(
    grad: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    format: str,
    group_size: int,
) -> torch.Tensor:
    """grad W, of grad's dtype and leading shape."""
    n, k = qweight.shape[0], qweight.shape[1] * 8 // CODES[format].bits
    out = torch.empty((*grad.shape[:-1], k), dtype=grad.dtype, device=grad.device)
    _run(
        _rows(grad),
        out,
        n,
        k,
        qweight,
        scales,
        zeros,
        scale_scales,
        scale_offset,
        None,
        format,
        group_size,
        True,
    )
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as a matrix whose rows one stride addresses; a copy only where no view is one."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _aligned(t: torch.Tensor | None) -> bool:
    return t is None or t.data_ptr() % 16 == 0


_handles: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any, grid: tuple[int, int, int], key: tuple[Any, ...], args: tuple[Any, ...], config: Config
) -> None:
    """Launch by the compiled kernel that `key` names: Triton's own lookup costs several times the launch.

    `key` holds what Triton would specialise on: dtypes, which pointers are aligned or None, and the constants in args.
    """
    handle = _handles.get(key)
    if handle is None:
        _handles[key] = kernel[grid](
            *args,
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
            enable_fp_fusion=True,
        )
    else:
        handle[grid](*args)


def _run(
    x: torch.Tensor,
    out: torch.Tensor,
    n: int,
    k: int,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    group_size: int,
    grad_x: bool,
) -> None:
    m = x.shape[0]
    width, depth = (k, n) if grad_x else (n, k)
    if m == 0 or width == 0:
        return
    if depth == 0:
        out.zero_()
        return
    device = _index(x.device)
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(
                x,
                out,
                n,
                k,
                qweight,
                scales,
                zeros,
                scale_scales,
                scale_offset,
                bias,
                format,
                group_size,
                grad_x,
            )
        return
    code = CODES[format]
    if group_size == k:
        group_size = 0
    config = choose(m, width, depth, code.bits, group_size, x.element_size(), *_device(device), grad_x)
    tile_m, tile_n, tile_k, sub, scale_product, splits, steps, *_ = config
    stride = x.stride(0) if m > 1 else depth
    k_align, n_align, stride_align = math.gcd(k, 128), math.gcd(n, 16), math.gcd(stride, 16)
    even = width % tile_n == 0 if grad_x else depth % tile_k == 0
    partial = torch.empty((splits, m, width), dtype=torch.float32, device=x.device) if splits > 1 else None
    scale_kind = _SCALES[scales.dtype]
    if scale_kind in ("e8m0", "e4m3"):
        scales = scales.view(torch.uint8)
    tensors = (
        x,
        qweight,
        scales,
        zeros,
        scale_scales,
        scale_offset,
        None if scale_offset is None else nested_code(x.device),
        FORMATS[format].values(x.device) if x.dtype == torch.float32 and not code.center else None,
        *(() if grad_x else (bias if partial is None else None,)),
        out if partial is None else partial,
    )
    decode = "" if x.dtype == torch.float32 else code.half if x.dtype == torch.float16 else code.bfloat
    constants = (
        decode, code.bits, code.center, group_size, NESTED_BLOCK, scale_kind, k_align, n_align, stride_align, even,
        tile_m, tile_n, tile_k, sub, *(() if grad_x else (scale_product,)), min(splits, 2), BAND,
    )  # fmt: skip
    key = (
        grad_x, device, format, x.dtype, scales.dtype, scale_kind, zeros is None, scale_scales is None, scale_offset is None, bias is None, group_size,
        k_align, n_align, stride_align, even, config.tile_m, config.tile_n, config.tile_k, splits > 1,
        *map(_aligned, tensors),
    )  # fmt: skip
    sizes = (m, n // n_align, k // k_align, stride // stride_align, steps)
    grid = (-(-m // tile_m) * -(-width // tile_n), splits, 1)
    _launch(_grad_x_kernel if grad_x else _forward_kernel, grid, key, (*tensors, *sizes, *constants), config)
    if partial is not None:
        align = k_align if grad_x else n_align
        _launch(
            _reduce_kernel,
            (-(-width // REDUCE_WIDTH), m, 1),
            ("reduce", device, out.dtype, bias is None, align, _aligned(out), _aligned(bias)),
            (partial, bias, out, m, width // align, splits, align, REDUCE_WIDTH),
            config,
        )

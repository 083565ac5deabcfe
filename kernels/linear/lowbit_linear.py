"""lowbit_linear in Triton: y = x W^T + b and its gradient grad W, W decoded tile by tile from the canonical
layout.

A program owns one [TileM, TileN] tile of the result and walks the contraction in steps of TileK. A step holds
a tile of x and the matching bytes of W; `num_stages - 1` steps are on their way to shared memory by
asynchronous copies. The bytes are read back in the order in which the tensor cores want their B operand
(mma.sync), or along rows (wgmma, whose B operand goes through shared memory once more), decoded in registers
to x's dtype by a few two-wide instructions (`Code`), and multiplied with float32 accumulators. Dense W exists
nowhere else.

Where the scale goes:
- one scale a row (GroupSize 0): on the accumulator, once, after the loop;
- one scale a row and step, few tokens: on the step's partial product, TileM / TileK multiplications a weight,
  and the weight is never rounded;
- otherwise on the weight, in float32, then rounded to x's dtype, as `W.to(x.dtype)` would be. Sub is the
  largest run of columns in a step that shares a scale, so the same lines serve any group size that is a
  multiple of 8. Float offsets always go this way: no integer is exact any more that would be worth keeping.

A low-rank term (`LowRank`: an adapter of `lora_linear`) is R more columns of the contraction, read from
tensors that are small beside W: h [M, R], whose float32 sums are scaled and rounded to x's dtype, and a
factor, B [N, R] or A [R, K]. The forward adds it after the loop, and from Hopper on waits only there for the
kernel that makes h (Overlap), which reads memory while this one multiplies. grad W begins with it, because
dropout masks it alone and no second accumulator fits the registers.

What bounds it: up to some 32 tokens the bytes of W, so programs split the contraction until the machine is
full and a second kernel adds their float32 partial sums in a fixed order; beyond, the tensor cores and the
decoding, which TileM tokens share.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ...core.cost import Cost, Prediction, Rates
from ...core.device import Device, device_of
from ...core.limits import NESTED_BLOCK
from ...weights.formats import FORMATS, nested_code
from ...weights.weight import WeightTensors
from ..core.decoding import CODES, decode16, decode32, decoding, times, times_less
from ..core.dropout import keep, row_keys
from ..core.launch import Plan, alignment_of, as_matrix, contiguous, dtype_of, jit, planned, refuse, tl
from ..core.products import multiply_add
from .lowbit_linear_tiles import Config, Product, choose, tuned
from .lowbit_linear_tiles import predicted as tiles_of_the_rule

# what goes to a kernel together


class Matrix(NamedTuple):
    """The tensors of W [N, K] in few bits, as the kernels read them; None for what its format has not.

    Attributes:
        qweight: uint8 [N, K * Bits / 8].
        scales: [N / Rows, groups], one-byte ones as uint8.
        zeros: uint8 [N / Rows, groups].
        offsets: of a float dtype [N / Rows, groups].
        scale_scales: float32, one, or of nested scales one for each block of them.
        scale_offset: float32, one, of nested scales.
        nested_code: float32 [256], what a nested scale's byte stands for.
        codebook: float32 [2**Bits], for x in float32 alone: its decoding has no PTX.
    """

    qweight: Any
    scales: Any
    zeros: Any
    offsets: Any
    scale_scales: Any
    scale_offset: Any
    nested_code: Any
    codebook: Any


class Term(NamedTuple):
    """The tensors of a low-rank term; all None where there is none.

    Attributes:
        h: float32 [M, R].
        factor: [N, R] for the forward, [R, K] for the gradient.
        scale_by: float32, one, that the forward's term is multiplied with, or None.
        seed: int64, one, of the gradient's dropout mask, or None.
    """

    h: Any
    factor: Any
    scale_by: Any
    seed: Any


class Codes(NamedTuple):
    """How W is read; constants.

    Attributes:
        Decode: PTX from codes to a 16-bit float (`decoding`); "" for float32.
        Bits, Center: of the format's `Code`.
        Scale: what a scale is: "float", "nested", "e8m0" or "e4m3".
        GroupSize: columns that share a scale; 0 for one scale a row.
        Rows: rows that share a scale.
        Block: nested scales that share a scale.
    """

    Decode: str
    Bits: int
    Center: int
    Scale: str
    GroupSize: int
    Rows: int
    Block: int


class Aligned(NamedTuple):
    """By what N, K, R and the stride of x are divided on their way to a kernel; constants. A new length is no
    reason to compile: all that a compiler needs to know is how wide a vector may be."""

    N: int
    K: int
    R: int
    Stride: int


class Tiles(NamedTuple):
    """What a program works on; constants.

    Attributes:
        M, N, K: rows and columns of its tile of the result, and the contraction's step.
        R: columns of a low-rank term in one step.
        Sub: columns of W in a tile that share a scale.
        ScaleProduct: whether a step's product is scaled, instead of its weights.
        Splits: whether the contraction is split among programs.
        Band: row tiles that go through W together.
        Even: whether no tile of W reaches past its last column.
        Overlap: whether it begins before the kernel that makes h has ended.
    """

    M: int
    N: int
    K: int
    R: int
    Sub: int
    ScaleProduct: bool
    Splits: bool
    Band: int
    Even: bool
    Overlap: bool


class Stretch(NamedTuple):
    """What a program of the second kernel sums; constants: columns, and by what N is divided."""

    Align: int
    Width: int


# kernels


@jit
def _weights(
    codes, weight, scale, zero, Code, Scaled: tl.constexpr, Count: tl.constexpr, Float: tl.constexpr
):  # fmt: skip
    """Weights [R, C] of dtype Float from their bytes: less the zero point, if W has any, and times the scale
    if Scaled; or times the scale and less the offset, which is in the zero point's place.

    Both are [R], or with Count > 1 [R, Count]: one for each run of C / Count columns.
    """
    R: tl.constexpr = codes.shape[0]
    C: tl.constexpr = codes.shape[1] * 8 // Code.Bits
    Zeros: tl.constexpr = weight.zeros is not None
    Offsets: tl.constexpr = weight.offsets is not None
    if Float == tl.float32:
        w = decode32(codes, weight.codebook, Code.Bits, Code.Center)
    else:
        w = decode16(codes, Code.Decode, Code.Bits, Float)
    if Count == 1:
        if Zeros:
            w = w - zero.to(Float)[:, None]  # exact: both are integers below 256
        if Offsets:
            w = times_less(w, scale[:, None], zero[:, None], Float)
        elif Scaled:
            w = times(w, scale[:, None], Float)
    else:
        w = w.reshape(R, Count, C // Count)
        if Zeros:
            w = w - zero.to(Float)[:, :, None]
        if Offsets:
            w = times_less(w, scale[:, :, None], zero[:, :, None], Float)
        elif Scaled:
            w = times(w, scale[:, :, None], Float)
        w = w.reshape(R, C)
    return w


@jit
def _group(weight, rows, k, groups, Code, Sub: tl.constexpr, Count: tl.constexpr):
    """Scale, and zero point less Center or offset less Center scales, float32, of the Count runs of Sub
    columns from k on, for each row.

    [R] when there is one run, [R, Count] else. Runs beyond the last group repeat it: what they scale is
    masked.
    """
    if Code.Rows != 1:
        rows = rows // Code.Rows
    if Code.GroupSize == 0:
        at = rows * groups
    elif Count == 1:
        at = rows * groups + tl.minimum(k // Code.GroupSize, groups - 1)
    else:
        group = tl.minimum((k + tl.arange(0, Count) * Sub) // Code.GroupSize, groups - 1)
        at = rows[:, None] * groups + group[None, :]
    scale = tl.load(weight.scales + at)
    if Code.Scale == "e8m0":
        # 2**(byte - 127): the exponent of a float32; the lowest has no leading one, the highest is NaN
        bits = scale.to(tl.uint32) << 23
        bits = tl.where(bits == 0, 0x400000, tl.where(bits == 0x7F800000, 0x7FC00000, bits))
        scale = bits.to(tl.float32, bitcast=True)
    elif Code.Scale == "e4m3":
        # sign, exponent and mantissa to float32's places, times 2**(127 - 7)
        bits = (scale.to(tl.uint32) & 0x80) << 24 | (scale.to(tl.uint32) & 0x7F) << 20
        scale = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    elif Code.Scale == "nested":
        block = tl.load(weight.scale_scales + at // Code.Block)
        scale = tl.load(weight.nested_code + scale.to(tl.int32)) * block + tl.load(weight.scale_offset)
    scale = scale.to(tl.float32)
    if weight.scale_scales is not None and Code.Scale != "nested":
        scale *= tl.load(weight.scale_scales)
    zero = scale
    if weight.zeros is not None:
        zero = tl.load(weight.zeros + at).to(tl.float32) - Code.Center
    elif weight.offsets is not None:
        zero = tl.load(weight.offsets + at).to(tl.float32) - Code.Center * scale
    return scale, zero


@jit
def add_low_rank(
    acc, h, factor, scaling, m, n, M, N, R, Float: tl.constexpr, Wide: tl.constexpr, TileR: tl.constexpr
):  # fmt: skip
    """acc + scaling h factor at rows m and columns n, multiplied in Float: h is float32 [M, R], factor [R, N]
    if Wide, else its transpose."""
    rank = tl.arange(0, TileR)
    h_at = h + m.to(tl.int64)[:, None] * R + rank[None, :]
    if Wide:
        factor_at = factor + rank.to(tl.int64)[:, None] * N + n[None, :]
    else:
        factor_at = factor + n.to(tl.int64)[:, None] * R + rank[None, :]
    for r in tl.range(0, R, TileR, num_stages=1):
        there = rank < R - r
        t = tl.load(h_at + r, mask=(m < M)[:, None] & there[None, :], other=0.0)
        if Wide:
            f = tl.load(factor_at + r.to(tl.int64) * N, mask=there[:, None] & (n < N)[None, :], other=0.0)
        else:
            f = tl.load(factor_at + r, mask=(n < N)[:, None] & there[None, :], other=0.0).T
        acc = multiply_add((t * scaling).to(Float), f.to(Float), acc)
    return acc


@jit
def _tile(m_tiles, n_tiles, Band: tl.constexpr):
    """Tile of this program: down a band of Band row tiles, then to the next column, so that a wave shares W
    in L2."""
    program = tl.program_id(0)
    band = program // (Band * n_tiles)
    within = program - band * Band * n_tiles
    height = tl.minimum(m_tiles - band * Band, Band)
    return band * Band + within % height, within // height


@jit
def _store(acc, out, out_scale, bias, previous, m, n, M, N, Splits: tl.constexpr):
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if Splits:
        at += tl.program_id(1).to(tl.int64) * M * N
    else:
        if out_scale is not None:
            acc *= tl.load(out_scale + n, mask=n < N, other=0.0)[None, :]
        if bias is not None:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if previous is not None:
            acc += tl.load(previous + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


_INTEGERS = ["threshold", "M", "N", "K", "R", "stride", "steps", "splits"]


@jit(do_not_specialize=_INTEGERS)
def _forward_kernel(
    x, weight, term, out_scale, bias, out, scaling, M, N, K, R, stride, steps, Code, Align, Tile
):  # fmt: skip
    """x [M, K] in rows of `stride` elements, times W^T: out [M, N], or if Splits float32 sums [splits, M, N].

    Program (tile, split) takes `steps` steps of Tile.K columns. The first split adds the low-rank term,
    h [M, R] times factor [N, R] transposed.
    """
    N *= Align.N
    K *= Align.K
    R *= Align.R
    stride = stride.to(tl.int64) * Align.Stride
    Float: tl.constexpr = x.dtype.element_ty
    Count: tl.constexpr = Tile.K // Tile.Sub
    groups = 1 if Code.GroupSize == 0 else K // Code.GroupSize
    tile_m, tile_n = _tile(tl.cdiv(M, Tile.M), tl.cdiv(N, Tile.N), Tile.Band)
    m = tile_m * Tile.M + tl.arange(0, Tile.M)
    n = tile_n * Tile.N + tl.arange(0, Tile.N)
    # rows past the end repeat the last; what they give is not stored
    rows = tl.minimum(n, N - 1).to(tl.int64)
    column = tl.arange(0, Tile.K)
    byte = tl.arange(0, Tile.K * Code.Bits // 8)
    x_at = x + m.to(tl.int64)[:, None] * stride + column[None, :]
    w_at = weight.qweight + rows[:, None] * (K // 8 * Code.Bits) + byte[None, :]
    begin = tl.program_id(1) * steps * Tile.K
    end = tl.minimum(begin + steps * Tile.K, K)
    scale, zero = _group(weight, rows, begin, groups, Code, Tile.Sub, Count)
    Offsets: tl.constexpr = weight.offsets is not None
    Scaled: tl.constexpr = Code.GroupSize != 0 and not Tile.ScaleProduct
    acc = tl.zeros((Tile.M, Tile.N), tl.float32)
    for k in range(begin, end, Tile.K):
        if Tile.Even:
            x_tile = tl.load(x_at + k, mask=(m < M)[:, None], other=0.0)
            codes = tl.load(w_at + k // 8 * Code.Bits)
        else:
            x_tile = tl.load(x_at + k, mask=(m < M)[:, None] & (column < K - k)[None, :], other=0.0)
            there = byte < (K - k) // 8 * Code.Bits
            codes = tl.load(w_at + k // 8 * Code.Bits, mask=there[None, :], other=0)
        w = _weights(codes, weight, scale, zero, Code, Scaled, Count, Float)
        if Tile.ScaleProduct:
            acc += tl.dot(x_tile, w.T, input_precision="ieee") * scale[None, :]
        else:
            acc = multiply_add(x_tile, w.T, acc)
        if Code.GroupSize != 0:
            # asked for a step ahead: too narrow for an asynchronous copy, it would be waited for
            scale, zero = _group(weight, rows, k + Tile.K, groups, Code, Tile.Sub, Count)
    if Code.GroupSize == 0 and not Offsets:
        acc *= scale[None, :]
    if Tile.Overlap:
        tl.extra.cuda.gdc_wait()
    if term.h is not None:
        rank = tl.where(tl.program_id(1) == 0, R, 0) if Tile.Splits else R
        if term.scale_by is not None:
            scaling *= tl.load(term.scale_by)
        acc = add_low_rank(acc, term.h, term.factor, scaling, m, n, M, N, rank, Float, False, Tile.R)
    _store(acc, out, out_scale, bias, None, m, n, M, N, Tile.Splits)


@jit(do_not_specialize=_INTEGERS)
def _grad_x_kernel(
    grad, weight, term, previous, out, scaling, threshold, M, N, K, R, stride, steps, Code, Align, Tile
):  # fmt: skip
    """grad [M, N] in rows of `stride` elements, times W: out [M, K], or if Splits float32 sums [splits, M,
    K].

    A program's tile of out has columns of W for its columns; a step contracts rows of W. A scale belongs to
    a row that is summed over, so it always goes on the weight. The sum begins, in the first split, with the
    low-rank term, h [M, R] times factor [R, K], dropped elements 0; previous [M, K] is added at the end.
    """
    N *= Align.N
    K *= Align.K
    R *= Align.R
    stride = stride.to(tl.int64) * Align.Stride
    Float: tl.constexpr = grad.dtype.element_ty
    Count: tl.constexpr = Tile.N // Tile.Sub
    groups = 1 if Code.GroupSize == 0 else K // Code.GroupSize
    tile_m, tile_k = _tile(tl.cdiv(M, Tile.M), tl.cdiv(K, Tile.N), Tile.Band)
    m = tile_m * Tile.M + tl.arange(0, Tile.M)
    k = tile_k * Tile.N + tl.arange(0, Tile.N)
    acc = tl.zeros((Tile.M, Tile.N), tl.float32)
    if term.h is not None:
        rank = tl.where(tl.program_id(1) == 0, R, 0) if Tile.Splits else R
        acc = add_low_rank(acc, term.h, term.factor, scaling, m, k, M, K, rank, Float, True, Tile.R)
        if term.seed is not None:
            first, second = row_keys(term.seed, m)
            acc = tl.where(keep(first[:, None], second[:, None], k[None, :], threshold), acc, 0.0)
    byte = tile_k * (Tile.N * Code.Bits // 8) + tl.arange(0, Tile.N * Code.Bits // 8)
    width = K // 8 * Code.Bits
    row = tl.arange(0, Tile.K)
    grad_at = grad + m.to(tl.int64)[:, None] * stride + row[None, :]
    begin = tl.program_id(1) * steps * Tile.K
    end = tl.minimum(begin + steps * Tile.K, N)
    # rows past the end repeat the last, times a gradient of 0
    rows = tl.minimum(begin + row, N - 1).to(tl.int64)
    scale, zero = _group(weight, rows, tile_k * Tile.N, groups, Code, Tile.Sub, Count)
    for n in range(begin, end, Tile.K):
        grad_tile = tl.load(grad_at + n, mask=(m < M)[:, None] & (row < N - n)[None, :], other=0.0)
        w_at = weight.qweight + tl.minimum(n + row, N - 1).to(tl.int64)[:, None] * width + byte[None, :]
        codes = tl.load(w_at) if Tile.Even else tl.load(w_at, mask=(byte < width)[None, :], other=0)
        w = _weights(codes, weight, scale, zero, Code, True, Count, Float)
        acc = multiply_add(grad_tile, w, acc)
        rows = tl.minimum(n + Tile.K + row, N - 1).to(tl.int64)
        scale, zero = _group(weight, rows, tile_k * Tile.N, groups, Code, Tile.Sub, Count)
    _store(acc, out, None, None, previous, m, k, M, K, Tile.Splits)


@jit(do_not_specialize=_INTEGERS)
def _reduce_kernel(partial, out_scale, bias, previous, out, M, N, splits, Row):
    """out = previous + bias + out_scale times the sum of partial [splits, M, N] over its first dimension, in
    order; a program has a stretch of a row."""
    N *= Row.Align
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * Row.Width + tl.arange(0, Row.Width)
    mask = n < N
    acc = tl.zeros((Row.Width,), tl.float32)
    for split in range(splits):
        acc += tl.load(partial + (split * M + row) * N + n, mask=mask, other=0.0)
    if out_scale is not None:
        acc *= tl.load(out_scale + n, mask=mask, other=0.0)
    if previous is not None:
        acc += tl.load(previous + row * N + n, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, acc.to(out.dtype.element_ty), mask=mask)


# the backend

# what a scale of each dtype is
SCALES = {
    torch.float32: "float",
    torch.float16: "float",
    torch.bfloat16: "float",
    torch.uint8: "nested",
    torch.float8_e8m0fnu: "e8m0",
    torch.float8_e4m3fn: "e4m3",
}


def supports(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return supports_grad_x(x, weight)


def supports_grad_x(grad: torch.Tensor, weight: WeightTensors) -> str | None:
    """None when `run_grad_x` can serve the call, else the reason."""
    qweight, scales, zeros, _, _, format, group_size, offsets, _ = weight
    if (reason := refuse(qweight.device)) is not None:
        return reason
    if format not in CODES:
        return f"it has no kernel for format {format}, of {', '.join(CODES)}"
    if group_size % 8:
        return f"group_size {group_size} is not a multiple of 8"
    if scales.dtype not in SCALES:
        return f"scales are {scales.dtype}"
    if not (qweight.is_contiguous() and scales.is_contiguous() and (zeros is None or zeros.is_contiguous())):
        return "qweight, scales or zeros is not contiguous"
    if not (offsets is None or offsets.is_contiguous()):
        return "offsets is not contiguous"
    if grad.numel() >= 2**31 and grad.numel() // grad.shape[-1] >= 2**31:
        return f"{grad.numel() // grad.shape[-1]} rows are more than 2**31 - 1"
    return None


def predicted(cost: Cost, rates: Rates, x: torch.Tensor, weight: WeightTensors, *rest: Any) -> Prediction:
    """The time to expect of the forward, by the tiles of the rule."""
    return tiles_of_the_rule(_product(x, weight, False), device_of(x.device), cost, rates)


def predicted_grad_x(cost: Cost, rates: Rates, grad: torch.Tensor, weight: WeightTensors) -> Prediction:
    """The same of the gradient."""
    return tiles_of_the_rule(_product(grad, weight, True), device_of(grad.device), cost, rates)


def _product(x: torch.Tensor, weight: WeightTensors, grad_x: bool) -> Product:
    n, k = weight.shape
    m = x.numel() // max(x.shape[-1], 1)
    width, depth = (k, n) if grad_x else (n, k)
    group_size = 0 if weight.group_size == k else weight.group_size
    bits = CODES[weight.format].bits
    return Product(max(m, 1), max(width, 1), max(depth, 1), bits, group_size, x.element_size(), grad_x)


class LowRank(NamedTuple):
    """What is added to a product: scaling * scale_by * h factor, rank R at least 1; all contiguous.

    Attributes:
        h: float32 [M, R].
        factor: any float dtype; B [N, R] for the forward (transposed there), A [R, K] for the gradient.
        scaling, scale_by: a number on the host, and one on the device or None; the gradient takes none.
        seed, threshold: the gradient: of the mask on the term (`bitfuse.core.dropout`), None and 0 for none.
            The threshold is an int32 that holds the unsigned one.
    """

    h: torch.Tensor
    factor: torch.Tensor
    scaling: float = 1.0
    scale_by: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    threshold: int = 0


NO_TERM = (None, None, 1.0, None, None, 0)  # a LowRank's fields where there is none


def run(
    x: torch.Tensor,
    weight: WeightTensors,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """y = out_scale (x W^T + low_rank) + bias, of x's dtype and leading shape; out_scale is float32 [N]."""
    return _run(x, weight, False, contiguous(bias), contiguous(out_scale), low_rank, None)


def run_grad_x(
    grad: torch.Tensor,
    weight: WeightTensors,
    low_rank: LowRank | None = None,
    previous: torch.Tensor | None = None,
) -> torch.Tensor:
    """previous + grad W + low_rank, of grad's dtype and leading shape; `previous` is overwritten with it."""
    return _run(grad, weight, True, None, None, low_rank, previous)


class Given(NamedTuple):
    """Which of the tensors that a call may have it has."""

    zeros: bool
    scale_scales: bool
    scale_offset: bool
    scale_by: bool
    seed: bool
    out_scale: bool
    bias: bool
    previous: bool


class Problem(NamedTuple):
    """What a plan depends on.

    Attributes:
        grad_x: whether it is the gradient.
        m, n, k: rows of x or of the gradient; W is [n, k].
        stride: elements between rows of x.
        format, group_size: of W; a row is k columns.
        offset_dtype: of W's offsets; None where it has none.
        scale_rows: rows of W that share a scale.
        dtype, scale_dtype: of x, and of W's scales.
        given: which tensors there are.
        rank, factor: of the low-rank term, and its factor's dtype; 0 and None for none.
    """

    grad_x: bool
    m: int
    n: int
    k: int
    stride: int
    format: str
    group_size: int
    offset_dtype: torch.dtype | None
    scale_rows: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    given: Given
    rank: int
    factor: torch.dtype | None


class Plans(NamedTuple):
    """The launches of a call: the product, and where its contraction is split the sum of what it then writes,
    float32 of the shape `partial`, [splits, m, columns]."""

    product: Plan
    reduce: Plan | None
    partial: tuple[int, int, int] | None


BAND = 8
REDUCE_WIDTH = 512
MOST_RANK = 64  # columns of a low-rank term in one step


def tile_r(rank: int) -> int:
    """Columns of a low-rank term in one step: a power of two, as tensor cores want them."""
    return min(max(16, 1 << (rank - 1).bit_length()), MOST_RANK)


@functools.lru_cache(maxsize=4096)
def _plans(device: Device, p: Problem) -> Plans:
    code = CODES[p.format]
    group_size = 0 if p.group_size == p.k else p.group_size
    width, depth = (p.k, p.n) if p.grad_x else (p.n, p.k)
    config = None if p.grad_x else _trial
    if config is None and not p.grad_x:
        config = tuned(device, p.m, p.n, p.k, p.format, group_size, p.dtype)
    if config is None:
        product = Product(p.m, width, depth, code.bits, group_size, p.dtype.itemsize, p.grad_x)
        config = choose(product, device)
    scale_product = config.scale_product and p.offset_dtype is None
    # what the widest vectors need, 16 bytes of x, of out and of W, and no more: each case is a compilation
    align = Aligned(
        math.gcd(p.n, 8), math.gcd(p.k, 128 // code.bits), math.gcd(p.rank, 8), math.gcd(p.stride, 8)
    )
    overlap = device.arch.overlaps and p.rank > 0 and not p.grad_x
    tile = Tiles(
        M=config.tile_m,
        N=config.tile_n,
        K=config.tile_k,
        R=tile_r(p.rank) if p.rank else 0,
        Sub=config.sub,
        ScaleProduct=scale_product,
        Splits=config.splits > 1,
        Band=BAND,
        Even=width % config.tile_n == 0 if p.grad_x else depth % config.tile_k == 0,
        Overlap=overlap,
    )
    codes = Codes(
        decoding(p.format, p.dtype), code.bits, code.center, SCALES[p.scale_dtype], group_size, p.scale_rows,
        NESTED_BLOCK,
    )  # fmt: skip
    given = p.given
    product_plan = planned(
        device,
        _grad_x_kernel if p.grad_x else _forward_kernel,
        (-(-p.m // tile.M) * -(-width // tile.N), config.splits, 1),
        (
            p.m,
            p.n // align.N,
            p.k // align.K,
            p.rank // (align.R or 1),
            p.stride // align.Stride,
            config.steps,
        ),
        (codes, align, tile),
        (p.dtype, p.scale_dtype, p.offset_dtype, given, p.factor),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
        enable_fp_fusion=True,
        **(dict(launch_pdl=True) if overlap else {}),
    )
    if config.splits == 1:
        return Plans(product_plan, None, None)
    row = Stretch(align.K if p.grad_x else align.N, REDUCE_WIDTH)
    reduce = planned(
        device,
        _reduce_kernel,
        (-(-width // row.Width), p.m, 1),
        (p.m, width // row.Align, config.splits),
        (row,),
        (p.dtype, given.out_scale, given.bias, given.previous),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return Plans(product_plan, reduce, (config.splits, p.m, width))


_trial: Config | None = None


@contextlib.contextmanager
def trying(config: Config) -> Iterator[None]:
    """Take this Config for every forward inside."""
    global _trial
    _trial = config
    _plans.cache_clear()
    try:
        yield
    finally:
        _trial = None
        _plans.cache_clear()


def matrix_of(weight: WeightTensors, x: torch.Tensor) -> Matrix:
    """W as the kernels read it, beside x."""
    qweight, scales, zeros, scale_scales, scale_offset = weight[:5]
    format = weight.format
    if scales.dtype.itemsize == 1:
        scales = scales.view(torch.uint8)  # Triton takes no eight-bit floats that the GPU lacks
    table = x.dtype == torch.float32 and CODES[format].center == 0 and FORMATS[format].codebook is not None
    return Matrix(
        qweight, scales, zeros, weight.offsets, scale_scales, scale_offset,
        None if scale_offset is None else nested_code(x.device),
        FORMATS[format].values(x.device) if table else None,
    )  # fmt: skip


def _run(
    x: torch.Tensor,
    weight: WeightTensors,
    grad_x: bool,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    low_rank: LowRank | None,
    previous: torch.Tensor | None,
) -> torch.Tensor:
    """x times W [n, k]: transposed for the forward; as it is for the gradient, where x is grad."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _run(x, weight, grad_x, bias, out_scale, low_rank, previous)
    n, k = weight.shape
    width, depth = (k, n) if grad_x else (n, k)
    out = previous
    if out is None:
        out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if depth == 0:
        return out.zero_() if previous is None else out
    x = as_matrix(x)
    m = x.shape[0]
    h, factor, scaling, scale_by, seed, threshold = low_rank or NO_TERM
    matrix = matrix_of(weight, x)
    given = Given(
        matrix.zeros is not None, matrix.scale_scales is not None, matrix.scale_offset is not None,
        scale_by is not None, seed is not None, out_scale is not None, bias is not None, previous is not None,
    )  # fmt: skip
    scale_dtype = weight.scales.dtype
    if scale_dtype is torch.uint8 and not given.scale_offset:  # the bytes of the format's eight-bit floats
        scale_dtype = FORMATS[weight.format].scale_dtype
    problem = Problem(
        grad_x, m, n, k, x.stride(0) if m > 1 else depth, weight.format, weight.group_size,
        dtype_of(matrix.offsets), weight.scale_rows, x.dtype, scale_dtype, given,
        0 if h is None else h.shape[1], dtype_of(factor),
    )  # fmt: skip
    product, reduce, partial = _plans(device_of(x.device), problem)
    target = out if partial is None else torch.empty(partial, dtype=torch.float32, device=x.device)
    alignment = alignment_of(x, *matrix[:6], h, factor, scale_by, seed, out_scale, bias, previous)
    term = Term(h, factor, scale_by, seed)
    if grad_x:
        product.launch((x, matrix, term, previous, target, scaling, threshold), alignment)
    elif reduce is None:
        product.launch((x, matrix, term, out_scale, bias, target, scaling), alignment)
    else:
        product.launch((x, matrix, term, None, None, target, scaling), alignment)
    if reduce is not None:
        reduce.launch((target, out_scale, bias, previous, out), alignment_of(out_scale, bias, previous))
    return out

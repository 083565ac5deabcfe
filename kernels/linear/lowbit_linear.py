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
  multiple of 8.

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
from typing import NamedTuple

import torch

from ...core import policy
from ...core.device import Device, device_of, pretended
from ...core.gpus import arch_of
from ...weights.formats import FORMATS, NESTED_BLOCK, nested_code
from ...weights.weight import WeightTensors
from ..core.decoding import CODES, decode16, decode32, decoding, times
from ..core.dropout import keep, row_keys
from ..core.launch import HANDLES, Plan, alignment_of, as_matrix, jit, refuse, tl
from ..core.products import multiply_add

# kernels


@jit
def _weights(
    codes, codebook, scale, zero, Decode: tl.constexpr, Bits: tl.constexpr, Center: tl.constexpr,
    Zeros: tl.constexpr, Scaled: tl.constexpr, Count: tl.constexpr, Float: tl.constexpr,
):  # fmt: skip
    """Weights [R, C] of dtype Float from their bytes: less the zero point if Zeros, times the scale if
    Scaled.

    Both are [R], or with Count > 1 [R, Count]: one for each run of C / Count columns.
    """
    R: tl.constexpr = codes.shape[0]
    C: tl.constexpr = codes.shape[1] * 8 // Bits
    if Float == tl.float32:
        w = decode32(codes, codebook, Bits, Center)
    else:
        w = decode16(codes, Decode, Bits, Float)
    if Count == 1:
        if Zeros:
            w = w - zero.to(Float)[:, None]  # exact: both are integers below 256
        if Scaled:
            w = times(w, scale[:, None], Float)
    else:
        w = w.reshape(R, Count, C // Count)
        if Zeros:
            w = w - zero.to(Float)[:, :, None]
        if Scaled:
            w = times(w, scale[:, :, None], Float)
        w = w.reshape(R, C)
    return w


@jit
def _group(
    scales, zeros, scale_scales, scale_offset, code, rows, k, groups, Scale: tl.constexpr,
    GroupSize: tl.constexpr, Sub: tl.constexpr, Count: tl.constexpr, Center: tl.constexpr,
    Block: tl.constexpr, ):  # fmt: skip
    """Scale, and zero point less Center, float32, of the Count runs of Sub columns from k on, for each row.

    [R] when there is one run, [R, Count] else. Runs beyond the last group repeat it: what they scale is
    masked.
    """
    if GroupSize == 0:
        at = rows * groups
    elif Count == 1:
        at = rows * groups + tl.minimum(k // GroupSize, groups - 1)
    else:
        group = tl.minimum((k + tl.arange(0, Count) * Sub) // GroupSize, groups - 1)
        at = rows[:, None] * groups + group[None, :]
    scale = tl.load(scales + at)
    if Scale == "e8m0":
        # 2**(byte - 127): the exponent of a float32; the lowest has no leading one, the highest is NaN
        bits = scale.to(tl.uint32) << 23
        bits = tl.where(bits == 0, 0x400000, tl.where(bits == 0x7F800000, 0x7FC00000, bits))
        scale = bits.to(tl.float32, bitcast=True)
    elif Scale == "e4m3":
        # sign, exponent and mantissa to float32's places, times 2**(127 - 7)
        bits = (scale.to(tl.uint32) & 0x80) << 24 | (scale.to(tl.uint32) & 0x7F) << 20
        scale = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    elif Scale == "nested":
        block = tl.load(scale_scales + at // Block)
        scale = tl.load(code + scale.to(tl.int32)) * block + tl.load(scale_offset)
    scale = scale.to(tl.float32)
    if scale_scales is not None and Scale != "nested":
        scale *= tl.load(scale_scales)
    return scale, scale if zeros is None else tl.load(zeros + at).to(tl.float32) - Center


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


# A new length is no reason to compile. N, K, R and stride come divided by their Align, which is all that a
# compiler needs to know: how wide a vector may be.
_INTEGERS = ["threshold", "M", "N", "K", "R", "stride", "steps", "splits"]


@jit(do_not_specialize=_INTEGERS)
def _forward_kernel(
    x, qweight, scales, zeros, scale_scales, scale_offset, code, codebook, h, factor, scale_by, out_scale,
    bias, out, scaling, M, N, K, R, stride, steps,
    Decode: tl.constexpr, Bits: tl.constexpr, Center: tl.constexpr, Scale: tl.constexpr,
    GroupSize: tl.constexpr, Block: tl.constexpr, NAlign: tl.constexpr, KAlign: tl.constexpr,
    RAlign: tl.constexpr, StrideAlign: tl.constexpr, Even: tl.constexpr, TileM: tl.constexpr,
    TileN: tl.constexpr, TileK: tl.constexpr, TileR: tl.constexpr, Sub: tl.constexpr,
    ScaleProduct: tl.constexpr, Splits: tl.constexpr, Band: tl.constexpr, Overlap: tl.constexpr,
):  # fmt: skip
    """x [M, K] in rows of `stride` elements, times W^T: out [M, N], or if Splits float32 sums [splits, M, N].

    Program (tile, split) takes `steps` steps of TileK columns. Even says that the last step is whole. The
    first split adds the low-rank term, h [M, R] times factor [N, R] transposed.
    """
    N *= NAlign
    K *= KAlign
    R *= RAlign
    stride = stride.to(tl.int64) * StrideAlign
    Float: tl.constexpr = x.dtype.element_ty
    Count: tl.constexpr = TileK // Sub
    groups = 1 if GroupSize == 0 else K // GroupSize
    tile_m, tile_n = _tile(tl.cdiv(M, TileM), tl.cdiv(N, TileN), Band)
    m = tile_m * TileM + tl.arange(0, TileM)
    n = tile_n * TileN + tl.arange(0, TileN)
    rows = tl.minimum(n, N - 1).to(
        tl.int64
    )  # rows past the end repeat the last; what they give is not stored
    column = tl.arange(0, TileK)
    byte = tl.arange(0, TileK * Bits // 8)
    x_at = x + m.to(tl.int64)[:, None] * stride + column[None, :]
    w_at = qweight + rows[:, None] * (K // 8 * Bits) + byte[None, :]
    begin = tl.program_id(1) * steps * TileK
    end = tl.minimum(begin + steps * TileK, K)
    scale, zero = _group(
        scales, zeros, scale_scales, scale_offset, code, rows, begin, groups, Scale, GroupSize, Sub, Count,
        Center, Block,
    )  # fmt: skip
    acc = tl.zeros((TileM, TileN), tl.float32)
    for k in range(begin, end, TileK):
        if Even:
            x_tile = tl.load(x_at + k, mask=(m < M)[:, None], other=0.0)
            codes = tl.load(w_at + k // 8 * Bits)
        else:
            x_tile = tl.load(x_at + k, mask=(m < M)[:, None] & (column < K - k)[None, :], other=0.0)
            codes = tl.load(w_at + k // 8 * Bits, mask=(byte < (K - k) // 8 * Bits)[None, :], other=0)
        w = _weights(
            codes, codebook, scale, zero, Decode, Bits, Center, zeros is not None,
            GroupSize != 0 and not ScaleProduct, Count, Float,
        )  # fmt: skip
        if ScaleProduct:
            acc += tl.dot(x_tile, w.T, input_precision="ieee") * scale[None, :]
        else:
            acc = multiply_add(x_tile, w.T, acc)
        if GroupSize != 0:
            # asked for a step ahead: too narrow for an asynchronous copy, it would be waited for
            scale, zero = _group(
                scales, zeros, scale_scales, scale_offset, code, rows, k + TileK, groups, Scale, GroupSize,
                Sub, Count, Center, Block,
            )  # fmt: skip
    if GroupSize == 0:
        acc *= scale[None, :]
    if Overlap:
        tl.extra.cuda.gdc_wait()
    if h is not None:
        rank = tl.where(tl.program_id(1) == 0, R, 0) if Splits else R
        if scale_by is not None:
            scaling *= tl.load(scale_by)
        acc = add_low_rank(acc, h, factor, scaling, m, n, M, N, rank, Float, False, TileR)
    _store(acc, out, out_scale, bias, None, m, n, M, N, Splits)


@jit(do_not_specialize=_INTEGERS)
def _grad_x_kernel(
    grad, qweight, scales, zeros, scale_scales, scale_offset, code, codebook, h, factor, seed, previous, out,
    scaling, threshold, M, N, K, R, stride, steps,
    Decode: tl.constexpr, Bits: tl.constexpr, Center: tl.constexpr, Scale: tl.constexpr,
    GroupSize: tl.constexpr, Block: tl.constexpr, NAlign: tl.constexpr, KAlign: tl.constexpr,
    RAlign: tl.constexpr, StrideAlign: tl.constexpr, Even: tl.constexpr, TileM: tl.constexpr,
    TileN: tl.constexpr, TileK: tl.constexpr, TileR: tl.constexpr, Sub: tl.constexpr, Splits: tl.constexpr,
    Band: tl.constexpr,
):  # fmt: skip
    """grad [M, N] in rows of `stride` elements, times W: out [M, K], or if Splits float32 sums [splits, M,
    K].

    The tile is [TileM, TileN] of out, so TileN columns of W (Even: none past the end); a step contracts TileK
    rows of W. A scale belongs to a row that is summed over, so it always goes on the weight. The sum begins,
    in the first split, with the low-rank term, h [M, R] times factor [R, K], dropped elements 0; previous
    [M, K] is added at the end.
    """
    N *= NAlign
    K *= KAlign
    R *= RAlign
    stride = stride.to(tl.int64) * StrideAlign
    Float: tl.constexpr = grad.dtype.element_ty
    Count: tl.constexpr = TileN // Sub
    groups = 1 if GroupSize == 0 else K // GroupSize
    tile_m, tile_k = _tile(tl.cdiv(M, TileM), tl.cdiv(K, TileN), Band)
    m = tile_m * TileM + tl.arange(0, TileM)
    k = tile_k * TileN + tl.arange(0, TileN)
    acc = tl.zeros((TileM, TileN), tl.float32)
    if h is not None:
        rank = tl.where(tl.program_id(1) == 0, R, 0) if Splits else R
        acc = add_low_rank(acc, h, factor, scaling, m, k, M, K, rank, Float, True, TileR)
        if seed is not None:
            first, second = row_keys(seed, m)
            acc = tl.where(keep(first[:, None], second[:, None], k[None, :], threshold), acc, 0.0)
    byte = tile_k * (TileN * Bits // 8) + tl.arange(0, TileN * Bits // 8)
    width = K // 8 * Bits
    row = tl.arange(0, TileK)
    grad_at = grad + m.to(tl.int64)[:, None] * stride + row[None, :]
    begin = tl.program_id(1) * steps * TileK
    end = tl.minimum(begin + steps * TileK, N)
    rows = tl.minimum(begin + row, N - 1).to(
        tl.int64
    )  # rows past the end repeat the last, times a gradient of 0
    scale, zero = _group(
        scales, zeros, scale_scales, scale_offset, code, rows, tile_k * TileN, groups, Scale, GroupSize, Sub,
        Count, Center, Block,
    )  # fmt: skip
    for n in range(begin, end, TileK):
        grad_tile = tl.load(grad_at + n, mask=(m < M)[:, None] & (row < N - n)[None, :], other=0.0)
        w_at = qweight + tl.minimum(n + row, N - 1).to(tl.int64)[:, None] * width + byte[None, :]
        codes = tl.load(w_at) if Even else tl.load(w_at, mask=(byte < width)[None, :], other=0)
        w = _weights(
            codes, codebook, scale, zero, Decode, Bits, Center, zeros is not None, True, Count, Float
        )
        acc = multiply_add(grad_tile, w, acc)
        rows = tl.minimum(n + TileK + row, N - 1).to(tl.int64)
        scale, zero = _group(
            scales, zeros, scale_scales, scale_offset, code, rows, tile_k * TileN, groups, Scale, GroupSize,
            Sub, Count, Center, Block,
        )  # fmt: skip
    _store(acc, out, None, None, previous, m, k, M, K, Splits)


@jit(do_not_specialize=_INTEGERS)
def _reduce_kernel(
    partial, out_scale, bias, previous, out, M, N, splits, NAlign: tl.constexpr, Width: tl.constexpr
):  # fmt: skip
    """out = previous + bias + out_scale times the sum of partial [splits, M, N] over its first dimension, in
    order; a program has a stretch of a row."""
    N *= NAlign
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * Width + tl.arange(0, Width)
    mask = n < N
    acc = tl.zeros((Width,), tl.float32)
    for split in range(splits):
        acc += tl.load(partial + (split * M + row) * N + n, mask=mask, other=0.0)
    if out_scale is not None:
        acc *= tl.load(out_scale + n, mask=mask, other=0.0)
    if previous is not None:
        acc += tl.load(previous + row * N + n, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, acc.to(out.dtype.element_ty), mask=mask)


# which tiles


class Config(NamedTuple):
    """What a launch fixes at compile time, and how it divides the contraction (see `choose`).

    N is columns of the result and K the contraction, for either kernel.
    """

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


MIN_SPLIT = 512  # contracted at least by a program: for less, partial sums cost more than their weights
BAND = 8  # row tiles that go through W together
REDUCE_WIDTH = 512
MOST_RANK = 64  # columns of a low-rank term in one step


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

    - Up to 32 tokens bytes are the bound. Programs enough that some 24 KB of W are in flight on each
      multiprocessor, by splitting the contraction; and as few instructions a weight as may be: a program
      decodes 128 rows, so that a warp reads each x fragment for 32 of them, in steps of a whole group where
      that is 64 or 128, so that products are scaled instead of weights.
    - Then decoding and tensor cores are. A decoded weight serves TileM = 64, then 128 tokens. At 128 x 128
      eight warps hold the accumulators in 64 registers each; on Hopper they are held to 128 in all, so that
      two programs fit a multiprocessor (74 to 83 KB each) and one decodes while the other multiplies. The
      contraction is split only where tiles are fewer than multiprocessors.
    - float32 runs on the FMA units: the largest tiles whose operands fit the registers.
    """
    wgmma = arch_of(capability).shared_operands
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
        # the longer step needs 98 KB, twice a multiprocessor, and accumulators that leave registers to decode
        # in
        tile_m, tile_n, tile_k, stages = 64, 128, 128 if bits == 4 and wgmma and not grad_x else 64, 3
    else:
        tile_m, tile_n, tile_k, warps, stages = 128, 128, 64, 8, 3
    tiles = -(-m // tile_m) * -(-n // tile_n)
    most = max(1, k // MIN_SPLIT)
    if m <= 32:
        splits = _fewest_splits(tiles, min(most, max(1, 4 * multiprocessors // tiles)), multiprocessors)
    else:
        splits = max(1, min(most, multiprocessors // tiles))
    registers = 128 if tile_m == 128 and wgmma else None
    return _completed(
        (tile_m, tile_n, tile_k), splits, warps, stages, registers, k, group_size, float_bytes, grad_x
    )


def _completed(
    tile: tuple[int, int, int],
    splits: int,
    warps: int,
    stages: int,
    registers: int | None,
    k: int,
    group_size: int,
    float_bytes: int,
    grad_x: bool,
) -> Config:
    """A Config of these tiles: the scales' runs and the steps that follow from them."""
    tile_m, tile_n, tile_k = tile
    run = tile_n if grad_x else tile_k
    sub = math.gcd(group_size, run) if group_size else run
    scale_product = not grad_x and group_size > 0 and sub == run and (tile_m <= 32 or float_bytes == 4)
    steps = -(-k // (tile_k * splits))
    splits = -(-k // (tile_k * steps))
    return Config(tile_m, tile_n, tile_k, sub, scale_product, splits, steps, warps, stages, registers)


def candidates(
    m: int,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    float_bytes: int,
    capability: int,
    multiprocessors: int,
) -> list[Config]:
    """The choice of `choose` for the forward, then what is worth measuring beside it: other tiles, more or
    fewer splits, copies further ahead."""
    first = choose(m, n, k, bits, group_size, float_bytes, capability, multiprocessors)
    found = [first]
    tile_ks = (64, 128) if float_bytes == 2 else (first.tile_k,)
    for tile_n in sorted({first.tile_n, 64, 128} if float_bytes == 2 else {first.tile_n}):
        for tile_k in tile_ks:
            for stages in (3, 4, 5) if float_bytes == 2 else (first.stages,):
                # a stage holds tiles of x and of codes, and must leave room for a second program
                held = stages * (first.tile_m * tile_k * float_bytes + tile_n * tile_k * bits // 8)
                if held > 100 << 10:
                    continue
                for splits in sorted({first.splits, max(1, first.splits // 2), first.splits * 2}):
                    if splits > max(1, k // MIN_SPLIT):
                        continue
                    tile = (first.tile_m, tile_n, tile_k)
                    config = _completed(
                        tile, splits, first.warps, stages, first.registers, k, group_size, float_bytes, False
                    )
                    if config not in found:
                        found.append(config)
    return found


def tuning_key(m: int, n: int, k: int, format: str, group_size: int, dtype: torch.dtype) -> str:
    """Of a Config in the policy's cache."""
    return policy.key("lowbit_linear", policy.bucket(m), n, k, format, group_size, dtype)


_trial: Config | None = None


@contextlib.contextmanager
def trying(config: Config) -> Iterator[None]:
    """Take this Config for every forward inside."""
    global _trial
    _trial = config
    _plan.cache_clear()
    try:
        yield
    finally:
        _trial = None
        _plan.cache_clear()


def _tuned(
    device: Device, m: int, n: int, k: int, format: str, group_size: int, dtype: torch.dtype
) -> Config | None:
    """What was measured to be the fastest on this GPU."""
    if _trial is not None:
        return _trial
    if pretended() is not None or not torch.cuda.is_available():
        return None
    configs = policy.of(torch.cuda.get_device_name(device.number))["configs"]
    found = configs.get(tuning_key(m, n, k, format, group_size, dtype))
    return None if found is None else Config(*found)


def _fewest_splits(tiles: int, most: int, multiprocessors: int) -> int:
    """The fewest splits that fill the last wave as well as 85% of the best does, with three programs to two
    multiprocessors or as near to that as `most` splits come."""
    counts = [s for s in range(1, most + 1) if 2 * tiles * s >= 3 * multiprocessors] or [most]
    filled = [tiles * s / (multiprocessors * -(-tiles * s // multiprocessors)) for s in counts]
    return next(s for s, f in zip(counts, filled, strict=True) if f >= 0.85 * max(filled))


# the backend


_SCALES = {
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
    qweight, scales, zeros, _, _, format, group_size, _, _ = weight
    if (reason := refuse(qweight.device)) is not None:
        return reason
    if format not in CODES:
        return f"format {format!r} is none of {', '.join(CODES)}"
    if (reason := weight.beyond()) is not None:
        return reason
    if group_size % 8:
        return f"group_size {group_size} is not a multiple of 8"
    if scales.dtype not in _SCALES:
        return f"scales are {scales.dtype}"
    if not (qweight.is_contiguous() and scales.is_contiguous() and (zeros is None or zeros.is_contiguous())):
        return "qweight, scales or zeros is not contiguous"
    if grad.numel() >= 2**31 and grad.numel() // grad.shape[-1] >= 2**31:
        return f"{grad.numel() // grad.shape[-1]} rows are more than 2**31 - 1"
    return None


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


def run(
    x: torch.Tensor,
    weight: WeightTensors,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """y = out_scale (x W^T + low_rank) + bias, of x's dtype and leading shape; out_scale is float32 [N]."""
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    if out_scale is not None and out_scale.stride(0) != 1:
        out_scale = out_scale.contiguous()
    return _run(x, weight, False, bias, out_scale, low_rank, None)


def run_grad_x(
    grad: torch.Tensor,
    weight: WeightTensors,
    low_rank: LowRank | None = None,
    previous: torch.Tensor | None = None,
) -> torch.Tensor:
    """previous + grad W + low_rank, of grad's dtype and leading shape; `previous` is overwritten with it."""
    return _run(grad, weight, True, None, None, low_rank, previous)


@functools.lru_cache(maxsize=4096)
def _plan(
    device: Device,
    grad_x: bool,
    m: int,
    n: int,
    k: int,
    stride: int,
    format: str,
    group_size: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    given: tuple[bool, ...],
    rank: int,
    factor: torch.dtype | None,
) -> Plan:
    """`given`: which of zeros, scale_scales, scale_offset, scale_by, seed, out_scale, bias and previous there
    are; `factor`: the dtype of the low-rank term's."""
    code, scale = CODES[format], _SCALES[scale_dtype]
    group_size = 0 if group_size == k else group_size
    width, depth = (k, n) if grad_x else (n, k)
    config = None if grad_x else _tuned(device, m, n, k, format, group_size, dtype)
    config = config or choose(
        m,
        width,
        depth,
        code.bits,
        group_size,
        dtype.itemsize,
        device.capability,
        device.multiprocessors,
        grad_x,
    )
    tile_m, tile_n, tile_k, sub, scale_product, splits, steps, warps, stages, registers = config
    even = width % tile_n == 0 if grad_x else depth % tile_k == 0
    # what the widest vectors need, 16 bytes of x, of out and of W, and no more: each case is a compilation
    n_align, k_align, stride_align = math.gcd(n, 8), math.gcd(k, 128 // code.bits), math.gcd(stride, 8)
    r_align = math.gcd(rank, 8)
    tile_r = min(max(16, 1 << (rank - 1).bit_length()), MOST_RANK) if rank else 0
    overlap = device.arch.overlaps and rank > 0 and not grad_x
    constants = (
        decoding(format, dtype), code.bits, code.center, scale, group_size, NESTED_BLOCK,
        n_align, k_align, r_align, stride_align, even,
        tile_m, tile_n, tile_k, tile_r, sub, *(() if grad_x else (scale_product,)), splits > 1, BAND,
        *(() if grad_x else (overlap,)),
    )  # fmt: skip
    reduce = None
    if splits > 1:
        align = k_align if grad_x else n_align
        reduce = Plan(
            _reduce_kernel,
            (-(-width // REDUCE_WIDTH), m, 1),
            (m, width // align, splits, align, REDUCE_WIDTH),
            dict(num_warps=4, enable_fp_fusion=True),
            HANDLES.setdefault((device.number, "reduce", dtype, align, given[-3:]), {}),
            None,
            None,
        )
    return Plan(
        _grad_x_kernel if grad_x else _forward_kernel,
        (-(-m // tile_m) * -(-width // tile_n), splits, 1),
        (m, n // n_align, k // k_align, rank // (r_align or 1), stride // stride_align, steps, *constants),
        dict(
            num_warps=warps,
            num_stages=stages,
            maxnreg=registers,
            enable_fp_fusion=True,
            **(dict(launch_pdl=True) if overlap else {}),
        ),
        HANDLES.setdefault(
            (device.number, grad_x, dtype, scale_dtype, given, factor, constants, warps, stages, registers),
            {},
        ),
        None if splits == 1 else (splits, m, width),
        reduce,
    )


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
    qweight, scales, zeros, scale_scales, scale_offset, format, group_size, _, _ = weight
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
    h, factor, scaling, scale_by, seed, threshold = low_rank or _NO_TERM
    given = (
        zeros is not None, scale_scales is not None, scale_offset is not None, scale_by is not None,
        seed is not None, out_scale is not None, bias is not None, previous is not None,
    )  # fmt: skip
    scale_dtype = scales.dtype
    if scale_dtype is torch.uint8 and scale_offset is None:  # the bytes of the format's eight-bit floats
        scale_dtype = FORMATS[format].scale_dtype
    plan = _plan(
        device_of(x.device), grad_x, m, n, k, x.stride(0) if m > 1 else depth, format, group_size, x.dtype,
        scale_dtype, given, 0 if h is None else h.shape[1], None if factor is None else factor.dtype,
    )  # fmt: skip
    if scales.dtype.itemsize == 1:
        scales = scales.view(torch.uint8)  # Triton takes no eight-bit floats that the GPU lacks
    target = out if plan.partial is None else torch.empty(plan.partial, dtype=torch.float32, device=x.device)
    codebook = FORMATS[format].codebook is not None and CODES[format].center == 0 and x.dtype == torch.float32
    tensors = (x, qweight, scales, zeros, scale_scales, scale_offset)
    terms: tuple[torch.Tensor | float | None, ...]
    if grad_x:
        terms = (h, factor, seed, previous, target, scaling, threshold)
    elif plan.partial is None:
        terms = (h, factor, scale_by, out_scale, bias, target, scaling)
    else:
        terms = (h, factor, scale_by, None, None, target, scaling)
    plan.launch(
        (
            *tensors,
            None if scale_offset is None else nested_code(x.device),
            FORMATS[format].values(x.device) if codebook else None,
            *terms,
        ),
        alignment_of(*tensors, h, factor, scale_by, seed, out_scale, bias, previous),
    )
    if plan.reduce is not None:
        plan.reduce.launch((target, out_scale, bias, previous, out), alignment_of(out_scale, bias, previous))
    return out


_NO_TERM = (None, None, 1.0, None, None, 0)

"""attention in Triton: softmax(scale q k^T) v, the scores never written (FlashAttention-2: Dao, 2023). The
backward is in attention_backward.py.

A program owns TileM queries of one head, in registers: their sums [TileM, DimV], row maxima and row sums, all
float32. It walks the keys in tiles of TileN, whose K and V are on their way to shared memory `stages - 1`
tiles ahead. The keys of the prefix come first, then the tiles that an edge of the window or of the sequence
crosses, which are masked, then those between, which are not; a tile outside the window is never visited.
Order does not matter to a running maximum, so the masked tiles of both edges share one loop.

Programs of the query heads of one key head are neighbours in the grid, then come the tiles of its queries,
last first: what runs at one time reads the keys and values of few heads, which L2 holds, and the longest
rows of a causal head begin first.

What bounds it, bfloat16, dim 128 on Hopper (counted in the compiled loop without masks, no spills in it): a
tile of 128 queries and 128 keys takes 1024 cycles of the tensor cores, 1024 of ex2, and 553 instructions of
each of eight warps, 1106 cycles to issue. One program fills a multiprocessor, and its two warpgroups overlap
only as far as they drift apart between barriers: predicted 48% of the tensor cores' rate when they do not,
90% when they always do; half of the way, 63%. On Ampere (mma.sync, tiles of 64 keys) a tile is 2048 cycles
of the tensor cores and 1080 to issue: 65% to 90%.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from ...core.device import Device, device_of
from ...core.dropout import threshold
from ...core.gpus import arch_of
from ...ops.attention.attention_args import AttentionArgs
from ..core.dropout import keep, row_keys
from ..core.launch import HANDLES, Plan, alignment_of, jit, refuse

try:
    import triton.language as tl

    constexpr: Any = tl.constexpr
except ImportError:  # supports() says why this backend is not used
    tl, constexpr = None, float
LOG2_E, LN_2 = map(constexpr, (math.log2(math.e), math.log(2.0)))

# what both directions share; rows are of queries, and every tile may lie either way: i and j are given as
# [TileM, 1] and [1, TileN], or as [1, TileM] and [TileN, 1]


@jit
def span(cu_seqlens, b, length, total):
    """The first row of sequence b and its length; what the offsets say is held to the tensor."""
    if cu_seqlens is None:
        return b * 0, length
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
        return first, tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), first), total) - first


@jit
def visited(first, last, before, after, length, Tile: tl.constexpr, Plain: tl.constexpr):
    """The tiles of `length` elements that [x - before, x + after] meets, x from first to last.

    (lo, edge, full, end, rest): `edge` tiles from lo are met in part, those from full to end wholly, and
    `rest` tiles from end on in part. Plain: all are said to be met in part; in float32 a mask costs nothing
    beside its products, and a second loop is much to compile.
    """
    lo = tl.maximum(first - before, 0) // Tile * Tile
    hi = tl.maximum(tl.minimum(last + after + 1, length), 0)
    full = tl.cdiv(tl.maximum(last - before, 0), Tile) * Tile
    full = tl.maximum(tl.minimum(full, tl.cdiv(hi, Tile) * Tile), lo)
    if Plain:
        full = tl.maximum(tl.cdiv(hi, Tile) * Tile, lo)
    end = tl.maximum(tl.maximum(tl.minimum(first + after + 1, length), 0) // Tile * Tile, full)
    return lo, (full - lo) // Tile, full, end, tl.cdiv(tl.maximum(hi - end, 0), Tile)


@jit
def masked_tile(t, lo, edge, end, Tile: tl.constexpr):
    """Where the t-th of the tiles begins that are met in part."""
    return tl.where(t < edge, lo + t * Tile, end + (t - edge) * Tile)


@jit
def tanh(x, Cap: tl.constexpr):
    """To float32's last places if Cap is "float32"; with an absolute error like that for float16; by the
    hardware, to 2**-11 of the result, for bfloat16, whose own rounding is four times that."""
    if Cap == "bfloat16":
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2 * LOG2_E)) + 1.0)
        large = tl.where(x < 0, -large, large)
        if Cap == "float16":
            return large
        else:  # below 0.625 the subtraction loses digits; the polynomial is Cephes's
            s = x * x
            p = -5.70498872745e-3
            p = p * s + 2.06390887954e-2
            p = p * s - 5.37397155531e-2
            p = p * s + 1.33314422036e-1
            p = p * s - 3.33332819422e-1
            return tl.where(tl.abs(x) < 0.625, x + x * s * p, large)


# What goes together:
# walk = (base, stride, rel, row, there), a tensor and the places of one tile of it;
# numbers = (scale, cap, bias_i, bias_j, threshold, inverse) of the call;
# window = (shift, left, right);
# Form = (scale > 0 and all keys have a bias or slopes or none has, which tanh, bias has rows, bias has
# columns (0 no, 1 yes, 2 with a stride), q and k are padded, v is padded, logits are natural), constants.
#
# Logits are kept times log2(e), so that a probability is one multiply-add and one ex2; but natural in
# float32, whose digits lse would lose on its way from one unit to the other.
#
# The largest logit of a row must have an exponent of 0, or the row overflows or is lost. In one multiply-add,
# z scale - largest has what the product of the two was rounded by: 128 where logits are billions. So:
# - float32, where an instruction more is nothing beside the products: (z - largest) scale, exactly 0.
# - 16 bits: the multiply-add, since all of a row have one rounding, which is in its sum too and cancels; up
#   to 2^27 it is 4 at most, 2^4, which float16 holds. Beyond, two neighbouring floats are 8 apart, 2^-8: all
#   that matters is which logits are the largest, and a row's scale is the power of two above the true one,
#   whose products are exact.


@jit
def power(z, Natural: tl.constexpr):
    """exp of a logit."""
    return tl.exp2(z * LOG2_E) if Natural else tl.exp2(z)


@jit
def in_unit(x, Natural: tl.constexpr):
    """What belongs to a logit, in the unit of the logits."""
    return x if Natural else x * LOG2_E


@jit
def logits(s, numbers, slope, bias, window, i, j, SQ, SK, Form: tl.constexpr):
    """The logits of the raw products s, and what of d cap(z) / dz differs from 1: tanh squared; but s itself
    where its positive scale can be left to the exponent's multiply-add. With the scale left.

    scale has the logits' unit in it, or with a cap, which has it, 1 / softcap.
    """
    if Form[0] and Form[1] == "" and slope is None and bias is None:
        return s, 0.0, numbers[0]
    else:
        z = s * numbers[0]
        squared = 0.0
        Cap: tl.constexpr = Form[1]  # Triton 3.6 passes no element of a tuple on
        if Cap != "":
            z = tanh(z, Cap)
            squared = z * z
            z = z * numbers[1]
        if slope is not None:
            z -= in_unit(slope, Form[6]) * tl.abs(j - i - window[0]).to(tl.float32)
        if bias is not None:
            place = bias
            if Form[2]:
                place += i.to(tl.int64) * numbers[2]
            if Form[3] == 1:
                place += j
            elif Form[3] == 2:
                place += j.to(tl.int64) * numbers[3]
            if Form[2] and Form[3]:
                added = tl.load(place, mask=(i < SQ) & (j < SK), other=0)
            elif Form[2]:
                added = tl.load(place, mask=i < SQ, other=0)
            elif Form[3]:
                added = tl.load(place, mask=j < SK, other=0)
            else:
                added = tl.load(place)
            if added.dtype == tl.uint8:
                z = tl.where(added != 0, z, float("-inf"))
            else:
                z += in_unit(added.to(tl.float32), Form[6])
        return z, squared, 1.0


@jit
def left_scale(numbers, slope, bias, Form: tl.constexpr):
    """What `logits` leaves to be multiplied with."""
    if Form[0] and Form[1] == "" and slope is None and bias is None:
        return numbers[0]
    else:
        return 1.0


@jit
def even_scale(top, scale):
    """For rows whose largest score is `top`: scale, or a power of two where scale would give 2^27 or more."""
    above = ((scale.to(tl.int32, bitcast=True) & 0x7F800000) + 0x00800000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(top * scale) < 134217728.0, scale, above)


@jit
def unseen_hidden(z, i, j, length, window, Edge: tl.constexpr):
    """z, -inf for the keys that are not seen. Edge: "" where all are, "end" where some may be past the end,
    "window" where the window may hide some too."""
    if Edge != "":
        seen = j < length
        if Edge == "window":
            shift, left, right = window
            distance = j - i - shift
            seen = seen & (distance >= -left) & (distance <= right)
        z = tl.where(seen, z, float("-inf"))
    return z


@jit
def tile(walk, n, length, Masked: tl.constexpr, Padded: tl.constexpr):
    """[rows, dim] from row n on; zeros past the last row, if Masked, and past the last column, if Padded."""
    base, stride, rel, row, there = walk
    place = base + n.to(tl.int64) * stride + rel
    if Masked and Padded:
        return tl.load(place, mask=(row < length - n)[:, None] & there[None, :], other=0.0)
    elif Masked:
        return tl.load(place, mask=(row < length - n)[:, None], other=0.0)
    elif Padded:
        return tl.load(place, mask=there[None, :], other=0.0)
    else:
        return tl.load(place)


@jit
def dot(a, b, acc):
    """acc + a b; float32 is multiplied as float32, and a tile's sum is added as one: a chain through all
    tiles loses digits with its length."""
    if a.dtype == tl.float32:
        return acc - tl.dot(a, -b, input_precision="ieee")  # `acc + dot` would become one chain
    else:
        return tl.dot(a, b, acc)


@jit
def product(a, b):
    return tl.dot(a, b, input_precision="ieee")


# the forward


@jit
def _step(
    acc, total, top, q, k, v, n, i, column, length, SQ, numbers, slope, bias, window, first, second, seed,
    drawn, Form: tl.constexpr, Edge: tl.constexpr,
):  # fmt: skip
    """Sums, row sums and row maxima, of scores, with the keys from n on; their dropout columns begin at n +
    drawn. Edge as `unseen_hidden` has it."""
    key = tile(k, n, length, Edge != "", Form[4])
    j = n + column[None, :]
    z, _, scale = logits(product(q, key.T), numbers, slope, bias, window, i, j, SQ, length, Form)
    z = unseen_hidden(z, i, j, length, window, Edge)
    new = tl.maximum(top, tl.max(z, 1))
    # a row that has seen nothing yet: any finite number, since exp(-inf - it) is 0
    base = tl.where(new == float("-inf"), 0.0, new)
    if Form[6]:
        p = power((z - base[:, None]) * scale, True)
        shrink = power((top - base) * scale, True)
    elif Form[0] and Form[1] == "" and slope is None and bias is None:
        even = even_scale(base, scale)
        level = base * even
        p = tl.exp2(z * even[:, None] - level[:, None])
        shrink = tl.exp2(top * even_scale(top, scale) - level)  # with the rounding of what it was relative to
    else:
        p = tl.exp2(z - base[:, None])
        shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    if seed is not None:
        p = tl.where(keep(first, second, j + drawn, numbers[4]), p, 0.0)
    value = tile(v, n, length, Edge != "", Form[5])
    acc = dot(p.to(value.dtype), value, acc * shrink[:, None])
    return acc, total, new


NUMBERS = [
    "threshold", "left", "right", "bottom", "heads", "group", "SQ", "SK", "P",
    "total_q", "total_k", "tiles", "q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch",
    "v_row", "v_head", "pk_batch", "pk_row", "pk_head", "pv_batch", "pv_row", "pv_head", "bias_batch",
    "bias_head", "bias_i", "bias_j", "slope_batch",
]  # fmt: skip
_SMALL = ["slopes", "sinks", "seed", "cu_seqlens_q", "cu_seqlens_k", "lse"]


@jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=_SMALL)
def _forward_kernel(
    q, k, v, prefix_k, prefix_v, bias, slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, out, lse,
    scale, cap, inverse, threshold, left, right, bottom, heads, group, SQ, SK, P, total_q, total_k,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    pk_batch, pk_row, pk_head, pv_batch, pv_row, pv_head,
    bias_batch, bias_head, bias_i, bias_j, slope_batch, tiles,
    Dim: tl.constexpr, DimV: tl.constexpr, Align: tl.constexpr, BiasAlign: tl.constexpr, Form: tl.constexpr,
    TileM: tl.constexpr, TileN: tl.constexpr, TileD: tl.constexpr, TileDV: tl.constexpr,
):  # fmt: skip
    """out [.., SQ, heads, DimV] and lse [.., heads, SQ], natural log, of q [.., SQ, heads, Dim] and k, v.

    Strides are in multiples of Align elements, those of bias of BiasAlign.
    """
    member = tl.program_id(0) % group
    rest = tl.program_id(0) // group
    m = (tiles - 1 - rest % tiles) * TileM
    kv_head = rest // tiles % (heads // group)
    b = rest // tiles // (heads // group)
    q_first, sq = span(cu_seqlens_q, b, SQ, total_q)
    if m >= sq:
        return
    k_first, sk = span(cu_seqlens_k, b, SK, total_k)
    shift = (sk - sq) * bottom
    wide_b, kv_wide = b.to(tl.int64), kv_head.to(tl.int64)
    head = kv_wide * group + member
    row, column = tl.arange(0, TileM), tl.arange(0, TileN)
    d, d_v = tl.arange(0, TileD), tl.arange(0, TileDV)
    i = m + row
    q_stride, k_stride, v_stride = (
        q_row.to(tl.int64) * Align, k_row.to(tl.int64) * Align, v_row.to(tl.int64) * Align
    )  # fmt: skip
    q += (wide_b * q_batch + head * q_head) * Align + q_first * q_stride
    k += (wide_b * k_batch + kv_wide * k_head) * Align + k_first * k_stride
    v += (wide_b * v_batch + kv_wide * v_head) * Align + k_first * v_stride
    q_rel = row[:, None] * (q_row * Align) + d[None, :]
    k_rel = column[:, None] * (k_row * Align) + d[None, :]
    v_rel = column[:, None] * (v_row * Align) + d_v[None, :]
    k_walk = (k, k_stride, k_rel, column, d < Dim)
    v_walk = (v, v_stride, v_rel, column, d_v < DimV)
    q_tile = tile((q, q_stride, q_rel, row, d < Dim), m, sq, True, Form[4])

    # rows of lse and of the dropout mask; and of out
    line, place = (wide_b * heads + head) * SQ, wide_b * SQ
    if cu_seqlens_q is not None:
        line, place = head * total_q + q_first, q_first.to(tl.int64)
    first, second = row_keys(seed, line + i)
    first, second = first[:, None], second[:, None]
    slope, own = slopes, bias
    if slopes is not None:
        slope = tl.load(slopes + wide_b * slope_batch + head)
    if bias is not None:
        own = bias + (wide_b * bias_batch + head * bias_head) * BiasAlign
    numbers = (scale, cap, bias_i.to(tl.int64) * BiasAlign, bias_j, threshold, inverse)
    window = (shift, left, right)
    left_over = left_scale(numbers, slopes, bias, Form)
    top = tl.full((TileM,), float("-inf"), tl.float32)
    total = tl.zeros((TileM,), tl.float32)
    if sinks is not None:
        sink = in_unit(tl.load(sinks + head), Form[6])
        top = tl.zeros((TileM,), tl.float32) + sink / left_over
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    acc = tl.zeros((TileM, TileDV), tl.float32)

    if prefix_k is not None:
        pk = prefix_k + (wide_b * pk_batch + kv_wide * pk_head) * Align
        pv = prefix_v + (wide_b * pv_batch + kv_wide * pv_head) * Align
        pk_rel = column[:, None] * (pk_row * Align) + d[None, :]
        pv_rel = column[:, None] * (pv_row * Align) + d_v[None, :]
        pk_walk = (pk, pk_row.to(tl.int64) * Align, pk_rel, column, d < Dim)
        pv_walk = (pv, pv_row.to(tl.int64) * Align, pv_rel, column, d_v < DimV)
        for n in range(0, P, TileN):
            acc, total, top = _step(
                acc, total, top, q_tile, pk_walk, pv_walk, n, i[:, None], column, P, sq, numbers, None,
                None, window, first, second, seed, 0, Form, "end",
            )  # fmt: skip
    last = tl.minimum(m + TileM, sq) - 1
    lo, edge, full, end, tail = visited(m, last, left - shift, shift + right, sk, TileN, Form[6])
    for t in range(edge + tail):
        n = masked_tile(t, lo, edge, end, TileN)
        acc, total, top = _step(
            acc, total, top, q_tile, k_walk, v_walk, n, i[:, None], column, sk, sq, numbers, slope, own,
            window, first, second, seed, P, Form, "window",
        )  # fmt: skip
    if not Form[6]:
        for n in range(full, end, TileN):
            acc, total, top = _step(
                acc, total, top, q_tile, k_walk, v_walk, n, i[:, None], column, sk, sq, numbers, slope, own,
                window, first, second, seed, P, Form, "",
            )  # fmt: skip

    empty = total == 0.0
    factor = tl.where(empty, 0.0, inverse / total)
    top *= left_over
    level = top + tl.log(total) if Form[6] else (top + tl.log2(total)) * LN_2
    tl.store(lse + line + i, tl.where(empty, float("-inf"), level), mask=i < sq)
    out += ((place + m) * heads + head) * DimV
    out_rel = row[:, None] * (heads * DimV) + d_v[None, :]
    inside = (row < sq - m)[:, None] & (d_v < DimV)[None, :]
    tl.store(out + out_rel, (acc * factor[:, None]).to(out.dtype.element_ty), mask=inside)


# which tiles


class Config(NamedTuple):
    """What a launch fixes at compile time: tiles of queries and of keys, and how they are worked."""

    tile_m: int
    tile_n: int
    warps: int
    stages: int


@functools.lru_cache(maxsize=4096)
def choose(sq: int, dim: int, float_bytes: int, capability: int, plain: bool) -> Config:
    """Tiles for sq queries of heads of `dim`, the wider of q's and v's padded ones; plain: a logit is a
    scaled product, nothing is dropped.

    - float32 runs on the FMA units: tiles whose operands the registers hold.
    - Up to 64 queries are one tile.
    - wgmma: two warpgroups of 64 queries. A tile of 128 keys halves what is paid a tile (the sums, 64
      registers a thread, are rescaled); its logits are 64 registers, which leaves none to work on them with
      more than a scale, nor beside the sums of dim 256.
    - mma.sync: 64 keys, whose fragments fit beside 128 queries'; 96 KB at most, which any multiprocessor has.
    """
    if float_bytes == 4:
        return Config(32, 32, 4, 1)
    if sq <= 64:
        return Config(64, 64 if dim <= 128 else 32, 4, 2)
    if arch_of(capability).shared_operands:
        return Config(128, 128 if plain and dim <= 128 else 64, 8, 2)
    return Config(128, 64, 8, 2) if dim <= 128 else Config(64, 32, 4, 2)


# the backend

LONGEST = 2**29  # rows of queries or of keys, so that a row plus a window is an int32
MAX_HEAD_DIM = 256
FARTHEST = 2**23  # elements between rows, so that those of a tile are an int32 apart


class Layout(NamedTuple):
    """A tensor and the strides of its batches, rows and heads."""

    tensor: torch.Tensor
    batch: int
    row: int
    head: int


def layout(t: torch.Tensor) -> Layout:
    """Of [batch, rows, heads, dim], or packed [rows, heads, dim]: a copy where the kernels can't walk it."""
    strides = [s if n > 1 else 0 for s, n in zip(t.stride(), t.shape, strict=True)]
    if not t.numel():  # always contiguous, says torch, whatever its strides; nothing of it is read
        return Layout(t, 0, 0, 0)
    if (t.shape[-1] > 1 and strides[-1] != 1) or strides[-3] >= FARTHEST:
        return layout(t.contiguous())
    return Layout(t, strides[0] if len(strides) == 4 else 0, strides[-3], strides[-2])


def vector(layouts: tuple[Layout | None, ...]) -> int:
    """How many elements all begin and all strides are multiples of: 16 bytes' worth, or 1."""
    present = [x for x in layouts if x is not None]
    width = 16 // present[0].tensor.element_size()
    if any(x.tensor.data_ptr() % 16 or x.batch % width or x.row % width or x.head % width for x in present):
        return 1
    return width


class Bias(NamedTuple):
    """An attention bias as the kernels take it."""

    tensor: torch.Tensor | None = None
    batch: int = 0
    head: int = 0
    row: int = 0
    column: int = 0
    align: int = 1
    rows: bool = False
    columns: int = 0  # 0: one for all keys; 1: a stride of 1; 2: another


def bias_layout(bias: torch.Tensor | None) -> Bias:
    if bias is None:
        return Bias()
    if bias.dtype == torch.bool:
        bias = bias.view(torch.uint8)
    b, h, i, j = (s if n > 1 else 0 for s, n in zip(bias.stride(), bias.shape, strict=True))
    width = 16 // bias.element_size()
    fits = j == 1 and not (bias.data_ptr() % 16 or b % width or h % width or i % width)
    align = width if fits else 1
    columns = 0 if j == 0 else 1 if j == 1 else 2
    return Bias(bias, b // align, h // align, i // align, j, align, i != 0, columns)


def padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def int32_threshold(dropout_p: float) -> int:
    """The unsigned threshold in an int32, the one type that Triton gives it whatever its value."""
    t = threshold(dropout_p) if dropout_p else 0
    return t - 2**32 if t >= 2**31 else t


def cap_kind(dtype: torch.dtype, softcap: float) -> str:
    """Which tanh: see `tanh`."""
    return str(dtype).removeprefix("torch.") if softcap else ""


def scales(a: AttentionArgs, natural: bool) -> tuple[float, float]:
    """The scale and the cap as the kernels take them."""
    unit = 1.0 if natural else math.log2(math.e)
    return (a.softmax_scale / a.softcap, a.softcap * unit) if a.softcap else (a.softmax_scale * unit, 0.0)


def bounds(a: AttentionArgs) -> tuple[int, int, int]:
    """left, right, and 1 where the last query meets the last key."""
    left, right = (x if 0 <= x < 2 * LONGEST else 2 * LONGEST - 1 for x in (a.left, a.right))
    return left, right, int(not a.top_left)


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if (reason := refuse(q.device)) is not None:
        return reason
    prefix = 0 if a.prefix_k is None else a.prefix_k.shape[1]
    longest = max(q.shape[-3], k.shape[-3] + prefix, a.max_seqlen_q, a.max_seqlen_k)
    if longest >= LONGEST:
        return f"{longest} queries or keys are more than 2**29 - 1"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return (
            f"head dims {q.shape[-1]} and {v.shape[-1]} are more than the {MAX_HEAD_DIM} that its tiles hold"
        )
    if q.shape[-2] * max(q.shape[-1], v.shape[-1]) >= FARTHEST:
        return f"{q.shape[-2]} heads are too many"
    return None


class Problem(NamedTuple):
    """What every kernel takes of a call, in its order, and what it is compiled for beside the constants."""

    tensors: tuple[torch.Tensor | None, ...]
    numbers: tuple[float | int | None, ...]
    constants: tuple[Any, ...]
    kind: tuple[Any, ...]
    alignment: Any
    others: tuple[Layout, ...]
    plain: bool
    batch: int
    sq: int
    sk: int


def problem_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs, *others: torch.Tensor
) -> Problem:
    """`others` are of q's dtype, and walked like q."""
    packed = a.cu_seqlens_q is not None
    heads, kv_heads = q.shape[-2], k.shape[-2]
    batch = a.cu_seqlens_q.shape[0] - 1 if a.cu_seqlens_q is not None else q.shape[0]
    sq, sk = (a.max_seqlen_q, a.max_seqlen_k) if packed else (q.shape[1], k.shape[1])
    layouts = tuple(None if t is None else layout(t) for t in (q, k, v, a.prefix_k, a.prefix_v))
    walked = tuple(layout(t) for t in others)
    align = vector((*layouts, *walked))
    strides = [s // align for x in layouts for s in ((0, 0, 0) if x is None else x[1:])]
    bias = bias_layout(a.bias)
    natural = q.dtype == torch.float32
    scale, cap = scales(a, natural)
    numbers = (
        scale, cap, 1 / (1 - a.dropout_p), int32_threshold(a.dropout_p), *bounds(a), heads, heads // kv_heads,
        sq, sk, 0 if a.prefix_k is None else a.prefix_k.shape[1], q.shape[0] if packed else 0,
        k.shape[0] if packed else 0, *strides, *bias[1:5],
        heads if a.alibi_slopes is not None and a.alibi_slopes.dim() == 2 else 0,
    )  # fmt: skip
    small = (a.alibi_slopes, a.sinks, a.seed if a.dropout_p else None, a.cu_seqlens_q, a.cu_seqlens_k)
    tensors = (
        *(None if x is None else x.tensor for x in layouts), bias.tensor,
        *(None if t is None else t.contiguous() for t in small),
    )  # fmt: skip
    dim, dim_v = q.shape[-1], v.shape[-1]
    positive = scale > 0 and (a.prefix_k is None or (a.bias is None and a.alibi_slopes is None))
    form = (
        positive, cap_kind(q.dtype, a.softcap), bias.rows, bias.columns, dim != padded(dim),
        dim_v != padded(dim_v), natural,
    )  # fmt: skip
    constants = (dim, dim_v, align, bias.align, form)
    kinds = tuple(None if t is None else t.dtype for t in tensors)
    wide = tuple(n >= 2**31 for n in (*strides, *bias[1:5]))
    plain = scale > 0 and not (cap or a.dropout_p) and a.bias is None and a.alibi_slopes is None
    aligned = alignment_of(*tensors[:6], *(x.tensor for x in walked))
    walked = tuple(Layout(x.tensor, x.batch // align, x.row // align, x.head // align) for x in walked)
    kind = (constants, kinds, wide, *(x.batch >= 2**31 for x in walked))
    return Problem(tensors, numbers, constants, kind, aligned, walked, plain, batch, sq, sk)


@functools.lru_cache(maxsize=4096)
def _plan(
    device: Device, sq: int, dim: int, dim_v: int, float_bytes: int, plain: bool, kind: tuple[Any, ...]
) -> Plan:
    """The grid is of one head's tiles (`launch`)."""
    tile_d, tile_dv = padded(dim), padded(dim_v)
    config = choose(sq, max(tile_d, tile_dv), float_bytes, device.capability, plain)
    tile_m, tile_n, warps, stages = config
    return Plan(
        _forward_kernel,
        (-(-sq // tile_m), 1, 1),
        (tile_m, tile_n, tile_d, tile_dv),
        dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True),
        HANDLES.setdefault((device.number, "attention", kind, config), {}),
    )


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> list[torch.Tensor]:
    """The output, of q's shape but for the head dimension, which is v's, and lse."""
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return run(q, k, v, a)
    heads, dim, dim_v = q.shape[-2], q.shape[-1], v.shape[-1]
    out = torch.empty((*q.shape[:-1], dim_v), dtype=q.dtype, device=q.device)
    rows = (q.shape[0], heads, q.shape[1]) if a.cu_seqlens_q is None else (heads, q.shape[0])
    lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    p = problem_of(q, k, v, a)
    if lse.numel() and p.sq:
        plan = _plan(device_of(q.device), p.sq, dim, dim_v, q.dtype.itemsize, p.plain, p.kind)
        launch(plan, p, p.batch * heads, (out, lse), (plan.grid[0],))
    return [out, lse]


def launch(
    plan: Plan, p: Problem, heads: int, tensors: tuple[Any, ...], numbers: tuple[float | int, ...]
) -> None:
    """A plan whose grid is the tiles of one head, for this many heads, with a kernel's own arguments."""
    inputs = (*p.tensors, *tensors, *p.numbers, *numbers, *p.constants)
    plan._replace(grid=(plan.grid[0] * heads, 1, 1)).launch(inputs, p.alignment)

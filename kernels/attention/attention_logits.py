"""What attention's kernels share in Triton: which tiles a row meets, tiles of a tensor, and logits.

Rows are of queries, and every tile may lie either way: i and j are given as [TileM, 1] and [1, TileN], or as
[1, TileM] and [TileN, 1].

Logits are kept times log2(e), so that a probability is one multiply-add and one ex2; but natural in float32,
whose digits lse would lose on its way from one unit to the other.

The largest logit of a row must have an exponent of 0, or the row overflows or is lost. In one multiply-add,
z scale - largest has what the product of the two was rounded by: 128 where logits are billions. So:
- float32, where an instruction more is nothing beside the products: (z - largest) scale, exactly 0.
- 16 bits: the multiply-add, since all of a row have one rounding, which is in its sum too and cancels; up to
  2^27 it is 4 at most, 2^4, which float16 holds. Beyond, two neighbouring floats are 8 apart, 2^-8: all that
  matters is which logits are the largest, and a row's scale is the power of two above the true one, whose
  products are exact.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..core.launch import constexpr, jit, tl

LOG2_E, LN_2 = map(constexpr, (math.log2(math.e), math.log(2.0)))

# what goes together


class Walk(NamedTuple):
    """A tensor, and the places of one tile of it: rows `stride` elements apart.

    Attributes:
        base: its first row.
        stride: int64.
        rel: where the tile's elements are from its first row on, [rows, dim].
        row: [rows], which row of the tile.
        there: [dim], which columns exist.
    """

    base: Any
    stride: Any
    rel: Any
    row: Any
    there: Any


class Numbers(NamedTuple):
    """Of a call.

    Attributes:
        scale: of the products; it has the logits' unit in it, or with a cap, which has it, 1 / softcap.
        cap: the softcap in the logits' unit.
        bias_i, bias_j: elements between the bias's rows, and its columns.
        threshold, inverse: of dropout: below it an element is dropped; 1 / (1 - p).
    """

    scale: Any
    cap: Any
    bias_i: Any
    bias_j: Any
    threshold: Any
    inverse: Any


class Window(NamedTuple):
    """Query i sees key j where -left <= j - i - shift <= right."""

    shift: Any
    left: Any
    right: Any


class Forms(NamedTuple):
    """What logits are made of; constants.

    Attributes:
        Positive: scale > 0, and all keys have a bias or slopes or none has.
        Cap: which tanh (see `tanh`); "" for no softcap.
        BiasRows: whether the bias has rows of its own.
        BiasColumns: 0: it has one for all keys, 1: a column a key, 2: with a stride.
        Padded, PaddedV: whether tiles of q and k, of v, are wider than the head.
        Natural: whether logits are natural, not times log2(e).
    """

    Positive: bool
    Cap: str
    BiasRows: bool
    BiasColumns: int
    Padded: bool
    PaddedV: bool
    Natural: bool


# which tiles


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


# logits and tiles


@jit
def power(z, Natural: tl.constexpr):
    """exp of a logit."""
    return tl.exp2(z * LOG2_E) if Natural else tl.exp2(z)


@jit
def in_unit(x, Natural: tl.constexpr):
    """What belongs to a logit, in the unit of the logits."""
    return x if Natural else x * LOG2_E


@jit
def logits(s, numbers, slope, bias, window, i, j, SQ, SK, Form):
    """The logits of the raw products s; tanh squared, by which the slope of the cap is less than 1; and 1.
    Where logits are s times a positive scale: s itself, 0, and the scale, for the exponent's multiply-add."""
    if Form.Positive and Form.Cap == "" and slope is None and bias is None:
        return s, 0.0, numbers.scale
    else:
        z = s * numbers.scale
        squared = 0.0
        if Form.Cap != "":
            z = tanh(z, Form.Cap)
            squared = z * z
            z = z * numbers.cap
        if slope is not None:
            z -= in_unit(slope, Form.Natural) * tl.abs(j - i - window.shift).to(tl.float32)
        if bias is not None:
            place = bias
            if Form.BiasRows:
                place += i.to(tl.int64) * numbers.bias_i
            if Form.BiasColumns == 1:
                place += j
            elif Form.BiasColumns == 2:
                place += j.to(tl.int64) * numbers.bias_j
            if Form.BiasRows and Form.BiasColumns:
                added = tl.load(place, mask=(i < SQ) & (j < SK), other=0)
            elif Form.BiasRows:
                added = tl.load(place, mask=i < SQ, other=0)
            elif Form.BiasColumns:
                added = tl.load(place, mask=j < SK, other=0)
            else:
                added = tl.load(place)
            if added.dtype == tl.uint8:
                z = tl.where(added != 0, z, float("-inf"))
            else:
                z += in_unit(added.to(tl.float32), Form.Natural)
        return z, squared, 1.0


@jit
def left_scale(numbers, slope, bias, Form):
    """What `logits` leaves to be multiplied with."""
    if Form.Positive and Form.Cap == "" and slope is None and bias is None:
        return numbers.scale
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
            distance = j - i - window.shift
            seen = seen & (distance >= -window.left) & (distance <= window.right)
        z = tl.where(seen, z, float("-inf"))
    return z


@jit
def tile(walk, n, length, Masked: tl.constexpr, Padded: tl.constexpr):
    """[rows, dim] from row n on; zeros past the last row, if Masked, and past the last column, if Padded."""
    place = walk.base + n.to(tl.int64) * walk.stride + walk.rel
    if Masked and Padded:
        return tl.load(place, mask=(walk.row < length - n)[:, None] & walk.there[None, :], other=0.0)
    elif Masked:
        return tl.load(place, mask=(walk.row < length - n)[:, None], other=0.0)
    elif Padded:
        return tl.load(place, mask=walk.there[None, :], other=0.0)
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

"""The backward of attention in Triton: probabilities are made again from lse, tile by tile (FlashAttention-2:
Dao, 2023). No atomics, unless they are asked for: every sum is in one program and one order, the same bits
every time.

With z a pair's logit, P = exp(z - lse), delta = sum(o dO) - dlse of a query, and dP = dO V^T, the gradient of
z is P (dP - delta); dV = P^T dO, dK = dz^T q scale, dQ = dz k scale.

- delta: a program has TileM queries of a head; bound by the bytes of o and dO.
- keys: a program owns TileN keys of one key head, their K and V in shared memory, dK and dV in registers,
  and walks the queries of all heads that share them; q and dO are `stages - 1` tiles ahead. Logits lie
  transposed, [TileN, TileM], so that P^T and dz^T are the first operand of a product, straight from
  registers. The keys of the prefix are a second launch of it.
- queries: a program owns TileM queries of a head and walks its keys, as the forward does.
- bias: a program owns a tile of the bias and walks what it is broadcast over. A bias that has a full row of
  keys and of queries costs nothing but itself; what is summed over tiles (a bias of one row or one column) is
  an array of partial sums, 1 / TileM or 1 / TileN of the pairs, that torch adds.

Both walks visit only the tiles that the window meets, those that its edge crosses first and masked. A pair
costs seven products of the head dimension: five, and two of them twice, which is what no atomics costs; a
bias takes two more.

Not deterministic, keys make dQ too: a tile's share, dz^T K, is added atomically to float32 sums in L2, five
products a pair; programs of one head begin their walks at different tiles, so that few add to one place. A
pass over the sums, 6 bytes an element, makes dQ of them. They are made without atomics either way where a
gradient of sinks wants what `queries` sums; where heads wider than 128 leave no registers; and where heads
wider than 64 leave no columns of Blackwell's tensor memory, which five products and their operands share.

What bounds it, bfloat16, dim 128 on Hopper: a pair of tiles of 128 and 64 takes keys 1024 cycles of the
tensor cores and 525 instructions of each of eight warps, 1050 cycles to issue (27 of them reload what
registers did not hold); queries 768 cycles, and 329 instructions, 658 to issue, no spills. Predicted of the
tensor cores' rate, the five products counted: 37% without any overlap of the two, 71% with all.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ...core.device import Device, device_of
from ...ops.attention.attention_args import AttentionArgs
from ..core.dropout import keep, row_keys
from ..core.launch import Plan, alignment_of, contiguous, jit, planned, tl
from .attention import Config
from .attention_logits import (
    Forms,
    Numbers,
    Walk,
    Window,
    dot,
    in_unit,
    logits,
    masked_tile,
    power,
    product,
    span,
    tile,
    unseen_hidden,
    visited,
)
from .attention_problem import NUMBERS, Heads, Problem, launch, problem_of
from .attention_problem import supports as supports_forward
from .layouts import Layout, layout, padded, vector

# constants


class DeltaTiles(NamedTuple):
    """Rows and the padded width of a program; the width of a head, and what strides are divided by."""

    M: int
    DV: int
    DimV: int
    Align: int


class Walked(NamedTuple):
    """Rows of queries and of keys of a tile, padded widths of q and k and of v; how many copies of lse and
    delta are read (see `_rows`)."""

    M: int
    N: int
    D: int
    DV: int
    Copies: int


class Summed(NamedTuple):
    """Whether a bias's gradient is summed over rows, and over columns."""

    I: bool  # noqa: E741  as the kernels call them
    J: bool


# kernels

_WALKED = ["g_batch", "g_row", "g_head", "o_batch", "o_row", "o_head"]
_OWN = [*NUMBERS, "tiles", *_WALKED[:3], "batch", "batches", "bias_heads"]
_SMALL = ["slopes", "sinks", "seed", "cu_seqlens_q", "cu_seqlens_k", "lse", "delta", "grad_lse", "totals"]


@jit(do_not_specialize=["SQ", "heads", *_WALKED], do_not_specialize_on_alignment=_SMALL)
def _delta_kernel(
    grad, out, grad_lse, delta, heads, SQ, g_batch, g_row, g_head, o_batch, o_row, o_head,
    Row,
):  # fmt: skip
    """delta [batch, heads, SQ] = the sum of out grad over the head dimension, less grad_lse."""
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * Row.M
    row, d = tl.arange(0, Row.M), tl.arange(0, Row.DV)
    grad += (b * g_batch + head * g_head) * Row.Align
    out += (b * o_batch + head * o_head) * Row.Align
    g_rel = row[:, None] * (g_row * Row.Align) + d[None, :]
    o_rel = row[:, None] * (o_row * Row.Align) + d[None, :]
    Padded: tl.constexpr = Row.DimV != Row.DV
    g = tile(Walk(grad, g_row.to(tl.int64) * Row.Align, g_rel, row, d < Row.DimV), m, SQ, True, Padded)
    o = tile(Walk(out, o_row.to(tl.int64) * Row.Align, o_rel, row, d < Row.DimV), m, SQ, True, Padded)
    total = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    line = (b * heads + head) * SQ + m + row
    inside = m + row < SQ
    if grad_lse is not None:
        total -= tl.load(grad_lse + line, mask=inside, other=0.0)
    tl.store(delta + line, total, mask=inside)


@jit
def _gradient(
    s, dp, numbers, slope, bias, window, i, j, SQ, length, lse, delta, first, second, seed, drawn,
    Form, Edge: tl.constexpr,
):  # fmt: skip
    """The dropped probabilities, the gradient of the logits and that of the raw products s; dp is the raw
    product of grad and v. All that is a row's, lse and delta too, lies as i does."""
    z, squared, scale = logits(s, numbers, slope, bias, window, i, j, SQ, length, Form)
    z = unseen_hidden(z, i, j, length, window, Edge)
    # lse was rounded: of logits in the billions by more than 2 to that power is a number
    p = power(tl.minimum(z * scale - lse, 0.0, propagate_nan=tl.PropagateNan.ALL), Form.Natural)
    dropped = p
    if seed is not None:
        kept = keep(first, second, j + drawn, numbers.threshold)
        dropped = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp * numbers.inverse, 0.0)
    dz = p * (dp - delta)
    return dropped, dz, dz * (1.0 - squared)


@jit
def _rows(lse, delta, i, length, Natural: tl.constexpr, Copies: tl.constexpr):
    """Of the queries i, in the logits' unit, lse: 0 for a query that sees nothing, whose logits are all -inf,
    inf past the end; and delta, 0 past the end.

    A vector of fewer elements than there are threads is read in the layout of the logits, where a thread may
    have all queries: 64 registers, and twice that of addresses. Of several copies of each it is not, at the
    price of some shared memory.
    """
    inside = i < length
    if Copies == 1:
        of_lse = tl.load(lse + i, mask=inside, other=float("inf"))
        of_delta = tl.load(delta + i, mask=inside, other=0.0)
    else:
        place = i[:, None] + tl.arange(0, Copies)[None, :] * 0
        of_lse = tl.max(tl.load(lse + place, mask=inside[:, None], other=float("inf")), 1)
        of_delta = tl.max(tl.load(delta + place, mask=inside[:, None], other=0.0), 1)
    level = in_unit(of_lse, Natural)
    return tl.where(level == float("-inf"), 0.0, level), of_delta


@jit
def _keys_step(
    dk, dv, key, value, q, grad, m, j, length, SQ, numbers, slope, bias, window, lse, delta, line, seed,
    drawn, sums, Form, Copies: tl.constexpr, Edge: tl.constexpr,
):  # fmt: skip
    """The queries from m on: what they give dk and dv [TileN, dim] of the keys j, and what these give to the
    sums [TileM, dim] of dq, walked from the head's first row on, if there are any."""
    i = m + q.row
    q_tile = tile(q, m, SQ, Edge != "", Form.Padded)
    s = product(key, q_tile.T)
    g_tile = tile(grad, m, SQ, Edge != "", Form.PaddedV)
    dp = product(value, g_tile.T)
    first, second = row_keys(seed, line + i)
    own_lse, own_delta = _rows(lse + line, delta + line, i, SQ, Form.Natural, Copies)
    dropped, _, ds = _gradient(
        s, dp, numbers, slope, bias, window, i[None, :], j, SQ, length, own_lse[None, :], own_delta[None, :],
        first[None, :], second[None, :], seed, drawn, Form, Edge,
    )  # fmt: skip
    dv = dot(dropped.to(g_tile.dtype), g_tile, dv)
    own = ds.to(q_tile.dtype)
    dk = dot(own, q_tile, dk)
    if sums is not None:
        place = sums.base + m.to(tl.int64) * sums.stride + sums.rel
        given = product(own.T, key)
        if Edge == "" and not Form.Padded:
            tl.atomic_add(place, given, sem="relaxed")
        else:
            tl.atomic_add(
                place, given, mask=(sums.row < SQ - m)[:, None] & sums.there[None, :], sem="relaxed"
            )
    return dk, dv


@jit(do_not_specialize=_OWN, do_not_specialize_on_alignment=_SMALL)
def _keys_kernel(
    q, k, v, prefix_k, prefix_v, bias, slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k,
    grad, lse, delta, dk, dv, sums,
    scale, cap, inverse, threshold, left, right, bottom, heads, group, SQ, SK, P, total_q, total_k,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    pk_batch, pk_row, pk_head, pv_batch, pv_row, pv_head,
    bias_batch, bias_head, bias_i, bias_j, slope_batch, g_batch, g_row, g_head, scaled, tiles,
    Head, Form, Tile,
):  # fmt: skip
    """dk and dv, contiguous, of the shapes of k and v. Where there are sums, dq without its scale is added to
    them."""
    pid = tl.program_id(0)
    n = pid % tiles * Tile.N
    kv_heads = heads // group
    kv_head = pid // tiles % kv_heads
    b = pid // tiles // kv_heads
    k_first, sk = span(cu_seqlens_k, b, SK, total_k)
    if n >= sk:
        return
    q_first, sq = span(cu_seqlens_q, b, SQ, total_q)
    shift = (sk - sq) * bottom
    wide_b, kv_wide = b.to(tl.int64), kv_head.to(tl.int64)
    row, column = tl.arange(0, Tile.M), tl.arange(0, Tile.N)
    d, d_v = tl.arange(0, Tile.D), tl.arange(0, Tile.DV)
    q_stride, g_stride = q_row.to(tl.int64) * Head.Align, g_row.to(tl.int64) * Head.Align
    k_stride, v_stride = k_row.to(tl.int64) * Head.Align, v_row.to(tl.int64) * Head.Align
    k += (wide_b * k_batch + kv_wide * k_head) * Head.Align + k_first * k_stride
    v += (wide_b * v_batch + kv_wide * v_head) * Head.Align + k_first * v_stride
    k_rel = column[:, None] * (k_row * Head.Align) + d[None, :]
    v_rel = column[:, None] * (v_row * Head.Align) + d_v[None, :]
    q_rel = row[:, None] * (q_row * Head.Align) + d[None, :]
    g_rel = row[:, None] * (g_row * Head.Align) + d_v[None, :]
    key = tile(Walk(k, k_stride, k_rel, column, d < Head.Dim), n, sk, True, Form.Padded)
    value = tile(Walk(v, v_stride, v_rel, column, d_v < Head.DimV), n, sk, True, Form.PaddedV)
    j = (n + column)[:, None]
    window = Window(shift, left, right)
    dk_sum = tl.zeros((Tile.N, Tile.D), tl.float32)
    dv_sum = tl.zeros((Tile.N, Tile.DV), tl.float32)
    last = tl.minimum(n + Tile.N, sk) - 1
    lo, edge, full, end, tail = visited(n, last, shift + right, left - shift, sq, Tile.M, Form.Natural)
    numbers = Numbers(scale, cap, bias_i.to(tl.int64) * Head.BiasAlign, bias_j, threshold, inverse)
    for member in range(group):
        head = kv_wide * group + member
        own_q = q + (wide_b * q_batch + head * q_head) * Head.Align + q_first * q_stride
        own_grad = grad + (wide_b * g_batch + head * g_head) * Head.Align + q_first * g_stride
        line = (wide_b * heads + head) * SQ
        if cu_seqlens_q is not None:
            line = head * total_q + q_first
        slope, own = slopes, bias
        if slopes is not None:
            slope = tl.load(slopes + wide_b * slope_batch + head)
        if bias is not None:
            own = bias + (wide_b * bias_batch + head * bias_head) * Head.BiasAlign
        q_walk = Walk(own_q, q_stride, q_rel, row, d < Head.Dim)
        g_walk = Walk(own_grad, g_stride, g_rel, row, d_v < Head.DimV)
        own_sums = sums
        if sums is not None:
            place = wide_b * SQ
            if cu_seqlens_q is not None:
                place = q_first.to(tl.int64)
            rel = row[:, None] * (heads * Head.Dim) + d[None, :]
            own_sums = Walk(
                sums + (place * heads + head) * Head.Dim, heads * Head.Dim, rel, row, d < Head.Dim
            )
        for t in range(edge + tail):
            m = masked_tile(t, lo, edge, end, Tile.M)
            dk_sum, dv_sum = _keys_step(
                dk_sum, dv_sum, key, value, q_walk, g_walk, m, j, sk, sq, numbers, slope, own, window,
                lse, delta, line, seed, P, own_sums, Form, Tile.Copies, "window",
            )  # fmt: skip
        if not Form.Natural:
            count = (end - full) // Tile.M
            for t in range(count):
                m = full + t * Tile.M
                if sums is not None:
                    m = full + (t + pid) % count * Tile.M
                dk_sum, dv_sum = _keys_step(
                    dk_sum, dv_sum, key, value, q_walk, g_walk, m, j, sk, sq, numbers, slope, own,
                    window, lse, delta, line, seed, P, own_sums, Form, Tile.Copies, "",
                )  # fmt: skip
    first_key = wide_b * SK
    if cu_seqlens_k is not None:
        first_key = k_first.to(tl.int64)
    inside = (column < sk - n)[:, None]
    dk += ((first_key + n) * kv_heads + kv_head) * Head.Dim
    dk_rel = column[:, None] * (kv_heads * Head.Dim) + d[None, :]
    tl.store(dk + dk_rel, (dk_sum * scaled).to(dk.dtype.element_ty), mask=inside & (d < Head.Dim)[None, :])
    dv += ((first_key + n) * kv_heads + kv_head) * Head.DimV
    dv_rel = column[:, None] * (kv_heads * Head.DimV) + d_v[None, :]
    tl.store(
        dv + dv_rel, (dv_sum * inverse).to(dv.dtype.element_ty), mask=inside & (d_v < Head.DimV)[None, :]
    )


@jit
def _queries_step(
    dq, total, q, grad, k, v, n, i, column, length, SQ, numbers, slope, bias, window, lse, delta, first,
    second, seed, drawn, Form, Totals: tl.constexpr, Edge: tl.constexpr,
):  # fmt: skip
    """The keys from n on: what they give dq [TileM, dim] and, if Totals, the sum of the logits' gradients."""
    key = tile(k, n, length, Edge != "", Form.Padded)
    s = product(q, key.T)
    value = tile(v, n, length, Edge != "", Form.PaddedV)
    dp = product(grad, value.T)
    _, dz, ds = _gradient(
        s, dp, numbers, slope, bias, window, i, n + column[None, :], SQ, length, lse, delta, first, second,
        seed, drawn, Form, Edge,
    )  # fmt: skip
    if Totals:
        total += tl.sum(dz, 1)
    return dot(ds.to(key.dtype), key, dq), total


@jit(do_not_specialize=_OWN, do_not_specialize_on_alignment=_SMALL)
def _queries_kernel(
    q, k, v, prefix_k, prefix_v, bias, slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k,
    grad, lse, delta, dq, totals,
    scale, cap, inverse, threshold, left, right, bottom, heads, group, SQ, SK, P, total_q, total_k,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    pk_batch, pk_row, pk_head, pv_batch, pv_row, pv_head,
    bias_batch, bias_head, bias_i, bias_j, slope_batch, g_batch, g_row, g_head, scaled, tiles,
    Head, Form, Tile,
):  # fmt: skip
    """dq, contiguous, of q's shape, and with `totals`, laid out as lse, the sums of the logits' gradients;
    the programs are in the forward's order."""
    member = tl.program_id(0) % group
    rest = tl.program_id(0) // group
    m = (tiles - 1 - rest % tiles) * Tile.M
    kv_head = rest // tiles % (heads // group)
    b = rest // tiles // (heads // group)
    q_first, sq = span(cu_seqlens_q, b, SQ, total_q)
    if m >= sq:
        return
    k_first, sk = span(cu_seqlens_k, b, SK, total_k)
    shift = (sk - sq) * bottom
    wide_b, kv_wide = b.to(tl.int64), kv_head.to(tl.int64)
    head = kv_wide * group + member
    row, column = tl.arange(0, Tile.M), tl.arange(0, Tile.N)
    d, d_v = tl.arange(0, Tile.D), tl.arange(0, Tile.DV)
    i = m + row
    q_stride, g_stride = q_row.to(tl.int64) * Head.Align, g_row.to(tl.int64) * Head.Align
    k_stride, v_stride = k_row.to(tl.int64) * Head.Align, v_row.to(tl.int64) * Head.Align
    q += (wide_b * q_batch + head * q_head) * Head.Align + q_first * q_stride
    grad += (wide_b * g_batch + head * g_head) * Head.Align + q_first * g_stride
    k += (wide_b * k_batch + kv_wide * k_head) * Head.Align + k_first * k_stride
    v += (wide_b * v_batch + kv_wide * v_head) * Head.Align + k_first * v_stride
    k_rel = column[:, None] * (k_row * Head.Align) + d[None, :]
    v_rel = column[:, None] * (v_row * Head.Align) + d_v[None, :]
    q_rel = row[:, None] * (q_row * Head.Align) + d[None, :]
    g_rel = row[:, None] * (g_row * Head.Align) + d_v[None, :]
    q_tile = tile(Walk(q, q_stride, q_rel, row, d < Head.Dim), m, sq, True, Form.Padded)
    g_tile = tile(Walk(grad, g_stride, g_rel, row, d_v < Head.DimV), m, sq, True, Form.PaddedV)
    k_walk = Walk(k, k_stride, k_rel, column, d < Head.Dim)
    v_walk = Walk(v, v_stride, v_rel, column, d_v < Head.DimV)
    line, place = (wide_b * heads + head) * SQ, wide_b * SQ
    if cu_seqlens_q is not None:
        line, place = head * total_q + q_first, q_first.to(tl.int64)
    first, second = row_keys(seed, line + i)
    first, second = first[:, None], second[:, None]
    own_lse, own_delta = _rows(lse + line, delta + line, i, sq, Form.Natural, Tile.Copies)
    own_lse, own_delta = own_lse[:, None], own_delta[:, None]
    slope, own = slopes, bias
    if slopes is not None:
        slope = tl.load(slopes + wide_b * slope_batch + head)
    if bias is not None:
        own = bias + (wide_b * bias_batch + head * bias_head) * Head.BiasAlign
    numbers = Numbers(scale, cap, bias_i.to(tl.int64) * Head.BiasAlign, bias_j, threshold, inverse)
    window = Window(shift, left, right)
    acc = tl.zeros((Tile.M, Tile.D), tl.float32)
    total = tl.zeros((Tile.M,), tl.float32)
    Totals: tl.constexpr = totals is not None
    if prefix_k is not None:
        pk = prefix_k + (wide_b * pk_batch + kv_wide * pk_head) * Head.Align
        pv = prefix_v + (wide_b * pv_batch + kv_wide * pv_head) * Head.Align
        pk_rel = column[:, None] * (pk_row * Head.Align) + d[None, :]
        pv_rel = column[:, None] * (pv_row * Head.Align) + d_v[None, :]
        pk_walk = Walk(pk, pk_row.to(tl.int64) * Head.Align, pk_rel, column, d < Head.Dim)
        pv_walk = Walk(pv, pv_row.to(tl.int64) * Head.Align, pv_rel, column, d_v < Head.DimV)
        for n in range(0, P, Tile.N):
            acc, total = _queries_step(
                acc, total, q_tile, g_tile, pk_walk, pv_walk, n, i[:, None], column, P, sq, numbers,
                None, None, window, own_lse, own_delta, first, second, seed, 0, Form, Totals, "end",
            )  # fmt: skip
    last = tl.minimum(m + Tile.M, sq) - 1
    lo, edge, full, end, tail = visited(m, last, left - shift, shift + right, sk, Tile.N, Form.Natural)
    for t in range(edge + tail):
        n = masked_tile(t, lo, edge, end, Tile.N)
        acc, total = _queries_step(
            acc, total, q_tile, g_tile, k_walk, v_walk, n, i[:, None], column, sk, sq, numbers,
            slope, own, window, own_lse, own_delta, first, second, seed, P, Form, Totals, "window",
        )  # fmt: skip
    if not Form.Natural:
        for n in range(full, end, Tile.N):
            acc, total = _queries_step(
                acc, total, q_tile, g_tile, k_walk, v_walk, n, i[:, None], column, sk, sq, numbers,
                slope, own, window, own_lse, own_delta, first, second, seed, P, Form, Totals, "",
            )  # fmt: skip
    if totals is not None:
        tl.store(totals + line + i, total, mask=i < sq)
    dq += ((place + m) * heads + head) * Head.Dim
    dq_rel = row[:, None] * (heads * Head.Dim) + d[None, :]
    inside = (row < sq - m)[:, None] & (d < Head.Dim)[None, :]
    tl.store(dq + dq_rel, (acc * scaled).to(dq.dtype.element_ty), mask=inside)


@jit(do_not_specialize=_OWN, do_not_specialize_on_alignment=_SMALL)
def _bias_kernel(
    q, k, v, prefix_k, prefix_v, bias, slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k,
    grad, lse, delta, dbias,
    scale, cap, inverse, threshold, left, right, bottom, heads, group, SQ, SK, P, total_q, total_k,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    pk_batch, pk_row, pk_head, pv_batch, pv_row, pv_head,
    bias_batch, bias_head, bias_i, bias_j, slope_batch, g_batch, g_row, g_head, batch, batches, bias_heads,
    tiles,
    Head, Form, Sum, Tile,
):  # fmt: skip
    """dbias [batches, bias_heads, rows, columns]: rows are SQ, or if they are summed (Sum.I) tiles of
    them; columns are SK, or if they are summed (Sum.J) `tiles`. A program has one tile of it, and sums the
    heads and batches that share it."""
    pid = tl.program_id(0)
    tile_n, rest = pid % tiles, pid // tiles
    row_tiles = tl.cdiv(SQ, Tile.M)
    tile_m, rest = rest % row_tiles, rest // row_tiles
    own_head, own_batch = (rest % bias_heads).to(tl.int64), (rest // bias_heads).to(tl.int64)
    m, n = tile_m * Tile.M, tile_n * Tile.N
    shift = (SK - SQ) * bottom
    row, column = tl.arange(0, Tile.M), tl.arange(0, Tile.N)
    d, d_v = tl.arange(0, Tile.D), tl.arange(0, Tile.DV)
    i, j = m + row, n + column
    q_stride, g_stride = q_row.to(tl.int64) * Head.Align, g_row.to(tl.int64) * Head.Align
    k_stride, v_stride = k_row.to(tl.int64) * Head.Align, v_row.to(tl.int64) * Head.Align
    k_rel = column[:, None] * (k_row * Head.Align) + d[None, :]
    v_rel = column[:, None] * (v_row * Head.Align) + d_v[None, :]
    q_rel = row[:, None] * (q_row * Head.Align) + d[None, :]
    g_rel = row[:, None] * (g_row * Head.Align) + d_v[None, :]
    numbers = Numbers(scale, cap, bias_i.to(tl.int64) * Head.BiasAlign, bias_j, threshold, inverse)
    window = Window(shift, left, right)
    acc = tl.zeros((Tile.M, Tile.N), tl.float32)
    sharing = heads // bias_heads
    count = sharing * (batch // batches)
    # a tile outside the window has nothing to sum
    nearest, farthest = n - (tl.minimum(m + Tile.M, SQ) - 1) - shift, n + Tile.N - 1 - m - shift
    count = tl.where((nearest <= right) & (farthest >= -left), count, 0)
    for which in range(count):
        head, b = own_head + which % sharing, own_batch + which // sharing
        kv_head = head // group
        own_q = q + (b * q_batch + head * q_head) * Head.Align
        own_grad = grad + (b * g_batch + head * g_head) * Head.Align
        own_k = k + (b * k_batch + kv_head * k_head) * Head.Align
        own_v = v + (b * v_batch + kv_head * v_head) * Head.Align
        line = (b * heads + head) * SQ
        slope = slopes
        if slopes is not None:
            slope = tl.load(slopes + b * slope_batch + head)
        own = bias + (b * bias_batch + head * bias_head) * Head.BiasAlign
        q_tile = tile(Walk(own_q, q_stride, q_rel, row, d < Head.Dim), m, SQ, True, Form.Padded)
        key = tile(Walk(own_k, k_stride, k_rel, column, d < Head.Dim), n, SK, True, Form.Padded)
        s = product(q_tile, key.T)
        g_tile = tile(Walk(own_grad, g_stride, g_rel, row, d_v < Head.DimV), m, SQ, True, Form.PaddedV)
        value = tile(Walk(own_v, v_stride, v_rel, column, d_v < Head.DimV), n, SK, True, Form.PaddedV)
        dp = product(g_tile, value.T)
        first, second = row_keys(seed, line + i)
        own_lse, own_delta = _rows(lse + line, delta + line, i, SQ, Form.Natural, Tile.Copies)
        own_lse, own_delta = own_lse[:, None], own_delta[:, None]
        _, dz, _ = _gradient(
            s, dp, numbers, slope, own, window, i[:, None], j[None, :], SQ, SK, own_lse, own_delta,
            first[:, None], second[:, None], seed, P, Form, "window",
        )  # fmt: skip
        acc += dz
    rows, columns = SQ, SK
    if Sum.I:
        rows = row_tiles
    if Sum.J:
        columns = tiles
    dbias += (own_batch * bias_heads + own_head) * rows * columns
    kind: tl.constexpr = dbias.dtype.element_ty
    if Sum.I and Sum.J:
        tl.store(dbias + tile_m * columns + tile_n, tl.sum(tl.sum(acc, 1), 0))
    elif Sum.I:
        tl.store(dbias + tile_m.to(tl.int64) * columns + j, tl.sum(acc, 0), mask=j < SK)
    elif Sum.J:
        tl.store(dbias + i.to(tl.int64) * columns + tile_n, tl.sum(acc, 1), mask=i < SQ)
    else:
        place = i.to(tl.int64)[:, None] * columns + j[None, :]
        tl.store(dbias + place, acc.to(kind), mask=(i < SQ)[:, None] & (j < SK)[None, :])


# which tiles

DELTA_ROWS = 64


@functools.lru_cache(maxsize=4096)
def choose(device: Device, kernel: str, dim: int, float_bytes: int, plain: bool) -> Config:
    """Tiles for heads of `dim`, the wider of q's and v's padded ones; kernel: "keys", "queries", "bias"
    or "fused", which is keys with dQ; plain: a logit is a scaled product, nothing is dropped.

    - float32 runs on the FMA units: tiles whose operands the registers hold.
    - Up to dim 128, 128 keys (or queries) own their sums, 64 registers a thread for each of dk and dv, and
      meet 64 queries (or keys) at a time. That is 97 KB at dim 128; where a program has 99 KB at most, what
      logits need beyond a scale leaves no room for a second stage, nor keys any for 64 queries.
    - dim 256: what shared memory holds, two stages on Hopper, one elsewhere; on Blackwell P and dz of keys
      pass through it too.
    """
    if float_bytes == 4:
        return Config(16, 16, 4, 1) if dim > 128 else Config(32, 32, 4, 1)
    if dim > 128:
        if device.arch.shared_operands:
            stages = 1 if kernel == "keys" and device.arch.tensor_memory else 2
            return Config(64, 32, 4, 1) if kernel == "bias" else Config(64, 64, 8, stages)
        return Config(32, 32, 4, 1)
    if kernel == "bias":
        return Config(64, 64, 4, 1)
    if kernel == "fused" and dim > 64 and not device.arch.shared_operands:
        return Config(64, 64, 8, 2)
    stages = 2 if plain or dim <= 64 or device.arch.roomy else 1
    if kernel == "queries":
        return Config(128, 64, 8, stages)
    return Config(64 if stages == 2 else 32, 128, 8, stages)


# the backend


class Launch(NamedTuple):
    """A plan, and tiles of all queries and of all keys."""

    plan: Plan
    row_tiles: int
    column_tiles: int


@functools.lru_cache(maxsize=4096)
def _plan(
    device: Device, kernel: str, sq: int, sk: int, heads: Heads, form: Forms, dtype: torch.dtype, plain: bool,
    kind: tuple[Any, ...], given: Any = None,
) -> Launch:  # fmt: skip
    """`given`: whether `queries` has totals; what `bias` sums. The grid is of one head's tiles."""
    tile_d, tile_dv = padded(heads.Dim), padded(heads.DimV)
    tile_m, tile_n, warps, stages = choose(device, kernel, max(tile_d, tile_dv), dtype.itemsize, plain)
    row_tiles, column_tiles = -(-sq // tile_m), -(-sk // tile_n)
    tiles = {
        "keys": column_tiles,
        "fused": column_tiles,
        "queries": row_tiles,
        "bias": row_tiles * column_tiles,
    }[kernel]
    tile = Walked(tile_m, tile_n, tile_d, tile_dv, 8 if device.arch.shared_operands else 1)
    plan = planned(
        device,
        {"queries": _queries_kernel, "bias": _bias_kernel}.get(kernel, _keys_kernel),
        (tiles, 1, 1),
        (),
        (heads, form, given, tile) if kernel == "bias" else (heads, form, tile),
        (kernel, kind, given),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    return Launch(plan, row_tiles, column_tiles)


def _delta(grad: Layout, out: torch.Tensor, grad_lse: torch.Tensor | None, packed: bool) -> torch.Tensor:
    """float32 [batch, heads, seqlen_q], or [heads, total] of packed sequences."""
    of = layout(out)
    shape = out.shape[:-1]
    batch, rows, heads = (1, *shape) if packed else shape
    delta = torch.empty((batch, heads, rows)[packed:], dtype=torch.float32, device=out.device)
    align = vector((grad, of))
    strides = tuple(s // align for x in (grad, of) for s in x[1:])
    dim = out.shape[-1]
    wide = tuple(s >= 2**31 for s in strides)
    plan = planned(
        device_of(out.device), _delta_kernel, (-(-rows // DELTA_ROWS), heads, batch), (),
        (DeltaTiles(DELTA_ROWS, padded(dim), dim, align),), (out.dtype, grad_lse is None, wide),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    grad_lse = contiguous(grad_lse)
    inputs = (grad.tensor, of.tensor, grad_lse, delta, heads, rows, *strides)
    plan.launch(inputs, alignment_of(grad.tensor, of.tensor))
    return delta


def supports(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    a: AttentionArgs,
    wanted: Any,
    deterministic: bool,
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return supports_forward(q, k, v, a)


def run(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    a: AttentionArgs,
    wanted: Any,
    deterministic: bool,
) -> list[torch.Tensor]:
    """The gradients of q, k, v, bias, sinks, prefix_k and prefix_v; an empty tensor for one not wanted."""
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return run(grad, grad_lse, q, k, v, out, lse, a, wanted, deterministic)
    of = (q, k, v, a.bias, a.sinks, a.prefix_k, a.prefix_v)
    dtypes = [q.dtype if t is None else t.dtype for t in of]
    made = [torch.empty(0, dtype=dtype, device=q.device) for dtype in dtypes]
    nothing = not lse.numel() or (a.cu_seqlens_q is not None and not a.max_seqlen_q)
    if nothing:
        return [
            torch.zeros_like(t) if want and t is not None else m
            for t, want, m in zip(of, wanted, made, strict=True)
        ]
    lse = lse.contiguous()
    p = problem_of(q, k, v, a, grad)
    delta = _delta(layout(grad), out, grad_lse, a.cu_seqlens_q is not None)
    of_sinks = wanted.sinks and a.sinks is not None
    sums = None
    narrow = max(q.shape[-1], v.shape[-1]) <= (64 if device_of(q.device).arch.tensor_memory else 128)
    if not deterministic and wanted.q and (wanted.k or wanted.v) and not of_sinks and narrow and p.sk:
        sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    elif wanted.q or of_sinks:
        totals = torch.empty_like(lse) if of_sinks else None
        dq = _queries(p, q, lse, delta, totals, a)
        made[0] = dq if wanted.q else made[0]
        if totals is not None and a.sinks is not None:
            made[4] = _sinks(a.sinks, lse, delta, grad_lse, totals)
    if wanted.k or wanted.v:
        both = _keys(p, q, k, v, lse, delta, a, sums)
        made[1:3] = (t if want else m for t, want, m in zip(both, wanted[1:3], made[1:3], strict=True))
    if wanted.bias and a.bias is not None:
        made[3] = _bias(p, q, lse, delta, a)
    of_prefix = sums is not None or wanted.prefix_k or wanted.prefix_v
    if of_prefix and a.prefix_k is not None and a.prefix_v is not None:
        alone = a._replace(
            left=-1, right=-1, bias=None, alibi_slopes=None, sinks=None, prefix_k=None, prefix_v=None,
            cu_seqlens_k=None, max_seqlen_k=a.prefix_k.shape[1],
        )  # fmt: skip
        p = problem_of(q, a.prefix_k, a.prefix_v, alone, grad)
        both = _keys(p, q, a.prefix_k, a.prefix_v, lse, delta, alone, sums)
        made[5:] = (t if want else m for t, want, m in zip(both, wanted[5:], made[5:], strict=True))
    if sums is not None:
        made[0] = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        torch.mul(sums, a.softmax_scale, out=made[0])
    return made


def _sinks(
    sinks: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_lse: torch.Tensor | None,
    totals: torch.Tensor,
) -> torch.Tensor:
    """[heads] of [batch, heads, seqlen_q] or [heads, total].

    A sink has no value, so the gradient of its logit is p (dlse - the sum of P dP over the keys). That sum is
    o dO, but o was rounded; the gradients of the keys' logits, P (dP - delta), give it to float32's digits.
    """
    p = torch.exp(sinks.unsqueeze(-1) - lse.masked_fill(lse == float("-inf"), 0))
    toward = totals + delta * (1 - p)
    if grad_lse is not None:
        toward = toward - grad_lse
    return -(p * toward).sum((1,) if lse.dim() == 2 else (0, 2))


def _keys(
    p: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor,
    a: AttentionArgs, sums: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if p.sk and dk.numel():
        kernel = "keys" if sums is None else "fused"
        plan, _, tiles = _plan(
            device_of(q.device), kernel, p.sq, p.sk, p.heads, p.form, q.dtype, p.plain, p.kind
        )
        grad = p.others[0]
        numbers = (grad.batch, grad.row, grad.head, a.softmax_scale, tiles)
        launch(plan, p, p.batch * k.shape[-2], (grad.tensor, lse, delta, dk, dv, sums), numbers)
    return dk, dv


def _queries(
    p: Problem, q: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, totals: torch.Tensor | None,
    a: AttentionArgs,
) -> torch.Tensor:  # fmt: skip
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    plan, tiles, _ = _plan(
        device_of(q.device), "queries", p.sq, p.sk, p.heads, p.form, q.dtype, p.plain, p.kind,
        totals is not None,
    )  # fmt: skip
    grad = p.others[0]
    numbers = (grad.batch, grad.row, grad.head, a.softmax_scale, tiles)
    launch(plan, p, p.batch * q.shape[-2], (grad.tensor, lse, delta, dq, totals), numbers)
    return dq


def _bias(
    p: Problem, q: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, a: AttentionArgs
) -> torch.Tensor:
    assert a.bias is not None
    batches, bias_heads, rows, columns = a.bias.shape
    if not p.sk:
        return torch.zeros_like(a.bias)
    sums = Summed(rows == 1 and p.sq > 1, columns == 1 and p.sk > 1)
    plan, row_tiles, tiles = _plan(
        device_of(q.device), "bias", p.sq, p.sk, p.heads, p.form, q.dtype, p.plain, p.kind, sums
    )
    shape = (batches, bias_heads, row_tiles if sums.I else p.sq, tiles if sums.J else p.sk)
    dtype = torch.float32 if any(sums) else a.bias.dtype
    dbias = torch.empty(shape, dtype=dtype, device=q.device)
    grad = p.others[0]
    numbers = (grad.batch, grad.row, grad.head, p.batch, batches, bias_heads, tiles)
    launch(plan, p, batches * bias_heads, (grad.tensor, lse, delta, dbias), numbers)
    over = [dimension for dimension, summed in zip((2, 3), sums, strict=True) if summed]
    return dbias.sum(over, keepdim=True).to(a.bias.dtype) if over else dbias

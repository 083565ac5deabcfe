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
from typing import Any, NamedTuple

import torch

from ...core.device import Device, device_of
from ...ops.attention.attention_args import AttentionArgs
from ..core.dropout import keep, row_keys
from ..core.launch import Plan, jit, planned, tl
from .attention_logits import (
    LN_2,
    Forms,
    Numbers,
    Walk,
    Window,
    dot,
    even_scale,
    in_unit,
    left_scale,
    logits,
    masked_tile,
    power,
    product,
    span,
    tile,
    unseen_hidden,
    visited,
)
from .attention_problem import NUMBERS, Heads, Tiles, launch, problem_of, supports
from .layouts import padded

__all__ = ["run", "supports"]

# the forward


@jit
def _step(
    acc, total, top, q, k, v, n, i, column, length, SQ, numbers, slope, bias, window, first, second, seed,
    drawn, Form, Edge: tl.constexpr,
):  # fmt: skip
    """Sums, row sums and row maxima, of scores, with the keys from n on; their dropout columns begin at n +
    drawn. Edge as `unseen_hidden` has it."""
    key = tile(k, n, length, Edge != "", Form.Padded)
    j = n + column[None, :]
    z, _, scale = logits(product(q, key.T), numbers, slope, bias, window, i, j, SQ, length, Form)
    z = unseen_hidden(z, i, j, length, window, Edge)
    new = tl.maximum(top, tl.max(z, 1))
    # a row that has seen nothing yet: any finite number, since exp(-inf - it) is 0
    base = tl.where(new == float("-inf"), 0.0, new)
    if Form.Natural:
        p = power((z - base[:, None]) * scale, True)
        shrink = power((top - base) * scale, True)
    elif Form.Positive and Form.Cap == "" and slope is None and bias is None:
        even = even_scale(base, scale)
        level = base * even
        p = tl.exp2(z * even[:, None] - level[:, None])
        shrink = tl.exp2(top * even_scale(top, scale) - level)  # with the rounding of what it was relative to
    else:
        p = tl.exp2(z - base[:, None])
        shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    if seed is not None:
        p = tl.where(keep(first, second, j + drawn, numbers.threshold), p, 0.0)
    value = tile(v, n, length, Edge != "", Form.PaddedV)
    acc = dot(p.to(value.dtype), value, acc * shrink[:, None])
    return acc, total, new


_SMALL = ["slopes", "sinks", "seed", "cu_seqlens_q", "cu_seqlens_k", "lse"]


@jit(do_not_specialize=[*NUMBERS, "tiles"], do_not_specialize_on_alignment=_SMALL)
def _forward_kernel(
    q, k, v, prefix_k, prefix_v, bias, slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, out, lse,
    scale, cap, inverse, threshold, left, right, bottom, heads, group, SQ, SK, P, total_q, total_k,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    pk_batch, pk_row, pk_head, pv_batch, pv_row, pv_head,
    bias_batch, bias_head, bias_i, bias_j, slope_batch, tiles, Head, Form, Tile,
):  # fmt: skip
    """out [.., SQ, heads, DimV] and lse [.., heads, SQ], natural log, of q [.., SQ, heads, Dim] and k, v.

    Strides are in multiples of Align elements, those of bias of BiasAlign.
    """
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
    q_stride, k_stride, v_stride = (
        q_row.to(tl.int64) * Head.Align, k_row.to(tl.int64) * Head.Align, v_row.to(tl.int64) * Head.Align
    )  # fmt: skip
    q += (wide_b * q_batch + head * q_head) * Head.Align + q_first * q_stride
    k += (wide_b * k_batch + kv_wide * k_head) * Head.Align + k_first * k_stride
    v += (wide_b * v_batch + kv_wide * v_head) * Head.Align + k_first * v_stride
    q_rel = row[:, None] * (q_row * Head.Align) + d[None, :]
    k_rel = column[:, None] * (k_row * Head.Align) + d[None, :]
    v_rel = column[:, None] * (v_row * Head.Align) + d_v[None, :]
    k_walk = Walk(k, k_stride, k_rel, column, d < Head.Dim)
    v_walk = Walk(v, v_stride, v_rel, column, d_v < Head.DimV)
    q_tile = tile(Walk(q, q_stride, q_rel, row, d < Head.Dim), m, sq, True, Form.Padded)

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
        own = bias + (wide_b * bias_batch + head * bias_head) * Head.BiasAlign
    numbers = Numbers(scale, cap, bias_i.to(tl.int64) * Head.BiasAlign, bias_j, threshold, inverse)
    window = Window(shift, left, right)
    left_over = left_scale(numbers, slopes, bias, Form)
    top = tl.full((Tile.M,), float("-inf"), tl.float32)
    total = tl.zeros((Tile.M,), tl.float32)
    if sinks is not None:
        sink = in_unit(tl.load(sinks + head), Form.Natural)
        top = tl.zeros((Tile.M,), tl.float32) + sink / left_over
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    acc = tl.zeros((Tile.M, Tile.DV), tl.float32)

    if prefix_k is not None:
        pk = prefix_k + (wide_b * pk_batch + kv_wide * pk_head) * Head.Align
        pv = prefix_v + (wide_b * pv_batch + kv_wide * pv_head) * Head.Align
        pk_rel = column[:, None] * (pk_row * Head.Align) + d[None, :]
        pv_rel = column[:, None] * (pv_row * Head.Align) + d_v[None, :]
        pk_walk = Walk(pk, pk_row.to(tl.int64) * Head.Align, pk_rel, column, d < Head.Dim)
        pv_walk = Walk(pv, pv_row.to(tl.int64) * Head.Align, pv_rel, column, d_v < Head.DimV)
        for n in range(0, P, Tile.N):
            acc, total, top = _step(
                acc, total, top, q_tile, pk_walk, pv_walk, n, i[:, None], column, P, sq, numbers, None,
                None, window, first, second, seed, 0, Form, "end",
            )  # fmt: skip
    last = tl.minimum(m + Tile.M, sq) - 1
    lo, edge, full, end, tail = visited(m, last, left - shift, shift + right, sk, Tile.N, Form.Natural)
    for t in range(edge + tail):
        n = masked_tile(t, lo, edge, end, Tile.N)
        acc, total, top = _step(
            acc, total, top, q_tile, k_walk, v_walk, n, i[:, None], column, sk, sq, numbers, slope, own,
            window, first, second, seed, P, Form, "window",
        )  # fmt: skip
    if not Form.Natural:
        for n in range(full, end, Tile.N):
            acc, total, top = _step(
                acc, total, top, q_tile, k_walk, v_walk, n, i[:, None], column, sk, sq, numbers, slope, own,
                window, first, second, seed, P, Form, "",
            )  # fmt: skip

    empty = total == 0.0
    factor = tl.where(empty, 0.0, inverse / total)
    top *= left_over
    level = top + tl.log(total) if Form.Natural else (top + tl.log2(total)) * LN_2
    tl.store(lse + line + i, tl.where(empty, float("-inf"), level), mask=i < sq)
    out += ((place + m) * heads + head) * Head.DimV
    out_rel = row[:, None] * (heads * Head.DimV) + d_v[None, :]
    inside = (row < sq - m)[:, None] & (d_v < Head.DimV)[None, :]
    tl.store(out + out_rel, (acc * factor[:, None]).to(out.dtype.element_ty), mask=inside)


# which tiles


class Config(NamedTuple):
    """What a launch fixes at compile time: tiles of queries and of keys, and how they are worked."""

    tile_m: int
    tile_n: int
    warps: int
    stages: int


@functools.lru_cache(maxsize=4096)
def choose(device: Device, sq: int, dim: int, float_bytes: int, plain: bool) -> Config:
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
    if device.arch.shared_operands:
        return Config(128, 128 if plain and dim <= 128 else 64, 8, 2)
    return Config(128, 64, 8, 2) if dim <= 128 else Config(64, 32, 4, 2)


# the backend


@functools.lru_cache(maxsize=4096)
def _plan(
    device: Device, sq: int, heads: Heads, form: Forms, dtype: torch.dtype, plain: bool, kind: tuple[Any, ...]
) -> Plan:
    """The grid is of one head's tiles (`launch`)."""
    tile_d, tile_dv = padded(heads.Dim), padded(heads.DimV)
    tile_m, tile_n, warps, stages = choose(device, sq, max(tile_d, tile_dv), dtype.itemsize, plain)
    return planned(
        device,
        _forward_kernel,
        (-(-sq // tile_m), 1, 1),
        (),
        (heads, form, Tiles(tile_m, tile_n, tile_d, tile_dv)),
        kind,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> list[torch.Tensor]:
    """The output, of q's shape but for the head dimension, which is v's, and lse."""
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return run(q, k, v, a)
    heads = q.shape[-2]
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    rows = (q.shape[0], heads, q.shape[1]) if a.cu_seqlens_q is None else (heads, q.shape[0])
    lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    p = problem_of(q, k, v, a)
    if lse.numel() and p.sq:
        plan = _plan(device_of(q.device), p.sq, p.heads, p.form, q.dtype, p.plain, p.kind)
        launch(plan, p, p.batch * heads, (out, lse), (plan.grid[0],))
    return [out, lse]

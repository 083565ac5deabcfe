"""speculative_sample and speculative_sample_tree in Triton: rejection sampling along a tree of draft tokens,
of which a chain is one.

A team of programs (teams.py) takes a sequence, each a part of the vocabulary, Tile tokens at a time, 8 a
thread. All of them walk down the tree alike, by a few scalars: a node that is accepted costs the two
probabilities of its token. One that is refused costs a sum over the vocabulary, of the weights that are left
for its siblings and for the last token. Weights are integers, 42 bits of a probability, so the sums do not
depend on who adds them; they are made from the rows of q and p whenever they are needed, in registers, and
written nowhere. At last the program whose part the uniform falls into makes its weights once more.

What bounds it, where sequences fill the device, are the bytes of q's row and p's at the first refusal, from
memory once and then from L2: of 128256 float32 probabilities 32064 sectors for the sum, as many again for
the draw, and 33 instructions a token, predicted 20 us a sequence on a multiprocessor of its own, where
memory takes 40 us for 128 of them. A further refused sibling adds two or three passes over L2. One sequence
shared by 32 programs is bound by latency: some 2 us an exchange, of which there is one a refusal.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ..core.launch import constants, jit, refuse, tl
from ..core.teams import before, exchange, team

TILE = 2048


@jit
def _fixed(x):
    """float32 as integers of 42 bits; what is not above 0 (NaN too) as 0."""
    return (tl.minimum(tl.where(x > 0, x, 0.0), 1.0) * 4398046511104.0).to(tl.int64)


@jit
def _clamped(uniform):
    uniform = uniform.to(tl.float64)
    return tl.minimum(tl.where(uniform > 0, uniform, 0.0), 1.0)


@jit
def _weights(q_row, draft, d_row, refused, refusals, at, inside):
    """The weights of tokens after `refusals` of the node's children: (token, row, ratio) each."""
    q = tl.load(q_row + at, inside, other=0).to(tl.float32)
    if refusals > 0:
        p_row = draft + tl.load(refused + 1).to(tl.int64) * d_row
        q -= tl.load(p_row + at, inside, other=0).to(tl.float32)
    weights = _fixed(q)
    for r in range(1, refusals):
        p_row = draft + tl.load(refused + r * 3 + 1).to(tl.int64) * d_row
        p = tl.load(p_row + at, inside, other=0).to(tl.float32)
        scaled = (weights.to(tl.float64) * tl.load(refused + r * 3 + 2)).to(tl.int64)
        weights = tl.maximum(scaled - _fixed(p), 0)
    return weights


@jit
def _sum_weights(q_row, draft, d_row, refused, refusals, begin, end, Tile: tl.constexpr):
    total = tl.zeros((Tile,), tl.int64)
    for first in range(begin, end, Tile):
        at = first + tl.arange(0, Tile)
        total += _weights(q_row, draft, d_row, refused, refusals, at, at < end)
    return tl.sum(total, 0)


@jit
def _sum_row(row, begin, end, Tile: tl.constexpr):
    total = tl.zeros((Tile,), tl.int64)
    for first in range(begin, end, Tile):
        at = first + tl.arange(0, Tile)
        total += _fixed(tl.load(row + at, at < end, other=0).to(tl.float32))
    return tl.sum(total, 0)


@jit
def _total(own, room, count, phase, part, Parts: tl.constexpr):
    """The team's sum of a number, and the sum of those before."""
    every = exchange(tl.full((1,), 0, tl.int64) + own, room, count, phase, part, Parts, 1, 1)
    return tl.sum(tl.sum(every, 0), 0), tl.sum(before(every, part, Parts), 0)


class Row(NamedTuple):
    """What V and the strides of draft and target are divided by; tokens at a time; programs of a team;
    constants."""

    Align: int
    Tile: int
    Parts: int


_INTEGERS = [
    "nodes", "rows", "V", "tiles", "d_batch", "d_row", "t_batch", "t_row", "i_batch", "i_node", "p_batch",
    "p_node", "r_batch", "r_node", "u_batch", "u_node", "replacement",
]  # fmt: skip
_SMALL = ["ids", "parents", "draft_rows", "uniforms", "tokens", "accepted", "path"]


@jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _kernel(
    draft, ids, parents, draft_rows, target, uniforms, tokens, accepted, path, room, count, refused,
    nodes, rows, V, tiles, d_batch, d_row, t_batch, t_row, i_batch, i_node, p_batch, p_node, r_batch, r_node,
    u_batch, u_node, replacement, Fixed,
):  # fmt: skip
    """parents: None for a chain; draft_rows: None where node i's is row i; path: None if not wanted."""
    Align: tl.constexpr = Fixed.Align
    Tile: tl.constexpr = Fixed.Tile
    Parts: tl.constexpr = Fixed.Parts
    V *= Align
    d_batch, d_row = d_batch.to(tl.int64) * Align, d_row.to(tl.int64) * Align
    t_batch, t_row = t_batch.to(tl.int64) * Align, t_row.to(tl.int64) * Align
    b, part = (tl.program_id(0) // Parts).to(tl.int64), tl.program_id(0) % Parts
    begin = part * tiles * Tile
    end = tl.minimum(begin + tiles * Tile, V)
    draft += b * d_batch
    target += b * t_batch
    tokens += b * (nodes + 1)
    uniforms += b * u_batch
    refused += tl.program_id(0).to(tl.int64) * nodes * 3
    if Parts > 1:
        room += b * (2 * Parts)
        count += b

    node = tl.full((), -1, tl.int64)
    draft_row = tl.full((), -1, tl.int64)  # whose sum is draft_total
    draft_total = tl.full((), 0, tl.int64)
    total = tl.full((), 0, tl.int64)  # of the weights; of this program's; of those of the programs before
    own = tl.full((), 0, tl.int64)
    ahead = tl.full((), 0, tl.int64)
    summed = tl.full((), 0, tl.int32)
    left = tl.full((), 1, tl.int32)
    kept_nodes = tl.full((), 0, tl.int32)
    refusals = tl.full((), 0, tl.int32)
    phase = tl.full((), 0, tl.int32)
    for i in range(nodes):
        token = tl.load(ids + b * i_batch + i * i_node).to(tl.int64)
        place = tl.full((), 0, tl.int64) + i
        parent, row = place - 1, place
        if parents is not None:
            parent = tl.load(parents + b * p_batch + i * p_node).to(tl.int64)
        if draft_rows is not None:
            row = tl.load(draft_rows + b * r_batch + i * r_node).to(tl.int64)
        there = (token >= 0) & (token < V) & (row >= 0) & (row < rows)
        if there & (parent == node) & (left > 0):
            p_row = draft + row * d_row
            q_row = target + (node + 1) * t_row
            uniform = _clamped(tl.load(uniforms + i * u_node))
            p = tl.load(p_row + token).to(tl.float32)
            kept = uniform * p.to(tl.float64) < tl.load(q_row + token).to(tl.float64)
            ratio = tl.full((), 1, tl.float64)
            if refusals > 0:
                if row != draft_row:
                    draft_row = row
                    mine = _sum_row(p_row, begin, end, Tile)
                    draft_total, _ = _total(mine, room, count, phase, part, Parts)
                    phase += 1
                rest = draft_total
                if replacement == 0:
                    for r in range(refusals):
                        taken = tl.load(refused + r * 3).to(tl.int64)
                        rest -= _fixed(tl.load(p_row + taken).to(tl.float32))
                    rest = tl.maximum(rest, 0)
                weight = _weights(q_row, draft, d_row, refused, refusals, token, token < V).to(tl.float64)
                wide, share = total.to(tl.float64), rest.to(tl.float64)
                kept = uniform * (_fixed(p).to(tl.float64) * wide) < weight * share
                ratio = share / wide
            if kept:
                if part == 0:
                    tl.store(tokens + kept_nodes, token)
                    if path is not None:
                        tl.store(path + b * nodes + kept_nodes, place)
                node = place
                kept_nodes += 1
                refusals = tl.full((), 0, tl.int32)
                summed = tl.full((), 0, tl.int32)
            else:
                tl.debug_barrier()  # all have read what may be overwritten
                tl.store(refused + refusals * 3, token.to(tl.float64))
                tl.store(refused + refusals * 3 + 1, row.to(tl.float64))
                tl.store(refused + refusals * 3 + 2, ratio)
                tl.debug_barrier()
                mine = _sum_weights(q_row, draft, d_row, refused, refusals + 1, begin, end, Tile)
                every, those = _total(mine, room, count, phase, part, Parts)
                phase += 1
                if every > 0:
                    refusals += 1
                    total, own, ahead = every, mine, those
                    summed = tl.full((), 1, tl.int32)
                else:  # q <= p everywhere, which rounded rows can come to
                    left = tl.full((), 0, tl.int32)
                    summed = tl.full((), 0, tl.int32)

    q_row = target + (node + 1) * t_row
    if summed == 0:
        own = _sum_weights(q_row, draft, d_row, refused, refusals, begin, end, Tile)
        total, ahead = _total(own, room, count, phase, part, Parts)
    uniform = _clamped(tl.load(uniforms + nodes * u_node))
    rest = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1) - ahead
    if (rest >= 0) & (rest < own):
        first = begin
        while rest >= 0:
            at = first + tl.arange(0, Tile)
            weights = _weights(q_row, draft, d_row, refused, refusals, at, at < end)
            sum = tl.sum(weights, 0)
            if rest < sum:
                less = tl.cumsum(weights, 0) <= rest
                tl.store(tokens + kept_nodes, (first + tl.sum(less.to(tl.int32), 0)).to(tl.int64))
            rest -= sum
            first += Tile
    if part == 0:
        if total == 0:
            tl.store(tokens + kept_nodes, tl.full((), 0, tl.int64))
        tl.store(accepted + b, kept_nodes.to(tl.int64))
        none = tl.full((64,), -1, tl.int64)
        for first in range(0, nodes + 1, 64):
            n = first + tl.arange(0, 64)
            tl.store(tokens + n, none, (n > kept_nodes) & (n <= nodes))
            if path is not None:
                tl.store(path + b * nodes + n, none, (n >= kept_nodes) & (n < nodes))


def supports(
    draft_probs: torch.Tensor, draft_ids: torch.Tensor, target_probs: torch.Tensor, uniforms: torch.Tensor
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return refuse(draft_probs.device)


def supports_tree(draft_probs: torch.Tensor, *rest: object) -> str | None:
    """None when `run_tree` can serve the call, else the reason."""
    return refuse(draft_probs.device)


def run(
    draft_probs: torch.Tensor, draft_ids: torch.Tensor, target_probs: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and how many were accepted. The arguments have passed the op's check and `supports`."""
    ids, accepted, _ = _run(draft_probs, draft_ids, None, None, target_probs, uniforms, False)
    return ids, accepted


def run_tree(
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    parents: torch.Tensor,
    draft_rows: torch.Tensor | None,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    replacement: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ids, how many were accepted, and which nodes. The arguments have passed the op's check and
    `supports_tree`."""
    ids, accepted, path = _run(
        draft_probs, draft_ids, parents, draft_rows, target_probs, uniforms, replacement
    )
    assert path is not None
    return ids, accepted, path


@functools.cache
def _row(align: int, parts: int) -> Row:
    return constants(Row(align, TILE, parts))


def _strides(t: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


def _run(
    p: torch.Tensor,
    drawn: torch.Tensor,
    parents: torch.Tensor | None,
    draft_rows: torch.Tensor | None,
    q: torch.Tensor,
    uniforms: torch.Tensor,
    replacement: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if p.is_cuda and p.device.index != torch.cuda.current_device():
        with torch.cuda.device(p.device):
            return _run(p, drawn, parents, draft_rows, q, uniforms, replacement)
    batch, nodes = drawn.shape
    vocabulary = q.shape[2]
    new: Any = p.new_empty
    ids, accepted = new(batch, nodes + 1, dtype=torch.int64), new(batch, dtype=torch.int64)
    path = None if parents is None else new(batch, nodes, dtype=torch.int64)
    if batch == 0:
        return ids, accepted, path
    p, q = (t if t.stride(-1) == 1 else t.contiguous() for t in (p, q))
    who = team(batch, vocabulary, TILE, 1, p.device)
    refused = new(batch * who.parts, nodes, 3, dtype=torch.float64)
    sizes = vocabulary, *_strides(p), *_strides(q)
    align = 8 if not any(n % 8 for n in sizes) else 1  # a thread's vector
    length, *rows = (n // align for n in sizes)
    _kernel[(batch * who.parts,)](
        p, drawn, parents, draft_rows, q, uniforms, ids, accepted, path, who.room, who.counts, refused,
        nodes, p.shape[1], length, who.tiles, *rows, *_strides(drawn),
        *_strides(parents), *_strides(draft_rows), *_strides(uniforms), int(replacement),
        _row(align, who.parts),
        num_warps=8, maxnreg=128, enable_fp_fusion=False, **who.options,
    )  # fmt: skip
    return ids, accepted, path

"""sample in Triton: temperature, min-p, top-k and top-p over rows of logits, and a token, without sorting.

A team of programs (teams.py) takes a row, each a part of its columns, Tile at a time, 4 a thread.

1. The largest logit and its first column.
2. What lies within reach of each of eight thresholds below the largest: how many tokens, and their weights'
   sum. A weight is an exponential in float64, cut off to an integer of 40 bits, so that sums do not depend on
   who adds them; top-k needs no weights here.
3. The tokens that reach the first threshold below which no kept one lies, in the order of their columns, are
   listed: a few thousand of 2^17 in a language model's row.
4. The lowest logit that is kept is searched for in the list, as an integer of the same order: sixteen
   candidates are counted, or weighed, at a time, so that a range of 2^24 takes six rounds. Of the tokens that
   have this very logit, those in the first columns are kept.
5. The program whose part the uniform falls into finds the token by the running sum of its weights.

Where neither top-k nor top-p is asked for, 2 is the sum of all weights, 3 and 4 do not happen, and 5 makes
the weights of one part again.

What bounds it is issuing instructions, where rows fill the device: of 128256 bfloat16 logits like a language
model's, with top-p, 24139 sectors are read, which is the row three times (from L2 after the first), and 155
instructions run a token, some 40 of them in float64 (with top-k 133, with neither 71 to 126): predicted 80 us
a row on a multiprocessor of its own. A row shared by 64 programs is bound by latency: 23300 instructions a
program, some 4 us, and about eight exchanges of some 1.5 us.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..core.launch import constants, jit, refuse, tl
from ..core.teams import before, exchange, team

TILE = 1024
ROOM = 16


@jit
def _logits(row, at, inside):
    """float32; NaN as -inf, and one zero."""
    z = tl.load(row + at, inside, other=float("-inf")).to(tl.float32)
    z = tl.where(z == z, z, float("-inf"))
    return tl.where(z == 0.0, 0.0, z)


@jit
def _ordered(z):
    """int32 in the order of float32 numbers; its own inverse, but for the type."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _keys(z, Shift: tl.constexpr):
    """int32 in the order of logits; the lowest Shift bits of those of 16 bits say nothing."""
    return _ordered(z) >> Shift


@jit
def _weights(z, top, temperature, min_p, inside):
    """Of the most likely token 2^40."""
    w = tl.exp((z.to(tl.float64) - top.to(tl.float64)) / temperature)
    w = tl.where(z == top, 1.0, w)
    return tl.where(inside & (w >= min_p), (w * 1099511627776.0).to(tl.int64), 0)


@jit
def _listed(row, list, place, n, whole, begin):
    """The columns at these places of the list, or of the part, and their logits."""
    inside = place < n
    at = tl.load(list + place, inside & (whole == 0), other=0)
    at = tl.where(whole > 0, begin + place, at)
    return at, _logits(row, at, inside), inside


@jit
def _search(
    goal, low, high, row, list, n, top, temperature, min_p, room, count, phase, part, Fixed,
    ByWeight: tl.constexpr, Tile: tl.constexpr,
):  # fmt: skip
    """The largest key from which on the listed tokens, or their weights, sum to `goal` or more; from low,
    where they do, to high, where they do not."""
    while high - low > 1:
        step = (high - low + 15) // 16
        candidates = tl.minimum(low + step * (tl.arange(0, 16) + 1), high).to(tl.int32)
        sums = tl.zeros((16,), tl.int64)
        for first in range(0, n, Tile):
            _, z, inside = _listed(row, list, first + tl.arange(0, Tile), n, 0, 0)
            value = _weights(z, top, temperature, min_p, inside) if ByWeight else inside.to(tl.int32)
            reached = _keys(z, Fixed.Shift)[:, None] >= candidates[None, :]
            sums += tl.sum(tl.where(reached, value[:, None], 0), 0)
        every = exchange(sums, room, count, phase, part, Fixed.Parts, 16, Fixed.Room)
        phase += 1
        low += step * tl.sum((tl.sum(every, 0) >= goal).to(tl.int64), 0)
        high = tl.minimum(low + step, high)
    return low, phase


@jit
def _pick(vector, i, Size: tl.constexpr):
    """An element of a vector."""
    return tl.sum(tl.where(tl.arange(0, Size) == i, vector, 0), 0)


@jit
def _around(
    key, row, list, n, top, temperature, min_p, Shift: tl.constexpr, Tile: tl.constexpr
):  # fmt: skip
    """int64 [4] of this program's list: tokens above the key and their weights, tokens at it and theirs."""
    above = tl.zeros((Tile,), tl.int64)
    above_weight = tl.zeros((Tile,), tl.int64)
    ties = tl.zeros((Tile,), tl.int64)
    ties_weight = tl.zeros((Tile,), tl.int64)
    for first in range(0, n, Tile):
        _, z, inside = _listed(row, list, first + tl.arange(0, Tile), n, 0, 0)
        w, keys = _weights(z, top, temperature, min_p, inside), _keys(z, Shift)
        above += (inside & (keys > key)).to(tl.int64)
        above_weight += tl.where(keys > key, w, 0)
        ties += (inside & (keys == key)).to(tl.int64)
        ties_weight += tl.where(keys == key, w, 0)
    i = tl.arange(0, 4)
    found = tl.where(i == 0, tl.sum(above, 0), tl.sum(above_weight, 0))
    return tl.where(i < 2, found, tl.where(i == 2, tl.sum(ties, 0), tl.sum(ties_weight, 0)))


class Row(NamedTuple):
    """How a row is read and shared; constants.

    Attributes:
        Align: what V and the stride are divided by.
        Shift: bits of a key that say nothing.
        Tile: columns at a time.
        Room: numbers that a program of a team has room for.
        Parts: programs of a team.
    """

    Align: int
    Shift: int
    Tile: int
    Room: int
    Parts: int


_INTEGERS = ["stride", "V", "tiles"]
_SMALL = ["uniforms", "temperatures", "top_ks", "top_ps", "min_ps", "ids"]


@jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_SMALL)
def _kernel(
    logits, uniforms, temperatures, top_ks, top_ps, min_ps, ids, lists, room, count, stride, V, tiles, Fixed
):  # fmt: skip
    """A token of each row of logits, to ids."""
    Align: tl.constexpr = Fixed.Align
    Shift: tl.constexpr = Fixed.Shift
    Tile: tl.constexpr = Fixed.Tile
    Room: tl.constexpr = Fixed.Room
    Parts: tl.constexpr = Fixed.Parts
    b, part = (tl.program_id(0) // Parts).to(tl.int64), tl.program_id(0) % Parts
    V *= Align
    row = logits + b * (stride.to(tl.int64) * Align)
    begin = part * tiles * Tile
    end = tl.minimum(begin + tiles * Tile, V)
    own_list = lists + b * V + begin
    if Parts > 1:
        room += b * (2 * Parts * Room)
        count += b
    phase = tl.full((), 0, tl.int32)

    # 1: as one integer, the largest logit, then the first column
    best = tl.full((Tile,), -(2**62), tl.int64)
    for first in range(begin, end, Tile):
        at = first + tl.arange(0, Tile)
        place = (_ordered(_logits(row, at, at < end)).to(tl.int64) << 20) | (0xFFFFF - at).to(tl.int64)
        best = tl.maximum(best, tl.where(at < end, place, -(2**62)))
    mine = tl.full((1,), 0, tl.int64) + tl.max(best, 0)
    best = tl.max(tl.max(exchange(mine, room, count, phase, part, Parts, 1, Room), 0), 0)
    phase += 1
    likeliest = 0xFFFFF - (best & 0xFFFFF)
    level = (best >> 20).to(tl.int32)
    top = (level ^ ((level >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    temperature = tl.load(temperatures + b)
    if not (temperature > 0):
        if part == 0:
            tl.store(ids + b, likeliest)
    else:
        min_p = tl.load(min_ps + b)
        min_p = tl.where(min_p <= 1, min_p, 1.0)
        top_p = tl.load(top_ps + b)
        k = tl.load(top_ks + b)
        some = (k > 0) & (k < V)

        # 2
        j = tl.arange(0, 8)
        reach = top.to(tl.float64) - temperature * tl.exp2(0.75 * j.to(tl.float32)).to(tl.float64)
        reach = tl.where(j == 7, float("-inf"), reach.to(tl.float32))
        found = tl.zeros((8,), tl.int64)  # tokens, if there is a top-k, else weights
        if some:
            for first in range(begin, end, Tile):
                at = first + tl.arange(0, Tile)
                z = _logits(row, at, at < end)
                reached = (z[:, None] >= reach[None, :]) & (at < end)[:, None]
                found += tl.sum(reached.to(tl.int32), 0)
        elif top_p < 1:
            for first in range(begin, end, Tile):
                at = first + tl.arange(0, Tile)
                z = _logits(row, at, at < end)
                w = _weights(z, top, temperature, min_p, at < end)
                found += tl.sum(tl.where(z[:, None] >= reach[None, :], w[:, None], 0), 0)
        else:
            sums = tl.zeros((Tile,), tl.int64)
            for first in range(begin, end, Tile):
                at = first + tl.arange(0, Tile)
                sums += _weights(_logits(row, at, at < end), top, temperature, min_p, at < end)
            found += tl.sum(sums, 0)
        reaching = exchange(found, room, count, phase, part, Parts, 8, Room)
        phase += 1
        founds = tl.sum(reaching, 0)
        total = _pick(founds, 7, 8)
        own, ahead = _pick(found, 7, 8), _pick(before(reaching, part, Parts), 7, 8)
        low = tl.full((), -(2**31), tl.int64)
        high = _keys(top, Shift).to(tl.int64) + 1
        kept_ties = tl.full((), 0, tl.int64)
        ties_ahead = tl.full((), 0, tl.int64)
        share = tl.where(top_p > 0, top_p, 0.0)
        n = tl.maximum(end - begin, 0)
        whole = tl.full((), 1, tl.int32)

        if some | (top_p < 1):
            # 3
            whole = tl.full((), 0, tl.int32)
            goal = tl.maximum((share * total.to(tl.float64)).to(tl.int64), 1)
            if some:
                goal = k
            threshold = tl.max(tl.where(founds >= goal, reach, float("-inf")), 0)
            n = tl.full((), 0, tl.int32)
            for first in range(begin, end, Tile):
                at = first + tl.arange(0, Tile)
                taken = (_logits(row, at, at < end) >= threshold) & (at < end)
                place = n + tl.cumsum(taken.to(tl.int32), 0) - 1
                tl.store(own_list + place, at, taken)
                n += tl.sum(taken.to(tl.int32), 0)
            tl.debug_barrier()

            # 4
            around = tl.zeros((4,), tl.int64)
            every = tl.zeros((Parts, 4), tl.int64)
            sums = tl.zeros((4,), tl.int64)
            tie = tl.full((), 0, tl.int64)
            least = tl.min(tl.where(founds < goal, reach, float("inf")), 0)  # from here on there are too few
            bound = tl.minimum(high, _keys(least, Shift).to(tl.int64) + 1)
            low = _keys(threshold, Shift).to(tl.int64)
            if some:
                low, phase = _search(
                    goal, low, bound, row, own_list, n, top, temperature, min_p, room, count, phase, part,
                    Fixed, False, Tile // 4,
                )  # fmt: skip
                around = _around(low, row, own_list, n, top, temperature, min_p, Shift, Tile // 4)
                every = exchange(around, room, count, phase, part, Parts, 4, Room)
                phase += 1
                sums = tl.sum(every, 0)
                kept_ties = goal - _pick(sums, 0, 4)
                tie = _pick(sums, 3, 4) // tl.maximum(_pick(sums, 2, 4), 1)
                total = _pick(sums, 1, 4) + kept_ties * tie
                goal = tl.maximum((share * total.to(tl.float64)).to(tl.int64), 1)
            if top_p < 1:
                most, lowest = kept_ties, low
                if some:
                    bound = high
                low, phase = _search(
                    goal, low, bound, row, own_list, n, top, temperature, min_p, room, count, phase, part,
                    Fixed, True, Tile // 4,
                )  # fmt: skip
                around = _around(low, row, own_list, n, top, temperature, min_p, Shift, Tile // 4)
                every = exchange(around, room, count, phase, part, Parts, 4, Room)
                phase += 1
                sums = tl.sum(every, 0)
                tie = _pick(sums, 3, 4) // tl.maximum(_pick(sums, 2, 4), 1)
                kept_ties = (goal - _pick(sums, 1, 4) + tie - 1) // tl.maximum(tie, 1)
                kept_ties = tl.minimum(kept_ties, _pick(sums, 2, 4))
                if some & (low == lowest):
                    kept_ties = tl.minimum(kept_ties, most)
                total = _pick(sums, 1, 4) + kept_ties * tie
            earlier = before(every, part, Parts)
            ties_ahead = _pick(earlier, 2, 4)
            ties_here = tl.minimum(tl.maximum(kept_ties - ties_ahead, 0), _pick(around, 2, 4))
            own = _pick(around, 1, 4) + ties_here * tie
            ahead = _pick(earlier, 1, 4) + tl.minimum(ties_ahead, kept_ties) * tie

        # 5
        uniform = tl.load(uniforms + b).to(tl.float64)
        uniform = tl.minimum(tl.where(uniform > 0, uniform, 0.0), 1.0)
        rest = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1) - ahead
        if (rest >= 0) & (rest < own):
            first = tl.full((), 0, tl.int32)
            while rest >= 0:
                place = first + tl.arange(0, Tile)
                at, z, inside = _listed(row, own_list, place, n, whole, begin)
                w, keys = _weights(z, top, temperature, min_p, inside), _keys(z, Shift)
                tied = inside & (keys == low)
                rank = ties_ahead + tl.cumsum(tied.to(tl.int64), 0)
                w = tl.where((keys > low) | (tied & (rank <= kept_ties)), w, 0)
                ties_ahead += tl.sum(tied.to(tl.int64), 0)
                sum = tl.sum(w, 0)
                if rest < sum:
                    prefix = tl.cumsum(w, 0)
                    hit = (prefix > rest) & (prefix - w <= rest)
                    tl.store(ids + b, tl.sum(tl.where(hit, at, 0).to(tl.int64), 0))
                rest -= sum
                first += Tile


def supports(logits: torch.Tensor, *rest: torch.Tensor) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return refuse(logits.device)


_SHIFTS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@functools.cache
def _row(align: int, dtype: torch.dtype, parts: int) -> Row:
    return constants(Row(align, _SHIFTS[dtype], TILE, ROOM, parts))


def run(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """A token a row. The arguments have passed the op's check and `supports`."""
    if logits.is_cuda and logits.device.index != torch.cuda.current_device():
        with torch.cuda.device(logits.device):
            return run(logits, uniforms, temperature, top_k, top_p, min_p)
    rows, vocabulary = logits.shape
    ids = logits.new_empty(rows, dtype=torch.int64)
    if rows == 0:
        return ids
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    per_row = [t.contiguous() for t in (uniforms, temperature, top_k, top_p, min_p)]
    stride = logits.stride(0) if rows > 1 else 0
    align = 8 if vocabulary % 8 == 0 and stride % 8 == 0 else 1  # a thread's vector
    who = team(rows, vocabulary, TILE, ROOM, logits.device)
    lists = logits.new_empty(rows, vocabulary, dtype=torch.int32)
    _kernel[(rows * who.parts,)](
        logits, *per_row, ids, lists, who.room, who.counts, stride // align, vocabulary // align, who.tiles,
        _row(align, logits.dtype, who.parts),
        num_warps=8, maxnreg=128, enable_fp_fusion=False, **who.options,
    )  # fmt: skip
    return ids

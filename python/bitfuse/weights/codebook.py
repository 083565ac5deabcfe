"""A 4-bit codebook in 16-bit floats, rounded so that no bias builds up.

Rounding a level to the nearest float errs the same way at every weight of that level, which adds up over k
where x has a mean: with NF4, K = 4096 and x > 0 it is four (float16) to seven times (bfloat16) the error of
rounding each product of level and scale, as plain PyTorch does.
"""

from __future__ import annotations

import math

import torch

PLACES = 4


def _around(levels: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest numbers of a 16-bit dtype from below and from above; the level itself where it is one."""
    near = levels.to(dtype)
    value = near.double()
    # in the bits of a positive number one more is the next one up, of a negative number the next one down
    step = torch.where((value < levels) == (value > 0), 1, -1).to(torch.int16)
    other = (near.view(torch.int16) + step).view(dtype)
    return torch.where(value > levels, other, near), torch.where(value < levels, other, near)


def _beliefs(levels: list[float]) -> list[list[float]]:
    """How often each code is met in groups of 64 normal numbers scaled by their largest, and if all were met
    alike."""
    order = sorted(range(len(levels)), key=levels.__getitem__)
    largest = max(map(abs, levels))
    spread = largest / 2.4 * math.sqrt(2)  # the largest of 64 is 2.4 standard deviations on average
    normal, below = [0.0] * len(levels), 0.0
    for at, code in enumerate(order):
        last = at + 1 == len(order)
        up_to = 1.0 if last else (1 + math.erf((levels[code] + levels[order[at + 1]]) / 2 / spread)) / 2
        normal[code], below = up_to - below, up_to
    return [normal, [1 / len(levels)] * len(levels)]


def unbiased_levels(levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One 16-bit float a level, `dtype` [16]: of all ways to round each up or down, the one with the least
    error of a sum over some 4096 weights, whose mean counts by 4096 and whose scatter by its root."""
    exact = levels.double().cpu()
    down, up = _around(exact, dtype)
    choices = (
        torch.arange(2**16, dtype=torch.int64, device="cpu").unsqueeze(1)
        >> torch.arange(16, dtype=torch.int64, device="cpu")
    ) & 1 == 1
    error = torch.where(choices, up.double(), down.double()) - exact
    beliefs = torch.tensor(_beliefs(exact.tolist()), dtype=torch.double, device="cpu")
    means = torch.cat((error @ beliefs.T, (error * exact) @ beliefs.T), dim=1)
    best = (4096 * means.square().sum(1) + error.square() @ beliefs[0]).argmin()
    return torch.where(choices[best], up, down)


def pairs_of_levels(levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes to pairs of levels: `dtype` [256, 4, 2] of (byte, lane % 4, low or high nibble); levels is
    float32 [16].

    A level is rounded up in as many of its contexts, and down in the others, as puts the mean at the level
    itself. A context is what the kernel's table is indexed by anyway: the other code of the byte, and the
    lane's place among the four that share a row.

    The decisions diffuse their error, from context to context and from code to code, the likely ones first,
    so that what is left when all are made is a small part of one rounding.
    """
    exact = levels.double().cpu()
    down, up = _around(exact, dtype)
    value = exact.tolist()
    steps = (up.double() - down.double()).tolist()
    beliefs = _beliefs(value)
    likely = sorted(range(16), key=beliefs[0].__getitem__, reverse=True)
    rounded = down.view(16, 1, 1).repeat(1, 16, PLACES)  # [code, other code, place]
    error = [0.0, 0.0]
    for code in likely:
        if steps[code] == 0:
            continue
        share = (value[code] - float(down[code])) / steps[code]  # of the contexts that should be rounded up
        first = 0
        for other in likely:
            weights = [belief[code] * belief[other] * steps[code] for belief in beliefs]
            choices = []
            for ups in (math.floor(PLACES * share), math.ceil(PLACES * share)):
                left = [e + w * (ups / PLACES - share) for e, w in zip(error, weights, strict=True)]
                choices.append((sum(e * e for e in left), ups, left))
            _, ups, error = min(choices)
            for place in range(first, first + ups):
                rounded[code, other, place % PLACES] = up[code]
            first += ups
    byte = torch.arange(256, dtype=torch.int64, device="cpu")
    low, high = byte & 15, byte >> 4
    # the high nibble takes the places in the opposite order, so as not to repeat the low one's decisions
    return torch.stack((rounded[low, high], rounded[high, low].flip(1)), dim=-1)

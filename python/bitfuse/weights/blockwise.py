"""Block-wise 8-bit floats: codes of the dynamic maps, one scale a block (Dettmers et al., "8-bit Optimizers
via Block-wise Quantization", 2021).

A dynamic map has 7 decades below 1. The values of a decade are evenly spaced and each decade has twice as
many as the one below it, so that a number is known to some 1% near the block's largest magnitude and to half
of itself a million times below it. The signed map has 2**i values of either sign in decade i, the unsigned
map 2**(i + 1); both add 0 and 1. Because the values of a decade are evenly spaced, kernels need no table of
256: `segments`.

The unsigned map keeps the code of 0 for 0 alone. A second moment that is rounded to 0 under a first moment
that is not gives a step of m / eps: with gradients that differ by some thousand times within a block, nearest
codes take steps of 10**4 times the learning rate (the zero-point problem; Li, Chen and Zhu, "Memory Efficient
Optimizers with 4-bit States", 2023).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..core.tensors import table
from .formats import nested_code

DECADES = 7
ZERO = {True: 127, False: 0}  # the code of 0 in the signed and in the unsigned map
TINY = torch.finfo(torch.float32).tiny  # a block whose largest magnitude is below it is stored as zeros


class Segment(NamedTuple):
    """A run of evenly spaced values of a map: 0, each decade, 1. Codes count from the code of 0.

    Args:
        first, last: codes.
        base, step: code k stands for ``base + (k - first) * step``.
        top: where the next segment begins: the midpoint between the last value and the next one; infinite for
            the last segment, TINY for the unsigned map's 0.
    """

    first: int
    last: int
    base: float
    step: float
    top: float


@functools.cache
def segments(signed: bool) -> tuple[Segment, ...]:
    """The positive half of a map, in ascending order: 0, seven decades, 1."""
    runs: list[tuple[int, float, float]] = [(1, 0.0, 0.0)]
    for decade in range(DECADES):
        count = 2 ** (decade + (not signed))
        power = 10.0 ** (decade + 1 - DECADES)
        step = power * 0.9 / count
        runs.append((count, power * 0.1 + step / 2, step))
    runs.append((1, 1.0, 0.0))
    found, first = [], 0
    for (count, base, step), following in zip(runs, [*runs[1:], None], strict=True):
        highest = base + (count - 1) * step
        top = (highest + following[1]) / 2 if following else float("inf")
        top = TINY if first == 0 and not signed else top
        found.append(Segment(first, first + count - 1, base, step, top))
        first += count
    return tuple(found)


@table
def _unsigned(device: str) -> torch.Tensor:
    values = [s.base + k * s.step for s in segments(False) for k in range(s.last - s.first + 1)]
    return torch.tensor(values, dtype=torch.float32, device=device)


def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """The 256 values of the codes, float32, ascending, times the block's scale."""
    return nested_code(device) if signed else _unsigned(str(device))


def blocks_of(numel: int, block_size: int) -> int:
    return -(-numel // block_size)


def quantize_blocks(x: torch.Tensor, signed: bool, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes, ties to the lower, and the largest magnitude of each run of block_size numbers.

    Args:
        x: float32, any shape; blocks run over the flattened array and the last one may be shorter.
        signed: which map; with the unsigned one x is not negative, and no positive number takes the code of
            0.

    Returns:
        uint8 of x's shape, float32 [blocks].
    """
    blocks = blocks_of(x.numel(), block_size)
    padded = torch.nn.functional.pad(x.flatten(), (0, blocks * block_size - x.numel())).view(
        blocks, block_size
    )
    absmax = padded.abs().amax(1) if blocks else padded.new_empty(0)
    ratio = padded * torch.where(absmax >= TINY, 1 / absmax, 0.0).unsqueeze(1)
    values = dynamic_map(signed, x.device)
    codes = torch.bucketize(ratio, (values[1:] + values[:-1]) / 2)
    if not signed:
        codes = codes.maximum((ratio >= TINY).long())
    return codes.to(torch.uint8).flatten()[: x.numel()].view(x.shape), absmax


def dequantize_blocks(
    codes: torch.Tensor, absmax: torch.Tensor, signed: bool, block_size: int
) -> torch.Tensor:
    """Float32 of codes' shape: the value of each code times its block's largest magnitude."""
    values = dynamic_map(signed, codes.device)[codes.flatten().int()]
    return (values * absmax.repeat_interleave(block_size)[: values.numel()]).view(codes.shape)

"""Cost: what a call can't do without, and the time that it takes at least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .gpus import Gpu

# of a device's rates, what a good kernel reaches
MEMORY_SHARE, MATH_SHARE = 0.85, 0.7


@dataclass(frozen=True)
class Rates:
    """What a device does.

    Attributes:
        name: of the device.
        bytes_per_s: read from, and written to, its memory.
        half_flop_per_s, float_flop_per_s: products of 16-bit floats with float32 sums, and of float32.
        call_s: seconds that a call takes though it does nothing.
    """

    name: str
    bytes_per_s: float
    half_flop_per_s: float
    float_flop_per_s: float
    call_s: float

    @classmethod
    def of(cls, gpu: Gpu) -> Rates:
        """Those of a card's data sheet, and 3 us to launch a kernel."""
        return cls(gpu.name, gpu.gb_per_s * 1e9, gpu.tflop_per_s * 1e12, gpu.float_tflop_per_s * 1e12, 3e-6)


@dataclass(frozen=True)
class Cost:
    """What a call can't do without.

    Attributes:
        nbytes: of its operands and results, each moved once.
        flops: of its products, 2 for each multiply-add.
        dtype: of the numbers that are multiplied.
    """

    nbytes: int
    flops: int
    dtype: torch.dtype

    def __add__(self, other: Cost) -> Cost:
        """Of one call after another: what passes between them is moved out and in."""
        return Cost(self.nbytes + other.nbytes, self.flops + other.flops, self.dtype)

    def seconds(self, rates: Rates) -> tuple[float, str]:
        """The least time on a device, and what sets it: "memory" or "arithmetic"."""
        memory = self.nbytes / rates.bytes_per_s
        slow = self.dtype.itemsize > 2
        arithmetic = self.flops / (rates.float_flop_per_s if slow else rates.half_flop_per_s)
        return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")

    def predicted(self, rates: Rates) -> float:
        """Seconds to expect of a good kernel, launch and all."""
        least, by = self.seconds(rates)
        return rates.call_s + least / (MEMORY_SHARE if by == "memory" else MATH_SHARE)

    def __str__(self) -> str:
        return f"{_scaled(self.nbytes)}B" + (f", {_scaled(self.flops)}FLOP" if self.flops else "")


def moved(*things: Any) -> int:
    """Bytes of all tensors in these, and in tuples and lists of them."""
    total = 0
    for thing in things:
        if isinstance(thing, torch.Tensor):
            total += thing.numel() * thing.element_size()
        elif isinstance(thing, (tuple, list)):
            total += moved(*thing)
    return total


def as_time(seconds: float) -> str:
    """In the unit that leaves one to three digits before the point."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _scaled(number: float) -> str:
    """With its SI prefix, three digits."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "

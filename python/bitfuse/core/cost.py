"""Cost: what a call can't do without, the time that it takes at least, and the time to expect.

A prediction is of a call in a CUDA graph, its operands not in L2. Its numbers were found for an H200 in the
kernels' machine code and on the simulator; on other GPUs clocks, multiprocessors and rates are theirs. `make
gpu` sets what is measured beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .gpus import Gpu

# of a device's rates, what a good kernel reaches: of the memory's, a copy 90%, and a kernel 6% less
MEMORY_SHARE, MATH_SHARE = 0.845, 0.7
# seconds: from one kernel of a graph to the next; until a block asks for its first bytes; until they are
# there; from the last bytes to the end
GAP, START, FIRST_BYTES, END = 0.8e-6, 0.35e-6, 0.9e-6, 0.3e-6
LAUNCH = GAP + START + FIRST_BYTES + END
SPLIT = 1.2e-6  # partial sums through L2: written, told of, added by the last block


@dataclass(frozen=True)
class Rates:
    """What a device does.

    Attributes:
        name: of the device.
        bytes_per_s: read from, and written to, its memory.
        half_flop_per_s, float_flop_per_s: products of 16-bit floats with float32 sums, and of float32.
        call_s: seconds that a call takes though it does nothing.
        multiprocessors: how many.
        clock_hz: theirs, under load.
    """

    name: str
    bytes_per_s: float
    half_flop_per_s: float
    float_flop_per_s: float
    call_s: float
    multiprocessors: int = 1
    clock_hz: float = 1e9

    @classmethod
    def of(cls, gpu: Gpu) -> Rates:
        """Those of a card's data sheet, and the launch of a kernel in a CUDA graph."""
        return cls(
            gpu.name, gpu.gb_per_s * 1e9, gpu.tflop_per_s * 1e12, gpu.float_tflop_per_s * 1e12, LAUNCH,
            gpu.multiprocessors, gpu.clock_hz,
        )  # fmt: skip

    def clocks(self, count: float) -> float:
        """Seconds of so many clocks of a multiprocessor."""
        return count / self.clock_hz


@dataclass(frozen=True)
class Prediction:
    """The time to expect of a call, by what it is made of, in seconds: the longest of what runs side by side,
    and what does not.

    Attributes:
        launch: of its kernels, though they do nothing.
        memory: its bytes.
        issue: its instructions.
        arithmetic: its products.
        after: what begins when all that is done: partial sums.
    """

    launch: float
    memory: float = 0.0
    issue: float = 0.0
    arithmetic: float = 0.0
    after: float = 0.0

    @property
    def seconds(self) -> float:
        return self.launch + max(self.memory, self.issue, self.arithmetic) + self.after

    def __add__(self, other: Prediction) -> Prediction:
        """Of one call after another."""
        longest = max(self.memory, self.issue, self.arithmetic)
        theirs = max(other.memory, other.issue, other.arithmetic)
        after = self.after + other.after
        return Prediction(self.launch + other.launch, longest + theirs, after=after)


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

    def memory_seconds(self, rates: Rates) -> float:
        """That a good kernel takes for its bytes."""
        return self.nbytes / rates.bytes_per_s / MEMORY_SHARE

    def predicted(self, rates: Rates) -> Prediction:
        """To expect of a good kernel that nobody knows more about."""
        arithmetic = Cost(0, self.flops, self.dtype).seconds(rates)[0] / MATH_SHARE
        return Prediction(rates.call_s, self.memory_seconds(rates), arithmetic=arithmetic)

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

"""Time a step of AdamW8bit against the optimisers that a user would otherwise pick, and the limit.

A case is a step over tensors of its own, enough of them to exceed any cache; how time is taken and what the
columns mean is in timing.py. Bytes are what a step must move: p read and written, the gradient read, the
state read and written.

    python benchmarks/bench_adamw8bit.py           # the default table; JSON goes to results/<device>/
    python benchmarks/bench_adamw8bit.py --parameters 65536 --no-json
    pytest benchmarks/bench_adamw8bit.py           # the same cases under pytest-benchmark
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bitfuse.bench import timing
from bitfuse.bench.timing import DEVICE, DTYPES, GPU, Chain
from bitfuse.cpu import adamw8bit as cpp
from bitfuse.optim import AdamW8bit

OURS = "bitfuse AdamW8bit"


@dataclass(frozen=True)
class Case:
    """One optimiser on parameters of a dtype.

    Attributes:
        name: who computes it.
        dtype: of parameters and gradients.
        state_bytes: of a parameter.
        build: the optimiser. Raises ImportError when the peer is not installed.
    """

    name: str
    dtype: str
    state_bytes: int
    build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"

    @property
    def nbytes(self) -> int:
        """What a step moves, a parameter."""
        return 3 * DTYPES[self.dtype].itemsize + 2 * self.state_bytes


def _bitsandbytes(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(parameters, lr=1e-3)


def cases(dtypes: list[str]) -> list[Case]:
    """Every case, peers first: the one list that the table and pytest share."""
    found = []
    for dtype in dtypes:
        wide = 2 * DTYPES[dtype].itemsize
        found += [
            Case("torch AdamW fused", dtype, wide, lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)),
            Case("torch AdamW foreach", dtype, wide, lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True)),
            Case("bitsandbytes AdamW8bit", dtype, 2, _bitsandbytes),
            Case(OURS, dtype, 2, lambda p: AdamW8bit(p, lr=1e-3)),
        ]
    return found


def make_chain(case: Case, size: int, cold_bytes: int) -> Chain:
    """A step over tensors of `size` parameters each, as one layer of the chain; gradients are never zeros."""
    generator = torch.Generator().manual_seed(0)
    count = timing.depth_of(size * case.nbytes, cold_bytes)
    base = torch.randn(size, generator=generator)
    parameters = []
    for i in range(count):
        p = torch.nn.Parameter(base.roll(i).to(DEVICE, DTYPES[case.dtype]))
        p.grad = (base.roll(-1 - i) * 0.01).to(DEVICE, DTYPES[case.dtype])
        parameters.append(p)
    optimizer = case.build(parameters)
    optimizer.step()  # makes the state
    return Chain(case.name, case.dtype, [optimizer.step], float(count * size * case.nbytes), 0.0)


def table(size: int, args: argparse.Namespace, ceiling: timing.Ceiling) -> list[dict[str, Any]]:
    """Sample the cases in turn, print and return the rows."""
    chains = []
    for case in cases(args.dtype):
        try:
            chains.append(make_chain(case, size, args.cold_mb << 20))
        except ImportError as error:
            print(f"left out: {case}: {error}")
    for _ in range(args.rounds):
        for chain in chains:
            chain.sample(args.budget, args.patience)

    def peers(chain: Chain) -> dict[str, Chain]:
        if chain.name != OURS:
            return {}
        return {c.name.split()[-1]: c for c in chains if c.dtype == chain.dtype and c.name != OURS}

    rows = timing.report(f"a step over tensors of {size} parameters", chains, peers, ceiling)
    return [{"parameters": size, **row} for row in rows]


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parameters", type=int, nargs="+", default=[1 << 16, 1 << 24], help="of a tensor (65536 16777216)")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="of p and gradient")
    timing.add_options(parser, "adamw8bit")
    args = parser.parse_args()
    ceiling = timing.measure_ceiling(args.dtype, args.budget, args.patience)
    isa = cpp._cpu.isa() if cpp._cpu is not None and not GPU else None
    timing.introduce(ceiling, isa, {}, "")
    rows = [row for size in args.parameters for row in table(size, args, ceiling)]
    timing.record(args, "adamw8bit", isa, ceiling, {}, rows)


@pytest.mark.parametrize("case", cases(["float32", "bfloat16"]), ids=str)
def test_adamw8bit(benchmark: Any, case: Case) -> None:
    try:
        chain = make_chain(case, 1 << 22, 128 << 20)
    except ImportError as error:
        pytest.skip(str(error))

    def run() -> None:
        chain()
        if GPU:
            torch.cuda.synchronize()

    benchmark(run)


if __name__ == "__main__":
    main()

"""Time multi_lora_linear, many adapters in one batch, against the product without adapters and a loop.

Mixes of who asks for which adapter: "none" (no adapter is active), "identical" (all rows one), "distinct"
(each row its own, as far as there are as many), "uniform", "zipf" (the i-th with weight 1 / i) and "skewed"
(nine rows in ten have one). "base" is the ratio over the same product without adapters: what the adapters
cost is what it lacks to 1. "loop" is that over plain PyTorch: for each adapter in the batch, the product of
its rows. On a GPU a layer is a CUDA graph, but for the loop, which waits for the device. How time is taken,
and what a limit is: timing.py.

    python benchmarks/bench_multi_lora_linear.py        # decode and prefill; JSON goes to results/<device>/
    python benchmarks/bench_multi_lora_linear.py --m 64 --mixes distinct zipf --no-json
    python benchmarks/bench_multi_lora_linear.py --m 512 2048 --formats dense --adapters 8 --no-json
    pytest benchmarks/bench_multi_lora_linear.py        # the same cases under pytest-benchmark
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.bench import timing
from bitfuse.bench.timing import DEVICE, DTYPES, GPU, Ceiling, Chain
from bitfuse.cpu import lowbit_linear as cpp
from bitfuse.ops.multi_lora_linear import multi_lora_linear

MIXES = ("none", "identical", "distinct", "uniform", "zipf", "skewed")
FORMATS = ("dense", "int4")
PREFILL = 256  # rows from which a layer's work, not its weights, is what takes the time


def ids_of(mix: str, m: int, count: int) -> torch.Tensor:
    """Each row's adapter."""
    generator = torch.Generator().manual_seed(0)
    if mix == "none":
        return torch.full((m,), -1)
    if mix == "identical":
        return torch.zeros(m, dtype=torch.int64)
    if mix == "distinct":
        return torch.arange(m) % count
    if mix == "zipf":
        return torch.multinomial(1.0 / torch.arange(1, count + 1), m, replacement=True, generator=generator)
    ids = torch.randint(0, count, (m,), generator=generator)
    return torch.where(torch.rand(m, generator=generator) < 0.9, 0, ids) if mix == "skewed" else ids


@dataclass
class Layer:
    """A weight and its adapters, stacked."""

    w: torch.Tensor | bitfuse.LowBitWeight
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: torch.Tensor

    def base(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.w, torch.Tensor):
            return torch.nn.functional.linear(x, self.w)
        return bitfuse.lowbit_linear(x, self.w)

    def bitfuse(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return multi_lora_linear(x, self.w, self.lora_A, self.lora_B, self.scaling, ids)

    def loop(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        y = self.base(x)
        for e in ids.unique().tolist():
            if e >= 0:
                rows = (ids == e).nonzero().squeeze(1)
                h = linear(x[rows], self.lora_A[e])
                y.index_add_(0, rows, linear(h, self.lora_B[e]) * self.scaling[e].to(x.dtype))
        return y


def make_layers(format: str, dtype: str, m: int, args: argparse.Namespace) -> list[Layer]:
    """As many as it takes that no weight is in a cache when its turn comes; one for prefill."""
    generator = torch.Generator().manual_seed(0)
    n, k, count, rank, t = args.n, args.k, args.adapters, args.rank, DTYPES[dtype]
    weight = torch.randn(n, k, generator=generator) / k**0.5
    nbytes = n * k * t.itemsize if format == "dense" else n * k * bitfuse.formats.get_format(format).bits // 8
    depth = 1 if m >= PREFILL else timing.depth_of(nbytes, args.cold_mb << 20)
    lora_a = torch.randn(count, rank, k, generator=generator) / k**0.5
    lora_b = torch.randn(count, n, rank, generator=generator) / rank**0.5
    layers = []
    for i in range(depth):
        own = weight.roll(i, 0).to(DEVICE)
        w = own.to(t) if format == "dense" else bitfuse.quantize(own, format)
        a, b = (s.roll(i, 1).to(DEVICE, t) for s in (lora_a, lora_b))
        layers.append(Layer(w, a, b, torch.ones(count, device=DEVICE)))
    return layers


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """On a GPU, a CUDA graph of the call."""
    if not GPU:
        return call
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def make_chains(
    format: str, dtype: str, m: int, mixes: list[str], args: argparse.Namespace
) -> dict[tuple[str, str], Chain]:
    """By who computes it and the mix: the base, and bitfuse and the loop for each mix."""
    layers = make_layers(format, dtype, m, args)
    n, k, rank, size = args.n, args.k, args.rank, DTYPES[dtype].itemsize
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPES[dtype])
    w = layers[0].w
    nbytes = w.nbytes + m * (n + k) * size
    chains = {
        ("base", ""): Chain(
            f"base {format}", dtype, [captured(functools.partial(layer.base, x)) for layer in layers],
            nbytes, 2.0 * m * n * k,
        )
    }  # fmt: skip
    for mix in mixes:
        ids = ids_of(mix, m, args.adapters)
        active = int((ids >= 0).sum())
        more = (int(ids.unique().numel()) if active else 0) * rank * (n + k) * size
        flops = 2.0 * m * n * k + 2.0 * active * rank * (n + k)
        ids = ids.to(DEVICE)
        ours = [captured(functools.partial(layer.bitfuse, x, ids)) for layer in layers]
        chains["bitfuse", mix] = Chain(f"bitfuse {format} {mix}", dtype, ours, nbytes + more, flops)
        if mix != "none":
            loops: list[Callable[[], Any]] = [functools.partial(layer.loop, x, ids) for layer in layers]
            chains["loop", mix] = Chain(f"loop {format} {mix}", dtype, loops, nbytes + more, flops)
    return chains


def table(
    format: str, dtype: str, m: int, args: argparse.Namespace, ceiling: Ceiling
) -> list[dict[str, Any]]:
    """Time every mix at m rows, print the table, return its rows."""
    chains = make_chains(format, dtype, m, args.mixes, args)
    for _ in range(args.rounds):
        for chain in chains.values():
            chain.sample(args.budget, args.patience)
    names = {id(chain): key for key, chain in chains.items()}

    def peers(chain: Chain) -> dict[str, Chain]:
        who, mix = names[id(chain)]
        found = {"base": chains["base", ""]}
        if who == "bitfuse" and ("loop", mix) in chains:
            found["loop"] = chains["loop", mix]
        return found

    sizes = f"M={m} N={args.n} K={args.k}, {args.adapters} adapters of rank {args.rank}"
    title = f"y, {sizes}: milliseconds a layer; ratios, higher is faster"
    rows = timing.report(title, list(chains.values()), peers, ceiling)
    place = {"m": m, "n": args.n, "k": args.k, "adapters": args.adapters, "rank": args.rank}
    gc.collect()
    return [{**row, **place} for row in rows]


def call_overhead() -> dict[str, float]:
    """Microseconds of a tiny call: the base, and with adapters of which none is active."""
    w = bitfuse.quantize(torch.randn(8, 128), "int4")
    x, a, b = torch.randn(1, 128), torch.randn(16, 4, 128), torch.randn(16, 8, 4)
    scaling, none, lists = torch.ones(16), torch.tensor([-1]), (list(a), list(b))
    return timing.microseconds(
        {
            "bitfuse.lowbit_linear": lambda: bitfuse.lowbit_linear(x, w),
            "16 adapters, stacked": lambda: multi_lora_linear(x, w, a, b, scaling, none),
            "16 adapters, a list": lambda: multi_lora_linear(x, w, *lists, scaling, none),
        }
    )


def parser() -> argparse.ArgumentParser:
    assert __doc__
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--m", type=int, nargs="+", default=[1, 16, 64, 512, 2048], help="rows of x, a table each")
    add("--n", type=int, default=4096, help="output features (4096)")
    add("--k", type=int, default=4096, help="input features (4096)")
    add("--adapters", type=int, default=64, help="how many there are (64)")
    add("--rank", type=int, default=16, help="of the adapters (16)")
    add("--formats", nargs="+", default=list(FORMATS), metavar="NAME", help="dense, or of bitfuse.quantize")
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="of x, A and B")
    add("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    timing.add_options(made, "multi_lora_linear")
    return made


def main() -> None:
    args = parser().parse_args()
    ceiling = timing.measure_ceiling(args.dtype, args.budget, args.patience)
    isa = cpp._cpu.isa() if cpp._cpu is not None and not GPU else None
    with torch.no_grad():
        overhead = {} if GPU else call_overhead()
        timing.introduce(ceiling, isa, overhead, "[1, 128] x [8, 128]")
        rows = [
            row
            for m in args.m
            for dtype in args.dtype
            for format in args.formats
            for row in table(format, dtype, m, args, ceiling)
        ]
    timing.record(args, "multi_lora_linear", isa, ceiling, overhead, rows)


@pytest.mark.parametrize("m", [1, 64, 512])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("format", FORMATS)
def test_multi_lora_linear(benchmark: Any, format: str, mix: str, m: int) -> None:
    args = parser().parse_args(["--cold-mb", "64"])
    with torch.no_grad():
        chain = make_chains(format, "bfloat16", m, [mix], args)["bitfuse", mix]

        def run() -> None:
            chain()
            if GPU:
                torch.cuda.synchronize()

        benchmark.extra_info["layers"] = len(chain.layers)
        benchmark(run)


if __name__ == "__main__":
    main()

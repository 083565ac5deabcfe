"""Time decode_attention, one token a sequence, against what a user would otherwise write.

A layer is a cache of its own; a chain of them exceeds the processor's cache, as in a decoding step of a model
(--cold-mb 0: one layer, which stays in the cache if it fits). How time is taken: timing.py.

    python benchmarks/bench_decode_attention.py       # the default tables; JSON goes to results/<device>/
    python benchmarks/bench_decode_attention.py --batch 1 --length 4096 --cold-mb 0 --no-json
    pytest benchmarks/bench_decode_attention.py       # the same cases under pytest-benchmark
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

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = "bfloat16"
LAYER = "torch sdpa, enable_gqa"
GROUPED = "torch matmul, heads grouped"
Layer = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Case:
    """One way to attend to a cache.

    Attributes:
        name: who computes it, and over what.
        nbytes: of one layer's keys and values, from the number of their elements.
        build: from keys and values [batch, length, kv_heads, head_dim] to one layer.
    """

    name: str
    nbytes: Callable[[int], int]
    build: Callable[[torch.Tensor, torch.Tensor], Layer]

    def __str__(self) -> str:
        return self.name


def _sdpa(k: torch.Tensor, v: torch.Tensor) -> Layer:
    keys, values = (t.transpose(1, 2).contiguous() for t in (k, v))  # as torch's own caches lie

    def run(q: torch.Tensor) -> torch.Tensor:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q.transpose(1, 2), keys, values, enable_gqa=True)

    return run


def _grouped(k: torch.Tensor, v: torch.Tensor) -> Layer:
    keys, values = (t.transpose(1, 2).contiguous() for t in (k, v))

    def run(q: torch.Tensor) -> torch.Tensor:
        rows = q.view(q.shape[0], KV_HEADS, HEADS // KV_HEADS, HEAD_DIM) * HEAD_DIM**-0.5
        p = torch.softmax(rows @ keys.transpose(-1, -2), -1, dtype=torch.float32).to(q.dtype)
        return (p @ values).view(q.shape)

    return run


def _bitfuse(format: str, page_size: int | None, k: torch.Tensor, v: torch.Tensor) -> Layer:
    batch, length = k.shape[:2]
    cache = bitfuse.KVCache(
        batch, length, KV_HEADS, HEAD_DIM, dtype=k.dtype, format=format, page_size=page_size, device=DEVICE
    )
    if cache.block_table is not None:
        order = torch.randperm(cache.block_table.numel(), dtype=torch.int32)
        cache.block_table.copy_(order.view_as(cache.block_table))
    cache.append(k, v)
    return lambda q: bitfuse.decode_attention(q, cache)


def cases() -> list[Case]:
    """Every case, peers first: the one list that the tables and pytest share."""
    # bits, with scales and offsets
    per_element = {"none": 16.0, "fp8": 8.0, "int8": 8.375, "int4": 5.0}
    found = [Case(LAYER, lambda n: 2 * n, _sdpa), Case(GROUPED, lambda n: 2 * n, _grouped)]
    for format, page_size in (("none", None), ("none", 16), ("fp8", None), ("int8", None), ("int8", 64),
                              ("int4", None)):  # fmt: skip
        what = DTYPE if format == "none" else format
        where = "contiguous" if page_size is None else f"pages of {page_size}"
        bits = per_element[format]
        found.append(
            Case(
                f"bitfuse {what}, {where}",
                functools.partial(lambda bits, n: int(n * bits / 8), bits),
                functools.partial(_bitfuse, format, page_size),
            )
        )
    return found


def make_chain(case: Case, batch: int, length: int, cold_bytes: int) -> Chain:
    """A chain of layers, whose keys and values are rolled, so that none equals another."""
    generator = torch.Generator().manual_seed(0)
    elements = 2 * batch * length * KV_HEADS * HEAD_DIM
    k, v = (
        torch.randn(batch, length, KV_HEADS, HEAD_DIM, generator=generator).to(DEVICE, DTYPES[DTYPE])
        for _ in range(2)
    )
    q = torch.randn(batch, 1, HEADS, HEAD_DIM, generator=generator).to(DEVICE, DTYPES[DTYPE])
    layers: list[Callable[[], Any]] = []
    for i in range(timing.depth_of(case.nbytes(elements), cold_bytes)):
        layers.append(functools.partial(case.build(k.roll(i, 1), v.roll(i, 1)), q))
    flops = 4.0 * batch * length * HEADS * HEAD_DIM
    return Chain(case.name, DTYPE, layers, case.nbytes(elements) + 2 * q.nbytes, flops)


def call_overhead() -> dict[str, float]:
    """Microseconds of a call over one token."""
    cache = bitfuse.KVCache(1, 2, 1, 8, dtype=torch.float32)
    k, q = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    cache.append(k, k)
    dense, length = cache.tensors, cache.seqlens
    first = q.transpose(1, 2)
    return timing.microseconds(
        {
            "bitfuse, a KVCache": lambda: bitfuse.decode_attention(q, cache),
            "bitfuse, tensors": lambda: bitfuse.decode_attention(q, dense.k, dense.v, length),
            "torch sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(first, first, first),
        }
    )


def table(batch: int, length: int, args: argparse.Namespace, ceiling: Ceiling) -> list[dict[str, Any]]:
    """Time every case, print the table, return its rows."""
    chains = []
    for case in cases():
        chains.append(make_chain(case, batch, length, args.cold_mb << 20))
        gc.collect()
    for _ in range(args.rounds):
        for chain in chains:
            chain.sample(args.budget, args.patience)
    by_name = {chain.name: chain for chain in chains}
    plain = by_name[f"bitfuse {DTYPE}, contiguous"]
    peers = {"sdpa": by_name[LAYER], "matmul": by_name[GROUPED], "bitfuse": plain}
    title = (
        f"batch {batch}, {length} keys, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}: milliseconds a layer; ratios "
        "over the peers, higher is faster"
    )
    rows = timing.report(title, chains, lambda chain: peers, ceiling)
    return [{**row, "batch": batch, "length": length} for row in rows]


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[1, 8], help="sequences (1 8)")
    add("--length", type=int, nargs="+", default=[512, 4096, 16384], help="keys of each (512 4096 16384)")
    add("--most", type=int, default=65536, help="keys of a batch in all; larger tables are left out (65536)")
    timing.add_options(parser, "decode_attention")
    args = parser.parse_args()

    ceiling = timing.measure_ceiling([DTYPE], args.budget, args.patience)
    isa = cpp._cpu.isa() if cpp._cpu is not None and not GPU else None
    overhead = {} if GPU else call_overhead()
    timing.introduce(ceiling, isa, overhead, "one token")
    rows = []
    with torch.no_grad():
        for batch in args.batch:
            for length in args.length:
                if batch * length <= args.most:
                    rows += table(batch, length, args, ceiling)
                    gc.collect()
    timing.record(args, "decode_attention", isa, ceiling, overhead, rows)


@pytest.mark.parametrize("length", [512, 4096])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_decode_attention(benchmark: Any, case: Case, length: int) -> None:
    chain = make_chain(case, 1, length, 128 << 20)

    def run() -> None:
        chain()
        if GPU:
            torch.cuda.synchronize()

    benchmark.extra_info["layers"] = len(chain.layers)
    with torch.no_grad():
        benchmark(run)


if __name__ == "__main__":
    main()

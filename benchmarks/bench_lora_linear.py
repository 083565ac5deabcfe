"""Time lora_linear against the product without an adapter, and against what a user would otherwise pick.

Forward: y. Gradient: dX, dA and dB of a y that is there already. "base" is the ratio over the same product
without an adapter: what the adapter costs is what it lacks to 1. How time is taken, and what a limit is:
timing.py.

    python benchmarks/bench_lora_linear.py             # the default tables; JSON goes to results/<device>/
    python benchmarks/bench_lora_linear.py --m 1 --formats int4 --dtype float32 --no-json
    python benchmarks/bench_lora_linear.py --m 128 --rank 64 --directions gradient --no-json
    pytest benchmarks/bench_lora_linear.py             # the same cases under pytest-benchmark
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.bench import timing
from bitfuse.bench.timing import DEVICE, DTYPES, GPU, Ceiling, Chain
from bitfuse.cpu import lowbit_linear as cpp

FORMATS = ("int4", "nf4")
ADAPTERS = ("float32", "bfloat16")
SCALING = 2.0
Layer = Callable[[torch.Tensor], torch.Tensor]  # x to y
Pair = tuple[torch.nn.Parameter, torch.nn.Parameter]  # lora_A and lora_B


@dataclass(frozen=True)
class Case:
    """One way to compute x W^T + s x A^T B^T.

    Attributes:
        name: who computes it, and with what.
        dtype: of x.
        adapter: dtype of A and B; None without them.
        weight_bytes: of one layer's W of n x k.
        build: from a float32 W and an adapter to a layer. Raises ImportError when it can't run here.
        base: the name of the case without an adapter.
    """

    name: str
    dtype: str
    adapter: str | None
    weight_bytes: Callable[[int, int], int]
    build: Callable[[torch.Tensor, Pair | None], Layer]
    base: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"


def _bitfuse(format: str, dtype: str, adapter: str | None, backend: str) -> Case:
    def build(weight: torch.Tensor, pair: Pair | None) -> Layer:
        w = bitfuse.quantize(weight, format)

        def layer(x: torch.Tensor) -> torch.Tensor:
            return bitfuse.lowbit_linear(x, w) if pair is None else bitfuse.lora_linear(x, w, *pair, SCALING)

        if not GPU:
            return layer

        def asked(x: torch.Tensor) -> torch.Tensor:
            try:
                with bitfuse.use_backend(backend):
                    return layer(x)
            except bitfuse.op.BackendError as error:
                raise ImportError(str(error)) from None

        return asked

    def weight_bytes(n: int, k: int) -> int:
        fmt = bitfuse.formats.get_format(format)
        groups = 1 if fmt.group_size == -1 else k // fmt.group_size
        return n * (k * fmt.bits // 8 + groups * fmt.scale_dtype.itemsize)

    base = f"bitfuse {format} ({backend})"
    name = base if adapter is None else f"{base} + LoRA {adapter}"
    return Case(name, dtype, adapter, weight_bytes, build, base)


def _torch(dtype: str, adapter: str | None) -> Case:
    """PEFT's own formula over a dense W of x's dtype."""

    def build(weight: torch.Tensor, pair: Pair | None) -> Layer:
        linear = torch.nn.functional.linear
        w = weight.to(DTYPES[dtype])
        if pair is None:
            return lambda x: linear(x, w)
        a, b = pair
        return lambda x: (linear(x, w) + linear(linear(x.to(a.dtype), a), b) * SCALING).to(x.dtype)

    size = DTYPES[dtype].itemsize
    name = "torch dense" if adapter is None else f"torch dense + LoRA {adapter}"
    return Case(name, dtype, adapter, lambda n, k: n * k * size, build, "torch dense")


@contextlib.contextmanager
def _outside_the_repository() -> Iterator[None]:
    """bitsandbytes asks for a package `kernels`, which is not the folder of that name here."""
    root, before = Path(__file__).resolve().parent.parent, list(sys.path)
    sys.path[:] = [entry for entry in before if Path(entry or ".").resolve() != root]
    try:
        yield
    finally:
        sys.path[:] = before


def _peft(dtype: str, adapter: str) -> Case:
    def build(weight: torch.Tensor, pair: Pair | None) -> Layer:
        assert pair is not None
        with _outside_the_repository():
            import bitsandbytes as bnb
            from peft import LoraConfig, get_peft_model

            n, k = weight.shape
            base = bnb.nn.Linear4bit(
                k, n, bias=False, compute_dtype=DTYPES[dtype], quant_type="nf4", compress_statistics=False
            )
            base.load_state_dict({"weight": weight.cpu()})
            rank = pair[0].shape[0]
            config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), target_modules=["0"])
            model: Any = get_peft_model(torch.nn.Sequential(base.to(DEVICE)), config)
            # bitsandbytes packs the weight for its CPU kernel in eval mode only
            model.train(torch.is_grad_enabled())
            layer = model.base_model.model[0]
            layer.lora_A["default"].weight, layer.lora_B["default"].weight = pair
            layer(torch.zeros(1, k, dtype=DTYPES[dtype], device=DEVICE))
        return lambda x: layer(x)

    name = f"PEFT, bitsandbytes NF4 + LoRA {adapter}"
    return Case(name, dtype, adapter, lambda n, k: n * k // 2 + n * k // 64 * 4, build, "")


def cases(formats: list[str], dtypes: list[str], gradient: bool) -> list[Case]:
    """Every case, peers first: the one list that the table and pytest share."""
    backends = (("triton",) if gradient else ("cuda", "triton")) if GPU else ("cpp",)
    found = []
    for d in dtypes:
        found += [_torch(d, a) for a in (None, *ADAPTERS)]
        found += [_peft(d, a) for a in ADAPTERS]
        found += [_bitfuse(f, d, a, b) for f in formats for b in backends for a in (None, *ADAPTERS)]
    return found


def make_chain(
    case: Case, m: int, n: int, k: int, rank: int, cold_bytes: int, gradient: bool
) -> tuple[Case, Chain]:
    """A chain for x of m rows. Every layer has a weight and an adapter of its own, none of them zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    size = m * DTYPES[case.dtype].itemsize
    adapter_bytes = 0 if case.adapter is None else rank * (n + k) * DTYPES[case.adapter].itemsize
    depth = timing.depth_of(case.weight_bytes(n, k), cold_bytes)
    x = torch.randn(m, k, generator=generator).to(DEVICE, DTYPES[case.dtype]).requires_grad_(gradient)
    grad = torch.randn(m, n, generator=generator).to(DEVICE, DTYPES[case.dtype])
    layers: list[Callable[[], Any]] = []
    for i in range(depth):
        pair = None
        if case.adapter is not None:
            a, b = (torch.randn(s, generator=generator) / s[1] ** 0.5 for s in ((rank, k), (n, rank)))
            a, b = (torch.nn.Parameter(t.to(DEVICE, DTYPES[case.adapter]), gradient) for t in (a, b))
            pair = a, b
        layer = case.build(weight.roll(i, 0).to(DEVICE), pair)
        if gradient:
            learnt = [x, *(pair or ())]
            layers.append(functools.partial(torch.autograd.grad, layer(x), learnt, grad, retain_graph=True))
        else:
            layers.append(functools.partial(layer, x))
    nbytes, flops = case.weight_bytes(n, k) + size * (n + k) + adapter_bytes, 2.0 * m * n * k
    if case.adapter is not None:
        flops += 2.0 * m * rank * (n + k) * (2 if gradient else 1)
        nbytes += adapter_bytes + size * k if gradient else 0
    layers[0]()
    return case, Chain(case.name, case.dtype, layers, nbytes, flops)


def table(m: int, gradient: bool, args: argparse.Namespace, ceiling: Ceiling) -> list[dict[str, Any]]:
    """Time every case at m rows, print the table, return its rows."""
    made: list[tuple[Case, Chain]] = []
    missing: list[str] = []
    for case in cases(args.formats, args.dtype, gradient):
        try:
            cold = args.cold_mb << 20
            made.append(make_chain(case, m, args.n, args.k, args.rank, cold, gradient))
        except ImportError as error:
            missing.append(f"{case}: {error}")
        gc.collect()
    for _ in range(args.rounds):
        for _, chain in made:
            chain.sample(args.budget, args.patience)

    def peers(chain: Chain) -> dict[str, Chain]:
        own = next(c for c, other in made if other is chain)
        found = {}
        for case, other in made:
            if case.dtype == own.dtype and case.name == own.base:
                found["base"] = other
            if case.dtype == own.dtype and case.adapter == own.adapter:
                for name in ("torch", "PEFT"):
                    if case.name.startswith(name):
                        found[name] = other
        return found

    what = "dX, dA, dB" if gradient else "y"
    sizes = f"M={m} N={args.n} K={args.k} rank={args.rank}"
    title = f"{what}, {sizes}: milliseconds a layer; ratios, higher is faster"
    rows = timing.report(title, [chain for _, chain in made], peers, ceiling)
    for text in missing:
        print(f"  not timed: {text}")
    place = {"direction": "gradient" if gradient else "forward", "m": m, "n": args.n, "k": args.k}
    return [{**row, **place, "rank": args.rank} for row in rows]


def call_overhead() -> dict[str, float]:
    """Microseconds of a tiny call, with and without an adapter."""
    w = bitfuse.quantize(torch.randn(8, 128), "int4")
    x, a, b = torch.randn(1, 128), torch.randn(4, 128), torch.randn(8, 4)
    return timing.microseconds(
        {
            "bitfuse.lowbit_linear": lambda: bitfuse.lowbit_linear(x, w),
            "bitfuse.lora_linear": lambda: bitfuse.lora_linear(x, w, a, b, SCALING),
        }
    )


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--m", type=int, nargs="+", default=[1, 16, 128], help="rows of x, a table each (1 16 128)")
    add("--n", type=int, default=4096, help="output features (4096)")
    add("--k", type=int, default=4096, help="input features (4096)")
    add("--rank", type=int, default=16, help="of the adapter (16)")
    add("--formats", nargs="+", default=list(FORMATS), metavar="NAME", help="of bitfuse.quantize")
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="of x")
    add(
        "--directions",
        nargs="+",
        choices=("forward", "gradient"),
        default=["forward", "gradient"],
        help="y, or dX, dA and dB; both unless said",
    )
    timing.add_options(parser, "lora_linear")
    args = parser.parse_args()

    ceiling = timing.measure_ceiling(args.dtype, args.budget, args.patience)
    isa = cpp._cpu.isa() if cpp._cpu is not None and not GPU else None
    with torch.no_grad():
        overhead = {} if GPU else call_overhead()
    timing.introduce(ceiling, isa, overhead, "[1, 128] x [8, 128]")
    rows: list[dict[str, Any]] = []
    for m in args.m:
        if "forward" in args.directions:
            with torch.no_grad():
                rows += table(m, False, args, ceiling)
        if "gradient" in args.directions:
            rows += table(m, True, args, ceiling)
    timing.record(args, "lora_linear", isa, ceiling, overhead, rows)


@pytest.mark.parametrize("m", [1, 16, 128])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("case", cases(list(FORMATS), ["bfloat16"], False), ids=str)
def test_lora_linear(benchmark: Any, case: Case, gradient: bool, m: int) -> None:
    with torch.set_grad_enabled(gradient):
        try:
            _, chain = make_chain(case, m, 4096, 4096, 16, 128 << 20, gradient)
        except ImportError as error:
            pytest.skip(str(error))

        def run() -> None:
            chain()
            if GPU:
                torch.cuda.synchronize()

        benchmark.extra_info["layers"] = len(chain.layers)
        benchmark(run)


if __name__ == "__main__":
    main()

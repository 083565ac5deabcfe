"""How fast are the other cuts? Of lowbit_linear the CUDA planner's, or Triton's tiles: each is timed beside
the one that the rule takes.

    benchmarks/gpu.py --unit bitfuse_tools.gpu.sweep plans|tiles

JSON on stdout, [{case, choice, cut, seconds, error}], what was measured before SIGINT too. The planner's cuts
are those that `bitfuse tune` tries.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from bitfuse.core.backends import use_backend
from bitfuse.core.cuda import cuda
from bitfuse.core.device import device_of, simulated
from bitfuse.kernels.core.launch import triton as compiler
from bitfuse.kernels.linear import lowbit_linear as triton
from bitfuse.kernels.linear import lowbit_linear_tiles as tiles
from bitfuse.ops.linear import lowbit_linear_cuda
from bitfuse.ops.linear.lowbit_linear import lowbit_linear
from bitfuse.weights.quantize import quantize
from bitfuse.weights.weight import LowBitWeight

from .. import tuning

MATRICES = ((4096, 4096), (28672, 4096), (4096, 14336), (1024, 4096))
PLANS = [(m, n, k, f) for f in ("int4", "int8") for m in (1, 16, 64) for n, k in MATRICES]
TILES = [(m, n, k, "int4") for m in (128, 1024, 8192) for n, k in MATRICES[:2]]


def wall_seconds(call: Callable[[], Any]) -> float:
    """Of a call on the simulator, which says nothing about a GPU."""
    at = time.perf_counter()
    call()
    return time.perf_counter() - at


def _timed(
    call: Callable[[], torch.Tensor], exact: torch.Tensor, timer: Callable[[Callable[[], Any]], float]
) -> dict[str, Any]:
    got = call().double()
    return {"seconds": timer(call), "error": float((got - exact).norm() / exact.norm())}


def swept(kind: str, cases: list[tuple[int, int, int, str]], found: list[dict[str, Any]]) -> None:
    """Time every cut of these cases, into `found`."""
    device = torch.device("cpu" if simulated() else "cuda")
    timer = wall_seconds if simulated() else tuning.graph_seconds
    w: LowBitWeight | None = None
    for m, n, k, format in cases:
        if w is None or (w.shape, w.format.name) != ((n, k), format):
            w = quantize(torch.randn(n, k, dtype=torch.float32, device=device) / k**0.5, format)
        x = torch.randn(m, k, dtype=torch.float32, device=device).to(torch.bfloat16)
        exact = x.double() @ w.dequantize(torch.float32).double().t()
        case, weight = f"{format} M={m} N={n} K={k}", w

        def call(x: torch.Tensor = x, weight: LowBitWeight = weight) -> torch.Tensor:
            with use_backend("cuda" if kind == "plans" else "triton"):
                return lowbit_linear(x, weight)

        ways: list[tuple[str, Any]] = []
        if kind == "plans":
            for cut in lowbit_linear_cuda.candidates(m, n, k, format, False, device_of(device)):
                name = f"{1 << cut.log_warps_n} warps along N, {cut.splits} splits"
                ways.append((name, lowbit_linear_cuda.trying(cut)))
        else:
            group = w.format.group_size
            product = tiles.Product(m, n, k, w.format.bits, 0 if group in (-1, k) else group, 2)
            for c in tiles.candidates(product, device_of(device)):
                name = f"{c.tile_m}x{c.tile_n}x{c.tile_k}, {c.splits} splits, {c.stages} stages"
                ways.append((name, triton.trying(c)))
        for i, (name, way) in enumerate(ways):
            try:
                with way:
                    measured = _timed(call, exact, timer)
            except (RuntimeError, compiler.TritonError) as why:  # no shared memory or registers for it here
                measured = {"seconds": None, "error": None, "said": str(why).splitlines()[0][:200]}
            found.append({"case": case, "choice": i == 0, "cut": name, **measured})


def main(arguments: list[str]) -> int:
    kind = arguments[0]
    todo = PLANS if kind == "plans" else TILES
    if simulated():
        todo = [(3, 64, 256, "int4")]
    if kind == "plans" and cuda.missing is not None:
        raise RuntimeError(cuda.missing)
    found: list[dict[str, Any]] = []
    try:
        swept(kind, todo, found)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        json.dump(found, sys.stdout)
    gains = [line for line in summary(found) if line]
    print(
        gains[-1] if gains else f"{len(found)} cuts of {len(todo)} cases: the rule's are the best",
        file=sys.stderr,
    )
    return 0


def summary(found: list[dict[str, Any]]) -> list[str]:
    """A line for each case whose best cut is more than 3% faster than the rule's."""
    lines = []
    by_case: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        if each.get("seconds"):
            by_case.setdefault(each["case"], []).append(each)
    for case, ways in by_case.items():
        best, own = min(ways, key=lambda w: w["seconds"]), next((w for w in ways if w["choice"]), None)
        if own is not None and best["seconds"] < 0.97 * own["seconds"]:
            lines.append(
                f"{case}: {best['cut']} takes {best['seconds'] * 1e6:.3g} us, the rule's {own['cut']} "
                f"{own['seconds'] * 1e6:.3g} us"
            )
    return lines

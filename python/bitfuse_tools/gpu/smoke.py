"""Is a kernel right? Every case of a family, an op on one backend, against the same call in float64: inputs
fresh in each run, outputs poisoned, and at most twice the error of the op's reference at the input's dtype.

    benchmarks/gpu.py --unit bitfuse_tools.gpu.smoke lowbit_linear:cuda [SEED]

JSON of the errors on stdout; ends with `WRONG` where one is too large, with `MISSING` where no case is
served.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from bitfuse.core.device import simulated

from ..bench import cases
from ..bench.cases import Contender, Problem, Setting, Unavailable, narrowed
from ..bench.suites import SUITES
from ..bench.suites.attention import Attention
from ..bench.suites.decode_attention import DecodeAttention
from ..bench.suites.lora_linear import LoraLinear
from ..bench.suites.lowbit_linear import LowBitLinear
from ..bench.timing import DTYPES
from .poison import Poisoned
from .units import MISSING, WRONG

# a weight whose work is cut along k too, one of odd sizes, and the usual one
MATRICES = ((4096, 4096), (1024, 4096), (520, 1056))
ROWS = (1, 16, 33, 64)
# on the simulator a thread is a loop
SMALL: dict[str, int] = {
    "m": 3, "n": 48, "k": 128, "rank": 8, "batch": 2, "heads": 2, "kv_heads": 1, "seqlen": 40, "length": 70,
    "seq": 3, "dim": 64, "head_dim": 64, "parameters": 600, "vocab": 300, "r": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One case: its error, what it may be, and why it was not tried, if it was not."""

    case: str
    error: float | None
    allowed: float | None
    said: str = ""

    @property
    def right(self) -> bool:
        return self.error is None or (self.allowed is not None and self.error <= self.allowed)


def problems(op: str, setting: Setting, small: bool) -> list[Problem]:
    """What to try of an op: its benchmark's problems, of sizes that float64 takes little time for, and more
    where a kernel has more ways."""
    if small:
        first = SUITES[op].problems(setting)[0]
        named = {f.name for f in fields(first)}
        less: dict[str, Any] = {name: size for name, size in SMALL.items() if name in named}
        return [replace(first, **less)]
    found: list[Problem] = [p.bounded() for p in SUITES[op].problems(setting)]
    sizes = list(itertools.product(ROWS, MATRICES))
    if op == "lowbit_linear":
        found += [LowBitLinear(m, n, k) for m, (n, k) in sizes]
        found += [LowBitLinear(200, n, k, way) for n, k in MATRICES for way in ("forward", "gradient")]
    elif op == "lora_linear":
        found += [LoraLinear(m, n, k) for m, (n, k) in sizes[:6]]
        found += [LoraLinear(200, n, k, direction="gradient") for n, k in MATRICES]
    elif op == "multi_lora_linear":
        found = found[:6]
    elif op == "decode_attention":
        found += [DecodeAttention(3, n, 32, 8, d) for n, d in ((1, 128), (777, 128), (5000, 64), (600, 256))]
    elif op == "attention":
        for dim, causal in itertools.product((64, 128, 256), (True, False)):
            found.append(Attention(2, 8, 2, 777, dim, causal))
        found += [
            Attention(1, 4, 4, 1500, 128, window=256),
            Attention(1, 4, 2, 300, 128, direction="training"),
        ]
    return list(dict.fromkeys(found))


def tried(op: str, backend: str, small: bool) -> Iterator[Found]:
    """Every case of a family, one after the other."""
    device = "cpu" if simulated() else "cuda"
    dtypes = ("bfloat16",) if small else None
    formats = {
        "lowbit_linear": ("int4", "nf4", "int8", "fp8"),
        "lora_linear": ("int4", "nf4"),
        "multi_lora_linear": ("int4",),
    }
    setting = Setting(
        device, backends=(backend, "reference"), against=(), quick=True, dtypes=dtypes,
        formats=("int4",) if small and op in formats else formats.get(op),
    )  # fmt: skip
    setting = narrowed(SUITES[op], replace(setting, cold_bytes=1 << 18))
    for problem in problems(op, setting, small):
        contenders = [c for c in problem.contenders(setting) if not c.peer]
        plain = {_key(c, "reference"): c for c in contenders if c.backend == "reference"}
        for contender in contenders:
            if contender.backend == backend:
                yield _one(problem, contender, plain.get(_key(contender, backend)))


def _key(contender: Contender, backend: str) -> tuple[Any, ...]:
    return contender.name.replace(f"({backend})", ""), contender.dtype, str(contender.sizes)


def _one(problem: Problem, contender: Contender, plain: Contender | None) -> Found:
    said = f"{contender}, {problem}"
    try:
        got = _errors(problem, contender, poisoned=True)
    except Unavailable as why:
        return Found(said, None, None, str(why))
    eps = torch.finfo(DTYPES[contender.dtype]).eps / 2
    twice = [2 * e for e in _errors(problem, plain, poisoned=False)] if plain else [0.0] * len(got)
    # the output that is furthest beyond what it may err
    error, allowed = max(
        ((e, a + eps) for e, a in zip(got, twice, strict=True)), key=lambda pair: pair[0] / pair[1]
    )
    return Found(said, error, allowed)


def _errors(problem: Problem, contender: Contender, poisoned: bool) -> list[float]:
    """|got - exact| / |exact| of each output; of choices the share that differs. Infinite for a NaN."""
    with torch.set_grad_enabled(problem.needs_grad):
        layer = contender.build(0)
        assert layer.exact is not None
        exact = layer.exact()
        if poisoned:
            with (mode := Poisoned()):
                returned = layer.call()
            mode.check()
        else:
            returned = layer.call()
        got = layer.read(returned)
    found = []
    for g, e in zip(got, exact, strict=True):
        if layer.discrete:
            error = float((g.cpu() != e.cpu()).double().mean())
        else:
            g, e = g.detach().double().cpu(), e.detach().double().cpu()
            error = float((g - e).norm()) / (float(e.norm()) or 1.0)
        found.append(error if error == error else float("inf"))
    return found


def main(arguments: list[str]) -> int:
    family = arguments[0]
    op, _, backend = family.partition(":")
    seed = int(arguments[1]) if len(arguments) > 1 else int.from_bytes(os.urandom(3), "little")
    cases.drawn(seed)
    small, found = simulated(), []
    for one in tried(op, backend, small):
        found.append(one)
        if not one.right:
            print(f"wrong: {one.case}: error {one.error:.3g}, allowed {one.allowed:.3g}", file=sys.stderr)
    timed = [one for one in found if one.error is not None]
    worst = max(((o.error or 0.0) / (o.allowed or 1.0) for o in timed), default=0.0)
    json.dump({"seed": seed, "cases": [vars(one) for one in found]}, sys.stdout)
    if not timed:
        print(found[0].said if found else "it has no case", file=sys.stderr)
        return MISSING
    wrong = [one for one in found if not one.right]
    told = (
        f"{len(wrong)} of {len(timed)} are wrong, such as {wrong[0].case}: {wrong[0].error:.3g}"
        if wrong
        else ""
    )
    print(
        told or f"{len(timed)} are right, the worst at {worst:.2f} of what it may err; seed {seed}",
        file=sys.stderr,
    )
    return WRONG if wrong else 0

"""Time attention against torch's scaled_dot_product_attention, forward and forward with backward.

torch gets its own layout, [batch, heads, seq, dim], contiguous; bitfuse [batch, seq, heads, dim]. A window is
a mask to torch. FLOPs are those of the pairs that are seen: 2 (dim + dim_v) each, two and a half times as
many backward. How time is taken, and what a limit is: timing.py.

    python benchmarks/bench_attention.py                # every case; JSON goes to results/<device>/
    python benchmarks/bench_attention.py --cases prefill gqa --no-json
    pytest benchmarks/bench_attention.py                # the same cases under pytest-benchmark
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.bench import timing
from bitfuse.bench.timing import DEVICE, DTYPES, GPU, Ceiling, Chain
from bitfuse.cpu import lowbit_linear as cpp


@dataclass(frozen=True)
class Case:
    """A call of attention; `window` counts the keys that a query sees, 0 for all."""

    batch: int
    heads: int
    kv_heads: int
    seqlen: int
    dim: int
    dtype: str = "bfloat16"
    causal: bool = True
    window: int = 0
    backward: bool = False

    @property
    def pairs(self) -> int:
        """Of query and key, that are seen in one head."""
        if not self.causal:
            return self.seqlen**2
        seen = min(self.window or self.seqlen, self.seqlen)
        return seen * (seen + 1) // 2 + (self.seqlen - seen) * seen

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * self.heads * self.pairs * self.dim * (3.5 if self.backward else 1)

    @property
    def nbytes(self) -> float:
        rows = self.batch * self.seqlen * self.dim * DTYPES[self.dtype].itemsize
        # q, k, v and out; backward reads them and the gradient of out, and writes three gradients
        return rows * (self.heads * 2 + self.kv_heads * 2) * (3 if self.backward else 1)


LONG = 16384 if GPU else 1024
PREFILL = Case(1, 32, 32, LONG, 128)
SMALL = Case(32, 12, 12, 128, 32, "float16" if GPU else "float32", causal=False)
CASES = {
    "prefill": PREFILL,
    "full": replace(PREFILL, causal=False),
    "gqa": replace(PREFILL, kv_heads=8),
    "window": replace(PREFILL, seqlen=2 * LONG, kv_heads=8, window=256),
    "dim64": Case(4, 16, 16, LONG // 2, 64),
    "training": replace(PREFILL, backward=True),
    "training full": replace(PREFILL, causal=False, backward=True),
    "training gqa": replace(PREFILL, kv_heads=8, backward=True),
    "embedder 20": replace(SMALL, seqlen=20),
    "embedder 128": SMALL,
    "embedder 256": replace(SMALL, seqlen=256),
    "embedder bf16": replace(SMALL, seqlen=256, dtype="bfloat16"),
    "tuning": replace(SMALL, backward=True),
} | ({} if GPU else {
    "prefill fp32": replace(PREFILL, dtype="float32"),
    "training fp32": replace(PREFILL, dtype="float32", backward=True),
})  # fmt: skip


def _run(attend: Callable[..., Any], tensors: list[torch.Tensor], grad: torch.Tensor | None) -> None:
    if grad is None:
        with torch.no_grad():
            attend(*tensors)
    else:
        torch.autograd.grad(attend(*tensors), tensors, grad)


def make_chains(case: Case) -> dict[str, Chain]:
    """By who computes it."""
    generator = torch.Generator().manual_seed(0)
    dtype, n = DTYPES[case.dtype], case.seqlen

    def make(heads: int) -> torch.Tensor:
        made = torch.randn(case.batch, n, heads, case.dim, generator=generator)
        return made.to(DEVICE, dtype).requires_grad_(case.backward)

    ours = [make(heads) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    theirs = [t.detach().transpose(1, 2).contiguous().requires_grad_(case.backward) for t in ours]
    grad = make(case.heads).detach() if case.backward else None
    grad_theirs = None if grad is None else grad.transpose(1, 2).contiguous()
    mask = None
    if case.window:
        mask = torch.ones(n, n, dtype=torch.bool, device=DEVICE).tril().triu(1 - case.window)
    torch_attention = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        attn_mask=mask,
        is_causal=case.causal and mask is None,
        enable_gqa=case.heads != case.kv_heads,
    )
    own_attention = functools.partial(
        bitfuse.attention, causal=case.causal, window_size=(case.window - 1, -1) if case.window else (-1, -1)
    )
    work = (case.nbytes, case.flops)
    return {
        "torch": Chain("torch", case.dtype, [lambda: _run(torch_attention, theirs, grad_theirs)], *work),
        "bitfuse": Chain("bitfuse", case.dtype, [lambda: _run(own_attention, ours, grad)], *work),
    }


def table(name: str, case: Case, args: argparse.Namespace, ceiling: Ceiling) -> list[dict[str, Any]]:
    """Time a case, print the table, return its rows."""
    chains = make_chains(case)
    for _ in range(args.rounds):
        for chain in chains.values():
            chain.sample(args.budget, args.patience)
    heads = f"H{case.heads}" + (f"/{case.kv_heads}" if case.heads != case.kv_heads else "")
    seen = f"window {case.window}" if case.window else "causal" if case.causal else "full"
    direction = "forward and backward" if case.backward else "forward"
    title = f"{name}: {direction}, B{case.batch} {heads} S{case.seqlen} D{case.dim} {seen}: milliseconds"
    rows = timing.report(
        title,
        list(chains.values()),
        lambda chain: {"torch": chains["torch"]} if chain is chains["bitfuse"] else {},
        ceiling,
    )
    return [{**row, "name": name, **vars(case)} for row in rows]


def call_overhead() -> dict[str, float]:
    """Microseconds of a tiny call."""
    q = torch.randn(1, 1, 1, 16)
    torch_attention = torch.nn.functional.scaled_dot_product_attention
    return timing.microseconds(
        {"torch": lambda: torch_attention(q, q, q), "bitfuse": lambda: bitfuse.attention(q, q, q)}
    )


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    timing.add_options(parser, "attention")
    args = parser.parse_args()
    chosen = {name: CASES[name] for name in args.cases}
    dtypes = list(dict.fromkeys(case.dtype for case in chosen.values()))
    ceiling = timing.measure_ceiling(dtypes, args.budget, args.patience)
    isa = cpp._cpu.isa() if cpp._cpu is not None and not GPU else None
    with torch.no_grad():
        overhead = {} if GPU else call_overhead()
    timing.introduce(ceiling, isa, overhead, "B1 H1 S1 D16")
    rows = [row for name, case in chosen.items() for row in table(name, case, args, ceiling)]
    timing.record(args, "attention", isa, ceiling, overhead, rows)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("who", ["torch", "bitfuse"])
def test_attention(benchmark: Any, who: str, name: str) -> None:
    chain = make_chains(CASES[name])[who]

    def run() -> None:
        chain()
        if GPU:
            torch.cuda.synchronize()

    benchmark(run)


if __name__ == "__main__":
    main()

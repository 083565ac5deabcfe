"""lora_linear: x W^T + s x A^T B^T, and dX, dA, dB."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.core.op import Op
from bitfuse.ops.linear.lora_linear import lora_linear, lora_linear_backward, lora_linear_op
from bitfuse.ops.linear.lowbit_linear import lowbit_linear
from bitfuse.weights.formats import FORMATS as ALL
from bitfuse.weights.quantize import quantize
from bitfuse.weights.weight import LowBitWeight

from .. import peers
from ..cases import Base, Contender, Layer, Problem, Setting, Weights, named, randn, served, weights
from ..timing import DTYPES

FORMATS = ("int4", "nf4")
ADAPTERS = ("float32", "bfloat16")
ROWS = (1, 16, 128)
RANK = 16
SCALING = 2.0
Pair = tuple[torch.nn.Parameter, torch.nn.Parameter]  # lora_A and lora_B


@dataclass(frozen=True)
class LoraLinear(Problem):
    op = "lora_linear"
    formats = tuple(ALL)
    m: int
    n: int
    k: int
    rank: int = RANK
    direction: str = "forward"

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        name = named(setting.shape)
        return [
            cls(m, n, k, direction=direction, model=name, layer=layer)
            for layer, (n, k) in setting.shape.linears.items()
            for m in setting.rows(ROWS, (1, 16))
            for direction in setting.towards(("forward", "gradient"))
        ]

    def bounded(self) -> LoraLinear:
        return replace(self, m=min(self.m, 64), n=min(self.n, 512), k=min(self.k, 1024))

    def contenders(self, setting: Setting) -> list[Contender]:
        parts = _Parts(self, setting)
        formats, backends = setting.of_weights(FORMATS), setting.native(self._op)
        found: list[Contender] = []
        for dtype in setting.of_x():
            found += [self._torch(dtype, adapter, parts) for adapter in (None, *ADAPTERS)]
            found += [self._peft(dtype, adapter, parts) for adapter in ADAPTERS]
            found += [
                self._bitfuse(format, dtype, adapter, backend, parts)
                for format in formats
                for backend in backends
                for adapter in (None, *ADAPTERS)
            ]
        return found

    @property
    def _op(self) -> Op:
        return lora_linear_backward if self.needs_grad else lora_linear_op

    def _work(self, dtype: str, adapter: str | None) -> dict[str, Any]:
        size = self.m * DTYPES[dtype].itemsize
        flops, nbytes = 2.0 * self.m * self.n * self.k, float(size * (self.n + self.k))
        if adapter is not None:
            gradient = self.needs_grad
            flops += 2.0 * self.m * self.rank * (self.n + self.k) * (2 if gradient else 1)
            # backward: x is read for dA, and dA and dB are written
            nbytes += (self._adapter_bytes(adapter) + size * self.k) if gradient else 0
        return {"flops": flops, "shared_bytes": nbytes, "group": f"{dtype} {adapter}"}

    def _adapter_bytes(self, adapter: str | None) -> int:
        return self.rank * (self.n + self.k) * DTYPES[adapter].itemsize if adapter else 0

    def _torch(self, dtype: str, adapter: str | None, parts: _Parts) -> Contender:
        """PEFT's own formula over a dense W of x's dtype."""
        linear = torch.nn.functional.linear

        def build(i: int) -> Layer:
            w, pair = parts.weights().dense(dtype, i), parts.pair(adapter, i)

            def forward(x: torch.Tensor) -> torch.Tensor:
                if pair is None:
                    return linear(x, w)
                a, b = pair
                return (linear(x, w) + linear(linear(x.to(a.dtype), a), b) * SCALING).to(x.dtype)

            return parts.layer(forward, w, w.nbytes, dtype, pair)

        name = "torch dense" if adapter is None else f"torch dense + LoRA {adapter}"
        base = None if adapter is None else "torch dense"
        return Contender(
            name, dtype, build, who="torch", label="torch", base=base, **self._work(dtype, adapter)
        )

    def _peft(self, dtype: str, adapter: str, parts: _Parts) -> Contender:
        def build(i: int) -> Layer:
            own, pair = parts.weights().plain(i), parts.pair(adapter, i)
            assert pair is not None
            forward = peers.peft_linear(own, *pair, SCALING, dtype, parts.setting.device)
            nbytes = self.n * self.k // 2 + self.n * self.k // 64 * 4
            return parts.layer(forward, quantize(own, "nf4"), nbytes, dtype, pair)

        name = f"PEFT, bitsandbytes NF4 + LoRA {adapter}"
        return Contender(name, dtype, build, who="peft", label="PEFT", **self._work(dtype, adapter))

    def _bitfuse(
        self, format: str, dtype: str, adapter: str | None, backend: str, parts: _Parts
    ) -> Contender:
        def build(i: int) -> Layer:
            w, pair = parts.weights().few_bit(format, i), parts.pair(adapter, i)

            def forward(x: torch.Tensor) -> torch.Tensor:
                return lowbit_linear(x, w) if pair is None else lora_linear(x, w, *pair, SCALING)

            return parts.layer(forward, w, w.nbytes, dtype, pair, backend)

        base = f"bitfuse {format} ({backend})"
        return Contender(
            base if adapter is None else f"{base} + LoRA {adapter}", dtype, build,
            base=None if adapter is None else base, backend=backend, format=format,
            **self._work(dtype, adapter),
        )  # fmt: skip

    @classmethod
    def overhead(cls) -> dict[str, Callable[[], Any]]:
        w = quantize(randn(8, 128), "int4")
        x, a, b = randn(1, 128), randn(4, 128), randn(8, 4)
        return {
            "bitfuse.lowbit_linear": lambda: lowbit_linear(x, w),
            "bitfuse.lora_linear": lambda: lora_linear(x, w, a, b, SCALING),
        }


class _Parts:
    """What the contenders of a problem share: the weight that each layer rolls, x, the gradient of y."""

    def __init__(self, problem: LoraLinear, setting: Setting) -> None:
        p, self.problem, self.setting = problem, problem, setting
        self._a = Base(lambda: randn(p.rank, p.k, seed=1) / p.k**0.5)
        self._b = Base(lambda: randn(p.n, p.rank, seed=2) / p.rank**0.5)
        self.x = functools.cache(lambda dtype: setting.tensor(randn(p.m, p.k, seed=3), dtype))
        self.grad = functools.cache(lambda dtype: setting.tensor(randn(p.m, p.n, seed=4), dtype))

    def weights(self) -> Weights:
        return weights(self.problem.n, self.problem.k, self.setting.device)

    def pair(self, adapter: str | None, i: int) -> Pair | None:
        if adapter is None:
            return None
        a, b = (torch.nn.Parameter(self.setting.tensor(t(i, 1), adapter)) for t in (self._a, self._b))
        return a, b

    def layer(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        w: torch.Tensor | LowBitWeight,
        weight_bytes: int,
        dtype: str,
        pair: Pair | None,
        backend: str | None = None,
    ) -> Layer:
        """y, or the gradients of a y that is there already."""
        p = self.problem
        x = self.x(dtype)
        if p.needs_grad:
            x = x.detach().requires_grad_()
            learnt, grad = [x, *(pair or ())], self.grad(dtype)
            y: list[torch.Tensor] = []

            def call() -> Any:
                if not y:
                    y.append(forward(x))
                return torch.autograd.grad(y[0], learnt, grad, retain_graph=True)
        else:

            def call() -> Any:
                return forward(x)

        if backend is not None:
            call = served(p._op, backend, self.setting.device, call)
        else:
            call()
        adapter = None if pair is None else str(pair[0].dtype).removeprefix("torch.")
        return Layer(call, weight_bytes + p._adapter_bytes(adapter), lambda: self.exact(x, w, dtype, pair))

    def exact(
        self, x: torch.Tensor, w: torch.Tensor | LowBitWeight, dtype: str, pair: Pair | None
    ) -> list[torch.Tensor]:
        dense = (w if isinstance(w, torch.Tensor) else w.dequantize(torch.float32)).double()
        given = [x.detach().double(), *(t.detach().double() for t in pair or ())]
        with torch.set_grad_enabled(self.problem.needs_grad):
            for t in given:
                t.requires_grad_(self.problem.needs_grad)
            y = given[0] @ dense.t()
            if pair is not None:
                y = y + SCALING * (given[0] @ given[1].t()) @ given[2].t()
            if not self.problem.needs_grad:
                return [y]
            return list(torch.autograd.grad(y, given, self.grad(dtype).double()))

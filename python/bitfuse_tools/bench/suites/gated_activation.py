"""gated_activation: act(gate) * up, and its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.core.activations import activate
from bitfuse.ops.linear.gated_activation import (
    gated_activation,
    gated_activation_backward,
    gated_activation_op,
)

from ..cases import Contender, Layer, Problem, Setting, Unavailable, named, normal, served
from ..timing import DTYPES

ROWS = (1, 128, 2048)


@dataclass(frozen=True)
class GatedActivation(Problem):
    op = "gated_activation"
    m: int
    n: int
    activation: str = "silu"
    direction: str = "forward"

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        s = setting.shape
        return [
            cls(m, s.intermediate, s.activation, direction, model=named(s))
            for m in setting.rows(ROWS, (128,))
            for direction in setting.towards(("forward", "gradient"))
        ]

    def bounded(self) -> GatedActivation:
        return replace(self, m=min(self.m, 16))

    def contenders(self, setting: Setting) -> list[Contender]:
        found = []
        op = gated_activation_backward if self.needs_grad else gated_activation_op
        for dtype in setting.of_x():
            make = functools.partial(self._contender, dtype, setting)
            found.append(make("torch", self._torch, who="torch", label="torch"))
            if setting.gpu:
                found.append(make("Liger", self._liger, who="liger", label="Liger"))
            for backend in setting.native(op):
                found.append(make(f"bitfuse ({backend})", self._bitfuse, backend=backend))
        return found

    def _contender(
        self, dtype: str, setting: Setting, name: str, way: Any, backend: str | None = None, **more: Any
    ) -> Contender:
        bases = [normal(setting, dtype, self.m, self.n, seed=seed) for seed in (0, 1)]
        grads = normal(setting, dtype, self.m, self.n, seed=2)
        # two read and one written; backward reads a gradient too and writes two
        nbytes = float(self.m * self.n * DTYPES[dtype].itemsize * (5 if self.needs_grad else 3))

        def build(i: int) -> Layer:
            call, given = way(), [b(i).requires_grad_(self.needs_grad) for b in bases]
            grad = grads(i)

            def forward() -> Any:
                return call(*given)

            run = self._backward(forward, given, grad) if self.needs_grad else forward
            if backend is not None:
                op = gated_activation_backward if self.needs_grad else gated_activation_op
                run = served(op, backend, setting.device, run)
            return Layer(run, nbytes, lambda: self._exact(given, grad))

        return Contender(name, dtype, build, group=dtype, backend=backend, **more)

    def _backward(self, forward: Any, given: list[torch.Tensor], grad: torch.Tensor) -> Callable[[], Any]:
        made = functools.cache(forward)  # the gradients of an output that is there already
        return lambda: torch.autograd.grad(made(), given, grad, retain_graph=True)

    def _torch(self) -> Any:
        return lambda gate, up: activate(gate, self.activation) * up

    def _liger(self) -> Any:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        if self.activation != "silu":
            raise Unavailable("its gated activation is measured with silu")
        return LigerSiLUMulFunction.apply

    def _bitfuse(self) -> Any:
        return lambda gate, up: gated_activation(gate, up, self.activation)

    def _exact(self, given: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
        with torch.set_grad_enabled(self.needs_grad):
            gate, up = (t.detach().double().requires_grad_(self.needs_grad) for t in given)
            y = activate(gate, self.activation) * up
            return list(torch.autograd.grad(y, (gate, up), grad.double())) if self.needs_grad else [y]

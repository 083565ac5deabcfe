"""rms_norm: x over its root mean square, with a residual added before, and its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from bitfuse.core.op import Op
from bitfuse.ops.norm.rms_norm import rms_norm, rms_norm_backward, rms_norm_op
from torch.nn import functional as F

from ..cases import Contender, Layer, Problem, Setting, named, normal, served
from ..timing import DTYPES

ROWS = (1, 128, 2048)
EPS = 1e-5


@dataclass(frozen=True)
class RMSNorm(Problem):
    op = "rms_norm"
    forward: ClassVar[Op] = rms_norm_op
    gradients: ClassVar[Op] = rms_norm_backward
    parameters: ClassVar[int] = 1
    m: int
    n: int
    residual: bool = False
    direction: str = "forward"

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        s = setting.shape
        return [
            cls(m, s.hidden, residual, direction, model=named(s))
            for m in setting.rows(ROWS, (128,))
            for residual in (False, True)
            for direction in setting.towards(("forward", "gradient"))
        ]

    def bounded(self) -> RMSNorm:
        return replace(self, m=min(self.m, 16))

    def contenders(self, setting: Setting) -> list[Contender]:
        found = []
        op = self.gradients if self.needs_grad else self.forward
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
        rows = [normal(setting, dtype, self.m, self.n, seed=seed) for seed in range(1 + self.residual)]
        parameters = [normal(setting, dtype, self.n, seed=4 + i) for i in range(self.parameters)]
        grads = [normal(setting, dtype, self.m, self.n, seed=8 + i) for i in range(1 + self.residual)]
        # x read and y written, and as much with a residual; gradients: s and y's read, x's written, and s's
        moved = (3 + self.residual) if self.needs_grad else 2 * (1 + self.residual)
        nbytes = float((self.m * moved + self.parameters) * self.n * DTYPES[dtype].itemsize)

        def build(i: int) -> Layer:
            call = way()
            given = [b(i).requires_grad_(self.needs_grad) for b in (*rows, *parameters)]
            above = [g(i) for g in grads]

            def forward() -> Any:
                return call(*given)

            run = self._backward(forward, given, above) if self.needs_grad else forward
            if backend is not None:
                op = self.gradients if self.needs_grad else self.forward
                run = served(op, backend, setting.device, run)
            return Layer(run, nbytes, lambda: self._exact(given, above))

        return Contender(name, dtype, build, group=dtype, backend=backend, **more)

    def _backward(
        self, forward: Any, given: list[torch.Tensor], above: list[torch.Tensor]
    ) -> Callable[[], Any]:
        made = functools.cache(forward)  # the gradients of an output that is there already

        def run() -> Any:
            out = made()
            outputs = list(out) if isinstance(out, tuple) else [out]
            return torch.autograd.grad(outputs, given, above, retain_graph=True)

        return run

    def _torch(self) -> Any:
        def call(x: torch.Tensor, *more: torch.Tensor) -> Any:
            s = x + more[0] if self.residual else x
            y = self._plain(s, *more[self.residual :])
            return (y, s) if self.residual else y

        return call

    def _plain(self, s: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(s, (self.n,), parameters[0], EPS)

    def _liger(self) -> Any:
        if self.residual:
            from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

            return lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)

    def _bitfuse(self) -> Any:
        if self.residual:
            return lambda x, r, w: rms_norm(x, w, EPS, residual=r)
        return lambda x, w: rms_norm(x, w, EPS)

    def _exact(self, given: list[torch.Tensor], above: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.set_grad_enabled(self.needs_grad):
            leaves = [t.detach().double().requires_grad_(self.needs_grad) for t in given]
            out = self._torch()(*leaves)
            outputs = list(out) if isinstance(out, tuple) else [out]
            if not self.needs_grad:
                return outputs
            return list(torch.autograd.grad(outputs, leaves, [g.double() for g in above]))

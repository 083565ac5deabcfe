"""bottleneck_adapter: x + act(x D^T + c) U^T + b."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.core.activations import activate
from bitfuse.ops.linear.bottleneck_adapter import bottleneck_adapter, bottleneck_adapter_op

from ..cases import Base, Contender, Layer, Problem, Setting, named, randn, served
from ..timing import DTYPES

ROWS = (1, 16, 128, 2048)


@dataclass(frozen=True)
class BottleneckAdapter(Problem):
    op = "bottleneck_adapter"
    m: int
    k: int
    r: int = 64

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        s = setting.shape
        return [cls(m, s.hidden, model=named(s)) for m in setting.rows(ROWS, (16,))]

    def bounded(self) -> BottleneckAdapter:
        return replace(self, m=min(self.m, 64))

    def contenders(self, setting: Setting) -> list[Contender]:
        found = []
        for dtype in setting.of_x(self.dtypes):
            found.append(self._contender("torch", dtype, setting, None, who="torch", label="torch"))
            for backend in setting.native(bottleneck_adapter_op):
                found.append(self._contender(f"bitfuse ({backend})", dtype, setting, backend))
        return found

    def _contender(
        self, name: str, dtype: str, setting: Setting, backend: str | None, **more: Any
    ) -> Contender:
        downs, ups = (
            Base(lambda: self._weight(self.r, self.k, 0)),
            Base(lambda: self._weight(self.k, self.r, 1)),
        )
        x = Base(lambda: setting.tensor(randn(self.m, self.k, seed=2), dtype))

        def build(i: int) -> Layer:
            matrices = [setting.tensor(t(i), dtype) for t in (downs, ups)]
            down, up = (t[:, :-1].contiguous() for t in matrices)
            down_bias, up_bias = (t[:, -1].contiguous() for t in matrices)
            given, parts = x(0), (down, up, down_bias, up_bias)

            def plain() -> torch.Tensor:
                h = torch.nn.functional.gelu(torch.nn.functional.linear(given, down, down_bias))
                return given + torch.nn.functional.linear(h, up, up_bias)

            def exact() -> list[torch.Tensor]:
                wide, d, u, c, b = (t.double() for t in (given, *parts))
                return [wide + activate(wide @ d.t() + c, "gelu") @ u.t() + b]

            call: Callable[[], Any] = plain
            if backend is not None:
                call = served(
                    bottleneck_adapter_op, backend, setting.device, lambda: bottleneck_adapter(given, *parts)
                )
            return Layer(call, sum(t.nbytes for t in parts), exact)

        x_and_y = 2.0 * self.m * self.k * DTYPES[dtype].itemsize
        flops = 4.0 * self.m * self.k * self.r
        return Contender(name, dtype, build, flops, x_and_y, group=dtype, backend=backend, **more)

    @staticmethod
    def _weight(n: int, k: int, seed: int) -> torch.Tensor:
        """A matrix and, as its last column, a bias."""
        return randn(n, k + 1, seed=seed) / k**0.5

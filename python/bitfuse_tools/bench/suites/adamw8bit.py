"""adamw8bit: a step of AdamW with 8-bit moments, against the optimisers that a user would otherwise pick.

A layer is a step over tensors enough to exceed any cache. Bytes are what it must move: p read and written,
the gradient read, the state read and written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.optim.adamw8bit import op as adamw8bit_op
from bitfuse.optim import AdamW8bit

from .. import peers
from ..cases import Contender, Layer, Problem, Setting, asked, randn, served
from ..timing import DTYPES

PARAMETERS = (1 << 16, 1 << 24)
LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-2


@dataclass(frozen=True)
class AdamW(Problem):
    """`parameters` are those of one tensor; small ones are many."""

    op = "adamw8bit"
    parameters: int

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        return [cls(p) for p in (PARAMETERS[:1] if setting.quick else PARAMETERS)]

    def bounded(self) -> AdamW:
        return replace(self, parameters=min(self.parameters, 1 << 14))

    @property
    def streamed(self) -> bool:
        return False  # a step is over many tensors already

    def contenders(self, setting: Setting) -> list[Contender]:
        found = []
        ours = functools.partial(AdamW8bit, lr=LR, weight_decay=DECAY, min_8bit_size=0)
        for dtype in setting.of_x(("float32", "bfloat16")):
            wide = 2 * DTYPES[dtype].itemsize
            for how in ("fused", "foreach"):
                options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, how: True}
                theirs: Any = functools.partial(torch.optim.AdamW, **options)
                found.append(
                    self._contender(f"torch AdamW {how}", dtype, wide, theirs, setting, "torch", how)
                )
            theirs, name = peers.bitsandbytes_adamw, "bitsandbytes AdamW8bit"
            found.append(self._contender(name, dtype, 2, theirs, setting, "bitsandbytes", "bitsandbytes"))
            for backend in setting.native(adamw8bit_op):
                name = f"bitfuse AdamW8bit ({backend})"
                found.append(self._contender(name, dtype, 2, ours, setting, "bitfuse", "", backend))
        return found

    def _contender(
        self,
        name: str,
        dtype: str,
        state_bytes: int,
        make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        setting: Setting,
        who: str,
        label: str,
        backend: str | None = None,
    ) -> Contender:
        each = 3 * DTYPES[dtype].itemsize + 2 * state_bytes

        def build(i: int) -> Layer:
            base = randn(self.parameters)
            count = max(1, min(512, round(setting.cold_bytes / (self.parameters * each))))
            parameters = []
            for j in range(count):
                p = torch.nn.Parameter(setting.tensor(base.roll(j), dtype))
                p.grad = setting.tensor(base.roll(-1 - j) * 0.01, dtype)  # never zeros
                parameters.append(p)
            optimizer = make(parameters)
            call: Callable[[], Any] = optimizer.step
            if backend is not None:
                own = torch.nn.Parameter(parameters[0].detach().clone())
                own.grad = parameters[0].grad
                served(adamw8bit_op, backend, setting.device, make([own]).step)
                call = asked(adamw8bit_op, backend, setting.device, call)
            return Layer(
                call, float(count * self.parameters * each), lambda: [_first_step(p, optimizer) for p in
                parameters], lambda _: [p.detach() for p in parameters],
            )  # fmt: skip

        # torch refuses to capture a step that counts on the host
        return Contender(
            name, dtype, build, who=who, label=label, group=dtype, backend=backend, capturable=False
        )


def _first_step(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """p after a step from moments of zero, in float64."""
    assert p.grad is not None
    x, g = p.detach().double(), p.grad.double()
    decay = optimizer.param_groups[0]["weight_decay"]
    m, v = (1 - BETA1) * g / (1 - BETA1), (1 - BETA2) * g * g / (1 - BETA2)
    return (1 - LR * decay) * x - LR * m / (v.sqrt() + EPS)

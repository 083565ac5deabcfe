"""Where a test runs: each backend on the devices that are here; GPU backends on the simulator when there is
no GPU."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import bitfuse
import cusim
import pytest
import torch
from bitfuse.core.backends import left_out
from bitfuse.core.op import Op
from bitfuse_tools.gpu.poison import Poisoned

_seeds = itertools.count(1)


@dataclass(frozen=True)
class Target:
    """A backend, and the device or the simulated compute capability that it runs on."""

    backend: str
    device: str
    sm: int = 0

    def __str__(self) -> str:
        return f"{self.backend}-{f'sm{self.sm}' if self.sm else self.device}"

    def pick(self, cases: Sequence[Any]) -> Sequence[Any]:
        """All cases, or on the simulator, which takes a millisecond for what a GPU does in none, every second
        one."""
        return cases[1::2] if self.sm else cases

    def place(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Tensors on the device; on the host they end at a guard page."""
        return [t.to(self.device) if self.device == "cuda" else cusim.guarded(t) for t in tensors]

    def place_weight(self, w: bitfuse.LowBitWeight) -> bitfuse.LowBitWeight:
        placed: dict[str, Any] = {name: self.place(t)[0] for name, t in w.tensors().items()}
        return replace(w, perm=None, **placed)

    def reason(self, op: Op, *args: Any) -> str | None:
        """Why the backend can't serve these arguments; None when it can."""
        self._skip_without(op)
        return next(b for b in op.backends if b.name == self.backend).supports(*args)

    def _skip_without(self, op: Op) -> None:
        name = getattr(op, "name", None)  # tests run functions of several ops too
        if (name, self.backend) in left_out():
            pytest.skip(f"BITFUSE_WITHOUT leaves {name}:{self.backend} out")

    def run(self, op: Op, *args: Any) -> Any:
        """The op on this target: outputs poisoned and guarded; simulated, races are checked and each run is
        scheduled anew."""
        self._skip_without(op)
        with contextlib.ExitStack() as stack:
            if self.sm:
                level = max(1, int(os.environ.get("CUSIM_RACECHECK", 0)))  # a test may ask for more
                stack.enter_context(cusim.device(sm=self.sm, racecheck=level, seed=next(_seeds)))
            stack.enter_context(bitfuse.use_backend(self.backend))
            # an output not wholly written is a NaN; a store too far is a fault, or on a GPU found by `check`
            outputs = stack.enter_context(Poisoned(cusim.guarded))
            found = op(*args)
            outputs.check()
            return found


def targets(*backends: str) -> list[Target]:
    """The targets of these backends on this machine."""
    gpu = torch.cuda.is_available()
    found = []
    for backend in backends:
        if backend in ("cpp", "reference"):
            found.append(Target(backend, "cpu"))
        if backend in ("cuda", "triton", "reference") and gpu:
            found.append(Target(backend, "cuda"))
        if backend in ("cuda", "triton") and not gpu:
            found += [Target(backend, "cpu", 80), Target(backend, "cpu", 90)]
    return found

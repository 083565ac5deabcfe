"""The same cases under pytest-benchmark: `pytest benchmarks/`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from .cases import Contender, Problem, Setting, Unavailable
from .measure import Chain, effort_for, said
from .suites import SUITES


@dataclass(frozen=True)
class Trial:
    """A contender of a problem."""

    problem: Problem
    contender: Contender
    setting: Setting

    def __str__(self) -> str:
        return f"{self.contender}, {self.problem}"

    def __call__(self, benchmark: Any) -> None:
        """Time it with pytest-benchmark's fixture; a test that can't run here is skipped with the reason."""
        import pytest

        effort = effort_for(self.setting.device, quick=True)
        try:
            chain = Chain(self.problem, self.contender, self.setting, effort.cold_bytes)
        except (Unavailable, ImportError) as error:
            pytest.skip(said(error))

        def run() -> None:
            chain()
            if self.setting.gpu:
                torch.cuda.synchronize()

        benchmark.extra_info["layers"] = chain.depth
        with torch.set_grad_enabled(self.problem.needs_grad):
            benchmark(run)


@functools.cache
def trials(op: str) -> list[Trial]:
    """The quick problems of an op, and everyone who computes them."""
    setting = Setting("cuda" if torch.cuda.is_available() else "cpu", quick=True)
    return [Trial(p, c, setting) for p in SUITES[op].problems(setting) for c in p.contenders(setting)]

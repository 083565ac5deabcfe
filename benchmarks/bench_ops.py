"""Every op against what a user would otherwise pick. The cases are those of bitfuse_tools.bench.

pytest benchmarks/bench_ops.py -k rope           # an op's quick cases under pytest-benchmark
bitfuse bench rope --quick                       # the same with interleaved rounds, and ratios
"""

from __future__ import annotations

from typing import Any

import pytest
from bitfuse_tools.bench import SUITES, Trial, trials


@pytest.mark.parametrize(
    "trial", [pytest.param(trial, id=f"{op}-{trial}") for op in SUITES for trial in trials(op)]
)
def test_op(benchmark: Any, trial: Trial) -> None:
    trial(benchmark)

"""Every op against what a user would otherwise pick. The cases are those of bitfuse_tools.bench.

pytest benchmarks/ -k rope                       # an op's quick cases under pytest-benchmark
python benchmarks/bench_ops.py rope --quick      # = bitfuse bench rope --quick: interleaved, with ratios
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from bitfuse_tools.bench import SUITES, Trial, trials
from bitfuse_tools.cli import app


@pytest.mark.parametrize(
    "trial", [pytest.param(trial, id=f"{op}-{trial}") for op in SUITES for trial in trials(op)]
)
def test_op(benchmark: Any, trial: Trial) -> None:
    trial(benchmark)


if __name__ == "__main__":
    app(["bench", *sys.argv[1:]], prog_name="bitfuse")

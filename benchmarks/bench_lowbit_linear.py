"""lowbit_linear against what a user would otherwise pick. The cases are those of bitfuse_tools.bench.

python benchmarks/bench_lowbit_linear.py --quick          # = bitfuse bench lowbit_linear --quick
pytest benchmarks/bench_lowbit_linear.py                  # the quick cases under pytest-benchmark
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from bitfuse_tools.bench import Trial, trials
from bitfuse_tools.cli import app

OP = "lowbit_linear"


@pytest.mark.parametrize("trial", trials(OP), ids=str)
def test_lowbit_linear(benchmark: Any, trial: Trial) -> None:
    trial(benchmark)


if __name__ == "__main__":
    app(["bench", OP, *sys.argv[1:]], prog_name="bitfuse")

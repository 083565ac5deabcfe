"""append_kv against what a user would otherwise pick. The cases are those of bitfuse_tools.bench.

python benchmarks/bench_append_kv.py --quick          # = bitfuse bench append_kv --quick
pytest benchmarks/bench_append_kv.py                  # the quick cases under pytest-benchmark
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from bitfuse_tools.bench import Trial, trials
from bitfuse_tools.cli import app

OP = "append_kv"


@pytest.mark.parametrize("trial", trials(OP), ids=str)
def test_append_kv(benchmark: Any, trial: Trial) -> None:
    trial(benchmark)


if __name__ == "__main__":
    app(["bench", OP, *sys.argv[1:]], prog_name="bitfuse")

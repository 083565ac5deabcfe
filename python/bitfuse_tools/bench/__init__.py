"""Benchmarks: every op, all its backends that run here, and what a user would otherwise pick.

    from bitfuse import bench

    session = bench.Session(bench.Setting("cpu"), bench.effort_for("cpu", quick=True))
    run = session.run("lowbit_linear")                    # a dict, as bench.results tells it
    print("\\n".join(bench.table.of_run("lowbit_linear", run)))

`bitfuse bench` is this with a progress bar, and writes the files that `bitfuse report` reads. Cases are data:
an op's `Problem`s (its sizes) and their `Contender`s; `suites/<op>.py` has them, for the command, for `pytest
benchmarks/` and for the tests.
"""

from __future__ import annotations

from . import compare, results, shapes, table
from .cases import Contender, Layer, Problem, Setting, Unavailable
from .measure import Chain, Session, effort_for
from .results import ResultsError
from .suites import SUITES
from .timing import Ceiling, Effort, device_name
from .trial import Trial, trials

__all__ = [
    "SUITES",
    "Ceiling",
    "Chain",
    "Contender",
    "Effort",
    "Layer",
    "Problem",
    "ResultsError",
    "Session",
    "Setting",
    "Trial",
    "Unavailable",
    "compare",
    "device_name",
    "effort_for",
    "results",
    "shapes",
    "table",
    "trials",
]

"""The ceiling of each machine: one, for all its ops. The best bandwidth and the best rates that anything
reached there, bitfuse, its peers or the loops that are timed beside them; they lie beside the results.

    benchmarks/results/limits.json

    {"schema": 1, "devices": {"amd-epyc-family-26-2-cores": {
     "bytes_per_s": {"value": 8.98e10, "by": "the loops timed beside gated_activation",
                     "date": "2026-11-22T05:34:52Z", "commit": "8cbb3400d61d"},
     "flop_per_s": {"bfloat16": {"value": 9.8e11, "by": ...}, ...}}}}

A rate of a dtype is that of x: who multiplies float32 by rounding it to 8 bits raises float32's. A share of
the ceiling can so be above 1 only where the data lay in a cache. `bitfuse bench` raises the file's values,
and never lowers them: a loud moment is none of the machine's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import results
from .results import ResultsError, finite_rate, shown
from .timing import Ceiling

FILE = "limits.json"
SCHEMA = 1
LOOPS = "the loops timed beside"


@dataclass(frozen=True)
class Reached:
    """A rate, and who reached it.

    Attributes:
        value: bytes or floating-point operations a second.
        by: in words; date, commit: of that run.
    """

    value: float
    by: str
    date: str | None = None
    commit: str | None = None


@dataclass
class Limits:
    """What a machine was seen to do: bytes a second, and FLOP/s by the dtype of x."""

    bytes_per_s: Reached | None = None
    flop_per_s: dict[str, Reached] = field(default_factory=dict)

    def see(self, limits: dict[str, Any], by: str, date: str | None, commit: str | None) -> None:
        """Take what is higher of `{"bytes_per_s": ..., "flop_per_s": {...}}`."""
        value = limits.get("bytes_per_s", 0.0)
        if value > (self.bytes_per_s.value if self.bytes_per_s else 0.0):
            self.bytes_per_s = Reached(value, by, date, commit)
        for dtype, rate in limits.get("flop_per_s", {}).items():
            if rate > (self.flop_per_s[dtype].value if dtype in self.flop_per_s else 0.0):
                self.flop_per_s[dtype] = Reached(rate, by, date, commit)

    def see_run(self, op: str, run: dict[str, Any]) -> None:
        """Take what is higher of a run: its loops, and its rows, whoever's they are. A row's bytes count only
        where they came from memory for certain; no one reads faster than what was measured without one."""
        date, commit = run.get("date"), run.get("commit")
        measured = run.get("limits", {}).get("measured") or {"before": run.get("limits", {})}
        for name in ("before", "after"):
            self.see(measured.get(name, {}), f"{LOOPS} {op}", date, commit)
        for row in run["rows"]:
            reached: dict[str, Any] = {"flop_per_s": {row["dtype"]: 1e12 * row.get("tflop_per_s", 0.0)}}
            if row.get("in_cache") is False:
                reached["bytes_per_s"] = 1e9 * row.get("gb_per_s", 0.0)
            self.see(reached, f"{row['case']}, {op}", date, commit)

    def join(self, other: Limits) -> None:
        """Take what is higher of another's."""
        for dtype, reached in ((None, other.bytes_per_s), *other.flop_per_s.items()):
            if reached is not None:
                rate = (
                    {"bytes_per_s": reached.value}
                    if dtype is None
                    else {"flop_per_s": {dtype: reached.value}}
                )
                self.see(rate, reached.by, reached.date, reached.commit)

    def share(self, gb_per_s: float, tflop_per_s: float, dtype: str) -> tuple[float | None, str]:
        """Of the ceiling that a row reached, and which bounds it, "memory" or "arithmetic"; the share is None
        where no rate is known."""
        memory = 1e9 * gb_per_s / self.bytes_per_s.value if self.bytes_per_s else 0.0
        rate = self.flop_per_s.get(dtype)
        arithmetic = 1e12 * tflop_per_s / rate.value if rate else 0.0
        bound = "memory" if memory >= arithmetic else "arithmetic"
        return max(memory, arithmetic) or None, bound

    def ceiling(self) -> Ceiling | None:
        """As `bitfuse bench` divides by it."""
        if self.bytes_per_s is None:
            return None
        return Ceiling(self.bytes_per_s.value, {d: r.value for d, r in self.flop_per_s.items()})

    def as_json(self) -> dict[str, Any]:
        return {
            "bytes_per_s": vars(self.bytes_per_s) if self.bytes_per_s else None,
            "flop_per_s": {dtype: vars(reached) for dtype, reached in sorted(self.flop_per_s.items())},
        }


def load(folder: Path) -> Limits:
    """Those of the device whose results lie in a folder; none where there are none.

    Raises:
        ResultsError: the file of limits can't be read, is not whole or of another layout.
    """
    path = folder.parent / FILE
    found = _devices(path).get(folder.name)
    if found is None:
        return Limits()
    try:
        rates = found["flop_per_s"]
        read = None if found["bytes_per_s"] is None else _reached("bytes_per_s", found["bytes_per_s"])
        return Limits(read, {dtype: _reached(dtype, each) for dtype, each in rates.items()})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(f"{shown(path)} is damaged: {results.brief(error)}; {WAY_OUT}") from None


WAY_OUT = "delete it: `bitfuse bench` makes it anew from the results beside it"


def _devices(path: Path) -> dict[str, Any]:
    found = results.read_if_there(path)
    if found is None:
        return {}
    if (
        not isinstance(found, dict)
        or found.get("schema") != SCHEMA
        or not isinstance(found.get("devices"), dict)
    ):
        raise ResultsError(f"{shown(path)} is no file of limits of schema {SCHEMA}; {WAY_OUT}")
    return dict(found["devices"])


def _reached(name: str, found: dict[str, Any]) -> Reached:
    words = (name, found["by"], found.get("date") or "", found.get("commit") or "")
    if not all(isinstance(word, str) and len(word) <= 1000 for word in words):
        raise ValueError(f"{results.brief(name)} has words that are none")
    return Reached(finite_rate(name, found["value"]), found["by"], found.get("date"), found.get("commit"))


def of_records(records: Iterable[dict[str, Any]], known: Limits | None = None) -> Limits:
    """What the files of a device hold together, and what was known before."""
    found = Limits()
    found.join(known or Limits())
    for record in records:
        for run in record["runs"]:
            found.see_run(record["op"], run)
    return found


def of_folder(folder: Path) -> Limits:
    """Those of a device's folder, and what its results hold beyond them.

    Raises:
        ResultsError: a file that is not sound.
    """
    from .suites import SUITES

    files = [folder / f"{op}.json" for op in SUITES if (folder / f"{op}.json").is_file()]
    return of_records(map(results.load, files), load(folder))


def keep(folder: Path) -> Limits:
    """Bring the file of limits up to the results of a device's folder.

    Raises:
        ResultsError: a file that is not sound, or can't be written.
    """
    found = of_folder(folder)
    path = folder.parent / FILE
    devices = _devices(path)
    if devices.get(folder.name) != found.as_json():
        devices[folder.name] = found.as_json()
        results.write(path, {"schema": SCHEMA, "devices": dict(sorted(devices.items()))})
    return found

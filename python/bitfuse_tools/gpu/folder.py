"""What a run leaves: a few files in one folder, whole at any moment.

    gpu.json      the GPU, the sources' hash, what is left out, every unit: status, seconds, what it said
    smoke.json    errors of each kernel against float64
    bench.json    what `bitfuse bench --json` gives, of all units; `bitfuse bench --compare` reads it
    sweeps.json   times of the planner's cuts and of Triton's tiles
    policy.json   what `bitfuse tune` remembers
    log.txt       the last lines of each unit
    report.txt    the table at the end

A disk that is full costs what was to be written: all is kept in memory too, and each write tries the whole
again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .units import Outcome

LOG_CHARACTERS = 4000  # of a unit


class Folder:
    """The folder of a run, and of the runs before it that had the same sources.

    Args:
        path: made if it is not there.
        sources: a hash of what results depend on.
        again: what is there counts for nothing.

    Attributes:
        units: what became of each, by name.
        trouble: why the last write failed; None after one that did not.
    """

    def __init__(self, path: Path, sources: str, again: bool = False) -> None:
        self.path = path
        self.trouble: str | None = None
        self._lock = threading.RLock()
        self._told: set[str] = set()
        self._documents: dict[str, Any] = {"smoke.json": {}, "sweeps.json": {}, "bench.json": []}
        self._state: dict[str, Any] = {"sources": sources, "without": [], "units": {}, "running": {}}
        self.units: dict[str, Outcome] = {}
        self._log = ""
        before = self._read("gpu.json")
        if again or not isinstance(before, dict) or before.get("sources") != sources:
            return
        _end(before.get("running"))
        try:
            self.units = {name: Outcome(**unit) for name, unit in before["units"].items()}
        except (AttributeError, KeyError, TypeError):  # another layout: as if it were not there
            self.units = {}
            return
        self._state["facts"] = before.get("facts")
        for name, empty in self._documents.items():
            found = self._read(name)
            if isinstance(found, type(empty)):
                self._documents[name] = found
        with contextlib.suppress(OSError):
            self._log = (path / "log.txt").read_text(errors="replace")

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return None

    @property
    def facts(self) -> dict[str, Any]:
        """Of the machine, as the first unit found them."""
        return self._state.get("facts") or {}

    @facts.setter
    def facts(self, found: dict[str, Any]) -> None:
        self._state["facts"] = found

    def begun(self, name: str, pid: int) -> None:
        """A unit's process runs: should this one be ended, the next run ends that first."""
        with self._lock:
            self._state["running"][name] = [pid, started(pid)]
            self._write_state()

    def ended(self, name: str, outcome: Outcome, log: str, without: list[str]) -> None:
        """Write down what became of a unit."""
        with self._lock:
            self.units[name] = outcome
            self._state["running"].pop(name, None)
            self._state["without"] = without
            self._log += f"== {name}: {outcome}\n{log[-LOG_CHARACTERS:].rstrip()}\n\n"
            self._write_state()
            self.text("log.txt", self._log)

    def _write_state(self) -> None:
        self._state["units"] = {name: vars(unit) for name, unit in self.units.items()}
        self.text("gpu.json", as_text(self._state))

    def put(self, into: str, name: str, document: Any) -> None:
        """Add what a unit found to a file: to a list of results, or by the unit's name."""
        with self._lock:
            held = self._documents[into]
            if isinstance(held, list):
                _merge(held, document)
            else:
                held[name] = document
            self.text(into, as_text(held))

    def text(self, name: str, text: str) -> None:
        """Aside, then renamed: a reader never sees half a file. A failure is told once, and kept."""
        aside = self.path / f".{name}.part"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(aside, text)
            os.replace(aside, self.path / name)
            self.trouble = None
        except OSError as why:
            self.trouble = f"{name}: {why.strerror or why}"
            if self.trouble not in self._told:
                self._told.add(self.trouble)
                print(f"make gpu: can't write {self.path / name}: {why.strerror or why}", file=sys.stderr)
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


def as_text(document: Any) -> str:
    return json.dumps(document, indent=1) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _merge(records: list[dict[str, Any]], more: list[dict[str, Any]]) -> None:
    """Results of an op behind those that are there; the last of a case counts."""
    for record in more:
        for known in records:
            if (known["op"], known["device"]) == (record["op"], record["device"]):
                known["runs"] += record["runs"]
                break
        else:
            records.append(record)


def started(pid: int) -> str:
    """What tells a process from a later one of its number; "" where nobody tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def _end(running: Any, kill: Callable[[int, int], None] = os.killpg) -> None:
    """End the processes that a run left behind when it was ended itself."""
    for said in running.values() if isinstance(running, dict) else ():
        if isinstance(said, list) and len(said) == 2 and said[1] and started(said[0]) == said[1]:
            with contextlib.suppress(OSError):  # gone meanwhile
                kill(said[0], signal.SIGKILL)

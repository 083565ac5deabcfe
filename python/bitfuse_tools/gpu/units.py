"""A unit: a process of its own with a limit of its own, and what became of it.

When its time is up it gets SIGINT (`bitfuse bench` then prints what it has), then SIGKILL, and after that
nobody waits for it: a process that is stuck in a driver does not end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[3]
WRONG, MISSING = 23, 24  # exit codes: its numbers are, what it needs is
# what a unit that is in no later run's way ended with
DONE = ("ok", "wrong", "crashed", "hung", "stuck", "failed", "missing")
BROKEN = ("hung", "stuck", "crashed")


@dataclass(frozen=True)
class Unit:
    """What to run.

    Attributes:
        name: the stage's first.
        stage: of `plan.STAGES`.
        command: "{seconds}" in it is the time that it has.
        limit: seconds.
        family: the op and the backend that its failure tells of, "attention:cuda".
        into: the file of the folder that takes the JSON on its stdout.
        environment: more of it.
    """

    name: str
    stage: str
    command: tuple[str, ...]
    limit: float
    family: str | None = None
    into: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a unit.

    Attributes:
        status: "ok"; "wrong" numbers; "crashed" (by a signal); "hung" (its limit was up); "stuck" (SIGKILL
        did not
            end it); "failed" (any other end); "missing" (what it needs is not here); "cut" (the run's time
            was up); "left out" (its family is).
        seconds: that it ran.
        said: in a line.
    """

    status: str
    seconds: float
    said: str

    def __str__(self) -> str:
        return f"{self.status}, {self.seconds:.1f} s. {self.said}"


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, None when its time was up; whether SIGKILL did not end it."""

    code: int | None
    stuck: bool
    seconds: float
    out: str
    error: str


class _Reader(threading.Thread):
    """The last bytes of a pipe."""

    def __init__(self, pipe: IO[bytes], most: int) -> None:
        super().__init__(daemon=True)
        self._pipe, self._most, self._parts = pipe, most, bytearray()
        self.start()

    def run(self) -> None:
        while part := self._pipe.read1(1 << 16):  # type: ignore[attr-defined]
            self._parts += part
            del self._parts[: max(0, len(self._parts) - self._most)]

    def text(self) -> str:
        self.join(2)  # whoever is stuck holds the pipe open
        return bytes(self._parts).decode(errors="replace")


def execute(
    command: list[str],
    environment: Mapping[str, str],
    limit: float,
    grace: float = 6.0,
    begun: Callable[[int], None] = lambda pid: None,
) -> Ended:
    """Run a command for at most `limit` seconds, `grace` more between SIGINT and SIGKILL, and never
    longer."""
    at = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    out, error = _Reader(process.stdout, 64 << 20), _Reader(process.stderr, 1 << 16)
    begun(process.pid)
    in_time = _ends(process, limit)
    if not in_time:
        _signal(process.pid, signal.SIGINT)
        _ends(process, grace)
    _signal(process.pid, signal.SIGKILL)  # what it started, too
    stuck = not _ends(process, grace)
    code = process.returncode if in_time else None
    return Ended(code, stuck, time.monotonic() - at, out.text(), error.text())


def _ends(process: subprocess.Popen[bytes], within: float) -> bool:
    try:
        process.wait(max(0.0, within))
    except subprocess.TimeoutExpired:
        return False
    return True


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(OSError):  # all of it has ended
        os.killpg(group, number)


def judge(ended: Ended, allowed: float, unit: Unit) -> Outcome:
    """What became of a unit whose process had `allowed` seconds."""
    said = last_line(ended.error) if unit.into else last_line(ended.out) or last_line(ended.error)
    code = ended.code
    if ended.stuck:
        status, said = "stuck", f"SIGKILL did not end it; {said}"
    elif code is None:
        status = "hung" if allowed >= unit.limit else "cut"
    elif code < 0 or code in (128 + signal.SIGSEGV, 128 + signal.SIGABRT, 128 + signal.SIGBUS):
        status, said = "crashed", f"{_named(code)}; {said}"
    else:
        status = {0: "ok", WRONG: "wrong", MISSING: "missing"}.get(code, "failed")
    failed = [line.split()[1] for line in ended.out.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if failed:  # pytest's
        said += f": {', '.join(name.rpartition('::')[2] for name in failed[:3])}"
    return Outcome(status, round(ended.seconds, 2), said)


def _named(code: int) -> str:
    number = -code if code < 0 else code - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def document(ended: Ended) -> Any:
    """The JSON that a process printed; None where it printed none."""
    try:
        return json.loads(ended.out)
    except ValueError:
        return None

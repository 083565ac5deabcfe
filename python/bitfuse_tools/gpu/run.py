"""Stage after stage, each unit once, until the time is up; what hangs, crashes or is wrong is left out of
what follows."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

from .folder import Folder
from .units import BROKEN, DONE, ROOT, Outcome, Unit, document, execute, judge

LEAST = 3.0  # seconds: a unit that has less is not begun
WITHOUT = "BITFUSE_WITHOUT"


class Stopped(Exception):
    """SIGINT or SIGTERM came."""


class Run:
    """What is left of a run's time, and its folder.

    Args:
        folder: what it leaves.
        minutes: for all of it.
        environment: of every unit, beside the caller's, whose PYTHONPATH stays behind ours.
        kernels: folders of `bitfuse compile`, before those of the caller's BITFUSE_KERNEL_PATH.
    """

    def __init__(
        self,
        folder: Folder,
        minutes: float,
        environment: dict[str, str] | None = None,
        kernels: Sequence[str] = (),
        paths: Sequence[str] = (str(ROOT / "python"),),
    ) -> None:
        self.folder = folder
        self.started = time.monotonic()
        self.end = self.started + 60 * minutes
        self.without = [word for word in os.environ.get(WITHOUT, "").split(",") if word.strip()]
        self.kernels = list(kernels)
        self._paths = paths
        self._environment = environment or {}
        self._groups: set[int] = set()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._units: dict[str, Unit] = {}

    def environment(self, unit: Unit) -> dict[str, str]:
        """That a unit gets."""
        found = {**os.environ, "PYTHONUNBUFFERED": "1", **self._environment, **unit.environment}
        for name, more in (("PYTHONPATH", self._paths), ("BITFUSE_KERNEL_PATH", self.kernels)):
            if joined := os.pathsep.join(filter(None, (*more, os.environ.get(name)))):
                found[name] = joined
        if without := self.left_out():
            found[WITHOUT] = ",".join(without)
        return found

    def left_out(self) -> list[str]:
        """What every unit from now on does without."""
        found = dict.fromkeys(self.without)
        for name, outcome in list(self.folder.units.items()):
            unit = self._units.get(name)
            if unit is None or unit.family is None:
                continue
            bad = (*BROKEN, "wrong", "failed") if unit.stage == "smoke" else BROKEN
            if outcome.status in bad:
                found[unit.family] = None
        return list(found)

    def known(self, units: Sequence[Unit]) -> None:
        """Units of this run and of those before it, whose families `left_out` looks up."""
        self._units |= {unit.name: unit for unit in units}

    def stage(self, units: Sequence[Unit], workers: int, until: float) -> None:
        """Run those that have not been done, so many at once.

        Raises:
            Stopped: by a signal; what ran is ended, and kept.
        """
        self.known(units)
        left = [u for u in units if u.name not in self.folder.units or not self.done(u)]
        if not left:
            return
        pool = ThreadPoolExecutor(min(workers, len(left)))
        try:
            for future in [pool.submit(self.unit, unit, min(until, self.end)) for unit in left]:
                future.result()
        except Stopped:
            self._stopped.set()
            for group in list(self._groups):
                with contextlib.suppress(OSError):  # it has ended
                    os.killpg(group, signal.SIGKILL)
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def done(self, unit: Unit) -> bool:
        return self.folder.units[unit.name].status in DONE

    def unit(self, unit: Unit, until: float) -> Outcome:
        """Run one, and write down what became of it."""
        allowed = min(unit.limit, until - time.monotonic())
        if self._stopped.is_set():
            return Outcome("cut", 0.0, "stopped")
        if unit.family in self.left_out():
            return self._note(unit, Outcome("left out", 0.0, f"{WITHOUT} has {unit.family}"))
        if allowed < min(LEAST, unit.limit):
            return self._note(unit, Outcome("cut", 0.0, "no time was left"))
        command = [word.replace("{seconds}", f"{allowed:.0f}") for word in unit.command]
        groups: list[int] = []

        def begun(pid: int) -> None:
            groups.append(pid)
            with self._lock:
                self._groups.add(pid)
            self.folder.begun(unit.name, pid)

        try:
            ended = execute(command, self.environment(unit), allowed, begun=begun)
        except OSError as why:  # no process, no memory for one
            return self._note(unit, Outcome("failed", 0.0, f"it did not start: {why.strerror or why}"))
        finally:
            with self._lock:
                self._groups.difference_update(groups)
        if self._stopped.is_set():
            return self._note(unit, Outcome("cut", ended.seconds, "stopped"), ended.error)
        outcome = judge(ended, allowed, unit)
        if unit.into is not None and (found := document(ended)) is not None:
            self.folder.put(unit.into, unit.name, found)
        log = ended.error if unit.into is not None else f"{ended.out}{ended.error}"
        return self._note(unit, outcome, log)

    def _note(self, unit: Unit, outcome: Outcome, log: str = "") -> Outcome:
        with self._lock:
            self.folder.units[unit.name] = outcome
            self.folder.ended(unit.name, outcome, log, self.left_out())
            at = time.monotonic() - self.started
            print(f"{at:6.0f} s  {unit.name:44s} {outcome.status:8s} {outcome.said}", flush=True)
        return outcome


def stop_on_signals() -> None:
    """SIGINT and SIGTERM raise `Stopped` in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

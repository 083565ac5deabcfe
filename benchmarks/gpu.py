"""`make gpu`: builds for the GPU that is here, then all tests, all benchmarks, `bitfuse tune` and
compute-sanitizer over a short list, in under ten minutes and with no network.

    python benchmarks/gpu.py                       # everything that this commit has not had yet
    python benchmarks/gpu.py --stages build tests  # of it
    python benchmarks/gpu.py --minutes 25 --again  # longer, from the beginning
    python benchmarks/gpu.py --list

Each stage has its share of the time, and what it does is done in units: a file of tests, an op's benchmark.
What a unit gave is written down when it ends, so a run that was cut leaves what it measured, and the next one
goes on from there as long as the sources are the same. Results lie in benchmarks/results/<device>/; the table
at the end is gpu.json there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "build" / "gpu"  # not part of the tree, so that it stays when the tree is copied anew
PYTHON = sys.executable
# of the time, at most; what a stage leaves is the next ones'
SHARES = {"build": 0.35, "tests": 0.45, "bench": 0.3, "tune": 0.12, "sanitize": 0.15}
# by tool, kernels with shared memory, barriers and asynchronous copies: a file of tests, and which of them
SANITIZED = (
    ("memcheck", "tests/linear/test_lowbit_linear_cuda.py", "rows_of_any_length or split_k or views"),
    ("memcheck", "tests/attention/test_decode_attention_cuda.py", "stretches or rows_than_a_tile"),
    ("memcheck", "tests/attention/test_attention_cuda.py", "many_tiles or packed_neighbours"),
    ("racecheck", "tests/linear/test_lowbit_linear_cuda.py", "split_k"),
    ("racecheck", "tests/linear/test_lora_linear_cuda.py", "any_rank or any_mix"),
)


@dataclass(frozen=True)
class Unit:
    """What one unit gave.

    Attributes:
        status: "ok", "failed", "cut" (its time was up) or "missing" (what it needs is not here).
        said: how many tests passed, or the last line of an error.
    """

    status: str
    seconds: float
    said: str


class Run:
    """The units of this run and of those before it, and the time that is left."""

    def __init__(self, minutes: float, again: bool, workers: int) -> None:
        self.started = time.monotonic()
        self.end = self.started + 60 * minutes
        self.workers = workers
        self.file = STATE / f"{sources()}.json"
        self.units: dict[str, Unit] = {}
        self.lock = threading.Lock()
        if self.file.exists() and not again:
            with contextlib.suppress(json.JSONDecodeError, TypeError):  # half a file: begin anew
                self.units = {name: Unit(**unit) for name, unit in json.loads(self.file.read_text()).items()}

    def stage(self, name: str) -> float:
        """When a stage that begins now must end."""
        now = time.monotonic()
        return min(self.end, now + SHARES[name] * (self.end - self.started))

    def done(self, name: str) -> bool:
        """Whether a unit ended by itself."""
        return name in self.units and self.units[name].status in ("ok", "failed", "missing")

    def note(self, name: str, unit: Unit) -> None:
        with self.lock:
            self.units[name] = unit
            write(self.file, {n: asdict(u) for n, u in self.units.items()})
            print(
                f"{time.monotonic() - self.started:6.0f} s  {name:48s} {unit.status:8s} {unit.said}",
                flush=True,
            )

    def command(
        self,
        name: str,
        command: list[str],
        until: float,
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> tuple[int | None, float]:
        """The exit code of a command, None if its time was up, and its seconds; its output is in the log."""
        started = time.monotonic()
        if until - started < 1:
            return None, 0.0
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as to:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=to,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": "python", **(environment or {})},
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(until - started)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = None
        return code, time.monotonic() - started


def write(file: Path, what: object) -> None:
    """Aside, then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(what, indent=1) + "\n")
    aside.replace(file)


def sources() -> str:
    """A hash of what results depend on."""
    made = hashlib.sha256()
    for folder in ("csrc", "kernels", "python", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".hpp", ".cpp", ".cu", ".cuh") and path != Path(__file__):
                made.update(f"{path.relative_to(ROOT)}\0".encode())
                made.update(path.read_bytes())
    return made.hexdigest()[:16]


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


def build(run: Run) -> None:
    name, log = "build", STATE / "build.log"
    if (
        run.done(name)
        and run.units[name].status == "ok"
        and list((ROOT / "python/bitfuse").glob("_cuda*.so"))
    ):
        return
    command = [PYTHON, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {"BITFUSE_CUDA": "1", "BITFUSE_CUDART": "static"}  # as users have it
    code, seconds = run.command(name, command, run.stage("build"), log, environment)
    run.note(name, Unit("cut" if code is None else "failed" if code else "ok", seconds, last_line(log)))


def tests(run: Run) -> None:
    """A file at a time on each worker, those of the GPU's kernels first."""
    until = run.stage("tests")
    files = sorted(
        ROOT.glob("tests/*/test_*.py"), key=lambda p: ("cuda" not in p.stem, "triton" not in p.stem)
    )
    left = [p for p in files if not run.done(unit_of(p))]
    with ThreadPoolExecutor(run.workers) as pool:
        list(pool.map(lambda file: test(run, file, until), left))


def unit_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test(run: Run, file: Path, until: float) -> None:
    name, log, xml = unit_of(file), STATE / f"{file.stem}.log", STATE / f"{file.stem}.xml"
    xml.unlink(missing_ok=True)
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}", str(file)]
    threads = str(max(1, (os.cpu_count() or 1) // run.workers))
    code, seconds = run.command(name, command, until, log, {"OMP_NUM_THREADS": threads})
    if code is None:
        run.note(name, Unit("cut", seconds, "time was up"))
    elif code == 2 and "ModuleNotFoundError" in log.read_text(errors="replace"):
        missing = next(s for s in log.read_text().splitlines() if "ModuleNotFoundError" in s)
        run.note(name, Unit("missing", seconds, missing.strip("E ")[:160]))
    else:
        run.note(name, Unit("failed" if code else "ok", seconds, counts(xml) or last_line(log)))


def counts(xml: Path) -> str:
    """Tests that passed, failed and were skipped; the first that failed by name."""
    if not xml.exists():
        return ""
    suite = next(ElementTree.parse(xml).iter("testsuite"))
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    said = f"{total - failed - skipped} passed"
    said += f", {skipped} skipped" if skipped else ""
    if failed:
        bad = [
            c for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None
        ]
        said += f", {failed} failed: {', '.join(c.get('name', '') for c in bad[:3])}"
    return said


def bench(run: Run) -> None:
    until = run.stage("bench")
    for file in sorted(ROOT.glob("python/bitfuse_tools/bench/suites/[!_]*.py")):
        name, log = f"bench {file.stem}", STATE / f"bench_{file.stem}.log"
        if run.done(name):
            continue
        command = [PYTHON, "-m", "bitfuse", "bench", file.stem, "--quick"]
        command += ["--results", str(ROOT / "benchmarks" / "results")]
        code, seconds = run.command(name, command, until, log)
        run.note(name, Unit("cut" if code is None else "failed" if code else "ok", seconds, last_line(log)))


def tune(run: Run) -> None:
    name, log = "tune", STATE / "tune.log"
    if run.done(name):
        return
    until = run.stage("tune")
    minutes = max(0.2, (until - time.monotonic()) / 60 - 0.3)
    command = [PYTHON, "-m", "bitfuse", "tune", "--minutes", f"{minutes:.2f}"]
    code, seconds = run.command(name, command, until, log)
    run.note(name, Unit("cut" if code is None else "failed" if code else "ok", seconds, last_line(log)))


def sanitize(run: Run) -> None:
    until = run.stage("sanitize")
    tool = shutil.which("compute-sanitizer")
    for kind, file, which in SANITIZED:
        name, log = f"{kind} {file}", STATE / f"{kind}-{Path(file).stem}.log"
        if run.done(name):
            continue
        if tool is None:
            run.note(name, Unit("missing", 0.0, "compute-sanitizer is not on PATH"))
            continue
        each = min(until, time.monotonic() + (until - time.monotonic()) / 2)
        command = [tool, "--tool", kind, "--error-exitcode", "3", PYTHON, "-m", "pytest", "-q", "-x"]
        command += [file, "-k", which]
        code, seconds = run.command(name, command, each, log)
        summary = [s for s in log.read_text(errors="replace").splitlines() if "SUMMARY" in s]
        said = summary[-1].strip("= ") if summary else last_line(log)
        run.note(name, Unit("cut" if code is None else "failed" if code else "ok", seconds, said))


STAGES = {"build": build, "tests": tests, "bench": bench, "tune": tune, "sanitize": sanitize}


def device() -> Iterator[str]:
    """The GPU's name, then its driver's version; ends the program where there is no GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        sys.exit("make gpu: no NVIDIA GPU is here (nvidia-smi does not answer); `make test` needs none")
    yield from found.strip().splitlines()[0].split(", ")


def report(run: Run, name: str, driver: str, out: Path | None) -> int:
    """The short table, last; the same as JSON. 1 if a unit failed."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    results = ROOT / "benchmarks" / "results" / slug
    units = {n: asdict(u) for n, u in sorted(run.units.items())}
    write(results / "gpu.json", {"device": name, "driver": driver, "sources": run.file.stem, "units": units})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(results.glob("*.json")):
            shutil.copy(file, out / file.name)
    print(f"\n{name}, driver {driver}; {time.monotonic() - run.started:.0f} s")
    for status in ("ok", "missing", "cut", "failed"):
        of = {n: u for n, u in run.units.items() if u.status == status}
        print(f"{status:8s} {len(of):3d}" + ("" if status == "ok" else f"  {', '.join(of)[:300]}"))
    for unit_name, unit in run.units.items():
        if unit.status == "failed":
            print(f"  {unit_name}: {unit.said}")
    return int(any(u.status == "failed" for u in run.units.values()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="in this order")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it (9.5)")
    parser.add_argument("--workers", type=int, default=min(8, max(1, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--again", action="store_true", help="also what ended before")
    parser.add_argument("--out", type=Path, help="folder for a copy of the results")
    parser.add_argument("--list", action="store_true", help="what has been done for these sources, and end")
    args = parser.parse_args()
    run = Run(args.minutes, args.again, args.workers)
    if args.list:
        for name, unit in run.units.items():
            print(f"{name:48s} {unit.status:8s} {unit.seconds:6.1f} s  {unit.said}")
        return 0
    name, driver = device()
    try:
        for stage in args.stages:
            STAGES[stage](run)
    except KeyboardInterrupt:
        print("interrupted: what ended is kept", file=sys.stderr)
        return 130
    return report(run, name, driver, args.out)


if __name__ == "__main__":
    sys.exit(main())

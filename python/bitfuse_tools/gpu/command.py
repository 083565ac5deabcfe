"""`python benchmarks/gpu.py`: its options, the order of it all, and how it ends."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from . import plan
from .folder import Folder
from .run import Run, Stopped, stop_on_signals
from .units import MISSING, ROOT, Ended, execute, last_line

RESERVE = 20.0  # seconds at the end, for the table
SUFFIXES = (".py", ".h", ".hpp", ".cpp", ".cu", ".cuh")


def sources() -> str:
    """A hash of what results depend on."""
    made = hashlib.sha256()
    for folder in ("csrc", "kernels", "python", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                made.update(f"{path.relative_to(ROOT)}\0".encode())
                made.update(path.read_bytes())
    return made.hexdigest()[:16]


def _parsed(doc: str, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="what it leaves (build/gpu)")
    parser.add_argument("--work", type=Path, help="kernels and caches that need not outlive it (OUT/work)")
    parser.add_argument("--kernels", type=Path, nargs="+", default=[], help="bundles of `bitfuse compile`")
    parser.add_argument("--stages", nargs="+", choices=plan.STAGES, default=list(plan.STAGES))
    parser.add_argument("--families", nargs="+", help="smoke of these only, such as attention:cuda")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it (9.5)")
    parser.add_argument("--workers", type=int, help="units at once, where several may run (half the cores)")
    parser.add_argument("--again", action="store_true", help="also what ended before")
    parser.add_argument("--list", action="store_true", help="what has been done for these sources, and end")
    parser.add_argument("--table", type=Path, metavar="DIR", help="print the table of a folder, and end")
    parser.add_argument("--rehearse", action="store_true", help="on the simulator, small: no figure of a GPU")
    args = parser.parse_args(arguments)
    if args.minutes <= 0:
        parser.error(f"--minutes is {args.minutes:g}, expected more than 0")
    return args


def main(doc: str, arguments: list[str]) -> int:
    args = _parsed(doc, arguments)
    out = args.out.resolve()
    if args.table is not None:
        command = [sys.executable, plan.ENTRY, "--unit", "bitfuse_tools.gpu.table", str(args.table.resolve())]
        return subprocess.run(command).returncode
    folder = Folder(out, sources(), args.again)
    if args.list:
        for name, outcome in folder.units.items():
            print(f"{name:44s} {outcome}")
        return 0
    if not args.rehearse and shutil.which("nvidia-smi") is None:
        print(
            "make gpu: no NVIDIA GPU is here (there is no nvidia-smi); `make test` needs none",
            file=sys.stderr,
        )
        return 1
    work = (args.work or out / "work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    place = plan.Place(work, out, args.workers * 2 if args.workers else plan.cores(), args.rehearse)
    kernels = [str(path.resolve()) for path in args.kernels]
    environment = {"BITFUSE_CACHE": str(work / "cache")}
    paths = [str(ROOT / "python"), *([str(ROOT / "tests")] if args.rehearse else [])]
    run = Run(folder, args.minutes, environment, kernels, paths)
    stop_on_signals()
    stopped = None
    try:
        if (ended := _facts(run, place)) is not None:
            print(f"make gpu: {last_line(ended.error) or 'the GPU does not answer'}", file=sys.stderr)
            return 1
        found = folder.facts
        run.kernels += [] if args.rehearse else list(place.kernels)
        place = plan.Place(
            place.work, out, place.cores, place.rehearse, found.get("cuda") is None,
            tuple(args.families) if args.families else plan.families(found.get("families")),
        )  # fmt: skip
        for stage in plan.STAGES:
            run.known(plan.units(stage, place))  # also of a stage that ran before
        for stage in args.stages:
            share = plan.SHARES[stage] * (run.end - run.started)
            until = min(run.end - RESERVE, time.monotonic() + share)
            run.stage(plan.units(stage, place), plan.workers(stage, place), until)
    except Stopped as why:
        stopped = str(why)
        print(f"stopped by {stopped}: what ended is kept", file=sys.stderr)
    return _report(run, place) or (130 if stopped else 0)


def _facts(run: Run, place: plan.Place) -> Ended | None:
    """None where there is a GPU: what it is, is in the folder then."""
    unit = plan.facts(place)
    ended = execute(list(unit.command), run.environment(unit), min(unit.limit, run.end - time.monotonic()))
    try:
        run.folder.facts = json.loads(ended.out)
    except ValueError:
        return ended
    print(f"{time.monotonic() - run.started:6.0f} s  {last_line(ended.error)}", flush=True)
    return None if ended.code == 0 else ended if ended.code == MISSING else None


def _report(run: Run, place: plan.Place) -> int:
    """The table, last, what was left out and what failed; 1 if anything of ours did."""
    unit = plan.table(place)
    left = max(RESERVE, run.end - time.monotonic())
    ended = execute(list(unit.command), run.environment(unit), min(unit.limit, left))
    lines = [ended.out.rstrip() if ended.code == 0 else f"no table: {last_line(ended.error)}", ""]
    units = run.folder.units
    for status in dict.fromkeys(["ok", *(u.status for u in units.values())]):
        names = [name for name, u in units.items() if u.status == status]
        lines.append(f"{status:8s} {len(names):3d}" + ("" if status == "ok" else f"  {', '.join(names)}"))
    bad = {
        name: u for name, u in units.items() if u.status in ("wrong", "crashed", "hung", "stuck", "failed")
    }
    lines += [f"  {name}: {outcome}" for name, outcome in bad.items()]
    if without := run.left_out():
        lines.append(f"left out of what followed: {', '.join(without)}")
    facts = run.folder.facts
    lines.append(
        f"{facts.get('device')}, driver {facts.get('driver')}; {time.monotonic() - run.started:.0f} s"
    )
    text = "\n".join(lines) + "\n"
    print(f"\n{text}", end="", flush=True)
    run.folder.text("report.txt", text)
    if run.folder.trouble is not None:
        print(f"make gpu: not everything is written: {run.folder.trouble}", file=sys.stderr)
    return int(bool(bad) or run.folder.trouble is not None)

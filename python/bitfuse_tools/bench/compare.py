"""Two sets of results, case by case, with their noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import ResultsError, latest, load_all, shown
from .suites import SUITES
from .table import columns, milliseconds

Measurements = dict[tuple[str, Any], tuple[dict[str, Any], dict[str, Any]]]  # by op and key: row, run


@dataclass(frozen=True)
class Change:
    """One case in both.

    Attributes:
        op, case, dtype, sizes: which; own: whether bitfuse computes it.
        before, after: median, p20 and p80, milliseconds.
        machine: how much faster the machine itself was measured after than before, at what bounds this case;
            None where that is not known.
    """

    op: str
    case: str
    dtype: str
    sizes: dict[str, Any]
    own: bool
    before: tuple[float, float, float]
    after: tuple[float, float, float]
    machine: float | None

    @property
    def ratio(self) -> float:
        """After over before: above 1 is slower."""
        return self.after[0] / self.before[0]

    @property
    def verdict(self) -> str:
        """ "slower" or "faster" where p20 to p80 of both do not meet, else "same"."""
        if self.after[1] > self.before[2]:
            return "slower"
        return "faster" if self.after[2] < self.before[1] else "same"

    @property
    def regression(self) -> bool:
        return self.own and self.verdict == "slower"


def read(where: str, ops: list[str], results: Path) -> Measurements:
    """The last measurement of each case in a file, in a folder, or at a commit that the files of `results`
    hold.

    Args:
        where: a path, or the first characters of a commit, four at least.
        ops: only these.

    Raises:
        ResultsError: nothing of that name, a file that is not sound.
    """
    path = Path(where)
    if path.is_file():
        files, commit = [path], ""
    elif path.is_dir():
        files, commit = _files(path, ops), ""
        if not files:  # the folder of all devices, as `bitfuse report` takes it
            devices = sorted(below for below in path.iterdir() if below.is_dir() and _files(below, ops))
            if len(devices) > 1:
                names = ", ".join(below.name for below in devices)
                raise ResultsError(f"{where} holds several devices' results: name one of {names} in it")
            files = [file for below in devices for file in _files(below, ops)]
    else:
        files, commit = _files(results, ops) if results.is_dir() else [], where
    found: Measurements = {}
    commits = set()
    for file in files:
        for record in load_all(file):
            if record["op"] not in ops:
                continue
            commits |= {str(run.get("commit")) for run in record["runs"]}
            runs = [run for run in record["runs"] if str(run.get("commit")).startswith(commit)]
            if len(commit) >= 4 or not commit:
                found |= {(record["op"], key): value for key, value in latest(runs).items()}
    if not found and commit:
        known = ", ".join(sorted(commits - {"None"})) or "none"
        raise ResultsError(
            f"{where} is no file or folder, and no commit in {shown(results)} (those there: {known})"
        )
    if not found:
        raise ResultsError(f"{where} holds no results of {', '.join(ops)}")
    return found


def _files(folder: Path, ops: list[str]) -> list[Path]:
    return [folder / f"{op}.json" for op in SUITES if op in ops and (folder / f"{op}.json").is_file()]


def compare(before: Measurements, after: Measurements) -> list[Change]:
    """Every case that both have, in the order of `after`."""
    found = []
    for place, (row, run) in after.items():
        if place not in before:
            continue
        old, old_run = before[place]
        found.append(
            Change(
                place[0],
                row["case"],
                row["dtype"],
                row["sizes"],
                row.get("who", row["case"].split()[0]) == "bitfuse",
                (old["median_ms"], old["p20_ms"], old["p80_ms"]),
                (row["median_ms"], row["p20_ms"], row["p80_ms"]),
                _machine(row, old_run, run),
            )
        )
    return found


def _machine(row: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """The ratio of what a machine was measured to do, of the rate that bounds a row."""

    def rate(run: dict[str, Any]) -> float | None:
        # the loops beside that run: the ceiling is the machine's, of any moment
        limits = run.get("limits", {})
        loops = [limits["measured"][n] for n in ("before", "after") if n in limits.get("measured", {})]
        memory = row.get("bound", "memory") == "memory"
        rates = [
            each.get("bytes_per_s") if memory else each.get("flop_per_s", {}).get(row["dtype"])
            for each in loops or [limits]
        ]
        return max((found for found in rates if found), default=None)

    old, new = rate(before), rate(after)
    return new / old if old and new else None


def as_lines(changes: list[Change], alone: int) -> list[str]:
    """The table, and how it ends. `alone`: cases that only one of both has."""
    table = [["op", "case", "before", "after", "after / before", "p20-p80 before", "p20-p80 after", ""]]
    for c in changes:
        sizes = " ".join(f"{name}={value}" for name, value in c.sizes.items())
        spans = [f"{milliseconds(t[1])}-{milliseconds(t[2])}" for t in (c.before, c.after)]
        table.append(
            [
                c.op, f"{c.case} {c.dtype}, {sizes}", milliseconds(c.before[0]), milliseconds(c.after[0]),
                f"{c.ratio:.3f}", *spans, c.verdict,
            ]
        )  # fmt: skip
    counts = {v: sum(c.verdict == v for c in changes) for v in ("slower", "faster", "same")}
    lines = columns(table, left=2) if changes else []
    lines.append("")
    lines.append(
        f"{len(changes)} cases: {counts['slower']} slower, {counts['faster']} faster, {counts['same']} the "
        "same (p20 to p80 of both meet)" + (f"; {alone} in one of both only" if alone else "")
    )
    drifts = [c.machine for c in changes if c.machine is not None and not 0.9 < c.machine < 1.1]
    if drifts:
        lines.append(
            f"the machine itself was measured at {min(drifts):.2f} to {max(drifts):.2f} times its rates of "
            f"before for {len(drifts)} of these cases: what differs by as much may not be the code's"
        )
    return lines


def as_json(changes: list[Change], alone: int) -> dict[str, Any]:
    return {
        "schema": 2,
        "cases": [
            {**vars(c), "ratio": c.ratio, "verdict": c.verdict, "regression": c.regression} for c in changes
        ],
        "alone": alone,
    }

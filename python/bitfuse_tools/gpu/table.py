"""The last table: each figure of a run's folder beside what `bitfuse explain` predicted for that GPU, and
beside the floor, the time that bytes and FLOPs take at the data sheet's rates.

    benchmarks/gpu.py --table DIR [DEVICE]

Needs no GPU. What is off by more than a quarter is marked. DEVICE: whose predictions, if not the folder's
GPU.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitfuse  # noqa: F401  the ops declare themselves
from bitfuse.core.backends import BackendError, use_backend
from bitfuse.core.cost import as_time
from bitfuse.core.explain import Explanation
from bitfuse.core.gpus import Gpu, find

from ..bench.table import columns
from ..bench.timing import DTYPES
from ..hypothetical import Sizes, explain_sizes
from .sweep import summary

OFF = 0.25


@dataclass(frozen=True)
class Line:
    """A figure.

    Attributes:
        what: op, case and sizes.
        seconds: measured; predicted, floor: None where nobody says.
        peer: how often it runs while the fastest peer runs once; None without peers.
    """

    what: str
    seconds: float
    predicted: float | None
    floor: float
    peer: float | None

    @property
    def off(self) -> float:
        """Measured over predicted."""
        return self.seconds / self.predicted if self.predicted else 1.0

    @property
    def mark(self) -> str:
        if self.predicted is None or 1 / (1 + OFF) <= self.off <= 1 + OFF:
            return ""
        return "slower than predicted" if self.off > 1 else "faster than predicted"


def sizes_of(op: str, row: dict[str, Any]) -> Sizes | None:
    """A row of results as the sizes that `explain` takes; None for one that it has none for."""
    s, names = dict(row["sizes"]), {"length": "kv_len", "dim": "head_dim"}
    if s.pop("direction", "forward") != "forward" or s.pop("window", 0) or "pages" in row["case"]:
        return None
    given = {names.get(name, name): value for name, value in s.items()}
    known = {name: given[name] for name in given if name in Sizes.__dataclass_fields__}
    if len(known) < len(given) or row["dtype"] not in DTYPES:
        return None
    if row.get("format") is not None:
        known["cache" if op == "decode_attention" else "format"] = row["format"]
    return Sizes(**known, dtype=DTYPES[row["dtype"]])


def predicted(op: str, row: dict[str, Any], gpu: Gpu) -> Explanation | None:
    """What `explain` says of a row's call by its backend."""
    sizes = sizes_of(op, row)
    if sizes is None or row.get("backend") not in ("cuda", "triton"):
        return None
    with contextlib.suppress(ValueError, TypeError, BackendError), use_backend(row["backend"]):
        return explain_sizes(op, sizes, gpu)
    return None


def lines(records: list[dict[str, Any]], gpu: Gpu) -> Iterator[Line]:
    """Of every row of bitfuse on a GPU."""
    for record in records:
        latest = {_key(row): (row, run) for run in record["runs"] for row in run["rows"]}
        for row, _ in latest.values():
            if row.get("who", row["case"].split()[0]) != "bitfuse":
                continue
            said = predicted(record["op"], row, gpu)
            flop_per_s = 1e12 * (gpu.float_tflop_per_s if row["dtype"] == "float32" else gpu.tflop_per_s)
            floor = max(row.get("bytes", 0) / (gpu.gb_per_s * 1e9), row.get("flops", 0) / flop_per_s)
            sizes = " ".join(f"{name}={value}" for name, value in row["sizes"].items())
            name = row["case"].removeprefix("bitfuse ")
            yield Line(
                f"{record['op']} {name} {row['dtype']} {sizes}", row["median_ms"] / 1e3,
                None if said is None or said.prediction is None else said.prediction.seconds, floor,
                min(row["ratio"].values()) if row["ratio"] else None,
            )  # fmt: skip


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["case"], row["dtype"], tuple(sorted(row["sizes"].items()))


def as_text(found: list[Line]) -> list[str]:
    table = [["", "measured", "predicted", "measured / predicted", "floor", "of the floor", "x peer", ""]]
    for line in found:
        table.append(
            [
                line.what, as_time(line.seconds), as_time(line.predicted) if line.predicted else "-",
                f"{line.off:.2f}" if line.predicted else "-", as_time(line.floor),
                f"{line.floor / line.seconds:.0%}", f"{line.peer:.2f}" if line.peer else "-", line.mark,
            ]
        )  # fmt: skip
    said = [line for line in found if line.predicted]
    off = sum(bool(line.mark) for line in said)
    return [*columns(table, left=1), "", f"{len(said)} predictions, {off} of them off by more than {OFF:.0%}"]


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    state = json.loads((folder / "gpu.json").read_text())
    name = arguments[1] if len(arguments) > 1 else str((state.get("facts") or {}).get("device"))
    try:
        gpu = find(name)
    except ValueError:
        print(f"no predictions for {name}: those of the H200 stand here")
        gpu = find("h200")
    with contextlib.suppress(OSError):
        records = json.loads((folder / "bench.json").read_text())
        print(*as_text(list(lines(records, gpu))), sep="\n")
    with contextlib.suppress(OSError):
        for kind, found in json.loads((folder / "sweeps.json").read_text()).items():
            best = summary(found)
            told = [f"{kind}: {len(best)} cases where another cut beats the rule's by more than 3%"]
            print(*told, *(f"  {line}" for line in best), sep="\n")
    return 0

"""From files of results to figures, checked: what a page can draw is finite and positive."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bitfuse.core.json_files import brief, finite, read_json

from ..bench import limits, results
from ..bench.limits import Limits
from ..bench.results import ResultsError, shown
from .figures import Device, OpFigures, Row, Setting, in_order, peer, short

DEMO = "demo.json"  # what `bitfuse demo` wrote, put beside a device's results
# what `make gpu` has done there, the machine's ceiling, what a tiny call costs, a
# whole model: no rows
OTHERS = ("gpu.json", "call_overhead.json", "model.json", limits.FILE)


def default_folder() -> Path:
    """Where `bitfuse bench` puts its results: of every device."""
    return results.folder("any").parent


def load(paths: Sequence[Path], wanted: Sequence[str] = ()) -> list[Device]:
    """The devices whose results lie in these files and folders.

    Args:
        paths: files, folders of a device, or folders of such folders.
        wanted: parts of devices' names; empty for all.

    Raises:
        ResultsError: a file that can't be read, is not whole or of another layout; nothing found; a wanted
            device that is not there. One line, with the way out.
    """
    files = sorted(dict.fromkeys(file.resolve() for path in paths for file in _files(path)))
    by_folder: dict[Path, list[Path]] = {}
    for file in files:
        by_folder.setdefault(file.parent, []).append(file)
    devices = [device for folder, inside in by_folder.items() if (device := _device(folder, inside))]
    if not devices:
        said = ", ".join(map(shown, paths))
        raise ResultsError(
            f"no results in {said}; `bitfuse bench` makes some, or name a folder that has them"
        )
    if not wanted:
        return devices
    chosen = []
    for name in wanted:
        found = [d for d in devices if name.lower() in (d.slug, d.name.lower())]
        found = found or [d for d in devices if name.lower() in d.slug or name.lower() in d.name.lower()]
        if not found:
            raise ResultsError(
                f"no device {name!r} in these results; there are {', '.join(d.slug for d in devices)}"
            )
        chosen += [device for device in found if device not in chosen]
    return chosen


def _files(path: Path) -> Iterable[Path]:
    if path.is_dir():
        found = [f for f in path.glob("**/*.json") if not f.name.startswith(".") and f.name not in OTHERS]
        return [file for file in found if file.is_file()]  # no folder, no pipe, no link to nothing
    if not path.is_file():
        what = "is no file" if path.exists() or path.is_symlink() else "is not there"
        raise ResultsError(f"{shown(path)} {what}; name files or folders of results")
    return [path]


def _device(folder: Path, files: Sequence[Path]) -> Device | None:
    demo = None
    records: dict[Path, dict[str, Any]] = {}
    for file in files:
        if file.name == DEMO:
            demo = _demo(file)
        else:
            records[file] = results.load(file)
    # one ceiling for all ops of a machine, whichever of its files are shown
    ceiling = limits.of_records(records.values(), limits.load(folder))
    ops: list[OpFigures] = []
    for file, found in records.items():
        try:
            figures = _op(found, ceiling)
        except KeyError as error:  # of what `bitfuse bench --compare` does without
            said = f"{error} is missing"
            raise ResultsError(f"{shown(file)} is damaged: {said}; measure again, or move it away") from None
        if figures.rows:
            ops.append(figures)
    ops.sort(key=lambda figures: in_order(figures.op))
    # a folder's name may be bytes that are no text
    slug = folder.name.encode(errors="replace").decode()
    name = next((found["device"] for found in records.values()), slug)
    return Device(slug, name, ops, demo, ceiling) if ops or demo else None


def _op(found: dict[str, Any], ceiling: Limits) -> OpFigures:
    """The last measurement of each case, with the runs that these come from."""
    runs = found["runs"]
    newest = {id(run): len(runs) - 1 - at for at, run in enumerate(runs)}
    latest = results.latest(runs).values()
    used = sorted({newest[id(run)] for _, run in latest})
    rows = [
        _row(
            {**row, "ratio": _ratios(row, (other for other, of in latest if of is run))},
            used.index(newest[id(run)]),
            ceiling,
        )
        for row, run in latest
    ]
    return OpFigures(found["op"], rows, [_setting(runs[len(runs) - 1 - at], ceiling) for at in used])


def _ratios(row: dict[str, Any], rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The ratios of a row by peer; to a package that was measured beside it in a file from before its ratio
    was taken round by round, that of the medians. Whoever was measured is told, also where it is faster."""
    found = {peer(name): value for name, value in row["ratio"].items()}
    if row["who"] != "bitfuse":
        return found
    known = " ".join(found).lower()
    for other in rows:
        beside = all(other.get(key) == row.get(key) for key in ("dtype", "sizes", "model", "layer"))
        if beside and other["who"] not in ("bitfuse", "torch") and other["who"] not in known:
            mode = re.search(r"\((\w+) activations\)", other["case"])
            name = short(f"{other['who']} {mode[1]}") if mode else other["who"]
            found[name] = other["median_ms"] / row["median_ms"]
    return found


def _row(row: dict[str, Any], run: int, ceiling: Limits) -> Row:
    """Of a row whose fields `results.load` has checked, where they are there."""
    share, bound = ceiling.share(row["gb_per_s"], row["tflop_per_s"], row["dtype"])
    # a row from before schema 2 does not say where its data lay; beyond the ceiling it was a cache
    cached = bound == "memory" and (row.get("in_cache") is True or (share or 0) > 1)
    place = {key: row[key] for key in ("model", "layer") if row.get(key) is not None}
    return Row(
        case=row["case"],
        dtype=row["dtype"],
        own=row["who"] == "bitfuse",
        place={**place, **row["sizes"]},
        median_ms=row["median_ms"],
        p20_ms=row["p20_ms"],
        p80_ms=row["p80_ms"],
        gb_per_s=row["gb_per_s"],
        tflop_per_s=row["tflop_per_s"],
        share=None if cached else share,
        cached=cached,
        ratio=row["ratio"],
        error=row.get("error"),
        peak_bytes=row.get("peak_bytes"),
        run=run,
    )


def _setting(run: dict[str, Any], ceiling: Limits) -> Setting:
    run["limits"]["bytes_per_s"], run["limits"]["flop_per_s"]
    return Setting(
        date=run.get("date"),
        commit=run.get("commit") or "unknown",
        driver=run.get("driver"),
        isa=run.get("isa"),
        threads=run.get("threads"),
        versions={name: version for name, version in run["versions"].items() if version},
        bytes_per_s=ceiling.bytes_per_s.value if ceiling.bytes_per_s else None,
        flop_per_s={dtype: reached.value for dtype, reached in ceiling.flop_per_s.items()},
        overhead_us=dict(run.get("overhead_us") or {}),
    )


def _demo(file: Path) -> dict[str, Any]:
    """What `bitfuse demo` wrote, as far as it is told here."""
    try:
        found = read_json(file)
        languages = set(found["rows"][0]["quality"])
        if not found["rows"] or "English" not in languages:
            raise ValueError("no row has the quality in English")
        for row in found["rows"]:
            _word("name", row["name"])
            finite("linear_bytes", row["linear_bytes"])
            finite("batch_ms", row["batch_ms"]["median"], least=1e-9)
            finite("sentence_ms", row["sentence_ms"]["median"], least=1e-9)
            if set(row["quality"]) != languages:
                raise ValueError("the rows have not the same languages")
            for quality in row["quality"].values():
                finite("cosine_mean", quality["cosine_mean"], -1.01, 1.01)
                finite("cosine_worst", quality["cosine_worst"], -1.01, 1.01)
        for name in ("model", "created"):
            _word(name, found[name])
        for name in ("threads", "batch_size", "batch_tokens"):
            finite(name, found[name])
        _word("commit", found["machine"]["commit"] or "unknown")
    except FileNotFoundError:
        raise ResultsError(f"{shown(file)} is not there") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ResultsError(
            f"{shown(file)} is no whole record of `bitfuse demo` ({brief(error)}); `bitfuse demo` makes one"
        ) from None
    return dict(found)


def _word(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError(f"{name} is {brief(value)}, expected a word")

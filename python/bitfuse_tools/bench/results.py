"""Files of results: one an op and device, `benchmarks/results/<device>/<op>.json`.

    {"schema": 2, "op": "lowbit_linear", "device": "AMD EPYC family 26, 2 cores", "runs": [run, ...]}

A run, the newest last:

    date            UTC, ISO 8601; of a run from before schema 2 the date of its commit
    commit          of the tree, "+changes" where the tree differs from it; None outside of a repository
    command         what was typed; None before schema 2
    driver          of the GPU, or None
    versions        by package; None for one that is not installed
    threads         of torch
    pinned          whether each thread stayed on a core of its own
    isa             instruction-set level of the C++ kernels, None on a GPU
    effort          rounds, budget (seconds a sample), patience (most seconds a sample waits for quiet cores),
                    cold_mb (MiB that a chain of layers streams)
    cache_bytes     of the last-level cache
    limits          bytes_per_s and flop_per_s (by dtype): the shares' ceiling, the largest of those in
                    `measured` (before, after: a sum, a copy and matmuls beside the table; rows: the best row;
                    known: the machine's ceiling so far, as limits.py keeps it)
    overhead_us     microseconds of a tiny call, by who makes it
    interrupted     whether Ctrl-C ended it
    rows            see below
    not_timed       [{case, dtype, sizes, reason, failed}]: what could not run here, and what should have

A row:

    case, dtype     who computes it, and with what; of x
    who             "bitfuse", or the peer: "torch", "bitsandbytes", "onnxruntime", "peft", ...
    backend, format of bitfuse, or None
    sizes           what is computed: {"m": 1, "n": 4096, ...}; case, dtype and sizes tell a row from another
    model, layer    whose sizes these are: "llama3-8b", "qkv"; None where no model was named
    layers          of the chain
    median_ms       a layer; with p20_ms and p80_ms of all samples, every round counting as much as another
    rounds_ms       the median of each round
    gb_per_s, tflop_per_s      of the bytes that a layer must move, and of its FLOPs
    bytes, flops    these
    share_of_limit  of the ceiling as it was known then; None where the bytes are what bounds it, but lie in a
                    cache. `bitfuse report` divides by the machine's ceiling of now instead
    bound           "memory" or "arithmetic"
    in_cache        whether a chain reads less than twice what the last-level cache holds
    timed_by        "wall clock", "CUDA graph" or "CUDA events"
    others          share of the cores that other processes took while it was sampled, the rounds' median
    error           |got - exact| / |exact| (Euclidean) against the same call in float64 at error_sizes, the
                    largest of its outputs; for sample and speculative_sample the share of tokens that differ;
                    None where there is nothing to compare with
    peak_bytes      of a call, beyond what was there before it; peak_by: whose count it is ("torch's CPU
                    allocator", "max_memory_allocated")
    ratio           how often this runs while a peer runs once, by peer, the median of the rounds' ratios

Rows from before schema 2 lack what was not measured then. A file keeps the last `KEEP` measurements of each
case.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitfuse.core.json_files import JsonError, brief, finite, read_json

SCHEMA = 2
KEEP = 5
ROOT = Path(__file__).resolve().parents[3]  # of the source tree, when this is one


class ResultsError(Exception):
    """A file of results that can't be read or written; the message is one line and tells the way out."""


def folder(device: str) -> Path:
    """Where the results of a device lie: in the source tree, or below the current folder outside of one."""
    tree = ROOT / "benchmarks"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return (tree if tree.is_dir() else Path("benchmarks")) / "results" / slug


def shown(path: Path) -> str:
    """A path as a person would type it."""
    with contextlib.suppress(ValueError, OSError, RuntimeError):  # links in a circle, a folder that is gone
        path = path.resolve().relative_to(Path.cwd())
    return str(path).encode(errors="backslashreplace").decode()


def key(row: dict[str, Any]) -> tuple[str, str, tuple[tuple[str, Any], ...]]:
    """What tells a row from another."""
    return row["case"], row["dtype"], tuple(sorted(row["sizes"].items()))


def load(path: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        ResultsError: it is not there, not whole, of another layout or of a later bitfuse.
    """
    found = _read(path)
    name = shown(path)
    if not isinstance(found, dict) or ("rows" not in found and "runs" not in found):
        raise ResultsError(f"{name} holds no benchmark's results; name a file that `bitfuse bench` wrote")
    schema = found.get("schema")
    if schema is None:
        raise ResultsError(
            f"{name} is of the layout before schema {SCHEMA}; `bitfuse bench --migrate {name}` rewrites it, "
            "figures kept"
        )
    if schema != SCHEMA:
        raise ResultsError(
            f"{name} has schema {brief(schema)}, bitfuse here reads {SCHEMA}; upgrade bitfuse or move it"
        )
    if reason := _fault(found):
        raise ResultsError(f"{name} is damaged: {reason}; {_way_out(path)}")
    return found


def load_all(path: Path) -> list[dict[str, Any]]:
    """A file of results, or the list of them that `bitfuse bench --json FILE` writes.

    Raises:
        ResultsError: as of `load`.
    """
    found = _read(path)
    if not isinstance(found, list):
        return [load(path)]
    for record in found:
        if not isinstance(record, dict) or record.get("schema") != SCHEMA or _fault(record):
            raise ResultsError(f"{shown(path)} is a list of something else than results of schema {SCHEMA}")
    return found


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise ResultsError(f"{shown(path)} is not there") from None
    except JsonError as error:
        said = str(error).replace("is not JSON", "is not whole JSON", 1)
        raise ResultsError(f"{shown(path)} {said}; {_way_out(path)}") from None


def read_if_there(path: Path) -> Any:
    """What a file of JSON holds; None where there is none.

    Raises:
        ResultsError: it can't be read, or is not whole.
    """
    return _read(path) if path.exists() else None


def _way_out(path: Path) -> str:
    return f"`git checkout -- {shown(path)}` may have it whole, else move it away"


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _fault(found: dict[str, Any]) -> str | None:
    """What is wrong with a file of this schema; None for a sound one: whoever reads it finds every field of
    the kind that this page's head tells, and numbers that can be drawn."""
    try:
        for name, kind in (("op", str), ("device", str), ("runs", list)):
            if not isinstance(found.get(name), kind):
                raise ValueError(f"{name!r} is {brief(found.get(name))}")
        _word("'device'", found["device"])
        if not re.fullmatch(r"\w{1,80}", found["op"]):
            raise ValueError(f"'op' is {brief(found['op'])}, expected the name of an op")
        for i, run in enumerate(found["runs"]):
            if not isinstance(run, dict) or not isinstance(run.get("rows"), list):
                raise ValueError(f"run {i} has no rows")
            _check(f"run {i}", run, _RUN)
            if "limits" in run:
                _check_limits(f"run {i}", run["limits"])
            for j, row in enumerate(run["rows"]):
                where = f"row {j} of run {i}"
                if not isinstance(row, dict):
                    raise ValueError(f"{where} is {brief(row)}")
                if missing := [name for name in NEEDED if name not in row]:
                    raise ValueError(f"{where} has no {missing[0]}")
                _check(where, row, _ROW)
        as_text(found)  # a number that is none, wherever it stands, can't be written again
    except ValueError as error:
        return str(error)
    return None


def _check(where: str, found: dict[str, Any], fields: Mapping[str, Kind]) -> None:
    for name, kind in fields.items():
        if name in found:
            try:
                kind(name, found[name])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None


def _check_limits(where: str, limits: Any) -> None:
    try:
        _limits("limits", limits)
        for name, each in limits.get("measured", {}).items():
            _limits(name, each)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{where}: limits: {error}") from None


def finite_rate(name: str, value: Any) -> float:
    """Bytes or FLOP a second.

    Raises:
        ValueError: none of them.
    """
    return finite(name, value, 1, 1e21)


def _limits(name: str, limits: Any) -> None:
    if not isinstance(limits, dict):
        raise ValueError(f"{name} is {brief(limits)}, expected rates by name")
    least = 0 if name == "rows" else 1  # rows that fit a cache read nothing, some compute nothing
    if "bytes_per_s" in limits:
        finite("bytes_per_s", limits["bytes_per_s"], least, 1e18)
    _mapping(_number(least, 1e21))("flop_per_s", limits.get("flop_per_s", {}))


# what a field may hold

Kind = Callable[[str, Any], Any]


def _number(least: float = 0.0, most: float = 1e15, none: bool = False) -> Kind:
    def check(name: str, value: Any) -> None:
        if not (none and value is None):
            finite(name, value, least, most)

    return check


def _word(name: str, value: Any) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= 1000:
        raise ValueError(f"{name} is {brief(value)}, expected a word")


def _maybe_word(name: str, value: Any) -> None:
    if value is not None:
        _word(name, value)


def _mapping(kind: Kind) -> Kind:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {brief(value)}, expected values by name")
        for key, each in value.items():
            _word(f"a name in {name}", key)
            kind(f"{name} of {brief(key)}", each)

    return check


def _size(name: str, value: Any) -> None:
    if isinstance(value, str):
        if len(value) > 1000:
            raise ValueError(f"{name} is {brief(value)}, expected a word")
    elif value is not None and not isinstance(value, bool):
        finite(name, value, -1e15, 1e15)


NEEDED = ("case", "dtype", "sizes", "median_ms", "p20_ms", "p80_ms", "ratio")
_ROW: dict[str, Kind] = {
    "case": _word,
    "dtype": _word,
    "who": _word,
    "backend": _maybe_word,
    "format": _maybe_word,
    "sizes": _mapping(_size),
    "model": _maybe_word,
    "layer": _maybe_word,
    **dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), _number(1e-9, 1e12)),
    **dict.fromkeys(("gb_per_s", "tflop_per_s"), _number(0, 1e9)),
    **dict.fromkeys(("bytes", "flops"), _number(0, 1e24, none=True)),
    "share_of_limit": _number(0, 1e12, none=True),
    "bound": _maybe_word,
    **dict.fromkeys(("error", "peak_bytes"), _number(0, 1e30, none=True)),
    "ratio": _mapping(_number(1e-9, 1e9)),
}
_RUN: dict[str, Kind] = {
    **dict.fromkeys(("date", "commit", "command", "driver", "isa"), _maybe_word),
    "versions": _mapping(_maybe_word),
    "threads": _number(0, 1e6, none=True),
    "overhead_us": _mapping(_number(0, 1e12)),
}


def write(path: Path, record: Any) -> None:
    """Written aside, then renamed: a reader never sees half a file.

    Raises:
        ResultsError: no permission, no room.
    """
    text = as_text(record)
    aside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        aside = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        aside.chmod(mode)
        aside.replace(path)
    except OSError as error:
        if aside is not None:
            aside.unlink(missing_ok=True)
        raise ResultsError(
            f"{shown(path)} can't be written: {_said(error)}; `--json -` prints figures, `--results DIR` "
            "puts them elsewhere"
        ) from None


def as_text(record: Any) -> str:
    """JSON, a row a line."""
    rows: list[str] = []

    def aside(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {k: aside(v, k) for k, v in value.items()}
        if isinstance(value, list) and name in ("rows", "not_timed"):
            rows.extend(json.dumps(row, allow_nan=False) for row in value)
            return [f"\0{i}" for i in range(len(rows) - len(value), len(rows))]
        return [aside(v) for v in value] if isinstance(value, list) else value

    text = json.dumps(aside(record), indent=1, allow_nan=False)
    return re.sub(r'"\\u0000(\d+)"', lambda found: rows[int(found[1])], text) + "\n"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check(path: Path, device: str) -> None:
    """Before anything is measured: that a run of this device can be appended to this file.

    Raises:
        ResultsError: it can't.
    """
    if path.exists():
        found = load(path)
        if found["device"] != device:
            raise ResultsError(
                f"{shown(path)} has results of {brief(found['device'])}, this is {device!r}; `--results DIR` "
                "names a folder for this device"
            )
    check_place(path)


def check_place(path: Path) -> None:
    """That a file can be written here.

    Raises:
        ResultsError: it can't.
    """
    if path.is_dir():
        raise ResultsError(f"{shown(path)} is a folder, expected the name of a file")
    parent = path.resolve().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "is not a folder" if not existing.is_dir() else "may not be written to"
        raise ResultsError(f"{shown(existing)} {what}; `--results DIR` names another folder")


def append(path: Path, op: str, device: str, run: dict[str, Any]) -> None:
    """Add a run to a file; of each case the last `KEEP` measurements stay.

    Raises:
        ResultsError: the file is not sound, or can't be written.
    """
    runs = load(path)["runs"] if path.exists() else []
    write(path, {"schema": SCHEMA, "op": op, "device": device, "runs": _last([*runs, run])})


def _last(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs, less the rows that were measured `KEEP` times since, less the runs of which none are left."""
    seen: Counter[tuple[Any, ...]] = Counter()
    kept: list[dict[str, Any]] = []
    for run in reversed(runs):
        rows = []
        for row in run["rows"]:
            seen[key(row)] += 1
            if seen[key(row)] <= KEEP:
                rows.append(row)
        if rows or not run["rows"]:
            kept.append({**run, "rows": rows})
    return kept[::-1]


def latest(runs: list[dict[str, Any]]) -> dict[Any, tuple[dict[str, Any], dict[str, Any]]]:
    """Of each case the last measurement: its row and its run, by `key`."""
    return {key(row): (row, run) for run in runs for row in run["rows"]}


# the layout before schema 2: one run a file, {op, device, threads, isa, versions, commit, cold_mb, ...}


def migrate(path: Path) -> bool:
    """Rewrite a file of the layout before schema 2, every figure kept; False when it is of schema 2 already.

    Raises:
        ResultsError: it holds no benchmark's results, or can't be read or written.
    """
    old = _read(path)
    if isinstance(old, dict) and old.get("schema") == SCHEMA:
        load(path)
        return False
    if not (isinstance(old, dict) and isinstance(old.get("op"), str) and isinstance(old.get("rows"), list)):
        raise ResultsError(f"{shown(path)} holds no benchmark's results; name a file that a benchmark wrote")
    rename = _RENAMED.get(old["op"], _plain)
    try:
        rows = [_migrated(row, rename) for row in old["rows"]]
        limits = {**old["limits"], "measured": {"before": old["limits"]}}
        run = {
            "date": _date(old["commit"]),
            "commit": old["commit"].replace("+", "+changes"),
            "command": None,
            "driver": None,
            "versions": {k: None if v == "not installed" else v for k, v in old["versions"].items()},
            "threads": old["threads"],
            "pinned": False,
            "isa": old["isa"],
            "effort": {"cold_mb": old["cold_mb"]},
            "limits": limits,
            "overhead_us": old["overhead_us"],
            "interrupted": False,
            "rows": rows,
            "not_timed": [],
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(f"{shown(path)} is damaged: {brief(error)}; {_way_out(path)}") from None
    found = {"schema": SCHEMA, "op": old["op"], "device": old["device"], "runs": [run]}
    if reason := _fault(found):
        raise ResultsError(f"{shown(path)} is damaged: {reason}; {_way_out(path)}")
    write(path, found)
    return True


def _date(commit: str) -> str | None:
    """Of a commit of this repository, UTC; None where there is none."""
    when = "--date=format-local:%Y-%m-%dT%H:%M:%SZ"
    command = ["git", "-C", str(ROOT), "show", "-s", "--format=%cd", when, commit.rstrip("+")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "TZ": "UTC"}
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


_MEASURED = (
    "case", "dtype", "layers", "median_ms", "p20_ms", "p80_ms", "gb_per_s", "tflop_per_s", "share_of_limit",
    "ratio",
)  # fmt: skip
Rename = Callable[[str, dict[str, Any]], str]


def _migrated(row: dict[str, Any], rename: Rename) -> dict[str, Any]:
    measured = {name: row[name] for name in _MEASURED}
    sizes = {name: value for name, value in row.items() if name not in _MEASURED}
    case = rename(row["case"], sizes)
    words = case.split()
    who = {"PEFT,": "peft", "base": "bitfuse", "loop": "torch"}.get(words[0], words[0])
    backend = "cpp" if "(cpp)" in case else None
    known = {"case": case, "who": who, "backend": backend, "model": None, "layer": sizes.pop("name", None)}
    return {**measured, **known, "sizes": sizes, "timed_by": "wall clock"}


def _plain(case: str, sizes: dict[str, Any]) -> str:
    return case


def _of_multi_lora(case: str, sizes: dict[str, Any]) -> str:
    """ "bitfuse int4 zipf" said the mix; it is one of the sizes now."""
    who, format, *mix = case.split()
    sizes["mix"] = mix[0] if mix else "none"
    if who == "loop" or (who, format) == ("base", "dense"):
        return f"{who} {format}"
    return f"{who} {format} (cpp)"


def _of_attention(case: str, sizes: dict[str, Any]) -> str:
    sizes["direction"] = "training" if sizes.pop("backward") else "forward"
    return "bitfuse (cpp)" if case == "bitfuse" else case


def _of_decode(case: str, sizes: dict[str, Any]) -> str:
    sizes.update(heads=32, kv_heads=8, head_dim=128)
    return f"{case} (cpp)" if case.startswith("bitfuse") else case


def _of_adamw(case: str, sizes: dict[str, Any]) -> str:
    return f"{case} (cpp)" if case.startswith("bitfuse") else case


_RENAMED: dict[str, Rename] = {
    "multi_lora_linear": _of_multi_lora,
    "attention": _of_attention,
    "decode_attention": _of_decode,
    "adamw8bit": _of_adamw,
}

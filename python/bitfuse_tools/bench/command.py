"""`bitfuse bench`, without its parsing of options: checks, a progress bar, tables, files."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitfuse.core.backends import BACKENDS
from bitfuse.core.declaration import declared
from bitfuse.ops.attention.kv_cache import CACHE_FORMATS
from bitfuse.weights.formats import FORMATS

from . import compare, limits, results, table
from .cases import Setting, split_format
from .measure import Session, effort_for
from .shapes import DEFAULT, find
from .suites import SUITES
from .timing import DTYPES, device_name

PEERS = ("torch", "bitsandbytes", "onnxruntime", "peft", "flash-attn", "flashinfer", "liger")
DIRECTIONS = ("forward", "gradient", "training")


@dataclass(frozen=True)
class Options:
    """As they are typed; lists are words with commas between."""

    ops: tuple[str, ...] = ()
    shapes: str | None = None
    dtype: str | None = None
    format: str | None = None
    backend: str | None = None
    against: str | None = None
    m: str | None = None
    direction: str | None = None
    device: str | None = None
    quick: bool = False
    rounds: int | None = None
    threads: int | None = None
    json: str | None = None
    results: Path | None = None

    def command(self) -> str:
        """What to type for the same figures; where they go is left out."""
        words = ["bitfuse", "bench", *self.ops]
        for name in (
            "shapes",
            "dtype",
            "format",
            "backend",
            "against",
            "m",
            "direction",
            "device",
            "rounds",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None:
                words += [f"--{name}", Path(value).name if name == "shapes" else str(value)]
        return shlex.join([*words, *(["--quick"] if self.quick else [])])


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        interrupted: by Ctrl-C.
        failed: cases of bitfuse that broke.
    """

    interrupted: bool = False
    failed: int = 0


def known_ops(ops: tuple[str, ...]) -> list[str]:
    """In the order of SUITES; all when none is named.

    Raises:
        ValueError: no such op.
    """
    if wrong := [op for op in ops if op not in SUITES]:
        raise ValueError(f"no op {wrong[0]!r}; ops: {', '.join(SUITES)}")
    return [op for op in SUITES if not ops or op in ops]


def setting_of(options: Options) -> Setting:
    """
    Raises:
        ValueError: a name or a number that there is not; the message is one line.
    """
    formats = _words("format", options.format)
    for format in formats or ():
        name, _ = split_format(format)
        if name not in (*FORMATS, *CACHE_FORMATS, "dense"):
            known = dict.fromkeys((*FORMATS, *CACHE_FORMATS, "dense"))
            raise ValueError(f"no format {name!r}; formats: {', '.join(known)}")
    against = _words("against", options.against, (*PEERS, "none"))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no GPU here")
    return Setting(
        device=device,
        shape=DEFAULT if options.shapes is None else find(options.shapes),
        dtypes=_words("dtype", options.dtype, tuple(DTYPES)),
        formats=formats,
        backends=_words("backend", options.backend, BACKENDS),
        against=None if against is None else tuple(a for a in against if a != "none"),
        m=_numbers("m", options.m),
        directions=_words("direction", options.direction, DIRECTIONS),
        quick=options.quick,
    )


def _words(option: str, text: str | None, known: tuple[str, ...] | None = None) -> tuple[str, ...] | None:
    if text is None:
        return None
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise ValueError(f"{option} is empty")
    for word in words:
        if known is not None and word not in known:
            raise ValueError(f"no {option} {word!r}; expected {', '.join(known)}")
    return words


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    words = _words(option, text)
    if words is None:
        return None
    if wrong := [w for w in words if not (w.isascii() and w.isdigit() and 1 <= int(w) <= 1 << 20)]:
        raise ValueError(f"{option} is {wrong[0]!r}, expected numbers from 1 to 2^20")
    return tuple(int(word) for word in words)


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """Sets the number of steps, and takes what `Session` tells; on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task("", total=None)
    with bar:
        yield bar, task


def run(options: Options) -> Outcome:
    """Measure, print the tables, write the files: after each op, and when Ctrl-C ends the run.

    Raises:
        ValueError: an option that is wrong.
        ResultsError: a file that can't be read or written; what was measured is on the screen.
    """
    ops = known_ops(options.ops)
    setting = setting_of(options)
    if options.rounds is not None and not 1 <= options.rounds <= 1000:
        raise ValueError(f"rounds is {options.rounds}, expected 1 to 1000")
    if options.threads is not None:
        if not 1 <= options.threads <= 1024:
            raise ValueError(f"threads is {options.threads}, expected 1 to 1024")
        torch.set_num_threads(options.threads)
    device = device_name(setting.device)
    into = options.results
    if into is None and options.json is None and not options.quick:
        into = results.folder(device)
    elif into is not None:
        into = into / results.folder(device).name
    known = limits.of_folder(into or results.folder(device))
    with _progress() as (bar, task):
        session = Session(
            setting,
            effort_for(setting.device, options.quick, rounds=options.rounds),
            lambda text, done: bar.update(task, description=text, completed=done),
            known.ceiling(),
        )
        ops = _measurable(session, ops, bool(options.ops))
        if into is not None:
            for op in ops:
                results.check(into / f"{op}.json", device)
        if options.json not in (None, "-"):
            results.check_place(Path(str(options.json)))
        bar.update(task, total=session.steps(ops))
        outcome, records = Outcome(), []
        screen = sys.stderr if options.json == "-" else sys.stdout
        for op in ops:
            found = session.run(op, options.command())
            outcome.interrupted = found["interrupted"]
            outcome.failed += sum(line["failed"] for line in found["not_timed"])
            print(*table.of_run(op, found), sep="\n", file=screen, flush=True)
            if found["rows"]:
                records.append({"schema": results.SCHEMA, "op": op, "device": device, "runs": [found]})
                if into is not None:
                    results.append(into / f"{op}.json", op, device, found)
                    limits.keep(into)
                    print(f"written: {results.shown(into / f'{op}.json')}", file=screen, flush=True)
            if outcome.interrupted:
                break
    if options.json == "-":
        sys.stdout.write(results.as_text(records))
        sys.stdout.flush()
    elif options.json is not None:
        results.write(Path(options.json), records)
        print(f"written: {results.shown(Path(options.json))}", flush=True)
    elif into is None and records:
        print("not written: a quick look; --results DIR or --json FILE keeps it", flush=True)
    return outcome


def _measurable(session: Session, ops: list[str], asked: bool) -> list[str]:
    """Those ops that have something to measure; when one that was asked for has not, the error says why."""
    found, reasons = [], []
    for op in ops:
        try:
            session.cases(op)
            found.append(op)
        except ValueError as error:
            if asked:
                raise
            reasons.append(str(error))
    if not found:
        raise ValueError(reasons[0])
    return found


def run_compare(options: Options, before: str, after: str) -> tuple[list[str], dict[str, Any], int]:
    """The lines, the JSON, and how many cases of bitfuse are slower beyond the noise.

    Raises:
        ValueError: no such op.
        ResultsError: nothing of that name, a file that is not sound, no case in both.
    """
    ops = known_ops(options.ops)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = results.folder(device_name(device))
    if options.results is not None:
        folder = options.results / folder.name
    old, new = (compare.read(where, ops, folder) for where in (before, after))
    changes = compare.compare(old, new)
    if not changes:
        raise results.ResultsError(f"{before} and {after} have no case in common")
    alone = len(old.keys() ^ new.keys())
    slower = sum(change.regression for change in changes)
    return compare.as_lines(changes, alone), compare.as_json(changes, alone), slower


def listed() -> list[str]:
    """Every op, what it computes, and the models by name."""
    from .shapes import SHAPES

    lines = table.columns([[op, declared(op).summary] for op in SUITES], left=2)
    return [*lines, "", f"shapes: {', '.join(SHAPES)}, or a .json file", f"peers: {', '.join(PEERS)}"]

"""The demo's results: as tables on the terminal, as JSON, and on disk all or nothing."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .embedder import DemoError
from .measure import Quality, Timing
from .sentences import LANGUAGES, TRIPLES

MEGA = 1e6  # bytes of an MB, as file sizes are counted
UNSTEADY = 1.5  # p80 over p20: more than this is another program's doing
WIDTH = 112  # columns that the tables take


@dataclass(frozen=True)
class Row:
    """One variant of the model and all that was measured of it."""

    name: str
    format: str | None
    runs_in: str
    layers: int
    few_bit_layers: int
    linear_bytes: int
    model_bytes: int
    weight_error: float
    batch_ms: Timing
    sentence_ms: Timing
    quality: dict[str, Quality]
    backend: str
    backend_layers: dict[str, int]
    backends_refused: dict[str, str]


@dataclass(frozen=True)
class Results:
    """The table, and where its numbers come from. The first two rows are fp32 and bf16."""

    created: str
    machine: dict[str, Any]
    device: str
    threads: int
    model: str
    parameters: int
    batch_size: int
    batch_tokens: int
    sentence_tokens: int
    seconds: float
    rows: tuple[Row, ...]

    @property
    def baselines(self) -> tuple[Row, Row]:
        return self.rows[0], self.rows[1]

    @property
    def where(self) -> str:
        """The device by its name."""
        name = next((d["name"] for d in self.machine["devices"] if d["device"] == self.device), self.device)
        return f"{name}, {self.threads} threads" if self.device == "cpu" else str(name)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, with ratios and the sentences: no reader has to compute or to look elsewhere."""
        fp32, bf16 = self.baselines
        plain = {k: v for k, v in asdict(self).items() if k != "rows"}
        plain["rows"] = [
            asdict(row)
            | {
                "linear_compression": fp32.linear_bytes / row.linear_bytes,
                "model_compression": fp32.model_bytes / row.model_bytes,
                "batch_speedup": {b.name: b.batch_ms.median / row.batch_ms.median for b in (fp32, bf16)},
                "sentence_speedup": {
                    b.name: b.sentence_ms.median / row.sentence_ms.median for b in (fp32, bf16)
                },
            }
            for row in self.rows
        ]
        plain["sentences"] = {lang: [asdict(t) for t in TRIPLES if t.language == lang] for lang in LANGUAGES}
        return plain


def print_results(results: Results, console: Console) -> None:
    """Two tables, size and speed then quality, and what their columns mean."""
    fp32, bf16 = results.baselines
    last_float = [row for row in results.rows if row.format is None][-1]
    console.print(
        f"\n[bold]{results.model}[/], {results.parameters / MEGA:.1f} M parameters, on {results.where}\n"
    )

    table = _table("Size and speed", "format", "served by")
    _right(table, "linears\nMB", "\n1/", "model\nMB", "\n1/")
    for what in (f"batch of {results.batch_size}", "1 sentence"):
        _right(table, f"{what}\nms [p20-p80]", "vs\nfp32", "vs\nbf16")
    for row in results.rows:
        cells = []
        for own, whole in ((row.linear_bytes, fp32.linear_bytes), (row.model_bytes, fp32.model_bytes)):
            cells += [f"{own / MEGA:.1f}", f"{whole / own:.1f}"]
        for own_ms, *floats in (
            (row.batch_ms, fp32.batch_ms, bf16.batch_ms),
            (row.sentence_ms, fp32.sentence_ms, bf16.sentence_ms),
        ):
            cells += [_milliseconds(own_ms), *(f"{ms.median / own_ms.median:.2f}" for ms in floats)]
        table.add_row(row.name, f"{row.backend}, {row.runs_in}", *cells, end_section=row is last_float)
    console.print(table)
    rounds = fp32.batch_ms.rounds
    console.print(
        f"linears: the {fp32.layers} linear layers with their scales and biases. model: all parameters and "
        "buffers, embeddings and norms too, in the dtype that the row runs in. 1/: times smaller than fp32. "
        f"ms: median of {rounds} interleaved rounds; the batch is English sentences, {results.batch_tokens} "
        f"tokens with padding, the sentence has {results.sentence_tokens}. vs: how many times as fast.\n",
        style="dim",
        highlight=False,
    )

    table = _table("Quality", "format")
    for language in LANGUAGES:
        _right(table, f"{language}\ncosine", "\nworst", "para-\nphrase", "near\nmiss", "unre-\nlated")
    _right(table, "para.\nfirst", "as in\nfp32")
    for row in results.rows:
        cells = []
        for language in LANGUAGES:
            q = row.quality[language]
            cells += [f"{q.cosine_mean:.5f}", f"{q.cosine_worst:.5f}"]
            cells += [f"{mean:.3f}" for mean in (q.paraphrase, q.near_miss, q.unrelated)]
        every = row.quality.values()
        total = sum(q.triples for q in every)
        cells += [f"{sum(q.first for q in every)}/{total}", f"{sum(q.order_kept for q in every)}/{total}"]
        table.add_row(row.name, *cells, end_section=row is last_float)
    console.print(table)
    anchors = len(TRIPLES)
    console.print(
        "cosine, worst: mean and lowest cosine of a sentence's embedding to its fp32 embedding. paraphrase, "
        f"near miss, unrelated: mean cosine within such pairs; there are {2 * anchors} pairs, a paraphrase "
        f"and a near miss around each of {anchors} anchors. para. first: anchors nearer to their paraphrase "
        "than to their near miss (some are hard for the float model too). as in fp32: anchors whose two "
        "pairs come in fp32's order.",
        style="dim",
        highlight=False,
    )
    _print_warnings(results, console)


def _print_warnings(results: Results, console: Console) -> None:
    """Loud when plain PyTorch served or the times are unsteady: they then say nothing of the kernels."""
    for row in results.rows:
        if 0 < row.few_bit_layers < row.layers:
            few = f"{row.few_bit_layers} of {row.layers} linear layers"
            console.print(
                f"\n{row.name}: {few}; the others have sizes that do not fit it, and stay float",
                style="yellow",
            )
    slow = [row for row in results.rows if "reference" in row.backend_layers]
    if slow:
        names = ", ".join(row.name for row in slow)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in slow[0].backends_refused.items())
        console.print(
            f"\n{names}: served by plain PyTorch, which is slow and no measure of a kernel ({reasons}).",
            style="yellow",
            highlight=False,
        )
    if any(t.p80 > UNSTEADY * t.p20 for row in results.rows for t in (row.batch_ms, row.sentence_ms)):
        console.print("\nThe times are unsteady: something else was running. Measure again.", style="yellow")


def _table(title: str, *left: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    for heading in left:
        table.add_column(heading, no_wrap=True)
    return table


def _right(table: Table, *headings: str) -> None:
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)


def _milliseconds(t: Timing) -> str:
    digits = 2 if t.median < 10 else 1 if t.median < 100 else 0
    return f"{t.median:.{digits}f} [{t.p20:.{digits}f}-{t.p80:.{digits}f}]"


def check_writable(folder: Path) -> None:
    """Raise DemoError, before the work and leaving no trace, for a folder that can't be written to."""
    at = folder.absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    if not at.is_dir():
        raise DemoError(f"--out {folder}: {at} is not a folder")
    try:
        tempfile.TemporaryFile(dir=at).close()
    except OSError as error:
        raise DemoError(f"--out {folder}: can't write to {at}: {error.strerror or error}") from error


def save(folder: Path, files: dict[str, Callable[[Path], object]]) -> list[Path]:
    """Write every file aside, then rename them all: a run that fails leaves the files of the run before."""
    made: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in files.items():
            target = folder / name
            aside = target.with_name(f".{os.getpid()}.{name}")
            made.append((aside, target))
            write(aside)
        for aside, target in made:
            os.replace(aside, target)
    except OSError as error:
        raise DemoError(f"--out {folder}: {error.strerror or error}") from error
    finally:
        for aside, _ in made:
            aside.unlink(missing_ok=True)
    return [target for _, target in made]


def write_json(results: Results) -> Callable[[Path], object]:
    """What `save` calls with the path of the JSON."""
    text = json.dumps(results.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")

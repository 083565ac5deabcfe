"""The demo: a real sentence model in few bits, what it saves and what it costs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from bitfuse.weights.formats import FORMATS
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .. import info
from .embedder import DemoError, Embedder, find_model, load, need_extra
from .measure import (
    BackendUse,
    Quality,
    Variant,
    backends_used,
    embed_triples,
    few_bit_variant,
    float_variant,
    linear_names,
    parse_format,
    quality,
    short,
    time_interleaved,
)
from .report import WIDTH, Results, Row, check_writable, print_results, save, write_json
from .sentences import LANGUAGES, TRIPLES

__all__ = ["DTYPES", "DemoError", "Options", "run"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
JSON_NAME, CHART_NAME = "results.json", "chart.png"


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        formats: names of `bitfuse.weights.formats.FORMATS`, with another group size after a colon, "int4:32".
        device: "cpu", "cuda" or "cuda:1".
        model: folder of a local transformers model; None is the packaged all-MiniLM-L6-v2.
        out: folder of results.json and chart.png.
        batch_size: sentences of a batch.
        threads: CPU threads of torch; None leaves them as they are.
        dtype: activations of the few-bit models: a name of `DTYPES`, or "auto" for what the float model runs
            faster in.
        seconds: time for timing; at least 5 rounds are done whatever it says.
    """

    formats: tuple[str, ...] = ("int8", "int4", "nf4", "fp8")
    device: str = "cpu"
    model: Path | None = None
    out: Path = Path("demo")
    batch_size: int = 32
    threads: int | None = None
    dtype: str = "auto"
    seconds: float = 40.0


def run(options: Options, console: Console | None = None) -> Results:
    """Measure, print the tables and save them.

    Raises:
        DemoError: an option that can't be served, a package or a model that is missing; nothing is written.
    """
    console = console or Console(width=max(WIDTH, Console().width))
    _check(options)
    need_extra()
    device = _device(options.device)
    info.require_asked_backend(device)
    folder = find_model(options.model)
    check_writable(options.out)
    from .chart import write_chart

    with cpu_threads(options.threads), quiet_fallback(), _steps(len(options.formats)) as step:
        results = _measure(options, device, folder, step)
        step("saving", 0.0)
        saved = save(options.out, {JSON_NAME: write_json(results), CHART_NAME: write_chart(results)})
    print_results(results, console)
    console.print(f"\nin {results.seconds:.0f} s; saved {' and '.join(map(str, saved))}", highlight=False)
    return results


def _check(options: Options) -> None:
    if not options.formats:
        raise DemoError("--formats is empty, expected " + ", ".join(FORMATS))
    for name in options.formats:
        try:
            parse_format(name)
        except ValueError as error:
            raise DemoError(f"--formats has {name!r}: {error}") from error
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise DemoError(f"--dtype is {options.dtype!r}, expected auto, {', '.join(DTYPES)}")
    if not 0 <= options.seconds < float("inf"):
        raise DemoError(f"--seconds is {options.seconds:g}, expected 0 or more")
    if options.batch_size < 1:
        raise DemoError(f"--batch-size is {options.batch_size}, expected at least 1")
    if options.threads is not None and options.threads < 1:
        raise DemoError(f"--threads is {options.threads}, expected at least 1")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DemoError(f"--device is {name!r}, expected cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise DemoError(f"--device is {name!r}, expected cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise DemoError(f"--device is {name!r}, but torch sees {count or 'no'} GPU{'s' if count > 1 else ''}")
    return torch.device("cuda", device.index or 0)


def _measure(
    options: Options, device: torch.device, folder: Path, step: Callable[[str, float], None]
) -> Results:
    start = time.perf_counter()
    step("loading the model", 1.0)
    base, embedder = load(folder, device)
    if not linear_names(base):
        raise DemoError(f"{folder}: a {type(base).__name__} has no torch.nn.Linear layers to quantise")
    english = [s for t in TRIPLES if t.language == "English" for s in (t.anchor, t.paraphrase, t.near_miss)]
    batch = embedder.tokens([english[i % len(english)] for i in range(options.batch_size)])
    sentence = embedder.tokens(english[:1])

    variants = [float_variant(base, torch.float32), float_variant(base, torch.bfloat16)]
    if options.dtype == "auto":
        step("choosing a dtype", 1.0)
        dtype = _faster_dtype(variants, embedder, batch, device)
    else:
        dtype = DTYPES[options.dtype]
    if dtype not in [v.dtype for v in variants]:
        variants.append(float_variant(base, dtype))
    for name in options.formats:
        step(f"quantising to {name}", 1.0)
        variants.append(few_bit_variant(base, name, dtype))

    qualities: list[dict[str, Quality]] = []
    uses: list[BackendUse] = []
    embeddings: list[dict[str, torch.Tensor]] = []
    for variant in variants:
        step(f"embedding {3 * len(TRIPLES)} sentences", 1.0 if variant.format else 0.0)
        embeddings.append(embed_triples(variant, embedder, options.batch_size))
        qualities.append({lang: quality(embeddings[-1][lang], embeddings[0][lang]) for lang in LANGUAGES})
        uses.append(backends_used(variant, embedder, batch))

    passes = [_pass(embedder, v, tokens) for tokens in (batch, sentence) for v in variants]
    told = 0.0

    def tick(share: float) -> None:
        nonlocal told
        step("timing, interleaved", _TIMING_STEPS * (share - told))
        told = share

    timings = time_interleaved(passes, device, seconds=options.seconds, tick=tick)
    rows = tuple(
        Row(
            name=v.name,
            format=v.format,
            runs_in=short(v.dtype),
            layers=len(v.linear_names),
            few_bit_layers=len(v.few_bit_names),
            linear_bytes=v.linear_bytes,
            model_bytes=v.model_bytes,
            weight_error=v.weight_error,
            batch_ms=timings[i],
            sentence_ms=timings[i + len(variants)],
            quality=qualities[i],
            backend=str(uses[i]) if v.format else "torch",
            backend_layers=dict(uses[i].layers),
            backends_refused=uses[i].refused,
        )
        for i, v in enumerate(variants)
    )
    return Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=info.collect(probe=False),
        device=str(device),
        threads=torch.get_num_threads(),
        model=embedder.name,
        parameters=sum(p.numel() for p in base.parameters()),
        batch_size=options.batch_size,
        batch_tokens=batch["input_ids"].numel(),
        sentence_tokens=sentence["input_ids"].numel(),
        seconds=time.perf_counter() - start,
        rows=rows,
    )


def _pass(embedder: Embedder, variant: Variant, tokens: dict[str, torch.Tensor]) -> Callable[[], object]:
    return lambda: embedder.embed(variant.model, tokens)


def _faster_dtype(
    variants: list[Variant], embedder: Embedder, batch: dict[str, torch.Tensor], device: torch.device
) -> torch.dtype:
    """What the float model runs faster in: much of a few-bit model is float, on the same units."""
    timings = time_interleaved(
        [_pass(embedder, v, batch) for v in variants], device, warm_up=1, rounds=3, at_least=3
    )
    return min(zip(timings, variants, strict=True), key=lambda pair: pair[0].median)[1].dtype


_TIMING_STEPS = 12.0  # of the bar: about what the timing takes beside a format's two steps


@contextmanager
def _steps(formats: int) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr: `step(what, share)` says what is done now and moves on by `share` steps.

    Where stderr is no terminal, each new step is a line.
    """
    console = Console(stderr=True)
    said = ""
    columns = TextColumn("{task.description:<32}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=2 + 2 * formats + _TIMING_STEPS)

        def step(what: str, share: float) -> None:
            nonlocal said
            if not console.is_terminal and what != said:
                console.print(what, highlight=False)
            said = what
            progress.update(task, description=what, advance=share)

        yield step


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_fallback() -> Iterator[None]:
    """The tables say which backend ran: the log need not say it in the middle of the bar."""
    logger = logging.getLogger("bitfuse")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

"""Fine-tuning end to end: a few-bit model, LoRA, 8-bit AdamW, a task, and what it cost (QLoRA; Dettmers et
al., 2023)."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from bitfuse.checkpoints import save_peft
from rich.console import Console

from .. import info
from ..demo import cpu_threads, quiet_fallback
from ..demo.embedder import DemoError, find_model, load, need_extra
from ..demo.measure import parse_format
from ..demo.report import WIDTH, check_writable, save
from .chart import draw
from .messages import TRAINING
from .report import Results, print_results
from .training import BATCH_SIZE, OPTIMIZERS, Recipe, Run, few_bit, train

__all__ = ["ADAPTER_FILES", "CHART_NAME", "JSON_NAME", "DemoError", "Options", "run"]

JSON_NAME, CHART_NAME = "finetune.json", "loss.png"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        format: of the linear layers: a name of `bitfuse.weights.formats.FORMATS`, with another group size
            after a colon.
        epochs: passes over the training messages.
        steps: batches of 32; None is what `epochs` makes.
        r, alpha, dropout: of the adapters; alpha None is 2 r.
        lr: highest learning rate.
        optimizer: a key of `training.OPTIMIZERS`.
        baseline: train a float32 copy too, with torch.optim.AdamW.
        model: folder of a local transformers model; None is the packaged all-MiniLM-L6-v2.
        out: folder of the adapter, the JSON and the PNG.
        threads: CPU threads of torch; None leaves them as they are.
        seed: of everything that is drawn.
    """

    format: str = "nf4"
    epochs: int = 8
    steps: int | None = None
    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    lr: float = 1e-3
    optimizer: str = "adamw8bit"
    baseline: bool = True
    model: Path | None = None
    out: Path = Path("finetune")
    threads: int | None = None
    seed: int = 0


def run(options: Options, console: Console | None = None) -> Results:
    """Train, print the tables and save adapter, JSON and PNG, all of them or none.

    Raises:
        DemoError: an option that can't be served, a package or a model that is missing; nothing is written.
    """
    console = console or Console(width=max(WIDTH, Console().width))
    recipe = _check(options)
    need_extra()
    folder = find_model(options.model)
    check_writable(options.out)
    with cpu_threads(options.threads), quiet_fallback():
        results = _train(options, recipe, folder)
    saved = _save(options.out, results, options.model)
    print_results(results, console)
    console.print(
        f"\nin {results.seconds:.0f} s; saved {', '.join(map(str, saved))}. The adapter loads with "
        "bitfuse.checkpoints.load_peft_ and with peft.PeftModel.from_pretrained.",
        highlight=False,
    )
    return results


def _check(options: Options) -> Recipe:
    try:
        parse_format(options.format)
    except ValueError as error:
        raise DemoError(f"--format is {options.format!r}: {error}") from error
    if options.optimizer not in OPTIMIZERS:
        raise DemoError(f"--optimizer is {options.optimizer!r}, expected {' or '.join(OPTIMIZERS)}")
    for name in ("epochs", "steps", "r", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise DemoError(f"--{name} is {value}, expected at least 1")
    if options.r > 512:
        raise DemoError(f"--r is {options.r}, expected at most 512")
    for name in ("lr", "alpha"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise DemoError(f"--{name} is {value}, expected more than 0")
    if not 0 <= options.dropout < 1:
        raise DemoError(f"--dropout is {options.dropout}, expected 0 <= dropout < 1")
    if not 0 <= options.seed < 2**63:
        raise DemoError(f"--seed is {options.seed}, expected 0 or more")
    return Recipe(
        steps=options.steps or options.epochs * math.ceil(len(TRAINING) / BATCH_SIZE),
        r=options.r,
        alpha=2.0 * options.r if options.alpha is None else options.alpha,
        lr=options.lr,
        dropout=options.dropout,
        seed=options.seed,
    )


def _train(options: Options, recipe: Recipe, folder: Path) -> Results:
    start = time.perf_counter()
    base, embedder = load(folder, torch.device("cpu"))
    if not any(isinstance(module, torch.nn.Linear) for module in base.modules()):
        raise DemoError(f"{folder}: a {type(base).__name__} has no torch.nn.Linear layers to adapt")
    parameters = sum(p.numel() for p in base.parameters())
    model, format = few_bit(base, options.format)
    runs = [train(f"{options.format} + LoRA", format, model, embedder, options.optimizer, recipe)]
    if options.baseline:
        runs.append(train("float32 + LoRA", None, base, embedder, "adamw", recipe))
    return Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=info.collect(probe=False),
        threads=torch.get_num_threads(),
        model=embedder.name,
        parameters=parameters,
        recipe=recipe,
        runs=tuple(runs),
        seconds=time.perf_counter() - start,
    )


def _save(out: Path, results: Results, model: Path | None) -> list[Path]:
    first: Run = results.runs[0]
    title = f"{results.model}: LoRA on {first.format}, {results.recipe.steps} steps"
    text = json.dumps(results.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with tempfile.TemporaryDirectory() as aside:
        save_peft(first.model, aside, base_model_name_or_path=results.model if model is None else model.name)
        adapter = {name: (Path(aside) / name).read_bytes() for name in ADAPTER_FILES}

    def written(content: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(content)

    return save(
        out,
        {
            **{name: written(content) for name, content in adapter.items()},
            CHART_NAME: lambda path: draw(results.runs, title, path),
            JSON_NAME: written(text.encode()),
        },
    )

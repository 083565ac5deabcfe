"""A fine-tuning's results: as tables on the terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .messages import HELD_OUT, INTENTS, LANGUAGES, TRAINING
from .task import SMOOTHING
from .training import BATCH_SIZE, Recipe, Run

MEGA = 1e6


@dataclass(frozen=True)
class Results:
    """The runs, few-bit first, and where their numbers come from."""

    created: str
    machine: dict[str, Any]
    threads: int
    model: str
    parameters: int
    recipe: Recipe
    runs: tuple[Run, ...]
    seconds: float

    @property
    def loss_ratio(self) -> float | None:
        """The few-bit run's training loss at the end over the baseline's."""
        return self.runs[0].final.objective / self.runs[1].final.objective if len(self.runs) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        plain = {
            name: getattr(self, name)
            for name in ("created", "machine", "threads", "model", "parameters", "seconds", "loss_ratio")
        }
        plain["recipe"] = asdict(self.recipe) | {"batch_size": BATCH_SIZE}
        plain["data"] = {"intents": INTENTS, "training": len(TRAINING), "held_out": len(HELD_OUT)}
        plain["runs"] = [
            {
                name: asdict(value) if name in ("before", "after", "final", "memory") else value
                for name, value in vars(run).items()
                if name != "model"
            }
            for run in self.runs
        ]
        return plain


def print_results(results: Results, console: Console) -> None:
    """Two tables, what was learnt and what it took, and what their columns mean."""
    recipe = results.recipe
    console.print(
        f"\n[bold]{results.model}[/], {results.parameters / MEGA:.1f} M parameters, of which "
        f"{results.runs[0].trainable / MEGA:.2f} M in adapters of rank {recipe.r} were trained for "
        f"{recipe.steps} steps of {BATCH_SIZE} messages\n",
        highlight=False,
    )
    table = _table("Learnt", "", "optimizer")
    _right(table, "training\nloss", "held out\nloss", "accuracy\nbefore", "\nafter")
    _right(table, *(f"{language}\nafter" for language in LANGUAGES), "steps\ns")
    for run in results.runs:
        table.add_row(
            run.name,
            run.optimizer,
            f"{run.final.objective:.4f}",
            f"{run.after.loss:.4f}",
            f"{run.before.accuracy:.1%}",
            f"{run.after.accuracy:.1%}",
            *(f"{run.after.by_language[language]:.1%}" for language in LANGUAGES),
            f"{run.seconds:.1f}",
        )
    console.print(table)
    if results.loss_ratio is not None:
        few, full = results.runs
        console.print(
            f"{few.name} ends at {results.loss_ratio:.3f} of {full.name}'s training loss "
            f"({few.after.loss / full.after.loss:.3f} of the held-out loss), with the same seed and order.",
            highlight=False,
        )
    console.print(
        f"training loss: mean of what was minimised, cross-entropy with labels smoothed by {SMOOTHING}, "
        f"over all {len(TRAINING)} training messages at the end, without dropout. held-out loss: mean "
        f"cross-entropy over {len(HELD_OUT)} messages about other matters. accuracy: held-out messages whose "
        "intent is named rightly; before: by the model as it comes, which compares a message with a sentence "
        "for each intent.\n",
        style="dim",
        highlight=False,
    )
    table = _table("Memory of a step, MB", "")
    kinds = ("weights", "adapters", "gradients", "optimizer", "activations", "total")
    _right(table, *kinds)
    for run in results.runs:
        table.add_row(run.name, *(f"{getattr(run.memory, kind) / MEGA:.2f}" for kind in kinds))
    console.print(table)
    console.print(
        "weights: the frozen parameters and buffers, embeddings and norms too. optimizer: its state. "
        "activations: tensors that autograd keeps for the backward pass of the longest batch, seen by its "
        "saved-tensor hooks; memory that is shared counts once, weights do not count.",
        style="dim",
        highlight=False,
    )


def _table(title: str, *left: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    for heading in left:
        table.add_column(heading, no_wrap=True)
    return table


def _right(table: Table, *headings: str) -> None:
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)

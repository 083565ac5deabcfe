"""The losses as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .training import Run

COLOURS = ("#1f6feb", "#8a8f98")


def draw(runs: Sequence[Run], title: str, path: Path) -> None:
    """The training loss of each run, every step faint and its mean over an epoch's worth of steps strong, and
    memory by kind."""
    # a figure of its own backend, and no pyplot: neither a display nor the caller's figures are touched
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(12, 4.8), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    FigureCanvasAgg(figure)
    curve, memory = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title, fontsize=14, fontweight="bold")
    for run, colour in zip(runs, COLOURS, strict=False):
        steps = range(1, len(run.losses) + 1)
        curve.plot(steps, run.losses, color=colour, alpha=0.3, linewidth=1)
        label = f"{run.name}: held-out accuracy {run.before.accuracy:.0%} to {run.after.accuracy:.0%}"
        curve.plot(steps, smoothed(run.losses), color=colour, linewidth=2.2, label=label)
    curve.set_xlabel("step")
    curve.set_ylim(bottom=0)
    curve.set_title("Training loss, nats", fontsize=11.5, loc="left", fontweight="bold")
    curve.legend(fontsize=9.5, edgecolor="none")

    kinds = ("weights", "adapters", "gradients", "optimizer", "activations")
    height = 0.8 / len(runs)
    for i, (run, colour) in enumerate(zip(runs, COLOURS, strict=False)):
        places = [k + (i - (len(runs) - 1) / 2) * height for k in range(len(kinds))]
        values = [getattr(run.memory, kind) / 1e6 for kind in kinds]
        memory.barh(places, values, height=height * 0.9, color=colour)
        for at, value in zip(places, values, strict=True):
            memory.text(value, at, f"  {value:.2f}", va="center", fontsize=9.5)
    memory.set_yticks(range(len(kinds)), kinds)
    memory.invert_yaxis()
    memory.set_xlim(0, 1.2 * max(getattr(run.memory, kind) / 1e6 for run in runs for kind in kinds))
    memory.set_title("Memory of a step, MB", fontsize=11.5, loc="left", fontweight="bold")
    for axes in (curve, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y" if axes is curve else "x", color="#eaeef2")
        axes.set_axisbelow(True)
    figure.savefig(path, format="png")


def smoothed(losses: Sequence[float], window: int = 8) -> list[float]:
    """The mean of each step's loss and those of up to window - 1 steps before it."""
    return [sum(losses[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(losses))]

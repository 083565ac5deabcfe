"""The table as a bar chart: size, time and what the quantisation costs, a panel each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .measure import Timing
from .report import MEGA, Results, Row
from .sentences import LANGUAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOAT, FEW_BIT, REST = "#8a8f98", "#1f6feb", "#d0d7de"
LANGUAGE_COLOURS = ("#1f6feb", "#e08a00")
EXACT = 1e-7  # 1 - cosine below this is float32 rounding


def write_chart(results: Results) -> Callable[[Path], object]:
    """What `save` calls with the path of the PNG."""
    return lambda path: _draw(results, path)


def _draw(results: Results, path: Path) -> None:
    # a figure of its own backend, and no pyplot: neither a display nor the caller's figures are touched
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = results.rows
    figure = Figure(
        figsize=(13.5, 1.6 + 1.06 * len(rows)),
        dpi=120,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
    )
    FigureCanvasAgg(figure)
    ((size, cost), (batch, sentence)) = figure.subplots(2, 2)
    figure.suptitle(f"{results.model} in few bits, on {results.where}", fontsize=15, fontweight="bold")
    _sizes(size, rows)
    _costs(cost, rows)
    _times(
        batch,
        rows,
        f"Milliseconds: a batch of {results.batch_size} sentences",
        [row.batch_ms for row in rows],
    )
    _times(sentence, rows, "Milliseconds: one sentence", [row.sentence_ms for row in rows])
    torch_version = results.machine["packages"]["torch"]
    versions = f"bitfuse {results.machine['bitfuse']}, torch {torch_version}, {results.created[:10]}"
    figure.supxlabel(versions, fontsize=8.5, color="#57606a", x=0.995, ha="right")
    figure.savefig(path, format="png")


def _names(axes: Axes, rows: Sequence[Row], title: str) -> None:
    """One row a variant, the first on top, with what it runs in below its name."""
    labels = [row.name if row.format is None else f"{row.name}\n{row.runs_in}, {row.backend}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=9.5)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=11.5, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#eaeef2")
    axes.set_axisbelow(True)


def _sizes(axes: Axes, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    linear = [row.linear_bytes / MEGA for row in rows]
    rest = [(row.model_bytes - row.linear_bytes) / MEGA for row in rows]
    axes.barh(places, linear, color=[FLOAT if row.format is None else FEW_BIT for row in rows], height=0.62)
    axes.barh(places, rest, left=linear, color=REST, height=0.62)
    for at, (row, a, b) in enumerate(zip(rows, linear, rest, strict=True)):
        smaller = f"  ({rows[0].linear_bytes / row.linear_bytes:.1f}x smaller)" if at else ""
        axes.text(a + b, at, f"  {a:.1f} + {b:.1f} MB{smaller}", va="center", fontsize=9.5)
    axes.set_xlim(0, 1.4 * max(a + b for a, b in zip(linear, rest, strict=True)))
    _names(axes, rows, "Megabytes: linear layers (coloured) + the rest (light)")


def _times(axes: Axes, rows: Sequence[Row], title: str, timings: Sequence[Timing]) -> None:
    medians = [t.median for t in timings]
    spread = [[t.median - t.p20 for t in timings], [t.p80 - t.median for t in timings]]
    colours = [FLOAT if row.format is None else FEW_BIT for row in rows]
    axes.barh(range(len(rows)), medians, color=colours, height=0.62)
    axes.errorbar(
        medians, range(len(rows)), xerr=spread, fmt="none", ecolor="#24292f", elinewidth=1.2, capsize=3
    )
    for at, t in enumerate(timings):
        text = f"   {t.median:.{2 if t.median < 10 else 1}f} ms" + (
            f"  ({timings[0].median / t.median:.2f}x fp32's speed)" if at else ""
        )
        axes.text(t.p80, at, text, va="center", fontsize=9.5)
    axes.set_xlim(0, 1.7 * max(t.p80 for t in timings))
    _names(axes, rows, f"{title} (median, p20 to p80)")


def _costs(axes: Axes, rows: Sequence[Row]) -> None:
    """Cosines are all close to 1, so their distance from 1 is drawn, on a logarithmic scale."""
    from matplotlib.ticker import FixedLocator, NullLocator

    shown = rows[1:]
    height = 0.36
    ticks: dict[str, Any] = {"marker": "|", "markersize": 11, "markeredgewidth": 2.2}
    for which, (language, colour) in enumerate(zip(LANGUAGES, LANGUAGE_COLOURS, strict=True)):
        places = [at + (which - 0.5) * height for at in range(len(shown))]
        cosines = [(row.quality[language].cosine_mean, row.quality[language].cosine_worst) for row in shown]
        means, worst = (
            [max(1 - cosine, EXACT) for cosine in column] for column in zip(*cosines, strict=True)
        )
        axes.barh(places, means, height=height * 0.92, color=colour, label=language)
        axes.hlines(places, means, worst, color=colour, linewidth=1)
        axes.plot(worst, places, linestyle="none", color=colour, **ticks)
        for at, far, (mean, least) in zip(places, worst, cosines, strict=True):
            axes.text(far, at, f"   {mean:.5f}, worst {least:.5f}", va="center", fontsize=8.5)
    axes.plot([], [], linestyle="none", color=FLOAT, label="worst sentence", **ticks)
    axes.set_xscale("log")
    low = min(1 - row.quality[lang].cosine_mean for row in shown for lang in LANGUAGES)
    high = max(1 - row.quality[lang].cosine_worst for row in shown for lang in LANGUAGES)
    axes.set_xlim(max(low, EXACT) / 3, max(high, EXACT) * 100)
    axes.xaxis.set_major_locator(FixedLocator([10.0**power for power in range(-7, 1)]))
    axes.xaxis.set_minor_locator(NullLocator())
    _names(axes, shown, "1 - cosine to the fp32 embeddings (shorter is better)")
    axes.legend(fontsize=8.5, loc="upper right", framealpha=0.8, edgecolor="none")

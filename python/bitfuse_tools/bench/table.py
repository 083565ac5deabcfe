"""The tables that `bitfuse bench` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines with every column as wide as its widest entry; the first `left` columns are flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def milliseconds(value: float) -> str:
    """Four digits, or to the tenth of a microsecond."""
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:.4g}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def of_run(op: str, run: dict[str, Any]) -> list[str]:
    """Every table of a run, a problem each."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in run["rows"]:
        groups.setdefault(_title(row), []).append(row)
    lines = []
    for title, rows in groups.items():
        lines += ["", f"{op}: {title}", *_table(rows)]
    if groups:
        lines += ["", *_legend(run)]
    reasons: dict[str, dict[str, None]] = {}
    for line in run["not_timed"]:
        mark = "FAILED: " if line["failed"] else ""
        reasons.setdefault(mark + line["reason"], {})[f"{line['case']} {line['dtype']}"] = None
    lines += [f"not timed: {', '.join(cases)}: {reason}" for reason, cases in reasons.items()]
    return lines


def _title(row: dict[str, Any]) -> str:
    sizes = " ".join(f"{name}={value}" for name, value in row["sizes"].items() if name != "mix")
    named = " ".join(filter(None, (row["model"], row["layer"])))
    return f"{named}, {sizes}" if named else sizes


def _table(rows: list[dict[str, Any]]) -> list[str]:
    heads = sorted({name for row in rows for name in row["ratio"]}, key=lambda name: (name == "base", name))
    dtypes = len({row["dtype"] for row in rows}) > 1
    table = [
        [
            "case", "ms", "p20", "p80", "GB/s", "TFLOP/s", "limit", "error", "peak",
            *(f"x {head}" for head in heads),
        ]
    ]  # fmt: skip
    for row in rows:
        mix = f" {row['sizes']['mix']}" if "mix" in row["sizes"] else ""
        share = row["share_of_limit"]
        table.append(
            [
                f"{row['case']}{mix}" + (f", {row['dtype']}" if dtypes else ""),
                *(milliseconds(row[name]) for name in ("median_ms", "p20_ms", "p80_ms")),
                f"{row['gb_per_s']:.1f}",
                f"{row['tflop_per_s']:.3g}" if row["flops"] else "-",
                ("cache" if share is None else f"{share:.0%}") + ("*" if row["in_cache"] and share else ""),
                "-" if row["error"] is None else f"{row['error']:.1e}" if row["error"] else "exact",
                _bytes(row["peak_bytes"]),
                *(f"{row['ratio'][h]:.2f}" if h in row["ratio"] else "" for h in heads),
            ]
        )
    return columns(table)


def _legend(run: dict[str, Any]) -> list[str]:
    limits = run["limits"]
    rates = ", ".join(f"{d} {f / 1e12:.3g} TFLOP/s" for d, f in limits["flop_per_s"].items())
    pinned = ", each on a core of its own" if run["pinned"] else ""
    lines = [
        f"the most that this machine was seen to do: {limits['bytes_per_s'] / 1e9:.1f} GB/s, {rates}; "
        f"{run['threads']} thread{'s' * (run['threads'] > 1)}{pinned}",
        "milliseconds a layer; x: how often it runs while the peer runs once; error: relative, against "
        "float64; peak: bytes that a call takes",
    ]
    if any(row["in_cache"] for row in run["rows"]):
        lines.append("cache, *: what is read is less than twice the last-level cache")
    if (others := max(row["others"] for row in run["rows"])) > 0.1:
        lines.append(f"noise: other processes took up to {others:.0%} of the cores meanwhile")
    lines += [f"a tiny call: {name} {us:.2f} us" for name, us in run["overhead_us"].items()]
    return lines

"""The report: one HTML page with all that it needs inside."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from bitfuse._version import __version__

from ..bench.limits import Reached
from .charts import Figure, figures_of, styles
from .figures import Device, OpFigures, Row, number, percent, said, short, spread, three, times

SPOKEN = 500  # cases; the marks of a larger page leave their words to its tables, to stay small


@dataclass(frozen=True)
class Column:
    """A column of an op's table; `better` is "lower", "higher" or empty, `numeric` sorts by number."""

    head: str
    unit: str = ""
    better: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class OpSection:
    """An op's part of the page."""

    key: str
    op: str
    constants: str
    note: str
    columns: list[Column]
    rows: list[str]
    figures: list[Figure]
    legend: list[dict[str, str]]
    cached: bool


def render(devices: Sequence[Device]) -> str:
    """The page as HTML: no network, readable without a script, on a phone, in the dark and on paper.

    Args:
        devices: what `sources.load` found.
    """
    cases = sum(len(figures.rows) for device in devices for figures in device.ops)
    context = {
        "version": __version__,
        "devices": [_device(device, at, cases <= SPOKEN) for at, device in enumerate(devices)],
    }
    return str(_template().render(context)) + "\n"


@functools.cache
def _template() -> Any:
    # here, so that the README's tables need no templates
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bitfuse_tools.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html.j2")


def _device(device: Device, at: int, spoken: bool) -> dict[str, Any]:
    sections = [_section(figures, f"d{at}-{figures.op}", spoken) for figures in device.ops]
    return {
        "key": f"d{at}",
        "name": device.name,
        "facts": _facts(device),
        "ceilings": _ceilings(device),
        "overview": [_overview(f, s) for f, s in zip(device.ops, sections, strict=True)],
        "ops": sections,
        "demo": _demo(device.demo) if device.demo else None,
    }


def _facts(device: Device) -> list[tuple[str, str]]:
    """The header's lines; where ops were measured apart, the commits and dates of all."""
    setting = device.setting
    if setting is None:
        return []
    settings = [figures.setting for figures in device.ops]
    dates = sorted({s.date[:10] for s in settings if s.date})
    commits = list(dict.fromkeys(s.commit for s in settings))
    facts = [
        ("date", _range(dates) or "not recorded"),
        ("commit", ", ".join(commits)),
        ("driver", setting.driver or ""),
        ("threads", str(setting.threads or "")),
        ("instructions", setting.isa or ""),
    ]
    versions: dict[str, list[str]] = {}
    for each in settings:
        for name, version in each.versions.items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    facts += [(name, ", ".join(found)) for name, found in versions.items()]
    return [(name, value) for name, value in facts if value and value != "not installed"]


def _range(dates: Sequence[str]) -> str:
    return "" if not dates else dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _ceilings(device: Device) -> list[tuple[str, str, str, str]]:
    """The most that was seen on this machine: name, figure, unit, and who reached it when."""

    def who(reached: Reached) -> str:
        return ", ".join(part for part in (short(reached.by), (reached.date or "")[:10]) if part)

    limits = device.limits
    found = []
    if limits.bytes_per_s is not None:
        read = limits.bytes_per_s
        found.append(("memory bandwidth", three(read.value / 1e9), "GB/s", who(read)))
    for dtype, reached in limits.flop_per_s.items():
        found.append((f"{short(dtype)} products", three(reached.value / 1e12), "TFLOP/s", who(reached)))
    return found


def _overview(figures: OpFigures, section: OpSection) -> dict[str, Any]:
    """An op in a line: how far ahead of each peer, how near to the ceiling."""
    gains = []
    for name in figures.peers:
        values = [r.ratio[name] for r in figures.own if name in r.ratio and r.ratio[name] != 1.0]
        if values:
            low, middle, high = spread(values)
            span = f"{times(low)}–{times(high)}×" if times(low) != times(high) else f"{times(low)}×"
            gains.append({"peer": name, "span": span, "median": f"{times(middle)}×"})
    shares = [row.share for row in figures.own if row.share is not None]
    cached = bool(figures.own) and all(row.cached for row in figures.own)
    return {
        "key": section.key,
        "op": figures.op,
        "cases": len(figures.rows),
        "gains": gains,
        "share": f"{percent(spread(shares)[1])}" if shares else "in cache" if cached else "not measured",
        "best": percent(max(shares)) if shares else "",
    }


def _section(figures: OpFigures, key: str, spoken: bool) -> OpSection:
    look = styles(figures)
    columns, cells = _table(figures)
    setting = figures.setting
    commit = f"commit {setting.commit}"
    note = ", ".join(part for part in (commit, f"{setting.date:.10}" if setting.date else "") if part)
    overhead = "; ".join(f"{name} {us:.1f} µs" for name, us in setting.overhead_us.items())
    return OpSection(
        key=key,
        op=figures.op,
        constants=" · ".join(said(k, v) for k, v in figures.constant.items() if v not in (None, "")),
        note=note + (f". A tiny call: {overhead}" if overhead else ""),
        columns=columns,
        rows=cells,
        figures=figures_of(figures, spoken),
        legend=[
            {"classes": style.classes, "mark": style.mark, "name": style.name} for style in look.values()
        ],
        cached=any(row.cached for row in figures.rows),
    )


def _table(figures: OpFigures) -> tuple[list[Column], list[str]]:
    """The columns that this op fills, and its rows as HTML, short: a page may hold thousands of them."""
    rows = figures.rows
    columns = [Column("case", numeric=False), Column("dtype", numeric=False)]
    for key in figures.varying:
        values = [row.place.get(key) for row in rows]
        numeric = all(isinstance(v, int | float | None) and not isinstance(v, bool) for v in values)
        columns.append(Column(key.upper() if len(key) == 1 else key.replace("_", " "), numeric=numeric))
    columns += [Column("median", "ms", "lower"), Column("p20", "ms", "lower"), Column("p80", "ms", "lower")]
    columns.append(Column("bandwidth", "GB/s", "higher"))
    computes = any(row.tflop_per_s > 0 for row in rows)
    shares = any(row.share is not None or row.cached for row in rows)
    errors = any(row.error is not None for row in rows)
    peaks = any(row.peak_bytes is not None for row in rows)
    columns += [Column("rate", "TFLOP/s", "higher")] * computes
    columns += [Column("of ceiling", "%", "higher")] * shares
    columns += [Column("error", "rel.", "lower")] * errors
    columns += [Column("peak memory", "MB", "lower")] * peaks
    every = list(dict.fromkeys(name for row in rows for name in row.ratio))
    columns += [Column(f"over {name}", "×", "higher") for name in every]

    def line(at: int, row: Row) -> str:
        cells = [row.case, short(row.dtype), *(_place(row.place.get(key)) for key in figures.varying)]
        cells += [three(row.median_ms), three(row.p20_ms), three(row.p80_ms), three(row.gb_per_s)]
        cells += [three(row.tflop_per_s)] * computes
        cells += [_share(row)] * shares
        cells += ["" if row.error is None else f"{row.error:.1e}" if row.error else "exact"] * errors
        cells += ["" if row.peak_bytes is None else three(row.peak_bytes / 1e6)] * peaks
        cells += [times(row.ratio[name]) if name in row.ratio else "" for name in every]
        # </td> and </tr> may be left out
        own = " class=own" if row.own else ""
        head = f"<tr{own} data-r={at}><th scope=row>{escape(cells[0])}"
        tags = ("<td>" if column.numeric else "<td class=t>" for column in columns[1:])
        return head + "".join(tag + escape(cell) for tag, cell in zip(tags, cells[1:], strict=True))

    return columns, [line(at, row) for at, row in enumerate(rows)]


def _share(row: Row) -> str:
    return "in cache" if row.cached else "" if row.share is None else f"{100 * row.share:.0f}"


def _place(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    return number(value) if isinstance(value, float) and not value.is_integer() else str(value)


def _demo(record: dict[str, Any]) -> dict[str, Any]:
    """`bitfuse demo`'s record as a table: what a real model gains and pays."""
    languages = list(record["rows"][0]["quality"])
    heads = [Column("weights", numeric=False), Column("linear layers", "MB", "lower")]
    heads += [
        Column(f"batch of {record['batch_size']}", "ms", "lower"),
        Column("one sentence", "ms", "lower"),
    ]
    heads += [Column(f"cosine to fp32, {language}", "", "higher") for language in languages]
    lines = [
        [
            row["name"],
            f"{row['linear_bytes'] / 1e6:.1f}",
            three(row["batch_ms"]["median"]),
            three(row["sentence_ms"]["median"]),
            *(f"{row['quality'][language]['cosine_mean']:.4f}" for language in languages),
        ]
        for row in record["rows"]
    ]
    facts = f"{record['model']}, {record['threads']} threads, commit {record['machine']['commit']}, "
    return {"facts": facts + record["created"][:10], "columns": heads, "rows": lines}

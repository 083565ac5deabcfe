"""The page's charts, as SVG: rooflines, latencies, speed-ups, bandwidths.

Each is drawn 360 units wide, the width of a phone, so that its words are as large there as on a desk, where
several stand side by side. Colours and type come from the page's style sheet by class: `k3` is the colour of
a case, `s3` a series (a case in a dtype), `h` float32, which is drawn hollow or dashed. A mark carries the
number of its row (`data-r`) and its own words in a `<title>`, so that it reads without a script too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from .figures import AXIS_WORDS, OpFigures, Row, number, said, short, three, times

WIDTH = 360
COLOURS = 8
OWN_MARKS, PEER_MARKS = 8, 8  # as many as the page's <defs> hold
LONGEST = 26  # bars in one chart; more are told apart by the axis
MOST_LINES = 9  # of latencies in one chart
LABEL = 142  # units that the names beside bars have
LETTER = 6.1  # units of a letter, in a wide typeface


@dataclass(frozen=True)
class Style:
    """How a series looks, and what it is called.

    Attributes:
        case, dtype: as the legend has them; dtype is empty where the case or the op has but one.
        label: the case beside a bar: that it is bitfuse, and a backend that all have, go without saying.
        classes, mark: of the style sheet, and of the page's <defs>.
    """

    case: str
    dtype: str
    label: str
    classes: str
    mark: str

    @property
    def name(self) -> str:
        return f"{self.case}, {self.dtype}" if self.dtype else self.case

    def brief(self, units: float) -> str:
        """The label cut to a width, its dtype last."""
        tail = f", {self.dtype}" if self.dtype else ""
        return _clip(self.label, units - LETTER * len(tail)) + tail


@dataclass(frozen=True)
class Chart:
    """An SVG and what stands around it; `choice` names it where a figure has several."""

    svg: str
    choice: str = ""


@dataclass(frozen=True)
class Figure:
    """One or several charts under a heading.

    Attributes:
        kind: "roofline", "latency", "speedup" or "bandwidth".
        title, unit: what is drawn, and in what, with which way is better.
    """

    kind: str
    title: str
    unit: str
    charts: list[Chart]


def styles(figures: OpFigures) -> dict[tuple[str, str], Style]:
    """By case and dtype, bitfuse's first: a colour and a mark a case; peers are grey."""
    own = list(dict.fromkeys(row.case for row in figures.rows if row.own))
    peers = list(dict.fromkeys(row.case for row in figures.rows if not row.own))
    dtypes = len({row.dtype for row in figures.rows}) > 1
    backends = {part for case in own for part in re.findall(r"\(\w+\)", case)}
    shared = backends.pop() if len(backends) == 1 else ""
    found: dict[tuple[str, str], Style] = {}
    for row in sorted(figures.rows, key=lambda row: not row.own):
        key = row.case, row.dtype
        if key in found:
            continue
        case, dtype = short(row.case), short(row.dtype)
        at = own.index(row.case) if row.own else peers.index(row.case)
        colour = f"k{at % COLOURS}" if row.own else "peer"
        # the ninth case has the first one's colour, and another mark
        mark = f"o{(at + at // COLOURS) % OWN_MARKS}" if row.own else f"q{at % PEER_MARKS}"
        hollow = " h" if dtypes and row.dtype == "float32" else ""
        told = dtype if dtypes and dtype not in case.split() else ""
        label = case.removeprefix("bitfuse ").replace(" activations)", ")")
        if shared:  # that all have it goes without saying; alone it would say nothing
            label = " ".join(label.replace(shared, "").split()) or case
        found[key] = Style(case, told, label, f"s{len(found)} {colour}{hollow}", mark)
    return found


def figures_of(figures: OpFigures, spoken: bool = True) -> list[Figure]:
    """What is drawn of an op; rows of an op are numbered in their order.

    Args:
        spoken: whether marks carry their own words; the table has them all the same.
    """
    look = styles(figures)
    numbers = {id(row): at for at, row in enumerate(figures.rows)}
    pen = _Pen(figures, look, numbers, spoken)
    drawn = [pen.roofline() or pen.bandwidth(), pen.latency(), pen.speedup()]
    return [figure for figure in drawn if figure is not None]


class Log:
    """A logarithmic scale: values from low to high onto units from start to end."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if high / low < 1.5:
            low, high = low / 1.5, high * 1.5
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside: powers of ten, or 1, 2 and 5 times them where few fit."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        found: list[float] = []
        for parts in ((1,), (1, 3), (1, 2, 5)):
            every = [part * 10.0**power for power in range(first, last + 1) for part in parts]
            inside = [v for v in every if self.low <= v * (1 + 1e-9) and v <= self.high * (1 + 1e-9)]
            if not found or len(inside) <= most:
                found = inside
        return found[:: math.ceil(len(found) / most)] if len(found) > most else found


def _quoted(value: str) -> str:
    """An attribute's value, in quotes where HTML needs them: a page holds thousands of marks."""
    return f'"{value}"' if " " in value else value


def _at(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(x: float, y: float, words: str, classes: str = "", extra: str = "") -> str:
    named = f" class={_quoted(classes)}" if classes else ""
    return f"<text x={_at(x)} y={_at(y)}{named}{extra}>{escape(words)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, classes: str) -> str:
    return f'<path class={classes} d="M{_at(x1)} {_at(y1)}L{_at(x2)} {_at(y2)}"/>'


def _clip(words: str, units: float) -> str:
    """Cut in the middle: names that begin alike differ in their ends."""
    letters = int(units / LETTER)
    if len(words) <= letters:
        return words
    end = (letters - 1) * 2 // 5
    return words[: letters - 1 - end].rstrip(" ,+") + "…" + words[-end:].lstrip(" ,+")


def _svg(height: float, label: str, parts: Iterable[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {_at(height)}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _tick(value: float) -> str:
    return f"{value:g}" if 1e-4 <= value < 1e5 else f"{value:.0e}"


_Draw = Callable[[Sequence[Row], Sequence[str]], str]


class _Pen:
    """Draws one op."""

    def __init__(
        self, figures: OpFigures, look: dict[tuple[str, str], Style], numbers: dict[int, int], spoken: bool
    ) -> None:
        self.figures, self.look, self.numbers, self.spoken = figures, look, numbers, spoken

    def style(self, row: Row) -> Style:
        return self.look[row.case, row.dtype]

    def words(self, row: Row, value: str) -> str:
        where = self.figures.where(row)
        return f"{self.style(row).name}{', ' + where if where else ''}: {value}"

    def mark(self, row: Row, x: float, y: float, value: str) -> str:
        style = self.style(row)
        title = f"<title>{escape(self.words(row, value))}</title>" if self.spoken else ""
        return (
            f'<use class="p {style.classes}" data-r={self.numbers[id(row)]} href=#{style.mark} '
            f"x={_at(x)} y={_at(y)}>{title}</use>"
        )

    def behind(self, rows: Sequence[Row]) -> list[Row]:
        """In the order of painting: peers first, so that bitfuse is on top."""
        return sorted(rows, key=lambda row: row.own)

    def frame(self, x: Log, y: Log, x_ticks: Sequence[tuple[float, str]], x_words: str) -> list[str]:
        across = "".join(f"M{_at(x.start)} {_at(y(value))}H{_at(x.end)}" for value in y.ticks())
        parts = [f'<path class=grid d="{across}"/>']
        for value in y.ticks():
            parts.append(_text(x.start - 5, y(value) + 3.5, _tick(value), "end"))
        for value, words in x_ticks:
            parts.append(_line(x(value), y.start, x(value), y.start + 4, "axis"))
            parts.append(_text(x(value), y.start + 16, words, "mid"))
        parts.append(_line(x.start, y.start, x.end, y.start, "axis"))
        parts.append(_text((x.start + x.end) / 2, y.start + 31, x_words, "mid name"))
        return parts

    def roofline(self) -> Figure | None:
        """Arithmetic intensity against TFLOP/s, under what this machine reads and multiplies."""
        rows = [row for row in self.figures.rows if row.intensity is not None]
        setting = self.figures.setting
        if not rows or not setting.bytes_per_s:
            return None
        bandwidth = setting.bytes_per_s / 1e12  # TFLOP/s at one FLOP a byte
        used = {row.dtype for row in rows}
        roofs = {d: f / 1e12 for d, f in setting.flop_per_s.items() if d in used} or {
            d: f / 1e12 for d, f in setting.flop_per_s.items()
        }
        reach = [row.intensity or 0 for row in rows]
        heights = [row.tflop_per_s for row in rows]
        if roofs:
            reach.append(max(roofs.values()) / bandwidth)
        x = Log(min(reach) / 1.6, max(reach) * 2.5, 40, WIDTH - 8)
        top = max([*heights, *roofs.values()]) * 1.9
        y = Log(min(heights) / 1.6, top, 262, 8)
        parts = self.frame(x, y, [(v, _tick(v)) for v in x.ticks(7)], "FLOP a byte moved")
        line, *names = self._slope(x, y, bandwidth, max(roofs.values(), default=top))
        parts.append(line)
        for dtype, peak in roofs.items():
            start = max(peak / bandwidth, x.low)
            parts.append(_line(x(start), y(peak), x.end, y(peak), "roof"))
            words = f"{short(dtype)}, best {three(peak)} TFLOP/s"
            names.append(_text(x.end, y(peak) - 5, words, "end roofname"))
        for row in self.behind(rows):
            assert row.intensity is not None
            value = f"{three(row.tflop_per_s)} TFLOP/s at {three(row.intensity)} FLOP a byte"
            parts.append(self.mark(row, x(row.intensity), y(row.tflop_per_s), value))
        parts += names
        label = f"Roofline of {self.figures.op}: TFLOP/s against FLOP a byte, {len(rows)} cases."
        return Figure("roofline", "Roofline", "TFLOP/s, higher is better", [Chart(_svg(300, label, parts))])

    def _slope(self, x: Log, y: Log, bandwidth: float, peak: float) -> list[str]:
        """The bandwidth's part of the roof, from where it enters the picture to the highest ceiling."""
        left = max(x.low, y.low / bandwidth)
        right = min(x.high, peak / bandwidth)
        if right <= left:
            return [""]
        ends = x(left), y(left * bandwidth), x(right), y(right * bandwidth)
        angle = math.degrees(math.atan2(ends[3] - ends[1], ends[2] - ends[0]))
        at_x, at_y = ends[0] + 0.04 * (ends[2] - ends[0]), ends[1] + 0.04 * (ends[3] - ends[1])
        turn = f' transform="rotate({_at(angle)} {_at(at_x)} {_at(at_y)}) translate(0 -5)"'
        words = f"{three(bandwidth * 1e3)} GB/s"
        return [_line(*ends, "roof"), _text(at_x, at_y, words, "roofname", turn)]

    def bandwidth(self) -> Figure | None:
        """GB/s of ops that hardly compute, under the bandwidth measured."""
        rows = [row for row in self.figures.rows if row.gb_per_s > 0]
        if not rows:
            return None
        ceiling = (self.figures.setting.bytes_per_s or 0) / 1e9
        most = 1.16 * max([ceiling, *(row.gb_per_s for row in rows)])
        span = WIDTH - LABEL - 12

        def x(value: float) -> float:
            return LABEL + span * value / most

        def draw(chosen: Sequence[Row], leave_out: Sequence[str]) -> str:
            parts, y = [], 18.0
            for name, group in self.groups(chosen, leave_out).items():
                if name:
                    parts.append(_text(0, y + 11, name, "name"))
                    y += 18
                for row in group:
                    value = f"{three(row.gb_per_s)} GB/s"
                    parts.append(
                        self.bar(row, self.style(row).brief(LABEL - 8), y, LABEL, x(row.gb_per_s), value)
                    )
                    y += 16
            if ceiling:
                parts.append(_line(x(ceiling), 14, x(ceiling), y + 4, "roof"))
                words = f"most measured {three(ceiling)} GB/s"
                parts.append(_text(min(x(ceiling), WIDTH), 10, words, "end roofname"))
            return _svg(y + 8, f"Bandwidth of {self.figures.op}, {len(chosen)} cases.", parts)

        return Figure("bandwidth", "Bandwidth", "GB/s, higher is better", self.split(rows, draw))

    def bar(self, row: Row, name: str, y: float, start: float, end: float, value: str) -> str:
        """A row of a bar chart, 16 high: its name, its bar from start to end, its value beyond."""
        style = self.style(row)
        left, wide = min(start, end), max(1.0, abs(end - start))
        words = value.removesuffix(" GB/s")
        right = max(start, end)
        tail = len(words) * 6.2 + 6
        value_at = _text(right + 4, y + 10.5, words, "num")
        if right + tail > WIDTH:
            value_at = _text(right - 4, y + 10.5, words, "num end in")
        return (
            f'<g class="p {style.classes}" data-r={self.numbers[id(row)]}>'
            f"{_text(LABEL - 6, y + 10.5, name, 'end')}"
            f"<rect x={_at(left)} y={_at(y + 2)} width={_at(wide)} height=10 rx=1.5 />{value_at}</g>"
        )

    def groups(self, rows: Sequence[Row], leave_out: Sequence[str] = ()) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in rows:
            found.setdefault(self.figures.where(row, leave_out), []).append(row)
        return found

    def split(
        self, rows: Sequence[Row], draw: _Draw, keys: tuple[str, ...] = (), name: str = ""
    ) -> list[Chart]:
        """One chart, or where it would be too long one for each value of what varies, M first."""
        order = [key for key in (self.figures.axis, *self.figures.varying) if key and key not in keys]
        key = next((key for key in order if len({row.place.get(key) for row in rows}) > 1), None)
        if len(rows) <= LONGEST or key is None:
            return [Chart(draw(rows, keys), name)]
        parts: dict[str, list[Row]] = {}
        for row in rows:
            value = row.place.get(key)
            parts.setdefault("other" if value is None else said(key, value), []).append(row)
        return [
            chart
            for part, chosen in parts.items()
            for chart in self.split(chosen, draw, (*keys, key), f"{name}, {part}" if name else part)
        ]

    def speedup(self) -> Figure | None:
        """How often bitfuse runs while a peer runs once."""
        charts = []
        for name in self.figures.peers:
            rows = [row for row in self.figures.own if row.ratio.get(name, 0) > 0 and not _is_self(row, name)]
            if not rows:
                continue
            low = min(0.8, min(row.ratio[name] for row in rows) / 1.25)
            high = max(1.25, max(row.ratio[name] for row in rows) * 1.45)
            x = Log(low, high, LABEL, WIDTH - 14)

            def draw(chosen: Sequence[Row], leave_out: Sequence[str], x: Log = x, name: str = name) -> str:
                return self._speedups(chosen, leave_out, x, name)

            charts += [
                Chart(part.svg, f"over {name}" + (f", {part.choice}" if part.choice else ""))
                for part in self.split(rows, draw)
            ]
        if not charts:
            return None
        return Figure("speedup", "Speed-up", "times as fast as the peer, higher is better", charts)

    def _speedups(self, rows: Sequence[Row], leave_out: Sequence[str], x: Log, peer: str) -> str:
        groups = self.groups(rows, leave_out)
        single = all(len(group) == 1 for group in groups.values())
        dtypes = len({row.dtype for row in rows}) > 1

        def dtype(row: Row) -> str:
            return f", {short(row.dtype)}" if dtypes else ""

        y = 20.0
        parts: list[str] = []
        body: list[str] = []
        for name, group in groups.items():
            if name and not single:
                body.append(_text(0, y + 11, name, "name"))
                y += 18
            for row in group:
                value = f"{times(row.ratio[peer])}×"
                label = (
                    _clip(name + dtype(row), LABEL - 8)
                    if single and name
                    else self.style(row).brief(LABEL - 8)
                )
                body.append(self.bar(row, label, y, x(1), x(row.ratio[peer]), value))
                y += 16
            y += 0 if single else 4
        for tick in x.ticks(6):
            parts.append(_line(x(tick), 16, x(tick), y, "grid"))
            parts.append(_text(x(tick), 10, f"{_tick(tick)}×", "mid"))
        body.append(_line(x(1), 14, x(1), y + 2, "axis"))
        words = f"Speed-up of {self.figures.op} over {peer}, {len(rows)} cases; right of 1 is faster."
        return _svg(y + 6, words, parts + body)

    def latency(self) -> Figure | None:
        """Milliseconds against the size that varies, else side by side."""
        axis = self.figures.axis
        if axis is None:
            return self._dots()
        facets: dict[str, list[list[Row]]] = {}
        for line in self.figures.lines(axis).values():
            facets.setdefault(self.figures.where(line[0], (axis,)), []).append(line)
        charts = [
            Chart(self._lines(part, axis), ", ".join(w for w in (name, dtype) if w))
            for name, lines in facets.items()
            for dtype, part in self._apart(lines)
        ]
        words = AXIS_WORDS.get(axis, axis)
        title = f"Latency against {words.split(',')[0]}"
        return Figure("latency", title, "milliseconds, lower is better", charts)

    def _apart(self, lines: Sequence[list[Row]]) -> list[tuple[str, list[list[Row]]]]:
        """Lines that would be a bundle in one chart: a chart for each dtype of x."""
        parts: dict[str, list[list[Row]]] = {}
        for line in lines:
            parts.setdefault(short(line[0].dtype), []).append(line)
        if len(lines) <= MOST_LINES or len(parts) == 1:
            return [("", list(lines))]
        return [(f"x {dtype}", part) for dtype, part in parts.items()]

    def _lines(self, lines: Sequence[Sequence[Row]], axis: str) -> str:
        rows = [row for line in lines for row in line]
        sizes = sorted({float(row.place[axis]) for row in rows})
        x = Log(sizes[0], sizes[-1], 50, WIDTH - 16)
        if len(sizes) == 1:
            x = Log(sizes[0] / 2, sizes[0] * 2, 50, WIDTH - 16)
        y = Log(min(r.p20_ms for r in rows) / 1.2, max(r.p80_ms for r in rows) * 1.2, 262, 10)
        ticks: list[tuple[float, str]] = []
        for size in sizes:
            if not ticks or x(size) - x(ticks[-1][0]) > 34:
                ticks.append((size, number(size)))
        parts = self.frame(x, y, ticks, AXIS_WORDS.get(axis, axis))
        for line in sorted(lines, key=lambda line: line[0].own):
            places = [(x(float(row.place[axis])), y(row.median_ms)) for row in line]
            classes = f"l {self.style(line[0]).classes}"
            if len(line) > 1:
                path = "L".join(f"{_at(a)} {_at(b)}" for a, b in places)
                parts.append(f'<path class="{classes}" d="M{path}"/>')
            whiskers = "".join(
                f"M{_at(a)} {_at(y(row.p20_ms))}V{_at(y(row.p80_ms))}"
                for (a, _), row in zip(places, line, strict=True)
                if abs(y(row.p20_ms) - y(row.p80_ms)) > 4
            )
            if whiskers:
                parts.append(f'<path class="{classes} w" d="{whiskers}"/>')
            parts += [
                self.mark(row, a, b, f"{three(row.median_ms)} ms")
                for (a, b), row in zip(places, line, strict=True)
            ]
        label = f"Latency of {self.figures.op} in milliseconds against {axis}, {len(lines)} cases."
        return _svg(300, label, parts)

    def _dots(self) -> Figure | None:
        rows = self.figures.rows
        if not rows:
            return None
        x = Log(min(r.median_ms for r in rows) / 1.3, max(r.median_ms for r in rows) * 1.3, LABEL, WIDTH - 12)
        dtypes = len({row.dtype for row in rows}) > 1
        groups: dict[str, list[Row]] = {}
        for row in rows:
            words = [self.figures.where(row), short(row.dtype) if dtypes else ""]
            groups.setdefault(", ".join(w for w in words if w) or self.figures.op, []).append(row)
        parts, y = [], 20.0
        bottom = y + 18 * len(groups)
        for value in x.ticks(6):
            parts.append(_line(x(value), 16, x(value), bottom, "grid"))
            parts.append(_text(x(value), 10, _tick(value), "mid"))
        for name, group in groups.items():
            middle = y + 9
            ends = [x(row.median_ms) for row in group]
            parts.append(_text(LABEL - 8, middle + 3.5, _clip(name, LABEL - 8), "end"))
            parts.append(_line(min(ends), middle, max(ends), middle, "axis"))
            parts += [
                self.mark(row, x(row.median_ms), middle, f"{three(row.median_ms)} ms")
                for row in self.behind(group)
            ]
            y += 18
        label = f"Latency of {self.figures.op} in milliseconds, {len(rows)} cases."
        return Figure(
            "latency", "Latency", "milliseconds, lower is better", [Chart(_svg(bottom + 6, label, parts))]
        )


def _is_self(row: Row, peer: str) -> bool:
    """Whether a row is what it is compared with: bitfuse over bitfuse, exactly 1."""
    return row.ratio[peer] == 1.0

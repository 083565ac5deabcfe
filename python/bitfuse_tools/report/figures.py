"""Figures as the page and the README tell them: an op's rows on a device, what tells them apart, words."""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..bench.limits import Limits
from ..hypothetical import EVERY

SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# peers whose name in the files says little without the file around it
PEERS = {
    "AdamW8bit": "bitsandbytes",
    "base": "no adapter",
    "bitfuse": "bitfuse's own plain cache",
    "bfloat16": "torch bf16",
    "float16": "torch fp16",
    "float32": "torch fp32",
    "foreach": "torch foreach",
    "fused": "torch fused",
    "loop": "a loop over adapters",
    "matmul": "torch matmul",
    "sdpa": "torch sdpa",
}
# what a latency is drawn against: the first of these that takes several values within one case
AXES = ("m", "tokens", "rows", "length", "seqlen", "seq", "keys", "batch", "parameters")
AXIS_WORDS = {
    "m": "M, rows of x",
    "tokens": "tokens",
    "rows": "rows",
    "length": "keys in the cache",
    "seqlen": "tokens in a sequence",
    "keys": "keys in the cache",
    "batch": "sequences in the batch",
    "parameters": "parameters in a tensor",
}
NAMES = ("model", "layer")  # what says a shape in words
PLAIN = ("model", "layer", "direction")  # whose values need no key beside them


@dataclass(frozen=True)
class Row:
    """One case, measured.

    Attributes:
        case, dtype: who computed, and in what.
        own: whether bitfuse computed it; the others are its peers.
        place: everything else that tells this row from another: sizes, direction, options.
        median_ms, p20_ms, p80_ms: milliseconds a call.
        gb_per_s, tflop_per_s: 1e9 bytes and 1e12 floating-point operations a second.
        share: of the machine's ceiling; None where none is known, or the data lay in a cache.
        cached: whether they did: the memory's bandwidth does not bound it.
        ratio: how often it runs while a peer runs once, by the peer as `peer` names it.
        error: against float64, relative; None where it was not taken.
        peak_bytes: of memory; None where it was not taken.
        run: which run of the file it comes from, 0 the newest.
    """

    case: str
    dtype: str
    own: bool
    place: dict[str, Any]
    median_ms: float
    p20_ms: float
    p80_ms: float
    gb_per_s: float
    tflop_per_s: float
    share: float | None
    ratio: dict[str, float]
    error: float | None = None
    peak_bytes: float | None = None
    run: int = 0
    cached: bool = False

    @property
    def intensity(self) -> float | None:
        """Floating-point operations a byte; None for a row that does none, or moves none."""
        if self.tflop_per_s < 1e-12 or self.gb_per_s < 1e-9:  # one a second
            return None
        return 1e3 * self.tflop_per_s / self.gb_per_s


@dataclass(frozen=True)
class Setting:
    """Under what a run was made: what the page's header says; and the ceiling of the machine."""

    date: str | None
    commit: str
    driver: str | None
    isa: str | None
    threads: int | None
    versions: dict[str, str]
    bytes_per_s: float | None
    flop_per_s: dict[str, float]
    overhead_us: dict[str, float]


@dataclass
class OpFigures:
    """An op on a device: its rows, and the settings of the runs that they come from, the newest first."""

    op: str
    rows: list[Row]
    settings: list[Setting]
    constant: dict[str, Any] = field(init=False)
    varying: list[str] = field(init=False)

    def __post_init__(self) -> None:
        keys = list(dict.fromkeys(key for row in self.rows for key in row.place))
        values = {key: [row.place.get(key) for row in self.rows] for key in keys}
        self.constant = {k: v[0] for k, v in values.items() if all(x == v[0] for x in v)}
        self.varying = [key for key in keys if key not in self.constant]

    @property
    def setting(self) -> Setting:
        return self.settings[0]

    @property
    def own(self) -> list[Row]:
        return [row for row in self.rows if row.own]

    @property
    def peers(self) -> list[str]:
        """Whom bitfuse's rows are compared with, in the order of the file."""
        return list(dict.fromkeys(peer for row in self.own for peer in row.ratio))

    @property
    def axis(self) -> str | None:
        """The size that a latency is drawn against; None where no case was taken at two sizes."""
        for key in AXES:
            if key in self.varying and any(len(line) > 1 for line in self.lines(key).values()):
                return key
        return None

    def lines(self, axis: str) -> dict[tuple[Any, ...], list[Row]]:
        """Rows that differ in nothing but `axis`, by it: a line each."""
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            value = row.place.get(axis)
            # what is drawn is drawn on a scale of powers
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 1e-9:
                rest = tuple(row.place.get(key) for key in self.varying if key != axis)
                found.setdefault((row.case, row.dtype, rest), []).append(row)
        return {key: sorted(line, key=lambda row: row.place[axis]) for key, line in found.items()}

    def where(self, row: Row, leave_out: Sequence[str] = ()) -> str:
        """A row's place in words, "M = 16, gradient": only what varies, and a name instead of its sizes."""
        left = [k for k in self.varying if k not in leave_out and row.place.get(k) is not None]
        if any(key in NAMES for key in left):
            left = [key for key in left if key in NAMES or key not in self._named]
        return ", ".join(said(key, row.place[key]) for key in left)

    @functools.cached_property
    def _named(self) -> set[str]:
        """The sizes that a model's and layer's name tells already."""
        told = set()
        for key in self.varying:
            values: dict[tuple[Any, ...], set[Any]] = {}
            for row in self.rows:
                values.setdefault(tuple(row.place.get(n) for n in NAMES), set()).add(row.place.get(key))
            if all(len(found) == 1 for found in values.values()):
                told.add(key)
        return told


@dataclass
class Device:
    """A machine, its ops, its ceiling and, where `bitfuse demo` was run there, the demo's record."""

    slug: str
    name: str
    ops: list[OpFigures]
    demo: dict[str, Any] | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def setting(self) -> Setting | None:
        """Of the op that was measured last."""
        dated = [figures.setting for figures in self.ops]
        return max(dated, key=lambda setting: setting.date or "", default=None)


def said(key: str, value: Any) -> str:
    """A part of a place in words."""
    if isinstance(value, bool):
        word = key.replace("_", " ")
        return word if value else f"not {word}"
    if isinstance(value, str):
        return value if key in PLAIN else f"{key.replace('_', ' ')} {value}"
    word = key.upper() if len(key) == 1 else key.replace("_", " ")
    return f"{word} = {number(value)}" if isinstance(value, int | float) else f"{word} = {value}"


def short(text: str) -> str:
    """Names of dtypes as people say them."""
    return re.sub(r"\bb?float(?:16|32)\b", lambda found: SHORT[found[0]], text)


def peer(name: str) -> str:
    """A peer as people call it."""
    return PEERS.get(name, short(name))


def in_order(op: str) -> tuple[int, str]:
    """What sorts ops: as they are declared, then those of other versions by name."""
    order = list(EVERY)
    return (order.index(op), "") if op in order else (len(order), op)


def three(value: float) -> str:
    """Three significant digits, with no exponent where one can do without."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        return f"{value:.2e}"
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    if size < 0.09995:
        digits = 4 if size >= 0.009995 else 5
    return f"{value:.{digits}f}"


def number(value: float) -> str:
    """A size: 4096, 16.8 M."""
    if isinstance(value, float) and not value.is_integer():
        return three(value)
    if abs(value) >= 1_000_000:
        return f"{value / 1e6:.3g} M"
    return str(int(value))


def times(value: float) -> str:
    """A ratio: 14.3, 5.1, 28, 0.55."""
    return f"{value:.0f}" if value >= 19.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def percent(value: float) -> str:
    return f"{value:.0%}"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Least, median, most."""
    return min(values), statistics.median(values), max(values)

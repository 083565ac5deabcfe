"""`bitfuse report`: the page's structure and words, README's figures, and the page in a browser.

The browser is any Chromium on PATH. Where there is none its tests are not collected; the others stand alone.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import html.parser
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bitfuse_tools import bench
from bitfuse_tools.bench import SUITES, compare, results
from bitfuse_tools.cli import app
from bitfuse_tools.report import ResultsError, load, render, rewrite
from bitfuse_tools.report.charts import Log, figures_of, styles
from bitfuse_tools.report.figures import Device, OpFigures, Row, Setting, short, three, times
from bitfuse_tools.report.sources import OTHERS
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
READ = sorted(path for path in RESULTS.glob("*/*.json") if path.name not in OTHERS)
VOID = {"meta", "link", "input", "br", "circle", "rect", "path", "hr", "img"}
OPTIONAL_END = {"td", "th", "tr", "thead", "tbody", "li", "dt", "dd", "p", "option"}


class Page(html.parser.HTMLParser):
    """A page's elements: nesting is checked, attributes and texts are kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        while self.open and self.open[-1] in OPTIONAL_END:
            self.open.pop()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] != tag:
            assert self.open[-1] in OPTIONAL_END, f"</{tag}> inside <{self.open[-1]}>"
            self.open.pop()
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append(data.strip())

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [
            attrs
            for name, attrs in self.elements
            if name == tag and all(attrs.get(key.rstrip("_")) == value for key, value in wanted.items())
        ]


def row(case: str = "bitfuse int4 (cpp)", dtype: str = "bfloat16", m: int = 1, **more: Any) -> dict[str, Any]:
    """A row of schema 2, plausible."""
    who = case.split()[0]
    return {
        "case": case,
        "dtype": dtype,
        "who": who,
        "backend": "cpp" if who == "bitfuse" else None,
        "model": None,
        "layer": None,
        "sizes": {"m": m, "n": 4096, "k": 4096},
        "median_ms": 0.2 * m,
        "p20_ms": 0.19 * m,
        "p80_ms": 0.25 * m,
        "gb_per_s": 43.0,
        "tflop_per_s": 0.15,
        "share_of_limit": 0.95,
        "ratio": {"torch bfloat16": 5.0} if who == "bitfuse" else {},
        **more,
    }


def record(rows: list[dict[str, Any]], op: str = "lowbit_linear", **more: Any) -> dict[str, Any]:
    run = {
        "date": "2026-11-20T10:00:00Z",
        "commit": "abc",
        "driver": None,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "peft": None},
        "threads": 2,
        "isa": "avx512bf16",
        "limits": {"bytes_per_s": 4.7e10, "flop_per_s": {"bfloat16": 9.6e11}},
        "overhead_us": {},
        "rows": rows,
        **more,
    }
    return {"schema": 2, "op": op, "device": "A machine", "runs": [run]}


def put(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for each in records:
        (folder / f"{each['op']}.json").write_text(json.dumps(each))
    return folder


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def page() -> str:
    return render(load([RESULTS]))


def test_page_stands_alone_and_is_small(page: str) -> None:
    assert len(page.encode()) < 500_000
    # an address may only be of this page or of data
    for address in re.findall(r"""(?:href|src|url)\s*[=(]\s*["']?([^"'\s>)]+)""", page):
        assert address.startswith(("#", "data:")), address
    assert "http" not in page and "@import" not in page and "fetch(" not in page


def test_page_is_sound(page: str) -> None:
    parsed = Page(page)
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in parsed.elements:
        for key in ("aria-labelledby", "href"):
            for name in (attrs.get(key) or "").split() if key != "href" else [attrs.get("href") or ""]:
                if key == "aria-labelledby" or name.startswith("#"):
                    assert name.lstrip("#") in ids, (tag, name)
    assert parsed.all("html", lang="en") and parsed.all("main") and parsed.all("h1")
    charts = [attrs for attrs in parsed.all("svg") if "aria-hidden" not in attrs]
    assert charts and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)


def test_page_says_every_row_and_every_unit(page: str) -> None:
    """Without a script: each case in a table, each figure with its unit and which way is better."""
    rows = sum(len(figures.rows) for device in load([RESULTS]) for figures in device.ops)
    parsed = Page(page)
    assert len([1 for attrs in parsed.all("tr") if "data-r" in attrs]) == rows
    captions = re.findall(r"<figcaption><strong>(.*?)</strong> <i>(.*?)</i>", page)
    assert len(captions) == len(parsed.all("figure"))
    assert all("higher is better" in unit or "lower is better" in unit for _, unit in captions)
    assert {title for title, _ in captions} >= {"Roofline", "Speed-up", "Latency against M", "Bandwidth"}
    assert all(word in page for word in ("commit", "torch", "2026-11-2", "avx512bf16", "GB/s", "measured"))


def test_marks_name_their_rows(page: str) -> None:
    """What a mark's tooltip shows is the row of the table that it was drawn from."""
    for section in re.findall(r'<section class="op".*?</section>', page, re.DOTALL):
        known = {attrs["data-r"] for attrs in Page(section).all("tr") if "data-r" in attrs}
        marks = re.findall(r'<(?:use|g) class="p [^>]*data-r=(\d+)', section)
        assert set(marks) <= known and (marks or not known)


def test_figures_are_those_of_the_files(tmp_path: Path) -> None:
    folder = put(tmp_path / "machine", record([row(m=1), row(m=16), row("torch bfloat16")]))
    (device,) = load([folder])
    assert (device.slug, device.name) == ("machine", "A machine")
    (figures,) = device.ops
    assert figures.axis == "m" and figures.constant == {"n": 4096, "k": 4096} and figures.varying == ["m"]
    assert figures.peers == ["torch bf16"] and [r.own for r in figures.rows] == [True, True, False]
    assert figures.rows[0].intensity == pytest.approx(150 / 43)
    assert figures.where(figures.rows[1]) == "M = 16"
    text = render([device])
    assert "<td>16<td>3.20<td>3.04<td>4.00<td>43.0<td>0.150<td>91<td>5.0" in text
    kinds = [figure.kind for figure in figures_of(figures)]
    assert kinds == ["roofline", "latency", "speedup"]


def test_shares_are_of_the_machines_one_ceiling(tmp_path: Path) -> None:
    """The most that anything reached, other ops included; beyond it a cache, in words."""
    low = {"bytes_per_s": 1e10, "flop_per_s": {"bfloat16": 1e11}}
    fast = row("peer", who="peer", gb_per_s=86.0, tflop_per_s=0.3, in_cache=False)
    folder = put(
        tmp_path / "machine",
        record([row(in_cache=True, tflop_per_s=0.21), row(m=16), row(m=32, gb_per_s=200.0)], limits=low),
        record([row("bitfuse (cpp)"), fast], op="rope", limits=low),
    )
    (device,) = load([folder])
    shares = {(f.op, r.case, r.place["m"]): r.share for f in device.ops for r in f.rows}
    assert shares["lowbit_linear", "bitfuse int4 (cpp)", 16] == shares["rope", "bitfuse (cpp)", 1] == 0.5
    assert shares["rope", "peer", 1] == 1.0 and device.ops[0].setting.bytes_per_s == 8.6e10
    # bound by arithmetic: where the data lay is no matter
    assert shares["lowbit_linear", "bitfuse int4 (cpp)", 1] == pytest.approx(0.7)
    assert shares["lowbit_linear", "bitfuse int4 (cpp)", 32] is None and device.ops[0].rows[2].cached
    text = render([device])
    assert "<td>in cache" in text and "by peer, rope" in text and text.count("the most measured here") == 2
    (real,) = load([RESULTS], ["amd-epyc"])
    assert all((r.share or 0) <= 1 for f in real.ops for r in f.rows)
    assert {f.setting.bytes_per_s for f in real.ops} == {real.limits.bytes_per_s.value}  # type: ignore[union-attr]


def test_peers_that_are_faster_are_told(tmp_path: Path) -> None:
    """Also of a file from before their ratios were taken: of the medians then."""
    peer = row("bitsandbytes NF4", median_ms=0.1)
    rows = [
        row(),
        peer,
        row("onnxruntime int4 (float32 activations)", median_ms=0.4),
        row("bitsandbytes NF4", m=2),
    ]
    (device,) = load([put(tmp_path / "machine", record(rows))])
    ratio = device.ops[0].rows[0].ratio
    assert ratio == {"torch bf16": 5.0, "bitsandbytes": 0.5, "onnxruntime fp32": 2.0}
    assert "bitsandbytes <b>0.50×</b>" in render([device])


def test_only_the_last_measurement_counts(tmp_path: Path) -> None:
    found = record([row(m=1, median_ms=9.0), row(m=16)])
    found["runs"].append({**found["runs"][0], "commit": "def", "rows": [row(m=1, median_ms=0.5)]})
    (device,) = load([put(tmp_path / "machine", found)])
    rows = {r.place["m"]: r for r in device.ops[0].rows}
    assert rows[1].median_ms == 0.5 and rows[1].run == 0 and rows[16].run == 1
    assert [setting.commit for setting in device.ops[0].settings] == ["def", "abc"]


def test_names_of_models_stand_for_their_sizes(tmp_path: Path) -> None:
    rows = [
        {**row(m=m), "model": "llama3-8b", "layer": layer, "sizes": {"m": m, "n": n, "k": 4096}}
        for m in (1, 16)
        for layer, n in (("qkv", 6144), ("gate", 14336))
    ]
    (device,) = load([put(tmp_path / "machine", record(rows))])
    figures = device.ops[0]
    assert [figures.where(r) for r in figures.rows[:2]] == ["qkv, M = 1", "gate, M = 1"]


def test_op_without_flops_has_bandwidths(tmp_path: Path) -> None:
    rows = [row("bitfuse (cpp)", tflop_per_s=0.0), row("torch", tflop_per_s=0.0, share_of_limit=None)]
    (device,) = load([put(tmp_path / "machine", record(rows, op="rope"))])
    drawn = figures_of(device.ops[0])
    assert [figure.kind for figure in drawn] == ["bandwidth", "latency", "speedup"]
    Page(render([device]))


def test_many_bars_are_told_apart(tmp_path: Path) -> None:
    """No chart is longer than a screen, and no two cases look the same."""
    rows = [
        {**row(f"bitfuse f{f} (cpp)", m=m), "layer": layer, "sizes": {"m": m, "n": n, "k": 4096}}
        for m in (1, 16) for layer, n in (("qkv", 6144), ("gate", 14336)) for f in range(20)
    ]  # fmt: skip
    (device,) = load([put(tmp_path / "machine", record(rows))])
    (figures,) = device.ops
    speedup = figures_of(figures)[-1]
    assert [chart.choice for chart in speedup.charts] == [
        f"over torch bf16, M = {m}, {layer}" for m in (1, 16) for layer in ("qkv", "gate")
    ]
    assert all(len(re.findall("<rect", chart.svg)) == 20 for chart in speedup.charts)
    look = [(re.findall(r"k\d", style.classes)[0], style.mark) for style in styles(figures).values()]
    assert len(set(look)) == 20


def test_names_beside_bars_stay_apart(tmp_path: Path) -> None:
    """However little room there is; and a lone case of bitfuse has a name."""
    for device in load([RESULTS]):
        for figures in device.ops:
            look = list(styles(figures).values())
            assert len({style.brief(134) for style in look}) == len(look), figures.op
            assert not any(style.label.startswith("(") for style in look)


def test_lines_that_would_be_a_bundle_are_drawn_apart(tmp_path: Path) -> None:
    rows = [
        row(f"bitfuse f{f} (cpp)", dtype=dtype, m=m)
        for f in range(7) for dtype in ("float32", "bfloat16") for m in (1, 16)
    ]  # fmt: skip
    limits = {"bytes_per_s": 4.7e10, "flop_per_s": {"bfloat16": 9.6e11, "float32": 9.6e11}}
    (device,) = load([put(tmp_path / "machine", record(rows, limits=limits))])
    latency = next(figure for figure in figures_of(device.ops[0]) if figure.kind == "latency")
    assert [chart.choice for chart in latency.charts] == ["x fp32", "x bf16"]


def test_words_where_a_number_would_say_nothing(tmp_path: Path) -> None:
    rows = [row(m=m, error=error, in_cache=True, tflop_per_s=0.0) for m, error in ((1, 0.0), (2, 1e-3))]
    text = render(load([put(tmp_path / "machine", record(rows))]))
    assert "<td>exact" in text and "0.0e+00" not in text and "<td>1.0e-03" in text
    assert 'data-name="of the ceiling, median (best)">in cache' in text


def test_package_data() -> None:
    """What the page is made from is in the wheel."""
    globs = re.findall(r'"(report/[^"]+)"', (ROOT / "pyproject.toml").read_text())
    folder = ROOT / "python" / "bitfuse"
    packed = {path for glob in globs for path in folder.glob(glob)}
    assert packed == {path for path in (folder / "report").glob("*.*") if path.suffix not in (".py", ".pyc")}


def test_strange_words_are_only_words(tmp_path: Path) -> None:
    """Names in the files can't become markup."""
    evil = "<script>alert(1)</script>"
    found = record([row(f"bitfuse {evil}", layer=evil), row(f'torch "{evil}', dtype=evil)], commit=evil)
    found["device"] = evil
    text = render(load([put(tmp_path / "machine", found)]))
    assert evil not in text and "&lt;script&gt;" in text
    Page(text)


def test_several_devices(tmp_path: Path) -> None:
    for at, name in enumerate(("alpha", "beta gamma")):
        found = record([row(), row(m=16)])
        found["device"] = name
        put(tmp_path / f"machine-{at}", found)
    devices = load([tmp_path])
    assert [device.name for device in devices] == ["alpha", "beta gamma"]
    parsed = Page(render(devices))
    assert len(parsed.all("article", class_="device")) == 2
    assert [device.name for device in load([tmp_path], ["gamma"])] == ["beta gamma"]
    assert [device.slug for device in load([tmp_path], ["machine-0"])] == ["machine-0"]
    with pytest.raises(ResultsError, match=r"no device 'delta'.*machine-0, machine-1"):
        load([tmp_path], ["delta"])


def test_a_large_page_stays_small(tmp_path: Path) -> None:
    rows = [row(f"bitfuse f{f} (cpp)", m=m, sizes={"m": m, "n": n, "k": 4096})
            for f in range(8) for m in (1, 4, 16, 64, 256) for n in range(1024, 20481, 1024)]  # fmt: skip
    text = render(load([put(tmp_path / "machine", record(rows))]))
    assert len(rows) == 800 and len(text) < 500_000
    Page(text)


@pytest.mark.parametrize("low, high", [(1e-6, 1e6), (0.9, 1.1), (3, 8), (1, 2048), (0.011, 0.96), (5.0, 5.0)])
def test_log_scale(low: float, high: float) -> None:
    scale = Log(low, high, 10, 110)
    assert 10 <= scale(low) <= scale(high) <= 110
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 7 and all(9.9 <= scale(tick) <= 110.1 for tick in ticks)


@pytest.mark.parametrize(
    "value, said",
    [(0.19512, "0.195"), (5.81, "5.81"), (24.92, "24.9"), (382.3, "382"), (9.999, "10.0"), (99.97, "100"),
     (0.0451, "0.0451"), (0, "0"), (0.99996, "1.00"), (2.5e-5, "2.50e-05")],
)  # fmt: skip
def test_three_digits(value: float, said: str) -> None:
    assert three(value) == said


def test_words() -> None:
    assert [times(v) for v in (14.31, 28.4, 0.55, 1.0, 0.996)] == ["14.3", "28", "0.55", "1.0", "1.0"]
    assert short("onnxruntime (float32), bfloat16") == "onnxruntime (fp32), bf16"


def test_styles_tell_series_apart() -> None:
    """Bitfuse in colours, a mark a case; peers grey; fp32 hollow."""
    (device,) = [d for d in load([RESULTS]) if d.slug == "amd-epyc-family-26-2-cores"]
    figures = next(f for f in device.ops if f.op == "lowbit_linear")
    look = styles(figures)
    assert len({style.classes for style in look.values()}) == len(look)
    own = {case: look[case, dtype] for case, dtype in look if case.startswith("bitfuse")}
    assert len({style.mark for style in own.values()}) == min(8, len(own))
    assert all("peer" in look[key].classes for key in look if not key[0].startswith("bitfuse"))
    assert look["bitfuse int4 (cpp)", "float32"].classes.endswith(" h")


# the command


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    done = command(RESULTS, "--out", out)
    assert done.exit_code == 0, done.output
    assert out.read_text().startswith("<!DOCTYPE html>") and "kB" in done.output
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o644


def damaged(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    found = record([row(), row(m=16)])
    change(found)
    return put(tmp_path / "machine", found) / "lowbit_linear.json"


HOSTILE: tuple[Any, ...] = (
    None, True, 0, -1, 10**400, 1 << 63, 1e308, -1e308, 5e-324, 1e-300, float("nan"), float("inf"), "", "x",
    "\ud800", "\0", "../../x", "a b\"'<c>&", "x" * 100_000, [], {}, [[]], {"a": 1}, {"": None}, {"\ud800": 1},
)  # fmt: skip


def places(found: Any) -> list[tuple[Any, Any]]:
    """Every value inside, as its container and its key."""
    here = list(found.items() if isinstance(found, dict) else enumerate(found))
    below = [place for _, value in here if isinstance(value, dict | list) for place in places(value)]
    return [(found, key) for key, _ in here] + below


def mutated(found: Any, dice: random.Random) -> str:
    """A file's text with one thing wrong, or a few."""
    found = copy.deepcopy(found)
    for _ in range(dice.choice((1, 1, 1, 3))):
        if not places(found):
            break
        # most of a file is rows: its head and its rows shall be hit as often
        holder, key = dice.choice(
            dice.choice((places(found), [p for p in places(found) if len(p[0]) < 20] or places(found)))
        )
        how = dice.randrange(5)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[dice.choice(("", "x", "\ud800", "x" * 2000, "rows"))] = holder.pop(key)
        elif how == 2:
            other, place = dice.choice(places(found))
            holder[key] = copy.deepcopy(other[place])
        else:
            holder[key] = dice.choice(HOSTILE)
    with int_digits():
        text = json.dumps(found)
    how = dice.randrange(12)
    if how == 0:
        text = text[: dice.randrange(len(text))]
    elif how == 1:
        at = text.find(":", dice.randrange(len(text) // 2 + 1)) + 1
        text = text[:at] + dice.choice(("[", '{"a":')) * dice.choice((100, 100_000)) + text[at:]
    elif how == 2:
        at = dice.randrange(len(text))
        text = text[:at] + dice.choice(("\0", '"', "9" * 5000, "é", "\u2028")) + text[at + 1 :]
    return text


@contextlib.contextmanager
def int_digits() -> Iterator[None]:
    """Numbers of any length can be written."""
    before = sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else None
    if before is None:
        yield
        return
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


@pytest.mark.parametrize("path", READ, ids=lambda path: path.stem)
def test_hostile_files(path: Path, tmp_path: Path) -> None:
    """Real files of results, changed in many ways: each gives a sound page, or an error of one line."""
    dice = random.Random(path.name)
    real = json.loads(path.read_text())
    for part in (real, *real.get("runs", ())):  # the first rows say as much as all
        part.update({name: part[name][:6] for name in ("rows", "not_timed") if name in part})
    file = tmp_path / path.name
    drawn = 0
    for _ in range(40):
        text = mutated(real, dice)
        file.write_bytes(text.encode(errors="surrogatepass"))
        try:
            devices = load([file])
            Page(render(devices).encode().decode())
            drawn += 1
        except ResultsError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 400, error
        for other in (
            lambda: compare.compare(*2 * [compare.read(str(file), list(SUITES), tmp_path)]),
            lambda: results.migrate(file),
            lambda: results.check(file, "A machine"),
        ):
            with contextlib.suppress(ResultsError):
                other()
    assert drawn  # some changes do no harm


def test_strange_files_beside_results(tmp_path: Path) -> None:
    """What is no file is left; named, it is told."""
    folder = put(tmp_path / "machine\udcff", record([row()]))
    for name in ("circle.json", "nothing.json"):
        (folder / name).symlink_to(folder / ("circle.json" if name == "circle.json" else "gone"))
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    (device,) = load([tmp_path])
    assert len(device.ops) == 1 and Page(render([device]).encode().decode())
    for name in ("circle.json", "nothing.json", "pipe.json"):
        with pytest.raises(ResultsError, match="is no file") as told:
            load([folder / name])
        assert str(told.value).encode() and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda r: r.pop("schema"), "layout before schema 2"),
        (lambda r: r["runs"][0]["rows"][0].update(median_ms=1e308), "median_ms is 1e+308"),
        (lambda r: r["runs"][0]["rows"][0].update(median_ms=10**30), "holds the number 100000000000"),
        (lambda r: r["runs"][0]["rows"][0].update(case="\ud800"), "surrogate"),
        (lambda r: r["runs"][0]["rows"][0].update(sizes={"m": []}), "sizes of 'm' is []"),
        (lambda r: r["runs"][0]["rows"][0].update(why=float("nan")), "not JSON compliant"),
        (lambda r: r["runs"][0].update(versions=[]), "versions is []"),
        (lambda r: r["runs"][0].update(limits={"bytes_per_s": 1e9, "flop_per_s": {"x": 0}}), "is 0"),
        (lambda r: r["runs"][0].update(x=json.loads("[" * 70 + "]" * 70)), "nested deeper"),
        (lambda r: r.update(schema=3), "upgrade bitfuse"),
        (lambda r: r["runs"][0].pop("limits"), "damaged"),
        (lambda r: r["runs"][0]["limits"].update(bytes_per_s=0), "bytes_per_s is 0"),
        (lambda r: r["runs"][0]["rows"][0].update(median_ms=float("nan")), "median_ms is nan"),
        (lambda r: r["runs"][0]["rows"][0].update(p20_ms=-1), "p20_ms is -1"),
        (lambda r: r["runs"][0]["rows"][0].update(ratio={"torch": "fast"}), "'fast'"),
        (lambda r: r["runs"][0]["rows"][0].update(gb_per_s=None), "gb_per_s is None"),
        (lambda r: r["runs"][0]["rows"][0].pop("who"), "'who' is missing"),
        (lambda r: r.update(runs=[]), "no results"),
    ],
)
def test_damaged_files(tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    """One line with the file's name, exit code 2, and the page of before stays."""
    file = damaged(tmp_path, change)
    out = tmp_path / "page.html"
    out.write_text("before")
    done = command(file, "--out", out)
    assert done.exit_code == 2 and said in done.stderr and "lowbit_linear.json" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert out.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == [
        "machine",
        "page.html",
    ]


def test_truncated_missing_and_empty(tmp_path: Path) -> None:
    file = damaged(tmp_path, lambda r: None)
    file.write_text(file.read_text()[:-40])
    (tmp_path / "empty").mkdir()
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "demo.json").write_text('{"rows": []}')
    said = {"machine": "not whole", "nowhere": "is not there", "empty": "no results", "demo": "bitfuse demo"}
    for name, words in said.items():
        path = tmp_path / name
        done = command(path, "--out", tmp_path / "page.html")
        assert done.exit_code == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither file is touched where one can't be written."""
    folder = put(tmp_path / "machine", record([row(), row(m=16)]))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bitfuse:figures lowbit_linear:m -->\n<!-- /bitfuse:figures -->\n")
    before = readme.read_text()
    done = command(folder, "--readme", readme, "--out", tmp_path / "README.md" / "page.html")
    assert done.exit_code == 2 and "can't be written" in done.stderr and len(done.stderr.splitlines()) == 1
    assert readme.read_text() == before
    done = command(folder, "--out", folder)
    assert done.exit_code == 2 and "it is a folder" in done.stderr

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    done = command(folder, "--readme", readme, "--out", tmp_path / "page.html")
    assert done.exit_code == 2 and "No space left" in done.stderr
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "machine"]
        and readme.read_text() == before
    )


# README's tables


def test_readme_is_what_the_files_say() -> None:
    """Nothing in README's figures is untrue: `bitfuse report --readme README.md` makes them."""
    text = (ROOT / "README.md").read_text()
    assert rewrite(text, load([RESULTS])) == text


def test_the_table_of_ops_is_made_alone() -> None:
    """Of declarations, which need no results; what stands around its marks stays."""
    made = rewrite("Words.\n<!-- bitfuse:ops -->\nold\n<!-- /bitfuse:ops -->\nß\n", [])
    assert made.startswith("Words.\n<!-- bitfuse:ops -->\n| op |") and "old" not in made
    assert "| `lowbit_linear`, gradient to x | yes | yes | yes | Triton serves it |\n" in made
    assert made.endswith("<!-- /bitfuse:ops -->\nß\n") and rewrite(made, []) == made
    for text in ("<!-- bitfuse:ops -->\n", made + "<!-- /bitfuse:ops -->"):
        with pytest.raises(ResultsError, match="needs its <!-- /bitfuse:ops -->"):
            rewrite(text, [])
    assert "<!-- bitfuse:ops -->" in (ROOT / "README.md").read_text()


def test_readme_has_no_figures_outside_of_the_marks() -> None:
    """A table of milliseconds in the README stands between marks."""
    text = (ROOT / "README.md").read_text()
    outside = re.sub(r"<!-- bitfuse:figures.*?<!-- /bitfuse:figures -->", "", text, flags=re.DOTALL)
    assert not re.findall(r"^\|[^|]*\|(?: \**\d+\.\d+\** \|)+$", outside, re.MULTILINE)
    assert text.count("<!-- bitfuse:figures ") >= 6


def test_readme_is_rewritten_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(
        tmp_path / "machine", record([row(m=1), row(m=16), row("torch bfloat16", m=1, median_ms=1.0)])
    )
    readme = tmp_path / "README.md"
    readme.write_bytes(
        "Words.\r\n<!-- bitfuse:figures lowbit_linear:m on machine -->\nold\n"
        "<!-- /bitfuse:figures -->\nß\n".encode()
    )
    monkeypatch.chdir(tmp_path)
    done = command(folder, "--readme", readme)
    assert done.exit_code == 0, done.output
    assert readme.read_bytes().decode() == (
        "Words.\r\n<!-- bitfuse:figures lowbit_linear:m on machine -->\n"
        "| milliseconds | M = 1 | M = 16 |\n|---|---|---|\n"
        "| bitfuse int4 (cpp), bf16 | **0.200** | **3.20** |\n| torch bf16 | 1.00 | |\n"
        "<!-- /bitfuse:figures -->\nß\n"
    )
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "text, said",
    [
        ("no marks", "no tables to rewrite"),
        ("<!-- bitfuse:figures lowbit_linear -->\n", "no tables to rewrite"),
        (
            "<!-- bitfuse:figures a:m -->\n<!-- bitfuse:figures b:m -->\n<!-- /bitfuse:figures -->",
            "stands alone",
        ),
        ("<!-- bitfuse:figures nothing -->\n<!-- /bitfuse:figures -->", "no table 'nothing'"),
        ("<!-- bitfuse:figures rope:m -->\n<!-- /bitfuse:figures -->", "they have no rope"),
        ("<!-- bitfuse:figures lowbit_linear:z -->\n<!-- /bitfuse:figures -->", "no size 'z'"),
        ("<!-- bitfuse:figures lowbit_linear -->\n<!-- /bitfuse:figures -->", "no row 'torch float32'"),
        ("<!-- bitfuse:figures demo -->\n<!-- /bitfuse:figures -->", "no demo.json"),
        ("<!-- bitfuse:figures lowbit_linear:m on h100 -->\n<!-- /bitfuse:figures -->", "results of h100"),
    ],
)
def test_readme_marks(tmp_path: Path, text: str, said: str) -> None:
    folder = put(tmp_path / "machine", record([row(), row(m=16)]))
    readme = tmp_path / "README.md"
    readme.write_text(text)
    done = command(folder, "--readme", readme)
    assert done.exit_code == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert readme.read_text() == text


def test_readme_names_the_device_where_there_are_several() -> None:
    setting = Setting(None, "abc", None, None, None, {}, 1e9, {}, {})
    rows = [Row("bitfuse", "float32", True, {"m": m}, 1.0, 1.0, 1.0, 1.0, 1.0, None, {}) for m in (1, 2)]
    devices = [Device(slug, slug, [OpFigures("rope", rows, [setting])]) for slug in ("one", "two")]
    block = "<!-- bitfuse:figures rope:m{} -->\n<!-- /bitfuse:figures -->"
    with pytest.raises(ResultsError, match="names no device"):
        rewrite(block.format(""), devices)
    assert "| bitfuse, fp32 | **1.00** | **1.00** |" in rewrite(block.format(" on two"), devices)


def test_files_of_results_are_of_this_schema() -> None:
    """The repository's own results read, every one."""
    for file in READ:
        if file.name != "demo.json":
            assert results.load(file)["runs"]


# in a browser: any Chromium on PATH, spoken to over a pipe; without one, the tests above stand for it

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


class Browser:
    """A headless Chromium and one tab, by its DevTools protocol over two pipes: no port, no driver."""

    def __init__(self, program: str, folder: Path) -> None:
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
        shell = f'exec "$0" {flags} --remote-debugging-pipe --user-data-dir="$1" 3<&{commands} 4>&{answers}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, program, str(folder)],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.number, self.rest, self.events = 0, b"", list[dict[str, Any]]()
        self.session: dict[str, str] = {}
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=tab, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            read = os.read(self.answers, 1 << 20)
            assert read, "the browser ended"
            self.rest += read
        one, _, self.rest = self.rest.partition(b"\0")
        return dict(json.loads(one))

    def open(self, path: Path, width: int, dark: bool = False, script: bool = True) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def run(self, code: str) -> Any:
        done = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def key(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def picture(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def wrong(self) -> list[dict[str, Any]]:
        """What the page threw, logged as an error or fetched from elsewhere."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            fetched = method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(
                ("file:", "data:")
            )
            logged = method == "Log.entryAdded" and params["entry"]["level"] == "error"
            if fetched or logged or method == "Runtime.exceptionThrown":
                found.append(event)
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self.call("Browser.close")
        os.close(self.commands)
        os.close(self.answers)
        self.process.wait(20)


if CHROMIUM is not None:

    @pytest.fixture(scope="module")
    def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
        assert CHROMIUM is not None
        found = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
        yield found
        found.close()

    @pytest.fixture(scope="module")
    def file(page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("page") / "report.html"
        path.write_text(page)
        return path

    @pytest.mark.parametrize("script", [True, False])
    @pytest.mark.parametrize("width", [360, 768, 1440])
    def test_browser_widths(browser: Browser, file: Path, width: int, script: bool) -> None:
        """Nothing is wider than the window but tables in their own scrolls; words in charts stay readable."""
        browser.open(file, width, script=script)
        assert not browser.wrong()
        if not script:
            browser.call("Emulation.setScriptExecutionDisabled", value=False)
        assert browser.run("document.documentElement.scrollWidth") <= width
        wide = """[...document.querySelectorAll("body *")]
            .filter((e) => !e.closest(".scroll, .defs, .skip, svg"))
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
            .map((e) => e.outerHTML.slice(0, 90))"""
        assert browser.run(wide) == []
        texts = """Math.min(...[...document.querySelectorAll(".plot text")]
            .map((e) => e.getBoundingClientRect().height).filter((height) => height))"""
        assert browser.run(texts) >= 10
        hidden = browser.run("document.querySelectorAll('.plot[hidden]').length")
        assert (hidden > 0) == script

    def test_browser_names_beside_bars_fit(browser: Browser, file: Path) -> None:
        """No word of a chart leaves its picture by more than a letter, nor lies over a bar."""
        browser.open(file, 1440, script=True)
        out = """[...document.querySelectorAll(".plot:not([hidden]) text")].filter((e) => {
            const own = e.getBoundingClientRect(), box = e.ownerSVGElement.getBoundingClientRect();
            return own.left < box.left - 8 || own.right > box.right + 8;
        }).map((e) => e.textContent)"""
        assert browser.run(out) == []

    def test_browser_dark_and_light(browser: Browser, file: Path) -> None:
        pictures, luminance = [], []
        for dark in (False, True):
            browser.open(file, 768, dark=dark)
            pictures.append(browser.picture())
            colour = browser.run("getComputedStyle(document.body).backgroundColor")
            luminance.append(sum(map(int, re.findall(r"\d+", colour)[:3])))
        assert luminance[0] > 700 and luminance[1] < 120
        assert (
            all(p.startswith(b"\x89PNG") and len(p) > 20_000 for p in pictures) and pictures[0] != pictures[1]
        )

    def test_browser_contrast(browser: Browser, file: Path) -> None:
        """Words reach 4.5 : 1 and marks 3 : 1 against their ground (WCAG 2.2), by day and by night."""
        code = """(() => {
            const style = getComputedStyle(document.documentElement), probe = document.createElement("i");
            document.body.append(probe);
            const light = (name) => {
                probe.style.color = style.getPropertyValue(name);
                const [r, g, b] = getComputedStyle(probe).color.match(/\\d+/g).map((v) => {
                    v /= 255;
                    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
                });
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            const found = {};
            for (const name of ["ink", "soft", "link", "peer", ...[..."01234567"].map((n) => "k" + n)])
                found[name] = ratio(light("--" + name), light("--card"));
            return found;
        })()"""
        for dark in (False, True):
            browser.open(file, 768, dark=dark)
            for name, ratio in browser.run(code).items():
                assert ratio >= (4.5 if name in ("ink", "soft", "link") else 3), (name, dark, ratio)

    def test_browser_sorts_and_filters(browser: Browser, file: Path) -> None:
        browser.open(file, 1440)
        table = 'document.querySelector("#d0-lowbit_linear table")'
        column = (
            f"""[...{table}.tBodies[0].rows].filter((r) => !r.hidden).map((r) => +r.cells[3].textContent)"""
        )
        click = f"{table}.querySelectorAll('th button')[3].click()"
        browser.run(click)
        up = browser.run(column)
        assert up == sorted(up) and len(up) > 20
        assert browser.run(f"{table}.querySelectorAll('th')[3].getAttribute('aria-sort')") == "ascending"
        browser.run(click)
        assert browser.run(column) == sorted(up, reverse=True)
        browser.run("""(() => {
            const input = document.querySelector("#d0-lowbit_linear input");
            input.value = "INT4 bitfuse bf16";
            input.dispatchEvent(new Event("input"));
        })()""")
        assert len(browser.run(column)) == 3
        assert "3 of" in browser.run("document.querySelector('#d0-lowbit_linear .tools span').textContent")

    def test_browser_keyboard_and_tooltip(browser: Browser, file: Path) -> None:
        """Arrow keys walk the marks and tell what the table says; Escape ends it."""
        browser.open(file, 360)
        browser.run("document.querySelector('#d0-lowbit_linear .plot svg').focus()")
        tip = "document.querySelector('.tip')"
        assert browser.run(f"{tip}.hidden")
        browser.key("ArrowRight")
        first = browser.run(f"{tip}.innerText")
        assert "median" in first and "GB/s" in first and not browser.run(f"{tip}.hidden")
        browser.key("ArrowRight")
        assert browser.run(f"{tip}.innerText") != first
        box = browser.run(f"(({{left, right}}) => [left, right])({tip}.getBoundingClientRect())")
        assert box[0] >= 0 and box[1] <= 360
        browser.key("Escape")
        assert browser.run(f"{tip}.hidden") and not browser.wrong()

    def test_browser_legend_and_choice(browser: Browser, file: Path) -> None:
        browser.open(file, 1440)
        browser.run("document.querySelector('#d0-lowbit_linear .legend li').focus()")
        browser.key("Enter")
        lit = "document.querySelectorAll('#d0-lowbit_linear .lit .on').length"
        assert browser.run(lit) > 0
        assert browser.run("document.activeElement.getAttribute('aria-pressed')") == "true"
        browser.key("Enter")
        assert browser.run(lit) == 0
        shown = browser.run("""(() => {
            const figure = document.querySelector("#d0-lowbit_linear figure.speedup");
            const select = figure.querySelector("select");
            select.value = select.options.length - 1;
            select.dispatchEvent(new Event("change"));
            return [...figure.querySelectorAll(".plot")].map((plot) => plot.hidden);
        })()""")
        assert shown.count(False) == 1 and shown[-1] is False

    def test_browser_devices(browser: Browser, tmp_path: Path) -> None:
        """One device at a time, by address; without a script all of them."""
        for at in range(2):
            found = record([row(), row(m=16)])
            found["device"] = f"machine {at}"
            put(tmp_path / f"machine-{at}", found)
        path = tmp_path / "report.html"
        path.write_text(render(load([tmp_path])))
        visible = "[...document.querySelectorAll('.device')].map((d) => d.getBoundingClientRect().height > 0)"
        browser.open(path, 768)
        assert browser.run(visible) == [True, False]
        browser.run("document.querySelectorAll('.devices a')[1].click()")
        browser.run("new Promise((done) => setTimeout(done, 50))")
        assert browser.run(visible) == [False, True]
        browser.open(path, 768, script=False)
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
        assert browser.run(visible) == [True, True]


def as_measured(op: str, without: tuple[str, ...]) -> dict[str, Any]:
    """A file as `bitfuse bench` would write it today, less the figures."""
    session = bench.Session(bench.Setting("cpu"), bench.effort_for("cpu", quick=True))
    rows = []
    for problem, contenders in session.cases(op):
        there = [c for c in contenders if c.who not in without]
        for c in there:
            ratio = {o.label: 2.0 for o in there if o.peer and not c.peer and o.group in ("", c.group)}
            if any(o.name == c.base and o.dtype == c.dtype for o in there):
                ratio["base"] = 0.5
            sizes = {**problem.sizes, **c.sizes}
            named: dict[str, Any] = {
                "model": problem.model,
                "layer": problem.layer,
                "who": c.who,
                "backend": c.backend,
            }
            rows.append(row(c.name, c.dtype, sizes=sizes, ratio=ratio, in_cache=False, **named))
    overhead = {name: 1.0 + at for at, name in enumerate(SUITES[op].overhead())}
    limits = {"bytes_per_s": 9e10, "flop_per_s": dict.fromkeys(("float32", "bfloat16"), 1e12)}
    return record(rows, op=op, overhead_us=overhead, limits=limits)


@pytest.mark.parametrize("without", [(), ("onnxruntime", "bitsandbytes")])
def test_the_readmes_tables_are_made_of_what_is_measured_today(
    without: tuple[str, ...], tmp_path: Path
) -> None:
    """Cases, peers and sizes have the names that the tables ask for, also where a peer is not installed."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"<!-- bitfuse:figures (\S+)", text)
    ops = [op for op in SUITES if op in (*blocks, "decode_attention")]
    folder = put(tmp_path / "machine", *(as_measured(op, without) for op in ops))
    shutil.copy(next(RESULTS.glob("*/demo.json")), folder)
    made = rewrite(re.sub(r"( on \S+)? -->", " -->", text), load([folder]))
    assert len(re.findall(r"<!-- bitfuse:figures", made)) == len(blocks) > 4
    assert ("bitsandbytes' NF4 runs once" in made) == (not without)

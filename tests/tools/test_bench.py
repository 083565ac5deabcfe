"""bitfuse bench: every case runs and is right, results are kept, compared and never half-written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitfuse.weights.formats import FORMATS, Format
from bitfuse_tools import bench
from bitfuse_tools.bench import compare, limits, measure, results, shapes, timing
from bitfuse_tools.bench.cases import Contender, Layer, Problem, relative_error
from bitfuse_tools.bench.suites.lowbit_linear import LowBitLinear
from bitfuse_tools.cli import app
from typer.testing import CliRunner

TINY = shapes.Shape("tiny", 128, 256, 4, 2, 32, 512, square=True)
EFFORT = bench.Effort(rounds=1, budget=1e-4, patience=0.0, cold_mb=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chains of few layers."""
    monkeypatch.setattr(measure, "MOST_LAYERS", 3)
    monkeypatch.setattr(measure, "effort_for", lambda *args, **kwargs: EFFORT)
    yield


def tiny(**changes: Any) -> bench.Setting:
    usual: dict[str, Any] = {"shape": TINY, "quick": True, "against": ("torch",)}
    return bench.Setting("cpu", **{**usual, **changes})


def run(op: str, **changes: Any) -> dict[str, Any]:
    return bench.Session(tiny(**changes), EFFORT).run(op)


def row(
    case: str = "bitfuse int4 (cpp)", median: float = 1.0, spread: float = 0.05, **more: Any
) -> dict[str, Any]:
    low, high = median * (1 - spread), median * (1 + spread)
    known: dict[str, Any] = {
        "case": case, "dtype": "float32", "who": case.split()[0], "sizes": {"m": 1}, "median_ms": median,
        "p20_ms": low, "p80_ms": high, "ratio": {},
    }  # fmt: skip
    return {**known, **more}


def run_of(*rows: dict[str, Any], commit: str = "aaaa11112222") -> dict[str, Any]:
    limits = {"bytes_per_s": 1e9, "flop_per_s": {"float32": 1e9}}
    return {"date": None, "commit": commit, "rows": list(rows), "limits": limits, "not_timed": []}


def cli(*args: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, args)])


# every case


@pytest.mark.parametrize("op", bench.SUITES)
def test_every_case_is_timed_and_right(op: str) -> None:
    found = run(op)
    assert not found["interrupted"] and not [line for line in found["not_timed"] if line["failed"]]
    assert {"bitfuse", "torch"} == {r["who"] for r in found["rows"]}
    # what rounds to few bits errs by its format: fp8 by 2^-4 of a number, int4 by a fifteenth of the range
    coarse = op in ("quantize_kv", "append_kv")
    for r in found["rows"]:
        assert r["median_ms"] > 0 and r["p20_ms"] <= r["p80_ms"] and r["layers"] >= 1
        if r["who"] == "bitfuse" or r["error"] is not None:  # a peer that draws by itself has none
            assert r["error"] <= (0.1 if coarse else 6e-3), r
        assert r["peak_bytes"] >= 0 and math.isfinite(r["gb_per_s"])
        assert r["share_of_limit"] is None or r["share_of_limit"] <= 1 + 1e-9 or r["in_cache"]
    ours = [r for r in found["rows"] if r["case"].startswith("bitfuse")]
    assert ours and all(r["ratio"] for r in ours)
    json.dumps(found, allow_nan=False)
    assert any(op in line for line in bench.table.of_run(op, found))


@pytest.mark.parametrize("op", bench.SUITES)
def test_cases_of_every_model_are_data(op: str) -> None:
    """Nothing is made until it is built: the cases of an 8B model are listed at once."""
    for shape in shapes.SHAPES.values():
        for device in ("cpu", "cuda"):
            setting = bench.Setting(device, shape)
            for problem in bench.SUITES[op].problems(setting):
                names = [str(c) for c in problem.contenders(setting)]
                assert len(set(names)) == len(names), "two cases of one name"
                assert problem.model == shape.name or op == "adamw8bit"
                assert max(v for v in problem.bounded().sizes.values() if isinstance(v, int)) <= 1 << 14


@pytest.mark.parametrize("package", ["bitsandbytes", "peft"])
def test_slow_peers(package: str) -> None:
    pytest.importorskip(package)
    op = "lowbit_linear" if package == "bitsandbytes" else "lora_linear"
    found = run(op, against=(package,), m=(2,), formats=("nf4",), dtypes=("bfloat16",))
    peers = [r for r in found["rows"] if r["who"] == package]
    assert peers and all(r["error"] < 6e-3 for r in peers)
    label = "bitsandbytes" if package == "bitsandbytes" else "PEFT"
    assert any(label in r["ratio"] for r in found["rows"] if r["who"] == "bitfuse")


def test_a_backend_a_format_and_rows_can_be_chosen() -> None:
    found = run("lowbit_linear", backends=("reference",), formats=("int4:32",), m=(3,), dtypes=("float16",))
    ours = [r for r in found["rows"] if r["who"] == "bitfuse"]
    assert [(r["backend"], r["format"], r["sizes"]["m"]) for r in ours] == [("reference", "int4:32", 3)]


def test_a_backend_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Format("bench5", 5, group_size=32)  # no kernel reads codes of 5 bits
    monkeypatch.setitem(FORMATS, wide.name, wide)
    monkeypatch.setattr(LowBitLinear, "formats", (wide.name, "int4"))
    found = run("lowbit_linear", formats=("bench5", "int4"), m=(1,), dtypes=("float32",))
    (line,) = [line for line in found["not_timed"] if line["case"].startswith("bitfuse")]
    assert "bench5" in line["case"] and "bench5" in line["reason"] and not line["failed"]
    with pytest.raises(ValueError, match="has none of the formats none"):
        run("lowbit_linear", formats=("none",))


def test_what_of_ours_breaks_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("launch failed")

    monkeypatch.setattr("bitfuse_tools.bench.suites.rope.rope", broken)
    found = run("rope")
    (line,) = found["not_timed"]
    assert line["failed"] and line["reason"] == "RuntimeError: launch failed"
    assert [r["who"] for r in found["rows"]] == ["torch"]


# how figures come about


def test_ratios_are_of_one_round_and_one_group() -> None:
    def chain(name: str, times: list[float], **more: Any) -> Any:
        found = measure.Chain.__new__(measure.Chain)
        found.contender = Contender(name, "float32", lambda i: Layer(lambda: None, 1.0), **more)
        found.times = [[t] for t in times]
        return found

    own = chain("ours", [1.0, 2.0, 10.0], group="a", base="less")
    peers = [
        chain("less", [0.5, 1.0, 5.0]),
        chain("torch", [2.0, 4.0, 20.0], who="torch", label="torch"),
        chain("other", [9.0, 9.0, 9.0], who="torch", label="other", group="b"),
        chain("early", [3.0], who="torch", label="early", group="a"),
    ]
    assert measure.ratios(own, [own, *peers]) == {"base": 0.5, "torch": 2.0, "early": 3.0}


def test_rounds_count_the_same() -> None:
    rounds = [[1.0] * 98 + [1.5, 2.0], [7.0]]
    assert [timing.percentile(rounds, share) for share in (0.2, 0.5, 0.8)] == [1.0, 2.0, 7.0]
    assert [timing.percentile([[3.0, 1.0, 2.0]], share) for share in (0.2, 0.5, 0.8)] == [1.0, 2.0, 3.0]


def test_a_ceiling_is_the_largest_seen() -> None:
    one, other = timing.Ceiling(2.0, {"float32": 1.0}), timing.Ceiling(1.0, {"float32": 3.0, "float16": 4.0})
    joined = one.joined(other)
    assert (joined.bytes_per_second, joined.flops) == (2.0, {"float32": 3.0, "float16": 4.0})
    assert joined.seconds(4.0, 3.0, "float32") == 2.0


def test_ceilings_are_measured_on_both_sides_of_a_table() -> None:
    found = run("rope")
    measured = found["limits"]["measured"]
    assert list(measured) == ["before", "after", "rows"]
    assert found["limits"]["bytes_per_s"] == max(c["bytes_per_s"] for c in measured.values())


def test_a_machine_has_one_ceiling(tmp_path: Path) -> None:
    """The most that anybody reached there, whatever was measured beside a run; it rises, and never falls."""
    folder = tmp_path / "here"
    peer = row("torch", who="torch", tflop_per_s=0.5, gb_per_s=7.0, in_cache=False)
    cached = row("bitfuse 1", tflop_per_s=0.25, gb_per_s=99.0, in_cache=True)
    results.append(folder / "rope.json", "rope", "here", run_of(peer, cached))
    results.append(folder / "sample.json", "sample", "here", run_of(row(tflop_per_s=0.125, gb_per_s=1.0)))
    found = limits.keep(folder)
    assert found.bytes_per_s is not None and found.bytes_per_s.value == 7e9
    assert found.bytes_per_s.by == "torch, rope" and found.flop_per_s["float32"].value == 5e11
    assert (
        limits.load(folder) == found == limits.of_folder(folder)
        and limits.load(tmp_path / "x") == limits.Limits()
    )
    assert (
        found.share(3.5, 0.1, "float32") == (0.5, "memory")
        and found.share(0.7, 0.5, "float32")[1] == "arithmetic"
    )
    (folder / "rope.json").unlink()  # what was seen once stays
    assert limits.keep(folder).bytes_per_s == found.bytes_per_s
    loops = run_of(row(tflop_per_s=0.0, gb_per_s=0.0))
    loops["limits"]["measured"] = {"before": {"bytes_per_s": 8e9, "flop_per_s": {}}}
    results.append(folder / "sample.json", "sample", "here", loops)
    raised = limits.keep(folder).bytes_per_s
    assert raised is not None and (raised.value, raised.by) == (8e9, "the loops timed beside sample")
    for text in ("[]", "{", '{"schema": 1, "devices": {"here": {"bytes_per_s": 3}}}', "[" * 10**5):
        (tmp_path / limits.FILE).write_text(text)
        with pytest.raises(bench.ResultsError, match=r"delete it|move it away") as told:
            limits.load(folder)
        assert "\n" not in str(told.value)


def test_a_run_divides_by_what_the_machine_did_before() -> None:
    known = timing.Ceiling(1e15, {"float32": 1e18})
    session = bench.Session(tiny(), EFFORT, known=known)
    found = session.run("merge_attention")
    assert found["limits"]["bytes_per_s"] == 1e15 and list(found["limits"]["measured"])[-1] == "known"
    assert all((r["share_of_limit"] or 0) < 1e-3 for r in found["rows"])


def test_errors_are_relative_and_see_a_nan() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)

    def layer(found: torch.Tensor, **more: Any) -> Layer:
        return Layer(lambda: found, 1.0, lambda: [exact], **more)

    assert relative_error(layer(torch.tensor([3.0, 4.5])), False) == pytest.approx(0.1)
    assert math.isnan(relative_error(layer(torch.tensor([3.0, math.nan])), False) or 0)
    assert relative_error(layer(torch.tensor([3.0, 5.0]), discrete=True), False) == 0.5
    assert relative_error(Layer(lambda: exact, 1.0), False) is None


def test_peak_memory_counts_what_stood_at_once() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(1000)
        second = first + 1
        del first
        return second + 1

    peak, by = timing.peak_memory(call, "cpu")
    assert peak is not None and 8000 <= peak <= 8100 and by == "torch's CPU allocator"


def test_threads_are_pinned_inside_only() -> None:
    code = (
        "import os, torch; torch.set_num_threads(2); from bitfuse_tools.bench.timing import Threads\n"
        "before = os.sched_getaffinity(0); t = Threads('cpu')\n"
        "with t.pin(): inside = [os.sched_getaffinity(task) for task in t.held]\n"
        "print(all(len(i) == 1 for i in inside), len(set(map(frozenset, inside))) == len(inside), "
        "os.sched_getaffinity(0) == before, t.pinned == (len(before) > 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 4


def test_a_set_backend_is_refused() -> None:
    import bitfuse

    with bitfuse.use_backend("cpp"), pytest.raises(ValueError, match="backends are named by --backend"):
        bench.Session(tiny(), EFFORT)


# shapes


def test_shapes_from_files(tmp_path: Path) -> None:
    mine = {"hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 100}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(mine))
    assert shapes.find(str(file)) == shapes.Shape("mine", 64, 128, 4, 2, 16, 100)
    config = tmp_path / "model" / "config.json"
    config.parent.mkdir()
    own = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100, "x": 1}
    config.write_text(json.dumps({**own, "hidden_act": "gelu_pytorch_tanh"}))
    assert shapes.find(str(config)) == shapes.Shape("model", 64, 128, 4, 4, 16, 100, "gelu_tanh")
    for wrong, why in (
        ({**mine, "heads": 3}, "multiple of kv_heads"),
        ({**mine, "hidden": 0}, "hidden is 0, expected a number"),
        ({**mine, "hidden": True}, "hidden is True"),
        ({k: v for k, v in mine.items() if k != "vocab"}, "vocab is missing"),
        ({**mine, "width": 3}, "has 'width', expected name, hidden"),
        ({**mine, "activation": "swish"}, "activation is 'swish'"),
        ([1], "holds a list"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=why):
            shapes.find(str(file))
    file.write_text('{"hidden": ')
    with pytest.raises(ValueError, match="is not JSON"):
        shapes.find(str(file))
    with pytest.raises(ValueError, match="expected one of llama3-8b"):
        shapes.find("llama9")


# files


def test_runs_append_and_old_measurements_of_a_case_go(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "rope.json"
    results.append(file, "rope", "here", run_of(row("old"), commit="0"))
    for i in range(results.KEEP + 2):
        results.append(file, "rope", "here", run_of(row(median=1.0 + i), commit=str(i + 1)))
    found = results.load(file)
    assert [r["commit"] for r in found["runs"]] == ["0", *(str(i + 3) for i in range(results.KEEP))]
    latest = results.latest(found["runs"])
    assert [value[0]["median_ms"] for value in latest.values()] == [1.0, 2.0 + results.KEEP]
    assert [p.name for p in file.parent.iterdir()] == ["rope.json"]


def test_text_is_json_a_row_a_line() -> None:
    record = {"schema": 2, "runs": [run_of(row("a"), row("b\\u00001"))]}
    text = results.as_text(record)
    assert json.loads(text) == record and sum('"case"' in line for line in text.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"schema": 2, "op": "rope", "ru', "is not whole"),
        ('{"op": "rope", "rows": []}', "--migrate"),
        ('{"schema": 3, "runs": []}', "upgrade bitfuse"),
        ('{"schema": 2, "op": "rope", "device": "here", "runs": [{}]}', "damaged: run 0 has no rows"),
        (
            '{"schema": 2, "op": "rope", "device": "here", "runs": [{"rows": [{"case": 1}]}]}',
            "row 0 of run 0",
        ),
        ("[1]", "holds no benchmark's results"),
    ],
)
def test_a_file_that_is_not_sound_is_told_and_kept(tmp_path: Path, text: str, why: str) -> None:
    folder = tmp_path / results.folder(bench.device_name("cpu")).name
    folder.mkdir()
    file = folder / "rope.json"
    file.write_text(text)
    with pytest.raises(bench.ResultsError, match=why):
        results.append(file, "rope", "here", run_of(row()))
    done = cli("rope", "--results", tmp_path)
    assert done.exit_code == 2 and why.split(":")[0] in done.stderr and len(done.stderr.splitlines()) == 1
    assert file.read_text() == text


def test_no_room_and_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rope.json"
    results.append(file, "rope", "here", run_of(row()))
    before = file.read_text()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(bench.ResultsError, match="No space left on device; `--json -` prints"):
        results.append(file, "rope", "here", run_of(row()))
    assert file.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["rope.json"]
    monkeypatch.setattr("os.access", lambda *args, **kwargs: False)
    done = cli("rope", "--results", tmp_path / "new")
    assert done.exit_code == 2 and "may not be written to" in done.stderr


def test_migration_keeps_every_figure(tmp_path: Path) -> None:
    measured = {
        "layers": 2, "median_ms": 1.5, "p20_ms": 1.25, "p80_ms": 1.75, "gb_per_s": 3.0, "tflop_per_s": 4.0,
        "share_of_limit": 1.25, "ratio": {"loop": 2.0},
    }  # fmt: skip
    old = {
        "op": "multi_lora_linear", "device": "here", "threads": 2, "isa": "avx2", "commit": "not-a-commit+",
        "versions": {"torch": "2", "peft": "not installed"}, "cold_mb": 64,
        "limits": {"bytes_per_s": 1.0, "flop_per_s": {"bfloat16": 2.0}}, "overhead_us": {"x": 1.0},
        "rows": [
            {"case": f"{who} int4{mix}", "dtype": "bfloat16", **measured, "m": 1, "n": 8, "k": 8}
            for who, mix in (("base", ""), ("bitfuse", " zipf"), ("loop", " zipf"))
        ],
    }  # fmt: skip
    file = tmp_path / "multi_lora_linear.json"
    file.write_text(json.dumps(old))
    assert "rewritten" in cli("--migrate", file).stdout and "already" in cli("--migrate", file).stdout
    (found,) = results.load(file)["runs"]
    assert [(r["case"], r["who"], r["sizes"]["mix"]) for r in found["rows"]] == [
        ("base int4 (cpp)", "bitfuse", "none"), ("bitfuse int4 (cpp)", "bitfuse", "zipf"),
        ("loop int4", "torch", "zipf"),
    ]  # fmt: skip
    for r in found["rows"]:
        assert {name: r[name] for name in measured} == measured
    assert found["commit"] == "not-a-commit+changes" and found["versions"]["peft"] is None
    file.write_text(json.dumps({"op": "rope", "rows": [{}]}))
    assert cli("--migrate", file).exit_code == 2


def test_the_results_of_this_repository_are_sound() -> None:
    for file in (results.ROOT / "benchmarks" / "results").glob("*/*.json"):
        if file.stem in bench.SUITES:
            assert results.load(file)["op"] == file.stem


# comparison


def test_comparison_looks_beyond_the_noise(tmp_path: Path) -> None:
    for name, medians in (("a", (1.0, 1.0, 1.0, 1.0)), ("b", (1.2, 1.02, 0.8, 1.2))):
        rows = [row(f"bitfuse {i}", median) for i, median in enumerate(medians[:3])]
        results.append(tmp_path / name / "rope.json", "rope", "here", run_of(*rows, row("torch", medians[3])))
    changes = compare.compare(
        *(compare.read(str(tmp_path / name), list(bench.SUITES), tmp_path) for name in ("a", "b"))
    )
    assert [c.verdict for c in changes] == ["slower", "same", "faster", "slower"]
    assert [c.regression for c in changes] == [True, False, False, False]  # a peer's is not ours
    done = cli("--compare", tmp_path / "a", tmp_path / "b", "--fail")
    assert done.exit_code == 1 and "4 cases: 2 slower, 1 faster, 1 the same" in done.stdout
    assert cli("--compare", tmp_path / "b", tmp_path / "a", "--fail", "--json", "-").exit_code == 1
    assert cli("--compare", tmp_path / "a", tmp_path / "b").exit_code == 0
    assert cli("--compare", tmp_path / "a", tmp_path / "a" / "rope.json", "--fail").exit_code == 0
    assert cli("--compare", tmp_path / "a", tmp_path / "b", "sample").exit_code == 2
    # the folder of a device's folder will do, as for `bitfuse report`; that of several will not
    for name in ("one", "two"):
        (tmp_path / name / "device").mkdir(parents=True)
        (tmp_path / name / "device" / "rope.json").write_text((tmp_path / "a" / "rope.json").read_text())
    assert cli("--compare", tmp_path / "one", tmp_path / "two").exit_code == 0
    done = cli("--compare", tmp_path / "a", tmp_path)
    assert done.exit_code == 2 and "several devices' results: name one of a, b in it" in done.stderr


def test_comparison_of_commits_and_of_machines(tmp_path: Path) -> None:
    folder = tmp_path / results.folder(bench.device_name("cpu")).name
    file = folder / "rope.json"
    results.append(file, "rope", "here", run_of(row(median=1.0), commit="aaaa11112222"))
    slow = run_of(row(median=2.0), commit="bbbb11112222+changes")
    slow["limits"]["bytes_per_s"] = 5e8
    results.append(file, "rope", "here", slow)
    done = cli("--compare", "aaaa", "bbbb11", "--results", tmp_path, "--json", "-")
    (change,) = json.loads(done.stdout)["cases"]
    assert (change["ratio"], change["verdict"], change["machine"]) == (2.0, "slower", 0.5)
    assert (
        "the machine itself was measured at 0.50"
        in cli("--compare", "aaaa", "bbbb", "--results", tmp_path).stdout
    )
    done = cli("--compare", "aaaa", "cccc", "--results", tmp_path)
    assert done.exit_code == 2 and "aaaa11112222, bbbb11112222+changes" in done.stderr


# the command


def test_the_command_writes_and_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitfuse_tools.bench.command.effort_for", lambda *args, **kwargs: EFFORT)
    shape = tmp_path / "mine.json"
    sizes = {"hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 100}
    shape.write_text(json.dumps(sizes))
    common = ("rope", "merge_attention", "--shapes", shape, "--against", "torch", "--m", "2", "--quick")
    done = cli(*common, "--results", tmp_path)
    assert done.exit_code == 0 and "rope: mine, batch=2 seq=1 heads=4 head_dim=16" in done.stdout
    (folder,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    assert sorted(p.name for p in folder.iterdir()) == ["merge_attention.json", "rope.json"]
    (found,) = results.load(folder / "rope.json")["runs"]
    assert (
        found["command"]
        == "bitfuse bench rope merge_attention --shapes mine.json --against torch --m 2 --quick"
    )
    done = cli(*common, "--json", "-")
    records = json.loads(done.stdout)
    assert [r["op"] for r in records] == ["rope", "merge_attention"] and "rope: mine" in done.stderr
    file = tmp_path / "run.json"
    file.write_text(done.stdout)
    assert cli("--compare", folder, file).exit_code == 0
    assert "not written" in cli(*common).stdout


def test_bad_input_is_told_in_a_line(tmp_path: Path) -> None:
    for args, why in (
        (("nope",), "no op 'nope'; ops: lowbit_linear"),
        (("--dtype", "fp64"), "no dtype 'fp64'; expected float32"),
        (("--format", "int5"), "no format 'int5'; formats: int8"),
        (("--format", "int4:7"), "expected a multiple of 8"),
        (("--backend", "cublas"), "no backend 'cublas'"),
        (("--against", "cutlass"), "no against 'cutlass'"),
        (("--direction", "up"), "no direction 'up'"),
        (("rope", "--direction", "gradient"), "rope has no direction gradient"),
        (("--m", "0"), "m is '0', expected numbers"),
        (("--m", ","), "m is empty"),
        (("--rounds", "0"), "rounds is 0"),
        (("--threads", "0"), "threads is 0"),
        (("--device", "tpu"), "device is 'tpu'"),
        (("--shapes", "nope"), "expected one of llama3-8b"),
        (("rope", "--json", tmp_path), "is a folder"),
        (("--compare", "nope", "nope", "--results", tmp_path), "no commit in"),
        (("rope", "--device", "cpu", "--backend", "cuda"), "rope has no backend cuda on cpu"),
    ):
        done = cli(*args)
        assert done.exit_code == 2, args
        assert why in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    """A real signal, in the middle of the second op."""
    code = """
import os, signal, sys
from bitfuse_tools.bench import command, measure
from bitfuse_tools.cli import app
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests themselves ignore
effort = measure.Effort(rounds=2, budget=1e-4, patience=0.0, cold_mb=1)
command.effort_for = lambda *args, **kwargs: effort
sampled = measure.Chain.sample
def sample(self, effort):
    if self.contender.name == "bitfuse (cpp)" and len(self.times) == 1 and self.own_bytes > 1.2e6:
        os.kill(os.getpid(), signal.SIGINT)
    sampled(self, effort)
measure.Chain.sample = sample
app(["bench", "rope", "merge_attention", "--quick", "--against", "torch", "--results", sys.argv[1]])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "what was measured is kept" in done.stderr
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    (found,) = results.load(folder / "merge_attention.json")["runs"]
    assert found["interrupted"] and {r["case"] for r in found["rows"]} == {"torch", "bitfuse (cpp)"}


def test_pytest_benchmark_runs_the_same_cases() -> None:
    class Benchmark:
        def __init__(self) -> None:
            self.extra_info: dict[str, Any] = {}
            self.calls = 0

        def __call__(self, call: Any) -> None:
            call()
            self.calls += 1

    trial = next(t for t in bench.trials("rope") if t.contender.who == "bitfuse")
    fixture = Benchmark()
    replace(trial, setting=tiny())(fixture)
    assert fixture.calls == 1 and fixture.extra_info["layers"] >= 1
    assert isinstance(trial.problem, Problem)


def test_a_chain_holds_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that touches little of what it keeps does not fill the memory."""
    monkeypatch.setattr(measure, "MOST_LAYERS", 512)
    problem = bench.suites.SUITES["rope"].problems(tiny())[0]
    for held, depth in ((0.0, 512), (64 << 20, 8), (1 << 30, 1)):
        layers = [Layer(lambda: torch.zeros(1), 8.0, held_bytes=held)] * 512
        contender = Contender("x", "float32", layers.__getitem__)
        assert measure.Chain(problem, contender, tiny(), 256 << 20).depth == depth
        few = measure.Chain(problem, contender, tiny(), 256 << 20, most_held=128 << 20)
        assert few.depth == min(depth, 2 if held else depth)
    assert 0 < measure.free_memory("cpu") < 1 << 50

    def secretive(i: int) -> Layer:
        kept = torch.ones(16 << 20)
        return Layer(lambda: kept[:1], 8.0)

    monkeypatch.setattr(measure, "free_memory", lambda device: 2 << 30)
    depth = measure.Chain(problem, Contender("x", "float32", secretive), tiny(), 256 << 20).depth
    assert 7 <= depth <= 9  # 512 MiB of what the system says that it grew by

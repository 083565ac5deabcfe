"""`make gpu` without a GPU: units that hang, crash or are wrong, a full disk, a run that is cut; and a
rehearsal of all of it on the simulator."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bitfuse_tools.gpu import folder as folders
from bitfuse_tools.gpu import plan
from bitfuse_tools.gpu.folder import Folder
from bitfuse_tools.gpu.run import WITHOUT, Run
from bitfuse_tools.gpu.units import MISSING, ROOT, WRONG, Unit, execute

PRINTS = "import json, sys; json.dump([{'op': 'rope', 'device': 'gpu', 'runs': [1]}], sys.stdout)"


def unit(name: str, code: str, limit: float = 20, stage: str = "smoke", **more: Any) -> Unit:
    return Unit(name, stage, (sys.executable, "-c", code), limit, **more)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WITHOUT, raising=False)


def run_of(path: Path, sources: str = "0", minutes: float = 1.0, **more: Any) -> Run:
    return Run(Folder(path, sources), minutes, **more)


def statuses(run: Run) -> dict[str, str]:
    return {name: outcome.status for name, outcome in run.folder.units.items()}


@pytest.mark.usefixtures("alone")
def test_what_becomes_of_units(tmp_path: Path) -> None:
    """Each in its own way; those behind them run, without the families that failed."""
    run = run_of(tmp_path)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    first = [
        unit("right", "print('fine')", family="rope:triton"),
        unit("wrong", f"raise SystemExit({WRONG})", family="sample:triton"),
        unit("not here", f"raise SystemExit({MISSING})", family="append_kv:triton"),
        unit("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", family="attention:cuda"),
        unit("hangs", "while True: pass", limit=1, family="lowbit_linear:cuda"),
        unit("is deaf", deaf, limit=1, family="attention:triton"),
        unit("raises", "raise RuntimeError('no room')", family="lora_linear:cuda"),
    ]
    run.stage(first, 4, run.end)
    assert statuses(run) == {
        "right": "ok", "wrong": "wrong", "not here": "missing", "crashes": "crashed", "hangs": "hung",
        "is deaf": "hung", "raises": "failed",
    }  # fmt: skip
    said = run.folder.units
    assert (
        said["right"].said == "fine"
        and "SIGSEGV" in said["crashes"].said
        and "no room" in said["raises"].said
    )
    without = {
        "sample:triton",
        "attention:cuda",
        "lowbit_linear:cuda",
        "attention:triton",
        "lora_linear:cuda",
    }
    assert set(run.left_out()) == without
    then = [
        unit("told", "import os; print(os.environ['BITFUSE_WITHOUT'])", stage="tests"),
        unit("of a family that crashed", "print('never')", stage="headline", family="attention:cuda"),
        unit("fails later", "raise SystemExit(1)", stage="headline", family="rope:triton"),
    ]
    run.stage(then, 1, run.end)
    assert (
        set(said["told"].said.split(",")) == without and said["of a family that crashed"].status == "left out"
    )
    assert "rope:triton" not in run.left_out()  # wrong options, say: its smoke test was right
    again = json.loads((tmp_path / "gpu.json").read_text())
    assert set(again["without"]) == without and again["running"] == {}
    assert {name: u["status"] for name, u in again["units"].items()} == statuses(run)
    assert "== crashes: crashed" in (tmp_path / "log.txt").read_text()


def test_nobody_waits_for_a_process_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in a driver is not ended by SIGKILL: here signals do not arrive."""
    sent: list[int] = []
    monkeypatch.setattr("bitfuse_tools.gpu.units._signal", lambda group, number: sent.append(number))
    pids: list[int] = []
    at = time.monotonic()
    ended = execute([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, 0.5, 0.3, pids.append)
    assert time.monotonic() - at < 10
    assert ended.stuck and ended.code is None and sent == [signal.SIGINT, signal.SIGKILL]
    os.killpg(pids[0], signal.SIGKILL)


@pytest.mark.usefixtures("alone")
def test_what_was_measured_before_sigint_is_kept(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    code = f"import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: pass\n{PRINTS}"
    bench = [unit(f"bench {i}", code, 1, "headline", into="bench.json") for i in range(2)]
    run.stage(bench, 1, run.end)
    assert set(statuses(run).values()) == {"hung"}
    assert json.loads((tmp_path / "bench.json").read_text()) == [
        {"op": "rope", "device": "gpu", "runs": [1, 1]}
    ]


@pytest.mark.usefixtures("alone")
def test_the_next_run_goes_on(tmp_path: Path) -> None:
    """With what was cut or left out; from the beginning when the sources are others."""
    code = f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"
    both = [unit("one", code, 20, "tests"), unit("two", f"import time; time.sleep(30); {code}", 20, "tests")]
    run = run_of(tmp_path / "out")
    run.stage(both, 1, time.monotonic() + 4)
    assert statuses(run) == {"one": "ok", "two": "cut"}
    run.stage([unit("three", code, 20, "tests")], 1, time.monotonic() + 1)
    assert statuses(run)["three"] == "cut" and (tmp_path / "ran").read_text() == "x"
    run = run_of(tmp_path / "out")
    assert statuses(run) == {"one": "ok", "two": "cut", "three": "cut"}
    run.stage([both[0], unit("two", code, 20, "tests")], 1, run.end)
    assert statuses(run)["two"] == "ok" and (tmp_path / "ran").read_text() == "xx"
    assert run_of(tmp_path / "out", "1").folder.units == {}
    (tmp_path / "out" / "gpu.json").write_text('{"sources": "0", "units": {"one": 3}}')
    assert run_of(tmp_path / "out").folder.units == {}


def test_what_a_run_left_behind_is_ended(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        folder = Folder(tmp_path, "0")
        folder.begun("a unit", child.pid)
        folder._state["running"]["of another boot"] = [other.pid, "then 12"]
        folder.begun("another", child.pid)
        Folder(tmp_path, "0")
        assert child.wait(10) == -signal.SIGKILL and other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.usefixtures("alone")
def test_a_full_disk_costs_nothing_that_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full, write = [True], folders._write

    def writes(path: Path, text: str) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)

    monkeypatch.setattr(folders, "_write", writes)
    run = run_of(tmp_path / "out")
    run.stage(
        [unit("bench", PRINTS, 20, "headline", into="bench.json"), unit("b", "print('fine')")], 1, run.end
    )
    assert set(statuses(run).values()) == {"ok"} and run.folder.trouble is not None
    said = capsys.readouterr().err
    assert said.count("No space left on device") == len(set(said.splitlines())) and not list(
        (tmp_path / "out").glob("*")
    )
    full[0] = False
    run.stage([unit("bench 2", PRINTS, 20, "headline", into="bench.json")], 1, run.end)
    assert run.folder.trouble is None
    assert json.loads((tmp_path / "out/bench.json").read_text())[0]["runs"] == [1, 1]
    assert set(json.loads((tmp_path / "out/gpu.json").read_text())["units"]) == {"bench", "b", "bench 2"}


@pytest.mark.usefixtures("alone")
def test_the_callers_paths_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    monkeypatch.setenv("BITFUSE_KERNEL_PATH", "/kernels")
    monkeypatch.setenv(WITHOUT, "rope:triton")
    run = run_of(tmp_path, kernels=["/made"])
    environment = run.environment(unit("any", ""))
    assert environment["PYTHONPATH"] == f"{ROOT / 'python'}:/theirs"
    assert environment["BITFUSE_KERNEL_PATH"] == "/made:/kernels" and environment[WITHOUT] == "rope:triton"


def test_the_units_of_a_gpu(tmp_path: Path) -> None:
    """Their commands are commands, and their limits fit."""
    from bitfuse_tools.bench import command
    from bitfuse_tools.gpu.facts import families

    found = families()
    assert {"attention:cuda", "multi_lora_linear:cuda", "rope:triton"} <= set(found) and len(found) > 15
    place = plan.Place(tmp_path, tmp_path / "out", 16, families=tuple(found))
    units = {stage: plan.units(stage, place) for stage in plan.STAGES}
    names = [u.name for stage in units.values() for u in stage]
    assert len(set(names)) == len(names) and sum(name.startswith("tests ") for name in names) > 20
    assert {u.family for u in units["headline"]} - {None} <= set(found)
    for name, words, limit, _ in plan.HEADLINE:
        op, *rest = words.split()
        assert limit <= 60 and "=" not in name
        given: dict[str, Any] = {
            a[2:]: b for a, b in zip(rest, [*rest[1:], "--"], strict=True) if a[:2] == "--" and b[:2] != "--"
        }
        given.pop("rounds", None)
        options = command.Options(ops=(op,), device="cpu", **given)
        command.known_ops(options.ops), command.setting_of(options)
    assert sum(u.limit for u in units["headline"]) < 0.35 * 570 * 3  # limits are for what goes wrong


# the rehearsal

# imported by every interpreter that starts with its folder on PYTHONPATH: kernels that hang, crash or are
# wrong, and a disk that is full for a while
PLANT = """
import errno, importlib.abc, importlib.machinery, os, signal, sys, time
PLANTS = dict(word.split("=") for word in os.environ.get("PLANTS", "").split())

def bad(how, run):
    def crash(*args):
        os.kill(os.getpid(), signal.SIGSEGV)
    def hang(*args):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while True:
            time.sleep(1)
    def wrong(*args):
        out = run(*args)
        return tuple(t * 1.25 for t in out) if isinstance(out, tuple) else out * 1.25
    return {"crash": crash, "hang": hang, "wrong": wrong}[how]

def backends(module):
    made = module.Candidates.__init__
    def init(self, op, backends, *rest):
        for backend in backends:
            if how := PLANTS.get(f"{op}:{backend.name}"):
                object.__setattr__(backend, "run", bad(how, backend.run))
        made(self, op, backends, *rest)
    module.Candidates.__init__ = init

def folder(module):
    write, left = module._write, [int(PLANTS.get("full", 0))]
    def full(path, text):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)
    module._write = full

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        after = {"bitfuse.core.backends": backends, "bitfuse_tools.gpu.folder": folder}.get(name)
        if after is None or not PLANTS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def both(module):
            load(module)
            after(module)
        spec.loader.exec_module = both
        return spec

sys.meta_path.insert(0, Finder())
"""
PLANTED = {"gated_activation": "hang", "rope": "crash", "decode_attention": "wrong"}
FAMILIES = ("lowbit_linear:cuda", "gated_activation:triton", "rope:triton", "decode_attention:cuda")


@contextlib.contextmanager
def rehearsal(out: Path, plants: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(out.parent), "PLANTS": plants, "OMP_NUM_THREADS": "1"}
    environment.pop(WITHOUT, None)
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--out", str(out), "--families", *FAMILIES]
    with subprocess.Popen(
        [*command, "--minutes", "8", *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def state(out: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((out / "gpu.json").read_text()))
    except FileNotFoundError:
        return {"units": {}, "running": {}}


def test_a_rehearsal_with_every_fault(tmp_path: Path) -> None:
    """A kernel hangs, one crashes, one is wrong; the run is killed in the middle, and the next one finds the
    disk full for a while. All else is measured."""
    (tmp_path / "sitecustomize.py").write_text(PLANT)
    out = tmp_path / "out"
    kernels = {"gated_activation": "triton", "rope": "triton", "decode_attention": "cuda"}
    plants = " ".join(f"{op}:{kernels[op]}={how}" for op, how in PLANTED.items())
    with rehearsal(out, plants) as process:
        until = time.monotonic() + 240
        while "smoke rope:triton" not in state(out)["units"] and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.2)
        process.kill()
        process.wait()
    before = state(out)
    hanging = [pid for name, (pid, _) in before["running"].items() if "gated" in name]
    with rehearsal(out, f"{plants} full=3") as process:
        said, errors = process.communicate(timeout=480)
    assert process.returncode == 1, (said, errors)
    found = state(out)
    units = {name: unit["status"] for name, unit in found["units"].items()}
    assert units.pop("smoke gated_activation:triton") == "hung", said
    assert units.pop("smoke rope:triton") == "crashed" and units.pop("smoke decode_attention:cuda") == "wrong"
    assert set(units.values()) == {"ok"}, (units, said, errors)
    stages = {name.split()[0] for name in units}
    assert stages == {"smoke", "headline", "sweep", "tests", "tune"}
    assert "No space left on device" in errors and found["running"] == {}
    assert set(found["without"]) == {f"{op}:{kernels[op]}" for op in PLANTED}
    last = said.splitlines()[-12:]
    assert any("left out of what followed: " in line and "rope:triton" in line for line in last)
    assert any("smoke rope:triton: crashed" in line and "SIGSEGV" in line for line in last)
    for pid in hanging:  # the second run ended what the first left behind
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1]
    assert (out / "report.txt").read_text() in said
    for name in ("smoke.json", "bench.json", "sweeps.json", "policy.json", "log.txt"):
        assert (out / name).stat().st_size > 50, name
    assert "skipped" in found["units"]["tests tests/linear/test_gated_activation.py"]["said"]
    bench = str(out / "bench.json")
    compared = subprocess.run(
        [sys.executable, "-m", "bitfuse", "bench", "--compare", bench, bench],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
    )  # fmt: skip
    assert "cases: 0 slower" in compared.stdout, compared.stderr

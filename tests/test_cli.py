"""The command line: help that teaches, `bitfuse info`, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse import info
from bitfuse.cli import app
from bitfuse.op import Backend
from bitfuse.ops.lowbit_linear import forward_op
from typer.testing import CliRunner


def bitfuse_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bitfuse", *arguments], capture_output=True, text=True)


def test_version_and_help() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == bitfuse.__version__ + "\n"
    top = CliRunner().invoke(app, ["--help"]).stdout
    assert "demo" in top and "info" in top and "quantize_" in top
    demo = CliRunner().invoke(app, ["demo", "--help"]).stdout
    for option in ("--formats", "--device", "--model", "--out", "--batch-size", "--threads", "--dtype"):
        assert option in demo
    assert "bitfuse[demo]" in demo  # not eaten as markup


def test_unknown_option() -> None:
    result = CliRunner().invoke(app, ["demo", "--colour", "blue"])
    assert result.exit_code == 2 and "No such option: --colour" in result.stderr


def test_info() -> None:
    """The real command, without the simulator of these tests."""
    done = bitfuse_command("info", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert facts["bitfuse"] == bitfuse.__version__ and facts["packages"]["torch"] == torch.__version__
    assert facts["devices"][0]["device"] == "cpu" and facts["devices"][0]["threads"] >= 1
    backends = {backend["name"]: backend for backend in facts["backends"]}
    assert list(backends) == [backend.name for backend in forward_op.backends]
    assert backends["reference"]["alive"] and set(backends["reference"]["formats"].values()) == {"right"}
    for backend in backends.values():
        assert backend["alive"] or backend["reason"]
        assert not any(outcome.startswith("wrong") for outcome in backend["formats"].values())
    assert str(Path.home()) not in done.stdout and str(Path(bitfuse.__file__).parent) not in done.stdout
    text = info.as_text(facts)
    assert all(line[:10].strip() or line.startswith(" ") for line in text.splitlines())
    assert "reference  alive on cpu" in text


def backend(run: Any, supports: Any = lambda *_: None) -> Backend:
    return Backend("reference", ("cpu",), supports, run)


@pytest.mark.parametrize(
    "run, said",
    [
        (lambda *args: forward_op.reference(*args) * 1.001, "wrong: error"),
        (lambda *args: forward_op.reference(*args) * float("nan"), "wrong: error nan"),
    ],
)
def test_info_finds_wrong_numbers(run: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_op, "backends", (backend(run),))
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 1 and said in result.stdout


def test_info_survives_a_broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(forward_op, "backends", (backend(broken),))
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 1
    assert (
        "wrong: RuntimeError: no kernel image is available" in result.stdout
        and "and more" not in result.stdout
    )


def test_info_says_why_not() -> None:
    check = info.check_backend(
        backend(forward_op.reference, lambda x, weight, bias: f"no {weight.format} today")
    )
    assert not check.alive and check.right
    assert check.reason is not None and "no int8 today" in check.reason and "no nf4 today" in check.reason


def test_commit_and_versions() -> None:
    commit = info.commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 12
    assert info.versions()["torch"] == torch.__version__

"""The command line: help that teaches, `bitfuse info`, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.core import backends
from bitfuse.core.backends import Backend
from bitfuse.ops.linear.lowbit_linear import forward_op
from bitfuse_tools import info
from bitfuse_tools.cli import app
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


SCRIPT = """
import sys
sys.argv[0] = "bitfuse"
sys.modules.update(dict.fromkeys({absent!r}))
from bitfuse_tools.cli import main
try:
    main()
finally:
    found = [name for name in ("torch", "numpy", "bitfuse", "rich", "tqdm", "jinja2") if name in sys.modules]
    print("imported:", *found, file=sys.stderr)
"""


def script(*arguments: str, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`bitfuse` as the shell starts it, where some packages are not installed; what it imported is told."""
    command = [sys.executable, "-c", SCRIPT.format(absent=absent), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("command", ["", *(c.name or "" for c in app.registered_commands)])
def test_help_is_there_at_once(command: str) -> None:
    """Under 0.4 s on a quiet machine: by what is imported, torch alone takes seconds."""
    done = script(*filter(None, [command]), "--help")
    assert done.returncode == 0 and "Usage: bitfuse" in done.stdout, done.stderr
    assert done.stderr == "imported:\n"


def test_what_needs_no_torch_imports_none() -> None:
    done = script("--version")
    assert (done.stdout, done.stderr) == (bitfuse.__version__ + "\n", "imported:\n")
    done = script("bench", "--colour", "blue")
    assert done.returncode == 2 and "No such option: --colour" in done.stderr
    assert done.stderr.endswith("imported:\n")


@pytest.mark.parametrize(
    "command, absent, said",
    [
        ("info", "typer", "bitfuse: the command line needs typer: pip install 'bitfuse[cli]'"),
        ("report", "jinja2", "bitfuse report: this needs jinja2: pip install 'bitfuse[cli]'"),
        ("demo", "rich", "bitfuse demo: this needs rich: pip install 'bitfuse[cli]'"),
        ("finetune", "tqdm", "bitfuse finetune: this needs tqdm: pip install 'bitfuse[cli]'"),
        ("demo", "transformers", "bitfuse demo: the demo needs transformers: pip install 'bitfuse[demo]'"),
    ],
)
def test_what_is_missing_is_told(command: str, absent: str, said: str) -> None:
    """A line that says what to install."""
    done = script(command, absent=(absent,))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == said and len(done.stderr.splitlines()) == 2, done.stderr


def test_unknown_option() -> None:
    result = CliRunner().invoke(app, ["demo", "--colour", "blue"])
    assert result.exit_code == 2 and "No such option: --colour" in result.stderr


def test_info() -> None:
    """The real command, without the simulator of these tests."""
    done = bitfuse_command("info", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert facts["bitfuse"] == bitfuse.__version__ and facts["packages"]["torch"] == torch.__version__
    assert facts["native"]["_cpu"]["built"]
    assert facts["devices"][0]["device"] == "cpu" and facts["devices"][0]["threads"] >= 1
    by_name = {backend["name"]: backend for backend in facts["backends"]}
    assert list(by_name) == [backend.name for backend in forward_op.backends]
    assert by_name["reference"]["alive"] and set(by_name["reference"]["formats"].values()) == {"right"}
    for backend in by_name.values():
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


@pytest.mark.parametrize("how", ["module", "script"])
def test_ctrl_c_while_torch_is_imported(how: str, tmp_path: Path) -> None:
    """A line and 130, as later on; of a program of one's own, KeyboardInterrupt as ever."""
    file = tmp_path / "bitfuse"
    file.write_text("import sys\nfrom bitfuse_tools.cli import main\nsys.exit(main())\n")
    command = ["-m", "bitfuse"] if how == "module" else [str(file)]
    process = subprocess.Popen(
        [sys.executable, *command, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():  # as soon as its first library is there
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "bitfuse: interrupted\n")


COMMANDS = {
    "demo": ("--seconds", "1", "--formats", "int8"),
    "finetune": ("--epochs", "1", "--no-baseline"),
    "explain": ("lowbit_linear",),
    "compile": ("--arch", "h100", "--op", "rope", "--backend", "triton"),
    "bench": ("rope", "--quick"),
    "tune": (),
}


@pytest.mark.parametrize("asked", ["triton", "foo"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_backend_that_is_not_here(
    command: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BITFUSE_BACKEND on a machine that can't serve it: one line, whatever the command."""
    monkeypatch.setattr(backends, "simulated", lambda: False)
    monkeypatch.setenv("BITFUSE_BACKEND", asked)
    monkeypatch.chdir(tmp_path)
    token = backends.asked.set(asked)  # as the variable does at the start
    done = CliRunner().invoke(app, [command, *COMMANDS[command]])
    backends.asked.reset(token)
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, (done.output, done.exception)
    assert done.stderr.startswith(f"bitfuse {command}: ") and "BITFUSE_BACKEND is" in done.stderr
    assert not done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked", ["triton", "foo", "cpp"])
def test_info_says_that_every_call_fails(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info.device, "simulated", lambda: False)
    monkeypatch.setenv("BITFUSE_BACKEND", asked)
    done = CliRunner().invoke(app, ["info"])
    assert done.exit_code == (0 if asked == "cpp" else 1)
    assert ("so every call fails" in done.stdout) == (asked != "cpp")


def test_info_tells_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variable that the package reads, and no path."""
    source = "".join(p.read_text() for p in Path(bitfuse.__file__).parents[1].rglob("*.py"))
    read = set(re.findall(r'environ(?:\.get\(|\[)\s*"(BITFUSE_\w+)"', source)) | {"BITFUSE_CPU_ISA"}
    assert read <= {*info._ENVIRONMENT, *info._PATHS} and len(read) > 6
    monkeypatch.setenv("BITFUSE_KERNEL_PATH", f"{tmp_path}{os.pathsep}/nowhere")
    monkeypatch.setenv("BITFUSE_CHECK", "1")
    facts = info.collect(probe=False)
    assert facts["environment"]["BITFUSE_KERNEL_PATH"] == "2 folders, 1 there"
    assert facts["environment"]["BITFUSE_CHECK"] == "1" and {"peft", "bitsandbytes"} <= set(facts["packages"])
    assert str(tmp_path) not in info.as_text(facts)

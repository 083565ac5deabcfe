"""What gets to a user: a package that can be imported, with its kernels and their sources."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import cusim
import pytest
from bitfuse.core import bundle
from bitfuse_tools.compile import toolchain

ROOT = Path(__file__).parents[2]
TOP = ("python", "kernels", "csrc", "build_backend", "tests")


def python(*args: str, cwd: Path = ROOT, path: Path | str = ROOT / "python") -> str:
    """What a Python of its own prints."""
    env = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_no_links() -> None:
    """pip unpacks those of a ZIP as text files."""
    ours = [path for top in TOP for path in (ROOT / top).rglob("*") if "build" not in path.parts]
    assert len(ours) > 100 and [path for path in ours if path.is_symlink()] == []


def test_the_checkout_hides_no_other_kernels(tmp_path: Path) -> None:
    """From the top level, PyPI's package `kernels` is found, and ours under its own name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 1")
    code = "import kernels, bitfuse.kernels.attention.rope as ours; "
    code += "print(kernels.get_kernel, kernels.__file__, ours.__file__)"
    path = f"{ROOT / 'python'}{os.pathsep}{tmp_path}"
    there, here = tmp_path / "kernels" / "__init__.py", ROOT / "kernels" / "attention" / "rope.py"
    assert python("-c", code, path=path) == f"1 {there} {here}"


LOOK = """
import bitfuse
from bitfuse.core import bundle
print(bitfuse.__file__)
print(*bundle.triton_sources(), *bundle.cuda_sources(), sep="\\n")
"""


def test_the_package_is_whole(tmp_path: Path) -> None:
    """As a wheel has it: Triton kernels and C++ sources lie beside the rest, wherever that is."""
    python("setup.py", "-q", "build_py", "--build-lib", str(tmp_path))
    package, *sources = python("-c", LOOK, cwd=tmp_path, path=tmp_path).splitlines()
    assert package == str(tmp_path / "bitfuse" / "__init__.py")
    own = {path.relative_to(ROOT) for top in ("kernels", "csrc") for path in (ROOT / top).rglob("*.[ch]*")}
    own |= {path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    assert own == {
        path.relative_to(tmp_path / "bitfuse")
        for top in ("kernels", "csrc")
        for path in (tmp_path / "bitfuse" / top).rglob("*.*")
    }
    assert len(sources) > 40 and all(Path(path).is_relative_to(tmp_path / "bitfuse") for path in sources)


def test_the_source_distribution_is_whole(tmp_path: Path) -> None:
    """It can run its own tests."""
    python("setup.py", "-q", "sdist", "--dist-dir", str(tmp_path))
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    ignored = {"__pycache__", "build", "bitfuse.egg-info"}
    for top in (*TOP, "benchmarks", "examples"):
        files = (path for path in (ROOT / top).rglob("*") if path.is_file() and path.suffix != ".so")
        ours = {str(f.relative_to(ROOT)) for f in files if not ignored & {*f.parts} and f.name[0] != "."}
        assert ours and ours - there == set()
    assert {"Makefile", "constraints.txt", "CONTRIBUTING.md"} <= there


# what the library needs

THIRD = ("typer", "rich", "tqdm", "jinja2", "matplotlib", "transformers", "safetensors", "peft")
ALONE = """
import sys
sys.modules.update(dict.fromkeys({absent!r}))
import bitfuse, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 64))
print(bitfuse.quantize_(model, "int4", skip=["1"]), bitfuse.add_lora_(model, "0", r=2))
print(model(torch.ones(64)).shape)
"""


def test_torch_and_numpy_are_all_it_needs() -> None:
    """Everything else is imported by who uses it; a table is a table without rich too."""
    absent = (*THIRD, "bitfuse_tools")
    said = python("-c", ALONE.format(absent=(*absent, "triton")))
    assert said == python("-c", ALONE.format(absent=("bitfuse_tools",)))
    assert "left as it is" in said and "whole model" in said and said.endswith("torch.Size([64])")
    code = "import sys, torch; before = {*sys.modules}; import bitfuse; "
    assert python("-c", code + f"print(*set({absent}) & {{*sys.modules}} - before)") == ""


# modules that are there for another package
OWN = {"peft_layers.py": {"peft"}, "triton_cache.py": {"triton"}, "__main__.py": {"bitfuse_tools"}}


def test_a_package_of_others_is_imported_inside_functions() -> None:
    """Except torch and numpy."""
    for path in (ROOT / "python/bitfuse").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            tops = {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "torch", "numpy"}
            own = {
                "peft_layers.py": {"peft"},
                "triton_cache.py": {"triton"},
                "__main__.py": {"bitfuse_tools"},
            }
            assert tops <= own.get(path.name, set()), path


# what is wrong is told before anything is compiled

WRONG = {
    "BITFUSE_CUDA is 'yes', expected 1": {"BITFUSE_CUDA": "yes"},
    "BITFUSE_CUDA_ARCHS has 'foo'": {"BITFUSE_CUDA_ARCHS": "foo"},
    "sm_75: the CUDA kernels need sm_80": {"BITFUSE_CUDA_ARCHS": "75", "BITFUSE_CUDA": "1"},
    "BITFUSE_CUDART is 'dynamic', expected static or shared": {"BITFUSE_CUDART": "dynamic"},
    "BITFUSE_JOBS is 'all'": {"BITFUSE_JOBS": "all"},
    r"CXX is 'no-such-g\+\+', which is not here: bitfuse needs g\+\+ 11 or later": {"CXX": "no-such-g++"},
    "CXX is 'false', which knows no C..20": {"CXX": "false"},
    "CXX is .*: No closing quotation": {"CXX": '"g++'},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BITFUSE_CUDA", "BITFUSE_CUDA_ARCHS", "BITFUSE_CUDART", "BITFUSE_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    toolchain.check_settings()
    for name, value in WRONG[message].items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, toolchain.CompilerMissing), match=message):
        toolchain.check_settings()
    monkeypatch.setenv("BITFUSE_CUDA", "0")  # then no architecture matters
    if set(WRONG[message]) <= {"BITFUSE_CUDA", "BITFUSE_CUDA_ARCHS"}:
        toolchain.check_settings()


HOOK = """
import sys
sys.modules["torch"] = None  # pip's isolated builds have none, and it would take the first second
sys.path.insert(0, "build_backend")
import bitfuse_build
bitfuse_build.get_requires_for_build_wheel()
"""


def test_a_build_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to find an architecture by a card's name, nor to list what is installed."""
    monkeypatch.setenv("BITFUSE_CUDA_ARCHS", "h100;rtx4090")
    python("-c", HOOK, path="")
    setup = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', '-q', '--name']; "
    assert python("-c", setup + "runpy.run_path('setup.py', run_name='__main__')", path="") == "bitfuse"


@pytest.mark.parametrize(
    "command", [["setup.py", "-q", "build_ext", "--build-lib", "LIB", "--build-temp", "TEMP"], ["-c", HOOK]]
)
@pytest.mark.parametrize(
    "environment", [{"BITFUSE_CUDA": "yes"}, {"BITFUSE_CUDA": "1", "CUDA_HOME": "/none"}]
)
def test_a_wrong_build_ends_at_once(command: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    """In one line, from setup.py and from pip's first call alike."""
    run = [sys.executable, *(str(tmp_path / c) if c in ("LIB", "TEMP") else c for c in command)]
    env = os.environ | environment
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(r"bitfuse: (BITFUSE_CUDA|CUDA_HOME) is .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


# CUDA's runtime


@pytest.mark.skipif(cusim.has_gpu(), reason="the simulator stands in for a GPU")
def test_the_tests_have_a_shared_runtime() -> None:
    """In whose place the simulator is. What users install has its own: tests/tools/test_compile.py."""
    extension = str(importlib.import_module("bitfuse._cuda").__file__)
    assert bundle.cudart_of(extension) == "shared", "build with `python setup.py build_ext --inplace`"

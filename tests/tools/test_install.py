"""What gets to a user: a package that can be imported, with its kernels and their sources."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import cusim
import pytest
from bitfuse.core import bundle
from bitfuse.core.cpu import extension as _cpu
from bitfuse_tools.compile import toolchain

ROOT = Path(__file__).parents[2]
TOP = ("python", "kernels", "csrc", "build_backend", "tests")


def python(*args: str, cwd: Path = ROOT, path: Path | str = ROOT / "python", **environment: str) -> str:
    """What a Python of its own prints."""
    env = os.environ | {"PYTHONPATH": str(path)} | environment
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
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for built in (ROOT / "python/bitfuse").glob("*.so"):
        (unpacked / "python/bitfuse" / built.name).write_bytes(built.read_bytes())
    # without conftest.py, which would build the simulator for minutes
    run = ("-m", "pytest", "-p", "no:cacheprovider", "--noconftest", "tests/weights/test_packing.py")
    said = python(*run, "-o", "addopts=", cwd=unpacked, path=unpacked / "python")
    assert " passed" in said and "failed" not in said


# pip's builds, with the objects of this checkout's build in place of minutes of compiling

KEPT = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "cpu"
COMPILER = """#!{python}
import os, shutil, sys
from pathlib import Path
args = sys.argv[1:]
if "-c" in args:
    source, out, depfile, target = (args[args.index(flag) + 1] for flag in ("-c", "-o", "-MF", "-MT"))
    print(source, file=open({log!r}, "a"))
    made = Path({kept!r}, *Path(target).parts[-2 if Path(target).parent.name == "bind" else -1:])
    if made.is_file():
        shutil.copy(made, out)
        Path(depfile).write_text(f"{{target}}: {{source}}\\n")
        sys.exit()
os.execvp("g++", ["g++", *args])
"""


class Pip:
    """Installs with the compiler above; `compiled` of the last call."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        compiler = folder / "compiler"
        compiler.write_text(COMPILER.format(python=sys.executable, log=str(self.log), kept=str(KEPT)))
        compiler.chmod(0o755)
        self.environment = {"CXX": str(compiler), "BITFUSE_CUDA": "0", "BITFUSE_CCACHE": "0"}
        self.environment |= {"BITFUSE_JOBS": "2", "BITFUSE_CPU_LEVELS": ""}

    def install(self, what: Path, name: str) -> Path:
        self.log.write_text("")
        options = ("--no-build-isolation", "--no-deps", "--no-index", "--no-compile", "--target")
        site = self.folder / name
        run = ("-m", "pip", "-q", "install", *options, str(site), str(what))
        python(*run, cwd=self.folder, path="", **self.environment)
        return site

    @property
    def compiled(self) -> int:
        return len(self.log.read_text().splitlines())


SERVED = """
import bitfuse, torch
w = bitfuse.quantize(torch.ones(8, 128), "int4")
print(bitfuse.explain(bitfuse.lowbit_linear, torch.ones(1, 128), w).chosen)
print(bitfuse.lowbit_linear(torch.ones(1, 128), w).shape)
"""


@pytest.mark.skipif(not KEPT.is_dir(), reason="no build of this checkout, whose objects would be taken")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git lists what a ZIP of the repository has")
def test_pip_installs(tmp_path: Path) -> None:
    """A ZIP as a forge serves it, without links, gives a package with its kernels; and of a folder that has
    not changed, nothing is compiled again."""
    asked = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    files = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    with zipfile.ZipFile(tmp_path / "bitfuse.zip", "w") as archive:
        for file in files:
            if (ROOT / file).is_file():
                archive.write(ROOT / file, f"bitfuse-main/{file}")
    pip = Pip(tmp_path)
    site = pip.install(tmp_path / "bitfuse.zip", "of_zip")
    jobs = len(toolchain.cpu_jobs(ROOT / "csrc", tmp_path))
    assert pip.compiled == jobs
    package, *sources = python("-c", LOOK, cwd=tmp_path, path=site).splitlines()
    assert package == str(site / "bitfuse" / "__init__.py") and len(sources) > 40
    assert python("-c", SERVED, cwd=tmp_path, path=site).splitlines() == ["cpp", "torch.Size([1, 8])"]

    with zipfile.ZipFile(tmp_path / "bitfuse.zip") as archive:
        archive.extractall(tmp_path)
    for name, compiled in (("first", jobs), ("second", 0)):
        site = pip.install(tmp_path / "bitfuse-main", name)
        assert pip.compiled == compiled and [*site.glob("bitfuse/_cpu*.so")]


ONE = """
#include "bind/cpu.h"
#include "cpu/linear/gated_activation.h"
namespace bitfuse {{
{others}
void bind_gated_activation(py::module_& m) {{
  m.def("calls", [] {{ return BITFUSE_OF_LEVEL(gated_activation) == &{level}::gated_activation; }});
}}
}}
"""


@pytest.mark.skipif(not KEPT.is_dir(), reason="no build of this checkout, whose objects would be taken")
def test_a_build_of_one_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of this machine, as `make demo` makes it; to ask it for another is an error."""
    csrc = ROOT / "csrc"
    monkeypatch.delenv("BITFUSE_CPU_LEVELS", raising=False)
    whole = toolchain.cpu_jobs(csrc, tmp_path)
    assert not _cpu.ONE_LEVEL
    monkeypatch.setenv("BITFUSE_CPU_LEVELS", "native")
    level = toolchain.native_level(csrc)
    assert level == python("-c", "import bitfuse._cpu; print(bitfuse._cpu.isa())", BITFUSE_CPU_ISA="")
    jobs = toolchain.cpu_jobs(csrc, tmp_path)
    kernels = {job for job in jobs if job.target.parent.name != "bind"}
    # those of a whole build, which compiles none of them again
    assert kernels == {job for job in whole if job.target.name.endswith(f".{level}.o")}

    # the module, and of one binding what it calls; the others add nothing
    names = re.findall(r"void (bind_\w+)\(py::module_& module\);", (csrc / "bind/cpu.h").read_text())
    source = tmp_path / "one.cpp"
    others = (f"void {name}(py::module_&) {{}}" for name in names if name != "bind_gated_activation")
    source.write_text(ONE.format(level=level, others="\n".join(others)))
    (module,) = (job for job in jobs if job.source == csrc / "bind/cpu.cpp")
    made = []
    for of in (module.source, source):
        made.append(toolchain.Job((*module.compiler, "-O0"), of, tmp_path / f"{of.stem}.o").make())
    made.append(KEPT / f"gated_activation.{level}.o")
    toolchain.link(tmp_path / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}", made, ["-fopenmp"])
    look = "import _cpu; print(_cpu.isa(), _cpu.ONE_LEVEL, _cpu.calls())"
    assert python("-c", look, path=tmp_path, BITFUSE_CPU_ISA="") == f"{level} True True"
    ask = "import _cpu\ntry: _cpu.isa()\nexcept ValueError as why: print(why)"
    for other in toolchain.levels(csrc):
        said = python("-c", ask, path=tmp_path, BITFUSE_CPU_ISA=other)
        if other != level and "which this machine does not support" not in said:
            assert said.startswith(f"BITFUSE_CPU_ISA is '{other}', which this build lacks: ")
            assert said.endswith(f" has {level} alone")
    said = python("-c", ask, path=tmp_path, BITFUSE_CPU_ISA="sse")
    assert said == f"BITFUSE_CPU_ISA is 'sse', expected one of {level}"


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
            assert tops <= OWN.get(path.name, set()), path


# what is wrong is told before anything is compiled

WRONG = {
    "BITFUSE_CUDA is 'yes', expected 1": {"BITFUSE_CUDA": "yes"},
    "BITFUSE_CUDA_ARCHS has 'foo'": {"BITFUSE_CUDA_ARCHS": "foo"},
    "sm_75: the CUDA kernels need sm_80": {"BITFUSE_CUDA_ARCHS": "75", "BITFUSE_CUDA": "1"},
    "BITFUSE_CUDART is 'dynamic', expected static or shared": {"BITFUSE_CUDART": "dynamic"},
    "BITFUSE_CPU_LEVELS is 'avx2', expected native": {"BITFUSE_CPU_LEVELS": "avx2"},
    "BITFUSE_JOBS is 'all'": {"BITFUSE_JOBS": "all"},
    r"CXX is 'no-such-g\+\+', which is not here: bitfuse needs g\+\+ 11 or later": {"CXX": "no-such-g++"},
    "CXX is 'false', which knows no C..20": {"CXX": "false"},
    "CXX is .*: No closing quotation": {"CXX": '"g++'},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {name for environment in WRONG.values() for name in environment}:
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
    "environment",
    [
        {"BITFUSE_CUDA": "yes"},
        {"BITFUSE_CUDA": "1", "CUDA_HOME": "/none"},
        {"BITFUSE_CUDA_ARCHS": "foo"},
        {"BITFUSE_CPU_LEVELS": "all"},
        {"CXX": "no-such-g++"},
    ],
    ids=lambda environment: [*environment][-1],
)
def test_a_wrong_build_ends_at_once(command: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    """In one line, from setup.py and from pip's first call alike."""
    run = [sys.executable, *(str(tmp_path / c) if c in ("LIB", "TEMP") else c for c in command)]
    env = os.environ | environment
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    name = [*environment][-1]
    assert done.returncode == 1 and re.fullmatch(rf"bitfuse: {name} (is|has) .*\n", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


# CUDA's runtime


@pytest.mark.skipif(cusim.has_gpu(), reason="the simulator stands in for a GPU")
def test_the_tests_have_a_shared_runtime() -> None:
    """In whose place the simulator is. What users install has its own: tests/tools/test_compile.py."""
    extension = str(importlib.import_module("bitfuse._cuda").__file__)
    assert bundle.cudart_of(extension) == "shared", "build with `python setup.py build_ext --inplace`"

"""nvcc and the host compiler: where they are, what they are asked for, and objects made again only when a
file or a command changed.

One code path for `pip install`, `setup.py build_ext --inplace` and `bitfuse compile`. Nothing but the
standard library: setup.py loads this file before there is torch.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# one release: unpinned, pip mixes releases and ptxas fails
NVCC_WHEELS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)
LOWEST = 80  # mma.m16n8k16 and cp.async: what the kernels are made of
DEFAULT_ARCHS = "80;90a+PTX"

CXXFLAGS: tuple[str, ...] = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")
# uninitialized: GCC 12 says it of its own AVX-512 headers
CXXFLAGS += ("-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
# -cudart says nothing of an object: which runtime is linked, `Nvcc.cudart` does
NVCCFLAGS = ("-std=c++20", "-O3", "-lineinfo", "-cudart", "shared")
# an older g++ says 201709 of C++20
LEVEL_PROBE = """
#include <cstdio>
#include "cpu/isa/levels.h"
#define CPU_HAS(feature) (__builtin_cpu_supports(#feature) != 0)
#define WIDEST(level, available, ...) if (has = has && (available)) widest = #level;
int main() {
  bool has = true;
  const char* widest = "";
  BITFUSE_LEVELS(WIDEST)
  std::puts(widest);
}
"""
PROBE = "#include <bit>\n#include <concepts>\nstatic_assert(__cplusplus >= 202002L);\n"


class CompilerMissing(RuntimeError):
    """Nothing can be compiled here; the message says what is missing and how to get it."""


class CompileError(RuntimeError):
    """A compiler or the linker failed; the message is its command and what it printed."""


# which machine code


@dataclass(frozen=True, order=True)
class Target:
    """An architecture to compile for.

    Attributes:
        number: its capability, 90 for 9.0.
        letter: "a" or "f" where instructions are asked for that only this architecture or family has.
        ptx: PTX too, of the plain architecture: that of an "a" target runs on no newer card.
    """

    number: int
    letter: str = ""
    ptx: bool = False

    def __str__(self) -> str:
        return f"sm_{self.number}{self.letter}"

    def gencode(self) -> list[str]:
        """nvcc's arguments."""
        code = f"{self.number}{self.letter}"
        flags = [f"-gencode=arch=compute_{code},code=sm_{code}"]
        if self.ptx:
            flags.append(f"-gencode=arch=compute_{self.number},code=compute_{self.number}")
        return flags


@functools.cache
def _gpus() -> Any:
    """bitfuse.core.gpus, a file by itself: with bitfuse would come torch, which a build does not have."""
    name = "_bitfuse_gpus"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "bitfuse/core/gpus.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def parse_targets(text: str, name: str = "BITFUSE_CUDA_ARCHS") -> list[Target]:
    """Architectures such as "80;90a", "8.0 9.0a+PTX", "sm_80", "h100" or "native", between semicolons,
    commas or blanks. A number is taken as it stands; a card is compiled for with all of its instructions.

    Raises:
        ValueError: one that nothing here knows.
        CompilerMissing: native, and no driver answers.
    """
    found: list[Target] = []
    for word in filter(None, re.split(r"[;,\s]+", text)):
        arch, _, ptx = word.partition("+")
        if ptx.upper() not in ("", "PTX") or ("+" in word and not ptx):
            raise ValueError(f"{name} has {word!r}, expected something like 80, 90a, 80+PTX or h100")
        if arch.lower() == "native":
            found += [Target(n, _letter(n), bool(ptx)) for n in native()]
            continue
        number = re.fullmatch(r"(?:sm_?|compute_?)?(\d{1,2})\.?(\d)([af]?)", arch.lower())
        if number:
            found.append(Target(int(number[1] + number[2]), number[3], bool(ptx)))
            continue
        try:
            card = _gpus().find(arch)
        except ValueError as why:
            raise ValueError(f"{name} has {word!r}: {why}") from None
        found.append(Target(card.capability, _letter(card.capability), bool(ptx)))
    if not found:
        raise ValueError(f"{name} is {text!r}, expected something like 80, 90a, 80+PTX or h100")
    return list(dict.fromkeys(found))


def _letter(number: int) -> str:
    """wgmma and setmaxnreg, and what came after them, exist only on the architecture-specific targets."""
    return "a" if number >= 90 else ""


def native() -> list[int]:
    """The compute capabilities of the GPUs here, as the driver tells.

    Raises:
        CompilerMissing: no driver answers, or it knows no GPU.
    """
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as why:
        raise CompilerMissing(f"native: nvidia-smi does not answer ({type(why).__name__})") from None
    capabilities = sorted({int(c.replace(".", "")) for c in said.split() if re.fullmatch(r"\d+\.\d", c)})
    if not capabilities:
        raise CompilerMissing("native: nvidia-smi names no GPU")
    return capabilities


def asked_targets() -> list[Target]:
    """What BITFUSE_CUDA_ARCHS asks for; unset, the GPUs that are here, else `DEFAULT_ARCHS`.

    Raises:
        ValueError: an architecture that nothing here knows.
        CompilerMissing: every one is below what the kernels are made of.
    """
    if asked := os.environ.get("BITFUSE_CUDA_ARCHS"):
        targets = parse_targets(asked)
    else:
        try:
            targets = [Target(n, _letter(n)) for n in native()]
        except CompilerMissing:
            targets = parse_targets(DEFAULT_ARCHS)
    able = [t for t in targets if t.number >= LOWEST]
    if not able:
        low = ", ".join(map(str, targets))
        raise CompilerMissing(f"{low}: the CUDA kernels need sm_{LOWEST} (mma.m16n8k16, cp.async)")
    return able


def gencode(targets: Sequence[Target]) -> list[str]:
    """nvcc's arguments for all of them."""
    return list(dict.fromkeys(flag for target in targets for flag in target.gencode()))


def hopper_gencode(targets: Sequence[Target]) -> list[str]:
    """What csrc/cuda/*_sm90.cu are compiled for: 90a alone, whose instructions no other target has; with its
    own PTX where that of 90 was asked for, which the tests' simulator runs. Nothing where 90a was not asked
    for: they are left out."""
    if not any(t.number == 90 and t.letter == "a" for t in targets):
        return []
    code = "[sm_90a,compute_90a]" if any(t.number == 90 and t.ptx for t in targets) else "sm_90a"
    return [f"-gencode=arch=compute_90a,code={code}"]


def made_for(targets: Sequence[Target]) -> str:
    """What the extension says that it holds: "sm_80 sm_90a compute_90"."""
    return " ".join(flag.rpartition("=")[2] for flag in gencode(targets))


# which compilers


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler.

    Attributes:
        path: of the program.
        origin: where it was found: "CUDA_HOME", "PATH", "the PyPI wheels" or "the usual folder".
        version: such as "13.0.88".
    """

    path: Path
    origin: str
    version: str

    @property
    def home(self) -> Path:
        return self.path.parent.parent

    def __str__(self) -> str:
        return f"nvcc {self.version} of {self.origin}"

    def release(self) -> tuple[str, str]:
        """Its folder, and a name."""
        return str(self.home), f"nvcc {self.version}"

    def includes(self) -> list[str]:
        """The host compiler's arguments for CUDA's headers."""
        folders = ("include", "targets/x86_64-linux/include", "targets/sbsa-linux/include")
        return [f"-I{self.home / folder}" for folder in folders if (self.home / folder).exists()]

    def cudart(self, kind: str = "static") -> list[str]:
        """The linker's arguments for CUDA's runtime.

        Args:
            kind: "static", which runs beside a torch of any CUDA; "shared", in whose place the tests'
                simulator can stand.

        Raises:
            CompilerMissing: there is none beside this compiler.
        """
        name = "libcudart_static.a" if kind == "static" else "libcudart.so*"
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            for library in sorted((self.home / folder).glob(name), key=lambda p: len(p.name)):
                # hidden, or those of another runtime in the process, torch's, would be called in their place
                own = [f"-Wl,--exclude-libs,{library.name}", "-ldl", "-lrt", "-lpthread"]
                return [str(library), *(own if kind == "static" else [])]
        wheel = next(w for w in NVCC_WHEELS if "runtime" in w)
        raise CompilerMissing(
            f"no {name.rstrip('*')} beside {self}: install the CUDA runtime (PyPI: {wheel})"
        )


def find_nvcc() -> Nvcc:
    """nvcc of CUDA_HOME, of PATH, of the PyPI wheels, or of the toolkit's usual folder.

    Raises:
        CompilerMissing: there is none.
    """
    if home := os.environ.get("CUDA_HOME"):
        if not (nvcc := Path(home) / "bin" / "nvcc").exists():
            raise CompilerMissing(f"CUDA_HOME is {home}, but there is no bin/nvcc in it")
        return _nvcc(nvcc, "CUDA_HOME")
    if (found := shutil.which("nvcc")) is not None:
        return _nvcc(_behind_wrapper(Path(found)), "PATH")
    for wheel in _in_wheels("bin/nvcc"):
        return _nvcc(wheel, "the PyPI wheels")
    if (usual := Path("/usr/local/cuda/bin/nvcc")).exists():
        return _nvcc(usual, "the usual folder")
    raise CompilerMissing(
        "no nvcc found: set CUDA_HOME, put nvcc on PATH, or pip install "
        + " ".join(NVCC_WHEELS)
        + " (and build with --no-build-isolation)"
    )


def _in_wheels(file: str) -> Iterator[Path]:
    """A file of the compiler's wheels, the newest release first: wherever packages are imported from, which
    in pip's isolated builds is a folder of its own."""
    for folder in dict.fromkeys([*sys.path, sysconfig.get_path("purelib")]):
        for home in sorted((Path(folder or ".") / "nvidia").glob("cu[0-9]*"), reverse=True):
            if (home / file).exists():
                yield home / file


def _behind_wrapper(nvcc: Path) -> Path:
    """A wrapper script on PATH need not lie in the toolkit: nvcc itself says where it is."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    for line in dry.splitlines():
        if line.startswith("#$ TOP="):
            return (Path(line.partition("=")[2]) / "bin" / "nvcc").resolve()
    return nvcc.resolve()


def _nvcc(path: Path, origin: str) -> Nvcc:
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as why:
        raise CompilerMissing(f"the nvcc of {origin} does not run: {why}") from None
    return Nvcc(path, origin, nvcc_version(said))


def nvcc_version(said: str) -> str:
    """The version in what `nvcc --version` prints."""
    version = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    if version is None:
        raise CompilerMissing("nvcc --version names no version")
    return version[1]


def find_tool(name: str) -> Path | None:
    """A program of the CUDA toolkit that is not needed to compile, such as nvdisasm: of CUDA_HOME, of PATH,
    of the PyPI wheels, or Triton's copy of it."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin" / name] if "CUDA_HOME" in os.environ else []
    places += [Path(found) for found in (shutil.which(name),) if found]
    places += [*_in_wheels(f"bin/{name}"), Path("/usr/local/cuda/bin") / name]
    places += [Path(folder or ".") / "triton" / "backends" / "nvidia" / "bin" / name for folder in sys.path]
    return next((place for place in places if place.is_file()), None)


def host_compiler() -> list[str]:
    """CXX, else g++.

    Raises:
        ValueError: CXX has a quote that is never closed.
    """
    try:
        return shlex.split(os.environ.get("CXX", "")) or ["g++"]
    except ValueError as why:
        raise ValueError(f"CXX is {os.environ['CXX']!r}: {why}") from None


def check_host_compiler() -> None:
    """Before minutes of compiling.

    Raises:
        CompilerMissing: it is not here, or knows no C++20.
    """
    command = host_compiler()
    asked = os.environ.get("CXX", "").strip()
    name = f"CXX is {asked!r}, which" if asked else f"the C++ compiler {command[0]}"
    wanted = "bitfuse needs g++ 11 or later, or another compiler of C++20 that CXX names"
    try:
        done = subprocess.run(
            [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
            input=PROBE, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as why:
        said = "is not here" if isinstance(why, FileNotFoundError) else f"does not run ({why})"
        raise CompilerMissing(f"{name} {said}: {wanted}") from None
    if done.returncode:
        said = next(iter((done.stderr or done.stdout).strip().splitlines()), f"exit status {done.returncode}")
        raise CompilerMissing(f"{name} knows no C++20 ({said}): {wanted}")


@functools.cache
def ccache() -> list[str]:
    """A compiler cache to put before a compiler, where one is on PATH and BITFUSE_CCACHE is not 0."""
    found = None if os.environ.get("BITFUSE_CCACHE") == "0" else shutil.which("ccache")
    return [found] if found else []


def worker_count() -> int:
    """BITFUSE_JOBS, else one a core.

    Raises:
        ValueError: BITFUSE_JOBS is no number above 0.
    """
    asked = os.environ.get("BITFUSE_JOBS", "")
    if asked and not (asked.isdecimal() and int(asked) > 0):
        raise ValueError(f"BITFUSE_JOBS is {asked!r}, expected a number above 0")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(asked or cores or 1)


# what is to be built


def cuda_wanted() -> bool | None:
    """BITFUSE_CUDA: the CUDA extension is demanded, left out, or made where that is possible (None).

    Raises:
        ValueError: it is something else.
    """
    said = os.environ.get("BITFUSE_CUDA", "")
    if said not in ("", "0", "1"):
        raise ValueError(
            f"BITFUSE_CUDA is {said!r}, expected 1 (CUDA kernels or no build), 0 (none) or unset"
        )
    return bool(int(said)) if said else None


def cudart_kind(default: str = "static") -> str:
    """BITFUSE_CUDART: how CUDA's runtime is linked.

    Raises:
        ValueError: neither "static" nor "shared".
    """
    kind = os.environ.get("BITFUSE_CUDART") or default
    if kind not in ("static", "shared"):
        raise ValueError(f"BITFUSE_CUDART is {kind!r}, expected static or shared")
    return kind


def check_settings() -> None:
    """The environment and the host compiler, before anything is fetched or compiled.

    Raises:
        ValueError, CompilerMissing: with what is wrong, in a line.
    """
    worker_count()
    cudart_kind()
    one_level()
    if cuda_wanted() is not False:
        try:
            asked_targets()
        except CompilerMissing:
            if cuda_wanted():
                raise
    check_host_compiler()


# objects


@dataclass(frozen=True)
class Job:
    """An object file to be made: the compiler with its arguments, what it reads, and where it goes.

    Attributes:
        releases: folders of released packages, each with a name that tells its version. pip's isolated builds
            have them somewhere else each time, so they are compared by name, neither by path nor by time.
    """

    compiler: tuple[str, ...]
    source: Path
    target: Path
    releases: tuple[tuple[str, str], ...] = ()

    def up_to_date(self) -> bool:
        """Whether the object was made by the same command from files that have not changed since."""
        depfile, log = self.target.with_suffix(".d"), self.target.with_suffix(".cmd")
        try:
            if log.read_text() != self.command():
                return False
            files = depfile.read_text().replace("\\\n", " ").partition(":")[2].split()
            made = self.target.stat().st_mtime
            return all(os.stat(f).st_mtime <= made for f in files)
        except OSError:
            return False

    def command(self) -> str:
        """What makes the object, for the next run to compare."""
        output = ["-o", str(self.target), "-MD", "-MF", str(self.target.with_suffix(".d"))]
        said = shlex.join([*self.compiler, "-c", str(self.source), *output])
        for folder, name in self.releases:
            said = said.replace(folder, f"<{name}>")
        return said

    def _forget_releases(self, depfile: Path) -> None:
        """Leave in the list of dependencies what may change."""
        files = depfile.read_text().replace("\\\n", " ").partition(":")[2].split()
        folders = tuple(f"{folder}{os.sep}" for folder, _ in self.releases)
        kept = [file for file in files if not file.startswith(folders)]
        depfile.write_text(f"{self.target}: " + " \\\n  ".join(kept) + "\n")

    def make(self) -> Path:
        """Compile it, unless that is done. What is half-written bears another name.

        Raises:
            CompileError: the compiler failed.
        """
        if not self.up_to_date():
            self.target.parent.mkdir(parents=True, exist_ok=True)
            depfile, log = self.target.with_suffix(".d"), self.target.with_suffix(".cmd")
            aside = self.target.with_suffix(f".part{os.getpid()}.o")
            try:
                # -MT: a compiler cache wants the same dependencies whatever the name aside
                output = ["-o", str(aside), "-MD", "-MF", str(depfile), "-MT", str(self.target)]
                log.unlink(missing_ok=True)
                run([*self.compiler, "-c", str(self.source), *output], f"compiling {self.source.name}")
                self._forget_releases(depfile)
                os.replace(aside, self.target)
            finally:
                aside.unlink(missing_ok=True)
            log.write_text(self.command())
        return self.target


def run(command: list[str], what: str) -> None:
    """Run a compiler; what it warns of goes to stderr.

    Raises:
        CompileError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{what} failed:\n  {shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)


def make_all(jobs: Sequence[Job], what: str = "bitfuse") -> list[Path]:
    """All objects, as many at once as `worker_count` says; those that are compiled are counted on stderr, as
    `what`. The first that fails ends it, when those that were begun are through.

    Raises:
        CompileError: a compiler failed.
    """
    stale = {job.target for job in jobs if not job.up_to_date()}
    count = itertools.count(1)
    if stale:
        _say(f"{what}: {len(stale)} of {len(jobs)} files to compile, {worker_count()} at once")

    def make(job: Job) -> Path:
        start = time.monotonic()
        made = job.make()
        if job.target in stale:
            took = time.monotonic() - start
            _say(f"{what}: [{next(count)}/{len(stale)}] {job.target.stem}, {took:.0f} s")
        return made

    pool = ThreadPoolExecutor(worker_count())
    try:
        return list(pool.map(make, jobs))
    finally:
        pool.shutdown(cancel_futures=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def link(target: Path, objects: Sequence[Path], libraries: Sequence[str]) -> Path:
    """A shared library of these objects, linked aside and renamed, so that a process that has the old file
    mapped keeps it.

    Raises:
        CompileError: the linker failed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        made = Path(aside) / target.name
        command = [*host_compiler(), "-shared", "-o", str(made), *map(str, objects), *libraries]
        run(command, f"linking {target.name}")
        os.replace(made, target)
    return target


# what bitfuse is made of


def levels(csrc: Path, machine: str | None = None) -> dict[str, list[str]]:
    """The instruction-set levels that every csrc/cpu/*.cpp is compiled for, the narrowest first, with their
    compiler's flags, as csrc/cpu/isa/levels.h lists them; one is picked at run time.

    Args:
        csrc: the folder of the sources.
        machine: as platform.machine() calls it; None: this one.
    """
    machine = (machine or platform.machine()).lower()
    rows = (csrc / "cpu" / "isa" / "levels.h").read_text().replace("\\\n", "")
    name = {"x86_64": "X86_64", "amd64": "X86_64", "aarch64": "AARCH64", "arm64": "AARCH64"}
    (line,) = re.findall(rf"#define BITFUSE_LEVELS_{name.get(machine, 'OTHER')}\(LEVEL, \.\.\.\)(.*)", rows)
    found: dict[str, list[str]] = {}
    flags: list[str] = []
    for level, needs in re.findall(r"LEVEL\((\w+),(.*?), *__VA_ARGS__\)", line):
        flags = flags + [f"-m{feature}" for feature in re.findall(r"CPU_HAS\((\w+)\)", needs)]
        found[level] = flags
    return found


def one_level() -> bool:
    """BITFUSE_CPU_LEVELS: "native", the level of this machine alone; or unset, all of them.

    Raises:
        ValueError: it is something else.
    """
    asked = os.environ.get("BITFUSE_CPU_LEVELS", "")
    if asked not in ("", "native"):
        raise ValueError(f"BITFUSE_CPU_LEVELS is {asked!r}, expected native (this machine's) or unset (all)")
    return bool(asked)


def native_level(csrc: Path) -> str:
    """The level that is picked at run time on this machine.

    Raises:
        CompileError: what the compiler makes does not run here.
    """
    with tempfile.TemporaryDirectory() as aside:
        program = Path(aside) / "level"
        program.with_suffix(".cpp").write_text(LEVEL_PROBE)
        command = [*host_compiler(), "-std=c++20", f"-I{csrc}", f"{program}.cpp", "-o", str(program)]
        run(command, "looking for this machine's instruction set")
        try:
            return subprocess.run([program], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError) as why:
            raise CompileError(
                f"BITFUSE_CPU_LEVELS is native, but what {command[0]} makes does not run here ({why})"
            ) from None


def pybind11_release() -> tuple[str, str]:
    """The headers' folder, and a name.

    Raises:
        CompilerMissing: it is not installed.
    """
    try:
        import pybind11
    except ImportError:
        raise CompilerMissing("pybind11 is not installed: pip install pybind11") from None
    return pybind11.get_include(), f"pybind11 {pybind11.__version__}"


def _bindings(csrc: Path) -> list[str]:
    includes = {sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11_release()[0]}
    return [*ccache(), *host_compiler(), *CXXFLAGS, f"-I{csrc}", *(f"-I{i}" for i in sorted(includes))]


def cpu_jobs(csrc: Path, out: Path) -> list[Job]:
    """The objects of bitfuse._cpu, of which each level has its own; the kernels are the same files whether
    BITFUSE_CPU_LEVELS asks for all levels or for one."""
    common = [*ccache(), *host_compiler(), *CXXFLAGS, "-fopenmp", f"-I{csrc}"]
    bindings = [*_bindings(csrc), "-fopenmp"]
    made = levels(csrc)
    if one_level():
        only = native_level(csrc)
        made = {only: made[only]}
        bindings += [f"-DBITFUSE_ONLY_LEVEL={only}", f"-DBITFUSE_OF_LEVEL(function)=(&{only}::function)"]
    jobs = [
        Job((*common, f"-DBITFUSE_ISA={level}", *flags), source, out / f"{source.stem}.{level}.o")
        for source in sorted((csrc / "cpu").rglob("*.cpp"))
        for level, flags in made.items()
    ]
    return jobs + [
        Job(tuple(bindings), source, out / "bind" / f"{source.stem}.o", (pybind11_release(),))
        for source in sorted((csrc / "bind").glob("cpu*.cpp"))
    ]


def cuda_jobs(csrc: Path, out: Path, nvcc: Nvcc, targets: Sequence[Target]) -> list[Job]:
    """The objects of bitfuse._cuda for these architectures."""
    common = [*ccache(), str(nvcc.path), *NVCCFLAGS, f"-I{csrc}", "-Xcompiler", "-fPIC"]
    common += ["-ccbin", host_compiler()[0]]
    everywhere, hopper = gencode(targets), hopper_gencode(targets)
    bindings = [*_bindings(csrc), f'-DBITFUSE_CUDA_ARCHITECTURES="{made_for(targets)}"']
    bindings += [*(["-DBITFUSE_SM90A"] if hopper else []), *nvcc.includes()]
    jobs = [
        Job((*common, *flags), source, out / f"{source.stem}.o", (nvcc.release(),))
        for source in sorted((csrc / "cuda").rglob("*.cu"))
        if (flags := hopper if source.stem.endswith("_sm90") else everywhere)
    ]
    return jobs + [
        Job(tuple(bindings), source, out / "bind" / f"{source.stem}.o", (pybind11_release(), nvcc.release()))
        for source in sorted((csrc / "bind").glob("cuda*.cpp"))
    ]

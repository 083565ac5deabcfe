"""Compiles the simulator on first use and loads it in place of CUDA's runtime library.

Imports neither torch nor triton: the library has to be in the process before torch is.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "src"
CACHE = HERE / "build"
NAME = "libcudart.so.13"
FLAGS = (
    *("-std=c++20", "-O3", "-g1", "-fPIC", "-march=native", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno"),  # a * b + c rounds twice, as the two instructions do
)
JOBS = 2


class BuildError(RuntimeError):
    """The simulator cannot be built here: no compiler, no CUDA headers, or a source that does not compile."""


def cuda_include() -> Path:
    """The folder of cuda_runtime_api.h: of a toolkit, or of NVIDIA's wheels."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        roots.append(Path(nvcc).resolve().parents[1])
    roots.append(Path("/usr/local/cuda"))
    packages = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path])
    roots += [Path(folder) / "nvidia" / name for folder in packages for name in ("cu13", "cuda_runtime")]
    for root in roots:
        if all((root / "include" / name).exists() for name in ("cuda.h", "cuda_runtime_api.h", "crt")):
            return root / "include"
    raise BuildError(
        "the CUDA headers are not here: set CUDA_HOME to a toolkit, or "
        "`pip install nvidia-cuda-runtime nvidia-cuda-crt`"
    )


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "g++-14", "g++-13", "g++-12", "g++-11")):
        if found := shutil.which(name):
            return found
    raise BuildError("no C++ compiler: set CXX or install g++ 11 or later")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _processor() -> str:
    """What -march=native depends on, so that a checkout shared by two machines keeps a build for each."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _key(sources: list[Path]) -> str:
    key = hashlib.sha256("\0".join((*FLAGS, platform.machine(), _processor())).encode())
    for source in sources:
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    return key.hexdigest()[:16]


@functools.cache
def library() -> Path:
    """The path of the compiled simulator, compiled now if its sources are new."""
    sources = sorted(SOURCE.glob("*.[chm]*"))
    built = CACHE / _key(sources) / NAME
    if built.exists():
        return built
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test workers one builds and the others wait for it
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as aside:
                made = _build([s for s in sources if s.suffix == ".cpp"], Path(aside))
                built.parent.mkdir(exist_ok=True)
                made.replace(built)
    return built


def declared(include: Path) -> list[str]:
    """The functions of the CUDA runtime, all of which a torch built for CUDA expects somewhere."""
    headers = (include / "cuda_runtime_api.h", include / "cuda_profiler_api.h")
    text = "".join(header.read_text(errors="replace") for header in headers if header.exists())
    return sorted(set(re.findall(r"\bcudaError_t\s+CUDARTAPI\s+(cuda\w+)\s*\(", text)))


def _rest(include: Path) -> str:
    """C++ that gives way to what the sources define: every other function says that it is not simulated."""
    weak = '__attribute__((weak)) int {0}() {{ return cusim_not_simulated("{0}"); }}'
    functions = [weak.format(name) for name in declared(include)]
    return "\n".join(['extern "C" {', "int cusim_not_simulated(const char* name);", *functions, "}", ""])


def _build(sources: list[Path], out: Path) -> Path:
    compiler, include = _compiler(), cuda_include()
    rest = out / "rest.cpp"
    rest.write_text(_rest(include))

    def compile_one(source: Path) -> str:
        made = str(out / f"{source.stem}.o")
        _run([compiler, *FLAGS, "-isystem", str(include), "-c", str(source), "-o", made])
        return made

    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, [*sources, rest]))
    made = out / NAME
    script = f"-Wl,-soname,{NAME},--version-script={SOURCE / 'runtime.map'}"
    _run([compiler, "-shared", *objects, "-o", str(made), script, "-ldl", "-pthread"])
    return made


@functools.cache
def load() -> ctypes.CDLL:
    """Put the simulator into this process. Call it before torch is imported.

    The dynamic linker knows a library by its soname: an extension that asks for libcudart.so.13 gets this.
    """
    return ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)


def has_gpu() -> bool:
    """Whether CUDA's driver sees a device, asked without torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def load_if_no_gpu() -> bool:
    """Load the simulator where there is no GPU; returns whether kernels run on it."""
    if has_gpu():
        return False
    load()
    return True

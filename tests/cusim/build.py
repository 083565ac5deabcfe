"""Compiles the simulator on first use and loads it in place of CUDA's runtime library.

Imports neither torch nor triton: the library has to be in the process before torch is.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import fcntl
import functools
import glob
import hashlib
import os
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
FLAGS = ("-std=c++20", "-O3", "-g1", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-march=native", "-Wall", "-Wextra")
JOBS = 2


class BuildError(RuntimeError):
    """The simulator cannot be built here: no compiler, no CUDA headers, or a source that does not compile."""


def cuda_include() -> Path:
    """The folder of cuda_runtime_api.h: of a toolkit, or of NVIDIA's wheels."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        roots.append(Path(nvcc).resolve().parents[1])
    roots.append(Path("/usr/local/cuda"))
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}
    roots += [Path(folder) / "nvidia" / wheel for folder in sorted(packages) for wheel in ("cu13", "cuda_runtime")]
    for root in roots:
        if (root / "include" / "cuda_runtime_api.h").exists() and (root / "include" / "cuda.h").exists():
            return root / "include"
    raise BuildError(
        "the CUDA headers are not here: set CUDA_HOME, or `pip install nvidia-cuda-runtime nvidia-cuda-crt`; "
        f"looked in {', '.join(map(str, roots))}"
    )


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "g++-12", "g++-11")):
        if found := shutil.which(name):
            return found
    raise BuildError("no C++ compiler: set CXX or install g++ 11 or later")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


@functools.cache
def library() -> Path:
    """The path of the compiled simulator, compiled now if its sources are new."""
    sources = sorted(SOURCE.iterdir())
    key = hashlib.sha256("\0".join(FLAGS).encode())
    for source in sources:
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = CACHE / key.hexdigest()[:16]
    built = folder / NAME
    if built.exists():
        return built
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test workers one builds and the others wait for it
        if built.exists():
            return built
        with tempfile.TemporaryDirectory(dir=CACHE) as aside:
            _build([s for s in sources if s.suffix == ".cpp"], Path(aside))
            folder.mkdir(exist_ok=True)
            os.replace(Path(aside) / NAME, built)
        for old in glob.glob(str(CACHE / "*" / NAME)):
            if Path(old) != built:
                shutil.rmtree(Path(old).parent, ignore_errors=True)
    return built


def _build(sources: list[Path], out: Path) -> None:
    compiler, include = _compiler(), cuda_include()

    def compile_one(source: Path) -> str:
        target = str(out / f"{source.stem}.o")
        _run([compiler, *FLAGS, "-isystem", str(include), "-c", str(source), "-o", target])
        return target

    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, sources))
    script = SOURCE / "runtime.map"
    _run(
        [compiler, "-shared", *objects, "-o", str(out / NAME), f"-Wl,-soname,{NAME}"]
        + [f"-Wl,--version-script={script}", "-ldl", "-pthread"]
    )


@functools.cache
def load() -> ctypes.CDLL:
    """Put the simulator into this process. Call it before torch is imported.

    The dynamic linker knows a library by its soname, so an extension that asks for libcudart.so.13 gets this one.
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

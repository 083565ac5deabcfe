"""Builds bitfuse._cpu always, and bitfuse._cuda when an nvcc is at hand. No torch is needed to build.

Environment:
    BITFUSE_CUDA        1 demands the CUDA extension (a failure fails the build), 0 leaves it out; else: tries
    BITFUSE_CUDA_ARCHS  such as "80;90a" or "80+PTX;90a+PTX"; unset: the GPU that is here, else 80;90a and PTX
    BITFUSE_JOBS        compilers at once; unset: one a core
    CUDA_HOME, CXX      where the toolkit is, and the host compiler
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
CXX = shlex.split(os.environ.get("CXX", "g++"))
# uninitialized: GCC 12 says it of its own AVX-512 headers
CXXFLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
CXXFLAGS += ["-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
X86_LEVELS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
X86_LEVELS["avx512bf16"] = [*X86_LEVELS["avx512"], "-mavx512vnni", "-mavx512bf16"]


def levels() -> dict[str, list[str]]:
    """The instruction-set levels that every csrc/cpu/*.cpp is compiled for; one is picked at run time."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return X86_LEVELS if x86 else {"portable": []}


class CudaMissing(RuntimeError):
    """The CUDA extension can't be built here; the message says what is missing and how to get it."""


def find_nvcc() -> Path:
    """nvcc of CUDA_HOME, of PATH, or of the compiler's PyPI wheels."""
    home = os.environ.get("CUDA_HOME")
    if home:
        if (nvcc := Path(home) / "bin" / "nvcc").exists():
            return nvcc
        raise CudaMissing(f"CUDA_HOME is {home}, but {nvcc} does not exist")
    if (found := shutil.which("nvcc")) is not None:
        # a wrapper script on PATH need not lie in the toolkit: ask nvcc itself where it is
        dry = subprocess.run(
            [found, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        ).stderr
        for line in dry.splitlines():
            if line.startswith("#$ TOP="):
                return (Path(line.partition("=")[2]) / "bin" / "nvcc").resolve()
        return Path(found).resolve()
    try:
        from cuda.pathfinder import find_nvidia_binary_utility

        if wheel := find_nvidia_binary_utility("nvcc"):
            return Path(wheel)
    except ImportError:
        pass
    if (wheel_nvcc := Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvcc").exists():
        return wheel_nvcc
    raise CudaMissing(
        "no nvcc found: set CUDA_HOME, put nvcc on PATH, or build with --no-build-isolation after "
        "pip install cuda-pathfinder nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 "
        "nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85"
    )


def cudart(home: Path) -> Path:
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        for library in sorted((home / folder).glob("libcudart.so*"), key=lambda p: len(p.name)):
            return library
    raise CudaMissing(
        f"no libcudart.so under {home}: install the CUDA runtime (PyPI: nvidia-cuda-runtime==13.0.96)"
    )


def architectures() -> list[str]:
    """nvcc's -gencode arguments."""
    asked = os.environ.get("BITFUSE_CUDA_ARCHS")
    if not asked:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            present = subprocess.run(
                query, capture_output=True, text=True, timeout=30, check=True
            ).stdout.split()
        except (OSError, subprocess.SubprocessError):
            present = []
        found = sorted({c.replace(".", "") for c in present}, key=int)
        # wgmma and setmaxnreg, and what came after them, exist only on the architecture-specific targets
        asked = ";".join(a + "a" if int(a) >= 90 else a for a in found) or "80;90a+PTX"
    flags = []
    for arch in filter(None, asked.replace(",", ";").replace(" ", ";").split(";")):
        number, _, ptx = arch.upper().removeprefix("SM_").partition("+")
        number = number.replace(".", "").lower()
        if not number.rstrip("af").isdigit() or ptx not in ("", "PTX"):
            raise CudaMissing(f"BITFUSE_CUDA_ARCHS has {arch!r}, expected something like 80, 90a or 80+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:  # PTX of the plain architecture: that of an 'a' target runs on no newer card
            plain = number.rstrip("af")
            flags.append(f"-gencode=arch=compute_{plain},code=compute_{plain}")
    return flags


def hopper(archs: list[str]) -> list[str]:
    """What csrc/cuda/*_sm90.cu are compiled for: 90a alone, whose instructions no other target has; with its
    own PTX where that of 90 was asked for, which the tests' simulator runs. Nothing where 90a was not asked
    for: they are left out."""
    if "-gencode=arch=compute_90a,code=sm_90a" not in archs:
        return []
    ptx = "-gencode=arch=compute_90,code=compute_90" in archs
    code = "[sm_90a,compute_90a]" if ptx else "sm_90a"
    return [f"-gencode=arch=compute_90a,code={code}"]


def up_to_date(target: Path, command: list[str]) -> bool:
    """True when the object was made by the same command from files that have not changed since."""
    depfile, log = target.with_suffix(".d"), target.with_suffix(".cmd")
    if not (target.exists() and depfile.exists() and log.exists() and log.read_text() == shlex.join(command)):
        return False
    files = depfile.read_text().replace("\\\n", " ").partition(":")[2].split()
    made = target.stat().st_mtime
    return all(Path(f).exists() and Path(f).stat().st_mtime <= made for f in files)


def run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n  {shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)


def compile_object(compiler: list[str], source: Path, target: Path) -> Path:
    command = [*compiler, "-c", str(source), "-o", str(target), "-MD", "-MF", str(target.with_suffix(".d"))]
    if not up_to_date(target, command):
        target.parent.mkdir(parents=True, exist_ok=True)
        run(command, f"compiling {source.relative_to(ROOT)}")
        target.with_suffix(".cmd").write_text(shlex.join(command))
    return target


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.name == "bitfuse._cpu":
            self.link(ext, self.cpu_objects(), ["-fopenmp"])
            return
        wanted = os.environ.get("BITFUSE_CUDA", "")
        if wanted == "0":
            return
        try:
            nvcc = find_nvcc()
            home = nvcc.parent.parent
            library = cudart(home)
            self.link(ext, self.cuda_objects(nvcc, home), [str(library)])
        except (CudaMissing, RuntimeError) as why:
            if wanted == "1":
                raise
            print(f"bitfuse: built without CUDA kernels: {why}", file=sys.stderr)

    def objects(self, jobs: list[tuple[list[str], Path, str]]) -> list[Path]:
        out = Path(self.build_temp).resolve()
        with ThreadPoolExecutor(int(os.environ.get("BITFUSE_JOBS", 0)) or os.cpu_count()) as pool:
            return list(pool.map(lambda job: compile_object(job[0], job[1], out / job[2]), jobs))

    def bindings(self) -> list[str]:
        import pybind11

        includes = {sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()}
        return [*CXX, *CXXFLAGS, f"-I{CSRC}", *(f"-I{i}" for i in sorted(includes))]

    def cpu_objects(self) -> list[Path]:
        bindings = [*self.bindings(), "-fopenmp", *(f"-DBITFUSE_LEVEL_{level}" for level in levels())]
        jobs = [
            (
                [*CXX, *CXXFLAGS, "-fopenmp", f"-I{CSRC}", f"-DBITFUSE_ISA={level}", *flags],
                s,
                f"cpu/{s.stem}.{level}.o",
            )
            for s in sorted((CSRC / "cpu").glob("*.cpp"))
            for level, flags in levels().items()
        ]
        binding = [(bindings, s, f"cpu/{s.stem}.o") for s in sorted(CSRC.glob("bind_cpu*.cpp"))]
        return self.objects([*jobs, *binding])

    def cuda_objects(self, nvcc: Path, home: Path) -> list[Path]:
        flags = ["-std=c++20", "-O3", "-lineinfo", "-cudart", "shared", f"-I{CSRC}", "-Xcompiler", "-fPIC"]
        archs = architectures()
        kernels = [str(nvcc), *flags, "-ccbin", CXX[0]]
        of_hopper = hopper(archs)
        made_for = " ".join(arch.rpartition("=")[2] for arch in archs)
        bindings = [*self.bindings(), f'-DBITFUSE_CUDA_ARCHITECTURES="{made_for}"']
        bindings += ["-DBITFUSE_SM90A"] if of_hopper else []
        jobs = [
            ([*kernels, *targets], s, f"cuda/{s.stem}.o")
            for s in sorted((CSRC / "cuda").glob("*.cu"))
            if (targets := of_hopper if s.stem.endswith("_sm90") else archs)
        ]
        includes = [
            f"-I{home / folder}"
            for folder in ("include", "targets/x86_64-linux/include")
            if (home / folder).exists()
        ]
        bindings += includes
        binding = [(bindings, s, f"cuda/{s.stem}.o") for s in sorted(CSRC.glob("bind_cuda*.cpp"))]
        return self.objects([*jobs, *binding])

    def link(self, ext: Extension, objects: list[Path], libraries: list[str]) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # linked aside and renamed, so that a process that has the old file mapped keeps it
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            made = Path(aside) / target.name
            run([*CXX, "-shared", "-o", str(made), *map(str, objects), *libraries], f"linking {ext.name}")
            os.replace(made, target)


# optional=True on the CUDA extension: a build without it copies what there is
setup(
    ext_modules=[Extension("bitfuse._cpu", []), Extension("bitfuse._cuda", [], optional=True)],
    cmdclass={"build_ext": Build},
)

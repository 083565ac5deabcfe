"""Builds bitfuse._cpu always, and bitfuse._cuda when an nvcc is at hand. No torch is needed to build.

Compilers, flags and jobs: python/bitfuse_tools/compile/toolchain.py, which `bitfuse compile` uses too.

Environment:
    BITFUSE_CUDA        1 demands the CUDA extension (a failure fails the build), 0 leaves it out; else: tries
    BITFUSE_CUDA_ARCHS  such as "80;90a", "80+PTX;90a+PTX", "h100" or "native"; unset: the GPU that is here,
                        else 80;90a and PTX
    BITFUSE_CUDART      how CUDA's runtime is linked: static, so that the extension runs beside a torch of any
                        CUDA; or shared, for the tests' simulator. Unset: static, but shared with --inplace
    BITFUSE_CPU_LEVELS  native makes the C++ kernels of this machine's instruction set alone, in a quarter of
                        the time and for such machines only; unset: of all, one of which is picked at run time
    BITFUSE_JOBS        compilers at once; unset: one a core
    BITFUSE_CCACHE      0 leaves out a ccache that is on PATH
    CUDA_HOME, CXX      where the toolkit is, and the host compiler
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
# bitfuse itself can't be imported yet: it wants torch
sys.path.insert(0, str(ROOT / "python"))
from bitfuse_tools.compile import toolchain  # noqa: E402

del sys.path[0]


class Build(build_ext):
    cuda: tuple[toolchain.Nvcc, list[toolchain.Target], list[str]] | None

    def run(self) -> None:
        """What can be wrong is looked for before minutes of compiling."""
        try:
            toolchain.check_settings()
            toolchain.pybind11_release()
            self.cuda = self.find_cuda()
            super().run()
        except (ValueError, toolchain.CompilerMissing, toolchain.CompileError) as why:
            raise SystemExit(f"bitfuse: {why}") from None

    def find_cuda(self) -> tuple[toolchain.Nvcc, list[toolchain.Target], list[str]] | None:
        """The compiler, what it is to make, and the runtime to link; None for a build without."""
        wanted = toolchain.cuda_wanted()
        if wanted is False:
            return None
        # what a checkout's own `build_ext --inplace` makes is what the tests run on the simulator
        kind = "shared" if self.inplace and not self.editable_mode else "static"
        try:
            nvcc, targets = toolchain.find_nvcc(), toolchain.asked_targets()
            runtime = nvcc.cudart(toolchain.cudart_kind(kind))
        except toolchain.CompilerMissing as why:
            if wanted:
                raise
            print(f"bitfuse: no CUDA kernels in this build: {why}", file=sys.stderr)
            return None
        print(f"bitfuse: {nvcc} for {', '.join(map(str, targets))}", file=sys.stderr)
        return nvcc, targets, runtime

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # an editable install's own folder goes away: what is made there would be made again each time
        kept = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        out = kept if self.editable_mode else Path(self.build_temp).resolve()
        if ext.name == "bitfuse._cpu":
            objects = toolchain.make_all(toolchain.cpu_jobs(CSRC, out / "cpu"), ext.name)
            toolchain.link(target, objects, ["-fopenmp"])
        elif self.cuda is not None:
            nvcc, targets, runtime = self.cuda
            try:
                jobs = toolchain.cuda_jobs(CSRC, out / "cuda", nvcc, targets)
                toolchain.link(target, toolchain.make_all(jobs, ext.name), runtime)
            except toolchain.CompileError as why:
                if toolchain.cuda_wanted():
                    raise
                print(f"bitfuse: built without CUDA kernels: {why}", file=sys.stderr)


def packages() -> list[str]:
    """Those below python/, and kernels/ and csrc/, which are installed beside them, with their folders."""
    for top in ("kernels", "csrc"):
        if not (ROOT / top).is_dir():
            raise SystemExit(f"bitfuse: there is no folder {top}/ beside setup.py: the sources are not whole")
    beside = [folder for top in ("kernels", "csrc") for folder in sorted((ROOT / top).glob("**/"))]
    names = [".".join(f.relative_to(ROOT).parts) for f in beside if f.name != "__pycache__"]
    return find_packages("python") + [f"bitfuse.{name}" for name in names]


# optional=True on the CUDA extension: a build without it copies what there is
setup(
    packages=packages(),
    ext_modules=[Extension("bitfuse._cpu", []), Extension("bitfuse._cuda", [], optional=True)],
    cmdclass={"build_ext": Build},
)

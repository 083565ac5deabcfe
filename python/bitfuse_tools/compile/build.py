"""Make a folder of kernels for GPUs that need not be here: the CUDA extension, Triton's kernels, what each
takes of a multiprocessor. Written aside and renamed at the end."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bitfuse._sources import source_folder
from bitfuse._version import __version__
from bitfuse.core import bundle
from bitfuse.core.gpus import ARCHS, Gpu, find

from ..bench.shapes import Shape
from ..hypothetical import EVERY, Sizes, explain_sizes
from . import cubin, toolchain, triton_kernels
from .toolchain import Target

BACKENDS = ("cuda", "triton")


class BuildError(Exception):
    """Nothing was made; the message is one line and tells the way out."""


@dataclass(frozen=True)
class Kernel:
    """What a compiled kernel takes, on one GPU.

    Attributes:
        op, backend, arch: which; of a CUDA kernel the op is its file's.
        name: its function, with template arguments.
        call: of a Triton kernel, sizes that need it.
        registers, local: 32-bit registers and bytes of stack a thread.
        static_shared, dynamic_shared: bytes a block; the latter None where the launch decides.
        threads: a block.
        blocks, warps, limit: held by a multiprocessor at once, and by what that is limited; where the launch
            decides on shared memory, what the rest allows.
        mix: instructions by name, as they stand in the code; None without nvdisasm.
        code: bytes.
    """

    op: str
    backend: str
    arch: str
    name: str
    call: str
    registers: int
    local: int
    static_shared: int
    dynamic_shared: int | None
    threads: int
    blocks: int
    warps: int
    limit: str
    mix: dict[str, int] | None
    code: int

    @property
    def fits(self) -> bool:
        """Whether a multiprocessor holds a block of it, so that it can be launched at all."""
        return self.blocks > 0

    @property
    def spills(self) -> bool:
        """Whether it touches local memory: registers that did not fit, or arrays that none hold."""
        if self.mix is None:
            return self.local > 0
        return bool(self.mix.get("LDL") or self.mix.get("STL"))


@dataclass(frozen=True)
class Options:
    """What to make.

    Attributes:
        gpus: for which.
        ops: of `EVERY`.
        backends: of `BACKENDS`.
        shapes, formats, dtypes, backward, variants: which calls the Triton kernels are for.
        out: the folder.
        cubins: also write the machine code of each CUDA source, to look at.
    """

    gpus: tuple[Gpu, ...]
    ops: tuple[str, ...]
    backends: tuple[str, ...]
    shapes: tuple[Shape, ...]
    formats: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    backward: bool
    out: Path
    cubins: bool = False
    variants: bool = True


@dataclass(frozen=True)
class Made:
    """What was made: the manifest, as it is on disk, and its kernels."""

    manifest: dict[str, Any]
    kernels: list[Kernel]


Progress = Callable[[str, Iterable[Any], int], Iterator[Any]]


def resolve(archs: Iterable[str]) -> tuple[Gpu, ...]:
    """The GPUs of these names; "native" is those that the driver knows.

    Raises:
        ValueError: an unknown name.
        toolchain.CompilerMissing: native, and no driver answers.
    """
    found: list[Gpu] = []
    for name in archs:
        found += native_gpus() if name.lower() == "native" else [find(name)]
    return tuple(dict.fromkeys(found))


def native_gpus() -> list[Gpu]:
    """The GPUs here, as the driver names them.

    Raises:
        ValueError: one of an architecture that is not known here.
        toolchain.CompilerMissing: no driver answers.
    """
    capabilities = toolchain.native()
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    found = []
    for card in filter(None, map(str.strip, said.splitlines())):
        with contextlib.suppress(ValueError):
            found.append(find(card))
    # a card that is not in the table is compiled for as the typical one of its architecture
    known = {gpu.capability for gpu in found}
    return found + [find(f"sm_{number}") for number in capabilities if number not in known]


def notes(gpus: Iterable[Gpu], ops: Iterable[str]) -> list[str]:
    """What will run instead where no kernel serves an op on a GPU, told before anything is compiled."""
    told = []
    for gpu in gpus:
        for op in ops:
            answer = explain_sizes(op, Sizes(m=256), gpu)
            if answer.chosen == "reference":
                why = "; ".join(f"{k}: {v}" for k, v in answer.refused.items() if k in BACKENDS)
                told.append(
                    f"{gpu.arch} ({gpu.name}): {op} runs in plain PyTorch there" + (why and f" ({why})")
                )
    return told


def cache_folder() -> Path:
    """Where objects and Triton's kernels are kept, so that the next run makes only what changed."""
    root = os.environ.get("BITFUSE_CACHE")
    if root:
        return Path(root) / "compile"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitfuse" / "compile"


def _silent(what: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    return iter(items)


def build(options: Options, progress: Progress = _silent) -> Made:
    """Make the folder; what was there is replaced when all is done.

    Raises:
        BuildError: it can't be written, or there is no compiler.
        toolchain.CompileError: a compiler failed.
    """
    out = options.out.absolute()
    if out.exists() and not (out / bundle.MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError(f"--out {options.out} is there and holds no kernels of ours: name another folder")
    with _told():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as held:
            aside = Path(held) / "new"
            aside.mkdir()
            made = _build_into(aside, options, progress)
            if out.exists():
                os.replace(out, Path(held) / "old")
            os.replace(aside, out)
    return made


_FULL = "the disk is full, nothing was written: free some, or set --out and BITFUSE_CACHE elsewhere"


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except toolchain.CompilerMissing as why:
        raise BuildError(str(why)) from None
    except toolchain.CompileError as why:
        if os.strerror(errno.ENOSPC) in str(why):
            raise BuildError(_FULL) from None
        raise
    except OSError as why:
        if why.errno == errno.ENOSPC:
            raise BuildError(_FULL) from None
        where = f" ({why.filename})" if why.filename else ""
        raise BuildError(
            f"can't write{where}: {why.strerror or why}; choose --out and BITFUSE_CACHE"
        ) from None


def _build_into(folder: Path, options: Options, progress: Progress) -> Made:
    able = tuple(gpu for gpu in options.gpus if gpu.capability >= toolchain.LOWEST)
    if not able:
        raise BuildError(f"nothing to compile: our kernels need sm_{toolchain.LOWEST}")
    kernels: list[Kernel] = []
    manifest: dict[str, Any] = {
        "layout": bundle.LAYOUT,
        "bitfuse": __version__,
        "archs": list(dict.fromkeys(str(gpu.arch) for gpu in able)),
        "gpus": [gpu.name for gpu in able],
        "cuda": None,
        "triton": None,
    }
    if "cuda" in options.backends:
        manifest["cuda"] = _cuda(folder, options, able, kernels, progress)
    if "triton" in options.backends:
        manifest["triton"] = _triton(folder, options, able, kernels, progress)
    manifest["kernels"] = [asdict(k) | {"spills": k.spills, "fits": k.fits} for k in kernels]
    (folder / bundle.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Made(manifest, kernels)


# the CUDA extension


def _cuda(
    folder: Path, options: Options, gpus: Sequence[Gpu], kernels: list[Kernel], progress: Progress
) -> dict[str, Any] | None:
    """The extension, which is whole whatever ops are chosen; None when none of them is in it."""
    csrc = source_folder("csrc")
    if not csrc.is_dir():
        raise BuildError("the C++ sources are not beside this installation: compile with --backend triton")
    if not any(_op_of(source.stem) in options.ops for source in (csrc / "cuda").rglob("*.cu")):
        return None
    nvcc = toolchain.find_nvcc()
    targets = list(dict.fromkeys(_target(gpu) for gpu in gpus))
    runtime = nvcc.cudart(toolchain.cudart_kind())
    objects = cache_folder() / "objects" / f"{'-'.join(map(str, targets))}{bundle.abi()}"
    jobs = toolchain.cuda_jobs(csrc, objects, nvcc, targets)
    made = _in_threads("CUDA C++", [job.make for job in jobs], progress)
    extension = f"_cuda{bundle.abi()}"
    toolchain.link(folder / extension, made, runtime)
    sources = [(path.stem, image) for path in made for image in cubin.read(path)]
    mixes = _in_threads("SASS", [functools.partial(_mix, image.elf) for _, image in sources], progress)
    for (stem, image), mix in zip(sources, mixes, strict=True):
        if (op := _op_of(stem)) in options.ops:
            kernels += _of_image(op, image, mix)
        if options.cubins:
            (folder / "cubins").mkdir(exist_ok=True)
            (folder / "cubins" / f"{stem}.{image.arch}.cubin").write_bytes(image.elf)
    return {
        "sources": bundle.source_hash(bundle.cuda_sources()),
        "abi": bundle.abi(),
        "nvcc": nvcc.version,
        "of": nvcc.origin,
        "architectures": toolchain.made_for(targets),
        "files": bundle.file_facts(folder, extension),
    }


def _op_of(stem: str) -> str:
    """The op that a CUDA source is of: attention_sm90.cu and decode_attention_codes.cu begin with theirs."""
    return max((op for op in EVERY if stem.startswith(op)), key=len, default=stem)


def _target(gpu: Gpu) -> Target:
    return Target(gpu.capability, gpu.arch.target.removeprefix(str(gpu.capability)))


def _in_threads(what: str, tasks: Sequence[Callable[[], Any]], progress: Progress) -> list[Any]:
    """All of them, in their order; the first that fails ends it."""
    pool = ThreadPoolExecutor(toolchain.worker_count())
    try:
        futures = [pool.submit(task) for task in tasks]
        for done in progress(what, as_completed(futures), len(futures)):
            done.result()
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _mix(elf: bytes) -> dict[str, dict[str, int]] | None:
    """The mix, kept beside the objects: a large cubin takes seconds to disassemble."""
    kept = cache_folder() / "mix" / f"{hashlib.sha256(elf).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, dict[str, int]] = json.loads(kept.read_text())
        return found
    mix = cubin.instruction_mix(elf)
    if mix is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_suffix(f".{os.getpid()}.part")
        aside.write_text(json.dumps(mix))
        os.replace(aside, kept)
    return mix


def _of_image(op: str, image: cubin.Image, mix: dict[str, dict[str, int]] | None) -> list[Kernel]:
    found = cubin.resources(image.elf)
    arch = find(image.arch).arch
    named = cubin.demangled([r.name for r in found])
    counted = [None if mix is None else mix.get(r.name) for r in found]
    return [
        _kernel(op, "cuda", arch.number, name, "", r, r.threads or 1024, None, count)
        for r, name, count in zip(found, named, counted, strict=True)
    ]


def _kernel(
    op: str,
    backend: str,
    capability: int,
    name: str,
    call: str,
    r: cubin.Resources,
    threads: int,
    dynamic: int | None,
    mix: dict[str, int] | None,
) -> Kernel:
    arch = ARCHS[capability]
    # from Hopper on the compiler counts the 1024 bytes that the system keeps as the kernel's own
    static = max(0, r.static_shared - 1024) if capability >= 90 else r.static_shared
    held = cubin.occupancy(arch, threads, r.registers, static + (dynamic or 0))
    return Kernel(
        op, backend, str(arch), name, call, r.registers, r.local, static, dynamic, threads,
        held.blocks, held.warps, held.limit, mix, r.code,
    )  # fmt: skip


# Triton's kernels


def _triton(
    folder: Path, options: Options, gpus: Sequence[Gpu], kernels: list[Kernel], progress: Progress
) -> dict[str, Any]:
    version = bundle.triton_version()
    if version is None:
        raise BuildError("Triton is not installed: pip install triton, or compile with --backend cuda")
    ops = [op for op in options.ops if triton_kernels.has_kernels(op)]
    cache = cache_folder() / "triton"
    cache.mkdir(parents=True, exist_ok=True)
    wanted, refused = _planned(gpus, ops, options, progress)
    compiled = _compiled(wanted, cache, progress)
    into = folder / "triton"
    into.mkdir()
    for each in compiled:
        triton_kernels.keep(each, into)
    elfs = [Path(each.cubin).read_bytes() for each in compiled]
    mixes = _in_threads("SASS", [functools.partial(_mix, elf) for elf in elfs], progress)
    for (gpu, spec), each, elf, mix in zip(wanted, compiled, elfs, mixes, strict=True):
        for r in cubin.resources(elf):
            name = f"{spec.module.rpartition('.')[2]}.{spec.kernel}"
            count = None if mix is None else mix.get(r.name)
            threads = each.warps * 32
            kernels.append(
                _kernel(spec.op, "triton", gpu.capability, name, spec.call, r, threads, each.shared, count)
            )
    return {
        "sources": bundle.source_hash(bundle.triton_sources()),
        "version": version,
        "torch": importlib.metadata.version("torch"),
        "ops": ops,
        "kernels": len(compiled),
        "launchers": len({key for each in compiled for key in each.modules}),
        "refused": refused,
        "files": bundle.file_facts(folder, "triton"),
    }


def _pool(workers: int, *arguments: Any) -> ProcessPoolExecutor:
    # spawned: a fork would share torch's and Triton's threads and locks
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, spawn, triton_kernels.begin, arguments)


def _planned(
    gpus: Sequence[Gpu], ops: list[str], options: Options, progress: Progress
) -> tuple[list[tuple[Gpu, triton_kernels.Specialisation]], dict[str, str]]:
    """What to compile, and of ops with a call that could not be made, the first and why."""
    refused: dict[str, str] = {}
    found: dict[tuple[int, str, str, str], tuple[Gpu, triton_kernels.Specialisation]] = {}
    asked = [(gpu, op) for gpu in gpus for op in ops]
    calls = (options.shapes, options.formats, options.dtypes, options.backward, options.variants)
    with _ended(_pool(min(toolchain.worker_count(), max(1, len(asked))))) as pool:
        futures = [pool.submit(triton_kernels.plan, gpu, op, *calls) for gpu, op in asked]
        for (gpu, op), future in zip(asked, progress("plans", futures, len(futures)), strict=True):
            plan = future.result()
            if plan.refused is not None:
                refused.setdefault(op, f"{gpu.name}: {plan.refused}")
            for spec in plan.found:
                # two cards of an architecture may want the same, and two ops
                found.setdefault((gpu.capability, spec.module, spec.kernel, spec.key), (gpu, spec))
    return list(found.values()), refused


def _compiled(
    wanted: Sequence[tuple[Gpu, triton_kernels.Specialisation]], cache: Path, progress: Progress
) -> list[triton_kernels.Compiled]:
    if not wanted:
        return []
    workers = min(toolchain.worker_count(), len(wanted))
    with _ended(_pool(workers, str(cache))) as pool:
        futures: list[Future[triton_kernels.Compiled]] = [
            pool.submit(triton_kernels.compile_one, gpu, spec) for gpu, spec in wanted
        ]
        for done in progress("Triton", as_completed(futures), len(futures)):
            done.result()
        return [future.result() for future in futures]


@contextlib.contextmanager
def _ended(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end with the block, at once when that ends by an error or Ctrl-C."""
    try:
        yield pool
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

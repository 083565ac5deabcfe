"""The Triton kernels that calls of the ops need on a GPU that is not here.

The ops are called as anyone calls them, on meta tensors, in a process of its own whose Triton believes in the
absent GPU. Their planning picks tiles, and Triton specialises on them and on the arguments; there, instead of
compiling, it hands over what it would compile. That is then compiled by as many processes as there are cores,
and kept under the same key under which a process on the GPU will look for it.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bitfuse.core import device
from bitfuse.core.gpus import GPUS, Gpu
from bitfuse.weights.formats import get_format

from ..bench.shapes import Shape
from ..hypothetical import DENSE, EVERY, Sizes

# rows of x: every number of tokens for which a plan may take another tile, and whole and odd ones of each
ROWS = (1, 2, 3, 4, 8, 13, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
# of these, as many as take a tile each, for what is compiled beside the usual
VARIED = (1, 3, 16, 32, 64, 128, 192, 2048)
BATCHES = (1, 8, 64)
LENGTHS = (1, 17, 128, 1024, 4096)
RANKS = (8, 16, 64)
CACHES = ("none", "fp8", "int8", "int4")
PAGES = (None, 16)


@dataclass(frozen=True)
class Specialisation:
    """One compilation: a kernel, and in Triton's own words its types, constants and options.

    Attributes:
        op: that calls it, first.
        call: the sizes of that call, in short.
        module, kernel: where it is defined.
        key: two specialisations of a kernel that compile to the same have the same.
        signature, constants, attributes, options: as `triton.compiler.ASTSource` and `triton.compile` take
            them. (`JITFunction.preload` would have them as JSON, in which NamedTuples lose their names.)
    """

    op: str
    call: str
    module: str
    kernel: str
    key: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its files by name, those of Triton's cache, in a folder of its key; and the modules
    that launch it, by the folders of theirs, where Triton compiles C for that (3.6 does, 3.9 does not)."""

    key: str
    files: dict[str, str]
    cubin: str
    shared: int
    warps: int
    modules: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """What an op needs on an absent GPU; and where some calls could not be made there, the first and why."""

    found: list[Specialisation]
    refused: str | None


def has_kernels(op: str) -> bool:
    """Whether there are Triton kernels of an op of `EVERY`."""
    return any(backend.name == "triton" for part in EVERY[op].kernels for backend in part.op.backends)


def sizes(
    op: str,
    shapes: Iterable[Shape],
    formats: Iterable[str],
    dtypes: Iterable[torch.dtype],
    variants: bool = False,
) -> list[Sizes]:
    """The calls of an op that models of these shapes make; with their variants: zero points, other groups."""
    declaration = EVERY[op]
    uses = declaration.uses
    models = list(shapes)
    linears = [nk for model in models for nk in model.matrices(declaration.matrices)]
    heads = list(dict.fromkeys((m.heads, m.kv_heads, m.head_dim) for m in models))
    kept = [f for f in formats if declaration.dense or f != DENSE]
    axes: dict[str, Iterable[Any]] = {
        "m": ROWS if "m" in uses else (),
        "linear": dict.fromkeys(linears) if "k" in uses or "n" in uses else (),
        "format": kept if "format" in uses else (),
        "rank": RANKS if "rank" in uses else (),
        "batch": BATCHES if "batch" in uses else (),
        "seqlen": LENGTHS if "seqlen" in uses else (),
        "attention": heads if "heads" in uses or "kv_heads" in uses else (),
        "cache": CACHES if "cache" in uses else (),
        "page_size": PAGES if "page_size" in uses else (),
        "causal": (True, False) if "causal" in uses else (),
        "vocab": dict.fromkeys(m.vocab for m in models) if "vocab" in uses else (),
        "dtype": dtypes,
    }
    axes = {name: values for name, values in axes.items() if values}
    own = {(m.heads, m.kv_heads, m.head_dim, m.hidden) for m in models}
    made = set()
    for chosen in itertools.product(*axes.values()):
        given = dict(zip(axes, chosen, strict=True))
        if "linear" in given:
            given["n"], given["k"] = given.pop("linear")
        if "attention" in given:
            given["heads"], given["kv_heads"], given["head_dim"] = given.pop("attention")
        if {"k", "kv_heads"} <= given.keys() and tuple(given[name] for name in _OF_A_MODEL) not in own:
            continue  # the heads of one model over the columns of another
        usual = Sizes(**{name: value for name, value in given.items() if name in uses})
        made.add(usual)
        varied = variants and ("m" not in uses or usual.m in VARIED)
        for variant in declaration.variants if varied else ():
            other = replace(usual, **variant)
            if _has(other, variant):
                made.add(other)
    return sorted(made, key=repr)


def _has(s: Sizes, variant: Mapping[str, Any]) -> bool:
    """Whether a format has this variant of a weight."""
    if not {"zero_points", "nested", "group_size"} & variant.keys():
        return True
    if s.format == DENSE:
        return False
    format = get_format(s.format)
    if s.nested:
        return format.codebook is not None and format.scale_dtype == torch.float32 and format.bits == 4
    # groups are a choice where the codes are integers
    whole = format.codebook is None and format.scale_dtype.itemsize > 1 and format.bits in (4, 8)
    return whole and s.group_size != format.group_size


_OF_A_MODEL = ("heads", "kv_heads", "head_dim", "k")


def in_short(op: str, s: Sizes) -> str:
    """A call in a few words: "int4 bfloat16 m=16 n=4096 k=4096"."""
    uses = EVERY[op].uses
    words = [s.format] if "format" in uses else []
    words += [f"cache={s.cache}"] if "cache" in uses else []
    words.append(str(s.dtype).removeprefix("torch."))
    names = ("m", "n", "k", "rank", "batch", "seqlen", "heads", "head_dim", "page_size", "vocab", "drafted")
    words += [f"{n}={getattr(s, n)}" for n in names if n in uses and getattr(s, n) is not None]
    usual = Sizes()
    more = ("group_size", "zero_points", "nested", "dropout", "listed")
    return " ".join(words + [f"{n}={getattr(s, n)}" for n in more if getattr(s, n) != getattr(usual, n)])


# in a process of its own


def begin(cache: str | None = None) -> None:
    """What a process that plans or compiles does first: Ctrl-C is for the one that waits for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if cache is not None:
        from triton import knobs

        knobs.cache.dir = cache


def _end_with(parent: int) -> None:
    """End when the process that waits for this one is gone, which a pool would not notice."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def believe(gpu: Gpu) -> None:
    """Make Triton in this process compile for a GPU that is not here. Nothing can be launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    facts = {
        "multiprocessor_count": gpu.multiprocessors,
        "max_shared_mem": gpu.arch.block_kib << 10,
        "warpSize": 32,
    }

    class Absent(DriverBase):
        def __init__(self) -> None:
            self.utils = SimpleNamespace(get_device_properties=lambda index: facts)

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", gpu.capability, 32)

        # Triton keeps what it knows by device: one for each GPU that this process has been told of
        def get_current_device(self) -> int:
            return list(GPUS).index(gpu.name)

        def get_current_stream(self, index: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("meta")

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("an absent GPU has no time")

    triton.runtime.driver.set_active(Absent())


def plan(
    gpu: Gpu,
    op: str,
    shapes: Iterable[Shape],
    formats: Iterable[str],
    dtypes: Iterable[torch.dtype],
    backward: bool,
    variants: bool = False,
) -> Plan:
    """What Triton would compile on this GPU for this op. Only in a process that does nothing else: its ops
    run nothing from here on."""
    from triton import knobs

    believe(gpu)
    device.plan_for(gpu)
    refused: str | None = None
    seen: dict[tuple[str, str, str], Specialisation] = {}
    now = ""

    def take(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        key = (fn.module, fn.name, str(compile["key"]))
        if key not in seen:
            (attributes,) = compile["configs"]
            options = json.loads(compile["specialization_data"])["options"]
            given = compile["signature"], compile["constants"], attributes, options
            seen[key] = Specialisation(op, now, *key, *given)
        return True  # taken care of: Triton compiles nothing and launches nothing

    knobs.runtime.jit_cache_hook = take
    # a bias is added by the forward, and its gradient is torch's
    kinds = [(False, False), (False, True)] if EVERY[op].bias else [(False, False)]
    if backward and EVERY[op].gradient:
        kinds.append((True, False))
    for each in sizes(op, shapes, formats, dtypes, variants):
        now = in_short(op, each)
        for gradient, biased in kinds:
            try:
                _call(op, each, gradient, biased)
            except (ValueError, TypeError, RuntimeError) as why:
                # sizes that the op refuses, and work that an absent GPU can't do
                refused = refused or f"{now}: {str(why).splitlines()[0]}"
    return Plan(list(seen.values()), refused)


def _call(op: str, s: Sizes, gradient: bool, biased: bool) -> None:
    def make(*shape: int, dtype: torch.dtype = s.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        return tensor.requires_grad_(gradient and dtype == s.dtype and dtype.is_floating_point)

    call = EVERY[op]
    keywords = call.options(s) | ({"bias": make(s.n)} if biased else {})
    out = call.function(*call.arguments(s, make), **keywords)
    if gradient:
        outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
        torch.autograd.backward(outs, [torch.empty_like(t) for t in outs])


def compile_one(gpu: Gpu, wanted: Specialisation) -> Compiled:
    """Compile it, or find it in this process's cache."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_manager

    believe(gpu)
    function: Any = importlib.import_module(wanted.module)
    for part in wanted.kernel.split("."):
        function = getattr(function, part)
    source = ASTSource(function, wanted.signature, wanted.constants, wanted.attributes)
    target = GPUTarget("cuda", gpu.capability, 32)
    # JSON has no tuples, which Triton's options have instead of lists
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in wanted.options.items()}
    kernel: Any = triton.compile(source, target=target, options=options)
    files = {name: str(path) for name, path in kernel.metadata_group.items()}
    key = getattr(get_cache_manager(kernel.hash), "key")  # noqa: B009  of the file cache, not of its base
    return Compiled(
        key=key,
        files=files,
        cubin=next(path for name, path in files.items() if name.endswith(".cubin")),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        modules=launchers(source, kernel.metadata),
    )


def launchers(source: Any, metadata: Any) -> dict[str, str]:
    """The C modules that Triton would compile at the first launch of a kernel: by the folder of its cache,
    the file. Nothing where this Triton needs none, or where there is no C compiler (then the first launch
    looks for one)."""
    from triton.backends.nvidia import driver

    make: Any = getattr(driver, "make_launcher", None)
    if make is None or shutil.which(os.environ.get("CC", "gcc")) is None:
        return {}
    constants = {
        (source.fn.arg_names.index(name),) if isinstance(name, str) else name: value
        for name, value in source.constants.items()
    }
    launcher = make(constants, dict(source.signature), getattr(metadata, "tensordesc_meta", None))
    utilities = (Path(driver.__file__).parent / "driver.c").read_text()
    made = [
        _c_module(text, name) for text, name in ((launcher, "__triton_launcher"), (utilities, "cuda_utils"))
    ]
    return dict(made)


def _c_module(text: str, name: str) -> tuple[str, str]:
    """Compile one of Triton's own modules, or find it in this process's cache, under the key by which Triton
    looks for it: its folder, its file. It needs the driver's library, for which an empty one stands in
    here."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import platform_key
    from triton.runtime.cache import get_cache_manager

    manager = get_cache_manager(hashlib.sha256((text + platform_key()).encode()).hexdigest())
    file = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    made = manager.get_file(file)
    if made is None:
        cc = os.environ.get("CC", "gcc")
        with tempfile.TemporaryDirectory() as held:
            folder = Path(held)
            (folder / "none.c").touch()
            (folder / "module.c").write_text(text)
            library = ["libcuda.so.1", "-Wl,-soname,libcuda.so.1"]
            subprocess.run([cc, "-shared", "-fPIC", "none.c", "-o", *library], cwd=held, check=True)
            include = [f"-I{path}" for path in (*driver.include_dirs, sysconfig.get_paths()["include"])]
            options = [
                "-O3",
                "-shared",
                "-fPIC",
                "-Wno-psabi",
                "-Wl,--no-as-needed",
                "-L.",
                "-l:libcuda.so.1",
            ]
            subprocess.run([cc, "module.c", "-o", file, *options, *include], cwd=held, check=True)
            made = manager.put((folder / file).read_bytes(), file)
    return str(getattr(manager, "key")), made  # noqa: B009  of the file cache, not of its base


KEPT = (".cubin", ".json", ".ptx")  # what a launch reads; PTX to be looked at, and for the simulator


def keep(compiled: Compiled, folder: Path) -> None:
    """Copy a kernel into a bundle's triton/ folder, its group file with names instead of this machine's
    paths."""
    into = folder / compiled.key
    into.mkdir(parents=True, exist_ok=True)
    names = [name for name in compiled.files if name.endswith(KEPT)]
    for name in names:
        (into / name).write_bytes(Path(compiled.files[name]).read_bytes())
    described = next(name for name in names if name.endswith(".json"))
    for key, file in compiled.modules.items():
        (folder / key).mkdir(exist_ok=True)
        (folder / key / Path(file).name).write_bytes(Path(file).read_bytes())
    group = {"child_paths": {name: name for name in names}}
    (into / f"__grp__{described}").write_text(json.dumps(group))

"""What is installed here and what works: the facts that a bug report or a file of results needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitfuse._version import __version__
from bitfuse.core import bundle, device, policy
from bitfuse.core.backends import BACKENDS, Backend, asked_backend
from bitfuse.core.explain import explain
from bitfuse.ops.linear.lowbit_linear import forward_op, lowbit_linear
from bitfuse.weights.formats import FORMATS
from bitfuse.weights.quantize import quantize

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "safetensors", "peft", "bitsandbytes", "accelerate",
    "pybind11",
)  # fmt: skip
_ROOT = Path(__file__).resolve().parents[2]  # of the source tree, when this is one


@dataclass
class BackendCheck:
    """Whether a backend serves a small `lowbit_linear` here, and whether its numbers are right.

    Attributes:
        alive: it serves at least one format.
        reason: why it serves none.
        right: every format that it serves is within the accuracy rule: against float64 on the exactly
            dequantised weight, an error at most twice that of plain PyTorch in the same dtype, plus one eps
            of the largest output.
        formats: per format "right", "wrong: ..." or "not served: ...".
    """

    name: str
    device: str
    alive: bool = False
    reason: str | None = None
    right: bool = True
    formats: dict[str, str] = field(default_factory=dict)


def collect(probe: bool = True) -> dict[str, Any]:
    """Versions, compilers, devices, native modules and, with `probe`, a real call of every backend.

    No path of the machine is in it: it can be pasted anywhere.
    """
    facts: dict[str, Any] = {
        "bitfuse": __version__,
        "commit": commit(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": versions(),
        "compilers": {"c++": _tool("g++", "c++"), "nvcc": _tool("nvcc")},
        "cuda": cuda(),
        "devices": devices(),
        "native": {"_cpu": _native("_cpu", "isa"), "_cuda": _native("_cuda", "architectures")},
        "kernels": [
            {"archs": list(k.archs), "used": list(k.used), "refused": dict(k.refused)} for k in bundle.LOADED
        ],
        "caches": caches(),
        "environment": environment(),
    }
    if probe:
        checks = [check_backend(backend) for backend in forward_op.backends]
        facts["backends"] = [asdict(check) for check in checks]
        facts["asked_backend"] = asked_backend_fault(checks)
    return facts


# what changes the outcome: variables that hold no path or secret, and those that do
_ENVIRONMENT = (
    "BITFUSE_BACKEND", "BITFUSE_CHECK", "BITFUSE_CPU_ISA", "BITFUSE_CPU_LEVELS", "BITFUSE_CUDA",
    "BITFUSE_CUDA_ARCHS",
    "BITFUSE_CUDART", "BITFUSE_CCACHE", "BITFUSE_JOBS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "BITFUSE_WITHOUT",
)  # fmt: skip
_PATHS = ("BITFUSE_KERNEL_PATH", "BITFUSE_CACHE")


def environment() -> dict[str, str]:
    """The variables that are set and change what runs; of paths only that they are, and how many."""
    found = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    for name in _PATHS:
        if folders := [folder for folder in os.environ.get(name, "").split(os.pathsep) if folder]:
            there = sum(Path(folder).is_dir() for folder in folders)
            found[name] = f"{len(folders)} folder{'s' * (len(folders) > 1)}, {there} there"
    return dict(sorted(found.items()))


def asked_backend_fault(checks: list[BackendCheck]) -> str | None:
    """Why every call of this process fails: BITFUSE_BACKEND asks for a backend that serves none here. None
    where it is not set, or does."""
    asked = os.environ.get("BITFUSE_BACKEND")
    if not asked:
        return None
    if asked not in BACKENDS:
        return f"it is none of {', '.join(BACKENDS)}"
    here = next((check for check in checks if check.name == asked), None)
    return None if here is None or here.alive else here.reason


def require_asked_backend(device: torch.device) -> None:
    """What BITFUSE_BACKEND asks for, if anything, tried on a small call: before a model is loaded.

    Raises:
        BackendError: it does not run on this device.
        ValueError: it is no backend.
    """
    if asked_backend() is not None:
        w = quantize(torch.zeros(8, 128, dtype=torch.float32, device="cpu"), "int8").to(device)
        explain(lowbit_linear, torch.zeros(1, 128, dtype=torch.float32, device=device), w)


def versions() -> dict[str, str | None]:
    """The versions of the packages that matter; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # which CUDA it was built for, its wheel's metadata may leave out
    return found


def commit() -> str | None:
    """The commit of the source tree that this runs from, "+changes" when files differ; None outside one."""
    if not (_ROOT / ".git").exists():
        return None
    head = _output("git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = _output("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if changed else head


def devices() -> list[dict[str, Any]]:
    """The CPU, then each GPU that torch sees."""
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "memory_gib": _memory_gib(),
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": card.name,
                "capability": f"{card.major}.{card.minor}",
                "multiprocessors": card.multi_processor_count,
                "memory_gib": round(card.total_memory / 2**30, 1),
            }
        )
    return found


def cuda() -> dict[str, str | bool | None]:
    """The CUDA release that torch was built with, the driver, and whether a GPU is simulated."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "torch_built_with": torch.version.cuda,
        "driver": driver.splitlines()[0] if driver else None,
        "simulated": device.simulated(),
    }


def caches() -> dict[str, Any]:
    """What earlier runs left: kernels that Triton compiled, and what `bitfuse tune` measured, by GPU."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache"))
    kernels = [e for e in os.scandir(folder) if e.is_dir()] if folder.is_dir() else []
    held = sum(f.stat().st_size for kernel in kernels for f in os.scandir(kernel) if f.is_file())
    found: dict[str, Any] = {"triton": {"kernels": len(kernels), "mib": round(held / 2**20, 1)}}
    try:
        measured = policy.read(policy.path())
        found["tuned"] = {
            gpu: f"{len(of['done'])} cases" + ("" if of["versions"] == policy.versions() else ", out of date")
            for gpu, of in measured.items()
        }
    except (policy.PolicyError, KeyError, TypeError):
        found["tuned"] = {"unreadable": "delete policy.json, and run bitfuse tune again"}
    return found


def check_backend(backend: Backend) -> BackendCheck:
    """Run one small `lowbit_linear` a format on this backend and compare it with float64."""
    on_gpu = "cuda" in backend.devices and torch.cuda.is_available() and backend.name != "reference"
    check = BackendCheck(backend.name, "cuda" if on_gpu else "cpu")
    if not on_gpu and "cpu" not in backend.devices and not device.simulated():
        check.reason = "no GPU: torch sees none"
        return check
    for name in FORMATS:
        check.formats[name] = outcome = _run_format(backend, name, torch.device(check.device))
        check.alive |= not outcome.startswith("not served")
        check.right &= not outcome.startswith("wrong")
    if not check.alive:
        check.reason = " / ".join(
            dict.fromkeys(o.removeprefix("not served: ") for o in check.formats.values())
        )
    return check


def _run_format(backend: Backend, format: str, device: torch.device) -> str:
    """An odd number of rows, sizes that fill no tile, and the dtype that the device is mostly used in."""
    rows, n, k = 5, 72, 384
    dtype = torch.float16 if backend.devices == ("cuda",) else torch.float32
    generator = torch.Generator(device="cpu").manual_seed(0)
    x, w, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
        for shape in ((rows, k), (n, k), (n,))
    )
    x, bias = x.to(dtype), bias.to(dtype)
    q = quantize(w, format)
    args = (x, q.op_args, bias)
    try:
        if (reason := backend.supports(*args)) is not None:
            return f"not served: {reason}"
        got = backend.run(*args).double()
    except Exception as why:  # whatever a broken build raises is what the report is for
        return f"wrong: {type(why).__name__}: {(str(why).strip() or 'no message').splitlines()[0]}"
    dense = q.dequantize()
    exact = x.double() @ dense.double().T + bias.double()
    plain = torch.nn.functional.linear(x, dense.to(dtype), bias).double()
    error, plain_error = (float((y - exact).abs().max()) for y in (got, plain))
    allowed = 2 * plain_error + torch.finfo(dtype).eps * float(exact.abs().max())
    if error <= allowed:  # False for a NaN
        return "right"
    return f"wrong: error {error:.3g}, allowed {allowed:.3g} ({str(dtype).removeprefix('torch.')})"


def _native(module: str, says: str) -> dict[str, Any]:
    """Whether a native module is built and loads, and what it says of itself."""
    try:
        loaded = importlib.import_module(f"bitfuse.{module}")
    except ModuleNotFoundError:
        return {"built": False, "reason": "not built"}
    except ImportError as error:
        return {"built": True, "reason": str(error).splitlines()[0]}
    found = {"built": True, says: getattr(loaded, says)()}
    if module == "_cuda":
        return found | {"runtime": bundle.cudart_of(str(loaded.__file__))}
    return found | ({"levels": "no other in this build"} if loaded.ONE_LEVEL else {})


def _output(*command: str) -> str | None:
    """What a command prints, None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _tool(*names: str) -> str | None:
    """The line of `--version` that names the release, of the first of these compilers that is on PATH."""
    for name in names:
        if shutil.which(name) and (text := _output(name, "--version")):
            lines = text.splitlines()
            return next((line for line in lines if "release" in line), lines[0])
    return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def as_text(facts: dict[str, Any]) -> str:
    """The facts as lines to paste into an issue."""
    from_commit = f" (commit {facts['commit']})" if facts["commit"] else ""
    lines = [
        ("bitfuse", facts["bitfuse"] + from_commit),
        ("python", facts["python"]),
        ("system", facts["system"]),
        ("packages", ", ".join(f"{k} {v or '-'}" for k, v in facts["packages"].items())),
        *((name, version or "not found") for name, version in facts["compilers"].items()),
    ]
    cuda_facts = facts["cuda"]
    built, driver = cuda_facts["torch_built_with"] or "none", cuda_facts["driver"] or "none"
    lines.append(("cuda", f"torch built with {built}, driver {driver}"))
    if cuda_facts["simulated"]:
        lines.append(("", "the GPU simulator stands in for the CUDA runtime"))
    for d in facts["devices"]:
        rest = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in d.items() if k not in ("device", "name"))
        lines.append((d["device"], f"{d['name']} ({rest})"))
    for module, said in facts["native"].items():
        lines.append((module, ", ".join(f"{k} {v}" for k, v in said.items() if k != "built") or "built"))
    for folder in facts["kernels"]:
        said = (
            f"compiled ahead for {', '.join(folder['archs'])}: {' and '.join(folder['used']) or 'none'} used"
        )
        lines.append(("kernels", said + "".join(f"; not {p}: {why}" for p, why in folder["refused"].items())))
    kept = facts["caches"]
    lines.append(
        ("triton", f"{kept['triton']['kernels']} compiled kernels kept, {kept['triton']['mib']} MiB")
    )
    lines += [("tuned", f"{gpu}: {said}") for gpu, said in kept["tuned"].items()]
    lines += [("env", f"{k}={v}") for k, v in facts["environment"].items()]
    if fault := facts.get("asked_backend"):
        lines.append(("", f"BITFUSE_BACKEND can't be served here, so every call fails: {fault}"))
    for b in facts.get("backends", ()):
        if not b["alive"]:
            lines.append((b["name"], f"not here: {b['reason']}"))
            continue
        by_outcome: dict[str, list[str]] = {}
        for name, outcome in b["formats"].items():
            # why a backend does not serve a format is in the JSON; here it would bury a "wrong"
            said = "not served" if outcome.startswith("not served") else outcome
            by_outcome.setdefault(said, []).append(name)
        said = "; ".join(f"{', '.join(names)} {outcome}" for outcome, names in by_outcome.items())
        lines.append((b["name"], f"alive on {b['device']}: {said}"))
    return "\n".join(f"{name:<10} {text}" for name, text in lines)

"""Which units there are, in which order, and how long each may take: on a GPU, and in a rehearsal, where the
simulator stands in and all is small."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .units import ROOT, Unit

ENTRY = str(ROOT / "benchmarks" / "gpu.py")
BITFUSE = "bitfuse_tools.cli"
# by tool, kernels with shared memory, barriers and asynchronous copies: a file of tests, and which of them
SANITIZED = (
    ("memcheck", "tests/linear/test_lowbit_linear_cuda.py", "rows_of_any_length or split_k or views"),
    ("memcheck", "tests/attention/test_decode_attention_cuda.py", "stretches or rows_than_a_tile"),
    ("memcheck", "tests/attention/test_attention_cuda.py", "many_tiles or packed_neighbours"),
    ("racecheck", "tests/linear/test_lowbit_linear_cuda.py", "split_k"),
    ("racecheck", "tests/linear/test_lora_linear_cuda.py", "any_rank or any_mix"),
)
# of the time, at most, that a stage may take; what one leaves is the next ones'
SHARES = {
    "build": 0.25, "smoke": 0.2, "headline": 0.35, "sweeps": 0.15, "tests": 0.4, "tune": 0.12,
    "sanitize": 0.3,
}  # fmt: skip
STAGES = tuple(SHARES)


@dataclass(frozen=True)
class Place:
    """Where a run happens.

    Attributes:
        work: a folder for what need not outlive it.
        out: the run's own.
        cores: for all units together.
        rehearse: on the simulator, small.
        built: the CUDA kernels are there already.
        families: ops and backends to try, "attention:cuda".
    """

    work: Path
    out: Path
    cores: int
    rehearse: bool = False
    built: bool = False
    families: tuple[str, ...] = ()

    def unit(self, module: str, *arguments: str) -> tuple[str, ...]:
        """The command of one of ours."""
        own = ("--rehearse",) if self.rehearse else ()
        return (sys.executable, ENTRY, *own, "--unit", module, *arguments)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Folders of kernels that the build makes."""
        return tuple(str(self.work / name) for name in ("kernels-cuda", "kernels-triton"))


def workers(stage: str, place: Place) -> int:
    """Units at once: what is timed is alone."""
    half = max(2, place.cores // 2)
    return {"build": 2, "smoke": half, "tests": half, "sanitize": 2}.get(stage, 1)


def units(stage: str, place: Place) -> list[Unit]:
    """Of a stage, in the order in which they begin."""
    made = {
        "build": _build, "smoke": _smoke, "headline": _headline, "sweeps": _sweeps, "tests": _tests,
        "tune": _tune, "sanitize": _sanitize,
    }[stage](place)  # fmt: skip
    return [replace(unit, stage=stage) for unit in made]


def facts(place: Place) -> Unit:
    """The first: the GPU, its driver, versions; what there is to try. It answers in seconds, or not at
    all."""
    return Unit("facts", "facts", place.unit("bitfuse_tools.gpu.facts"), 90)


def table(place: Place) -> Unit:
    """The last: each figure beside its prediction."""
    return Unit("table", "table", place.unit("bitfuse_tools.gpu.table", str(place.out)), 60)


def _build(place: Place) -> list[Unit]:
    if place.rehearse:
        return []
    cuda, triton = place.kernels
    jobs = {"BITFUSE_JOBS": str(max(1, place.cores // 2)), "BITFUSE_CACHE": str(place.work / "cache")}

    def compile(name: str, *arguments: str) -> Unit:
        command = place.unit(BITFUSE, "compile", "--arch", "native", *arguments)
        return Unit(f"build {name}", "", command, 150, environment=jobs)

    # what the headline calls; for all else Triton compiles at the first call
    ops = [
        w for op in ("lowbit_linear", "lora_linear", "attention", "decode_attention") for w in ("--op", op)
    ]
    calls = (
        "--shapes",
        "llama3-8b",
        "--format",
        "int4",
        "--dtype",
        "bfloat16",
        "--no-variants",
        "--out",
        triton,
    )
    found = [] if place.built else [compile("cuda", "--backend", "cuda", "--out", cuda)]
    return [*found, compile("triton", "--backend", "triton", *ops, *calls, "--out", triton)]


def _smoke(place: Place) -> list[Unit]:
    """Every kernel against float64; of CUDA first, which headlines are of."""
    families = sorted(place.families, key=lambda family: not family.endswith(":cuda"))
    limit = 45 if place.rehearse else 60
    return [
        Unit(f"smoke {f}", "", place.unit("bitfuse_tools.gpu.smoke", f), limit, family=f, into="smoke.json")
        for f in families
    ]


def _bench(place: Place, name: str, words: str, limit: float, family: str | None) -> Unit:
    arguments = ("bench", *words.split(), "--json", "-")
    return Unit(f"headline {name}", "", place.unit(BITFUSE, *arguments), limit, family, "bench.json")


_INT4 = "--format int4 --dtype bfloat16"
_FLASH = "torch,flash-attn"
# what is told of first: a name, words of `bitfuse bench`, seconds, whose failure it tells of
HEADLINE: tuple[tuple[str, str, float, str | None], ...] = (
    (
        "lowbit_linear int4",
        f"lowbit_linear --backend cuda {_INT4} --m 1,8,16,32,64 --shapes llama3-8b --quick --against torch",
        45, "lowbit_linear:cuda",
    ),
    (
        "attention 16384 cuda",
        f"attention --backend cuda --shapes llama3-8b --direction forward --rounds 2 --against {_FLASH}",
        30, "attention:cuda",
    ),
    (
        "decode_attention cuda", f"decode_attention --backend cuda --m 1,8 --rounds 2 --against {_FLASH}",
        45, "decode_attention:cuda",
    ),
    (
        "lowbit_linear nf4 int8 fp8",
        "lowbit_linear --backend cuda --format nf4,int8,fp8 --dtype bfloat16 --m 1,16,64 --shapes llama3-8b "
        "--quick --against bitsandbytes",
        45, "lowbit_linear:cuda",
    ),
    (
        "lowbit_linear triton",
        f"lowbit_linear --backend triton {_INT4} --m 64,128,1024,8192 --direction forward,gradient --quick "
        "--against torch",
        45, "lowbit_linear:triton",
    ),
    (
        "attention 16384 triton",
        f"attention --backend triton --shapes llama3-8b --rounds 2 --against {_FLASH}",
        45, "attention:triton",
    ),
    ("attention 2048", "attention --quick --direction forward --against torch", 30, None),
    (
        "lora_linear",
        f"lora_linear --backend cuda {_INT4} --m 1,16,64 --direction forward --quick --against torch,peft",
        30, "lora_linear:cuda",
    ),
    (
        "lora_linear gradient",
        f"lora_linear --backend triton {_INT4} --m 1024 --direction gradient --quick --against torch",
        30, "lora_linear:triton",
    ),
    (
        "adamw8bit", "adamw8bit --dtype float32 --rounds 2 --against torch,bitsandbytes",
        30, "adamw8bit:triton",
    ),
    ("multi_lora_linear", "multi_lora_linear --backend cuda --quick", 30, "multi_lora_linear:cuda"),
    *((op, f"{op} --quick", 25.0, f"{op}:triton") for op in ("sample", "rope", "gated_activation")),
)  # fmt: skip


_SMALL = {
    "name": "small", "hidden": 128, "intermediate": 64, "heads": 2, "kv_heads": 1, "head_dim": 64,
    "vocab": 300,
}  # fmt: skip


def _headline(place: Place) -> list[Unit]:
    if not place.rehearse:
        return [_bench(place, name, words, limit, family) for name, words, limit, family in HEADLINE]
    small = place.work / "small.json"
    small.write_text(json.dumps(_SMALL))
    words = f"--dtype bfloat16 --quick --rounds 1 --against none --device cpu --threads 1 --shapes {small}"
    return [
        _bench(
            place, "lowbit_linear int4", f"lowbit_linear --backend cuda --format int4 --m 1 {words}", 90,
            "lowbit_linear:cuda",
        )
    ]  # fmt: skip


def _sweeps(place: Place) -> list[Unit]:
    """The cuts of the CUDA planner, and Triton's tiles."""
    sweep = "bitfuse_tools.gpu.sweep"
    found = [Unit("sweep plans", "", place.unit(sweep, "plans"), 60, "lowbit_linear:cuda", "sweeps.json")]
    if not place.rehearse:
        found.append(
            Unit("sweep tiles", "", place.unit(sweep, "tiles"), 60, "lowbit_linear:triton", "sweeps.json")
        )
    return found


def _pytest(name: str, arguments: Sequence[str], limit: float, before: Sequence[str] = ()) -> Unit:
    command = (*before, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments)
    return Unit(name, "", command, limit, environment={"OMP_NUM_THREADS": "1"})


def _tests(place: Place) -> list[Unit]:
    """Files whose tests run on a GPU where there is one; of the CUDA kernels first."""
    if place.rehearse:
        file = "tests/linear/test_gated_activation.py"
        return [_pytest(f"tests {file}", [file, "-k", "triton-sm90 and value", "-x"], 90)]
    files = [f for f in sorted(ROOT.glob("tests/*/test_*.py")) if "targets(" in f.read_text()]
    files.sort(key=lambda file: ("cuda" not in file.stem, "triton" not in file.stem))
    names = [str(file.relative_to(ROOT)) for file in files]
    return [_pytest(f"tests {name}", [name], 75) for name in names]


def _tune(place: Place) -> list[Unit]:
    into = {"BITFUSE_CACHE": str(place.out)}
    return [Unit("tune", "", place.unit("bitfuse_tools.gpu.tune", "{seconds}"), 120, environment=into)]


def _sanitize(place: Place) -> list[Unit]:
    tool = shutil.which("compute-sanitizer")
    if tool is None or place.rehearse:
        return []
    found = []
    for kind, file, which in SANITIZED:
        before = (tool, "--tool", kind, "--error-exitcode", "3")
        found.append(_pytest(f"{kind} {file}", ["-x", file, "-k", which], 90, before))
    return found


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def families(found: Any) -> tuple[str, ...]:
    """Those to try, of what `facts.py` says."""
    return tuple(word for word in found if isinstance(word, str)) if isinstance(found, list) else ()

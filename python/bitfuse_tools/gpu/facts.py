"""The first unit: the GPU and its driver, versions, whether the CUDA kernels are there, what there is to try;
JSON on stdout. Ends with `MISSING` where there is no GPU, the simulator's aside."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch
from bitfuse.core import bundle
from bitfuse.core.cuda import cuda
from bitfuse.core.declaration import declarations
from bitfuse.core.device import simulated

from ..info import versions
from .units import MISSING


def families() -> list[str]:
    """Every op that has kernels for a GPU, and each backend of them."""
    found: dict[str, None] = {}
    for each in declarations():
        if each.like is None:
            there = {backend.name for part in each.parts for backend in part.op.backends}
            found |= dict.fromkeys(f"{each.name}:{name}" for name in ("cuda", "triton") if name in there)
    return list(found)


def _driver() -> dict[str, str]:
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        values = done.strip().splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(("driver", "sm clock", "memory clock", "power limit"), values, strict=False))


def main(arguments: list[str]) -> int:
    found: dict[str, Any] = {"versions": versions(), "families": families()}
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), **_driver()}
        device = torch.device("cuda", 0)
    elif simulated():
        found["device"] = "simulator"
        device = torch.device("cpu")
    else:
        print("torch sees no GPU here", file=sys.stderr)
        return MISSING
    found["cuda"] = cuda.missing or cuda.refuses(device)
    found["kernels"] = [str(loaded) for loaded in bundle.LOADED]
    json.dump(found, sys.stdout)
    print(f"{found['device']}, torch {torch.__version__}", file=sys.stderr)
    return 0

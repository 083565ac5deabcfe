"""`bitfuse tune` for what the headline calls, or on the simulator for one small call: policy.json goes where
BITFUSE_CACHE says.

    benchmarks/gpu.py --unit bitfuse_tools.gpu.tune SECONDS
"""

from __future__ import annotations

import sys

import torch
from bitfuse.core.device import simulated

from .. import tuning
from ..bench.shapes import SHAPES
from ..bench.timing import device_name
from ..hypothetical import Sizes
from .sweep import wall_seconds

MARGIN = 12  # seconds: for the imports, and for a case that has begun


def main(arguments: list[str]) -> int:
    minutes = max(1.0, float(arguments[0]) - MARGIN) / 60
    if simulated():
        todo = [tuning.Case("lora_linear", Sizes(m=2, n=64, k=128, rank=8))]
        timer, device, name = wall_seconds, "cpu", "simulator"
    else:
        todo = tuning.cases(tuning.OPS, SHAPES["llama3-8b"])
        timer, device, name = tuning.graph_seconds, "cuda", device_name("cuda")
    done = 0
    try:
        with torch.no_grad():
            for case, found in tuning.tune(name, todo, minutes, False, timer, device):
                done += 1
                if found is not None:
                    print(f"{case}: {found}", file=sys.stderr)
    except KeyboardInterrupt:
        pass
    print(f"{done} of {len(todo)} cases")
    return 0

"""lowbit_embedding on the CPU. The kernel, and what bounds it: csrc/cpu/linear/lowbit_embedding.cpp."""

from __future__ import annotations

import torch

from ...core.cpu import extension as _cpu
from ...weights.weight import WeightTensors, weight_tensors
from .lowbit_linear_cpu import reason


def supports(indices: torch.Tensor, weight: WeightTensors, dtype: torch.dtype) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return reason(weight)


def run(indices: torch.Tensor, weight: WeightTensors, dtype: torch.dtype) -> torch.Tensor:
    """Rows of W; raises IndexError for one that there is not. The arguments have passed the op's check and
    `supports`."""
    out = torch.empty((*indices.shape, weight.shape[1]), dtype=dtype, device=indices.device)
    dense = [None if t is None else t.contiguous() for t in weight.tensors()]
    _cpu.lowbit_embedding(indices.contiguous(), weight_tensors(dense, *weight.how()), out)
    return out

"""merge_attention on the CPU: tensors to addresses. The kernel: csrc/cpu/attention/decode_attention.cpp."""

from __future__ import annotations

import torch

from ...core.cpu import DTYPES
from ...core.cpu import extension as _cpu
from . import append_kv_cpu as cache

supports = cache.supports


def run(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and lse. The arguments have passed the op's check."""
    out, lse = o1.new_empty(o1.shape), lse1.new_empty(lse1.shape, dtype=torch.float32)
    kept = [t.contiguous() for t in (o1, lse1, o2, lse2)]
    _cpu.merge_attention(
        DTYPES[o1.dtype], *o1.shape, *(t.data_ptr() for t in kept), out.data_ptr(), lse.data_ptr()
    )
    return out, lse

"""merge_attention on the CPU. The kernel: csrc/cpu/attention/decode_attention.cpp."""

from __future__ import annotations

import torch

from ...core.cpu import extension as _cpu
from .append_kv_cpu import supports

__all__ = ["run", "supports"]


def run(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and lse. The arguments have passed the op's check."""
    out, lse = o1.new_empty(o1.shape), lse1.new_empty(lse1.shape)
    _cpu.merge_attention(o1.contiguous(), lse1.contiguous(), o2.contiguous(), lse2.contiguous(), out, lse)
    return out, lse

"""rope on the CPU. The kernel: csrc/cpu/attention/append_kv.cpp."""

from __future__ import annotations

import torch

from ...core.cpu import extension as _cpu
from . import append_kv_cpu as cpp
from .attention_args import MAX_HEAD_DIM
from .kv_cache import Rotary
from .operands import dense_rows, rotary_operands


def supports(x: torch.Tensor, rotary: Rotary, inverse: bool) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if x.shape[3] > MAX_HEAD_DIM:
        return f"head_dim is {x.shape[3]}, more than {MAX_HEAD_DIM}"
    return cpp.supports()


def run(x: torch.Tensor, rotary: Rotary, inverse: bool) -> torch.Tensor:
    """x rotated. The arguments have passed the op's check.

    Raises:
        ValueError: a position that cos does not have.
    """
    out = x.new_empty(x.shape)
    if x.numel():
        _cpu.rope(dense_rows(x), rotary_operands(rotary), inverse, out)
    return out

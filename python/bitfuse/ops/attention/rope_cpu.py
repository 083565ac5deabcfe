"""rope on the CPU: tensors to addresses. The kernel: csrc/cpu/attention/append_kv.cpp."""

from __future__ import annotations

import torch

from ...core.cpu import DTYPES
from ...core.cpu import extension as _cpu
from . import append_kv_cpu as cache
from .kv_cache import Rotary

MAX_HEAD_DIM = 512


def supports(x: torch.Tensor, rotary: Rotary, inverse: bool) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if x.shape[3] > MAX_HEAD_DIM:
        return f"head_dim is {x.shape[3]}, more than {MAX_HEAD_DIM}"
    return cache.supports()


def run(x: torch.Tensor, rotary: Rotary, inverse: bool) -> torch.Tensor:
    """x rotated. The arguments have passed the op's check.

    Raises:
        ValueError: a position that cos does not have.
    """
    out = x.new_empty(x.shape)
    if x.numel():
        x = cache.dense_rows(x)
        turn, _kept = cache.rotary_integers(rotary, inverse)
        _cpu.rope(DTYPES[x.dtype], *x.shape, cache.rows(x), out.data_ptr(), turn)
    return out

"""append_kv on the CPU. The kernel: csrc/cpu/attention/append_kv.cpp."""

from __future__ import annotations

from typing import Any

import torch

from ...core.cpu import extension as _cpu
from ...core.cpu import missing
from .kv_cache import CacheTensors, Rotary
from .operands import dense_rows, rotary_operands


def supports(*args: Any) -> str | None:
    """None when `run` can serve the call, which is always where it is built."""
    return missing


def run(
    k: torch.Tensor, v: torch.Tensor, cache: CacheTensors, cache_seqlens: torch.Tensor, rotary: Rotary
) -> None:
    """Write new keys and values. The arguments have passed the op's check.

    Raises:
        ValueError: a cache that is full, a page or a position that is not there; nothing has been written.
    """
    _cpu.append_kv(dense_rows(k), dense_rows(v), cache, cache_seqlens.contiguous(), rotary_operands(rotary))

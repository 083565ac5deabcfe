"""decode_attention on the CPU. The kernels, and what bounds them: csrc/cpu/attention/decode_attention.cpp."""

from __future__ import annotations

import torch

from ...core.cpu import extension as _cpu
from .append_kv_cpu import supports
from .kv_cache import CacheTensors, DecodeArgs, Rotary
from .operands import decode_operands, dense_rows, rotary_operands

__all__ = ["run", "supports"]


def run(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor,
    rotary: Rotary,
    a: DecodeArgs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and lse. The arguments have passed the op's check.

    Raises:
        ValueError: a cache that is full, a page or a position that is not there; nothing has been written.
    """
    batch, queries, heads, _ = q.shape
    out = q.new_empty((batch, queries, heads, cache.head_dim_v))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    if k is not None and v is not None:
        k, v = dense_rows(k), dense_rows(v)
    _cpu.decode_attention(
        dense_rows(q), k, v, cache, cache_seqlens.contiguous(), rotary_operands(rotary), decode_operands(a),
        out, lse,
    )  # fmt: skip
    return out, lse

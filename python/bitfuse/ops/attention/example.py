"""Queries, keys and values from sizes alone, for calls that nobody makes."""

from __future__ import annotations

import torch

from ...core.declaration import Make, Sizes


def example_qkv(s: Sizes, make: Make, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [batch, seqlen, heads, head_dim]; k and v of this many keys."""
    q = make(s.batch, s.seqlen, s.heads, s.head_dim)
    return q, make(s.batch, keys, s.kv_heads, s.head_dim), make(s.batch, keys, s.kv_heads, s.head_dim)

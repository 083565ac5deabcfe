"""decode_attention on the CPU: tensors to addresses. The kernels, and what bounds them:
csrc/cpu/attention/decode_attention.cpp."""

from __future__ import annotations

import torch

from ...core.cpu import extension as _cpu
from .append_kv_cpu import NO_ROWS, cache_integers, dense_rows, rotary_integers, rows, supports
from .kv_cache import CacheTensors, DecodeArgs, Rotary

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
    q, seqlens = dense_rows(q), cache_seqlens.contiguous()
    k_rows = v_rows = NO_ROWS
    new = 0
    if k is not None and v is not None:
        k, v, new = dense_rows(k), dense_rows(v), k.shape[1]
        k_rows, v_rows = rows(k), rows(v)
    turn, _kept = rotary_integers(rotary)
    tree, alibi, sinks = (
        None if t is None else t.contiguous() for t in (a.tree_mask, a.alibi_slopes, a.sinks)
    )
    _cpu.decode_attention(
        cache_integers(cache, batch, q.dtype), seqlens.data_ptr(), rows(q), queries, heads, k_rows, v_rows,
        new, turn, a.softmax_scale, a.softcap, a.left, a.right, 0 if tree is None else tree.data_ptr(),
        1 if tree is None else tree.shape[0], 0 if alibi is None else alibi.data_ptr(),
        alibi is not None and alibi.dim() == 2, 0 if sinks is None else sinks.data_ptr(), out.data_ptr(),
        lse.data_ptr(),
    )  # fmt: skip
    return out, lse

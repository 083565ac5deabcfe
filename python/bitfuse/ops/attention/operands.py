"""What native kernels of attention and of a KV cache ask of their tensors. The bindings of both devices read
named tuples by their fields, and tensors where they are; what is scattered is copied first."""

from __future__ import annotations

from typing import TypeVar

import torch

from .attention_args import AttentionArgs
from .kv_cache import DecodeArgs, Rotary

_Args = TypeVar("_Args", AttentionArgs, DecodeArgs, Rotary)


def dense_rows(t: torch.Tensor) -> torch.Tensor:
    """t with a dense last dimension; a copy where it has none."""
    return t if t.is_contiguous() or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _dense(args: _Args, *names: str) -> _Args:
    """`args` with fields that are contiguous tensors, or None."""
    scattered = {n: t.contiguous() for n in names if (t := getattr(args, n)) is not None}
    return args._replace(**scattered) if scattered else args


def attention_operands(a: AttentionArgs) -> AttentionArgs:
    """Offsets, slopes and sinks contiguous, prefixes with a dense last dimension."""
    if a.prefix_k is not None and a.prefix_v is not None:
        a = a._replace(prefix_k=dense_rows(a.prefix_k), prefix_v=dense_rows(a.prefix_v))
    if a.cu_seqlens_q is None and a.alibi_slopes is None and a.sinks is None:
        return a
    return _dense(a, "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "sinks")


def decode_operands(a: DecodeArgs) -> DecodeArgs:
    """Masks of trees, slopes and sinks contiguous."""
    if a.tree_mask is None and a.alibi_slopes is None and a.sinks is None:
        return a
    return _dense(a, "tree_mask", "alibi_slopes", "sinks")


def rotary_operands(rotary: Rotary) -> Rotary:
    """Tables and positions contiguous."""
    return rotary if rotary.cos is None else _dense(rotary, "cos", "sin", "positions")

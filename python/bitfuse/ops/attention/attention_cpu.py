"""attention on the CPU: tensors to addresses. The kernels, and what bounds them:
csrc/cpu/attention/attention.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...core.cpu import DTYPES, missing
from ...core.cpu import extension as _cpu
from .attention_args import AttentionArgs

_MASK = 3  # of bools, behind the float dtypes


def supports(*args: Any) -> str | None:
    """None when `run` and `run_backward` can serve the call, which is always where they are built."""
    return missing


supports_backward = supports


def _dense(t: torch.Tensor) -> torch.Tensor:
    """t with a dense last dimension; a copy where it has none."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _view(t: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Address, and strides of batch, row and head, of [batch, seq, heads, dim]; packed: no batch."""
    if t is None:
        return 0, 0, 0, 0
    return t.data_ptr(), t.stride(0) if t.dim() == 4 else 0, t.stride(-3), t.stride(-2)


def _common(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs
) -> tuple[tuple[Any, ...], tuple[torch.Tensor | None, ...]]:
    """What both directions hand to the binding, and the tensors that must outlive the call."""
    packed = a.cu_seqlens_q is not None
    prefix = 0 if a.prefix_k is None else a.prefix_k.shape[1]
    batch = q.shape[0] if a.cu_seqlens_q is None else a.cu_seqlens_q.shape[0] - 1
    sizes = (
        DTYPES[q.dtype], batch, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], q.shape[-3],
        k.shape[-3], prefix,
    )  # fmt: skip
    tensors = [None if t is None else _dense(t) for t in (q, k, v, a.prefix_k, a.prefix_v)]
    others = [
        None if t is None else t.contiguous()
        for t in (a.cu_seqlens_q, a.cu_seqlens_k, a.alibi_slopes, a.sinks)
    ]
    cu_q, cu_k, alibi, sinks = (0 if t is None else t.data_ptr() for t in others)
    bias: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    if a.bias is not None:
        strides = (0 if size == 1 else step for size, step in zip(a.bias.shape, a.bias.stride(), strict=True))
        bias = (a.bias.data_ptr(), DTYPES.get(a.bias.dtype, _MASK), *strides)
    seed = 0 if a.seed is None or not a.dropout_p else int(a.seed)
    arguments = (
        sizes, *map(_view, tensors), cu_q if packed else 0, cu_k if packed else 0, a.softmax_scale, a.softcap,
        max(a.left, -1), max(a.right, -1), a.top_left, a.dropout_p, seed, bias, alibi,
        a.alibi_slopes is not None and a.alibi_slopes.dim() == 2, sinks,
    )  # fmt: skip
    return arguments, (*tensors, *others)


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> list[torch.Tensor]:
    """The output and lse. The arguments have passed the op's check.

    Raises:
        ValueError: offsets of packed sequences that decrease or do not end at the total.
    """
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(rows, dtype=torch.float32)
    arguments, _kept = _common(q, k, v, a)
    _cpu.attention(*arguments, out.data_ptr(), lse.data_ptr())
    return [out, lse]


def run_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    a: AttentionArgs,
    wanted: Sequence[bool],
    deterministic: bool,
) -> list[torch.Tensor]:
    """The gradients of q, k, v, bias, sinks, prefix_k and prefix_v, an empty tensor for one not wanted. They
    are the same from run to run and for any number of threads, asked for or not.

    Raises:
        ValueError: offsets of packed sequences that decrease or do not end at the total.
    """
    of = (q, k, v, a.bias, a.sinks, a.prefix_k, a.prefix_v)
    make = q.new_empty if q.numel() else q.new_zeros
    grads = [
        make(t.shape, dtype=t.dtype)
        if t is not None and want
        else q.new_empty(0, dtype=(q if t is None else t).dtype)
        for t, want in zip(of, wanted, strict=True)
    ]
    if not q.numel():
        return grads
    arguments, _kept = _common(q, k, v, a)
    grad, out, lse = _dense(grad), _dense(out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    _cpu.attention_backward(
        *arguments, _view(grad), _view(out), lse.data_ptr(), 0 if grad_lse is None else grad_lse.data_ptr(),
        (0, 0, 0, 0) if a.bias is None else tuple(a.bias.shape),
        tuple(g.data_ptr() if g.numel() else 0 for g in grads),
    )  # fmt: skip
    return grads

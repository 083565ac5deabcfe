"""attention on the CPU. The kernels, and what bounds them: csrc/cpu/attention/attention.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...core.cpu import extension as _cpu
from ...core.cpu import missing
from .attention_args import AttentionArgs
from .operands import attention_operands, dense_rows


class Gradients(NamedTuple):
    """Where the gradients of a call's tensors go, each dense and of its tensor's shape; None: not wanted."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    prefix_k: torch.Tensor | None
    prefix_v: torch.Tensor | None


def supports(*args: Any) -> str | None:
    """None when `run` and `run_backward` can serve the call, which is always where they are built."""
    return missing


supports_backward = supports


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> list[torch.Tensor]:
    """The output and lse. The arguments have passed the op's check.

    Raises:
        ValueError: offsets of packed sequences that decrease or do not end at the total.
    """
    *outer, rows, heads, dim = q.shape
    dim_v = v.shape[-1]
    if dim_v == dim and q.is_contiguous():  # half as long as by sizes
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        out = q.new_empty((*outer, rows, heads, dim_v))
    lse = q.new_empty((*outer, heads, rows), dtype=torch.float32)
    _cpu.attention(dense_rows(q), dense_rows(k), dense_rows(v), attention_operands(a), out, lse)
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
    made = [
        make(t.shape, dtype=t.dtype) if t is not None and want else None
        for t, want in zip(of, wanted, strict=True)
    ]
    if q.numel():
        _cpu.attention_backward(
            dense_rows(grad), None if grad_lse is None else grad_lse.contiguous(), dense_rows(q),
            dense_rows(k), dense_rows(v), dense_rows(out), lse.contiguous(), attention_operands(a),
            Gradients(*made),
        )  # fmt: skip
    return [
        q.new_empty(0, dtype=(q if t is None else t).dtype) if g is None else g
        for g, t in zip(made, of, strict=True)
    ]

"""merge_attention: attention over two sets of keys, from the attention over each."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...core import autocast
from ...core.autograd import Function, recorded
from ...core.backends import Backend
from ...core.declaration import HEADS, Declaration, Make, Part, Sizes, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...core.tensors import check_tensor
from ...kernels.attention import merge_attention as triton
from ..linear.lowbit_linear import FLOATS
from . import merge_attention_cpu as cpp


def _check(o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor) -> None:
    if o1.dim() != 4:
        raise ValueError(f"o1 has shape {list(o1.shape)}, expected [batch, seq, heads, head_dim]")
    batch, seq, heads, _ = o1.shape
    check_tensor("o1", o1, FLOATS, tuple(o1.shape), o1.device)
    check_tensor("o2", o2, (o1.dtype,), tuple(o1.shape), o1.device)
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        check_tensor(name, lse, (torch.float32,), (batch, heads, seq), o1.device)


def shares(lse1: torch.Tensor, lse2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """lse of both sets, and the share of each: exp(lse1 - lse), exp(lse2 - lse), 0 where both sets are
    empty."""
    lse = torch.logaddexp(lse1, lse2)
    from_zero = lse.masked_fill(lse == -math.inf, 0)
    return lse, torch.exp(lse1 - from_zero), torch.exp(lse2 - from_zero)


def _of_rows(share: torch.Tensor) -> torch.Tensor:
    return share.transpose(1, 2).unsqueeze(-1)


def seen(o: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """o, and 0 in rows that saw nothing of the set, whatever stands there: it may never have been written."""
    return o.masked_fill(_of_rows(lse == -math.inf), 0)


def _reference(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """o = w1 o1 + w2 o2 with w = exp(lse_i - lse), lse = log(exp(lse1) + exp(lse2))."""
    lse, w1, w2 = shares(lse1, lse2)
    o1, o2 = seen(o1, lse1), seen(o2, lse2)
    out = _of_rows(w1) * o1.to(lse.dtype) + _of_rows(w2) * o2.to(lse.dtype)
    return out.to(o1.dtype).contiguous(), lse


def _fake(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return o1.new_empty(o1.shape), lse1.new_empty(lse1.shape)


merge_attention_op = Op(
    "merge_attention(Tensor o1, Tensor lse1, Tensor o2, Tensor lse2) -> (Tensor, Tensor)",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
)


class _Merge(Function):
    """dO_i = w_i dO; dlse_i = w_i (dlse + dO . (o_i - o)). In plain torch, and so differentiable."""

    op = "merge_attention"

    @staticmethod
    def forward(
        o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = merge_attention_op(o1, lse1, o2, lse2)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, output[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        o1, lse1, o2, lse2, out = ctx.saved_tensors
        grad, grad_lse = grads
        _, w1, w2 = shares(lse1, lse2)
        grad32, out32 = grad.float(), out.float()
        found: list[torch.Tensor] = []
        for o, w in ((seen(o1, lse1), w1), (seen(o2, lse2), w2)):
            along = (grad32 * (o.float() - out32)).sum(-1).transpose(1, 2)
            found += [(_of_rows(w) * grad32).to(o.dtype), w * (grad_lse + along)]
        return tuple(found)


def merge_attention(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys, from the outputs and lse of each: exact (the split-KV merge
    of Flash-Decoding: Dao et al., 2023; shared prefixes as in Cascade Inference: Ye et al., 2024).

    A set that a row saw nothing of has lse -inf, and gives nothing, whatever its output holds there; where
    both are, the output is 0 and lse -inf. Gradients flow to all four. Under `torch.autocast` two dtypes
    become the wider one.

    Args:
        o1, o2: [batch, seq, heads, head_dim], one of float32, float16, bfloat16.
        lse1, lse2: float32 [batch, heads, seq], as `attention` and `decode_attention` return it.

    Returns:
        The output, of o1's dtype, and lse.

    Raises:
        TypeError: a dtype or a type that is not listed.
        ValueError: sizes that do not fit, tensors on two devices.
    """
    tensors = (o1, lse1, o2, lse2)
    for name, t in zip(("o1", "lse1", "o2", "lse2"), tensors, strict=True):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor")
    if autocast.is_any_enabled():
        o1, o2 = autocast.of_elements(o1, o2)
        tensors = (o1, lse1, o2, lse2)
    if recorded(*tensors):
        return _Merge.call(*tensors)
    return merge_attention_op(*tensors)


def _explain(o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor) -> Explanation:
    return merge_attention_op.explain(o1, lse1, o2, lse2)


def _example(s: Sizes, make: Make) -> tuple[Any, ...]:
    o = make(s.batch, s.seqlen, s.heads, s.head_dim)
    lse = make(s.batch, s.heads, s.seqlen, dtype=torch.float32)
    return o, lse, o, lse


declare(
    Declaration(
        merge_attention,
        "attention over two sets of keys, from that over each",
        place=8,
        explain=_explain,
        uses=HEADS,
        arguments=_example,
        parts=(Part(merge_attention_op),),
    )
)

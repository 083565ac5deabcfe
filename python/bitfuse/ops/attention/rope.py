"""rope: rotary position embedding."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.compiler import is_compiling

from ...core import autocast
from ...core.autograd import Function, elsewhere, no_forward_mode, recorded
from ...core.backends import Backend
from ...core.declaration import HEADS, Declaration, Part, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...core.tensors import check_frozen, check_tensor
from ...kernels.attention import rope as triton
from ..linear.lowbit_linear import FLOATS
from . import rope_cpu as cpp
from .kv_cache import Rotary, check_rotary, rotate

CHECK_PLACES = os.environ.get("BITFUSE_CHECK", "") not in ("", "0")  # on a GPU, where it makes the host wait
LAST = 2**31 - 1


def _check(x: torch.Tensor, rotary: Rotary, inverse: bool) -> None:
    if x.dim() != 4:
        raise ValueError(f"x has shape {list(x.shape)}, expected [batch, seq, heads, head_dim]")
    check_tensor("x", x, FLOATS, tuple(x.shape), x.device)
    if rotary.cos is None or rotary.sin is None:
        raise TypeError("cos or sin is missing, expected tensors [positions, rotary_dim / 2]")
    check_rotary(rotary, x.shape[0], x.shape[1], x.shape[3], x.device)
    if rotary.positions is None and x.shape[1] > rotary.cos.shape[0]:
        raise ValueError(f"rotary_cos has {rotary.cos.shape[0]} positions, expected {x.shape[1]} or more")
    if CHECK_PLACES and x.is_cuda:
        _check_positions(rotary)


def _check_positions(rotary: Rotary) -> None:
    """Raise ValueError for a position that cos does not have. Waits for the device."""
    if rotary.positions is not None and rotary.cos is not None and rotary.positions.numel():
        low, high = (int(p) for p in torch.aminmax(rotary.positions))
        if low < 0 or high >= rotary.cos.shape[0]:
            raise ValueError(
                f"positions holds {low if low < 0 else high}, expected 0 to {rotary.cos.shape[0] - 1}, as "
                "rotary_cos has"
            )


def _reference(x: torch.Tensor, rotary: Rotary, inverse: bool) -> torch.Tensor:
    """Each pair (a, b) of a token's first rotary_dim channels becomes (a cos - b sin, b cos + a sin)."""
    assert rotary.cos is not None and rotary.sin is not None
    _check_positions(rotary)
    positions = rotary.positions
    if positions is None:
        positions = torch.arange(x.shape[1], dtype=torch.int64, device=x.device).unsqueeze(0)
    at = positions.long()
    return rotate(x, rotary.cos[at], rotary.sin[at], rotary.interleaved, inverse).contiguous()


def _fake(x: torch.Tensor, rotary: Rotary, inverse: bool) -> torch.Tensor:
    return x.new_empty(x.shape)


rope_op = Op(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
    flatten=lambda x, rotary, inverse: (x, *rotary, inverse),
    unflatten=lambda x, cos, sin, positions, interleaved, inverse: (
        x,
        Rotary(cos, sin, positions, interleaved),
        inverse,
    ),
)


class _Rope(Function):
    """A rotation: its gradient turns back."""

    op = "rope"

    @staticmethod
    def forward(x: torch.Tensor, inverse: bool, *rotary: Any) -> torch.Tensor:
        return rope_op(x, Rotary(*rotary), inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.inverse, *tensors, ctx.interleaved = inputs
        ctx.save_for_backward(*tensors)
        if elsewhere():
            ctx.save_for_forward(*tensors)
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        rotary = Rotary(cos, sin, positions, ctx.interleaved)
        return apply_rope(grads[0], rotary, not ctx.inverse), *(None,) * 5

    @staticmethod
    def tangents(ctx: Any, *tangents: Any) -> torch.Tensor:
        if any(t is not None for t in tangents[1:]):
            raise no_forward_mode("rope of cos and sin")
        cos, sin, positions = ctx.saved_tensors
        return apply_rope(tangents[0], Rotary(cos, sin, positions, ctx.interleaved), ctx.inverse)


def apply_rope(x: torch.Tensor, rotary: Rotary, inverse: bool = False) -> torch.Tensor:
    """x turned, or turned back, with gradients."""
    if recorded(x):
        return _Rope.call(x, inverse, *rotary)
    return rope_op(x, rotary, inverse)


def as_positions(positions: torch.Tensor | None) -> torch.Tensor | None:
    """int32 [batch or 1, tokens].

    Raises:
        ValueError: on the CPU, a position of more than 32 bits. On a GPU, where nobody looks, it becomes one
            that no table has.
    """
    if positions is None:
        return None
    if not isinstance(positions, torch.Tensor):
        raise TypeError(f"positions is a {type(positions).__name__}, expected a tensor")
    if positions.dtype == torch.int64:
        # what a graph, a fake or a transform has no values of is looked at by the kernel
        known = type(positions) is torch.Tensor and not is_compiling() and not elsewhere()
        if known and positions.is_cpu and positions.numel():
            low, high = (int(p) for p in torch.aminmax(positions))
            if low < -LAST or high > LAST:
                raise ValueError(
                    f"positions holds {low if low < 0 else high}, expected 0 to {LAST}, what 32 bits hold"
                )
        positions = positions.clamp(-LAST, LAST).int()
    return positions.unsqueeze(0) if positions.dim() == 1 else positions


def as_rotary(
    cos: torch.Tensor | None, sin: torch.Tensor | None, positions: torch.Tensor | None, interleaved: bool
) -> Rotary:
    """What the public functions take as one thing.

    Raises:
        TypeError: neither tensors nor None.
        ValueError: positions as `as_positions`; cos or sin require a gradient, which no op gives them.
    """
    if cos is None and sin is None and positions is None:
        return Rotary(None, None, None, interleaved)
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        if t is not None:
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor or None")
            if t.requires_grad:
                check_frozen(name, t)
    if cos is not None and sin is not None and autocast.is_any_enabled():
        cos, sin = autocast.of_elements(cos, sin)
    return Rotary(cos, sin, as_positions(positions), interleaved)


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """x with each token's channels turned by its position (RoFormer: Su et al., 2021). Computed in float32
    and rounded once; gradients flow to x.

    Args:
        x: [batch, seq, heads, head_dim], float32, float16 or bfloat16, any strides.
        cos, sin: [positions, rotary_dim / 2], one float dtype (under `torch.autocast` two become the wider);
            rotary_dim is 2 to head_dim, and the channels past it are left as they are. They get no gradient:
            tables that require one are refused.
        positions: [batch or 1, seq] or [seq], int32 or int64: the row of cos for each token; 0, 1, ... by
            default. On the CPU a position without a row is refused; on a GPU (but with BITFUSE_CHECK=1 in the
            environment, which waits for it) what it turns becomes NaN.
        interleaved: pairs are channels (2 i, 2 i + 1), as in GPT-J, not (i, i + rotary_dim / 2), as in Llama.

    Returns:
        [batch, seq, heads, head_dim] of x's dtype, contiguous.

    Raises:
        TypeError: a dtype or a type that is not listed.
        ValueError: sizes that do not fit, tensors on two devices, a position that cos does not have.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a tensor")
    rotary = as_rotary(cos, sin, positions, interleaved)
    return apply_rope(x, rotary)


def _explain(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> Explanation:
    return rope_op.explain(x, as_rotary(cos, sin, positions, interleaved), False)


declare(
    Declaration(
        rope,
        "rotary position embedding",
        place=7,
        explain=_explain,
        uses=HEADS,
        arguments=lambda s, make: (
            make(s.batch, s.seqlen, s.heads, s.head_dim),
            make(s.seqlen, s.head_dim // 2),
            make(s.seqlen, s.head_dim // 2),
        ),
        parts=(Part(rope_op),),
    )
)

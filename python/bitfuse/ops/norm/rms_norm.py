"""rms_norm: x over its root mean square, times a weight; with a residual added before, and its gradients."""

from __future__ import annotations

from typing import Any, overload

import torch

from ...core.autograd import Function, once, recorded
from ...core.backends import Backend
from ...core.declaration import Declaration, Part, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...kernels.norm import norm as triton
from . import norm_cpu as cpp
from .norm_args import arguments, check, check_backward, number, summed


def _check(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float, offset: float
) -> None:
    check(x, weight, None, residual, eps)
    number("offset", offset)


def _reference(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float, offset: float
) -> list[torch.Tensor]:
    s = x if residual is None else x + residual
    z = s.float()
    y = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * (weight.float() + offset)
    return [y.to(x.dtype)] if residual is None else [y.to(x.dtype), s]


def _fake(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float, offset: float
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for _ in range(1 if residual is None else 2)]


def _check_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    learns: bool,
) -> None:
    check_backward(grad, grad_sum, x, weight, None, eps)
    number("offset", offset)


def _reference_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    learns: bool,
) -> list[torch.Tensor]:
    z, dy = x.float(), grad.float()
    r = torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    g = dy * (weight.float() + offset)
    dx = r * (g - z * r * (r * (g * z).mean(-1, keepdim=True)))
    dx = (dx if grad_sum is None else dx + grad_sum.float()).to(x.dtype)
    over = tuple(range(x.dim() - 1))
    return [dx, summed(dy * z * r, over).to(weight.dtype)] if learns else [dx]


def _fake_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    learns: bool,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape), *([weight.new_empty(weight.shape)] if learns else [])]


rms_norm_op = Op(
    "rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps, float offset) -> Tensor[]",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.rms_norm),
        Backend("triton", ("cuda",), triton.supports, triton.rms_norm),
    ),
)
rms_norm_backward = Op(
    "rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, float eps, float offset, "
    "bool learns) -> Tensor[]",
    _check_backward,
    _reference_backward,
    _fake_backward,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.rms_norm_backward),
        Backend("triton", ("cuda",), triton.supports_backward, triton.rms_norm_backward),
    ),
)


class _RMSNorm(Function):
    """Of x, weight, residual, eps and offset: y, or y and the sum."""

    op = "rms_norm"

    @staticmethod
    def forward(
        x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float, offset: float
    ) -> Any:
        made = rms_norm_op(x, weight, residual, eps, offset)
        return made[0] if residual is None else tuple(made)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, residual, ctx.eps, ctx.offset = inputs
        ctx.save_for_backward(x if residual is None else output[1], weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once("rms_norm")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        above = grads[1] if len(grads) == 2 else None
        if grads[0] is None:  # nobody uses y
            return above, None, above, None, None
        learns = ctx.needs_input_grad[1]
        made = rms_norm_backward(grads[0], above, x, weight, ctx.eps, ctx.offset, learns)
        dx, d_weight = made if learns else (made[0], None)
        return dx, d_weight, dx if len(grads) == 2 else None, None, None


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = ...,
    *,
    residual: None = ...,
    offset: float = ...,
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = ..., *, residual: torch.Tensor, offset: float = ...
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension (Zhang and Sennrich, 2019). With
    a residual, of s = x + residual, and s with it: the end of one block and the beginning of the next in one
    pass, as vLLM's and Liger's fused add and norm. float32 inside; y is rounded once, s before it is
    normalised, as where the two are apart. The backward is one pass too, gradients of s included. Under
    `torch.autocast` x and residual become the wider dtype of theirs, as where torch adds them.

    Args:
        x: [..., features], float32, float16 or bfloat16, any strides.
        weight: [features], of any of these dtypes.
        eps: 0 or more.
        residual: of x's shape and dtype.
        offset: added to the weight in float32: 1 for Gemma's.

    Returns:
        y, of x's dtype and shape; with a residual y and s.

    Raises:
        TypeError: a dtype that is not listed, a residual of another dtype than x.
        ValueError: shapes or devices that do not fit, eps below 0 or not finite.
    """
    x, residual = arguments(x, residual, weight=weight)
    if recorded(x, weight, residual):
        return _RMSNorm.call(x, weight, residual, eps, offset)
    made = rms_norm_op(x, weight, residual, eps, offset)
    return made[0] if residual is None else (made[0], made[1])


def _explain(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> Explanation:
    x, residual = arguments(x, residual, weight=weight)
    return rms_norm_op.explain(x, weight, residual, eps, offset)


declare(
    Declaration(
        rms_norm,
        "x over its root mean square, a residual added before, and its gradients",
        place=0,
        explain=_explain,
        uses=("m", "n", "dtype"),
        arguments=lambda s, make: (make(s.m, s.n), make(s.n)),
        parts=(Part(rms_norm_op, "forward"), Part(rms_norm_backward, "gradients")),
        matrices="hidden",
    )
)

"""layer_norm: x less its mean over its deviation, times a weight; with a residual added before, and its
gradients."""

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
from .norm_args import arguments, check, check_backward, summed


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> None:
    check(x, weight, bias, residual, eps)


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> list[torch.Tensor]:
    s = x if residual is None else x + residual
    z = s.float()
    z = z - z.mean(-1, keepdim=True)
    y = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * weight.float()
    y = y if bias is None else y + bias.float()
    return [y.to(x.dtype)] if residual is None else [y.to(x.dtype), s]


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for _ in range(1 if residual is None else 2)]


def _check_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    learns: bool,
) -> None:
    check_backward(grad, grad_sum, x, weight, bias, eps)


def _reference_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    learns: bool,
) -> list[torch.Tensor]:
    z, dy = x.float(), grad.float()
    z = z - z.mean(-1, keepdim=True)
    r = torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    g = dy * weight.float()
    dx = r * (g - g.mean(-1, keepdim=True) - z * r * (r * (g * z).mean(-1, keepdim=True)))
    dx = (dx if grad_sum is None else dx + grad_sum.float()).to(x.dtype)
    over = tuple(range(x.dim() - 1))
    if not learns:
        return [dx]
    d_weight = summed(dy * z * r, over).to(weight.dtype)
    return [dx, d_weight] if bias is None else [dx, d_weight, summed(dy, over).to(bias.dtype)]


def _fake_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    learns: bool,
) -> list[torch.Tensor]:
    learnt = [weight, bias] if learns else []
    return [t.new_empty(t.shape) for t in (x, *learnt) if t is not None]


layer_norm_op = Op(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps) -> Tensor[]",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.layer_norm),
        Backend("triton", ("cuda",), triton.supports, triton.layer_norm),
    ),
)
layer_norm_backward = Op(
    "layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor? bias, "
    "float eps, bool learns) -> Tensor[]",
    _check_backward,
    _reference_backward,
    _fake_backward,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.layer_norm_backward),
        Backend("triton", ("cuda",), triton.supports_backward, triton.layer_norm_backward),
    ),
)


class _LayerNorm(Function):
    """Of x, weight, bias, residual and eps: y, or y and the sum."""

    op = "layer_norm"

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        eps: float,
    ) -> Any:
        made = layer_norm_op(x, weight, bias, residual, eps)
        return made[0] if residual is None else tuple(made)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, residual, ctx.eps = inputs
        ctx.save_for_backward(x if residual is None else output[1], weight, bias)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once("layer_norm")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        above = grads[1] if len(grads) == 2 else None
        if grads[0] is None:  # nobody uses y
            return above, None, None, above, None
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        made = layer_norm_backward(grads[0], above, x, weight, bias, ctx.eps, learns)
        dx, d_weight, d_bias = (*made, None, None)[:3]
        return dx, d_weight, d_bias, dx if len(grads) == 2 else None, None


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    *,
    residual: None = ...,
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    *,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (Ba et al., 2016), with the
    variance of all numbers as torch's; with a residual, of s = x + residual, and s with it, in one pass.
    float32 inside; y is rounded once, s before it is normalised, as where the two are apart. The backward is
    one pass too, gradients of s included. Under `torch.autocast` x and residual become the wider dtype of
    theirs, as where torch adds them.

    Args:
        x: [..., features], float32, float16 or bfloat16, any strides.
        weight, bias: [features], each of any of these dtypes; no bias: None.
        eps: 0 or more.
        residual: of x's shape and dtype.

    Returns:
        y, of x's dtype and shape; with a residual y and s.

    Raises:
        TypeError: a dtype that is not listed, a residual of another dtype than x.
        ValueError: shapes or devices that do not fit, eps below 0 or not finite.
    """
    x, residual = arguments(x, residual, weight=weight, bias=bias)
    if recorded(x, weight, bias, residual):
        return _LayerNorm.call(x, weight, bias, residual, eps)
    made = layer_norm_op(x, weight, bias, residual, eps)
    return made[0] if residual is None else (made[0], made[1])


def _explain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
) -> Explanation:
    x, residual = arguments(x, residual, weight=weight, bias=bias)
    return layer_norm_op.explain(x, weight, bias, residual, eps)


declare(
    Declaration(
        layer_norm,
        "x less its mean over its deviation, a residual added before, and its gradients",
        place=1,
        explain=_explain,
        uses=("m", "n", "dtype"),
        arguments=lambda s, make: (make(s.m, s.n), make(s.n), make(s.n)),
        parts=(Part(layer_norm_op, "forward"), Part(layer_norm_backward, "gradients")),
        matrices="hidden",
    )
)

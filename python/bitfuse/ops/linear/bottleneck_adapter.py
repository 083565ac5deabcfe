"""bottleneck_adapter: y = x + act(x D^T + c) U^T + b, the adapter that stands after a layer."""

from __future__ import annotations

from typing import Any

import torch

from ...core import autocast
from ...core.activations import activate, check_activation, derivative
from ...core.autograd import Function, once, recorded, refuse_intermediate
from ...core.backends import Backend
from ...core.cost import Cost, moved
from ...core.declaration import Declaration, Part, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...core.tensors import as_rows, check_tensor
from ...kernels.linear import bottleneck_adapter as triton
from . import bottleneck_adapter_cpu as cpp
from .lowbit_linear import FLOATS, check_float


def _check(
    x: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str,
    residual: bool,
) -> None:
    check_activation(activation)
    k = down.shape[1] if down.dim() == 2 else 0
    check_float(x, "x", k)
    r = down.shape[0]
    n = up.shape[0] if up.dim() == 2 else 0
    for name, t, shape in (
        ("down", down, (r, k)),
        ("down_bias", down_bias, (r,)),
        ("up", up, (n, r)),
        ("up_bias", up_bias, (n,)),
    ):
        if t is not None or name in ("down", "up"):
            check_tensor(name, t, FLOATS, shape, x.device)
    if residual and n != k:
        raise ValueError(f"up has shape {list(up.shape)}, expected {[k, r]} to add x")


def _reference(
    x: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str,
    residual: bool,
) -> list[torch.Tensor]:
    """y [..., N] of x's dtype, and h = x D^T + c, float32 [rows, r]."""
    biases = [None if b is None else b.to(w.dtype) for b, w in ((down_bias, down), (up_bias, up))]
    h = torch.nn.functional.linear(as_rows(x).to(down.dtype), down, biases[0])
    y = torch.nn.functional.linear(activate(h, activation).to(up.dtype), up, biases[1])
    y = y.view(*x.shape[:-1], up.shape[0])
    return [(x + y if residual else y).to(x.dtype), h.float()]


def _fake(
    x: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str,
    residual: bool,
) -> list[torch.Tensor]:
    rows = x.shape[:-1].numel()
    return [
        x.new_empty(*x.shape[:-1], up.shape[0]),
        x.new_empty(rows, down.shape[0], dtype=torch.float32),
    ]


def _cost(
    x: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str,
    residual: bool,
) -> Cost:
    rows, (n, r) = x.shape[:-1].numel(), up.shape
    out = rows * (n * x.element_size() + r * 4)
    return Cost(moved(x, down, down_bias, up, up_bias) + out, 2 * rows * r * (x.shape[-1] + n), x.dtype)


bottleneck_adapter_op = Op(
    "bottleneck_adapter(Tensor x, Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias, "
    "str activation, bool residual) -> Tensor[]",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
    cost=_cost,
)


class _BottleneckAdapter(Function):
    """Keeps x and h; what the backward makes beside the gradients is [rows, r]."""

    op = "bottleneck_adapter"

    @staticmethod
    def forward(
        x: torch.Tensor,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
        activation: str,
        residual: bool,
    ) -> tuple[torch.Tensor, ...]:
        return tuple(bottleneck_adapter_op(x, down, down_bias, up, up_bias, activation, residual))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, down, down_bias, up, up_bias, ctx.activation, ctx.residual = inputs
        ctx.set_materialize_grads(False)
        ctx.biases = [None if b is None else b.dtype for b in (down_bias, up_bias)]
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, down, up, output[1])

    @staticmethod
    @once("bottleneck_adapter")
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_intermediate("bottleneck_adapter", grads[1:])
        x, down, up, h = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad = as_rows(grads[0])
        d_x = d_down = d_down_bias = d_up = d_up_bias = None
        if any(wanted[:3]):
            d_h = (grad.to(up.dtype) @ up).float() * derivative(h, ctx.activation)
            if wanted[0]:
                d_x = (d_h.to(down.dtype) @ down).to(grad.dtype)
                d_x = (grad + d_x if ctx.residual else d_x).view(*grads[0].shape[:-1], down.shape[1])
            if wanted[1]:
                d_down = d_h.to(down.dtype).t() @ as_rows(x).to(down.dtype)
            if wanted[2]:
                d_down_bias = d_h.sum(0).to(ctx.biases[0])
        if wanted[3]:
            d_up = grad.to(up.dtype).t() @ activate(h, ctx.activation).to(up.dtype)
        if wanted[4]:
            d_up_bias = grad.sum(0, dtype=torch.float32).to(ctx.biases[1])
        return d_x, d_down, d_down_bias, d_up, d_up_bias, None, None


def bottleneck_adapter(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    down_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    activation: str = "gelu",
    residual: bool = True,
) -> torch.Tensor:
    """y = x + act(x down^T + down_bias) up^T + up_bias (Houlsby et al., 2019; Pfeiffer et al., 2021).

    The middle, [rows, r], is float32 and never rounded; x is read, y written, and nothing of their size lies
    between. Gradients flow to x, both matrices and both biases. Under `torch.autocast` the output has the
    autocast dtype or, where x is added to it, the wider of the two: what torch's layers give.

    Args:
        x: [..., in_features], float32, float16 or bfloat16, any strides.
        down: [r, in_features]; up: [out_features, r]; down_bias: [r]; up_bias: [out_features]; each of the
            three dtypes, x's or another.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        residual: False leaves x out of the sum; True needs out_features = in_features.

    Returns:
        [..., out_features], of x's dtype.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: sizes that do not fit, an unknown activation, two devices.
    """
    for name, t in (("x", x), ("down", down), ("up", up)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor")
    for name, bias in (("down_bias", down_bias), ("up_bias", up_bias)):
        if not (bias is None or isinstance(bias, torch.Tensor)):
            raise TypeError(f"{name} is a {type(bias).__name__}, expected a tensor or None")
    if autocast.is_any_enabled() and (dtype := autocast.dtype_of(x)) is not None:
        # as what torch's layers give, in the autocast dtype, and as its sum with x
        x = autocast.cast(x, torch.promote_types(x.dtype, dtype) if residual else dtype)
    tensors = (x, down, down_bias, up, up_bias)
    if recorded(*tensors):
        return _BottleneckAdapter.call(*tensors, activation, residual)[0]
    return bottleneck_adapter_op(*tensors, activation, residual)[0]


def _explain(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    down_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    activation: str = "gelu",
    residual: bool = True,
) -> Explanation:
    return bottleneck_adapter_op.explain(x, down, down_bias, up, up_bias, activation, residual)


declare(
    Declaration(
        bottleneck_adapter,
        "x + act(x D^T + c) U^T + b",
        place=7,
        explain=_explain,
        uses=("m", "k", "rank", "dtype"),
        arguments=lambda s, make: (make(s.m, s.k), make(s.rank, s.k), make(s.k, s.rank)),
        parts=(Part(bottleneck_adapter_op),),
        matrices="hidden",
    )
)

"""gated_activation: act(gate) * up, the middle of a gated MLP, and its gradients in one pass."""

from __future__ import annotations

from typing import Any

import torch

from ...core import autocast
from ...core.activations import activate, check_activation, derivative
from ...core.autograd import Function, once, recorded
from ...core.backends import Backend
from ...core.declaration import Declaration, Part, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...core.tensors import check_tensor
from ...kernels.linear import gated_activation as triton
from . import gated_activation_cpu as cpp
from .lowbit_linear import FLOATS


def _check(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    check_activation(activation)
    check_tensor("gate", gate, FLOATS, gate.shape, gate.device)
    check_tensor("up", up, (gate.dtype,), gate.shape, gate.device)


def _reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return activate(gate, activation) * up


def _fake(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _check_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    _check(gate, up, activation)
    check_tensor("grad", grad, (gate.dtype,), gate.shape, gate.device)


def _reference_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> list[torch.Tensor]:
    z = gate.float()
    d_gate = grad.float() * up.float() * derivative(z, activation)
    return [d_gate.to(gate.dtype), grad * activate(gate, activation)]


def _fake_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> list[torch.Tensor]:
    return [gate.new_empty(gate.shape), gate.new_empty(gate.shape)]


gated_activation_op = Op(
    "gated_activation(Tensor gate, Tensor up, str activation) -> Tensor",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
)
gated_activation_backward = Op(
    "gated_activation_backward(Tensor grad, Tensor gate, Tensor up, str activation) -> Tensor[]",
    _check_backward,
    _reference_backward,
    _fake_backward,
    (
        Backend("cpp", ("cpu",), cpp.supports_backward, cpp.run_backward),
        Backend("triton", ("cuda",), triton.supports_backward, triton.run_backward),
    ),
)


class _GatedActivation(Function):
    op = "gated_activation"

    @staticmethod
    def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        return gated_activation_op(gate, up, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        gate, up, ctx.activation = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    @once("gated_activation")
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = gated_activation_backward(grads[0], gate, up, ctx.activation)
        return d_gate, d_up, None


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(gate) * up: SwiGLU with "silu", GeGLU with "gelu" (erf) or "gelu_tanh", ReGLU with "relu"
    (Shazeer, 2020). One read of both and one write; float32 inside; the backward is one pass too. Under
    `torch.autocast` two dtypes become the wider one, as where torch multiplies.

    Args:
        gate, up: [..., features], of one shape, float32, float16 or bfloat16, any strides.
        activation: "silu", "gelu", "gelu_tanh" or "relu".

    Raises:
        TypeError: a dtype that is not listed, two dtypes.
        ValueError: two shapes or devices, an unknown activation.
    """
    for name, t in (("gate", gate), ("up", up)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor")
    if autocast.is_any_enabled():
        gate, up = autocast.of_elements(gate, up)
    if recorded(gate, up):
        return _GatedActivation.call(gate, up, activation)
    return gated_activation_op(gate, up, activation)


def _explain(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu") -> Explanation:
    return gated_activation_op.explain(*autocast.of_elements(gate, up), activation)


declare(
    Declaration(
        gated_activation,
        "act(gate) * up, the middle of a gated MLP, and its gradients",
        place=6,
        explain=_explain,
        uses=("m", "n", "dtype"),
        arguments=lambda s, make: (make(s.m, s.n), make(s.m, s.n)),
        parts=(Part(gated_activation_op, "forward"), Part(gated_activation_backward, "gradients")),
        matrices="mlp",
    )
)

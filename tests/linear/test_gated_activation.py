"""gated_activation and its gradients: every backend, one test."""

from __future__ import annotations

from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.core.activations import ACTIVATIONS, activate, derivative
from bitfuse.ops.linear.gated_activation import gated_activation_backward, gated_activation_op

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 8), (3, 5, 40), (17, 1000), (2, 3)]
TARGETS = targets("cpp", "triton", "reference")


def inputs(target: Target, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Of every size: tails of the activations, and a few zeros and huge values."""
    gate = torch.randn(shape) * torch.logspace(-2, 1.2, shape[-1])
    gate.view(-1)[:2] = torch.tensor([0.0, -100.0])
    return target.place(gate.to(dtype), torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_forward_and_backward(target: Target, dtype: torch.dtype, activation: str) -> None:
    for shape in target.pick(SHAPES):
        gate, up, grad = inputs(target, shape, dtype)
        g, u, dy = (t.cpu().double() for t in (gate, up, grad))
        plain = activate(gate.cpu(), activation) * up.cpu()
        got = target.run(gated_activation_op, gate, up, activation)
        assert_accurate(got.cpu(), activate(g, activation) * u, plain, f"{shape}")
        d_gate, d_up = target.run(gated_activation_backward, grad, gate, up, activation)
        leaves = [t.cpu().clone().requires_grad_() for t in (gate, up)]
        plain_grads = torch.autograd.grad(activate(leaves[0], activation) * leaves[1], leaves, grad.cpu())
        assert_accurate(d_gate.cpu(), dy * u * derivative(g, activation), plain_grads[0], f"gate {shape}")
        assert_accurate(d_up.cpu(), dy * activate(g, activation), plain_grads[1], f"up {shape}")


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_views_and_special_values(target: Target) -> None:
    wide = target.place(torch.randn(6, 4, 64))[0]
    for gate, up in (
        (wide[..., :32], wide[..., 32:]),
        (wide[..., ::2], wide[..., 1::2]),
        (wide.transpose(0, 1), wide.transpose(0, 1)),
        (wide[:0], wide[:0]),
        (wide[:1].expand(6, 4, 64), wide),
    ):
        got = target.run(gated_activation_op, gate, up, "silu")
        torch.testing.assert_close(got.cpu(), activate(gate.cpu(), "silu") * up.cpu())
        d_gate, d_up = target.run(gated_activation_backward, gate, gate, up, "gelu")
        torch.testing.assert_close(d_up.cpu(), gate.cpu() * activate(gate.cpu(), "gelu"))
        assert d_gate.shape == gate.shape
    for activation in ACTIVATIONS:
        gate, up = target.place(torch.tensor([3e4, float("nan"), -1e30, 1e30]), torch.ones(4))
        got = target.run(gated_activation_op, gate, up, activation).cpu()
        assert got[0] == 3e4 and got[1].isnan() and got[2] == 0 and got[3] == 1e30, (activation, got)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_gates_far_from_zero(target: Target, activation: str) -> None:
    """Activations and derivatives have their limits, infinite gates too, where torch's value is no NaN."""
    far = [1e4, 1e13, 1e20, 1e30, 3e38, float("inf")]
    gate, up = target.place(torch.tensor([*far, *(-x for x in far)]), torch.ones(12))
    wanted = torch.tensor([*far, *([0.0] * 6)])
    known = ~activate(gate.cpu().double(), activation).isnan()
    got = target.run(gated_activation_op, gate, up, activation).cpu()
    if target.backend != "reference":  # torch's own gelu is inf in float32 where it is 3e38 in float64
        torch.testing.assert_close(got[known], wanted[known], rtol=0, atol=0)
    d_gate, d_up = (t.cpu() for t in target.run(gated_activation_backward, up, gate, up, activation))
    assert d_gate.tolist() == [1.0] * 6 + [0.0] * 6, d_gate
    torch.testing.assert_close(d_up, got, rtol=0, atol=0, equal_nan=True)


def test_derivatives_are_those_of_torch() -> None:
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
    for activation in ACTIVATIONS:
        (wanted,) = torch.autograd.grad(activate(z, activation).sum(), z)
        torch.testing.assert_close(derivative(z.detach(), activation), wanted)


def test_autograd_compile_and_opcheck() -> None:
    gate, up = (torch.randn(4, 24, requires_grad=True) for _ in range(2))
    compiled = torch.compile(bitfuse.gated_activation, fullgraph=True, dynamic=False)
    wanted = torch.autograd.grad((activate(gate, "silu") * up).square().sum(), (gate, up))
    for function in (bitfuse.gated_activation, compiled):
        got = torch.autograd.grad(function(gate, up).square().sum(), (gate, up))
        torch.testing.assert_close(got, wanted)
    for activation in ACTIVATIONS:
        g, u = gate.detach(), up.detach()
        torch.library.opcheck(torch.ops.bitfuse.gated_activation.default, (g, u, activation))
        torch.library.opcheck(torch.ops.bitfuse.gated_activation_backward.default, (g, g, u, activation))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(activation="tanh"), ValueError, "activation is 'tanh', expected one of 'silu'"),
        (dict(up=torch.randn(2, 7)), ValueError, r"up has shape \[2, 7\], expected \[2, 8\]"),
        (dict(up=torch.randn(2, 8).half()), TypeError, "up has dtype torch.float16, expected torch.float32"),
        (dict(gate=torch.randn(2, 8).double()), TypeError, "gate has dtype torch.float64"),
        (dict(gate=3), TypeError, "gate is a int, expected a tensor"),
    ],
)
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bitfuse.gated_activation(**dict(gate=torch.randn(2, 8), up=torch.randn(2, 8)) | changes)

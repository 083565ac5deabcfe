"""bottleneck_adapter and its gradients: every backend, one test."""

from __future__ import annotations

from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.core.activations import ACTIVATIONS, activate
from bitfuse.ops.linear.bottleneck_adapter import bottleneck_adapter_op

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# rows, in, bottleneck, out, dtype of x, of the adapter, activation, biases
CASES = [
    (1, 128, 16, 128, F16, F16, "gelu", True),
    (5, 64, 7, 64, F32, F32, "silu", True),
    (3, 96, 130, 40, BF16, F32, "relu", False),
    (70, 128, 24, 128, BF16, BF16, "gelu_tanh", True),
    (17, 200, 64, 72, F32, F16, "gelu", False),
]


def make(target: Target, case: tuple[Any, ...]) -> list[Any]:
    m, k, r, n, dtype, adapter, activation, biased = case
    placed: list[Any] = target.place(
        torch.randn(m, k, dtype=dtype),
        (torch.randn(r, k) / k**0.5).to(adapter),
        torch.randn(r).to(adapter),
        (torch.randn(n, r) / r**0.5).to(adapter),
        torch.randn(n).to(adapter),
    )
    if not biased:
        placed[2] = placed[4] = None
    return [*placed, activation, n == k]


def formula(args: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    x, down, down_bias, up, up_bias, activation, residual = args
    h = torch.nn.functional.linear(x, down, down_bias)
    y = torch.nn.functional.linear(activate(h, activation), up, up_bias)
    return (x + y if residual else y), h


def moved(args: list[Any], dtype: torch.dtype | None = None) -> list[Any]:
    return [t.cpu().to(dtype or t.dtype) if isinstance(t, torch.Tensor) else t for t in args]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"m{c[0]}k{c[1]}r{c[2]}-{str(c[4])[6:]}-{c[6]}")
@pytest.mark.parametrize("target", targets("cpp", "triton", "reference"), ids=str)
def test_forward(target: Target, case: tuple[Any, ...]) -> None:
    args = make(target, case)
    y, h = target.run(bottleneck_adapter_op, *args)
    plain = bottleneck_adapter_op.reference(*moved(args))
    for got, exact, of_plain in zip((y, h), formula(moved(args, torch.float64)), plain, strict=True):
        assert_accurate(got.cpu(), exact, of_plain)
    assert torch.equal(y, target.run(bottleneck_adapter_op, *args)[0]), "another run, other numbers"


@pytest.mark.parametrize("target", targets("cpp", "triton", "reference"), ids=str)
def test_views_and_empty_inputs(target: Target) -> None:
    _, *adapter, activation, residual = make(target, CASES[1])
    wide = target.place(torch.randn(4, 3, 128))[0]
    for x in (
        wide[..., :64],
        wide[..., ::2],
        wide.transpose(0, 1)[..., 64:],
        wide[:0, :, :64],
        wide[0, 0, :64],
    ):
        y, _ = target.run(bottleneck_adapter_op, x, *adapter, activation, residual)
        wanted, _ = formula(moved([x, *adapter, activation, residual]))
        torch.testing.assert_close(y.cpu(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [True, False])
def test_gradients_reach_only_what_asks_for_them(activation: str, residual: bool) -> None:
    args = make(Target("cpp", "cpu"), (6, 48, 5, 48, F32, F32, activation, True))
    args[-1] = residual
    for subset in range(1, 32):
        asked = [i for i in range(5) if subset >> i & 1]
        given = [a.clone().requires_grad_(i in asked) if i < 5 else a for i, a in enumerate(args)]
        x, down, down_bias, up, up_bias, *rest = given
        y = bitfuse.bottleneck_adapter(x, down, up, down_bias, up_bias, *rest)
        got = torch.autograd.grad(y.square().sum(), [given[i] for i in asked])
        wanted = torch.autograd.grad(formula(given)[0].square().sum(), [given[i] for i in asked])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_compile_and_opcheck() -> None:
    x, down, down_bias, up, up_bias, *rest = moved(make(Target("cpp", "cpu"), CASES[1]))
    args = [t.clone() for t in (x, down, down_bias, up, up_bias)]
    torch.library.opcheck(torch.ops.bitfuse.bottleneck_adapter.default, (*args, *rest))
    torch.library.opcheck(
        torch.ops.bitfuse.bottleneck_adapter.default, (x.clone(), down.clone(), None, up.clone(), None, *rest)
    )
    compiled = torch.compile(bitfuse.bottleneck_adapter, fullgraph=True, dynamic=False)
    down.requires_grad_()
    results = [function(x, down, up, down_bias) for function in (compiled, bitfuse.bottleneck_adapter)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), down)[0] for y in results))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            dict(x=torch.randn(2, 40)),
            ValueError,
            r"x has shape \[2, 40\], expected the last dimension to be 48",
        ),
        (dict(up=torch.randn(48, 6)), ValueError, r"up has shape \[48, 6\], expected \[48, 5\]"),
        (dict(up=torch.randn(40, 5)), ValueError, r"up has shape \[40, 5\], expected \[48, 5\] to add x"),
        (dict(down_bias=torch.randn(6)), ValueError, r"down_bias has shape \[6\], expected \[5\]"),
        (dict(up_bias=torch.randn(48).int()), TypeError, "up_bias has dtype torch.int32"),
        (dict(activation="tanh"), ValueError, "activation is 'tanh'"),
        (dict(down=None), TypeError, "down is a NoneType, expected a tensor"),
    ],
)
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    given = dict(x=torch.randn(2, 48), down=torch.randn(5, 48), up=torch.randn(48, 5))
    with pytest.raises(error, match=words):
        bitfuse.bottleneck_adapter(**given | changes)

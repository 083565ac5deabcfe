"""What rms_norm and layer_norm are handed, checked: theirs are the same arguments."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...core import autocast
from ...core.tensors import check_tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def arguments(
    x: torch.Tensor, residual: torch.Tensor | None, **others: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x and residual, which autocast makes one dtype; a TypeError that names what is no tensor."""
    for name, t in (("x", x), ("residual", residual), *others.items()):
        if not isinstance(t, torch.Tensor) and not (t is None and name in ("residual", "bias")):
            raise TypeError(
                f"{name} is {'missing' if t is None else f'a {type(t).__name__}'}, expected a tensor"
            )
    if residual is not None and autocast.is_any_enabled():
        x, residual = autocast.of_elements(x, residual)
    return x, residual


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> None:
    """Of a forward."""
    if x.dim() == 0:
        raise ValueError("x has no dimension, expected [..., features]")
    check_tensor("x", x, FLOATS, x.shape, x.device)
    check_tensor("weight", weight, FLOATS, x.shape[-1:], x.device)
    if bias is not None:
        check_tensor("bias", bias, FLOATS, x.shape[-1:], x.device)
    if residual is not None:
        check_tensor("residual", residual, (x.dtype,), x.shape, x.device)
    number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps is {eps}, expected 0 or more")


def check_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> None:
    """Of gradients."""
    check(x, weight, bias, grad_sum, eps)
    check_tensor("grad", grad, (x.dtype,), x.shape, x.device)


def number(name: str, value: object) -> None:
    """Raise for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}, expected a finite number")


def summed(t: torch.Tensor, over: tuple[int, ...]) -> torch.Tensor:
    """t's sum over these dimensions; torch's over none of them is one over all."""
    return t.sum(over) if over else t

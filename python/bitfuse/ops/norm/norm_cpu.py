"""rms_norm and layer_norm on the CPU. The kernel, and what bounds it: csrc/cpu/norm/norm.cpp; it reads
tensors where they lie."""

from __future__ import annotations

from typing import Any

import torch

from ...core.cpu import addressable, missing
from ...core.cpu import extension as _cpu


def supports(*arguments: Any) -> str | None:
    """None when a call can be served, else the reason."""
    return missing


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
) -> list[torch.Tensor]:
    out = x.new_empty(x.shape)
    if residual is None:
        _cpu.norm(addressable(x), weight.contiguous(), _dense(bias), None, out, None, eps, offset, centered)
        return [out]
    total = x.new_empty(x.shape)
    given = addressable(x), weight.contiguous(), _dense(bias), addressable(residual)
    _cpu.norm(*given, out, total, eps, offset, centered)
    return [out, total]


def _backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    learns: bool,
    centered: bool,
) -> list[torch.Tensor]:
    dx = x.new_empty(x.shape)
    d_weight = weight.new_empty(weight.shape) if learns else None
    d_bias = None if bias is None or not learns else bias.new_empty(bias.shape)
    above = None if grad_sum is None else addressable(grad_sum)
    _cpu.norm_backward(
        addressable(grad), above, addressable(x), weight.contiguous(), dx, d_weight, d_bias, eps, offset,
        centered,
    )  # fmt: skip
    return [t for t in (dx, d_weight, d_bias) if t is not None]


def _dense(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float, offset: float
) -> list[torch.Tensor]:
    """y, and x + residual where there is one. The arguments have passed the op's check and `supports`."""
    return _forward(x, weight, None, residual, eps, offset, False)


def rms_norm_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    learns: bool,
) -> list[torch.Tensor]:
    """The gradient of x, and where it learns of the weight."""
    return _backward(grad, grad_sum, x, weight, None, eps, offset, learns, False)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> list[torch.Tensor]:
    """y, and x + residual where there is one. The arguments have passed the op's check and `supports`."""
    return _forward(x, weight, bias, residual, eps, 0.0, True)


def layer_norm_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    learns: bool,
) -> list[torch.Tensor]:
    """The gradient of x, and where they learn of the weight and of the bias."""
    return _backward(grad, grad_sum, x, weight, bias, eps, 0.0, learns, True)

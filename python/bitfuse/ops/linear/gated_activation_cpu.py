"""gated_activation on the CPU. The kernel, and what bounds it: csrc/cpu/; it reads tensors where they lie."""

from __future__ import annotations

from typing import Any

import torch

from ...core.cpu import addressable, missing
from ...core.cpu import extension as _cpu


def kernels_activation(name: str) -> Any:
    """The Activation of an activation's name."""
    return getattr(_cpu.Activation, name.upper())


def supports(gate: torch.Tensor, up: torch.Tensor, activation: str) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return missing


def supports_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> str | None:
    """None when `run_backward` can serve the call, else the reason."""
    return missing


def run(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up. The arguments have passed the op's check and `supports`."""
    out = gate.new_empty(gate.shape)
    _cpu.gated_activation(kernels_activation(activation), *_halves(gate, up), out)
    return out


def run_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> list[torch.Tensor]:
    """The gradients of gate and of up. The arguments have passed the op's check and `supports_backward`."""
    d_gate, d_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _cpu.gated_activation_backward(
        kernels_activation(activation), *_halves(grad, gate, up), d_gate, d_up
    )  # fmt: skip
    return [d_gate, d_up]


def _halves(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, halves of a joint gate and up where they lie; one without a dimension is dense."""
    return tuple(addressable(t) for t in tensors)

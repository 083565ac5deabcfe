"""gated_activation on the CPU: tensors to addresses. The kernel, and what bounds it: csrc/cpu/."""

from __future__ import annotations

import torch

from ...core.activations import ACTIVATIONS
from ...core.cpu import DTYPES, missing, strided_rows
from ...core.cpu import extension as _cpu

_NUMBERS = {name: i for i, name in enumerate(ACTIVATIONS)}  # Activation of csrc/cpu/linear/gated_activation.h


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
    _call(activation, gate, up, None, out.data_ptr(), 0, 0)
    return out


def run_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> list[torch.Tensor]:
    """The gradients of gate and of up. The arguments have passed the op's check and `supports_backward`."""
    d_gate, d_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _call(activation, gate, up, grad, 0, d_gate.data_ptr(), d_up.data_ptr())
    return [d_gate, d_up]


def _call(
    activation: str, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor | None, *outputs: int
) -> None:
    """Dense tensors are one long row; halves of a joint gate and up are read where they lie."""
    count = gate.numel()
    if count == 0:
        return
    tensors = [gate, up] if grad is None else [gate, up, grad]
    if all(t.is_contiguous() for t in tensors):
        rows, columns = 1, count
        strides = [count] * 3
    else:
        columns = gate.shape[-1] if gate.dim() else 1
        rows = count // columns
        addressed = [strided_rows(t if t.dim() else t.view(1)) for t in tensors]
        tensors, strides = [t for t, _ in addressed], [*(stride for _, stride in addressed), 0]
    _cpu.gated_activation(
        _NUMBERS[activation], DTYPES[gate.dtype], rows, columns, tensors[0].data_ptr(), strides[0],
        tensors[1].data_ptr(), strides[1], 0 if grad is None else tensors[2].data_ptr(), strides[2], *outputs,
    )  # fmt: skip

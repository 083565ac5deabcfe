"""bottleneck_adapter on the CPU. Its kernel, csrc/cpu/linear/lora_linear.cpp, reads tensors as they lie."""

from __future__ import annotations

import torch

from ...core.cpu import addressable, missing
from ...core.cpu import extension as _cpu
from ...core.limits import MAX_RANK
from .gated_activation_cpu import kernels_activation


def supports(
    x: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str,
    residual: bool,
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if missing is not None:
        return missing
    if not 0 < down.shape[0] <= MAX_RANK:
        return f"its kernel takes a bottleneck of 1 to {MAX_RANK}, not {down.shape[0]}"
    return None


def run(
    x: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    activation: str,
    residual: bool,
) -> list[torch.Tensor]:
    """y [..., N], and h = x D^T + c. The arguments have passed the op's check and `supports`."""
    outer = x.shape[:-1]
    rows, rank, n = x.shape[:-1].numel(), down.shape[0], up.shape[0]
    y = x.new_empty(*outer, n)
    make = x.new_empty if n else x.new_zeros  # without outputs the kernel writes neither
    h, activated = (make(rows, rank, dtype=torch.float32) for _ in range(2))
    biases = [None if b is None else b.contiguous() for b in (down_bias, up_bias)]
    _cpu.bottleneck_adapter(
        addressable(x), down.contiguous(), biases[0], kernels_activation(activation), up.contiguous(),
        biases[1], residual, h=h, t=activated, out=y,
    )  # fmt: skip
    return [y, h]

"""bottleneck_adapter on the CPU: tensors to addresses. The kernel: csrc/cpu/linear/lora_linear.cpp."""

from __future__ import annotations

import torch

from ...core.cpu import DTYPES, missing, strided_rows
from ...core.cpu import extension as _cpu
from .gated_activation_cpu import _NUMBERS

MAX_RANK = 512  # of csrc/bind/cpu_lora_linear.cpp


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
    *outer, k = x.shape
    rows, rank, n = x.shape[:-1].numel(), down.shape[0], up.shape[0]
    y = x.new_empty(*outer, n)
    make = x.new_empty if n else x.new_zeros  # without outputs the kernel writes neither
    h, activated = (make(rows, rank, dtype=torch.float32) for _ in range(2))
    x, stride = (x, k) if x.is_contiguous() else strided_rows(x)
    down, up = down.contiguous(), up.contiguous()
    biases = [None if b is None else b.contiguous() for b in (down_bias, up_bias)]
    (c, c_dtype), (b, b_dtype) = [(0, 0) if b is None else (b.data_ptr(), DTYPES[b.dtype]) for b in biases]
    _cpu.bottleneck_adapter(
        x.data_ptr(), DTYPES[x.dtype], rows, stride, k, down.data_ptr(), DTYPES[down.dtype], c, c_dtype,
        _NUMBERS[activation], rank, h.data_ptr(), activated.data_ptr(), up.data_ptr(), DTYPES[up.dtype], b,
        b_dtype, residual, n, y.data_ptr(),
    )  # fmt: skip
    return [y, h]

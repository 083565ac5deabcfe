"""adamw8bit on the CPU: tensors to addresses. The kernel, and what bounds it: csrc/cpu/optim/adamw8bit.cpp"""

from __future__ import annotations

from typing import Any

import torch

from ...core.cpu import DTYPES, missing
from ...core.cpu import extension as _cpu


def supports(*args: Any) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return missing


def run(
    p: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_absmax: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_absmax: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: float,
    maximize: bool,
    block_size: int,
) -> None:
    """One step in place. The arguments have passed the op's check and `supports`."""
    grad = grad.contiguous()
    _cpu.adamw8bit(
        p.data_ptr(), DTYPES[p.dtype], grad.data_ptr(), DTYPES[grad.dtype], exp_avg.data_ptr(),
        exp_avg_absmax.data_ptr(), exp_avg_sq.data_ptr(), exp_avg_sq_absmax.data_ptr(), p.numel(), block_size,
        lr, beta1, beta2, eps, weight_decay, step, maximize,
    )  # fmt: skip

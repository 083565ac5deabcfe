"""adamw8bit on the CPU. The kernel, and what bounds it: csrc/cpu/optim/adamw8bit.cpp"""

from __future__ import annotations

from typing import Any

import torch

from ...core.cpu import extension as _cpu
from ...core.cpu import missing


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
    _cpu.adamw8bit(
        p, grad.contiguous(), exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax,
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step, maximize=maximize,
        block_size=block_size,
    )  # fmt: skip

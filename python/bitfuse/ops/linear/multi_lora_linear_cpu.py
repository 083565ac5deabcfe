"""multi_lora_linear on the CPU. The kernel, which reads tensors where they lie, and what bounds it:
csrc/cpu/linear/multi_lora_linear.cpp."""

from __future__ import annotations

import torch

from ...core.cpu import addressable, missing
from ...core.cpu import extension as _cpu
from .multi_lora_args import Adapters


def supports(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return missing


def _contiguous(adapters: Adapters) -> Adapters:
    if all(map(torch.Tensor.is_contiguous, adapters)):
        return adapters
    return [t.contiguous() for t in adapters]


def run(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
) -> None:
    """y += the adapters' part, in place. The arguments have passed the op's check.

    Raises:
        ValueError: an id that is not there.
    """
    if y.numel() == 0:
        return
    _cpu.multi_lora_add(
        y, addressable(x), _contiguous(lora_A), _contiguous(lora_B), scaling.contiguous(),
        adapter_ids.contiguous(),
    )  # fmt: skip

"""multi_lora_linear on the CPU: tensors to addresses. The kernel, and what bounds it:
csrc/cpu/linear/multi_lora_linear.cpp."""

from __future__ import annotations

import torch

from ...core.cpu import DTYPES, missing, strided_rows
from ...core.cpu import extension as _cpu
from .multi_lora_args import Adapters, count_of, is_stacked


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


_ADDRESS = torch.Tensor.data_ptr


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
    n, k = y.shape[-1], x.shape[-1]
    if y.numel() == 0:
        return
    stride = k
    if not x.is_contiguous():
        x, stride = strided_rows(x)
    # contiguous copies live until the function returns
    lora_A, lora_B = _contiguous(lora_A), _contiguous(lora_B)
    scaling, adapter_ids = scaling.contiguous(), adapter_ids.contiguous()
    stacked = is_stacked(lora_A)
    _cpu.multi_lora_add(
        y.data_ptr(), x.data_ptr(), DTYPES[x.dtype], y.numel() // n, stride, n, k,
        list(map(_ADDRESS, lora_A)), list(map(_ADDRESS, lora_B)),
        [lora_A[0].shape[1]] if stacked else [t.shape[0] for t in lora_A], count_of(lora_A), stacked,
        DTYPES[lora_A[0].dtype] if lora_A else 0, DTYPES[lora_B[0].dtype] if lora_B else 0,
        scaling.data_ptr(), adapter_ids.data_ptr(), adapter_ids.dtype == torch.int64,
    )  # fmt: skip

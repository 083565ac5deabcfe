"""sample on the CPU: tensors to addresses. The kernel, and what bounds it: csrc/cpu/."""

from __future__ import annotations

import torch

from ...core.cpu import DTYPES, missing
from ...core.cpu import extension as _cpu


def supports(logits: torch.Tensor, *rest: torch.Tensor) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return missing


def run(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """A token a row. The arguments have passed the op's check and `supports`."""
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    ids = logits.new_empty(rows, dtype=torch.int64)
    per_row = [t.contiguous() for t in (uniforms.double(), temperature, top_k, top_p, min_p)]
    _cpu.sample(
        rows, vocabulary, DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0),
        *(t.data_ptr() for t in per_row), ids.data_ptr(),
    )  # fmt: skip
    return ids

"""sample on the CPU. The kernel, and what bounds it: csrc/cpu/."""

from __future__ import annotations

import torch

from ...core.cpu import extension as _cpu
from ...core.cpu import missing


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
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    ids = logits.new_empty(logits.shape[0], dtype=torch.int64)
    per_row = (t.contiguous() for t in (uniforms.double(), temperature, top_k, top_p, min_p))
    _cpu.sample(logits, *per_row, ids)
    return ids

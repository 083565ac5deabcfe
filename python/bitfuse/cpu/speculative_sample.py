"""speculative_sample on the CPU: tensors to addresses. The kernel, and what bounds it: csrc/cpu/."""

from __future__ import annotations

import torch

from .lowbit_linear import _DTYPES, _cpu, _missing


def supports(
    draft_probs: torch.Tensor, draft_ids: torch.Tensor, target_probs: torch.Tensor, uniforms: torch.Tensor
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return None if _cpu is not None else _missing


def run(
    draft_probs: torch.Tensor, draft_ids: torch.Tensor, target_probs: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and how many were accepted. The arguments have passed the op's check and `supports`."""
    batch, drafted, vocabulary = draft_probs.shape
    p, q = (t if t.stride(-1) == 1 else t.contiguous() for t in (draft_probs, target_probs))
    drawn, u = draft_ids.long().contiguous(), uniforms.double().contiguous()
    ids = p.new_empty(batch, drafted + 1, dtype=torch.int64)
    accepted = p.new_empty(batch, dtype=torch.int64)
    _cpu.speculative_sample(
        batch, drafted, vocabulary, _DTYPES[p.dtype], p.data_ptr(), *p.stride()[:2], drawn.data_ptr(),
        _DTYPES[q.dtype], q.data_ptr(), *q.stride()[:2], u.data_ptr(), ids.data_ptr(), accepted.data_ptr(),
    )  # fmt: skip
    return ids, accepted

"""speculative_sample and speculative_sample_tree on the CPU: tensors to addresses. The kernel: csrc/cpu/."""

from __future__ import annotations

import torch

from ...core.cpu import DTYPES, missing
from ...core.cpu import extension as _cpu


def supports(
    draft_probs: torch.Tensor, draft_ids: torch.Tensor, target_probs: torch.Tensor, uniforms: torch.Tensor
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return missing


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
        batch, drafted, vocabulary, DTYPES[p.dtype], p.data_ptr(), *p.stride()[:2], drawn.data_ptr(),
        DTYPES[q.dtype], q.data_ptr(), *q.stride()[:2], u.data_ptr(), ids.data_ptr(), accepted.data_ptr(),
    )  # fmt: skip
    return ids, accepted


def supports_tree(draft_probs: torch.Tensor, *rest: object) -> str | None:
    """None when `run_tree` can serve the call, else the reason."""
    return missing


def run_tree(
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    parents: torch.Tensor,
    draft_rows: torch.Tensor | None,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    replacement: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ids, how many were accepted, and which nodes. The arguments have passed the op's check and
    `supports_tree`."""
    batch, nodes = draft_ids.shape
    p, q = (t if t.stride(-1) == 1 else t.contiguous() for t in (draft_probs, target_probs))
    drawn, tree, u = (
        draft_ids.long().contiguous(),
        parents.long().contiguous(),
        uniforms.double().contiguous(),
    )
    own = None if draft_rows is None else draft_rows.long().contiguous()
    ids = p.new_empty(batch, nodes + 1, dtype=torch.int64)
    accepted, path = p.new_empty(batch, dtype=torch.int64), p.new_empty(batch, nodes, dtype=torch.int64)
    _cpu.speculative_sample_tree(
        batch, nodes, p.shape[1], p.shape[2], DTYPES[p.dtype], p.data_ptr(), *p.stride()[:2],
        drawn.data_ptr(), tree.data_ptr(), 0 if own is None else own.data_ptr(), replacement,
        DTYPES[q.dtype], q.data_ptr(), *q.stride()[:2], u.data_ptr(), ids.data_ptr(), accepted.data_ptr(),
        path.data_ptr(),
    )  # fmt: skip
    return ids, accepted, path

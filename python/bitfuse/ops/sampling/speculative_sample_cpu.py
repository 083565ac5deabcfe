"""speculative_sample and speculative_sample_tree on the CPU. The kernel: csrc/cpu/."""

from __future__ import annotations

import torch

from ...core.cpu import extension as _cpu
from ...core.cpu import missing


def _dense_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def supports(
    draft_probs: torch.Tensor, draft_ids: torch.Tensor, target_probs: torch.Tensor, uniforms: torch.Tensor
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return missing


def run(
    draft_probs: torch.Tensor, draft_ids: torch.Tensor, target_probs: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and how many were accepted. The arguments have passed the op's check and `supports`."""
    batch, drafted = draft_ids.shape
    ids = draft_probs.new_empty(batch, drafted + 1, dtype=torch.int64)
    accepted = draft_probs.new_empty(batch, dtype=torch.int64)
    _cpu.speculative_sample(
        _dense_rows(draft_probs), draft_ids.long().contiguous(), _dense_rows(target_probs),
        uniforms.double().contiguous(), ids, accepted,
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
    new = draft_probs.new_empty
    ids, accepted = new(batch, nodes + 1, dtype=torch.int64), new(batch, dtype=torch.int64)
    path = new(batch, nodes, dtype=torch.int64)
    _cpu.speculative_sample_tree(
        _dense_rows(draft_probs), draft_ids.long().contiguous(), parents.long().contiguous(),
        None if draft_rows is None else draft_rows.long().contiguous(), _dense_rows(target_probs),
        uniforms.double().contiguous(), replacement, ids, accepted, path,
    )  # fmt: skip
    return ids, accepted, path

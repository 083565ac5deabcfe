"""Tensors: their rows."""

from __future__ import annotations

import torch


def as_rows(t: torch.Tensor) -> torch.Tensor:
    """[..., features] as [rows, features], whatever of it is 0 (`reshape(-1, 0)` is refused); [features] as
    one row."""
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)

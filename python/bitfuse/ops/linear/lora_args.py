"""LoraArgs: what one projection of an input, with its adapter, is to a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...weights.weight import WeightTensors


class LoraArgs(NamedTuple):
    """y = out_scale * (x W^T + scaling * scale_by * drop(x) lora_A^T lora_B^T) + bias.

    Attributes:
        weight: W [N, K], few-bit or a float matrix.
        lora_A, lora_B: [r, K] and [N, r], any float dtype; r may be 0.
        scaling: a number, known on the host.
        scale_by: a float32 number on the device, or None for 1.
        bias: [N] of x's dtype, or None.
        out_scale: float32 [N], or None for 1.
        seed: int64, one element: of the dropout mask (`bitfuse.core.dropout`); None where nothing is dropped.
    """

    weight: WeightTensors | torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float = 1.0
    scale_by: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    seed: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(out_features, in_features, rank)."""
        return self.lora_B.shape[0], self.lora_A.shape[1], self.lora_A.shape[0]

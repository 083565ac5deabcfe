"""layer_norm: x less its mean over its deviation, with a residual added before, and its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from bitfuse.core.op import Op
from bitfuse.ops.norm.layer_norm import layer_norm, layer_norm_backward, layer_norm_op
from torch.nn import functional as F

from ..cases import Unavailable
from .rms_norm import EPS, RMSNorm


@dataclass(frozen=True)
class LayerNorm(RMSNorm):
    op = "layer_norm"
    forward: ClassVar[Op] = layer_norm_op
    gradients: ClassVar[Op] = layer_norm_backward
    parameters: ClassVar[int] = 2

    def _plain(self, s: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        weight, bias = parameters
        return F.layer_norm(s, (self.n,), weight, bias, EPS)

    def _liger(self) -> Any:
        if self.residual:
            raise Unavailable("its layer norm adds no residual")
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS)

    def _bitfuse(self) -> Any:
        if self.residual:
            return lambda x, r, w, b: layer_norm(x, w, b, EPS, residual=r)
        return lambda x, w, b: layer_norm(x, w, b, EPS)

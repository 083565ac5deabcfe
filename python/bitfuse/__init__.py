"""bitfuse: few-bit weights, LoRA and attention as torch ops, each with several kernels and one plain PyTorch reference."""

from __future__ import annotations

from . import ops
from .formats import Format
from .op import use_backend
from .ops.lowbit_linear import lowbit_linear
from .weight import LowBitWeight, quantize

__all__ = ["Format", "LowBitWeight", "lowbit_linear", "ops", "quantize", "use_backend"]

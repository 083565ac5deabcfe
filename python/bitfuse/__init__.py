"""bitfuse: few-bit weights, LoRA and attention as torch ops, each with several kernels and one plain PyTorch
reference."""

from __future__ import annotations

from . import nn, ops
from ._version import __version__
from .formats import Format, register_format
from .op import BackendError, Explanation, explain, use_backend
from .ops.attention import attention, varlen_attention
from .ops.bottleneck_adapter import bottleneck_adapter
from .ops.gated_activation import gated_activation
from .ops.lora_linear import lora_linear
from .ops.lora_mlp import Projection, lora_mlp, lora_qkv
from .ops.lowbit_linear import lowbit_linear
from .quantization import QuantizationReport, quantize_
from .weight import LowBitWeight, quantize

__all__ = [
    "BackendError",
    "Explanation",
    "Format",
    "LowBitWeight",
    "Projection",
    "QuantizationReport",
    "__version__",
    "attention",
    "bottleneck_adapter",
    "explain",
    "gated_activation",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "lowbit_linear",
    "nn",
    "ops",
    "quantize",
    "quantize_",
    "register_format",
    "use_backend",
    "varlen_attention",
]

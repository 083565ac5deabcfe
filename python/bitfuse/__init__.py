"""bitfuse: few-bit weights, LoRA and attention as torch ops, each with several kernels and one plain PyTorch
reference."""

from __future__ import annotations

from . import nn, ops, optim
from ._version import __version__
from .checkpoints import load_peft_, save_peft
from .formats import Format, register_format
from .integrations import FuseReport, fuse_peft_, unfuse_peft_, with_bitfuse_layers
from .lora import (
    AdapterReport,
    MergeReport,
    add_ia3_,
    add_lora_,
    disable_adapters,
    lora_parameters,
    merge_adapters_,
    remove_adapters_,
    set_adapter_,
    unmerge_adapters_,
)
from .op import BackendError, Explanation, explain, use_backend
from .ops.attention import attention, varlen_attention
from .ops.bottleneck_adapter import bottleneck_adapter
from .ops.gated_activation import gated_activation
from .ops.lora_linear import lora_linear
from .ops.lora_mlp import Projection, lora_mlp, lora_qkv
from .ops.lowbit_linear import lowbit_linear
from .ops.multi_lora_linear import multi_lora_linear
from .quantization import QuantizationReport, quantize_
from .weight import LowBitWeight, quantize

__all__ = [
    "AdapterReport",
    "BackendError",
    "Explanation",
    "Format",
    "FuseReport",
    "LowBitWeight",
    "MergeReport",
    "Projection",
    "QuantizationReport",
    "__version__",
    "add_ia3_",
    "add_lora_",
    "attention",
    "bottleneck_adapter",
    "disable_adapters",
    "explain",
    "fuse_peft_",
    "gated_activation",
    "load_peft_",
    "lora_linear",
    "lora_mlp",
    "lora_parameters",
    "lora_qkv",
    "lowbit_linear",
    "merge_adapters_",
    "multi_lora_linear",
    "nn",
    "ops",
    "optim",
    "quantize",
    "quantize_",
    "register_format",
    "remove_adapters_",
    "save_peft",
    "set_adapter_",
    "unfuse_peft_",
    "unmerge_adapters_",
    "use_backend",
    "varlen_attention",
    "with_bitfuse_layers",
]

"""The operators, one file each."""

from .attention import attention, varlen_attention
from .bottleneck_adapter import bottleneck_adapter
from .gated_activation import gated_activation
from .lora_linear import lora_linear
from .lora_mlp import Projection, lora_mlp, lora_qkv
from .lowbit_linear import lowbit_linear, lowbit_linear_grad_x
from .multi_lora_linear import multi_lora_linear

__all__ = [
    "Projection",
    "attention",
    "bottleneck_adapter",
    "gated_activation",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "lowbit_linear",
    "lowbit_linear_grad_x",
    "multi_lora_linear",
    "varlen_attention",
]

"""The operators, one file each."""

from .append_kv import KVCache, append_kv
from .attention import attention, varlen_attention
from .bottleneck_adapter import bottleneck_adapter
from .decode_attention import decode_attention
from .gated_activation import gated_activation
from .lora_linear import lora_linear
from .lora_mlp import Projection, lora_mlp, lora_qkv
from .lowbit_linear import lowbit_linear, lowbit_linear_grad_x
from .merge_attention import merge_attention
from .multi_lora_linear import multi_lora_linear
from .quantize_kv import QuantizedKV, quantize_kv
from .rope import rope
from .sample import sample
from .scaled_dot_product_attention import scaled_dot_product_attention
from .speculative_sample import speculative_sample
from .speculative_sample_tree import speculative_sample_tree

__all__ = [
    "KVCache",
    "Projection",
    "QuantizedKV",
    "append_kv",
    "attention",
    "bottleneck_adapter",
    "decode_attention",
    "gated_activation",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "lowbit_linear",
    "lowbit_linear_grad_x",
    "merge_attention",
    "multi_lora_linear",
    "quantize_kv",
    "rope",
    "sample",
    "scaled_dot_product_attention",
    "speculative_sample",
    "speculative_sample_tree",
    "varlen_attention",
]

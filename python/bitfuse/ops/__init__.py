"""The operators, one file each."""

from .attention.append_kv import KVCache, append_kv
from .attention.attention import attention, varlen_attention
from .attention.decode_attention import decode_attention
from .attention.merge_attention import merge_attention
from .attention.quantize_kv import QuantizedKV, quantize_kv
from .attention.rope import rope
from .attention.scaled_dot_product_attention import scaled_dot_product_attention
from .linear.bottleneck_adapter import bottleneck_adapter
from .linear.gated_activation import gated_activation
from .linear.lora_linear import lora_linear
from .linear.lora_mlp import Projection, lora_mlp, lora_qkv
from .linear.lowbit_linear import lowbit_linear, lowbit_linear_grad_x
from .linear.multi_lora_linear import multi_lora_linear
from .sampling.sample import sample
from .sampling.speculative_sample import speculative_sample
from .sampling.speculative_sample_tree import speculative_sample_tree

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

"""The operators, one file each. What is exported are those that are declared; a type checker reads it in the
imports."""

from ..core.declaration import declarations
from .attention.append_kv import KVCache as KVCache
from .attention.append_kv import append_kv as append_kv
from .attention.attention import attention as attention
from .attention.attention import varlen_attention as varlen_attention
from .attention.decode_attention import decode_attention as decode_attention
from .attention.merge_attention import merge_attention as merge_attention
from .attention.quantize_kv import QuantizedKV as QuantizedKV
from .attention.quantize_kv import quantize_kv as quantize_kv
from .attention.rope import rope as rope
from .attention.scaled_dot_product_attention import (
    scaled_dot_product_attention as scaled_dot_product_attention,
)
from .linear.bottleneck_adapter import bottleneck_adapter as bottleneck_adapter
from .linear.gated_activation import gated_activation as gated_activation
from .linear.lora_linear import lora_linear as lora_linear
from .linear.lora_mlp import Projection as Projection
from .linear.lora_mlp import lora_mlp as lora_mlp
from .linear.lora_mlp import lora_qkv as lora_qkv
from .linear.lowbit_embedding import lowbit_embedding as lowbit_embedding
from .linear.lowbit_linear import lowbit_linear as lowbit_linear
from .linear.lowbit_linear import lowbit_linear_grad_x as lowbit_linear_grad_x
from .linear.multi_lora_linear import multi_lora_linear as multi_lora_linear
from .norm.layer_norm import layer_norm as layer_norm
from .norm.rms_norm import rms_norm as rms_norm
from .optim.adamw8bit import adamw8bit as _adamw8bit  # noqa: F401  the step of bitfuse.optim.AdamW8bit
from .sampling.sample import sample as sample
from .sampling.speculative_sample import speculative_sample as speculative_sample
from .sampling.speculative_sample_tree import speculative_sample_tree as speculative_sample_tree

__all__ = sorted(name for each in declarations() for name in (*each.exports, *each.ops))

"""bitfuse: few-bit weights, LoRA and attention as torch ops, each with several kernels and one plain PyTorch
reference.

What is exported of ops are those that are declared; a type checker reads it in the imports."""

from __future__ import annotations

from . import (
    _interrupt,  # noqa: F401  before torch is imported: it answers Ctrl-C meanwhile
    _sources,  # noqa: F401  the first of them: it tells where bitfuse.kernels is
    compat,
    nn,
    ops,
    optim,
)
from ._version import __version__
from .checkpoints import from_pretrained, load_peft_, save_peft
from .core.backends import BackendError, use_backend
from .core.bundle import load_kernels
from .core.declaration import declarations as _declarations
from .core.explain import Explanation, explain
from .integrations import (
    BlockReport,
    FuseReport,
    fuse_,
    fuse_peft_,
    unfuse_,
    unfuse_peft_,
    with_bitfuse_layers,
)
from .models.decoder import Decoder, Unserved
from .models.generation import Generation, generate
from .models.lora import (
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
from .models.quantization import QuantizationReport, quantize_
from .models.rotary import RopeFrequencies, rope_frequencies, rope_tables
from .ops.attention.append_kv import KVCache as KVCache
from .ops.attention.append_kv import append_kv as append_kv
from .ops.attention.attention import attention as attention
from .ops.attention.attention import varlen_attention as varlen_attention
from .ops.attention.decode_attention import decode_attention as decode_attention
from .ops.attention.merge_attention import merge_attention as merge_attention
from .ops.attention.quantize_kv import QuantizedKV as QuantizedKV
from .ops.attention.quantize_kv import quantize_kv as quantize_kv
from .ops.attention.rope import rope as rope
from .ops.attention.scaled_dot_product_attention import (
    scaled_dot_product_attention as scaled_dot_product_attention,
)
from .ops.linear.bottleneck_adapter import bottleneck_adapter as bottleneck_adapter
from .ops.linear.gated_activation import gated_activation as gated_activation
from .ops.linear.lora_linear import lora_linear as lora_linear
from .ops.linear.lora_mlp import Projection as Projection
from .ops.linear.lora_mlp import lora_mlp as lora_mlp
from .ops.linear.lora_mlp import lora_qkv as lora_qkv
from .ops.linear.lowbit_embedding import lowbit_embedding as lowbit_embedding
from .ops.linear.lowbit_linear import lowbit_linear as lowbit_linear
from .ops.linear.multi_lora_linear import multi_lora_linear as multi_lora_linear
from .ops.norm.layer_norm import layer_norm as layer_norm
from .ops.norm.rms_norm import rms_norm as rms_norm
from .ops.sampling.sample import sample as sample
from .ops.sampling.speculative_sample import speculative_sample as speculative_sample
from .ops.sampling.speculative_sample_tree import speculative_sample_tree as speculative_sample_tree
from .weights.formats import Format, register_format
from .weights.quantize import quantize
from .weights.weight import LowBitWeight

__all__ = [
    "AdapterReport",
    "BackendError",
    "BlockReport",
    "Decoder",
    "Explanation",
    "Format",
    "FuseReport",
    "Generation",
    "LowBitWeight",
    "MergeReport",
    "QuantizationReport",
    "RopeFrequencies",
    "Unserved",
    "__version__",
    "add_ia3_",
    "add_lora_",
    "compat",
    "disable_adapters",
    "explain",
    "from_pretrained",
    "fuse_",
    "fuse_peft_",
    "generate",
    "load_kernels",
    "load_peft_",
    "lora_parameters",
    "merge_adapters_",
    "nn",
    "ops",
    "optim",
    "quantize",
    "quantize_",
    "register_format",
    "remove_adapters_",
    "rope_frequencies",
    "rope_tables",
    "save_peft",
    "set_adapter_",
    "unfuse_",
    "unfuse_peft_",
    "unmerge_adapters_",
    "use_backend",
    "with_bitfuse_layers",
]
__all__ += [name for each in _declarations() for name in each.exports]
__all__.sort()

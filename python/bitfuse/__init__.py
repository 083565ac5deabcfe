"""bitfuse: few-bit weights, LoRA and attention as torch ops, each with several kernels and one plain PyTorch
reference."""

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
from .checkpoints import load_peft_, save_peft
from .core.backends import BackendError, use_backend
from .core.bundle import load_kernels
from .core.explain import Explanation, explain
from .integrations import FuseReport, fuse_peft_, unfuse_peft_, with_bitfuse_layers
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
from .ops.attention.append_kv import KVCache, append_kv
from .ops.attention.attention import attention, varlen_attention
from .ops.attention.decode_attention import decode_attention
from .ops.attention.merge_attention import merge_attention
from .ops.attention.quantize_kv import QuantizedKV, quantize_kv
from .ops.attention.rope import rope
from .ops.attention.scaled_dot_product_attention import scaled_dot_product_attention
from .ops.linear.bottleneck_adapter import bottleneck_adapter
from .ops.linear.gated_activation import gated_activation
from .ops.linear.lora_linear import lora_linear
from .ops.linear.lora_mlp import Projection, lora_mlp, lora_qkv
from .ops.linear.lowbit_linear import lowbit_linear
from .ops.linear.multi_lora_linear import multi_lora_linear
from .ops.sampling.sample import sample
from .ops.sampling.speculative_sample import speculative_sample
from .ops.sampling.speculative_sample_tree import speculative_sample_tree
from .weights.formats import Format, register_format
from .weights.quantize import quantize
from .weights.weight import LowBitWeight

__all__ = [
    "AdapterReport",
    "BackendError",
    "Explanation",
    "Format",
    "FuseReport",
    "KVCache",
    "LowBitWeight",
    "MergeReport",
    "Projection",
    "QuantizationReport",
    "QuantizedKV",
    "__version__",
    "add_ia3_",
    "add_lora_",
    "append_kv",
    "attention",
    "bottleneck_adapter",
    "compat",
    "decode_attention",
    "disable_adapters",
    "explain",
    "fuse_peft_",
    "gated_activation",
    "load_kernels",
    "load_peft_",
    "lora_linear",
    "lora_mlp",
    "lora_parameters",
    "lora_qkv",
    "lowbit_linear",
    "merge_adapters_",
    "merge_attention",
    "multi_lora_linear",
    "nn",
    "ops",
    "optim",
    "quantize",
    "quantize_",
    "quantize_kv",
    "register_format",
    "remove_adapters_",
    "rope",
    "sample",
    "save_peft",
    "scaled_dot_product_attention",
    "set_adapter_",
    "speculative_sample",
    "speculative_sample_tree",
    "unfuse_peft_",
    "unmerge_adapters_",
    "use_backend",
    "varlen_attention",
    "with_bitfuse_layers",
]

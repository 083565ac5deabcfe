"""What is measured, an op a file: its problems and who computes them."""

from __future__ import annotations

from ..cases import Problem
from .adamw8bit import AdamW
from .append_kv import AppendKV
from .attention import Attention
from .bottleneck_adapter import BottleneckAdapter
from .decode_attention import DecodeAttention
from .gated_activation import GatedActivation
from .lora_linear import LoraLinear
from .lowbit_linear import LowBitLinear
from .merge_attention import MergeAttention
from .multi_lora_linear import MultiLoraLinear
from .quantize_kv import QuantizeKV
from .rope import Rope
from .sample import Sample
from .speculative_sample import SpeculativeSample
from .speculative_sample_tree import SpeculativeSampleTree

__all__ = ["SUITES"]

SUITES: dict[str, type[Problem]] = {
    suite.op: suite
    for suite in (
        LowBitLinear,
        LoraLinear,
        MultiLoraLinear,
        Attention,
        DecodeAttention,
        GatedActivation,
        BottleneckAdapter,
        AdamW,
        Rope,
        AppendKV,
        QuantizeKV,
        MergeAttention,
        Sample,
        SpeculativeSample,
        SpeculativeSampleTree,
    )
}

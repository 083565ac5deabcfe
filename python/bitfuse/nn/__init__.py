"""Drop-in layers."""

from .adapters import AdapterLinear, Merged
from .bottleneck import BottleneckAdapter
from .embedding import Embedding
from .ia3 import IA3Adapter, IA3Linear
from .linear import Linear
from .lora import LoRAAdapter, LoRALinear
from .multihead_attention import MultiheadAttention

__all__ = [
    "AdapterLinear",
    "BottleneckAdapter",
    "Embedding",
    "IA3Adapter",
    "IA3Linear",
    "Linear",
    "LoRAAdapter",
    "LoRALinear",
    "Merged",
    "MultiheadAttention",
]

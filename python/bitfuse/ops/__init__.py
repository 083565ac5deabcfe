"""The operators, one file each."""

from .lora_linear import lora_linear
from .lowbit_linear import lowbit_linear, lowbit_linear_grad_x

__all__ = ["lora_linear", "lowbit_linear", "lowbit_linear_grad_x"]

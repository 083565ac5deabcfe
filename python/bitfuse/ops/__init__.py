"""The operators, one file each."""

from .lowbit_linear import lowbit_linear, lowbit_linear_grad_x

__all__ = ["lowbit_linear", "lowbit_linear_grad_x"]

"""What `torch.autocast` does to the arguments of an op: the same as to those of torch's own."""

from __future__ import annotations

from typing import Any

import torch

# any device's: a fifth of what asking for one costs, and what every call outside of autocast pays
is_any_enabled = torch._C._is_any_autocast_enabled
_WIDE = (torch.float32, torch.float16, torch.bfloat16)


def dtype_of(t: torch.Tensor) -> torch.dtype | None:
    """The autocast dtype of t's device; None where autocast is off."""
    device = "cpu" if t.is_cpu else t.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(t: Any, dtype: torch.dtype) -> Any:
    """A float of 16 or 32 bits in this dtype; anything else, float64 as in torch too, as it is."""
    return t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in _WIDE else t


def of_matmul(*tensors: Any) -> tuple[Any, ...]:
    """As torch's matmuls and scaled_dot_product_attention take their arguments: in the autocast dtype."""
    dtype = dtype_of(tensors[0]) if is_any_enabled() and isinstance(tensors[0], torch.Tensor) else None
    return tensors if dtype is None else tuple(cast(t, dtype) for t in tensors)


def of_elements(*tensors: Any) -> tuple[Any, ...]:
    """As torch's products and sums of elements take their arguments, which autocast leaves alone: two dtypes
    become the wider one."""
    if not is_any_enabled() or any(not isinstance(t, torch.Tensor) or t.dtype not in _WIDE for t in tensors):
        return tensors
    if dtype_of(tensors[0]) is None or len({t.dtype for t in tensors}) == 1:
        return tensors
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)

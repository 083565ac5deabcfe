"""Tensors that are not there, or lie: what native code must refuse."""

from __future__ import annotations

from typing import Any

import torch

NAMES = {
    torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float64: "FLOAT64",
    torch.uint8: "UINT8", torch.int32: "INT32", torch.int64: "INT64", torch.bool: "BOOL",
}  # fmt: skip


def described(native: Any, t: torch.Tensor, **changes: Any) -> Any:
    """A tensor as the class Tensor of an extension, with another `address`, `dtype` (its name there), `shape`
    or `strides` than it has."""
    given: dict[str, Any] = {
        "address": t.data_ptr(),
        "dtype": NAMES[t.dtype],
        "shape": t.shape,
        "strides": t.stride(),
    }
    given |= changes
    dtype = getattr(native.Dtype, given["dtype"])
    return native.Tensor(given["address"], dtype, list(given["shape"]), list(given["strides"]))

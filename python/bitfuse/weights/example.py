"""A weight from sizes alone, for calls that nobody makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..core.declaration import DENSE, Make, Sizes
from .formats import get_format
from .weight import LowBitWeight


def example_weight(s: Sizes, make: Make) -> torch.Tensor | LowBitWeight:
    """[n, k] in the format of the sizes; a tensor where that is "dense"."""
    if s.format == DENSE:
        return make(s.n, s.k)
    format = get_format(s.format, group_size=s.group_size)
    if s.group_size is None:
        format = format.fitted(s.k)
    if s.zero_points or s.nested:
        format = replace(format, symmetric=not s.zero_points, nested=s.nested)
    tensors: dict[str, Any] = {
        name: make(*shape, dtype=format.scale_dtype if name == "scales" and not format.nested else dtypes[0])
        for name, dtypes, shape in LowBitWeight.expected(format, (s.n, s.k))
    }
    return LowBitWeight(format=format, shape=(s.n, s.k), **tensors)

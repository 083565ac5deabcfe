"""bitfuse._cpu, the C++ kernels: the extension, and what it can't read of a tensor."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import torch

extension: Any = None
missing: str | None = None  # why it is not there
try:
    extension = importlib.import_module("bitfuse._cpu")
    extension.isa()  # a bad BITFUSE_CPU_ISA is an error now, not at the first call
except ImportError as error:
    missing = f"the C++ extension bitfuse._cpu can't be imported ({error})"


def addressable(x: torch.Tensor) -> torch.Tensor:
    """x, or a dense copy where no one stride leads from each of its rows to the next."""
    if x.is_contiguous():
        return x
    return strided_rows(x)[0] if x.dim() <= extension.MAX_DIMS else x.contiguous()


def strided_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x, which is not contiguous, or a dense copy where one row stride can't address it; and that stride."""
    if x.stride(-1) == 1:
        outer = [(x.shape[i], x.stride(i)) for i in range(x.dim() - 1) if x.shape[i] != 1]
        if all(slow[1] == fast[0] * fast[1] for slow, fast in itertools.pairwise(outer)):
            return x, outer[-1][1] if outer else x.shape[-1]
    return x.contiguous(), x.shape[-1]

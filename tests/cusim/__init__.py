"""Runs CUDA and Triton kernels without a GPU: see README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .build import BuildError, cuda_include, has_gpu, library, load, load_if_no_gpu
from .device import SimulationError, compute_capability, counts, device, run_ptx

if TYPE_CHECKING:
    from .guard import guarded, guarded_empty

__all__ = [
    "BuildError",
    "SimulationError",
    "compute_capability",
    "counts",
    "cuda_include",
    "device",
    "guarded",
    "guarded_empty",
    "has_gpu",
    "library",
    "load",
    "load_if_no_gpu",
    "run_ptx",
]


def __getattr__(name: str) -> Any:
    if name in ("guarded", "guarded_empty"):  # needs torch, which must come after load()
        from . import guard

        return getattr(guard, name)
    raise AttributeError(name)

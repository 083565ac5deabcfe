"""Runs CUDA and Triton kernels without a GPU: see README.md."""

from __future__ import annotations

from .build import has_gpu, library, load, load_if_no_gpu

__all__ = ["has_gpu", "library", "load", "load_if_no_gpu"]

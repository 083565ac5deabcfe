"""Limits that Python plans with, as csrc/common/limits.h has them; the extensions, whose attributes a test
compares with these, may not be there."""

from __future__ import annotations

MAX_RANK = 512  # of an adapter, and of a bottleneck
MAX_HEAD_SIZE = 256  # of attention on a GPU
NESTED_BLOCK = 256  # scales that share one second-level scale, counted over the flattened array
MAX_TOKENS = 64  # rows of x that the CUDA kernels for few tokens take

"""Products of tiles."""

from __future__ import annotations

from .launch import jit, tl


@jit
def multiply_add(a, b, acc):
    """acc + a b. float32 sums each step by itself first: one long chain of additions loses digits with its
    length."""
    if a.dtype == tl.float32:
        return acc - tl.dot(
            a, -b, input_precision="ieee"
        )  # Triton would fold `acc + dot` back into one chain
    else:
        return tl.dot(a, b, acc)

"""Tensors of heads as the Triton kernels of attention walk them, and the limits of that."""

from __future__ import annotations

from typing import NamedTuple

import torch

LONGEST = 2**29  # rows of queries or of keys, so that a row plus a window is an int32
FARTHEST = 2**23  # elements between rows, so that those of a tile are an int32 apart


class Layout(NamedTuple):
    """A tensor and the strides of its batches, rows and heads."""

    tensor: torch.Tensor
    batch: int
    row: int
    head: int


def layout(t: torch.Tensor) -> Layout:
    """Of [batch, rows, heads, dim], or packed [rows, heads, dim]: a copy where the kernels can't walk it."""
    strides = [s if n > 1 else 0 for s, n in zip(t.stride(), t.shape, strict=True)]
    if not t.numel():  # always contiguous, says torch, whatever its strides; nothing of it is read
        return Layout(t, 0, 0, 0)
    if (t.shape[-1] > 1 and strides[-1] != 1) or strides[-3] >= FARTHEST:
        return layout(t.contiguous())
    return Layout(t, strides[0] if len(strides) == 4 else 0, strides[-3], strides[-2])


def vector(layouts: tuple[Layout | None, ...]) -> int:
    """How many elements all begin and all strides are multiples of: 16 bytes' worth, or 1."""
    present = [x for x in layouts if x is not None]
    width = 16 // present[0].tensor.element_size()
    if any(x.tensor.data_ptr() % 16 or x.batch % width or x.row % width or x.head % width for x in present):
        return 1
    return width


def padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())

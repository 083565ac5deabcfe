"""Tensors that end, or begin, where the memory does: an access one byte too far is a fault."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Sequence

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _pages(size: int, before: bool, align: int) -> ctypes.Array[ctypes.c_uint8]:
    """`size` bytes between pages that may not be touched, filled with 0xff: NaN in every float format."""
    page = mmap.PAGESIZE
    inside = -(-size // page) * page
    base = _libc.mmap(None, inside + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE,
                      mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)  # fmt: skip
    if base in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"mmap of {inside + 2 * page} bytes failed")
    ctypes.memset(base + page, 0xFF, inside)
    for guard in (base, base + page + inside):
        _libc.mprotect(guard, page, 0)
    start = base + page + (0 if before else (inside - size) // align * align)
    buffer = (ctypes.c_uint8 * size).from_address(start)
    weakref.finalize(buffer, _libc.munmap, base, inside + 2 * page)
    return buffer


def guarded_empty(
    shape: Sequence[int], dtype: torch.dtype, *, before: bool = False, align: int = 16
) -> torch.Tensor:
    """An uninitialised tensor against a guard page: NaN if it is of floats, else all bits set.

    Its last byte is the last one that may be touched; with `before` its first is the first. The address is a
    multiple of `align`, so a tensor whose bytes are not leaves up to `align - 1` that can be touched behind
    it (they are NaN): give `align=1` where the kernel does not ask for more.
    """
    numel = 1
    for length in shape:
        numel *= length
    if numel == 0:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    return torch.frombuffer(_pages(numel * dtype.itemsize, before, align), dtype=dtype).view(tuple(shape))


def guarded(tensor: torch.Tensor, *, before: bool = False, align: int = 16) -> torch.Tensor:
    """A copy of the tensor against a guard page, with the same strides; a tensor on a GPU as it is."""
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return tensor
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = guarded_empty((extent,), tensor.dtype, before=before, align=align)
    out = storage.as_strided(tensor.shape, tensor.stride())
    with torch.no_grad():
        out.copy_(tensor)
    return out.requires_grad_(tensor.requires_grad)

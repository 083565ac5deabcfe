"""Launching Triton kernels: whether they can run, and what a launch needs beside its tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core.device import device_of, pretended, served

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
except ImportError:  # the package is whole without Triton; supports() says why this backend is not used
    triton = tl = None

    def jit(function: Any = None, **options: Any) -> Any:
        return jit if function is None else function


_served: set[torch.device] = set()


def refuse(device: torch.device) -> str | None:
    """Why no Triton kernel of ours runs on tensors of this device; None when they do."""
    absent = pretended() is not None
    if device in _served and not absent:
        return None
    if triton is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "its decoding is PTX, which only NVIDIA GPUs run"
    if device.type != "cuda":
        return None if served(device) else f"it runs on cuda, the tensors are on {device.type}"
    if (capability := device_of(device).capability) < 80:
        return f"it needs compute capability 8.0, {device} has {capability / 10}"
    if not absent:
        _served.add(device)
    return None


class Plan(NamedTuple):
    """What a launch needs beside its tensors, found once for each kind and shape of call.

    `handles` are the compiled kernels, by the alignment of the tensors; plans for which Triton would compile
    the same share them.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    handles: dict[Any, Any]
    partial: tuple[int, int, int] | None
    reduce: Plan | None

    def launch(self, inputs: tuple[torch.Tensor | float | None, ...], alignment: Any) -> None:
        """Launch on these tensors, and numbers that vary from call to call."""
        handle = self.handles.get(alignment)
        if handle is not None:  # Triton's own lookup costs several times the launch
            handle[self.grid](*inputs, *self.arguments)
        else:
            self.handles[alignment] = self.kernel[self.grid](*inputs, *self.arguments, **self.options)


HANDLES: dict[tuple[Any, ...], dict[Any, Any]] = {}


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """x as a matrix whose rows one stride addresses; a copy only where no view is one."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def alignment_of(*tensors: torch.Tensor | None) -> Any:
    """True if all tensors begin at multiples of 16 bytes, which Triton compiles for; else which ones do."""
    addresses = [t.data_ptr() & 15 for t in tensors if t is not None]
    return not any(addresses) or tuple(a == 0 for a in addresses)

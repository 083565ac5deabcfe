"""Launching Triton kernels: whether they can run, and what a launch needs beside its tensors.

What belongs together goes to a kernel under one name: the tensors of a few-bit matrix as one NamedTuple
(`weight.scales`; None where it has none), what is fixed at compile time as others, whose fields are constants
(`Tile.M`; see `constants`) and whose names are written large. Kernels make NamedTuples of their own, too.

What Triton 3.6 and 3.9 make of it:
- An argument that is annotated `tl.constexpr`, and is a NamedTuple, would do in 3.9. In 3.6 its fields come
  out as plain Python objects, which can't be in a shape, nor, as strings, be handed on to another function.
  A NamedTuple of `tl.constexpr` works in both.
- `do_not_specialize` does not reach into a tuple: a size in one would be a compilation when it is 1, and
  another when it is a multiple of 16. So sizes and strides are arguments of their own.
- A dtype can't be in such a tuple.
- `JITFunction.preload` takes JSON, in which a NamedTuple loses its names, so `bitfuse compile` does without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch

from ...core.device import Device, device_of, pretended, served

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
    constexpr: Any = tl.constexpr
except ImportError:  # the package is whole without Triton; supports() says why this backend is not used
    triton, tl, constexpr = None, None, float

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


Fields = TypeVar("Fields", bound=tuple[Any, ...])


def constants(of: Fields) -> Fields:
    """A NamedTuple whose fields a kernel is compiled for: numbers, strings and None."""
    return type(of)(*map(constexpr, of))


class Plan(NamedTuple):
    """What a launch needs beside its tensors, found once for each kind and shape of call.

    Attributes:
        kernel: of `jit`.
        grid: its programs.
        arguments: after those that vary from call to call: sizes, then constants.
        options: of the compiler.
        handles: the compiled kernels, by the alignment of the tensors; plans for which Triton would compile
            the same share them.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    handles: dict[Any, Any]

    def launch(
        self, inputs: tuple[Any, ...], alignment: Any, grid: tuple[int, int, int] | None = None
    ) -> None:
        """Launch on these tensors, and numbers that vary from call to call; the grid may, too."""
        grid = grid or self.grid
        handle = self.handles.get(alignment)
        if handle is not None:  # Triton's own lookup costs several times the launch
            handle[grid](*inputs, *self.arguments)
        else:
            self.handles[alignment] = self.kernel[grid](*inputs, *self.arguments, **self.options)


HANDLES: dict[tuple[Any, ...], dict[Any, Any]] = {}


def planned(
    device: Device,
    kernel: Any,
    grid: tuple[int, int, int],
    sizes: tuple[int, ...],
    fixed: tuple[Any, ...],
    kind: Any,
    **options: Any,
) -> Plan:
    """A plan.

    Args:
        sizes: the kernel's last integers, which it is not compiled for.
        fixed: the kernel's last arguments: NamedTuples of constants; or constants, which are annotated there.
        kind: whatever else it is compiled for: the dtypes of tensors and which of them there are.
        options: of the compiler: num_warps and such.
    """
    name = kernel.__module__, kernel.__name__
    handles = HANDLES.setdefault((device.number, name, fixed, kind, *options.values()), {})
    fixed = tuple(constants(f) if isinstance(f, tuple) else f for f in fixed)
    return Plan(kernel, grid, (*sizes, *fixed), options, handles)


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """x as a matrix whose rows one stride addresses; a copy only where no view is one."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def dtype_of(t: torch.Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def dtypes_of(tensors: Iterable[torch.Tensor | None]) -> tuple[torch.dtype | None, ...]:
    return tuple([None if t is None else t.dtype for t in tensors])


def alignment_of(*tensors: torch.Tensor | None) -> Any:
    """True if all tensors begin at multiples of 16 bytes, which Triton compiles for; else which ones do."""
    addresses = [t.data_ptr() for t in tensors if t is not None]
    every = 0
    for address in addresses:
        every |= address
    return not every & 15 or tuple(address & 15 == 0 for address in addresses)

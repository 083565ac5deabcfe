"""lowbit_linear on the CPU: which calls its kernels serve. The kernels, and what bounds them: csrc/cpu/; they
read tensors where they lie."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...core.cpu import addressable, missing
from ...core.cpu import extension as _cpu
from ...core.tensors import aside
from ...weights.formats import FORMATS, Format, nested_code
from ...weights.weight import WeightTensors, weight_tensors


def code_kind(fmt: Format, kinds: Any) -> Any:
    """The CodeKind, of an extension's enum, by which kernels read a format; None for one without."""
    if fmt.codebook == FORMATS["fp8"].codebook:
        return kinds.E4M3
    return getattr(kinds, f"{'INT' if fmt.is_integer else 'CODEBOOK'}{fmt.bits}", None)


def scale_kind(fmt: Format, kinds: Any) -> Any:
    """The ScaleKind of a format whose scales are floats of eight bits; FLOAT32 says any other float."""
    fixed = {torch.float8_e8m0fnu: kinds.E8M0, torch.float8_e4m3fn: kinds.E4M3}
    return fixed.get(fmt.scale_dtype, kinds.FLOAT32)


@functools.cache
@aside()
def _known(format: str) -> bool:
    """Whether the kernels read a format, of which they are told."""
    fmt = FORMATS[format]
    kind = code_kind(fmt, _cpu.CodeKind)
    if kind is None:
        return False
    scales = scale_kind(fmt, _cpu.ScaleKind)
    if scales == _cpu.ScaleKind.FLOAT32:
        levels = nested_code()
    else:
        levels = torch.arange(256, dtype=torch.uint8, device="cpu").view(fmt.scale_dtype).float()
    values = fmt.values().repeat(16 >> fmt.bits) if fmt.bits < 8 else None
    _cpu.formats[format] = _cpu.WeightFormat(kind, fmt.zero_point, scales, fmt.tensor_scale, values, levels)
    return True


def reason(weight: WeightTensors) -> str | None:
    """Why the kernels can't read a weight; None when they can."""
    if missing is not None:
        return missing
    if not _known(weight.format):
        return f"it has no kernel for format {weight.format}"
    if weight.group_size % 8:
        return f"group_size {weight.group_size} is not a multiple of 8"
    return None


def supports(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return reason(weight)


def supports_grad_x(grad: torch.Tensor, weight: WeightTensors) -> str | None:
    """None when `run_grad_x` can serve the call, else the reason."""
    return reason(weight)


# the op's check, `supports` and `run` in one call, of arguments that are plain in every respect; else None
direct: Any = getattr(_cpu, "lowbit_linear_direct", None)


def run(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> torch.Tensor:
    """y = x W^T + b. The arguments have passed the op's check and `supports`."""
    out = x.new_empty(*x.shape[:-1], weight.qweight.shape[0])
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    _cpu.lowbit_linear(addressable(x), readable(weight), bias, out)
    return out


def run_grad_x(grad: torch.Tensor, weight: WeightTensors) -> torch.Tensor:
    """grad W. The arguments have passed the op's check and `supports_grad_x`."""
    n, k = weight.shape
    if n == 0:
        return grad.new_zeros((*grad.shape[:-1], k))
    out = grad.new_empty(*grad.shape[:-1], k)
    _cpu.lowbit_linear_grad_x(addressable(grad), readable(weight), out)
    return out


def readable(weight: WeightTensors) -> WeightTensors:
    """The weight, with contiguous copies of those of its tensors that are not; the kernels are told of its
    format."""
    _known(weight.format)
    tensors = weight.tensors()
    if all(t is None or t.is_contiguous() for t in tensors):
        return weight
    return weight_tensors([None if t is None else t.contiguous() for t in tensors], *weight.how())

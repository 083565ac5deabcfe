"""lowbit_linear on the CPU: tensors to addresses. The kernels, and what bounds them: csrc/cpu/."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...core.cpu import DTYPES, missing, strided_rows
from ...core.cpu import extension as _cpu
from ...core.tensors import aside
from ...weights.formats import FORMATS, nested_code
from ...weights.weight import WeightTensors

# ScaleKind: scales in 8 bits are looked up in a table of 256
_SCALES = {**DTYPES, torch.uint8: 3, torch.float8_e8m0fnu: 4, torch.float8_e4m3fn: 4}
_NIBBLE, _BYTE, _E4M3 = 0, 2, 3  # CodeKind of csrc/common/types.h


@functools.cache
@aside()
def _code(format: str) -> tuple[int, int, int] | None:
    """CodeKind, address of the values and zero point of a format; None for one without a kernel."""
    fmt = FORMATS[format]
    if fmt.bits == 4:
        return _NIBBLE, _kept(fmt.values()), fmt.zero_point
    if fmt.bits == 8 and fmt.is_integer:
        return _BYTE, 0, fmt.zero_point
    return (_E4M3, 0, 0) if fmt.codebook == FORMATS["fp8"].codebook else None


@functools.cache
@aside()
def _scale_table(dtype: torch.dtype) -> int:
    """Address of the 256 values of a scale in 8 bits."""
    if dtype is torch.uint8:
        return _kept(nested_code())
    return _kept(torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float())


_tables: list[torch.Tensor] = []


def _kept(table: torch.Tensor) -> int:
    _tables.append(table)
    return table.data_ptr()


def _reason(weight: WeightTensors) -> str | None:
    if missing is not None:
        return missing
    if _code(weight.format) is None:
        return f"it has no kernel for format {weight.format}"
    if weight.group_size % 8:
        return f"group_size {weight.group_size} is not a multiple of 8"
    return weight.beyond()


def supports(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return _reason(weight)


def supports_grad_x(grad: torch.Tensor, weight: WeightTensors) -> str | None:
    """None when `run_grad_x` can serve the call, else the reason."""
    return _reason(weight)


def run(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> torch.Tensor:
    """y = x W^T + b. The arguments have passed the op's check and `supports`."""
    n, k = weight.qweight.shape[0], x.shape[-1]
    out = x.new_empty(*x.shape[:-1], n)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    _call(_cpu.lowbit_linear, x, weight, n, k, 0 if bias is None else bias.data_ptr(), out.data_ptr())
    return out


def run_grad_x(grad: torch.Tensor, weight: WeightTensors) -> torch.Tensor:
    """grad W. The arguments have passed the op's check and `supports_grad_x`."""
    n, k = weight.shape
    if n == 0:
        return grad.new_zeros((*grad.shape[:-1], k))
    out = grad.new_empty(*grad.shape[:-1], k)
    _call(_cpu.lowbit_linear_grad_x, grad, weight, n, k, out.data_ptr())
    return out


def _call(function: Any, x: torch.Tensor, weight: WeightTensors, n: int, k: int, *rest: float) -> None:
    """Call a compiled function. No helpers here: their calls would be a good part of a tiny product's time.
    Copies of what is not contiguous live until the function returns."""
    qweight, scales, zeros, scale_scales, scale_offset, format, group_size, _, _ = weight
    code_kind, values, zero_point = _code(format)  # type: ignore[misc]
    scale_dtype = scales.dtype
    if scale_dtype is torch.uint8 and scale_offset is None:  # the bytes of the format's eight-bit floats
        scale_dtype = FORMATS[format].scale_dtype
    scale_kind = _SCALES[scale_dtype]
    stride = x.shape[-1]
    rows = x.numel() // stride if stride else 0
    if not x.is_contiguous():
        x, stride = strided_rows(x)
    if not qweight.is_contiguous():
        qweight = qweight.contiguous()
    if not scales.is_contiguous():
        scales = scales.contiguous()
    if zeros is not None and not zeros.is_contiguous():
        zeros = zeros.contiguous()
    if scale_scales is not None and not scale_scales.is_contiguous():
        scale_scales = scale_scales.contiguous()
    function(
        x.data_ptr(), DTYPES[x.dtype], rows, stride,
        qweight.data_ptr(), scales.data_ptr(), scale_kind, 0 if zeros is None else zeros.data_ptr(),
        _scale_table(scale_dtype) if scale_kind >= 3 else 0,
        0 if scale_scales is None else scale_scales.data_ptr(),
        0 if scale_offset is None else scale_offset.data_ptr(),
        values, code_kind, zero_point, n, k, group_size, *rest,
    )  # fmt: skip

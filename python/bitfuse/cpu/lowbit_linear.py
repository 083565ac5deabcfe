"""lowbit_linear on the CPU: tensors to addresses. The kernels and what bounds them: csrc/cpu/lowbit_linear.cpp."""

from __future__ import annotations

import functools

import torch

from ..formats import E4M3, FORMATS, nested_code

try:
    from .. import _cpu
except ImportError as error:
    _cpu = None  # type: ignore[assignment]
    _missing = f"the C++ extension bitfuse._cpu is not there ({error})"

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# ScaleKind: scales in 8 bits are looked up in a table of 256
_SCALES = {**_DTYPES, torch.uint8: 3, torch.float8_e8m0fnu: 4, torch.float8_e4m3fn: 4}
_NIBBLE, _BYTE, _E4M3 = range(3)  # CodeKind of csrc/cpu/lowbit_linear.h


@functools.cache
def _code(format: str) -> tuple[int, int, int] | None:
    """CodeKind, address of the values and zero point of a format; None for one that the kernels do not know."""
    fmt = FORMATS[format]
    if fmt.bits == 4:
        return _NIBBLE, _kept(fmt.values()), fmt.zero_point
    if fmt.bits == 8 and fmt.is_integer:
        return _BYTE, 0, fmt.zero_point
    return (_E4M3, 0, 0) if fmt.codebook is E4M3 else None


@functools.cache
def _scale_table(dtype: torch.dtype) -> int:
    """Address of the 256 values of a scale in 8 bits."""
    if dtype is torch.uint8:
        return _kept(nested_code())
    return _kept(torch.arange(256, dtype=torch.uint8).view(dtype).float())


_tables: list[torch.Tensor] = []


def _kept(table: torch.Tensor) -> int:
    _tables.append(table)
    return table.data_ptr()


def _reason(format: str, group_size: int) -> str | None:
    if _cpu is None:
        return _missing
    if _code(format) is None:
        return f"it has no kernel for format {format}"
    if group_size % 8:
        return f"group_size {group_size} is not a multiple of 8"
    return None


def supports(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    group_size: int,
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return _reason(format, group_size)


def supports_grad_x(
    grad: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    format: str,
    group_size: int,
) -> str | None:
    """None when `run_grad_x` can serve the call, else the reason."""
    return _reason(format, group_size)


def _dense(t: torch.Tensor) -> torch.Tensor:
    return t if t.is_contiguous() else t.contiguous()


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """x, or a dense copy of it where one row stride can't address it; its rows and that stride."""
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    if x.is_contiguous():
        return x, rows, columns
    if x.stride(-1) == 1:
        if x.dim() == 2:
            return x, rows, x.stride(0)
        outer = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1]) if size != 1]
        if all(a[1] == b[0] * b[1] for a, b in zip(outer, outer[1:])):
            return x, rows, outer[-1][1] if outer else columns
    return x.contiguous(), rows, columns


def run(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    group_size: int,
) -> torch.Tensor:
    """y = x W^T + b. The arguments have passed the op's check and `supports`."""
    code_kind, values, zero_point = _code(format)  # type: ignore[misc]
    n, k = qweight.shape[0], x.shape[-1]
    x, rows, stride = _rows(x)
    qweight, scales = _dense(qweight), _dense(scales)
    zeros = None if zeros is None else _dense(zeros)
    bias = None if bias is None else _dense(bias)
    scale_scales = None if scale_scales is None else _dense(scale_scales)
    scale_kind = _SCALES[scales.dtype]
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    _cpu.lowbit_linear(
        x.data_ptr(), _DTYPES[x.dtype], rows, stride,
        qweight.data_ptr(), scales.data_ptr(), scale_kind, 0 if zeros is None else zeros.data_ptr(),
        0 if scale_kind < 3 else _scale_table(scales.dtype), 0 if scale_scales is None else scale_scales.data_ptr(),
        0 if scale_offset is None else scale_offset.data_ptr(),
        values, code_kind, zero_point, n, k, group_size, 0 if bias is None else bias.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def run_grad_x(
    grad: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    format: str,
    group_size: int,
) -> torch.Tensor:
    """grad W. The arguments have passed the op's check and `supports_grad_x`."""
    code_kind, values, zero_point = _code(format)  # type: ignore[misc]
    n, k = qweight.shape[0], qweight.shape[1] * 8 // FORMATS[format].bits
    if n == 0:
        return grad.new_zeros((*grad.shape[:-1], k))
    grad, rows, stride = _rows(grad)
    qweight, scales = _dense(qweight), _dense(scales)
    zeros = None if zeros is None else _dense(zeros)
    scale_scales = None if scale_scales is None else _dense(scale_scales)
    scale_kind = _SCALES[scales.dtype]
    out = torch.empty((*grad.shape[:-1], k), dtype=grad.dtype)
    _cpu.lowbit_linear_grad_x(
        grad.data_ptr(), _DTYPES[grad.dtype], rows, stride,
        qweight.data_ptr(), scales.data_ptr(), scale_kind, 0 if zeros is None else zeros.data_ptr(),
        0 if scale_kind < 3 else _scale_table(scales.dtype), 0 if scale_scales is None else scale_scales.data_ptr(),
        0 if scale_offset is None else scale_offset.data_ptr(),
        values, code_kind, zero_point, n, k, group_size, out.data_ptr(),
    )  # fmt: skip
    return out

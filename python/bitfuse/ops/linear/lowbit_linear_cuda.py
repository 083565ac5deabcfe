"""lowbit_linear on CUDA for few tokens: tensors to addresses.

The kernel, its layout and what bounds it: csrc/cuda/linear/lowbit_linear.cu.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ...core.cuda import FLOATS, cuda, stream_of, zeroed_counters
from ...core.device import Device, device_of
from ...core.tensors import table
from ...weights.codebook import pairs_of_levels
from ...weights.formats import FORMATS, nested_code
from ...weights.weight import WeightTensors

# the numbers of the enums of csrc/cuda/linear/lowbit_linear.h
_SCALES = {
    torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e8m0fnu: 3, torch.uint8: 4,
}  # fmt: skip
_INT4, _CODEBOOK4, _INT8, _FP8 = range(4)

MAX_TOKENS = 64
SPAN = 32  # columns that a step of the kernel sums before a scale can change


@functools.cache
def _code(format: str) -> int | None:
    """Which decoder of the kernel reads a format; None when there is none."""
    fmt = FORMATS[format]
    if fmt.bits == 4:
        return _INT4 if fmt.is_integer else _CODEBOOK4
    if fmt.bits == 8:
        return _INT8 if fmt.is_integer else _FP8 if fmt.codebook == FORMATS["fp8"].codebook else None
    return None


@cuda.cached
def _plan(
    m: int, n: int, k: int, code: int | None, nested: bool, device: Device, adapter: bool = False
) -> Any:
    arch = device.arch
    return cuda.module.plan_lowbit_linear(
        m, n, k, code, nested, device.multiprocessors, arch.block_kib << 10, arch.shared_kib << 10,
        device.capability, adapter,
    )  # fmt: skip


@table
def _pairs(format: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return pairs_of_levels(FORMATS[format].values(), dtype).to(device)


@table
def _nested_levels(device: torch.device) -> torch.Tensor:
    return nested_code(device)


def _rows_apart(t: torch.Tensor) -> bool:
    """True when a row's elements are neighbours and rows do not overlap, so that one stride addresses it."""
    return t.is_contiguous() or (t.stride(1) == 1 and t.stride(0) >= t.shape[1])


def _scale_dtype(scales: torch.Tensor, scale_offset: torch.Tensor | None, format: str) -> torch.dtype:
    """What the scales are: bytes that are not nested are the format's eight-bit floats."""
    bytes_of_floats = scales.dtype is torch.uint8 and scale_offset is None
    return FORMATS[format].scale_dtype if bytes_of_floats else scales.dtype


def supports(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> str | None:
    """None when `run` can serve the call, else the reason."""
    qweight, scales, zeros, scale_scales, scale_offset, format, group_size, _, _ = weight
    if cuda.missing is not None:
        return cuda.missing
    if _code(format) is None:
        return f"it has no kernel for format {format}"
    if (reason := weight.beyond()) is not None:
        return reason
    if x.dtype not in FLOATS:
        return f"x is {str(x.dtype)[6:]}: its tensor cores take float16 and bfloat16"
    k = x.shape[-1]
    if x.numel() > MAX_TOKENS * k:
        return f"M = {x.numel() // k} is above {MAX_TOKENS}: the Triton kernel serves it"
    scale_dtype = _scale_dtype(scales, scale_offset, format)
    if scale_dtype not in _SCALES or (scale_scales is None) != (scale_offset is None):
        return f"it has no kernel for scales in {str(scale_dtype)[6:]}"
    if group_size % SPAN and group_size != k:
        return f"group_size {group_size} is not a multiple of {SPAN} (nor in_features)"
    if not qweight.is_contiguous() and not (_rows_apart(qweight) and qweight.stride(0) % 4 == 0):
        return f"qweight has strides {qweight.stride()}, not rows of bytes a multiple of 4 apart"
    if qweight.data_ptr() % 4:
        return "qweight starts at an address that is not a multiple of 4"
    if not (scales.is_contiguous() or (scale_offset is None and _rows_apart(scales))):
        return f"scales have strides {scales.stride()}, not contiguous rows"
    if not (zeros is None or _rows_apart(zeros)):
        return f"zeros have strides {zeros.stride()}, not contiguous rows"
    if (reason := cuda.refuses(x.device)) is not None:
        return reason
    device = device_of(x.device)
    if not device.arch.roomy and x.numel() and qweight.numel():
        m, n = x.numel() // k, qweight.shape[0]
        if _plan(m, n, k, _code(format), scale_offset is not None, device).token_tiles == 0:
            return f"M = {m} needs more shared memory than the device has: the Triton kernel serves it"
    return None


def run(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> torch.Tensor:
    """y = x W^T + b. The arguments have passed the op's check and `supports`."""
    call = prepare(x, weight, bias)
    if call.plan is not None:
        cuda.module.lowbit_linear(*call.arguments)
    return call.y


class Call(NamedTuple):
    """A launch of the kernel that is not queued yet.

    Attributes:
        y: the output, to be written.
        plan: how the work is cut; None where there is no work.
        arguments: of the binding.
        counters: zero, as many as were asked for.
        kept: tensors that must live until the launch is queued.
    """

    y: torch.Tensor
    plan: Any = None
    arguments: tuple[Any, ...] = ()
    counters: torch.Tensor | None = None
    kept: tuple[Any, ...] = ()


def prepare(
    x: torch.Tensor,
    weight: WeightTensors,
    bias: torch.Tensor | None,
    adapter: bool = False,
    more_counters: int = 0,
) -> Call:
    """All that a launch takes; with room for what rides along if there is an adapter."""
    qweight, scales, zeros, scale_scales, scale_offset, format, group_size, _, _ = weight
    device, n, k = x.device, qweight.shape[0], x.shape[-1]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=device)
    m = x.numel() // k
    if m == 0 or n == 0:
        return Call(y)
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.reshape(m, k)
        if x.stride(1) != 1 or x.data_ptr() % 16 or (m > 1 and (x.stride(0) < k or x.stride(0) % 8)):
            x = x.clone(memory_format=torch.contiguous_format)
    if bias is not None:
        bias = bias.contiguous()

    index = device.index or 0
    stream = stream_of(x)
    nested = scale_offset is not None
    code = _code(format)
    plan = _plan(m, n, k, code, nested, device_of(device), adapter)
    partial = counters = None
    if plan.splits > 1:
        partial = torch.empty((plan.splits, m, n + n % 2), dtype=torch.float32, device=device)
        counters = zeroed_counters(more_counters + plan.tiles, device, stream)
    elif more_counters:
        counters = zeroed_counters(more_counters, device, stream)
    arguments = (
        x.data_ptr(), qweight.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr(),
        scale_scales.data_ptr() if scale_scales is not None else 0,
        scale_offset.data_ptr() if scale_offset is not None else 0,
        _nested_levels(device).data_ptr() if nested else 0,
        _pairs(format, x.dtype, device).data_ptr() if code == _CODEBOOK4 else 0,
        0 if bias is None else bias.data_ptr(), y.data_ptr(),
        0 if partial is None else partial.data_ptr(),
        0 if counters is None else counters.data_ptr() + 4 * more_counters,
        x.stride(0) if x.dim() == 2 else k, qweight.stride(0), scales.stride(0),
        0 if zeros is None else zeros.stride(0), m, n, k, group_size, FORMATS[format].zero_point,
        _SCALES[_scale_dtype(scales, scale_offset, format)], FLOATS[x.dtype], code, plan, index, stream,
    )  # fmt: skip
    return Call(y, plan, arguments, counters, (x, bias, partial))

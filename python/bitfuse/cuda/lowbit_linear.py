"""lowbit_linear on CUDA for few tokens: tensors to addresses.

The kernel, its layout and what bounds it: csrc/cuda/lowbit_linear.cu.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..codebook import pairs_of_levels
from ..formats import FORMATS, nested_code
from ..op import simulated_gpu
from ..weight import WeightTensors

try:
    from .. import _cuda  # type: ignore[attr-defined]
except ImportError as error:
    _cuda = None
    _missing = f"the CUDA extension bitfuse._cuda is not there ({error})"

# the numbers of the enums of csrc/cuda/lowbit_linear.h
_FLOATS = {torch.float16: 0, torch.bfloat16: 1}
_SCALES = {
    torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e8m0fnu: 3, torch.uint8: 4,
}  # fmt: skip
_INT4, _CODEBOOK4, _INT8, _FP8 = range(4)

MAX_TOKENS = 64
SPAN = 32  # columns that a step of the kernel sums before a scale can change
ROOMY = 160 * 1024  # bytes of shared memory that a block may have where every number of tokens has a plan


@functools.cache
def _code(format: str) -> int | None:
    """Which decoder of the kernel reads a format; None when there is none."""
    fmt = FORMATS[format]
    if fmt.bits == 4:
        return _INT4 if fmt.is_integer else _CODEBOOK4
    if fmt.bits == 8:
        return _INT8 if fmt.is_integer else _FP8 if fmt.codebook == FORMATS["fp8"].codebook else None
    return None


@functools.cache
def _gpu(index: int) -> tuple[int, ...]:
    return _cuda.device_info(index)


def _device(index: int) -> tuple[int, ...]:
    """Multiprocessors, shared memory of a block and of a multiprocessor, compute capability of a device."""
    # the simulator's can change from call to call
    return _cuda.device_info(index) if simulated_gpu() else _gpu(index)


@functools.lru_cache(maxsize=4096)
def _plan(m: int, n: int, k: int, code: int | None, nested: bool, device: tuple[int, ...]) -> Any:
    return _cuda.plan_lowbit_linear(m, n, k, code, nested, *device)


@functools.cache
def _pairs(format: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return pairs_of_levels(FORMATS[format].values(), dtype).to(device)


@functools.cache
def _nested_levels(device: torch.device) -> torch.Tensor:
    return nested_code(device)


_counters: dict[tuple[int, int], torch.Tensor] = {}


def _zeroed_counters(count: int, device: torch.device, stream: int) -> torch.Tensor:
    """Counters of the blocks that have finished a tile, zero; the kernel leaves them zero.

    Kept for each device and stream, within which one kernel follows the other. A kernel in a CUDA graph gets
    its own, which the graph clears: when it is replayed, and beside what, is not known here.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device.index or 0, stream)
    kept = _counters.get(key)
    if kept is None or kept.numel() < count:
        kept = _counters[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return kept


def _rows_apart(t: torch.Tensor) -> bool:
    """True when a row's elements are neighbours and rows do not overlap, so that one stride addresses it."""
    return t.is_contiguous() or (t.stride(1) == 1 and t.stride(0) >= t.shape[1])


def supports(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> str | None:
    """None when `run` can serve the call, else the reason."""
    qweight, scales, zeros, scale_scales, scale_offset, format, group_size = weight
    if _cuda is None:
        return _missing
    if _code(format) is None:
        return f"it has no kernel for format {format}"
    if x.dtype not in _FLOATS:
        return f"x is {str(x.dtype)[6:]}: its tensor cores take float16 and bfloat16"
    k = x.shape[-1]
    if x.numel() > MAX_TOKENS * k:
        return f"M = {x.numel() // k} is above {MAX_TOKENS}: the Triton kernel serves it"
    if scales.dtype not in _SCALES or (scale_scales is None) != (scale_offset is None):
        return f"it has no kernel for scales in {str(scales.dtype)[6:]}"
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
    if not x.is_cuda and not simulated_gpu():
        return "the tensors are not on a GPU"
    device = _device(x.device.index or 0)
    if device[3] < 80:
        return f"compute capability {device[3] / 10} is below 8.0"
    if device[1] < ROOMY and x.numel() and qweight.numel():
        m, n = x.numel() // k, qweight.shape[0]
        if _plan(m, n, k, _code(format), scale_offset is not None, device).token_tiles == 0:
            return f"M = {m} needs more shared memory than the device has: the Triton kernel serves it"
    return None


def run(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> torch.Tensor:
    """y = x W^T + b. The arguments have passed the op's check and `supports`."""
    qweight, scales, zeros, scale_scales, scale_offset, format, group_size = weight
    device, n, k = x.device, qweight.shape[0], x.shape[-1]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=device)
    m = x.numel() // k
    if m == 0 or n == 0:
        return y
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.reshape(m, k)
        if x.stride(1) != 1 or x.data_ptr() % 16 or (m > 1 and (x.stride(0) < k or x.stride(0) % 8)):
            x = x.clone(memory_format=torch.contiguous_format)
    if bias is not None:
        bias = bias.contiguous()

    index = device.index or 0
    stream = torch._C._cuda_getCurrentRawStream(index) if x.is_cuda else 0
    nested = scale_offset is not None
    code = _code(format)
    plan = _plan(m, n, k, code, nested, _device(index))
    partial = counters = None
    if plan.splits > 1:
        partial = torch.empty((plan.splits, m, n), dtype=torch.float32, device=device)
        counters = _zeroed_counters(plan.tiles, device, stream)
    _cuda.lowbit_linear(
        x.data_ptr(), qweight.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr(),
        scale_scales.data_ptr() if scale_scales is not None else 0,
        scale_offset.data_ptr() if scale_offset is not None else 0,
        _nested_levels(device).data_ptr() if nested else 0,
        _pairs(format, x.dtype, device).data_ptr() if code == _CODEBOOK4 else 0,
        0 if bias is None else bias.data_ptr(), y.data_ptr(),
        0 if partial is None else partial.data_ptr(), 0 if counters is None else counters.data_ptr(),
        x.stride(0) if x.dim() == 2 else k, qweight.stride(0), scales.stride(0),
        0 if zeros is None else zeros.stride(0), m, n, k, group_size, FORMATS[format].zero_point,
        _SCALES[scales.dtype], _FLOATS[x.dtype], code, plan, index, stream,
    )  # fmt: skip
    return y

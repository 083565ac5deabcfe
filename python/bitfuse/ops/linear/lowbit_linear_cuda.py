"""lowbit_linear on CUDA for few tokens.

The kernel, its layout and what bounds it: csrc/cuda/linear/lowbit_linear.cu. It reads tensors where they lie.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ...core import policy
from ...core.cost import SPLIT, Cost, Prediction, Rates
from ...core.cuda import FLOATS, cuda, stream_of, zeroed_counters
from ...core.device import Device, device_of, pretended
from ...core.gpus import GPUS, TYPICAL, Gpu
from ...core.limits import MAX_TOKENS
from ...core.tensors import table
from ...weights.codebook import pairs_of_levels
from ...weights.formats import FORMATS, nested_code
from ...weights.weight import WeightTensors
from .lowbit_linear_cpu import code_kind, scale_kind

# dtypes of scales that the kernel reads
_SCALES = (torch.float32, *FLOATS, torch.float8_e8m0fnu, torch.uint8)
SPAN = 32  # columns that a step of the kernel sums before a scale can change
WARP_ROWS = 32  # rows that a warp of the kernel has; where rows share scales, one serves them all


@cuda.cached
def _code(format: str) -> Any:
    """The CodeKind by which the kernel reads a format, of which it is told; None when there is none."""
    native, fmt = cuda.module, FORMATS[format]
    kind = code_kind(fmt, native.CodeKind)
    if fmt.bits not in (4, 8):
        return None
    if kind is not None:
        scales = scale_kind(fmt, native.ScaleKind)
        native.formats[format] = native.WeightFormat(kind, fmt.zero_point, scales, fmt.tensor_scale)
    return kind


@cuda.cached
def _info(device: Device, gpu: Gpu | None) -> Any:
    """A device as plans see it; `gpu` is its card, where that is pretended."""
    native, arch = cuda.module, device.arch
    if gpu is not None:
        memory_bytes = gpu.memory_bytes
    elif device.number >= 0 and torch.cuda.is_available():
        memory_bytes = native.device_info(device.number).memory_bytes
    else:  # the simulator's, which has no clock, or one that nobody named
        memory_bytes = GPUS[TYPICAL[arch.number]].memory_bytes
    return native.DeviceInfo(
        device.multiprocessors, arch.block_kib << 10, arch.shared_kib << 10, device.capability, memory_bytes
    )


@cuda.cached
def _plan(
    m: int, n: int, k: int, format: str, nested: bool, device: Device, adapter: bool = False,
    gpu: Gpu | None = None,
) -> Any:  # fmt: skip
    """How the work is cut: as it was measured or is tried, else by the model of lowbit_linear.cu; of
    token_tiles 0 where the device can't run it."""
    native = cuda.module
    problem = m, n, k, _code(format), nested, _info(device, gpu), adapter
    cut = _trial or tuned(device, m, n, k, format)
    for plan in () if cut is None else native.lowbit_linear_plans(*problem):
        if (plan.log_warps_n, plan.splits) == cut:
            return plan
    return native.plan_lowbit_linear(*problem)


class Cut(NamedTuple):
    """What makes a plan: how many warps of a block stand side by side, as a logarithm, and blocks that split
    k."""

    log_warps_n: int
    splits: int


_trial: Cut | None = None


@contextlib.contextmanager
def trying(cut: Cut) -> Iterator[None]:
    """Take this cut for every call inside that can be cut so."""
    global _trial
    _trial = cut
    _plan.cache_clear()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _trial = None
        _plan.cache_clear()  # type: ignore[attr-defined]


def candidates(m: int, n: int, k: int, format: str, nested: bool, device: Device) -> list[Cut]:
    """The choice of the model, then what is worth measuring beside it: cuts that it takes to be not much
    worse, some of each width of a block."""
    native = cuda.module
    problem = m, n, k, _code(format), nested, _info(device, pretended())
    chosen = native.plan_lowbit_linear(*problem)
    if chosen.token_tiles == 0:
        return []
    found = [Cut(chosen.log_warps_n, chosen.splits)]
    for plan in native.lowbit_linear_plans(*problem):
        cut = Cut(plan.log_warps_n, plan.splits)
        of_width = sum(cut.log_warps_n == c.log_warps_n for c in found)
        if cut not in found and of_width < 4 and plan.clocks < 1.6 * chosen.clocks:
            found.append(cut)
    return found


def tuning_key(m: int, n: int, k: int, format: str) -> str:
    """Of a Cut in the policy's cache."""
    return policy.key("lowbit_linear on cuda", policy.bucket(m), n, k, format)


def tuned(device: Device, m: int, n: int, k: int, format: str) -> Cut | None:
    """What was measured to be the fastest on this GPU."""
    if pretended() is not None or not torch.cuda.is_available():
        return None
    configs = policy.of(torch.cuda.get_device_name(device.number))["configs"]
    found = configs.get(tuning_key(m, n, k, format))
    return None if found is None else Cut(*found)


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
    qweight, scales, zeros, scale_scales, scale_offset, format, group_size, offsets, scale_rows = weight
    if cuda.missing is not None:
        return cuda.missing
    if _code(format) is None:
        return f"it has no kernel for format {format}"
    if scale_rows != 1 and (scale_rows % WARP_ROWS or scale_rows & (scale_rows - 1)):
        return f"it has no kernel for scales that {scale_rows} rows share: a power of two from {WARP_ROWS} on"
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
    if not (offsets is None or _rows_apart(offsets)):
        return f"offsets have strides {offsets.stride()}, not contiguous rows"
    if (reason := cuda.refuses(x.device)) is not None:
        return reason
    device = device_of(x.device)
    if not device.arch.roomy and x.numel() and qweight.numel():
        m, n = x.numel() // k, qweight.shape[0]
        plan = _plan(m, n, k, format, scale_offset is not None, device, False, pretended())
        if plan.token_tiles == 0:
            return f"M = {m} needs more shared memory than the device has: the Triton kernel serves it"
    return None


def run(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> torch.Tensor:
    """y = x W^T + b. The arguments have passed the op's check and `supports`."""
    call = prepare(x, weight, bias)
    if call.plan is not None:
        call.launch()
    return call.y


# what a warp issues for a span of 512 bytes of codes, by tokens a block multiplies (1; 8; 16; 32; 64),
# counted in the machine code of sm_90a for bfloat16; float16 saves 8 of codes of 4 bits. And beside its
# spans, once
_ISSUED = {
    "int4": (96.0, 121.0, 113.5, 134.0, 175.0),
    "codebook": (116.0, 129.5, 120.0, 143.0, 178.0),
    "byte": (86.0, 98.5, 91.5, 107.0, 136.0),
}
_ONCE = 380
_WARPS, _WARP_ROWS, _CHUNK_BYTES, _SPAN_BYTES = 8, 32, 64, 512  # of csrc/cuda/linear/lowbit_linear.cuh
_ONE_BLOCK, _TWO_BLOCKS = 2.4, 3.0  # instructions a clock, of a multiprocessor that holds so many blocks
_L2_BYTES = 24  # that L2 gives a multiprocessor a clock


def predicted(
    cost: Cost, rates: Rates, x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None,
    adapter: bool = False,
) -> Prediction:  # fmt: skip
    """The time to expect: bytes, what the busiest multiprocessor issues, x through L2 for each block's
    rows."""
    n, k = weight.shape
    m = x.numel() // max(k, 1)
    if m == 0 or n == 0:
        return Prediction(rates.call_s)
    device, bits = device_of(x.device), FORMATS[weight.format].bits
    nested = weight.scale_offset is not None
    plan = _plan(m, n, k, weight.format, nested, device, adapter, pretended())
    kind = "byte" if bits == 8 else "int4" if FORMATS[weight.format].codebook is None else "codebook"
    few, eight, *more = _ISSUED[kind]
    span = few + (eight - few) * (min(m, 8) - 1) / 7
    if plan.token_tiles > 1:
        span = more[plan.token_tiles.bit_length() - 2]
    if x.dtype == torch.float16 and bits == 4:
        span -= 8
    warps_k = _WARPS >> plan.log_warps_n
    chunks = math.ceil(math.ceil(k * bits / (8 * _CHUNK_BYTES)) / plan.splits)
    chunks = math.ceil(chunks / warps_k) * warps_k
    block = (_WARP_ROWS << plan.log_warps_n) * chunks * _CHUNK_BYTES / _SPAN_BYTES * span + _WARPS * _ONCE
    busiest = -(-plan.tiles * plan.splits // rates.multiprocessors)
    two = plan.token_tiles <= 2 and plan.shared_bytes <= (device.arch.shared_kib << 9) - 1024
    pairs = busiest // 2 if two else 0
    clocks = 2 * pairs * block / _TWO_BLOCKS + (busiest - 2 * pairs) * block / _ONE_BLOCK
    partial = 8 * plan.splits * m * n if plan.splits > 1 else 0
    through = cost.nbytes + 2 * m * k * plan.tiles + partial
    return Prediction(
        rates.call_s,
        max(cost.memory_seconds(rates), rates.clocks(through / (_L2_BYTES * rates.multiprocessors))),
        rates.clocks(clocks),
        cost.predicted(rates).arithmetic,
        SPLIT if plan.splits > 1 else 0.0,
    )


class Call(NamedTuple):
    """A launch of the kernel that is not queued yet.

    Attributes:
        y: the output, to be written.
        plan: how the work is cut; None where there is no work.
        tensors: x, the weight and the bias, and the output as rows.
        others: what else the binding takes, by name.
        counters: zero, as many as were asked for.
    """

    y: torch.Tensor
    plan: Any = None
    tensors: tuple[Any, ...] = ()
    others: dict[str, Any] = {}  # noqa: RUF012  (never written)
    counters: torch.Tensor | None = None

    def launch(self, **more: Any) -> None:
        """Queue it, with what rides along."""
        stream = stream_of(self.y)
        cuda.module.lowbit_linear(*self.tensors, self.plan, stream, **self.others, **more)


def prepare(
    x: torch.Tensor,
    weight: WeightTensors,
    bias: torch.Tensor | None,
    adapter: bool = False,
    more_counters: int = 0,
) -> Call:
    """All that a launch takes; with room for what rides along if there is an adapter."""
    format = weight.format
    device, n, k = x.device, weight.qweight.shape[0], x.shape[-1]
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

    nested = weight.scale_offset is not None
    plan = _plan(m, n, k, format, nested, device_of(device), adapter)
    others: dict[str, Any] = {}
    counters = None
    if plan.splits > 1:
        partial = torch.empty((plan.splits, m, n + n % 2), dtype=torch.float32, device=device)
        counters = zeroed_counters(more_counters + plan.tiles, device, stream_of(x))
        others |= {"partial": partial, "counters": counters, "first_counter": more_counters}
    elif more_counters:
        counters = zeroed_counters(more_counters, device, stream_of(x))
    if nested:
        others["nested_levels"] = _nested_levels(device)
    if _code(format) == cuda.module.CodeKind.CODEBOOK4:
        others["pairs"] = _pairs(format, x.dtype, device)
    return Call(y, plan, (x, weight, bias, y), others, counters)

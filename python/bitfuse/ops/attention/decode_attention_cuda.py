"""decode_attention on CUDA.

The kernels, their layout and what bounds them: decode_attention.cuh and append_kv.cu of csrc/cuda/attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core.cost import Cost, Prediction, Rates
from ...core.cuda import FLOATS, cuda, stream_of, zeroed_counters
from ...core.device import device_of
from ...core.limits import MAX_HEAD_SIZE
from .kv_cache import BITS, CacheTensors, DecodeArgs, Rotary
from .operands import decode_operands, dense_rows, rotary_operands

MAX_ROWS = 128  # queries times query heads of a kv head: beyond, K and V would be read too often
GROUP_STEP = 32  # tokens that a warp takes at once: they must share K's scales
_UNIT = 16  # bytes that are copied at once
_LARGEST = 2**31 - 1


class _Shape(NamedTuple):
    """What a plan is made for."""

    format: str
    dtype: torch.dtype
    batch: int
    kv_heads: int
    dim: int
    dim_v: int
    capacity: int
    queries: int
    heads: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    capability: int


@cuda.cached
def _plan(shape: _Shape) -> Any:
    return cuda.module.plan_decode_attention(**shape._asdict())


def _shape(q: torch.Tensor, cache: CacheTensors) -> _Shape:
    batch, queries, heads, dim = q.shape
    device = device_of(q.device)
    arch = device.arch
    return _Shape(
        cache.format, q.dtype, batch, cache.k.shape[2], dim, cache.head_dim_v, cache.capacity, queries, heads,
        device.multiprocessors, arch.block_kib << 10, arch.shared_kib << 10, device.capability,
    )  # fmt: skip


def _apart(t: torch.Tensor, unit: int) -> bool:
    """True when rows, of four dimensions' last, begin at multiples of `unit` bytes."""
    mask = unit // t.element_size() - 1
    a, b, c, _ = t.stride()
    if t.data_ptr() % unit:
        return False
    if not (a | b | c) & mask:
        return True
    return all(n <= 1 or not s & mask for n, s in zip(t.shape, (a, b, c), strict=False))


# instructions of a warp for a token of a kv head of 128 channels, by the cache's format; how many a
# multiprocessor issues a clock; seconds that a block's start takes beyond the usual, and the merge of the
# parts by the last one
_ISSUED = {"none": 23.8, "fp8": 24.6, "int8": 30.8, "int4": 32.8}
_A_CLOCK = 2.4
_LATER, _MERGE = 0.55e-6, 2e-6


def predicted(
    cost: Cost, rates: Rates, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None,
    cache: CacheTensors, *rest: Any,
) -> Prediction:  # fmt: skip
    """The time to expect: bytes or instructions, and the merge."""
    _, queries, heads, dim = q.shape
    pairs = cost.flops / max(1, 2 * heads * queries * (dim + cache.head_dim_v))  # tokens of all sequences
    issued = _ISSUED[cache.format] * pairs * cache.k.shape[2] * (dim + cache.head_dim_v) / 256
    return Prediction(
        rates.call_s + _LATER,
        cost.memory_seconds(rates),
        rates.clocks(issued / (_A_CLOCK * rates.multiprocessors)),
        after=_MERGE,
    )


def supports(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor,
    rotary: Rotary,
    a: DecodeArgs,
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if cuda.missing is not None:
        return cuda.missing
    if q.dtype not in FLOATS:
        return f"q is {str(q.dtype)[6:]}: its tensor cores take float16 and bfloat16"
    batch, queries, heads, dim = q.shape
    bits = BITS.get(cache.format, cache.k.element_size() * 8)
    step = _UNIT * 8 // bits
    dim_v = cache.head_dim_v
    if max(dim, dim_v) > MAX_HEAD_SIZE:
        return f"head dims {dim} and {dim_v} are more than {MAX_HEAD_SIZE}, its widest kernel"
    if dim % step or dim_v % step:
        return f"head dims {dim} and {dim_v} are not multiples of {step}, the channels of {_UNIT} bytes"
    for name, t in (("k_cache", cache.k), ("v_cache", cache.v)):
        if not _apart(t, _UNIT):
            return f"{name} has strides {t.stride()}: its rows are not at multiples of {_UNIT} bytes"
    if cache.format in BITS:
        if cache.group_size % GROUP_STEP:
            return (
                f"{cache.group_size} tokens share K's scales (group_size, never more than a page), "
                f"not a multiple of {GROUP_STEP}"
            )
        for name in ("k_scales", "k_offsets", "v_scales", "v_offsets", "k_tail", "v_tail"):
            t = getattr(cache, name)
            if t.data_ptr() % _UNIT:
                return f"{name} starts at an address that is not a multiple of {_UNIT}"
        groups = -(-dim_v // cache.channel_group)
        if groups > 2 and groups * cache.k.shape[2] % 2:
            return f"{groups} scales of V for each of {cache.k.shape[2]} heads are an odd number for a token"
    if queries * (heads // cache.k.shape[2]) > MAX_ROWS:
        return f"{queries} queries of {heads} heads are more than {MAX_ROWS} rows a kv head"
    if rotary.cos is not None and rotary.cos.shape[0] == 0:
        return "rotary_cos has no positions"
    if (reason := cuda.refuses(q.device)) is not None:
        return reason
    pages, page_size = cache.k.shape[:2]
    if cache.format in BITS and max(pages * page_size, 2 * batch * cache.group_size) > _LARGEST:
        return f"{pages} pages of {page_size} tokens are too many"
    if not cache.capacity and cache.block_table is not None:
        return "the block_table has no pages"
    if queries * heads * batch * (cache.capacity // 64 + 2) > _LARGEST:
        return "its units of work are too many"
    if batch and queries and heads and _plan(_shape(q, cache)).dim == 0:
        return f"it has no kernel for {cache.format} and head dims {dim} and {dim_v} on this device"
    return None


def run(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor,
    rotary: Rotary,
    a: DecodeArgs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and lse. The arguments have passed the op's check and `supports`."""
    device = q.device
    batch, queries, heads, _ = q.shape
    out = torch.empty((batch, queries, heads, cache.head_dim_v), dtype=q.dtype, device=device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=device)
    if q.stride(-1) != 1 or not _apart(q, _UNIT):
        q = q.clone(memory_format=torch.contiguous_format)
    if k is not None and v is not None:
        k, v = dense_rows(k), dense_rows(v)
    stream = stream_of(q)
    plan = partial = counters = None
    if batch and queries and heads:
        plan = _plan(_shape(q, cache))
        partial = torch.empty(plan.partial_floats, dtype=torch.float32, device=device)
        counters = zeroed_counters(plan.counters, device, stream)
    cuda.module.decode_attention(
        q, k, v, cache, cache_seqlens.contiguous(), rotary_operands(rotary), decode_operands(a), out, lse,
        partial, counters, plan, stream,
    )  # fmt: skip
    return out, lse

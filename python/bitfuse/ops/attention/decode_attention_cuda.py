"""decode_attention on CUDA: tensors to addresses.

The kernels, their layout and what bounds them: decode_attention.cuh and append_kv.cu of csrc/cuda/attention.
"""

from __future__ import annotations

from typing import Any

import torch

from ...core.cuda import FLOATS, cuda, stream_of, zeroed_counters
from ...core.device import device_of
from .kv_cache import BITS, CACHE_FORMATS, CacheTensors, DecodeArgs, Rotary

# the numbers of the enums of csrc/cuda/attention/kv_cache.h
_FORMATS = {name: i for i, name in enumerate(CACHE_FORMATS)}
_ROTARY = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NO_ROWS = (0, 0, 0, 0)
_NO_ROTARY = (0,) * 8

MAX_HEAD_DIM = 256  # MostHeadDim of csrc/cuda/attention/kv_cache.h
MAX_ROWS = 128  # queries times query heads of a kv head: beyond, K and V would be read too often
GROUP_STEP = 32  # tokens that a warp takes at once: they must share K's scales
_UNIT = 16  # bytes that are copied at once
_LARGEST = 2**31 - 1


@cuda.cached
def _plan(*sizes: int) -> Any:
    return cuda.module.plan_decode_attention(*sizes)


def _sizes(q: torch.Tensor, cache: CacheTensors) -> tuple[int, ...]:
    batch, queries, heads, dim = q.shape
    device = device_of(q.device)
    arch = device.arch
    return (
        _FORMATS[cache.format], FLOATS[q.dtype], batch, cache.k.shape[2], dim, cache.head_dim_v,
        cache.capacity, queries, heads, device.multiprocessors, arch.block_kib << 10, arch.shared_kib << 10,
        device.capability,
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
    if max(dim, dim_v) > MAX_HEAD_DIM:
        return f"head dims {dim} and {dim_v} are more than {MAX_HEAD_DIM}, its widest kernel"
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
    if batch and queries and heads and _plan(*_sizes(q, cache)).dim == 0:
        return f"it has no kernel for {cache.format} and head dims {dim} and {dim_v} on this device"
    return None


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rows(t: torch.Tensor) -> tuple[int, int, int, int]:
    """Address, and strides of batch, token and head."""
    strides = t.stride()
    return t.data_ptr(), strides[0], strides[1], strides[2]


def _dense_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _cache_integers(cache: CacheTensors, batch: int, dtype: torch.dtype) -> tuple[int, ...]:
    k, v, table = cache.k, cache.v, cache.block_table
    pages, page_size, kv_heads, _ = k.shape
    return (
        _FORMATS[cache.format], FLOATS[dtype], batch, pages, page_size, kv_heads, cache.head_dim,
        cache.head_dim_v, cache.group_size, cache.channel_group, *_rows(k), *_rows(v),
        *(_address(t) for t in cache[2:8]), _address(table), 1 if table is None else table.shape[1],
    )  # fmt: skip


def _rotary_integers(rotary: Rotary) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Rotary embedding as the binding takes it, and the tensors that must live until the launch is queued."""
    if rotary.cos is None or rotary.sin is None:
        return _NO_ROTARY, ()
    cos, sin = rotary.cos.contiguous(), rotary.sin.contiguous()
    positions = None if rotary.positions is None else rotary.positions.contiguous()
    return (
        cos.data_ptr(), sin.data_ptr(), _ROTARY[cos.dtype], cos.shape[1], cos.shape[0], _address(positions),
        0 if positions is None else positions.shape[0], rotary.interleaved,
    ), (cos, sin, positions)  # fmt: skip


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
    seqlens = cache_seqlens.contiguous()
    k_rows = v_rows = _NO_ROWS
    new = 0
    if k is not None and v is not None:
        k, v, new = _dense_rows(k), _dense_rows(v), k.shape[1]
        k_rows, v_rows = _rows(k), _rows(v)
    turn, _kept = _rotary_integers(rotary)
    tree, alibi, sinks = (
        None if t is None else t.contiguous() for t in (a.tree_mask, a.alibi_slopes, a.sinks)
    )
    index = device.index or 0
    stream = stream_of(q)
    plan = partial = counters = None
    if batch and queries and heads:
        plan = _plan(*_sizes(q, cache))
        partial = torch.empty(plan.partial_floats, dtype=torch.float32, device=device)
        counters = zeroed_counters(plan.counters, device, stream)
    cuda.module.decode_attention(
        _cache_integers(cache, batch, q.dtype), seqlens.data_ptr(), _rows(q), queries, heads, k_rows, v_rows,
        new, turn, a.softmax_scale, a.softcap, a.left, a.right, _address(tree),
        1 if tree is None else tree.shape[0], _address(alibi), alibi is not None and alibi.dim() == 2,
        _address(sinks), out.data_ptr(), lse.data_ptr(), _address(partial), _address(counters), plan, index,
        stream,
    )  # fmt: skip
    return out, lse

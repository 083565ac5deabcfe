"""Calls that nobody makes: an op's arguments from sizes alone, to ask who would serve them and at what cost,
on a device that need not be here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from .arch.gpus import Gpu
from .formats import get_format
from .op import Explanation, explain, pretend
from .ops.append_kv import KVCache, append_kv
from .ops.attention import attention
from .ops.bottleneck_adapter import bottleneck_adapter
from .ops.decode_attention import decode_attention
from .ops.gated_activation import gated_activation
from .ops.lora_linear import lora_linear
from .ops.lowbit_linear import lowbit_linear
from .ops.merge_attention import merge_attention
from .ops.multi_lora_linear import multi_lora_linear
from .ops.quantize_kv import quantize_kv
from .ops.rope import rope
from .ops.sample import sample
from .weight import LowBitWeight

DENSE = "dense"


@dataclass(frozen=True)
class Sizes:
    """Of a call; an op uses some of them.

    Attributes:
        m, n, k: rows of x, out_features, in_features.
        format: of the weight, or "dense"; group_size: None for the format's own.
        dtype: of activations, and of a dense weight.
        rank, adapters: of LoRA, and how many of them there are.
        batch, seqlen, kv_len: sequences, their queries, their keys.
        heads, kv_heads, head_dim: of attention.
        causal: whether a query sees later keys.
        cache, page_size: the KV cache's format ("none" for dtype itself); None for no pages.
        vocab: tokens to choose from.
    """

    m: int = 1
    n: int = 4096
    k: int = 4096
    format: str = "int4"
    group_size: int | None = None
    dtype: torch.dtype = torch.bfloat16
    rank: int = 16
    adapters: int = 64
    batch: int = 1
    seqlen: int = 1024
    kv_len: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    causal: bool = True
    cache: str = "none"
    page_size: int | None = None
    vocab: int = 128256


Make = Callable[..., torch.Tensor]


def _weight(s: Sizes, make: Make) -> torch.Tensor | LowBitWeight:
    if s.format == DENSE:
        return make(s.n, s.k)
    format = get_format(s.format, group_size=s.group_size)
    if s.group_size is None:
        format = format.fitted(s.k)
    tensors: dict[str, Any] = {
        name: make(*shape, dtype=format.scale_dtype if name == "scales" and not format.nested else dtypes[0])
        for name, dtypes, shape in LowBitWeight.expected(format, (s.n, s.k))
    }
    return LowBitWeight(format=format, shape=(s.n, s.k), **tensors)


def _lowbit(s: Sizes, make: Make) -> tuple[Any, ...]:
    if s.format == DENSE:
        raise ValueError("format is 'dense', which lowbit_linear does not take: that is torch's linear")
    return make(s.m, s.k), _weight(s, make)


def _lora(s: Sizes, make: Make) -> tuple[Any, ...]:
    return make(s.m, s.k), _weight(s, make), make(s.rank, s.k), make(s.n, s.rank), 1.0


def _multi(s: Sizes, make: Make) -> tuple[Any, ...]:
    e = s.adapters
    scaling = make(e, dtype=torch.float32)
    ids = make(s.m, dtype=torch.int32)
    return (make(s.m, s.k), _weight(s, make), make(e, s.rank, s.k), make(e, s.n, s.rank), scaling, ids)


def _qkv(s: Sizes, make: Make, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = make(s.batch, s.seqlen, s.heads, s.head_dim)
    return q, make(s.batch, keys, s.kv_heads, s.head_dim), make(s.batch, keys, s.kv_heads, s.head_dim)


def _cache(s: Sizes, make: Make) -> KVCache:
    return KVCache(
        s.batch, s.kv_len, s.kv_heads, s.head_dim,
        dtype=s.dtype, format=s.cache, page_size=s.page_size, device=make(0).device,
    )  # fmt: skip


def _merge(s: Sizes, make: Make) -> tuple[Any, ...]:
    o = make(s.batch, s.seqlen, s.heads, s.head_dim)
    lse = make(s.batch, s.heads, s.seqlen, dtype=torch.float32)
    return o, lse, o, lse


@dataclass(frozen=True)
class Call:
    """An op, what of `Sizes` it uses, and its arguments from them and from what makes a tensor."""

    function: Callable[..., Any]
    uses: tuple[str, ...]
    arguments: Callable[[Sizes, Make], tuple[Any, ...]]
    keywords: Callable[[Sizes], dict[str, Any]] = lambda s: {}


_LINEAR = ("m", "n", "k", "format", "group_size", "dtype")
_HEADS = ("batch", "seqlen", "heads", "head_dim", "dtype")
_CACHE = ("batch", "kv_len", "kv_heads", "head_dim", "cache", "page_size", "dtype")
CALLS = {
    "lowbit_linear": Call(lowbit_linear, _LINEAR, _lowbit),
    "lora_linear": Call(lora_linear, (*_LINEAR, "rank"), _lora),
    "multi_lora_linear": Call(multi_lora_linear, (*_LINEAR, "rank", "adapters"), _multi),
    "gated_activation": Call(
        gated_activation, ("m", "n", "dtype"), lambda s, make: (make(s.m, s.n), make(s.m, s.n))
    ),
    "bottleneck_adapter": Call(
        bottleneck_adapter,
        ("m", "k", "rank", "dtype"),
        lambda s, make: (make(s.m, s.k), make(s.rank, s.k), make(s.k, s.rank)),
    ),
    "attention": Call(
        attention,
        (*_HEADS, "kv_heads", "causal"),
        lambda s, make: _qkv(s, make, s.seqlen),
        lambda s: {"causal": s.causal},
    ),
    "decode_attention": Call(
        decode_attention,
        (*_CACHE, "heads"),
        lambda s, make: (make(s.batch, 1, s.heads, s.head_dim), _cache(s, make)),
    ),
    "append_kv": Call(
        append_kv,
        (*_CACHE, "seqlen"),
        lambda s, make: (*_qkv(s, make, s.seqlen)[1:], _cache(s, make)),
    ),
    "quantize_kv": Call(
        quantize_kv,
        ("batch", "kv_len", "kv_heads", "head_dim", "dtype", "cache"),
        lambda s, make: _qkv(s, make, s.kv_len)[1:],
        lambda s: {"format": "int8" if s.cache == "none" else s.cache},
    ),
    "rope": Call(
        rope,
        _HEADS,
        lambda s, make: (
            make(s.batch, s.seqlen, s.heads, s.head_dim),
            make(s.seqlen, s.head_dim // 2),
            make(s.seqlen, s.head_dim // 2),
        ),
    ),
    "merge_attention": Call(merge_attention, _HEADS, _merge),
    "sample": Call(
        sample,
        ("batch", "vocab", "dtype"),
        lambda s, make: (make(s.batch, s.vocab), make(s.batch, dtype=torch.float32)),
    ),
}


def explain_sizes(op: str, sizes: Sizes, gpu: Gpu | None) -> Explanation:
    """`bitfuse.explain` of a call of these sizes, on this GPU; None for the CPU.

    Raises:
        ValueError: no op of that name, sizes that it refuses.
    """
    if op not in CALLS:
        raise ValueError(f"no op {op!r}: there are {', '.join(CALLS)}")
    for field in fields(sizes):
        value = getattr(sizes, field.name)
        least = 0 if field.name in ("rank", "m", "batch", "seqlen", "kv_len") else 1
        if isinstance(value, int) and value < least:
            raise ValueError(f"{field.name} is {value}, expected {least} or more")
    call = CALLS[op]
    with pretend(gpu):

        def make(*shape: int, dtype: torch.dtype = sizes.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cpu" if gpu is None else "cuda")

        return explain(call.function, *call.arguments(sizes, make), **call.keywords(sizes))

"""Calls that nobody makes: an op's arguments from sizes alone, to ask who would serve them and at what cost,
on a device that need not be here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from bitfuse.core.backends import BackendError
from bitfuse.core.device import pretend
from bitfuse.core.explain import Explanation, explain
from bitfuse.core.gpus import Gpu
from bitfuse.core.json_files import brief
from bitfuse.ops.attention.append_kv import KVCache, append_kv
from bitfuse.ops.attention.attention import attention, varlen_attention
from bitfuse.ops.attention.decode_attention import decode_attention
from bitfuse.ops.attention.merge_attention import merge_attention
from bitfuse.ops.attention.quantize_kv import quantize_kv
from bitfuse.ops.attention.rope import rope
from bitfuse.ops.attention.scaled_dot_product_attention import scaled_dot_product_attention
from bitfuse.ops.linear.bottleneck_adapter import bottleneck_adapter
from bitfuse.ops.linear.gated_activation import gated_activation
from bitfuse.ops.linear.lora_linear import lora_linear
from bitfuse.ops.linear.lora_mlp import Projection, lora_mlp, lora_qkv
from bitfuse.ops.linear.lowbit_linear import lowbit_linear
from bitfuse.ops.linear.multi_lora_linear import multi_lora_linear
from bitfuse.ops.optim.adamw8bit import adamw8bit
from bitfuse.ops.sampling.sample import sample
from bitfuse.ops.sampling.speculative_sample import speculative_sample
from bitfuse.ops.sampling.speculative_sample_tree import speculative_sample_tree
from bitfuse.weights.formats import get_format
from bitfuse.weights.weight import LowBitWeight

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
        vocab: tokens to choose from; drafted: those that a draft model proposes.
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
    drafted: int = 4


MOST = {"seqlen": 1 << 24, "kv_len": 1 << 24}  # others: what an int32 holds
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


def _projection(s: Sizes, make: Make, n: int, k: int) -> Projection:
    return Projection(_weight(replace(s, n=n, k=k), make), make(s.rank, k), make(n, s.rank))


def _qkv_projections(s: Sizes, make: Make) -> tuple[Any, ...]:
    widths = (s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim)
    return make(s.m, s.k), [_projection(s, make, n, s.k) for n in widths]


def _mlp(s: Sizes, make: Make) -> tuple[Any, ...]:
    wide = [_projection(s, make, s.n, s.k) for _ in range(2)]
    return make(s.m, s.k), *wide, _projection(s, make, s.k, s.n)


def _varlen(s: Sizes, make: Make) -> tuple[Any, ...]:
    q, k, v = (t.flatten(0, 1) for t in _qkv(s, make, s.seqlen))
    cu = make(s.batch + 1, dtype=torch.int32)
    return q, k, v, cu, cu, s.seqlen, s.seqlen


def _drafts(s: Sizes, make: Make) -> tuple[torch.Tensor, ...]:
    """Probabilities and ids of a draft; the target's, and uniforms."""
    ids = make(s.batch, s.drafted, dtype=torch.int64)
    target = make(s.batch, s.drafted + 1, s.vocab)
    return make(s.batch, s.drafted, s.vocab), ids, target, make(s.batch, s.drafted + 1, dtype=torch.float32)


def _tree(s: Sizes, make: Make) -> tuple[Any, ...]:
    probs, ids, target, uniforms = _drafts(s, make)
    return probs, ids, make(s.batch, s.drafted, dtype=torch.int64), target, uniforms


def _adamw(s: Sizes, make: Make) -> tuple[Any, ...]:
    blocks = -(-s.n * s.k // 256)
    moments = [(make(s.n, s.k, dtype=torch.uint8), make(blocks, dtype=torch.float32)) for _ in range(2)]
    return make(s.n, s.k), make(s.n, s.k), *moments[0], *moments[1]


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
    "lora_qkv": Call(
        lora_qkv,
        ("m", "k", "heads", "kv_heads", "head_dim", "format", "group_size", "dtype", "rank"),
        _qkv_projections,
    ),
    "lora_mlp": Call(lora_mlp, (*_LINEAR, "rank"), _mlp),
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
    "varlen_attention": Call(
        varlen_attention, (*_HEADS, "kv_heads", "causal"), _varlen, lambda s: {"causal": s.causal}
    ),
    "scaled_dot_product_attention": Call(
        scaled_dot_product_attention,
        (*_HEADS, "kv_heads", "causal"),
        lambda s, make: tuple(t.transpose(1, 2) for t in _qkv(s, make, s.seqlen)),
        lambda s: {"is_causal": s.causal, "enable_gqa": s.heads != s.kv_heads},
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
    "speculative_sample": Call(speculative_sample, ("batch", "drafted", "vocab", "dtype"), _drafts),
    "speculative_sample_tree": Call(speculative_sample_tree, ("batch", "drafted", "vocab", "dtype"), _tree),
}
# what is called on parameters, not on activations
STEPS = {"adamw8bit": Call(adamw8bit, ("n", "k", "dtype"), _adamw, lambda s: {"lr": 1e-3, "step": 1.0})}
EVERY = {**CALLS, **STEPS}


@contextlib.contextmanager
def _in_a_line() -> Iterator[None]:
    """What torch says of a tensor that there can't be comes with its own stack."""
    try:
        yield
    except BackendError:
        raise
    except (RuntimeError, OverflowError, MemoryError) as why:
        said = str(why).strip().splitlines()
        raise ValueError(
            f"there is no call of these sizes: {said[0] if said else type(why).__name__}"
        ) from None


def explain_sizes(op: str, sizes: Sizes, gpu: Gpu | None) -> Explanation:
    """`bitfuse.explain` of a call of these sizes, on this GPU; None for the CPU.

    Raises:
        ValueError: no op of that name, sizes that it refuses.
    """
    if op not in EVERY:
        raise ValueError(f"no op {op!r}: there are {', '.join(EVERY)}")
    for field in fields(sizes):
        value = getattr(sizes, field.name)
        least = 0 if field.name in ("rank", "m", "batch", "seqlen", "kv_len") else 1
        if isinstance(value, int) and value < least:
            raise ValueError(f"{field.name} is {value}, expected {least} or more")
        most = MOST.get(field.name, 2**31 - 1)
        if isinstance(value, int) and value > most:
            raise ValueError(f"{field.name} is {brief(value)}, expected at most {most}")
    call = EVERY[op]
    with pretend(gpu), _in_a_line():

        def make(*shape: int, dtype: torch.dtype = sizes.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cpu" if gpu is None else "cuda")

        return explain(call.function, *call.arguments(sizes, make), **call.keywords(sizes))

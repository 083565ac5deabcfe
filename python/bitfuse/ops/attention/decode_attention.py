"""decode_attention: a few queries of each sequence against its cache of keys and values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from ...core import autocast
from ...core.autograd import recorded, recording, without_gradient
from ...core.backends import Backend
from ...core.cost import Cost, moved
from ...core.cpu import extension
from ...core.declaration import CACHE, LENGTHS, Declaration, Part, Tuned, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...core.policy import bucket
from ...core.tensors import PLAIN, check_read, check_tensor
from ...kernels.attention import decode_attention as triton
from ..linear.lowbit_linear import FLOATS
from . import decode_attention_cpu as cpp
from . import decode_attention_cuda as cuda
from .append_kv import (
    CACHE_SCHEMA,
    CHECK_PLACES,
    MAX_HEAD_DIM,
    KVCache,
    as_cache,
    check_new,
    example_cache,
    of_cache,
    turned,
    unflatten_cache,
    written,
)
from .attention import attention_op, default_scale
from .attention_args import NO_WINDOW, AttentionArgs, window_of
from .kv_cache import (
    CacheTensors,
    DecodeArgs,
    Rotary,
    check_cache,
    check_places,
    check_rotary,
    gather,
    head_dims,
    store,
)
from .rope import as_rotary

# a C++ function that says in a microsecond that `_check_tensors` has nothing to say; never true of what only
# torch can read, nor of a cache in few bits
_fits: Callable[..., bool] = getattr(extension, "decode_attention_fits", lambda *args: False)


def _check(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor,
    rotary: Rotary,
    a: DecodeArgs,
) -> None:
    if not _fits(q, k, v, cache, cache_seqlens, rotary, a):
        _check_tensors(q, k, v, cache, cache_seqlens, rotary, a)
    if CHECK_PLACES and q.is_cuda:
        check_places(cache, cache_seqlens, q.shape[1], 0 if k is None else k.shape[1], rotary)


def _check_tensors(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor,
    rotary: Rotary,
    a: DecodeArgs,
) -> None:
    if q.dim() != 4:
        raise ValueError(f"q has shape {list(q.shape)}, expected [batch, seq, heads, head_dim]")
    if q.dtype not in FLOATS:
        raise TypeError(f"q has dtype {q.dtype}, expected {' or '.join(map(str, FLOATS))}")
    if type(q) not in PLAIN or q.is_neg():
        check_read("q", q)
    batch, queries, heads, dim = q.shape
    device = q.device
    check_cache(cache, batch, q.dtype, device, cache_seqlens)
    kv_heads = cache.k.shape[2]
    dim_k, dim_v = head_dims(cache)
    if dim != dim_k or not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"q has head_dim {dim} and k_cache {dim_k}, expected one of 1 to {MAX_HEAD_DIM}")
    if not 1 <= dim_v <= MAX_HEAD_DIM:
        raise ValueError(f"v_cache has head_dim {dim_v}, expected 1 to {MAX_HEAD_DIM}")
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k_cache {kv_heads}, expected a multiple")
    new = 0
    if k is not None and v is not None:
        new = k.shape[1] if k.dim() == 4 else 0
        check_new(k, v, cache, batch, new)
        if k.dtype is not q.dtype:
            raise TypeError(f"k has dtype {k.dtype}, expected {q.dtype}, as q has")
    elif k is not v:
        raise ValueError("only one of k and v is given, expected both or neither")
    if rotary.cos is not None or rotary.sin is not None or rotary.positions is not None:
        check_rotary(rotary, batch, queries, dim, device)
        if rotary.positions is not None and k is not None and new != queries:
            raise ValueError(
                f"positions are given for {queries} queries and {new} new tokens, expected as many"
            )
    if not (math.isfinite(a.softmax_scale) and math.isfinite(a.softcap) and a.softcap >= 0):
        raise ValueError(
            f"softmax_scale is {a.softmax_scale} and softcap {a.softcap}, expected finite numbers, "
            "softcap 0 or more"
        )
    if a.tree_mask is not None:
        rows = a.tree_mask.shape[0] if a.tree_mask.dim() == 3 else -1
        shape = (rows if rows == 1 else batch, queries, queries)
        check_tensor("tree_mask", a.tree_mask, (torch.bool,), shape, device)
    if a.alibi_slopes is not None:
        slopes = (batch, heads) if a.alibi_slopes.dim() == 2 else (heads,)
        check_tensor("alibi_slopes", a.alibi_slopes, (torch.float32,), slopes, device)
    if a.sinks is not None:
        check_tensor("sinks", a.sinks, (torch.float32,), (heads,), device)


def _seen(a: DecodeArgs, sequence: int, queries: int, length: int) -> torch.Tensor | None:
    """The tree's mask over all of a sequence's keys: bool [1, 1, queries, length]."""
    if a.tree_mask is None:
        return None
    tree = a.tree_mask[sequence if a.tree_mask.shape[0] > 1 else 0]
    own = min(queries, length)
    seen = torch.ones(1, 1, queries, length, dtype=torch.bool, device=tree.device)
    seen[..., length - own :] = tree[:, queries - own :]
    return seen


def _reference(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor,
    rotary: Rotary,
    a: DecodeArgs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and lse: natural log of the sum of the exponentials, float32 [batch, heads, seqlen_q]."""
    batch, queries, heads, _ = q.shape
    new = 0 if k is None else k.shape[1]
    check_places(cache, cache_seqlens, queries, new, rotary)
    out = q.new_empty(batch, queries, heads, cache.head_dim_v)
    lse = q.new_empty(batch, heads, queries, dtype=torch.promote_types(q.dtype, torch.float32))
    for b, begin in enumerate(cache_seqlens.tolist()):
        length = begin + new
        if k is not None and v is not None:
            store(cache, b, begin, turned(k[b], rotary, b, begin), v[b])
        keys, values = gather(cache, b, length, q.dtype)
        own = turned(q[b], rotary, b, length - queries)
        slopes = a.alibi_slopes if a.alibi_slopes is None or a.alibi_slopes.dim() == 1 else a.alibi_slopes[b]
        args = AttentionArgs(
            a.softmax_scale, a.left, a.right, softcap=a.softcap, bias=_seen(a, b, queries, length),
            alibi_slopes=slopes, sinks=a.sinks,
        )  # fmt: skip
        one = attention_op.reference(own.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), args)
        out[b], lse[b] = one[0][0], one[1][0]
    return out, lse


def _fake(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor,
    rotary: Rotary,
    a: DecodeArgs,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, _ = q.shape
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    return q.new_empty(batch, queries, heads, cache.head_dim_v), lse


def _cost(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor,
    rotary: Rotary,
    a: DecodeArgs,
) -> Cost:
    """Of sequences as long as they are; of full ones where the lengths can't be read."""
    batch, queries, heads, dim = q.shape
    known = type(cache_seqlens) is torch.Tensor
    tokens = int(cache_seqlens.sum()) if known else batch * cache.capacity
    own = max(1, cache.k.shape[0] * cache.k.shape[1])  # a cache of nothing moves nothing
    token = moved(cache.k, cache.v, cache.k_scales, cache.v_scales, cache.k_offsets, cache.v_offsets) / own
    new = 0 if k is None else k.shape[0] * k.shape[1]
    out = batch * queries * heads * (cache.head_dim_v * q.element_size() + 4)
    flops = 2 * heads * queries * (dim + cache.head_dim_v) * (tokens + new)
    return Cost(moved(q, k, v) + int(token * (tokens + new)) + out, flops, q.dtype)


def _kind(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor,
    rotary: Rotary,
    a: DecodeArgs,
) -> tuple[Any, ...]:
    batch, queries, heads, dim = q.shape
    page = 0 if cache.block_table is None else cache.k.shape[1]
    return (
        bucket(batch),
        queries,
        bucket(cache.capacity),
        heads,
        cache.k.shape[2],
        dim,
        cache.format,
        page,
        q.dtype,
    )


def _flatten(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cache: CacheTensors,
    cache_seqlens: torch.Tensor,
    rotary: Rotary,
    a: DecodeArgs,
) -> tuple[Any, ...]:
    return q, k, v, *cache, cache_seqlens, *rotary, *a


def _unflatten(
    q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, *flat: Any
) -> tuple[Any, ...]:
    cache, cache_seqlens, rotary, rest = unflatten_cache(flat)
    return q, k, v, cache, cache_seqlens, rotary, DecodeArgs(*rest)


decode_attention_op = Op(
    f"decode_attention(Tensor q, Tensor? k, Tensor? v, {CACHE_SCHEMA}, float softmax_scale, int left, "
    "int right, float softcap, Tensor? tree_mask, Tensor? alibi_slopes, Tensor? sinks) -> (Tensor, Tensor)",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("cuda", ("cuda",), cuda.supports, cuda.run, predicted=cuda.predicted),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
    cost=_cost,
    kind=_kind,
    writes=lambda q, k, v, cache, *rest: () if k is None else written(cache),
    flatten=_flatten,
    unflatten=_unflatten,
)


_NO_GRADIENT = "decode_attention has no gradient, for a cache keeps none: train with bitfuse.attention"


def _args(
    q: torch.Tensor,
    tree_mask: torch.Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> DecodeArgs:
    for name, t in (("tree_mask", tree_mask), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if not (t is None or isinstance(t, torch.Tensor)):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor or None")
    left, right = window_size if window_size == NO_WINDOW else window_of(window_size)
    if causal and tree_mask is None:
        right = 0
    return DecodeArgs(
        default_scale(q) if softmax_scale is None else float(softmax_scale),
        left,
        right,
        float(softcap),
        tree_mask,
        alibi_slopes if alibi_slopes is None else alibi_slopes.float(),
        sinks if sinks is None else sinks.float(),
    )


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor | KVCache,
    v_cache: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    positions: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(softmax_scale * q k^T) v over a cache of keys and values, to which new ones are appended first
    (Flash-Decoding: Dao et al., 2023; pages: Kwon et al., 2023; codes: KIVI, Liu et al., 2024).

    A sequence's keys are split among the cores; all query heads of a kv head, and all queries, meet a key
    when it is read once. The shapes alone decide what is launched: nothing waits for the device.

    Query i stands at distance d = j - (i + length - seqlen_q) from key j, length counting the new tokens: the
    last query is aligned with the last key. A query that sees no key gives 0, and lse -inf.

    A prefix that sequences share is read once when its attention is a call of its own, over a cache of the
    prefix alone, with all sequences' queries as one sequence's (causal=False), merged with the rest by
    `bitfuse.merge_attention`. Queries are then rotated beforehand, by `bitfuse.rope`.

    No gradient flows: a backward through the output is an error, whichever of the tensors asked for one.

    Under `torch.autocast` the output has the autocast dtype, as torch's attention gives it; q, k and v take
    the dtype that the cache keeps full precision in (over fp8 the autocast dtype): the cache is read as it
    is.

    Args:
        q: [batch, seqlen_q, heads, head_dim], float32, float16 or bfloat16, any strides. Head dims from 1 to
            256.
        k_cache, v_cache: [batch, max_len, kv_heads, head_dim] and [..., head_dim_v] in q's dtype or
            float8_e4m3fn; with a block_table pages [pages, page_size, kv_heads, head_dim], page_size a power
            of two. Any strides with a dense last dimension; heads is a multiple of kv_heads. Or k_cache is
            a `bitfuse.KVCache`, in any of its formats; then v_cache and block_table are its own.
        cache_seqlens: int32 [batch]: tokens that each sequence has before the call. A KVCache has its own,
            which grow by the new tokens.
        block_table: int32 [batch, max_pages], contiguous: the pages of each sequence, in order. Entries past
            the last page that is needed are not read; sequences may share pages that are not written to.
        k, v: [batch, new, kv_heads, head_dim] and [..., head_dim_v] of q's dtype: written to the cache at
            positions cache_seqlens[b], ..., and seen. None: the cache has all keys.
        rotary_cos, rotary_sin, rotary_interleaved: `bitfuse.rope` of q and k: [positions, rotary_dim / 2].
        positions: int32 [batch or 1, seqlen_q]: for rope, of queries and new keys (in a tree: the depth). By
            default the places in the sequence.
        tree_mask: bool [batch or 1, seqlen_q, seqlen_q]: which of the last seqlen_q keys each query sees, in
            place of causality (speculative verification); keys before those are all seen.
        causal: d <= 0 only.
        softmax_scale: head_dim ** -0.5 by default.
        window_size: (left, right): -left <= d <= right only; -1 is no bound.
        softcap: logits become softcap * tanh(logit / softcap); 0 is none.
        alibi_slopes: [heads] or [batch, heads]: -slope * |d| is added.
        sinks: [heads]: one more logit a head, that takes probability and gives no value.
        return_lse: return lse too.

    Returns:
        [batch, seqlen_q, heads, head_dim_v] of q's dtype; with return_lse also the natural log of the sum of
        exponentials (sinks included), float32 [batch, heads, seqlen_q].

    Raises:
        TypeError: a dtype or a type that is not listed.
        ValueError: sizes that do not fit, tensors on two devices; on the CPU (on a GPU with BITFUSE_CHECK=1
            in the environment, else such tokens are neither written nor read) also a cache that is full,
            naming the sequence, before anything is written; a page or a position that is not there.
    """
    if not isinstance(q, torch.Tensor):
        raise TypeError(f"q is a {type(q).__name__}, expected a tensor")
    for name, t in (("k", k), ("v", v)):
        if not (t is None or isinstance(t, torch.Tensor)):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor or None")
    cache, seqlens = as_cache(k_cache, v_cache, cache_seqlens, block_table)
    learnt: tuple[torch.Tensor, ...] = ()
    if recording():
        given = (q, k, v, rotary_cos, rotary_sin, alibi_slopes, sinks)
        learnt = tuple(t for t in given if isinstance(t, torch.Tensor))
        if recorded(*learnt):  # what the cache keeps has no history
            q = q.detach()
            k, v, rotary_cos, rotary_sin, alibi_slopes, sinks = (
                t.detach() if isinstance(t, torch.Tensor) else t for t in given[1:]
            )
    rotary = as_rotary(rotary_cos, rotary_sin, positions, rotary_interleaved)
    a = _args(q, tree_mask, causal, softmax_scale, window_size, softcap, alibi_slopes, sinks)
    dtype = None
    if autocast.is_any_enabled():
        dtype = autocast.dtype_of(q)
        q, k, v = of_cache(cache, q, k, v)
    own = k_cache if k is not None and isinstance(k_cache, KVCache) else None
    if own is not None and k is not None and own.gives_pages:
        decode_attention_op.check(q, k, v, cache, seqlens, rotary, a)
        own.before_new(k.shape[1], cache_seqlens)
    out, lse = decode_attention_op(q, k, v, cache, seqlens, rotary, a)
    if own is not None and k is not None and cache_seqlens is None:
        own.after_new(k.shape[1])
    if dtype is not None:
        out = out.to(dtype)
    if learnt:
        out, lse = without_gradient(_NO_GRADIENT, (out, lse), (*learnt, cache.k, cache.v))
    return (out, lse) if return_lse else out


def _explain(
    q: torch.Tensor,
    k_cache: torch.Tensor | KVCache,
    v_cache: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    **options: Any,
) -> Explanation:
    cache, seqlens = as_cache(k_cache, v_cache, cache_seqlens, block_table)
    defaults = inspect.signature(decode_attention).parameters
    given = {n: options.get(n, p.default) for n, p in defaults.items() if p.kind is p.KEYWORD_ONLY}
    rotary = as_rotary(
        given["rotary_cos"], given["rotary_sin"], given["positions"], given["rotary_interleaved"]
    )
    args = _args(q, *(given[n] for n in inspect.signature(_args).parameters if n != "q"))
    q, k, v = of_cache(cache, q, given["k"], given["v"])
    return decode_attention_op.explain(q, k, v, cache, seqlens, rotary, args)


declare(
    Declaration(
        decode_attention,
        "one query a sequence against a KV cache, full, paged or in few bits",
        place=4,
        explain=_explain,
        uses=(*CACHE, "heads"),
        arguments=lambda s, make: (make(s.batch, 1, s.heads, s.head_dim), example_cache(s, make)),
        parts=(
            Part(
                decode_attention_op,
                "over a `KVCache` (full precision, fp8, int8, int4; paged or not)",
                {"cuda": "fp16, bf16"},
            ),
        ),
        gradient=False,
        tuned=Tuned({"batch": (1, 8), "kv_len": LENGTHS, "cache": ("none", "int8")}),
    )
)

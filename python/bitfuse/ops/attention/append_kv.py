"""append_kv: new keys and values into a cache; KVCache: the tensors of one."""

from __future__ import annotations

from typing import Any

import torch

from ...core import autocast
from ...core.backends import Backend
from ...core.cost import Cost, moved
from ...core.declaration import CACHE, Declaration, Make, Part, Sizes, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...core.tensors import check_tensor
from ...kernels.attention import append_kv as triton
from ..linear.lowbit_linear import FLOATS
from . import append_kv_cpu as cpp
from .attention_args import MAX_HEAD_DIM
from .cache_sequences import CacheSequences
from .example import example_qkv
from .kv_cache import (
    BITS,
    CACHE_FORMATS,
    CHANNEL_STEP,
    DEFAULT_GROUPS,
    FP8,
    CacheTensors,
    Rotary,
    check_cache,
    check_places,
    check_rotary,
    check_sequence,
    default_channels,
    gather,
    head_dims,
    rotate,
    store,
    take,
)
from .pages import Pages
from .rope import CHECK_PLACES, as_rotary

CACHE_SCHEMA = (
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scales, Tensor(d!)? k_offsets, "
    "Tensor(e!)? v_scales, Tensor(f!)? v_offsets, Tensor(g!)? k_tail, Tensor(h!)? v_tail, "
    "Tensor? block_table, str format, int group_size, int channel_group, Tensor cache_seqlens, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? positions, bool interleaved"
)
_CACHE = len(CacheTensors._fields)
_ROTARY = len(Rotary._fields)


def unflatten_cache(flat: tuple[Any, ...]) -> tuple[CacheTensors, torch.Tensor, Rotary, tuple[Any, ...]]:
    """The arguments of CACHE_SCHEMA as objects, and those behind them."""
    rotary = _CACHE + 1
    rest = rotary + _ROTARY
    return CacheTensors(*flat[:_CACHE]), flat[_CACHE], Rotary(*flat[rotary:rest]), flat[rest:]


def written(cache: CacheTensors) -> tuple[torch.Tensor | None, ...]:
    """The tensors that new tokens are written to."""
    return cache[:2] if cache.k_tail is None else cache[:8]


def check_new(k: torch.Tensor, v: torch.Tensor, cache: CacheTensors, batch: int, tokens: int) -> None:
    """Raise TypeError or ValueError for new keys and values that the cache has no place for."""
    kv_heads = cache.k.shape[2]
    dim, dim_v = head_dims(cache)
    if cache.format in BITS and cache.k_tail is None:  # check_cache refuses it
        return
    dtypes = FLOATS if cache.format == "fp8" else ((cache.k if cache.k_tail is None else cache.k_tail).dtype,)
    shape = (batch, tokens, kv_heads)
    if k.shape != (*shape, dim) or k.dtype not in dtypes or k.device != cache.k.device or k.is_neg():
        check_tensor("k", k, dtypes, (*shape, dim), cache.k.device)
    if v.shape != (*shape, dim_v) or v.dtype is not k.dtype or v.device != cache.k.device or v.is_neg():
        check_tensor("v", v, (k.dtype,), (*shape, dim_v), cache.k.device)


def _check(
    k: torch.Tensor, v: torch.Tensor, cache: CacheTensors, cache_seqlens: torch.Tensor, rotary: Rotary
) -> None:
    if k.dim() != 4:
        raise ValueError(f"k has shape {list(k.shape)}, expected [batch, tokens, kv_heads, head_dim]")
    if k.dtype not in FLOATS:
        raise TypeError(f"k has dtype {k.dtype}, expected {' or '.join(map(str, FLOATS))}")
    batch, tokens = k.shape[:2]
    check_cache(cache, batch, k.dtype, k.device, cache_seqlens)
    check_new(k, v, cache, batch, tokens)
    check_rotary(rotary, batch, tokens, head_dims(cache)[0], k.device)
    if CHECK_PLACES and k.is_cuda:
        check_places(cache, cache_seqlens, 0, tokens, rotary)


def turned(x: torch.Tensor, rotary: Rotary, sequence: int, first: int) -> torch.Tensor:
    """x [tokens, heads, head_dim] of one sequence, whose first token is at position `first`, rotated."""
    if rotary.cos is None or rotary.sin is None:
        return x
    if rotary.positions is None:  # queries before the first token see nothing: any rotation will do
        at = torch.arange(first, first + x.shape[0], dtype=torch.int64, device=x.device).clamp(min=0)
    else:
        at = rotary.positions[sequence if rotary.positions.shape[0] > 1 else 0].long()
    return rotate(x, rotary.cos[at], rotary.sin[at], rotary.interleaved)


def _reference(
    k: torch.Tensor, v: torch.Tensor, cache: CacheTensors, cache_seqlens: torch.Tensor, rotary: Rotary
) -> None:
    """Token i of sequence b goes to position cache_seqlens[b] + i, its key rotated."""
    check_places(cache, cache_seqlens, 0, k.shape[1], rotary)
    for b, length in enumerate(cache_seqlens.tolist()):
        store(cache, b, length, turned(k[b], rotary, b, length), v[b])


def _fake(
    k: torch.Tensor, v: torch.Tensor, cache: CacheTensors, cache_seqlens: torch.Tensor, rotary: Rotary
) -> None:
    return None


def _unflatten(k: torch.Tensor, v: torch.Tensor, *flat: Any) -> tuple[Any, ...]:
    return k, v, *unflatten_cache(flat)[:3]


append_kv_op = Op(
    f"append_kv(Tensor k, Tensor v, {CACHE_SCHEMA}) -> ()",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
    cost=lambda k, v, *rest: Cost(2 * moved(k, v), 0, k.dtype),
    writes=lambda k, v, cache, *rest: written(cache),
    flatten=lambda k, v, cache, cache_seqlens, rotary: (k, v, *cache, cache_seqlens, *rotary),
    unflatten=_unflatten,
)


class KVCache(CacheSequences):
    """Keys and values of a batch of sequences in memory that is allocated once, contiguous or paged, in full
    or few bits. `bitfuse.decode_attention` takes it, and appends to it, in place of tensors.

    In "fp8" an element is e4m3 over its kv head's scale. "int8" and "int4" are KIVI's (Liu et al., 2024): K
    per channel in groups of tokens, V per token in groups of channels, and the tokens past the last whole
    group in full precision; kv_cache.py has the layout.

    Args:
        batch: sequences.
        max_len: tokens that each has room for; in a paged cache rounded up to whole pages.
        kv_heads, head_dim, head_dim_v: sizes; head_dim_v is head_dim by default. Codes want multiples of 8.
        dtype: float32, float16 or bfloat16: of queries and, in format "none", of the cache.
        format: "none", "fp8", "int8" or "int4".
        group_size: int8, int4: tokens that share K's scales, a power of two; 64 for int8 and 32 for int4 by
            default, and never more than a page.
        channel_group: int8, int4: channels that share V's scales, a multiple of 32; by default 32 for int4,
            the whole head for int8.
        page_size: tokens of a page, a power of two; None for a contiguous cache.
        pages: of a paged cache, for all sequences together. None: as many as the batch can fill, all given
            out, in order. A number: nothing is given out, entries of `block_table` without a page are -1, and
            a token without a page is refused on the CPU, and neither written nor read on a GPU. Pages are
            then given out as below, unless you write your own `block_table`, which ends that.
        k_scale, v_scale: fp8: float32 [kv_heads]; 1 by default.
        device: of all tensors.

    Attributes:
        tensors: what the ops take.
        seqlens: int32 [batch]: tokens of each sequence. Lower it to take back the last tokens, by group_size
            at most where codes are kept.
        block_table: int32 [batch, max_pages], or None; -1 where there is no page.

    With `pages` given, pages are handed out and shared as in vLLM (Kwon et al., 2023), by lists on the host.
    `append`, and decode_attention with new keys, give each sequence the pages that it lacks, and copy a page
    that others share before writing to it; they raise ValueError, having done nothing, where too few are
    free. `allocate` does so beforehand, `free` and `truncate` give pages back, `fork` and `reorder` share
    them.

    None of them waits for a GPU: the lengths are counted on the host too. Only where you have written to
    `seqlens` yourself they are read back, once. Inside torch.compile and in a CUDA graph nothing is given out
    and nothing copied, for this host code does not run: `allocate` the length to come before each step. After
    replays of a graph, which move seqlens unseen, call `refresh` before anything else from Python.

    Raises:
        TypeError, ValueError: a dtype or a size that does not fit.
    """

    def __init__(
        self,
        batch: int,
        max_len: int,
        kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        format: str = "none",
        group_size: int | None = None,
        channel_group: int | None = None,
        page_size: int | None = None,
        pages: int | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        for name, integer in (
            ("batch", batch), ("max_len", max_len), ("kv_heads", kv_heads), ("head_dim", head_dim),
            ("head_dim_v", head_dim_v), ("group_size", group_size), ("channel_group", channel_group),
            ("page_size", page_size), ("pages", pages),
        ):  # fmt: skip
            if not hasattr(integer, "__index__") and integer is not None:
                raise TypeError(f"{name} is {integer!r}, expected an int")
        if format not in CACHE_FORMATS:
            raise ValueError(f"format is {format!r}, expected one of {', '.join(map(repr, CACHE_FORMATS))}")
        if dtype not in FLOATS:
            raise TypeError(f"dtype is {dtype}, expected {' or '.join(map(str, FLOATS))}")
        for name, size, most in (
            ("batch", batch, None),
            ("max_len", max_len, None),
            ("kv_heads", kv_heads, None),
            ("head_dim", head_dim, MAX_HEAD_DIM),
            ("head_dim_v", head_dim_v, MAX_HEAD_DIM),
            ("pages", 0 if pages is None else pages, None),
        ):
            least = 0 if name in ("batch", "max_len", "pages") else 1
            if size < least or (most is not None and size > most):
                raise ValueError(
                    f"{name} is {size}, expected {least}" + (" or more" if most is None else f" to {most}")
                )
            if format in BITS and most is not None and size % 8:
                raise ValueError(f"{name} is {size}, expected a multiple of 8 for {format}")
        group_size = DEFAULT_GROUPS.get(format, 1) if group_size is None else group_size
        for name, power in (("page_size", page_size), ("group_size", group_size)):
            if power is not None and (power < 1 or power & (power - 1)):
                raise ValueError(f"{name} is {power}, expected a power of two")
        if channel_group is not None and (channel_group < CHANNEL_STEP or channel_group % CHANNEL_STEP):
            raise ValueError(f"channel_group is {channel_group}, expected a multiple of {CHANNEL_STEP}")
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is not None:
                if not isinstance(scale, torch.Tensor):
                    raise TypeError(f"{name} is a {type(scale).__name__}, expected a tensor or None")
                if format != "fp8":
                    raise ValueError(f"{name} is given, which a cache of format {format!r} has no place for")
                check_tensor(name, scale, (torch.float32,), (kv_heads,), scale.device)
        if page_size is None:
            if pages is not None:
                raise ValueError(f"pages is {pages} without a page_size")
            size = group_size if format in BITS else 1
            rows, room = batch, -(-max_len // size) * size
        else:
            each = -(-max_len // page_size)
            rows, room = batch * each if pages is None else pages, page_size
            group_size = min(group_size, page_size)
        bits = BITS.get(format)
        stored = dtype if format == "none" else FP8 if bits is None else torch.uint8
        sizes = [dim if bits is None else dim * bits // 8 for dim in (head_dim, head_dim_v)]
        channels = default_channels(format, head_dim_v) if channel_group is None else channel_group
        with torch.inference_mode(False):  # tensors that may be written in it and outside of it
            k, v = (torch.zeros(rows, room, kv_heads, s, dtype=stored, device=device) for s in sizes)
            self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
            self._pages = None
            table = None
            if page_size is not None:
                each = -(-max_len // page_size)
                table = torch.arange(batch * each, dtype=torch.int32, device=device).view(batch, each)
                if pages is not None:
                    self._pages = Pages(pages, page_size, batch, each)
                    table.fill_(-1)
            self.block_table = table
            if bits is None:
                scales = [None if s is None else s.to(k.device) for s in (k_scale, v_scale)]
                self.tensors = CacheTensors(k, v, scales[0], None, scales[1], None, None, None, table, format)
            else:
                of_k = (rows, room // group_size, kv_heads, head_dim)
                of_v = (rows, room, kv_heads, -(-head_dim_v // channels))
                k_tail, v_tail = (
                    torch.zeros(batch, 2 * group_size, kv_heads, dim, dtype=dtype, device=device)
                    for dim in (head_dim, head_dim_v)
                )
                scales_k, offsets_k = (
                    torch.zeros(of_k, dtype=torch.float16, device=device) for _ in range(2)
                )
                scales_v, offsets_v = (
                    torch.zeros(of_v, dtype=torch.float16, device=device) for _ in range(2)
                )
                self.tensors = CacheTensors(
                    k, v, scales_k, offsets_k, scales_v, offsets_v, k_tail, v_tail, table, format, group_size,
                    channels,
                )  # fmt: skip
        self._begin()

    @property
    def format(self) -> str:
        return self.tensors.format

    @property
    def capacity(self) -> int:
        """Tokens that a sequence has room for."""
        return self.tensors.capacity

    @property
    def nbytes(self) -> int:
        """Of all tensors: codes, scales, tails, lengths and the block table."""
        return self.seqlens.nbytes + sum(t.nbytes for t in self.tensors if isinstance(t, torch.Tensor))

    def keep_path(self, path: torch.Tensor, accepted: torch.Tensor) -> None:
        """Of each sequence's last tokens, which were the nodes of a tree, keep those on a path, one after the
        other, and take the rest back: what follows `bitfuse.speculative_sample_tree`. Nothing waits for the
        device; where pages are given out the next call from Python does, once, for the lengths.

        Args:
            path: int64 [batch, nodes]: which nodes, in growing order, then -1; the cache has the nodes as its
                last tokens. accepted: int64 [batch]: how many they are. Both as speculative_sample_tree
                returns them.

        Raises:
            ValueError: sizes that do not fit, a cache of codes and more nodes than group_size.
        """
        batch, tensors = len(self.seqlens), self.tensors
        nodes = path.shape[1] if path.dim() == 2 else -1
        check_tensor("path", path, (torch.int64,), (batch, nodes), self.seqlens.device)
        check_tensor("accepted", accepted, (torch.int64,), (batch,), self.seqlens.device)
        if self.format in BITS and nodes > tensors.group_size:
            raise ValueError(f"path has {nodes} nodes, expected at most {tensors.group_size}, a group")
        if not nodes or not batch:
            return
        begin = self.seqlens - nodes
        own = torch.arange(nodes, dtype=torch.int64, device=path.device)
        k, v = take(tensors, begin.unsqueeze(1) + torch.where((path < 0) | (path >= nodes), own, path))
        append_kv_op(k, v, tensors, begin, Rotary())
        self.seqlens.copy_(begin + accepted.clamp(0, nodes))

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        rotary_cos: torch.Tensor | None = None,
        rotary_sin: torch.Tensor | None = None,
        rotary_interleaved: bool = False,
        positions: torch.Tensor | None = None,
    ) -> None:
        """`append_kv` at seqlens, which grow by the tokens of k."""
        append_kv(
            k, v, self, rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved,
            positions=positions,
        )  # fmt: skip

    def gather(self, sequence: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence as plain tensors [length, kv_heads, head_dim], dequantised; float32
        by default. Waits for the device.

        Raises:
            ValueError: seqlens has a length that the cache has no room, or a sequence no page for.
        """
        if not -len(self.seqlens) <= sequence < len(self.seqlens):
            raise ValueError(f"sequence is {sequence}, expected 0 to {len(self.seqlens) - 1}")
        length = int(self.seqlens[sequence])
        check_sequence(self.tensors, range(len(self.seqlens))[sequence], length, 0)
        return gather(self.tensors, sequence, length, torch.float32 if dtype is None else dtype)

    def __repr__(self) -> str:
        where = "contiguous" if self.block_table is None else f"pages of {self.tensors.k.shape[1]}"
        return (
            f"KVCache({self.format}, {len(self.seqlens)} x {self.capacity} tokens, {where}, {self.nbytes} B)"
        )


def as_cache(
    k_cache: torch.Tensor | KVCache,
    v_cache: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> tuple[CacheTensors, torch.Tensor]:
    """The tensors of a cache and its lengths, from what a public function is given."""
    if isinstance(k_cache, KVCache):
        if v_cache is not None or block_table is not None:
            raise ValueError("v_cache or block_table is given beside a KVCache, which has its own")
        return k_cache.tensors, k_cache.seqlens if cache_seqlens is None else cache_seqlens
    if not isinstance(k_cache, torch.Tensor) or not isinstance(v_cache, torch.Tensor):
        raise TypeError(
            f"k_cache is a {type(k_cache).__name__} and v_cache a {type(v_cache).__name__}, expected tensors "
            "or a KVCache"
        )
    if not isinstance(cache_seqlens, torch.Tensor):
        raise TypeError(f"cache_seqlens is a {type(cache_seqlens).__name__}, expected a tensor")
    if block_table is not None and not isinstance(block_table, torch.Tensor):
        raise TypeError(f"block_table is a {type(block_table).__name__}, expected a tensor or None")
    format = "fp8" if k_cache.dtype is FP8 else "none"
    none = None
    return (
        CacheTensors(k_cache, v_cache, none, none, none, none, none, none, block_table, format),
        cache_seqlens,
    )


def of_cache(cache: CacheTensors, *tensors: Any) -> tuple[Any, ...]:
    """Under autocast queries, keys and values in the dtype that the cache keeps full precision in; over fp8
    in the autocast dtype."""
    dtype = autocast.dtype_of(tensors[0]) if autocast.is_any_enabled() else None
    if dtype is None:
        return tensors
    if cache.format != "fp8":
        dtype = (cache.k if cache.k_tail is None else cache.k_tail).dtype
    return tuple(autocast.cast(t, dtype) for t in tensors)


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor | KVCache,
    v_cache: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    *,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    positions: torch.Tensor | None = None,
) -> None:
    """Write keys and values at positions cache_seqlens[b], cache_seqlens[b] + 1, ... of each sequence of a
    cache, in place: rotated, quantised, into pages, in one pass.

    On the CPU a cache that is full, or a page that is not there, is refused before anything is written; on a
    GPU, where the host does not look, such tokens are left out, unless the environment has BITFUSE_CHECK=1.
    No gradient flows through a cache. Under `torch.autocast` k and v take the cache's dtype.

    Args:
        k, v: [batch, tokens, kv_heads, head_dim] and [..., head_dim_v], of the cache's dtype (fp8: any
        float). k_cache, v_cache: [batch, max_len, kv_heads, head_dim] and [..., head_dim_v], or with a
            block_table pages [pages, page_size, kv_heads, head_dim], any strides with a dense last dimension;
            float8_e4m3fn for an fp8 cache with scales of 1. Or k_cache is a `KVCache`, whose seqlens grow.
        cache_seqlens: int32 [batch]: tokens that each sequence has before. Not changed.
        block_table: int32 [batch, max_pages], contiguous: the pages of each sequence in order.
        rotary_cos, rotary_sin, rotary_interleaved: `bitfuse.rope` of k.
        positions: int32 [batch or 1, tokens]: for rope; by default where the tokens are written.

    Raises:
        TypeError: a dtype or a type that is not listed.
        ValueError: sizes that do not fit, tensors on two devices, a cache that is full, a page or a position
            that is not there.
    """
    for name, t in (("k", k), ("v", v)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor")
    cache, seqlens = as_cache(k_cache, v_cache, cache_seqlens, block_table)
    rotary = as_rotary(rotary_cos, rotary_sin, positions, rotary_interleaved)
    k, v = k.detach(), v.detach()
    if autocast.is_any_enabled():
        k, v = of_cache(cache, k, v)
    own = k_cache if isinstance(k_cache, KVCache) else None
    if own is not None and own.gives_pages:
        append_kv_op.check(k, v, cache, seqlens, rotary)
        own.before_new(k.shape[1], cache_seqlens)
    append_kv_op(k, v, cache, seqlens, rotary)
    if own is not None and cache_seqlens is None:
        own.after_new(k.shape[1])


def _explain(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor | KVCache,
    v_cache: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    **options: Any,
) -> Explanation:
    cache, seqlens = as_cache(k_cache, v_cache, cache_seqlens, block_table)
    rotary = as_rotary(
        options.get("rotary_cos"), options.get("rotary_sin"), options.get("positions"),
        options.get("rotary_interleaved", False),
    )  # fmt: skip
    return append_kv_op.explain(*of_cache(cache, k, v), cache, seqlens, rotary)


def example_cache(s: Sizes, make: Make) -> KVCache:
    """A cache from sizes alone, for calls that nobody makes."""
    return KVCache(
        s.batch, s.kv_len, s.kv_heads, s.head_dim,
        dtype=s.dtype, format=s.cache, page_size=s.page_size, device=make(0).device,
    )  # fmt: skip


declare(
    Declaration(
        append_kv,
        "new keys, rotated, and values into a KV cache",
        place=5,
        explain=_explain,
        uses=(*CACHE, "seqlen"),
        arguments=lambda s, make: (*example_qkv(s, make, s.seqlen)[1:], example_cache(s, make)),
        parts=(Part(append_kv_op),),
        classes=(KVCache,),
        gradient=False,
    )
)

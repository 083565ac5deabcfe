"""How a cache of keys and values lies in memory and what its codes mean: what decode_attention, append_kv and
their backends share.

The token at position p of sequence b lies in row (page, slot): (b, p) of a contiguous cache, and
(block_table[b, p // page_size], p % page_size) of a paged one. Formats:

    none    elements of the queries' dtype
    fp8     e4m3; value = element * scale of the kv head (1 where there are no scales)
    int8    value = code * scale + offset, codes 0 to 255 in one byte (KIVI: Liu et al., 2024)
    int4    the same, codes 0 to 15, channel 2 i in the low half of byte i

In int8 and int4, scales and offsets are float16: for K one of each a channel and group of `group_size` tokens
of a page; for V one a token and group of `channel_group` channels (the last group may be short). The tokens
of a sequence past its last whole group are not codes yet: position p of sequence b is row p % (2 *
group_size) of the tail, in full precision. The tail holds two groups, so that tokens which speculation
rejects can be taken back: lowering a length by group_size or less loses nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...core.tensors import as_rows, check_tensor
from ...weights.packing import pack, packed_width, unpack

CACHE_FORMATS = ("none", "fp8", "int8", "int4")
BITS = {"int8": 8, "int4": 4}
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
HALF_LARGEST = 65504.0
CHANNEL_STEP = 32  # channel_group is a multiple of it
# tokens; of 4 bits a range of fewer numbers is worth more
DEFAULT_GROUPS = {"int8": 64, "int4": 32}


def default_channels(format: str, head_dim_v: int) -> int:
    """Channels of V that share scales."""
    return -(-head_dim_v // CHANNEL_STEP) * CHANNEL_STEP if format == "int8" else CHANNEL_STEP


class CacheTensors(NamedTuple):
    """A cache, as the ops and their backends take it.

    Attributes:
        k: [batch or pages, max_len or page_size, kv_heads, head_dim] in the queries' dtype or float8_e4m3fn;
            codes: uint8 [..., head_dim * bits / 8]. Any strides, the last dimension dense.
        v: the same with head_dim_v.
        k_scales, k_offsets: int8, int4: float16 [pages, page_size / group_size, kv_heads, head_dim]; fp8:
            k_scales float32 [kv_heads], or None for 1. Contiguous.
        v_scales, v_offsets: int8, int4: float16 [pages, page_size, kv_heads, ceil(head_dim_v /
            channel_group)]; fp8: as k_scales. Contiguous.
        k_tail, v_tail: int8, int4: [batch, 2 * group_size, kv_heads, head_dim] in the queries' dtype.
            Contiguous.
        block_table: int32 [batch, max_pages], contiguous; None: one row of k is one sequence. Entries past a
            sequence's last page are not read.
        format: of CACHE_FORMATS.
        group_size: int8, int4: tokens that share K's scales, a power of two that divides a page.
        channel_group: int8, int4: channels that share V's scales, a multiple of 32.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor | None = None
    k_offsets: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None
    v_offsets: torch.Tensor | None = None
    k_tail: torch.Tensor | None = None
    v_tail: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    format: str = "none"
    group_size: int = 0
    channel_group: int = 0

    @property
    def head_dim(self) -> int:
        return head_dims(self)[0]

    @property
    def head_dim_v(self) -> int:
        return head_dims(self)[1]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence has room for."""
        return self.k.shape[1] * (1 if self.block_table is None else self.block_table.shape[1])


def head_dims(cache: CacheTensors) -> tuple[int, int]:
    """Of K and of V: a function, as before torch 2.11 torch.compile reads no property of a NamedTuple."""
    k = cache.k if cache.k_tail is None else cache.k_tail
    v = cache.v if cache.v_tail is None else cache.v_tail
    return k.shape[-1], v.shape[-1]


class Rotary(NamedTuple):
    """Rotary position embedding, applied to queries and to new keys.

    Attributes:
        cos, sin: [positions, rotary_dim / 2], one float dtype; None for no rotation. Channels past
            rotary_dim are left as they are.
        positions: int32 [batch or 1, tokens]: of queries and new keys. None: a token's place in its
            sequence.
        interleaved: channel pairs are (2 i, 2 i + 1), not (i, i + rotary_dim / 2).
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    interleaved: bool = False


class DecodeArgs(NamedTuple):
    """How queries meet the keys of a cache.

    Query i of seqlen_q and the key at position j stand at distance d = j - (i + length - seqlen_q), length
    being the sequence's with its new tokens: the last query is aligned with the last key. The key is seen
    when -left <= d <= right, a negative left or right meaning no bound. Its logit is

        z = cap(softmax_scale * q_i . k_j) - alibi_slopes * |d|,   cap(z) = softcap * tanh(z / softcap)

    Attributes:
        softmax_scale: of q k^T.
        left, right: the window; -1 for no bound.
        softcap: 0 for none.
        tree_mask: bool [batch or 1, seqlen_q, seqlen_q]: which of a sequence's last seqlen_q keys each query
            may see; None for all that the window has.
        alibi_slopes: float32 [heads] or [batch, heads].
        sinks: float32 [heads]: one more logit each, with no value.
    """

    softmax_scale: float
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    tree_mask: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


# rotary embedding


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool = False
) -> torch.Tensor:
    """Each pair (a, b) of x's first channels becomes (a cos - b sin, b cos + a sin), in float32 (float64 for
    float64) and rounded once; `inverse` turns back.

    Args:
        x: [..., tokens, heads, head_dim].
        cos, sin: [..., tokens, rotary_dim / 2]: of each token's position.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = cos.shape[-1]
    c, s = cos.to(work).unsqueeze(-2), sin.to(work).unsqueeze(-2)
    if inverse:
        s = -s
    turned = x[..., : 2 * half].to(work)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        pairs = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((pairs.to(x.dtype), x[..., 2 * half :]), -1)


# codes


def quantize_groups(x: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (uint8, of x's shape), and the scale and offset (float16) of each group, which is all of
    dimension `dim`: offset = min, scale = (max - min) / (2^bits - 1), both rounded to float16, then

        code = round((x - offset) * (1 / scale)), ties to even, clamped to 0 and 2^bits - 1

    in float32. Offsets and scales saturate at float16's largest. A group that holds a NaN or an infinity has
    NaN as offset and scale.
    """
    x = x.float()
    lo, hi = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    bad = ~(torch.isfinite(lo) & torch.isfinite(hi))
    levels = 2**bits - 1
    offset = lo.clamp(-HALF_LARGEST, HALF_LARGEST).half()
    scale = ((hi - offset.float()) / levels).clamp(0, HALF_LARGEST).half()
    inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
    codes = ((x - offset.float()) * inverse).round().clamp(0, levels)
    codes = codes.masked_fill(bad, 0).to(torch.uint8)
    scale, offset = (t.masked_fill(bad, float("nan")).squeeze(dim) for t in (scale, offset))
    return codes, scale, offset


def quantize_keys(k: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K per channel: [..., group_size, kv_heads, head_dim] to packed codes, scales and offsets [...,
    kv_heads, head_dim]."""
    codes, scales, offsets = quantize_groups(k, -3, bits)
    return packed(codes, bits), scales, offsets


def quantize_values(
    v: torch.Tensor, bits: int, channel_group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V per token: [..., head_dim_v] to packed codes, scales and offsets [..., groups]."""
    dim = v.shape[-1]
    groups = -(-dim // channel_group)
    # the last group, if short, is filled with its last channel, which moves neither its min nor its max
    channels = torch.arange(groups * channel_group, dtype=torch.int64, device=v.device).clamp(max=dim - 1)
    whole = v[..., channels].unflatten(-1, (groups, channel_group))
    codes, scales, offsets = quantize_groups(whole, -1, bits)
    return packed(codes.flatten(-2)[..., :dim], bits), scales, offsets


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return pack(as_rows(codes), bits).view(*codes.shape[:-1], packed_width(codes.shape[-1], bits))


def unpacked(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return unpack(as_rows(codes), bits).view(*codes.shape[:-1], codes.shape[-1] * 8 // bits)


def to_fp8(x: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """x [..., kv_heads, head_dim] over its head's scale, saturated, to nearest; NaN stays NaN."""
    x = x.float()
    if scales is not None:
        x = x / scales.unsqueeze(-1)
    return x.clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)


def from_fp8(x: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    work = torch.float64 if dtype == torch.float64 else torch.float32
    x = x.to(work)
    return (x if scales is None else x * scales.to(work).unsqueeze(-1)).to(dtype)


def head_scales(x: torch.Tensor) -> torch.Tensor:
    """Of each kv head: largest magnitude / 448, or 1 where that is 0."""
    if not x.shape[0] * x.shape[1] * x.shape[3]:
        return torch.ones(x.shape[2], dtype=torch.float32, device=x.device)
    scales = x.abs().amax((0, 1, 3)).float() / FP8_LARGEST
    return scales.masked_fill(scales == 0, 1)


# one sequence of a cache


def rows_of(cache: CacheTensors, sequence: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages and slots of positions begin to end, int64."""
    positions = torch.arange(begin, end, dtype=torch.int64, device=cache.k.device)
    if cache.block_table is None:
        return torch.full_like(positions, sequence), positions
    size = cache.k.shape[1]
    return cache.block_table[sequence].long()[positions // size], positions % size


def bytes_of(t: torch.Tensor) -> torch.Tensor:
    """e4m3, which few of torch's functions index, as bytes."""
    return t.view(torch.uint8) if t.dtype == FP8 else t


def gather(
    cache: CacheTensors, sequence: int, length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a sequence's first `length` tokens, dequantised in float32 (float64 for float64) and rounded
    to dtype: [length, kv_heads, head_dim] and [..., head_dim_v]."""
    page, slot = rows_of(cache, sequence, 0, length)
    k, v = bytes_of(cache.k)[page, slot], bytes_of(cache.v)[page, slot]
    if cache.format == "none":
        return k.to(dtype), v.to(dtype)
    if cache.format == "fp8":
        return from_fp8(k.view(FP8), cache.k_scales, dtype), from_fp8(v.view(FP8), cache.v_scales, dtype)
    parts = (cache.k_scales, cache.k_offsets, cache.v_scales, cache.v_offsets, cache.k_tail, cache.v_tail)
    k_scales, k_offsets, v_scales, v_offsets, k_tail, v_tail = parts
    assert k_scales is not None and k_offsets is not None and v_scales is not None
    assert v_offsets is not None and k_tail is not None and v_tail is not None
    work = torch.float64 if dtype == torch.float64 else torch.float32
    bits, group = BITS[cache.format], slot // cache.group_size
    k = unpacked(k, bits).to(work) * k_scales[page, group].to(work) + k_offsets[page, group].to(work)
    dim_v = v_tail.shape[-1]
    of_channel = torch.arange(dim_v, dtype=torch.int64, device=v.device) // cache.channel_group
    v = unpacked(v, bits).to(work) * v_scales[page, slot].to(work)[..., of_channel]
    v = v + v_offsets[page, slot].to(work)[..., of_channel]
    whole = length // cache.group_size * cache.group_size
    late = torch.arange(whole, length, dtype=torch.int64, device=k.device) % (2 * cache.group_size)
    k[whole:], v[whole:] = k_tail[sequence, late].to(work), v_tail[sequence, late].to(work)
    return k.to(dtype), v.to(dtype)


def take(cache: CacheTensors, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values at positions [batch, tokens] of each sequence, as they were given; of a cache of codes
    they are in the tail. [batch, tokens, kv_heads, head_dim] and [..., head_dim_v]; fp8 in float32."""
    at = positions.long().clamp(min=0)
    sequence = torch.arange(at.shape[0], dtype=torch.int64, device=at.device).unsqueeze(1)
    if cache.k_tail is not None and cache.v_tail is not None:
        late = at % (2 * cache.group_size)
        return cache.k_tail[sequence, late], cache.v_tail[sequence, late]
    page, slot = sequence, at
    if cache.block_table is not None:
        size = cache.k.shape[1]
        page, slot = cache.block_table.long().gather(1, at // size), at % size
    k, v = bytes_of(cache.k)[page, slot], bytes_of(cache.v)[page, slot]
    if cache.format == "fp8":
        work = torch.float32
        return from_fp8(k.view(FP8), cache.k_scales, work), from_fp8(v.view(FP8), cache.v_scales, work)
    return k, v


def store(cache: CacheTensors, sequence: int, begin: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write new keys and values [tokens, kv_heads, head_dim] at positions begin, begin + 1, ...: groups that
    become whole as codes, the last two groups into the tail too."""
    end = begin + k.shape[0]
    if cache.format not in BITS:
        page, slot = rows_of(cache, sequence, begin, end)
        if cache.format == "fp8":
            k, v = to_fp8(k, cache.k_scales), to_fp8(v, cache.v_scales)
        bytes_of(cache.k)[page, slot], bytes_of(cache.v)[page, slot] = bytes_of(k), bytes_of(v)
        return
    parts = (cache.k_scales, cache.k_offsets, cache.v_scales, cache.v_offsets, cache.k_tail, cache.v_tail)
    k_scales, k_offsets, v_scales, v_offsets, k_tail, v_tail = parts
    assert k_scales is not None and k_offsets is not None and v_scales is not None
    assert v_offsets is not None and k_tail is not None and v_tail is not None
    size, bits = cache.group_size, BITS[cache.format]
    first, whole = begin // size * size, end // size * size
    device = k.device
    if whole > first:
        begun = torch.arange(first, begin, dtype=torch.int64, device=device) % (2 * size)
        k_whole = torch.cat([k_tail[sequence, begun], k])[: whole - first].unflatten(0, (-1, size))
        v_whole = torch.cat([v_tail[sequence, begun], v])[: whole - first]
        page, slot = rows_of(cache, sequence, first, whole)
        codes, scales, offsets = quantize_keys(k_whole, bits)
        cache.k[page, slot] = codes.flatten(0, 1)
        k_scales[page[::size], slot[::size] // size] = scales
        k_offsets[page[::size], slot[::size] // size] = offsets
        cache.v[page, slot], v_scales[page, slot], v_offsets[page, slot] = quantize_values(
            v_whole, bits, cache.channel_group
        )
    kept = max(begin, whole - size)
    late = torch.arange(kept, end, dtype=torch.int64, device=device) % (2 * size)
    k_tail[sequence, late], v_tail[sequence, late] = k[kept - begin :], v[kept - begin :]


# checks


def check_cache(
    cache: CacheTensors, batch: int, dtype: torch.dtype, device: torch.device, cache_seqlens: object
) -> None:
    """What native code relies on, of the tensors' types and shapes. Their values: `check_places`.

    Raises:
        TypeError, ValueError: naming the tensor, what it is and what was expected.
    """
    k, v, table = cache.k, cache.v, cache.block_table
    if cache.format not in CACHE_FORMATS:
        raise ValueError(f"format is {cache.format!r}, expected one of {', '.join(map(repr, CACHE_FORMATS))}")
    if not isinstance(k, torch.Tensor) or not isinstance(v, torch.Tensor):
        raise TypeError(
            f"k_cache is a {type(k).__name__} and v_cache a {type(v).__name__}, expected tensors or a KVCache"
        )
    bits = BITS.get(cache.format)
    stored = dtype if cache.format == "none" else FP8 if bits is None else torch.uint8
    shape = k.shape
    if len(shape) != 4 or k.dtype is not stored or k.device != device or shape[2] == 0 or k.is_neg():
        sizes = (*shape[:2], max(1, shape[2]), shape[3]) if len(shape) == 4 else (-1,) * 4
        check_tensor("k_cache", k, (stored,), sizes, device)
    if v.shape[:-1] != shape[:-1] or v.dtype is not stored or v.device != device or v.is_neg():
        check_tensor("v_cache", v, (stored,), (*shape[:-1], v.shape[-1] if v.dim() else 0), device)
    for name, t in (("k_cache", k), ("v_cache", v)):
        if t.stride(-1) != 1 and t.shape[-1] != 1:
            raise ValueError(f"{name} has strides {t.stride()}, expected a dense last dimension")
    if table is None:
        if shape[0] != batch:
            raise ValueError(
                f"k_cache has shape {list(shape)}, expected {batch} sequences, as q has, or a block_table"
            )
    else:
        if table.dim() != 2 or table.dtype != torch.int32 or table.shape[0] != batch:
            pages = table.shape[1] if table.dim() == 2 else -1
            check_tensor("block_table", table, (torch.int32,), (batch, pages), device)
        if table.device != device or not table.is_contiguous():
            raise ValueError(
                f"block_table is on {table.device} with strides {table.stride()}, expected a contiguous "
                f"tensor on {device}"
            )
        if (shape[1] & (shape[1] - 1) and table.shape[1] > 1) or shape[1] == 0:
            raise ValueError(f"k_cache has pages of {shape[1]} tokens, expected a power of two")
    if (
        not isinstance(cache_seqlens, torch.Tensor)
        or cache_seqlens.dtype != torch.int32
        or cache_seqlens.shape != (batch,)
        or cache_seqlens.device != device
    ):
        check_tensor("cache_seqlens", cache_seqlens, (torch.int32,), (batch,), device)
    if bits is not None:
        _check_codes(cache, batch, bits, dtype, device)
        return
    heads = (shape[2],)
    for name, scales in (("k_scales", cache.k_scales), ("v_scales", cache.v_scales)):
        if scales is not None and cache.format == "none":
            raise ValueError(f"{name} is given, which a cache of format 'none' has no place for")
        if scales is not None:
            check_tensor(name, scales, (torch.float32,), heads, device)


def _check_codes(
    cache: CacheTensors, batch: int, bits: int, dtype: torch.dtype, device: torch.device
) -> None:
    pages, page_size, kv_heads, width = cache.k.shape
    size, channels = cache.group_size, cache.channel_group
    if size < 1 or size & (size - 1) or page_size % size:
        raise ValueError(
            f"group_size is {size}, expected a power of two that divides the {page_size} tokens of a page"
        )
    if channels < CHANNEL_STEP or channels % CHANNEL_STEP:
        raise ValueError(f"channel_group is {channels}, expected a multiple of {CHANNEL_STEP}")
    dim, dim_v = width * 8 // bits, cache.v.shape[-1] * 8 // bits
    half = (torch.float16,)
    of_k = (pages, page_size // size, kv_heads, dim)
    of_v = (pages, page_size, kv_heads, -(-dim_v // channels))
    for name, t, dtypes, shape in (
        ("k_scales", cache.k_scales, half, of_k),
        ("k_offsets", cache.k_offsets, half, of_k),
        ("v_scales", cache.v_scales, half, of_v),
        ("v_offsets", cache.v_offsets, half, of_v),
        ("k_tail", cache.k_tail, (dtype,), (batch, 2 * size, kv_heads, dim)),
        ("v_tail", cache.v_tail, (dtype,), (batch, 2 * size, kv_heads, dim_v)),
    ):
        if t is None or t.dtype not in dtypes or t.shape != shape or t.device != device:
            check_tensor(name, t, dtypes, shape, device)
        assert t is not None
        if not t.is_contiguous():
            raise ValueError(f"{name} has strides {t.stride()}, expected a contiguous tensor")


def check_rotary(rotary: Rotary, batch: int, tokens: int, dim: int, device: torch.device) -> None:
    """Raise TypeError or ValueError for cos, sin or positions that do not fit."""
    cos, sin, positions = rotary.cos, rotary.sin, rotary.positions
    if cos is None or sin is None:
        if cos is not None or sin is not None or positions is not None:
            raise ValueError(
                "rotary_cos, rotary_sin and positions: expected both of the first, or none of them"
            )
        return
    floats = (torch.float32, torch.float16, torch.bfloat16)
    if cos.dim() != 2 or not 1 <= 2 * cos.shape[1] <= dim:
        raise ValueError(
            f"rotary_cos has shape {list(cos.shape)}, expected [positions, rotary_dim / 2] with rotary_dim "
            f"2 to {dim}"
        )
    check_tensor("rotary_cos", cos, floats, tuple(cos.shape), device)
    check_tensor("rotary_sin", sin, (cos.dtype,), tuple(cos.shape), device)
    if positions is not None:
        rows = positions.shape[0] if positions.dim() == 2 else -1
        shape = (rows if rows == 1 else batch, tokens)
        check_tensor("positions", positions, (torch.int32,), shape, device)


def check_sequence(cache: CacheTensors, b: int, length: int, new: int) -> None:
    """Raise ValueError where a sequence of this length, with new tokens behind it, has no room or lacks a
    page. Waits for the device."""
    page_size, pages, capacity = cache.k.shape[1], cache.k.shape[0], cache.capacity
    total = length + new
    if length < 0:
        raise ValueError(f"cache_seqlens[{b}] is {length}, expected 0 or more")
    if new > capacity:
        raise ValueError(f"{new} new tokens do not fit: sequence {b} has room for {capacity}")
    if total > capacity:
        why = f", and {new} new tokens do not fit: the cache of sequence {b} is full" if new else ""
        raise ValueError(f"cache_seqlens[{b}] is {length}, expected at most {capacity - new}{why}")
    if cache.block_table is None:
        return
    for i, page in enumerate(cache.block_table[b, : -(-total // page_size)].tolist()):
        if not 0 <= page < pages:
            why = f": sequence {b} has no page there, KVCache.allocate gives one" if page == -1 else ""
            raise ValueError(f"block_table[{b}, {i}] is {page}, expected 0 to {pages - 1}{why}")


def check_places(
    cache: CacheTensors, cache_seqlens: torch.Tensor, queries: int, new: int, rotary: Rotary
) -> None:
    """Raise ValueError where a length, a page or a position lies outside: a cache that is full names its
    sequence. Waits for the device.

    Args:
        queries, new: queries and new tokens of each sequence.
    """
    for b, length in enumerate(cache_seqlens.tolist()):
        check_sequence(cache, b, length, new)
        total = length + new
        if rotary.cos is None:
            continue
        rows = rotary.cos.shape[0]
        if rotary.positions is not None:
            for p in rotary.positions[b if rotary.positions.shape[0] > 1 else 0].tolist():
                if not 0 <= p < rows:
                    raise ValueError(f"positions holds {p}, expected 0 to {rows - 1}, as rotary_cos has")
        elif total > rows and (queries or new):
            raise ValueError(
                f"rotary_cos has {rows} positions, expected {total} or more: sequence {b} has so many tokens"
            )

"""flash-attn 2's functions, with its signatures, layouts and meanings: `from bitfuse.compat.flash_attn import
flash_attn_func`.

They run on any device and in float32 too. What differs: the lse of a query that sees no key is -inf; with
return_attn_probs the third value is None, for the probabilities are never made (flash-attn fills it only when
it drops, for its own tests); the seed of dropout comes from torch's generator.
"""

from __future__ import annotations

from typing import Any

import torch

from ..ops.attention.attention import attention, varlen_attention
from ..ops.attention.decode_attention import decode_attention
from ..ops.attention.rope import rope


def _returned(made: tuple[torch.Tensor, torch.Tensor], return_attn_probs: bool) -> Any:
    return (*made, None) if return_attn_probs else made[0]


def _parts(name: str, packed: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Views of q, k and v, or of k and v, that lie side by side."""
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"{name} is a {type(packed).__name__}, expected a tensor")
    if packed.dim() < 3 or packed.shape[-3] != count:
        raise ValueError(f"{name} has shape {list(packed.shape)}, expected [..., {count}, heads, head_dim]")
    return packed.unbind(-3)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`bitfuse.attention`, whose arguments these are.

    Args:
        q: [batch, seqlen_q, heads, head_dim]; k, v: [batch, seqlen_k, kv_heads, head_dim].
        return_attn_probs: return (output, lse, None).

    Raises:
        TypeError, ValueError: as `bitfuse.attention`.
    """
    made = attention(
        q, k, v, causal, softmax_scale, window_size, softcap, alibi_slopes, dropout_p=dropout_p,
        deterministic=deterministic, return_lse=True,
    )  # fmt: skip
    return _returned(made, return_attn_probs)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with kv [batch, seqlen_k, 2, kv_heads, head_dim], read where it lies."""
    k, v = _parts("kv", kv, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with qkv [batch, seq, 3, heads, head_dim], read where it lies."""
    q, k, v = _parts("qkv", qkv, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """`bitfuse.varlen_attention`, whose arguments these are.

    Args:
        q: [total_q, heads, head_dim]; k, v: [total_k, kv_heads, head_dim].
        return_attn_probs: return (output, lse, None), lse being [heads, total_q].
        block_table: None only: `flash_attn_with_kvcache` reads pages.

    Raises:
        TypeError, ValueError: as `bitfuse.varlen_attention`.
    """
    if block_table is not None:
        raise ValueError("block_table is given, expected None: flash_attn_with_kvcache reads pages")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(longest, torch.Tensor) and not hasattr(longest, "__index__"):
            raise TypeError(f"{name} is {longest!r}, expected an int")
    made = varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), causal, softmax_scale,
        window_size, softcap, alibi_slopes, dropout_p=dropout_p, deterministic=deterministic, return_lse=True,
    )  # fmt: skip
    return _returned(made, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with kv [total_k, 2, kv_heads, head_dim], read where it lies."""
    k, v = _parts("kv", kv, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with qkv [total, 3, heads, head_dim], read where it lies."""
    q, k, v = _parts("qkv", qkv, 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """`bitfuse.decode_attention`, whose arguments these are; k and v are written to the cache.

    Args:
        q: [batch, seqlen_q, heads, head_dim].
        k_cache, v_cache: [batch, max_len, kv_heads, head_dim], or with a block_table pages of a power of two
            of tokens.
        k, v: [batch, new, kv_heads, head_dim], or None.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2], with k and v only. k is rotated from position
            cache_seqlens on, and so is q; all of q at cache_seqlens where there is neither causality nor a
            window.
        cache_seqlens: tokens in the cache before the call: int32 [batch], one number for all, or None where k
            is None: the cache is full.
        cache_batch_idx, cache_leftpad: None only.
        num_splits: not looked at: the shapes decide.

    Returns:
        [batch, seqlen_q, heads, head_dim]; with return_softmax_lse also lse, [batch, heads, seqlen_q].

    Raises:
        TypeError, ValueError: as `bitfuse.decode_attention`; also what is None only and is given.
    """
    for name, t in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if t is not None:
            raise ValueError(f"{name} is given, expected None: a block_table places sequences anywhere")
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    if cache_seqlens is None:
        if k is not None or block_table is not None:
            raise ValueError("cache_seqlens is None, expected [batch], for k or a block_table is given")
        cache_seqlens = k_cache.shape[1]
    if not isinstance(cache_seqlens, torch.Tensor):
        if not hasattr(cache_seqlens, "__index__"):
            raise TypeError(f"cache_seqlens is {cache_seqlens!r}, expected an int or a tensor")
        if not 0 <= cache_seqlens <= k_cache.numel():
            raise ValueError(f"cache_seqlens is {cache_seqlens}, expected 0 to what the cache holds")
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    rotary: dict[str, Any] = {
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved,
    }
    if rotary_cos is not None and rotary_sin is not None:
        if k is None:
            raise ValueError("rotary_cos is given and k is None, expected new keys to rotate")
        local = causal or tuple(window_size) != (-1, -1)
        if q.shape[1] > 1 and (not local or k.shape[1] != q.shape[1]):
            # decode_attention rotates queries at the last places of the sequence; here they begin at its end
            begin = cache_seqlens.unsqueeze(1)
            steps = torch.arange(max(q.shape[1], k.shape[1]), dtype=torch.int32, device=q.device)
            of_q = begin + (steps[: q.shape[1]] if local else torch.zeros_like(steps[: q.shape[1]]))
            q = rope(q, rotary_cos, rotary_sin, of_q, rotary_interleaved)
            k = rope(k, rotary_cos, rotary_sin, begin + steps[: k.shape[1]], rotary_interleaved)
            rotary = {}
    return decode_attention(
        q, k_cache, v_cache, cache_seqlens, block_table, k=k, v=v, causal=causal, softmax_scale=softmax_scale,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, return_lse=return_softmax_lse,
        **rotary,
    )  # fmt: skip

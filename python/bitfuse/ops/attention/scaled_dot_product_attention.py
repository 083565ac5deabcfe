"""scaled_dot_product_attention: bitfuse's attention with torch's signature and meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ...core import autocast
from ...core.declaration import HEADS, Declaration, declare
from ...core.dropout import new_seed
from ...core.explain import Explanation
from .attention import apply_attention, attention_op
from .attention_args import AttentionArgs
from .example import example_qkv


class _Call(NamedTuple):
    """torch's arguments as the op takes them, and the batch dimensions that were made one."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    args: AttentionArgs
    batch: tuple[int, ...]


def _broadcast(what: str, *shapes: Sequence[int]) -> tuple[int, ...]:
    """As torch.broadcast_shapes; its RuntimeError says what did not fit."""
    length = max(map(len, shapes))
    longest = next(i for i, s in enumerate(shapes) if len(s) == length)
    padded = [(1,) * (length - len(s)) + tuple(s) for s in shapes]
    sizes = []
    for column in zip(*padded, strict=True):
        distinct = {int(n): n for n in column if n != 1}  # int: torch.jit.trace gives tensors
        if len(distinct) > 1:
            raise RuntimeError(f"{what}: {', '.join(str(list(s)) for s in shapes)} do not broadcast")
        sizes.append(next(iter(distinct.values()), column[longest]))
    return tuple(sizes)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor")
        if t.layout is not torch.strided:
            raise TypeError(f"{name} has layout {t.layout}, expected a strided tensor")
        if t.dim() < 2:
            raise RuntimeError(f"{name} has shape {list(t.shape)}, expected [..., heads, seq, head_dim]")
        if t.dtype != query.dtype:
            raise RuntimeError(f"{name} has dtype {t.dtype}, expected query's {query.dtype}")
        if t.device != query.device:
            raise RuntimeError(f"{name} is on {t.device}, expected query's {query.device}")
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(f"key has head_dim {key.shape[-1]}, expected query's {query.shape[-1]}")
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(f"value has {value.shape[-2]} keys, expected key's {key.shape[-2]}")
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"dropout_p is {dropout_p}, expected 0 to 1")


def _mask(attn_mask: torch.Tensor, query: torch.Tensor, scores: tuple[int, ...]) -> torch.Tensor:
    """[batch or 1, heads or 1, seqlen_q or 1, seqlen_k or 1]."""
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            f"attn_mask has dtype {attn_mask.dtype}, expected torch.bool, torch.float32 or {query.dtype}"
        )
    if _broadcast("attn_mask and the scores", attn_mask.shape, scores) != scores:
        raise RuntimeError(
            f"attn_mask has shape {list(attn_mask.shape)}, expected to broadcast to {list(scores)}"
        )
    mask = attn_mask[(None,) * (4 - attn_mask.dim())] if attn_mask.dim() < 4 else attn_mask
    if mask.dim() > 4 or (len(scores) > 4 and mask.shape[0] != 1):
        mask = mask.expand(*scores[:-3], *mask.shape[-3:]).flatten(0, -4)
    return mask


def _arranged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> _Call:
    if not (attn_mask is None or isinstance(attn_mask, torch.Tensor)):
        raise TypeError(f"attn_mask is a {type(attn_mask).__name__}, expected a tensor or None")
    query, key, value, attn_mask = autocast.of_matmul(query, key, value, attn_mask)
    _check(query, key, value, dropout_p)
    if attn_mask is not None:
        if not isinstance(attn_mask, torch.Tensor):
            raise TypeError(f"attn_mask is a {type(attn_mask).__name__}, expected a tensor or None")
        if attn_mask.layout is not torch.strided:
            raise TypeError(f"attn_mask has layout {attn_mask.layout}, expected a strided tensor")
    # the dimension before the sequence counts as heads, whatever it is to the caller: one batch of them
    q, k, v = (t[(None,) * (4 - t.dim())] if t.dim() < 4 else t for t in (query, key, value))
    heads, k_heads, v_heads = q.shape[-3], k.shape[-3], v.shape[-3]
    if enable_gqa:
        if not k_heads or not v_heads or heads % k_heads or heads % v_heads:
            raise RuntimeError(
                f"key and value have {k_heads} and {v_heads} heads, expected divisors of query's {heads}"
            )
        if k_heads != v_heads:
            k, v = (t.repeat_interleave(heads // t.shape[-3], -3) for t in (k, v))
    else:
        (heads,) = _broadcast("heads of query, key and value", q.shape[-3:-2], k.shape[-3:-2], v.shape[-3:-2])
        q = q.expand(*q.shape[:-3], heads, *q.shape[-2:])
        if k_heads != v_heads or k_heads not in (1, heads):
            k, v = (t.expand(*t.shape[:-3], heads, *t.shape[-2:]) for t in (k, v))
    batch = _broadcast("query, key and value", q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, k, v = (t.expand(*batch, *t.shape[-3:]).flatten(0, -4) for t in (q, k, v))
    if attn_mask is not None:
        scores = (*batch, heads, q.shape[-2], k.shape[-2])
        attn_mask = _mask(attn_mask, query, scores)
    args = AttentionArgs(
        (1 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0) if scale is None else float(scale),
        right=0 if is_causal else -1,
        top_left=is_causal,
        dropout_p=float(dropout_p),
        seed=new_seed(query) if dropout_p else None,
        bias=attn_mask,
    )
    return _Call(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), args, batch)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` by `bitfuse.attention`: the same signature, the same
    meaning, the scores never written.

    Args:
        query: [..., heads, seqlen_q, head_dim], float32, float16 or bfloat16, any strides; two dimensions or
            more. Head dims from 1 to 512.
        key, value: [..., heads, seqlen_k, head_dim] and [..., head_dim_v]. Leading dimensions broadcast.
        attn_mask: bool, True for a key that is seen, or float (query's dtype or float32), added; it
            broadcasts to [..., heads, seqlen_q, seqlen_k]. Gradients flow to a float mask. A query that sees
            no key gives 0.
        dropout_p: probability that a probability is dropped; the seed comes from torch's generator. As in
            torch it is applied whenever it is above 0, with no regard to training.
        is_causal: query i sees the keys up to i (top-left aligned, which differs from `bitfuse.attention`
            where the lengths differ). With attn_mask both apply, as torch's CPU kernel has it.
        scale: head_dim ** -0.5 by default.
        enable_gqa: key and value may have fewer heads, divisors of query's.

    Returns:
        [..., heads, seqlen_q, head_dim_v] of query's dtype, under `torch.autocast` of the autocast dtype,
        which the tensors and a float mask take; heads are not the outer dimension in memory.

    Raises:
        RuntimeError: what torch refuses: sizes that do not fit, two dtypes.
        TypeError, ValueError: what `bitfuse.attention` refuses: float64, a head_dim above 512, dropout_p = 1.
    """
    call = _arranged(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out, _ = apply_attention(call.q, call.k, call.v, call.args, True)
    out = out.transpose(1, 2)
    dims = max(query.dim(), key.dim(), value.dim())
    return out.unflatten(0, call.batch) if dims > 4 else out if dims == 4 else out[(0,) * (4 - dims)]


def _explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Explanation:
    call = _arranged(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    found = attention_op.explain(call.q, call.k, call.v, call.args)
    return replace(found, op="scaled_dot_product_attention")


declare(
    Declaration(
        scaled_dot_product_attention,
        "attention by torch's signature",
        place=3,
        explain=_explain,
        uses=(*HEADS, "kv_heads", "causal"),
        arguments=lambda s, make: tuple(t.transpose(1, 2) for t in example_qkv(s, make, s.seqlen)),
        options=lambda s: {"is_causal": s.causal, "enable_gqa": s.heads != s.kv_heads},
        like="attention",
    )
)

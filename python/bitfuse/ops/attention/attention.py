"""attention and varlen_attention: softmax(scale * q k^T) v, never writing the scores."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.compiler import is_compiling

from ...core import autocast
from ...core.autograd import Function, once, recorded
from ...core.backends import Backend
from ...core.cost import Cost, Prediction, Rates, moved
from ...core.cpu import extension
from ...core.declaration import HEADS, LENGTHS, Declaration, Make, Part, Sizes, Tuned, declare
from ...core.dropout import keep, new_seed
from ...core.explain import Explanation
from ...core.op import Op
from ...core.policy import bucket
from ...core.tensors import check_frozen, check_read, check_tensor
from ...kernels.attention import attention as triton
from ...kernels.attention import attention_backward as triton_backward
from ..linear.lowbit_linear import FLOATS
from . import attention_cpu as cpp
from . import attention_cuda as cuda
from .attention_args import MAX_HEAD_DIM, NO_WINDOW, AttentionArgs, window_of
from .example import example_qkv

_PREFIXES = ("prefix_k", "prefix_v")


# the reference: one sequence or a batch of equal ones, [batch, heads, seq, dim]


@dataclass
class _Scores:
    """What both directions of the reference need: [batch, heads, seqlen_q, prefix + seqlen_k]."""

    q: torch.Tensor
    k: torch.Tensor  # repeated to q's heads, the prefix first
    v: torch.Tensor
    slope: torch.Tensor  # d cap(z) / dz; empty without a cap
    logits: torch.Tensor
    kept: torch.Tensor | None


def _accumulate(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _heads_first(t: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, seq, kv_heads, dim] as [batch, heads, seq, dim], each repeated for its query heads."""
    t = t.transpose(1, 2)
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def _visible(sq: int, sk: int, a: AttentionArgs, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """j - (i + shift), and whether key j is in query i's window; both [sq, sk]."""
    shift = 0 if a.top_left else sk - sq
    distance = torch.arange(sk, dtype=torch.int64, device=device)
    distance = distance - (torch.arange(sq, dtype=torch.int64, device=device) + shift).unsqueeze(1)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if a.left >= 0:
        seen &= distance >= -a.left
    if a.right >= 0:
        seen &= distance <= a.right
    return distance, seen


def _scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs, kept: torch.Tensor | None
) -> _Scores:
    sq, heads, sk = q.shape[1], q.shape[2], k.shape[1]
    distance, seen = _visible(sq, sk, a, q.device)
    k, v = _heads_first(k, heads), _heads_first(v, heads)
    prefix = 0
    if a.prefix_k is not None and a.prefix_v is not None:
        prefix = a.prefix_k.shape[1]
        k = torch.cat([_heads_first(a.prefix_k, heads), k], 2)
        v = torch.cat([_heads_first(a.prefix_v, heads), v], 2)
    q = q.transpose(1, 2)
    z = _accumulate(q @ k.transpose(-1, -2)) * a.softmax_scale
    slope = torch.ones_like(z[..., :0])
    if a.softcap:
        tanh = torch.tanh(z / a.softcap)
        z, slope = tanh * a.softcap, 1 - tanh * tanh
    own = z[..., prefix:]
    if a.alibi_slopes is not None:
        own = own - a.alibi_slopes.view(-1, heads, 1, 1).to(z.dtype) * distance.abs()
    if a.bias is not None:
        if a.bias.dtype == torch.bool:
            seen = seen & a.bias
        else:
            own = own + a.bias.to(z.dtype)
    own = own.masked_fill(~seen, -math.inf)
    return _Scores(q, k, v, slope, torch.cat([z[..., :prefix], own], -1), kept)


def _probabilities(logits: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """0 where lse is -inf: a query that sees nothing."""
    return torch.exp(logits - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1))


def _dropped(p: torch.Tensor, kept: torch.Tensor | None, dropout_p: float) -> torch.Tensor:
    return p if kept is None else p * kept / (1 - dropout_p)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs, kept: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, seqlen_q, heads, head_dim_v], and lse [batch, heads, seqlen_q]."""
    s = _scores(q, k, v, a, kept)
    if a.sinks is not None:
        sinks = a.sinks.to(s.logits.dtype).view(1, -1, 1, 1).expand(*s.logits.shape[:-1], 1)
        lse = torch.logsumexp(torch.cat([s.logits, sinks], -1), -1)
    elif s.logits.shape[-1]:
        lse = torch.logsumexp(s.logits, -1)
    else:
        lse = s.logits.new_full(s.logits.shape[:-1], -math.inf)
    p = _dropped(_probabilities(s.logits, lse), s.kept, a.dropout_p)
    return (p.to(v.dtype) @ s.v).transpose(1, 2), lse


def _grouped(t: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[batch, heads, seq, dim] summed over each kv head's query heads: [batch, seq, kv_heads, dim]."""
    batch, heads, seq, dim = t.shape
    return t.view(batch, kv_heads, heads // kv_heads, seq, dim).sum(2).transpose(1, 2)


def _summed_to(t: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """t with the dimensions summed that `shape` has as 1."""
    over = [i for i, (own, wanted) in enumerate(zip(t.shape, shape, strict=True)) if own != wanted]
    return t.sum(over, keepdim=True) if over else t


def _backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    a: AttentionArgs,
    kept: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Of one batch: delta = sum o dO - dlse; P = exp(z - lse); dS = P (dP - delta)."""
    kv_heads, prefix = k.shape[2], 0 if a.prefix_k is None else a.prefix_k.shape[1]
    s = _scores(q, k, v, a, kept)
    do = grad.transpose(1, 2)
    delta = (_accumulate(do) * _accumulate(out.transpose(1, 2))).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    p = _probabilities(s.logits, lse)
    dp = _dropped(_accumulate(do @ s.v.transpose(-1, -2)), s.kept, a.dropout_p)
    dz = p * (dp - delta.unsqueeze(-1))
    found = {}
    if a.bias is not None and a.bias.dtype != torch.bool:
        found["bias"] = _summed_to(dz[..., prefix:], a.bias.shape)
    if a.sinks is not None:
        of_sink = _probabilities(a.sinks.to(dz.dtype).view(1, -1, 1, 1), lse).squeeze(-1)
        found["sinks"] = -(of_sink * delta).sum((0, 2))
    if a.softcap:
        dz = dz * s.slope
    ds = (dz * a.softmax_scale).to(q.dtype)
    dk = _grouped(ds.transpose(-1, -2) @ s.q, kv_heads)
    dv = _grouped(_dropped(p, s.kept, a.dropout_p).to(v.dtype).transpose(-1, -2) @ do, kv_heads)
    found |= {"q": (ds @ s.k).transpose(1, 2), "k": dk[:, prefix:], "v": dv[:, prefix:]}
    return found | {"prefix_k": dk[:, :prefix], "prefix_v": dv[:, :prefix]}


# the reference, over packed sequences too


class Wanted(NamedTuple):
    """Which gradients to compute."""

    q: bool = True
    k: bool = True
    v: bool = True
    bias: bool = False
    sinks: bool = False
    prefix_k: bool = False
    prefix_v: bool = False


def _parts(
    q: torch.Tensor, k: torch.Tensor, a: AttentionArgs
) -> Iterator[tuple[slice, slice, AttentionArgs, torch.Tensor | None]]:
    """Of q and k [batch, seq, heads, dim] (packed: batch 1): slices of seq that meet, their arguments, and
    which of their probabilities survive."""
    batch, sq, heads, _ = q.shape
    prefix = 0 if a.prefix_k is None else a.prefix_k.shape[1]
    kept = None
    if a.dropout_p:
        assert a.seed is not None
        columns = prefix + (k.shape[1] if a.cu_seqlens_k is None else a.max_seqlen_k)
        kept = keep(a.seed, batch * heads * sq, columns, a.dropout_p).view(batch, heads, sq, columns)
    if a.cu_seqlens_q is None or a.cu_seqlens_k is None:
        yield slice(None), slice(None), a, kept
        return
    edges = itertools.pairwise(zip(a.cu_seqlens_q.tolist(), a.cu_seqlens_k.tolist(), strict=True))
    for b, ((q0, k0), (q1, k1)) in enumerate(edges):
        own = a
        if a.prefix_k is not None and a.prefix_v is not None:
            own = own._replace(prefix_k=a.prefix_k[b : b + 1], prefix_v=a.prefix_v[b : b + 1])
        if a.alibi_slopes is not None and a.alibi_slopes.dim() == 2:
            own = own._replace(alibi_slopes=a.alibi_slopes[b])
        part = None if kept is None else kept[:, :, q0:q1, : prefix + k1 - k0]
        yield slice(q0, q1), slice(k0, k1), own, part


def _batched(a: AttentionArgs, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensors if a.cu_seqlens_q is None else tuple(t.unsqueeze(0) for t in tensors)


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> list[torch.Tensor]:
    """The output, and lse: natural log of the sum of the exponentials, float32 [batch, heads, seqlen_q], or
    [heads, total] of packed sequences."""
    q, k, v = _batched(a, q, k, v)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = _accumulate(q.new_empty(q.shape[0], q.shape[2], q.shape[1]))
    for of_q, of_k, own, kept in _parts(q, k, a):
        out[:, of_q], lse[:, :, of_q] = _forward(q[:, of_q], k[:, of_k], v[:, of_k], own, kept)
    return [out, lse] if a.cu_seqlens_q is None else [out[0], lse[0]]


def _reference_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    a: AttentionArgs,
    wanted: Wanted,
    deterministic: bool,
) -> list[torch.Tensor]:
    """The gradients of q, k, v, bias, sinks, prefix_k and prefix_v; an empty tensor for one not wanted."""
    packed = a.cu_seqlens_q is not None
    grad, q, k, v, out, lse = _batched(a, grad, q, k, v, out, lse)
    if grad_lse is not None and packed:
        grad_lse = grad_lse.unsqueeze(0)
    prefixes = (a.prefix_k, a.prefix_v)
    total: dict[str, Any] = {n: q.new_zeros(t.shape) for n, t in zip("qkv", (q, k, v), strict=True)}
    total |= {n: q.new_zeros(t.shape) for n, t in zip(_PREFIXES, prefixes, strict=True) if t is not None}
    total |= {"bias": None, "sinks": None if a.sinks is None else lse.new_zeros(a.sinks.shape)}
    for b, (of_q, of_k, own, kept) in enumerate(_parts(q, k, a)):
        rows = (grad[:, of_q], None if grad_lse is None else grad_lse[:, :, of_q], q[:, of_q])
        found = _backward(*rows, k[:, of_k], v[:, of_k], out[:, of_q], lse[:, :, of_q], own, kept)
        for name, at in (("q", of_q), ("k", of_k), ("v", of_k)):
            total[name][:, at] = found[name].to(q.dtype)
        for name in (n for n in _PREFIXES if n in total):
            total[name][b : b + 1 if packed else None] = found[name].to(q.dtype)
        if a.sinks is not None:
            total["sinks"] += found["sinks"]
        total["bias"] = found.get("bias")
    made = [total[n][0] if packed else total[n] for n in "qkv"]
    made += [total[n] for n in ("bias", "sinks")]
    made += [total.get(n) for n in _PREFIXES]
    dtypes = (q.dtype, k.dtype, v.dtype, *(t.dtype if t is not None else q.dtype for t in (a.bias, a.sinks)))
    dtypes += (q.dtype, q.dtype)
    return [
        t.to(dtype) if want and t is not None else q.new_empty(0, dtype=dtype)
        for t, dtype, want in zip(made, dtypes, wanted, strict=True)
    ]


# the op


# a C++ function that says in a quarter of a microsecond that `_check_heads` has nothing to say; never true of
# what only torch can read
_fits: Callable[..., bool] = getattr(extension, "attention_fits", lambda q, k, v: False)


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: bool) -> None:
    dims = 3 if packed else 4
    if q.dtype not in FLOATS:
        raise TypeError(f"q has dtype {q.dtype}, expected {' or '.join(map(str, FLOATS))}")
    check_read("q", q)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != dims:
            layout = "[total, heads, head_dim]" if packed else "[batch, seq, heads, head_dim]"
            raise ValueError(f"{name} has shape {list(t.shape)}, expected {layout}")
    heads, kv_heads, dim, dim_v = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    check_tensor("k", k, (q.dtype,), (*(() if packed else q.shape[:1]), k.shape[-3], kv_heads, dim), q.device)
    check_tensor("v", v, (q.dtype,), (*k.shape[:-1], dim_v), q.device)
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k {kv_heads}, expected a multiple")
    for name, size in (("q", dim), ("v", dim_v)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has head_dim {size}, expected 1 to {MAX_HEAD_DIM}")


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> None:
    if a.cu_seqlens_q is not None or not _fits(q, k, v):
        _check_heads(q, k, v, a.cu_seqlens_q is not None)
    if not (math.isfinite(a.softmax_scale) and math.isfinite(a.softcap) and a.softcap >= 0):
        raise ValueError(
            f"softmax_scale is {a.softmax_scale} and softcap {a.softcap}, expected finite numbers, "
            "softcap 0 or more"
        )
    if not 0 <= a.dropout_p < 1:
        raise ValueError(f"dropout_p is {a.dropout_p}, expected 0 <= dropout_p < 1")
    if (
        a.bias is not None
        or a.alibi_slopes is not None
        or a.sinks is not None
        or a.prefix_k is not None
        or a.prefix_v is not None
        or a.cu_seqlens_q is not None
        or a.dropout_p
    ):
        _check_options(q, k, v, a)


def _check_options(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> None:
    heads, kv_heads, dim, dim_v = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    batch = q.shape[0]
    if a.cu_seqlens_q is not None:
        batch = a.cu_seqlens_q.shape[0] - 1 if a.cu_seqlens_q.dim() == 1 else -1
        if batch < 0 or a.cu_seqlens_k is None:
            raise ValueError("cu_seqlens_q and cu_seqlens_k are expected both, [batch + 1]")
        for name, t in (("cu_seqlens_q", a.cu_seqlens_q), ("cu_seqlens_k", a.cu_seqlens_k)):
            check_tensor(name, t, (torch.int32,), (batch + 1,), q.device)
        if a.bias is not None:
            raise ValueError("attn_bias is given, which packed sequences have no place for")
    if a.dropout_p:
        check_tensor("seed", a.seed, (torch.int64,), (), q.device)
    if a.bias is not None:
        sizes = (batch, heads, q.shape[1], k.shape[1])
        if a.bias.dim() != 4 or any(
            own not in (1, full) for own, full in zip(a.bias.shape, sizes, strict=True)
        ):
            raise ValueError(
                f"attn_bias has shape {list(a.bias.shape)}, expected to broadcast to {list(sizes)}"
            )
        check_tensor("attn_bias", a.bias, (torch.bool, *FLOATS), tuple(a.bias.shape), q.device)
    if a.alibi_slopes is not None:
        shape = (batch, heads) if a.alibi_slopes.dim() == 2 else (heads,)
        check_tensor("alibi_slopes", a.alibi_slopes, (torch.float32,), shape, q.device)
    if a.sinks is not None:
        check_tensor("sinks", a.sinks, (torch.float32,), (heads,), q.device)
    if (a.prefix_k is None) != (a.prefix_v is None):
        raise ValueError("only one of prefix_k and prefix_v is given, expected both or neither")
    if a.prefix_k is not None:
        length = a.prefix_k.shape[1] if a.prefix_k.dim() == 4 else 0
        check_tensor("prefix_k", a.prefix_k, (q.dtype,), (batch, length, kv_heads, dim), q.device)
        check_tensor("prefix_v", a.prefix_v, (q.dtype,), (batch, length, kv_heads, dim_v), q.device)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> list[torch.Tensor]:
    rows = (q.shape[0], q.shape[2], q.shape[1]) if a.cu_seqlens_q is None else (q.shape[1], q.shape[0])
    return [q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(rows, dtype=torch.float32)]


def _pairs(q: torch.Tensor, k: torch.Tensor, a: AttentionArgs) -> int:
    """Queries that see a key, of all heads; packed sequences as if each had the mean length."""
    batch, sq, sk = q.shape[0], q.shape[1] if q.dim() == 4 else 0, k.shape[1] if k.dim() == 4 else 0
    if a.cu_seqlens_q is not None:
        batch = max(a.cu_seqlens_q.shape[0] - 1, 1)
        sq, sk = -(-q.shape[0] // batch), -(-k.shape[0] // batch)
    row = np.arange(sq) + (0 if a.top_left else sk - sq)
    first = (row - a.left).clip(0, sk) if a.left >= 0 else 0 * row
    end = (row + a.right + 1).clip(0, sk) if a.right >= 0 else 0 * row + sk
    prefix = 0 if a.prefix_k is None else a.prefix_k.shape[1]
    seen = int((end - first).clip(0).sum()) + sq * prefix
    return batch * q.shape[-2] * seen


def _cost(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> Cost:
    rows = q.numel() // q.shape[-1]
    out = rows * (v.shape[-1] * q.element_size() + 4)
    flops = 2 * (q.shape[-1] + v.shape[-1]) * _pairs(q, k, a)
    return Cost(moved(q, k, v, a.bias, a.prefix_k, a.prefix_v) + out, flops, q.dtype)


# of the tensor cores' rate, what the inner loops reach: CUDA's by head dim, Triton's forward and backward
_CUDA_SHARE, _TRITON_SHARE, _BACKWARD_SHARE = {64: 0.405, 128: 0.648, 256: 0.63}, 0.475, 0.283
_TILE, _TILE_CLOCKS = 128, 4300  # queries of a tile, and its beginning and end


def _predicted(
    share: float, cost: Cost, rates: Rates, q: torch.Tensor, v: torch.Tensor, a: AttentionArgs
) -> Prediction:
    """The time to expect: products, also of the masked half of a tile at an edge of the window; the ends of
    tiles; and half a tile at the end, for which others wait."""
    rows = q.numel() // max(q.shape[-1], 1)
    keys = cost.flops / max(1, 2 * rows * (q.shape[-1] + v.shape[-1]))  # that a query sees
    edges = (a.right >= 0) + (a.left >= 0)
    products = cost.flops / (share * rates.half_flop_per_s) * (1 + _TILE / 2 * edges / max(keys, 1.0))
    each = max(1.0, rows / (_TILE * rates.multiprocessors))  # tiles of a multiprocessor
    work = products * (1 + 0.5 / each) + rates.clocks(_TILE_CLOCKS * each)
    return Prediction(rates.call_s, cost.memory_seconds(rates), arithmetic=work)


def _predicted_cuda(
    cost: Cost, rates: Rates, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs
) -> Prediction:
    return _predicted(_CUDA_SHARE.get(q.shape[-1], 0.5), cost, rates, q, v, a)


def _predicted_triton(
    cost: Cost, rates: Rates, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs
) -> Prediction:
    if q.dtype == torch.float32:
        return cost.predicted(rates)
    return _predicted(_TRITON_SHARE, cost, rates, q, v, a)


def _kind(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> tuple[Any, ...]:
    packed = a.cu_seqlens_q is not None
    lengths = (a.max_seqlen_q, a.max_seqlen_k) if packed else (q.shape[1], k.shape[1])
    batch = a.cu_seqlens_q.shape[0] - 1 if a.cu_seqlens_q is not None else q.shape[0]
    heads = (q.shape[-2], k.shape[-2], q.shape[-1])
    return bucket(batch), *map(bucket, lengths), *heads, a.right == 0, packed, q.dtype


_SCHEMA = (
    "float softmax_scale, int left, int right, bool top_left, float softcap, float dropout_p, Tensor? seed, "
    "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? prefix_k, Tensor? prefix_v, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int max_seqlen_q, int max_seqlen_k"
)
_ARGS = len(AttentionArgs._fields)

attention_op = Op(
    f"attention(Tensor q, Tensor k, Tensor v, {_SCHEMA}) -> Tensor[]",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("cuda", ("cuda",), cuda.supports, cuda.run, predicted=_predicted_cuda),
        Backend("triton", ("cuda",), triton.supports, triton.run, predicted=_predicted_triton),
    ),
    cost=_cost,
    kind=_kind,
    flatten=lambda q, k, v, a: (q, k, v, *a),
    unflatten=lambda q, k, v, *a: (q, k, v, AttentionArgs(*a)),
)


def _check_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    a: AttentionArgs,
    wanted: Wanted,
    deterministic: bool,
) -> None:
    _check(q, k, v, a)
    shape = (*q.shape[:-1], v.shape[-1])
    check_tensor("grad", grad, (q.dtype,), shape, q.device)
    check_tensor("out", out, (q.dtype,), shape, q.device)
    rows = (q.shape[0], q.shape[2], q.shape[1]) if a.cu_seqlens_q is None else (q.shape[1], q.shape[0])
    check_tensor("lse", lse, (torch.float32,), rows, q.device)
    if grad_lse is not None:
        check_tensor("grad_lse", grad_lse, (torch.float32,), rows, q.device)


def _fake_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    a: AttentionArgs,
    wanted: Wanted,
    deterministic: bool,
) -> list[torch.Tensor]:
    of = (q, k, v, a.bias, a.sinks, a.prefix_k, a.prefix_v)
    return [
        q.new_empty(0 if t is None or not want else t.shape, dtype=q.dtype if t is None else t.dtype)
        for t, want in zip(of, wanted, strict=True)
    ]


def _cost_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    a: AttentionArgs,
    wanted: Wanted,
    deterministic: bool,
) -> Cost:
    """Five products instead of two: q k^T again, dP, dV, dQ and dK."""
    pairs = _pairs(q, k, a)
    flops = 2 * (3 * q.shape[-1] + 2 * v.shape[-1]) * pairs
    return Cost(moved(grad, q, k, v, out, lse) + moved(q, k, v), flops, q.dtype)


def _predicted_backward(cost: Cost, rates: Rates, *args: Any) -> Prediction:
    """The time to expect of three kernels: delta, the gradients to keys and values, those to queries."""
    if cost.dtype == torch.float32:
        return cost.predicted(rates)
    products = cost.flops / (_BACKWARD_SHARE * rates.half_flop_per_s)
    return Prediction(3 * rates.call_s, cost.memory_seconds(rates), arithmetic=products)


def _flatten_backward(*args: Any) -> tuple[Any, ...]:
    *tensors, a, wanted, deterministic = args
    return (*tensors, *a, list(wanted), deterministic)


def _unflatten_backward(*flat: Any) -> tuple[Any, ...]:
    a = AttentionArgs(*flat[7 : 7 + _ARGS])
    wanted, deterministic = flat[7 + _ARGS :]
    return (*flat[:7], a, Wanted(*wanted), deterministic)


attention_backward = Op(
    "attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SCHEMA}, bool[] wanted, bool deterministic) -> Tensor[]",
    _check_backward,
    _reference_backward,
    _fake_backward,
    (
        Backend("cpp", ("cpu",), cpp.supports_backward, cpp.run_backward),
        Backend(
            "triton", ("cuda",), triton_backward.supports, triton_backward.run, predicted=_predicted_backward
        ),
    ),
    cost=_cost_backward,
    flatten=_flatten_backward,
    unflatten=_unflatten_backward,
)


class _Attention(Function):
    """Keeps q, k, v, the output and lse; the probabilities are made again in the backward."""

    op = "attention"

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
        prefix_k: torch.Tensor | None,
        prefix_v: torch.Tensor | None,
        a: AttentionArgs,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attention_op(q, k, v, a)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        q, k, v, _, _, _, _, a, ctx.deterministic = inputs
        ctx.numbers = [None if t is None or isinstance(t, torch.Tensor) else t for t in a]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *output, *(t if isinstance(t, torch.Tensor) else None for t in a))

    @staticmethod
    @once("attention")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        a = AttentionArgs(*(n if t is None else t for n, t in zip(ctx.numbers, tensors, strict=True)))
        grad = torch.zeros_like(out) if grads[0] is None else grads[0]
        wanted = Wanted(*ctx.needs_input_grad[:7])
        made = attention_backward(grad, grads[1], q, k, v, out, lse, a, wanted, ctx.deterministic)
        return *(g if want else None for g, want in zip(made, wanted, strict=True)), None, None


def _autocast(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionArgs]:
    """As `autocast.of_matmul`: float masks and prefixes too."""
    dtype = autocast.dtype_of(q) if autocast.is_any_enabled() else None
    if dtype is None:
        return q, k, v, a
    cast = autocast.cast
    a = a._replace(
        bias=cast(a.bias, dtype), prefix_k=cast(a.prefix_k, dtype), prefix_v=cast(a.prefix_v, dtype)
    )
    return cast(q, dtype), cast(k, dtype), cast(v, dtype), a


def apply_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs, deterministic: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse, with gradients: what the public functions call. Follows autocast."""
    if autocast.is_any_enabled():
        q, k, v, a = _autocast(q, k, v, a)
    learnt = (a.bias, a.sinks, a.prefix_k, a.prefix_v)
    if recorded(q, k, v, *learnt):
        return _Attention.call(q, k, v, *learnt, a, deterministic)
    out, lse = attention_op(q, k, v, a)
    return out, lse


# the public functions


def _args(
    q: torch.Tensor,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    attn_bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    dropout_p: float,
    seed: int | torch.Tensor | None,
) -> AttentionArgs:
    check_optional(
        alibi_slopes=alibi_slopes, attn_bias=attn_bias, sinks=sinks, prefix_k=prefix_k, prefix_v=prefix_v
    )
    if alibi_slopes is not None:
        check_frozen("alibi_slopes", alibi_slopes)
    left, right = window_size if window_size == NO_WINDOW else window_of(window_size)
    if causal:
        right = 0
    if dropout_p and not isinstance(seed, torch.Tensor):
        seed = new_seed(q) if seed is None else given_seed(seed, q.device)
    if attn_bias is not None:
        if attn_bias.dim() > 4:
            raise ValueError(f"attn_bias has shape {list(attn_bias.shape)}, expected at most four dimensions")
        attn_bias = attn_bias[(None,) * (4 - attn_bias.dim())]
    return AttentionArgs(
        default_scale(q) if softmax_scale is None else float(softmax_scale),
        left,
        right,
        False,
        float(softcap),
        float(dropout_p),
        seed.reshape(()) if dropout_p and isinstance(seed, torch.Tensor) else None,
        attn_bias,
        None if alibi_slopes is None else alibi_slopes.float(),
        None if sinks is None else sinks.float(),
        prefix_k,
        prefix_v,
    )


def check_optional(**tensors: object) -> None:
    """Raise TypeError for what is neither a tensor nor None."""
    for name, t in tensors.items():
        if t is not None and not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor or None")


def default_scale(q: torch.Tensor) -> float:
    """head_dim ** -0.5; of what the op refuses, any."""
    shape = q.shape
    return shape[-1] ** -0.5 if shape and shape[-1] else 1.0


def given_seed(seed: int, device: torch.device) -> torch.Tensor:
    """A seed that is no tensor as one.

    Raises:
        TypeError, ValueError: it is not an int of 64 bits.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed is {seed!r}, expected an int or an int64 tensor")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}, expected an int of 64 bits")
    return torch.tensor(seed, dtype=torch.int64, device=device)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    prefix_k: torch.Tensor | None = None,
    prefix_v: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    seed: int | torch.Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Any:
    """softmax(softmax_scale * q k^T + bias) v, tile by tile: the scores are never written (FlashAttention:
    Dao et al., 2022; Dao, 2023; Shah et al., 2024).

    Query i meets key j at distance d = j - i - (seqlen_k - seqlen_q): the last query is aligned with the last
    key. A query that sees no key gives 0, and lse -inf. Gradients flow to q, k, v, a float attn_bias, sinks,
    prefix_k, prefix_v, and through lse. Under `torch.autocast` q, k, v, a float attn_bias and prefixes take
    the autocast dtype, as in torch's scaled_dot_product_attention.

    Args:
        q: [batch, seqlen_q, heads, head_dim], float32, float16 or bfloat16, any strides.
        k, v: [batch, seqlen_k, kv_heads, head_dim] and [..., head_dim_v]; heads is a multiple of kv_heads
            (grouped or multi-query attention). Head dims from 1 to 512.
        causal: d <= 0 only.
        softmax_scale: head_dim ** -0.5 by default.
        window_size: (left, right): -left <= d <= right only; -1 is no bound.
        softcap: logits become softcap * tanh(logit / softcap), before what is added to them; 0 is none.
        alibi_slopes: [heads] or [batch, heads]: -slope * |d| is added (Press et al., 2022). They get no
            gradient: slopes that require one are refused.
        attn_bias: added, or bool, False for a key that is not seen; broadcast to [batch, heads, seqlen_q,
            seqlen_k].
        sinks: [heads], one more logit a head, that takes probability and gives no value (Xiao et al., 2024;
            learnt as in gpt-oss).
        prefix_k, prefix_v: [batch, prefix, kv_heads, head_dim], seen by every query, whatever the window and
            the bias (prefix tuning: Li and Liang, 2021), without being copied in front of k and v.
        dropout_p: probability that a probability is dropped; survivors are divided by 1 - dropout_p.
        seed: of the dropout mask (`bitfuse.core.dropout`); None draws one from torch's generator.
        deterministic: False lets the backward add in an order that may change from run to run.
        return_lse: return lse too.

    Returns:
        [batch, seqlen_q, heads, head_dim_v] of q's dtype; with return_lse also the natural log of the sum of
        exponentials (sinks included), float32 [batch, heads, seqlen_q].

    Raises:
        TypeError: a dtype or a type that is not listed.
        ValueError: sizes that do not fit, tensors on two devices, alibi_slopes that require a gradient.
    """
    _check_tensors(q, k, v)
    a = _args(
        q, causal, softmax_scale, window_size, softcap, alibi_slopes, attn_bias, sinks, prefix_k, prefix_v,
        dropout_p, seed,
    )  # fmt: skip
    out, lse = apply_attention(q, k, v, a, deterministic)
    return (out, lse) if return_lse else out


def _check_tensors(q: object, k: object, v: object) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor")
        if t.dim() < 3:
            raise ValueError(f"{name} has shape {list(t.shape)}, expected [..., heads, head_dim]")


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    prefix_k: torch.Tensor | None = None,
    prefix_v: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    seed: int | torch.Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Any:
    """`bitfuse.attention` of sequences of different lengths, packed one after the other.

    Args:
        q: [total_q, heads, head_dim]; k, v: [total_k, kv_heads, head_dim] and [..., head_dim_v].
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1] on q's device: where each sequence begins, and the
            total. A length may be 0.
        max_seqlen_q, max_seqlen_k: the longest, or more.
        Others as `bitfuse.attention`; prefixes are [batch, ...].

    Returns:
        [total_q, heads, head_dim_v]; with return_lse also lse, float32 [heads, total_q].

    Raises:
        TypeError, ValueError: as `bitfuse.attention`; on the CPU also offsets that decrease, do not
            begin at 0 or end at the total, or a sequence longer than stated.
    """
    _check_tensors(q, k, v)
    a = _args(
        q,
        causal,
        softmax_scale,
        window_size,
        softcap,
        alibi_slopes,
        None,
        sinks,
        prefix_k,
        prefix_v,
        dropout_p,
        seed,
    )
    a = a._replace(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    for name, cu, longest, t in (
        ("cu_seqlens_q", cu_seqlens_q, max_seqlen_q, q),
        ("cu_seqlens_k", cu_seqlens_k, max_seqlen_k, k),
    ):
        if not isinstance(cu, torch.Tensor):
            raise TypeError(f"{name} is a {type(cu).__name__}, expected a tensor")
        if not hasattr(longest, "__index__"):
            raise TypeError(f"max_seqlen_{name[-1]} is {longest!r}, expected an int")
        if not t.dim():
            raise ValueError(f"{name[-1]} has shape [], expected [total, heads, head_dim]")
        check_read(name, cu)
        # a graph and a fake have no values; the CPU's kernel looks again
        if type(cu) is torch.Tensor and not is_compiling() and cu.is_cpu and cu.dim() == 1 and cu.numel():
            lengths = cu.diff()
            if int(cu[0]) != 0 or int(cu[-1]) != t.shape[0] or bool((lengths < 0).any()):
                raise ValueError(
                    f"{name} is {cu.tolist()[:8]}..., expected 0 to {t.shape[0]}, not decreasing"
                )
            if lengths.numel() and int(lengths.max()) > longest:
                raise ValueError(
                    f"max_seqlen_{name[-1]} is {longest}, and a sequence is {int(lengths.max())} long"
                )
    out, lse = apply_attention(q, k, v, a, deterministic)
    return (out, lse) if return_lse else out


def _explain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Explanation:
    _check_tensors(q, k, v)
    defaults = inspect.signature(attention).parameters
    names = inspect.signature(_args).parameters
    given = {n: options.get(n, defaults[n].default) for n in names if n != "q"}
    return attention_op.explain(*_autocast(q, k, v, _args(q, **given)))


def _explain_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
    **named: Any,
) -> Explanation:
    """Offsets are taken as they are: a call of sizes alone has none."""
    _check_tensors(q, k, v)
    bound = inspect.signature(varlen_attention).bind(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options, **named
    )
    bound.apply_defaults()
    names = inspect.signature(_args).parameters
    given: dict[str, Any] = {n: bound.arguments.get(n) for n in names}  # it has no bias
    a = _args(**given)._replace(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return replace(attention_op.explain(*_autocast(q, k, v, a)), op="varlen_attention")


def _example_varlen(s: Sizes, make: Make) -> tuple[Any, ...]:
    q, k, v = (t.flatten(0, 1) for t in example_qkv(s, make, s.seqlen))
    cu = make(s.batch + 1, dtype=torch.int32)
    return q, k, v, cu, cu, s.seqlen, s.seqlen


declare(
    Declaration(
        attention,
        "softmax(q k^T) v, and its gradients",
        place=1,
        explain=_explain,
        uses=(*HEADS, "kv_heads", "causal"),
        arguments=lambda s, make: example_qkv(s, make, s.seqlen),
        options=lambda s: {"causal": s.causal} | ({"dropout_p": s.dropout} if s.dropout else {}),
        parts=(
            Part(
                attention_op,
                "forward",
                {"cuda": "sm_90: wgmma and TMA; fp16, bf16; head dims 64, 128, 256"},
            ),
            Part(attention_backward, "gradients to q, k, v, bias, sinks, prefix"),
        ),
        tuned=Tuned({"seqlen": LENGTHS}),
        variants=({"dropout": 0.1},),
    )
)
declare(
    Declaration(
        varlen_attention,
        "attention over packed sequences",
        place=2,
        explain=_explain_varlen,
        uses=(*HEADS, "kv_heads", "causal"),
        arguments=_example_varlen,
        options=lambda s: {"causal": s.causal},
        like="attention",
    )
)

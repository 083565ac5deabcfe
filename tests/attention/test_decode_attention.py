"""decode_attention: every backend, features combined at random, against float64 on the dequantised cache."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import Errors
from backends import Target, targets
from bitfuse.ops.attention.append_kv import turned
from bitfuse.ops.attention.attention import attention_op
from bitfuse.ops.attention.attention_args import AttentionArgs
from bitfuse.ops.attention.decode_attention import _reference, _seen, decode_attention_op
from bitfuse.ops.attention.kv_cache import CACHE_FORMATS, CacheTensors, DecodeArgs, Rotary, gather

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (0, 1, 5, 31, 32, 33, 63, 64, 65, 100, 130, 200)
KINDS, DRAWS = 12, 42  # of dtype and format; of each kind


@dataclass
class Draw:
    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    cache: CacheTensors
    seqlens: torch.Tensor
    rotary: Rotary
    args: DecodeArgs
    what: str

    def call(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.cache, self.seqlens, self.rotary, self.args

    def cloned(self) -> Draw:
        tensors: dict[str, Any] = {
            n: t.clone() for n, t in self.cache._asdict().items() if isinstance(t, torch.Tensor)
        }
        return replace(self, cache=self.cache._replace(**tensors))


def draw(
    target: Target,
    number: int,
    dims: Sequence[int] = (),
    page_sizes: Sequence[int | None] = (None, None, 1, 4, 16, 64),
    group_sizes: Sequence[int] = (8, 32, 64),
) -> Draw:
    """A cache filled in two appends (by the reference), tensors against guard pages."""
    r = random.Random(number)
    torch.manual_seed(number)
    dtype, format = DTYPES[number % 3], CACHE_FORMATS[number // 3 % 4]
    codes = format in ("int8", "int4")
    dims = dims or ((8, 16, 40, 64, 72, 128, 256) if codes else (1, 3, 8, 16, 40, 64, 72, 128, 256))
    dim = r.choice(dims)
    dim_v = dim if r.random() < 0.7 else r.choice(dims)
    kv_heads, group, batch = r.choice((1, 2, 3)), r.choice((1, 2, 3, 4, 5)), r.choice((1, 2, 3))
    heads, queries = kv_heads * group, r.choice((1, 1, 1, 2, 3, 7))
    scales = [torch.rand(kv_heads) + 0.5 if format == "fp8" and r.random() < 0.5 else None for _ in range(2)]
    page_size = r.choice(page_sizes)
    cache = bitfuse.KVCache(
        batch, 224, kv_heads, dim, head_dim_v=dim_v, dtype=dtype, format=format, page_size=page_size,
        group_size=r.choice(group_sizes), channel_group=r.choice((None, 32, 64)), k_scale=scales[0],
        v_scale=scales[1],
    )  # fmt: skip
    if cache.block_table is not None:  # pages in any order
        order = torch.randperm(cache.block_table.numel(), dtype=torch.int32)
        cache.block_table.copy_(order.view_as(cache.block_table))
    lengths = [r.choice(LENGTHS) for _ in range(batch)]
    with bitfuse.use_backend("reference"):
        for at in (0, 97):  # a group that is begun is finished by the second
            k, v = (torch.randn(batch, 200 - at if at else 97, kv_heads, d).to(dtype) for d in (dim, dim_v))
            cache.append(k, v)
    cache.seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
    if codes:  # the tail of what is now the last group
        size = cache.tensors.group_size
        for b, length in enumerate(lengths):
            cache.seqlens[b] = length // size * size
        with bitfuse.use_backend("reference"):
            for b, length in enumerate(lengths):
                rest = length - int(cache.seqlens[b])
                one = cache.tensors._replace(block_table=None)
                for tail, width in ((one.k_tail, dim), (one.v_tail, dim_v)):
                    assert tail is not None
                    late = torch.arange(length - rest, length) % (2 * size)
                    tail[b, late] = torch.randn(rest, kv_heads, width).to(dtype)
        cache.seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
    tensors = cache.tensors
    for name, t in tensors._asdict().items():
        if isinstance(t, torch.Tensor):
            tensors = tensors._replace(**{name: target.place(t)[0]})
    if not codes and r.random() < 0.3:  # K and V of one tensor
        both = torch.cat([tensors.k.view(torch.uint8), tensors.v.view(torch.uint8)], -1)
        (both,) = target.place(both)
        k, v = both.split([t.shape[-1] * t.element_size() for t in (tensors.k, tensors.v)], -1)
        if tensors.k.element_size() == 1 or k.storage_offset() % 4 == v.storage_offset() % 4 == 0:
            widths = [t.shape[-1] * t.element_size() % 4 == 0 for t in (tensors.k, tensors.v)]
            if all(widths):
                tensors = tensors._replace(k=k.view(tensors.k.dtype), v=v.view(tensors.v.dtype))

    new = queries if r.random() < 0.7 else 0
    q = torch.randn(batch, heads, queries, dim).to(dtype)
    (q,) = target.place(q)
    q = q.transpose(1, 2)
    fresh = [torch.randn(batch, queries, kv_heads, d).to(dtype) for d in (dim, dim_v)]
    k, v = target.place(*fresh)
    rotary = Rotary()
    if dim > 1 and r.random() < 0.5:
        half = r.choice([h for h in (1, 4, dim // 2) if 2 * h <= dim])
        table = torch.randn(2, 256, half).to(r.choice((dtype, torch.float32)))
        cos, sin = target.place(*table)
        positions = None
        if r.random() < 0.4:
            (positions,) = target.place(
                torch.randint(256, (r.choice((1, batch)), queries), dtype=torch.int32)
            )
        rotary = Rotary(cos, sin, positions, r.random() < 0.5)
    tree, alibi, sinks, seqlens = target.place(
        torch.rand(r.choice((1, batch)), queries, queries) < 0.6,
        torch.rand((batch, heads)[r.randrange(2) :]),
        torch.randn(heads),
        cache.seqlens,
    )
    window, with_tree = r.random() < 0.3, r.random() < 0.25
    args = DecodeArgs(
        dim**-0.5 * r.choice((1.0, 2.0)),
        r.choice((0, 3, 70)) if window else -1,
        -1 if with_tree else r.choice((0, 0, -1, 2)),
        r.choice((0.0, 0.0, 5.0)),
        tree if with_tree else None,
        alibi if r.random() < 0.3 else None,
        sinks if r.random() < 0.3 else None,
    )
    what = (
        f"draw {number}: {format} {dtype}, lengths {lengths}, {queries} queries, {new} new, heads {heads}/"
        f"{kv_heads}, dims {dim} {dim_v}, page_size {page_size}, {args}"
    )
    return Draw(q, k if new else None, v if new else None, tensors, seqlens, rotary, args, what)


def exact(d: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, of the rotated queries and the cache as `d` has it after the call."""
    batch, queries, heads, _ = d.q.shape
    new = 0 if d.k is None else d.k.shape[1]
    out = torch.empty(batch, queries, heads, d.cache.head_dim_v, dtype=torch.float64)
    lse = torch.empty(batch, heads, queries, dtype=torch.float64)
    a = d.args
    for b, length in enumerate((d.seqlens + new).tolist()):
        keys, values = gather(d.cache, b, length, torch.float64)
        own = turned(d.q[b], d.rotary, b, length - queries).double()
        slopes = (
            a.alibi_slopes[b] if a.alibi_slopes is not None and a.alibi_slopes.dim() == 2 else a.alibi_slopes
        )
        args = AttentionArgs(
            a.softmax_scale, a.left, a.right, softcap=a.softcap, bias=_seen(a, b, queries, length),
            alibi_slopes=slopes, sinks=a.sinks,
        )  # fmt: skip
        one = attention_op.reference(own[None], keys[None], values[None], args)
        out[b], lse[b] = one[0][0], one[1][0]
    return out, lse


def check(target: Target, d: Draw, errors: Errors) -> None:
    plain = d.cloned()
    plain_out, plain_lse = _reference(*plain.call())
    got, got_lse = target.run(decode_attention_op, *d.call())
    for name, mine in d.cache._asdict().items():
        other = getattr(plain.cache, name)
        if not isinstance(mine, torch.Tensor):
            continue
        same = torch.equal(mine.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        assert same, f"{d.what}: {name} differs"
    out, lse = exact(d)
    errors.add("out", got, out, plain_out)
    empty = lse == -math.inf
    assert torch.equal(got_lse == -math.inf, empty), f"{d.what}: lse of a row that sees nothing is -inf"
    errors.add("lse", *(t.masked_fill(empty, 0) for t in (got_lse, lse, plain_lse)))
    after = d.seqlens + (0 if d.k is None else d.k.shape[1])
    again, lse_again = target.run(decode_attention_op, *replace(d, k=None, v=None, seqlens=after).call())
    assert torch.equal(again, got) and torch.equal(lse_again, got_lse), f"{d.what}: other numbers"


def check_kind(target: Target, kind: int, draws: int = DRAWS) -> None:
    errors = Errors()
    for number in range(kind, draws * KINDS, KINDS):
        check(target, draw(target, number), errors)
    errors.check(f"{CACHE_FORMATS[kind // 3]} {DTYPES[kind % 3]}")


@pytest.mark.parametrize("kind", range(KINDS))
@pytest.mark.parametrize("target", targets("cpp"), ids=str)
def test_draws(target: Target, kind: int) -> None:
    check_kind(target, kind)

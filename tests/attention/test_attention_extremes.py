"""Attention where numbers end: logits of billions, queries of almost nothing, keys with outlier channels,
heads of 512, tensors without elements. Every backend that serves the case."""

from __future__ import annotations

import math
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import Errors, assert_accurate
from backends import Target, targets
from bitfuse.ops.attention.attention import (
    Wanted,
    _reference,
    _reference_backward,
    attention_backward,
    attention_op,
)
from bitfuse.ops.attention.attention_args import AttentionArgs
from bitfuse.ops.attention.decode_attention import decode_attention_op
from bitfuse.ops.attention.kv_cache import CacheTensors, DecodeArgs, Rotary
from bitfuse.ops.attention.merge_attention import merge_attention_op
from bitfuse.ops.attention.rope import rope_op
from test_decode_attention import Draw, check, draw

SCALE = 128**-0.5  # no power of two: products with it are rounded
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def served(*backends: str) -> list[Any]:
    """Targets with the dtypes and the head dimension that each is tested at; on the simulator each is seconds
    of compilation."""
    found = []
    for target in targets(*backends):
        dtypes: tuple[torch.dtype, ...] = FLOATS
        if target.backend == "cuda":
            dtypes = FLOATS[1:] if target.sm != 80 else ()
        elif target.sm:
            dtypes = (FLOATS[0], FLOATS[2]) if target.sm == 80 else FLOATS[2:]
        dim = 128 if target.backend == "cuda" else 32
        found += [pytest.param(target, dtype, dim, id=f"{target}-{str(dtype)[6:]}") for dtype in dtypes]
    return found


def large(dtype: torch.dtype, dim: int, size: float, alike: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries that are keys too, and values. alike: all logits of a row are equal."""
    most = 6e4 if dtype == torch.float16 else 1e30
    q = torch.full((1, 70, 2, dim), size) if alike else torch.randn(1, 70, 2, dim) * size
    return q.clamp(-most, most).to(dtype), torch.randn(1, 70, 2, dim).to(dtype)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(("target", "dtype", "dim"), served("cpp", "triton", "cuda"))
def test_large_logits(target: Target, dtype: torch.dtype, dim: int, alike: bool) -> None:
    """The largest logit of a row has an exponent of 0. Plain PyTorch is no measure: its products of equal
    rows differ in the last place, which is 256. Its answer to queries of 0 is, where all logits are equal."""
    for size in (30.0, 1e4, 3e4, 5e4):
        q, v = target.place(*large(dtype, dim, size, alike))
        for given in (dict(right=0), dict(left=9, sinks=torch.tensor([1.0, size * size * 1e2]))):
            a = AttentionArgs(SCALE, **given)
            out, lse = target.run(attention_op, q, q, v, a)
            wanted, level = _reference(q.cpu().double(), q.cpu().double(), v.cpu().double(), a)
            # 16 bits: probabilities are an operand in it, over a power that is nearly their maximum's
            once = torch.finfo(dtype).eps / 2 if target.backend in ("triton", "cuda") else 0.0
            plain = (wanted * (1 + once)).to(dtype)
            if alike:
                sinks = (
                    torch.tensor([-math.inf, 1e9]) if "sinks" in given else None
                )  # logits are above and below
                x, y = (t.cpu() for t in (q, v))
                plain = _reference(x * 0, x * 0, y, a._replace(sinks=sinks))[0]
            assert_accurate(out.cpu(), wanted, plain, f"{size} {given}")
            torch.testing.assert_close(lse.cpu(), level.float(), rtol=1e-6, atol=1e-6)


def test_one_large_logit() -> None:
    """The report of PyTorch's issue 121558."""
    q = torch.full((1, 1, 1, 128), 30000.0, dtype=torch.bfloat16)
    assert torch.equal(bitfuse.scaled_dot_product_attention(q, q, q), q)


LARGE_FEATURES: list[dict[str, Any]] = [
    {},
    dict(right=0),
    dict(left=10, sinks=torch.tensor([1.0, 1e9])),
    dict(bias=torch.randn(1, 2, 70, 70) * 10),
    dict(alibi_slopes=torch.tensor([0.5, 1e6])),
    dict(prefix_k=torch.randn(1, 5, 2, 32), prefix_v=torch.randn(1, 5, 2, 32)),
]


def gradients(
    target: Target | None, tensors: tuple[torch.Tensor, ...], given: dict[str, Any], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Of q, v and grad the output and three gradients; without a target by the formula, in `dtype`."""
    like = tensors[0].dtype
    own = {name: t.to(like).to(dtype) if name.startswith("prefix") else t for name, t in given.items()}
    a = AttentionArgs(SCALE, **own)
    x, y, g = (t.to(dtype) for t in tensors)
    if target is None:
        out, lse = _reference(x, x, y, a)
        return [out, *_reference_backward(g, None, x, x, y, out, lse, a, Wanted(), True)[:3]]
    out, lse = target.run(attention_op, x, x, y, a)
    return [out, *target.run(attention_backward, g, None, x, x, y, out, lse, a, Wanted(), True)[:3]]


@pytest.mark.parametrize("given", LARGE_FEATURES, ids=lambda given: "-".join(given) or "plain")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_large_logits(dtype: torch.dtype, given: dict[str, Any]) -> None:
    """Probabilities made again from lse are the forward's, though lse has no digits behind the point."""
    target = Target("cpp", "cpu")
    names = ("out", "gradient of q", "gradient of k", "gradient of v")
    for alike in (True, False):
        for size in (1.0, 30.0, 1e3, 3e4):
            q, v = large(dtype, 32, size, alike)
            grad = torch.randn(v.shape).to(dtype)

            tensors = (q, v, grad)
            made = gradients(target, tensors, given, dtype)
            exact, plain = (gradients(None, tensors, given, of) for of in (torch.float64, dtype))
            for name, got, wanted, other in zip(names, made, exact, plain, strict=True):
                if not torch.isfinite(other).all():  # float16's logits, in plain PyTorch
                    assert torch.isfinite(got).all(), name
                    continue
                assert_accurate(got, wanted, other, f"{name} {size} {alike}")


CACHED = [
    pytest.param(target, format, id=f"{target}-{format}")
    for target in targets("cpp", "triton", "cuda")
    for format in (("int8",) if target.sm == 90 else ("none", "int8", "int4", "fp8"))
]


@pytest.mark.parametrize(("target", "format"), CACHED)
def test_large_logits_of_a_cache(target: Target, format: str) -> None:
    dtypes = FLOATS if not target.sm else FLOATS[2:]
    for dtype in dtypes:
        for size in (30.0,) if format == "fp8" else (30.0, 3e4):
            k, v = (t[:, :, :1] for t in large(dtype, 64, size, True))
            cache = bitfuse.KVCache(1, 128, 1, 64, dtype=dtype, format=format)
            cache.append(k, v)
            values = cache.gather(0)[1].double()
            tensors = _placed(target, cache.tensors)
            (q,) = target.place(k[:, :1].expand(1, 1, 4, 64).contiguous())
            seqlens = torch.tensor([70], dtype=torch.int32)
            out, _ = target.run(
                decode_attention_op, q, None, None, tensors, seqlens, Rotary(), DecodeArgs(SCALE)
            )
            with bitfuse.use_backend("reference"):
                plain = bitfuse.decode_attention(q.cpu() * 0, cache)
            assert_accurate(out.cpu(), values.mean(0).expand(out.shape), plain, f"{dtype} {size}")


def _placed(target: Target, tensors: CacheTensors) -> CacheTensors:
    placed = {n: target.place(t)[0] for n, t in tensors._asdict().items() if isinstance(t, torch.Tensor)}
    return tensors._replace(**placed)


def outliers(
    target: Target, format: str, dtype: torch.dtype, dim: int, ratio: float, count: int, power: float
) -> Draw:
    """K has `count` channels `ratio` times the others, and queries are small there by ratio to the power. One
    token of V is as small, and most rows look at it."""
    k, v, q = torch.randn(2, 160, 2, dim), torch.randn(2, 160, 2, dim), torch.randn(2, 1, 8, dim)
    channels = torch.randperm(dim)[:count]
    k[..., channels] *= ratio
    q[..., channels] /= ratio**power
    k[:, 3] += q[:, 0, ::4] * 6 / dim**0.5
    v[:, 3] /= ratio
    cache = bitfuse.KVCache(2, 192, 2, dim, dtype=dtype, format=format, group_size=32)
    cache.append(k.to(dtype), v.to(dtype))
    seqlens = torch.full((2,), 160, dtype=torch.int32)
    return Draw(
        target.place(q.to(dtype))[0], None, None, _placed(target, cache.tensors), seqlens, Rotary(),
        DecodeArgs(dim**-0.5), f"{format} {dim} {ratio} {count} {power}",
    )  # fmt: skip


def of_codes() -> list[Any]:
    """Each format at each dtype; on the simulator one format a capability, and float16, which shows most."""
    return [
        pytest.param(target, dtype, format, id=f"{target}-{str(dtype)[6:]}-{format}")
        for target in targets("cpp", "triton", "cuda")
        for dtype in FLOATS
        for format in ("int8", "int4")
        if not target.sm or (dtype == torch.float16 and format == {80: "int8", 90: "int4"}[target.sm])
    ]


@pytest.mark.parametrize(("target", "dtype", "format"), of_codes())
def test_outlier_channels(target: Target, dtype: torch.dtype, format: str) -> None:
    for dim in (64, 256) if not target.sm else (64,):
        for ratio in (1.0, 30.0, 1000.0):
            errors = Errors()
            for count in (1, 8):
                for power in (1.0, 0.5):
                    check(target, outliers(target, format, dtype, dim, ratio, count, power), errors)
            errors.check(f"{format} {dim} {ratio}")


@pytest.mark.parametrize("format", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_of_almost_nothing(dtype: torch.dtype, format: str) -> None:
    """Also where one over the largest is no float: every value counts as much."""
    cache = bitfuse.KVCache(1, 64, 1, 16, dtype=dtype, format=format)
    cache.append(torch.randn(1, 64, 1, 16).to(dtype), torch.randn(1, 64, 1, 16).to(dtype))
    wanted = cache.gather(0)[1].double().mean(0).flatten()
    with bitfuse.use_backend("reference"):
        plain = bitfuse.decode_attention(torch.zeros(1, 1, 1, 16).to(dtype), cache).flatten()
    for size in (0.0, 1e-45, 1e-41, 1e-39, 1e-38, 1e-30):
        q = torch.full((1, 1, 1, 16), size).to(dtype)
        out, lse = bitfuse.decode_attention(q, cache, return_lse=True)
        assert_accurate(out.flatten(), wanted, plain, f"{size}")
        assert abs(float(lse) - math.log(64)) < 1e-5


@pytest.mark.parametrize("kind", range(12))
def test_heads_of_512_of_a_cache(kind: int) -> None:
    """New keys and values, rotation, codes and the attention, in draws of test_decode_attention.py."""
    errors, target = Errors(), Target("cpp", "cpu")
    for number in range(kind, 12 * 5, 12):
        check(target, draw(target, number, dims=(512, 512, 480, 264)), errors)
    errors.check("heads of 512")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_heads_of_512(dtype: torch.dtype) -> None:
    """What a model with such heads calls: packed sequences, rotation, codes of keys, merges."""
    q, k, v = (torch.randn(60, heads, 512).to(dtype) for heads in (4, 2, 2))
    cu = torch.tensor([0, 20, 60], dtype=torch.int32)
    got = bitfuse.varlen_attention(q, k, v, cu, cu, 40, 40, causal=True)

    def apart(of: torch.dtype) -> torch.Tensor:
        a = AttentionArgs(512**-0.5, right=0)
        parts = []
        for i, j in ((0, 20), (20, 60)):
            x, y, z = (t[None, i:j].to(of) for t in (q, k, v))
            parts.append(_reference(x, y, z, a)[0][0])
        return torch.cat(parts)

    assert_accurate(got, apart(torch.float64), apart(dtype))
    cos, sin = (torch.randn(64, 256) for _ in range(2))
    for backend in ("cpp", "reference"):
        with bitfuse.use_backend(backend):
            made = [
                bitfuse.rope(q[None], cos, sin),
                *bitfuse.merge_attention(q[None], torch.zeros(1, 4, 60), q[None], torch.ones(1, 4, 60)),
                *(
                    t
                    for t in bitfuse.quantize_kv(k[None, :32], v[None, :32], "int4")
                    if isinstance(t, torch.Tensor)
                ),
            ]
        if backend == "cpp":
            first = made
    for x, y in zip(first, made, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("target", targets("triton", "cuda"), ids=str)
def test_wider_heads_are_refused_with_the_reason(target: Target) -> None:
    (x,) = target.place(torch.zeros(1, 4, 1, 512).half())
    assert "512" in str(target.reason(attention_op, x, x, x, AttentionArgs(1.0)))
    cache = _placed(target, bitfuse.KVCache(1, 64, 1, 512, dtype=torch.float16).tensors)
    seqlens = torch.zeros(1, dtype=torch.int32)
    reason = target.reason(decode_attention_op, x, None, None, cache, seqlens, Rotary(), DecodeArgs(1.0))
    assert "512" in str(reason)


EMPTY = [(0, 16, 8, 2), (2, 0, 8, 2), (0, 3, 2, 8)]


@pytest.mark.parametrize("target", targets("cpp", "triton"), ids=str)
def test_tensors_without_elements_and_odd_strides(target: Target) -> None:
    """torch calls them contiguous whatever their strides are."""
    for shape in EMPTY:
        x = torch.randn(shape).half().transpose(2, 3)
        batch, seq, heads, _ = x.shape
        a = AttentionArgs(1.0)
        out, lse = target.run(attention_op, x, x, x, a)
        assert out.shape == x.shape and lse.shape == (batch, heads, seq)
        grads = target.run(attention_backward, x, None, x, x, x, out, lse, a, Wanted(), True)
        assert [g.shape for g in grads[:3]] == [x.shape] * 3
        cos = torch.randn(32, x.shape[3] // 2)
        assert target.run(rope_op, x, Rotary(cos, cos), False).shape == x.shape
        merged = target.run(merge_attention_op, x, lse, x, lse)
        assert merged[0].shape == x.shape
    # keys that are none, of queries that are some; a prefix that is none
    q, none = (
        target.place(torch.randn(2, 3, 2, 16).half())[0],
        torch.randn(2, 0, 16, 2).half().transpose(2, 3),
    )
    out, lse = target.run(attention_op, q, none, none, AttentionArgs(1.0))
    assert not out.any() and bool((lse == -math.inf).all())
    out, _ = target.run(attention_op, q, q, q, AttentionArgs(1.0, prefix_k=none, prefix_v=none))
    assert torch.equal(out, target.run(attention_op, q, q, q, AttentionArgs(1.0))[0])

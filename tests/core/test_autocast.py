"""Under torch.autocast every op takes what torch's own takes, and gives the dtype that torch's own gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import bitfuse
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from bitfuse.compat import flash_attn as fa
from bitfuse.ops.attention.kv_cache import CACHE_FORMATS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
B, T, H, KV, D = 2, 7, 4, 2, 16


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """torch's, with bitfuse's layout."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def packed(function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    cu = torch.arange(B + 1, dtype=torch.int32) * T
    return function(*(t.flatten(0, 1) for t in (q, k, v)), cu, cu, T, T).view(B, T, H, D)


def decoded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    format: str = "none",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    cache = bitfuse.KVCache(B, 32, KV, D, dtype=dtype, format=format)
    cache.append(k[:, :3], v[:, :3])
    return bitfuse.decode_attention(q, cache, k=k[:, 3:], v=v[:, 3:], causal=False)


def with_kvcache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k_cache, v_cache = torch.zeros(2, B, 16, KV, D)
    return fa.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=0)


def heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return bitfuse.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


ATTENTION: dict[str, Callable[..., torch.Tensor]] = {
    "attention": bitfuse.attention,
    "scaled_dot_product_attention": heads_first,
    "varlen_attention": lambda q, k, v: packed(bitfuse.varlen_attention, q, k, v),
    "flash_attn_func": fa.flash_attn_func,
    "flash_attn_varlen_func": lambda q, k, v: packed(fa.flash_attn_varlen_func, q, k, v),
    "flash_attn_with_kvcache": with_kvcache,
    "decode_attention": decoded,
    "decode_attention, bf16": lambda q, k, v: decoded(q, k, v, dtype=torch.bfloat16),
    "decode_attention, fp8": lambda q, k, v: decoded(q, k, v, "fp8"),
    "decode_attention, int8": lambda q, k, v: decoded(q, k, v, "int8", torch.float16),
}


def mixtures() -> Iterator[tuple[torch.dtype, ...]]:
    """All the same, and q and k of one dtype with v of another, as rotary embedding leaves them."""
    yield from ((d, d, d) for d in DTYPES)
    yield from ((a, a, b) for a, b in itertools.permutations(DTYPES[:2]))
    yield (torch.bfloat16, torch.float32, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_as_torch_s(name: str, dtype: torch.dtype) -> None:
    for dtypes in mixtures():
        drawn = [torch.randn(B, T, heads, D) for heads in (H, KV, KV)]
        leaves = [t.to(d).requires_grad_() for t, d in zip(drawn, dtypes, strict=True)]
        with torch.autocast("cpu", dtype):
            got, plain = ATTENTION[name](*leaves), sdpa(*leaves)
        assert got.dtype == plain.dtype == dtype
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        exact = sdpa(*doubles)
        if "fp8" in name:  # codes of 3 bits of mantissa
            torch.testing.assert_close(got.double(), exact, rtol=0.2, atol=0.2)
            continue
        if "bf16" in name:  # what the cache keeps
            plain = sdpa(*(t.bfloat16() for t in leaves)).to(dtype)
        assert_accurate(got.detach(), exact.detach(), plain.detach(), f"{name}, {dtypes}")
        if "cache" in name or "decode" in name:
            with pytest.raises(RuntimeError, match="decode_attention has no gradient"):
                got.sum().backward()
            continue
        grad = torch.randn_like(got)
        found = [
            torch.autograd.grad(out, of, grad.to(out.dtype))
            for out, of in ((got, leaves), (exact, doubles), (plain, leaves))
        ]
        for mine, wanted, theirs in zip(*found, strict=True):
            assert_accurate(mine, wanted, theirs, f"gradients of {name}, {dtypes}")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_masks_and_prefixes(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(B, T, H, D) for _ in range(3))
    bias, prefix = torch.randn(B, H, T, T), torch.randn(2, B, 3, H, D)
    with torch.autocast("cpu", dtype):
        for mask in (bias, bias.half(), bias > 0):
            query, key, value = (t.transpose(1, 2) for t in (q, k, v.to(dtype)))
            got = bitfuse.scaled_dot_product_attention(query, key, value, mask)
            plain = F.scaled_dot_product_attention(query, key, value, mask)
            assert got.dtype == plain.dtype == dtype
            torch.testing.assert_close(got, plain, rtol=2e-2, atol=2e-2)
        out = bitfuse.attention(
            q, k, v.to(dtype), attn_bias=bias, prefix_k=prefix[0], prefix_v=prefix[1].half()
        )
        assert out.dtype == dtype
        explained = bitfuse.explain(bitfuse.attention, q, k, v.to(dtype), attn_bias=bias)
        assert explained.chosen == "cpp"
    with pytest.raises(TypeError, match="v has dtype"):
        bitfuse.attention(q, k, v.to(dtype))
    with torch.autocast("cpu", dtype), pytest.raises(TypeError, match="q has dtype torch"):
        bitfuse.attention(q.double(), k, v)  # which autocast leaves alone, in torch too


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_elements_as_torch_s(dtype: torch.dtype) -> None:
    """Products and sums are left alone by autocast: two dtypes become the wider one."""
    with torch.autocast("cpu", dtype):
        for a, b in itertools.product(DTYPES, DTYPES):
            gate, up = torch.randn(3, 8).to(a), torch.randn(3, 8).to(b)
            got, wanted = bitfuse.gated_activation(gate, up), F.silu(gate) * up
            assert got.dtype == wanted.dtype == torch.promote_types(a, b)
            torch.testing.assert_close(got, wanted, rtol=3e-2, atol=1e-2)
            o1, o2 = torch.randn(B, T, H, D).to(a), torch.randn(B, T, H, D).to(b)
            lse = torch.randn(2, B, H, T)
            merged, _ = bitfuse.merge_attention(o1, lse[0], o2, lse[1])
            assert merged.dtype == torch.promote_types(a, b)
            cos, sin = torch.randn(T, D // 2).to(a), torch.randn(T, D // 2).to(b)
            assert bitfuse.rope(o1, cos, sin).dtype == a
            x, down, up = torch.randn(3, 8).to(a), torch.randn(4, 8).to(b), torch.randn(8, 4).to(b)
            for residual in (True, False):
                y = bitfuse.bottleneck_adapter(x, down, up, residual=residual)
                plain = F.linear(F.gelu(F.linear(x, down)), up)
                assert y.dtype == (x + plain if residual else plain).dtype, (a, b, residual)
    with pytest.raises(TypeError, match="up has dtype"):
        bitfuse.gated_activation(torch.randn(3, 8), torch.randn(3, 8).to(dtype))


@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_caches_take_what_models_give(format: str) -> None:
    """Rotated keys in float32 beside values in 16 bits, whatever the cache keeps."""
    for stored, dtype in itertools.product(DTYPES, DTYPES[1:]):
        cache = bitfuse.KVCache(B, 32, KV, D, dtype=stored, format=format)
        k, v = torch.randn(B, T, KV, D), torch.randn(B, T, KV, D)
        with torch.autocast("cpu", dtype):
            cache.append(k, v.to(dtype))
            bitfuse.append_kv(k.to(dtype), v, cache)
            assert bitfuse.quantize_kv(k[:, :1], v[:, :1].to(dtype), "fp8").k.shape == k[:, :1].shape
        if format == "none":
            assert torch.equal(cache.gather(0)[0][:T], k[0].to(stored).float())
            assert torch.equal(cache.gather(0)[1][T:], v[0].to(stored).float())
        assert cache.seqlens.tolist() == [2 * T] * B
        if format != "fp8":
            with pytest.raises(TypeError, match="has dtype"):
                cache.append(k.to(dtype), v)


@pytest.mark.parametrize("name", ATTENTION)
def test_the_reference_computes_as_kernels_do(name: str) -> None:
    """Float32 stays float32 where an op takes it so: the products of the plain code are not cast again."""
    q, k, v = torch.randn(B, T, H, D), torch.randn(B, T, KV, D), torch.randn(B, T, KV, D)
    with torch.autocast("cpu", torch.bfloat16):
        native = ATTENTION[name](q, k, v)
        with bitfuse.use_backend("reference"):
            plain = ATTENTION[name](q, k, v)
    if name == "decode_attention":  # over a cache in float32
        with bitfuse.use_backend("reference"):
            assert torch.equal(plain, decoded(q, k, v).bfloat16())
    torch.testing.assert_close(native, plain, rtol=2e-2, atol=2e-2)


def test_compiled() -> None:
    q, k, v = torch.randn(B, T, H, D), torch.randn(B, T, KV, D), torch.randn(B, T, KV, D).bfloat16()

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return bitfuse.attention(q, k, v)

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v), step(q, k, v))

"""KVCache, append_kv, quantize_kv; what decode_attention refuses, compiles and has no gradient of."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from backends import Target, targets
from bitfuse.ops.attention.append_kv import append_kv_op
from bitfuse.ops.attention.decode_attention import _flatten
from bitfuse.ops.attention.kv_cache import (
    BITS,
    CACHE_FORMATS,
    CacheTensors,
    DecodeArgs,
    Rotary,
    from_fp8,
)
from bitfuse.ops.attention.quantize_kv import quantize_kv_op
from descriptors import described
from levels import LEVELS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NATIVE = targets("cpp", "triton")


def filled(format: str = "none", page_size: int | None = None, **given: Any) -> bitfuse.KVCache:
    cache = bitfuse.KVCache(2, 64, 2, 32, dtype=torch.float32, format=format, page_size=page_size, **given)
    cache.append(torch.randn(2, 45, 2, 32), torch.randn(2, 45, 2, 32))
    return cache


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


# the cache


@pytest.mark.parametrize("page_size", (None, 16))
@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_what_is_appended_is_what_is_gathered(format: str, page_size: int | None) -> None:
    cache = bitfuse.KVCache(2, 90, 2, 32, dtype=torch.float32, format=format, page_size=page_size)
    k, v = torch.randn(2, 80, 2, 32), torch.randn(2, 80, 2, 32)
    pointers = [t.data_ptr() for t in cache.tensors if isinstance(t, torch.Tensor)]
    for begin, end in ((0, 7), (7, 8), (8, 8), (8, 70), (70, 80)):
        cache.append(k[:, begin:end], v[:, begin:end])
    assert cache.seqlens.tolist() == [80, 80]
    assert pointers == [t.data_ptr() for t in cache.tensors if isinstance(t, torch.Tensor)]
    for b in range(2):
        for got, wanted in zip(cache.gather(b), (k[b], v[b]), strict=True):
            assert got.shape == wanted.shape
            # half a step of the widest group: of a float8's 3 bits of mantissa, or of a range of some 6
            step = {"none": 0.0, "fp8": 8 / 16, "int8": 7 / 255, "int4": 7 / 15}[format]
            assert float((got - wanted).abs().max()) <= 0.5 * step + 0.002 * bool(step)
    cache.reset(torch.tensor([True, False]))
    assert cache.seqlens.tolist() == [0, 80]
    cache.reset()
    assert cache.seqlens.tolist() == [0, 0]


def test_bytes_are_few() -> None:
    sizes = {f: bitfuse.KVCache(1, 4096, 8, 128, format=f).nbytes for f in CACHE_FORMATS}
    elements = 2 * 4096 * 8 * 128
    assert sizes["none"] == 2 * elements + 4 and sizes["fp8"] == elements + 4
    # int4: a scale and an offset, 4 bytes, for 32 codes of K and of V; int8: for 64 of K and 128 of V
    for format, scales, tail in (
        ("int4", elements / 32 * 4, 64),
        ("int8", elements / 2 * (4 / 64 + 4 / 128), 128),
    ):
        codes = elements * BITS[format] // 8
        assert sizes[format] == codes + scales + 2 * tail * 8 * 128 * 2 + 4
    assert "int4, 1 x 4096 tokens, contiguous" in repr(bitfuse.KVCache(1, 4096, 8, 128, format="int4"))


@pytest.mark.parametrize("format", ("int8", "int4"))
def test_rejected_tokens_are_taken_back(format: str) -> None:
    """Lowering a length across the edge of a group gives what was there before."""
    cache = filled(format)
    before = cache.gather(0)
    cache.append(torch.randn(2, 19, 2, 32), torch.randn(2, 19, 2, 32))  # 64 tokens: the group is whole
    cache.seqlens.fill_(45)
    for got, wanted in zip(cache.gather(0), before, strict=True):
        assert torch.equal(got, wanted)
    k, v = torch.randn(2, 1, 2, 32), torch.randn(2, 1, 2, 32)
    cache.append(k, v)
    keys, values = cache.gather(1)
    assert torch.equal(keys[45], k[1, 0]) and torch.equal(values[45], v[1, 0])


@pytest.mark.parametrize("target", NATIVE, ids=str)
@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_append_is_the_reference_bit_for_bit(target: Target, format: str) -> None:
    for dtype, page_size, interleaved in zip(DTYPES, (None, 8, 32), (True, False, False), strict=True):
        cos, sin = target.place(*torch.randn(2, 100, 12))
        k, v = target.place(torch.randn(3, 37, 2, 40).to(dtype), torch.randn(3, 37, 2, 24).to(dtype))
        scale = torch.rand(2) + 0.5 if format == "fp8" else None
        found = []
        for one in (Target("reference", target.device), target):
            cache = bitfuse.KVCache(
                3, 90, 2, 40, head_dim_v=24, dtype=dtype, format=format, page_size=page_size, k_scale=scale
            )
            cache.seqlens.copy_(torch.tensor([0, 3, 40]))
            tensors = cache.tensors
            for name, t in tensors._asdict().items():
                if isinstance(t, torch.Tensor):
                    tensors = tensors._replace(**{name: target.place(t)[0]})
            one.run(
                append_kv_op, k, v, tensors, *target.place(cache.seqlens), Rotary(cos, sin, None, interleaved)
            )
            found.append(tensors)
        for name in CacheTensors._fields:
            a, b = (getattr(t, name) for t in found)
            if isinstance(a, torch.Tensor):
                assert torch.equal(bits(a), bits(b)), f"{format} {dtype}: {name}"


def test_a_full_cache_is_an_error_and_nothing_is_written() -> None:
    for format in CACHE_FORMATS:
        for backend in ("cpp", "reference"):
            cache = filled(format)
            cache.seqlens.copy_(torch.tensor([10, 60]))
            before = [bits(t).clone() for t in cache.tensors if isinstance(t, torch.Tensor)]
            k = torch.randn(2, 5, 2, 32)
            words = (
                r"cache_seqlens\[1\] is 60.*expected at most 59, and 5 new tokens do not fit: the cache of "
            )
            with bitfuse.use_backend(backend):
                with pytest.raises(ValueError, match=words + "sequence 1 is full"):
                    cache.append(k, k)
                with pytest.raises(ValueError, match="sequence 1 is full"):
                    bitfuse.decode_attention(torch.randn(2, 5, 4, 32), cache, k=k, v=k)
            assert cache.seqlens.tolist() == [10, 60]
            after = [bits(t) for t in cache.tensors if isinstance(t, torch.Tensor)]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("backend", ("cpp", "reference"))
def test_pages_that_are_not_there(backend: str) -> None:
    cache = filled(page_size=16)
    assert cache.block_table is not None
    q = torch.randn(2, 1, 4, 32)
    with bitfuse.use_backend(backend):
        cache.block_table[1, 3] = 99  # past the last page that 45 tokens need
        wanted = bitfuse.decode_attention(q, cache)
        assert torch.isfinite(wanted).all()
        for page in (8, -1):
            cache.block_table[1, 2] = page
            with pytest.raises(ValueError, match=rf"block_table\[1, 2\] is {page}, expected 0 to 7"):
                bitfuse.decode_attention(q, cache)
        cache.block_table[1, 2] = 6
        cache.seqlens[0] = -1
        with pytest.raises(ValueError, match=r"cache_seqlens\[0\] is -1, expected 0 or more"):
            bitfuse.decode_attention(q, cache)
        cache.seqlens[0] = 65
        with pytest.raises(ValueError, match=r"cache_seqlens\[0\] is 65.*expected at most 64"):
            bitfuse.decode_attention(q, cache)
        cache.seqlens[0] = 45
        table = torch.randn(40, 16)
        with pytest.raises(ValueError, match="rotary_cos"):
            bitfuse.decode_attention(q, cache, rotary_cos=table, rotary_sin=table)
        with pytest.raises(ValueError, match=r"positions (is|holds) 40, expected 0 to 39"):
            at = torch.tensor([[40]], dtype=torch.int32)
            bitfuse.decode_attention(q, cache, rotary_cos=table, rotary_sin=table, positions=at)


# quantize_kv


@pytest.mark.parametrize("target", NATIVE, ids=str)
@pytest.mark.parametrize("format", ("int8", "int4", "fp8"))
def test_quantize_kv(target: Target, format: str) -> None:
    for dtype in DTYPES:
        k, v = target.place((torch.randn(2, 64, 3, 72) * 3).to(dtype), torch.randn(2, 64, 3, 40).to(dtype))
        k[0, :32, 0, 5] = 1.5  # a group of one value
        got = target.run(quantize_kv_op, k, v, format, 32, 32)
        wanted = Target("reference", target.device).run(quantize_kv_op, k, v, format, 32, 32)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, wanted, strict=True))
        q = bitfuse.quantize_kv(k, v, format, 32, 32)
        if format == "fp8":
            assert float((from_fp8(q.k, q.k_scales, torch.float32) - k.float()).abs().max()) <= 0.5
            continue
        sizes: dict[str, Any] = dict(group_size=32, channel_group=32)
        cache = bitfuse.KVCache(2, 64, 3, 72, head_dim_v=40, dtype=dtype, format=format, **sizes)
        cache.append(k, v)
        names = ("k", "v", "k_scales", "k_offsets", "v_scales", "v_offsets")
        assert all(torch.equal(bits(getattr(q, n)), bits(getattr(cache.tensors, n))) for n in names)


@pytest.mark.parametrize("backend", ("cpp", "reference"))
def test_groups_that_are_not_finite(backend: str) -> None:
    k, v = torch.randn(1, 32, 1, 32), torch.randn(1, 32, 1, 64)
    k[0, 3, 0, 7], v[0, 5, 0, 40] = math.nan, math.inf
    with bitfuse.use_backend(backend):
        given: dict[str, Any] = dict(dtype=torch.float32, group_size=32, channel_group=32)
        cache = bitfuse.KVCache(1, 32, 1, 32, head_dim_v=64, format="int8", **given)
        cache.append(k, v)
        keys, values = cache.gather(0)
        assert keys[:, 0, 7].isnan().all() and int(keys.isnan().sum()) == 32
        assert values[5, 0, 32:].isnan().all() and int(values.isnan().sum()) == 32
        huge = bitfuse.quantize_kv(k.nan_to_num() + 1e6, v.nan_to_num(posinf=0) - 1e6, "int4")
        assert float(huge.k_offsets.max()) == 65504 and float(huge.v_offsets.min()) == -65504


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_fp8_comes_out(dtype: torch.dtype) -> None:
    q = torch.randn(1, 1, 2, 32).to(dtype)
    for of_k in (True, False):
        cache = bitfuse.KVCache(1, 40, 1, 32, dtype=dtype, format="fp8")
        k, v = torch.randn(1, 40, 1, 32).to(dtype), torch.randn(1, 40, 1, 32).to(dtype)
        (k if of_k else v)[0, 20, 0, 3] = math.nan
        cache.append(k, v)
        out = bitfuse.decode_attention(q, cache)
        assert out[..., 3].isnan().all() and bool(out[..., 4].isnan().all()) == of_k


# decode_attention


@pytest.mark.parametrize("name", ("q", "k", "v", "k_cache", "v_cache", "sinks", "alibi_slopes", "rotary_cos"))
def test_whatever_asks_for_a_gradient_is_told(name: str) -> None:
    given: dict[str, Any] = dict(
        q=torch.randn(2, 3, 2, 32), k=torch.randn(2, 3, 2, 32), v=torch.randn(2, 3, 2, 32),
        k_cache=torch.zeros(2, 16, 2, 32), v_cache=torch.zeros(2, 16, 2, 32), sinks=torch.randn(2),
        alibi_slopes=torch.rand(2), rotary_cos=torch.randn(20, 16), rotary_sin=torch.randn(20, 16),
    )  # fmt: skip
    given[name].requires_grad_()
    lengths = torch.zeros(2, dtype=torch.int32)
    if name.endswith("cache"):  # read only: a leaf that requires a gradient is not written to, as in torch
        with pytest.raises(RuntimeError, match="writes in place to a leaf"):
            bitfuse.decode_attention(**given, cache_seqlens=lengths)
        del given["k"], given["v"]
        lengths += 3
    for made in bitfuse.decode_attention(**given, cache_seqlens=lengths, return_lse=True):
        assert made.requires_grad
        with pytest.raises(RuntimeError, match="decode_attention has no gradient"):
            made.sum().backward()
    with torch.no_grad():
        assert not bitfuse.decode_attention(**given, cache_seqlens=lengths).requires_grad


def test_what_gets_no_gradient_is_refused() -> None:
    x, table = torch.randn(2, 3, 2, 32), torch.randn(20, 16)
    learnt = table.clone().requires_grad_()
    slopes = torch.rand(2).requires_grad_()
    calls: list[tuple[str, Any]] = [
        ("rotary_cos", lambda: bitfuse.rope(x, learnt, table)),
        ("rotary_sin", lambda: bitfuse.rope(x, table, learnt)),
        ("alibi_slopes", lambda: bitfuse.attention(x, x, x, alibi_slopes=slopes)),
        ("alibi_slopes", lambda: bitfuse.compat.flash_attn.flash_attn_func(x, x, x, alibi_slopes=slopes)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=f"{name} requires a gradient"):
            call()
        with torch.no_grad():
            call()


def test_decodes_as_torch_attends() -> None:
    """Token after token, with rope and an append a call, equal to causal attention over all."""
    q, k, v = torch.randn(2, 12, 4, 32), torch.randn(2, 12, 2, 32), torch.randn(2, 12, 2, 32)
    cos, sin = torch.randn(2, 20, 16)
    wanted = bitfuse.attention(bitfuse.rope(q, cos, sin), bitfuse.rope(k, cos, sin), v, causal=True)
    cache = bitfuse.KVCache(2, 16, 2, 32, dtype=torch.float32, page_size=4)
    parts = []
    for at, end in ((0, 5), (5, 6), (6, 8), (8, 12)):
        new: dict[str, Any] = dict(k=k[:, at:end], v=v[:, at:end], rotary_cos=cos, rotary_sin=sin)
        parts.append(bitfuse.decode_attention(q[:, at:end], cache, **new))
    torch.testing.assert_close(torch.cat(parts, 1), wanted)


def test_a_tree_is_its_branches() -> None:
    """Two branches verified at once give what each gives alone."""
    cache = filled()
    branches, root = [[1, 2], [3]], 0
    parents = {1: 0, 2: 1, 3: 0}
    tree = torch.eye(4, dtype=torch.bool)
    depth = torch.zeros(1, 4, dtype=torch.int32)
    for node, parent in parents.items():
        tree[node] |= tree[parent]
        depth[0, node] = depth[0, parent] + 1
    cos, sin = torch.randn(2, 64, 16)
    q, k, v = torch.randn(2, 4, 4, 32), torch.randn(2, 4, 2, 32), torch.randn(2, 4, 2, 32)
    rope: dict[str, Any] = dict(rotary_cos=cos, rotary_sin=sin)
    out = bitfuse.decode_attention(q, cache, k=k, v=v, tree_mask=tree[None], positions=45 + depth, **rope)
    for branch in branches:
        cache.seqlens.fill_(45)
        path = [root, *branch]
        alone = bitfuse.decode_attention(q[:, path], cache, k=k[:, path], v=v[:, path], **rope)
        torch.testing.assert_close(out[:, path], alone)


@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_compiles_and_opcheck(format: str) -> None:
    cos, sin = torch.randn(2, 64, 16)
    q, k = torch.randn(2, 1, 4, 32), torch.randn(2, 1, 2, 32)

    def step(q: torch.Tensor, k: torch.Tensor, cache: bitfuse.KVCache) -> Any:
        out = bitfuse.decode_attention(q, cache, k=k, v=k, rotary_cos=cos, rotary_sin=sin)
        return out + bitfuse.decode_attention(q, cache)

    torch.manual_seed(0)
    ours = filled(format, 16)
    torch.manual_seed(0)
    theirs = filled(format, 16)
    got = torch.compile(step, fullgraph=True, dynamic=False)(q, k, theirs)
    assert torch.equal(got, step(q, k, ours))
    assert ours.seqlens.tolist() == theirs.seqlens.tolist() == [46, 46]
    for name in CacheTensors._fields:
        a, b = getattr(ours.tensors, name), getattr(theirs.tensors, name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(bits(a), bits(b)), name
    flat = _flatten(q, k, k, ours.tensors, ours.seqlens, Rotary(cos, sin), DecodeArgs(0.2, right=0))
    # torch's own check of a schema multiplies the tensors, which float8 can't
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic", "test_schema")
    given = tests[:2] if format == "fp8" else tests
    torch.library.opcheck(torch.ops.bitfuse.decode_attention.default, flat, test_utils=given)
    if format != "none":
        flat = (torch.randn(1, 32, 2, 32), torch.randn(1, 32, 2, 32), format, 32, 32)
        torch.library.opcheck(torch.ops.bitfuse.quantize_kv.default, flat)


def test_explain_says_who_runs() -> None:
    cache = filled("int4")
    q, k = torch.randn(2, 1, 4, 32), torch.randn(2, 1, 2, 32)
    table = torch.randn(9, 16)
    assert bitfuse.explain(bitfuse.decode_attention, q, cache, k=k, v=k).chosen == "cpp"
    assert bitfuse.explain(bitfuse.append_kv, k, k, cache).chosen == "cpp"
    assert bitfuse.explain(bitfuse.quantize_kv, k, k, "fp8").chosen == "cpp"
    assert bitfuse.explain(bitfuse.rope, q, table, table).chosen == "cpp"
    out, lse = torch.randn(2, 5, 3, 40), torch.randn(2, 3, 5)
    assert bitfuse.explain(bitfuse.merge_attention, out, lse, out, lse).chosen == "cpp"


def test_no_gradient_is_an_error_and_not_a_silence() -> None:
    q = torch.randn(2, 1, 4, 32, requires_grad=True)
    out = bitfuse.decode_attention(q, filled())
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="decode_attention has no gradient"):
        out.sum().backward()
    with torch.no_grad():
        assert not bitfuse.decode_attention(q, filled()).requires_grad


def test_empty() -> None:
    none = bitfuse.KVCache(0, 16, 2, 32, dtype=torch.float32)
    assert bitfuse.decode_attention(torch.randn(0, 1, 4, 32), none).shape == (0, 1, 4, 32)
    cache = bitfuse.KVCache(2, 0, 2, 32, dtype=torch.float32)
    out, lse = bitfuse.decode_attention(torch.randn(2, 3, 4, 32), cache, return_lse=True)
    assert not out.any() and (lse == -math.inf).all()
    assert bitfuse.decode_attention(torch.randn(2, 0, 4, 32), filled()).shape == (2, 0, 4, 32)


CACHE = torch.randn(2, 16, 2, 32)
LENGTHS = torch.tensor([3, 4], dtype=torch.int32)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(q=None), TypeError, "q is a NoneType, expected a tensor"),
    (dict(q=torch.randn(1, 4, 32)), ValueError, r"q has shape \[1, 4, 32\], expected \[batch, seq"),
    (dict(q=torch.randn(2, 1, 4, 32).double()), TypeError, "q has dtype torch.float64"),
    (dict(q=torch.randn(2, 1, 3, 32)), ValueError, "q has 3 heads and k_cache 2, expected a multiple"),
    (dict(q=torch.randn(2, 1, 4, 24)), ValueError, "q has head_dim 24 and k_cache 32"),
    (dict(k_cache=CACHE.half()), TypeError, "k_cache has dtype torch.float16, expected torch.float32"),
    (
        dict(k_cache=CACHE[:1], v_cache=CACHE[:1]),
        ValueError,
        "expected 2 sequences, as q has, or a block_table",
    ),
    (dict(v_cache=CACHE[:, :8]), ValueError, r"v_cache has shape \[2, 8, 2, 32\]"),
    (dict(k_cache=CACHE.transpose(2, 3)), ValueError, "v_cache has shape|expected a dense last dimension"),
    (dict(v_cache=None), TypeError, "v_cache a NoneType"),
    (dict(cache_seqlens=3), TypeError, "cache_seqlens is a int, expected a tensor"),
    (dict(cache_seqlens=LENGTHS.long()), TypeError, "cache_seqlens has dtype torch.int64"),
    (dict(cache_seqlens=LENGTHS[:1]), ValueError, r"cache_seqlens has shape \[1\], expected \[2\]"),
    (dict(block_table=LENGTHS), ValueError, r"block_table has shape \[2\]"),
    (
        dict(
            block_table=LENGTHS.view(2, 1).expand(2, 2).contiguous(),
            k_cache=CACHE[:, :12],
            v_cache=CACHE[:, :12],
        ),
        ValueError,
        "pages of 12 tokens, expected a power of two",
    ),
    (dict(k=torch.randn(2, 1, 2, 32)), ValueError, "only one of k and v is given"),
    (
        dict(k=torch.randn(2, 1, 4, 32), v=torch.randn(2, 1, 4, 32)),
        ValueError,
        r"k has shape \[2, 1, 4, 32\], expected \[2, 1, 2, 32\]",
    ),
    (dict(rotary_cos=torch.randn(9, 16)), ValueError, "rotary_cos, rotary_sin and positions: expected both"),
    (dict(tree_mask=torch.ones(2, 1, 2, dtype=torch.bool)), ValueError, "tree_mask has shape"),
    (dict(alibi_slopes=torch.rand(3)), ValueError, r"alibi_slopes has shape \[3\], expected \[4\]"),
    (dict(sinks=torch.rand(3)), ValueError, r"sinks has shape \[3\], expected \[4\]"),
    (dict(softcap=-1.0), ValueError, "softcap -1.0"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD, ids=[b[2][:30] for b in BAD])
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = dict(
        q=torch.randn(2, 1, 4, 32), k_cache=CACHE, v_cache=CACHE, cache_seqlens=LENGTHS
    )
    with pytest.raises(error, match=words):
        bitfuse.decode_attention(**given | changes)


BAD_CACHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(format="int5"), ValueError, "format is 'int5', expected one of 'none'"),
    (dict(dtype=torch.int8), TypeError, "dtype is torch.int8"),
    (dict(head_dim=600), ValueError, "head_dim is 600, expected 1 to 512"),
    (dict(kv_heads=0), ValueError, "kv_heads is 0, expected 1 or more"),
    (dict(format="int4", head_dim=20), ValueError, "head_dim is 20, expected a multiple of 8 for int4"),
    (dict(page_size=12), ValueError, "page_size is 12, expected a power of two"),
    (dict(group_size=24), ValueError, "group_size is 24, expected a power of two"),
    (dict(channel_group=24), ValueError, "channel_group is 24, expected a multiple of 32"),
    (dict(pages=4), ValueError, "pages is 4 without a page_size"),
    (dict(page_size=16, pages=-1), ValueError, "pages is -1, expected 0 or more"),
    (dict(page_size=2.0), TypeError, "page_size is 2.0, expected an int"),
    (dict(max_len=16.0), TypeError, "max_len is 16.0, expected an int"),
    (dict(page_size=16, pages=2.5), TypeError, "pages is 2.5, expected an int"),
    (dict(head_dim="32"), TypeError, "head_dim is '32', expected an int"),
    (dict(k_scale=torch.ones(2)), ValueError, "k_scale is given, which a cache of format 'none'"),
    (dict(format="fp8", k_scale=torch.ones(3)), ValueError, r"k_scale has shape \[3\], expected \[2\]"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD_CACHES, ids=[b[2][:30] for b in BAD_CACHES])
def test_a_cache_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = dict(batch=1, max_len=16, kv_heads=2, head_dim=32)
    with pytest.raises(error, match=words):
        bitfuse.KVCache(**given | changes)


@pytest.mark.parametrize("page_size", (None, 16))
@pytest.mark.parametrize("format", CACHE_FORMATS)
@pytest.mark.parametrize("backend", ("cpp", "reference"))
def test_caches_of_nothing(format: str, page_size: int | None, backend: str) -> None:
    """No room, no sequences, no new tokens: what torch's attention over no keys would be."""
    for batch, max_len in ((2, 0), (0, 16), (0, 0)):
        cache = bitfuse.KVCache(
            batch, max_len, 2, 32, dtype=torch.float32, format=format, page_size=page_size
        )
        none, one = torch.randn(batch, 0, 2, 32), torch.randn(batch, 1, 2, 32)
        with bitfuse.use_backend(backend):
            cache.append(none, none)
            out, lse = bitfuse.decode_attention(one, cache, k=none, v=none, return_lse=True)
            assert out.shape == (batch, 1, 2, 32) and not out.any() and (lse == -math.inf).all()
            if batch:
                assert cache.gather(0)[0].shape == (0, 2, 32)
                with pytest.raises(ValueError, match=r"at most 0|fit"):
                    cache.append(one, one)
        explained = bitfuse.explain(bitfuse.decode_attention, one, cache)
        assert explained.op == "decode_attention" and "nan" not in str(explained)


def test_gather_looks_at_lengths() -> None:
    for length in (65, 2**31 - 1, -1):
        cache = filled()
        cache.seqlens[1] = length
        with pytest.raises(ValueError, match=rf"cache_seqlens\[1\] is {length}"):
            cache.gather(1)
    cache = filled()
    with pytest.raises(ValueError, match=r"new tokens is 70, expected at most 64|70 new tokens"):
        cache.append(torch.randn(2, 70, 2, 32), torch.randn(2, 70, 2, 32))


LEVEL = """
from backends import Target
from test_decode_attention import KINDS, check_kind
from test_kv_cache import CACHE_FORMATS, test_append_is_the_reference_bit_for_bit as append
for kind in range(KINDS):
    check_kind(Target("cpp", "cpu"), kind, 12)
for format in CACHE_FORMATS:
    append(Target("cpp", "cpu"), format)
"""


@pytest.mark.parametrize("level", LEVELS[:-1])  # the widest is the default
def test_every_level(level: str) -> None:
    here = Path(__file__).parent
    path = [str(here), *sys.path, os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "BITFUSE_CPU_ISA": level}
    done = subprocess.run([sys.executable, "-c", LEVEL], env=env, capture_output=True, text=True)
    if "which this machine does not support" in done.stderr:
        return
    assert done.returncode == 0, done.stderr[-2000:]


def test_native_code_trusts_no_integer() -> None:
    from bitfuse import _cpu  # type: ignore[attr-defined]

    cache = bitfuse.KVCache(2, 64, 2, 32, dtype=torch.float32, format="int8").tensors
    k = torch.randn(2, 1, 2, 32)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("k", dict(dtype="FLOAT32")), ("k", dict(address=0)), ("k", dict(shape=(-1, 64, 2, 32))),
        ("k", dict(shape=(2, 1 << 62, 2, 32))), ("k", dict(shape=(2, 64, 0, 32))),
        ("k", dict(shape=(2, 64, 2, 0))), ("k", dict(shape=(2, 64, 2, 600))),
        ("v", dict(shape=(2, 64, 2, 513))),
        ("k", dict(strides=(-1, 64, 32, 1))), ("k", dict(strides=(1 << 62, 64, 32, 1))),
        ("v", dict(strides=(4096, 64, 32, 2))), ("v", dict(strides=(4096, 64, 1 << 62, 1))),
        ("k_scales", dict(address=0)), ("k_offsets", dict(address=1)),
        ("v_scales", dict(shape=(2, 64, 2, 2))), ("v_offsets", dict(dtype="FLOAT32")),
        ("k_tail", dict(address=2)), ("v_tail", dict(shape=(2, 64, 2, 32))),
    ]  # fmt: skip
    assert cache.k_tail is not None
    bad: list[Any] = [
        cache._replace(**{name: described(_cpu, getattr(cache, name), **changes)}) for name, changes in wrong
    ]
    bad += [
        cache._replace(format="int5"), cache._replace(group_size=24), cache._replace(channel_group=8),
        cache._replace(format="int4"), cache._replace(k_tail=cache.k_tail[:1]), cache._replace(k=cache.k[:1]),
    ]  # fmt: skip
    _cpu.append_kv(k, k, cache, LENGTHS, Rotary())
    for one in bad:
        with pytest.raises(ValueError, match="expected"):
            _cpu.append_kv(k, k, one, LENGTHS, Rotary())
    for changes in (
        dict(address=0), dict(address=k.data_ptr() + 1), dict(strides=(-1, 0, 0, 1)),
        dict(shape=(2, -1, 2, 32)), dict(strides=(1 << 62, 0, 0, 1)), dict(shape=(2, 2, 2, 32)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            _cpu.append_kv(k, described(_cpu, k, **changes), cache, LENGTHS, Rotary())
    for lengths in (described(_cpu, LENGTHS, address=0), described(_cpu, LENGTHS, shape=(3,))):
        with pytest.raises(ValueError, match="cache_seqlens"):
            _cpu.append_kv(k, k, cache, lengths, Rotary())
    angles = torch.zeros(64, 16)
    for rotary in (
        Rotary(angles, described(_cpu, angles, shape=(63, 16))), Rotary(angles[:, :0], angles[:, :0]),
        Rotary(angles, angles, torch.zeros(2, 2, dtype=torch.int32)),
        Rotary(torch.zeros(64, 17), torch.zeros(64, 17)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            _cpu.append_kv(k, k, cache, LENGTHS, rotary)


def test_storage_under_a_cache_may_be_swapped() -> None:
    """No address is kept from call to call."""
    cache = bitfuse.KVCache(1, 8, 2, 16, dtype=torch.float32)
    k, v, q = (torch.randn(1, 5, 2, 16) for _ in range(3))
    cache.append(k, v)
    expected = bitfuse.decode_attention(q, cache)
    old = cache.tensors.k.data
    cache.tensors.k.data = old.clone()
    old.fill_(torch.nan)
    assert torch.equal(bitfuse.decode_attention(q, cache), expected)
    held = cache.tensors.v.clone()
    cache.tensors.v.untyped_storage().resize_(0)
    cache.tensors.v.untyped_storage().resize_(held.nbytes)
    cache.tensors.v.copy_(held)
    assert torch.equal(bitfuse.decode_attention(q, cache), expected)

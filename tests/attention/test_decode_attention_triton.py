"""What is the Triton backend's own: stretches over many sequences, what is not there is neither written nor
read, what it compiles; and test_decode_attention's draws, on the simulator a part of them."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.kernels.core.launch import HANDLES
from bitfuse.ops.attention.append_kv import append_kv_op
from bitfuse.ops.attention.decode_attention import _reference, decode_attention_op
from bitfuse.ops.attention.kv_cache import CACHE_FORMATS, CacheTensors, DecodeArgs, Rotary
from test_decode_attention import DRAWS, KINDS, Draw, check_kind, exact

pytest.importorskip("triton")
from bitfuse.kernels.attention import append_kv
from bitfuse.kernels.attention import decode_attention as backend

TARGETS = pytest.mark.parametrize("target", targets("triton"), ids=str)
# of which kinds on the simulator, where a draw is seconds of compilation; together all formats and dtypes
DRAWN = {80: (0, 5, 7, 11), 90: (2, 4, 8, 10)}


def drawn() -> list[Any]:
    """Each target with each of its kinds, and how many draws of it."""
    return [
        pytest.param(target, kind, 2 if target.sm else DRAWS, id=f"{target}-{kind}")
        for target in targets("triton")
        for kind in (DRAWN[target.sm] if target.sm else range(KINDS))
    ]


@pytest.mark.parametrize(("target", "kind", "draws"), drawn())
def test_draws(target: Target, kind: int, draws: int) -> None:
    check_kind(target, kind, draws)


def filled(target: Target, lengths: list[int], **given: Any) -> tuple[CacheTensors, torch.Tensor]:
    """A cache of 2 heads of 32 channels in bfloat16 on the target, with so many tokens, and lengths."""
    cache = bitfuse.KVCache(len(lengths), 192, 2, 32, **given)
    k, v = (torch.randn(len(lengths), 192, 2, 32).bfloat16() for _ in range(2))
    with bitfuse.use_backend("reference"):
        for b, length in enumerate(lengths):
            own = cache.tensors._replace(
                **{n: getattr(cache.tensors, n)[b : b + 1] for n in ("k_tail", "v_tail", "block_table")
                   if getattr(cache.tensors, n) is not None}
            )  # fmt: skip
            if cache.block_table is None:
                rows = [n for n in CacheTensors._fields[:6] if own.format in ("int8", "int4") or n in "kv"]
                own = own._replace(**{n: getattr(own, n)[b : b + 1] for n in rows})
            append_kv_op(
                k[b : b + 1, :length], v[b : b + 1, :length], own, torch.zeros(1, dtype=torch.int32), Rotary()
            )
    tensors = cache.tensors
    for name, t in tensors._asdict().items():
        if isinstance(t, torch.Tensor):
            tensors = tensors._replace(**{name: target.place(t)[0]})
    (seqlens,) = target.place(torch.tensor(lengths, dtype=torch.int32))
    return tensors, seqlens


def compare(
    target: Target, q: torch.Tensor, cache: CacheTensors, seqlens: torch.Tensor, a: DecodeArgs
) -> None:
    (q,) = target.place(q)
    d = Draw(q, None, None, cache, seqlens, Rotary(), a, "")
    got, got_lse = target.run(decode_attention_op, *d.call())
    plain, plain_lse = _reference(*d.call())
    out, lse = exact(d)
    assert_accurate(got, out, plain)
    empty = lse == -math.inf
    assert torch.equal(got_lse.cpu() == -math.inf, empty)
    assert_accurate(*(t.cpu().masked_fill(empty, 0) for t in (got_lse, lse, plain_lse)))


@TARGETS
@pytest.mark.parametrize("page_size", (None, 16, 64))
def test_stretches_cross_sequences(
    target: Target, page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long and short sequences and those without a token; stretches of one tile, of several sequences, and
    one program that has all."""
    lengths = [0, 192, 3, 0, 70, 64, 0]
    cache, seqlens = filled(target, lengths, page_size=page_size)
    q = torch.randn(7, 2, 12, 32).bfloat16()
    compare(target, q, cache, seqlens, DecodeArgs(0.2, right=0))
    for splits in (1, 3, 7, 40):
        backend._plans.cache_clear()
        monkeypatch.setattr(backend, "splits_of", lambda *args, n=splits: n)
        compare(target, q, cache, seqlens, DecodeArgs(0.2, 80, 0))
    backend._plans.cache_clear()


@TARGETS
def test_many_rows(target: Target) -> None:
    """More rows than a tile has, whose windows begin at different tiles."""
    cache, seqlens = filled(target, [150, 40], format="int8")
    compare(target, torch.randn(2, 45, 6, 32).bfloat16(), cache, seqlens, DecodeArgs(0.2, 20, 0))


@TARGETS
@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_what_is_not_there(target: Target, format: str) -> None:
    """A cache that is full, a length that is none, pages that are not there: nothing past the tensors is
    touched, tokens that have a place are written and seen, others are neither."""
    cache, _ = filled(target, [150, 150, 150, 150], page_size=64, format=format)
    assert cache.block_table is not None
    cache.block_table[2, 1] = 99
    cache.block_table[3, 2] = -1
    (seqlens,) = target.place(torch.tensor([190, -5, 60, 126], dtype=torch.int32))
    k, v = target.place(*torch.randn(2, 4, 6, 2, 32).bfloat16())
    before = {n: t.clone() for n, t in cache._asdict().items() if isinstance(t, torch.Tensor)}
    out, lse = target.run(
        decode_attention_op, *target.place(torch.randn(4, 6, 2, 32).bfloat16()), k, v, cache, seqlens,
        Rotary(), DecodeArgs(0.2, right=0),
    )  # fmt: skip
    assert torch.isfinite(out).all()
    # of sequence 1, from 0 on, its 6 new tokens alone; the others have keys
    assert torch.isfinite(lse[[0, 2, 3]]).all()
    if format == "none":
        pages = cache.block_table.long()
        for b, begin, count in ((0, 190, 2), (2, 60, 4), (3, 126, 2)):
            page, slot = int(pages[b, begin // 64]), begin % 64
            assert torch.equal(cache.k[page, slot : slot + count], k[b, :count])
            before["k"][page, slot : slot + count] = k[b, :count]
            before["v"][page, slot : slot + count] = v[b, :count]
        assert torch.equal(cache.k, before["k"]) and torch.equal(cache.v, before["v"])


@TARGETS
@pytest.mark.parametrize("format", ("int8", "int4"))
def test_a_tail_is_read_before_it_is_written(target: Target, format: str) -> None:
    """A begun group becomes whole while tokens three groups later take its rows of the tail."""
    found = []
    torch.manual_seed(1)
    k, v = torch.randn(2, 2, 60, 2, 32).bfloat16()
    for one in (Target("reference", target.device), target):
        torch.manual_seed(2)
        cache, seqlens = filled(target, [5, 13], format=format, group_size=16)
        one.run(append_kv_op, *target.place(k, v), cache, seqlens, Rotary())
        found.append(cache)
    for name in CacheTensors._fields:
        a, b = (getattr(c, name) for c in found)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), name


@TARGETS
def test_nan_in_fp8_comes_out(target: Target) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cache = bitfuse.KVCache(1, 40, 1, 32, dtype=dtype, format="fp8")
        k, v = torch.randn(1, 40, 1, 32).to(dtype), torch.randn(1, 40, 1, 32).to(dtype)
        v[0, 20, 0, 3], v[0, 20, 0, 9] = math.nan, 1e4
        with bitfuse.use_backend("reference"):
            cache.append(k, v)
        tensors = cache.tensors._replace(**dict(zip("kv", target.place(*cache.tensors[:2]), strict=True)))
        q, seqlens = target.place(torch.zeros(1, 1, 2, 32).to(dtype), cache.seqlens)
        out, _ = target.run(decode_attention_op, q, None, None, tensors, seqlens, Rotary(), DecodeArgs(1.0))
        assert out[..., 3].isnan().all() and int(out.isnan().sum()) == 2
        assert float((out[..., 9].float() - 448 / 40).abs().max()) < 1


@TARGETS
def test_what_it_compiles(target: Target) -> None:
    """Tensor cores, 16 bytes a copy, pages or not, and nothing in local memory."""
    for format, page_size in (("none", None), ("none", 16), ("int4", 64)):
        HANDLES.clear()
        cache = bitfuse.KVCache(1, 64, 1, 128, format=format, page_size=page_size).tensors
        for name, t in cache._asdict().items():
            if isinstance(t, torch.Tensor):
                cache = cache._replace(**{name: target.place(t)[0]})
        q, seqlens = target.place(
            torch.randn(1, 1, 8, 128).bfloat16(), torch.full((1,), 64, dtype=torch.int32)
        )
        target.run(decode_attention_op, q, None, None, cache, seqlens, Rotary(), DecodeArgs(0.1, right=0))
        texts = {h.metadata.name: h.asm["ptx"] for own in HANDLES.values() for h in own.values()}
        assert set(texts) == {"_decode_kernel", "_merge_kernel"}
        assert not any(".local" in ptx for ptx in texts.values())
        ptx = texts["_decode_kernel"]
        assert "mma.sync" in ptx
        assert re.search(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx), (format, page_size)


def test_splits() -> None:
    """One wave, or waves that are full."""
    assert backend.splits_of(8, 264, 10**6) == 33
    assert backend.splits_of(8, 264, 5) == 5
    for heads in range(1, 700):
        splits = backend.splits_of(heads, 264, 10**6)
        waves = -(-heads * splits // 264)
        assert heads * splits >= 0.85 * waves * 264 or splits == max(1, 264 // heads)


def test_reasons() -> None:
    target = targets("triton")[0]
    cache, seqlens = filled(target, [3])
    (q,) = target.place(torch.randn(1, 1, 2, 32).bfloat16())
    args = (None, None, cache, seqlens, Rotary(), DecodeArgs(1.0))
    assert backend.supports(q, *args) is None
    far = cache.k.as_strided((1, 2**28, 2, 32), (0, 0, 32, 1))
    reason = append_kv.refused(q.device, cache._replace(k=far, v=far), 1)
    assert reason == "268435456 tokens of capacity and 1 new ones are more than 2**28 - 1"


def test_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from bitfuse.kernels.attention import decode_attention as backend\n"
        "from bitfuse.kernels.attention.append_kv import refused\n"
        "from bitfuse.ops.attention.kv_cache import CacheTensors\n"
        "x = torch.zeros(1, 2, 1, 8); print(refused(x.device, CacheTensors(x, x), 1))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "triton is not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the card is what it is")
def test_cards_with_less_shared_memory() -> None:
    """8 bits in pages shorter than a tile, where a program has 99 KiB."""
    cache = bitfuse.KVCache(2, 96, 2, 128, dtype=torch.bfloat16, format="int8", page_size=16, group_size=16)
    cache.append(*(torch.randn(2, 75, 2, 128).bfloat16() for _ in range(2)))
    a = DecodeArgs(128**-0.5)
    compare(
        Target("triton", "cpu", 86), torch.randn(2, 1, 16, 128).bfloat16(), cache.tensors, cache.seqlens, a
    )

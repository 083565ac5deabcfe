"""What is the CUDA backend's own: draws that it serves, how work is cut among blocks, magnitudes that float16
lacks, what is not there is neither written nor read, refusals, plans and bindings."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import bitfuse
import cusim
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.ops.attention.decode_attention import _reference, decode_attention_op
from bitfuse.ops.attention.kv_cache import CACHE_FORMATS, CacheTensors, DecodeArgs, Rotary
from descriptors import described
from test_attention import Errors
from test_decode_attention import DTYPES, KINDS, Draw, check, draw, exact

pytest.importorskip("bitfuse._cuda")
from bitfuse.core.cuda import cuda
from bitfuse.ops.attention import decode_attention_cuda as backend

TARGETS = pytest.mark.parametrize("target", targets("cuda"), ids=str)
HALVES = [torch.float16, torch.bfloat16]
H100 = (132, 232448, 233472, 90)
A100 = (108, 166912, 167936, 80)
L40S = (142, 101376, 102400, 89)
DIMS = {"none": (8, 40, 64, 72, 128, 256), "fp8": (16, 48, 64, 80, 128, 256), "int8": (16, 48, 64, 80, 128),
        "int4": (32, 64, 96, 128)}  # fmt: skip


@pytest.mark.parametrize("kind", [k for k in range(KINDS) if DTYPES[k % 3] in HALVES])
@TARGETS
def test_draws(target: Target, kind: int) -> None:
    format = CACHE_FORMATS[kind // 3]
    page_sizes = (None, None, 64, 128) if format in ("int8", "int4") else (None, None, 1, 4, 16, 64)
    errors = Errors()
    for number in range(kind, (16 if target.sm else 64) * KINDS, KINDS):
        d = draw(target, number, DIMS[format], page_sizes, (32, 64))
        reason = target.reason(decode_attention_op, *d.call())
        assert reason is None or "odd number" in reason, f"{d.what}: {reason}"
        if reason is None:
            check(target, d, errors)
    errors.check(f"{format} {DTYPES[kind % 3]}")


def filled(
    target: Target, lengths: list[int], dims: tuple[int, int] = (64, 64), times: float = 1, **given: Any
) -> tuple[CacheTensors, torch.Tensor]:
    """A cache of 2 heads on the target, each sequence with its own tokens, and the lengths."""
    kv_heads, dtype = given.pop("kv_heads", 2), given.pop("dtype", torch.bfloat16)
    room = given.pop("room", max([1, *lengths]))
    cache = bitfuse.KVCache(
        len(lengths), room, kv_heads, dims[0], head_dim_v=dims[1], dtype=dtype, **given
    )  # fmt: skip
    k, v = ((times * torch.randn(len(lengths), max(lengths), kv_heads, d)).to(dtype) for d in dims)
    with bitfuse.use_backend("reference"):
        cache.append(k, v)  # of codes, one length for all: a tail is of a length
    tensors = cache.tensors
    for name, t in tensors._asdict().items():
        if isinstance(t, torch.Tensor):
            tensors = tensors._replace(**{name: target.place(t)[0]})
    (seqlens,) = target.place(torch.tensor(lengths, dtype=torch.int32))
    return tensors, seqlens


@contextlib.contextmanager
def simulated(target: Target, multiprocessors: int) -> Iterator[None]:
    """So many multiprocessors."""
    with cusim.device(multiprocessors=multiprocessors) if target.sm else contextlib.nullcontext():
        yield


def compare(target: Target, d: Draw, what: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    (q,) = target.place(d.q)
    d = Draw(q, d.k, d.v, d.cache, d.seqlens, d.rotary, d.args, what)
    got, got_lse = target.run(decode_attention_op, *d.call())
    plain, plain_lse = _reference(*d.call())
    out, lse = exact(d)
    assert_accurate(got, out, plain, what)
    empty = lse == -math.inf
    assert torch.equal(got_lse.cpu() == -math.inf, empty), what
    assert_accurate(*(t.cpu().masked_fill(empty, 0) for t in (got_lse, lse, plain_lse)), what)
    return got, got_lse


def plain_call(
    cache: CacheTensors, seqlens: torch.Tensor, group: int = 4, queries: int = 1, **more: Any
) -> Draw:
    dtype = more.pop("dtype", torch.bfloat16)
    q = torch.randn(len(seqlens), queries, cache.k.shape[2] * group, cache.head_dim).to(dtype)
    args = DecodeArgs(cache.head_dim**-0.5, -1, more.pop("right", 0), **more)
    return Draw(q, None, None, cache, seqlens, Rotary(), args, "")


@TARGETS
def test_stretches_over_sequences(target: Target) -> None:
    """Blocks take equal stretches of uneven sequences, so that some have parts of several and some sequences
    lie in many blocks; whoever comes last adds the parts in the same order."""
    cache, seqlens = filled(target, [0, 300, 1, 0, 129, 64, 700], page_size=16)
    d = plain_call(cache, seqlens)
    for multiprocessors in (1, 3, 16):
        with simulated(target, multiprocessors):
            first = compare(target, d, f"{multiprocessors} multiprocessors")
        if target.sm:  # races in global memory too
            settings = dict(sm=target.sm, multiprocessors=multiprocessors, racecheck=2, seed=multiprocessors)
            with cusim.device(**settings), bitfuse.use_backend("cuda"):
                again = decode_attention_op(*d.call())
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("format", CACHE_FORMATS)
@TARGETS
def test_more_rows_than_a_tile(target: Target, format: str) -> None:
    cache, seqlens = filled(target, [150, 150], format=format)
    with simulated(target, 2):
        compare(target, plain_call(cache, seqlens, group=5, queries=7), format)


@pytest.mark.parametrize("format", ["int8", "int4"])
@TARGETS
def test_codes_of_256_channels(target: Target, format: str) -> None:
    """Their stages and a tail's fit into the shared memory of an H100, not of an A100."""
    cache, seqlens = filled(target, [150, 150], dims=(256, 160), format=format)
    d = plain_call(cache, seqlens, group=3)
    with simulated(target, 2), cusim.device(sm=target.sm or None):
        reason = target.reason(decode_attention_op, *d.call())
        if target.sm == 80:
            assert reason is not None and "no kernel" in reason
        elif reason is None:
            compare(target, d, format)


@pytest.mark.parametrize("format", CACHE_FORMATS)
@pytest.mark.parametrize("target", targets("cuda")[:1], ids=str)
def test_little_shared_memory(target: Target, format: str) -> None:
    """A block of 99 KiB."""
    if target.sm:
        target = replace(target, sm=86)
    cache, seqlens = filled(target, [300, 300], dims=(128, 128), format=format)
    with simulated(target, 2):
        compare(target, plain_call(cache, seqlens, group=8), format)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("times", [1e-4, 1e-2, 300.0, 1e6])
@TARGETS
def test_magnitudes(target: Target, times: float, format: str) -> None:
    """Codes are multiplied in float16, of which bfloat16's numbers overflow, and lose what is small."""
    cache, seqlens = filled(target, [160], times=times, format=format, dims=(64, 64))
    d = plain_call(cache, seqlens)
    d.args = d.args._replace(softmax_scale=0.1 / times)
    compare(target, d, f"{format} {times}")


@TARGETS
def test_magnitudes_change(target: Target) -> None:
    """V of later tokens is a thousand times larger, then smaller again: sums follow."""
    for dtype in HALVES:
        cache = bitfuse.KVCache(1, 256, 1, 64, dtype=dtype, format="int8", group_size=32)
        k, v = torch.randn(2, 1, 256, 1, 64).to(dtype)
        v[:, :64] *= 1e-3
        v[:, 96:128] *= 1e3
        k[:, 96:128] *= 0.01
        with bitfuse.use_backend("reference"):
            cache.append(k, v)
        with simulated(target, 1):
            compare(target, plain_call(cache.tensors, cache.seqlens, dtype=dtype))


@TARGETS
def test_not_a_number(target: Target) -> None:
    """A NaN in the cache is a NaN in what sees it, and nowhere else."""
    for format in CACHE_FORMATS:
        cache, seqlens = filled(target, [96], format=format, dims=(64, 64))
        for poisoned in (cache.k, cache.v) if format in ("none", "fp8") else (cache.k_scales, cache.v_scales):
            assert poisoned is not None
            at = poisoned.view(torch.uint8).flatten()
            kept = at.clone()
            # of the first head; 0x7f7f is a NaN in bfloat16 and, with all bits, in the others
            poisoned.view(torch.uint8)[0, 0, 0, :2] = 0xFF if poisoned.element_size() == 2 else 0x7F
            d = plain_call(cache, seqlens)
            (q,) = target.place(d.q)
            out, _ = target.run(decode_attention_op, q, *d.call()[1:])
            assert out[:, :, :4].isnan().any() and out[:, :, 4:].isfinite().all(), format
            at.copy_(kept)


@TARGETS
def test_what_is_not_there(target: Target) -> None:
    """Lengths beyond the cache and pages that do not exist: nothing outside is read or written."""
    lengths = [40, 64]
    for format in CACHE_FORMATS:
        page_size = 32 if format in ("int8", "int4") else 16
        cache, seqlens = filled(target, [64, 64], format=format, page_size=page_size, dims=(64, 64))
        assert cache.block_table is not None
        good = [t.clone() for t in cache if isinstance(t, torch.Tensor)]
        seqlens.copy_(torch.tensor([2_000_000_000, 64], dtype=torch.int32))
        d = plain_call(cache, seqlens)
        new = torch.randn(2, 1, 2, 64).bfloat16()
        q, k, v = target.place(d.q, new, new)
        out, _ = target.run(decode_attention_op, q, k, v, *d.call()[3:])
        assert out.isfinite().all()
        same = zip((t for t in cache if isinstance(t, torch.Tensor)), good, strict=True)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in same)
        seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        for bad in (-1, 1 << 30):
            cache.block_table[0, 0] = bad
            out, _ = target.run(decode_attention_op, q, *d.call()[1:])
            assert out.isfinite().all()


@TARGETS
def test_nothing_to_do(target: Target) -> None:
    cache, seqlens = filled(target, [5, 5])
    d = plain_call(cache, seqlens)
    for q in (d.q[:, :0], d.q[:, :, :0]):
        out, lse = target.run(decode_attention_op, *target.place(q), *d.call()[1:])
        assert out.shape == q.shape and lse.shape == (2, q.shape[2], q.shape[1])


@TARGETS
def test_refuses(target: Target) -> None:
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("q is float32", {"dtype": torch.float32}, {}),
        ("head dims 20 and 64 are not multiples of 8", {"dims": (20, 64)}, {}),
        ("head dims 64 and 24 are not multiples of 16", {"dims": (64, 24), "format": "fp8"}, {}),
        ("head dims 48 and 48 are not multiples of 32", {"dims": (48, 48), "format": "int4"}, {}),
        ("16 tokens share K's scales", {"format": "int8", "group_size": 16}, {}),
        ("are an odd number", {"format": "int4", "dims": (96, 96), "kv_heads": 1}, {}),
        ("are more than 128 rows", {}, {"queries": 65, "group": 2}),
    ]
    with cusim.device(sm=target.sm) if target.sm else contextlib.nullcontext():
        for reason, cache_args, call_args in cases:
            dtype = cache_args.get("dtype", torch.bfloat16)
            cache, seqlens = filled(target, [8], room=64, **cache_args)
            d = plain_call(cache, seqlens, dtype=dtype, **call_args)
            found = target.reason(decode_attention_op, *d.call())
            assert found is not None and reason in found, found
        cache, seqlens = filled(target, [8], room=64)
        d = plain_call(cache._replace(k=torch.zeros(1, 64, 2, 65).bfloat16()[..., 1:]), seqlens)
        assert "multiples of 16 bytes" in (target.reason(decode_attention_op, *d.call()) or "")


def plan(device: tuple[int, ...], format: str = "none", **sizes: int) -> Any:
    given = dict(batch=16, kv_heads=8, dim=128, dim_v=128, capacity=16384, queries=1, heads=64) | sizes
    return backend._plan(backend._Shape(format, torch.bfloat16, *given.values(), *device))


def test_plans() -> None:
    """An H100 has two blocks of three stages or more on each multiprocessor; cards of 99 KiB one."""
    for format in CACHE_FORMATS:
        p = plan(H100, format)
        assert p.blocks == 264 and p.stages >= 3 and 2 * (p.shared_bytes + 1024) <= H100[2], format
        p = plan(L40S, format)
        assert p.dim == 128 and p.stages >= 2 and p.shared_bytes <= L40S[1]
        assert plan(A100, format).stages >= 3
    assert plan(H100, dim=64, dim_v=64).stages == 6
    assert plan(H100, dim=256, dim_v=256).blocks == 132
    assert plan(L40S, dim=256, dim_v=256).dim == 0 and plan(A100, dim=256, dim_v=256).stages == 2
    # no more blocks than there is work for
    assert plan(H100, batch=1, capacity=64, kv_heads=1, heads=8).blocks == 1
    assert plan(H100, heads=256, queries=2).row_tiles == 4


def test_bindings_refuse() -> None:
    native = cuda.module
    good = backend._Shape("none", torch.bfloat16, 1, 2, 64, 64, 64, 1, 8, *H100)
    made = backend._plan(good)
    assert made.dim == 64
    wrong: dict[str, Any] = dict(
        format="int5",
        dtype=torch.float32,
        batch=0,
        dim=257,
        capacity=-1,
        heads=7,
        queries=1 << 30,
        kv_heads=0,
    )
    for name, value in wrong.items():
        with pytest.raises(ValueError, match="expected"):
            native.plan_decode_attention(**good._asdict() | {name: value})

    room, q = torch.zeros(1, 64, 2, 64).bfloat16(), torch.zeros(1, 1, 8, 64).bfloat16()
    given: dict[str, Any] = dict(
        q=q, k=None, v=None, cache=CacheTensors(room, room.clone()), rotary=Rotary(), args=DecodeArgs(0.1),
        cache_seqlens=torch.zeros(1, dtype=torch.int32), out=torch.zeros_like(q), lse=torch.zeros(1, 8, 1),
        partial=torch.zeros(made.partial_floats), counters=torch.zeros(made.counters, dtype=torch.int32),
        plan=made, stream=0,
    )  # fmt: skip

    def refuses(words: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=words):
            native.decode_attention(**given | changes)

    for name, changes in (
        ("k", dict(dtype="FLOAT16")), ("k", dict(shape=(2, 64, 2, 64))), ("k", dict(shape=(1, 64, 0, 64))),
        ("k", dict(address=0)), ("k", dict(address=room.data_ptr() + 2)),
        ("k", dict(strides=(8192, 132, 66, 1))), ("v", dict(strides=(8192, 128, -8, 1))),
        ("v", dict(strides=(1 << 62, 1 << 62, 64, 1))), ("v", dict(shape=(1, 64, 2, 20))),
    ):  # fmt: skip
        refuses("expected", cache=given["cache"]._replace(**{name: described(native, room, **changes)}))
    wide = torch.zeros(1, 64, 2, 264).bfloat16()
    refuses("expected", cache=CacheTensors(wide, wide))
    refuses("format", cache=given["cache"]._replace(format="int5"))
    two = torch.zeros(1, 2, 8, 64).bfloat16()
    refuses("plan is", q=two, out=two.clone(), lse=torch.zeros(1, 8, 2))
    refuses("q is", q=described(native, q, address=0))
    refuses("partial is", partial=given["partial"][1:])
    refuses("counters is", counters=given["counters"][1:])
    refuses("softcap is", args=DecodeArgs(0.1, softcap=-1.0))
    refuses("heads is 7", q=torch.zeros(1, 1, 7, 64).bfloat16())

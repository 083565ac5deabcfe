"""What only the CPU backend of attention has: instruction-set levels, threads, chunks of keys, shares of
rows, tiles that are not visited, and bindings that check integers.

That every feature is right, and nothing past a tensor is touched, is tested in test_attention.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from bitfuse.ops.attention import attention_cpu as cpp
from bitfuse.ops.attention.attention import Wanted, _reference, _reference_backward
from bitfuse.ops.attention.attention_args import AttentionArgs
from descriptors import described
from levels import LEVELS

pytestmark = pytest.mark.skipif(cpp._cpu is None, reason="bitfuse._cpu is not built")

# The draws of test_attention.py at one level: of each kind the first ten.
DRAWS = """
from accuracy import Errors
from backends import Target
from bitfuse import _cpu
from test_attention import KINDS, check, kind
for of_kind in range(KINDS):
    errors = Errors()
    for number in range(of_kind, 10 * KINDS, KINDS):
        check(Target("cpp", "cpu"), number, True, errors)
    errors.check(str(kind(of_kind)))
print(_cpu.isa())
"""


@pytest.mark.parametrize("level", LEVELS[:-1])  # the widest is the default
def test_level_meets_the_accuracy_rule(level: str) -> None:
    path = [str(Path(bitfuse.__file__).parent.parent), str(Path(__file__).parent), *sys.path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "BITFUSE_CPU_ISA": level}
    done = subprocess.run([sys.executable, "-c", DRAWS], env=env, capture_output=True, text=True)
    if "does not support" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [level]


def inputs(
    dtype: torch.dtype, batch: int, sq: int, sk: int, heads: int, kv_heads: int, dim: int, dim_v: int
) -> tuple[torch.Tensor, ...]:
    sizes = ((sq, heads, dim), (sk, kv_heads, dim), (sk, kv_heads, dim_v), (sq, heads, dim_v))
    return tuple(torch.randn(batch, *size).to(dtype) for size in sizes)


def run(tensors: tuple[torch.Tensor, ...], a: AttentionArgs) -> list[torch.Tensor]:
    """Output, lse and all gradients, of q, k, v and grad."""
    q, k, v, grad = tensors
    float_bias = a.bias is not None and a.bias.dtype != torch.bool
    wanted = Wanted(True, True, True, float_bias, *(t is not None for t in (a.sinks, a.prefix_k, a.prefix_v)))
    out, lse = cpp.run(q, k, v, a)
    return [out, lse, *cpp.run_backward(grad, None, q, k, v, out, lse, a, wanted, True)]


# dtype, batch, seqlen_q, seqlen_k, heads, kv_heads, dims, and arguments: past a chunk of keys, past a group
# of tiles, one head with its rows in shares, the widest and narrowest heads
LARGE: list[tuple[torch.dtype, tuple[int, ...], dict[str, Any]]] = [
    (torch.bfloat16, (1, 700, 1100, 2, 1, 128, 128), dict(right=0)),
    (torch.float32, (1, 700, 1100, 2, 2, 64, 64), dict(right=0)),
    (torch.bfloat16, (1, 1500, 1500, 2, 1, 32, 32), dict(left=200, right=7)),
    (torch.float32, (1, 500, 900, 1, 1, 256, 256), {}),
    (torch.bfloat16, (2, 300, 400, 2, 2, 256, 40), dict(softcap=20.0)),
    (torch.float16, (2, 130, 300, 3, 1, 1, 3), dict(right=0, top_left=True)),
    (torch.bfloat16, (40, 20, 20, 3, 3, 7, 9), {}),
]


@pytest.mark.parametrize(("dtype", "sizes", "given"), LARGE, ids=[f"{s[1]}x{s[2]}" for _, s, _ in LARGE])
def test_many_tiles(dtype: torch.dtype, sizes: tuple[int, ...], given: dict[str, Any]) -> None:
    q, k, v, grad = inputs(dtype, *sizes)
    a = AttentionArgs(sizes[-2] ** -0.5, **given)

    def reference(dtype: torch.dtype) -> list[torch.Tensor]:
        x, y, z, g = (t.to(dtype) for t in (q, k, v, grad))
        out, lse = _reference(x, y, z, a)
        return [out, lse, *_reference_backward(g, None, x, y, z, out, lse, a, Wanted(), True)[:3]]

    names = ("out", "lse", "gradient of q", "gradient of k", "gradient of v")
    made = run((q, k, v, grad), a)[: len(names)]
    for name, *three in zip(names, made, reference(torch.float64), reference(dtype), strict=True):
        assert_accurate(*three, f"{name}, {dtype}, {sizes}, {given}")


@pytest.mark.parametrize("sizes", [(1, 400, 400, 2, 1, 64, 64), (3, 150, 200, 8, 8, 32, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    q, k, v, grad = inputs(dtype, *sizes)
    _, sq, sk, heads = sizes[:4]
    a = AttentionArgs(
        0.2, left=150, right=30, dropout_p=0.1, seed=torch.tensor(7), bias=torch.randn(1, heads, sq, sk),
        alibi_slopes=torch.rand(heads), sinks=torch.randn(heads),
    )  # fmt: skip
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(run((q, k, v, grad), a))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


def test_calls_from_several_threads_do_not_share_scratch() -> None:
    a = AttentionArgs(0.2, right=0)
    calls = [inputs(torch.bfloat16, 1, s, s, 2, 2, 32, 32) for s in (5, 70, 130, 300)]
    expected = [run(call, a) for call in calls]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not all(torch.equal(x, y) for x, y in zip(run(calls[i], a), expected[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("hidden", ["causal", "window", "mask", "padding"])
def test_tiles_that_nobody_sees_are_not_visited(hidden: str) -> None:
    # on the edges of blocks: what shares a block with a key that is seen is multiplied by 0
    q, k, v, grad = inputs(torch.float32, 1, 768, 768, 1, 1, 16, 16)
    mask = torch.ones(1, 1, 384, 768, dtype=torch.bool)
    mask[..., 384:] = False
    a = {
        "causal": AttentionArgs(0.25, right=0, top_left=True),
        "window": AttentionArgs(0.25, left=0),
        "mask": AttentionArgs(0.25, bias=mask),
        "padding": AttentionArgs(0.25, bias=mask[:, :, :1]),
    }[hidden]
    first, last = slice(0, 384), slice(384, 768)
    seen, unseen = (last, first) if hidden == "window" else (first, last)
    q, grad = q[:, seen], grad[:, seen]
    k[:, unseen], v[:, unseen] = torch.nan, torch.nan
    made = run((q, k, v, grad), a)
    assert all(t.isfinite().all() for t in made)
    assert not made[3][:, unseen].any() and not made[4][:, unseen].any()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale: float) -> None:
    q, k, v, _ = inputs(torch.float32, 1, 40, 50, 2, 2, 16, 16)
    a = AttentionArgs(scale, right=0)
    out, lse = cpp.run(q, k, v, a)
    exact = _reference(q.double(), k.double(), v.double(), a)
    for got, wanted, plain in zip((out, lse), exact, _reference(q, k, v, a), strict=True):
        assert_accurate(got, wanted, plain, f"scale {scale}")


def test_the_lowest_float_hides_as_minus_infinity_does() -> None:
    q, k, v, _ = inputs(torch.bfloat16, 1, 40, 50, 2, 2, 16, 16)
    seen = torch.rand(1, 1, 40, 50) < 0.5
    seen[..., 0] = True
    outs = [
        cpp.run(q, k, v, AttentionArgs(0.25, bias=torch.where(seen, 0.0, low)))[0]
        for low in (-torch.inf, torch.finfo(torch.float32).min)
    ]
    assert torch.equal(*outs)
    assert torch.equal(outs[0], cpp.run(q, k, v, AttentionArgs(0.25, bias=seen))[0])


def test_a_last_dimension_that_is_not_dense() -> None:
    q, k, v, grad = inputs(torch.float32, 2, 20, 30, 2, 2, 16, 16)
    turned = tuple(t.mT.contiguous().mT for t in (q, k, v, grad))
    bias = torch.randn(2, 2, 30, 20).mT
    dense = run((q, k, v, grad), AttentionArgs(0.25, bias=bias.contiguous()))
    strided = run(turned, AttentionArgs(0.25, bias=bias))
    assert all(torch.equal(x, y) for x, y in zip(dense, strided, strict=True))


def test_the_binding_refuses_wrong_integers() -> None:
    q, k, v, out = inputs(torch.float32, 1, 4, 4, 2, 2, 16, 16)
    native, lse, a = cpp._cpu, torch.empty(1, 2, 4), AttentionArgs(0.25)
    bias = torch.zeros(1, 2, 4, 4)
    native.attention(q, k, v, a, out, lse)
    shape = tuple(q.shape)
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("q", dict(dtype="UINT8"), "q is of dtype uint8"),
        ("q", dict(shape=(-1, *shape[1:])), "q is -1"),
        ("q", dict(shape=(1, 4, 3, 16)), "heads is 3, expected a multiple of 2"),
        ("k", dict(shape=(1, 4, 0, 16)), "kv_heads is 0"),
        ("q", dict(shape=(1, 4, 2, 513)), "dim is 513, expected 1 to 512"),
        ("v", dict(shape=(1, 4, 2, 0)), "dim_v is 0"),
        ("q", dict(shape=(1, -4, 2, 16)), "q is -4"),
        ("q", dict(shape=(1 << 40, 1 << 30, 2, 16)), "larger than memory"),
        ("k", dict(shape=(1, 5, 2, 16)), "v is of shape"),
        ("v", dict(dtype="FLOAT16"), "v is of dtype float16, expected float32"),
        ("q", dict(address=0), "q is null"),
        ("q", dict(address=2), "q is 2, expected a multiple of 4"),
        ("q", dict(strides=(128, 32, 16, 2)), "q is of strides"),
        ("k", dict(strides=(64, -128, 32, 1)), "k is -128"),
        ("k", dict(strides=(64, 1 << 62, 1 << 62, 1)), "k is larger than memory"),
        ("out", dict(address=0), "out is null"),
        ("out", dict(shape=(1, 4, 2, 15)), "out is of shape"),
        ("lse", dict(address=0), "lse is null"),
        ("lse", dict(shape=(1, 4, 2)), "lse is of shape"),
    ]
    for name, changes, words in wrong:
        given = dict(q=q, k=k, v=v, args=a, out=out, lse=lse)
        given[name] = described(native, cast(torch.Tensor, given[name]), **changes)
        with pytest.raises(ValueError, match=words):
            native.attention(**given)
    for options, words in (
        (dict(softcap=float("nan")), "softcap is nan"),
        (dict(dropout_p=1.0), "dropout_p is 1.0"),
        (dict(prefix_k=k), "prefix_v is missing"),
        (dict(prefix_k=described(native, k, address=0), prefix_v=v), "prefix_k is null"),
        (dict(bias=described(native, bias, dtype="INT32")), "bias is of dtype int32"),
        (dict(bias=described(native, bias, strides=(32, 16, -4, 1))), "bias is -4"),
        (dict(bias=described(native, bias, shape=(1, 2, 4, 3))), "bias is of shape"),
        (dict(sinks=torch.zeros(3)), "sinks is of shape"),
        (dict(cu_seqlens_q=torch.zeros(2, dtype=torch.int32)), "q is of shape"),
    ):
        with pytest.raises(ValueError, match=words):
            native.attention(q, k, v, a._replace(**cast(Any, options)), out, lse)


def test_offsets_are_checked_where_they_are_used() -> None:
    q = torch.randn(6, 2, 16)
    good = torch.tensor([0, 2, 6], dtype=torch.int32)
    for bad, words in (
        ([0, 4, 2], "2 at 2"),
        ([1, 2, 6], "1 at 0"),
        ([0, 2, 5], "is 5"),
        ([0, -1, 6], "-1 at 1"),
    ):
        cu = torch.tensor(bad, dtype=torch.int32)
        for own in ((cu, good), (good, cu)):
            a = AttentionArgs(0.25, cu_seqlens_q=own[0], cu_seqlens_k=own[1], max_seqlen_q=6, max_seqlen_k=6)
            with pytest.raises(ValueError, match=words):
                cpp.run(q, q, q, a)

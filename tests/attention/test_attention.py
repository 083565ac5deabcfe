"""attention and varlen_attention with their gradients: every backend, features combined at random."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import Errors
from backends import Target, targets
from bitfuse.ops.attention.attention import (
    Wanted,
    _reference,
    _reference_backward,
    attention_backward,
    attention_op,
)
from bitfuse.ops.attention.attention_args import AttentionArgs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# lengths: none, one, within a tile, just past one, two and a bit
LENGTHS = (0, 1, 2, 5, 16, 17, 33, 64, 70, 130)
DRAWS = 500
KINDS = 20  # of features, which a compiled kernel may be specialised for; sizes differ from draw to draw


@dataclass(frozen=True)
class Kind:
    """The features of a call, and what else a kernel might be compiled for."""

    dtype: torch.dtype
    dim: int
    dim_v: int
    causal: bool
    window: bool
    softcap: float
    alibi: int  # dimensions of the slopes
    bias: str
    sinks: bool
    prefix: bool
    dropout_p: float
    packed: bool
    top_left: bool


def kind(number: int) -> Kind:
    r = random.Random(number)
    dim = r.choice((16, 24, 40, 64, 72, 128))
    packed = r.random() < 0.3
    return Kind(
        DTYPES[number % 3], dim, dim if r.random() < 0.7 else r.choice((16, 32, 80, 128)), r.random() < 0.5,
        r.random() < 0.3, r.choice((0.0, 0.0, 5.0)), r.choice((0, 0, 0, 1, 2)),
        "" if packed else r.choice(("", "", "float", "bool")), r.random() < 0.3, r.random() < 0.3,
        r.choice((0.0, 0.0, 0.0, 0.2)), packed, r.random() < 0.15,
    )  # fmt: skip


@dataclass
class Draw:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    args: AttentionArgs
    grad: torch.Tensor
    grad_lse: torch.Tensor | None

    def moved(self, dtype: torch.dtype | None = None) -> Draw:
        """A copy on the CPU; floats of q's dtype as another."""

        def move(t: Any) -> Any:
            if not isinstance(t, torch.Tensor):
                return t
            return t.cpu().to(dtype) if dtype is not None and t.is_floating_point() else t.cpu().clone()

        q, k, v, grad, grad_lse = map(move, (self.q, self.k, self.v, self.grad, self.grad_lse))
        return Draw(q, k, v, AttentionArgs._make(map(move, self.args)), grad, grad_lse)


def draw(target: Target, number: int) -> Draw:
    """q, k and v against guard pages: dense, or with the heads first in memory, or slices of one tensor."""
    c, r = kind(number % KINDS), random.Random(1000 + number)
    torch.manual_seed(number)
    kv_heads, group, batch = r.choice((1, 2)), r.choice((1, 2, 4)), r.choice((1, 2, 3))
    heads = kv_heads * group
    cu: dict[str, Any] = {}
    sizes: list[tuple[int, ...]]
    if c.packed:
        both = [[r.choice(LENGTHS[:8]) for _ in range(batch)] for _ in "qk"]
        sizes = [(sum(lengths),) for lengths in both]
        edges = [torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) for lengths in both]
        cu = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), target.place(*edges), strict=True))
        cu |= {"max_seqlen_q": max(both[0]), "max_seqlen_k": max(both[1])}
    else:
        sizes = [(batch, r.choice(LENGTHS)) for _ in "qk"]
    layout = r.choice(("dense", "heads first", "sliced"))

    def make(size: tuple[int, ...], heads: int, dim: int) -> torch.Tensor:
        if layout == "sliced":
            return target.place(torch.randn(*size, heads, 2 * dim + 8).to(c.dtype))[0][..., 8 : 8 + dim]
        if layout == "heads first":
            order = (*size[:-1], heads, size[-1], dim)
            return target.place(torch.randn(order).to(c.dtype))[0].transpose(-2, -3)
        return target.place(torch.randn(*size, heads, dim).to(c.dtype))[0]

    q, k, v = make(sizes[0], heads, c.dim), make(sizes[1], kv_heads, c.dim), make(sizes[1], kv_heads, c.dim_v)
    bias = None
    if c.bias:
        full = (batch, heads, sizes[0][1], sizes[1][1])
        shape = [n if r.random() < 0.7 else 1 for n in full]
        made = (
            torch.rand(shape) < 0.7
            if c.bias == "bool"
            else torch.randn(shape).to(r.choice((c.dtype, DTYPES[0])))
        )
        (bias,) = target.place(made)
    slopes, sinks, seed, prefix_k, prefix_v = target.place(
        torch.rand((batch, heads)[2 - c.alibi :]), torch.randn(heads), torch.tensor([number * 2**33 + 5]),
        torch.randn(batch, r.choice((1, 7, 40)), kv_heads, c.dim).to(c.dtype),
        torch.randn(batch, 40, kv_heads, c.dim_v).to(c.dtype),
    )  # fmt: skip
    args = AttentionArgs(
        c.dim**-0.5 * r.choice((1.0, 2.0)),
        r.choice((0, 3, 20)) if c.window else -1,
        0 if c.causal else r.choice((0, 4, 30)) if c.window else -1,
        c.top_left,
        c.softcap,
        c.dropout_p,
        seed.view(()) if c.dropout_p else None,
        bias,
        slopes if c.alibi else None,
        sinks if c.sinks else None,
        prefix_k if c.prefix else None,
        prefix_v[:, : prefix_k.shape[1]] if c.prefix else None,
        **cu,
    )
    grad, grad_lse = target.place(
        torch.randn(*q.shape[:-1], c.dim_v).to(c.dtype),
        torch.randn((heads, *sizes[0]) if c.packed else (batch, heads, sizes[0][1])),
    )
    return Draw(q, k, v, args, grad, grad_lse if r.random() < 0.5 else None)


def check(target: Target, number: int, backward: bool, errors: Errors, deterministic: bool = True) -> None:
    d = draw(target, number)
    c = d.moved()
    exact, plain = d.moved(torch.float64), c
    out, lse = _reference(exact.q, exact.k, exact.v, exact.args)
    plain_out, plain_lse = _reference(plain.q, plain.k, plain.v, plain.args)
    what = f"draw {number}: q {list(d.q.shape)}, k {list(d.k.shape)}"
    got, got_lse = target.run(attention_op, d.q, d.k, d.v, d.args)
    errors.add("out", got, out, plain_out)
    empty = lse == -math.inf
    assert torch.equal(got_lse.cpu() == -math.inf, empty), f"{what}: lse of a row that sees nothing is -inf"
    errors.add("lse", *(t.cpu().masked_fill(empty, 0) for t in (got_lse, lse, plain_lse)))
    again, lse_again = target.run(attention_op, d.q, d.k, d.v, d.args)
    assert torch.equal(again, got) and torch.equal(lse_again, got_lse), f"{what}: another run, other numbers"
    if not backward:
        return
    a = d.args
    float_bias = a.bias is not None and a.bias.dtype != torch.bool
    wanted = Wanted(True, True, True, float_bias, *(t is not None for t in (a.sinks, a.prefix_k, a.prefix_v)))
    given = (d.grad, d.grad_lse, d.q, d.k, d.v, got, got_lse, a, wanted, deterministic)
    made = target.run(attention_backward, *given)
    of_exact = _reference_backward(
        exact.grad, exact.grad_lse, exact.q, exact.k, exact.v, out, lse, exact.args, wanted, True
    )
    of_plain = _reference_backward(
        plain.grad, plain.grad_lse, plain.q, plain.k, plain.v, plain_out, plain_lse, plain.args, wanted, True
    )
    for name, one, e, p in zip(Wanted._fields, made, of_exact, of_plain, strict=True):
        errors.add(f"gradient of {name}", one, e, p)
    if not deterministic:
        return
    again = target.run(attention_backward, *given)
    assert all(torch.equal(x, y) for x, y in zip(again, made, strict=True)), f"{what}: other gradients"


# twenty tests of twenty-five draws, a kind each
@pytest.mark.parametrize("of_kind", range(KINDS))
@pytest.mark.parametrize("target", targets("reference", "cpp"), ids=str)
def test_draws(target: Target, of_kind: int) -> None:
    errors = Errors()
    for number in range(of_kind, DRAWS, KINDS):
        check(target, number, True, errors)
    errors.check(str(kind(of_kind)))


@dataclass(frozen=True)
class Plain:
    """What torch's own attention computes, for the public functions."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def __call__(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (self.q, self.k, self.v))
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def inputs(batch: int = 2, sq: int = 7, sk: int = 11, heads: int = 4, kv_heads: int = 2) -> Plain:
    return Plain(
        torch.randn(batch, sq, heads, 16, requires_grad=True),
        torch.randn(batch, sk, kv_heads, 16, requires_grad=True),
        torch.randn(batch, sk, kv_heads, 16, requires_grad=True),
    )


def test_is_torch_s_attention() -> None:
    p = inputs()
    given: dict[str, Any]
    causal = torch.ones(7, 11, dtype=torch.bool).tril(4)  # the last query and the last key are aligned
    bias = torch.randn(2, 1, 7, 11)
    for given, mask in (
        ({}, None),
        (dict(causal=True), causal),
        (dict(attn_bias=bias), bias),
        (dict(attn_bias=causal), causal),
    ):
        y, wanted = bitfuse.attention(p.q, p.k, p.v, **given), p(mask)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        got = torch.autograd.grad(y.square().sum(), (p.q, p.k, p.v))
        for a, b in zip(got, torch.autograd.grad(wanted.square().sum(), (p.q, p.k, p.v)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_lse_has_a_gradient() -> None:
    p = inputs()
    out, lse = bitfuse.attention(p.q, p.k, p.v, return_lse=True)
    keys = p.k.repeat_interleave(2, 2)
    wanted = torch.einsum("bqhd,bkhd->bhqk", p.q, keys).mul(0.25).logsumexp(-1)
    torch.testing.assert_close(lse, wanted)
    got = torch.autograd.grad(lse.square().sum(), (p.q, p.k))
    for a, b in zip(got, torch.autograd.grad(wanted.square().sum(), (p.q, p.k)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert out.shape == (2, 7, 4, 16)


def test_gradients_reach_only_what_asks_for_them() -> None:
    p = inputs()
    given: dict[str, Any] = dict(
        attn_bias=torch.randn(4, 7, 11),
        sinks=torch.randn(4),
        prefix_k=torch.randn(2, 3, 2, 16),
        prefix_v=torch.randn(2, 3, 2, 16),
    )
    tensors: dict[str, Any] = dict(q=p.q.detach(), k=p.k.detach(), v=p.v.detach(), **given)
    whole = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    everything = torch.autograd.grad(bitfuse.attention(**whole).square().sum(), list(whole.values()))
    for (name, t), wanted in zip(tensors.items(), everything, strict=True):
        one = t.clone().requires_grad_()
        (got,) = torch.autograd.grad(bitfuse.attention(**tensors | {name: one}).square().sum(), one)
        torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        assert not bitfuse.attention(p.q, p.k, p.v).requires_grad


def test_packed_is_each_sequence_alone() -> None:
    lengths = ((3, 5), (0, 4), (7, 7), (2, 0))
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in zip(*lengths, strict=True)
    )
    q, k, v = torch.randn(12, 4, 16), torch.randn(16, 2, 16), torch.randn(16, 2, 8)
    out, lse = bitfuse.varlen_attention(q, k, v, cu_q, cu_k, 7, 7, causal=True, return_lse=True)
    for (a, b), (c, d) in zip(
        itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True
    ):
        alone, own = bitfuse.attention(q[None, a:b], k[None, c:d], v[None, c:d], causal=True, return_lse=True)
        torch.testing.assert_close(out[a:b], alone[0])
        torch.testing.assert_close(lse[:, a:b], own[0])


def test_compiles_and_opcheck() -> None:
    p = inputs()
    compiled = torch.compile(bitfuse.attention, fullgraph=True, dynamic=False)
    y, wanted = compiled(p.q, p.k, p.v, causal=True), bitfuse.attention(p.q, p.k, p.v, causal=True)
    assert torch.equal(y, wanted)
    got = torch.autograd.grad(y.square().sum(), (p.q, p.k, p.v))
    torch.testing.assert_close(got, torch.autograd.grad(wanted.square().sum(), (p.q, p.k, p.v)))
    for number in (0, 3, 7):
        c = draw(Target("cpp", "cpu"), number).moved()
        assert attention_op._flatten is not None and attention_backward._flatten is not None
        flat = attention_op._flatten(c.q, c.k, c.v, c.args)
        torch.library.opcheck(torch.ops.bitfuse.attention.default, flat)
        out, lse = attention_op(c.q, c.k, c.v, c.args)
        flat = attention_backward._flatten(c.grad, None, c.q, c.k, c.v, out, lse, c.args, Wanted(), True)
        torch.library.opcheck(torch.ops.bitfuse.attention_backward.default, flat)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(q=torch.randn(2, 7, 4, 16).double()), TypeError, "q has dtype torch.float64"),
    (dict(q=torch.randn(7, 4, 16)), ValueError, r"q has shape \[7, 4, 16\], expected \[batch, seq"),
    (dict(q=None), TypeError, "q is a NoneType, expected a tensor"),
    (
        dict(k=torch.randn(2, 11, 2, 24)),
        ValueError,
        r"k has shape \[2, 11, 2, 24\], expected \[2, 11, 2, 16\]",
    ),
    (dict(k=torch.randn(3, 11, 2, 16)), ValueError, r"k has shape \[3, 11, 2, 16\]"),
    (
        dict(v=torch.randn(2, 10, 2, 16)),
        ValueError,
        r"v has shape \[2, 10, 2, 16\], expected \[2, 11, 2, 16\]",
    ),
    (dict(q=torch.randn(2, 7, 3, 16)), ValueError, "q has 3 heads and k 2, expected a multiple"),
    (dict(softcap=-1.0), ValueError, "softcap -1.0"),
    (dict(softmax_scale=math.nan), ValueError, "softmax_scale is nan"),
    (dict(dropout_p=1.0), ValueError, "dropout_p is 1.0"),
    (
        dict(attn_bias=torch.randn(7, 10)),
        ValueError,
        r"attn_bias has shape \[1, 1, 7, 10\], expected to broadcast",
    ),
    (dict(alibi_slopes=torch.rand(5)), ValueError, r"alibi_slopes has shape \[5\], expected \[4\]"),
    (dict(sinks=torch.rand(5)), ValueError, r"sinks has shape \[5\], expected \[4\]"),
    (dict(prefix_k=torch.randn(2, 3, 2, 16)), ValueError, "only one of prefix_k and prefix_v"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD, ids=[b[2][:30] for b in BAD])
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = dict(
        q=torch.randn(2, 7, 4, 16), k=torch.randn(2, 11, 2, 16), v=torch.randn(2, 11, 2, 16)
    )
    with pytest.raises(error, match=words):
        bitfuse.attention(**given | changes)


def test_packed_compiles_and_exports() -> None:
    """fullgraph on the CPU too, with sizes that change; the kernel looks at the offsets."""
    cu = torch.tensor([0, 3, 9], dtype=torch.int32)

    def step(q: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        return bitfuse.varlen_attention(q, q, q, cu, cu, 6, 6, causal=True)

    def as_flash(q: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        return bitfuse.compat.flash_attn.flash_attn_varlen_func(q, q, q, cu, cu, 6, 6, causal=True)

    for function in (step, as_flash):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        for offsets in (cu, torch.tensor([0, 5, 5, 11], dtype=torch.int32)):
            q = torch.randn(int(offsets[-1]), 2, 8, requires_grad=True)
            out, wanted = compiled(q, offsets), function(q, offsets)
            assert torch.equal(out, wanted)
            grads = [torch.autograd.grad(o.square().sum(), q)[0] for o in (out, wanted)]
            torch.testing.assert_close(*grads)  # summed over the three uses in another order
        with pytest.raises(ValueError, match="cu_seqlens_q"):
            compiled(q, cu)

    class Packed(torch.nn.Module):
        def forward(self, q: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
            return bitfuse.varlen_attention(q, q, q, cu, cu, 6, 6)

    q = torch.randn(9, 2, 8)
    assert torch.equal(torch.export.export(Packed(), (q, cu)).module()(q, cu), Packed()(q, cu))


def test_packed_offsets_are_looked_at() -> None:
    q, k = torch.randn(6, 2, 16), torch.randn(8, 2, 16)
    good: dict[str, Any] = dict(
        cu_seqlens_q=torch.tensor([0, 2, 6], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 8, 8], dtype=torch.int32),
        max_seqlen_q=4,
        max_seqlen_k=8,
    )
    assert bitfuse.varlen_attention(q, k, k, **good).shape == (6, 2, 16)
    for changes, words in (
        (dict(cu_seqlens_q=torch.tensor([0, 2, 7], dtype=torch.int32)), "expected 0 to 6"),
        (dict(cu_seqlens_k=torch.tensor([0, 9, 8], dtype=torch.int32)), "not decreasing"),
        (dict(max_seqlen_q=3), "max_seqlen_q is 3, and a sequence is 4 long"),
        (
            dict(cu_seqlens_q=torch.tensor([0, 6], dtype=torch.int32), max_seqlen_q=6),
            r"cu_seqlens_k has shape \[3\], expected \[2\]",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            bitfuse.varlen_attention(q, k, k, **good | changes)

"""merge_attention: against its reference, what saw nothing, gradients, a prefix that sequences share."""

from __future__ import annotations

import math

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.ops.attention.merge_attention import _reference as merge_reference
from bitfuse.ops.attention.merge_attention import merge_attention_op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def halves(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    lse1, lse2 = torch.randn(2, 3, 5) * 4, torch.randn(2, 3, 5) * 4
    lse1[0, 0, 0], lse2[0, 1, 1] = -math.inf, -math.inf
    lse1[1, 2, 3] = lse2[1, 2, 3] = -math.inf
    o1, o2 = torch.randn(2, 5, 3, 40).to(dtype), torch.randn(2, 5, 3, 40).to(dtype)
    o1[1, 3, 2] = o2[1, 3, 2] = 0
    return o1, lse1, o2, lse2


@pytest.mark.parametrize("target", targets("cpp", "triton", "reference"), ids=str)
def test_merge_attention(target: Target) -> None:
    for dtype in DTYPES:
        tensors = target.place(*halves(dtype))
        out, lse = target.run(merge_attention_op, *tensors)
        plain, plain_lse = merge_reference(*tensors)
        exact, exact_lse = merge_reference(*(t.double() for t in tensors))
        assert_accurate(out, exact, plain)
        empty = exact_lse == -math.inf
        assert int(empty.sum()) == 1 and torch.equal(lse == -math.inf, empty) and not out[1, 3, 2].any()
        assert_accurate(
            lse.masked_fill(empty, 0), exact_lse.masked_fill(empty, 0), plain_lse.masked_fill(empty, 0)
        )


def test_merge_has_gradients() -> None:
    o1, lse1, o2, lse2 = (t.requires_grad_() for t in halves(torch.float32))
    out, lse = bitfuse.merge_attention(o1, lse1, o2, lse2)
    finite = lse.detach() > -math.inf
    weights = torch.randn_like(out), torch.randn_like(lse)
    loss = (out * weights[0]).sum() + (lse[finite] * weights[1][finite]).sum()
    got = torch.autograd.grad(loss, (o1, lse1, o2, lse2))
    lses = torch.stack([lse1, lse2])
    share = torch.softmax(lses.masked_fill(~finite, 0), 0).transpose(2, 3).unsqueeze(-1)
    wanted = share[0] * o1 + share[1] * o2
    loss = (wanted * weights[0]).sum() + (lses.logsumexp(0)[finite] * weights[1][finite]).sum()
    for a, b in zip(got, torch.autograd.grad(loss, (o1, lse1, o2, lse2)), strict=True):
        alive = torch.ones_like(a, dtype=torch.bool)
        alive[(1, 3, 2) if a.dim() == 4 else (1, 2, 3)] = False  # the row that saw nothing: no gradient
        torch.testing.assert_close(a[alive], b[alive], rtol=1e-4, atol=1e-5)
        assert not a[~alive].any()
    torch.library.opcheck(torch.ops.bitfuse.merge_attention.default, halves(torch.float32))


@pytest.mark.parametrize("target", targets("cpp", "triton", "reference"), ids=str)
def test_what_saw_nothing_gives_nothing(target: Target) -> None:
    """Whatever stands in its output: it may never have been written."""
    for dtype, bad in zip(DTYPES, (math.nan, math.inf, -math.inf), strict=True):
        o1, lse1, o2, lse2 = halves(dtype)
        rows = [(lse == -math.inf).transpose(1, 2) for lse in (lse1, lse2)]
        wanted = merge_reference(o1, lse1, o2, lse2)
        o1[rows[0]], o2[rows[1]] = bad, bad
        found = target.run(merge_attention_op, *target.place(o1, lse1, o2, lse2))
        for got, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(got.cpu(), exact, rtol=1e-2, atol=1e-6)
        assert not found[0].cpu()[rows[0] & rows[1]].any()


def test_what_saw_nothing_gets_no_gradient() -> None:
    leaves = [t.requires_grad_() for t in halves(torch.float32)]
    empty = [(lse == -math.inf).transpose(1, 2) for lse in (leaves[1], leaves[3])]
    with torch.no_grad():
        for o, rows in zip((leaves[0], leaves[2]), empty, strict=True):
            o[rows] = math.nan
    out, _ = bitfuse.merge_attention(*leaves)
    for gradient, rows in zip(torch.autograd.grad(out.sum(), leaves)[::2], empty, strict=True):
        assert torch.isfinite(gradient).all() and not gradient[rows].any()


def test_a_shared_prefix_is_a_call_of_its_own() -> None:
    """Three sequences behind one prefix, read once and merged by lse: as caches with the prefix in front."""
    prefix_k, prefix_v = torch.randn(1, 50, 2, 32), torch.randn(1, 50, 2, 32)
    k, v, q = torch.randn(3, 20, 2, 32), torch.randn(3, 20, 2, 32), torch.randn(3, 1, 4, 32)
    prefix = bitfuse.KVCache(1, 50, 2, 32, dtype=torch.float32)
    own, whole = (bitfuse.KVCache(3, n, 2, 32, dtype=torch.float32) for n in (20, 70))
    prefix.append(prefix_k, prefix_v)
    own.append(k, v)
    for part in ((prefix_k.expand(3, -1, -1, -1), prefix_v.expand(3, -1, -1, -1)), (k, v)):
        whole.append(*part)
    o1, lse1 = bitfuse.decode_attention(q.view(1, 3, 4, 32), prefix, causal=False, return_lse=True)
    o2, lse2 = bitfuse.decode_attention(q, own, return_lse=True)
    out, lse = bitfuse.merge_attention(o1.view(3, 1, 4, 32), lse1.view(4, 3).t().reshape(3, 4, 1), o2, lse2)
    wanted, wanted_lse = bitfuse.decode_attention(q, whole, return_lse=True)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)

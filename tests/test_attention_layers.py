"""What stands in for others' attention: torch's function and layer, flash-attn's functions, transformers'."""

from __future__ import annotations

import math
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate

torch_sdpa = torch.nn.functional.scaled_dot_product_attention

# scaled_dot_product_attention

Shape = tuple[int, ...]
# query, key, value, mask ("" none, "b" bool, "f" float), its shape, options
SDPA: list[tuple[Shape, Shape, Shape, str, Shape, dict[str, Any]]] = [
    ((2, 4, 7, 16), (2, 4, 9, 16), (2, 4, 9, 24), "", (), {}),
    ((2, 4, 7, 16), (2, 4, 9, 16), (2, 4, 9, 16), "", (), dict(is_causal=True, scale=0.3)),
    ((2, 4, 9, 16), (2, 4, 7, 16), (2, 4, 7, 16), "", (), dict(is_causal=True)),
    ((2, 4, 7, 16), (2, 2, 9, 16), (2, 2, 9, 16), "b", (2, 1, 1, 9), dict(enable_gqa=True)),
    ((2, 4, 7, 16), (2, 2, 9, 16), (2, 4, 9, 16), "", (), dict(enable_gqa=True)),
    ((2, 4, 7, 16), (2, 1, 9, 16), (2, 1, 9, 16), "f", (7, 9), {}),
    ((2, 4, 7, 16), (1, 4, 9, 16), (2, 1, 9, 16), "f", (4, 7, 9), {}),
    ((7, 16), (9, 16), (9, 8), "b", (7, 9), {}),
    ((5, 7, 16), (5, 9, 16), (5, 9, 16), "f", (5, 1, 9), {}),
    ((2, 3, 4, 7, 16), (2, 3, 4, 9, 16), (2, 3, 4, 9, 8), "f", (3, 1, 7, 9), {}),
    ((2, 3, 4, 7, 16), (2, 3, 2, 9, 16), (2, 3, 2, 9, 8), "b", (2, 1, 4, 7, 9), dict(enable_gqa=True)),
    ((2, 3, 4, 7, 16), (2, 3, 4, 9, 16), (2, 3, 4, 9, 8), "b", (7, 9), {}),
    ((2, 4, 7, 16), (4, 9, 16), (4, 9, 16), "b", (1, 1), {}),
    ((2, 4, 7, 16), (2, 4, 0, 16), (2, 4, 0, 16), "", (), {}),
    ((2, 4, 0, 16), (2, 4, 5, 16), (2, 4, 5, 16), "", (), dict(is_causal=True)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("number", range(len(SDPA)))
def test_sdpa_is_torch_s(number: int, dtype: torch.dtype) -> None:
    torch.manual_seed(number)
    *sizes, kind, shape, options = SDPA[number]
    tensors = {
        n: torch.randn(s).to(dtype).requires_grad_()
        for n, s in zip(("query", "key", "value"), sizes, strict=True)
    }
    if kind == "b":
        tensors["attn_mask"] = torch.rand(shape) < 0.7
    elif kind == "f":
        tensors["attn_mask"] = torch.randn(shape).to(dtype).requires_grad_()
    exact = {
        n: t.detach().double().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()
    }
    y, wanted = bitfuse.scaled_dot_product_attention(**tensors, **options), torch_sdpa(**exact, **options)
    assert_accurate(y.detach(), wanted.detach(), torch_sdpa(**tensors, **options).detach(), "output")
    grad = torch.randn(y.shape).to(dtype)

    def gradients(y: torch.Tensor, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, [t for t in given.values() if t.requires_grad], grad.to(y.dtype))

    got, of_exact = gradients(y, tensors), gradients(wanted, exact)
    with bitfuse.use_backend("reference"):  # the same formula, from lse, where torch keeps the probabilities
        of_plain = gradients(bitfuse.scaled_dot_product_attention(**tensors, **options), tensors)
    for one, e, p in zip(got, of_exact, of_plain, strict=True):
        assert_accurate(one, e, p, "gradient")


@pytest.mark.parametrize(
    "options",
    (
        dict(key=torch.randn(2, 2, 9, 16), value=torch.randn(2, 2, 9, 16)),
        dict(key=torch.randn(2, 3, 9, 16), value=torch.randn(2, 3, 9, 16), enable_gqa=True),
        dict(attn_mask=torch.zeros(7, 9, dtype=torch.int32)),
        dict(attn_mask=torch.zeros(7, 9, dtype=torch.bfloat16)),
        dict(attn_mask=torch.zeros(7, 8)),
        dict(attn_mask=torch.zeros(3, 1, 1, 7, 9)),
        dict(query=torch.randn(16)),
        dict(key=torch.randn(2, 4, 9, 8)),
        dict(key=torch.randn(2, 4, 9, 16).bfloat16()),
        dict(dropout_p=1.5),
        dict(query=None),
    ),
    ids=lambda o: "-".join(o),
)  # fmt: skip
def test_sdpa_refuses_as_torch_does(options: dict[str, Any]) -> None:
    given: dict[str, Any] = dict(
        query=torch.randn(2, 4, 7, 16), key=torch.randn(2, 4, 9, 16), value=torch.randn(2, 4, 9, 16)
    )
    with pytest.raises((RuntimeError, TypeError)) as torch_s:
        torch_sdpa(**given | options)
    with pytest.raises(torch_s.type):
        bitfuse.scaled_dot_product_attention(**given | options)


def test_sdpa_drops_and_sees_nothing() -> None:
    q, k, v = torch.randn(2, 4, 64, 16), torch.randn(2, 4, 200, 16), torch.ones(2, 4, 200, 8)
    torch.manual_seed(3)
    y = bitfuse.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    torch.manual_seed(3)
    assert torch.equal(y, bitfuse.scaled_dot_product_attention(q, k, v, dropout_p=0.25))
    assert not torch.equal(y, bitfuse.scaled_dot_product_attention(q, k, v, dropout_p=0.25))
    assert abs(float(y.mean()) - 1) < 0.02 and float(y.std()) > 0.01
    mask = torch.ones(64, 200, dtype=torch.bool)
    mask[5] = False
    assert not bitfuse.scaled_dot_product_attention(q, k, v, mask)[:, :, 5].any()
    with torch.no_grad():
        mask = torch.zeros(64, 200).index_fill(0, torch.tensor([5]), -math.inf)
        assert not bitfuse.scaled_dot_product_attention(q, k, v, mask)[:, :, 5].any()


def test_sdpa_mask_and_causality_both_apply() -> None:
    q, k, mask = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 9, 16), torch.rand(7, 9) < 0.7
    mask[:, 0] = True
    y = bitfuse.scaled_dot_product_attention(q, k, k, mask, is_causal=True)
    torch.testing.assert_close(y, torch_sdpa(q, k, k, mask.tril()))


def test_sdpa_compiles_and_explains() -> None:
    q = torch.randn(2, 4, 7, 16)
    compiled = torch.compile(bitfuse.scaled_dot_product_attention, fullgraph=True, dynamic=False)
    mask = torch.rand(2, 1, 7, 7) < 0.7
    assert torch.equal(compiled(q, q, q, mask), bitfuse.scaled_dot_product_attention(q, q, q, mask))
    assert bitfuse.explain(bitfuse.scaled_dot_product_attention, q, q, q, is_causal=True).op == "attention"

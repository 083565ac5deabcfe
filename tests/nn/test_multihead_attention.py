"""nn.MultiheadAttention against torch's: every option, forward and backward, and what differs on purpose."""

from __future__ import annotations

import copy
import random
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import Errors, assert_accurate

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DRAWS = 72
Mha = bitfuse.nn.MultiheadAttention


def same(module: torch.nn.MultiheadAttention, kind: type, dtype: torch.dtype) -> Any:
    """A layer of another class and dtype with the same parameters."""
    made = kind(
        module.embed_dim, module.num_heads, module.dropout, module.in_proj_bias is not None,
        module.bias_k is not None, module.add_zero_attn, module.kdim, module.vdim, module.batch_first,
    )  # fmt: skip
    made.load_state_dict(module.state_dict())
    return made.to(dtype).train(module.training)


def draw(number: int) -> tuple[torch.nn.MultiheadAttention, dict[str, torch.Tensor], dict[str, Any]]:
    """A torch layer, its tensors and its options; bool masks leave a key to every query."""
    r = random.Random(number)
    torch.manual_seed(number)
    heads = r.choice((1, 2, 3, 4))
    embed = heads * r.choice((5, 8, 16))
    inputs = r.choice(("self", "cross", "three", "sizes"))
    kdim, vdim = (r.choice((7, 16)), r.choice((9, 24))) if inputs == "sizes" else (None, None)
    batch, sq = r.choice((1, 2, 3)), r.choice((1, 4, 9))
    sk = sq if inputs == "self" else r.choice((1, 6, 11))
    unbatched = r.random() < 0.2
    first = r.random() < 0.5
    layer = torch.nn.MultiheadAttention(
        embed, heads, 0.0, r.random() < 0.7, r.random() < 0.4, r.random() < 0.4, kdim, vdim, first
    )
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5 * 1.5)
    if unbatched:
        batch = 1

    def tensor(seq: int, size: int) -> torch.Tensor:
        return torch.randn(*((seq,) if unbatched else (batch, seq) if first else (seq, batch)), size)

    tensors = {"query": tensor(sq, embed)}
    if inputs != "self":
        tensors["key"] = tensor(sk, layer.kdim)
    if inputs in ("three", "sizes"):
        tensors["value"] = tensor(sk, layer.vdim)
    kinds = r.choice(("", "", "b", "f")), r.choice(("", "b", "f", "c", "b3", "f3"))
    if kinds[0]:
        shape = (sk,) if unbatched else (batch, sk)
        tensors["key_padding_mask"] = torch.randn(shape) if kinds[0] == "f" else torch.rand(shape) < 0.3
    if kinds[1] == "c":
        tensors["attn_mask"] = torch.ones(sq, sk, dtype=torch.bool).triu(1)
    elif kinds[1]:
        pairs = (batch * heads, sq, sk) if kinds[1][1:] else (sq, sk)
        tensors["attn_mask"] = torch.randn(pairs) if kinds[1][0] == "f" else torch.rand(pairs) < 0.3
    for name in ("key_padding_mask", "attn_mask"):
        if name in tensors and tensors[name].dtype == torch.bool:
            tensors[name][..., 0] = False
    options = dict(need_weights=r.random() < 0.6, average_attn_weights=r.random() < 0.5)
    return layer, tensors, options | dict(is_causal=kinds[1] == "c" and r.random() < 0.7)


def called(
    layer: torch.nn.Module, tensors: dict[str, torch.Tensor], options: dict[str, Any], upstream: int
) -> dict[str, torch.Tensor]:
    """Outputs, and the gradients of everything that has one."""
    given = dict(tensors)
    given.setdefault("key", given["query"])
    given.setdefault("value", given["key"])
    out, weights = layer(**given, **options)
    found = {"out": out} if weights is None else {"out": out, "weights": weights}
    torch.manual_seed(upstream)
    loss = sum((t * torch.randn(t.shape).to(t.dtype)).sum() for t in found.values())
    leaves = {n: t for n, t in tensors.items() if t.requires_grad} | dict(layer.named_parameters())
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads_of = {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}
    return {n: t.detach() for n, t in (found | grads_of).items()}


def moved(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        n: t.to(dtype).detach().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("part", range(3))
def test_is_torch_s(part: int, dtype: torch.dtype) -> None:
    """Draws of every option; torch has the causal mask in full, whose rows see the added keys too."""
    errors = Errors()
    for number in range(part, DRAWS if dtype == F32 else DRAWS // 2, 3):
        layer, tensors, options = draw(number)
        rounded = moved(tensors, dtype)
        module = layer.to(dtype)
        exact = called(
            same(module, torch.nn.MultiheadAttention, torch.float64), moved(rounded, torch.float64),
            options | dict(is_causal=False), number,
        )  # fmt: skip
        plain = called(module, rounded, options | dict(is_causal=False), number)
        got = called(same(module, Mha, dtype), moved(tensors, dtype), options, number)
        if options["is_causal"]:
            exact.pop("gradient of attn_mask", None)
        assert got.keys() == exact.keys(), (number, got.keys() ^ exact.keys())
        for name in got:
            errors.add(name, got[name], exact[name], plain[name])
    errors.check(str(dtype))


def test_the_causal_hint() -> None:
    """What torch does with it, and without a mask, which torch wants."""
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    own = Mha.from_torch(layer)
    x, mask = torch.randn(2, 9, 32), torch.nn.Transformer.generate_square_subsequent_mask(9)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    for kpm in (None, padding.float() * -1e9):
        wanted, _ = layer(x, x, x, kpm, need_weights=False, attn_mask=mask, is_causal=True)
        for given in (mask, None):
            got, _ = own(x, x, x, kpm, need_weights=False, attn_mask=given, is_causal=True)
            torch.testing.assert_close(got, wanted)
    _, weights = own(x, x, x, is_causal=True)
    assert weights.shape == (2, 9, 9) and not weights.triu(1).any()


@pytest.mark.parametrize("average", (False, True))
@pytest.mark.parametrize("added", (False, True))
def test_dropout_is_in_the_weights(added: bool, average: bool) -> None:
    """Output and weights drop the same pairs, and so do their gradients."""
    torch.manual_seed(int(added))
    layer = Mha(32, 2, dropout=0.4, add_bias_kv=added, add_zero_attn=added, batch_first=True)
    x = torch.randn(2, 7, 32, requires_grad=True)

    def of(average: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(5)
        return layer(x, x, x, average_attn_weights=average)

    _, each = of(False)
    kept = (each != 0).detach()
    assert 0.2 < 1 - float(kept.float().mean()) < 0.6
    out, weights = of(average)

    def formula(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = {n: p.detach().to(x.dtype) for n, p in layer.named_parameters()}
        parts = torch.nn.functional.linear(x, t["in_proj_weight"], t["in_proj_bias"]).chunk(3, -1)
        q, k, v = (p.unflatten(-1, (2, 16)).transpose(1, 2) for p in parts)
        if added:
            bk, bv = (t[n].view(1, 2, 1, 16).expand(2, -1, -1, -1) for n in ("bias_k", "bias_v"))
            k, v = torch.cat([k, bk, torch.zeros_like(bk)], 2), torch.cat([v, bv, torch.zeros_like(bv)], 2)
        p = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) * kept / 0.6
        y = torch.nn.functional.linear((p @ v).transpose(1, 2).flatten(2), t["out_proj.weight"])
        return y + t["out_proj.bias"], p.mean(1) if average else p

    results = []
    for tensor, (y, w) in ((x, (out, weights)), *((t, formula(t)) for t in (x.double(), x))):
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + w.square().sum()
        (grad,) = torch.autograd.grad(loss, tensor)
        results.append([t.detach() for t in (y, w, grad)])
    for got, exact, plain in zip(*results, strict=True):
        assert_accurate(got, exact, plain)
    layer.eval()
    assert float(layer(x, x, x)[1].detach().sum()) == pytest.approx(14, rel=1e-5)


def test_state_dicts_go_both_ways() -> None:
    cases: tuple[dict[str, Any], ...] = ({}, dict(bias=False), dict(add_bias_kv=True), dict(kdim=8, vdim=12))
    for options in cases:
        torch.manual_seed(0)
        theirs = torch.nn.MultiheadAttention(32, 4, **options)
        torch.manual_seed(0)
        ours = Mha(32, 4, **options)
        for a, b in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
            assert a[0] == b[0] and torch.equal(a[1], b[1]), "the same parameters, drawn alike"
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


def test_from_torch_shares() -> None:
    theirs = torch.nn.MultiheadAttention(32, 4, 0.1, add_bias_kv=True, add_zero_attn=True, kdim=8, vdim=12)
    ours = Mha.from_torch(theirs.eval())
    assert not ours.training and isinstance(ours, torch.nn.MultiheadAttention)
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert a is b, name
    q, k, v = torch.randn(3, 2, 32), torch.randn(5, 2, 8), torch.randn(5, 2, 12)
    for a, b in zip(theirs(q, k, v), copy.deepcopy(ours)(q, k, v), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(TypeError, match=r"module is a Linear, expected a torch.nn.MultiheadAttention"):
        Mha.from_torch(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no subclass"):
        Mha.from_torch(ours)


def test_in_a_transformer() -> None:
    block = torch.nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    ours = copy.deepcopy(block)
    ours.self_attn = Mha.from_torch(ours.self_attn)
    x, mask = torch.randn(2, 9, 32), torch.nn.Transformer.generate_square_subsequent_mask(9)
    for options in ({}, dict(src_mask=mask, is_causal=True), dict(src_key_padding_mask=x[..., 0] > 1)):
        torch.testing.assert_close(ours(x, **options), block(x, **options))


def test_a_query_that_sees_nothing() -> None:
    layer = Mha(16, 2, batch_first=True)
    x = torch.randn(1, 3, 16, requires_grad=True)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1] = True
    out, weights = layer(x, x, x, attn_mask=mask)
    assert torch.equal(out[0, 1], layer.out_proj.bias) and not weights[0, 1].any()
    (grad,) = torch.autograd.grad(out.square().sum() + weights.square().sum(), x)
    assert torch.isfinite(grad).all()


def test_nothing_of_the_weights_is_kept() -> None:
    """The default returns weights that most callers drop: the graph holds no tensor of their size."""
    layer, x = Mha(32, 4, batch_first=True), torch.randn(1, 50, 32)
    sizes = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, x, x)
    assert max(sizes) < 4 * 50 * 50


@pytest.mark.parametrize("options", (dict(need_weights=False), dict(), dict(average_attn_weights=False)))
def test_compiles(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layer = Mha(32, 4, batch_first=True, add_zero_attn=True)
    x = torch.randn(2, 6, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    padding = torch.arange(6) >= torch.tensor([[6], [4]])
    results = []
    for module in (layer, compiled):
        t = x.clone().requires_grad_()
        out, weights = module(t, t, t, padding, **options)
        loss = out.square().sum() + (0 if weights is None else weights.square().sum())
        results.append([out, *torch.autograd.grad(loss, [t, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_and_empty_inputs() -> None:
    layer = Mha(32, 4, add_bias_kv=True, batch_first=True)
    x = torch.randn(2, 6, 32)
    exact, exact_weights = layer(x, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = layer(x, x, x)
    assert out.dtype == weights.dtype == BF16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)
    assert (weights.float().sum(-1) - 1).abs().max() < 2**-7
    torch.testing.assert_close(weights.float(), exact_weights, rtol=0.05, atol=0.01)
    for empty in (x[:0], x[:, :0]):
        out, weights = layer(empty, empty, empty)
        assert out.shape == empty.shape and weights.shape == (*empty.shape[:2], empty.shape[1] + 1)
    out, weights = layer(x, x[:, :0], x[:, :0])
    assert torch.equal(weights, torch.ones(2, 6, 1))
    assert Mha(32, 4, device="meta")(*(x.to("meta"),) * 3)[1].shape == (6, 2, 2)


def test_explain() -> None:
    layer, x = Mha(32, 4), torch.randn(6, 2, 32)
    explanation = bitfuse.explain(layer, x, x, x, is_causal=True)
    assert explanation.op == "attention" and explanation.chosen == "cpp"


X = torch.randn(2, 6, 32)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(query=None), TypeError, "query is a NoneType"),
    (dict(query=torch.nested.nested_tensor([X[0]])), TypeError, "query is a nested tensor, .* pad it"),
    (dict(query=X[0]), ValueError, r"key has shape \[2, 6, 32\]"),
    (dict(query=X[..., :8]), ValueError, r"query has shape \[2, 6, 8\]"),
    (dict(key=X[:1]), ValueError, r"key has shape \[1, 6, 32\], expected \[2, 6, 32\]"),
    (dict(value=X[:, :3]), ValueError, r"value has shape \[2, 3, 32\], expected \[2, 6, 32\]"),
    (dict(key_padding_mask=torch.zeros(6)), ValueError, r"key_padding_mask has shape \[6\], expected \[2, 6"),
    (dict(attn_mask=torch.zeros(6, 7)), ValueError, r"expected \[6, 6\] or \[8, 6, 6\]"),
    (dict(attn_mask=torch.zeros(6, 6).int()), TypeError, "attn_mask has dtype torch.int32"),
    (dict(attn_mask=3), TypeError, "attn_mask is a int"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD, ids=[b[2][:30] for b in BAD])
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    layer = Mha(32, 4, batch_first=True)
    with pytest.raises(error, match=words):
        layer(**dict(query=X, key=X, value=X) | changes)


def test_the_constructor_refuses() -> None:
    for sizes, words in (
        ((30, 4), "embed_dim is 30, expected a multiple of num_heads, 4"),
        ((0, 1), "embed_dim is 0"),
        ((1032, 2), "expected at most 512 a head"),
    ):
        with pytest.raises(ValueError, match=words):
            Mha(*sizes)
    with pytest.raises(TypeError, match=r"dtype torch.float64"):
        Mha(32, 4, dtype=torch.float64)(*(X.double(),) * 3)

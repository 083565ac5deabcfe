"""What stands in for others' attention: torch's function and layer, flash-attn's functions, transformers'."""

from __future__ import annotations

import math
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import Errors

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
    errors = Errors()
    for draw in range(5):
        torch.manual_seed(5 * number + draw)
        sdpa_draw(errors, *SDPA[number], dtype=dtype)
    errors.check("sdpa")


def sdpa_draw(errors: Errors, *case: Any, dtype: torch.dtype) -> None:
    *sizes, kind, shape, options = case
    tensors: dict[str, Any] = {
        n: torch.randn(s).to(dtype).requires_grad_()
        for n, s in zip(("query", "key", "value"), sizes, strict=True)
    }
    if kind == "b":
        tensors["attn_mask"] = torch.rand(shape) < 0.7
    elif kind == "f":
        tensors["attn_mask"] = torch.randn(shape).to(dtype).requires_grad_()
    exact: dict[str, Any] = {
        n: t.detach().double().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()
    }
    y, wanted = bitfuse.scaled_dot_product_attention(**tensors, **options), torch_sdpa(**exact, **options)
    errors.add("output", y.detach(), wanted.detach(), torch_sdpa(**tensors, **options).detach())
    grad = torch.randn(y.shape).to(dtype)
    learnt = {n: t for n, t in tensors.items() if t.requires_grad}

    def gradients(y: torch.Tensor, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, [given[n] for n in learnt], grad.to(y.dtype))

    got, of_exact = gradients(y, tensors), gradients(wanted, exact)
    with bitfuse.use_backend("reference"):  # the same formula, from lse, where torch keeps the probabilities
        of_plain = gradients(bitfuse.scaled_dot_product_attention(**tensors, **options), tensors)
    for name, one, e, p in zip(learnt, got, of_exact, of_plain, strict=True):
        errors.add(f"gradient of {name}", one, e, p)


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
    assert bitfuse.explain(bitfuse.scaled_dot_product_attention, q, q, q, is_causal=True).op == (
        "scaled_dot_product_attention"
    )


# transformers

SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": dict(num_key_value_heads=2),
    "Mistral": dict(num_key_value_heads=2, sliding_window=5),
    "Gemma2": dict(num_key_value_heads=2, head_dim=16, sliding_window=6, attn_logit_softcapping=2.0),
    "GptOss": dict(
        num_key_value_heads=2, head_dim=16, sliding_window=6, num_local_experts=4, num_experts_per_tok=2
    ),
    "Bert": {},
}


def small_model(name: str) -> Any:
    import transformers

    bitfuse.integrations.transformers.register()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | MODELS[name])
    kind = "ForMaskedLM" if name == "Bert" else "ForCausalLM"
    model = getattr(transformers, name + kind)(config).eval()
    for parameter_name, p in model.named_parameters():
        if p.dim() > 1 or "sinks" in parameter_name:  # larger than at the start, for scores that matter
            torch.nn.init.normal_(p, std=0.5 if "sinks" in parameter_name else 0.15)
    return model


def tokens(padding: str) -> dict[str, torch.Tensor]:
    ids, mask = torch.randint(2, 97, (3, 11)), torch.ones(3, 11, dtype=torch.int64)
    for row, length in enumerate((0, 3, 8) if padding else ()):
        mask[row, slice(length) if padding == "left" else slice(11 - length, None)] = 0
    return dict(input_ids=ids * mask, attention_mask=mask)


@pytest.mark.parametrize("padding", ("", "left", "right"))
@pytest.mark.parametrize("name", MODELS)
def test_transformers_models(name: str, padding: str) -> None:
    model, given = small_model(name), tokens(padding)
    real = given["attention_mask"].bool()
    found: dict[str, list[torch.Tensor]] = {}
    peers = ("bitfuse", "eager") if name in ("Gemma2", "GptOss") else ("bitfuse", "eager", "sdpa")
    for implementation in peers:
        model.set_attn_implementation(implementation)
        logits = model(**given).logits[real]
        gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters()), allow_unused=True)
        found[implementation] = [logits, *(g for g in gradients if g is not None)]
    for implementation in peers[1:]:
        wanted = found[implementation]
        # of all gradients: that of BERT's key biases is 0 but for rounding
        scale = max(float(g.abs().max()) for g in wanted[1:])
        torch.testing.assert_close(found["bitfuse"][0], wanted[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["bitfuse"][1:], wanted[1:], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("name", [n for n in MODELS if n != "Bert"])
def test_transformers_generate(name: str, cache: str) -> None:
    model, given = small_model(name), tokens("left")
    found = {}
    for implementation in ("bitfuse", "eager"):
        model.set_attn_implementation(implementation)
        options = dict(max_new_tokens=8, do_sample=False, cache_implementation=cache, disable_compile=True)
        found[implementation] = model.generate(**given, **options)
    assert torch.equal(found["bitfuse"], found["eager"])


def test_transformers_mask_is_not_lost() -> None:
    """No mask tensor for a causal model without padding; a change of what padding hides changes nothing."""
    model = small_model("Llama")
    seen: list[Any] = []
    model.set_attn_implementation("bitfuse")
    forward = bitfuse.integrations.transformers.attention_forward

    def spy(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        seen.append(mask)
        return forward(module, q, k, v, mask, **options)

    from transformers import AttentionInterface

    AttentionInterface.register("bitfuse", spy)
    try:
        model(**tokens(""))
        assert seen == [None, None]
        given = tokens("left")
        first = model(**given).logits
        assert seen[-1].dtype == torch.bool and seen[-1].shape == (3, 1, 11, 11)
    finally:
        bitfuse.integrations.transformers.register()
    real = given["attention_mask"].bool()
    given["input_ids"] = torch.where(real, given["input_ids"], 5)
    assert torch.equal(model(**given).logits[real], first[real])


def test_transformers_dropout_is_of_the_seed() -> None:
    model, given = small_model("Llama").train(), tokens("")
    model.set_attn_implementation("bitfuse")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(model(**given).logits)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("name", [n for n in MODELS if n != "Bert"])
def test_transformers_packed_rows(name: str) -> None:
    """Sequences one after the other, in one row or more, are each as it is alone, with a mask of ones beside
    them or without."""
    model, lengths = small_model(name), (7, 12, 3)
    ids = torch.randint(2, 97, (1, sum(lengths)))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        alone = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
        model.set_attn_implementation("bitfuse")
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        places = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
        given: dict[str, Any] = dict(cu_seq_lens_q=cu.int(), cu_seq_lens_k=cu.int(), position_ids=places)
        for mask in (None, torch.ones_like(ids)):
            for longest in (12, torch.tensor(12), None):
                got = model(
                    ids, attention_mask=mask, max_length_q=longest, max_length_k=longest, **given
                ).logits
                torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
        twice = torch.cat([cu, cu[1:] + cu[-1]]).int()
        two: dict[str, Any] = dict(
            cu_seq_lens_q=twice, cu_seq_lens_k=twice, position_ids=places.expand(2, -1),
            attention_mask=torch.ones(2, sum(lengths), dtype=torch.int64),
        )  # fmt: skip
        got = model(ids.expand(2, -1), **two).logits
        torch.testing.assert_close(got, alone.expand(2, -1, -1), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="only one of cu_seq_lens_q and cu_seq_lens_k"):
            model(ids, cu_seq_lens_q=cu.int())


def test_transformers_packed_masks() -> None:
    """Packed rows with a position bias, and with a float mask, forward and where no order is kept."""
    q, k, v, bias = *(torch.randn(1, 2, 9, 8) for _ in range(3)), torch.randn(1, 2, 9, 9)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    module = torch.nn.Module()
    forward = bitfuse.integrations.transformers.attention_forward
    for causal in (True, False):
        for options in (dict(position_bias=bias), dict(attention_mask=bias)):
            given: dict[str, Any] = dict(attention_mask=None, is_causal=causal) | options
            got, _ = forward(module, q, k, v, cu_seq_lens_q=cu, cu_seq_lens_k=cu, **given)
            for part in (slice(0, 4), slice(4, 9)):
                mask = bias[..., part, part]
                if causal and "position_bias" in options:
                    n = mask.shape[-1]
                    mask = mask.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
                own = [t[:, :, part] for t in (q, k, v)]
                wanted = torch.nn.functional.scaled_dot_product_attention(own[0], own[1], own[2], mask)
                torch.testing.assert_close(got[:, part].transpose(1, 2), wanted)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_autocast(name: str, dtype: torch.dtype) -> None:
    """Training and generation in mixed precision, as Trainer(bf16=True) has it: rotated queries and keys come
    in float32, values in 16 bits."""
    model, given = small_model(name), tokens("left")
    real = given["attention_mask"].bool()
    found = {}
    for implementation in ("bitfuse", "eager"):
        model.set_attn_implementation(implementation)
        with torch.autocast("cpu", dtype):
            logits = model(**given).logits[real]
        found[implementation] = [
            logits.detach().float(),
            *torch.autograd.grad(logits.float().square().mean(), list(model.parameters()), allow_unused=True),
        ]
    with torch.no_grad():
        exact = model(**given).logits[real]
    error, plain = (float((found[i][0] - exact).abs().max()) for i in ("bitfuse", "eager"))
    assert error <= 2 * plain
    norms = [sum(float(g.square().sum()) for g in f[1:] if g is not None) for f in found.values()]
    assert abs(norms[0] / norms[1] - 1) < 0.1
    if name != "Bert":
        with torch.autocast("cpu", dtype):
            model.set_attn_implementation("bitfuse")
            assert model.generate(**given, max_new_tokens=3, do_sample=False).shape == (3, 14)


def test_transformers_packaged_model() -> None:
    transformers = pytest.importorskip("transformers")
    from bitfuse_tools.demo.embedder import find_model

    bitfuse.integrations.transformers.register()
    folder = find_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval().float()
    given = tokenizer(["a cat sat on the mat", "rain"], padding=True, return_tensors="pt")
    real, made = given["attention_mask"].bool(), {}
    for implementation in ("bitfuse", "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            made[implementation] = model(**given).last_hidden_state[real]
    for peer in ("sdpa", "eager"):
        torch.testing.assert_close(made["bitfuse"], made[peer], rtol=1e-4, atol=1e-5)


# flash-attn


def plainly(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """[batch, seq, heads, dim] in float32, written out, aligned bottom-right."""
    sq, sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    d = torch.arange(sk) - torch.arange(sq).unsqueeze(1) - (sk - sq)
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if causal:
        seen &= d <= 0
    if window[0] >= 0:
        seen &= d >= -window[0]
    if window[1] >= 0:
        seen &= d <= window[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    return torch_sdpa(q, k, v, attn_mask=seen).transpose(1, 2)


@pytest.mark.parametrize(
    ("causal", "window"), ((False, (-1, -1)), (True, (-1, -1)), (True, (3, 0)), (False, (2, 4)))
)
def test_flash_attn_functions(causal: bool, window: tuple[int, int]) -> None:
    f = bitfuse.compat.flash_attn
    options: dict[str, Any] = dict(causal=causal, window_size=window)
    seen: dict[str, Any] = dict(causal=causal, window=window)
    q, kv = torch.randn(2, 7, 4, 16), torch.randn(2, 9, 2, 2, 16)
    k, v = kv.unbind(2)
    wanted = plainly(q, k, v, **seen)
    torch.testing.assert_close(f.flash_attn_func(q, k, v, **options), wanted)
    torch.testing.assert_close(f.flash_attn_kvpacked_func(q, kv, **options), wanted)
    out, lse, probabilities = f.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    torch.testing.assert_close(out, wanted)
    assert lse.shape == (2, 4, 7) and lse.dtype == torch.float32 and probabilities is None

    qkv = torch.randn(2, 8, 3, 4, 16, requires_grad=True)
    y, wanted = f.flash_attn_qkvpacked_func(qkv, **options), plainly(*qkv.unbind(2), **seen)
    torch.testing.assert_close(y, wanted)
    (got,), (expected,) = (torch.autograd.grad(t.square().sum(), qkv) for t in (y, wanted))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    packed, edges = torch.randn(12, 3, 4, 16), torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    alone = [plainly(*packed[None, a:b].unbind(2), **seen)[0] for a, b in ((0, 5), (5, 12))]
    of_qkv = f.flash_attn_varlen_qkvpacked_func(packed, edges, 7, **options)
    torch.testing.assert_close(of_qkv, torch.cat(alone))
    q, kv = packed[:, 0], packed[:, 1:]
    of_kv = f.flash_attn_varlen_kvpacked_func(q, kv, edges, edges, 7, 7, **options)
    assert torch.equal(of_kv, of_qkv)
    out, lse, _ = f.flash_attn_varlen_func(
        q, kv[:, 0], kv[:, 1], edges, edges, 7, 7, return_attn_probs=True, **options
    )
    assert torch.equal(out, of_qkv) and lse.shape == (4, 12)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pairs of neighbours, turned by the angles of their positions [batch, seq]."""
    half = cos.shape[1]
    c, s = (t[positions.long()].unsqueeze(2) for t in (cos, sin))
    a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return torch.cat([torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2), x[..., 2 * half :]], -1)


@pytest.mark.parametrize("paged", (False, True))
@pytest.mark.parametrize(
    ("queries", "new", "causal", "window"),
    (
        (1, 1, True, (-1, -1)),
        (3, 3, True, (-1, -1)),
        (3, 3, False, (-1, -1)),
        (2, 4, True, (-1, -1)),
        (2, 4, False, (3, 3)),
    ),
)
def test_flash_attn_with_kvcache(
    queries: int, new: int, causal: bool, window: tuple[int, int], paged: bool
) -> None:
    lengths = torch.tensor([5, 0, 11], dtype=torch.int32)
    k_cache, v_cache = torch.randn(3, 16, 2, 16), torch.randn(3, 16, 2, 16)
    q, k, v = torch.randn(3, queries, 4, 16), torch.randn(3, new, 2, 16), torch.randn(3, new, 2, 16)
    angles = torch.randn(32, 6)
    cos, sin = angles.cos(), angles.sin()
    steps = torch.arange(queries) if causal or window != (-1, -1) else torch.zeros(queries, dtype=torch.int64)
    turned_q = turned(q, cos, sin, lengths.unsqueeze(1) + steps)
    turned_k = turned(k, cos, sin, lengths.unsqueeze(1) + torch.arange(new))
    wanted = []
    for b, n in enumerate(lengths.tolist()):
        keys, values = (torch.cat([c[b, :n], t[b]])[None] for c, t in ((k_cache, turned_k), (v_cache, v)))
        wanted.append(plainly(turned_q[b : b + 1], keys, values, causal=causal, window=window))
    given: dict[str, Any] = dict(k=k, v=v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths)
    caches = [k_cache.clone(), v_cache.clone()]
    if paged:
        order = torch.randperm(12)
        given["block_table"] = order.argsort().view(3, 4).int()
        caches = [c.view(12, 4, 2, 16)[order].contiguous() for c in caches]
    out, lse = bitfuse.compat.flash_attn.flash_attn_with_kvcache(
        q, caches[0], caches[1], causal=causal, window_size=window, return_softmax_lse=True, **given
    )
    torch.testing.assert_close(out, torch.cat(wanted))
    assert lse.shape == (3, 4, queries)
    written = caches[0] if not paged else caches[0][given["block_table"].long()].view(3, 16, 2, 16)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(written[b, n : n + new], turned_k[b])
        assert torch.equal(written[b, :n], k_cache[b, :n])


def test_flash_attn_with_kvcache_without_new_keys() -> None:
    f = bitfuse.compat.flash_attn.flash_attn_with_kvcache
    q, cache = torch.randn(2, 1, 4, 16), torch.randn(2, 16, 2, 16)
    torch.testing.assert_close(f(q, cache, cache), plainly(q, cache, cache))
    torch.testing.assert_close(f(q, cache, cache, cache_seqlens=9), plainly(q, cache[:, :9], cache[:, :9]))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    (
        (dict(cache_batch_idx=torch.zeros(2)), ValueError, "cache_batch_idx is given, expected None"),
        (dict(k=torch.randn(2, 1, 2, 16), v=torch.randn(2, 1, 2, 16)), ValueError, "cache_seqlens is None"),
        (dict(rotary_cos=torch.ones(9, 4), rotary_sin=torch.ones(9, 4)), ValueError, "k is None"),
        (dict(q=None), TypeError, "q is a NoneType"),
    ),
)
def test_flash_attn_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    cache = torch.randn(2, 16, 2, 16)
    given: dict[str, Any] = dict(q=torch.randn(2, 1, 4, 16), k_cache=cache, v_cache=cache)
    with pytest.raises(error, match=words):
        bitfuse.compat.flash_attn.flash_attn_with_kvcache(**given | changes)
    with pytest.raises(ValueError, match=r"qkv has shape \[2, 7, 2, 4, 16\], expected \[..., 3, heads"):
        bitfuse.compat.flash_attn.flash_attn_qkvpacked_func(torch.randn(2, 7, 2, 4, 16))

"""Decoder: a native step is what the model's modules give, and bit for bit what the ops give one by one."""

from __future__ import annotations

import copy
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from bitfuse.models.architectures import ARCHITECTURES
from bitfuse.models.decoder import PARTS, Decoder, Unserved

transformers = pytest.importorskip("transformers")

VOCABULARY = 199
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(tie_word_embeddings=True, attention_bias=True)),
    "llama3": (
        "Llama",
        dict(
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=1e4,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            )
        ),
    ),
    "mistral": ("Mistral", dict(sliding_window=9, head_dim=24)),
    "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=9, query_pre_attn_scalar=16)),
    "gemma3_text": ("Gemma3", dict(head_dim=16, sliding_window=9, query_pre_attn_scalar=16)),
    "phi3": ("Phi3", dict(partial_rotary_factor=0.5)),
}


def made(kind: str, dtype: torch.dtype = torch.float32, format: str = "int8", **more: Any) -> tuple[Any, Any]:
    """A model with numbers of every size in its norms and biases, in few bits, and the same in float64."""
    name, options = MODELS[kind]
    text = "Text" if kind.startswith("gemma3") else ""
    config = getattr(transformers, f"{name}{text}Config")(**SIZES | options | more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model = model.to(dtype)
    few = copy.deepcopy(model)
    bitfuse.quantize_(few, format, group_size=32, progress=False)
    exact = model.double()
    with torch.no_grad():
        for name, module in few.named_modules():
            if isinstance(module, bitfuse.nn.Linear):
                exact.get_submodule(name).weight.copy_(module.weight.dequantize())
    return few, exact


def test_every_architecture_is_tested() -> None:
    tested = {"llama" if kind == "llama3" else kind for kind in MODELS}
    assert tested == set(ARCHITECTURES)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_is_the_model(kind: str, dtype: torch.dtype) -> None:
    few, exact = made(kind, dtype)
    ids = torch.randint(3, VOCABULARY, (2, 23))
    wanted, plain = exact(ids).logits, few(ids).logits
    decoder = Decoder(few, batch=2, max_len=32)
    got = decoder.step(ids[:, :11], every=True)
    assert_accurate(got, wanted[:, :11], plain[:, :11], "the prompt")
    decoder.prefill(ids[:, 11:20], chunk=4)
    for i in range(20, 23):  # past the window of those that have one
        got = decoder.step(ids[:, i : i + 1])
        assert_accurate(got, wanted[:, i], plain[:, i], f"token {i}")
    assert decoder.lengths == [23, 23]


def step_of_ops(model: Any, caches: list[bitfuse.KVCache], ids: torch.Tensor) -> torch.Tensor:
    """A step of a Llama by public ops."""
    config, body = model.config, model.model
    batch, tokens = ids.shape
    x = h = body.embed_tokens(ids)
    angles = torch.outer(torch.arange(64, dtype=torch.float32), body.rotary_emb.inv_freq)
    block: Any = None
    for layer, cache in zip(body.layers, caches, strict=True):
        attention, mlp = layer.self_attn, layer.mlp

        def norm(
            module: Any, block: torch.Tensor | None, h: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if block is None:
                return bitfuse.rms_norm(h, module.weight, module.variance_epsilon), h
            return bitfuse.rms_norm(block, module.weight, module.variance_epsilon, residual=h)

        x, h = norm(layer.input_layernorm, block, h)
        q, k, v = (
            p(x).view(batch, tokens, -1, config.head_dim)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out = bitfuse.decode_attention(
            q, cache, k=k, v=v, rotary_cos=angles.cos(), rotary_sin=angles.sin(),
            softmax_scale=attention.scaling, causal=True,
        )  # fmt: skip
        block = attention.o_proj(out.flatten(2))
        x, h = norm(layer.post_attention_layernorm, block, h)
        block = mlp.down_proj(bitfuse.gated_activation(mlp.gate_proj(x), mlp.up_proj(x)))
    y, _ = bitfuse.rms_norm(block, body.norm.weight, body.norm.variance_epsilon, residual=h)
    return model.lm_head(y[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["none", "fp8", "int8", "int4"])
def test_bits_are_those_of_the_ops(cache: str) -> None:
    model, _ = made("llama", format="int4", tie_word_embeddings=False)
    model.lm_head = bitfuse.nn.Linear.from_float(
        torch.nn.Linear(64, VOCABULARY, bias=False), "int8", group_size=32
    )
    caches = [
        bitfuse.KVCache(2, 64, 2, 16, dtype=torch.float32, format=cache)
        for _ in range(model.config.num_hidden_layers)
    ]
    decoder = Decoder(model, batch=2, max_len=64, cache=cache)
    ids = torch.randint(3, VOCABULARY, (2, 44))
    for begin, end in ((0, 40), (40, 41), (41, 44)):
        got = decoder.step(ids[:, begin:end])
        wanted = step_of_ops(model, caches, ids[:, begin:end])
        assert torch.equal(got, wanted), (begin, (got - wanted).abs().max())


@torch.no_grad()
def test_same_bits_for_any_threads() -> None:
    model, _ = made("qwen3")
    ids = torch.randint(3, VOCABULARY, (1, 40))
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            decoder = Decoder(model, max_len=48)
            decoder.prefill(ids[:, :39])
            found.append(decoder.step(ids[:, 39:]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["none", "int8"])
def test_sequences_of_other_lengths(cache: str) -> None:
    model, _ = made("llama")
    prompts = [torch.randint(3, VOCABULARY, (1, n)) for n in (7, 19, 1)]
    together = Decoder(model, batch=3, max_len=40, cache=cache)
    alone = [Decoder(model, max_len=40, cache=cache) for _ in prompts]
    for b, prompt in enumerate(prompts):
        assert torch.equal(together.prefill(prompt, first=b), alone[b].prefill(prompt))
    for _ in range(3):
        ids = torch.randint(3, VOCABULARY, (3, 1))
        got = together.step(ids)
        wanted = torch.cat([decoder.step(ids[b : b + 1]) for b, decoder in enumerate(alone)])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert together.lengths == [10, 22, 4]


@torch.no_grad()
def test_tokens_are_taken_back() -> None:
    model, _ = made("llama")
    ids = torch.randint(3, VOCABULARY, (1, 30))
    decoder = Decoder(model, max_len=128, cache="int4")
    decoder.prefill(ids[:, :29])
    wanted = decoder.step(ids[:, 29:])
    decoder.step(torch.randint(3, VOCABULARY, (1, 9)))
    decoder.truncate(29)
    assert torch.equal(decoder.step(ids[:, 29:]), wanted)
    decoder.prefill(torch.randint(3, VOCABULARY, (1, 60)))
    with pytest.raises(ValueError, match="length is 29, expected 58 or more: older tokens are codes"):
        decoder.truncate(29)
    with pytest.raises(ValueError, match="length is 91, expected 0 to 90"):
        decoder.truncate(91)


def test_the_clock_and_weights_that_are_shared() -> None:
    model, _ = made("llama")
    decoder = Decoder(model, max_len=16)
    decoder.seconds = torch.zeros(len(PARTS), dtype=torch.float64)
    decoder.step(torch.tensor([[5, 6]]))
    assert (decoder.seconds[:4] > 0).all()
    layer = decoder._args.layers[0]
    assert layer.down.weight[0].data_ptr() == model.model.layers[0].mlp.down_proj.qweight.data_ptr()


def test_refuses() -> None:
    model, _ = made("llama")
    decoder = Decoder(model, batch=2, max_len=8)
    for tokens, words in (
        ([[VOCABULARY]], f"a token of ids is {VOCABULARY}, expected 0 to {VOCABULARY - 1}"),
        ([[-1]], "a token of ids is -1"),
        ([[1] * 9], "seqlens is 0, expected 0 to -1: there is room for 8 tokens"),
        ([[1], [2], [3]], "batch is 3, expected at most 2"),
    ):
        with pytest.raises(ValueError, match=words):
            decoder.step(torch.tensor(tokens))
    for ids in (torch.tensor([1]), torch.tensor([[1.0]]), [[1]]):
        with pytest.raises(ValueError, match=r"expected an int64 tensor \[batch, tokens\]"):
            decoder.step(ids)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="first is 2, expected 0 to 1"):
        decoder._native.step(
            torch.tensor([[1]]), torch.zeros(1, dtype=torch.int32), 2, torch.zeros(1, VOCABULARY), None, None
        )
    with pytest.raises(ValueError, match="logits is of shape"):
        decoder.step(torch.tensor([[1]]), out=torch.zeros(1, 7))
    assert decoder.lengths == [0, 0]
    with pytest.raises(ValueError, match="max_len is 0, expected 1 or more"):
        Decoder(model, max_len=0)
    with pytest.raises(ValueError, match="layer 2 is to be left out, expected 0 to 1"):
        Decoder(model, without_layers=[2])
    with pytest.raises(ValueError, match="format is 'int3'"):
        Decoder(model, cache="int3")


def test_says_what_has_no_step() -> None:
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    )
    with pytest.raises(Unserved, match="model_type 'gpt2' has no native step: there are llama"):
        Decoder(gpt, max_len=8)
    model, _ = made("llama")
    bitfuse.add_lora_(model, ["q_proj"], r=4)
    with pytest.raises(Unserved, match=r"layers\.0\.self_attn\.q_proj is a LoRALinear"):
        Decoder(model, max_len=8)
    growing, _ = made("llama", rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))
    Decoder(growing, max_len=128)
    with pytest.raises(
        Unserved, match="max_len is 129, expected 128 or less: beyond it the tables of rope_type"
    ):
        Decoder(growing, max_len=129)


def test_an_embedding_of_few_bits_and_a_head_of_its_codes() -> None:
    """As the reader of a GGUF file makes them: the native step gives the tokens that the modules give."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    w = bitfuse.quantize(model.model.embed_tokens.weight.detach(), "int8", group_size=32)
    model.model.embed_tokens = bitfuse.nn.Embedding.from_weight(w)
    model.lm_head = bitfuse.nn.Linear.tied_to(model.model.embed_tokens)
    ids = torch.randint(3, VOCABULARY, (1, 5))
    got = bitfuse.generate(model, ids, max_new_tokens=6, eos_token_id=[])
    with bitfuse.use_backend("reference"):
        wanted = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert got.tokens[0] == wanted[0, 5:].tolist()

"""fuse_ and unfuse_ on a small model of each architecture."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import Errors

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 1, 9, 33, 2, 60, 7], [8, 8, 3, 11, 59, 4, 1]])
SMALL: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=64, pad_token_id=0, head_dim=16,
)  # fmt: skip
BERT = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
PHI = {k: v for k, v in SMALL.items() if k != "head_dim"}
# the config's class, what it is given, the model's class, and blocks of each kind that are fused
MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, int]]] = {
    "llama": (
        "LlamaConfig", SMALL, "LlamaForCausalLM", {"LlamaDecoderLayer": 2, "LlamaRMSNorm": 5, "LlamaMLP": 2}
    ),
    "mistral": (
        "MistralConfig", SMALL | dict(sliding_window=4), "MistralForCausalLM",
        {"MistralDecoderLayer": 2, "MistralRMSNorm": 5, "MistralMLP": 2},
    ),
    "qwen2": (
        "Qwen2Config", SMALL, "Qwen2ForCausalLM", {"Qwen2DecoderLayer": 2, "Qwen2RMSNorm": 5, "Qwen2MLP": 2}
    ),
    "qwen3": (
        "Qwen3Config", SMALL, "Qwen3ForCausalLM", {"Qwen3DecoderLayer": 2, "Qwen3RMSNorm": 9, "Qwen3MLP": 2}
    ),
    "gemma2": (
        "Gemma2Config", SMALL | dict(sliding_window=4, query_pre_attn_scalar=16), "Gemma2ForCausalLM",
        {"Gemma2DecoderLayer": 2, "Gemma2RMSNorm": 9, "Gemma2MLP": 2},
    ),
    "gemma3": (
        "Gemma3TextConfig", SMALL | dict(sliding_window=4, query_pre_attn_scalar=16), "Gemma3ForCausalLM",
        {"Gemma3DecoderLayer": 2, "Gemma3RMSNorm": 13, "Gemma3MLP": 2},
    ),
    "phi3": ("Phi3Config", PHI, "Phi3ForCausalLM", {"Phi3DecoderLayer": 2, "Phi3RMSNorm": 5, "Phi3MLP": 2}),
    "gpt_oss": (
        "GptOssConfig", SMALL
        | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=4, experts_implementation="eager"),
        "GptOssForCausalLM", {"GptOssDecoderLayer": 2, "GptOssRMSNorm": 5},
    ),
    "bert": ("BertConfig", BERT, "BertModel", {"LayerNorm": 5, "BertSelfOutput": 2, "BertOutput": 2}),
}  # fmt: skip


def built(name: str) -> Any:
    """With weights of every size, so that what a norm gives matters."""
    config, sizes, model, _ = MODELS[name]
    torch.manual_seed(3)
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for key, p in made.named_parameters():
            size = 0.3 if p.dim() == 1 else 1.0 if "embed" in key else p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape) * size + (p.dim() == 1))
    return made


def outcome(model: Any, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output, and the gradients of all parameters."""
    out = model(ids)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    model.zero_grad()
    (out * weights).sum().backward()
    return out.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str) -> None:
    draws = torch.randint(64, (6, 2, 9), generator=torch.Generator().manual_seed(7))
    exact = [outcome(built(name).double(), ids) for ids in draws]
    for dtype in (torch.float32, torch.bfloat16):
        model = built(name).to(dtype)
        plain = [outcome(model, ids) for ids in draws]
        report = bitfuse.fuse_(model)
        assert report.blocks == MODELS[name][3] and report.attention
        experts = [n for n in report.left if "mlp" in n]
        assert set(report.left) == set(experts) and bool(experts) == (name == "gpt_oss"), report.left
        errors = Errors()
        for ids, right, near in zip(draws, exact, plain, strict=True):
            got = outcome(model, ids)
            errors.add("output", got[0], right[0], near[0])
            for grads in zip(got[1], right[1], near[1], strict=True):
                errors.add("gradients", *grads)
        errors.check(f"{name} {dtype}")
        assert bitfuse.unfuse_(model) == sum(report.blocks.values())
        again, again_grads = outcome(model, draws[0])
        assert torch.equal(again, plain[0][0])
        assert all(torch.equal(a, b) for a, b in zip(again_grads, plain[0][1], strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_the_same_names_and_kinds(name: str) -> None:
    model = built(name)
    before = {n: (type(m).__name__, type(m).__mro__[-1]) for n, m in model.named_modules()}
    kinds = {n: type(m) for n, m in model.named_modules()}
    state = {n: id(p) for n, p in model.named_parameters()}
    attention = model.config._attn_implementation
    bitfuse.fuse_(model)
    assert {n: (type(m).__name__, type(m).__mro__[-1]) for n, m in model.named_modules()} == before
    assert all(isinstance(m, kinds[n]) for n, m in model.named_modules())
    assert {n: id(p) for n, p in model.named_parameters()} == state
    assert bitfuse.fuse_(model).blocks == MODELS[name][3]  # nothing more
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS)[0], model(IDS)[0])
        assert bitfuse.unfuse_(other) == bitfuse.unfuse_(copy.deepcopy(model)) > 0
    bitfuse.unfuse_(model)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert model.config._attn_implementation == attention


def test_padding_generation_and_recorded_outputs() -> None:
    model = built("llama")
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    plain = model(IDS, attention_mask=mask, output_hidden_states=True)
    tokens = model.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False)
    bitfuse.fuse_(model)
    got = model(IDS, attention_mask=mask, output_hidden_states=True)
    seen = mask.bool()
    torch.testing.assert_close(got.logits[seen], plain.logits[seen], rtol=1e-4, atol=1e-4)
    assert len(got.hidden_states) == len(plain.hidden_states) == 3
    assert torch.equal(model.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False), tokens)


def test_training_with_checkpoints_and_dropout() -> None:
    model = built("phi3").train()
    bitfuse.fuse_(model)
    plain, plain_grads = outcome(model)
    model.gradient_checkpointing_enable()
    got, grads = outcome(model)
    assert torch.equal(got, plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))
    for layer in model.model.layers:
        layer.resid_attn_dropout.p = 0.5
    with torch.no_grad():
        assert not torch.equal(model(IDS)[0], model(IDS)[0])


def test_hooks_are_heard() -> None:
    model = built("qwen3")
    bitfuse.fuse_(model)
    plain, heard = model(IDS)[0], []
    norm = model.model.layers[1].post_attention_layernorm
    handle = norm.register_forward_hook(lambda module, given, made: heard.append(made.shape))
    model.model.layers[0].register_forward_hook(lambda module, given, made: heard.append(made.shape))
    torch.testing.assert_close(model(IDS)[0], plain)
    assert len(heard) == 2
    bitfuse.unfuse_(model)
    model(IDS)
    assert len(heard) == 4
    handle.remove()
    model(IDS)
    assert len(heard) == 5


def test_quantized_models_and_back() -> None:
    """Few-bit layers come in after the blocks were fused, and stay when they are not."""
    model, other = built("llama"), built("llama")
    bitfuse.fuse_(model)
    bitfuse.quantize_(model, "int8", embeddings=True, progress=False)
    bitfuse.quantize_(other, "int8", embeddings=True, progress=False)
    plain = other(IDS)[0]
    torch.testing.assert_close(model(IDS)[0], plain, rtol=1e-4, atol=1e-4)
    bitfuse.unfuse_(model)
    assert isinstance(model.model.layers[0].mlp.gate_proj, bitfuse.nn.Linear)
    assert torch.equal(model(IDS)[0], plain)


def test_what_is_left_is_named() -> None:
    config = transformers.LlamaConfig(**SMALL, hidden_act="gelu_new")
    report = bitfuse.fuse_(transformers.LlamaForCausalLM(config))
    assert report.left == {
        f"model.layers.{i}.mlp": "its activation is a NewGELUActivation, which gated_activation has not"
        for i in range(2)
    }
    assert "left as it is: its activation" in str(report) and "LlamaRMSNorm" in str(report)
    model = built("llama")
    norm = model.model.norm
    norm.forward = norm.forward
    report = bitfuse.fuse_(model, attention=False)
    assert report.left == {"model.norm": "its forward is replaced on the instance"} and not report.attention
    assert model.config._attn_implementation != "bitfuse"
    layer = built("llama").model.layers[0]
    assert bitfuse.fuse_(layer).left == {
        "LlamaDecoderLayer": "it is the model itself, which can't be replaced in place"
    }
    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    unknown = transformers.OlmoForCausalLM(transformers.OlmoConfig(**sizes, pad_token_id=0))
    report = bitfuse.fuse_(unknown, attention=False)
    assert not report.blocks
    assert report.left["model.layers.0.mlp"] == "a OlmoMLP of an unknown architecture, olmo"
    for function in (bitfuse.fuse_, bitfuse.unfuse_):
        with pytest.raises(TypeError, match=r"model is a dict, expected a torch\.nn\.Module"):
            function({})  # type: ignore[arg-type]


def test_compiled() -> None:
    model = built("llama")
    bitfuse.fuse_(model)
    plain = model(IDS)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS, use_cache=False)[0], plain)


def test_a_double_model_runs_as_before() -> None:
    model = built("gemma3").double()
    plain = model(IDS)[0]
    bitfuse.fuse_(model, attention=False)
    assert torch.equal(model(IDS)[0], plain)

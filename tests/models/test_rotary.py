"""Rotary tables of configurations: the bits of transformers' own."""

from __future__ import annotations

from typing import Any

import bitfuse
import pytest
import torch

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

SIZES: dict[str, Any] = dict(hidden_size=512, num_attention_heads=8, max_position_embeddings=8192)
KINDS: dict[str, dict[str, Any]] = {
    "linear": dict(rope_type="linear", factor=4.0),
    "dynamic": dict(rope_type="dynamic", factor=2.5),
    "llama3": dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=2048,
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048),
    "yarn-mscale": dict(
        rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0,
        mscale_all_dim=0.7, beta_fast=16, beta_slow=2, truncate=False,
    ),
    "yarn-attention": dict(
        rope_type="yarn", factor=1.0, original_max_position_embeddings=8192, attention_factor=1.3
    ),
    "longrope": dict(
        rope_type="longrope", short_factor=[1.0 + 0.01 * i for i in range(32)],
        long_factor=[1.5 + 0.3 * i for i in range(32)], original_max_position_embeddings=4096,
    ),
}  # fmt: skip


def their(config: Any, length: int | None) -> tuple[torch.Tensor, float]:
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        made = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        return made.inv_freq, made.attention_scaling
    found: tuple[torch.Tensor, float] = rope_utils.ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    return found


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000])
@pytest.mark.parametrize("name", ["default", *KINDS])
def test_the_bits_of_transformers(name: str, theta: float) -> None:
    given = dict(KINDS.get(name, dict(rope_type="default")), rope_theta=theta)
    config = transformers.LlamaConfig(**SIZES, rope_parameters=given)
    for length in (None, 100, 5000, 20000):
        inv_freq, scaling = their(config, length)
        for own in (config, config.to_dict()):
            got = bitfuse.rope_frequencies(own, length)
            assert torch.equal(got.inv_freq, inv_freq) and got.attention_scaling == scaling, length
    # as older files say it
    older = SIZES | dict(rope_theta=theta, rope_scaling=dict(KINDS.get(name, {})))
    if "rope_type" in older["rope_scaling"]:
        older["rope_scaling"]["type"] = older["rope_scaling"].pop("rope_type")
    assert torch.equal(bitfuse.rope_frequencies(older, 20000).inv_freq, their(config, 20000)[0])


@pytest.mark.parametrize("name", ["default", "linear", "yarn", "llama3", "dynamic"])
def test_a_share_of_the_channels(name: str) -> None:
    given = dict(KINDS.get(name, dict(rope_type="default")), rope_theta=10000.0, partial_rotary_factor=0.5)
    kind = transformers.Phi3Config if name == "default" else transformers.LlamaConfig
    config = kind(**SIZES, rope_parameters=given, pad_token_id=0)
    if name == "default":
        made = transformers.models.phi3.modeling_phi3.Phi3RotaryEmbedding(config)
        inv_freq = made.inv_freq
    else:
        inv_freq = rope_utils.ROPE_INIT_FUNCTIONS[name](config)[0]
    got = bitfuse.rope_frequencies(config)
    assert got.inv_freq.shape == (16,) and torch.equal(got.inv_freq, inv_freq)


def test_layers_that_differ() -> None:
    config = transformers.Gemma3TextConfig(hidden_size=64, num_attention_heads=2, head_dim=32)
    model = transformers.models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding(config)
    for layer in ("full_attention", "sliding_attention"):
        got = bitfuse.rope_frequencies(config, layer_type=layer)
        assert torch.equal(got.inv_freq, getattr(model, f"{layer}_inv_freq"))
    with pytest.raises(ValueError, match="layer_type is None, expected one of"):
        bitfuse.rope_frequencies(config)


@pytest.mark.parametrize("name", ["default", *KINDS])
def test_tables(name: str) -> None:
    given = dict(KINDS.get(name, dict(rope_type="default")), rope_theta=10000.0)
    config = transformers.LlamaConfig(**SIZES, rope_parameters=given)
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    for length in (100, 9000):
        cos, sin = module(torch.zeros(1), torch.arange(length)[None])
        for got, wanted in zip(bitfuse.rope_tables(config, length), (cos, sin), strict=True):
            if name == "dynamic" and length > 8192:  # the module has the base in float32 then
                torch.testing.assert_close(got, wanted[0, :, :32], rtol=0, atol=2e-3)
            else:
                assert torch.equal(got, wanted[0, :, :32])
    x = torch.randn(1, 100, 2, 64)
    cos, sin = bitfuse.rope_tables(config, 100, dtype=torch.bfloat16)
    assert bitfuse.rope(x, cos, sin).shape == x.shape and cos.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            dict(rope_parameters=dict(rope_type="wave")),
            "rope_type is 'wave', expected one of default, linear",
        ),
        (
            dict(rope_parameters=dict(rope_type="linear")),
            "factor of rope 'linear' is None, expected a positive",
        ),
        (dict(rope_scaling=dict(type="linear", factor=-1)), "factor of rope 'linear' is -1"),
        (dict(hidden_size=None), "hidden_size is None, expected a positive whole number"),
        (dict(rope_theta=0.5), "64 of 64 channels turn at a rope_theta of 0.5"),
        (dict(partial_rotary_factor=0.01), "0 of 64 channels turn"),
        (
            dict(rope_parameters=dict(rope_type="longrope", short_factor=[1.0])),
            "short_factor of rope 'longrope' is 1, expected 32 numbers",
        ),
        (
            dict(rope_parameters=dict(rope_type="dynamic", factor=2.0), max_position_embeddings=None),
            "max_position_embeddings is missing",
        ),
    ],
)
def test_refuses(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bitfuse.rope_frequencies(SIZES | config)
    with pytest.raises(ValueError, match="length is -1"):
        bitfuse.rope_tables(SIZES, -1)

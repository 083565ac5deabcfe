"""Folders of packed safetensors: each format is written by a small encoder (or by its own package), and read
bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitfuse
import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from bitfuse.checkpoints import open_checkpoint
from bitfuse.weights.formats import E2M1, E4M3

save_file = pytest.importorskip("safetensors.torch").save_file

N, K = 48, 192
ROUNDING = 2.0**-24  # of float32, to the nearest
Tensors = dict[str, torch.Tensor]


def write(folder: Path, tensors: Tensors, quantization: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    said = {"model_type": "llama", "quantization_config": quantization, **config}
    (folder / "config.json").write_text(json.dumps(said))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    return folder


def read(folder: Path, name: str = "l") -> tuple[Any, Any]:
    """The one matrix of a folder: its entry, and it."""
    layers = list(open_checkpoint(folder).layers())
    assert [e.name for e in layers] == [name]
    loaded: Any = layers[0].read()
    assert loaded.weight.shape == layers[0].shape
    loaded.weight.check_values()
    return layers[0], loaded


def stream(codes: torch.Tensor, bits: int, word: Any = np.int32) -> torch.Tensor:
    """Rows of codes as a stream of bits, the low ones first, in words."""
    each = np.unpackbits(codes.numpy().astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    flat = each.reshape(codes.shape[0], -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % (8 * np.dtype(word).itemsize))))
    return torch.from_numpy(np.packbits(flat, axis=1, bitorder="little").view(word))


def draw(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape)


def scales_of(groups: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(N, groups) + 0.5).div(10).to(dtype)


def spread(t: torch.Tensor, group: int) -> torch.Tensor:
    return t.float().repeat_interleave(group, 1)[:, :K]


# ------------------------------------------------------------------------------------------------------ GPTQ


def gptq(bits: int, group: int, version: str, zeros: str, order: torch.Tensor | None) -> tuple[Tensors, Any]:
    groups = -(-K // group)
    q, s = draw(bits, N, K), scales_of(groups)
    z = torch.full((N, groups), 2 ** (bits - 1)) if zeros == "middle" else draw(bits, N, groups)
    g_idx = torch.arange(K) // group if order is None else order
    stored = (z - 1) % 2**bits if version == "gptq" else z
    tensors = {
        "l.qweight": stream(q, bits).t(), "l.scales": s.t(), "l.g_idx": g_idx.int(),
        "l.qzeros": stream(stored.t(), bits), "l.bias": torch.randn(N),
    }  # fmt: skip
    return tensors, s.float()[:, g_idx] * (q - z[:, g_idx])


@pytest.mark.parametrize("order", [False, True], ids=["", "act_order"])
@pytest.mark.parametrize("zeros", ["middle", "any"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, version: str, zeros: str, order: bool, tmp_path: Path) -> None:
    said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": version}
    g_idx = torch.randperm(K) // 32 if order else None
    tensors, expected = gptq(bits, 32, version, zeros, g_idx)
    entry, loaded = read(write(tmp_path, tensors, said))
    assert entry.stored == f"gptq {bits} bits g32" and not loaded.loss
    assert torch.equal(loaded.weight.dequantize(), expected)
    assert (loaded.weight.zeros is None) == (zeros == "middle")
    others = [e.name for e in open_checkpoint(tmp_path).entries() if not e.few_bit]
    assert others == ["l.bias"]


def test_gptq_of_a_lying_version(tmp_path: Path) -> None:
    tensors, expected = gptq(4, 64, "gptq_v2", "middle", None)
    said = {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq"}
    _, loaded = read(write(tmp_path, tensors, said))
    assert torch.equal(loaded.weight.dequantize(), expected) and "of version 2" in loaded.note


def test_gptq_groups_that_do_not_divide_rows(tmp_path: Path) -> None:
    tensors, expected = gptq(4, 128, "gptq", "any", None)
    _, loaded = read(write(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 128}))
    assert loaded.weight.group_size == 64 and torch.equal(loaded.weight.dequantize(), expected)


def test_gptq_of_an_old_config_file_and_its_errors(tmp_path: Path) -> None:
    tensors, expected = gptq(4, K, "gptq", "any", None)
    write(tmp_path, tensors, {})
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": -1}')
    _, loaded = read(tmp_path)
    assert torch.equal(loaded.weight.dequantize(), expected)

    def error(changes: Tensors, **config: Any) -> str:
        base = {"quant_method": "gptq", "bits": 4, "group_size": -1}
        write(tmp_path, tensors | changes, base | config)
        with pytest.raises(ValueError) as why:
            read(tmp_path)
        assert str(tmp_path) in str(why.value)
        return str(why.value)

    assert "checkpoint_format is 'marlin', expected 'gptq' or 'gptq_v2'" in error(
        {}, checkpoint_format="marlin"
    )
    assert "'l.scales' has shape [1, 40], expected [1, 48]" in error({"l.scales": torch.ones(1, 40).half()})
    assert "scales[0, 0] is inf" in error({"l.scales": torch.full((1, N), float("inf")).half()})
    assert "g_idx holds 0 to 3" in error({"l.g_idx": torch.randint(0, 4, (K,)).sort().values.int()})
    assert "bits is 'x' in quantization_config" in error({}, bits="x")


# ------------------------------------------------------------------------------------------------------- AWQ


def test_awq_gemm(tmp_path: Path) -> None:
    q, z, s = draw(4, N, K), draw(4, N, K // 64), scales_of(K // 64)

    def words(t: torch.Tensor) -> torch.Tensor:  # [rows, columns], packed along the columns
        eight = t.view(t.shape[0], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return stream(eight.reshape(t.shape), 4)

    tensors = {"l.qweight": words(q.t()), "l.qzeros": words(z.t()), "l.scales": s.t()}
    said = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
    _, loaded = read(write(tmp_path, tensors, said))
    assert torch.equal(loaded.weight.dequantize(), spread(s, 64) * (q - spread(z, 64)))


def test_awq_gemv(tmp_path: Path) -> None:
    q, z, s = draw(4, N, K), draw(4, N, 16), scales_of(16)
    tensors = {"l.qweight": stream(q, 4), "l.qzeros": stream(z, 4), "l.scales": s}
    said = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMV"}
    _, loaded = read(write(tmp_path, tensors, said))
    assert torch.equal(loaded.weight.dequantize(), spread(s[:, :3], 64) * (q - spread(z[:, :3], 64)))


def test_awq_gemv_fast(tmp_path: Path) -> None:
    q, z, s = draw(4, N, K), draw(4, N, K // 64), scales_of(K // 64)
    kernel = q.view(N, K // 32, 4, 4, 2).transpose(2, 3).reshape(N, K // 32, 4, 4, 2).transpose(3, 4)
    kernel = kernel.reshape(N // 4, 4, K // 64, 64).transpose(1, 2).reshape(N // 4, K // 64, 4, 64)
    nibbles = kernel.transpose(2, 3).reshape(N // 4, 4 * K)
    shift = -(s.float() * z).half()
    pad = torch.zeros(8 - K // 64, N).half()
    tensors = {
        "l.qweight": stream(nibbles, 4, np.int16), "l.scales": torch.cat((s.t(), pad)),
        "l.qzeros": torch.cat((shift.t(), pad)),
    }  # fmt: skip
    said = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv_fast"}
    _, loaded = read(write(tmp_path, tensors, said))
    assert torch.equal(loaded.weight.dequantize(), spread(s, 64) * q + spread(shift, 64))


# ---------------------------------------------------------------------------------------- compressed-tensors


def compressed(tensors: Tensors, folder: Path, **weights: Any) -> Any:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    said = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}
    more = {"lm_head.weight": torch.randn(8, 8), "l.input_scale": torch.ones(1)}
    _, loaded = read(write(folder, tensors | more, said))
    others = [e.name for e in open_checkpoint(folder).entries() if not e.few_bit]
    assert others == ["lm_head.weight"]
    return loaded


@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_pack_quantized(bits: int, asymmetric: bool, padded: bool, tmp_path: Path) -> None:
    q, z, s = draw(bits, N, K), draw(bits, N, K // 64), scales_of(K // 64, torch.bfloat16)

    def words(t: torch.Tensor) -> torch.Tensor:
        if not padded:
            return stream(t, bits)
        each = 32 // bits
        t = torch.nn.functional.pad(t, (0, -t.shape[1] % each)).view(t.shape[0], -1, each)
        return (t << torch.arange(0, each * bits, bits)).sum(-1).to(torch.int32)

    tensors = {"l.weight_packed": words(q), "l.weight_scale": s, "l.weight_shape": torch.tensor([N, K])}
    if asymmetric:
        tensors["l.weight_zero_point"] = words(z.t()).t()
    loaded = compressed(tensors, tmp_path, num_bits=bits, type="int", strategy="group", group_size=64)
    zero = spread(z, 64) if asymmetric else 2 ** (bits - 1)
    assert torch.equal(loaded.weight.dequantize(), spread(s, 64) * (q - zero))
    assert (loaded.note != "") == (bits in (5, 6, 7))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_pack_quantized_by_the_package(bits: int, tmp_path: Path) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    value, s = (draw(bits, N, K) - 2 ** (bits - 1)).to(torch.int8), scales_of(K // 64)
    zero = (draw(bits, N, K // 64) - 2 ** (bits - 1)).to(torch.int8)
    tensors = {
        "l.weight_packed": helpers.pack_to_int32(value, bits), "l.weight_scale": s,
        "l.weight_shape": torch.tensor([N, K]), "l.weight_zero_point": helpers.pack_to_int32(zero, bits, 0),
    }  # fmt: skip
    loaded = compressed(tensors, tmp_path, num_bits=bits, type="int", strategy="group", group_size=64)
    assert torch.equal(loaded.weight.dequantize(), spread(s, 64) * (value.float() - spread(zero, 64)))


def test_pack_quantized_in_an_order_and_by_name(tmp_path: Path) -> None:
    q, s, g_idx = draw(4, N, K), scales_of(3), torch.randperm(K) // 64
    tensors = {
        "l.weight_packed": stream(q, 4), "l.weight_scale": s, "l.weight_shape": torch.tensor([N, K]),
        "l.weight_g_idx": g_idx.int(),
    }  # fmt: skip
    groups = {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 8}},
        "b": {"targets": ["re:.*l$"], "weights": {"num_bits": 4, "group_size": 64}},
    }
    _, loaded = read(
        write(tmp_path, tensors, {"quant_method": "compressed-tensors", "config_groups": groups})
    )
    assert torch.equal(loaded.weight.dequantize(), s.float()[:, g_idx] * (q - 8))


@pytest.mark.parametrize("shape", [(N, 1), (1,), (N, K // 64)], ids=["channel", "tensor", "group"])
def test_int_quantized(shape: tuple[int, ...], tmp_path: Path) -> None:
    q, s = torch.randint(-128, 128, (N, K)).to(torch.int8), torch.rand(shape) + 0.5
    each = s.expand(N, 1) if s.dim() == 1 else s
    expected = q.float() * spread(each, K // each.shape[1])
    tensors = {"l.weight": q, "l.weight_scale": s, "l.input_zero_point": torch.zeros(1)}
    loaded = compressed(tensors, tmp_path, num_bits=8, type="int")
    assert torch.equal(loaded.weight.dequantize(), expected)
    if s.dim() == 2:
        zero = torch.randint(-128, 128, shape).to(torch.int8)
        loaded = compressed(tensors | {"l.weight_zero_point": zero}, tmp_path, num_bits=8, type="int")
        wanted = (q.float() - spread(zero, K // shape[1])) * spread(s, K // shape[1])
        assert torch.equal(loaded.weight.dequantize(), wanted)


def floats8(*shape: int) -> torch.Tensor:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.where((codes & 0x7F) == 0x7F, 0, codes).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", [(N, 1), (1,), (N, K // 64), (3, 3), (2, 2)])
def test_float_quantized(shape: tuple[int, ...], tmp_path: Path) -> None:
    q, s = floats8(N, K), torch.rand(shape) + 0.5
    known: dict[tuple[int, ...], Any] = {(3, 3): [16, 64], (2, 2): "32x128"}
    blocks = known.get(shape)
    loaded = compressed({"l.weight": q, "l.weight_scale": s}, tmp_path, num_bits=8, block_structure=blocks)
    each = (
        s.expand(N, 1)
        if s.dim() == 1
        else s.repeat_interleave(-(-N // shape[0]) if shape[0] != 2 else 32, 0)[:N]
    )
    width = 128 if shape == (2, 2) else K // each.shape[1]
    assert torch.equal(loaded.weight.dequantize(), q.float() * spread(each, width))
    assert q.float().std() > 0 and max(E4M3[:127]) == 448


def fp4(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(E2M1)[codes]


def test_nvfp4(tmp_path: Path) -> None:
    q, s = draw(4, N, K), floats8(N, K // 16).view(torch.uint8) & 0x7F
    s = torch.where(s == 0x7F, 1, s).view(torch.float8_e4m3fn)
    packed = stream(q, 4, np.uint8)
    for divisor, lossless in ((64.0, True), (1234.5, False)):
        tensors = {
            "l.weight_packed": packed, "l.weight_scale": s, "l.weight_global_scale": torch.tensor([divisor]),
            "l.input_global_scale": torch.ones(1),
        }  # fmt: skip
        loaded = compressed(tensors, tmp_path, num_bits=4, type="float", group_size=16)
        expected = fp4(q) * spread(s.float() / divisor, 16)
        assert (not loaded.loss) == lossless == torch.equal(loaded.weight.dequantize(), expected)
        torch.testing.assert_close(loaded.weight.dequantize(), expected, rtol=4 * ROUNDING, atol=0)
    tensors = {"l.weight": packed, "l.weight_scale": s, "l.weight_scale_2": torch.tensor(0.0123)}
    folder = write(tmp_path / "modelopt", tensors, {})
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    _, loaded = read(folder)
    assert open_checkpoint(folder).kind == "modelopt" and not loaded.loss
    assert torch.equal(loaded.weight.dequantize(), fp4(q) * spread(s.float() * torch.tensor(0.0123), 16))


def test_mx(tmp_path: Path) -> None:
    q, e = draw(4, N, K), torch.randint(100, 140, (N, K // 32), dtype=torch.uint8)
    scale = spread(2.0 ** (e.float() - 127), 32)
    loaded = compressed({"l.weight_packed": stream(q, 4, np.uint8), "l.weight_scale": e}, tmp_path)
    assert torch.equal(loaded.weight.dequantize(), fp4(q) * scale)
    w = floats8(N, K)
    loaded = compressed({"l.weight": w, "l.weight_scale": e}, tmp_path)
    assert torch.equal(loaded.weight.dequantize(), w.float() * scale)
    blocks = stream(q, 4, np.uint8).view(3, N // 3, K // 32, 16)
    tensors = {"a.experts.down_proj_blocks": blocks, "a.experts.down_proj_scales": e.view(3, N // 3, K // 32)}
    _, loaded = read(write(tmp_path, tensors, {"quant_method": "mxfp4"}), "a.experts.down_proj")
    assert torch.equal(loaded.weight.dequantize(), (fp4(q) * scale).view(3, N // 3, K))


@pytest.mark.parametrize("scale", [torch.float32, torch.float8_e8m0fnu, torch.uint8])
def test_fp8_blocks(scale: torch.dtype, tmp_path: Path) -> None:
    w, exponent = floats8(300, K), torch.randint(110, 135, (3, 2), dtype=torch.uint8)
    s = torch.rand(3, 2) + 0.5 if scale == torch.float32 else exponent.view(torch.float8_e8m0fnu).float()
    stored = s if scale == torch.float32 else exponent.view(scale)
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    _, loaded = read(write(tmp_path, {"l.weight": w, "l.weight_scale_inv": stored}, said))
    each = s.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :K]
    assert (
        torch.equal(loaded.weight.dequantize(), w.float() * each) and loaded.weight.format.scale_rows == 128
    )


# ---------------------------------------------------------------------------------------------- bitsandbytes


@pytest.mark.parametrize("k", [K, 72], ids=["", "blocks across rows"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes(kind: str, nested: bool, k: int, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        torch.randn(N, k), blocksize=64, quant_type=kind, compress_statistics=nested
    )
    parts = {f"l.weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    entry, loaded = read(write(tmp_path, {"l.weight": packed} | parts, {"quant_method": "bitsandbytes"}))
    assert entry.shape == (N, k) and not loaded.loss
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(loaded.weight.dequantize(), expected)
    assert loaded.weight.format.nested == (nested and k == K)


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    q, s = torch.randint(-127, 128, (N, K)).to(torch.int8), torch.rand(N) + 1
    tensors = {"l.weight": q, "l.SCB": s, "l.weight_format": torch.zeros((), dtype=torch.uint8)}
    _, loaded = read(write(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}))
    torch.testing.assert_close(loaded.weight.dequantize(), q * s[:, None] / 127, rtol=4 * ROUNDING, atol=0)
    assert "rounded once" in loaded.loss


# ------------------------------------------------------------------------------------------------------- HQQ


@pytest.mark.parametrize("whole", [True, False], ids=["whole zeros", "float zeros"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq(bits: int, whole: bool, tmp_path: Path) -> None:
    group = 64
    groups = N * K // group
    q, s = draw(bits, groups, group), torch.rand(groups, 1) + 0.5
    z = draw(bits, groups, 1).float() + (0 if whole else 0.37)
    each = {2: 4, 3: 10, 4: 2, 8: 1}[bits]
    padded = torch.nn.functional.pad(q, (0, 0, 0, -groups % each)).view(each, -1, group)
    shifts = {2: (6, 4, 2, 0), 3: tuple(range(27, -1, -3)), 4: (4, 0), 8: (0,)}[bits]
    words = torch.stack([padded[i] << shifts[i] for i in range(each)]).sum(0)
    packing = "3bit_32" if bits == 3 else f"{bits}bit_u8"
    tensors = {
        "l.W_q": words.to(torch.int32 if bits == 3 else torch.uint8), "l.scale": s, "l.zero": z,
        "l.shape": torch.tensor([N, K]), "l.nbits": torch.tensor(bits), "l.group_size": torch.tensor(group),
        "l.axis": torch.tensor(1), "l.packing": torch.tensor([ord(c) for c in packing], dtype=torch.uint8),
    }  # fmt: skip
    _, loaded = read(write(tmp_path, tensors, {"quant_method": "hqq"}))
    expected = ((q - z) * s).view(N, K)
    assert (not loaded.loss) == whole
    if whole:
        assert torch.equal(loaded.weight.dequantize(), expected)
    else:
        torch.testing.assert_close(
            loaded.weight.dequantize(), expected, rtol=0, atol=float(4 * ROUNDING * 2**bits * 1.5)
        )
    tensors["l.axis"] = torch.tensor(0)
    with pytest.raises(ValueError, match="axis is 0, expected 1"):
        read(write(tmp_path, tensors, {"quant_method": "hqq"}))


# ----------------------------------------------------------------------------------------------- whole models


def test_a_model_from_two_files(tmp_path: Path) -> None:
    """A llama in GPTQ over an index, with a bias and an untied head that stays as it is."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=K, intermediate_size=N * 2, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, attention_bias=True, dtype="float16",
    )  # fmt: skip
    plain = transformers.LlamaForCausalLM(config).eval()
    shards: list[Tensors] = [{}, {}]
    for i, (name, p) in enumerate(plain.named_parameters()):
        torch.nn.init.normal_(p, 0, 0.2)
        p.data = p.data.half().float()
        module = name.removesuffix(".weight")
        if "proj.weight" not in name:
            shards[i % 2][name] = p.detach().half()
            continue
        n, k = p.shape
        q, s = torch.randint(0, 16, (n, k)), (torch.rand(n, k // 32) / 50).half()
        p.data = s.float().repeat_interleave(32, 1) * (q - 8)
        shards[i % 2][f"{module}.qweight"] = stream(q, 4).t()
        shards[(i + 1) % 2][f"{module}.scales"] = s.t()
        shards[i % 2][f"{module}.qzeros"] = torch.full((k // 32, n // 8), 0x77777777, dtype=torch.int32)
    places: dict[str, str] = {}
    for i, shard in enumerate(shards):
        save_file({k: t.contiguous() for k, t in shard.items()}, tmp_path / f"{i}.safetensors")
        places |= dict.fromkeys(shard, f"{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": said}))
    model = bitfuse.from_pretrained(tmp_path, progress=False)
    assert model.dtype == torch.float16 and model.load_report.lossless
    assert sum(isinstance(m, bitfuse.nn.Linear) for m in model.modules()) == 7
    model = bitfuse.from_pretrained(tmp_path, dtype=torch.float32, progress=False)
    x = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        got, wanted = model(x).logits, plain(x).logits
        assert_accurate(got, plain.double()(x).logits, wanted)

    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.safetensors"):
        bitfuse.from_pretrained(tmp_path)
    places[next(iter(places))] = "../x.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(
        ValueError, match=r"in '\.\./x\.safetensors', expected a \.safetensors file beside it"
    ):
        bitfuse.from_pretrained(tmp_path)


def test_gpt_oss(tmp_path: Path) -> None:
    """Experts in MXFP4: what transformers computes of the same numbers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        max_position_embeddings=64, dtype="bfloat16",
    )  # fmt: skip
    plain = transformers.GptOssForCausalLM(config).eval()
    tensors: Tensors = {}
    for name, p in plain.named_parameters():
        torch.nn.init.normal_(p, 0, 0.3)
        p.data = p.data.bfloat16().float()
        if p.dim() != 3:
            tensors[name] = p.detach().bfloat16()
            continue
        experts, k, n = p.shape
        q, e = draw(4, experts * n, k), torch.randint(120, 126, (experts * n, k // 32), dtype=torch.uint8)
        tensors[f"{name}_blocks"] = stream(q, 4, np.uint8).view(experts, n, k // 32, 16)
        tensors[f"{name}_scales"] = e.view(experts, n, k // 32)
        dense = fp4(q) * (2.0 ** (e.float() - 127)).repeat_interleave(32, 1)
        p.data = dense.view(experts, n, k).mT.contiguous()
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    write(tmp_path, tensors, said, **config.to_dict() | {"quantization_config": said})
    model = bitfuse.from_pretrained(tmp_path, dtype=torch.float32, progress=False)
    few_bit = [n for n, m in model.named_modules() if isinstance(m, bitfuse.nn.Linear)]
    assert len(few_bit) == 2 * 2 * 4 and model.load_report.lossless
    x = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        got, wanted = model(x).logits, plain(x).logits
        plain.set_experts_implementation("eager")  # the default has no float64
        assert_accurate(got, plain.double()(x).logits, wanted)
    del tensors["model.layers.1.mlp.experts.down_proj_blocks"]
    write(tmp_path, tensors, said, **config.to_dict() | {"quantization_config": said})
    with pytest.raises(ValueError, match=r"experts\.down_proj_scales"):
        bitfuse.from_pretrained(tmp_path, progress=False)


# ---------------------------------------------------------------------------------------------- damaged files


def read_all(folder: Path) -> None:
    for entry in open_checkpoint(folder).entries():
        entry.read()


def damaged(change: Callable[[bytearray], bytes], folder: Path, raw: bytes) -> bool:
    (folder / "model.safetensors").write_bytes(change(bytearray(raw)))
    try:
        read_all(folder)
    except ValueError as why:
        assert str(folder) in str(why)
        return True
    return False


def test_damaged_files_are_value_errors(tmp_path: Path) -> None:
    tensors, _ = gptq(4, 32, "gptq", "any", torch.randperm(K) // 32)
    write(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    rng = np.random.default_rng(0)
    for cut in [*range(1, 20), header - 1, header, *rng.integers(20, len(raw), 20), len(raw) - 1]:
        assert damaged(lambda b, cut=cut: b[:cut], tmp_path, raw), cut  # type: ignore[misc]
    count = 0
    for at in [*range(header), *rng.integers(header, len(raw), 50)]:

        def turn(b: bytearray, at: int = at) -> bytes:
            b[at] ^= 1 << int(rng.integers(8))
            return bytes(b)

        count += damaged(turn, tmp_path, raw)
    assert count > header // 2
    for text in ("{", "[]", '{"quantization_config": 3}', '{"a": 1, "a": 2}', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            open_checkpoint(tmp_path)

"""PEFT: its checkpoints load and save, its live models run fused, with its numbers."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from bitfuse.checkpoints import load_peft_, save_peft
from bitfuse.checkpoints.peft import CONFIG, WEIGHTS
from bitfuse.integrations import bitsandbytes as convert
from bitfuse.integrations import fuse_peft_, unfuse_peft_, with_bitfuse_layers
from bitfuse.models.lora import adapted_layers, add_ia3_, add_lora_, lora_parameters, set_adapter_
from bitfuse.nn import Linear, LoRALinear
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

K = 128


class Block(torch.nn.Module):
    """Without a residual: torch adds the gradients of several users of x in the order of its own tape, and a
    fused layer is one user where PEFT's is two."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(K, K)
        self.v_proj = torch.nn.Linear(K, K, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(torch.tanh(self.q_proj(x)))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(2))
        self.head = torch.nn.Linear(K, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(0))
QV = ["q_proj", "v_proj"]

LORA = {
    "plain": dict(r=4, lora_alpha=7, target_modules=QV),
    "rslora": dict(r=4, lora_alpha=7, target_modules=["q_proj"], use_rslora=True),
    "patterns": dict(
        r=4,
        lora_alpha=16,
        target_modules=QV,
        rank_pattern={"layers.0.q_proj": 8, "^layers.1.v_proj": 2},
        alpha_pattern={"v_proj": 3},
    ),
    "regex": dict(r=2, target_modules=r"layers\.1\..*_proj"),
    "dropout": dict(r=4, target_modules=QV, lora_dropout=0.25),
    "exclude": dict(r=4, target_modules=QV, exclude_modules=["layers.0.q_proj"]),
    "one layer": dict(r=4, target_modules=QV, layers_to_transform=[1], layers_pattern="layers"),
    "gaussian": dict(r=4, target_modules=QV, init_lora_weights="gaussian"),
}
DORA = dict(r=4, lora_alpha=6, target_modules=QV, use_dora=True)
IA3 = dict(target_modules=QV, feedforward_modules=["v_proj"])


def stir(model: torch.nn.Module) -> None:
    """Make adapters do something."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name or "ia3_l" in name:
                p.add_(torch.randn_like(p) * 0.1)


def adapt(base: torch.nn.Module, config: Any) -> Any:
    model = peft.get_peft_model(copy.deepcopy(base), config)
    stir(model)
    return model


def gradients(model: torch.nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """Of x and of what learns, A before B in each layer; and the output."""
    x = x.clone().requires_grad_()
    y = model(x)
    found = torch.autograd.grad(y, [x, *(p for p in model.parameters() if p.requires_grad)], g)
    return [y.detach(), *found]


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(bits(v), bits(b[k])) for k, v in a.items())


def bits(t: torch.Tensor) -> torch.Tensor:
    """Bytes: codes that are stored as floats may be NaN."""
    return t.detach().contiguous().view(-1).view(torch.uint8)


# checkpoints


def test_adapters_begin_with_the_same_numbers() -> None:
    base = Model()
    torch.manual_seed(5)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=QV, use_dora=True))
    torch.manual_seed(5)
    ours = copy.deepcopy(base)
    add_lora_(ours, QV, 4, 8, use_dora=True)
    expected = {k: v for k, v in theirs.state_dict().items() if "lora_" in k}
    layers: Any = adapted_layers(ours)
    assert len(expected) == 12
    for name, layer in layers.items():
        a, prefix = layer.adapter("default"), f"base_model.model.{name}."
        assert torch.equal(a.lora_A, expected[prefix + "lora_A.default.weight"])
        assert torch.equal(a.lora_B, expected[prefix + "lora_B.default.weight"])
        magnitude = expected[prefix + "lora_magnitude_vector.default.weight"]
        assert_accurate(a.lora_magnitude_vector, layer.weight.double().norm(dim=1), magnitude)


@pytest.mark.parametrize("name", LORA)
def test_lora_is_peft_bit_for_bit_both_ways(name: str, tmp_path: Path) -> None:
    base = Model()
    theirs = adapt(base, peft.LoraConfig(**LORA[name]))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    rng = torch.get_rng_state()
    report = load_peft_(ours, tmp_path / "theirs", trainable=True)
    assert torch.equal(torch.get_rng_state(), rng)
    wrapped = {
        n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    }
    assert {layer.name for layer in report.layers} == set(adapted_layers(ours)) == wrapped
    theirs.eval(), ours.eval()
    g = torch.randn(2, 3, 8)
    with bitfuse.use_backend("reference"):
        for got, expected in zip(gradients(ours, X, g), gradients(theirs, X, g), strict=True):
            assert torch.equal(got, expected)
    save_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True).eval()
    for got, expected in zip(gradients(back, X, g), gradients(theirs, X, g), strict=True):
        assert torch.equal(got, expected)
    a, b = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert same(a, b)


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_dora_and_ia3_both_ways(kind: str, tmp_path: Path) -> None:
    base = Model()
    config = peft.LoraConfig(**DORA) if kind == "dora" else peft.IA3Config(**IA3)
    theirs = adapt(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base).eval()
    load_peft_(ours, tmp_path / "theirs", trainable=True)
    g = torch.randn(2, 3, 8)
    plain = gradients(theirs, X, g)
    precise = [t.double() for t in gradients(copy.deepcopy(theirs).double(), X.double(), g.double())]
    # PEFT's parameters come kind by kind in a layer, ours too; IA3's have another shape
    for got, true, p in zip(gradients(ours, X, g), precise, plain, strict=True):
        assert_accurate(got.view(p.shape), true, p)
    save_peft(ours, tmp_path / "ours")
    assert same(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS))
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(back(X), theirs(X))


def test_modules_to_save_both_ways(tmp_path: Path) -> None:
    base = Model()
    theirs = adapt(base, peft.LoraConfig(**LORA["plain"], modules_to_save=["head"])).eval()
    with torch.no_grad():
        for p in theirs.base_model.model.head.parameters():
            p.add_(torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base).eval()
    report = load_peft_(ours, tmp_path / "theirs", trainable=True)
    assert ours.head.weight.requires_grad and report.trainable == sum(
        p.numel() for p in ours.parameters() if p.requires_grad
    )
    with bitfuse.use_backend("reference"):
        assert torch.equal(ours(X), theirs(X))
    save_peft(ours, tmp_path / "ours", modules_to_save="head")
    assert same(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS))
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(back(X), theirs(X))
    # what does not fit
    quantised, tied, short = Model(), Model(), Model()
    bitfuse.quantize_(quantised, "int8", progress=False)
    tied.other = torch.nn.Linear(K, 8)
    tied.other.weight = tied.head.weight
    short.head = torch.nn.Linear(K, 7)
    for model, match in (
        (quantised, "'head', which is quantised"),
        (tied, "tied to 'other'"),
        (short, r"head\.weight is of shape \[8, 128\], expected a tensor \[7, 128\]"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=match):
            load_peft_(model, tmp_path / "theirs")
        assert same(snapshot(model), before)
    for name, match in (
        ("tail", "no module of the model"),
        ("layers.0", "quantised or adapted"),
        ("d", "no module"),
    ):
        with pytest.raises(ValueError, match=match):
            save_peft(ours, tmp_path / "ours", modules_to_save=[name])
    ours.forehead = torch.nn.Identity()
    with pytest.raises(ValueError, match="means 'forehead' too"):
        save_peft(ours, tmp_path / "ours", modules_to_save=["head"])


def test_quantised_bases_take_the_same_files(tmp_path: Path) -> None:
    base = Model()
    adapt(base, peft.LoraConfig(**LORA["plain"])).save_pretrained(tmp_path)
    bitfuse.quantize_(base, "int8", progress=False)
    load_peft_(base, tmp_path, "theirs", dtype=torch.bfloat16)
    assert {p.dtype for p in lora_parameters(base, "theirs")} == {torch.bfloat16}
    assert not any(p.requires_grad for p in base.parameters())
    dense = peft.PeftModel.from_pretrained(Model(), tmp_path)
    assert dense(X).shape == base(X).shape


def test_ours_as_people_write_it(tmp_path: Path) -> None:
    model = Model()
    add_lora_(model, QV, 4, 16, dropout=0.1, use_rslora=True)
    save_peft(model, tmp_path, base_model_name_or_path="some/model")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == QV and config["rank_pattern"] == config["alpha_pattern"] == {}
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 16, 0.1)
    assert config["use_rslora"] and config["base_model_name_or_path"] == "some/model"
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    other = Model()
    load_peft_(other, tmp_path)
    layer: Any = adapted_layers(other)["layers.0.q_proj"]
    assert layer.adapter("default").options() == dict(
        r=4, alpha=16, dropout=0.1, use_rslora=True, use_dora=False
    )


def test_names_that_end_alike_become_a_pattern(tmp_path: Path) -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(K, K), torch.nn.Linear(K, K))
    base = torch.nn.Sequential(torch.nn.Linear(K, K), inner)
    for targets in ("0", "1.0", "1.1"):
        model = copy.deepcopy(base)
        picked = [n for n in ("0", "1.0", "1.1") if n == targets]
        add_lora_(model, picked, 4, skip=[n for n in ("1.*", "0") if targets == "0" and n != "0"])
        stir(model)
        save_peft(model, tmp_path / targets)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / targets)
        assert len([n for n, _ in theirs.named_parameters() if "lora_A" in n]) == len(adapted_layers(model))
        with bitfuse.use_backend("reference"):
            assert torch.equal(theirs(X), model(X))
        other = copy.deepcopy(base)
        load_peft_(other, tmp_path / targets)
        assert adapted_layers(other).keys() == adapted_layers(model).keys()


def test_loading_over_an_adapter_swaps_it_in_place(tmp_path: Path) -> None:
    base = Model()
    for name, config in (("a", LORA["plain"]), ("b", dict(r=4, lora_alpha=20, target_modules=QV))):
        adapt(base, peft.LoraConfig(**config)).save_pretrained(tmp_path / name)
    adapt(base, peft.LoraConfig(r=8, target_modules=QV)).save_pretrained(tmp_path / "rank")
    adapt(base, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "layers")
    model = copy.deepcopy(base)
    load_peft_(model, tmp_path / "a")
    places = [p.data_ptr() for p in lora_parameters(model)]
    load_peft_(model, tmp_path / "b")
    assert [p.data_ptr() for p in lora_parameters(model)] == places
    with bitfuse.use_backend("reference"):
        assert torch.equal(model(X), peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b")(X))
    before = snapshot(model)
    with pytest.raises(ValueError, match="r 4 and use_dora False, the file one with 8"):
        load_peft_(model, tmp_path / "rank")
    with pytest.raises(ValueError, match=r"on other layers.*unexpected layers\.0\.v_proj"):
        load_peft_(model, tmp_path / "layers")
    assert same(snapshot(model), before)
    load_peft_(model, tmp_path / "layers", "second")
    set_adapter_(model, ["default", "second"])
    assert not torch.equal(model(X), base(X))


def rewrite(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in "AB":
        tensors[f"base_model.model.x.lora_{name}.weight"] = tensors.pop(f"{KEY}{name}.weight")


KEY = "base_model.model.layers.0.q_proj.lora_"
BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, "adapter_config"),
    "no tensors": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "adapter_model.*missing"),
    "cut config": (lambda f: cut(f / CONFIG, 40), ValueError, "is not JSON"),
    "bytes for a config": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), ValueError, "is not JSON"),
    "a list for a config": (lambda f: (f / CONFIG).write_text("[1]"), ValueError, "expected an object"),
    "cut tensors": (lambda f: cut(f / WEIGHTS, 3000), ValueError, "corrupted or cut short"),
    "cut header": (lambda f: cut(f / WEIGHTS, 5), ValueError, "corrupted or cut short"),
    "missing key": (lambda f: retensor(f, lambda t: t.pop(KEY + "B.weight")), ValueError, "missing lora_B"),
    "missing layer": (
        lambda f: retensor(f, lambda t: [t.pop(k) for k in list(t) if "layers.0.q" in k]),
        ValueError,
        r"target_modules means 'layers\.0\.q_proj' too",
    ),
    "another layer": (
        lambda f: retensor(
            f,
            lambda t: t.update(
                {
                    "base_model.model.x.lora_A.weight": t.pop(KEY + "A.weight"),
                    "base_model.model.x.lora_B.weight": t.pop(KEY + "B.weight"),
                }
            ),
        ),
        ValueError,
        "the model has no layer 'x'",
    ),
    "another key": (
        lambda f: retensor(f, lambda t: t.update({"base_model.model.head.weight": torch.ones(8, K)})),
        ValueError,
        r"holds 'base_model\.model\.head\.weight', which is no tensor of a LORA adapter",
    ),
    "shape": (
        lambda f: retensor(f, lambda t: t.update({KEY + "A.weight": torch.ones(4, 7)})),
        ValueError,
        r"lora_A\.weight has shape \[4, 7\], expected \[4, 128\]",
    ),
    "rank": (lambda f: rewrite(f, r=8), ValueError, r"has shape \[4, 128\], expected \[8, 128\]"),
    "dtype": (
        lambda f: retensor(f, lambda t: t.update({KEY + "A.weight": torch.ones(4, K, dtype=torch.int32)})),
        ValueError,
        r"has dtype torch\.int32",
    ),
    "dora without magnitudes": (lambda f: rewrite(f, use_dora=True), ValueError, "missing lora_magnitude"),
    "another method": (lambda f: rewrite(f, peft_type="VERA"), ValueError, "peft_type is 'VERA'"),
    "bias": (lambda f: rewrite(f, bias="all"), ValueError, "bias is 'all'"),
    "pissa": (lambda f: rewrite(f, init_lora_weights="pissa"), ValueError, "changed the base weight too"),
    "transposed": (lambda f: rewrite(f, fan_in_fan_out=True), ValueError, "fan_in_fan_out is True"),
    "a whole module": (
        lambda f: rewrite(f, modules_to_save=["head"]),
        ValueError,
        r"head\.weight is missing, expected a tensor \[8, 128\]",
    ),
    "an unknown module": (lambda f: rewrite(f, modules_to_save=["x"]), ValueError, "'x', which no module"),
    "no list of modules": (lambda f: rewrite(f, modules_to_save="head"), ValueError, "expected names"),
    "lora_bias": (lambda f: rewrite(f, lora_bias=True), ValueError, "lora_bias is True"),
    "a field of tomorrow": (lambda f: rewrite(f, use_warp=1), ValueError, "use_warp is 1, which bitfuse"),
    "replicated": (lambda f: rewrite(f, layer_replication=[[0, 1]]), ValueError, "layer_replication is"),
    "parameters": (lambda f: rewrite(f, target_parameters=["w"]), ValueError, "target_parameters is"),
    "no targets": (lambda f: rewrite(f, target_modules=None), ValueError, "target_modules is None"),
    "bad pattern": (lambda f: rewrite(f, target_modules="(["), ValueError, "unterminated|missing"),
    "bad rank pattern": (lambda f: rewrite(f, rank_pattern={"([": 3}), ValueError, "unterminated|missing"),
    "bad rank": (lambda f: rewrite(f, r="4"), ValueError, "r is a str"),
    "bad alpha": (lambda f: rewrite(f, lora_alpha=None), ValueError, "alpha is a NoneType"),
    "bad flag": (lambda f: rewrite(f, use_rslora="yes"), ValueError, "use_rslora is 'yes'"),
    "bad dropout": (lambda f: rewrite(f, lora_dropout=2), ValueError, "dropout is 2"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_files_leave_the_model_alone(how: str, tmp_path: Path) -> None:
    model = Model()
    adapt(model, peft.LoraConfig(**LORA["plain"])).save_pretrained(tmp_path)
    change, error, match = BROKEN[how]
    change(tmp_path)
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        load_peft_(model, tmp_path)
    assert same(snapshot(model), before) and [p.requires_grad for p in model.parameters()] == flags


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    adapt(Model(), peft.LoraConfig(**LORA["plain"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj carries other adapters"):
        model = Model()
        add_ia3_(model, "q_proj")
        load_peft_(model, tmp_path)
    with pytest.raises(ValueError, match=r"adapter_name is 'a/b\.c'"):
        load_peft_(Model(), tmp_path, "a/b.c")
    shared: Any = Model()
    shared.layers[1].q_proj = shared.layers[0].q_proj
    with pytest.raises(ValueError, match=r"no layer|several places"):
        load_peft_(shared, tmp_path)
    model = Model()
    del model.layers[1]
    with pytest.raises(ValueError, match=r"no layer 'layers\.1\.q_proj' \(2 such"):
        load_peft_(model, tmp_path)
    assert not adapted_layers(model)


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    model = Model()
    with pytest.raises(ValueError, match="which no layer of the model has"):
        save_peft(model, tmp_path)
    add_lora_(model, "q_proj", 4, dropout=0.1)
    layer: Any = model.layers[0].v_proj
    model.layers[0].v_proj = LoRALinear(layer, 4, dropout=0.2)
    with pytest.raises(ValueError, match=r"layers differ in dropout \(\[0\.1, 0\.2\]\)"):
        save_peft(model, tmp_path)
    model.layers[0].v_proj = layer
    add_ia3_(model, "v_proj")
    with pytest.raises(ValueError, match="LoRA on some layers and IA3 on others"):
        save_peft(model, tmp_path)
    shared: Any = Model()
    shared.layers[1].q_proj = shared.layers[0].q_proj
    add_lora_(shared, "q_proj", 4)
    with pytest.raises(ValueError, match="several places"):
        save_peft(shared, tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("at", ["write", "rename"])
def test_an_interrupted_save_leaves_the_old_files(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    add_lora_(model, QV, 4)
    save_peft(model, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    stir(model)

    def fail(*args: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync" if at == "write" else "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_peft(model, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


# live models


BNB: dict[str, dict[str, Any]] = {
    "nf4": dict(quant_type="nf4", compress_statistics=False),
    "nf4 nested": dict(quant_type="nf4", compress_statistics=True),
    "fp4": dict(quant_type="fp4", compress_statistics=False),
    "fp4 nested": dict(quant_type="fp4", compress_statistics=True),
    "int8": dict(has_fp16_weights=False),
}
BASES = ["dense", "bitfuse", *BNB]


def bnb_layer(linear: torch.nn.Linear, kind: str, **more: Any) -> Any:
    options = {**BNB[kind], **more}
    make = bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit
    layer = make(linear.in_features, linear.out_features, linear.bias is not None, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def live(kind: str, config: Any) -> Any:
    """A PEFT model over a base of this kind."""
    base: Any = Model()
    if kind in BNB:
        for block in base.layers:
            block.q_proj, block.v_proj = bnb_layer(block.q_proj, kind), bnb_layer(block.v_proj, kind)
        base.is_loaded_in_8bit, base.is_loaded_in_4bit = kind == "int8", kind != "int8"
    model = peft.get_peft_model(base, config)
    if kind == "bitfuse":
        bitfuse.quantize_(model, "int4", group_size=32, skip=["lora_A", "lora_B"], progress=False)
        for p in model.parameters():
            if p.dtype == torch.float32:
                p.requires_grad_(any(p is q for n, q in model.named_parameters() if "lora_" in n))
    stir(model)
    return model


def lora_layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", BASES)
def test_fused_is_peft(kind: str, dora: bool) -> None:
    if dora and kind == "bitfuse":
        with pytest.raises(ValueError, match="use_dora is True"):
            with_bitfuse_layers(peft.LoraConfig(**DORA))
        return
    model = live(kind, peft.LoraConfig(**(DORA if dora else LORA["plain"])))
    model.train()  # in eval mode bitsandbytes repacks a weight on some CPUs
    g = torch.randn(2, 3, 8)
    with bitfuse.use_backend("reference"):
        plain = gradients(model, X, g)
    held = [id(p) for layer in lora_layers(model) for n, p in layer.named_parameters() if "lora_" in n]
    report = fuse_peft_(model)
    assert len(report.layers) == 4 and not report.left and "4 fused" in str(report)
    assert [
        id(p) for layer in lora_layers(model) for n, p in layer.named_parameters() if "lora_" in n
    ] == held
    with bitfuse.use_backend("reference"):
        fused = gradients(model, X, g)
    if dora or kind == "int8":  # another order of operations, another rounding of the scale
        for got, expected in zip(fused, plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    else:
        assert all(torch.equal(got, expected) for got, expected in zip(fused, plain, strict=True))
    for got, expected in zip(gradients(model, X, g), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    copied = copy.deepcopy(model)
    for one in (copied, model):
        unfuse_peft_(one)
        assert all(type(layer).__module__.startswith("peft.") for layer in lora_layers(one))
        with bitfuse.use_backend("reference"):
            again = gradients(one, X, g)
        assert all(torch.equal(got, expected) for got, expected in zip(again, plain, strict=True))


@pytest.mark.parametrize("kind", [*BNB, "nf4 stored as bfloat16"])
def test_bitsandbytes_values_are_taken_over_in_place(kind: str) -> None:
    linear = torch.nn.Linear(K, 64)
    storage: dict[str, Any] = {} if kind in BNB else {"quant_storage": torch.bfloat16}
    kind = kind if kind in BNB else "nf4"
    layer, untouched = bnb_layer(linear, kind, **storage), bnb_layer(linear, kind, **storage)
    if kind == "int8":
        codes, scales = untouched.weight.data.clone(), untouched.weight.SCB.clone()
        values = bnb.functional.int8_vectorwise_dequant(codes, scales)
    else:
        values = bnb.functional.dequantize_4bit(untouched.weight.data, untouched.weight.quant_state)
    place = layer.weight.data_ptr()
    made: Any = convert.to_bitfuse(layer)
    assert made.qweight.data_ptr() == place and layer.weight.numel() == 0
    assert made.bias is layer.bias
    found = made.weight.dequantize()
    if kind == "int8":
        torch.testing.assert_close(found, values, rtol=2.0**-22, atol=0)
    else:
        assert torch.equal(found, values)
    x = torch.randn(3, K)
    torch.testing.assert_close(
        made(x), torch.nn.functional.linear(x, values, layer.bias), rtol=1e-4, atol=1e-5
    )
    convert.to_bitsandbytes(made, layer)
    assert layer.weight.data_ptr() == place
    assert layer.weight.shape == untouched.weight.shape
    assert torch.equal(bits(layer.weight), bits(untouched.weight))
    x.requires_grad_()
    assert torch.equal(layer(x), untouched(x))
    assert same(
        {k: v for k, v in layer.state_dict().items() if isinstance(v, torch.Tensor)},
        {k: v for k, v in untouched.state_dict().items() if isinstance(v, torch.Tensor)},
    )


def test_training_goes_on_through_fusing() -> None:
    model = live("nf4 nested", peft.LoraConfig(r=4, target_modules=QV, lora_dropout=0.1))
    other = peft.LoraConfig(r=2, target_modules=QV)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    y = torch.randn(2, 3, 8)

    def step() -> float:
        loss = (model(X) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    first = step()
    fuse_peft_(model)
    steps = [step() for _ in range(3)]
    unfuse_peft_(model)
    assert steps[-1] < first and step() < first
    fuse_peft_(model)
    # PEFT's own business over fused layers
    model.add_adapter("second", other)
    model.set_adapter("second")
    stir(model)
    second = model(X)
    with model.disable_adapter():
        base = model(X)
    assert not torch.equal(second, base)
    model.eval()
    model.base_model.set_adapter(["default", "second"])
    both = model(X)
    assert not torch.equal(both, second)
    mixed = torch.cat([X, X])
    model.set_adapter("default")
    default = model(X)
    model.set_adapter("second")
    by_row = model(mixed, adapter_names=["default"] * 2 + ["second"] * 2)
    torch.testing.assert_close(by_row[:2], default, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="unfuse_peft_ the model first"):
        model.merge_adapter()
    model.delete_adapter("second")


def test_saving_a_fused_model(tmp_path: Path) -> None:
    model = live("dense", peft.LoraConfig(**LORA["plain"]))
    model.save_pretrained(tmp_path / "before")
    fuse_peft_(model)
    model.save_pretrained(tmp_path / "after")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    base: Any = copy.deepcopy(model)
    merged = base.merge_and_unload()
    torch.testing.assert_close(merged(X), model(X), rtol=1e-4, atol=1e-5)


def test_the_layers_norms_follow_training_and_set_scale() -> None:
    model = live("nf4", peft.LoraConfig(**DORA))
    fuse_peft_(model)
    model.eval()
    with torch.no_grad():
        for change in (
            lambda layer: None,
            lambda layer: layer.lora_B["default"].weight.data.mul_(2),
            lambda layer: layer.lora_A["default"].weight.copy_(torch.randn(4, K)),
            lambda layer: layer.set_scale("default", 3),
        ):
            for layer in lora_layers(model):
                change(layer)
            kept = model(X)
            for layer in lora_layers(model):
                layer.__dict__.pop("_bitfuse_norms")
            assert torch.equal(model(X), kept)


def test_bitfuse_layers_under_peft() -> None:
    base: Any = Model()
    bitfuse.quantize_(base, "nf4", progress=False)
    before = base(X)
    model = peft.get_peft_model(base, with_bitfuse_layers(peft.LoraConfig(**LORA["plain"])))
    assert type(model.base_model.model.layers[0].q_proj.base_layer) is Linear
    torch.testing.assert_close(model(X), before)
    stir(model)
    model(X).sum().backward()
    learns = [p for p in model.parameters() if p.requires_grad]
    assert len(learns) == 8 and all(p.grad is not None for p in learns)
    y = model(X)
    unfuse_peft_(model)
    torch.testing.assert_close(model(X), y)
    with pytest.raises(TypeError, match="config is a str"):
        with_bitfuse_layers("config")


def test_a_compute_dtype_is_kept() -> None:
    linear = torch.nn.Linear(K, K)
    base = torch.nn.Sequential(bnb_layer(linear, "nf4", compute_dtype=torch.bfloat16))
    base.is_loaded_in_4bit = True  # type: ignore[assignment]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0"]))
    stir(model)
    model.train()
    plain = model(X)
    fuse_peft_(model)
    y = model(X)
    assert y.dtype == plain.dtype == torch.float32
    layer = lora_layers(model)[0]
    w = layer.base_layer.weight.dequantize(torch.float64)
    w = w + layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    assert_accurate(y, X.double() @ w.t() + layer.base_layer.bias.double(), plain.to(torch.bfloat16).float())


class Zoo(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, K)
        self.conv = torch.nn.Conv1d(K, K, 1)
        for name in ("plain", "hooked", "replaced", "merged", "biased"):
            setattr(self, name, torch.nn.Linear(K, K))


def test_what_can_not_be_fused_is_named() -> None:
    config = peft.LoraConfig(r=4, target_modules=["embed", "conv", "plain", "hooked", "replaced", "merged"])
    model: Any = peft.get_peft_model(Zoo(), config)
    zoo = model.base_model.model
    zoo.hooked.lora_A["default"].register_forward_hook(lambda *a: None)
    zoo.replaced.forward = lambda x: x
    zoo.merged.merge()
    zoo.biased = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(K, K)), peft.LoraConfig(r=4, target_modules=["0"], lora_bias=True)
    )
    zoo.ia3 = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(K, K)),
        peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    )
    report = fuse_peft_(model)
    prefix = "base_model.model."
    assert [layer.name for layer in report.layers] == [prefix + "plain"]
    reasons = {
        "embed": "Embedding, which bitfuse has no fused form of",
        "conv": "Conv1d",
        "hooked": r"lora_A.default has hooks",
        "replaced": "forward is replaced",
        "merged": "are merged: unmerge them first",
        "biased.base_model.model.0": "lora_bias is True",
        "ia3.base_model.model.0": "no fused form",
    }
    assert all(reason in report.left[prefix + name] for name, reason in reasons.items()), report.left
    assert "left as it is" in str(report)
    assert fuse_peft_(model).left[prefix + "plain"] == "it is fused already"
    wrong: list[tuple[Any, type[Exception]]] = [(torch.nn.Linear(2, 2), ValueError), ("model", TypeError)]
    for bad, error in wrong:
        with pytest.raises(error, match="model"):
            fuse_peft_(bad)


def test_bitsandbytes_layers_that_are_left() -> None:
    def refusal(linear: torch.nn.Linear, kind: str = "nf4", **more: Any) -> str | None:
        return convert.refusal(bnb_layer(linear, kind, **more))

    assert "does not divide in_features 96" in str(refusal(torch.nn.Linear(96, 64)))
    assert refusal(torch.nn.Linear(K, 3)) is None
    assert "not quantised yet" in str(convert.refusal(bnb.nn.Linear4bit(K, K)))
    assert "has_fp16_weights" in str(refusal(torch.nn.Linear(K, K), "int8", has_fp16_weights=True))
    assert "does not convert" in str(convert.refusal(torch.nn.Linear(K, K)))
    packed = bnb_layer(torch.nn.Linear(K, K), "nf4", compute_dtype=torch.bfloat16)
    packed.weight.quant_state.packing_format_for_cpu = True
    assert "rounded its scales to bfloat16" in str(convert.refusal(packed))
    with pytest.raises(ValueError, match="layer: its in_features 12"):
        convert.to_bitfuse(bnb_layer(torch.nn.Linear(12, K), "nf4"))
    shared = live("nf4", peft.LoraConfig(**LORA["plain"]))
    block = shared.base_model.model.layers
    block[1].q_proj.base_layer.weight = block[0].q_proj.base_layer.weight
    report = fuse_peft_(shared)
    assert len(report.layers) == 2 and all("shared with another" in why for why in report.left.values())

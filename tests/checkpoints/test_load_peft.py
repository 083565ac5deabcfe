"""load_peft_ and save_peft: heads, resized embeddings, wrapped models, and files from anywhere."""

from __future__ import annotations

import contextlib
import copy
import json
import time
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.checkpoints import load_peft_, save_peft
from bitfuse.checkpoints.patterns import fullmatch
from bitfuse.checkpoints.peft import CONFIG, WEIGHTS
from bitfuse.models.lora import (
    adapted_layers,
    add_lora_,
    disable_adapters,
    lora_parameters,
    merge_adapters_,
    remove_adapters_,
    set_adapter_,
    unmerge_adapters_,
)
from bitfuse.nn import LoRALinear
from safetensors.torch import load_file, save_file
from test_linear import replicas
from test_peft import LORA, QV, K, Model, X, adapt, rewrite, same, snapshot, stir

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


# heads


def two_heads(tmp_path: Path, base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Two PEFT adapters, each with a head of its own, saved; the output with each."""
    outputs = {}
    for name in ("a", "b"):
        theirs = adapt(base, peft.LoraConfig(r=4, target_modules=QV, modules_to_save=["head"])).eval()
        with torch.no_grad():
            for p in theirs.base_model.model.head.parameters():
                p.add_(torch.randn_like(p))
        theirs.save_pretrained(tmp_path / name)
        outputs[name] = theirs(X)
    return outputs


def test_each_adapter_keeps_its_head(tmp_path: Path) -> None:
    base = Model().eval()
    want = two_heads(tmp_path, base)
    want["base"] = base(X)
    model: Any = copy.deepcopy(base)
    keys = list(model.state_dict())
    with bitfuse.use_backend("reference"):
        load_peft_(model, tmp_path / "a", "a")
        assert torch.equal(model(X), want["a"])
        load_peft_(model, tmp_path / "b", "b")
        assert torch.equal(model(X), want["a"])
        for name in ("b", "a"):
            set_adapter_(model, name)
            assert torch.equal(model(X), want[name])
            assert model.head.weight.requires_grad
            assert {
                n.split(".")[2] for n, p in model.named_parameters() if "head" in n and p.requires_grad
            } == {name}
            with disable_adapters(model):
                assert torch.equal(model(X), want["base"])
            save_peft(model, tmp_path / "again", name)
            assert same(load_file(tmp_path / "again" / WEIGHTS), load_file(tmp_path / name / WEIGHTS))
        with pytest.raises(ValueError, match=r"head: adapters \['a', 'b'\] each bring this module"):
            set_adapter_(model, ["a", "b"])
        with pytest.raises(ValueError, match="each bring this module"):
            merge_adapters_(model, ["a", "b"])
        assert torch.equal(model(X), want["a"])
        # a whole state dict, into another model that has them
        other: Any = copy.deepcopy(base)
        for name in ("b", "a"):
            load_peft_(other, tmp_path / name, name)
        with torch.no_grad():
            for p in lora_parameters(other):
                p.zero_()
        other.load_state_dict(model.state_dict())
        set_adapter_(other, "a")
        assert torch.equal(other(X), want["a"])
        # merging b uses b's head, whatever is active
        merge_adapters_(model, "b")
        torch.testing.assert_close(model(X), want["b"], rtol=1e-4, atol=1e-5)
        with disable_adapters(model):
            assert torch.equal(model(X), want["base"])
        unmerge_adapters_(model)
        assert torch.equal(model(X), want["a"])
        remove_adapters_(model, "a")
        assert torch.equal(model(X), want["base"])
        remove_adapters_(model)
        assert torch.equal(model(X), want["base"]) and list(model.state_dict()) == keys
        # a merged head stays
        merge_adapters_(other, "b")
        merged = other(X)
        remove_adapters_(other)
        assert torch.equal(other(X), merged) and list(other.state_dict()) == keys


def test_training_and_swapping_a_head(tmp_path: Path) -> None:
    base = Model()
    two_heads(tmp_path, base)
    model: Any = copy.deepcopy(base)
    calls: list[Any] = []
    model.head.register_forward_hook(lambda m, i, o: calls.append(type(m).__name__))
    load_peft_(model, tmp_path / "a", trainable=True)
    assert any(p is model.head.weight for p in lora_parameters(model))
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    before, original = model.head.weight.clone(), model.head.original_module.weight.clone()
    model(X).square().mean().backward()
    optimizer.step()
    assert len(calls) == 1 and not torch.equal(model.head.weight, before)
    assert torch.equal(model.head.original_module.weight, original)
    place = model.head.weight.data_ptr()
    load_peft_(model, tmp_path / "b")
    assert model.head.weight.data_ptr() == place and not model.head.weight.requires_grad
    with bitfuse.use_backend("reference"):
        assert torch.equal(model(X), peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b")(X))
    adapt(base, peft.LoraConfig(r=4, target_modules=QV)).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="copies of other modules than the file's: unexpected head"):
        load_peft_(model, tmp_path / "none")
    report = add_lora_(model, [*QV, "head"], 4, adapter_name="second")
    assert report.skipped == {"head": "adapters ['default'] have copies of it (modules_to_save)"}
    assert all(torch.equal(replica(X), model(X)) for replica in replicas(model))
    remove_adapters_(model)
    calls.clear()
    model(X)
    assert calls == ["Linear"]


def test_a_state_of_version_0_1_is_the_head_in_use(tmp_path: Path) -> None:
    """It had one head, under the module's own name."""
    base = Model()
    want = two_heads(tmp_path, base)["a"]
    model: Any = copy.deepcopy(base).eval()
    load_peft_(model, tmp_path / "a")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    state |= {f"head.{k}": v.clone() for k, v in model.head.in_use().state_dict().items()}
    other: Any = copy.deepcopy(base).eval()
    load_peft_(other, tmp_path / "b")
    other.load_state_dict(state)
    with bitfuse.use_backend("reference"):
        assert torch.equal(other(X), want)
    assert same(other.head.original_module.state_dict(), base.head.state_dict())


# transformers' models

SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40)


def bert(kind: str) -> Any:
    return getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**SMALL, num_labels=3))


def roberta(kind: str) -> Any:
    return getattr(transformers, f"Roberta{kind}")(transformers.RobertaConfig(**SMALL, num_labels=3))


def llama(kind: str = "ForCausalLM", tied: bool = False) -> Any:
    config = transformers.LlamaConfig(**SMALL, num_labels=3, pad_token_id=0, tie_word_embeddings=tied)
    return getattr(transformers, f"Llama{kind}")(config)


IDS = torch.arange(12).view(2, 6) + 3


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (lambda: bert("ForSequenceClassification"), ["query", "value"]),
        (lambda: bert("ForTokenClassification"), ["query", "value"]),
        (lambda: bert("ForSequenceClassification"), "all-linear"),
        (lambda: roberta("ForSequenceClassification"), ["query", "dense"]),
        (lambda: roberta("ForSequenceClassification"), "all-linear"),
        (lambda: llama("ForSequenceClassification"), ["q_proj", "v_proj"]),
    ],
    ids=["bert", "tokens", "bert all", "roberta dense", "roberta all", "llama"],
)
def test_classifiers_of_peft(make: Any, targets: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = make().eval()
    task = "TOKEN_CLS" if "Token" in type(base).__name__ else "SEQ_CLS"
    theirs = adapt(base, peft.LoraConfig(r=4, target_modules=targets, task_type=task)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "modules_to_save" in name:
                p.add_(torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]) >= {"classifier", "score"}
    ours = copy.deepcopy(base)
    load_peft_(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    before = base(IDS).logits
    with disable_adapters(ours):
        assert torch.equal(ours(IDS).logits, before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_an_output_embedding_as_peft_saves_it(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama(tied=tied).eval()
    theirs = adapt(base, peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])).eval()
    theirs.save_pretrained(tmp_path)
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in load_file(tmp_path / WEIGHTS)
    ours = copy.deepcopy(base)
    load_peft_(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    few_bit: Any = copy.deepcopy(base)
    bitfuse.quantize_(few_bit, "nf4", group_size=16, progress=False)
    few_bit.lm_head = bitfuse.nn.Linear.from_float(base.lm_head, "nf4", group_size=16)
    load_peft_(few_bit, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    before = snapshot(few_bit)
    with pytest.raises(ValueError, match=r"is not the model's own lm_head\.weight"):
        load_peft_(few_bit, tmp_path, "other")
    assert same(snapshot(few_bit), before)
    # over other rows, as after a resized vocabulary: the adapter has a base of its own
    other: Any = copy.deepcopy(base)
    load_peft_(other, tmp_path)
    with torch.no_grad():
        theirs.base_model.model.lm_head.base_layer.weight = torch.nn.Parameter(tensors[key])
    want = theirs(IDS).logits
    torch.testing.assert_close(other(IDS).logits, want, rtol=1e-4, atol=1e-5)
    save_peft(other, tmp_path / "again")
    again = copy.deepcopy(base)
    load_peft_(again, tmp_path / "again")
    assert torch.equal(again(IDS).logits, other(IDS).logits)
    with pytest.raises(ValueError, match="have brought a base weight of their own"):
        add_lora_(again, "lm_head", 2, adapter_name="second")
    load_peft_(again, tmp_path)  # over itself
    again.tie_weights()
    torch.testing.assert_close(again(IDS).logits, want, rtol=1e-4, atol=1e-5)
    again.save_pretrained(tmp_path / "whole")
    with disable_adapters(again):
        assert torch.equal(again(IDS).logits, base(IDS).logits)
    merged = copy.deepcopy(again)
    merge_adapters_(merged)
    remove_adapters_(merged)
    torch.testing.assert_close(merged(IDS).logits, want, rtol=1e-4, atol=1e-5)
    single = copy.deepcopy(again)
    remove_adapters_(single, "default")
    remove_adapters_(again)
    for model in (single, again):
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_resized_vocabulary(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama(tied=tied).eval()
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(48)
    theirs = adapt(grown, peft.LoraConfig(r=4, target_modules=["q_proj"])).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours: Any = copy.deepcopy(base)
    ours.resize_token_embeddings(48)  # with rows of its own
    before = ours(IDS + 30).logits
    load_peft_(ours, tmp_path)
    torch.testing.assert_close(ours(IDS + 30).logits, theirs(IDS + 30).logits, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "whole")
    remove_adapters_(ours)
    assert torch.equal(ours(IDS + 30).logits, before)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    same_rows = copy.deepcopy(grown)  # nothing to copy then
    load_peft_(same_rows, tmp_path)
    assert "modules_to_save" not in " ".join(same_rows.state_dict())


def test_ia3_on_one_output(tmp_path: Path) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(K, K), torch.nn.Linear(K, 1))
    for feedforward in ([], ["1"], "1"):
        config = peft.IA3Config(target_modules=["0", "1"], feedforward_modules=feedforward)
        theirs = adapt(base, config).eval()
        theirs.save_pretrained(tmp_path)
        ours: Any = copy.deepcopy(base)
        load_peft_(ours, tmp_path)
        assert ours[1].feedforward == bool(feedforward)
        torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-5)


# models inside others


def wrap_in(how: str, model: Any) -> Any:
    if how == "compile":
        return torch.compile(model, backend="eager")
    if how == "blocks":
        for i, layer in enumerate(model.layers):
            model.layers[i] = torch.compile(layer, backend="eager")
        return model
    if how == "checkpointed":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for i, layer in enumerate(model.layers):
            model.layers[i] = checkpoint_wrapper(layer)
        return model
    return torch.nn.DataParallel(torch.compile(model, backend="eager"))


@pytest.mark.parametrize("how", ["compile", "blocks", "checkpointed", "parallel"])
def test_wrapped_models_save_and_load(how: str, tmp_path: Path) -> None:
    base = Model().eval()
    model = copy.deepcopy(base)
    add_lora_(model, QV, 4)
    stir(model)
    save_peft(model, tmp_path / "plain", modules_to_save=["head"])
    want = model(X)
    outer = wrap_in(how, model)
    save_peft(outer, tmp_path / "wrapped", modules_to_save=["head"])
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "wrapped")
    torch.testing.assert_close(theirs(X), want, rtol=1e-4, atol=1e-5)
    other = wrap_in(how, copy.deepcopy(base))
    before = other(X)  # compiled by now
    report = load_peft_(other, tmp_path / "wrapped")
    assert [layer.name for layer in report.layers] == list(adapted_layers(model))
    torch.testing.assert_close(other(X), want, rtol=1e-4, atol=1e-5)
    remove_adapters_(other)
    torch.testing.assert_close(other(X), before, rtol=1e-5, atol=1e-6)


def test_a_compiled_linear_layer_is_left(tmp_path: Path) -> None:
    """torch.compile goes on calling the layer that it saw."""
    model: Any = Model()
    add_lora_(model, "q_proj", 4)
    save_peft(model, tmp_path)
    remove_adapters_(model)
    model.layers[0].q_proj = torch.compile(model.layers[0].q_proj, backend="eager")
    report = add_lora_(copy.copy(model), "q_proj", 4, adapter_name="x")
    assert "before you compile" in report.skipped["layers.0.q_proj"]
    remove_adapters_(model)
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj is compiled"):
        load_peft_(model, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapted_output_embedding_of_transformers(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(tied=tied).eval()
    add_lora_(model, ["q_proj", "lm_head"], 4)
    stir(model)
    want = model(IDS).logits
    model.save_pretrained(tmp_path / "whole")
    state = load_file(tmp_path / "whole" / "model.safetensors")
    assert ("lm_head.base_layer.weight" in state) != tied and "lm_head.adapters.default.lora_A" in state
    model.tie_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model(IDS).logits, want)
    remove_adapters_(model)
    model.save_pretrained(tmp_path / "base")
    assert type(model.lm_head) is torch.nn.Linear
    assert torch.equal(type(model).from_pretrained(tmp_path / "base")(IDS).logits, model(IDS).logits)


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_conv1d_of_gpt2_both_ways(dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = gpt2()
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=dora)
    theirs = adapt(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    want = theirs(IDS).logits
    ours = copy.deepcopy(base)
    before, keys = ours(IDS).logits, list(ours.state_dict())
    report = load_peft_(ours, tmp_path / "theirs")
    assert {layer.shape for layer in report.layers} == {(96, 32), (32, 32), (32, 128)}
    torch.testing.assert_close(ours(IDS).logits, want, rtol=1e-4, atol=1e-5)
    save_peft(ours, tmp_path / "ours")
    assert same(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS))
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(back(IDS).logits, want, rtol=1e-4, atol=1e-5)
    few_bit = copy.deepcopy(base)
    bitfuse.quantize_(few_bit, "int8", progress=False)
    load_peft_(few_bit, tmp_path / "theirs")
    merged = copy.deepcopy(ours)
    remove_adapters_(ours)
    assert torch.equal(ours(IDS).logits, before) and list(ours.state_dict()) == keys
    assert all(
        torch.equal(a, b) for a, b in zip(ours.state_dict().values(), base.state_dict().values(), strict=True)
    )
    merge_adapters_(merged)
    remove_adapters_(merged)
    torch.testing.assert_close(merged(IDS).logits, want, rtol=1e-4, atol=1e-5)
    assert list(merged.state_dict()) == keys
    assert len(add_lora_(gpt2(), "all-linear", 4).layers) == 4


def test_keys_that_version_0_1_wrote_of_a_compiled_model(tmp_path: Path) -> None:
    base = Model()
    adapt(base, peft.LoraConfig(r=4, target_modules=QV)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    renamed = {k.replace("base_model.model.", "base_model.model._orig_mod."): t for k, t in tensors.items()}
    save_file(renamed, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert len(load_peft_(base, tmp_path).layers) == 4


# files from anywhere

HOSTILE = [
    r"((\w|\.)+)+#",
    r"(.*)*#",
    r"(a|a)*(\w|\.)*(\w|\.)*(\w|\.)*#",
    r".*.*.*.*.*.*.*.*.*.*#",
    r"(((.*){1000}){1000}){1000}#",
    "(m|m)(o|o)(d|d)(e|e)(l|l)" * 8,
    "(" * 3000 + ")" * 3000,
    "a{99999999999}",
    ".*" * 5_000 + "#",
    "((" + "a?" * 2_000 + "){0,99}){0,99}#",
]


@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "alpha_pattern", "exclude_modules"])
@pytest.mark.parametrize("pattern", HOSTILE, ids=range(len(HOSTILE)))
def test_patterns_come_back(field: str, pattern: str, tmp_path: Path) -> None:
    base = Model()
    adapt(base, peft.LoraConfig(**LORA["plain"])).save_pretrained(tmp_path)
    rewrite(tmp_path, **{field: {pattern: 4} if field.endswith("_pattern") else pattern})
    begin = time.process_time()
    with contextlib.suppress(ValueError):
        load_peft_(base, tmp_path)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj",
        r"^(?!.*(lm_head|vision)).*\.(up|down)_proj$",
        r"layers\.\d{1,2}\.[^.]+",
        r"(?:.*?(?:self_attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.x)",
        r"(.*\.)?(q_proj)$",
        r"(?i)MODEL.*",
        r"(a|ab)(c|bcd)(d*)",
        r"(?<=a)b|a(?<!b)c?",
        r"(a?){3}a{3}",
        r"\w+\.\S*|a\Bb",
        r"[a-c\d_]+?",
        r"x*",
        "",
    ],
)
def test_patterns_mean_what_re_means(pattern: str) -> None:
    import re

    generator = torch.Generator().manual_seed(0)
    names = [
        "model.layers.0.self_attn.q_proj",
        "vision.x.mlp.v_proj",
        "MODEL.x",
        "q_proj",
        "abcd",
        "aaaa",
        "\n",
    ]
    for _ in range(200):
        size = int(torch.randint(7, (), generator=generator))
        names.append("".join("abcd.1_ q"[i] for i in torch.randint(9, (size,), generator=generator).tolist()))
    for name in names:
        assert fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None), name


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"peft_type": ' + "[" * 100_000 + "]" * 100_000 + "}", "is not JSON"),
        ('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"peft_type": ["LORA"]}', r"peft_type is \['LORA'\]"),
        ('{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": 1e308}', r"alpha is 1e\+308"),
        (
            '{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": 1' + "0" * 400 + "}",
            "alpha is 1",
        ),
        (
            '{"peft_type": "LORA", "target_modules": ["q_proj"], "alpha_pattern": {"q": 1e39}}',
            r"alpha is 1e\+39",
        ),
        ('{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": NaN}', "alpha is nan"),
        (r'{"peft_type": "LORA", "target_modules": "(.)\\1"}', "groupref"),
    ],
)
def test_hostile_configs_change_nothing(content: str, match: str, tmp_path: Path) -> None:
    model = Model()
    adapt(model, peft.LoraConfig(r=8, target_modules=QV)).save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(content)
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=match):
        load_peft_(model, tmp_path)
    assert same(snapshot(model), before) and [p.requires_grad for p in model.parameters()] == flags


def test_options_nested_too_deep() -> None:
    layer = LoRALinear(torch.nn.Linear(K, K), 4)
    state = layer.state_dict()
    key = "adapters.default._extra_state"
    state[key] = torch.frombuffer(bytearray(b"[" * 100_000), dtype=torch.uint8)
    with pytest.raises(ValueError, match="is not the JSON of an adapter's options"):
        layer.load_state_dict(state)

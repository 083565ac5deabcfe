"""`bitfuse generate`: text as it comes, from a folder, and what it says where something is wrong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from bitfuse_tools import generation
from bitfuse_tools.cli import app
from bitfuse_tools.generation import GenerationError, Options, Printer, run
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random numbers whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_prints_the_text_and_how_fast_it_came(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for more in ({}, {"draft": "lookup"}, {"draft": "layers:1-1"}, {"draft": str(folder)}):
        run(Options(model=folder, prompt="abcabcabc", max_new_tokens=24, format="int8:32", **more))  # type: ignore[arg-type]
        out, err = capsys.readouterr()
        texts.append(out)
        assert "9 tokens of prompt at " in err and "24 new ones at " in err
    assert len(set(texts)) == 1 and len(texts[0]) > 1 and texts[0].endswith("\n")


def test_chat_and_standard_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi"))
    run(Options(model=folder, chat=True, system="be brief", max_new_tokens=4, cache="int8", dtype="bfloat16"))
    count = len("<system>be brief<user>hi<assistant>")
    assert f"{count} tokens of prompt" in capsys.readouterr().err


def test_a_character_of_several_tokens_comes_whole(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    written: list[str] = []
    printer = Printer(tokenizer, written.append)
    text = "커널 a\nö!\n\n한"
    for token in tokenizer(text)["input_ids"]:
        printer(0, [token])
    printer.finish()
    assert "".join(written) == text
    assert [w for w in written if w] == list(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(model=Path("nowhere")), "there is nothing at nowhere"),
        (dict(prompt=""), "the prompt is empty"),
        (dict(dtype="int8"), "dtype is 'int8', expected float32, float16, bfloat16"),
        (dict(threads=0), "threads is 0"),
        (dict(cache="int5"), "format is 'int5'"),
        (dict(format="int9"), "int9"),
        (dict(draft="elsewhere"), "there is nothing at elsewhere"),
        (dict(top_p=2.0), "top_p is 2.0"),
    ],
)
def test_says_what_is_wrong(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        given: dict[str, Any] = dict(model=folder, prompt="a", max_new_tokens=2) | options
        run(Options(**given))


def test_a_model_that_has_no_template(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = generation.load

    def without(*args: Any) -> tuple[Any, Any]:
        model, tokenizer = real(*args)
        tokenizer.chat_template = None
        return model, tokenizer

    monkeypatch.setattr(generation, "load", without)
    with pytest.raises(GenerationError, match="no chat template: leave --chat away"):
        run(Options(model=folder, prompt="a", chat=True))


def test_the_command(folder: Path) -> None:
    done = CliRunner().invoke(app, ["generate", "--model", str(folder), "--prompt", "ab", "-n", "3"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["generate", "--model", "nowhere", "--prompt", "ab"])
    assert done.exit_code == 2 and "bitfuse generate: there is nothing at nowhere" in done.stderr
    help = CliRunner().invoke(app, ["generate", "--help"]).stdout
    assert "--draft" in help and "as it comes" in help

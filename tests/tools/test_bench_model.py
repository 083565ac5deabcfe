"""`bitfuse bench model`: every contender gets the same tokens, and the record says what a table needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bitfuse_tools.bench.model import ModelOptions, contenders, lines_of, measure
from bitfuse_tools.cli import app
from test_generate import folder  # noqa: F401
from typer.testing import CliRunner

pytest.importorskip("transformers")


def test_contenders_agree(folder: Path) -> None:  # noqa: F811
    """They compute the same model: what is timed is the same work."""
    found = {c.name: c for c in contenders(ModelOptions(folder, tokens=4, context=3, prompt=5))}
    assert list(found) == [
        "bitfuse, float32, cache none",
        "bitfuse's layers in transformers, float32",
        "bitfuse, bfloat16, cache none",
        "transformers, bfloat16",
    ]
    first = found["bitfuse, float32, cache none"]
    assert first.decoder is not None and first.bytes_per_token is not None
    first.read([1, 2, 3])
    first.step(4)
    assert first.decoder.lengths == [4]
    # two layers, the head and half a token of keys too few: what a step reads
    layer = 4 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96)
    assert first.decoder.weight_bytes == 2 * layer + 4 * 257 * 64


def test_measures_and_writes(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    record = measure(
        ModelOptions(
            folder, tokens=3, context=2, prompt=4, dtypes=("float32",), caches=("none", "int8"), rounds=2
        )
    )
    cases = [row["case"] for row in record["rows"]]
    assert cases[:2] == ["bitfuse, float32, cache none", "bitfuse, float32, cache int8"]
    for row in record["rows"]:
        assert row["decode_tokens_per_s"] > 0 and len(row["decode_rounds"]) == 2
    assert set(record["rows"][0]["ms_by_part"]) == {
        "linear", "attention", "norm", "head", "sampling", "overhead",
    }  # fmt: skip
    text = "\n".join(lines_of(record))
    assert "decode, tokens/s" in text and "ms a token" in text
    out = tmp_path / "model.json"
    command = ["bench", "model", "--model", str(folder), "--quick", "--rounds", "1", "--dtype", "float32"]
    done = CliRunner().invoke(app, [*command, "--against", "none", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert [r["case"] for r in json.loads(out.read_text())["rows"]] == ["bitfuse, float32, cache none"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model"], "bitfuse bench model --model PATH"),
        (["rope", "--model", "x"], "bitfuse bench model --model PATH"),
        (["model", "--model", "nowhere"], "there is nothing at nowhere"),
        (["model", "--model", "{folder}", "--dtype", "int8"], "dtype is 'int8'"),
        (["model", "--model", "{folder}", "--against", "vllm"], "against is 'vllm', expected llama.cpp"),
    ],
)
def test_says_what_is_wrong(folder: Path, words: list[str], said: str) -> None:  # noqa: F811
    done = CliRunner().invoke(app, ["bench", *(w.format(folder=folder) for w in words)])
    assert done.exit_code == 2 and said in done.stderr

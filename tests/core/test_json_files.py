"""Files of JSON that anybody may have written, or cut: each that the package reads is read or refused, in a
line. (Files of results: tests/tools/test_report.py.)"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitfuse
import pytest
from bitfuse.core import bundle, policy
from bitfuse.core.json_files import DEEPEST, JsonError, finite, parse_json, read_json
from bitfuse_tools.bench import ResultsError, limits, shapes
from test_report import RESULTS, mutated

SHAPE = {"hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 100}
CONFIG = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}


def manifest() -> dict[str, Any]:
    cuda = {"abi": bundle.abi(), "sources": bundle.source_hash(bundle.cuda_sources())}
    triton = {"version": bundle.triton_version(), "sources": bundle.source_hash(bundle.triton_sources())}
    return {
        "layout": bundle.LAYOUT,
        "archs": ["sm_90a"],
        "cuda": {**cuda, "files": {f"_cuda{bundle.abi()}": [3, "abc"]}},
        "triton": {**triton, "files": {"triton/key/kernel.cubin": [3, "abc"]}},
    }


def devices() -> dict[str, Any]:
    entry = {
        "versions": policy.versions(),
        "backends": {"op(1)": {"cuda": 1e-6}},
        "configs": {"x": [1, None]},
    }
    return {"schema": policy.SCHEMA, "devices": {"GPU": {**entry, "done": ["op"]}}}


# by name: what is in it, who reads it, and what it raises
READERS: dict[str, tuple[Callable[[], Any], Callable[[Path], Any], type[Exception]]] = {
    bundle.MANIFEST: (manifest, lambda path: bitfuse.load_kernels(path.parent), ValueError),
    "policy.json": (devices, policy.read, policy.PolicyError),
    "mine.json": (lambda: SHAPE, lambda path: shapes.find(str(path)), ValueError),
    "config.json": (lambda: CONFIG, lambda path: shapes.find(str(path)), ValueError),
    limits.FILE: (
        lambda: json.loads((RESULTS / limits.FILE).read_text()),
        lambda path: limits.load(path.parent / "amd-epyc-family-26-2-cores"),
        ResultsError,
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_hostile_files(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, reader, error = READERS[name]
    dice = random.Random(name)
    real = made()
    file = tmp_path / name
    file.write_text(json.dumps(real))
    reader(file)  # as it is, it is read
    refused = 0
    for _ in range(80):
        file.write_bytes(mutated(real, dice).encode(errors="surrogatepass"))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "bitfuse"):
            try:
                reader(file)
            except error as why:
                refused += 1
                assert str(why).encode() and "\n" not in str(why) and len(str(why)) < 1000, why
        assert all("\n" not in line.getMessage() for line in caplog.records)
    assert refused


def test_what_is_refused(tmp_path: Path) -> None:
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(deep[1:-1]) is not None
    for text, said in (
        ("", "is not JSON"), (f"[{deep}]", "nested deeper than 64"), ("[" * 10**6, "nested deeper than 64"),
        ("1" * 5000, "thousands of digits"), (str(1 << 64), "of more than 64 bits"),
        ('"\\ud800"', "surrogate"), ('{"\\udfff": 1}', "surrogate"),
    ):  # fmt: skip
        with pytest.raises(JsonError, match=said):
            parse_json(text)
    with pytest.raises(JsonError, match="can't be read: Is a directory"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing")
    for value in (True, None, "1", float("nan"), float("inf"), 10**400, [1]):
        with pytest.raises(ValueError, match=r"x is .*, expected a number"):
            finite("x", value)
    with pytest.raises(ValueError, match=r"x is -1, expected 0 to 1e\+15"):
        finite("x", -1)

"""The policy's cache, and what `bitfuse tune` puts into it; times are made up, for there may be no GPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitfuse
import cusim
import pytest
import torch
from bitfuse.core import policy
from bitfuse.core.backends import Backend
from bitfuse.core.device import Device, device_of
from bitfuse.core.op import Op
from bitfuse.kernels.linear import lowbit_linear as triton
from bitfuse.kernels.linear import lowbit_linear_tiles as tiles
from bitfuse.ops.linear import lowbit_linear_cuda as native
from bitfuse_tools import tuning
from bitfuse_tools.cli import app
from bitfuse_tools.hypothetical import Sizes
from typer.testing import CliRunner

SMALL = Sizes(m=3, n=64, k=1024, dtype=torch.float16)
SMALL_PRODUCT = tiles.Product(3, 64, 1024, 4, 128, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("BITFUSE_CACHE", str(tmp_path))
    policy.of.cache_clear()
    yield tmp_path / "policy.json"
    policy.of.cache_clear()


def entry(**parts: Any) -> dict[str, Any]:
    return {"versions": policy.versions(), "backends": {}, "configs": {}, "done": [], **parts}


def test_file(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert policy.read(cache) == {} and policy.of("GPU") == {"backends": {}, "configs": {}}
    key = policy.key("op", 4, torch.bfloat16)
    assert key == "op(4,bfloat16)" and [policy.bucket(m) for m in (0, 1, 2, 3, 5, 64, 65)] == [
        1, 1, 2, 4, 8, 64, 128
    ]  # fmt: skip
    old = entry(backends={key: {"cuda": 1.0}}) | {"versions": {"bitfuse": "0.0"}}
    policy.write(cache, {"GPU": entry(backends={key: {"cuda": 2e-6, "triton": 1e-6}}), "Old": old})
    policy.of.cache_clear()
    assert policy.fastest("GPU", "op", (4, torch.bfloat16)) == "triton"
    assert policy.fastest("GPU", "op", (8, torch.bfloat16)) is None
    assert policy.fastest("Old", "op", (4, torch.bfloat16)) is None and "other versions" in caplog.text
    assert [p.name for p in cache.parent.iterdir()] == ["policy.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ('{"schema": 7}', "layout 7, expected 1"),
        ("[]", "truncated or no policy"),
        ("[" * 100_000, "nested deeper"),
        ('{"schema": 1, "devices": {"x": 3}}', "truncated or no policy"),
        ('{"schema": 1, "devices": {"x": {"backends": {"a": {"cuda": "fast"}}}}}', "no policy"),
        ('{"schema": 1, "devices": {"x": {"configs": {"a": [1, "x"]}}}}', "no policy"),
    ],
)
def test_a_file_that_is_none(cache: Path, caplog: pytest.LogCaptureFixture, text: str, said: str) -> None:
    cache.write_text(text)
    with pytest.raises(policy.PolicyError, match=said):
        policy.read(cache)
    assert policy.of("GPU")["backends"] == {} and said in caplog.text  # a call goes on with the rules


def test_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(policy.PolicyError, match=r"can't be written: .*; set BITFUSE_CACHE"):
        policy.write(tmp_path / "file" / "policy.json", {})


def test_no_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BITFUSE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert policy.of("GPU")["configs"] == {} and "set BITFUSE_CACHE" in caplog.text


def test_an_op_prefers_what_was_fastest(cache: Path) -> None:
    served: list[str] = []

    def backend(name: str) -> Backend:
        def run(x: torch.Tensor) -> torch.Tensor:
            served.append(name)
            return x

        return Backend(name, ("cpu",), lambda x: None, run)

    op = Op(
        "tuned_test(Tensor x) -> Tensor", lambda x: None, lambda x: x, torch.empty_like,
        (backend("cuda"), backend("triton")), kind=lambda x: (policy.bucket(x.numel()),),
    )  # fmt: skip
    policy.write(cache, {"GPU": entry(backends={"tuned_test(4)": {"cuda": 2.0, "triton": 1.0}})})
    x = torch.zeros(3)
    assert op.explain(x).policy_key == "tuned_test(4)"
    op(x)
    op.candidates.measured_as(x.device, "GPU")
    op(x), op(torch.zeros(5))
    assert served == ["cuda", "triton", "cuda"]
    assert op.explain(x).chosen == "triton" and op.explain(torch.zeros(5)).chosen == "cuda"


def test_cases_are_of_the_model() -> None:
    from bitfuse_tools.bench.shapes import SHAPES

    found = tuning.cases(tuning.OPS, SHAPES["llama3-8b"], ("int4", "nf4"), rows=(1, 512))
    assert len(set(found)) == len(found)
    linear = [c for c in found if c.op == "lowbit_linear"]
    assert len(linear) == 2 * 2 * 4 and {c.sizes.format for c in linear} == {"int4", "nf4"}
    assert all(c.sizes.m == 1 for c in found if c.op == "multi_lora_linear")
    assert {c.sizes.kv_heads for c in found if c.op.endswith("attention")} == {8}


def made_up(seconds: Callable[[str, tiles.Config | None], float]) -> tuning.Timer:
    """Runs the call, and says what it took: by the backend that was asked for, and by the tiles on trial."""

    def timer(call: Callable[[], Any]) -> float:
        got = call()
        assert torch.isfinite(got).all() and got.abs().max() > 0
        from bitfuse.core.backends import asked_backend

        return seconds(asked_backend() or "", triton._trial)

    return timer


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU `make gpu` runs the real one")
def test_tune(cache: Path) -> None:
    """Cases run on the simulator: the tiles that took least are remembered, once, and used."""
    rule = tiles.choose(SMALL_PRODUCT, Device(0, 80, 4))
    best = tiles.candidates(SMALL_PRODUCT, Device(0, 80, 4))[2]
    assert best != rule
    timer = made_up(lambda name, c: {"cuda": 3e-6, "triton": 1e-6 if c == best else 2e-6}[name])
    todo = [tuning.Case("lowbit_linear", SMALL), tuning.Case("lora_linear", SMALL)]
    with cusim.device(sm=80):
        on = device_of(torch.device("cpu"))
        best = tiles.candidates(SMALL_PRODUCT, on)[2]
        got = list(tuning.tune("GPU", todo, 5, False, timer, "cpu"))
        again = list(tuning.tune("GPU", todo, 5, False, timer, "cpu"))
    assert [case for case, _ in got] == todo and [found for _, found in again] == [None, None]
    first = got[0][1]
    assert first is not None and first.config == best and "the rule's take 2 us" in str(first)
    assert policy.fastest("GPU", "lowbit_linear", (4, 64, 1024, "int4", 128, torch.float16)) == "triton"
    written = json.loads(cache.read_text())["devices"]["GPU"]
    key = tiles.tuning_key(3, 64, 1024, "int4", 128, torch.float16)
    assert tiles.Config(*written["configs"][key]) == best
    assert sorted(written["done"]) == sorted(map(str, todo))
    assert any(name.startswith("lora_linear(4,64,1024,int4,16,1,float16") for name in written["backends"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU `make gpu` runs the real one")
def test_tune_times_cuts_of_the_cuda_kernel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitfuse._cuda")
    sizes = Sizes(m=3, n=64, k=1024, dtype=torch.float16)

    def timer(call: Callable[[], Any]) -> float:
        call()
        return {None: 3e-6, best: 1e-6}.get(native._trial, 2e-6)

    with cusim.device(sm=90):
        on = device_of(torch.device("cpu"))
        best = native.candidates(3, 64, 1024, "int4", False, on)[2]
        ((_, found),) = tuning.tune("GPU", [tuning.Case("lowbit_linear", sizes)], 5, False, timer, "cpu")
        assert found is not None and found.cut == best and "the model's take 3 us" in str(found)
        assert found.seconds["cuda"] == 1e-6
        written = json.loads(cache.read_text())["devices"]["GPU"]
        assert native.Cut(*written["configs"][native.tuning_key(3, 64, 1024, "int4")]) == best
        # a later process takes it
        monkeypatch.setattr(native, "tuned", lambda *_: best)
        native._plan.cache_clear()  # type: ignore[attr-defined]
        plan = native._plan(3, 64, 1024, "int4", False, on)
        assert (plan.log_warps_n, plan.splits) == best
    native._plan.cache_clear()  # type: ignore[attr-defined]


def test_candidates_compute_the_same() -> None:
    if torch.cuda.is_available():
        gpu, device = device_of(torch.device("cuda", 0)), "cuda"
    else:
        gpu, device = None, "cpu"
    w = bitfuse.quantize(torch.randn(64, 1024, device=device), "int4")
    x = torch.randn(3, 1024, device=device, dtype=torch.float16)
    expected = torch.nn.functional.linear(x.double(), w.dequantize().double())
    with cusim.device(sm=90, racecheck=True) if gpu is None else bitfuse.use_backend("triton"):
        found = tiles.candidates(SMALL_PRODUCT, gpu or device_of(torch.device("cpu")))
        assert len(found) > 5
        for config in found[1:4]:
            with bitfuse.use_backend("triton"), triton.trying(config):
                error = (bitfuse.lowbit_linear(x, w).double() - expected).abs().max()
            assert error < 2e-3 * expected.abs().max()


def test_command_without_a_gpu() -> None:
    if torch.cuda.is_available():
        result = CliRunner().invoke(app, ["tune", "rope"])
        assert result.exit_code == 2 and "no op 'rope' to tune" in result.stderr
    else:
        result = CliRunner().invoke(app, ["tune"], env=dict(os.environ))
        assert result.exit_code == 2 and "torch sees no GPU here" in result.stderr

"""Op: who serves a call, what explain says of it, what is asked for and can't be had."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.core import backends, device
from bitfuse.core.backends import BACKENDS, Backend, BackendError, asked
from bitfuse.core.gpus import find
from bitfuse.core.op import Op

calls: list[str] = []


def backend(name: str, refuses: str | None = None) -> Backend:
    def run(x: torch.Tensor) -> torch.Tensor:
        calls.append(name)
        return x + 1

    return Backend(
        name, ("cpu",) if name == "cpp" else ("cuda",), lambda x: refuses if x.dim() == 2 else None, run
    )


def reference(x: torch.Tensor) -> torch.Tensor:
    """One more."""
    calls.append("reference")
    return x + 1


@pytest.fixture(autouse=True)
def nothing_is_left_out() -> Iterator[None]:
    yield
    backends.left_out.cache_clear()


def check(x: torch.Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"x has dtype {x.dtype}, expected torch.float32")


plus_one = Op(
    "plus_one_test(Tensor x) -> Tensor",
    check,
    reference,
    lambda x: torch.empty_like(x),
    (backend("cpp", "2 dimensions are too many"), backend("cuda"), backend("triton")),
)


def served(x: torch.Tensor) -> list[str]:
    calls.clear()
    assert torch.equal(plus_one(x), x + 1)
    return list(calls)


def test_the_first_backend_that_can_serves() -> None:
    assert served(torch.zeros(3)) == ["cpp"]


def test_the_reference_serves_the_rest_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    plus_one._told.clear()
    with caplog.at_level(logging.WARNING, "bitfuse"):
        assert served(torch.zeros(3, 1)) == ["reference"]
        assert served(torch.zeros(3, 1)) == ["reference"]
    (record,) = caplog.records
    assert "not cpp: 2 dimensions are too many" in record.getMessage()


def test_meta_tensors_are_of_the_gpu_that_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels plan for it; where they refuse, and where nothing is planned for, the fake answers."""
    x = torch.zeros(3, device="meta")
    calls.clear()
    assert plus_one(x).shape == (3,) and calls == []
    monkeypatch.setattr(device, "_planned", find("h100"))  # as `plan_for` does for the rest of a process
    assert plus_one(x).shape == (3,) and calls == ["triton"]
    choosy = (backend("cpp"), backend("triton", "2 dimensions are too many"))
    op = Op("plus_one_planned(Tensor x) -> Tensor", check, reference, torch.empty_like, choosy)
    calls.clear()
    assert op(torch.zeros(3, 1, device="meta")).shape == (3, 1) and calls == []


def test_explain() -> None:
    explanation = plus_one.explain(torch.zeros(3, 1))
    assert explanation.chosen == "reference" and explanation.refused["cpp"] == "2 dimensions are too many"
    assert str(plus_one.explain(torch.zeros(3))) == "plus_one_test on cpu: cpp runs\n  24 B"
    with pytest.raises(TypeError, match="op is 3, expected a bitfuse op or layer"):
        bitfuse.explain(3)


def test_explain_of_public_functions_and_layers() -> None:
    layer = bitfuse.nn.Linear.from_float(torch.nn.Linear(128, 64))
    x = torch.randn(2, 128)
    for explanation in (bitfuse.explain(layer, x), bitfuse.explain(bitfuse.lowbit_linear, x, layer.weight)):
        assert explanation.op == "lowbit_linear" and explanation.chosen == "cpp"
    assert bitfuse.explain(bitfuse.ops.lowbit_linear, x, layer.weight).chosen == "cpp"


def test_asking_for_a_backend() -> None:
    with bitfuse.use_backend("reference"):
        assert served(torch.zeros(3)) == ["reference"]
        with bitfuse.use_backend("cpp"):
            assert served(torch.zeros(3)) == ["cpp"]
        assert plus_one.explain(torch.zeros(3)).refused["cpp"] == "reference was asked for"
    with (
        bitfuse.use_backend("cpp"),
        pytest.raises(BackendError, match="'cpp' was asked for, but 2 dimensions"),
    ):
        plus_one(torch.zeros(1, 1))
    token = asked.set("fastest")  # as BITFUSE_BACKEND does at the start
    with pytest.raises(ValueError, match="BITFUSE_BACKEND is 'fastest', expected one of 'cpp'"):
        plus_one(torch.zeros(3))
    asked.reset(token)
    with pytest.raises(ValueError, match="name is 'tritn'"), bitfuse.use_backend("tritn"):
        pass


def test_a_backend_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one op; it serves nothing, not by name either, and explain says why."""
    monkeypatch.setattr(backends, "_without", "plus_one_without:cpp, rope:triton")  # as BITFUSE_WITHOUT does
    backends.left_out.cache_clear()
    monkeypatch.setattr(backends, "_every", list(backends._every))
    op = Op(
        "plus_one_without(Tensor x) -> Tensor", check, reference, torch.empty_like,
        (backend("cpp"), backend("cuda")),
    )  # fmt: skip
    calls.clear()
    op(torch.zeros(3))
    assert calls == ["reference"] and served(torch.zeros(3)) == ["cpp"]
    assert op.explain(torch.zeros(3)).refused["cpp"] == "BITFUSE_WITHOUT leaves it out"
    with bitfuse.use_backend("cpp"), pytest.raises(BackendError, match="but BITFUSE_WITHOUT leaves it out"):
        op(torch.zeros(3))
    monkeypatch.undo()
    backends.left_out.cache_clear()
    assert op(torch.zeros(3)).shape == (3,)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("rope", "rope has cpp, triton"),
        ("rope:cuda", "rope has cpp, triton"),
        ("rope:reference", "rope has cpp, triton"),
        ("attention:triton,", "no op '' has kernels"),
        ("rpoe:cpp", "no op 'rpoe' has kernels"),
    ],
)
def test_what_can_not_be_left_out(said: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_without", said)
    backends.left_out.cache_clear()
    with pytest.raises(ValueError, match=f"BITFUSE_WITHOUT is '{said}', expected ops and backends .*: {why}"):
        backends.left_out()


def test_a_public_function_stands_for_its_ops() -> None:
    """In a process of its own, whose environment says so; a wrong name is an error of every call."""
    code = (
        "import bitfuse, torch\n"
        "from bitfuse.core.backends import left_out\n"
        "q = torch.randn(1, 3, 2, 16)\n"
        "print(bitfuse.explain(bitfuse.attention, q, q, q).chosen, sorted(left_out()))\n"
        "print(bitfuse.attention(q, q, q).shape)\n"
    )
    done = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True,
            env={**os.environ, "BITFUSE_WITHOUT": names},
        )
        for names in ("varlen_attention:cpp", "attention:cp")
    ]  # fmt: skip
    assert done[0].stdout.splitlines()[0] == (
        "reference [('attention', 'cpp'), ('attention_backward', 'cpp'), ('varlen_attention', 'cpp')]"
    ), done[0].stderr
    assert "ValueError: BITFUSE_WITHOUT is 'attention:cp', expected" in done[1].stderr


def test_plain_by_design(caplog: pytest.LogCaptureFixture) -> None:
    """Plain torch is what serves, and what explain says; nobody is warned, no backend is refused."""
    op = Op("plus_one_plain(Tensor x) -> Tensor", check, reference, torch.empty_like, (), plain=True)
    x = torch.zeros(3)
    with caplog.at_level(logging.WARNING, "bitfuse"):
        for name in (None, *BACKENDS):
            with bitfuse.use_backend(name) if name else contextlib.nullcontext():
                assert torch.equal(op(x), x + 1)
                explanation = op.explain(x)
            assert explanation.chosen == "reference" and not explanation.refused
            assert str(explanation) == (
                "plus_one_plain on cpu: reference runs, plain torch on every device by design\n  24 B"
            )
    assert not caplog.records
    with pytest.raises(TypeError, match=r"x has dtype torch.int64"):
        op(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="plain is True, and backends has 1, expected none"):
        Op("two(Tensor x) -> Tensor", check, reference, torch.empty_like, (backend("cpp"),), plain=True)


def test_arguments_are_checked_however_the_op_is_called() -> None:
    for call in (plus_one, torch.ops.bitfuse.plus_one_test, plus_one.explain):
        with pytest.raises(TypeError, match=r"x has dtype torch.int64"):
            call(torch.zeros(3, dtype=torch.int64))


def test_under_a_compile_and_a_mode() -> None:
    def twice(x: torch.Tensor) -> Any:
        return plus_one(plus_one(x))

    x = torch.zeros(3)
    assert torch.equal(torch.compile(twice, fullgraph=True)(x), x + 2)
    assert plus_one(torch.zeros(3, device="meta")).shape == (3,)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        assert twice(mode.from_tensor(x)).shape == (3,)

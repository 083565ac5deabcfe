"""What a call would cost and who would serve it, on devices that are not here."""

from __future__ import annotations

import json

import bitfuse
import pytest
import torch
from bitfuse.arch.gpus import GPUS, find
from bitfuse.cli import app
from bitfuse.cost import Cost, Rates, moved
from bitfuse.hypothetical import CALLS, Sizes, explain_sizes
from typer.testing import CliRunner


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["explain", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_cost_counts_what_real_tensors_hold() -> None:
    w = bitfuse.quantize(torch.randn(256, 512), "int4")
    x = torch.randn(3, 512, dtype=torch.bfloat16)
    cost = bitfuse.explain(bitfuse.lowbit_linear, x, w).cost
    assert cost == Cost(x.nbytes + w.nbytes + 3 * 256 * 2, 2 * 3 * 256 * 512, torch.bfloat16)
    made = explain_sizes("lowbit_linear", Sizes(m=3, n=256, k=512), None)
    assert made.cost == cost and made.rates is None and made.chosen == "cpp"


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({}, 5 * 7),
        ({"causal": True}, 3 + 4 + 5 + 6 + 7),
        ({"window_size": (1, 0)}, 5 * 2),
        ({"window_size": (2, 1)}, 4 * 4 + 3),
    ],
)
def test_attention_counts_the_pairs_that_are_seen(options: dict[str, object], pairs: int) -> None:
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16)
    cost = bitfuse.explain(bitfuse.attention, q, k, k, **options).cost
    assert cost.flops == 2 * 4 * pairs * 2 * (16 + 16)
    assert cost.nbytes == q.nbytes + 2 * k.nbytes + q.nbytes + 2 * 4 * 5 * 4


def test_decode_reads_what_is_in_the_cache() -> None:
    cache = bitfuse.KVCache(2, 64, 2, 16, dtype=torch.float32)
    k = torch.randn(2, 24, 2, 16)
    cache.append(k, k)
    q = torch.randn(2, 1, 4, 16)
    cost = bitfuse.explain(bitfuse.decode_attention, q, cache).cost
    assert cost.nbytes == q.nbytes + 2 * k.nbytes + q.nbytes + 2 * 4 * 4
    assert cost.flops == 2 * 2 * 24 * 4 * (16 + 16)


def test_the_bound() -> None:
    rates = Rates("x", 1e9, 1e12, 1e11, 1e-6)
    assert Cost(1000, 10, torch.bfloat16).seconds(rates) == (1e-6, "memory")
    assert Cost(1000, 10**7, torch.bfloat16).seconds(rates) == (1e-5, "arithmetic")
    assert Cost(1000, 10**7, torch.float32).seconds(rates) == (1e-4, "arithmetic")
    assert moved(torch.zeros(3), [None, (torch.zeros(2, dtype=torch.int8), 7)]) == 14


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("device", [None, "h100", "a100", "t4"])
def test_every_op_on_any_device(op: str, device: str | None) -> None:
    gpu = None if device is None else find(device)
    explanation = explain_sizes(op, Sizes(), gpu)
    assert explanation.cost.nbytes > 0
    if gpu is None:
        assert explanation.chosen == "cpp" and explanation.device == "cpu"
    else:
        assert explanation.rates is not None and explanation.rates.name == device
        expected = ("reference",) if device == "t4" else ("cuda", "triton")
        assert explanation.chosen in expected, str(explanation)


def test_nothing_of_a_pretended_gpu_stays() -> None:
    explain_sizes("lowbit_linear", Sizes(), GPUS["h100"])
    old = explain_sizes("lowbit_linear", Sizes(), GPUS["t4"])
    assert old.refused["triton"] == "it needs compute capability 8.0, cuda:0 has 7.5"
    x = torch.randn(1, 128)
    assert not isinstance(torch.zeros(1), torch._subclasses.FakeTensor)
    assert bitfuse.explain(bitfuse.lowbit_linear, x, bitfuse.quantize(torch.randn(8, 128))).rates is None


def test_the_command() -> None:
    code, out, _ = run("lowbit_linear", "--m", "8192", "--format", "nf4", "--device", "RTX 4090", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["chosen"] == "triton" and facts["bound"] == "arithmetic"
    assert facts["least_s"] == pytest.approx(2 * 8192 * 4096**2 / 165.2e12)
    assert facts["predicted_s"] > facts["least_s"] and "above 64" in facts["refused"]["cuda"]
    code, out, _ = run("decode_attention", "--cache", "int8", "--page-size", "16", "--device", "sm_80")
    assert code == 0 and "bound by memory" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lowbit",), "no op 'lowbit': there are lowbit_linear, lora_linear"),
        (("lowbit_linear", "--device", "gtx1080"), "no GPU or architecture 'gtx1080'"),
        (("lowbit_linear", "--heads", "3"), "lowbit_linear has no --heads; it has --m, --n, --k"),
        (("lowbit_linear", "--format", "int5"), "format is 'int5'"),
        (("lowbit_linear", "--format", "dense"), "format is 'dense'"),
        (("lowbit_linear", "--k", "100"), "100"),
        (("lowbit_linear", "--n", "0"), "n is 0, expected 1 or more"),
        (("attention", "--heads", "30"), "q has 30 heads and k 8"),
        (("attention", "--dtype", "int8"), "no dtype 'int8'"),
        (("decode_attention", "--cache", "fp4"), "format is 'fp4'"),
        (("decode_attention", "--page-size", "17"), "page_size is 17"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1, (out, err)

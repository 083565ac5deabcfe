"""What a call would cost and who would serve it, on devices that are not here."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.core.cost import Cost, Rates, moved
from bitfuse.core.gpus import GPUS, find
from bitfuse_tools.bench.shapes import SHAPES
from bitfuse_tools.cli import app
from bitfuse_tools.compile import triton_kernels
from bitfuse_tools.hypothetical import EVERY, Sizes, explain_sizes
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


@pytest.mark.parametrize("op", EVERY)
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


def public_ops() -> list[str]:
    """The functions of bitfuse that compute, by name."""
    made = [name for name in bitfuse.__all__ if inspect.isfunction(getattr(bitfuse, name))]
    ops = [n for n in made if getattr(bitfuse, n).__module__.startswith("bitfuse.ops.")]
    return [*ops, "adamw8bit"]  # AdamW8bit's step


@pytest.mark.parametrize("op", public_ops())
def test_every_public_op_is_explained_and_compiled(op: str) -> None:
    """By the name that it is called by, on any device; and `bitfuse compile` knows its Triton kernels."""
    assert op in EVERY, f"{op} is public: declare it"
    for gpu in (None, find("h100"), find("a100")):
        explanation = explain_sizes(op, Sizes(), gpu)
        assert explanation.op == op and explanation.cost.nbytes > 0
        assert str(explanation).startswith(f"{op} on {explanation.device}: ")
    assert triton_kernels.has_kernels(op)
    assert triton_kernels.sizes(op, [SHAPES["llama3-8b"]], ["int4"], [torch.bfloat16])


def test_calls_of_several_parts_count_them_all() -> None:
    """The product that adapters add to is a part of the call; a gated MLP is three projections and more."""
    product = explain_sizes("lowbit_linear", Sizes(m=64), None).cost
    many = explain_sizes("multi_lora_linear", Sizes(m=64), None)
    assert many.cost.nbytes > product.nbytes and many.cost.flops > product.flops
    assert "product: lowbit_linear" in str(many)
    dense = explain_sizes("multi_lora_linear", Sizes(m=64, format="dense"), None)
    assert dense.cost.nbytes > 2 * 4096 * 4096 and dense.cost.flops == many.cost.flops
    single = explain_sizes("lora_linear", Sizes(m=64), None).cost
    mlp = explain_sizes("lora_mlp", Sizes(m=64), None)
    assert mlp.cost.flops == 3 * single.flops and mlp.cost.nbytes > 2.5 * single.nbytes
    mixed = explain_sizes("lora_mlp", Sizes(), find("h100"))
    assert mixed.chosen == "cuda" and "activation: gated_activation by triton" in str(mixed)


def test_calls_of_nothing() -> None:
    w, x, ids = bitfuse.quantize(torch.randn(16, 128)), torch.randn(3, 128), torch.full((3,), -1)
    said = bitfuse.explain(bitfuse.multi_lora_linear, x, w, [], [], 1.0, ids)
    assert said.op == "multi_lora_linear" and said.note == "no adapters"
    cache = bitfuse.KVCache(0, 64, 2, 16, page_size=16, dtype=torch.float32)
    assert bitfuse.explain(bitfuse.decode_attention, torch.zeros(0, 1, 4, 16), cache).cost.flops == 0
    for op in EVERY:
        names = ("rank", "m", "batch", "seqlen", "kv_len")
        least: dict[str, Any] = {n: 0 for n in names if n in EVERY[op].uses}
        try:
            explain_sizes(op, Sizes(**least, page_size=16), None)
        except ValueError as error:  # what the op itself refuses
            assert "\n" not in str(error)


def test_the_examples_of_the_help_are_served() -> None:
    """Each of them, by a kernel."""
    examples = re.findall(
        r"^ +bitfuse explain (.*)", CliRunner().invoke(app, ["explain", "--help"]).stdout, re.M
    )
    assert len(examples) > 3
    for example in examples:
        code, out, err = run(*example.split())
        assert code == 0 and re.search(": (cuda|triton) runs", out), (example, out, err)
        assert "not cuda: " not in out or "above 64" in out or "sm_90" in out or "9.0" in out, out


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
        (("lowbit_linear", "--m", "9" * 23), "expected at most 2147483647"),
        (("attention", "--seqlen", "99999999"), "expected at most 16777216"),
        (("attention", "--batch", "2147483647", "--seqlen", "16777216"), "there is no call of these sizes"),
        (("attention", "--heads", "30"), "q has 30 heads and k 8"),
        (("attention", "--dtype", "int8"), "no dtype 'int8'"),
        (("decode_attention", "--cache", "fp4"), "format is 'fp4'"),
        (("decode_attention", "--page-size", "17"), "page_size is 17"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1, (out, err)

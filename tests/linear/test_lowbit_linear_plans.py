"""How the CUDA kernel's work is cut on cards that are not here, and that `bitfuse tune` can say otherwise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import bitfuse
import cusim
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.core.device import Device, device_of, pretend
from bitfuse.core.gpus import GPUS, Gpu
from bitfuse.ops.linear import lowbit_linear_cuda as cuda
from bitfuse.ops.linear.lowbit_linear import forward_op

native = pytest.importorskip("bitfuse._cuda")

CARDS = ("a100", "h100", "h200", "b200", "rtx4090")
SHAPES = (  # n, k
    (1024, 4096), (4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (8192, 8192),
    (8192, 28672),
)  # fmt: skip
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
FORMATS = ("int4", "nf4", "int8")


def problem(gpu: Gpu, m: int, n: int, k: int, format: str) -> tuple[Any, ...]:
    info = cuda._info(Device(0, gpu.capability, gpu.multiprocessors), gpu)
    return m, n, k, cuda._code(format), False, info


@pytest.mark.parametrize("card", CARDS)
def test_a_plan_is_near_the_best_and_fills_the_machine(card: str) -> None:
    gpu = GPUS[card]
    for (n, k), m, format in itertools.product(SHAPES, ROWS, FORMATS):
        plans = native.lowbit_linear_plans(*problem(gpu, m, n, k, format))
        plan = native.plan_lowbit_linear(*problem(gpu, m, n, k, format))
        what = f"{card} {n} x {k} {format} M={m}: {plan!r}"
        if not plans:
            assert plan.token_tiles == 0 and not gpu.arch.roomy, what
            continue
        assert plan.clocks <= 1.15 * plans[0].clocks, what
        blocks, memory = plan.tiles * plan.splits, n * k * (8 if format == "int8" else 4) / 8
        memory /= 0.9 * gpu.memory_bytes * gpu.multiprocessors
        if blocks < 0.9 * gpu.multiprocessors and memory < 0.55 * plan.clocks:  # bytes are not the bound
            full = [p.clocks for p in plans if p.tiles * p.splits >= 0.9 * gpu.multiprocessors]
            assert min(full, default=math.inf) > 1.1 * plan.clocks, what
            assert not gpu.arch.roomy or blocks >= 0.55 * gpu.multiprocessors, what


# microseconds that a review on paper expects of 4096 x 4096 and 28672 x 4096 on an H200, by M, where it found
# the cut of version 0.1 sound
REVIEW = {
    ("int4", 4096): {1: 5.6, 8: 6.3, 16: 7.3, 32: 8.8, 64: 10.2},
    ("int4", 28672): {1: 20.2, 8: 24.7, 16: 23.3, 32: 32.5, 64: 41.3},
    ("nf4", 4096): {1: 6.1, 8: 6.5, 16: 7.5, 32: 9.1, 64: 10.3},
    ("int8", 4096): {1: 7.7, 8: 8.4},
    ("int8", 28672): {1: 33.4, 8: 37.8, 16: 35.6, 32: 50.0, 64: 61.0},
}


def test_the_model_agrees_with_the_review() -> None:
    gpu = GPUS["h200"]
    for (format, n), times in REVIEW.items():
        for m, microseconds in times.items():
            plan = native.plan_lowbit_linear(*problem(gpu, m, n, 4096, format))
            expected = plan.clocks / gpu.clock_ghz / 1e3 + 0.8  # to launch it
            assert 0.75 < expected / microseconds < 1.3, (format, n, m, expected, plan)


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_eight_bits_of_sixteen_tokens_use_the_whole_machine(card: str) -> None:
    """Version 0.1 cut 4096 x 4096 into 64 blocks for 132 multiprocessors."""
    for format, m in itertools.product(("int8", "fp8"), (12, 16, 24, 32)):
        plan = native.plan_lowbit_linear(*problem(GPUS[card], m, 4096, 4096, format))
        assert plan.tiles * plan.splits >= 119, plan


def test_cards_of_one_architecture_are_told_apart() -> None:
    w, x = bitfuse.quantize(torch.randn(64, 256), "int4"), torch.randn(1, 256).half()
    for card in ("h100", "h200"):
        with pretend(GPUS[card]):
            assert bitfuse.explain(bitfuse.lowbit_linear, x, w).chosen
    device = Device(0, 90, 132)
    assert cuda._info(device, GPUS["h200"]).memory_bytes == pytest.approx(4800 / (132 * 1.98), rel=0.01)
    assert cuda._info(device, GPUS["h100"]).memory_bytes == pytest.approx(3352 / (132 * 1.98), rel=0.01)


@pytest.mark.parametrize("target", targets("cuda"), ids=str)
def test_every_cut_gives_the_product(target: Target) -> None:
    """Those that `bitfuse tune` measures, whatever the model takes them for."""
    w, x = bitfuse.quantize(torch.randn(136, 4096) / 64, "int4"), torch.randn(3, 4096).half()
    exact, plain = x.double() @ w.dequantize().double().T, x @ w.dequantize(torch.float16).T
    args = (*target.place(x), target.place_weight(w).op_args, None)
    with cusim.device(multiprocessors=64, racecheck=2, resident=16):
        device = device_of(args[0].device)
        cuts = cuda.candidates(3, 136, 4096, "int4", False, device)
        assert len(cuts) > 4 and len({c.log_warps_n for c in cuts}) > 1
        for cut in target.pick(cuts):
            with cuda.trying(cut):
                plan = cuda._plan(3, 136, 4096, "int4", False, device)
                assert (plan.log_warps_n, plan.splits) == cut
                assert_accurate(target.run(forward_op, *args).cpu(), exact, plain, f"{plan!r}")
        with cuda.trying(cuda.Cut(0, 63)):  # one that can't be: the model's, then
            plan = cuda._plan(3, 136, 4096, "int4", False, device)
            assert cuda.Cut(plan.log_warps_n, plan.splits) == cuts[0]


def test_splits_begin_where_they_would_by_division() -> None:
    """As the kernel finds them without one: csrc/cuda/linear/lowbit_linear.cuh, first_chunk."""
    for splits in range(1, 65):
        inverse = -(-(1 << 20) // splits)
        for left, split in itertools.product(range(splits), range(splits + 1)):
            assert left * split * inverse >> 20 == left * split // splits and left * split * inverse < 2**31

"""What only the CPU backend has: instruction-set levels, threads, scratch, and bindings that check integers.

That its numbers are right is tested with every other backend's, in test_lowbit_linear.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.core.cpu import strided_rows
from bitfuse.ops.linear import lowbit_linear_cpu as cpp
from levels import LEVELS

FORMATS = ("int4", "nf4", "fp4", "int8", "fp8")

pytestmark = pytest.mark.skipif(cpp._cpu is None, reason="bitfuse._cpu is not built")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The code in a fresh interpreter: a level is picked once a process."""
    path = str(Path(bitfuse.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([path, *sys.path]), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


# The rule of tests/accuracy.py at one level, for shapes around the widths of its tiles; a NaN code of FP8.
RULE = """
import torch, bitfuse
from accuracy import assert_accurate
from bitfuse.ops.linear.lowbit_linear import lowbit_linear_grad_x
from bitfuse import _cpu
torch.manual_seed(0)
for format in {formats}:
    for n, k, group in ((41, 24, 8), (27, 72, 24), (72, 136, -1), (201, 384, 64)):
        for symmetric in (True, False) if format.startswith("int") else (None,):
            w = bitfuse.quantize(torch.randn(n, k), format, group_size=group, symmetric=symmetric)
            for m in (1, 3, 5, 9, 100):
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    x, grad = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
                    exact, plain = w.dequantize().double(), w.dequantize().to(dtype)
                    what = f"{{_cpu.isa()}} {{format}} {{n}}x{{k}} group {{group}} m={{m}} {{dtype}}"
                    assert_accurate(bitfuse.lowbit_linear(x, w), x.double() @ exact.T, x @ plain.T, what)
                    gx = lowbit_linear_grad_x(grad, w.op_args)
                    assert_accurate(gx, grad.double() @ exact, grad @ plain, "gradient, " + what)
w = bitfuse.quantize(torch.randn(23, 72), "fp8")
w.qweight[5, 70] = 0xFF
for m in (1, 5, 100):
    for dtype in (torch.float32, torch.bfloat16):
        nan = bitfuse.lowbit_linear(torch.ones(m, 72, dtype=dtype), w).isnan()
        assert nan[:, 5].all() and int(nan.sum()) == m
        nan = lowbit_linear_grad_x(torch.ones(m, 23, dtype=dtype), w.op_args).isnan()
        assert nan[:, 70].all() and int(nan.sum()) == m
print(_cpu.isa())
"""


@pytest.mark.parametrize("level", LEVELS)
def test_level_meets_the_accuracy_rule(level: str) -> None:
    done = python(RULE.format(formats=FORMATS), BITFUSE_CPU_ISA=level, BITFUSE_BACKEND="cpp")
    if "does not support" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [level]


def test_unknown_level_is_refused_by_name() -> None:
    done = python("import bitfuse", BITFUSE_CPU_ISA="sse9")
    assert done.returncode != 0
    assert f"ValueError: BITFUSE_CPU_ISA is 'sse9', expected one of {', '.join(LEVELS)}" in done.stderr


def test_the_widest_level_is_the_default() -> None:
    done = python("from bitfuse import _cpu; print(_cpu.isa())", BITFUSE_CPU_ISA="")
    assert done.stdout.strip() in LEVELS
    if "avx512_bf16" in Path("/proc/cpuinfo").read_text():
        assert done.stdout.strip() == "avx512bf16"


@pytest.mark.parametrize("m", [1, 16, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(m: int, dtype: torch.dtype) -> None:
    w = bitfuse.quantize(torch.randn(520, 1032), "int4", group_size=24)
    x, grad = torch.randn(m, 1032).to(dtype), torch.randn(m, 520).to(dtype)
    forward: tuple[Any, ...] = (x, w.op_args, None)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append((cpp.run(*forward), cpp.run_grad_x(grad, w.op_args)))
    finally:
        torch.set_num_threads(before)
    for y, gx in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(gx, found[0][1])


def test_calls_from_several_threads_do_not_share_scratch() -> None:
    w = bitfuse.quantize(torch.randn(256, 512), "nf4")
    inputs = [torch.randn(m, 512) for m in (1, 3, 20, 150)]
    expected = [bitfuse.lowbit_linear(x, w) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(bitfuse.lowbit_linear(inputs[i], w), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": 0}, "x is null"),
        ({"x": 2}, "x is 2, expected a multiple of 4"),
        ({"dtype": 7}, "dtype is 7"),
        ({"rows": -1}, "rows is -1"),
        ({"row_stride": -8}, "row_stride is -8"),
        ({"codes": 0}, "codes is null"),
        ({"scales": 0}, "scales is null"),
        ({"scale_kind": 9}, "scale_kind is 9"),
        ({"scale_kind": 3}, "scale_table is null"),
        ({"values": 0}, "values is null"),
        ({"code_kind": -1}, "code_kind is -1"),
        ({"n": -1}, "n is -1, expected 0 or more"),
        ({"k": 0}, "k is 0"),
        ({"group_size": 24}, "group_size is 24"),
        ({"rows": 1 << 40, "row_stride": 1 << 40}, "x is larger than memory"),
        ({"out": 0}, "out is null"),
    ],
)
def test_the_binding_refuses_wrong_integers(change: dict[str, int], words: str) -> None:
    x, out = torch.zeros(2, 64), torch.zeros(2, 16)
    w = bitfuse.quantize(torch.randn(16, 64), "int4", group_size=32)
    code_kind, values, zero_point = cpp._code("int4")  # type: ignore[misc]
    arguments: dict[str, Any] = {
        "x": x.data_ptr(), "dtype": 0, "rows": 2, "row_stride": 64, "codes": w.qweight.data_ptr(),
        "scales": w.scales.data_ptr(), "scale_kind": 1, "zeros": 0, "scale_table": 0, "scale_scales": 0,
        "scale_offset": 0, "values": values, "code_kind": code_kind, "zero_point": zero_point, "n": 16,
        "k": 64, "group_size": 32, "bias": 0, "out": out.data_ptr(),
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        cpp._cpu.lowbit_linear(*{**arguments, **change}.values())


def test_rows_are_addressed_where_they_lie() -> None:
    x = torch.randn(4, 3, 80)
    views = ((x[..., :64], False), (x[:, 1, :64], False), (x[:, :2, :64], True), (x.mT[:, :64], True))
    for view, copied in views:
        got, stride = strided_rows(view)
        assert (got is not view) == copied
        shape = (view[..., 0].numel(), view.shape[-1])
        assert torch.equal(got.as_strided(shape, (stride, 1)), view.reshape(shape))

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
from bitfuse.ops.linear.lowbit_linear import forward_op
from bitfuse.weights.formats import get_format
from bitfuse.weights.weight import WeightTensors
from levels import LEVELS
from test_weight import BUILT_IN

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
zeros, offset, shared = [dict(symmetric=True), dict(symmetric=False)], dict(offset=True), dict(scale_rows=16)
cases = [("int4", zeros), ("nf4", [dict()]), ("fp4", [dict()]), ("int8", zeros), ("fp8", [dict()]),
         ("int4", [offset, dict(symmetric=False, scale_rows=16)]), ("int8", [offset]), ("fp8", [shared]),
         ("int3", [*zeros, offset]), ("int2", [*zeros, offset]), ("ternary", [dict()])]
for format, variants in cases:
    for n, k, group in ((41, 24, 8), (27, 72, 24), (72, 136, -1), (201, 384, 64)):
        for options in variants:
            w = bitfuse.quantize(torch.randn(n, k), format, group_size=group, **options)
            for m in (1, 3, 5, 9, 100):
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    x, grad = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
                    exact, plain = w.dequantize().double(), w.dequantize().to(dtype)
                    what = f"{_cpu.isa()} {format} {options} {n}x{k} {group} m={m} {dtype}"
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
    done = python(RULE, BITFUSE_CPU_ISA=level, BITFUSE_BACKEND="cpp")
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


def at(address: int, *shape: int, strides: tuple[int, ...] | None = None, dtype: str = "FLOAT32") -> Any:
    """A descriptor of numbers that may be anybody's."""
    return cpp._cpu.Tensor(address, getattr(cpp._cpu.Dtype, dtype), shape, strides)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": (0, 2, 64)}, "x is null"),
        ({"x": (2, 2, 64)}, "x is 2, expected a multiple of 4"),
        ({"x": (64, -1, 64)}, "x is -1, expected 0 rows"),
        ({"x": (64, 2, 63)}, r"x is of shape \[2, 63\], expected the last dimension to be 64"),
        ({"x": (64, 1 << 40, 1 << 40)}, "x is larger than memory"),
        ({"qweight": (0, 16, 32)}, "qweight is null"),
        ({"qweight": (64, -1, 32)}, "qweight is -1, expected 0 rows"),
        ({"qweight": (64, 16, 0)}, "qweight is 0"),
        ({"qweight": (64, 16, 31)}, "in_features is 62, expected a multiple of 8"),
        ({"scales": (0, 16, 2)}, "scales is null"),
        ({"scales": (64, 16, 1)}, r"scales is of shape \[16, 1\], expected \[16, 2\]"),
        ({"zeros": (64, 16, 1)}, r"zeros is of shape \[16, 1\], expected \[16, 2\]"),
        ({"scale_offset": (64, 1)}, "scales is of dtype float32, expected uint8"),
        ({"scale_scales": (64, 1)}, "scale_scales is given, expected none"),
        ({"group_size": 24}, "group_size is 24"),
        ({"group_size": -32}, "group_size is -32"),
        ({"format": "no such"}, "format is no such"),
        ({"offsets": (64, 16, 1)}, r"offsets is of shape \[16, 1\], expected \[16, 2\]"),
        ({"offsets": (64, 16, 2), "zeros": (64, 16, 2)}, "offsets is given beside zeros"),
        ({"offsets": (64, 16, 2), "format": "nf4"}, "offsets is given, expected none"),
        ({"scale_rows": 2}, r"scales is of shape \[16, 2\], expected \[8, 2\]"),
        ({"scale_rows": 0}, "scale_rows is 0, expected 1 or more"),
        ({"bias": (64, 15)}, r"bias is of shape \[15\], expected \[16\]"),
        ({"out": (0, 2, 16)}, "out is null"),
        ({"out": (64, 3, 16)}, r"out is of shape \[3, 16\]"),
    ],
)
def test_the_binding_refuses_wrong_numbers(change: dict[str, Any], words: str) -> None:
    assert cpp._known("int4") and cpp._known("nf4")  # the extension knows the formats
    memory = torch.zeros(64, 64)
    parts: dict[str, Any] = {
        "x": (64, 2, 64), "qweight": (64, 16, 32), "scales": (64, 16, 2), "zeros": None, "scale_scales": None,
        "scale_offset": None, "format": "int4", "group_size": 32, "offsets": None, "scale_rows": 1,
        "bias": None, "out": (64, 2, 16),
    }  # fmt: skip

    def made(name: str, value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        address, *shape = value
        dtype = "UINT8" if name in ("qweight", "zeros") else "FLOAT32"
        return at(memory.data_ptr() if address == 64 else address, *shape, dtype=dtype)

    tensors = {name: made(name, value) for name, value in parts.items()}
    weight = cpp._cpu.WEIGHT_FIELDS
    cpp._cpu.lowbit_linear(tensors["x"], tuple(tensors[n] for n in weight), None, tensors["out"])
    tensors |= {name: made(name, value) for name, value in change.items()}
    with pytest.raises(ValueError, match=words):
        arguments = tensors["x"], tuple(tensors[n] for n in weight), tensors["bias"], tensors["out"]
        cpp._cpu.lowbit_linear(*arguments)


def test_the_binding_refuses_what_is_no_tensor_and_no_weight() -> None:
    x, out = torch.zeros(2, 64), torch.zeros(2, 16)
    w = bitfuse.quantize(torch.randn(16, 64), "int4", group_size=32).op_args
    assert cpp._known("int4")
    with pytest.raises(TypeError, match="x is a float, expected a tensor"):
        cpp._cpu.lowbit_linear(1.0, w, None, out)
    with pytest.raises(TypeError, match="weight is a list, expected a WeightTensors"):
        cpp._cpu.lowbit_linear(x, list(w), None, out)
    with pytest.raises(ValueError, match="x is of dtype float64, expected float32, float16 or bfloat16"):
        cpp._cpu.lowbit_linear(x.double(), w, None, out)
    with pytest.raises(ValueError, match="qweight is of strides"):
        cpp._cpu.lowbit_linear(x, w._replace(qweight=w.qweight.t().contiguous().t()), None, out)


def test_the_fields_of_a_weight() -> None:
    assert WeightTensors._fields == cpp._cpu.WEIGHT_FIELDS


def having(format: str, options: dict[str, Any]) -> bool:
    """Whether a format has these options."""
    try:
        get_format(format, **options)
    except ValueError:
        return False
    return True


FORMS = [
    (format, options)
    for format in ("int4", "nf4", "int8", "fp8", "mxfp8", "mxfp4", "nvfp4", "int3", "int2", "ternary")
    for options in ({}, {"symmetric": False}, {"nested": True})
    if having(format, options)
]


@pytest.mark.parametrize("format", BUILT_IN)
def test_every_format_is_served(format: str) -> None:
    grown: list[dict[str, Any]] = [{}, {"offset": True}, {"scale_rows": 8}]
    for options in grown:
        if having(format, options):
            w = bitfuse.quantize(torch.randn(16, 128), format, **options)
            assert cpp.supports(torch.randn(2, 128), w.op_args, None) is None
            assert cpp.supports_grad_x(torch.randn(2, 16), w.op_args) is None


@pytest.mark.parametrize(("format", "options"), FORMS, ids=str)
def test_the_direct_way_has_the_same_bits(format: str, options: dict[str, bool]) -> None:
    w = bitfuse.quantize(torch.randn(48, 64), format, **options)  # type: ignore[arg-type]
    bias = torch.randn(48)
    for x in (torch.randn(64), torch.randn(3, 64), torch.randn(2, 3, 80)[..., :64]):
        assert cpp.supports(x, w.op_args, bias) is None
        direct = cpp.direct(x, w.op_args, bias)
        assert direct.shape == (*x.shape[:-1], 48)
        assert torch.equal(direct, cpp.run(x, w.op_args, bias))


def test_the_direct_way_leaves_the_rest_to_the_op() -> None:
    x, w, bias = torch.randn(3, 64), bitfuse.quantize(torch.randn(48, 64), "int4").op_args, torch.randn(48)
    assert cpp.direct(x, w, bias) is not None
    nothing: Any = None
    for wrong in (
        (x.double(), w, bias), (x[:, :63], w, bias), (x[0, 0], w, bias), (x[:0], w, bias), (1.0, w, bias),
        (x.to("meta"), w, bias), (x.to_sparse(), w, bias), (torch._neg_view(x), w, bias),
        (x, w, torch._neg_view(bias)), (x, w, bias.double()), (x, w, bias[:47]), (x, w, 1.0),
        (x, w._replace(qweight=w.qweight[:, :31]), bias), (x, w._replace(scales=w.scales[:47]), bias),
        (x, w._replace(group_size=0), bias), (x, w._replace(format="no such"), bias), (x, tuple(w)[:6], bias),
        (x, w._replace(scale_rows=2), bias),
        (x, w._replace(offsets=w.scales[:47]), bias),
        (x, w._replace(qweight=nothing), bias), (x.t().contiguous().t(), w, bias),
    ):  # fmt: skip
        assert cpp.direct(*wrong) is None
    # as the rest of the op has it
    assert torch.equal(forward_op(torch._neg_view(x), w, bias), forward_op(-x, w, bias))
    assert torch.equal(forward_op(x.t().contiguous().t(), w, bias), forward_op(x, w, bias))


def test_rows_are_addressed_where_they_lie() -> None:
    x = torch.randn(4, 3, 80)
    views = ((x[..., :64], False), (x[:, 1, :64], False), (x[:, :2, :64], True), (x.mT[:, :64], True))
    for view, copied in views:
        got, stride = strided_rows(view)
        assert (got is not view) == copied
        shape = (view[..., 0].numel(), view.shape[-1])
        assert torch.equal(got.as_strided(shape, (stride, 1)), view.reshape(shape))

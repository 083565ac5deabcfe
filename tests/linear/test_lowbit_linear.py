"""lowbit_linear and its gradient: every backend, one test."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import Errors, assert_accurate
from backends import Target, targets
from bitfuse.ops.linear.lowbit_linear import forward_op, lowbit_linear_grad_x
from bitfuse.weights.formats import FORMATS
from test_weight import EVERY, FEWER_BITS, GROWN, LATER, name_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# m, n, k: one of a kind, no multiples of any tile, several tiles; k is a multiple of the group
SHAPES = [(1, 8, 0), (3, 41, 1), (17, 72, 2), (1, 264, 3), (70, 137, 2)]

# what the decode kernel leaves to Triton, and says so
REFUSED = re.compile("float32|M = ")


def columns(options: dict[str, Any], factor: int) -> int:
    """in_features of the factor-th shape: the smallest, a few groups, or for whole-row scales an odd multiple
    of 8."""
    group = options.get("group_size") or FORMATS[options["format"]].group_size
    return (8, 88, 264, 1000)[factor] if group == -1 else group * (1, 3, 5, 8)[factor]


def make(
    target: Target, shape: tuple[int, int, int], options: dict[str, Any], dtype: torch.dtype
) -> tuple[Any, ...]:
    m, n, factor = shape
    k = columns(options, factor)
    w = bitfuse.quantize(torch.randn(n, k) / k**0.5, **options)
    x, bias, grad = (
        torch.randn(m, k, dtype=dtype),
        torch.randn(n, dtype=dtype),
        torch.randn(m, n, dtype=dtype),
    )
    return w, *target.place(x, bias, grad), target.place_weight(w)


@pytest.mark.parametrize("options", EVERY, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"), ids=str)
def test_forward(target: Target, dtype: torch.dtype, options: dict[str, Any]) -> None:
    for i, shape in enumerate(target.pick(SHAPES)):
        w, x, bias, _, placed = make(target, shape, options, dtype)
        with_bias = i % 2 == 0
        exact = torch.nn.functional.linear(x.double().cpu(), w.dequantize().double())
        plain = torch.nn.functional.linear(x.cpu(), w.dequantize(dtype), bias.cpu() if with_bias else None)
        if with_bias:
            exact = exact + bias.double().cpu()
        args = (x, placed.op_args, bias if with_bias else None)
        if reason := target.reason(forward_op, *args):
            assert target.backend == "cuda" and REFUSED.search(reason), reason
            continue
        got = target.run(forward_op, *args)
        assert_accurate(got.cpu(), exact, plain, f"{shape} bias={with_bias}")
        assert torch.equal(got, target.run(forward_op, *args)), "another run, other numbers"


@pytest.mark.parametrize("options", EVERY, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", targets("cpp", "triton", "reference"), ids=str)
def test_grad_x(target: Target, dtype: torch.dtype, options: dict[str, Any]) -> None:
    for shape in target.pick(SHAPES):
        w, _, _, grad, placed = make(target, shape, options, dtype)
        exact = grad.double().cpu() @ w.dequantize().double()
        plain = grad.cpu() @ w.dequantize(dtype)
        got = target.run(lowbit_linear_grad_x, grad, placed.op_args)
        assert_accurate(got.cpu(), exact, plain, f"{shape}")
        assert torch.equal(got, target.run(lowbit_linear_grad_x, grad, placed.op_args)), (
            "another run, other numbers"
        )


# heads of few labels: too few rows for a tile, a quad, an eight; each group size that divides 576
NARROW = [
    dict(format="int4", group_size=8, symmetric=False),
    dict(format="nf4", group_size=16, nested=True),
    dict(format="fp8", group_size=32),
    dict(format="int8", group_size=64),
    dict(format="nf4", group_size=64),
]


@pytest.mark.parametrize("options", NARROW, ids=name_of)
@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"), ids=str)
def test_any_out_features(target: Target, options: dict[str, Any]) -> None:
    cases = [(m, n) for n in (1, 3, 5, 7, 9, 12) for m in (1, 3, 40)]
    if target.sm:  # where each compiles kernels: all sizes, but not of each format
        few = 1 + 2 * NARROW.index(options)
        cases = [(1, few), (40, 10 - few)]
    errors = Errors()
    for i, (m, n) in enumerate(cases):
        dtype = torch.bfloat16 if target.sm else DTYPES[(i + i // 3) % 3]
        w = bitfuse.quantize(torch.randn(n, 576) / 24, **options)
        random = (torch.randn(size).to(dtype) for size in ((m, 576), (m, n), (n,)))
        placed, (x, grad, bias) = target.place_weight(w).op_args, target.place(*random)
        exact, dense = w.dequantize().double(), w.dequantize(dtype)
        if reason := target.reason(forward_op, x, placed, bias):
            assert target.backend == "cuda" and (REFUSED.search(reason) or options["group_size"] < 32)
            continue
        wanted = x.cpu().double() @ exact.T + bias.cpu().double()
        plain = torch.nn.functional.linear(x.cpu(), dense, bias.cpu())
        errors.add("y", target.run(forward_op, x, placed, bias), wanted, plain)
        if target.backend != "cuda":
            got = target.run(lowbit_linear_grad_x, grad, placed)
            errors.add("x'", got, grad.cpu().double() @ exact, grad.cpu() @ dense)
    errors.check(str(target))


@pytest.mark.parametrize("target", targets("cpp", "reference"), ids=str)
def test_a_vocabulary_of_50257(target: Target) -> None:
    for m, dtype in ((1, torch.float32), (3, torch.bfloat16), (20, torch.bfloat16)):
        w, x, bias, grad, placed = make(target, (m, 50257, 0), dict(format="int4", group_size=64), dtype)
        exact, dense = w.dequantize().double(), w.dequantize(dtype)
        got = target.run(forward_op, x, placed.op_args, bias)
        wanted = x.cpu().double() @ exact.T + bias.cpu().double()
        assert_accurate(got.cpu(), wanted, torch.nn.functional.linear(x.cpu(), dense, bias.cpu()))
        got = target.run(lowbit_linear_grad_x, grad, placed.op_args)
        assert_accurate(got.cpu(), grad.cpu().double() @ exact, grad.cpu() @ dense)


@pytest.mark.parametrize(
    "options", [dict(format=name) for name in ("int8", "int4", "nf4", "fp8")], ids=name_of
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"), ids=str)
def test_no_bias_builds_up(target: Target, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Where all of x is positive, a level of the codebook that is rounded one way shifts every output."""
    for m in (2, 33):
        w = bitfuse.quantize(torch.randn(32, 4096) / 64, **options)
        x = torch.rand(m, 4096, dtype=dtype)
        exact, plain = x.double() @ w.dequantize().double().T, x @ w.dequantize(dtype).T
        args = target.place_weight(w).op_args
        given = (target.place(x)[0], args, None)
        if target.reason(forward_op, *given) is None:
            assert_accurate(target.run(forward_op, *given).cpu(), exact, plain, f"{m} rows")


@pytest.mark.parametrize("options", LATER, ids=name_of)
@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"), ids=str)
def test_a_format_that_a_backend_lacks_is_refused_and_never_served_wrong(
    target: Target, options: dict[str, Any]
) -> None:
    w = bitfuse.quantize(torch.randn(32, 128), **(options | dict(group_size=64)))
    dtype = torch.float16 if target.backend == "cuda" else torch.float32
    x, grad = target.place(torch.randn(2, 128, dtype=dtype), torch.randn(2, 32, dtype=dtype))
    args = target.place_weight(w).op_args
    dense = w.dequantize()
    for op, given, exact, plain in (
        (
            forward_op,
            (x, args, None),
            x.cpu().double() @ dense.double().T,
            x.cpu() @ dense.to(dtype).T,
        ),
        (
            lowbit_linear_grad_x,
            (grad, args),
            grad.cpu().double() @ dense.double(),
            grad.cpu() @ dense.to(dtype),
        ),
    ):
        if not any(b.name == target.backend for b in op.backends):
            continue
        if target.reason(op, *given) is None:
            assert_accurate(target.run(op, *given).cpu(), exact, plain)


@pytest.mark.parametrize("options", [*GROWN, *FEWER_BITS, dict(format="ternary")], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"), ids=str)
def test_offsets_shared_scales_and_narrow_codes(
    target: Target, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Both directions, by whoever does not refuse; out_features are no multiple of the rows that share."""
    for shape in target.pick(SHAPES):
        w, x, bias, grad, placed = make(target, shape, options, dtype)
        exact, dense = w.dequantize().double(), w.dequantize(dtype)
        if reason := target.reason(forward_op, x, placed.op_args, bias):
            assert "it has no kernel for" in reason or REFUSED.search(reason), reason
        else:
            got = target.run(forward_op, x, placed.op_args, bias)
            wanted = x.cpu().double() @ exact.T + bias.cpu().double()
            assert_accurate(
                got.cpu(), wanted, torch.nn.functional.linear(x.cpu(), dense, bias.cpu()), f"{shape}"
            )
        if target.backend == "cuda" or target.reason(lowbit_linear_grad_x, grad, placed.op_args):
            continue
        got = target.run(lowbit_linear_grad_x, grad, placed.op_args)
        assert_accurate(got.cpu(), grad.cpu().double() @ exact, grad.cpu() @ dense, f"{shape}")


@pytest.mark.parametrize("target", targets("cpp", "reference"), ids=str)
def test_offsets_that_scales_drown_under(target: Target) -> None:
    """Groups of one number, whose scale is 0; of numbers far from 0; codes under a scale of 0."""
    for m in (4, 20, 200):  # of one row, one sum of 1e4 decides
        w = bitfuse.quantize(
            torch.randn(40, 128), "int4", group_size=32, offset=True, scale_dtype=torch.float32
        )
        assert w.offsets is not None
        w.scales[3] = 0
        w.scales[5:9, 1] = 1e-30
        w.offsets[7] = -1e4
        w.offsets[11] = 0
        w.scales[11, 2] = 0
        x, grad = torch.randn(m, 128), torch.randn(m, 40)
        exact, dense = w.dequantize().double(), w.dequantize()
        got = target.run(forward_op, x, w.op_args, None)
        assert_accurate(got, x.double() @ exact.T, x @ dense.T, f"{m} rows")
        got = target.run(lowbit_linear_grad_x, grad, w.op_args)
        assert_accurate(got, grad.double() @ exact, grad @ dense, f"{m} rows")


def wide_case() -> tuple[torch.Tensor, bitfuse.LowBitWeight, torch.Tensor]:
    return torch.randn(4, 128), bitfuse.quantize(torch.randn(64, 128), "int4"), torch.randn(64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    for options in (*EVERY, *GROWN):
        w = bitfuse.quantize(torch.randn(16, 128), **options)
        x, bias, grad = (
            torch.randn(2, 3, 128, dtype=dtype),
            torch.randn(16, dtype=dtype),
            torch.randn(2, 3, 16, dtype=dtype),
        )
        torch.library.opcheck(
            torch.ops.bitfuse.lowbit_linear.default, (x, *w.op_args[:5], bias, *w.op_args[5:])
        )
        torch.library.opcheck(torch.ops.bitfuse.lowbit_linear_grad_x.default, (grad, *w.op_args))


def test_compiles_without_a_break() -> None:
    x, w, bias = wide_case()
    compiled = torch.compile(bitfuse.lowbit_linear, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x, w, bias), bitfuse.lowbit_linear(x, w, bias))
    x.requires_grad_()
    bias.requires_grad_()
    wanted = torch.autograd.grad(bitfuse.lowbit_linear(x, w, bias).square().sum(), (x, bias))
    torch.testing.assert_close(torch.autograd.grad(compiled(x, w, bias).square().sum(), (x, bias)), wanted)


def test_exports() -> None:
    layer = bitfuse.nn.Linear.from_float(torch.nn.Linear(128, 64), "nf4")
    x = torch.randn(4, 128)
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x), layer(x))


def test_gradients_reach_only_what_asks_for_them() -> None:
    x, w, bias = wide_case()
    for x_grad in (False, True):
        for bias_grad in (False, True):
            a, b = x.clone().requires_grad_(x_grad), bias.clone().requires_grad_(bias_grad)
            y = bitfuse.lowbit_linear(a, w, b)
            assert y.requires_grad == (x_grad or bias_grad)
            if y.requires_grad:
                y.square().sum().backward()
            assert (a.grad is not None, b.grad is not None) == (x_grad, bias_grad)
    with torch.no_grad():
        assert not bitfuse.lowbit_linear(x.requires_grad_(), w, bias).requires_grad
    weights = torch.randn(4, 64)
    dense = torch.autograd.grad((torch.nn.functional.linear(x, w.dequantize(), bias) * weights).sum(), x)
    fused = torch.autograd.grad((bitfuse.lowbit_linear(x, w, bias) * weights).sum(), x)
    torch.testing.assert_close(fused, dense, rtol=1e-4, atol=1e-4)


def test_act_order_matches_the_dense_weight() -> None:
    w = bitfuse.quantize(torch.randn(64, 128), "int4", group_size=32, g_idx=torch.randperm(128) // 32)
    x = torch.randn(5, 128, requires_grad=True)
    y, dense = bitfuse.lowbit_linear(x, w), torch.nn.functional.linear(x, w.dequantize())
    torch.testing.assert_close(y, dense)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(dense.sum(), x))


def test_any_leading_shape_and_strides() -> None:
    _, w, bias = wide_case()
    wide = torch.randn(6, 4, 256)
    for x in (
        torch.randn(128), wide[:, :, :128], wide[:, :, ::2], wide.transpose(0, 1)[..., 128:],
        wide[0, 0, :128], torch.randn(128, 3).t(), torch.randn(1, 128).expand(5, 128),
        torch.randn(2, 1, 3, 128),
    ):  # fmt: skip
        torch.testing.assert_close(
            bitfuse.lowbit_linear(x, w, bias),
            torch.nn.functional.linear(x, w.dequantize(), bias),
            rtol=1e-4,
            atol=1e-4,
        )
    for shape in ((0, 128), (3, 0, 128)):
        x = torch.zeros(shape, requires_grad=True)
        y = bitfuse.lowbit_linear(x, w, bias)
        assert y.shape == (*shape[:-1], 64)
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == shape


BAD = [
    (dict(x=torch.randn(4, 128).double()), TypeError, "x has dtype torch.float64"),
    (dict(x=torch.zeros(4, 128, dtype=torch.int32)), TypeError, "x has dtype torch.int32"),
    (dict(x=[1.0]), TypeError, "x is a list, expected a tensor"),
    (dict(x=torch.randn(4, 120)), ValueError, "x has 120 features .* expected in_features = 128"),
    (dict(x=torch.tensor(1.0)), ValueError, r"x has shape \[\]"),
    (dict(x=torch.randn(4, 128, device="meta")), ValueError, "qweight is on cpu, expected meta"),
    (dict(w=torch.randn(64, 128)), TypeError, "w is a Tensor, expected a bitfuse.LowBitWeight"),
    (dict(bias=torch.randn(63)), ValueError, r"bias has shape \[63\], expected \[64\]"),
    (dict(bias=torch.randn(64).half()), TypeError, "bias has dtype torch.float16, expected torch.float32"),
    (dict(bias=torch.randn(64, device="meta")), ValueError, "bias is on meta, expected cpu"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD, ids=[b[2][:30] for b in BAD])
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    x, w, bias = wide_case()
    with pytest.raises(error, match=words):
        bitfuse.lowbit_linear(**{"x": x, "w": w, "bias": bias, **changes})


def test_the_torch_op_refuses_what_would_crash() -> None:
    """torch.ops takes tensors that no LowBitWeight has seen; nothing may reach native code unchecked."""
    x, w, _ = wide_case()
    op = torch.ops.bitfuse.lowbit_linear.default
    good = (x, *w.op_args[:5], None, *w.op_args[5:])
    op(*good)
    for at, value, words in (
        (1, w.qweight[:, :32], "x has 128 features and qweight has shape"),
        (1, w.qweight[:7], r"scales has shape \[64, 1\], expected \[7, 1\]"),
        (2, w.scales[:32], r"scales has shape \[32, 1\]"),
        (2, w.scales.double(), "scales has dtype torch.float64"),
        (3, torch.zeros(64, 2, dtype=torch.uint8), r"zeros has shape \[64, 2\]"),
        (4, torch.zeros(3), "scales has dtype torch.float16, expected torch.uint8"),
        (7, "int5", "format is 'int5'"),
        (8, 0, "group_size is 0"),
        (8, -128, "group_size is -128"),
        (8, 64, r"scales has shape \[64, 1\], expected \[64, 2\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            op(*good[:at], value, *good[at + 1 :])


PEAK = """
import resource, torch, bitfuse
from bitfuse.weights.formats import get_format
n, k = 8192, 4096
qweight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
w = bitfuse.LowBitWeight(qweight, torch.rand(n, k // 128).half(), get_format("int4"), (n, k))
small = bitfuse.quantize(torch.randn(64, 128), "int4")
for weight, rows in ((small, 64), (w, 64)):
    x = torch.randn(rows, weight.shape[1], dtype=torch.bfloat16, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bitfuse.lowbit_linear(x, weight).sum().backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(peak / 1024)
"""


def test_forward_and_backward_write_no_dense_weight() -> None:
    """In bfloat16 the dense weight would take 64 MiB; x, y and their gradients take 3."""
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    assert float(out) < 16, f"{out.strip()} MiB"

"""What is special to the CUDA kernel of lowbit_linear: how work is cut, rounding of codebooks, addresses."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import bitfuse
import cusim
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.core import cuda as counters
from bitfuse.core.device import device_of
from bitfuse.ops.linear import lowbit_linear_cuda as cuda
from bitfuse.ops.linear.lowbit_linear import forward_op
from bitfuse.weights.codebook import pairs_of_levels
from bitfuse.weights.formats import FORMATS, NF4
from bitfuse.weights.weight import WeightTensors

native = pytest.importorskip("bitfuse._cuda")

TARGETS = targets("cuda")
HALVES = [torch.float16, torch.bfloat16]
# multiprocessors, shared memory of a block and of a multiprocessor, capability, bytes of memory a clock
H100, A100 = (132, 232448, 233472, 90, 12.8), (108, 166912, 167936, 80, 13.4)
SMALL = (28, 101376, 102400, 86, 7.2)


@contextlib.contextmanager
def many_multiprocessors(target: Target) -> Iterator[None]:
    """Enough that a small matrix is worth splitting along k; races in global memory are faults too."""
    with (
        cusim.device(multiprocessors=64, racecheck=2, resident=16) if target.sm else contextlib.nullcontext()
    ):
        yield


def arguments(
    target: Target, x: torch.Tensor, w: bitfuse.LowBitWeight, bias: torch.Tensor | None = None
) -> tuple[Any, ...]:
    args = target.place_weight(w).op_args
    return (*target.place(x), args, None if bias is None else target.place(bias)[0])


def check(
    target: Target, x: torch.Tensor, w: bitfuse.LowBitWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    exact = x.double() @ w.dequantize().double().T
    plain = torch.nn.functional.linear(x, w.dequantize(x.dtype), bias)
    got = target.run(forward_op, *arguments(target, x, w, bias)).cpu()
    assert_accurate(got, exact if bias is None else exact + bias.double(), plain, f"{w.format} {x.shape}")
    return got


@pytest.mark.parametrize("format", ["int4", "nf4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_number_of_tokens(target: Target, dtype: torch.dtype, format: str) -> None:
    n = 104 if format == "int4" else 101
    w = bitfuse.quantize(torch.randn(n, 1152) / 34, format, group_size=64)
    for m in (1, 2, 8, 9, 16, 31, 64):
        check(target, torch.randn(m, 1152, dtype=dtype), w, torch.randn(n, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_offsets_and_shared_scales(target: Target, dtype: torch.dtype) -> None:
    """Every number of tokens' tiles, groups of a span, of several and of the row; offsets of every dtype;
    rows that are no multiple of those that share a scale."""
    for m, (format, group, scale_dtype) in zip(
        (1, 8, 12, 31, 64),
        itertools.cycle([
            ("int4", 32, torch.float16), ("int8", 96, torch.float32), ("int4", -1, torch.bfloat16),
            ("int8", 32, torch.float16), ("int4", 64, torch.float32),
        ]),
        strict=False,
    ):  # fmt: skip
        weight = torch.randn(101, 1152) / 34 + 0.02
        w = bitfuse.quantize(weight, format, group_size=group, offset=True, scale_dtype=scale_dtype)
        check(target, torch.randn(m, 1152, dtype=dtype), w, torch.randn(101, dtype=dtype))
    shared: tuple[tuple[int, dict[str, Any]], ...] = (
        (1, dict(format="fp8", group_size=128, scale_rows=128)),
        (9, dict(format="int8", group_size=64, scale_rows=32, symmetric=False)),
        (3, dict(format="int4", group_size=32, scale_rows=64, offset=True)),
        (20, dict(format="nf4", nested=True, scale_rows=32)),
    )
    for m, options in shared:
        w = bitfuse.quantize(torch.randn(300, 640) / 25, **options)
        check(target, torch.randn(m, 640, dtype=dtype), w)


@pytest.mark.parametrize("m", [1, 12, 40])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_blocks_that_split_k_are_added_in_one_order(target: Target, m: int) -> None:
    n, k = {1: 72, 12: 71, 40: 69}[m], 16384
    w = bitfuse.quantize(torch.randn(n, k) / k**0.5, "int4")
    x = torch.randn(m, k, dtype=torch.float16)
    with many_multiprocessors(target):
        device = device_of(torch.device("cpu"))
        assert cuda._plan(m, n, k, "int4", False, device).splits > 1
        first = check(target, x, w)
        for _ in range(2):  # another schedule each time
            assert torch.equal(check(target, x, w), first)
    assert not any(bool(kept.any()) for kept in counters._counters.values())


@pytest.mark.parametrize("k", [8, 24, 1000, 7392, 10944])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_rows_of_any_length(target: Target, k: int) -> None:
    for format in ("int4", "int8"):
        w = bitfuse.quantize(torch.randn(40, k) / k**0.5, format, group_size=-1)
        check(target, torch.randn(3, k, dtype=torch.bfloat16), w)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_groups_that_are_no_power_of_two(target: Target) -> None:
    for format, group in itertools.product(("int4", "int8"), (32, 96, 160, 320)):
        w = bitfuse.quantize(torch.randn(27, 960) / 31, format, group_size=group, symmetric=False)
        check(target, torch.randn(5, 960, dtype=torch.float16), w)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_rounding_of_a_codebook_does_not_add_up(target: Target, dtype: torch.dtype) -> None:
    """With x of one sign, a level that is always rounded the same way would show up k times."""
    w = bitfuse.quantize(torch.randn(64, 8192) / 90, "nf4")
    check(target, torch.rand(2, 8192).to(dtype), w)
    check(target, torch.ones(1, 8192, dtype=dtype), w)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_levels_are_rounded_to_neighbours_and_right_on_average(dtype: torch.dtype) -> None:
    exact = torch.tensor(NF4)
    pairs = pairs_of_levels(exact, dtype).double()
    byte = torch.arange(256)
    for half, code in ((0, byte & 15), (1, byte >> 4)):
        error = pairs[..., half] - exact.double()[code].unsqueeze(1)
        step = torch.finfo(dtype).eps * exact.double()[code].abs().log2().floor().exp2().nan_to_num(0)
        assert bool((error.abs() < step.unsqueeze(1) + 1e-30).all())
        assert float(error.mean().abs()) < torch.finfo(dtype).eps / 1000
        by_code = torch.stack([error[code == c].mean() for c in range(16)])
        assert float(by_code.abs().max()) < torch.finfo(dtype).eps / 20
    for name in ("fp4", "mxfp4"):
        values = FORMATS[name].values()
        assert torch.equal(pairs_of_levels(values, dtype)[:, 0, 0].float(), values[byte & 15])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_fp8_code(target: Target, dtype: torch.dtype) -> None:
    """Row n of W is code n in the first column; the NaN codes make their outputs NaN and no other."""
    codes = torch.zeros(256, 32, dtype=torch.uint8)
    codes[:, 0] = torch.arange(256)
    w = bitfuse.LowBitWeight(codes, torch.ones(256, 1), FORMATS["fp8"], (256, 32))
    x = torch.zeros(2, 32, dtype=dtype)
    x[0, 0] = 1
    got = target.run(forward_op, *arguments(target, x, w)).cpu()
    values = w.format.values().to(dtype)
    finite = torch.isfinite(values)
    assert torch.equal(got[0][finite], values[finite])
    assert torch.equal(torch.isnan(got), (~finite).expand(2, 256))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_large_partial_sums_do_not_overflow(target: Target) -> None:
    w = bitfuse.quantize(torch.ones(8, 4096), "int4")
    x = torch.full((1, 4096), 60000.0, dtype=torch.float16)
    x[:, 1::2] *= -1
    assert torch.equal(target.run(forward_op, *arguments(target, x, w)).cpu(), torch.zeros(1, 8).half())


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_views_are_read_where_they_are(target: Target) -> None:
    w = bitfuse.quantize(torch.randn(32, 512) / 22, "int4", symmetric=False)
    wide = torch.randn(6, 1024, dtype=torch.float16)
    dense = w.dequantize().double()
    placed, x = target.place_weight(w), target.place(wide)[0]
    for view in (
        x[:, 256:768],
        x[:, 1:513],
        x[::2, :512],
        x[:, ::2],
        x[0, 8:520],
        x.view(3, 2, 1024)[:, 1, :512],
    ):
        args = (view, placed.op_args, None)
        exact = view.cpu().double() @ dense.T
        plain = view.cpu() @ w.dequantize(torch.float16).T
        assert_accurate(target.run(forward_op, *args).cpu(), exact, plain)
    # a shard of the columns is a view of qweight, scales and zeros
    assert placed.zeros is not None
    shard = (placed.qweight[:, 64:192], placed.scales[:, 1:3], placed.zeros[:, 1:3])
    args = (x[:, :256], WeightTensors(*shard, None, None, "int4", 128), None)
    exact = wide[:, :256].double() @ dense[:, 128:384].T
    assert_accurate(
        target.run(forward_op, *args).cpu(), exact, wide[:, :256] @ w.dequantize(torch.float16)[:, 128:384].T
    )


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_says_what_it_does_not_serve(target: Target) -> None:
    w = bitfuse.quantize(torch.randn(16, 96), "int4", group_size=48)
    half = torch.zeros(2, 96, dtype=torch.float16)
    assert "group_size 48" in (target.reason(forward_op, *arguments(target, half, w)) or "")
    w = bitfuse.quantize(torch.randn(16, 96), "int4", group_size=32)
    assert "float32" in (target.reason(forward_op, *arguments(target, half.float(), w)) or "")
    assert "M = 65" in (target.reason(forward_op, *arguments(target, half[:1].repeat(65, 1), w)) or "")
    x, weight, _ = arguments(target, half, w)
    for rows in (8, 96):
        grown = bitfuse.quantize(torch.randn(16, 96), "int4", group_size=32, scale_rows=rows)
        said = f"scales that {rows} rows share"
        assert said in (target.reason(forward_op, *arguments(target, half, grown)) or "")
    weight = weight._replace(qweight=weight.qweight[:, :1].expand(16, 48))
    assert "qweight has strides" in (target.reason(forward_op, x, weight, None) or "")
    assert target.run(forward_op, *arguments(target, half[:0], w)).shape == (0, 16)


def test_the_plan_is_one_that_the_kernel_can_run() -> None:
    sizes = (8, 72, 1000, 1024, 4096, 7392, 14336, 128256)
    codes = list(native.CodeKind.__members__.values())
    for device, m, n, k, code, nested in itertools.product(
        (H100, A100, SMALL), (1, 8, 9, 16, 17, 33, 64), sizes, sizes, range(4), (False, True)
    ):
        plan = native.plan_lowbit_linear(m, n, k, codes[code], nested, native.DeviceInfo(*device))
        chunk = 128 if code < 2 else 64
        chunks, warps_k = math.ceil(k / chunk), 8 >> plan.log_warps_n
        if plan.token_tiles == 0:
            assert device is SMALL and (m > 8 or code == 1), (device, m, code)
            continue
        assert m <= 8 * plan.token_tiles and plan.shared_bytes <= device[1]
        assert plan.tiles * (32 << plan.log_warps_n) >= n and 1 <= plan.splits <= chunks
        steps = math.ceil(math.ceil(chunks / plan.splits) / warps_k)
        if plan.panel_buffers == 1:
            assert 1 << plan.log_panel >= steps
        else:  # a panel is asked for three steps ahead, as weights are
            assert (plan.panel_buffers - 1) << plan.log_panel >= 3


def test_a_large_matrix_fills_the_machine_without_splitting_k() -> None:
    plan = native.plan_lowbit_linear(1, 8192, 8192, native.CodeKind.INT4, False, native.DeviceInfo(*H100))
    assert plan.splits == 1 and plan.tiles >= 120


def descriptor(
    address: int, *shape: int, strides: tuple[int, ...] | None = None, dtype: str = "FLOAT16"
) -> Any:
    """Of numbers that may be anybody's."""
    return native.Tensor(address, getattr(native.Dtype, dtype), shape, strides)


def product() -> dict[str, Any]:
    """Arguments that the binding takes, but that point nowhere: of no call that is made."""
    assert cuda._code("int4") is not None  # the extension knows the format
    info = native.DeviceInfo(*H100)
    return {
        "x": descriptor(64, 2, 64), "qweight": descriptor(64, 16, 32, dtype="UINT8"),
        "scales": descriptor(64, 16, 2, dtype="FLOAT32"), "zeros": None, "scale_scales": None,
        "scale_offset": None, "format": "int4", "group_size": 32, "offsets": None, "scale_rows": 1,
        "bias": None, "out": descriptor(64, 2, 16),
        "plan": native.plan_lowbit_linear(2, 16, 64, native.CodeKind.INT4, False, info, True), "stream": 0,
    }  # fmt: skip


def call(arguments: dict[str, Any], **others: Any) -> None:
    weight = tuple(arguments.pop(name) for name in native.WEIGHT_FIELDS)
    native.lowbit_linear(weight=weight, **arguments, **others)


def some_scales(rows: int, dtype: str = "FLOAT32") -> Any:
    return descriptor(64, rows, 2, dtype=dtype)


def some(count: int = 64, **other: Any) -> Any:
    return descriptor(64, count, **other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: {"x": descriptor(0, 2, 64)}, "x is null"),
        (lambda: {"x": descriptor(8, 2, 64)}, "x is 8, expected a multiple of 16"),
        (lambda: {"x": descriptor(64, 2, 64, dtype="FLOAT32")}, "x is float32, expected float16 or bfloat16"),
        (lambda: {"x": descriptor(64, 0, 64)}, "m is 0"),
        (lambda: {"x": descriptor(64, 2, 56)}, "x is 56, expected as many columns as the weight"),
        (lambda: {"x": descriptor(64, 2, 64, strides=(100, 1))}, r"x is of .*strides \[100, 1\]"),
        (lambda: {"x": descriptor(64, 9, 64)}, "m is 9, expected what the plan was made for"),
        (lambda: {"qweight": descriptor(2, 16, 32, dtype="UINT8")}, "qweight is 2, expected a multiple of 4"),
        (lambda: {"qweight": descriptor(64, 0, 32, dtype="UINT8")}, r"scales is of shape|n is 0"),
        (
            lambda: {"qweight": descriptor(64, 16, 32, strides=(34, 1), dtype="UINT8")},
            "qweight's stride is 34, expected a multiple of 4",
        ),
        (
            lambda: {"qweight": descriptor(64, 16, 32, strides=(2, 1), dtype="UINT8")},
            r"qweight is of strides \[2, 1\], expected dense rows",
        ),
        (lambda: {"scales": descriptor(1, 16, 2, dtype="FLOAT32")}, "scales is 1, expected a multiple of 4"),
        (
            lambda: {"scales": descriptor(64, 16, 2, strides=(2**31, 1), dtype="FLOAT32")},
            "scales' stride is 2147483648",
        ),
        (lambda: {"group_size": 24}, "group_size is 24"),
        (
            lambda: {"group_size": 16, "scales": descriptor(64, 16, 4)},
            "group_size is 16, expected a",
        ),
        (lambda: {"format": "no such"}, "format is no such"),
        (lambda: {"scale_rows": 0}, "scale_rows is 0, expected 1 or more"),
        (lambda: {"scale_rows": 32}, r"scales is of shape \[16, 2\], expected \[1, 2\]"),
        (
            lambda: {"scale_rows": 8, "scales": some_scales(2)},
            "scale_rows is 8, expected 1, or a power of two",
        ),
        (lambda: {"offsets": some_scales(16, dtype="UINT8")}, "offsets is .*uint8"),
        (lambda: {"offsets": some_scales(15)}, r"offsets is of shape \[15, 2\], expected \[16, 2\]"),
        (
            lambda: {"offsets": some_scales(16), "zeros": some_scales(16, dtype="UINT8")},
            "offsets is given beside zeros",
        ),
        (lambda: {"bias": descriptor(64, 15)}, r"bias is of shape \[15\], expected \[16\]"),
        (lambda: {"out": descriptor(2, 2, 16)}, "out is 2, expected a multiple of 4"),
        (lambda: {"out": descriptor(64, 2, 15)}, r"out is of shape \[2, 15\]"),
    ],
)
def test_the_binding_names_what_is_wrong(change: Callable[[], dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        call(product() | change())


def test_a_plan_and_a_format_are_checked() -> None:
    with pytest.raises(ValueError, match="m is 65, expected at most 64"):
        native.plan_lowbit_linear(65, 16, 64, native.CodeKind.INT4, False, native.DeviceInfo(*H100))
    with pytest.raises(ValueError, match="multiprocessors is 0"):
        native.DeviceInfo(0, *H100[1:])
    with pytest.raises(ValueError, match="zero_point is 16, expected a code"):
        native.WeightFormat(native.CodeKind.INT4, 16, native.ScaleKind.FLOAT32, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts are the simulator's")
@pytest.mark.parametrize("format", ["int4", "nf4", "int8", "fp8"])
def test_no_two_lanes_meet_in_a_bank(format: str) -> None:
    w = bitfuse.quantize(torch.randn(256, 1024), format, group_size=128)
    for m in (1, 8, 40):
        with cusim.device(counts=True):
            cusim.counts()
            with bitfuse.use_backend("cuda"):
                forward_op(*arguments(TARGETS[0], torch.randn(m, 1024).half(), w))
            (counted,) = cusim.counts().values()
        assert counted["shared_wavefronts"] == counted["shared_wavefronts_ideal"]
        assert counted["local_accesses"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_runs_in_a_graph() -> None:
    w = bitfuse.quantize(torch.randn(64, 8192) / 90, "int4").to("cuda")
    x = torch.randn(4, 8192, dtype=torch.float16, device="cuda")
    with bitfuse.use_backend("cuda"):
        wanted = bitfuse.lowbit_linear(x, w)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = bitfuse.lowbit_linear(x, w)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, wanted)

"""What is the Triton backend's own: its decoding, code by code, its tiles and splits, its addresses and what
it compiles."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from typing import Any

import bitfuse
import cusim
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.core.device import Device
from bitfuse.kernels.core.decoding import CODES
from bitfuse.kernels.core.launch import HANDLES
from bitfuse.ops.linear.lowbit_linear import forward_op, lowbit_linear_grad_x
from bitfuse.weights.codebook import unbiased_levels
from bitfuse.weights.formats import get_format
from bitfuse.weights.packing import pack
from bitfuse.weights.weight import WeightTensors

pytest.importorskip("triton")
from bitfuse.kernels.linear import lowbit_linear as backend
from bitfuse.kernels.linear import lowbit_linear_tiles as tiles

TARGETS = pytest.mark.parametrize("target", targets("triton"), ids=str)
H100 = Device(0, 90, 132)
HALVES = [torch.float16, torch.bfloat16]


def run(
    target: Target, w: bitfuse.LowBitWeight, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return target.run(forward_op, x, w.op_args, bias).cpu()


def twelve_multiprocessors(target: Target) -> contextlib.AbstractContextManager[None]:
    """Simulated: enough to split a small contraction."""
    return cusim.device(multiprocessors=12) if target.sm else contextlib.nullcontext()


def check(
    target: Target, m: int, n: int, k: int, dtype: torch.dtype, grad_x: bool = False, **options: Any
) -> None:
    """The result against float64 on the same weight, with NaN in outputs and tensors against guard pages."""
    w = bitfuse.quantize(torch.randn(n, k) / k**0.5, **options)
    placed = target.place_weight(w)
    x, bias = target.place(torch.randn(m, n if grad_x else k, dtype=dtype), torch.randn(n, dtype=dtype))
    exact, dense = w.dequantize().double(), w.dequantize(dtype)
    if grad_x:
        got = target.run(lowbit_linear_grad_x, x, placed.op_args)
        assert_accurate(got.cpu(), x.cpu().double() @ exact, x.cpu() @ dense)
    else:
        got = run(target, placed, x, bias)
        wanted = x.cpu().double() @ exact.T + bias.cpu().double()
        assert_accurate(got, wanted, torch.nn.functional.linear(x.cpu(), dense, bias.cpu()))


@pytest.mark.parametrize("format", sorted(CODES))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@TARGETS
def test_every_code_decodes_exactly(target: Target, dtype: torch.dtype, format: str) -> None:
    """W holds each code in each place of a byte, scale 1: times the unit vectors that is the table itself."""
    kind = get_format(format)
    exact = kind.values() - kind.zero_point
    values = unbiased_levels(exact, dtype) if kind.bits == 4 and not kind.is_integer else exact.to(dtype)
    codes = torch.arange(8).unsqueeze(1) + torch.arange(256)
    codes = torch.where(values.isnan()[codes % 2**kind.bits], 0, codes % 2**kind.bits).to(torch.uint8)
    group = 256 if kind.group_size == -1 else kind.group_size
    one = torch.ones(8, 256 // group).to(kind.scale_dtype)
    tensor_scale = torch.ones(1) if kind.tensor_scale else None
    qweight, scales = target.place(pack(codes, kind.bits), one)
    scale_scales = None if tensor_scale is None else target.place(tensor_scale)[0]
    (x,) = target.place(torch.eye(256, dtype=dtype))
    weight = WeightTensors(qweight, scales, None, scale_scales, None, format, group)
    assert torch.equal(target.run(forward_op, x, weight, None).cpu(), values[codes.int()].T)


# each row of the table of tiles, with ends that are no whole tile, runs of each kind, zeros, nested scales,
# float offsets, scales that rows share
CASES = [
    (1, 137, 2056, torch.bfloat16, dict(format="int4", group_size=8)),
    (16, 264, 2048, torch.bfloat16, dict(format="nf4", nested=True)),
    (20, 141, 1024, torch.float16, dict(format="int4", group_size=64, symmetric=False)),
    (33, 264, 1104, torch.float16, dict(format="int8")),
    (64, 136, 1024, torch.bfloat16, dict(format="int4")),
    (130, 267, 520, torch.bfloat16, dict(format="int4", group_size=40, symmetric=False)),
    (40, 73, 1032, torch.float32, dict(format="int4", group_size=24)),
    (2, 136, 1024, torch.bfloat16, dict(format="int4", group_size=64, offset=True)),
    (67, 141, 1024, torch.float16, dict(format="int8", group_size=128, offset=True, scale_rows=24)),
    (3, 73, 1032, torch.float32, dict(format="int2", group_size=24, offset=True)),
]


@pytest.mark.parametrize("grad_x", [False, True], ids=["forward", "grad_x"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"m{c[0]}")
@TARGETS
def test_tiles_and_splits(target: Target, case: tuple[Any, ...], grad_x: bool) -> None:
    m, n, k, dtype, options = case
    with twelve_multiprocessors(target):
        rows, columns = (k - n % 8, n // 8 * 8) if grad_x else (n, k)
        check(target, m, rows, columns, dtype, grad_x, **_fit(options, columns, grad_x))


def _fit(options: dict[str, Any], columns: int, grad_x: bool) -> dict[str, Any]:
    """For the gradient, whose columns are few: a group that divides them."""
    return (
        options | dict(group_size=columns // 3 if columns % 24 == 0 else columns // 17) if grad_x else options
    )


@TARGETS
def test_float32_sums_in_steps(target: Target) -> None:
    """A chain of 4096 additions errs more than twice as much as torch's blocked sums do."""
    check(target, 20, 64, 4096, torch.float32, format="int8")
    check(target, 20, 4096, 64, torch.float32, grad_x=True, format="nf4")


@TARGETS
def test_splits_give_the_same_numbers_every_time(target: Target) -> None:
    w = target.place_weight(bitfuse.quantize(torch.randn(64, 4096), "int4"))
    (x,) = target.place(torch.randn(3, 4096, dtype=torch.float16))
    with twelve_multiprocessors(target):
        first = run(target, w, x)
        assert all(torch.equal(run(target, w, x), first) for _ in range(3))


@TARGETS
def test_addresses_beyond_32_bits(target: Target) -> None:
    """Rows of x 2**30 elements apart, of which only a few are touched."""
    w = bitfuse.quantize(torch.randn(16, 64), "int4", group_size=32)
    stride = 2**30 + 8
    far = torch.empty(2 * stride + 64, dtype=torch.float16, device=target.device).as_strided(
        (3, 64), (stride, 1)
    )
    far.copy_(torch.randn(3, 64))
    near = run(target, target.place_weight(w), far.contiguous())
    assert torch.equal(run(target, target.place_weight(w), far), near)


@TARGETS
def test_rows_that_are_not_aligned(target: Target) -> None:
    """Slices of x and of W at addresses and strides that allow no vectors."""
    w = bitfuse.quantize(torch.randn(24, 40), "int4", group_size=8)
    x = torch.randn(5, 128, dtype=torch.float16)
    for view in (x[:, 3:43], torch.randn(5, 43).half()[:, 1:41], x[:, :80:2], x[:1, 1:41].expand(4, 40)):
        exact = view.double() @ w.dequantize().double().T
        plain = view @ w.dequantize(torch.float16).T
        got = run(target, w.to(target.device), view.to(target.device))
        assert_accurate(got, exact, plain)
    shard = bitfuse.LowBitWeight(w.qweight[8:], w.scales[8:], w.format, (16, 40)).to(target.device)
    assert_accurate(run(target, shard, view.to(target.device)), exact[:, 8:], plain[:, 8:])


@TARGETS
def test_a_new_length_compiles_nothing(target: Target) -> None:
    def call(m: int, n: int, k: int) -> int:
        w = target.place_weight(bitfuse.quantize(torch.randn(n, k), "int4", group_size=32))
        run(target, w, target.place(torch.randn(m, k, dtype=torch.float16))[0])
        return sum(map(len, HANDLES.values()))

    before = call(2, 24, 256)
    assert {call(1, 24, 256), call(7, 40, 384), call(16, 48, 128)} == {before}
    assert call(17, 24, 256) == before + 1


@pytest.mark.parametrize("m", [1, 200])
@TARGETS
def test_what_is_compiled(target: Target, m: int) -> None:
    """Tensor cores of the right generation, 16-byte asynchronous copies, and nothing in local memory."""
    backend._plans.cache_clear()
    HANDLES.clear()
    check(target, m, 128, 256, torch.bfloat16, format="int4")
    check(target, m, 256, 128, torch.bfloat16, grad_x=True, format="nf4")
    capability = target.sm or 10 * torch.cuda.get_device_capability()[0]
    matmul = "wgmma.mma_async" if capability == 90 and m > 64 else "mma.sync"
    for handle in (handle for handles in HANDLES.values() for handle in handles.values()):
        ptx = handle.asm["ptx"]
        assert matmul in ptx and ".local" not in ptx
        assert set(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x(\w+)", ptx)) <= {"10"}, ptx


def test_the_table_of_tiles() -> None:
    """Decode fills an H100; a prompt's tiles fill it alone; every split has at least MIN_SPLIT columns."""
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 8192), (10944, 7392)):
        decode = tiles.choose(tiles.Product(1, n, k, 4, 128, 2), H100)
        programs = -(-n // decode.tile_n) * decode.splits
        assert programs >= 132 or decode.splits == k // tiles.MIN_SPLIT, decode
        for m in (1, 16, 17, 64, 65, 300, 4096):
            for grad_x in (False, True):
                c = tiles.choose(tiles.Product(m, n, k, 4, 128, 2, grad_x), H100)
                assert c.steps * c.tile_k * c.splits >= k > c.steps * c.tile_k * (c.splits - 1)
                assert c.splits == 1 or k >= c.splits * tiles.MIN_SPLIT
        assert tiles.choose(tiles.Product(4096, n, k, 4, 128, 2), H100).splits == 1


def test_reasons() -> None:
    target = targets("triton")[0]
    w = target.place_weight(bitfuse.quantize(torch.randn(16, 64), "int4", group_size=32))
    (x,) = target.place(torch.randn(2, 64))
    qweight, scales = w.qweight, w.scales

    def reason(qweight: torch.Tensor, format: str, group_size: int) -> str | None:
        weight = WeightTensors(qweight, scales, None, None, None, format, group_size)
        return backend.supports_grad_x(x, weight)

    lacking = backend.supports(x, WeightTensors(qweight, scales, None, None, None, "int3", 32), None)
    assert lacking is not None and lacking.startswith("it has no kernel for format int3, of int8, ")
    assert reason(qweight.t().contiguous().t(), "int4", 32) == "qweight, scales or zeros is not contiguous"
    assert reason(qweight, "int4", 12) == "group_size 12 is not a multiple of 8"


def test_without_triton() -> None:
    """The package imports, and says why this backend does not run."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from bitfuse.kernels.linear import lowbit_linear as backend\n"
        "from bitfuse.weights.weight import WeightTensors; x = torch.zeros(8, 8)\n"
        "print(backend.supports(x, WeightTensors(x, x, None, None, None, 'int4', 8), None))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "triton is not installed"

"""Triton's compiled kernels on the simulator, for two compute capabilities in one process."""

# The arguments of a kernel are pointers and constexprs, which its decorator types.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import pytest
import torch

import cusim

pytest.importorskip("triton")

import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(cusim.has_gpu(), reason="the simulator stands in for a GPU")


@triton.jit
def matmul(
    a, b, c, M, N, K, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, Sum: tl.constexpr = tl.float32
):
    rm = tl.program_id(0) * TM + tl.arange(0, TM)
    rn = tl.program_id(1) * TN + tl.arange(0, TN)
    acc = tl.zeros((TM, TN), Sum)
    for k in range(0, K, TK):
        rk = k + tl.arange(0, TK)
        x = tl.load(a + rm[:, None] * K + rk[None, :], mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0)
        y = tl.load(b + rn[None, :] * K + rk[:, None], mask=(rn[None, :] < N) & (rk[:, None] < K), other=0.0)
        acc = tl.dot(x, y, acc, out_dtype=Sum)
    inside = (rm[:, None] < M) & (rn[None, :] < N)
    tl.store(c + rm[:, None] * N + rn[None, :], acc.to(c.dtype.element_ty), mask=inside)


def reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.double() @ b.double().T


CASES = [(sm, dtype) for sm in (80, 90) for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("sm", "dtype"), [*CASES, (90, torch.float8_e4m3fn)])
@pytest.mark.parametrize("seed", [0, 1])
def test_matmul(sm: int, dtype: torch.dtype, seed: int) -> None:
    instruction = {80: "mma.sync", 90: "wgmma.mma_async"}[sm]
    m, n, k = 70, 72, 96
    a, b = (torch.randn(rows, k).to(dtype) for rows in (m, n))
    c = cusim.guarded_empty((m, n), torch.float32)
    with cusim.device(sm=sm, racecheck=2, seed=seed):
        done = matmul[(2, 2)](
            cusim.guarded(a), cusim.guarded(b), c, m, n, k, 64, 64, 32, num_stages=3, num_warps=4
        )
    assert instruction in done.asm["ptx"]
    torch.testing.assert_close(c.double(), reference(a, b), rtol=1e-5, atol=1e-5)


def test_both_capabilities_take_turns() -> None:
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    targets = []
    for sm in (80, 90, 80):
        c = torch.full((64, 64), float("nan"))
        with cusim.device(sm=sm):
            done = matmul[(1, 1)](a, b, c, 64, 64, 64, 64, 64, 64)
        targets.append(done.metadata.target.arch)
        torch.testing.assert_close(c.double(), reference(a, b), rtol=1e-5, atol=1e-5)
    assert targets == [80, 90, 80]


def test_int8_matmul() -> None:
    a, b = (torch.randint(-128, 128, (64, 64), dtype=torch.int8) for _ in range(2))
    c = torch.zeros(64, 64, dtype=torch.int32)
    for sm in (80, 90):
        with cusim.device(sm=sm, racecheck=True):
            matmul[(1, 1)](a, b, c.zero_(), 64, 64, 64, 64, 64, 32, tl.int32)
        assert torch.equal(c.double(), reference(a, b))


def test_a_load_past_the_end_is_found() -> None:
    a, b = torch.randn(64, 64).half(), torch.randn(60, 64).half()
    c = torch.zeros(64, 60)
    with cusim.device(sm=80), pytest.raises(cusim.SimulationError, match="invalid global memory access"):
        matmul[(1, 1)](a, cusim.guarded(b), c, 64, 80, 64, 64, 128, 64)


@triton.jit
def histogram(x, counts, locks, N, T: tl.constexpr):
    i = tl.program_id(0) * T + tl.arange(0, T)
    v = tl.load(x + i, mask=i < N, other=0.0)
    tl.atomic_add(counts + i % 7, v, mask=i < N)
    while tl.atomic_cas(locks, 0, 1) == 1:
        pass
    tl.store(counts + 7, tl.load(counts + 7) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(locks, 0)


@pytest.mark.parametrize("sm", [80, 90])
def test_atomics(sm: int) -> None:
    x = torch.randn(500)
    counts, lock = torch.zeros(8), torch.zeros(1, dtype=torch.int32)
    with cusim.device(sm=sm, racecheck=True, seed=5):
        histogram[(4,)](x, counts, lock, 500, 128)
    expected = torch.zeros(7).index_add(0, torch.arange(500) % 7, x)
    torch.testing.assert_close(counts[:7], expected, rtol=1e-5, atol=1e-5)
    assert counts[7] == 4


@triton.jit
def descriptor_matmul(a, b, c, K, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr):
    i, j = tl.program_id(0) * TM, tl.program_id(1) * TN
    acc = tl.zeros((TM, TN), tl.float32)
    for k in range(0, K, TK):
        acc = tl.dot(a.load([i, k]), b.load([j, k]).T, acc)
    c.store([i, j], acc.to(c.dtype))


@pytest.mark.parametrize(("sm", "instruction"), [(80, "mma.sync"), (90, "cp.async.bulk.tensor")])
def test_tensor_descriptors(sm: int, instruction: str) -> None:
    descriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor
    a, b = torch.randn(100, 128).bfloat16(), torch.randn(72, 128).bfloat16()
    c = torch.full((100, 72), float("nan"), dtype=torch.bfloat16)
    views = [descriptor(t, t.shape, t.stride(), [64, 64]) for t in (a, b, c)]
    with cusim.device(sm=sm, racecheck=2, seed=2):
        done = descriptor_matmul[(2, 2)](*views, 128, 64, 64, 64, num_stages=3)
    assert instruction in done.asm["ptx"]
    torch.testing.assert_close(c.double(), reference(a, b), rtol=1e-2, atol=1e-2)


@triton.jit
def elementwise(x, y, scale, flag: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    if flag:
        v = tl.exp2(v) + tl.cumsum(v, 0) + tl.max(v, 0)
    tl.device_assert(v == v, "NaN")
    tl.store(y + i, v * scale)


def test_scalars_and_assertions() -> None:
    x = torch.randn(256)
    y = torch.zeros(256)
    with cusim.device(sm=90, racecheck=True):
        elementwise[(1,)](x, y, 0.5, True, 256)
        torch.testing.assert_close(y, (x.exp2() + x.cumsum(0) + x.max()) * 0.5, rtol=1e-5, atol=1e-4)
        x[3] = float("nan")
        with pytest.raises(cusim.SimulationError, match="device assert: NaN"):
            elementwise[(1,)](x, y, 0.5, False, 256, debug=True)


def test_autotune_takes_the_first() -> None:
    tuned = triton.autotune([triton.Config({"N": n}) for n in (64, 128)], key=["flag"])(elementwise)
    x, y = torch.randn(128), torch.zeros(128)
    with cusim.device(sm=80):
        tuned[(1,)](x, y, 1.0, False)
    assert torch.equal(y[:64], x[:64])

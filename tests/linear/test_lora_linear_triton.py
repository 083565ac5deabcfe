"""What is lora_linear's own in Triton: tall tiles and shares of rows, its launches, its addresses, and what
it compiles."""

from __future__ import annotations

import math
import re
from typing import Any

import bitfuse
import cusim
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.core.device import Device
from bitfuse.core.dropout import keep
from bitfuse.kernels.core.launch import HANDLES
from bitfuse.ops.linear.lora_args import LoraArgs
from bitfuse.ops.linear.lora_linear import Wanted, lora_linear_backward, lora_linear_op

pytest.importorskip("triton")
from bitfuse.kernels.linear import lora_linear_passes as passes
from bitfuse.kernels.linear import lowbit_linear

TARGETS = pytest.mark.parametrize("target", targets("triton"), ids=str)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
EVERYTHING = Wanted(True, (True,), (True,))


def make(
    target: Target,
    m: int,
    k: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    adapter: torch.dtype,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[torch.Tensor, LoraArgs, torch.Tensor, torch.Tensor]:
    """x, a projection over int4 or what the options say, a gradient of y, and the dense weight."""
    options = options or dict(format="int4", group_size=math.gcd(k, 32))
    w = bitfuse.quantize(torch.randn(n, k) / k**0.5, **options)
    x, lora_A, lora_B, grad = target.place(
        torch.randn(m, k, dtype=dtype), (torch.randn(rank, k) / k**0.5).to(adapter),
        torch.randn(n, rank).to(adapter), torch.randn(m, n, dtype=dtype),
    )  # fmt: skip
    return x, LoraArgs(target.place_weight(w).op_args, lora_A, lora_B, 0.5, **more), grad, w.dequantize()


def check(target: Target, x: torch.Tensor, p: LoraArgs, grad: torch.Tensor, w: torch.Tensor) -> None:
    """Outputs and gradients against float64, with the seed's mask at dropout 0.25."""
    dropout_p = 0.0 if p.seed is None else 0.25
    y, h = target.run(lora_linear_op, x, (p,), dropout_p)
    dx, da, db = target.run(lora_linear_backward, (grad,), x, (p,), (h,), dropout_p, EVERYTHING)
    cpu = p._replace(
        weight=w.to(x.dtype), lora_A=p.lora_A.cpu(), lora_B=p.lora_B.cpu(),
        seed=None if p.seed is None else p.seed.cpu(),
    )  # fmt: skip
    plain_y, plain_h = lora_linear_op.reference(x.cpu(), (cpu,), dropout_p)
    plain = lora_linear_backward.reference((grad.cpu(),), x.cpu(), (cpu,), (plain_h,), dropout_p, EVERYTHING)
    mask = 1.0 if cpu.seed is None else keep(cpu.seed, x.shape[0], x.shape[1], dropout_p) / (1 - dropout_p)
    X, G, W, A, B = (t.cpu().double() for t in (x, grad, w, p.lora_A, p.lora_B))
    H, GB = (X * mask) @ A.T, 0.5 * G @ B
    assert_accurate(h.cpu(), H, plain_h, "h")
    assert_accurate(y.cpu(), X @ W.T + 0.5 * H @ B.T, plain_y, "y")
    assert_accurate(dx.cpu(), G @ W + (GB @ A) * mask, plain[0], "x")
    assert_accurate(da.cpu(), GB.T @ (X * mask), plain[1], "lora_A")
    assert_accurate(db.cpu(), 0.5 * G.T @ H, plain[2], "lora_B")


@TARGETS
def test_tall_tiles_and_shares_of_rows(target: Target) -> None:
    """Rows enough for the tallest tile of the shrink and for several shares, which do not end with a tile."""
    (seed,) = target.place(torch.tensor([2**40 + 5]))
    check(target, *make(target, 300, 136, 72, 16, BF16, BF16))
    check(target, *make(target, 300, 136, 136, 12, BF16, F32, seed=seed.view(())))


@TARGETS
def test_offsets_and_shared_scales(target: Target) -> None:
    """Forward and backward over weights that the CUDA kernels refuse, too."""
    (seed,) = target.place(torch.tensor([2**40 + 5]))
    check(target, *make(target, 5, 128, 72, 8, BF16, BF16, dict(format="int8", offset=True)))
    options = dict(format="int4", group_size=32, offset=True, scale_rows=24)
    check(target, *make(target, 70, 160, 72, 8, F16, F32, options, seed=seed.view(())))
    check(target, *make(target, 3, 256, 72, 8, F16, F16, dict(format="fp8", group_size=128, scale_rows=128)))


@TARGETS
def test_a_float32_adapter_keeps_its_digits(target: Target) -> None:
    """Long sums: tensor cores take pieces of bfloat16, whose sums must not lose what float32 would keep."""
    check(target, *make(target, 24, 1024, 24, 4, BF16, F32))
    check(target, *make(target, 24, 24, 1024, 4, BF16, F32))


@TARGETS
def test_gb_is_the_same_whatever_is_wanted(target: Target) -> None:
    x, p, grad, _ = make(target, 40, 64, 64, 8, BF16, BF16)
    args = (grad,), x, (p,)
    _, h = target.run(lora_linear_op, x, (p,), 0.0)
    everything = target.run(lora_linear_backward, *args, (h,), 0.0, EVERYTHING)
    for i, wanted in enumerate((Wanted(True, (False,), (False,)), Wanted(False, (True,), (False,)))):
        alone = target.run(lora_linear_backward, *args, (None,), 0.0, wanted)
        assert torch.equal(alone[i], everything[i]) and [t.numel() > 0 for t in alone].count(True) == 1


@TARGETS
def test_several_projections_through_splits(target: Target) -> None:
    """Four projections, more than a pass takes, of a contraction that is split, and all that goes with it."""
    rows, k, n = 3, 1024, 1024
    made = [make(target, rows, k, n, 5, F16, F16) for _ in range(4)]
    x = made[0][0]
    scale, bias, by = target.place(torch.rand(n) + 0.5, torch.randn(n).half(), torch.tensor([3.0, 2.0]))
    given = dict(out_scale=scale, bias=bias, scale_by=by[1])
    with cusim.device(multiprocessors=12):
        got = target.run(lora_linear_op, x, tuple(p._replace(**given) for _, p, _, _ in made), 0.0)
        grads, ps = tuple(g for _, _, g, _ in made), tuple(p for _, p, _, _ in made)
        wanted = Wanted(True, (True,) * 4, (False,) * 4)
        dx, *others = target.run(lora_linear_backward, grads, x, ps, (None,) * 4, 0.0, wanted)
    exact_dx = torch.zeros(rows, k, dtype=torch.float64)
    plain_dx = torch.zeros(rows, k, dtype=F16)
    for i, (_, p, grad, w) in enumerate(made):
        A, B, G = (t.cpu().double() for t in (p.lora_A, p.lora_B, grad))
        h = x.cpu().double() @ A.T
        exact = (x.cpu().double() @ w.double().T + h @ B.T) * scale.cpu() + bias.cpu()
        cpu = LoraArgs(w.half(), p.lora_A.cpu(), p.lora_B.cpu(), 0.5)
        told = cpu._replace(scale_by=by[1].cpu(), out_scale=scale.cpu(), bias=bias.cpu())
        assert_accurate(got[i].cpu(), exact, lora_linear_op.reference(x.cpu(), (told,), 0.0)[0], f"y {i}")
        plain = lora_linear_backward.reference((grad.cpu(),), x.cpu(), (cpu,), (h.float(),), 0.0, EVERYTHING)
        assert_accurate(others[2 * i].cpu(), (0.5 * G @ B).T @ x.cpu().double(), plain[1], f"lora_A {i}")
        exact_dx += G @ w.double() + 0.5 * G @ B @ A
        plain_dx += plain[0]
    assert_accurate(dx.cpu(), exact_dx, plain_dx, "x")


@TARGETS
def test_a_new_length_a_new_seed_and_a_new_scaling_compile_nothing(target: Target) -> None:
    def call(m: int, k: int, n: int, scaling: float, dropout_p: float) -> int:
        (seed,) = target.place(torch.tensor([m]))
        x, p, grad, _ = make(target, m, k, n, 8, F16, F16, seed=seed.view(()))
        p = p._replace(scaling=scaling)
        _, h = target.run(lora_linear_op, x, (p,), dropout_p)
        target.run(lora_linear_backward, (grad,), x, (p,), (h,), dropout_p, EVERYTHING)
        return sum(map(len, HANDLES.values()))

    before = call(2, 128, 128, 1.0, 0.25)
    assert {call(1, 128, 256, 1.0, 0.75), call(7, 256, 128, 0.0, 0.5), call(16, 384, 128, -2.0, 0.1)} == {
        before
    }


@TARGETS
def test_addresses_beyond_32_bits(target: Target) -> None:
    """Rows of x and of a gradient 2**30 elements apart, of which only a few are touched."""
    x, p, grad, _ = make(target, 3, 64, 64, 8, F16, F16)
    far = []
    for near in (x, grad):
        space = torch.empty(2 * (2**30 + 8) + 64, dtype=F16, device=target.device)
        far.append(space.as_strided((3, 64), (2**30 + 8, 1)).copy_(near))
    y, h = target.run(lora_linear_op, x, (p,), 0.0)
    assert torch.equal(target.run(lora_linear_op, far[0], (p,), 0.0)[0], y)
    wanted = target.run(lora_linear_backward, (grad,), x, (p,), (h,), 0.0, EVERYTHING)
    got = target.run(lora_linear_backward, (far[1],), far[0], (p,), (h,), 0.0, EVERYTHING)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@TARGETS
def test_what_is_compiled(target: Target) -> None:
    """Tensor cores of the right generation, asynchronous copies of 16 bytes, nothing in local memory; and on
    Hopper a product that waits for h after its loop, not before."""
    for cached in (lowbit_linear._plans, passes._shrink_plan, passes._column_sums_plan):
        cached.cache_clear()
    HANDLES.clear()
    x, p, grad, _ = make(target, 256, 128, 128, 16, BF16, BF16)
    _, h = target.run(lora_linear_op, x, (p,), 0.0)
    target.run(lora_linear_backward, (grad,), x, (p,), (h,), 0.0, EVERYTHING)
    names = set()
    for handles in HANDLES.values():
        for handle in handles.values():
            ptx, name = handle.asm["ptx"], handle.metadata.name
            names.add(name)
            assert ".local" not in ptx
            if name not in ("_sum_kernel", "_reduce_kernel"):
                wide = (target.sm or torch.cuda.get_device_capability()[0] * 10) == 90
                matmul = "wgmma" if wide and name != "_column_sums_kernel" else "mma.sync"
                assert matmul in ptx and "cp.async.cg.shared.global" in ptx, name
                if name == "_forward_kernel":
                    wait = ptx.find("griddepcontrol.wait")
                    assert (ptx.find("wgmma.mma_async") < wait < ptx.rfind("ld.global")) if wide else wait < 0
                if name in ("_shrink_kernel", "_column_sums_kernel"):
                    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x(\w+)", ptx)
                    # h, which is read across, comes in single numbers
                    assert {"10"} <= set(copies) <= {"10", "4"} and (
                        name != "_shrink_kernel" or "4" not in copies
                    )
    products = {"_forward_kernel", "_grad_x_kernel"}
    assert names == {"_shrink_kernel", "_column_sums_kernel", "_sum_kernel"} | products


def test_the_table_of_tiles() -> None:
    """A prompt's shrink fills an H100, and its programs' stages a multiprocessor; shares cover the rows."""
    h100 = Device(0, 90, 132)
    for m in (1, 100, 512, 2048, 8192, 100_000):
        for k in (1024, 4096, 14336):
            for adapter in (BF16, F32):
                p = passes.Pass(m, k, k, BF16, (16,), (adapter,), None, False, False, False)
                plan = passes._shrink_plan(h100, p)
                tile_m, tile_r, tile_k = (v.value for v in plan.arguments[-1][:3])
                assert plan.grid[0] * tile_m >= m and (plan.grid[0] >= 99 or tile_m == 16)
                stage = (tile_m * 2 + tile_r * adapter.itemsize) * tile_k
                assert 12 << 10 <= stage <= 32 << 10
                p = p._replace(factor=adapter, across=True)
                plan, shares, tiles = passes._column_sums_plan(h100, p)
                tile_m, _, tile_c = (v.value for v in plan.arguments[-1])
                steps = plan.arguments[6]
                assert tiles * tile_c >= k and shares * steps * tile_m >= m > (shares - 1) * steps * tile_m
                assert tiles * shares <= 264


def test_reasons() -> None:
    target = targets("triton")[0]
    x, p, _, _ = make(target, 2, 64, 64, 8, F32, F32)
    assert target.reason(lora_linear_op, x, (p,), 0.0) is None
    nothing = p._replace(weight=torch.empty(0, 64), lora_B=torch.empty(0, 8))
    assert "leaves nothing to do" in str(target.reason(lora_linear_op, x, (nothing,), 0.0))
    three = bitfuse.quantize(torch.randn(64, 64), "int3", group_size=32).op_args
    assert "int3" in str(target.reason(lora_linear_op, x, (p._replace(weight=three),), 0.0))

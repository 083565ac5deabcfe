"""Each fault that the simulator promises to find, planted; and the same kernel mended, which must pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cusim
from cusim.ptx import kernel, pointer, run

pytestmark = pytest.mark.skipif(cusim.has_gpu(), reason="the simulator stands in for a GPU")
OUT = "mad.wide.u32 %rd1, %t, 4, %out;"


def out(count: int = 64) -> np.ndarray:
    return np.zeros(count, dtype=np.uint32)


def test_shared_memory_out_of_bounds() -> None:
    body = "mad.lo.u32 %r1, %t, 4, %smem; st.shared.u32 [%r1], %t;"
    run(body, threads=32, shared=128)
    with pytest.raises(
        cusim.SimulationError, match=r"write out of bounds: offset 128, 4 bytes.*\n.*thread 32,0,0"
    ):
        run(body, threads=64, shared=128)
    with pytest.raises(cusim.SimulationError, match="out of bounds"):
        run("ld.shared.u32 %r1, [%smem+-4];", shared=128)


def test_misaligned() -> None:
    with pytest.raises(cusim.SimulationError, match="misaligned 16-byte"):
        run("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%out+4];", {"out": np.zeros(64, dtype=np.complex128)})
    with pytest.raises(cusim.SimulationError, match="misaligned 8-byte"):
        run("ld.shared.u64 %rd1, [%smem+4];", shared=128)
    with pytest.raises(cusim.SimulationError, match="misaligned ldmatrix"):
        run("add.u32 %r1, %smem, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];", shared=512)


def test_null_pointer() -> None:
    with pytest.raises(cusim.SimulationError, match="null pointer write"):
        run("mov.u64 %rd1, 0; st.global.u32 [%rd1+16], %t;")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("access", ["ld.global.u8 %r1, [%rd1];", "st.global.u8 [%rd1], %t;"])
def test_guard_pages(before: bool, access: str) -> None:
    tensor = cusim.guarded(torch.arange(100, dtype=torch.uint8), before=before, align=1)
    address = tensor.numpy()
    last = "mad.wide.u32 %rd1, %t, 1, %x;" + access
    run(last, {"x": address}, threads=100)
    with pytest.raises(cusim.SimulationError, match="invalid global memory access"):
        run(
            ("sub.u64 %rd1, %x, 1;" if before else "add.u64 %rd1, %x, 100;") + access,
            {"x": address},
            threads=1,
        )


def test_guarded_keeps_strides_and_values() -> None:
    x = torch.randn(6, 5).t()[1:, ::2]
    y = cusim.guarded(x)
    assert y.stride() == x.stride()
    assert torch.equal(x, y)
    empty = cusim.guarded_empty((3, 4), torch.bfloat16)
    assert empty.isnan().all()
    assert (empty.data_ptr() + 24 + 8) % 4096 == 0  # 24 bytes end within 16 of the page's end
    assert cusim.guarded(x[:0]).shape == x[:0].shape


EXCHANGE = f"""{OUT} mad.lo.u32 %r1, %t, 4, %smem; xor.b32 %r2, %t, 32; mad.lo.u32 %r3, %r2, 4, %smem;
st.shared.u32 [%r1], %t; BARRIER ld.shared.u32 %r4, [%r3]; st.global.u32 [%rd1], %r4;"""


@pytest.mark.parametrize("seed", range(4))
def test_missing_barrier(seed: int) -> None:
    with cusim.device(racecheck=True, seed=seed):
        run(EXCHANGE.replace("BARRIER", "bar.sync 0;"), {"out": out()}, threads=64, shared=256)
        with pytest.raises(cusim.SimulationError, match=r"race on shared memory.*warp"):
            run(EXCHANGE.replace("BARRIER", ""), {"out": out()}, threads=64, shared=256)


def test_missing_barrier_before_the_next_round() -> None:
    """A write after the read of another warp."""
    body = EXCHANGE.replace("BARRIER", "bar.sync 0;") + "{} st.shared.u32 [%r1], %r4;"
    with cusim.device(racecheck=True):
        run(body.format("bar.sync 0;"), {"out": out()}, threads=64, shared=256)
        with pytest.raises(cusim.SimulationError, match="race on shared memory"):
            run(body.format(""), {"out": out()}, threads=64, shared=256)


PIPELINE = f"""{OUT} mad.lo.u32 %r1, %t, 4, %smem; xor.b32 %r2, %t, 32; mad.lo.u32 %r3, %r2, 4, %smem;
mad.wide.u32 %rd2, %t, 4, %src;
cp.async.ca.shared.global [%r1], [%rd2], 4; cp.async.commit_group;
cp.async.ca.shared.global [%r1+256], [%rd2], 4; cp.async.commit_group;
cp.async.wait_group WAIT; bar.sync 0; ld.shared.u32 %r4, [%r3]; ld.shared.u32 %r5, [%r3+SECOND];
add.u32 %r4, %r4, %r5; st.global.u32 [%rd1], %r4;"""


@pytest.mark.parametrize("seed", range(3))
def test_lax_wait(seed: int) -> None:
    """The second stage is read when only the first was waited for."""
    arrays = {"src": np.arange(64, dtype=np.uint32), "out": out()}
    right = PIPELINE.replace("WAIT", "0").replace("SECOND", "256")
    lax = PIPELINE.replace("WAIT", "1").replace("SECOND", "256")
    with cusim.device(racecheck=True, seed=seed):
        run(right, arrays, threads=64, shared=512)
        np.testing.assert_array_equal(arrays["out"], 2 * (np.arange(64) ^ 32))
        with pytest.raises(cusim.SimulationError, match="an asynchronous copy has yet to fill"):
            run(lax, arrays, threads=64, shared=512)
    with cusim.device(racecheck=False):  # without the check the old bytes are seen
        run(lax, arrays, threads=64, shared=512)
        np.testing.assert_array_equal(arrays["out"].view(np.int32), (np.arange(64) ^ 32) - 1)


def test_own_copy_read_too_early() -> None:
    arrays = {"src": np.arange(32, dtype=np.float32), "out": np.zeros(32, dtype=np.float32)}
    body = f"""{OUT} mad.lo.u32 %r1, %t, 4, %smem; mad.wide.u32 %rd2, %t, 4, %src;
    cp.async.ca.shared.global [%r1], [%rd2], 4; cp.async.commit_group; {{}} ld.shared.f32 %f1, [%r1];
    st.global.f32 [%rd1], %f1;"""
    run(body.format("cp.async.wait_group 0;"), arrays, shared=128)
    np.testing.assert_array_equal(arrays["out"], arrays["src"])
    run(body.format(""), arrays, shared=128)
    assert np.isnan(arrays["out"]).all()
    with cusim.device(racecheck=True), pytest.raises(cusim.SimulationError, match="yet to fill"):
        run(body.format(""), arrays, shared=128)


def test_barrier_deadlock() -> None:
    body = "setp.lt.u32 %p1, %t, 32; @%p1 bra $end; bar.sync 1, 64; $end: bar.sync 2, 64;"
    with pytest.raises(
        cusim.SimulationError, match=r"deadlock(.|\n)*warp 0 at a barrier(.|\n)*warp 1 at a barrier"
    ):
        run(body, threads=64)


def test_wait_for_ever() -> None:
    body = "$w: ld.volatile.global.u32 %r1, [%out]; setp.eq.u32 %p1, %r1, 0; @%p1 bra $w;"
    with pytest.raises(cusim.SimulationError, match="every warp waits"):
        run(body, {"out": out()})
    barrier = """setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared::cta.b64 [%smem], 2; bar.sync 0;
    @%p1 mbarrier.arrive.shared::cta.b64 _, [%smem];
    $w: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%smem], 0; @!%p2 bra $w;"""
    for seed in (0, 1):
        with cusim.device(seed=seed), pytest.raises(cusim.SimulationError, match="every warp waits"):
            run(barrier, threads=64, shared=16)


def test_collective_not_reached_by_all() -> None:
    body = "setp.lt.u32 %p1, %t, 16; @%p1 bra $end; shfl.sync.bfly.b32 %r1, %t, 1, 31, -1; {} $end: {}"
    with pytest.raises(cusim.SimulationError, match="warp collective that not all of its lanes reach"):
        run(body.format("", "bar.warp.sync -1;"))
    with pytest.raises(cusim.SimulationError, match="which does not take part"):
        run("setp.lt.u32 %p1, %t, 16; @%p1 shfl.sync.bfly.b32 %r1, %t, 16, 31, 0xffff;")


def test_uninitialised_shared_memory_is_nan() -> None:
    got = np.zeros(32, dtype=np.uint32)
    run(
        f"{OUT} mad.lo.u32 %r1, %t, 4, %smem; ld.shared.u32 %r2, [%r1]; st.global.u32 [%rd1], %r2;",
        {"out": got},
        shared=128,
    )
    for dtype in (np.float32, np.float16):
        assert np.isnan(got.view(dtype)).all()
    assert torch.from_numpy(got.view(np.uint8)).view(torch.float8_e4m3fn).isnan().all()


def test_global_race_between_blocks() -> None:
    """Two blocks write different values to one word; with atomics, or in different words, they may."""
    block = f"mov.u32 %r1, %ctaid.x; {OUT}"
    with cusim.device(racecheck=2):
        run(
            block + "mad.wide.u32 %rd2, %r1, 128, %rd1; st.global.u32 [%rd2], %r1;",
            {"out": out(128)},
            blocks=4,
        )
        run(block + "red.global.add.u32 [%rd1], %r1;", {"out": out()}, blocks=4)
        with pytest.raises(cusim.SimulationError, match=r"race on global memory: write after write.*block 0"):
            run(block + "st.global.u32 [%rd1], %r1;", {"out": out()}, blocks=4)
        with pytest.raises(cusim.SimulationError, match="race on global memory"):
            run(
                block + "ld.global.u32 %r2, [%rd1]; add.u32 %r2, %r2, 1; st.global.u32 [%rd1], %r2;",
                {"out": out()},
                blocks=2,
            )
    with cusim.device(racecheck=1):
        run(block + "st.global.u32 [%rd1], %r1;", {"out": out()}, blocks=4)


def test_global_flag_orders_blocks() -> None:
    """Block 0 writes, sets a flag; block 1 waits for the flag and reads: no race. Without the flag: one."""
    body = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @!%p1 bra $second;
    st.global.u32 [%out+64], 7; fence.acq_rel.gpu; st.release.gpu.global.u32 [%out], 1; ret;
    $second: {} ld.global.u32 %r3, [%out+64]; st.global.u32 [%out+128], %r3;"""
    poll = "$w: ld.acquire.gpu.global.u32 %r2, [%out]; setp.eq.u32 %p2, %r2, 0; @%p2 bra $w;"
    with cusim.device(racecheck=2):
        result = out()
        run(body.format(poll), {"out": result}, blocks=2, threads=1)
        assert result[32] == 7
        with pytest.raises(cusim.SimulationError, match="race on global memory"):
            run(body.format(""), {"out": out()}, blocks=2, threads=1)


WGMMA = """mad.lo.u32 %r99, %t, 16, %smem; mov.u32 %r98, 0; st.shared.v4.u32 [%r99], {%r98, %r98, %r98, %r98};
st.shared.v4.u32 [%r99+2048], {%r98, %r98, %r98, %r98}; FENCE bar.sync 0;
shr.u32 %r97, %smem, 4; cvt.u64.u32 %rd2, %r97; or.b64 %rd2, %rd2, 0x0000001000080000; setp.ne.b32 %p1, 0, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %rd2, %rd2, %p1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned; mov.f32 %f4, %f0; WAIT
""" + OUT + "st.global.f32 [%rd1], %f4;"  # fmt: skip


def test_wgmma_result_read_before_the_wait() -> None:
    kernel = WGMMA.replace("FENCE", "fence.proxy.async;")
    run(
        kernel.replace("WAIT", "wgmma.wait_group.sync.aligned 0;"),
        {"out": out(128)},
        threads=128,
        shared=4096,
    )
    for wait in ("", "wgmma.wait_group.sync.aligned 1;"):
        with pytest.raises(cusim.SimulationError, match=r"read before wgmma\.wait_group"):
            run(kernel.replace("WAIT", wait), {"out": out(128)}, threads=128, shared=4096)


def test_missing_proxy_fence() -> None:
    kernel = WGMMA.replace("WAIT", "wgmma.wait_group.sync.aligned 0;")
    with cusim.device(racecheck=True):
        run(kernel.replace("FENCE", "fence.proxy.async;"), {"out": out(128)}, threads=128, shared=4096)
        with pytest.raises(cusim.SimulationError, match=r"without fence\.proxy\.async"):
            run(kernel.replace("FENCE", ""), {"out": out(128)}, threads=128, shared=4096)


def test_operands_of_a_wgmma_overwritten() -> None:
    kernel = WGMMA.replace("FENCE", "fence.proxy.async;").replace(
        "WAIT", "MORE wgmma.wait_group.sync.aligned 0;"
    )
    store = "setp.ge.u32 %p2, %t, 96; mov.u32 %r98, 1; @%p2 st.shared.u32 [%smem], %r98;"
    with cusim.device(racecheck=True):
        run(kernel.replace("MORE", ""), {"out": out(128)}, threads=128, shared=4096)
        with pytest.raises(cusim.SimulationError, match="race on shared memory"):
            run(kernel.replace("MORE", store), {"out": out(128)}, threads=128, shared=4096)


def test_stmatrix_of_two_warps() -> None:
    """As st: bytes that lie there already are no race (of a tile that warps have copies of); others are."""
    body = """and.b32 %r1, %t, 31; mad.lo.u32 %r1, %r1, 16, %smem; VALUE
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r2, %r2, %r2, %r2};"""
    with cusim.device(racecheck=True):
        run(body.replace("VALUE", "mov.u32 %r2, 7;"), threads=64, shared=512)
        with pytest.raises(cusim.SimulationError, match="race on shared memory: write after write"):
            run(body.replace("VALUE", "shr.u32 %r2, %t, 5;"), threads=64, shared=512)


@pytest.mark.parametrize("seed", range(3))
def test_bulk_copy_into_what_is_still_read(seed: int) -> None:
    """The producer refills a buffer; it must wait until the other warps have read it."""
    body = f"""{OUT} add.u32 %r1, %smem, 1024; setp.eq.u32 %p1, %t, 0; mad.lo.u32 %r2, %t, 4, %smem;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; @%p1 mbarrier.init.shared::cta.b64 [%r1+8], 1;
    bar.sync 0; mov.u32 %r3, 0;
    $round: @!%p1 bra $wait; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%smem], [%src], 256, [%r1];
    $wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra $wait;
    ld.shared.u32 %r4, [%r2]; st.global.u32 [%rd1], %r4; BARRIER
    add.u32 %r1, %r1, 8; add.u32 %r3, %r3, 1; setp.lt.u32 %p3, %r3, 2; @%p3 bra $round;"""
    arrays = {"src": np.arange(64, dtype=np.uint32), "out": out()}
    with cusim.device(racecheck=True, seed=seed):
        run(body.replace("BARRIER", "bar.sync 0;"), arrays, threads=64, shared=2048)
        np.testing.assert_array_equal(arrays["out"], arrays["src"])
        with pytest.raises(cusim.SimulationError, match=r"race on shared memory|yet to fill"):
            run(body.replace("BARRIER", ""), arrays, threads=64, shared=2048)


def test_mbarrier_misuse() -> None:
    with pytest.raises(cusim.SimulationError, match=r"before mbarrier\.init"):
        run("mbarrier.arrive.shared::cta.b64 _, [%smem];", shared=16)
    body = """setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared::cta.b64 [%smem], 1; bar.warp.sync -1;
    @%p1 mbarrier.arrive.shared::cta.b64 _, [%smem], 2;"""
    with pytest.raises(cusim.SimulationError, match="more arrivals"):
        run(body, shared=16)


def test_unknown_instructions_are_named() -> None:
    for text in ("mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0}, {%r0}, {%r1}, {%f0}, %r2, 0;",
                 "tcgen05.fence::before_thread_sync;", "frobnicate.u32 %r1, %r2;"):  # fmt: skip
        with pytest.raises(cusim.SimulationError, match="is not supported by cusim"):
            run(text)


def test_too_much_shared_memory_for_the_device() -> None:
    with cusim.device(sm=90):
        run("st.shared.u32 [%smem], %t;", shared=200 * 1024)
    with cusim.device(sm=86), pytest.raises(cusim.SimulationError, match=r"sm_86 has 101376"):
        run("st.shared.u32 [%smem], %t;", shared=200 * 1024)


def test_a_source_path_may_hold_two_slashes() -> None:
    """nvcc from wheels writes `bin/..//include` into .file: no comment begins inside a string."""
    result = out()
    code = kernel("st.global.u32 [%out], 7;", ["out"])
    files = b'\n.file 1 "/include//a.hpp"\n.file 2 "/b.cuh"\n'
    cusim.run_ptx(code + files, b"k", (1,), (1,), [pointer(result)])
    assert result[0] == 7

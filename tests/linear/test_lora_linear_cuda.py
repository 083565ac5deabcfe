"""What is special to the CUDA kernels of LoRA: how all blocks make h at once, and who waits for whom."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import bitfuse
import cusim
import pytest
import torch
from accuracy import assert_accurate, worst_order
from backends import Target, targets
from bitfuse.core import cuda as counters
from bitfuse.core.device import device_of
from bitfuse.ops.linear import lowbit_linear_cuda as base
from bitfuse.ops.linear.lora_args import LoraArgs
from bitfuse.ops.linear.lora_linear import lora_linear_op
from bitfuse.ops.linear.multi_lora_linear import multi_lora_add_
from bitfuse.weights.weight import WeightTensors

native = pytest.importorskip("bitfuse._cuda")

TARGETS = targets("cuda")
HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]
H100 = (132, 232448, 233472, 90, 12.8)


@contextlib.contextmanager
def simulated(target: Target, multiprocessors: int, resident: int) -> Iterator[None]:
    """So many multiprocessors, and blocks in flight at once; races in global memory are faults too."""
    settings = dict(multiprocessors=multiprocessors, racecheck=2, resident=resident)
    with cusim.device(**settings) if target.sm else contextlib.nullcontext():
        yield


def case(
    m: int,
    n: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    a_dtype: torch.dtype | None = None,
    b_dtype: torch.dtype | None = None,
    format: str = "int4",
    **more: Any,
) -> tuple[torch.Tensor, LoraArgs]:
    w = bitfuse.quantize(torch.randn(n, k) / k**0.5, format, group_size=32)
    a = (torch.randn(rank, k) / k**0.5).to(a_dtype or dtype)
    b = (torch.randn(n, rank) / max(rank, 1) ** 0.5).to(b_dtype or dtype)
    return torch.randn(m, k).to(dtype), LoraArgs(w.op_args, a, b, **more)


def place(target: Target, p: LoraArgs) -> LoraArgs:
    def placed(t: Any) -> Any:
        return target.place(t)[0] if isinstance(t, torch.Tensor) else t

    few_bit = isinstance(p.weight, WeightTensors)
    weight = WeightTensors._make(map(placed, p.weight)) if few_bit else placed(p.weight)
    return LoraArgs(weight, *map(placed, p[1:]))


def check(target: Target, x: torch.Tensor, p: LoraArgs) -> list[torch.Tensor]:
    """Against float64; plain PyTorch rounds where PEFT does."""
    y, h = (t.cpu() for t in target.run(lora_linear_op, target.place(x)[0], (place(target, p),), 0.0))
    scaling = p.scaling * (1.0 if p.scale_by is None else float(p.scale_by))
    exact_h = x.double() @ p.lora_A.double().T
    exact = x.double() @ p.weight.dequantize().double().T + scaling * exact_h @ p.lora_B.double().T
    if p.out_scale is not None:
        exact *= p.out_scale.double()
    if p.bias is not None:
        exact += p.bias.double()
    plain, _ = lora_linear_op.reference(x, (p,), 0.0)
    dot: Any = lambda x, a: torch.nn.functional.linear(x, a).float()  # noqa: E731
    plain_h = worst_order(dot, x.to(p.lora_A.dtype), p.lora_A, exact_h)
    what = f"{tuple(x.shape)} {p.shape} {p.lora_A.dtype} {p.lora_B.dtype}"
    assert_accurate(y, exact, plain, what)
    assert_accurate(h, exact_h, plain_h, f"h of {what}")
    return [y, h]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_number_of_tokens(target: Target, dtype: torch.dtype) -> None:
    for m in (1, 7, 8, 9, 16, 31, 64):
        check(target, *case(m, 73, 640, 16, dtype, bias=torch.randn(73, dtype=dtype), scaling=0.5))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_adapters_of_other_dtypes(target: Target, dtype: torch.dtype) -> None:
    for a_dtype, b_dtype in itertools.product(FLOATS, FLOATS):
        check(target, *case(3, 40, 512, 20, dtype, a_dtype, b_dtype))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_any_rank(target: Target) -> None:
    for rank in target.pick((0, 1, 2, 5, 8, 15, 17, 33, 64, 100, 256, 512)):
        check(target, *case(2, 37, 320, rank, torch.float16))
    check(target, *case(40, 16, 64, 509, torch.bfloat16))


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8", "mxfp4"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_formats_and_epilogues(target: Target, format: str) -> None:
    n = 69
    more: dict[str, Any] = dict(
        bias=torch.randn(n).half(), out_scale=torch.rand(n) + 0.5, scale_by=torch.tensor(0.25), scaling=3.0
    )
    check(target, *case(5, n, 640, 12, torch.float16, format=format, **more))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_offsets_and_shared_scales(target: Target) -> None:
    cases: tuple[tuple[int, dict[str, Any]], ...] = (
        (1, dict(format="int4", group_size=32, offset=True)),
        (12, dict(format="int8", group_size=64, offset=True)),
        (40, dict(format="int4", group_size=64, offset=True, scale_rows=32)),
        (5, dict(format="fp8", group_size=128, scale_rows=128)),
    )
    for m, options in cases:
        x, p = case(m, 150, 640, 12, torch.bfloat16, bias=torch.randn(150).bfloat16(), scaling=0.5)
        check(target, x, p._replace(weight=bitfuse.quantize(torch.randn(150, 640) / 25, **options).op_args))


@pytest.mark.parametrize("k", [8, 24, 1000, 7392])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_rows_of_any_length(target: Target, k: int) -> None:
    w = bitfuse.quantize(torch.randn(40, k) / k**0.5, "int4", group_size=-1)
    a, b = torch.randn(9, k) / k**0.5, torch.randn(40, 9) / 3
    check(target, torch.randn(3, k).bfloat16(), LoraArgs(w.op_args, a.bfloat16(), b.bfloat16()))


@pytest.mark.parametrize(("m", "k"), [(1, 8192), (12, 4096), (40, 4096)])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_blocks_that_split_k_agree_on_the_sums(target: Target, m: int, k: int) -> None:
    """Both W's product and h are sums of many blocks, in one order."""
    x, p = case(m, 72, k, 24, torch.float16)
    with simulated(target, multiprocessors=32, resident=64):
        plan = base._plan(m, 72, k, "int4", False, device_of(torch.device("cpu")), True)
        assert plan.splits > 1 and plan.tiles * plan.splits > 4
        first = check(target, x, p)
        for _ in range(2):  # another schedule each time
            assert all(map(torch.equal, check(target, x, p), first))
    assert not any(bool(kept.any()) for kept in counters._counters.values())


@pytest.mark.parametrize("resident", [1, 3])
@pytest.mark.skipif(torch.cuda.is_available(), reason="how many blocks start at once is the simulator's")
def test_blocks_that_can_not_start_are_not_waited_for(resident: int) -> None:
    """Few blocks in flight: those that make h come after those that want it, and these lose patience."""
    for target, m in itertools.product(TARGETS, (1, 20)):
        x, p = case(m, 264, 2048, 40, torch.bfloat16)
        with simulated(target, multiprocessors=16, resident=16):
            first = check(target, x, p)
        with simulated(target, multiprocessors=16, resident=resident):
            assert all(map(torch.equal, check(target, x, p), first))
        assert not any(bool(kept.any()) for kept in counters._counters.values())


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_several_projections_and_views(target: Target) -> None:
    wide = torch.randn(6, 1024).half()
    q, v = case(6, 32, 512, 8, torch.float16)[1], case(6, 48, 512, 16, torch.float16)[1]
    x = target.place(wide)[0]
    for view, plain_x in ((x[:, 256:768], wide[:, 256:768]), (x[:, 1:513], wide[:, 1:513])):
        got = target.run(lora_linear_op, view, (place(target, q), place(target, v)), 0.0)
        assert [t.shape for t in got] == [(6, 32), (6, 48), (6, 8), (6, 16)]
        for i, p in enumerate((q, v)):
            exact = (
                plain_x.double() @ (p.weight.dequantize().double() + p.lora_B.double() @ p.lora_A.double()).T
            )
            plain = lora_linear_op.reference(plain_x, (p,), 0.0)[0]
            assert_accurate(got[i].cpu(), exact, plain)
    odd = LoraArgs(q.weight, torch.randn(8, 513).half()[:, 1:], torch.randn(8, 32).half().T)
    check(target, wide[:, :512].contiguous(), odd)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_says_what_it_does_not_serve(target: Target) -> None:
    x, p = case(2, 16, 64, 4, torch.float16)

    def reason(x: torch.Tensor, p: LoraArgs, dropout_p: float = 0.0) -> str:
        return target.reason(lora_linear_op, target.place(x)[0], (place(target, p),), dropout_p) or ""

    assert reason(x, p) == ""
    assert "dropout_p is 0.1" in reason(x, p, 0.1)
    assert "dense" in reason(x, p._replace(weight=torch.zeros(16, 64).half()))
    assert "float32" in reason(x.float(), p)
    assert "M = 65" in reason(x[:1].repeat(65, 1), p)
    y, h = target.run(lora_linear_op, target.place(x[:0])[0], (place(target, p),), 0.0)
    assert y.shape == (0, 16) and h.shape == (0, 4)


def descriptor(address: int, *shape: int, dtype: str = "FLOAT16") -> Any:
    """Of numbers that may be anybody's."""
    return native.Tensor(address, getattr(native.Dtype, dtype), shape)


def adapters(**change: Any) -> dict[str, Any]:
    """Arguments of a descriptor of adapters that point nowhere."""
    good = {
        "lora_A": descriptor(64, 16, 64), "lora_B": descriptor(64, 16, 16),
        "h": descriptor(64, 2, 16, dtype="FLOAT32"), "slices": descriptor(64, 4096, dtype="FLOAT32"),
        "counters": descriptor(64, 64, dtype="INT32"), "participants": 1,
    }  # fmt: skip
    return good | change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: {"lora_A": descriptor(0, 16, 64)}, "lora_A is null"),
        (lambda: {"lora_A": descriptor(8, 16, 64)}, "lora_A is 8, expected a multiple of 16"),
        (lambda: {"lora_A": descriptor(64, 16, 64, dtype="INT32")}, "lora_A is of dtype int32"),
        (lambda: {"lora_A": descriptor(64, 8, 64)}, r"lora_A is of shape \[8, 64\]"),
        (lambda: {"lora_B": descriptor(0, 16, 16)}, "lora_B is null"),
        (lambda: {"lora_B": descriptor(1, 16, 16)}, "lora_B is 1"),
        (lambda: {"lora_B": descriptor(64, 16, 8)}, r"lora_B is of shape \[16, 8\]"),
        (lambda: {"lora_B": descriptor(64, 16, 16, dtype="BOOL")}, "lora_B is of dtype bool"),
        (lambda: {"table": descriptor(4, 3, 2, dtype="INT64")}, "table is 4"),
        (lambda: {"table": descriptor(64, 2, 2, dtype="INT64")}, r"table is of shape \[2, 2\]"),
        (lambda: {"table": descriptor(64, 3, 0, dtype="INT64")}, "adapters is 0"),
        (lambda: {"ids": descriptor(4, 2, dtype="INT64")}, "ids is 4"),
        (lambda: {"ids": descriptor(64, 3, dtype="INT32")}, r"ids is of shape \[3\]"),
        (lambda: {"scaling": descriptor(2, 1, dtype="FLOAT32")}, "scaling is 2"),
        (lambda: {"h": descriptor(0, 2, 16, dtype="FLOAT32")}, "h is null"),
        (lambda: {"h": descriptor(64, 2, 513, dtype="FLOAT32")}, "rank is 513"),
        (lambda: {"h": descriptor(64, 2, 0, dtype="FLOAT32")}, "rank is 0"),
        (lambda: {"slices": descriptor(4, 4096, dtype="FLOAT32")}, "slices is 4"),
        (lambda: {"slices": descriptor(64, 64, dtype="FLOAT32")}, r"slices is of shape \[64\]"),
        (lambda: {"counters": descriptor(4, 64, dtype="INT32")}, "counters is 4"),
        (lambda: {"counters": descriptor(64, 2, dtype="INT32")}, r"counters is of shape \[2\]"),
        (lambda: {"participants": 0}, "participants is 0"),
    ],
)
def test_the_binding_names_what_is_wrong(change: Callable[[], dict[str, Any]], words: str) -> None:
    native.Adapters(**adapters())
    with pytest.raises(ValueError, match=f"^{words}"):
        native.Adapters(**adapters(**change()))


def test_the_bindings_name_what_is_wrong_with_a_product() -> None:
    x, y = descriptor(64, 2, 64), descriptor(64, 2, 16)
    assert base._code("int4") is not None  # the extension knows the format
    plan = native.plan_lowbit_linear(2, 16, 64, native.CodeKind.INT4, False, native.DeviceInfo(*H100), True)
    codes, scales = descriptor(64, 16, 32, dtype="UINT8"), descriptor(64, 16, 2, dtype="FLOAT32")
    weight = (codes, scales, None, None, None, "int4", 32, None, 1)
    many = native.Adapters(**adapters(participants=8, slices=descriptor(64, 8192, dtype="FLOAT32")))
    wide = native.Adapters(**adapters(lora_A=descriptor(64, 16, 72)))
    tall = native.Adapters(**adapters(lora_B=descriptor(64, 24, 16)))
    more = native.Adapters(**adapters(h=descriptor(64, 3, 16, dtype="FLOAT32")))
    for others, name in (
        ({"out_scale": descriptor(2, 16, dtype="FLOAT32")}, "out_scale"),
        ({"out_scale": descriptor(64, 8, dtype="FLOAT32")}, "out_scale"),
        ({"adapters": many}, "participants"), ({"adapters": wide}, "lora_A"), ({"adapters": tall}, "lora_B"),
        ({"adapters": more}, "h"),
    ):  # fmt: skip
        assert plan.tiles * plan.splits < 8
        with pytest.raises(ValueError, match=rf"^{name} is"):
            native.lowbit_linear(x, weight, None, y, plan, 0, **others)
    good: dict[str, Any] = {"x": x, "y": y, "adapters": native.Adapters(**adapters()), "stream": 0}
    for change, name in (
        ({"x": descriptor(8, 2, 64)}, "x"), ({"y": descriptor(2, 2, 16)}, "y"),
        ({"x": descriptor(64, 65, 64)}, "m"),
        ({"x": descriptor(64, 2, 60)}, "x"), ({"y": descriptor(64, 3, 16)}, "y"),
        ({"x": descriptor(64, 2, 64, dtype="FLOAT32")}, "x"), ({"y": descriptor(64, 2, 24)}, "lora_B"),
        ({"adapters": more}, "h"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name} is"):
            native.multi_lora_add(**good | change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts are the simulator's")
def test_what_rides_along_reads_little() -> None:
    """A, B and x once, and less than half of that for what blocks pass on; few lanes meet in a bank."""
    for m, n, k, rank in ((1, 256, 2048, 16), (64, 256, 2048, 16)):
        x, p = case(m, n, k, rank, torch.float16)
        counted = []
        for args in (p._replace(lora_A=p.lora_A[:0], lora_B=p.lora_B[:, :0]), p):
            with cusim.device(counts=True), bitfuse.use_backend("cuda"):
                cusim.counts()
                lora_linear_op(x, (args,), 0.0)
                counted.append(next(iter(cusim.counts().values())))
        without, rides = counted
        assert rides["local_accesses"] == 0
        assert rides["shared_wavefronts"] <= 1.01 * rides["shared_wavefronts_ideal"]
        once = (p.lora_A.nbytes + p.lora_B.nbytes + x.nbytes) / 32
        assert rides["global_sectors"] - without["global_sectors"] <= 1.5 * once


def check_many(
    target: Target, ids: torch.Tensor, ranks: list[int], n: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    """An adapter of each of these ranks, one tensor of all where the ranks are one."""
    lora_a = [torch.randn(r, k).to(dtype) / k**0.5 for r in ranks]
    lora_b = [torch.randn(n, r).to(dtype) / max(r, 1) ** 0.5 for r in ranks]
    scaling = torch.rand(len(ranks)) + 0.5
    x, before = torch.randn(len(ids), k).to(dtype), torch.randn(len(ids), n).to(dtype)
    exact, plain = before.double(), before.clone()
    for m, e in enumerate(ids.tolist()):
        if 0 <= e < len(ranks):
            exact[m] += float(scaling[e]) * (lora_b[e].double() @ (lora_a[e].double() @ x[m].double()))
    multi_lora_add_.reference(plain, x, lora_a, lora_b, scaling, ids.clamp(-1, len(ranks) - 1))
    if len(set(ranks)) == 1:
        lora_a, lora_b = [torch.stack(lora_a)], [torch.stack(lora_b)]
    y, *rest = target.place(before, x, scaling, ids)
    target.run(multi_lora_add_, y, rest[0], target.place(*lora_a), target.place(*lora_b), *rest[1:])
    assert_accurate(y.cpu(), exact, plain, f"{ids.tolist()} {ranks}")
    none = (ids < 0) | (ids >= len(ranks))
    assert torch.equal(y.cpu()[none], before[none])
    return y.cpu()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_rows_with_an_adapter_each(target: Target, dtype: torch.dtype) -> None:
    check_many(target, torch.randperm(64), [16] * 64, 72, 512, dtype)
    check_many(target, torch.arange(23, dtype=torch.int32) - 1, [16, 4, 0, 33] * 5, 40, 264, dtype)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_any_mix_of_adapters(target: Target) -> None:
    ranks = [8, 40, 5]
    for m in target.pick((1, 8, 12, 17, 32, 33, 63, 64)):
        check_many(target, torch.randint(-1, 3, (m,)), ranks, 40, 320, torch.float16)
    check_many(target, torch.full((64,), 1), ranks, 40, 320, torch.float16)
    check_many(target, torch.full((5,), -1), ranks, 40, 320, torch.float16)
    check_many(target, torch.full((3,), 9), [4], 8, 8, torch.bfloat16)
    if target.sm:  # ids that are not there: only the kernel itself is asked
        ids = torch.tensor([0, 7, -5, 2**40, 2])
        check_many(target, ids, ranks, 40, 320, torch.float16)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_an_adapter_that_is_no_number_spoils_its_own_rows_only(target: Target) -> None:
    ids = torch.arange(16) % 3
    a, b = torch.randn(3, 8, 64).half(), torch.randn(3, 16, 8).half()
    a[1, 3], b[1, 5] = float("inf"), float("nan")
    y, *args = target.place(torch.zeros(16, 16).half(), torch.randn(16, 64).half(), torch.ones(3), ids)
    target.run(multi_lora_add_, y, args[0], target.place(a), target.place(b), *args[1:])
    assert torch.equal(y.cpu().isfinite().all(1), ids != 1)


@pytest.mark.parametrize("resident", [1, 3, 32])
@pytest.mark.skipif(torch.cuda.is_available(), reason="how many blocks start at once is the simulator's")
def test_many_adapters_give_the_same_bits_however_blocks_are_scheduled(resident: int) -> None:
    ids = torch.arange(20) % 7
    for target in TARGETS:
        found = []
        for at_once in (32, resident):
            torch.manual_seed(1)
            with simulated(target, multiprocessors=16, resident=at_once):
                found.append(check_many(target, ids, [24] * 7, 72, 1024, torch.float16))
        assert torch.equal(*found)
        assert not any(bool(kept.any()) for kept in counters._counters.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_runs_in_a_graph() -> None:
    x, p = case(4, 64, 8192, 16, torch.float16)
    x, p = x.cuda(), place(TARGETS[0], p)
    with bitfuse.use_backend("cuda"):
        wanted = lora_linear_op(x, (p,), 0.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = lora_linear_op(x, (p,), 0.0)
    for _ in range(3):
        for t in got:
            t.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, got, wanted))

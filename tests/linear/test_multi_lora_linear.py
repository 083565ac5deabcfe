"""multi_lora_linear and its gradients: every backend, one test; then what each backend has of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bitfuse
import cusim
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.kernels.core.launch import HANDLES
from bitfuse.ops.linear import lowbit_linear_cpu as native
from bitfuse.ops.linear import multi_lora_args
from bitfuse.ops.linear import multi_lora_linear_cpu as cpp
from bitfuse.ops.linear.multi_lora_linear import multi_lora_add_, multi_lora_linear
from levels import LEVELS

OP = sys.modules["bitfuse.ops.linear.multi_lora_linear"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# of x, of lora_A, of lora_B
KINDS = [(d, d, d) for d in DTYPES]
KINDS += [
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float16, torch.float16, torch.bfloat16),
]
TARGETS = pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"), ids=str)
TRITON = pytest.mark.parametrize("target", targets("triton"), ids=str)
# what a decode kernel leaves to Triton, and says so
REFUSED = re.compile("float32|multiples? of (8|16)|M = |not contiguous")


class Case(NamedTuple):
    """Shapes, and how many adapters; one rank stacks them, several are a list."""

    m: int
    n: int
    k: int
    adapters: int
    ranks: tuple[int, ...]
    mix: str


CASES = [
    Case(1, 8, 8, 1, (1,), "identical"),
    Case(9, 73, 264, 4, (16, 1, 0, 20), "uniform"),
    Case(5, 40, 33, 7, (4, 1, 0, 20, 8, 3, 70), "distinct"),
    Case(150, 263, 520, 4, (16,), "zipf"),
    Case(66, 71, 130, 3, (8, 33, 3), "skewed"),
]


def ids_of(mix: str, m: int, count: int) -> torch.Tensor:
    """Who asks for which adapter; in each but the identical and the distinct mix some ask for none."""
    if mix == "identical":
        return torch.full((m,), count - 1)
    if mix == "distinct":
        return torch.arange(m) % count
    if mix == "skewed":  # one adapter has nine rows in ten
        return torch.where(torch.rand(m) < 0.9, 0, torch.randint(-1, count, (m,)))
    if mix == "zipf":
        return torch.multinomial(1.0 / torch.arange(1, count + 2), m, replacement=True) - 1
    return torch.randint(-1, count, (m,))


def adapters_of(
    case: Case, a_dtype: torch.dtype, b_dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """As the op takes them."""
    if len(case.ranks) == 1:
        a = torch.randn(case.adapters, case.ranks[0], case.k) / case.k**0.5
        return [a.to(a_dtype)], [torch.randn(case.adapters, case.n, case.ranks[0]).to(b_dtype)]
    lora_a = [(torch.randn(r, case.k) / case.k**0.5).to(a_dtype) for r in case.ranks]
    return lora_a, [torch.randn(case.n, r).to(b_dtype) for r in case.ranks]


def each(adapters: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(adapters[0]) if adapters[0].dim() == 3 else adapters


def add_plain(
    y: torch.Tensor,
    x: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    scaling: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """The formula, a row at a time, in plain PyTorch; in float64 if y is."""
    linear = torch.nn.functional.linear
    y = y.clone()
    for m, e in enumerate(ids.tolist()):
        if e >= 0:
            one, two = (t.double() if y.dtype == torch.float64 else t for t in (each(a)[e], each(b)[e]))
            h = linear(x[m : m + 1].to(one.dtype), one).to(two.dtype)
            y[m] = (y[m] + linear(h, two)[0] * scaling[e].to(torch.float64)).to(y.dtype)
    return y


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(d)[6:] for d in kind))
@TARGETS
def test_add(target: Target, kind: tuple[torch.dtype, ...]) -> None:
    for i, case in enumerate(target.pick(CASES)):
        a, b = adapters_of(case, *kind[1:])
        x, before = torch.randn(case.m, case.k).to(kind[0]), torch.randn(case.m, case.n).to(kind[0])
        scaling = torch.rand(case.adapters) + 0.5
        ids = ids_of(case.mix, case.m, case.adapters).to(torch.int32 if i % 2 else torch.int64)
        exact = add_plain(before.double(), x.double(), a, b, scaling, ids)
        plain = add_plain(before, x, a, b, scaling, ids)
        y, *placed = target.place(before, x, scaling, ids)
        given = (placed[0], target.place(*a), target.place(*b), *placed[1:])
        if reason := target.reason(multi_lora_add_, y, *given):
            assert target.backend == "cuda" and REFUSED.search(reason), reason
            continue
        target.run(multi_lora_add_, y, *given)
        assert_accurate(y.cpu(), exact, plain, f"{case}")
        assert torch.equal(y.cpu()[ids < 0], before[ids < 0]), "a row of no adapter was written"
        (again,) = target.place(before)
        target.run(multi_lora_add_, again, *given)
        assert torch.equal(y, again), "another run, other numbers"


def small(
    dtype: torch.dtype = torch.float32, format: str | None = None
) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, w, stacked lora_A and lora_B, ids."""
    w = torch.randn(40, 64) / 8
    weight = w.to(dtype) if format is None else bitfuse.quantize(w, format, group_size=32)
    a, b = torch.randn(3, 4, 64) / 8, torch.randn(3, 40, 4)
    return (
        torch.randn(6, 64, dtype=dtype),
        weight,
        a.to(dtype),
        b.to(dtype),
        torch.tensor([0, -1, 2, 2, 1, 0]),
    )


@pytest.mark.parametrize("format", [None, "int4", "nf4", "int3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_the_base(dtype: torch.dtype, format: str | None) -> None:
    x, w, a, b, ids = small(dtype, format)
    bias, scaling = torch.randn(40, dtype=dtype), torch.tensor([0.5, 1.0, 2.0])
    dense = w if format is None else w.dequantize()
    base = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    exact = add_plain(base, x.double(), [a], [b], scaling, ids)
    plain = torch.nn.functional.linear(x, dense.to(dtype), bias)
    plain = add_plain(plain, x, [a], [b], scaling, ids)
    for given in (scaling, [0.5, 1, 2], (0.5, 1.0, 2.0)):
        assert_accurate(multi_lora_linear(x, w, a, b, given, ids, bias), exact, plain)
    lists = multi_lora_linear(x, w, list(a), list(b), scaling, ids, bias)
    assert torch.equal(lists, multi_lora_linear(x, w, a, b, scaling, ids, bias))
    one = multi_lora_linear(x, w, a, b, 2.0, ids, bias)
    assert torch.equal(one, multi_lora_linear(x, w, a, b, torch.tensor(2.0), ids, bias))
    assert torch.equal(one, multi_lora_linear(x, w, a, b, [2.0] * 3, ids, bias))


@pytest.mark.parametrize("format", [None, "int4"])
def test_without_adapters_it_is_the_base_bit_for_bit(format: str | None) -> None:
    x, w, a, b, ids = small(format=format)
    base = bitfuse.lowbit_linear(x, w) if format else torch.nn.functional.linear(x, w)
    none = torch.full_like(ids, -1)
    assert torch.equal(multi_lora_linear(x, w, a, b, 1.0, none), base)
    assert torch.equal(multi_lora_linear(x, w, [], [], 1.0, none), base)
    assert torch.equal(multi_lora_linear(x, w, a[:0], b[:0], [], none), base)
    assert torch.equal(multi_lora_linear(x, w, a[:, :0], b[..., :0], 1.0, ids), base)


@TARGETS
def test_an_id_that_is_not_there(target: Target) -> None:
    """The CPU refuses it; a GPU, where the host does not look, takes it for none and reads nothing."""
    x, _, a, b, ids = small(torch.float16)
    for many in (1, 20):  # decode and prefill
        before = torch.randn(6 * many, 40, dtype=torch.float16)
        for wrong in (-2, 3, 2**31 - 1):
            bad = ids.repeat(many)
            bad[1] = wrong
            y, *placed = target.place(before, x.repeat(many, 1), a, b, torch.ones(3), bad)
            given = (placed[0], [placed[1]], [placed[2]], *placed[3:])
            if target.reason(multi_lora_add_, y, *given):
                continue
            if target.backend in ("cpp", "reference") and target.device == "cpu":
                with pytest.raises(
                    ValueError, match=rf"adapter_ids holds {wrong}, expected -1 \(none\) to 2"
                ):
                    target.run(multi_lora_add_, y, *given)
            else:
                target.run(multi_lora_add_, y, *given)
                good = add_plain(before, x.repeat(many, 1), [a], [b], torch.ones(3), ids.repeat(many))
                assert torch.equal(y.cpu()[1], before[1])
                torch.testing.assert_close(y.cpu(), good, rtol=1e-2, atol=1e-2)


def test_check_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """With BITFUSE_CHECK=1 a GPU refuses the id too."""
    x, _, a, b, ids = small()
    target = targets("triton")[0]
    y, *placed = target.place(torch.zeros(6, 40), x, a, b, torch.ones(3), torch.where(ids < 0, 7, ids))
    monkeypatch.setattr(OP, "_CHECK_IDS", True)
    with pytest.raises(ValueError, match="adapter_ids holds 7"):
        target.run(multi_lora_add_, y, placed[0], [placed[1]], [placed[2]], *placed[3:])


@TARGETS
def test_adapters_and_ids_change_in_place(target: Target) -> None:
    """What a serving loop does between two replays of a graph: nothing is compiled or built anew."""
    x, _, a, b, ids = small(torch.bfloat16)
    before = torch.randn(6, 40, dtype=torch.bfloat16)
    x_, scaling, ids_ = target.place(x, torch.ones(3), ids)
    a_, b_ = target.place(*a), target.place(*b)
    if target.reason(multi_lora_add_, target.place(before)[0], x_, a_, b_, scaling, ids_):
        return

    def check() -> int:
        (y,) = target.place(before)
        target.run(multi_lora_add_, y, x_, a_, b_, scaling, ids_)
        given = [t.cpu() for t in a_], [t.cpu() for t in b_], scaling.cpu(), ids_.cpu()
        exact = add_plain(before.double(), x.double(), *given)
        assert_accurate(y.cpu(), exact, add_plain(before, x, *given))
        return len(multi_lora_args._tables)

    tables = check()
    a_[2].copy_(torch.randn(4, 64))
    scaling[2] = 3
    ids_.copy_(torch.tensor([2, 2, -1, 0, 1, 2]))
    assert check() == tables
    b_[1].data = target.place(torch.randn(40, 4, dtype=torch.bfloat16))[0]  # moved: found again
    check()


# gradients


def plain_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """All rows at once, in the dtype of the adapters, for autograd."""
    s, e = torch.where(ids < 0, 0, scaling.to(x.dtype)[ids.clamp(min=0)]), ids.clamp(min=0)
    h = torch.einsum("mk,mrk->mr", x, a[e])
    return torch.nn.functional.linear(x, w, bias) + s[:, None] * torch.einsum("mr,mnr->mn", h, b[e])


@pytest.mark.parametrize("format", [None, "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@TARGETS
def test_gradients(target: Target, dtype: torch.dtype, format: str | None) -> None:
    x, w, a, b, ids = small(dtype, format)
    dense = w if format is None else w.dequantize(dtype)
    bias, scaling, grad = (
        torch.randn(40, dtype=dtype),
        torch.tensor([0.5, 1.0, 2.0]),
        torch.randn(6, 40, dtype=dtype),
    )
    exact_w = dense if format is None else w.dequantize()

    def gradients(function: Callable[..., torch.Tensor], *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in given]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(given[0]))

    def plain(double: bool) -> tuple[torch.Tensor, ...]:
        weight = (exact_w if double else dense).to(torch.float64 if double else dtype)
        given = [t.double() if double else t for t in (x, a, b, bias)]
        return gradients(lambda x, a, b, bias: plain_linear(x, weight, a, b, scaling, ids, bias), *given)

    placed_w = w if format is None else target.place_weight(w)
    if isinstance(placed_w, torch.Tensor):
        (placed_w,) = target.place(placed_w)
    scaling_, ids_ = target.place(scaling, ids)
    if target.backend == "cuda":
        return  # its part is the forward

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients(
            lambda x, a, b, bias: multi_lora_linear(x, placed_w, a, b, scaling_, ids_, bias), *given
        )

    found = target.run(run, *target.place(x, a, b, bias))
    for name, got, exact, other in zip(
        ("x", "A", "B", "bias"), found, plain(True), plain(False), strict=True
    ):
        assert_accurate(got.cpu(), exact, other, name)


def test_gradients_reach_only_what_asks_for_them() -> None:
    x, w, a, b, ids = small()
    bias = torch.randn(40)
    for asked in range(32):
        leaves = [t.clone().requires_grad_(bool(asked >> i & 1)) for i, t in enumerate((x, a, b, bias, w))]
        y = multi_lora_linear(leaves[0], leaves[4], leaves[1], leaves[2], 1.0, ids, leaves[3])
        assert y.requires_grad == bool(asked)
        if asked:
            y.square().sum().backward()
        assert [t.grad is not None for t in leaves] == [bool(asked >> i & 1) for i in range(5)]
    some = [t.clone().requires_grad_(i == 1) for i, t in enumerate(a)]
    multi_lora_linear(x, w, some, list(b), 1.0, ids).sum().backward()
    assert [t.grad is not None for t in some] == [False, True, False]
    with torch.no_grad():
        assert not multi_lora_linear(x.requires_grad_(), w, a, b, 1.0, ids).requires_grad


def test_an_adapter_of_no_row_gets_zeros() -> None:
    x, w, a, b, ids = small()
    a.requires_grad_()
    multi_lora_linear(x, w, a, b, 1.0, ids.clamp(max=1)).sum().backward()
    assert a.grad is not None and not a.grad[2].any() and a.grad[1].any()


def test_act_order() -> None:
    """The base takes x's columns in the order of its groups, the adapters in their own."""
    x, _, a, b, ids = small()
    w = bitfuse.quantize(torch.randn(40, 64), "int4", group_size=32, g_idx=torch.randperm(64) // 32)
    x.requires_grad_()
    y, dense = (multi_lora_linear(x, v, a, b, 1.0, ids) for v in (w, w.dequantize()))
    torch.testing.assert_close(y, dense)
    got, wanted = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y, dense))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_scales_made_in_inference_mode_serve_training() -> None:
    x, w, a, b, ids = small()
    with torch.inference_mode():
        multi_lora_linear(x, w, a, b, 0.125, ids)
    a.requires_grad_()
    multi_lora_linear(x, w, a, b, 0.125, ids).sum().backward()


def test_autocast() -> None:
    x, w, a, b, ids = small()
    with torch.autocast("cpu", torch.bfloat16):
        y = multi_lora_linear(x, w, a, b, 1.0, ids, torch.randn(40))
    assert y.dtype == torch.bfloat16


# shapes, torch's own machinery, what is refused


def test_any_leading_shape_and_strides() -> None:
    _, w, a, b, _ = small()
    wide = torch.randn(6, 4, 128)
    for x in (
        torch.randn(64), wide[..., :64], wide[..., ::2], wide.transpose(0, 1)[..., 64:],
        torch.randn(64, 3).t(), torch.randn(1, 64).expand(5, 64), torch.randn(2, 1, 3, 64),
    ):  # fmt: skip
        ids = torch.randint(-1, 3, x.shape[:-1])
        flat = x.reshape(-1, 64)
        wanted = plain_linear(flat, w, a, b, torch.ones(3), ids.reshape(-1), torch.zeros(40))
        got = multi_lora_linear(x, w, a, b, 1.0, ids)
        torch.testing.assert_close(got, wanted.view(*x.shape[:-1], 40), rtol=1e-4, atol=1e-4)
        scattered = torch.stack([ids, ids], -1)[..., 0]
        assert torch.equal(got, multi_lora_linear(x, w, a, b, 1.0, scattered))
    turned = a.mT.contiguous().mT, b.mT.contiguous().mT
    assert torch.equal(got, multi_lora_linear(x, w, *turned, 1.0, ids))
    for shape in ((0, 64), (3, 0, 64)):
        x = torch.zeros(shape, requires_grad=True)
        y = multi_lora_linear(x, w, a, b, 1.0, torch.zeros(shape[:-1], dtype=torch.int64))
        assert y.shape == (*shape[:-1], 40)
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == shape


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, stacked: bool) -> None:
    x, _, a, b, ids = small(dtype)
    adapters = ([a], [b]) if stacked else (list(a), list(b))
    y, scaling = torch.randn(6, 40, dtype=dtype), torch.rand(3)
    torch.library.opcheck(torch.ops.bitfuse.multi_lora_add_.default, (y, x, *adapters, scaling, ids))
    given = (y, x, *adapters, scaling, ids, True, True)
    torch.library.opcheck(torch.ops.bitfuse.multi_lora_grads.default, given)


@pytest.mark.parametrize(("format", "compiler"), [(None, "aot_eager"), ("int4", "inductor")])
def test_compiles_without_a_break(format: str | None, compiler: str) -> None:
    x, w, a, b, ids = small(format=format)

    def function(*given: Any) -> torch.Tensor:
        x, a, b, ids = given
        return multi_lora_linear(x, w, a, b, [0.5, 1.0, 2.0], ids)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)
    assert torch.equal(compiled(x, a, b, ids), function(x, a, b, ids))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(x, a + 1, b, ids.flip(0)), function(x, a + 1, b, ids.flip(0)))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    wanted = torch.autograd.grad(function(*leaves, ids).square().sum(), leaves)
    found = torch.autograd.grad(compiled(*leaves, ids).square().sum(), leaves)
    torch.testing.assert_close(found, wanted)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(x=[1.0]), TypeError, "x is a list"),
    (dict(x=torch.randn(6, 64).double()), TypeError, "x has dtype torch.float64"),
    (dict(x=torch.randn(6, 63)), ValueError, r"w has shape \[40, 64\], expected \[40, 63\]"),
    (dict(w=[1.0]), TypeError, "w is a list, expected a tensor or a bitfuse.LowBitWeight"),
    (dict(w=torch.randn(40, 64).half()), TypeError, "w has dtype torch.float16, expected torch.float32"),
    (dict(lora_A=torch.randn(4, 64)), ValueError, r"lora_A has shape \[4, 64\], expected three dimensions"),
    (dict(lora_A=3), TypeError, "lora_A is a int"),
    (dict(lora_A=[3.0] * 3), TypeError, r"lora_A\[0\] is a float"),
    (dict(lora_A=torch.randn(3, 4, 63)), ValueError, r"lora_A has shape \[3, 4, 63\], expected \[3, 4, 64\]"),
    (dict(lora_A=torch.randn(2, 4, 64)), ValueError, r"lora_B has shape \[3, 40, 4\], expected \[2, 40, 4\]"),
    (dict(lora_A=torch.randn(3, 513, 64)), ValueError, r"lora_B has shape \[3, 40, 4\], expected \[3, 40, 5"),
    (dict(lora_A=list(torch.randn(3, 4, 64))), ValueError, "expected both stacked or both lists"),
    (dict(lora_B=torch.randn(3, 40, 4).double()), TypeError, "lora_B has dtype torch.float64"),
    (dict(lora_B=torch.randn(3, 40, 4, device="meta")), ValueError, "lora_B is on meta"),
    (dict(scaling="1"), TypeError, "scaling is '1'"),
    (dict(scaling=["1"] * 3), TypeError, "scaling holds '1'"),
    (dict(scaling=True), TypeError, "scaling is True"),
    (dict(scaling=float("nan")), ValueError, "scaling holds nan"),
    (dict(scaling=[1.0, 2.0]), ValueError, "scaling has 2 numbers, expected 3"),
    (dict(scaling=torch.ones(2)), ValueError, r"scaling has shape \[2\], expected \[3\]"),
    (dict(scaling=torch.ones(3, dtype=torch.int32)), TypeError, "scaling is a tensor of torch.int32"),
    (dict(adapter_ids=[0] * 6), TypeError, "adapter_ids is a list"),
    (dict(adapter_ids=torch.zeros(6)), TypeError, "adapter_ids has dtype torch.float32"),
    (dict(adapter_ids=torch.full((5,), 0)), ValueError, r"adapter_ids has shape \[5\], expected \[6\]"),
    (dict(adapter_ids=torch.full((6,), 3)), ValueError, r"adapter_ids holds 3, expected -1 \(none\) to 2"),
    (dict(bias=torch.randn(39)), ValueError, r"bias has shape \[39\], expected \[40\]"),
    (dict(bias=1.0), TypeError, "bias is a float"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "words"), BAD, ids=[b[2][:40] for b in BAD])
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    x, w, a, b, ids = small()
    given = {"x": x, "w": w, "lora_A": a, "lora_B": b, "scaling": 1.0, "adapter_ids": ids}
    with pytest.raises(error, match=words):
        multi_lora_linear(**{**given, **changes})


def test_lists_are_checked_each() -> None:
    x, w, a, b, ids = small()

    def call(lora_A: list[torch.Tensor], lora_B: list[torch.Tensor]) -> None:
        multi_lora_linear(x, w, lora_A, lora_B, 1.0, ids)

    for change, words in (
        ((list(a)[:2], list(b)), "lora_A is a list of 2 and lora_B a list of 3"),
        (([a[0], a[1], a[2, :3]], list(b)), r"lora_B\[2\] has shape \[40, 4\], expected \[40, 3\]"),
        (([a[0], a[1].half(), a[2]], list(b)), "adapter 1 is in torch.float16"),
        (([a[0], a[1][0], a[2]], list(b)), r"lora_A\[1\] has shape \[64\]"),
        (([a[0], torch.randn(513, 64), a[2]], [b[0], torch.randn(40, 513), b[2]]), "a rank of at most 512"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            call(*change)


def test_the_torch_op_refuses_what_would_crash() -> None:
    x, _, a, b, ids = small()
    good: tuple[Any, ...] = (torch.zeros(6, 40), x, [a], [b], torch.ones(3), ids)
    op = torch.ops.bitfuse.multi_lora_add_.default
    op(*good)
    for at, value, words in (
        (0, torch.zeros(5, 40), r"y has shape \[5, 40\], expected \[6, 40\]"),
        (0, torch.zeros(40, 6).t(), "y has strides"),
        (0, torch.zeros(6, 40).half(), "y has dtype torch.float16"),
        (0, torch.zeros(6, 39), r"lora_B has shape \[3, 40, 4\], expected \[3, 39, 4\]"),
        (4, torch.ones(2), r"scaling has shape \[2\]"),
        (4, torch.ones(3).double(), "scaling has dtype torch.float64"),
        (5, ids[:5], r"adapter_ids has shape \[5\]"),
        (5, ids.to(torch.int16), "adapter_ids has dtype torch.int16"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            op(*good[:at], value, *good[at + 1 :])


def test_explains_itself() -> None:
    x, w, a, b, ids = small()
    told = str(bitfuse.explain(multi_lora_linear, x, w, a, b, 1.0, ids))
    assert told.startswith("multi_lora_linear on cpu: cpp runs")


# the C++ backend


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = str(Path(bitfuse.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([path, *sys.path]), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


LEVEL = """
from test_multi_lora_linear import *
from bitfuse import _cpu
torch.manual_seed(0)
cases = [*CASES, Case(13, 200, 1100, 3, (6,), "uniform"), Case(3, 65, 63, 2, (130,), "uniform")]
for case in cases:
    for kind in KINDS:
        a, b = adapters_of(case, *kind[1:])
        x, before = torch.randn(case.m, case.k).to(kind[0]), torch.randn(case.m, case.n).to(kind[0])
        scaling, ids = torch.rand(case.adapters), ids_of(case.mix, case.m, case.adapters)
        y = before.clone()
        cpp.run(y, x, a, b, scaling, ids)
        exact = add_plain(before.double(), x.double(), a, b, scaling, ids)
        assert_accurate(y, exact, add_plain(before, x, a, b, scaling, ids), f"{case} {kind}")
print(_cpu.isa())
"""


@pytest.mark.skipif(native._cpu is None, reason="bitfuse._cpu is not built")
@pytest.mark.parametrize("level", LEVELS)
def test_level_meets_the_accuracy_rule(level: str) -> None:
    done = python(LEVEL, BITFUSE_CPU_ISA=level)
    if "does not support" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [level]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    case = Case(70, 520, 1032, 9, (16,), "uniform")
    a, b = adapters_of(case, dtype, dtype)
    x, ids = torch.randn(case.m, case.k).to(dtype), ids_of("uniform", case.m, case.adapters)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(torch.zeros(case.m, case.n, dtype=dtype))
            cpp.run(found[-1], x, a, b, torch.ones(9), ids)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.skipif(native._cpu is None, reason="bitfuse._cpu is not built")
@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("y", (0, 6, 40), "y is null"),
        ("y", (64, 5, 40), r"y is of shape \[5, 40\]"),
        ("x", (2, 6, 64), "x is 2, expected a multiple of 4"),
        ("x", (64, -1, 64), "x is -1, expected 0 rows"),
        ("x", (64, 6, 1 << 62), "x is larger than memory"),
        ("lora_A", (0, 3, 4, 64), "a is null"),
        ("lora_A", (64, 3, 4, 63), r"a is of shape \[3, 4, 63\]"),
        ("lora_A", (64, 3, -1, 64), "a is -1"),
        ("lora_A", (64, 3, 1 << 40, 64), "a is larger than memory|rank is"),
        ("lora_A", (64, 4, 64), r"b is of shape \[3, 40, 4\]|a is of shape"),
        ("lora_B", (1, 3, 40, 4), "b is 1, expected a multiple of 4"),
        ("lora_B", (64, 3, 40, 5), r"b is of shape \[3, 40, 5\]"),
        ("scaling", (0, 3), "scaling is null"),
        ("scaling", (64, 2), r"scaling is of shape \[2\], expected \[3\]"),
        ("adapter_ids", (0, 6), "adapter_ids is null"),
        ("adapter_ids", (4, 6), "adapter_ids is 4, expected a multiple of 8"),
        ("adapter_ids", (64, 5), r"adapter_ids is of shape \[5\]"),
    ],
)
def test_the_binding_refuses_wrong_numbers(name: str, shape: tuple[int, ...], words: str) -> None:
    memory = torch.zeros(64, 64)

    def at(address: int, *sizes: int, dtype: str = "FLOAT32") -> Any:
        kinds = native._cpu.Dtype
        place = memory.data_ptr() if address == 64 else address
        return native._cpu.Tensor(place, getattr(kinds, dtype), sizes)

    def arguments(**change: tuple[int, ...]) -> dict[str, Any]:
        sizes = {
            "y": (64, 6, 40), "x": (64, 6, 64), "lora_A": (64, 3, 4, 64), "lora_B": (64, 3, 40, 4),
            "scaling": (64, 3), "adapter_ids": (64, 6),
        } | change  # fmt: skip
        made = {n: at(*s, dtype="INT64" if n == "adapter_ids" else "FLOAT32") for n, s in sizes.items()}
        return made | {n: [made[n]] for n in ("lora_A", "lora_B")}

    native._cpu.multi_lora_add(**arguments())
    with pytest.raises(ValueError, match=words):
        native._cpu.multi_lora_add(**arguments(**{name: shape}))
    with pytest.raises(ValueError, match="the number of adapters is 1 and 0"):
        native._cpu.multi_lora_add(**arguments() | {"lora_B": []})


# the Triton backend


def triton_backend() -> Any:
    pytest.importorskip("triton")
    from bitfuse.kernels.linear import multi_lora_linear as backend

    return backend


@TRITON
def test_what_is_compiled(target: Target) -> None:
    """Vectors of 16 bytes for A and B, tensor cores for prefill, nothing in local memory."""
    backend = triton_backend()
    backend._plans.cache_clear()
    HANDLES.clear()
    for m in (8, 80):
        for lists in (False, True):
            a, b = torch.randn(2, 16, 256).bfloat16(), torch.randn(2, 128, 16).bfloat16()
            given = target.place(torch.randn(m, 256).bfloat16(), torch.ones(2), torch.arange(m) % 2)
            adapters = [target.place(*(t if lists else [t])) for t in (a, b)]
            (y,) = target.place(torch.zeros(m, 128, dtype=torch.bfloat16))
            target.run(multi_lora_add_, y, given[0], *adapters, *given[1:])
    seen = set()
    for handles in HANDLES.values():
        for handle in handles.values():
            ptx, name = handle.asm["ptx"], handle.metadata.name.strip("_").removesuffix("_kernel")
            seen.add(name)
            assert ".local" not in ptx, name
            if name in ("shrink", "expand"):
                assert "mma" in ptx
            wide = "cp.async.cg.shared.global" if name == "shrink" else "ld.global.v4"
            assert name == "sort" or wide in ptx, name
    assert seen == {"few_shrink", "few_expand", "sort", "shrink", "expand"}


if not torch.cuda.is_available():

    @TRITON
    def test_decode_reads_adapters_once_and_nothing_for_no_adapter(target: Target) -> None:
        """In sectors of 32 bytes, which the simulator counts: reads that do not coalesce double them."""
        m, n, k, rank = 8, 512, 2048, 16
        a, b = torch.randn(m, rank, k).bfloat16(), torch.randn(m, n, rank).bfloat16()
        y, x, scaling = target.place(
            torch.zeros(m, n).bfloat16(), torch.randn(m, k).bfloat16(), torch.ones(m)
        )
        for ids, adapters in ((torch.arange(m), (a.nbytes, b.nbytes)), (torch.full((m,), -1), (0, 0))):
            with cusim.device(counts=True):
                cusim.counts()
                target.run(multi_lora_add_, y, x, target.place(a), target.place(b), scaling, ids)
                counts = cusim.counts()
            for name, nbytes in zip(("_few_shrink_kernel", "_few_expand_kernel"), adapters, strict=True):
                warps = counts[name]["threads"] // 32
                assert counts[name]["global_sectors"] <= 1.5 * nbytes / 32 + 2 * warps, counts[name]


@TRITON
def test_a_new_length_compiles_nothing(target: Target) -> None:

    def call(m: int, n: int, k: int, count: int) -> int:
        given = target.place(torch.randn(m, k).half(), torch.ones(count), torch.arange(m) % count)
        a, b = target.place(torch.randn(count, 8, k).half(), torch.randn(count, n, 8).half())
        (y,) = target.place(torch.zeros(m, n, dtype=torch.float16))
        target.run(multi_lora_add_, y, given[0], [a], [b], *given[1:])
        return sum(map(len, HANDLES.values()))

    few = call(5, 528, 256, 3)
    assert call(7, 560, 256, 4) == few
    many = call(65, 64, 256, 40)
    assert call(90, 80, 256, 50) == many


def test_slots_hold_every_mix() -> None:
    """First slots are begin // TileM + e: no adapter's slots reach into the next one's, and the last one's
    end in time."""
    torch.manual_seed(0)
    for _ in range(300):
        tile, count, m = (
            int(torch.randint(1, 33, ())),
            int(torch.randint(1, 20, ())),
            int(torch.randint(0, 300, ())),
        )
        rows = torch.bincount(torch.randint(0, count, (m,)) ** 2 // count, minlength=count).tolist()
        begin, free = 0, 0
        for e, own in enumerate(rows):
            first = begin // tile + e
            assert first >= free
            free = first + -(-own // tile)
            begin += own
        assert free <= m // tile + count


def test_the_table_of_tiles() -> None:
    backend = triton_backend()
    for m in (1, 4, 16, 64):
        for rank in (1, 8, 16, 100, 512):
            few = backend.choose_few(m, 4096, 4096, rank, 2)
            assert few.shrink_r * few.shrink_k * 2 <= 32768 and few.splits * few.shrink_k >= 4096
            assert 128 <= few.expand_r * few.expand_n * 2 <= 16384
    few = backend.choose_few(64, 4096, 4096, 16, 2)
    assert 64 * few.splits >= 132 and 64 * 4096 // few.expand_n >= 132  # an H100 has a program each
    for m, count in ((65, 1000), (512, 8), (2048, 1), (8192, 64)):
        many = backend.choose_many(m, 4096, 4096, count, 16, 2, 132)
        assert many.slots * many.tile_m >= m and many.steps * many.tile_k * many.splits >= 4096
        assert many.slots * -(-4096 // (many.tile_n * many.strip)) <= max(16 * 132, 2 * many.slots)


def test_tables_of_addresses_are_bounded_and_kept_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = [torch.randn(2, 8) for _ in range(3)], [torch.randn(4, 2) for _ in range(3)]
    table = multi_lora_args.table(a, b)
    assert table.entries.tolist() == [[t.data_ptr() for t in a], [t.data_ptr() for t in b], [2, 2, 2]]
    assert (table.max_rank, table.align) == (2, 2) and multi_lora_args.table(a, b) is table
    monkeypatch.setattr(multi_lora_args, "_MOST_TABLES", len(multi_lora_args._tables) + 1)
    kept = []
    for _ in range(3):
        kept.append(torch.randn(2, 8))
        multi_lora_args.table([kept[-1]], b[:1])
    assert len(multi_lora_args._tables) <= multi_lora_args._MOST_TABLES
    monkeypatch.setattr(multi_lora_args, "capturing", lambda device: True)
    monkeypatch.setattr(multi_lora_args, "_captured", [])
    current = multi_lora_args.table([kept[-1]], b[:1])
    multi_lora_args.table([kept[-1]], b[:1])
    assert len(multi_lora_args._captured) == 1 and multi_lora_args._captured[0] is current.entries
    with pytest.raises(RuntimeError, match="call the op once before the capture"):
        multi_lora_args.table([torch.randn(3, 8)], [torch.randn(4, 3)])


if torch.cuda.is_available():

    def test_a_graph_follows_ids_and_adapters() -> None:
        x, w, a, b, ids = (t.cuda() for t in small(torch.bfloat16))
        lists = list(a), list(b)
        multi_lora_linear(x, w, *lists, 1.0, ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = multi_lora_linear(x, w, *lists, 1.0, ids)
        ids.copy_(ids.flip(0))
        lists[0][1].mul_(2)
        graph.replay()
        assert torch.equal(y, multi_lora_linear(x, w, *lists, 1.0, ids))


@TRITON
def test_columns_beyond_a_first_tile_of_ranks(target: Target) -> None:
    """Ranks of several tiles, K of several splits, on both paths."""
    with cusim.device(multiprocessors=12):
        for m, ranks in ((3, (130,)), (70, (130, 24))):
            case = Case(m, 136, 1100, 2, ranks, "uniform")
            a, b = adapters_of(case, torch.bfloat16, torch.bfloat16)
            x, before = torch.randn(m, 1100).bfloat16(), torch.randn(m, 136).bfloat16()
            ids = ids_of("uniform", m, 2)
            y, *placed = target.place(before, x, torch.ones(2), ids)
            target.run(multi_lora_add_, y, placed[0], target.place(*a), target.place(*b), *placed[1:])
            exact = add_plain(before.double(), x.double(), a, b, torch.ones(2), ids)
            assert_accurate(y.cpu(), exact, add_plain(before, x, a, b, torch.ones(2), ids))

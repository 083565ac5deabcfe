"""rms_norm and layer_norm and their gradients: every backend, one test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.core.op import Op
from bitfuse.ops.norm.layer_norm import layer_norm_backward, layer_norm_op
from bitfuse.ops.norm.rms_norm import rms_norm_backward, rms_norm_op
from torch.nn import functional as F

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# shorter than a vector, whole vectors, a rest; more rows than a program's; longer than registers hold
SHAPES = [(1, 8), (3, 5, 40), (2, 1), (37, 1000), (7, 2048), (3, 10_000)]
TARGETS = targets("cpp", "triton", "reference")
EPS = 1e-5


def drawn(target: Target, shape: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype) -> dict[str, Any]:
    """Rows of every size, with a mean."""
    n = shape[-1]
    size = torch.logspace(-2, 1, max(1, torch.Size(shape).numel() // n)).reshape(*shape[:-1], 1)
    made = {
        "x": (torch.randn(shape) + 0.5) * size,
        "residual": torch.randn(shape) * size,
        "grad": torch.randn(shape),
        "grad_sum": torch.randn(shape),
    }
    given = {name: t.to(dtype) for name, t in made.items()}
    given |= {"weight": torch.randn(n).to(weights) + 1, "bias": torch.randn(n).to(weights)}
    return dict(zip(given, target.place(*given.values()), strict=True))


def plain_rms(s: torch.Tensor, weight: torch.Tensor, bias: Any, offset: float) -> torch.Tensor:
    if offset:  # Gemma's
        wide = torch.float64 if s.dtype == torch.float64 else torch.float32
        z = s.to(wide)
        z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + EPS)
        return (z * (offset + weight.to(wide))).type_as(s)
    return F.rms_norm(s, s.shape[-1:], weight, EPS)


def plain_layer(s: torch.Tensor, weight: torch.Tensor, bias: Any, offset: float) -> torch.Tensor:
    return F.layer_norm(s, s.shape[-1:], weight, bias, EPS)


def both(
    plain: Callable[..., torch.Tensor], given: dict[str, Any], dtype: torch.dtype, offset: float, biased: bool
) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]:
    """y and s, and gradients of x, weight and bias: of y alone, of both, by the formula in a dtype."""
    leaves = {n: t.cpu().to(dtype).clone().requires_grad_() for n, t in given.items()}
    bias = leaves["bias"] if biased else None
    outputs: list[torch.Tensor] = []
    grads = {}
    for name in ("residual", "alone"):
        s = leaves["x"] + leaves["residual"] if name == "residual" else leaves["x"]
        y = plain(s, leaves["weight"], bias, offset)
        wanted = [leaves["x"], leaves["weight"], *([bias] if biased else [])]
        above = [leaves["grad"].detach(), leaves["grad_sum"].detach()][: 2 if name == "residual" else 1]
        grads[name] = list(torch.autograd.grad([y, s][: len(above)], wanted, above))
        outputs += [y.detach(), s.detach()][: len(above)]
    return outputs, grads


KINDS: dict[str, tuple[Op, Op, Callable[..., torch.Tensor], float, bool]] = {
    "rms_norm": (rms_norm_op, rms_norm_backward, plain_rms, 0.0, False),
    "gemma": (rms_norm_op, rms_norm_backward, plain_rms, 1.0, False),
    "layer_norm": (layer_norm_op, layer_norm_backward, plain_layer, 0.0, True),
    "layer_norm without bias": (layer_norm_op, layer_norm_backward, plain_layer, 0.0, False),
}


# on the simulator, where a kernel takes seconds to compile: rows in one piece and in three
SIMULATED = {
    (torch.float32, "rms_norm"): (9, 1000),
    (torch.float32, "layer_norm"): (9, 1000),
    (torch.float16, "gemma"): (3, 5, 40),
    (torch.float16, "layer_norm without bias"): (3, 5, 40),
    (torch.bfloat16, "rms_norm"): (3, 9000),
    (torch.bfloat16, "layer_norm"): (3, 9000),
}
CASES = [
    pytest.param(target, dtype, kind, id=f"{target}-{dtype}-{kind}")
    for target in TARGETS
    for dtype in DTYPES
    for kind in KINDS
    if not target.sm or (dtype, kind) in SIMULATED
]


@pytest.mark.parametrize(("target", "dtype", "kind"), CASES)
def test_forward_and_backward(target: Target, dtype: torch.dtype, kind: str) -> None:
    op, backward, plain, offset, biased = KINDS[kind]
    rms = op is rms_norm_op
    for i, shape in enumerate([SIMULATED[dtype, kind]] if target.sm else SHAPES):
        weights = DTYPES[i % 3] if i % 2 or target.sm else dtype
        given = drawn(target, shape, dtype, weights)
        x, residual, weight, bias = (given[n] for n in ("x", "residual", "weight", "bias"))
        middle = [weight] if rms else [weight, bias if biased else None]
        last = [EPS, offset] if rms else [EPS]
        exact, exact_grads = both(plain, given, torch.float64, offset, biased)
        close, close_grads = both(plain, given, dtype, offset, biased)
        what = f"{kind} {shape} {dtype} weight {weights}"
        if not target.sm or dtype == torch.float16:
            (y,) = target.run(op, x, *middle, None, *last)
            assert_accurate(y.cpu(), exact[2], close[2], what)
        y, s = target.run(op, x, *middle, residual, *last)
        assert_accurate(y.cpu(), exact[0], close[0], f"{what} with a residual")
        assert torch.equal(s.cpu(), close[1])
        for name, above, at in (("alone", None, x), ("residual", given["grad_sum"], s)):
            if target.sm and (name == "alone") != (dtype == torch.float16):
                continue
            got = target.run(backward, given["grad"], above, at, *middle, *last, True)
            assert [t.dtype for t in got[1:]] == [weights] * (len(got) - 1)
            parts = zip(got, exact_grads[name], close_grads[name], strict=True)
            for label, (found, right, near) in zip(("x", "weight", "bias"), parts, strict=False):
                near = near.to(found.dtype)
                assert_accurate(found.cpu(), right, near, f"gradient of {label}, {what}, {name}")
            only = target.run(backward, given["grad"], above, at, *middle, *last, False)
            assert len(only) == 1 and torch.equal(only[0], got[0])


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_views(target: Target) -> None:
    wide = target.place(torch.randn(6, 4, 64))[0]
    w, b = target.place(torch.randn(32), torch.randn(64))
    for x, weight in (
        (wide[..., :32], w),
        (wide[..., ::2], w),
        (wide.transpose(0, 1), b),
        (wide[:0], b),
        (wide[:1].expand(6, 4, 64), b),
        (wide[0, 0], b[::1]),
    ):
        n = x.shape[-1]
        y, s = target.run(rms_norm_op, x, weight, x, EPS, 0.0)
        torch.testing.assert_close(s.cpu(), 2 * x.cpu())
        torch.testing.assert_close(y.cpu(), F.rms_norm(2 * x.cpu(), (n,), weight.cpu(), EPS))
        dx, dw = target.run(rms_norm_backward, x, x, x, weight, EPS, 0.0, True)
        assert dx.shape == x.shape and dw.shape == (n,)
        if x.numel() == 0:
            assert not dw.any()
        (y,) = target.run(layer_norm_op, x, weight, weight, None, EPS)
        torch.testing.assert_close(y.cpu(), F.layer_norm(x.cpu(), (n,), weight.cpu(), weight.cpu(), EPS))
    x, weight = target.place(torch.empty(3, 0), torch.empty(0))
    assert target.run(rms_norm_op, x, weight, None, EPS, 0.0)[0].shape == (3, 0)
    assert [t.shape for t in target.run(rms_norm_backward, x, None, x, weight, EPS, 0.0, True)] == [
        (3, 0),
        (0,),
    ]


@pytest.mark.parametrize("target", targets("cpp", "triton"), ids=str)
def test_special_values(target: Target) -> None:
    """As torch: rows of zeros, of huge numbers whose squares are infinite, of NaN; a mean far from zero."""
    x = torch.zeros(4, 48)
    x[1], x[2, 3], x[3, 5] = 1e25, float("nan"), float("inf")
    far = 1e4 + torch.randn(3, 48)
    x, far, w = target.place(x, far, torch.ones(48))
    for op, more, plain in (
        (rms_norm_op, (None, EPS, 0.0), lambda t, w: F.rms_norm(t, (48,), w, EPS)),
        (layer_norm_op, (None, None, EPS), lambda t, w: F.layer_norm(t, (48,), w, None, EPS)),
    ):
        (y,) = target.run(op, x, w, *more)
        same = [0, 2, 3] if op is layer_norm_op else [0, 1, 2, 3]
        torch.testing.assert_close(y.cpu()[same], plain(x.cpu(), w.cpu())[same], equal_nan=True)
        (y,) = target.run(op, far, w, *more)
        exact = plain(far.cpu().double(), w.cpu().double())
        assert_accurate(y.cpu(), exact, plain(far.cpu(), w.cpu()), "far from zero")


def test_bits_do_not_depend_on_threads() -> None:
    x, residual, grad = (torch.randn(500, 777) for _ in range(3))
    weight, bias = torch.randn(777), torch.randn(777)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            with bitfuse.use_backend("cpp"):
                found.append(
                    [
                        *rms_norm_op(x, weight, residual, EPS, 0.0),
                        *rms_norm_backward(grad, grad, x, weight, EPS, 0.0, True),
                        *layer_norm_backward(grad, None, x, weight, bias, EPS, True),
                    ]
                )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("biased", [None, False, True], ids=["rms_norm", "layer_norm", "with bias"])
def test_autograd_and_compile(biased: bool | None) -> None:
    """Any of the gradients, any of the outputs used; the sum used after it was normalised."""
    leaves = [torch.randn(4, 24, requires_grad=True), torch.randn(4, 24, requires_grad=True)]
    leaves += [torch.randn(24, requires_grad=True) for _ in range(2 if biased else 1)]

    def ours(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, b: Any = None) -> Any:
        if biased is None:
            return bitfuse.rms_norm(x, w, EPS, residual=r)
        return bitfuse.layer_norm(x, w, b, EPS, residual=r)

    def plain(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, b: Any = None) -> Any:
        s = x + r
        return (F.rms_norm(s, (24,), w, EPS) if biased is None else F.layer_norm(s, (24,), w, b, EPS)), s

    def loss(f: Callable[..., Any], uses: str, *given: torch.Tensor) -> torch.Tensor:
        y, s = f(*given)
        return sum(t.square().sum() for n, t in (("y", y), ("s", s)) if n in uses) + 0 * y.sum()

    compiled = torch.compile(ours, fullgraph=True, dynamic=False)
    for uses in ("y", "s", "ys"):
        wanted = torch.autograd.grad(loss(plain, uses, *leaves), leaves)
        for f in (ours, compiled):
            torch.testing.assert_close(torch.autograd.grad(loss(f, uses, *leaves), leaves), wanted)
    _, s = ours(*leaves)
    gx, gr = torch.autograd.grad(s.square().sum(), leaves[:2])  # y is used by nobody
    torch.testing.assert_close(gx, 2 * s)
    assert torch.equal(gx, gr)
    for i, leaf in enumerate(leaves):
        given = [t if i == j else t.detach() for j, t in enumerate(leaves)]
        torch.testing.assert_close(
            torch.autograd.grad(loss(ours, "ys", *given), leaf),
            torch.autograd.grad(loss(plain, "ys", *given), leaf),
        )
    x = leaves[0]  # an input used twice
    torch.testing.assert_close(
        torch.autograd.grad(loss(ours, "ys", x, x, *leaves[2:]), x),
        torch.autograd.grad(loss(plain, "ys", x, x, *leaves[2:]), x),
    )
    with torch.no_grad():
        assert not ours(*leaves)[0].requires_grad


def test_opcheck() -> None:
    x, r, g, w, b = (torch.randn(s) for s in ((3, 24), (3, 24), (3, 24), (24,), (24,)))
    ops = torch.ops.bitfuse
    for residual in (None, r):
        torch.library.opcheck(ops.rms_norm.default, (x, w, residual, EPS, 1.0))
        torch.library.opcheck(ops.layer_norm.default, (x, w, b, residual, EPS))
        for learns in (True, False):
            torch.library.opcheck(ops.rms_norm_backward.default, (g, residual, x, w, EPS, 0.0, learns))
            torch.library.opcheck(ops.layer_norm_backward.default, (g, residual, x, w, b, EPS, learns))


def test_autocast() -> None:
    x, residual, w = torch.randn(3, 8).bfloat16(), torch.randn(3, 8), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        y, s = bitfuse.rms_norm(x, w, residual=residual)
        assert y.dtype == s.dtype == torch.float32 and torch.equal(s, x + residual)
        assert bitfuse.layer_norm(x, w, w).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"residual has dtype torch.float32, expected torch.bfloat16"):
        bitfuse.rms_norm(x, w, residual=residual)


X = torch.randn(2, 8)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(weight=torch.randn(7)), ValueError, r"weight has shape \[7\], expected \[8\]"),
        (dict(weight=torch.randn(1, 8)), ValueError, r"weight has shape \[1, 8\]"),
        (dict(residual=torch.randn(8)), ValueError, r"residual has shape \[8\], expected \[2, 8\]"),
        (dict(residual=X.half()), TypeError, "residual has dtype torch.float16, expected torch.float32"),
        (dict(x=X.double()), TypeError, "x has dtype torch.float64"),
        (dict(x=torch.tensor(1.0)), ValueError, "x has no dimension"),
        (dict(x=3), TypeError, "x is a int, expected a tensor"),
        (dict(weight=None), TypeError, "weight is missing, expected a tensor"),
        (dict(eps=-1.0), ValueError, "eps is -1.0, expected 0 or more"),
        (dict(eps=float("nan")), ValueError, "eps is nan, expected a finite number"),
        (dict(eps="1"), TypeError, "eps is a str, expected a number"),
    ],
)
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    given = dict(x=X, weight=torch.randn(8)) | changes
    for function in (bitfuse.rms_norm, bitfuse.layer_norm):
        with pytest.raises(error, match=words):
            function(**given)
    if changes.keys() == {"eps"} and isinstance(changes["eps"], float):
        with pytest.raises(ValueError, match="offset is inf"):
            bitfuse.rms_norm(X, torch.randn(8), offset=float("inf"))


def test_bindings_trust_nothing() -> None:
    norm, x, w = bitfuse.core.cpu.extension.norm, torch.randn(3, 8), torch.randn(8)
    good = dict(
        x=x, weight=w, bias=None, residual=None, out=torch.empty(3, 8), sum=None, eps=EPS, offset=0.0,
        centered=False,
    )  # fmt: skip
    norm(**good)
    for changes, words in (
        (dict(weight=torch.randn(9)), "weight is of shape"),
        (dict(out=torch.empty(2, 8)), "out is of shape"),
        (dict(out=torch.empty(3, 8).half()), "out is of dtype"),
        (dict(residual=torch.empty(3, 7), sum=torch.empty(3, 8)), "residual is of shape"),
        (dict(bias=torch.empty(7)), "bias is of shape"),
    ):
        with pytest.raises(ValueError, match=words):
            norm(**(good | changes))

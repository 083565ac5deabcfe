"""lora_linear, its joint forms and its gradients: every backend, one test."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate, worst_order
from backends import Target, targets
from bitfuse.core.dropout import keep
from bitfuse.ops.linear.lora_args import LoraArgs
from bitfuse.ops.linear.lora_linear import Wanted, lora_linear_backward, lora_linear_op
from bitfuse.weights.weight import WeightTensors

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# what the CUDA decode kernel leaves to Triton, and says so
REFUSED = re.compile("float32|M = |dropout|dense")


@dataclass(frozen=True)
class Case:
    """m rows of x of a dtype, and for each projection (n, rank, format or None for a dense W)."""

    m: int
    k: int
    projections: tuple[tuple[int, int, str | None], ...]
    dtype: torch.dtype
    adapter: torch.dtype
    bias: bool = False
    out_scale: bool = False
    dropout_p: float = 0.0
    tensor_scaling: bool = False

    def __str__(self) -> str:
        each = "+".join(f"{n}r{r}{f or 'dense'}" for n, r, f in self.projections)
        flags = (
            f"{'b' * self.bias}{'o' * self.out_scale}{'d' * bool(self.dropout_p)}{'t' * self.tensor_scaling}"
        )
        return f"m{self.m}k{self.k}-{each}-{str(self.dtype)[6:]}-{str(self.adapter)[6:]}-{flags}"


# few rows and many, ranks that are no multiple of anything, adapters of another dtype, joint projections
CASES = [
    Case(1, 128, ((75, 16, "int4"),), F16, F16, bias=True),
    Case(3, 192, ((45, 5, "nf4"),), BF16, F32, out_scale=True),
    Case(1, 256, ((264, 1, "int8"),), F32, F32, bias=True, out_scale=True),
    Case(17, 128, ((72, 64, "int4"),), BF16, BF16, bias=True, dropout_p=0.3),
    Case(5, 128, ((41, 16, None),), F32, F32, bias=True),
    Case(40, 384, ((133, 24, "fp8"),), F16, F32, tensor_scaling=True),
    Case(70, 128, ((73, 8, "int4"), (40, 16, "nf4"), (35, 3, "int8")), BF16, BF16, dropout_p=0.1),
    Case(33, 128, ((77, 96, None),), F16, F16, dropout_p=0.5),
    Case(2, 128, ((40, 7, "nf4"), (40, 130, "nf4")), F32, BF16, bias=True),
    Case(6, 128, ((45, 0, "int4"), (68, 16, "int4")), BF16, F16, tensor_scaling=True),
    Case(64, 256, ((136, 512, "int4"),), F16, BF16),
    Case(9, 128, ((24, 16, "int4"),), F32, F16, dropout_p=0.25, out_scale=True),
]


def make(target: Target, case: Case) -> tuple[torch.Tensor, tuple[LoraArgs, ...], list[torch.Tensor]]:
    """x and the projections, placed; and the dense weights in float64."""
    projections, dense = [], []
    for i, (n, r, format) in enumerate(case.projections):
        weight = torch.randn(n, case.k) / case.k**0.5
        placed: Any
        if format is None:
            (placed,) = target.place(weight.to(case.dtype))
            dense.append(weight.to(case.dtype).double())
        else:
            w = bitfuse.quantize(weight, format)
            placed = target.place_weight(w).op_args
            dense.append(w.dequantize().double())
        lora_A = (torch.randn(r, case.k) / case.k**0.5).to(case.adapter)
        lora_B = (torch.randn(n, r) / max(r, 1) ** 0.5).to(case.adapter)
        lora_A, lora_B, bias, out_scale, scale_by, seed = target.place(
            lora_A, lora_B, torch.randn(n, dtype=case.dtype), torch.rand(n) + 0.5, torch.tensor([0.75]),
            torch.tensor([123456789012 + i]),
        )  # fmt: skip
        projections.append(
            LoraArgs(
                placed,
                lora_A,
                lora_B,
                1.5,
                scale_by.view(()) if case.tensor_scaling else None,
                bias if case.bias else None,
                out_scale if case.out_scale else None,
                seed.view(()) if case.dropout_p else None,
            )
        )
    (x,) = target.place(torch.randn(case.m, case.k, dtype=case.dtype))
    return x, tuple(projections), dense


def on_cpu(p: LoraArgs) -> LoraArgs:
    def moved(t: Any) -> Any:
        return t.cpu() if isinstance(t, torch.Tensor) else t

    few = isinstance(p.weight, WeightTensors)
    weight = WeightTensors._make(map(moved, p.weight)) if few else moved(p.weight)
    return LoraArgs(weight, *map(moved, p[1:]))


def dropped(x: torch.Tensor, p: LoraArgs, dropout_p: float) -> torch.Tensor:
    if not dropout_p:
        return x
    assert p.seed is not None
    return x * keep(p.seed.cpu(), x.shape[0], x.shape[1], dropout_p) / (1 - dropout_p)


def scaling(p: LoraArgs) -> float:
    return p.scaling * (1.0 if p.scale_by is None else float(p.scale_by))


def exact_forward(
    x: torch.Tensor, p: LoraArgs, dense: torch.Tensor, dropout_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x, p = x.double(), on_cpu(p)
    h = dropped(x, p, dropout_p) @ p.lora_A.double().T
    y = x @ dense.T + scaling(p) * h @ p.lora_B.double().T
    if p.out_scale is not None:
        y = y * p.out_scale.double()
    return y if p.bias is None else y + p.bias.double(), h


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"), ids=str)
def test_forward(target: Target, case: Case) -> None:
    x, projections, dense = make(target, case)
    args = (x, projections, case.dropout_p)
    if reason := target.reason(lora_linear_op, *args):
        assert target.backend == "cuda" and REFUSED.search(reason), reason
        return
    got = target.run(lora_linear_op, *args)
    plain = lora_linear_op.reference(x.cpu(), tuple(map(on_cpu, projections)), case.dropout_p)
    count = len(projections)
    for i, (p, w) in enumerate(zip(projections, dense, strict=True)):
        y, h = exact_forward(x.cpu(), p, w, case.dropout_p)
        assert_accurate(got[i].cpu(), y, plain[i], f"y of projection {i}")
        p = on_cpu(p)
        kept = dropped(x.cpu().to(p.lora_A.dtype), p, case.dropout_p)
        plain_h = worst_order(lambda x, a: torch.nn.functional.linear(x, a).float(), kept, p.lora_A, h)
        assert_accurate(got[count + i].cpu(), h, plain_h, f"h of projection {i}")
    again = target.run(lora_linear_op, *args)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "another run, other numbers"


@pytest.mark.parametrize("case", [c for c in CASES if not c.out_scale or c.dropout_p], ids=str)
@pytest.mark.parametrize("target", targets("cpp", "triton", "reference"), ids=str)
def test_backward(target: Target, case: Case) -> None:
    x, projections, dense = make(target, case)
    projections = tuple(p._replace(bias=None, out_scale=None) for p in projections)
    cpu = tuple(map(on_cpu, projections))
    grads = tuple(target.place(*(torch.randn(case.m, p.shape[0], dtype=case.dtype) for p in projections)))
    exact_hs = [exact_forward(x.cpu(), p, w, case.dropout_p)[1] for p, w in zip(cpu, dense, strict=True)]
    hs = tuple(target.place(*(h.float() for h in exact_hs)))
    everything = Wanted(True, (True,) * len(projections), (True,) * len(projections))
    args = (grads, x, projections, hs, case.dropout_p)
    got = target.run(lora_linear_backward, *args, everything)
    plain = lora_linear_backward.reference(
        tuple(g.cpu() for g in grads), x.cpu(), cpu, tuple(h.cpu() for h in hs), case.dropout_p, everything
    )
    grad_x = torch.zeros(x.shape, dtype=torch.float64)
    for i, (grad, p, w, h) in enumerate(zip(grads, cpu, dense, exact_hs, strict=True)):
        scaled = scaling(p) * grad.cpu().double()
        gb = scaled @ p.lora_B.double()
        grad_x += grad.cpu().double() @ w + dropped(gb @ p.lora_A.double(), p, case.dropout_p)
        grad_a = gb.T @ dropped(x.cpu().double(), p, case.dropout_p)
        assert_accurate(got[1 + 2 * i].cpu(), grad_a, plain[1 + 2 * i], f"lora_A of projection {i}")
        assert_accurate(got[2 + 2 * i].cpu(), scaled.T @ h, plain[2 + 2 * i], f"lora_B of projection {i}")
    assert_accurate(got[0].cpu(), grad_x, plain[0], "x")
    again = target.run(lora_linear_backward, *args, everything)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "another run, other numbers"
    if target.sm:
        return
    # each gradient alone, and nothing but it
    none = (False,) * len(projections)
    for wanted, at in (
        (Wanted(True, none, none), [0]),
        (Wanted(False, everything.lora_A, none), range(1, len(got), 2)),
        (Wanted(False, none, everything.lora_B), range(2, len(got), 2)),
    ):
        alone = target.run(
            lora_linear_backward, grads, x if any(wanted.lora_A) else None, projections,
            hs if any(wanted.lora_B) else (None,) * len(hs), case.dropout_p, wanted,
        )  # fmt: skip
        for i, (one, of_all) in enumerate(zip(alone, got, strict=True)):
            assert torch.equal(one, of_all) if i in at else one.numel() == 0


@pytest.mark.parametrize("target", targets("cpp", "triton", "reference"), ids=str)
def test_views_and_empty_inputs(target: Target) -> None:
    """x and gradients that are slices, transposed, expanded, of three dimensions, of no rows."""
    case = Case(4, 128, ((40, 8, "int4"),), F32, F32)
    _, (p,), (w,) = make(target, case)
    (wide,) = target.place(torch.randn(4, 3, 256))
    views = [
        wide[:, :, :128],
        wide[:, :, ::2],
        wide.transpose(0, 1)[..., 128:],
        wide[0, :1, :128].expand(5, 128),
    ]
    for x in [*views, wide[:0, :, :128], wide[0, 0, :128]]:
        y, h = target.run(lora_linear_op, x, (p,), 0.0)
        assert y.shape == (*x.shape[:-1], 40) and h.shape == (x.shape[:-1].numel(), 8)
        exact, _ = exact_forward(x.cpu().reshape(-1, 128), p, w, 0.0)
        plain = lora_linear_op.reference(x.cpu().reshape(-1, 128), (on_cpu(p),), 0.0)[0]
        assert_accurate(y.cpu().view(exact.shape), exact, plain)
        grad = torch.randn(*x.shape[:-1], 80).to(x.device)[..., ::2]
        dx, da, db = target.run(
            lora_linear_backward, (grad,), x, (p,), (h,), 0.0, Wanted(True, (True,), (True,))
        )
        assert dx.shape == x.shape
        rows = grad.cpu().double().reshape(-1, 40) * 1.5
        gb = rows @ p.lora_B.cpu().double()
        for got, wanted in (
            (dx.reshape(-1, 128), rows / 1.5 @ w + gb @ p.lora_A.cpu().double()),
            (da, gb.T @ x.cpu().double().reshape(-1, 128)),
            (db, rows.T @ h.cpu().double()),
        ):
            torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", targets("cpp", "triton"), ids=str)
def test_masks_are_the_reference_s(target: Target) -> None:
    """With x = 1 and A, B picking columns out, the output shows which elements were dropped."""
    rows, k, p = 37, 128, 0.4
    w = target.place_weight(bitfuse.quantize(torch.zeros(k, k), "int8")).op_args
    for seed in (0, 1, 2**40 + 12345, 2**61 + 7):
        x, eye, s = target.place(torch.ones(rows, k), torch.eye(k), torch.tensor([seed]))
        args = LoraArgs(w, eye, eye, 1.0, seed=s.view(()))
        y, h = target.run(lora_linear_op, x, (args,), p)
        mask = keep(torch.tensor(seed), rows, k, p)
        torch.testing.assert_close(h.cpu(), mask / (1 - p))
        torch.testing.assert_close(y.cpu(), mask / (1 - p))


def test_the_mask_is_random() -> None:
    for seed in (0, 1, 987654321987):
        mask = keep(torch.tensor(seed), 512, 512, 0.3).double()
        sigma = (0.3 * 0.7 / 512**2) ** 0.5
        assert abs(float(mask.mean()) - 0.7) < 5 * sigma
        for other in (mask.roll(1, 0), mask.roll(1, 1), mask.T, keep(torch.tensor(seed + 1), 512, 512, 0.3)):
            both = float((mask * other).mean())  # independent ones agree to be kept in 0.49 of the places
            assert abs(both - 0.49) < 0.005, both
    rows = keep(torch.tensor(5), 2000, 256, 0.5).double() - 0.5
    correlation = (rows @ rows.T / 64 - torch.eye(2000)).abs().max()
    assert float(correlation) < 0.5, "two rows have much the same mask"


def wide_case(few: bool = True) -> dict[str, Any]:
    weight = torch.randn(64, 128) / 11
    return dict(
        x=torch.randn(4, 128),
        w=bitfuse.quantize(weight, "int4") if few else weight,
        lora_A=torch.randn(8, 128) / 11,
        lora_B=torch.randn(64, 8) / 3,
        scaling=2.0,
        bias=torch.randn(64),
    )


def plain_formula(
    x: torch.Tensor, w: Any, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: Any, bias: torch.Tensor
) -> torch.Tensor:
    linear = torch.nn.functional.linear
    dense = w if isinstance(w, torch.Tensor) else w.dequantize()
    return linear(x, dense, bias) + linear(linear(x, lora_A), lora_B) * scaling


@pytest.mark.parametrize("few", [True, False], ids=["int4", "dense"])
def test_gradients_reach_only_what_asks_for_them(few: bool) -> None:
    given = wide_case(few)
    names = ("x", "lora_A", "lora_B", "bias", *(() if few else ("w",)))
    for subset in range(2 ** len(names)):
        asked = [name for i, name in enumerate(names) if subset >> i & 1]
        case = given | {name: given[name].clone().requires_grad_(name in asked) for name in names}
        y = bitfuse.lora_linear(**case)
        assert y.requires_grad == bool(asked)
        if asked:
            y.square().sum().backward()
            wanted = torch.autograd.grad(plain_formula(**case).square().sum(), [case[n] for n in asked])
            for name, grad in zip(asked, wanted, strict=True):
                torch.testing.assert_close(case[name].grad, grad, rtol=1e-4, atol=1e-3)
        assert [n for n in names if case[n].grad is not None] == asked
    with torch.no_grad():
        assert not bitfuse.lora_linear(**given | {"x": given["x"].clone().requires_grad_()}).requires_grad


def test_what_is_saved_is_as_little_as_can_be() -> None:
    """x is kept for lora_A's gradient only (LoRA-FA freezes lora_A to be rid of it)."""
    given = wide_case()
    x = torch.randn(4096, 128, requires_grad=True)
    for asked, kept in ((("lora_A", "lora_B"), True), (("lora_B",), False), ((), False)):
        case = (
            given | {n: given[n].clone().requires_grad_(n in asked) for n in ("lora_A", "lora_B")} | {"x": x}
        )
        saved: list[torch.Tensor] = []

        def keep_it(t: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep_it, lambda t: t):
            bitfuse.lora_linear(**case)
        assert any(t.numel() == x.numel() for t in saved) == kept


def test_a_tensor_for_scaling_and_out_scale_learn() -> None:
    given = wide_case()
    scale, out = torch.tensor(2.0, requires_grad=True), torch.rand(64, requires_grad=True)
    y = bitfuse.lora_linear(**given | {"scaling": scale}, out_scale=out)
    base = plain_formula(**given | {"scaling": scale, "bias": None})
    wanted = torch.autograd.grad((base * out + given["bias"]).square().sum(), (scale, out))
    got = torch.autograd.grad(y.square().sum(), (scale, out))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    frozen = bitfuse.lora_linear(**given | {"scaling": torch.tensor(2.0, dtype=torch.float64)})
    assert torch.equal(frozen, bitfuse.lora_linear(**given))


def test_dropout_repeats_and_follows_the_generator() -> None:
    given = wide_case()
    given["lora_A"].requires_grad_()

    def run(**more: Any) -> torch.Tensor:
        return bitfuse.lora_linear(**given, dropout_p=0.5, **more)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first) and not torch.equal(first, second)
    assert torch.equal(run(seed=7), run(seed=torch.tensor([7]))) and not torch.equal(run(seed=8), run(seed=7))
    # checkpointing runs the forward twice, with one mask
    x = given["x"].clone().requires_grad_()
    for use_reentrant in (False, True):
        grads = []
        for checkpointed in (False, True):
            torch.manual_seed(5)
            case = given | {"x": x}

            def body(x: torch.Tensor, case: dict[str, Any] = case) -> torch.Tensor:
                return bitfuse.lora_linear(**case | {"x": x}, dropout_p=0.5)

            y = (
                torch.utils.checkpoint.checkpoint(body, x, use_reentrant=use_reentrant)
                if checkpointed
                else body(x)
            )
            grads.append(
                torch.autograd.grad(y.square().sum(), (x, given["lora_A"])) if not use_reentrant else ()
            )
            if use_reentrant:
                x.grad = given["lora_A"].grad = None
                y.square().sum().backward()
                grads[-1] = (x.grad.clone(), given["lora_A"].grad.clone())
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_double_use_and_saved_activations() -> None:
    """One x in two layers, and one layer twice; nothing that autograd saved is written to."""
    given = wide_case()
    x = given["x"].clone().requires_grad_()
    A, B = (given[n].clone().requires_grad_() for n in ("lora_A", "lora_B"))
    square = bitfuse.quantize(torch.randn(128, 128) / 11, "nf4")
    up = torch.randn(128, 8) / 3
    relu_x = torch.relu(x)
    before = relu_x.detach().clone()
    one = bitfuse.lora_linear(relu_x, square, A, up, 0.5)
    two = bitfuse.lora_linear(one + relu_x, given["w"], A, B, 2.0)
    three = bitfuse.lora_linear(relu_x, given["w"], A, B, 2.0)
    got = torch.autograd.grad((two * three).sum(), (x, A, B), retain_graph=True)
    plain_one = plain_formula(relu_x, square, A, up, 0.5, None)  # type: ignore[arg-type]
    plain_two = plain_formula(plain_one + relu_x, given["w"], A, B, 2.0, None)  # type: ignore[arg-type]
    plain_three = plain_formula(relu_x, given["w"], A, B, 2.0, None)  # type: ignore[arg-type]
    wanted = torch.autograd.grad((plain_two * plain_three).sum(), (x, A, B))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert torch.equal(relu_x, before)


def test_act_order_matches_the_dense_weight() -> None:
    given = wide_case()
    w = bitfuse.quantize(torch.randn(64, 128), "int4", group_size=32, g_idx=torch.randperm(128) // 32)
    learn = {n: given[n].clone().requires_grad_() for n in ("x", "lora_A", "lora_B")}
    case = given | learn | {"w": w}
    y, wanted = bitfuse.lora_linear(**case), plain_formula(**case)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad(y.square().sum(), list(learn.values()))
    for a, b in zip(got, torch.autograd.grad(wanted.square().sum(), list(learn.values())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


def test_autocast_takes_x_and_leaves_the_adapter() -> None:
    given = wide_case()
    given["lora_A"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = bitfuse.lora_linear(**given)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert given["lora_A"].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    for p in (0.0, 0.25):
        for case in (
            Case(3, 128, ((40, 4, "int4"), (24, 2, None)), dtype, F32, bias=True, dropout_p=p),
            Case(2, 128, ((40, 0, "nf4"),), dtype, dtype, out_scale=True, tensor_scaling=True, dropout_p=p),
        ):
            x, projections, _ = make(Target("cpp", "cpu"), case)
            x, projections = x.clone(), tuple(on_cpu(q) for q in projections)
            torch.library.opcheck(
                torch.ops.bitfuse.lora_linear.default,
                lora_linear_op._flatten(x, projections, p),
            )
            grads = tuple(torch.randn(case.m, q.shape[0], dtype=dtype) for q in projections)
            hs = tuple(torch.randn(case.m, q.shape[2]) for q in projections)
            every = (True,) * len(projections)
            flat = lora_linear_backward._flatten(grads, x, projections, hs, p, Wanted(True, every, every))
            torch.library.opcheck(torch.ops.bitfuse.lora_linear_backward.default, flat)


def projection(n: int, k: int, r: int, format: str | None = "int4", bias: bool = True) -> bitfuse.Projection:
    weight = torch.randn(n, k) / k**0.5
    return bitfuse.Projection(
        bitfuse.quantize(weight, format, group_size=32) if format else weight,
        (torch.randn(r, k) / k**0.5).requires_grad_(),
        (torch.randn(n, r) / r**0.5).requires_grad_(),
        0.5,
        torch.randn(n).requires_grad_() if bias else None,
    )


def plain(x: torch.Tensor, p: bitfuse.Projection) -> torch.Tensor:
    return plain_formula(x, p.w, p.lora_A, p.lora_B, p.scaling, p.bias)  # type: ignore[arg-type]


def tensors(*projections: bitfuse.Projection) -> list[torch.Tensor]:
    return [t for p in projections for t in (p.lora_A, p.lora_B, p.bias) if t is not None]


def test_qkv() -> None:
    x = torch.randn(2, 5, 96, requires_grad=True)
    three = (projection(61, 96, 4), projection(33, 96, 8, None), projection(3, 96, 2, bias=False))
    got, wanted = bitfuse.lora_qkv(x, three), [plain(x, p) for p in three]
    learnt = [x, *tensors(*three)]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    loss, plain_loss = (sum((y.square().sum() for y in ys), torch.zeros(())) for ys in (got, wanted))
    for a, b in zip(torch.autograd.grad(loss, learnt), torch.autograd.grad(plain_loss, learnt), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    # one of the outputs used alone: the others' gradients are zeros
    alone = torch.autograd.grad(bitfuse.lora_qkv(x, three)[1].sum(), x)[0]
    torch.testing.assert_close(
        alone, torch.autograd.grad(plain(x, three[1]).sum(), x)[0], rtol=1e-3, atol=1e-3
    )
    bare = three[0]._replace(lora_A=None, lora_B=None)
    assert isinstance(bare.w, bitfuse.LowBitWeight)
    torch.testing.assert_close(
        bitfuse.lora_qkv(x, (bare,))[0], bitfuse.lowbit_linear(x, bare.w, bare.bias), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_mlp(activation: str) -> None:
    from bitfuse.core.activations import activate

    x = torch.randn(2, 9, 64, requires_grad=True)
    gate, up, down = projection(96, 64, 4), projection(96, 64, 8, None), projection(61, 96, 4)
    got = bitfuse.lora_mlp(x, gate, up, down, activation)
    wanted = plain(activate(plain(x, gate), activation) * plain(x, up), down)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    learnt = [x, *tensors(gate, up, down)]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), learnt),
        torch.autograd.grad(wanted.square().sum(), learnt),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)
    # each tensor alone
    for t in learnt:
        for other in learnt:
            other.requires_grad_(other is t)
        (one,) = torch.autograd.grad(bitfuse.lora_mlp(x, gate, up, down, activation).sum(), t)
        (two,) = torch.autograd.grad(
            plain(activate(plain(x, gate), activation) * plain(x, up), down).sum(), t
        )
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-2)


def test_compiles_without_a_break() -> None:
    given = wide_case()
    learn = {n: given[n].clone().requires_grad_() for n in ("x", "lora_A", "lora_B", "bias")}
    case = given | learn
    compiled = torch.compile(bitfuse.lora_linear, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(**case), bitfuse.lora_linear(**case))
    got = torch.autograd.grad(compiled(**case).square().sum(), list(learn.values()))
    wanted = torch.autograd.grad(bitfuse.lora_linear(**case).square().sum(), list(learn.values()))
    torch.testing.assert_close(got, wanted)
    assert compiled(**case, dropout_p=0.5).shape == (4, 64)
    x = torch.randn(3, 64, requires_grad=True)
    gate, up, down = projection(96, 64, 4), projection(96, 64, 8), projection(64, 96, 4)
    mlp = torch.compile(bitfuse.lora_mlp, fullgraph=True, dynamic=False)
    torch.testing.assert_close(mlp(x, gate, up, down), bitfuse.lora_mlp(x, gate, up, down))
    torch.testing.assert_close(
        torch.autograd.grad(mlp(x, gate, up, down).sum(), x),
        torch.autograd.grad(bitfuse.lora_mlp(x, gate, up, down).sum(), x),
    )


BAD = [
    (dict(x=torch.randn(4, 128).double()), TypeError, "x has dtype torch.float64"),
    (dict(x=[1.0]), TypeError, "x is a list, expected a tensor"),
    (dict(x=torch.randn(4, 120)), ValueError, "x has 120 features"),
    (dict(w=1), TypeError, "w is a int, expected a tensor or a bitfuse.LowBitWeight"),
    (dict(w=torch.randn(64, 120)), ValueError, r"w has shape \[64, 120\], expected \[64, 128\]"),
    (dict(w=torch.randn(64, 128).half()), TypeError, "w has dtype torch.float16, expected torch.float32"),
    (dict(lora_A=torch.randn(8, 120)), ValueError, r"lora_A has shape \[8, 120\], expected \[8, 128\]"),
    (dict(lora_A=torch.randn(128)), ValueError, r"lora_A has shape \[128\]"),
    (dict(lora_A=None), TypeError, "lora_A is a NoneType, expected a tensor"),
    (dict(lora_A=torch.randn(8, 128).int()), TypeError, "lora_A has dtype torch.int32"),
    (dict(lora_B=torch.randn(64, 9)), ValueError, r"lora_B has shape \[64, 9\], expected \[64, 8\]"),
    (dict(lora_B=torch.randn(64, 8, device="meta")), ValueError, "lora_B is on meta, expected cpu"),
    (dict(lora_A=torch.randn(513, 128), lora_B=torch.randn(64, 513)), ValueError, "a rank of at most 512"),
    (dict(scaling="1"), TypeError, "scaling is '1', expected a number"),
    (dict(scaling=float("nan")), ValueError, "scaling is nan, expected a finite number"),
    (dict(scaling=torch.randn(2)), ValueError, r"scaling is a tensor of shape \[2\]"),
    (dict(bias=torch.randn(63)), ValueError, r"bias has shape \[63\], expected \[64\]"),
    (dict(dropout_p=1.0), ValueError, "dropout_p is 1.0, expected 0 <= dropout_p < 1"),
    (dict(dropout_p=-0.1), ValueError, "dropout_p is -0.1"),
    (dict(out_scale=torch.randn(63)), ValueError, r"out_scale has shape \[63\], expected \[64\]"),
    (dict(dropout_p=0.5, seed=torch.zeros(2, dtype=torch.int64)), ValueError, r"seed has shape \[2\]"),
    (dict(dropout_p=0.5, seed=torch.zeros(())), TypeError, "seed has dtype torch.float32"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD, ids=[b[2][:30] for b in BAD])
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bitfuse.lora_linear(**wide_case() | changes)


def test_joint_forms_refuse() -> None:
    x, p = torch.randn(2, 96), projection(64, 96, 4)
    for call, error, words in (
        (lambda: bitfuse.lora_qkv(x, ()), ValueError, "projections is empty"),
        (lambda: bitfuse.lora_qkv(x, (p.w,)), TypeError, r"projections\[0\] is a LowBitWeight"),  # type: ignore[arg-type]
        (
            lambda: bitfuse.lora_qkv(x, (p._replace(lora_A=None),)),
            ValueError,
            "only one of lora_A and lora_B",
        ),
        (lambda: bitfuse.lora_mlp(x, p, projection(72, 96, 4), p), ValueError, "64 and 72 out_features"),
        (
            lambda: bitfuse.lora_mlp(x, p, p, projection(96, 64, 4), "tanh"),
            ValueError,
            "activation is 'tanh'",
        ),
    ):
        with pytest.raises(error, match=words):
            call()


def test_explain_names_who_runs() -> None:
    case = wide_case()
    assert "lora_linear on cpu: cpp runs" in str(bitfuse.explain(bitfuse.lora_linear, **case))


PEAK = """
import resource, torch, bitfuse
from bitfuse.weights.formats import get_format
n, k = 8192, 4096
qweight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
w = bitfuse.LowBitWeight(qweight, torch.rand(n, k // 128).half(), get_format("int4"), (n, k))
small = bitfuse.quantize(torch.randn(64, 128), "int4")
for weight in (small, w):
    n, k = weight.shape
    x = torch.randn(64, k, dtype=torch.bfloat16, requires_grad=True)
    A, B = torch.randn(16, k, requires_grad=True), torch.randn(n, 16, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bitfuse.lora_linear(x, weight, A, B, 0.5, dropout_p=0.1).sum().backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(peak / 1024)
"""


def test_forward_and_backward_write_no_dense_weight() -> None:
    """In bfloat16 the dense weight would take 64 MiB; x, y, the adapter and all gradients take 5."""
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    assert float(out) < 20, f"{out.strip()} MiB"

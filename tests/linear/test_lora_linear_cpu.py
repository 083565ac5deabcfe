"""What only the CPU backend of lora_linear, gated_activation and bottleneck_adapter has: instruction-set
levels, threads, and bindings that check integers.

That its numbers are right is tested with every other backend's, in test_lora_linear.py and its like.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.core.dropout import keep
from bitfuse.ops.linear import bottleneck_adapter_cpu as bottleneck_adapter
from bitfuse.ops.linear import gated_activation_cpu as gated_activation
from bitfuse.ops.linear import lora_linear_cpu as lora_linear
from bitfuse.ops.linear import lowbit_linear_cpu as cpp
from bitfuse.ops.linear.lora_args import LoraArgs
from bitfuse.ops.linear.lora_linear import Wanted
from test_lowbit_linear_cpu import LEVELS, python

pytestmark = pytest.mark.skipif(cpp._cpu is None, reason="bitfuse._cpu is not built")

# The rule of tests/accuracy.py at one level: tails of rows, columns and ranks; tensors end at a guard page.
# Rank 1 not with few rows: the error of one h, which all outputs share, says nothing.
RULE = """
import itertools, math, torch, bitfuse
from accuracy import assert_accurate
from backends import Target
from bitfuse.core.activations import ACTIVATIONS, activate, derivative
from bitfuse import _cpu
from bitfuse.ops.linear.lora_args import LoraArgs
from bitfuse.ops.linear.bottleneck_adapter import bottleneck_adapter_op
from bitfuse.ops.linear.gated_activation import gated_activation_backward, gated_activation_op
from bitfuse.ops.linear.lora_linear import Wanted, lora_linear_backward, lora_linear_op
torch.manual_seed(0)
target = Target("cpp", "cpu")
floats = (torch.float32, torch.float16, torch.bfloat16)
formats = (dict(format="int4", group_size=8), dict(format="fp8", group_size=-1), None,
           dict(format="nf4", group_size=-1), dict(format="int4", group_size=8, offset=True),
           dict(format="int8", group_size=40, offset=True, scale_rows=3), dict(format="int3", group_size=40))
turn = itertools.cycle(itertools.product(floats, floats, formats, (0.0, 0.25), (False, True)))

def exact(t):
    return t.double() if t.is_floating_point() else t

for m, n, k, rank in itertools.product((1, 3, 5, 14, 70), (27, 136), (64, 200), (7, 16, 40, 150, 1)):
    if rank == 1 and m < 14:
        continue
    dtype, adapter, format, p, scaled = next(turn)
    weight = torch.randn(n, k) / k**0.5
    if format is None:
        w, = target.place(weight.to(dtype))
        dense = w.double()
    else:
        format = format | dict(group_size=-1 if k % format["group_size"] else format["group_size"])
        few = target.place_weight(bitfuse.quantize(weight, **format))
        w, dense = few.op_args, few.dequantize().double()
    x, y_grad, a, b, bias, scale, seed = target.place(
        torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), (torch.randn(rank, k) / k**0.5).to(adapter),
        (torch.randn(n, rank) / rank**0.5).to(adapter), torch.randn(n).to(dtype), torch.rand(n) + 0.5,
        torch.randint(0, 2**62, (1,)))
    args = LoraArgs(w, a, b, 1.5, None, bias, scale if scaled else None, seed.view(()) if p else None)
    doubles = LoraArgs(dense, a.double(), b.double(), 1.5, None, bias.double(), args.out_scale, args.seed)
    what = f"{_cpu.isa()} {m}x{n}x{k} rank {rank} {dtype} {adapter} {format} p={p} scaled={scaled}"
    got = target.run(lora_linear_op, x, (args,), p)
    plain = lora_linear_op.reference(x, (args,), p)
    wanted = lora_linear_op.reference(x.double(), (doubles,), p)
    assert_accurate(got[0], wanted[0], plain[0], what)
    if m == 1:  # so few products make a gradient that one rounding decides
        continue
    args, doubles = args._replace(out_scale=None), doubles._replace(out_scale=None)
    rest = (p, Wanted(True, (True, ), (True, )))
    got = target.run(lora_linear_backward, (y_grad,), x, (args,), (plain[1],), *rest)
    plain_grads = lora_linear_backward.reference((y_grad,), x, (args,), (plain[1],), *rest)
    in_double = ((y_grad.double(),), x.double(), (doubles,), (plain[1].double(),))
    wanted = lora_linear_backward.reference(*in_double, *rest)
    for name, g, e, r in zip(("x", "lora_A", "lora_B"), got, wanted, plain_grads):
        assert_accurate(g, e, r, f"gradient of {name}, {what}")
for dtype in floats:
    for m, k, rank in ((1, 24, 3), (6, 200, 40)):
        c = target.place(torch.randn(m, k).to(dtype), torch.randn(rank, k) / k**0.5, torch.randn(rank),
                         torch.randn(k, rank).bfloat16() / rank**0.5, torch.randn(k).half())
        for activation in ACTIVATIONS:
            y, h = target.run(bottleneck_adapter_op, *c, activation, True)
            wanted = bottleneck_adapter_op.reference(*map(exact, c), activation, True)
            plain = bottleneck_adapter_op.reference(*c, activation, True)
            assert_accurate(y, wanted[0], plain[0], f"bottleneck {dtype} {activation}")
            gate, up, grad = target.place(*(3 * torch.randn(3, m, k).to(dtype)))
            a = target.run(gated_activation_op, gate, up, activation)
            wanted = activate(gate.double(), activation) * up.double()
            assert_accurate(a, wanted, activate(gate, activation) * up, f"gated {dtype} {activation}")
            d_gate, d_up = target.run(gated_activation_backward, grad, gate, up, activation)
            leaf = gate.clone().requires_grad_()
            plain_grad, = torch.autograd.grad(activate(leaf, activation), leaf, grad * up)
            wanted = (grad.double() * up.double() * derivative(gate.double(), activation))
            assert_accurate(d_gate, wanted, plain_grad, f"gate {dtype} {activation}")
print(_cpu.isa())
"""


@pytest.mark.parametrize("level", LEVELS)
def test_level_meets_the_accuracy_rule(level: str) -> None:
    done = python(RULE, BITFUSE_CPU_ISA=level)
    if "does not support" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [level]


def adapted(m: int, dtype: torch.dtype, rank: int = 20, dropout_p: float = 0.0) -> tuple[Any, ...]:
    """x, two projections of it and the gradients of their outputs."""
    projections = [
        LoraArgs(
            weight,
            torch.randn(rank, 1560),
            torch.randn(n, rank).bfloat16(),
            0.5,
            seed=torch.tensor(7 + n) if dropout_p else None,
        )
        for n, weight in (
            (264, bitfuse.quantize(torch.randn(264, 1560), "int4", group_size=40).op_args),
            (72, torch.randn(72, 1560).to(dtype)),
        )
    ]
    grads = tuple(torch.randn(m, n).to(dtype) for n in (264, 72))
    return torch.randn(m, 1560).to(dtype), tuple(projections), grads


BOTH = Wanted(True, (True, True), (True, True))


@pytest.mark.parametrize("m", [1, 4, 17, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(m: int, dtype: torch.dtype) -> None:
    x, projections, grads = adapted(m, dtype, dropout_p=0.1)
    hs = tuple(torch.randn(m, 20) for _ in projections)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            few = (
                projections[:1],
                grads[:1],
                hs[:1],
            )  # the dense product is torch's, and not ours to vouch for
            found.append(
                [
                    *lora_linear.run(x, few[0], 0.1),
                    *lora_linear.run_backward(few[1], x, few[0], few[2], 0.1, BOTH),
                    *bottleneck_adapter.run(
                        x, projections[0].lora_A, None, torch.ones(9, 20), None, "gelu", False
                    ),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_the_mask_is_the_one_of_keep(rows: int) -> None:
    seed, p = torch.tensor(-(2**60) + 12345), 0.3
    x, a = torch.ones(rows, 72), torch.eye(72)
    mask = keep(seed, rows, 72, p) / (1 - p)
    weight = bitfuse.quantize(torch.randn(16, 72), "int8", group_size=72).op_args
    args = LoraArgs(weight, a, torch.zeros(16, 72), seed=seed)
    _, h = lora_linear.run(x, (args,), p)
    assert torch.equal(h, mask)
    wanted = Wanted(True, (True,), (False,))
    for w in (torch.zeros(16, 72), bitfuse.quantize(torch.zeros(16, 72), "int8", group_size=72).op_args):
        args = LoraArgs(w, a, torch.ones(16, 72) / 16, seed=seed)
        grad_x, grad_a, _ = lora_linear.run_backward((torch.ones(rows, 16),), x, (args,), (None,), p, wanted)
        assert torch.equal(grad_x, mask)
        torch.testing.assert_close(grad_a, mask.sum(0).expand(72, 72))


def test_several_projections_add_to_one_gradient() -> None:
    x, projections, grads = adapted(9, torch.float32)
    hs = tuple(torch.randn(9, 20) for _ in projections)
    joint = lora_linear.run_backward(grads, x, projections, hs, 0.0, BOTH)
    one = Wanted(True, (True,), (True,))
    parts = [
        lora_linear.run_backward((g,), x, (p,), (h,), 0.0, one)
        for g, p, h in zip(grads, projections, hs, strict=True)
    ]
    torch.testing.assert_close(joint[0], parts[0][0] + parts[1][0], rtol=1e-5, atol=1e-3)
    for got, alone in zip(joint[1:], [*parts[0][1:], *parts[1][1:]], strict=True):
        assert torch.equal(got, alone)


def test_rows_are_read_where_they_lie() -> None:
    """Views of x and of the outputs' gradients give what dense copies give; nothing given is written to."""
    wide, (p, dense), _ = adapted(12, torch.bfloat16)
    wide = torch.cat([wide, wide], 1)
    x, grad = wide[:, :1560], torch.randn(264, 12).t().bfloat16()
    given = [t.clone() for t in (wide, grad, p.lora_A, p.lora_B)]
    for args in (p, dense._replace(weight=torch.randn(264, 1560).bfloat16(), lora_B=p.lora_B)):
        results = [
            [
                *lora_linear.run(a, (args,), 0.0),
                *lora_linear.run_backward(
                    (g,), a, (args,), (torch.ones(12, 20),), 0.0, Wanted(True, (True,), (True,))
                ),
            ]
            for a, g in ((x, grad), (x.contiguous(), grad.contiguous()))
        ]
        for view, copy in zip(*results, strict=True):
            torch.testing.assert_close(view, copy)
    assert all(torch.equal(a, b) for a, b in zip(given, (wide, grad, p.lora_A, p.lora_B), strict=True))


def test_calls_from_several_threads_do_not_share_scratch() -> None:
    cases = [adapted(m, torch.float32, rank, 0.1)[:2] for m, rank in ((1, 30), (4, 3), (20, 16), (150, 150))]
    expected = [lora_linear.run(x, p, 0.1) for x, p in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            x, projections = cases[i]
            got = lora_linear.run(x, projections, 0.1)
            # of the dense projection only h: the product with W is torch's
            if not all(torch.equal(got[j], expected[i][j]) for j in (0, 2, 3)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


F = torch.zeros(64, 64)  # what addresses point to


def at(address: int, *shape: int, strides: tuple[int, ...] | None = None, dtype: str = "FLOAT32") -> Any:
    """A descriptor of numbers that may be anybody's."""
    return cpp._cpu.Tensor(address, getattr(cpp._cpu.Dtype, dtype), shape, strides)


def good(*shape: int, **other: Any) -> Any:
    return at(F.data_ptr(), *shape, **other)


def adapter(a: Any, h: Any, **other: Any) -> Any:
    return cpp._cpu.Adapter(a, h, **other)


def calls() -> dict[str, dict[str, Any]]:
    """Arguments of each binding that it takes."""
    row = good(2, 16)
    none = cpp._cpu.Dropout()
    return {
        "lora_shrink": {"x": row, "adapter": adapter(good(4, 16), good(2, 4))},
        "lora_expand": {
            "out": row, "t": good(2, 4), "p": good(16, 4), "transposed": True, "scale": 1.0, "dropout": none,
            "out_scale": None, "bias": None,
        },
        "lora_times": {"y": row, "b": good(16, 4), "scale": 1.0, "out": good(2, 4)},
        "lora_outer": {
            "t": good(2, 4), "x": row, "dropout": none, "scale": 1.0, "out": good(4, 16), "transposed": False,
        },
        "bottleneck_adapter": {
            "x": row, "down": good(4, 16), "down_bias": None, "activation": cpp._cpu.Activation.SILU,
            "up": good(16, 4), "up_bias": None, "residual": True, "h": good(2, 4), "t": good(2, 4),
            "out": row,
        },
        "gated_activation": {"activation": cpp._cpu.Activation.SILU, "gate": row, "up": row, "out": row},
        "gated_activation_backward": {
            "activation": cpp._cpu.Activation.SILU, "grad": row, "gate": row, "up": row, "d_gate": row,
            "d_up": row,
        },
    }  # fmt: skip


def test_the_calls_are_good() -> None:
    for name, arguments in calls().items():
        getattr(cpp._cpu, name)(**arguments)


@pytest.mark.parametrize(
    ("function", "change", "words"),
    [
        ("lora_shrink", lambda: {"x": at(0, 2, 16)}, "x is null"),
        ("lora_shrink", lambda: {"x": at(6, 2, 16)}, "x is 6, expected a multiple of 4"),
        ("lora_shrink", lambda: {"x": good(2, 16, dtype="UINT8")}, "x is of dtype uint8, expected float32"),
        ("lora_shrink", lambda: {"x": good(-1, 16)}, "x is -1, expected 0 rows or more"),
        ("lora_shrink", lambda: {"x": good(2, 16, strides=(-16, 1))}, "x is -16, expected a row stride"),
        ("lora_shrink", lambda: {"x": good(2, -1)}, "x is -1, expected 0 columns"),
        (
            "lora_shrink",
            lambda: {"adapter": adapter(good(0, 16), good(2, 0))},
            "rank is 0, expected 1 to",
        ),
        ("lora_shrink", lambda: {"adapter": adapter(good(513, 16), good(2, 513))}, "rank is 513"),
        (
            "lora_shrink",
            lambda: {"adapter": adapter(good(4, 16, dtype="INT32"), good(2, 4))},
            "a is of dtype int32, expected float32, float16 or bfloat16",
        ),
        ("lora_shrink", lambda: {"adapter": adapter(good(4, 8), good(2, 4))}, r"a is of shape \[4, 8\]"),
        ("lora_shrink", lambda: {"adapter": adapter(good(4, 16), good(2, 5))}, r"h is of shape \[2, 5\]"),
        ("lora_shrink", lambda: {"x": cpp._cpu.Dropout(1.0)}, "dropout_p is 1.0"),
        ("lora_shrink", lambda: {"x": cpp._cpu.Dropout(float("nan"))}, "dropout_p is nan"),
        ("lora_shrink", lambda: {"x": good(1 << 60, 16)}, "x is larger than memory"),
        ("lora_expand", lambda: {"out": at(0, 2, 16)}, "out is null"),
        ("lora_expand", lambda: {"t": at(0, 2, 4)}, "t is null"),
        ("lora_expand", lambda: {"out_scale": at(2, 16)}, "out_scale is 2, expected a multiple of 4"),
        ("lora_expand", lambda: {"bias": at(2, 16)}, "bias is 2, expected a multiple of 4"),
        ("lora_expand", lambda: {"bias": good(15)}, r"bias is of shape \[15\], expected \[16\]"),
        ("lora_expand", lambda: {"out": good(2, 1 << 62)}, "out is larger than memory"),
        ("lora_times", lambda: {"y": good(2, 0)}, "depth is 0"),
        ("lora_times", lambda: {"b": at(0, 16, 4)}, "b is null"),
        ("lora_outer", lambda: {"out": good(4, 16, dtype="INT64")}, "out is of dtype int64"),
        ("lora_outer", lambda: {"x": good(2, -16)}, "x is -16, expected 0 columns"),
        (
            "bottleneck_adapter",
            lambda: {"up": good(8, 4), "out": good(2, 8)},
            "outs is 8, expected depth",
        ),
        ("bottleneck_adapter", lambda: {"up_bias": good(16, dtype="BOOL")}, "up_bias is of dtype bool"),
        ("gated_activation", lambda: {"gate": at(0, 2, 16)}, "gate is null"),
        ("gated_activation_backward", lambda: {"d_gate": at(0, 2, 16)}, "d_gate is null"),
        (
            "gated_activation",
            lambda: {"up": good(2, 16, strides=(-1, 1))},
            "up is -1, expected a row stride",
        ),
        ("gated_activation", lambda: {"gate": good(2, 1 << 62)}, "gate is larger than memory"),
        ("gated_activation", lambda: {"up": good(2, 15)}, r"up is of shape \[2, 15\], expected \[2, 16\]"),
    ],
)
def test_the_bindings_refuse_wrong_numbers(
    function: str, change: Callable[[], dict[str, Any]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        getattr(cpp._cpu, function)(**calls()[function] | change())


def test_a_tensor_scaling_and_rank_0() -> None:
    x, (p, _), _ = adapted(3, torch.float32)
    bare = p._replace(lora_A=p.lora_A[:0], lora_B=p.lora_B[:, :0])
    y, h = lora_linear.run(x, (bare,), 0.0)
    assert torch.equal(y, cpp.run(x, p.weight, None)) and h.shape == (3, 0)
    halved = p._replace(scaling=1.0, scale_by=torch.tensor(0.5))
    assert torch.equal(lora_linear.run(x, (halved,), 0.0)[0], lora_linear.run(x, (p,), 0.0)[0])
    gated = gated_activation.run(x[:, 1::2], x[:, ::2], "relu")
    assert torch.equal(gated, x[:, 1::2].relu() * x[:, ::2])

"""What every differentiable op owes torch beside a first gradient: second ones, or an error; torch.func;
forward mode; torch.jit.trace. One table of calls for all of it, and a check that none is missing."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.core import autograd
from bitfuse.ops.attention.kv_cache import rotate
from torch.autograd import forward_ad

F32 = torch.float32


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True)
class Case:
    """A function of tensors, the same in plain torch, and inputs; linear: it has all derivatives."""

    run: Callable[..., torch.Tensor]
    plain: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    linear: bool = False


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    z = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (torch.softmax(z if mask is None else z + mask, -1) @ v).transpose(1, 2)


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    return bitfuse.varlen_attention(q, k, v, cu, cu, 3, 3)


def packed_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.cat([attend(*(t[None, i:j] for t in (q, k, v)))[0] for i, j in ((0, 2), (2, 5))])


W = bitfuse.quantize(draw(8, 32), "int8")
DOWN = bitfuse.quantize(draw(8, 8), "int8", group_size=8)
DENSE = W.dequantize()
COS, SIN = draw(9, 2), draw(9, 2)


def turned(x: torch.Tensor) -> torch.Tensor:
    return rotate(x, COS[None, : x.shape[1]], SIN[None, : x.shape[1]], False)


def lora(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return x @ DENSE.t() + 0.5 * (x @ a.t() @ b.t())


def projections(*parts: torch.Tensor) -> list[bitfuse.Projection]:
    return [bitfuse.Projection(W, a, b, 0.5) for a, b in zip(parts[::2], parts[1::2], strict=True)]


def mlp_plain(x: torch.Tensor, *ab: torch.Tensor) -> torch.Tensor:
    gate, up = (lora(x, a, b) for a, b in (ab[:2], ab[2:4]))
    middle = torch.nn.functional.silu(gate) * up
    return middle @ DOWN.dequantize().t() + 0.5 * (middle @ ab[4].t() @ ab[5].t())


def mlp(x: torch.Tensor, *ab: torch.Tensor) -> torch.Tensor:
    gate, up = projections(*ab[:4])
    down = bitfuse.Projection(DOWN, ab[4], ab[5], 0.5)
    return bitfuse.lora_mlp(x, gate, up, down)


def many(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return bitfuse.multi_lora_linear(x, W, a, b, 0.5, torch.tensor([1, 0, -1]))


def many_plain(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    rows = [x[0] @ a[1].t() @ b[1].t(), x[1] @ a[0].t() @ b[0].t(), torch.zeros(8)]
    return x @ DENSE.t() + 0.5 * torch.stack(rows)


def merged_plain(o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor) -> torch.Tensor:
    share = torch.sigmoid(lse1 - lse2).transpose(1, 2).unsqueeze(-1)
    return share * o1 + (1 - share) * o2


def adapter_plain(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return x + torch.nn.functional.gelu(x @ down.t()) @ up.t()


QKV = (draw(1, 5, 2, 4), draw(1, 6, 2, 4), draw(1, 6, 2, 4))
AB = (draw(2, 32), draw(8, 2))
CASES = {
    "lowbit_linear": Case(
        lambda x, b: bitfuse.lowbit_linear(x, W, b),
        lambda x, b: x @ DENSE.t() + b,
        (draw(3, 32), draw(8)),
        True,
    ),
    "rope": Case(lambda x: bitfuse.rope(x, COS, SIN), turned, (draw(1, 5, 2, 4),), True),
    "merge_attention": Case(
        lambda *t: bitfuse.merge_attention(*t)[0],
        merged_plain,
        (draw(1, 3, 2, 4), draw(1, 2, 3), draw(1, 3, 2, 4) + 1, draw(1, 2, 3) + 1),
        True,
    ),
    "attention": Case(bitfuse.attention, attend, QKV),
    "attention with a bias": Case(
        lambda q, k, v, m: bitfuse.attention(q, k, v, attn_bias=m), attend, (*QKV, draw(1, 2, 5, 6))
    ),
    "varlen_attention": Case(packed, packed_plain, (draw(5, 2, 4), draw(5, 2, 4) + 1, draw(5, 2, 4) - 1)),
    "scaled_dot_product_attention": Case(
        lambda *t: bitfuse.scaled_dot_product_attention(*(x.transpose(1, 2) for x in t)).transpose(1, 2),
        attend,
        QKV,
    ),
    "gated_activation": Case(
        bitfuse.gated_activation, lambda g, u: torch.nn.functional.silu(g) * u, (draw(3, 8), draw(3, 8) + 1)
    ),
    "rms_norm": Case(
        lambda x, w: bitfuse.rms_norm(x, w, 1e-5),
        lambda x, w: torch.nn.functional.rms_norm(x, (8,), w, 1e-5),
        (draw(3, 8), draw(8)),
    ),
    "rms_norm with a residual": Case(
        lambda x, w, r: torch.add(*bitfuse.rms_norm(x, w, 1e-5, residual=r)),
        lambda x, w, r: torch.nn.functional.rms_norm(x + r, (8,), w, 1e-5) + (x + r),
        (draw(3, 8), draw(8), draw(3, 8) + 1),
    ),
    "layer_norm": Case(
        bitfuse.layer_norm,
        lambda x, w, b: torch.nn.functional.layer_norm(x, (8,), w, b),
        (draw(3, 8), draw(8), draw(8) + 1),
    ),
    "bottleneck_adapter": Case(
        bitfuse.bottleneck_adapter, adapter_plain, (draw(3, 16), draw(4, 16), draw(16, 4))
    ),
    "lora_linear": Case(lambda x, a, b: bitfuse.lora_linear(x, W, a, b, 0.5), lora, (draw(3, 32), *AB)),
    "lora_linear, dense": Case(
        lambda x, w, a, b: bitfuse.lora_linear(x, w, a, b, 0.5),
        lambda x, w, a, b: x @ w.t() + 0.5 * (x @ a.t() @ b.t()),
        (draw(3, 32), draw(8, 32), *AB),
    ),
    "lora_qkv": Case(
        lambda x, *ab: torch.cat(bitfuse.lora_qkv(x, projections(*ab)), -1),
        lambda x, *ab: torch.cat([lora(x, *ab[:2]), lora(x, *ab[2:])], -1),
        (draw(3, 32), *AB, draw(2, 32) + 1, draw(8, 2) + 1),
    ),
    "lora_mlp": Case(
        mlp, mlp_plain, (draw(3, 32), *AB, draw(2, 32) + 1, draw(8, 2) + 1, draw(2, 8), draw(8, 2))
    ),
    "multi_lora_linear": Case(many, many_plain, (draw(3, 32), draw(2, 2, 32), draw(2, 8, 2))),
}


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


def through(name: str, plain: bool = False) -> Callable[..., torch.Tensor]:
    """A number made of the case's output, which is linear in nothing."""
    f = CASES[name].plain if plain else CASES[name].run
    return lambda *tensors: f(*(t.tanh() for t in tensors)).pow(3).sum()


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_function_is_here() -> None:
    """Every torch.autograd.Function is one of `bitfuse.core.autograd`, and has an op in this table."""

    def below(cls: Any) -> set[Any]:
        return {cls}.union(*(below(c) for c in cls.__subclasses__()))

    ours: set[Any] = {c for c in below(torch.autograd.Function) if c.__module__.startswith("bitfuse")}
    assert all(issubclass(c, autograd.Function) for c in ours), ours
    for c in ours - {autograd.Function}:
        assert "setup_context" in {k for b in c.__mro__[:-1] for k in b.__dict__} and c.forward, c
        assert next(iter(inspect.signature(c.forward).parameters), "") != "ctx", c
    named = {c.op for c in ours if c.__module__.startswith("bitfuse.ops")} - {""}
    assert named <= set(CASES), named - set(CASES)
    differentiable = {"lowbit_linear", "rope", "merge_attention"}
    for c in ours - {autograd.Function}:
        source = inspect.getsource(c.backward)
        assert "once(" in source or "raise" in source or c.op in differentiable, c


def test_second_derivatives(name: str) -> None:
    case = CASES[name]
    given = tuple(t.clone().requires_grad_() for t in case.inputs)
    along = tuple(torch.ones_like(t) for t in given)
    if case.linear:
        close(
            torch.autograd.functional.hvp(through(name), given, along)[1],
            torch.autograd.functional.hvp(through(name, True), given, along)[1],
        )
        return
    ask: list[Callable[[], Any]] = [
        lambda: torch.autograd.functional.hvp(through(name), given, along),
        lambda: torch.autograd.functional.hessian(through(name), given),
    ]
    for i, t in enumerate(given):  # a penalty on one gradient, with a path past the op and without

        def penalty(i: int = i, t: torch.Tensor = t, past: float = 1.0) -> Any:
            y = through(name)(*given)
            (g,) = torch.autograd.grad(y, t, create_graph=True)
            return torch.autograd.grad(past * y + g.square().sum(), given, allow_unused=True)

        ask += [penalty, lambda penalty=penalty: penalty(past=0.0)]  # type: ignore[misc]
    for only in range(len(given)):  # one input learns, the gradient of another is asked for
        for other in range(len(given)):

            def mixed(only: int = only, other: int = other) -> Any:
                tensors = [
                    t.detach().clone().requires_grad_(i in (only, other)) for i, t in enumerate(case.inputs)
                ]
                y = through(name)(*tensors)
                (g,) = torch.autograd.grad(y, tensors[only], create_graph=True)
                return torch.autograd.grad(g.square().sum(), tensors[other])

            ask.append(mixed)
    for asked in ask:
        with pytest.raises(RuntimeError, match="no second derivative"):
            asked()


def test_create_graph_alone_changes_nothing(name: str) -> None:
    given = tuple(t.clone().requires_grad_() for t in CASES[name].inputs)
    one = torch.autograd.grad(through(name)(*given), given)
    two = torch.autograd.grad(through(name)(*given), given, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_torch_func(name: str) -> None:
    given = CASES[name].inputs
    each = tuple(range(len(given)))
    f, plain = through(name), through(name, True)
    close(torch.func.grad(f, each)(*given), torch.func.grad(plain, each)(*given))
    out = CASES[name].run
    close(torch.func.jacrev(out, 0)(*given), torch.func.jacrev(CASES[name].plain, 0)(*given))
    with (
        pytest.raises(RuntimeError, match="no second derivative")
        if not CASES[name].linear
        else contextlib.nullcontext()
    ):
        got = torch.func.grad(lambda *t: torch.func.grad(f)(*t).square().sum())(*given)
        close(got, torch.func.grad(lambda *t: torch.func.grad(plain)(*t).square().sum())(*given))


def test_vmap(name: str) -> None:
    """Over all inputs, over the first, over all but the first; gradients inside and outside."""
    case = CASES[name]
    f, plain = through(name), through(name, True)
    count = len(case.inputs)
    ways = (
        [(0,) * count]
        if count == 1
        else [(0,) * count, (0,) + (None,) * (count - 1), (None,) + (0,) * (count - 1)]
    )
    if name == "multi_lora_linear":  # adapters alone are added to one product
        ways = ways[:2]
    for dims in ways:
        given = tuple(
            t if d is None else torch.stack([t, 0.5 * t, -t]) for t, d in zip(case.inputs, dims, strict=True)
        )
        each = tuple(range(count))
        close(torch.vmap(case.run, dims)(*given), torch.vmap(case.plain, dims)(*given))
        close(
            torch.vmap(torch.func.grad(f, each), dims)(*given),
            torch.vmap(torch.func.grad(plain, each), dims)(*given),
        )
        close(
            torch.func.grad(lambda *t: torch.vmap(f, dims)(*t).sum(), each)(*given),  # noqa: B023
            torch.func.grad(lambda *t: torch.vmap(plain, dims)(*t).sum(), each)(*given),  # noqa: B023
        )


def test_gradients_in_batches(name: str) -> None:
    """`is_grads_batched`, which has a vmap of its own."""
    given = CASES[name].inputs
    close(
        torch.autograd.functional.jacobian(CASES[name].run, given, vectorize=True),
        torch.autograd.functional.jacobian(CASES[name].plain, given),
    )


def test_forward_mode(name: str) -> None:
    """Right where the op is linear, and an error elsewhere; never a tangent that is lost."""
    case = CASES[name]
    right = case.linear and name != "merge_attention"
    tangents = tuple(torch.ones_like(t) for t in case.inputs)
    f = through(name)

    def dual() -> torch.Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, case.inputs, tangents))).tangent

    def jacobian() -> Any:
        return torch.autograd.functional.jacobian(f, case.inputs, vectorize=True, strategy="forward-mode")

    plain = through(name, True)
    each = tuple(range(len(case.inputs)))
    for run, wanted in (
        (dual, lambda: torch.func.jvp(plain, case.inputs, tangents)[1]),
        (
            lambda: torch.func.jvp(f, case.inputs, tangents)[1],
            lambda: torch.func.jvp(plain, case.inputs, tangents)[1],
        ),
        (jacobian, lambda: torch.autograd.functional.jacobian(plain, case.inputs)),
        (
            lambda: torch.func.jacfwd(f, each)(*case.inputs),
            lambda: torch.func.jacfwd(plain, each)(*case.inputs),
        ),
        (lambda: torch.func.hessian(f)(*case.inputs), lambda: torch.func.hessian(plain)(*case.inputs)),
    ):
        if right:
            close(run(), wanted())
        else:
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                run()
    with torch.no_grad(), pytest.raises(NotImplementedError) if not right else contextlib.nullcontext():
        dual()


@pytest.mark.parametrize("grad", [False, True])
def test_jit_trace(name: str, grad: bool) -> None:
    """The op in the graph, exact, also for other numbers of rows."""
    case = CASES[name]
    given = tuple(t.clone().requires_grad_(grad) for t in case.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(case.run, given, check_trace=False)
    torch.full((100_000,), 3.0)
    assert "bitfuse::" in str(traced.inlined_graph)
    assert torch.equal(traced(*given), case.run(*given))
    if name in (
        "lowbit_linear",
        "gated_activation",
        "rms_norm",
        "layer_norm",
        "lora_linear",
        "lora_mlp",
        "lora_qkv",
        "bottleneck_adapter",
    ):
        more = (torch.cat([given[0], given[0] + 1]), *given[1:])
        if name == "gated_activation":
            more = tuple(torch.cat([t, t + 1]) for t in given)
        assert torch.equal(traced(*more), case.run(*more))
    elif "attention" in name and "merge" not in name and "bias" not in name and "varlen" not in name:
        more = tuple(torch.cat([t, t + 1]) for t in given)
        assert torch.equal(traced(*more), case.run(*more))


LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "Linear": lambda: bitfuse.nn.Linear.from_float(torch.nn.Linear(64, 16), "nf4"),
    "LoRALinear": lambda: bitfuse.nn.LoRALinear(torch.nn.Linear(64, 16), 4),
    "LoRALinear over few bits": lambda: bitfuse.nn.LoRALinear(
        bitfuse.nn.Linear.from_float(torch.nn.Linear(64, 16), "int8"), 4
    ),
    "DoRA": lambda: bitfuse.nn.LoRALinear(torch.nn.Linear(64, 16), 4, use_dora=True),
    "IA3Linear": lambda: bitfuse.nn.IA3Linear(torch.nn.Linear(64, 16)),
    "BottleneckAdapter": lambda: bitfuse.nn.BottleneckAdapter(64, 4),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer: str) -> None:
    """Traced, and their gradients for each sample."""
    torch.manual_seed(0)
    made = LAYERS[layer]()
    with torch.no_grad():
        for p in made.parameters():
            if p.is_floating_point() and p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    x = draw(3, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(made, x, check_trace=False)
    more = draw(7, 64)
    with torch.no_grad():  # DoRA that learns multiplies apart
        assert torch.equal(traced(more), made(more))

    learnt = {n: p.detach() for n, p in made.named_parameters() if p.requires_grad}

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(made, p, (x[None],)).square().sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0))(learnt, x)
    for i in range(len(x)):
        for p in made.parameters():
            p.grad = None
        made(x[i][None]).square().sum().backward()
        for n, p in made.named_parameters():
            if p.requires_grad:
                close(got[n][i], p.grad)


@pytest.mark.parametrize("weights", [False, True])
def test_multihead_attention_for_each_sample(weights: bool) -> None:
    torch.manual_seed(0)
    made = bitfuse.nn.MultiheadAttention(16, 2, batch_first=True)
    plain = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    plain.load_state_dict(made.state_dict())
    x = draw(4, 5, 16)

    def per_sample(m: torch.nn.Module) -> Any:
        def loss(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            out = torch.func.functional_call(m, p, (x[None],) * 3, {"need_weights": weights})
            return out[0].square().sum() + (out[1].square().sum() if weights else 0)

        learnt = {n: p.detach() for n, p in m.named_parameters()}
        return torch.vmap(torch.func.grad(loss), (None, 0))(learnt, x)

    close(per_sample(made), per_sample(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(_SelfAttention(made, weights), x, check_trace=False)
    assert torch.equal(traced(draw(2, 7, 16)), made(*(draw(2, 7, 16),) * 3, need_weights=weights)[0])


def test_what_has_no_gradient_says_so() -> None:
    c = draw(1, 8, 1, 8)
    q, new = draw(1, 1, 1, 8), draw(1, 1, 1, 8)
    for i in range(3):
        given = [t.clone().requires_grad_(j == i) for j, t in enumerate((q, new, new))]
        lengths = torch.tensor([4], dtype=torch.int32)
        out = bitfuse.decode_attention(given[0], c.clone(), c.clone(), lengths, k=given[1], v=given[2])
        with pytest.raises(RuntimeError, match="decode_attention has no gradient"):
            out.sum().backward()
    lengths = torch.tensor([4], dtype=torch.int32)
    compiled = torch.compile(
        lambda q: bitfuse.decode_attention(q, c, c.clone(), lengths), backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match="decode_attention has no gradient"):
        compiled(q.clone().requires_grad_()).sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="decode_attention has no"):
        bitfuse.decode_attention(forward_ad.make_dual(q, q), c, c.clone(), lengths)


def test_tangents_of_what_is_no_input_are_not_lost() -> None:
    q = draw(1, 3, 2, 4)
    slopes = torch.tensor([0.5, 0.25])
    with forward_ad.dual_level():
        for run in (
            lambda: bitfuse.rope(q, forward_ad.make_dual(COS, COS), SIN),
            lambda: bitfuse.attention(q, q, q, alibi_slopes=forward_ad.make_dual(slopes, slopes)),
        ):
            with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
                run()


def test_vmap_of_what_writes() -> None:
    def write(k: torch.Tensor) -> torch.Tensor:
        cache.append(k, k)
        return k

    cache = bitfuse.KVCache(1, 8, 1, 8, dtype=F32)
    with pytest.raises(RuntimeError, match="append_kv writes to k_cache, which"):
        torch.vmap(write)(draw(3, 1, 2, 1, 8))


class _SelfAttention(torch.nn.Module):
    def __init__(self, attention: torch.nn.Module, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = attention, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]

"""fuse_peft_: what is no longer PEFT's own inside a layer is left alone, or met at the call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.integrations import fuse_peft_, unfuse_peft_, with_bitfuse_layers
from bitfuse.integrations.peft_layers import FusedLinear
from test_linear import replicas
from torch.nn.utils import parametrizations, parametrize, prune

peft = pytest.importorskip("peft")

K = 32


def wrapped(dora: bool = False, dropout: float = 0.0, few_bit: bool = False, **more: Any) -> Any:
    """A PEFT model of one layer whose adapter does something."""
    torch.manual_seed(3)
    base = torch.nn.Sequential(torch.nn.Linear(K, K))
    config = peft.LoraConfig(
        r=4, target_modules=["0"], init_lora_weights=False, use_dora=dora, lora_dropout=dropout, **more
    )
    if few_bit:
        bitfuse.quantize_(base, "int8", progress=False)
        config = with_bitfuse_layers(config)
    return peft.get_peft_model(base, config)


def layer_of(model: Any) -> Any:
    return model.base_model.model[0]


class Tripled(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3


class Doubled(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def _bias(layer: Any, key: str) -> None:
    inner = getattr(layer, key)["default"]
    inner.bias = torch.nn.Parameter(torch.linspace(-1, 1, inner.out_features))


def _subclass(inner: Any) -> None:
    inner.__class__ = Tripled


def _replace(inner: Any) -> None:
    inner.forward = lambda x, *args, _f=inner.forward, **kwargs: _f(x, *args, **kwargs) * 2


def _prune(inner: Any) -> None:
    prune.l1_unstructured(inner, "weight", 0.5)


def _parametrize(inner: Any) -> None:
    parametrize.register_parametrization(inner, "weight", Doubled())


def _scaling(layer: Any) -> None:
    layer.scaling["default"] = torch.nn.Parameter(torch.tensor(1.7))


def _cast(layer: Any) -> None:
    layer.cast_input_dtype_enabled = False


def _every(layer: Any) -> None:
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, i, o: o * 1.5)


def _double_backward_hook(inner: Any) -> None:
    inner.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else g * 2 for g in gi))


INNER: dict[str, Callable[[Any], Any]] = {
    "base": lambda layer: layer.base_layer,
    "A": lambda layer: layer.lora_A["default"],
    "B": lambda layer: layer.lora_B["default"],
    "dropout": lambda layer: layer.lora_dropout["default"],
}
CHANGES: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda m: m.register_forward_hook(lambda m, i, o: o * 0.5),
    "hook with kwargs": lambda m: m.register_forward_hook(lambda m, i, k, o: o * 0.5, with_kwargs=True),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "backward hook": _double_backward_hook,
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda m, g: tuple(t * 2 for t in g)),
    "forward": _replace,
}
LINEAR_CHANGES: dict[str, Callable[[Any], Any]] = {
    "subclass": _subclass,
    "prune": _prune,
    "parametrize": _parametrize,
    "weight_norm": lambda m: parametrizations.weight_norm(m),
}


def _inside(where: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda layer: change(INNER[where](layer))


CASES: dict[str, Callable[[Any], Any]] = {
    f"{where}: {what}": _inside(where, change)
    for where in INNER
    for what, change in {**CHANGES, **({} if where == "dropout" else LINEAR_CHANGES)}.items()
}
CASES |= {
    "A: bias": lambda layer: _bias(layer, "lora_A"),
    "B: bias": lambda layer: _bias(layer, "lora_B"),
    "learnable scaling": _scaling,
    "no casts of the input": _cast,
    "every linear": _every,
}


def numbers(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and every gradient."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(7)
    y = model(x)
    y.square().sum().backward()
    layer = layer_of(model)
    learnt = [t for t in layer.scaling.values() if isinstance(t, torch.Tensor)]
    grads = [p.grad for p in [*model.parameters(), *learnt] if p.grad is not None]
    return [y.detach(), x.grad, *(g.clone() for g in grads)]


def check_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_what_is_changed_inside_counts(case: str) -> None:
    """Before fusing such a layer is left alone; after it, PEFT's forward runs while the change is there."""
    plain = wrapped()
    x = torch.randn(5, K)
    unchanged = numbers(plain, x)
    early, late = copy.deepcopy(plain), copy.deepcopy(plain)
    CASES[case](layer_of(plain))
    want = numbers(plain, x)
    CASES[case](layer_of(early))
    left = fuse_peft_(early).left
    if case != "no casts of the input":  # an option of the call, as disable_adapters is
        assert len(left) == 1 and type(layer_of(early)) is not FusedLinear, left
    assert not fuse_peft_(late).left
    check_same(numbers(late, x), unchanged)
    CASES[case](layer_of(late))
    for model in (early, late):
        check_same(numbers(model, x), want)


@pytest.mark.parametrize("few_bit", [False, True])
@pytest.mark.parametrize("case", ["base: forward hook", "A: forward hook", "B: forward", "A: bias"])
def test_dora_too(case: str, few_bit: bool) -> None:
    if few_bit:  # PEFT can't begin DoRA over a few-bit base: the base is put below
        plain, late = wrapped(dora=True), wrapped(dora=True)
        made = bitfuse.nn.Linear.from_float(layer_of(late).base_layer, "int8")
        layer_of(late).base_layer = made
        layer_of(plain).base_layer.weight.data = made.weight.dequantize()
        assert torch.equal(layer_of(late).base_layer.bias, layer_of(plain).base_layer.bias)
    else:
        plain, late = wrapped(dora=True), wrapped(dora=True)
    assert not fuse_peft_(late).left
    x = torch.randn(5, K)
    check_same(numbers(late, x)[:2], numbers(plain, x)[:2])
    for model in (plain, late):
        CASES[case](layer_of(model))
    with torch.no_grad():
        torch.testing.assert_close(late(x), plain(x), rtol=1e-4, atol=1e-5)
    check_same(numbers(late, x)[:2], numbers(plain, x)[:2])


def test_hooks_come_and_go() -> None:
    model = wrapped()
    fuse_peft_(model)
    x, seen = torch.randn(2, K), []
    fused = model(x)
    handle = layer_of(model).base_layer.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    model(x)
    handle.remove()
    assert len(seen) == 1 and torch.equal(model(x), fused)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen[1:].count(torch.nn.Linear) == 3 and torch.equal(model(x), fused)


def test_float64_and_large_ranks() -> None:
    x = torch.randn(3, K)
    model = wrapped().double()
    assert "torch.float64" in next(iter(fuse_peft_(model).left.values()))
    assert model(x.double()).dtype == torch.float64
    model = wrapped()
    assert not fuse_peft_(model).left
    want = wrapped().double()(x.double())
    assert torch.equal(model.double()(x.double()), want)
    model.float()
    model.add_adapter("wide", peft.LoraConfig(r=600, target_modules=["0"], init_lora_weights=False))
    model.set_adapter("wide")
    y = model(x)
    unfuse_peft_(model)
    assert torch.equal(model(x), y)
    assert "rank 600, above 512" in next(iter(fuse_peft_(model).left.values()))


@pytest.mark.parametrize("dropout", [0.3, 1.0])
def test_dropout_of_any_rate(dropout: float) -> None:
    model = wrapped(dropout=dropout)
    assert bool(fuse_peft_(model).left) == (dropout == 1)
    x = torch.randn(2, K)
    y = model(x)
    layer_of(model).lora_dropout["default"].p = 1.0
    base = layer_of(model).base_layer(x)
    assert torch.equal(model(x), base) and (torch.equal(y, base) == (dropout == 1))


@pytest.mark.parametrize("few_bit", [False, True])
def test_dora_follows_writes_to_its_base(few_bit: bool) -> None:
    plain, model = wrapped(dora=True).eval(), wrapped(dora=True).eval()
    if few_bit:
        made = bitfuse.nn.Linear.from_float(layer_of(model).base_layer, "nf4", group_size=32)
        layer_of(model).base_layer = made
    fuse_peft_(model)
    x = torch.randn(3, K)
    with torch.no_grad():
        for factor in (1, 2, 3):
            base = layer_of(model).base_layer
            (base.scales if few_bit else base.weight).data.mul_(factor)
            if few_bit:
                layer_of(plain).base_layer.weight.data = base.weight.dequantize()
            else:
                layer_of(plain).base_layer.weight.data.mul_(factor)
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    layer_of(model).clear_norms()


def test_an_accelerate_hook_and_offloading() -> None:
    accelerate = pytest.importorskip("accelerate")  # which peft needs
    model = wrapped()
    fuse_peft_(model)
    x = torch.randn(2, K)
    want = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert layer_of(model).base_layer.weight.is_meta
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_casts_of_the_input_can_be_turned_off() -> None:
    model = wrapped()
    fuse_peft_(model)
    layer_of(model).lora_A["default"].bfloat16()
    x = torch.randn(2, K)
    assert model(x).dtype == torch.float32  # cast, as PEFT does
    with peft.helpers.disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(x)


def test_compiled_in_one_graph() -> None:
    model = wrapped()
    fuse_peft_(model)
    x = torch.randn(2, K)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("few_bit", [False, True])
@pytest.mark.parametrize("case", ["", "A: forward hook", "base: forward hook"])
def test_replicas_of_data_parallel(case: str, few_bit: bool) -> None:
    """Their parameters are plain attributes: PEFT's forward runs them."""
    model = wrapped(few_bit=few_bit)
    fuse_peft_(model)
    if case:
        CASES[case](layer_of(model))
    x = torch.randn(3, K)
    want = model(x)
    for replica in replicas(model):
        torch.testing.assert_close(replica(x), want, rtol=1e-4, atol=1e-5)

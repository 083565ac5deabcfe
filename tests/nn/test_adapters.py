"""Adapters over models and layers: what several calls, a cast and an error half-way leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitfuse.models.lora import adapted_layers, add_ia3_, add_lora_, lora_parameters, set_adapter_
from bitfuse.nn import IA3Linear, Linear, LoRALinear
from test_lora_layers import K, Model, N, Q, R, V


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("ia3", "ia3"), ("lora", "ia3"), ("ia3", "lora")])
def test_an_adapter_in_two_calls(kinds: tuple[str, str]) -> None:
    """More layers for an adapter are as active, and learn, as those it has."""

    def grow(name: str, kind: str, where: str, r: int) -> Any:
        if kind == "ia3":
            return add_ia3_(model, where, adapter_name=name)
        return add_lora_(model, where, r, adapter_name=name)

    model: Any = Model()
    grow("one", kinds[0], "q_proj", 4)
    grow("two", kinds[0], "layers.0.q_proj", 2)
    report = grow("one", kinds[1], "v_proj", 8)
    layers = adapted_layers(model)
    assert sorted(layers) == sorted(Q + V) and {m.active_adapters for m in layers.values()} == {("one",)}
    assert report.trainable == sum(p.numel() for p in lora_parameters(model, "one") if p.requires_grad)
    assert {p.requires_grad for p in lora_parameters(model, "one")} == {True}
    assert not any(p.requires_grad for p in lora_parameters(model, "two"))
    grow("two", kinds[1], "layers.1.v_proj", 8)  # waits, as its other layer does
    assert layers[V[1]].active_adapters == ("one",)
    set_adapter_(model, ["two", "one"])
    if kinds[0] == kinds[1]:  # both stay, in the order of the model
        grow("two", kinds[1], "layers.1.q_proj", 2)
        assert layers[Q[1]].active_adapters == ("two", "one")
    assert layers[V[1]].active_adapters == ("two", "one")
    set_adapter_(model, [])
    grow("one", kinds[0], "head", 2)  # is known and off
    assert model.head.active_adapters == ()
    grow("three", kinds[0], "head", 2)  # nothing is on: the first
    assert model.head.active_adapters == ("three",)


def test_an_error_half_way_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Model()
    add_lora_(model, "layers.0.q_proj", R)
    before = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    real, calls = LoRALinear.add_adapter, []

    def third_fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError("no more")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LoRALinear, "add_adapter", third_fails)
    with pytest.raises(MemoryError):
        add_lora_(model, "all-linear", R, adapter_name="second")
    after = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    assert after.keys() == before.keys() and len(adapted_layers(model)) == 1
    assert all(after[n][0] is p and after[n][1] == flag for n, (p, flag) in before.items())
    assert model.layers[0].q_proj.active_adapters == ("default",)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("few_bit", [True, False])
@pytest.mark.parametrize(
    "adapters",
    [
        [dict()],
        [dict(dropout=0.5)],
        [dict(use_dora=True)],
        [dict(), dict()],
        [dict(dropout=0.5), dict(dropout=0.5)],
        [dict(use_dora=True), dict(dropout=0.5)],
        [dict(dropout=0.5), dict(use_dora=True), dict()],
        ["ia3"],
        ["feedforward"],
    ],
    ids=str,
)
def test_autocast_gives_the_dtype_of_linear(adapters: list[Any], few_bit: bool, bias: bool) -> None:
    base: Any = torch.nn.Linear(K, N, bias=bias)
    x = torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        want = base(x)
    base = Linear.from_float(base, "int8") if few_bit else base
    if adapters in (["ia3"], ["feedforward"]):
        layer: Any = IA3Linear(base, adapters == ["feedforward"])
    else:
        layer = LoRALinear(base, None)
        for i, options in enumerate(adapters):
            layer.add_adapter(str(i), R, **options)
        layer.set_adapter(list(layer.adapters))
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == want.dtype == torch.bfloat16
    y.sum().backward()
    layer.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        # with lora_B = 0 it is the base: the layer's own error, and no more than bfloat16's
        assert (layer(x).float() - layer.base_layer(x).float()).abs().max() <= want.abs().max() * 2**-7


def test_patterns_of_ranks_and_alphas() -> None:
    model: Any = Model()
    report = add_lora_(
        model,
        ["q_proj", "v_proj"],
        4,
        8,
        rank_pattern={"layers.1.*": 2, "v_proj": 6},
        alpha_pattern={"q_proj": 3},
    )
    found = {a.name: (a.r, model.get_submodule(a.name).adapter("default").alpha) for a in report.layers}
    assert found == {Q[0]: (4, 3), V[0]: (6, 8), Q[1]: (2, 3), V[1]: (2, 8)}
    for wrong, match in (
        (dict(rank_pattern={"head": 2}), "rank_pattern holds 'head', which names no target"),
        (dict(rank_pattern={"q_proj": 0}), "r is 0"),
        (dict(alpha_pattern={"q_proj": 1e39}), "alpha is"),
    ):
        other = Model()
        with pytest.raises(ValueError, match=match):
            add_lora_(other, "q_proj", 4, **wrong)
        assert not adapted_layers(other)

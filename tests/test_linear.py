"""bitfuse.nn.Linear behaves as a torch layer: saving, loading, moving, copying, compiling, training around
it."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.nn import Linear
from safetensors.torch import load_file, save_file
from test_weight import EVERY, LATER, name_of


def make(**options: Any) -> Linear:
    return Linear.from_float(torch.nn.Linear(128, 64), **options)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """All tensors and the output are bit for bit the same."""
    x = torch.randn(3, 128)
    states = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(k == m and torch.equal(v, w) for (k, v), (m, w) in states) and torch.equal(a(x), b(x))


ACT_ORDER = torch.randperm(128, generator=torch.Generator().manual_seed(1)) // 32
ALL = [*EVERY, *LATER, dict(format="int4", group_size=32, g_idx=ACT_ORDER)]


@pytest.mark.parametrize("options", ALL, ids=name_of)
def test_saving_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    layer = make(**options)
    empty = dict(options)
    act_order = empty.pop("g_idx", None) is not None
    for way in ("torch.save", "safetensors", "assign"):
        target = Linear(128, 64, **empty, act_order=act_order)
        if way == "safetensors":
            save_file(layer.state_dict(), tmp_path / "w.safetensors")
            state = load_file(tmp_path / "w.safetensors")
        else:
            torch.save(layer.state_dict(), tmp_path / "w.pt")
            state = torch.load(tmp_path / "w.pt", weights_only=True)
        target.load_state_dict(state, assign=way == "assign")
        assert same(layer, target), way
    assert same(layer, copy.deepcopy(layer))
    assert same(layer, pickle.loads(pickle.dumps(layer)))
    whole = io.BytesIO()
    torch.save(layer, whole)
    whole.seek(0)
    assert same(layer, torch.load(whole, weights_only=False))


def test_codes_do_not_require_gradients_and_bias_does() -> None:
    layer = make(format="nf4", nested=True)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    with pytest.raises(RuntimeError):
        layer.qweight.requires_grad_()


@pytest.mark.parametrize("options", ALL, ids=name_of)
def test_casting_moves_the_bias_and_never_the_scales(options: dict[str, Any]) -> None:
    layer = make(**options)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for cast in (
        torch.nn.Module.half,
        torch.nn.Module.bfloat16,
        torch.nn.Module.double,
        torch.nn.Module.float,
    ):
        cast(layer)
        state = layer.state_dict()
        assert all(torch.equal(state[k], before[k]) for k in state if k != "bias")
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer(torch.randn(2, 128)).dtype == torch.float32
    meta = layer.to("meta")
    assert {t.device.type for t in meta.state_dict().values() if t.numel() > 200} == {"meta"}
    assert meta.scales.dtype == before["scales"].dtype


def test_autocast() -> None:
    layer = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 128)).dtype == torch.bfloat16
        assert bitfuse.lowbit_linear(torch.randn(2, 128), layer.weight, layer.bias).dtype == torch.bfloat16


def test_compiles_without_a_break_and_trains() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 128), make(g_idx=torch.randperm(128) // 64, group_size=64), torch.nn.ReLU()
    )
    x = torch.randn(4, 32)
    expected = model(x)
    expected.square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    got = torch.compile(model, fullgraph=True)(x)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close([p.grad for p in model.parameters() if p.grad is not None], wanted)


def test_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    layer, x = make(), torch.randn(5, 128, requires_grad=True)
    (direct,) = torch.autograd.grad(layer(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(direct, again)


def test_one_input_used_twice() -> None:
    layer, x = make(), torch.randn(5, 128, requires_grad=True)
    (once,) = torch.autograd.grad(layer(x).sum(), x)
    (twice,) = torch.autograd.grad((layer(x) + layer(x)).sum(), x)
    torch.testing.assert_close(twice, 2 * once)


def broken(state: dict[str, torch.Tensor], key: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = dict(state)
    if value is None:
        del state[key]
    else:
        state[key] = value
    return state


def test_a_broken_state_is_refused_and_nothing_is_written() -> None:
    source = make(format="int4", group_size=64)
    state = source.state_dict()
    target = torch.nn.ModuleDict({"proj": Linear(128, 64, format="int4", group_size=64)})
    untouched = {k: v.clone() for k, v in target.state_dict().items()}
    nan = state["scales"].clone()
    nan[5, 1] = float("nan")
    for key, value, words in (
        ("scales", None, "proj.scales is missing"),
        ("qweight", state["qweight"][:, :32], r"proj.qweight has shape \[64, 32\], expected \[64, 64\]"),
        ("qweight", state["qweight"].float(), "proj.qweight has dtype torch.float32"),
        ("scales", nan, r"proj.scales\[5, 1\] is nan"),
        ("zeros", state["qweight"], "proj.zeros, which this layer .* has no place for"),
        ("scales", state["scales"].float(), "proj.scales has dtype torch.float32, expected the layer's"),
        (
            "_extra_state",
            torch.tensor([51], dtype=torch.uint8),
            "proj._extra_state is not the JSON of a format",
        ),
        ("_extra_state", state["qweight"], "proj._extra_state is not the JSON of a format"),
        ("_extra_state", state["_extra_state"][:-3], "proj._extra_state is not the JSON of a format"),
        (
            "_extra_state",
            make(format="int4", group_size=32).state_dict()["_extra_state"],
            "group_size 32 .layer: 64",
        ),
    ):
        bad = {"proj." + k: v for k, v in broken(state, key, value).items()}
        with pytest.raises(ValueError, match=words):
            target.load_state_dict(bad)
        assert all(torch.equal(v, untouched[k]) for k, v in target.state_dict().items())
    with pytest.raises(ValueError, match=r"of another format than the layer: name 'nf4'"):
        Linear(128, 64, format="int4", group_size=64).load_state_dict(
            Linear.from_float(torch.nn.Linear(128, 64), "nf4").state_dict()
        )
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({})


def test_scales_of_another_dtype_load_as_they_are_converted_exactly() -> None:
    """A float32-scale checkpoint does not slip into a float16 layer: its format says so."""
    with pytest.raises(ValueError, match=r"scale_dtype 'float32' .layer: 'float16'"):
        make().load_state_dict(make(scale_dtype=torch.float32).state_dict())


def test_from_float_refuses() -> None:
    with pytest.raises(TypeError, match="linear is a ReLU"):
        Linear.from_float(torch.nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiples of 8"):
        Linear(100, 64)


def test_repr_names_the_format() -> None:
    assert "format=nf4, g64, double quantised" in repr(make(format="nf4", nested=True))

"""LoRALinear, IA3Linear, BottleneckAdapter, and adapters over a whole model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitfuse
import bitfuse.nn.adapters
import pytest
import torch
from accuracy import assert_accurate
from bitfuse.models.lora import (
    adapted_layers,
    add_ia3_,
    add_lora_,
    disable_adapters,
    lora_parameters,
    merge_adapters_,
    remove_adapters_,
    set_adapter_,
    unmerge_adapters_,
)
from bitfuse.nn import (
    AdapterLinear,
    BottleneckAdapter,
    IA3Adapter,
    IA3Linear,
    Linear,
    LoRAAdapter,
    LoRALinear,
    adapters,
)
from bitfuse.nn.dora import RowNorms
from bitfuse.weights import weight as weight_module
from safetensors.torch import load_file, save_file
from test_weight import EVERY, name_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

K, N, R = 128, 64, 4
DENSE: dict[str, Any] = {}
FEW_BIT = dict(format="nf4", nested=True)
BASES = [DENSE, FEW_BIT, dict(format="int4", group_size=32)]
ACT_ORDER = torch.randperm(K, generator=torch.Generator().manual_seed(1)) // 32


def base_of(options: dict[str, Any]) -> torch.nn.Linear | Linear:
    linear = torch.nn.Linear(K, N)
    return Linear.from_float(linear, **options) if options else linear


def make(options: dict[str, Any], r: int = R, **more: Any) -> Any:
    """A layer whose adapter does something."""
    layer = LoRALinear(base_of(options), r, 2 * r, **more)
    fill(layer)
    return layer


def fill(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for a in (m for m in module.modules() if isinstance(m, LoRAAdapter)):
            a.lora_B.normal_(std=0.02)


def dense(layer: AdapterLinear, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    w = layer.base_layer.weight
    return (w.dequantize() if isinstance(w, bitfuse.LowBitWeight) else w.detach()).to(dtype)


def exact(layer: Any, x: torch.Tensor, names: list[str], dtype: torch.dtype) -> torch.Tensor:
    """The formula, at a dtype."""
    x, y = x.to(dtype), x.to(dtype) @ dense(layer, dtype).t()
    for name in names:
        a = layer.adapter(name)
        y = y + a.scaling * (x @ a.lora_A.to(dtype).t() @ a.lora_B.to(dtype).t())
        if a.lora_magnitude_vector is not None:
            delta = a.scaling * a.lora_B.to(dtype) @ a.lora_A.to(dtype)
            norm = (dense(layer, dtype) + delta).norm(dim=1).detach()
            y = y * (a.lora_magnitude_vector.to(dtype) / norm)
    return y + layer.base_layer.bias.detach().to(dtype)


def learnt(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


class Largest(TorchDispatchMode):
    """The most elements of a float tensor that any operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.elements = max(self.elements, t.numel())
        return out


# LoRALinear: what it computes


@pytest.mark.parametrize(
    "options", [DENSE, *EVERY, dict(format="int4", group_size=32, g_idx=ACT_ORDER)], ids=name_of
)
def test_forward_and_gradients_are_the_formula(options: dict[str, Any]) -> None:
    layer = make(options)
    x = torch.randn(2, 3, K, requires_grad=True)
    y = layer(x)
    assert_accurate(
        y, exact(layer, x, ["default"], torch.float64), exact(layer, x, ["default"], torch.float32)
    )
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *learnt(layer)], g)
    for dtype in (torch.float64, torch.float32):
        reference = torch.autograd.grad(exact(layer, x, ["default"], dtype), [x, *learnt(layer)], g.to(dtype))
        if dtype == torch.float64:
            precise = [t.double() for t in reference]
    for got, true, plain in zip(found, precise, reference, strict=True):
        assert_accurate(got, true, plain)


def test_only_the_adapter_learns_and_the_base_is_shared() -> None:
    linear = torch.nn.Linear(K, N)
    layer = LoRALinear(linear, R)
    assert layer.base_layer is linear and layer.weight is linear.weight and layer.bias is linear.bias
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "adapters.default.lora_A",
        "adapters.default.lora_B",
    ]
    x = torch.randn(5, K)
    assert torch.equal(layer(x), linear(x))  # B begins as zeros
    layer(x).sum().backward()
    assert linear.weight.grad is None and linear.bias.grad is None


@pytest.mark.parametrize("options", BASES, ids=name_of)
def test_several_adapters_add_up(options: dict[str, Any]) -> None:
    layer = make(options)
    layer.add_adapter("second", 2, 3, use_rslora=True)
    layer.add_adapter("third", 8, dropout=0.5, dtype=torch.bfloat16)
    fill(layer)
    x = torch.randn(5, K)
    assert layer.active_adapters == ("default",)
    assert float(layer.adapter("second").scaling) == pytest.approx(3 / 2**0.5)
    layer.eval()
    for names in (["second"], ["default", "second"], ["third", "default", "second"]):
        layer.set_adapter(names)
        y = layer(x)
        plain = exact(layer, x, names, torch.float32)
        assert_accurate(y, exact(layer, x, names, torch.float64), plain)
        assert {n.split(".")[1] for n, p in layer.named_parameters() if p.requires_grad} == set(names)
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in learnt(layer))
    layer.set_adapter("second", trainable=False)
    assert not learnt(layer)
    layer.set_adapter(())
    assert torch.equal(layer(x), layer.base_layer(x))


def test_several_adapters_with_dropout_and_dora() -> None:
    layer = make(FEW_BIT, use_dora=True)
    layer.add_adapter("second", 2, dropout=0.5)
    layer.add_adapter("third", 2, use_dora=True)
    fill(layer)
    names = ["default", "second", "third"]
    layer.set_adapter(names)
    x = torch.randn(5, K)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer(x).sum().backward()
    assert all(p.grad is not None for p in learnt(layer))
    layer.eval()
    assert_accurate(layer(x), exact(layer, x, names, torch.float64), exact(layer, x, names, torch.float32))


def test_disable_delete_and_names() -> None:
    layer = make(DENSE)
    x = torch.randn(3, K)
    y, base = layer(x), layer.base_layer(x)
    layer.disable_adapters()
    assert torch.equal(layer(x), base) and not torch.equal(base, y) and "disabled" in repr(layer)
    layer.enable_adapters()
    assert torch.equal(layer(x), y)
    for call in (
        lambda: layer.set_adapter("other"),
        lambda: layer.delete_adapter("other"),
        lambda: layer.adapter("o"),
    ):
        with pytest.raises(ValueError, match=r"no adapter 'o.*'default'"):
            call()
    with pytest.raises(ValueError, match="each name once"):
        layer.set_adapter(["default", "default"])
    layer.delete_adapter("default")
    assert layer.active_adapters == () and torch.equal(layer(x), base)
    assert list(layer.state_dict()) == ["base_layer.weight", "base_layer.bias"]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(r=0), ValueError, "r is 0, expected 1 to 512"),
        (dict(r=513), ValueError, "r is 513"),
        (dict(r=2.0), TypeError, "r is a float"),
        (dict(r=4, alpha=float("nan")), ValueError, "alpha is nan"),
        (
            dict(r=4, alpha=1e308),
            ValueError,
            r"alpha is 1e\+308, expected a finite number",
        ),
        (dict(r=4, alpha=-(10**400)), ValueError, "alpha is -1000"),
        (dict(r=4, alpha="8"), TypeError, "alpha is a str"),
        (dict(r=4, dropout=1.0), ValueError, "dropout is 1.0"),
        (dict(r=4, dtype=torch.int8), ValueError, r"dtype is torch\.int8"),
        (dict(r=4, adapter_name="a.b"), ValueError, "adapter_name is 'a.b'"),
        (dict(r=4, adapter_name="keys"), ValueError, "adapter_name is 'keys'"),
        (dict(r=4, adapter_name="default"), ValueError, "which this layer has already"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_bad_options(options: dict[str, Any], error: type[Exception], match: str) -> None:
    layer = LoRALinear(torch.nn.Linear(K, N), R)
    options = {"adapter_name": "new", **options}
    with pytest.raises(error, match=match):
        layer.add_adapter(**options)
    assert list(layer.adapters) == ["default"]


@pytest.mark.parametrize("base", [torch.nn.Conv2d(1, 1, 1), torch.nn.LazyLinear(3), "no module"])
def test_bad_bases(base: Any) -> None:
    with pytest.raises(TypeError, match=r"base is a .*expected a torch\.nn\.Linear or a bitfuse"):
        LoRALinear(base, R)


def test_a_replaced_forward_is_refused() -> None:
    linear: Any = torch.nn.Linear(K, N)
    linear.forward = lambda x: x
    with pytest.raises(TypeError, match="forward is replaced"):
        LoRALinear(linear, R)
    with pytest.raises(TypeError, match="computed by a hook"):
        LoRALinear(torch.nn.utils.weight_norm(torch.nn.Linear(K, N)), R)
    with pytest.raises(TypeError, match=r"its weight is torch\.float64, expected torch\.float32"):
        LoRALinear(torch.nn.Linear(K, N).double(), R)


# as a torch layer


@pytest.mark.parametrize("options", [DENSE, FEW_BIT], ids=name_of)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_saving_is_exact(options: dict[str, Any], dora: bool, tmp_path: Path) -> None:
    layer = make(options, use_dora=dora)
    layer.add_adapter("second", 2, use_rslora=True)
    fill(layer)
    x = torch.randn(3, K)
    y = layer(x)
    state = layer.state_dict()
    assert {k.removeprefix("adapters.default.") for k in state if k.startswith("adapters.default.")} == (
        {"lora_A", "lora_B", "_extra_state"} | ({"lora_magnitude_vector"} if dora else set())
    )
    save_file(state, tmp_path / "w.safetensors")
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    for saved, assign in (
        (load_file(tmp_path / "w.safetensors"), False),
        (torch.load(stream, weights_only=True), True),
    ):
        target = LoRALinear(base_of(options), R, 99, use_dora=dora)
        target.add_adapter("second", 2)
        target.load_state_dict(saved, assign=assign)
        assert torch.equal(target(x), y)
        assert target.adapter("default").options() == layer.adapter("default").options()
        assert target.adapter("second").options() == layer.adapter("second").options()
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)


def break_state(state: dict[str, Any], how: str) -> None:
    key = "adapters.default."
    if how == "missing":
        del state[key + "lora_B"]
    elif how == "shape":
        state[key + "lora_A"] = state[key + "lora_A"][:2]
    elif how == "dtype":
        state[key + "lora_A"] = state[key + "lora_A"].int()
    elif how == "json":
        state[key + "_extra_state"] = torch.tensor([123], dtype=torch.uint8)
    elif how == "no tensor":
        state[key + "_extra_state"] = 3
    elif how == "rank":
        state[key + "_extra_state"] = LoRALinear(base_of(DENSE), 2).state_dict()[key + "_extra_state"]
    elif how == "dora":
        state[key + "_extra_state"] = LoRALinear(base_of(DENSE), R, use_dora=True).state_dict()[
            key + "_extra_state"
        ]
    elif how == "base":
        state["base_layer.weight"] = state["base_layer.weight"][:8]


@pytest.mark.parametrize("how", ["missing", "shape", "dtype", "json", "no tensor", "rank", "dora", "base"])
def test_a_broken_state_writes_nothing(how: str) -> None:
    layer, other = make(DENSE), make(DENSE)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    state = other.state_dict()
    break_state(state, how)
    with pytest.raises(ValueError, match=r"adapters\.default|base_layer|the state is of"):
        layer.load_state_dict(state, strict=False)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_casts_keep_the_scaling() -> None:
    layer = make(FEW_BIT, r=3)  # 6 / 3 = 2 is exact: take one that is not
    layer.load_adapter_("default", torch.randn(3, K), torch.randn(N, 3), alpha=0.1)
    for cast, dtype in (
        (torch.nn.Module.half, torch.float16),
        (torch.nn.Module.bfloat16, torch.bfloat16),
        (torch.nn.Module.float, torch.float32),
    ):
        cast(layer)
        a = layer.adapter("default")
        assert a.lora_A.dtype == dtype and a.scale_by.dtype == torch.float32
        assert a.scaling == 0.1 / 3 and float(a.scale_by) == float(torch.tensor(0.1 / 3))
        assert layer(torch.randn(2, K, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("options", [DENSE, FEW_BIT], ids=name_of)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_compile_is_one_graph_and_sees_swaps(options: dict[str, Any], dora: bool) -> None:
    layer = make(options, use_dora=dora)
    x = torch.randn(3, K)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert torch.equal(compiled(x), layer(x))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    magnitude = torch.rand(N) if dora else None
    layer.load_adapter_("default", torch.randn(R, K), torch.randn(N, R), alpha=3, magnitude=magnitude)
    assert torch.equal(compiled(x), layer(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    layer.load_state_dict(make(options, use_dora=dora).state_dict())
    assert_accurate(compiled(x), exact(layer, x, ["default"], torch.float64), layer(x))


def test_swap_in_place() -> None:
    layer = make(DENSE, use_rslora=True)
    a = layer.adapter("default")
    places = [p.data_ptr() for p in (a.lora_A, a.lora_B, a.scale_by)]
    lora_A, lora_B = torch.randn(R, K).half(), torch.randn(N, R)
    layer.load_adapter_("default", lora_A, lora_B, alpha=5, dropout=0.25, use_rslora=False)
    assert [p.data_ptr() for p in (a.lora_A, a.lora_B, a.scale_by)] == places
    assert torch.equal(a.lora_A, lora_A.float()) and torch.equal(a.lora_B, lora_B)
    assert a.options() == dict(r=R, alpha=5, dropout=0.25, use_rslora=False, use_dora=False)
    assert a.scaling == float(a.scale_by) == 5 / R
    before = copy.deepcopy(a.state_dict())
    for args, more, match in (
        ((lora_A[:2], lora_B), {}, "lora_A has shape"),
        ((lora_A, lora_B.t()), {}, "lora_B has shape"),
        ((lora_A, lora_B.int()), {}, r"lora_B is torch\.int32"),
        ((lora_A, lora_B), {"magnitude": torch.ones(N)}, "magnitude is given"),
        ((lora_A, lora_B), {"alpha": float("inf")}, "alpha is inf"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            layer.load_adapter_("default", *args, **more)
        assert all(torch.equal(v, before[k]) for k, v in a.state_dict().items())


def test_dropout_in_training_only_and_checkpointed() -> None:
    layer = make(FEW_BIT, dropout=0.5)
    x = torch.randn(4, K, requires_grad=True)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    grads = []
    for run in (layer, lambda t: checkpoint(layer, t, use_reentrant=False)):
        torch.manual_seed(7)
        grads.append(torch.autograd.grad(run(x).square().sum(), [x, *learnt(layer)]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("options", [DENSE, FEW_BIT], ids=name_of)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_autocast(options: dict[str, Any], dora: bool) -> None:
    layer = make(options, use_dora=dora)
    x = torch.randn(4, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learnt(layer))
    true = exact(layer, x, ["default"], torch.float64)
    plain = exact(layer, x.bfloat16(), ["default"], torch.bfloat16)
    assert_accurate(y, true, plain)


def test_hooks_of_the_base_fire_once() -> None:
    linear = torch.nn.Linear(K, N)
    calls: list[str] = []
    handle = linear.register_forward_hook(lambda *a: calls.append("forward"))
    linear.register_forward_pre_hook(lambda *a: calls.append("pre"))
    linear.register_full_backward_hook(lambda *a: calls.append("backward"))
    layer = LoRALinear(linear, R)
    x = torch.randn(2, K, requires_grad=True)
    for prepare in (layer.enable_adapters, layer.disable_adapters, layer.merge):
        prepare()
        calls.clear()
        layer(x).sum().backward()
        assert calls == ["pre", "forward", "backward"]
    layer.unmerge()
    handle.remove()
    calls.clear()
    assert layer.unwrap() is linear
    linear(x).sum().backward()
    assert calls == ["pre", "backward"]


def test_double_use_and_subset_of_gradients() -> None:
    layer = make(FEW_BIT)
    x = torch.randn(4, K, requires_grad=True)
    layer.adapter("default").lora_A.requires_grad_(False)
    (layer(x) + layer(x * 2)).sum().backward()
    assert layer.adapter("default").lora_A.grad is None and x.grad is not None
    plain = torch.autograd.grad(layer(3 * x).sum(), x)[0]
    torch.testing.assert_close(x.grad, plain)
    layer.requires_grad_(False)
    assert not layer(x.detach()).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_explain() -> None:
    layer, x = make(FEW_BIT), torch.randn(2, K)
    assert bitfuse.explain(layer, x).op == "lora_linear"
    layer.disable_adapters()
    assert bitfuse.explain(layer, x).op == "lowbit_linear"
    assert bitfuse.explain(LoRALinear(torch.nn.Linear(K, N), None), x).chosen == "torch"


# merging


@pytest.mark.parametrize(
    "options", [DENSE, *EVERY, dict(format="int4", group_size=32, g_idx=ACT_ORDER)], ids=name_of
)
def test_merge_and_unmerge(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(options)
    layer.add_adapter("second", 2)
    fill(layer)
    names = ["default", "second"]
    x = torch.randn(5, K)
    base = {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
    held = dict(layer.base_layer.named_parameters())
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    y = layer(x)
    merged = layer.merge(names)
    w = dense(layer)
    for name in names:
        a = layer.adapter(name)
        w = w + a.scaling * a.lora_B.double() @ a.lora_A.double()
    stored = layer.weight
    stored = stored.dequantize() if isinstance(stored, bitfuse.LowBitWeight) else stored
    error = float((stored.double() - w).norm() / w.norm())
    assert merged.adapters == ("default", "second") and merged.nbytes > 0
    assert merged.relative_error == pytest.approx(error, rel=1e-3, abs=1e-6)
    if options:  # the same codes as the whole matrix gives at once
        assert isinstance(layer.base_layer, Linear) and isinstance(layer.weight, bitfuse.LowBitWeight)
        whole = bitfuse.quantize(w.float(), layer.base_layer.format, g_idx=layer.weight.g_idx)
        differ = (whole.qweight != layer.weight.qweight).float().mean()
        assert differ < 0.01  # w rounds to float32 at other places here
    else:
        assert merged.relative_error == 0
    assert_accurate(layer(x), x.double() @ stored.double().t() + layer.bias.double(), layer.merged_layer(x))
    # the state is that of the unmerged layer
    assert state.keys() == layer.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    for call, match in (
        (lambda: layer.merge(), "merge"),
        (lambda: layer.set_adapter("second"), "set adapters"),
        (lambda: layer.add_adapter("third", 2), "add an adapter"),
        (lambda: layer.delete_adapter("second"), "delete an adapter"),
        (lambda: layer.load_state_dict(state), "load a state"),
        (lambda: layer.load_adapter_("second", torch.zeros(2, K), torch.zeros(N, 2)), "swap"),
    ):
        with pytest.raises(ValueError, match=rf"are merged into the weight: unmerge\(\) before you {match}"):
            call()
    copied = copy.deepcopy(layer)
    copied.unmerge()
    assert torch.equal(copied(x), y)
    layer.disable_adapters()
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters()
    layer.unmerge()
    assert all(p is held[k] for k, p in layer.base_layer.named_parameters())
    assert all(torch.equal(v, base[k]) for k, v in layer.base_layer.state_dict().items())
    assert torch.equal(layer(x), y) and layer.merged_adapters == ()


@pytest.mark.parametrize(
    "options", [DENSE, FEW_BIT, dict(format="int4", group_size=32, symmetric=False)], ids=name_of
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merge_in_slices_is_the_same(
    options: dict[str, Any], dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(options, use_dora=dora)
    whole = layer.merge()
    weight = layer.merged_layer
    layer.unmerge()
    for module in (adapters, weight_module):
        monkeypatch.setattr(module, "CHUNK", 16 * K)
    with Largest() as seen:
        sliced = layer.merge()
    assert all(
        torch.equal(a, b) for a, b in zip(weight.parameters(), layer.merged_layer.parameters(), strict=True)
    )
    assert sliced.relative_error == pytest.approx(whole.relative_error, rel=1e-4, abs=1e-9)
    assert seen.elements <= (16 * K if options else N * K)


@pytest.mark.parametrize("options", BASES, ids=name_of)
def test_a_merge_that_is_not_finite_changes_nothing(options: dict[str, Any]) -> None:
    layer = make(options)
    with torch.no_grad():
        layer.adapter("default").lora_B[3, 1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        layer.merge()
    assert layer.merged_layer is None and layer.merged_adapters == ()


# DoRA


@pytest.mark.parametrize("options", BASES, ids=name_of)
def test_dora_is_the_formula(options: dict[str, Any]) -> None:
    layer = make(options, use_dora=True)
    a = layer.adapter("default")
    fresh = LoRALinear(layer.base_layer, R, use_dora=True)
    x = torch.randn(6, K, requires_grad=True)
    torch.testing.assert_close(fresh(x), layer.base_layer(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        a.lora_magnitude_vector.mul_(torch.rand(N) + 0.5)
    y = layer(x)
    assert_accurate(
        y, exact(layer, x, ["default"], torch.float64), exact(layer, x, ["default"], torch.float32)
    )
    wanted = [x, *learnt(layer)]
    assert len(wanted) == 4
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, wanted, g)
    true = torch.autograd.grad(exact(layer, x, ["default"], torch.float64), wanted, g.double())
    plain = torch.autograd.grad(exact(layer, x, ["default"], torch.float32), wanted, g)
    for got, t, p in zip(found, true, plain, strict=True):
        assert_accurate(got, t.double(), p)


def test_dora_norm_needs_no_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(FEW_BIT, use_dora=True)
    x = torch.randn(2, K, requires_grad=True)
    for module in (adapters, weight_module):
        monkeypatch.setattr(module, "CHUNK", 8 * K)
    layer.clear_norms()
    with Largest() as seen:
        layer(x)
        with torch.no_grad():
            layer.eval()(x)
    assert seen.elements < N * K / 2


def test_a_row_of_zeros_stays_one() -> None:
    linear = torch.nn.Linear(K, N)
    with torch.no_grad():
        linear.weight[5] = 0
    layer = LoRALinear(linear, R, use_dora=True)
    x = torch.randn(2, K)
    torch.testing.assert_close(layer(x), linear(x))


def _step(layer: LoRALinear) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(learnt(layer), lr=0.1)
        layer(torch.randn(3, K)).square().sum().backward()
        optimizer.step()


def _state(layer: LoRALinear, assign: bool) -> None:
    layer.load_state_dict(
        make(FEW_BIT if isinstance(layer.base_layer, Linear) else DENSE, use_dora=True).state_dict(),
        assign=assign,
    )


def _base(layer: LoRALinear, assign: bool) -> None:
    other = base_of(FEW_BIT if isinstance(layer.base_layer, Linear) else DENSE)
    layer.base_layer.load_state_dict(other.state_dict(), assign=assign)


def _new_base(layer: LoRALinear) -> None:
    layer.base_layer = base_of(FEW_BIT if isinstance(layer.base_layer, Linear) else DENSE).requires_grad_(
        False
    )


def _write_base(layer: LoRALinear) -> None:
    for p in layer.base_layer.parameters():
        if p.is_floating_point():
            p.data.mul_(2)
    layer.clear_norms()


def _pointer(layer: LoRALinear) -> None:
    layer.adapter("default").lora_B.data = torch.randn(N, R)


def _alpha(layer: LoRALinear) -> None:
    a = layer.adapter("default")
    layer.load_adapter_(
        "default", a.lora_A.clone(), a.lora_B.clone(), alpha=50, magnitude=a.lora_magnitude_vector
    )


def _renew(layer: LoRALinear) -> None:
    layer.delete_adapter("default")
    layer.add_adapter("default", R, use_dora=True)


CHANGES: dict[str, Callable[[LoRALinear], object]] = {
    "optimizer": _step,
    "A in place": lambda m: m.adapter("default").lora_A.copy_(torch.randn(R, K)),
    "B in place": lambda m: m.adapter("default").lora_B.mul_(3),
    "A by data": lambda m: m.adapter("default").lora_A.data.copy_(torch.randn(R, K)),
    "B by data": lambda m: m.adapter("default").lora_B.data.mul_(3),
    "B by numpy": lambda m: m.adapter("default").lora_B.detach().numpy().fill(0.3),
    "another storage": _pointer,
    "scaling": lambda m: m.adapter("default").set_scaling(9, True),
    "alpha": _alpha,
    "another parameter": lambda m: setattr(
        m.adapter("default"), "lora_B", torch.nn.Parameter(torch.randn(N, R))
    ),
    "state": lambda m: _state(m, False),
    "state assigned": lambda m: _state(m, True),
    "base state": lambda m: _base(m, False),
    "base state assigned": lambda m: _base(m, True),
    "another base": _new_base,
    "base by data, told": _write_base,
    "cast": lambda m: m.bfloat16().float(),
    "deleted and added": _renew,
}


@pytest.mark.parametrize("options", [DENSE, FEW_BIT], ids=name_of)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_kept_norms_follow_every_change(options: dict[str, Any], change: str) -> None:
    layer = make(options, use_dora=True).eval()
    x = torch.randn(3, K)
    layer(x)
    CHANGES[change](layer)
    layer(x)
    for _ in range(2):
        y = layer(x)
        plain = exact(layer, x, ["default"], torch.float32)
        assert_accurate(y, exact(layer, x, ["default"], torch.float64), plain, change)


@pytest.mark.parametrize("options", [DENSE, FEW_BIT], ids=name_of)
def test_norms_are_kept_in_place_where_nothing_changes(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make(options, use_dora=True).eval()
    x = torch.randn(3, K)
    found: list[int] = []
    fresh = RowNorms.fresh

    def counted(*args: Any) -> torch.Tensor:
        found.append(1)
        return fresh(*args)

    monkeypatch.setattr(RowNorms, "fresh", counted)
    with torch.no_grad():
        first = layer(x)
        kept = layer._norms._norms["default"].value
        assert torch.equal(layer(x), first) and len(found) == 1
        place = kept.data_ptr()
        layer.load_adapter_(
            "default", torch.randn(R, K), torch.randn(N, R), magnitude=torch.rand(N)
        )  # renewed at once, where a captured graph reads it
        layer(x)
        assert len(found) == 2 and layer._norms._norms["default"].value.data_ptr() == place
        layer.train()
        layer.eval()
        layer(x)
        assert len(found) == 3 and layer._norms._norms["default"].value.data_ptr() == place
    layer(x)  # under grad mode nothing is kept
    assert len(found) == 4
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x))
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        assert torch.equal(copied(x), layer(x))


# IA3 and the bottleneck


@pytest.mark.parametrize("options", [DENSE, FEW_BIT], ids=name_of)
@pytest.mark.parametrize("feedforward", [False, True], ids=["outputs", "inputs"])
def test_ia3(options: dict[str, Any], feedforward: bool) -> None:
    layer = IA3Linear(base_of(options), feedforward)
    x = torch.randn(4, K, requires_grad=True)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer.add_adapter("second")
    with torch.no_grad():
        for a in (m for m in layer.modules() if isinstance(m, IA3Adapter)):
            a.ia3_l.copy_(torch.rand_like(a.ia3_l) + 0.5)

    def formula(names: list[str], dtype: torch.dtype) -> torch.Tensor:
        scale: torch.Tensor = torch.ones((), dtype=dtype)
        for name in names:
            scale = scale * layer.adapter(name).ia3_l.to(dtype)
        w, b = dense(layer, dtype), layer.base_layer.bias.to(dtype)
        return (x.to(dtype) * scale) @ w.t() + b if feedforward else scale * (x.to(dtype) @ w.t() + b)

    for names in (["default"], ["second", "default"]):
        layer.set_adapter(names)
        y = layer(x)
        assert_accurate(y, formula(names, torch.float64), formula(names, torch.float32))
        g = torch.randn_like(y)
        wanted = [x, *learnt(layer)]
        found = torch.autograd.grad(y, wanted, g)
        true = torch.autograd.grad(formula(names, torch.float64), wanted, g.double())
        plain = torch.autograd.grad(formula(names, torch.float32), wanted, g)
        for got, t, p in zip(found, true, plain, strict=True):
            assert_accurate(got, t.double(), p)
    with torch.no_grad():
        y = layer(x)
        merged = layer.merge()
        assert merged.adapters == ("second", "default")
        if not options:
            torch.testing.assert_close(layer(x), y)
        layer.unmerge()
        assert torch.equal(layer(x), y)
    other = IA3Linear(base_of(options), feedforward)
    other.add_adapter("second")
    other.load_state_dict(layer.state_dict())
    other.set_adapter(["second", "default"])
    with torch.no_grad():
        assert torch.equal(other(x), y) and torch.equal(copy.deepcopy(other)(x), y)
    with pytest.raises(ValueError, match=r"ia3_l has shape|feedforward"):
        IA3Linear(base_of(options), not feedforward).load_state_dict(layer.state_dict(), strict=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_bottleneck(bias: bool) -> None:
    layer = BottleneckAdapter(K, 16, "gelu", bias)
    x = torch.randn(2, 3, K, requires_grad=True)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.1)

    def formula(dtype: torch.dtype) -> torch.Tensor:
        d, u = copy.deepcopy(layer.down).to(dtype), copy.deepcopy(layer.up).to(dtype)
        return x.to(dtype) + u(torch.nn.functional.gelu(d(x.to(dtype))))

    y = layer(x)
    assert_accurate(y, formula(torch.float64), formula(torch.float32))
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    other = BottleneckAdapter(K, 16, "gelu", bias)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    for args, match in (
        ((0, 8), "features is 0"),
        ((8, 0), "bottleneck is 0"),
        ((8, 8, "sin"), "activation is 'sin'"),
    ):
        with pytest.raises(ValueError, match=match):
            BottleneckAdapter(*args)


# a whole model


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(K, K, bias=False)
        self.v_proj = torch.nn.Linear(K, K, bias=False)
        self.norm = torch.nn.LayerNorm(K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.v_proj(torch.relu(self.q_proj(x))))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(N, K)
        self.layers = torch.nn.ModuleList(Block() for _ in range(2))
        self.head = torch.nn.Linear(K, N, bias=False)
        self.head.weight = self.embed.weight  # tied

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.arange(12).view(2, 6)
Q = ["layers.0.q_proj", "layers.1.q_proj"]
V = ["layers.0.v_proj", "layers.1.v_proj"]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("q_proj", Q),
        (["q_proj", "v_proj"], sorted(Q + V)),
        ("layers.1.q_proj", Q[1:]),
        ("1.q_proj", Q[1:]),
        ("*.q_proj", Q),
        ("layers.0.*", [Q[0], V[0]]),
        ("all-linear", sorted(Q + V)),
        (["all-linear", "head"], [*sorted(Q + V), "head"]),
    ],
    ids=str,
)
def test_targets(targets: Any, names: list[str]) -> None:
    model: Any = Model()
    before = model(IDS)
    report = add_lora_(model, targets, R, 8)
    assert sorted(a.name for a in report.layers) == sorted(names)
    assert sorted(adapted_layers(model)) == sorted(names)
    assert torch.equal(model(IDS), before)
    assert {n.rpartition(".adapters.")[0] for n, p in model.named_parameters() if p.requires_grad} == set(
        names
    )
    assert (
        report.trainable
        == sum(p.numel() for p in lora_parameters(model))
        == sum(a.parameters for a in report.layers)
    )
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert names[0] in str(report) and f"{report.trainable:,}" in str(report)


def test_training_a_quantised_model_with_two_adapters() -> None:
    model: Any = Model()
    bitfuse.quantize_(model, "int4", group_size=32, progress=False)
    report = add_lora_(model, ["q_proj", "v_proj"], R, use_dora=True)
    assert report.layers[0].base == "int4, g32"
    assert report.parameters == sum(p.numel() for p in Model().parameters()) + report.trainable
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten().flip(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    first = model(IDS)
    # a further adapter waits
    add_lora_(model, "head", 2, adapter_name="second")
    add_lora_(model, "q_proj", 2, adapter_name="third")
    assert torch.equal(model(IDS), first)
    fill(model)
    assert len(lora_parameters(model, "second")) == 2 and len(lora_parameters(model, "third")) == 4
    set_adapter_(model, "second")
    second = model(IDS)
    assert not torch.equal(second, first)
    assert all(".second." in n for n, p in model.named_parameters() if p.requires_grad)
    set_adapter_(model, ["default", "second"], trainable=False)
    assert not torch.equal(model(IDS), second) and not [p for p in model.parameters() if p.requires_grad]
    with disable_adapters(model):
        base = model(IDS)
    assert not torch.equal(base, model(IDS))
    remove_adapters_(model, "second")
    assert model.head.active_adapters == ()
    remove_adapters_(model)
    assert not adapted_layers(model) and torch.equal(model(IDS), base)
    assert type(model.layers[0].q_proj) is Linear


def test_merge_over_a_model() -> None:
    model: Any = Model()
    bitfuse.quantize_(model, "int8", progress=False)
    add_lora_(model, "all-linear", R)
    fill(model)
    before = model(IDS)
    report = merge_adapters_(model)
    assert list(report.layers) == sorted(Q + V) and 0 < report.worst_relative_error < 0.01
    assert report.nbytes > 0 and "worst" in str(report)
    merged = model(IDS)
    with pytest.raises(ValueError, match="is merged"):
        set_adapter_(model, "default")
    with pytest.raises(ValueError, match="is merged"):
        add_lora_(model, "q_proj", 2, adapter_name="second")
    unmerge_adapters_(model)
    assert torch.equal(model(IDS), before)
    # one layer that can't be merged: none is
    with torch.no_grad():
        model.layers[1].v_proj.adapter("default").lora_B[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.v_proj: .*finite"):
        merge_adapters_(model)
    assert all(layer.merged_layer is None for layer in adapted_layers(model).values())
    with torch.no_grad():
        model.layers[1].v_proj.adapter("default").lora_B[0, 0] = 0
    merge_adapters_(model, "default")
    merged = model(IDS)
    remove_adapters_(model)  # leaves the merged weights
    assert torch.equal(model(IDS), merged) and not adapted_layers(model)


def test_shared_modules_and_weights() -> None:
    model: Any = Model()
    model.layers[1].q_proj = model.layers[0].q_proj
    model.layers[1].v_proj.weight = model.layers[0].v_proj.weight
    report = add_lora_(model, ["q_proj", "v_proj"], R)
    assert [a.name for a in report.layers] == ["layers.0.q_proj", "layers.0.v_proj", "layers.1.v_proj"]
    first, second = model.layers
    assert first.q_proj is second.q_proj and first.v_proj is not second.v_proj
    assert first.v_proj.weight is second.v_proj.weight
    assert len(lora_parameters(model)) == 6
    base = second.v_proj.base_layer.weight.clone()
    fill(model)
    first.v_proj.merge()
    assert torch.equal(second.v_proj.weight, base)


class Odd(torch.nn.Linear):
    pass


def test_what_is_left_alone() -> None:
    model: Any = torch.nn.ModuleDict(
        {
            "plain": torch.nn.Linear(K, K),
            "odd": Odd(K, K),
            "skipped": torch.nn.Linear(K, K),
            "encoder": torch.nn.TransformerEncoderLayer(K, 4, 64, batch_first=True),
            "other": IA3Linear(torch.nn.Linear(K, K)),
            "wide": torch.nn.Linear(K, K).double(),
        }
    )
    replaced: Any = torch.nn.Linear(K, K)
    replaced.forward = lambda x: x
    model["replaced"] = replaced
    with pytest.warns(UserWarning, match="skip='nothing' matches no linear layer"):
        report = add_lora_(model, "all-linear", R, skip=["skipped", "nothing"])
    assert [a.name for a in report.layers] == ["plain"]
    reasons = {
        "odd": "a Odd",
        "skipped": "skip='skipped'",
        "replaced": "forward is replaced",
        "encoder.linear1": "reads its weight and passes the layer by",
        "encoder.self_attn.out_proj": "NonDynamicallyQuantizableLinear",
        "other": "it carries other adapters",
        "wide": "its weight is torch.float64",
    }
    assert all(reason in report.skipped[name] for name, reason in reasons.items())
    assert "left as it is" in str(report)
    assert model["other"].adapters["default"].ia3_l.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(targets="nothing"), ValueError, r"targets is \['nothing'\].*linear layers are layers\.0"),
        (dict(targets="embed"), ValueError, "means no layer that can be adapted"),
        (dict(targets=[3]), TypeError, "targets holds 3"),
        (dict(r=0), ValueError, "r is 0"),
        (dict(dropout=-0.1), ValueError, r"dropout is -0\.1"),
        (dict(dtype=torch.float64), ValueError, r"dtype is torch\.float64"),
        (dict(adapter_name="a.b"), ValueError, "adapter_name"),
        (dict(model=torch.nn.Linear(K, K)), TypeError, "itself a linear layer"),
        (dict(model="model"), TypeError, "model is a str"),
    ],
    ids=lambda v: str(v)[:30] if isinstance(v, dict) else "",
)
@pytest.mark.filterwarnings("ignore:.*matches no linear layer")
def test_add_lora_errors_change_nothing(change: dict[str, Any], error: type[Exception], match: str) -> None:
    model: Any = Model()
    arguments: dict[str, Any] = {"model": model, "targets": "q_proj", "r": R, **change}
    with pytest.raises(error, match=match):
        add_lora_(**arguments)
    assert not adapted_layers(model) and all(p.requires_grad for p in model.parameters())


def test_names_of_adapters_are_checked_first() -> None:
    model: Any = Model()
    with pytest.raises(ValueError, match="the model has no adapters"):
        lora_parameters(model)
    add_lora_(model, V[1], R)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"which layers\.1\.v_proj has already"):
        add_lora_(model, ["q_proj", "v_proj"], R)
    assert list(model.state_dict()) == before
    for call in (
        lambda: set_adapter_(model, "x"),
        lambda: remove_adapters_(model, "x"),
        lambda: lora_parameters(model, "x"),
    ):
        with pytest.raises(ValueError, match="no adapter 'x' in this model, expected one of: default"):
            call()


def test_a_model_round_trip(tmp_path: Path) -> None:
    model: Any = Model()
    bitfuse.quantize_(model, "nf4", progress=False)
    add_lora_(model, "all-linear", R, dropout=0.1)
    fill(model)
    model.eval()
    save_file({k: v for k, v in model.state_dict().items() if k != "head.weight"}, tmp_path / "m.safetensors")
    other: Any = Model().eval()
    bitfuse.quantize_(other, "nf4", progress=False)
    add_lora_(other, "all-linear", R)
    state = load_file(tmp_path / "m.safetensors")
    other.load_state_dict({**state, "head.weight": state["embed.weight"]})
    assert torch.equal(other(IDS), model(IDS))
    model.half()
    assert model(IDS).dtype == torch.float16


def test_ia3_over_a_model() -> None:
    model: Any = Model()
    before = model(IDS)
    report = add_ia3_(model, ["q_proj", "v_proj"], feedforward="v_proj")
    torch.testing.assert_close(model(IDS), before)
    layers = adapted_layers(model)
    assert {n: m.feedforward for n, m in layers.items()} == {n: n in V for n in Q + V}
    assert report.layers[0].r is None and report.trainable == 4 * K
    with pytest.raises(ValueError, match="feedforward='head' names none of the targets"):
        add_ia3_(Model(), "q_proj", feedforward="head")
    with pytest.raises(ValueError, match="has feedforward True, and False is asked for"):
        add_ia3_(model, "v_proj", adapter_name="second")


def test_quantising_under_adapters() -> None:
    model: Any = Model()
    add_lora_(model, "all-linear", R, use_dora=True)
    fill(model)
    model.eval()
    with torch.no_grad():
        model(IDS)
        bitfuse.quantize_(model, "int8", progress=False)
        y = model(IDS)
    layer = model.layers[0].q_proj
    assert isinstance(layer, LoRALinear) and type(layer.base_layer) is Linear
    for m in model.modules():
        if isinstance(m, LoRALinear):
            m.clear_norms()
    with torch.no_grad():
        assert torch.equal(model(IDS), y)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model: Any = Model()
        bitfuse_layer = Linear(K, N, format="nf4")
    add_lora_(model, "all-linear", R, use_dora=True)
    layer = LoRALinear(bitfuse_layer, R, use_dora=True)
    assert {p.device.type for p in [*model.parameters(), *layer.parameters()]} == {"meta"}
    layer.to_empty(device="cpu")
    assert float(layer.adapter("default").scale_by) == 1
    layer.load_state_dict(make(dict(format="nf4"), use_dora=True).state_dict())
    assert torch.isfinite(layer(torch.randn(2, K))).all()


def test_removing_frees_the_wrapped_layers() -> None:
    model: Any = Model()
    add_lora_(model, "all-linear", R)
    remove_adapters_(model)
    gc.collect()
    assert not any(isinstance(m, AdapterLinear) for m in model.modules())

"""bitfuse.nn.Linear behaves as a torch layer: saving, loading, moving, copying, compiling, training around
it."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.nn import IA3Linear, Linear, LoRALinear
from bitfuse.weights.formats import FIXED_SCALE_DTYPES
from safetensors.torch import load_file, load_model, save_file, save_model
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


@pytest.mark.parametrize("options", [*EVERY, *LATER], ids=name_of)
def test_states_of_whole_models_and_of_version_0_1(options: dict[str, Any], tmp_path: Path) -> None:
    """safetensors' save_model wants each tensor to have its own memory; 0.1 held scales of eight bits as
    floats."""
    layer = Linear.from_float(torch.nn.Linear(256, 24), **options)
    assert all(t.dtype not in FIXED_SCALE_DTYPES for t in layer.state_dict().values())
    save_model(layer, str(tmp_path / "m.safetensors"))
    target = Linear(256, 24, **options)
    load_model(target, str(tmp_path / "m.safetensors"))
    old = layer.state_dict()
    if layer.format.scale_dtype in FIXED_SCALE_DTYPES:
        old["scales"] = old["scales"].view(layer.format.scale_dtype)
    x = torch.randn(3, 256)
    assert torch.equal(target(x), layer(x))
    for assign in (False, True):
        target = Linear(256, 24, **options)
        target.load_state_dict(old, assign=assign)
        assert torch.equal(target(x), layer(x)) and target.scales.dtype == layer.scales.dtype


@pytest.mark.parametrize("options", ALL, ids=name_of)
def test_weight_says_what_the_layer_was_cast_to(options: dict[str, Any]) -> None:
    layer = make(**options)
    before = layer.weight.dequantize()
    assert isinstance(layer, torch.nn.Linear) and layer.weight.dtype == torch.float32
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert layer.to(dtype).weight.dtype == dtype
        assert copy.deepcopy(layer).weight.dtype == dtype
        assert torch.equal(layer.weight.dequantize(), before)
    assert Linear.from_float(torch.nn.Linear(128, 64).half(), **options).weight.dtype == torch.float16
    assert Linear(128, 64, dtype=torch.bfloat16, format=options["format"]).weight.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="reset_parameters would write"):
        layer.reset_parameters()


def test_nested_tensors_and_tensors_of_other_classes() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    rows = [torch.randn(n, 128) for n in (2, 5)]
    for layer in (make(), LoRALinear(make(), 4), IA3Linear(make())):
        nested: Any = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
        out = layer(nested)
        for got, x in zip(out.unbind(), rows, strict=True):
            torch.testing.assert_close(got, layer(x))
        out.values().sum().backward()
        assert nested.grad is not None
        if not isinstance(layer, IA3Linear):  # makes tensors of its own beside x
            two = layer(TwoTensor(rows[0], rows[0] + 1))
            torch.testing.assert_close((two.a, two.b), (layer(rows[0]), layer(rows[0] + 1)))


@pytest.mark.parametrize("options", ALL, ids=name_of)
def test_a_loop_that_widens_parameters_leaves_states_alone(options: dict[str, Any]) -> None:
    """As PEFT's prepare_model_for_kbit_training does."""
    layer = make(**options)
    widened, x = copy.deepcopy(layer), torch.randn(3, 128)
    for p in widened.parameters():
        if p.dtype in (torch.float16, torch.bfloat16):
            p.data = p.data.float()
    assert torch.equal(widened(x), layer(x))
    state = widened.state_dict()
    assert all(torch.equal(state[k], t) and state[k].dtype == t.dtype for k, t in layer.state_dict().items())
    for target in (layer, widened):
        target.load_state_dict(state)
        assert torch.equal(target(x), layer(x))


def test_the_input_has_torchs_name() -> None:
    x = torch.randn(3, 128)
    for layer in (make(), LoRALinear(make(), 4), IA3Linear(make())):
        assert torch.equal(layer(input=x), layer(x))


def replicas(layer: torch.nn.Module) -> list[Any]:
    """`nn.DataParallel`'s, with clones for the copies on other devices."""
    module = sys.modules["torch.nn.parallel.replicate"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_get_device_index", lambda device, *args: 0)
        clones = lambda ts, ids, detach=False: [[t.clone() for t in ts] for _ in ids]  # noqa: E731
        patch.setattr(module, "_broadcast_coalesced_reshape", clones)
        return module.replicate(layer, [0, 1])


@pytest.mark.parametrize("options", [*ALL, None], ids=lambda o: name_of(o) if o else "dense")
def test_replicas_of_data_parallel(options: dict[str, Any] | None) -> None:
    def base() -> Any:
        return torch.nn.Linear(128, 64) if options is None else make(**options)

    x = torch.randn(3, 128)
    layers: list[Any] = [LoRALinear(torch.nn.Linear(128, 64, bias=False), 4)]
    layers += [LoRALinear(base(), 4), LoRALinear(base(), 4, use_dora=True), IA3Linear(base())]
    for layer in layers if options is None else [*layers, base()]:
        for mode in (True, False):
            layer.train(mode)
            with torch.set_grad_enabled(mode):
                expected = layer(x)
                assert all(torch.equal(replica(x), expected) for replica in replicas(layer))
                if options is not None and isinstance(layer, Linear):
                    again = replicas(layer)[1].weight
                    assert torch.equal(again.dequantize(), layer.weight.dequantize())


def test_every_layer_has_replicas() -> None:
    """A new layer of bitfuse.nn belongs in this list."""
    layers: dict[str, Any] = {
        "Linear": make(),
        "Embedding": bitfuse.nn.Embedding.from_float(torch.nn.Embedding(64, 128)),
        "LoRALinear": LoRALinear(make(), 4),
        "IA3Linear": IA3Linear(make(), feedforward=True),
        "BottleneckAdapter": bitfuse.nn.BottleneckAdapter(128, 8),
        "MultiheadAttention": bitfuse.nn.MultiheadAttention(128, 4),
    }
    parts = {"AdapterLinear", "IA3Adapter", "LoRAAdapter", "Merged"}  # none of these is called
    assert layers.keys() | parts == set(bitfuse.nn.__all__)
    x = torch.randn(5, 2, 128)
    for name, layer in layers.items():
        args = (x, x, x) if name == "MultiheadAttention" else (x,)
        args = (torch.randint(64, (5, 2)),) if name == "Embedding" else args
        first, *_ = expected if isinstance(expected := layer(*args), tuple) else (expected,)
        for replica in replicas(layer):
            got = replica(*args)
            assert torch.equal(got[0] if isinstance(got, tuple) else got, first), name


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    """A mesh of this process alone."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_shards_are_never_cast(one_process: Any) -> None:
    """FSDP2's mixed precision casts float parameters when it gathers them; gloo has no eight-bit floats."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    x = torch.randn(4, 128).bfloat16()
    for options in ALL:
        layer = make(**options)
        torch.nn.parallel.DistributedDataParallel(layer)
        model = torch.nn.Sequential(copy.deepcopy(layer))
        expected = copy.deepcopy(layer).bfloat16()(x)
        fully_shard(model, mesh=one_process, mp_policy=policy)
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        for key, t in layer.state_dict().items():
            found = full[f"0.{key}"]
            assert type(found) is torch.Tensor and torch.equal(found, t), key
        for change in (
            lambda m: None,
            lambda m: m.load_state_dict(m.state_dict()),
            lambda m: m.load_state_dict(m.state_dict(), assign=True),
            lambda m: m.to("cpu"),
        ):
            change(model)
            assert torch.equal(model(x), expected), (options, "scales were rounded")


def test_shards_under_adapters(one_process: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(4, 128)
    for options in (dict(format="nf4", nested=True), dict(format="mxfp4"), ALL[-1]):
        layer = LoRALinear(make(**options), 4, use_dora=True)
        model = torch.nn.Sequential(copy.deepcopy(layer))
        fully_shard(model, mesh=one_process)
        for mode in (True, False):
            layer.train(mode)
            model.train(mode)
            with torch.set_grad_enabled(mode):
                assert torch.equal(model(x), layer(x)), options


@pytest.mark.parametrize("options", ALL, ids=name_of)
def test_averages_of_models(options: dict[str, Any]) -> None:
    """At a decay that keeps integers (torch rounds them down)."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = make(**options)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    for _ in range(3):
        average.update_parameters(model)
    assert same(model, average.module)


def test_what_autocast_leaves_to_torch() -> None:
    """As torch.nn.functional.linear: integers are no input, float64 is not cast."""
    layer = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in (torch.ones(2, 128, dtype=torch.int64), torch.ones(2, 128, dtype=torch.float64)):
            with pytest.raises(TypeError, match=f"x has dtype {x.dtype}"):
                layer(x)


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


def test_a_head_of_three_labels() -> None:
    """Made, saved, loaded, trained, merged as any other layer."""
    options: dict[str, Any] = dict(format="nf4", group_size=8)
    model = torch.nn.Sequential(torch.nn.Linear(64, 72), torch.nn.Tanh(), torch.nn.Linear(72, 3))
    bitfuse.quantize_(model, **options, progress=False)
    again = torch.nn.Sequential(Linear(64, 72, **options), torch.nn.Tanh(), Linear(72, 3, **options))
    again.load_state_dict(model.state_dict())
    x = torch.randn(5, 64, requires_grad=True)
    assert torch.equal(again(x), model(x))
    bitfuse.add_lora_(model, "all-linear", r=4)
    learnt = [x, *bitfuse.lora_parameters(model)]
    got = torch.autograd.grad(model(x).square().sum(), learnt)
    with bitfuse.use_backend("reference"):
        plain = torch.autograd.grad(model(x).square().sum(), learnt)
    torch.testing.assert_close(got, plain)
    bitfuse.merge_adapters_(model)
    torch.testing.assert_close(model(x), again(x))  # lora_B is still 0


def test_from_float_refuses() -> None:
    with pytest.raises(TypeError, match="linear is a ReLU"):
        Linear.from_float(torch.nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in_features a multiple of 8"):
        Linear(100, 64)


def test_repr_names_the_format() -> None:
    assert "format=nf4, g64, double quantised" in repr(make(format="nf4", nested=True))


# storage that is swapped under a weight which was called before


def _by_data(layer: bitfuse.nn.Linear, other: bitfuse.nn.Linear) -> None:
    for name, p in layer.named_parameters():
        p.data = other.get_parameter(name).data.clone()


def _by_swap_tensors(layer: bitfuse.nn.Linear, other: bitfuse.nn.Linear) -> None:
    for name, p in layer.named_parameters():
        theirs = torch.nn.Parameter(other.get_parameter(name).detach().clone(), requires_grad=p.requires_grad)
        torch.utils.swap_tensors(p, theirs)


def _by_set(layer: bitfuse.nn.Linear, other: bitfuse.nn.Linear) -> None:
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.set_(other.get_parameter(name).detach().clone())  # type: ignore[call-overload]


def _by_resized_storage(layer: bitfuse.nn.Linear, other: bitfuse.nn.Linear) -> None:
    """What FSDP does to the parameters that it gathers: their storage is freed, and allocated again."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            storage = p.untyped_storage()
            size = storage.nbytes()
            storage.resize_(0)
            if name == "qweight":
                with pytest.raises(ValueError, match="qweight is null"):
                    layer(torch.randn(3, 64))
            storage.resize_(size)
            p.copy_(other.get_parameter(name))


def _by_loading(layer: bitfuse.nn.Linear, other: bitfuse.nn.Linear, assign: bool = False) -> None:
    layer.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=assign)


def _by_new_parameters(layer: bitfuse.nn.Linear, other: bitfuse.nn.Linear) -> None:
    for name, p in list(layer.named_parameters()):
        setattr(layer, name, torch.nn.Parameter(other.get_parameter(name).detach(), p.requires_grad))


@pytest.mark.parametrize(
    "swap",
    [
        _by_data,
        _by_swap_tensors,
        _by_set,
        _by_resized_storage,
        _by_loading,
        functools.partial(_by_loading, assign=True),
        _by_new_parameters,
    ],
    ids=["data", "swap_tensors", "set_", "storage", "load_state_dict", "assign", "Parameter"],
)
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"format": "nf4", "nested": True}], ids=str)
def test_storage_swapped_under_a_weight(
    swap: Callable[[bitfuse.nn.Linear, bitfuse.nn.Linear], None], options: dict[str, Any]
) -> None:
    layer, other = (bitfuse.nn.Linear.from_float(torch.nn.Linear(64, 32), **options) for _ in range(2))
    x = torch.randn(3, 64)
    w = layer.weight  # of the tensors that are swapped
    with torch.no_grad():
        first, expected = layer(x), other(x)
        assert torch.equal(bitfuse.lowbit_linear(x, w, layer.bias), first)
        assert not torch.equal(first, expected)
        swap(layer, other)
        assert torch.equal(layer(x), expected)
        if swap not in (_by_new_parameters, _by_swap_tensors) and getattr(swap, "keywords", {}) == {}:
            assert torch.equal(bitfuse.lowbit_linear(x, w, layer.bias), expected)


def test_a_weight_of_another_shape_under_a_layer() -> None:
    layer, wider = (bitfuse.nn.Linear.from_float(torch.nn.Linear(64, n)) for n in (32, 48))
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert layer(x).shape == (3, 32)
        for name, p in layer.named_parameters():
            p.data = wider.get_parameter(name).data
        assert torch.equal(layer(x), wider(x))
        scales = layer.get_parameter("scales")
        scales.data = scales.data[:47]  # and one that does not fit the others
        with pytest.raises(ValueError, match=r"scales has shape \[47, 1\]"):
            layer(x)


def test_a_weight_moved_in_place() -> None:
    layer = bitfuse.nn.Linear.from_float(torch.nn.Linear(64, 32))
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(layer.double().float()(x), expected)
        assert layer.to("meta")(x.to("meta")).is_meta

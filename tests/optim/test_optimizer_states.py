"""AdamW8bit takes in the states of other AdamWs, gives none that they misread, and shards its own."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitfuse.optim import AdamW8bit
from bitfuse.weights.blockwise import dequantize_blocks, quantize_blocks
from torch.testing._internal.two_tensor import TwoTensor

SIZES = ((64, 96), (96,))  # 8 bits, float32


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]


def advance(optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator) * 0.1
        optimizer.step()


def trained(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> tuple[list[Any], Any]:
    own = parameters()
    optimizer = kind(own, lr=1e-3, **options)
    advance(optimizer)
    return own, optimizer


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def look(optimizer: torch.optim.Optimizer) -> Any:
    """All that an optimiser holds, to be compared."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return groups, [dict(optimizer.state[p]) for g in optimizer.param_groups for p in g["params"]]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam])
def test_torch_refuses_codes_at_once(kind: Any) -> None:
    _, ours = trained(AdamW8bit)
    theirs = kind(parameters(), lr=1e-3)
    with pytest.raises(KeyError, match="step"):
        theirs.load_state_dict(through_a_file(ours.state_dict()))


def test_torch_takes_float_moments_and_goes_on() -> None:
    own, ours = trained(AdamW8bit, min_8bit_size=10**9)
    theirs_own = [torch.nn.Parameter(p.detach().clone()) for p in own]
    theirs = torch.optim.AdamW(theirs_own, lr=1e-3, fused=True)
    saved = through_a_file(ours.state_dict())
    for group in saved["param_groups"]:
        group["fused"] = True
    theirs.load_state_dict(saved)
    for one in (ours, theirs):
        advance(one, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(own, theirs_own, strict=True))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_torchs_moments_become_codes(kind: Any) -> None:
    _, theirs = trained(kind)
    own = parameters()
    ours = AdamW8bit(own, block_size=128, min_8bit_size=1000)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    first, second = theirs.state_dict()["state"].values()
    large, small = (ours.state[p] for p in own)
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        codes, absmax = quantize_blocks(first[name], signed, 128)
        assert torch.equal(large[f"{name}_8bit"], codes) and torch.equal(large[f"{name}_absmax"], absmax)
        assert torch.equal(small[name], second[name])
    assert float(large["step_8bit"]) == float(small["step"]) == 3
    group = ours.param_groups[0]
    assert group["lr"] == 1e-3 and group["block_size"] == 128 and group["min_8bit_size"] == 1000
    advance(ours)


@pytest.mark.parametrize("hidden", [True, False])
def test_bitsandbytes_codes_stay(hidden: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    _, theirs = trained(bnb.optim.AdamW8bit)
    saved = theirs.state_dict()
    if not hidden:  # as before it hid them from FSDP
        saved["state"] = {
            i: {"step": s["step"], **s["__bnb_optimizer_quant_state__"]} for i, s in saved["state"].items()
        }
    own = parameters()
    ours = AdamW8bit(own)
    ours.load_state_dict(through_a_file(saved))
    first, second = (s.get("__bnb_optimizer_quant_state__", s) for s in saved["state"].values())
    large, small = (ours.state[p] for p in own)
    for name, which in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        assert torch.equal(large[f"{name}_8bit"], first[f"state{which}"])
        assert torch.equal(large[f"{name}_absmax"], first[f"absmax{which}"])
        assert torch.equal(small[name], second[f"state{which}"])
    assert float(large["step_8bit"]) == 3 and ours.param_groups[0]["betas"] == (0.9, 0.999)
    advance(ours)
    # in blocks of another size they are rounded anew
    ours = AdamW8bit(own, block_size=64)
    ours.load_state_dict(saved)
    state = ours.state[own[0]]
    found = dequantize_blocks(state["exp_avg_8bit"], state["exp_avg_absmax"], True, 64)
    held = first["qmap1"][first["state1"].int()] * first["absmax1"].repeat_interleave(256).view(SIZES[0])
    codes, absmax = quantize_blocks(held, True, 64)
    assert torch.equal(found, dequantize_blocks(codes, absmax, True, 64))


def old(state: Any) -> Any:
    """A state_dict of version 0.1: other names, fewer options."""
    back = {"step_8bit": "step", "exp_avg_8bit": "exp_avg", "exp_avg_sq_8bit": "exp_avg_sq"}
    later = ("amsgrad", "foreach", "capturable", "differentiable", "fused")
    states = {i: {back.get(k, k): v for k, v in s.items()} for i, s in state["state"].items()}
    groups = [{k: v for k, v in g.items() if k not in later} for g in state["param_groups"]]
    return {"state": states, "param_groups": groups}


def test_version_0_1_loads_as_it_is() -> None:
    own, ours = trained(AdamW8bit)
    saved = through_a_file(old(ours.state_dict()))
    again_own = [torch.nn.Parameter(p.detach().clone()) for p in own]
    again = AdamW8bit(again_own)
    again.load_state_dict(saved)
    assert look(again)[1] and same(look(again)[1], look(ours)[1])
    assert set(look(again)[0][0]) == set(look(ours)[0][0])
    for one in (ours, again):
        advance(one, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(own, again_own, strict=True))
    # and pickled whole
    ours.defaults = {k: v for k, v in ours.defaults.items() if k in old(ours.state_dict())["param_groups"][0]}
    for p in own:
        ours.state[p] = old({"state": {0: ours.state[p]}, "param_groups": []})["state"][0]
    unpickled = pickle.loads(pickle.dumps(ours))
    advance(unpickled)
    assert unpickled.param_groups[0]["amsgrad"] is False and unpickled.defaults["fused"] is None


def _sgd() -> Any:
    return trained(torch.optim.SGD, momentum=0.9)[1].state_dict()


def _broken(**changes: Any) -> Any:
    state = copy.deepcopy(trained(torch.optim.AdamW)[1].state_dict())
    state["state"][1].update(changes)
    return state


def _ours(change: Callable[[Any], Any]) -> Any:
    state = copy.deepcopy(trained(AdamW8bit)[1].state_dict())
    change(state)
    return state


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "SGD": (_sgd, r"parameter 0: holds \['momentum_buffer'\], without step: it is not of an AdamW"),
    "Adagrad": (lambda: trained(torch.optim.Adagrad)[1].state_dict(), "without exp_avg"),
    "Adamax": (lambda: trained(torch.optim.Adamax)[1].state_dict(), "without exp_avg_sq"),
    "amsgrad": (lambda: trained(torch.optim.AdamW, amsgrad=True)[1].state_dict(), "amsgrad"),
    "max": (lambda: _broken(max_exp_avg_sq=torch.ones(96)), "parameter 1: holds max_exp_avg_sq"),
    "capturable": (
        lambda: (
            trained(torch.optim.AdamW, capturable=False)[1].state_dict()
            | {"param_groups": [{"capturable": True, "params": [0, 1]}]}
        ),
        "capturable is True",
    ),
    "shape": (lambda: _broken(exp_avg=torch.ones(95)), r"exp_avg has shape \[95\], expected a tensor \[96\]"),
    "negative": (lambda: _broken(exp_avg_sq=-torch.ones(96)), "exp_avg_sq holds a negative number"),
    "step": (lambda: _broken(step=torch.ones(2)), "step is tensor"),
    "no step": (lambda: _broken(step=None), "step is None"),
    "integers": (lambda: _broken(exp_avg=torch.ones(96, dtype=torch.uint8)), "exp_avg has dtype torch.uint8"),
    "no dict": (lambda: _ours(lambda s: s["state"].update({1: 3})), "a int, expected a dict"),
    "blocks": (
        lambda: _ours(lambda s: s["param_groups"][0].update(block_size=64)),
        r"exp_avg_absmax has shape \[24\], expected a tensor \[96\]",
    ),
    "half of it": (lambda: _ours(lambda s: s["state"][0].pop("exp_avg_sq_8bit")), "exp_avg_sq_8bit is a Non"),
    "cast codes": (
        lambda: _ours(lambda s: s["state"][0].update(exp_avg_8bit=torch.ones(SIZES[0]))),
        "exp_avg_8bit has dtype torch.float32",
    ),
    "options": (lambda: _ours(lambda s: s["param_groups"][0].update(block_size=100)), "block_size is 100"),
    "groups": (
        lambda: _ours(lambda s: s["param_groups"].append({"params": []})),
        "different number",
    ),
    "group": (lambda: _ours(lambda s: s["param_groups"][0].update(params=[0])), "doesn't match the size"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_refused_state_changes_nothing(how: str) -> None:
    make, match = REFUSED[how]
    _, optimizer = trained(AdamW8bit)
    before = copy.deepcopy(look(optimizer))
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(make())
    assert same(look(optimizer), before)
    advance(optimizer)


def test_keywords_of_adamw() -> None:
    options: dict[str, Any] = dict(foreach=None, fused=True, capturable=False, differentiable=False)
    AdamW8bit(parameters(), 1e-3, (0.9, 0.99), 1e-8, 0.1, False, maximize=True, **options)
    for name in ("amsgrad", "capturable", "differentiable"):
        wrong: dict[str, Any] = {name: True}
        with pytest.raises(ValueError, match=f"{name} is True, expected False"):
            AdamW8bit(parameters(), **wrong)
        with pytest.raises(ValueError, match=f"{name} is True, expected False"):
            AdamW8bit([{"params": parameters(), **wrong}])


def test_tensors_without_memory_are_refused() -> None:
    two = torch.nn.Parameter(TwoTensor(torch.ones(4), torch.ones(4)))
    with pytest.raises(TypeError, match="params holds a TwoTensor, expected plain tensors or DTensors"):
        AdamW8bit([two])


SHARDED = """
import sys
import torch
import torch.distributed as dist
from bitfuse.weights.blockwise import dequantize_blocks
from bitfuse.optim import AdamW8bit
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
mesh = init_device_mesh("cpu", (2,))


def make():
    torch.manual_seed(0)
    # whole blocks a rank; shards of odd sizes; float32 by its size; a rank without rows
    return torch.nn.ParameterDict({
        "blocks": torch.nn.Parameter(torch.randn(64, 128)), "odd": torch.nn.Parameter(torch.randn(67, 100)),
        "small": torch.nn.Parameter(torch.randn(10, 3)), "row": torch.nn.Parameter(torch.randn(1, 5000)),
    })


def advance(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for p in model.values():
            grad = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                from torch.distributed.tensor import distribute_tensor
                grad = distribute_tensor(grad, p.device_mesh, p.placements)
            p.grad = grad
        optimizer.step()


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


plain, model = make(), make()
fully_shard(model, mesh=mesh)
assert all(isinstance(p, DTensor) for p in model.values())
ones = [AdamW8bit(m.parameters(), lr=1e-2, min_8bit_size=4096) for m in (plain, model)]
for m, optimizer in zip((plain, model), ones):
    advance(m, optimizer, 1)
assert "exp_avg_8bit" in ones[1].state[model["blocks"]] and "exp_avg" in ones[1].state[model["odd"]]
for name in ("blocks", "small"):
    assert torch.equal(full(model[name]), plain[name]), name
# those whose blocks are not the shards' keep float32 moments: torch's AdamW
exact = make()
advance(exact, torch.optim.AdamW(exact.parameters(), lr=1e-2, fused=True), 1)
for name in ("odd", "row"):
    torch.testing.assert_close(full(model[name]), exact[name], rtol=1e-6, atol=1e-7)

# a state of shards, and one of a single process, restored
for state in (ones[1].state_dict(), ones[0].state_dict()):
    again = make()
    fully_shard(again, mesh=mesh)
    for name, p in model.items():
        again[name].to_local().detach().copy_(p.to_local().detach())
    other = AdamW8bit(again.parameters(), lr=1e-2)
    other.load_state_dict(state)
    for name in ("odd", "row"):  # the codes of a single process become floats
        codes = ones[0].state[plain[name]]
        want = dequantize_blocks(codes["exp_avg_8bit"], codes["exp_avg_absmax"], True, 256)
        if "step" in state["state"][1]:
            want = full(ones[1].state[model[name]]["exp_avg"])
        assert torch.equal(full(other.state[again[name]]["exp_avg"]), want), name
    follow = make()
    fully_shard(follow, mesh=mesh)
    for name, p in model.items():
        follow[name].to_local().detach().copy_(p.to_local().detach())
    mine = AdamW8bit(follow.parameters(), lr=1e-2)
    mine.load_state_dict(ones[1].state_dict())
    advance(follow, mine, 2)
    advance(again, other, 2)
    for name in ("blocks", "small"):
        assert torch.equal(full(again[name]), full(follow[name])), name

# by torch's own way, gathered and flattened
for options in (dict(full_state_dict=True), dict(flatten_optimizer_state_dict=True)):
    options = dcp.StateDictOptions(**options)
    state = dcp.get_optimizer_state_dict(model, ones[1], options=options)
    again = make()
    fully_shard(again, mesh=mesh)
    other = AdamW8bit(again.parameters(), lr=1e-2)
    dcp.set_optimizer_state_dict(again, other, state, options=options)
    for name in model:
        own, found = ones[1].state[model[name]], other.state[again[name]]
        assert own.keys() == found.keys(), name
        assert all(torch.equal(full(own[k]), full(found[k])) for k in own), name
dist.barrier()
dist.destroy_process_group()
"""


def test_sharded_over_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARDED]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-4000:]

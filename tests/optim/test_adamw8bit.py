"""adamw8bit and AdamW8bit: the codes, the update on every backend, and torch.optim.AdamW to its user."""

from __future__ import annotations

import copy
import io
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.ops.optim.adamw8bit import adamw8bit, op
from bitfuse.optim import AdamW8bit
from bitfuse.weights.blockwise import (
    TINY,
    ZERO,
    blocks_of,
    dequantize_blocks,
    dynamic_map,
    quantize_blocks,
    segments,
)
from descriptors import described

TARGETS = pytest.mark.parametrize("target", targets("reference", "cpp", "triton"), ids=str)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


# the maps


@SIGNS
def test_maps_are_those_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(
        dynamic_map(signed), functional.create_dynamic_map(signed=signed), rtol=2e-7, atol=0
    )


@SIGNS
def test_segments_are_the_map(signed: bool) -> None:
    values = dynamic_map(signed)[ZERO[signed] :]
    assert bool((values.diff() > 0).all()) and values[0] == 0 and values[-1] == 1
    for s in segments(signed):
        codes = torch.arange(s.first, s.last + 1)
        torch.testing.assert_close(
            values[codes], (s.base + (codes - s.first) * s.step).float(), rtol=2e-7, atol=0
        )
    assert [s.last + 1 for s in segments(signed)][:-1] == [s.first for s in segments(signed)][1:]


@SIGNS
def test_codes_are_the_nearest(signed: bool) -> None:
    x = torch.randn(1000) * torch.rand(1000) ** 8
    x = x if signed else x.abs()
    codes, absmax = quantize_blocks(x, signed, 64)
    assert codes.dtype == torch.uint8 and absmax.shape == (16,)
    ratio = x / absmax.repeat_interleave(64)[:1000]
    distance = (ratio.unsqueeze(1) - dynamic_map(signed)).abs()
    chosen = distance.gather(1, codes.long().unsqueeze(1)).squeeze(1)
    nearest = distance.amin(1)
    if not signed:  # but 0 for 0 alone
        nearest = torch.where(ratio > 0, distance[:, 1:].amin(1), nearest)
    torch.testing.assert_close(chosen, nearest, rtol=1e-3, atol=1e-9)
    back = dequantize_blocks(codes, absmax, signed, 64)
    assert bool(((back == 0) == (x == 0)).all()) or signed


def test_blocks_of_zeros_and_of_nothing() -> None:
    for x in (torch.zeros(70), torch.full((70,), TINY / 2), torch.zeros(0)):
        for signed in (True, False):
            codes, absmax = quantize_blocks(x, signed, 64)
            assert bool((codes == ZERO[signed]).all()) and absmax.shape == (blocks_of(x.numel(), 64),)


# the op


def new_state(p: torch.Tensor, block_size: int) -> list[torch.Tensor]:
    blocks = blocks_of(p.numel(), block_size)
    codes = [torch.full(p.shape, ZERO[signed], dtype=torch.uint8) for signed in (True, False)]
    return [codes[0], torch.zeros(blocks), codes[1], torch.zeros(blocks)]


def some_state(p: torch.Tensor, block_size: int, spread: float = 4.0) -> list[torch.Tensor]:
    """Moments of many sizes, as a run leaves them."""
    size = torch.rand(p.shape) ** spread
    m = quantize_blocks(torch.randn(p.shape) * size, True, block_size)
    v = quantize_blocks(torch.rand(p.shape) * size.square(), False, block_size)
    return [*m, *v]


def options(step: float = 7.0, maximize: bool = False, block_size: int = 256) -> tuple[Any, ...]:
    return (1e-2, 0.9, 0.999, 1e-8, 0.1, step, maximize, block_size)


def moments(state: list[torch.Tensor], block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, m_absmax, v, v_absmax = state
    return dequantize_blocks(m, m_absmax, True, block_size), dequantize_blocks(v, v_absmax, False, block_size)


def plain(
    p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, dtype: torch.dtype, *hyper: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The formula in a dtype: p, m, v after the step."""
    lr, beta1, beta2, eps, decay, step, maximize, _ = hyper
    p, g, m, v = (t.to(dtype) for t in (p, g, m, v))
    g = -g if maximize else g
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    update = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)
    return p * (1 - lr * decay) - lr * update, m, v


CASES = [
    ((5,), torch.float32, torch.float32, 256, False),
    ((3, 700), torch.float32, torch.float32, 256, False),
    ((2049,), torch.bfloat16, torch.bfloat16, 256, False),
    ((40, 64), torch.float16, torch.float32, 64, True),
    ((4096,), torch.float32, torch.bfloat16, 4096, False),
    ((9, 512), torch.bfloat16, torch.float16, 1024, True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{list(c[0])}-{c[1]}-{c[2]}-b{c[3]}")
@TARGETS
def test_one_step(target: Target, case: tuple[Any, ...]) -> None:
    """p by the rule of accuracy; codes right but for those that the last rounding decides."""
    shape, dtype, grad_dtype, block_size, maximize = case
    hyper = options(maximize=maximize, block_size=block_size)
    p, g = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=grad_dtype)
    state = some_state(p, block_size)
    before = moments(state, block_size)
    exact = plain(p, g, *before, torch.float64, *hyper)
    placed = target.place(p, g, *(t.clone() for t in state))
    target.run(op, *placed, *hyper)
    wanted = plain(p, g, *before, torch.float32, *hyper)[0]
    assert_accurate(placed[0].cpu(), exact[0], wanted.to(dtype), "p")

    for which, signed in ((0, True), (1, False)):
        codes = placed[2 + 2 * which].cpu()
        moment = exact[1 + which].float()
        right, scales = quantize_blocks(moment, signed, block_size)
        off = (codes.int() - right.int()).abs()
        assert int(off.max()) <= 1
        if bool((off > 0).any()):
            values = dynamic_map(signed)
            ratio = (moment.flatten() / scales.repeat_interleave(block_size)[: moment.numel()]).view(shape)
            midpoint = (values[codes.int()] + values[right.int()]) / 2
            torch.testing.assert_close(ratio[off > 0], midpoint[off > 0], rtol=2e-6, atol=0)
        assert int((off > 0).sum()) <= max(1, codes.numel() // 1000)


@TARGETS
def test_scales(target: Target) -> None:
    """By the rule of accuracy, over enough blocks for an error's size to be more than luck."""
    p, g = torch.randn(12_800), torch.randn(12_800)
    state, hyper = some_state(p, 64), options(block_size=64)
    placed = target.place(p, g, *(t.clone() for t in state))
    target.run(op, *placed, *hyper)
    before = moments(state, 64)
    exact = plain(p, g, *before, torch.float64, *hyper)
    wanted = plain(p, g, *before, torch.float32, *hyper)
    for which, got in ((1, placed[3]), (2, placed[5])):
        scales = exact[which].view(-1, 64).abs().amax(1)
        assert_accurate(got.cpu(), scales, wanted[which].view(-1, 64).abs().amax(1))


@TARGETS
def test_every_code_is_read_and_written(target: Target) -> None:
    """With beta 1 - 2**-24 and no gradient the moments stay, so the codes must come back as they were."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)
    codes[0] = 1  # there is a 1 and no -1: the lowest code is no block's largest magnitude
    p = torch.zeros(512)
    state = [codes.clone(), torch.tensor([0.25, 3.0]), codes.clone(), torch.tensor([1e-9, 40.0])]
    placed = target.place(p, torch.zeros(512), *(t.clone() for t in state))
    target.run(op, *placed, 0.0, 1 - 2**-24, 1 - 2**-24, 1e-8, 0.0, 1e9, False, 256)
    for got, before in zip(placed[2:], state, strict=True):
        if got.dtype == torch.uint8:
            assert torch.equal(got.cpu(), before)
        else:
            torch.testing.assert_close(got.cpu(), before, rtol=1e-6, atol=0)


@TARGETS
def test_wide_gradients_take_no_wild_steps(target: Target) -> None:
    """A second moment rounded to 0 under a first one that is not would be a step of 10**4 times lr."""
    p, hyper = torch.zeros(1024), (1.0, 0.9, 0.999, 1e-8, 0.0)
    state = new_state(p, 256)
    placed = target.place(p, torch.zeros(1024), *state)
    size, before = torch.rand(1024) ** 6, p
    for step in range(1, 9):
        placed[1].copy_(torch.randn(1024) * size)
        target.run(op, *placed, *hyper, float(step), False, 256)
        assert float((placed[0].cpu() - before).abs().max()) < 10
        before = placed[0].cpu().clone()


@TARGETS
def test_a_nan_reaches_its_block_and_no_other(target: Target) -> None:
    p = torch.randn(600)
    g = torch.randn(600)
    g[300] = float("nan")
    placed = target.place(p, g, *some_state(p, 256))
    target.run(op, *placed, *options())
    assert placed[0].isnan().nonzero().flatten().tolist() == [300]
    assert placed[3].isnan().tolist() == placed[5].isnan().tolist() == [False, True, False]
    placed[1].nan_to_num_(0)
    target.run(op, *placed, *options(8.0))
    assert placed[0].isnan().nonzero().flatten().tolist() == list(range(256, 512))


@TARGETS
def test_nothing_to_do(target: Target) -> None:
    p = torch.zeros(0, 3)
    target.run(op, *target.place(p, p.clone(), *new_state(p, 256)), *options())


def test_threads_and_levels_agree() -> None:
    """The same bits on one thread and on two."""
    p, g = torch.randn(100_003), torch.randn(100_003)
    state = some_state(p, 256)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            mine = [p.clone(), g, *(t.clone() for t in state)]
            with bitfuse.use_backend("cpp"):
                op(*mine, *options())
        finally:
            torch.set_num_threads(before)
        results.append(mine)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bad_arguments() -> None:
    p = torch.randn(300)
    good: list[Any] = [p, torch.randn(300), *new_state(p, 256)]
    hyper: dict[str, Any] = dict(lr=1e-3, step=1)

    def refused(
        error: type[Exception], match: str, at: int | None = None, value: Any = None, **more: Any
    ) -> None:
        args = list(good)
        if at is not None:
            args[at] = value
        with pytest.raises(error, match=match):
            adamw8bit(*args, **{**hyper, **more})

    refused(TypeError, "p has dtype torch.float64", 0, p.double())
    refused(ValueError, r"grad has shape \[299\], expected \[300\]", 1, p[:299])
    refused(TypeError, "exp_avg has dtype torch.int8", 2, good[2].to(torch.int8))
    refused(ValueError, r"exp_avg_absmax has shape \[3\], expected \[2\]", 3, torch.zeros(3))
    refused(TypeError, "exp_avg_sq_absmax has dtype", 5, good[5].half())
    refused(ValueError, "p has strides", 0, torch.randn(600)[::2])
    refused(ValueError, "block_size is 100", block_size=100)
    refused(ValueError, "step is 0", step=0)
    refused(ValueError, "beta2 is 1", beta2=1.0)
    assert bitfuse.explain(adamw8bit, *good, **hyper).chosen in ("cpp", "reference")


def test_bindings_trust_no_integer() -> None:
    from bitfuse.ops.optim.adamw8bit_cpu import _cpu

    if _cpu is None:
        return
    t, codes, absmax = torch.zeros(64), torch.zeros(64, dtype=torch.uint8), torch.zeros(1)
    good: list[Any] = [t, t.clone(), codes, absmax, codes.clone(), absmax.clone()]
    hyper: dict[str, Any] = dict(
        lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1.0, maximize=False, block_size=64
    )
    _cpu.adamw8bit(*good, **hyper)
    wrong: list[tuple[int, dict[str, Any]]] = [
        (0, dict(address=0)), (0, dict(address=t.data_ptr() + 1)), (0, dict(dtype="UINT8")),
        (0, dict(shape=(-1,))), (0, dict(shape=(2**62,))), (0, dict(strides=(2,))), (1, dict(address=2)),
        (1, dict(dtype="INT32")), (1, dict(shape=(63,))), (2, dict(address=0)), (2, dict(shape=(65,))),
        (3, dict(address=6)), (3, dict(shape=(2,))), (4, dict(address=0)), (5, dict(dtype="FLOAT16")),
    ]  # fmt: skip
    for place, changes in wrong:
        bad = described(_cpu, good[place], **changes)
        with pytest.raises(ValueError, match="expected"):
            _cpu.adamw8bit(*good[:place], bad, *good[place + 1 :], **hyper)
    for block_size in (0, 65, 8192):
        with pytest.raises(ValueError, match=f"block_size is {block_size}, expected"):
            _cpu.adamw8bit(*good, **hyper | dict(block_size=block_size))


def test_opcheck() -> None:
    p = torch.randn(600)
    args = (p, torch.randn(600), *new_state(p, 256), *options(1.0))
    torch.library.opcheck(torch.ops.bitfuse.adamw8bit.default, args)


# the optimiser


def regression(
    optimizer: Any, steps: int = 200, dtype: torch.dtype = torch.float32
) -> tuple[float, list[Any]]:
    """The loss of a small regression after some steps, and the parameters."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128),
        torch.nn.Tanh(),
        torch.nn.Linear(128, 128),
        torch.nn.Tanh(),
        torch.nn.Linear(128, 8),
    )
    teacher = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
    x = torch.randn(512, 64)
    y = teacher(x).detach() + 0.3 * torch.randn(512, 8)
    model, x, y = model.to(dtype), x.to(dtype), y.to(dtype)
    made = optimizer(model.parameters())
    for step in range(steps):
        batch = slice(step % 8 * 64, step % 8 * 64 + 64)
        loss = torch.nn.functional.mse_loss(model(x[batch]).float(), y[batch].float())
        made.zero_grad()
        loss.backward()
        made.step()
    with torch.no_grad():
        final = torch.nn.functional.mse_loss(model(x).float(), y.float())
    return float(final), [p.detach() for p in model.parameters()]


def test_learns_as_adamw_does() -> None:
    """Within 1% of torch.optim.AdamW's loss after 200 steps (on other seeds within 0.2%)."""
    theirs, _ = regression(lambda p: torch.optim.AdamW(p, lr=1e-3))
    ours, _ = regression(lambda p: AdamW8bit(p, lr=1e-3))
    assert abs(ours / theirs - 1) < 0.01, (ours, theirs)


def test_small_parameters_are_adamw_bit_for_bit() -> None:
    kinds: list[dict[str, Any]] = [dict(), dict(maximize=True, betas=(0.8, 0.99), weight_decay=0.0, eps=1e-6)]
    for kind in kinds:
        theirs, p = regression(lambda p, k=kind: torch.optim.AdamW(p, lr=1e-3, fused=True, **k), 5)
        ours, q = regression(lambda p, k=kind: AdamW8bit(p, lr=1e-3, min_8bit_size=10**9, **k), 5)
        assert ours == theirs and all(torch.equal(a, b) for a, b in zip(p, q, strict=True))


def test_state_is_two_bytes_a_parameter() -> None:
    p = torch.nn.Parameter(torch.randn(4096 * 4))
    small = torch.nn.Parameter(torch.randn(4095))
    optimizer = AdamW8bit([p, small])
    p.grad, small.grad = torch.randn_like(p), torch.randn_like(small)
    optimizer.step()
    assert {k: t.dtype for k, t in optimizer.state[p].items()} == {
        "step_8bit": torch.float32, "exp_avg_8bit": torch.uint8, "exp_avg_sq_8bit": torch.uint8,
        "exp_avg_absmax": torch.float32, "exp_avg_sq_absmax": torch.float32,
    }  # fmt: skip
    held = sum(t.nbytes for k, t in optimizer.state[p].items() if k != "step_8bit")
    assert held == 2 * p.numel() + 2 * 4 * (p.numel() // 256)
    assert sum(t.nbytes for k, t in optimizer.state[small].items() if k != "step") == 8 * small.numel()


def make(**changes: Any) -> tuple[torch.nn.Sequential, AdamW8bit]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64))
    groups = [
        dict(params=model[0].parameters(), lr=1e-2),
        dict(params=model[2].parameters(), weight_decay=0.1),
    ]
    return model, AdamW8bit(groups, **changes)


def advance(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 64, generator=generator)).square().mean().backward()
        optimizer.step()


def test_checkpoint_is_exact() -> None:
    """Saved, loaded into another process's optimiser and continued: the same bits as without a stop."""
    model, optimizer = make()
    advance(model, optimizer, 3, seed=5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, other = make()
    seen: list[type] = []
    other.register_load_state_dict_post_hook(
        lambda o: seen.extend(type(t) for s in o.state.values() for t in s.values())
    )
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert seen and set(seen) == {torch.Tensor}
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for name, t in optimizer.state[p].items():
            assert other.state[q][name].dtype == t.dtype and torch.equal(other.state[q][name], t)
    kept = copy.deepcopy(saved["optimizer"]["state"])
    advance(model, optimizer, 3, seed=6)
    advance(again, other, 3, seed=6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    for i, state in saved["optimizer"]["state"].items():  # loading took copies
        assert all(torch.equal(t, kept[i][name]) for name, t in state.items())


def test_runs_repeat() -> None:
    first, second = (make() for _ in range(2))
    for model, optimizer in (first, second):
        advance(model, optimizer, 4, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True))


def test_what_torch_optimisers_do() -> None:
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 4)
    for p in model[2].parameters():
        p.requires_grad_(False)
    before = [p.clone() for p in model[2].parameters()]
    advance(model, optimizer, 2, seed=0)
    scheduler.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model[2].parameters(), before, strict=True)
    )  # no grad, no step
    assert optimizer.param_groups[0]["lr"] < 1e-2
    weight = model[0].weight
    version = weight._version
    assert float(optimizer.step(lambda: torch.tensor(3.0))) == 3.0
    assert weight._version > version  # autograd knows that it was written to
    weight.grad = torch.zeros(96, 64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layouts_and_dtypes(dtype: torch.dtype) -> None:
    """A transposed parameter and gradient take the same steps as dense ones; so does a tensor lr."""
    values, grads = torch.randn(96, 64).to(dtype), [torch.randn(96, 64).to(dtype) for _ in range(3)]
    found = []
    for transposed, lr in ((False, 1e-2), (True, 1e-2), (False, torch.tensor(1e-2, dtype=torch.float64))):
        p = torch.nn.Parameter(values.T.contiguous().T if transposed else values.clone())
        optimizer = AdamW8bit([p], lr=lr)
        for grad in grads:
            p.grad = grad.T.contiguous().T if transposed else grad.clone()
            optimizer.step()
        found.append(p.detach())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], values)


def test_bfloat16_parameters_learn() -> None:
    """At most 1% above torch.optim.AdamW's loss, whose moments are in bfloat16 as the parameters are."""
    theirs, _ = regression(lambda p: torch.optim.AdamW(p, lr=1e-3), dtype=torch.bfloat16)
    ours, _ = regression(lambda p: AdamW8bit(p, lr=1e-3), dtype=torch.bfloat16)
    assert ours < 1.01 * theirs, (ours, theirs)


@pytest.mark.parametrize(
    "changes, error, match",
    [
        (dict(lr=-1.0), ValueError, "lr is -1.0"),
        (dict(lr=torch.ones(2)), ValueError, r"lr has shape \[2\]"),
        (dict(betas=(0.9, 1.0)), ValueError, "betas"),
        (dict(eps=-1e-8), ValueError, "eps"),
        (dict(weight_decay=float("nan")), ValueError, "weight_decay is nan"),
        (dict(block_size=100), ValueError, "block_size is 100"),
        (dict(min_8bit_size=-1), ValueError, "min_8bit_size"),
    ],
)
def test_bad_options(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        AdamW8bit([torch.nn.Parameter(torch.zeros(4))], **changes)


def test_other_refusals() -> None:
    with pytest.raises(TypeError, match=r"params holds a torch.float64"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))])
    with pytest.warns(UserWarning, match="paged=True changes nothing"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(4))], paged=True)


@pytest.mark.filterwarnings("ignore:paged=True changes nothing")
def test_paged_state_lives_in_host_memory() -> None:
    """The same bits as with state on the device, checkpoints included; on the CPU nothing to page."""
    gpu = torch.cuda.is_available()
    values = torch.randn(300, 64, device="cuda" if gpu else "cpu")
    grads = [torch.randn_like(values) for _ in range(3)]
    found = []
    for paged in (False, True):
        p = torch.nn.Parameter(values.clone())
        optimizer = AdamW8bit([p], paged=paged)
        for grad in grads:
            p.grad = grad
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state[p]["exp_avg_8bit"].is_pinned() == (paged and gpu)
        found.append((p.detach(), optimizer.state_dict()["state"][0]["exp_avg_8bit"].cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

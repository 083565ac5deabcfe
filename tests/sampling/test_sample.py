"""sample: its filters, its distribution, and the same tokens from every backend."""

from __future__ import annotations

import math
import random
from typing import Any

import bitfuse
import cusim
import pytest
import torch
from backends import Target, targets
from bitfuse.ops.sampling.sample import _arguments, sample_op
from descriptors import described

TARGETS = targets("reference", "cpp", "triton")
FILTERS: list[dict[str, Any]] = [
    {},
    dict(temperature=0.0),
    dict(temperature=0.3, top_k=5),
    dict(top_p=0.7),
    dict(top_p=0.0),
    dict(min_p=0.05, top_p=0.9),
    dict(temperature=1.7, top_k=40, top_p=0.8, min_p=0.01),
    dict(
        temperature=torch.tensor([0.0, 0.5, 1.0, 2.0, 9.0, 0.1]), top_k=torch.tensor([0, 1, 3, 50, 9999, 7])
    ),
]


@pytest.mark.parametrize("number", range(len(FILTERS)))
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_is_the_filters_one_after_the_other(target: Target, number: int) -> None:
    """Against whole sorted rows of integer weights in Python; rounded logits, so that many are equal."""
    dtypes = ((0, torch.float32), (1, torch.float16), (2, torch.bfloat16))
    for seed, dtype in target.pick(dtypes):
        torch.manual_seed(seed)
        logits = (torch.randn(6, 700) * 12).round().div(4).to(dtype)
        logits[3, ::3] = -torch.inf
        u = torch.rand(6, dtype=torch.float64)
        args = _arguments(logits, u, **dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) | FILTERS[number])
        got = target.run(sample_op, *target.place(*args)).cpu()
        for row in range(6):
            t, k, p, m = (float(a[row]) for a in args[2:])
            z = logits[row].double()
            order = sorted(range(700), key=lambda i: (-float(z[i]), i))
            scores = (z - z.max()) / t if t else torch.where(torch.arange(700) == order[0], 0.0, -torch.inf)
            weights = [int(w * 2**40) for w in scores.exp().tolist()]
            nucleus: list[int] = []
            kept = [i for i in order if weights[i] >= m * 2**40][: int(k) or None]
            total, mass = sum(weights[i] for i in kept), 0
            for i in kept:
                if p < 1 and nucleus and mass >= int(p * total):
                    break
                nucleus.append(i)
                mass += weights[i]
            at = min(int(float(u[row]) * mass), mass - 1)
            for token in sorted(nucleus):
                at -= weights[token]
                if at < 0:
                    break
            assert int(got[row]) == token, (seed, row)


def drawn(seed: int, rows: int, vocabulary: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The op's arguments: rows of different kinds, and per-row options, some of them out of range."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    kinds = [
        lambda z: z * 3,
        lambda z: (z * 4).round() / 4,
        lambda z: torch.zeros_like(z),
        lambda z: z * 50,
        lambda z: torch.where(z > 3, z, -torch.inf),
        lambda z: torch.where(z > 2.5, torch.nan, z.abs()),
    ]
    logits = torch.stack([r.choice(kinds)(torch.randn(vocabulary)) for _ in range(rows)]).to(dtype)
    nan = math.nan

    def per_row(dtype: torch.dtype, *values: float) -> torch.Tensor:
        return torch.tensor([r.choice(values) for _ in range(rows)], dtype=dtype)

    return [
        logits,
        torch.rand(rows, dtype=torch.float64),
        per_row(torch.float64, 1.0, 1.0, 0.3, 3.0, 0.0, nan, 1e-30, 1e30),
        per_row(torch.int64, 0, 0, 1, 7, 300, vocabulary - 1, vocabulary + 1, -3),
        per_row(torch.float64, 1.0, 1.0, 0.9, 0.3, 0.0, 1e-9, 1 - 1e-9, nan, 2.0, -1.0),
        per_row(torch.float64, 0.0, 0.0, 0.02, 0.5, 1.0, 2.0, nan, -1.0),
    ]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_backend_gives_the_same_tokens(target: Target) -> None:
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    sizes = ((6, 3000, bf16), (1, 9000, f32), (2, 5003, f16), (9, 1, bf16))
    for seed in range(28):
        arguments = drawn(seed, *sizes[seed % 4])
        wanted = sample_op.reference(*arguments)
        if seed == 4:  # a slice of a larger tensor
            arguments[0] = torch.cat([arguments[0] + 1, arguments[0]], 1)[:, arguments[0].shape[1] :]
            placed = [t.to(target.device) for t in arguments]
        else:
            placed = target.place(*arguments)
        assert torch.equal(target.run(sample_op, *placed).cpu(), wanted), seed


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_top_k_of_a_row(target: Target) -> None:
    """Wherever the cut of top-k falls among the kernels' bins, top-p counts what top-k has left."""
    draws = 1 if target.sm else 8
    logits = (3 * torch.randn(4, 400)).repeat_interleave(60 * draws, 0)
    u = torch.rand(len(logits), dtype=torch.float64)
    top_k = torch.arange(1, 61).repeat(4 * draws)
    args = _arguments(logits, u, temperature=0.8, top_k=top_k, top_p=0.9, min_p=0.0)
    expected = sample_op.reference(*args)
    assert torch.equal(target.run(sample_op, *target.place(*args)).cpu(), expected)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.sm], ids=str)
def test_teams_of_programs(target: Target) -> None:
    """Two or eight programs a row, every access to global memory checked for races."""
    for seed in range(16):
        arguments = drawn(seed, 1, 9000, torch.float32)
        with (
            cusim.device(sm=target.sm, racecheck=2, seed=seed, multiprocessors=2 if target.sm == 80 else 8),
            bitfuse.use_backend("triton"),
        ):
            assert torch.equal(sample_op(*arguments), sample_op.reference(*arguments)), seed


def test_probabilities() -> None:
    """Uniforms on a grid: each token comes as often as softmax says."""
    z = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
    rows = 20000
    u = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    ids = bitfuse.sample(z.expand(rows, -1), u, temperature=0.8)
    found = torch.bincount(ids, minlength=5) / rows
    torch.testing.assert_close(found, torch.softmax(z / 0.8, -1), rtol=0, atol=1 / rows)


def test_speculation_wants_what_was_drawn_from() -> None:
    """Drafts and target both filtered: tokens as if the target had drawn them."""
    rows, draft, target = 40000, torch.randn(9), torch.randn(9)
    filters: dict[str, Any] = dict(top_k=3, temperature=0.7, return_probs=True)
    ids, p = bitfuse.sample(draft.expand(rows, -1), torch.rand(rows), **filters)
    _, q = bitfuse.sample(target.expand(2 * rows, -1), torch.zeros(2 * rows), top_p=0.8, return_probs=True)
    assert p.dtype == torch.float32 and int((p[0] > 0).sum()) == 3
    kept = draft.topk(3).indices
    torch.testing.assert_close(p[0][kept], torch.softmax(draft[kept] / 0.7, -1))
    torch.testing.assert_close(p.sum(-1), torch.ones(rows))
    uniforms = torch.rand(rows, 2, dtype=torch.float64)
    found, _ = bitfuse.speculative_sample(p.unsqueeze(1), ids.unsqueeze(1), q.view(rows, 2, 9), uniforms)
    often = torch.bincount(found[:, 0], minlength=9) / rows
    assert 0.5 * float((often - q[0]).abs().sum()) < 0.015  # 0.1 and more with the plain softmax of the draft


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_odd_rows(target: Target) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[1, nan, 3, 3], [-inf] * 4, [nan] * 4, [0, inf, 1, inf], [5, -inf, -inf, -inf]])
    for u, wanted in ((0.0, [0, 0, 0, 1, 0]), (0.999, [3, 3, 3, 3, 0])):
        args = _arguments(logits, torch.full((5,), u), 1.0, 0, 1.0, 0.0)
        assert target.run(sample_op, *target.place(*args)).tolist() == wanted
    args = _arguments(logits, torch.full((5,), 0.999), 0.0, 0, 1.0, 0.0)
    assert target.run(sample_op, *target.place(*args)).tolist() == [2, 0, 0, 1, 0]
    args = _arguments(logits[:0], torch.rand(0), 1.0, 0, 1.0, 0.0)
    assert target.run(sample_op, *target.place(*args)).shape == (0,)


def test_compiles_and_opcheck() -> None:
    logits, u = torch.randn(3, 50), torch.rand(3)
    compiled = torch.compile(bitfuse.sample, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(logits, u, 0.7, 5, 0.9), bitfuse.sample(logits, u, 0.7, 5, 0.9))
    torch.library.opcheck(torch.ops.bitfuse.sample.default, _arguments(logits, u, 0.7, 5, 0.9, 0.0))
    assert bitfuse.explain(bitfuse.sample, logits, u).chosen == "cpp"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    (
        (dict(logits=None), TypeError, "logits is a NoneType"),
        (dict(logits=torch.randn(9)), ValueError, r"logits has shape \[9\]"),
        (dict(logits=torch.randn(2, 0)), ValueError, r"logits has shape \[2, 0\]"),
        (dict(uniforms=torch.rand(3)), ValueError, r"uniforms has shape \[3\], expected \[2\]"),
        (dict(temperature=-1.0), ValueError, "temperature is -1.0"),
        (dict(top_k=-1), ValueError, "top_k is -1"),
        (dict(top_k=2.5), TypeError, "top_k is 2.5, expected an int"),
        (dict(top_k=torch.tensor([2.5, 1.0])), TypeError, "top_k has dtype torch.float32"),
        (dict(top_p=1.5), ValueError, "top_p is 1.5"),
        (dict(min_p=torch.rand(3)), ValueError, r"min_p has shape \[3\], expected \[2\]"),
    ),
)
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bitfuse.sample(**dict(logits=torch.randn(2, 9), uniforms=torch.rand(2)) | changes)


def test_native_code_trusts_no_integer() -> None:
    from bitfuse import _cpu  # type: ignore[attr-defined]

    one, whole = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    good: list[Any] = [torch.randn(1, 4), one, one, whole, one, one, whole.clone()]
    _cpu.sample(*good)
    wrong: list[tuple[int, dict[str, Any]]] = [
        (0, dict(shape=(-1, 4))), (0, dict(shape=(2**62, 4))), (0, dict(shape=(1, 0))),
        (0, dict(shape=(1, 2**21))), (0, dict(dtype="INT64")), (0, dict(address=0)),
        (0, dict(strides=(-1, 1))), (0, dict(strides=(8, 2))), (1, dict(address=0)),
        (1, dict(shape=(2,))), (3, dict(address=4)),
        (3, dict(dtype="INT32")), (6, dict(address=0)),
    ]  # fmt: skip
    for at, changes in wrong:
        with pytest.raises(ValueError, match="expected"):
            _cpu.sample(*good[:at], described(_cpu, good[at], **changes), *good[at + 1 :])

"""speculative_sample: lossless, and the same tokens from every backend."""

from __future__ import annotations

import math
from typing import Any

import bitfuse
import pytest
import torch
from backends import Target, targets
from bitfuse.ops.sampling.speculative_sample import speculative_sample_op
from descriptors import described

TARGETS = targets("reference", "cpp", "triton")


def case(seed: int, batch: int, drafted: int, vocabulary: int, dtype: torch.dtype, sharp: float) -> list[Any]:
    """Drafts from p, a target near it."""
    torch.manual_seed(seed)
    logits = torch.randn(batch, drafted + 1, vocabulary) * sharp
    p = torch.softmax(logits[:, :-1] + torch.randn(batch, drafted, vocabulary) * 0.5, -1).to(dtype)
    q = torch.softmax(logits, -1).to(dtype)
    rows = p.float().flatten(0, 1)
    ids = (
        torch.multinomial(rows, 1).view(batch, drafted)
        if drafted
        else torch.empty(batch, 0, dtype=torch.int64)
    )
    return [p, ids, q, torch.rand(batch, drafted + 1, dtype=torch.float64)]


CASES = [
    (3, 4, 50, torch.float32, 1.0),
    (2, 3, 5000, torch.float32, 2.0),
    (5, 1, 2048, torch.bfloat16, 3.0),
    (4, 2, 2049, torch.float16, 3.0),
    (2, 0, 700, torch.float32, 1.0),
    (1, 7, 32000, torch.bfloat16, 4.0),
    (0, 2, 10, torch.float32, 1.0),
    (64, 3, 1, torch.float32, 1.0),
]


# simulated, each compute capability has every second case
EVERY = [(t, n) for t in TARGETS for n in range(t.sm // 10 % 2, len(CASES), 2 if t.sm else 1)]


@pytest.mark.parametrize(("target", "number"), EVERY, ids=str)
def test_every_backend_gives_the_same_tokens(target: Target, number: int) -> None:
    for seed in range(6):
        p, ids, q, u = case(seed, *CASES[number])
        if seed == 1:  # drafts that end early
            ids = torch.where(torch.rand(ids.shape) < 0.3, -1, ids)
        elif seed == 2:  # ids past the vocabulary too
            ids, u = torch.where(torch.rand(ids.shape) < 0.3, q.shape[-1], ids).int(), u.float()
        elif seed == 4:  # nothing is left of a row; the uniforms' ends
            q[:, 1::2], u = 0, u.round()
        elif seed == 5:  # what no softmax gives
            p, q = p * 3, torch.where(torch.rand(q.shape) < 0.1, math.nan, q)
        with bitfuse.use_backend("reference"):
            wanted = bitfuse.speculative_sample(p, ids, q, u)
        if seed == 0:  # slices of larger tensors
            p, q = torch.stack([p, p + 1], 1)[:, 0], torch.cat([q + 1, q], -1)[..., q.shape[-1] :]
            got = target.run(speculative_sample_op, *(t.to(target.device) for t in (p, ids, q, u)))
        else:
            got = target.run(speculative_sample_op, *target.place(p, ids, q, u))
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.cpu(), b), f"seed {seed}: {a.tolist()} and not {b.tolist()}"


@pytest.mark.parametrize("target", [t for t in TARGETS if not t.sm], ids=str)
def test_lossless_by_enumeration(target: Target) -> None:
    """Probabilities in quarters: every draft, and every case of the uniforms, in twelfths, once."""
    p = torch.tensor([[2, 1, 1], [1, 3, 0]]) / 4
    q = torch.tensor([[1, 3, 0], [0, 2, 2], [1, 1, 2]]) / 4
    drafts = torch.tensor(
        [(a, b) for a in range(3) for b in range(3) for _ in range(int(16 * p[0, a] * p[1, b]))]
    )
    grid = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
    u = torch.cartesian_prod(grid, grid, grid)
    drafts, u = drafts.repeat_interleave(len(u), 0), u.repeat(len(drafts), 1)
    rows = len(u)
    ids, accepted = target.run(
        speculative_sample_op,
        *target.place(p.expand(rows, -1, -1).contiguous(), drafts, q.expand(rows, -1, -1).contiguous(), u),
    )
    ids, accepted = ids.cpu(), accepted.cpu()
    for place in range(3):
        there = ids[
            accepted >= place, place
        ]  # those that came so far have nothing to do with the place's token
        assert len(there) and torch.equal(torch.bincount(there, minlength=3) / len(there), q[place]), place
    # and the pair: the second token is the target's whatever the first was
    for first in (0, 1):
        there = ids[(accepted >= 1) & (ids[:, 0] == first), 1]
        assert torch.equal(torch.bincount(there, minlength=3) / len(there), q[1])
    assert torch.equal((ids >= 0).sum(1), accepted + 1)


def test_lossless_by_chi_square() -> None:
    rows, vocabulary = 40000, 40
    torch.manual_seed(5)
    p = torch.softmax(torch.randn(2, vocabulary), -1)
    q = torch.softmax(torch.randn(3, vocabulary), -1)
    drafts = torch.multinomial(p, rows, replacement=True).t()
    u = torch.rand(rows, 3)
    ids, accepted = bitfuse.speculative_sample(p.expand(rows, -1, -1), drafts, q.expand(rows, -1, -1), u)
    for place in range(3):
        there = ids[accepted >= place, place]
        expected = q[place] * len(there)
        statistic = float(
            ((torch.bincount(there, minlength=vocabulary) - expected).square() / expected).sum()
        )
        # the mean of chi-square is its degrees of freedom, the variance twice that
        assert statistic < vocabulary - 1 + 4 * math.sqrt(2 * (vocabulary - 1)), (place, statistic)
    # and as many are accepted as can be
    assert abs(float((accepted >= 1).float().mean()) - float(torch.minimum(p[0], q[0]).sum())) < 0.01


def test_equal_models_accept_everything() -> None:
    _p, ids, q, u = case(0, 50, 4, 300, torch.float32, 2.0)
    _, accepted = bitfuse.speculative_sample(q[:, :-1], ids, q, u)
    assert accepted.tolist() == [4] * 50


def test_compiles_and_opcheck() -> None:
    args = case(1, 3, 2, 100, torch.float32, 1.0)
    compiled = torch.compile(bitfuse.speculative_sample, fullgraph=True, dynamic=False)
    for a, b in zip(compiled(*args), bitfuse.speculative_sample(*args), strict=True):
        assert torch.equal(a, b)
    torch.library.opcheck(torch.ops.bitfuse.speculative_sample.default, tuple(args))
    assert bitfuse.explain(bitfuse.speculative_sample, *args).chosen == "cpp"


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(draft_probs=None), TypeError, "draft_probs is a NoneType"),
    (dict(draft_probs=torch.rand(2, 3, 10).double()), TypeError, "draft_probs has dtype torch.float64"),
    (dict(draft_probs=torch.rand(2, 10)), ValueError, r"draft_probs has shape \[2, 10\]"),
    (dict(draft_probs=torch.rand(2, 3, 0)), ValueError, "a vocabulary of 0, expected 1 to 1048576"),
    (dict(draft_ids=torch.rand(2, 3)), TypeError, "draft_ids has dtype torch.float32"),
    (
        dict(target_probs=torch.rand(2, 3, 10)),
        ValueError,
        r"target_probs has shape \[2, 3, 10\], expected \[2, 4",
    ),
    (dict(uniforms=torch.rand(2, 3)), ValueError, r"uniforms has shape \[2, 3\], expected \[2, 4\]"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD, ids=[b[2][:30] for b in BAD])
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = dict(
        draft_probs=torch.rand(2, 3, 10), draft_ids=torch.zeros(2, 3, dtype=torch.int64),
        target_probs=torch.rand(2, 4, 10), uniforms=torch.rand(2, 4),
    )  # fmt: skip
    with pytest.raises(error, match=words):
        bitfuse.speculative_sample(**given | changes)


def test_native_code_trusts_no_integer() -> None:
    from bitfuse import _cpu  # type: ignore[attr-defined]

    ids = torch.zeros(1, 1, dtype=torch.int64)
    good: list[Any] = [
        torch.rand(1, 1, 4), ids, torch.rand(1, 2, 4), torch.rand(1, 2, dtype=torch.float64),
        torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64),
    ]  # fmt: skip
    _cpu.speculative_sample(*good)
    wrong: list[tuple[int, dict[str, Any]]] = [
        (2, dict(shape=(-1, 2, 4))), (2, dict(shape=(1, 0, 4))), (2, dict(shape=(1, 2, 0))),
        (2, dict(shape=(1, 2, 2**21))), (2, dict(shape=(2**62, 2, 4))), (0, dict(dtype="INT64")),
        (0, dict(shape=(1, 3, 4))), (0, dict(strides=(-4, 4, 1))), (1, dict(shape=(1, 2))),
        *((at, dict(address=0)) for at in range(6)), (2, dict(address=65)), (5, dict(shape=(2,))),
    ]  # fmt: skip
    for at, changes in wrong:
        with pytest.raises(ValueError, match="expected"):
            _cpu.speculative_sample(*good[:at], described(_cpu, good[at], **changes), *good[at + 1 :])

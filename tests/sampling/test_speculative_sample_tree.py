"""speculative_sample_tree: lossless, the same tokens from every backend, and a chain's in a chain."""

from __future__ import annotations

import math
import random
from typing import Any

import bitfuse
import cusim
import pytest
import torch
from backends import Target, targets
from bitfuse.ops.sampling.speculative_sample_tree import speculative_sample_tree_op
from descriptors import described

TARGETS = targets("reference", "cpp", "triton")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def case(seed: int, batch: int, nodes: int, vocabulary: int, dtype: torch.dtype) -> list[Any]:
    """The op's arguments: trees at random, targets near the drafts, few tokens, so that siblings meet."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    shape = (batch, nodes) if seed % 2 else (nodes,)
    bushy = r.choice((1, 3, 8))
    parents = torch.tensor(
        [[max(-1, i - 1 - r.randrange(bushy)) for i in range(nodes)] for _ in range(batch)], dtype=torch.int64
    ).view(batch, nodes)
    if len(shape) == 1:
        parents = parents[:1].expand(batch, -1)
    logits = torch.randn(batch, nodes + 1, vocabulary) * r.choice((0.5, 2.0, 4.0))
    q = torch.softmax(logits, -1).to(dtype)
    shared = r.random() < 0.5  # a row of drafts for each node's children
    p = torch.softmax(logits + torch.randn(logits.shape) * 0.7, -1).to(F32 if dtype == F16 else dtype)
    rows = parents + 1 if shared else None
    if not shared:
        p = p.gather(1, (parents + 1).unsqueeze(-1).expand(-1, -1, vocabulary))
    own = p if rows is None else p.gather(1, rows.unsqueeze(-1).expand(-1, -1, vocabulary))
    ids = torch.multinomial(own.float().flatten(0, 1), 1).view(batch, nodes) if nodes else parents
    return [p, ids, parents, rows, q, torch.rand(batch, nodes + 1, dtype=torch.float64), r.random() < 0.5]


CASES = [
    (3, 9, 5, F32),
    (2, 20, 300, F32),
    (5, 12, 2048, BF16),
    (2, 6, 2049, F16),
    (2, 0, 70, F32),
    (1, 33, 9000, BF16),
    (0, 4, 10, F32),
    (40, 5, 2, F32),
]


# simulated, each compute capability has every second case
EVERY = [(t, n) for t in TARGETS for n in range(t.sm // 10 % 2, len(CASES), 2 if t.sm else 1)]


@pytest.mark.parametrize(("target", "number"), EVERY, ids=str)
def test_every_backend_gives_the_same_tokens(target: Target, number: int) -> None:
    for seed in range(12):
        p, ids, parents, rows, q, u, replacement = case(seed, *CASES[number])
        vocabulary = q.shape[-1]
        if seed == 1:  # no nodes, and beyond the vocabulary
            ids = torch.where(torch.rand(ids.shape) < 0.2, -1, ids)
            ids = torch.where(torch.rand(ids.shape) < 0.2, vocabulary, ids).int()
            parents, u = parents.int(), u.float()
        elif seed == 2:  # parents that are not before their children
            parents = torch.where(torch.rand(parents.shape) < 0.2, torch.arange(ids.shape[1]), parents)
        elif seed == 3 and rows is not None:  # rows that are not there
            rows = torch.where(torch.rand(rows.shape) < 0.2, p.shape[1], rows)
            rows = torch.where(torch.rand(rows.shape) < 0.2, -1, rows)
        elif seed == 4:  # nothing is left of a row; the uniforms' ends and what is beyond
            q[:, 1::2], u = 0, (u * 4).round() - 1
        elif seed == 5:  # what no softmax gives
            p, q = p * 3, torch.where(torch.rand(q.shape) < 0.1, math.nan, q)
        elif seed == 6:  # everything is refused
            u = torch.ones_like(u)
        elif seed == 7:  # a model and itself
            p, rows = q, parents + 1
        elif seed == 8 and vocabulary > 1:  # nothing is left of a draft
            p = torch.zeros_like(p)
            p[..., 1] = 1
        arguments = [p, ids, parents, rows, q, u, replacement]
        with bitfuse.use_backend("reference"):
            wanted = speculative_sample_tree_op(*arguments)
        if seed == 0:  # slices of larger tensors
            arguments[0] = torch.stack([p, p + 1], 1)[:, 0]
            arguments[4] = torch.cat([q + 1, q], -1)[..., vocabulary:]
        placed = [a.to(target.device) if isinstance(a, torch.Tensor) else a for a in arguments]
        if seed and target.device == "cpu":
            placed = [
                target.place(a.contiguous())[0] if isinstance(a, torch.Tensor) else a for a in arguments
            ]
        got = target.run(speculative_sample_tree_op, *placed)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.cpu(), b), f"seed {seed}: {a.tolist()} and not {b.tolist()}"


@pytest.mark.parametrize("target", [t for t in TARGETS if t.sm], ids=str)
def test_teams_of_programs(target: Target) -> None:
    """Two or eight programs a sequence, every access to global memory checked for races."""
    for seed in range(4):
        arguments = case(seed, 1, 9, 16384, BF16)
        if seed == 3:  # everything is refused
            arguments[5] = torch.ones_like(arguments[5])
        wanted = speculative_sample_tree_op.reference(*arguments)
        with (
            cusim.device(sm=target.sm, racecheck=2, seed=seed, multiprocessors=2 if target.sm == 80 else 8),
            bitfuse.use_backend("triton"),
        ):
            got = speculative_sample_tree_op(*arguments)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)


def test_a_chain_is_a_tree() -> None:
    for seed in range(20):
        p, ids, _, rows, q, u, replacement = case(seed, 4, 5, 200, F32)
        p = p[:, : ids.shape[1]] if rows is not None else p
        chain = bitfuse.speculative_sample(p, ids, q, u)
        tree = bitfuse.speculative_sample_tree(p, ids, torch.arange(-1, 4), q, u, None, replacement)
        for a, b in zip(chain, tree, strict=False):
            assert torch.equal(a, b)
        places = torch.arange(5).expand(4, -1)
        assert torch.equal(tree[2], torch.where(places < tree[1].unsqueeze(1), places, -1))


@pytest.mark.parametrize("replacement", (False, True))
@pytest.mark.parametrize("target", [t for t in TARGETS if not t.sm], ids=str)
def test_lossless_by_enumeration(target: Target, replacement: bool) -> None:
    """Nodes 0 and 1 continue the root, 2 continues 0 and 3 continues 1: every draft as often as it is drawn,
    and every case of the uniforms, whose grid has all thresholds as edges."""
    root = torch.tensor([6, 3, 3]) / 12  # of a draft: refused at 1/3, then at 1/2
    below = torch.tensor([2, 1, 1]) / 4
    q = torch.tensor([[2, 4, 6], [3, 9, 0], [0, 6, 6], [3, 3, 6], [6, 6, 0]]) / 12
    other = torch.tensor([0, 6, 6]) / 12  # with replacement, the row of the second sibling
    second = torch.stack([other] * 3) if replacement else (root * (1 - torch.eye(3)))
    pairs = root.unsqueeze(1) * second / second.sum(1, keepdim=True)
    drafts = torch.tensor(
        [
            (a, b, c, c)
            for a in range(3)
            for b in range(3)
            for c in range(3)
            for _ in range(round(float(96 * pairs[a, b] * below[c])))
        ]
    )
    assert len(drafts) == 96
    grids = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (6, 6, 4, 12)]
    u = torch.cartesian_prod(*grids)[:, (0, 1, 2, 2, 3)]
    drafts, u = drafts.repeat_interleave(len(u), 0), u.repeat(len(drafts), 1)
    rows = len(u)
    p = torch.stack([root, other if replacement else root, below, below])
    arguments = (p.expand(rows, -1, -1), drafts, torch.tensor([-1, -1, 0, 1]).expand(rows, -1))
    arguments = target.place(*(t.contiguous() for t in arguments))
    q_rows, u_rows = target.place(q.expand(rows, -1, -1).contiguous(), u)
    found = target.run(speculative_sample_tree_op, *arguments, None, q_rows, u_rows, replacement)
    ids, accepted, path = (t.cpu() for t in found)

    def distribution(of: torch.Tensor) -> torch.Tensor:
        return torch.bincount(of, minlength=3) / len(of)

    torch.testing.assert_close(distribution(ids[:, 0]), q[0], rtol=0, atol=1e-7)
    for first in (0, 1):
        for child in (0, 1):  # the second token is the target's, whichever was accepted before it
            there = (accepted >= 1) & (path[:, 0] == child) & (ids[:, 0] == first + 1)
            assert there.any()
            after = distribution(ids[there, 1])
            torch.testing.assert_close(after, q[child + 1], rtol=0, atol=1e-7)
            deeper = ids[there & (accepted == 2), 2]
            torch.testing.assert_close(distribution(deeper), q[child + 3], rtol=0, atol=1e-7)
    assert torch.equal((ids >= 0).sum(1), accepted + 1)
    # the second sibling is worth something: without it 1 - (6/12 * 2/3) are accepted
    assert float((accepted >= 1).float().mean()) > 2 / 3 + 0.05


def test_lossless_by_chi_square() -> None:
    """Three siblings at the root and two below each, all without replacement."""
    batch, vocabulary = 30000, 40
    torch.manual_seed(3)
    parents = torch.tensor([-1, -1, -1, 0, 0, 1, 1, 2, 2])
    p = torch.softmax(torch.randn(4, vocabulary), -1)
    q = torch.softmax(torch.randn(10, vocabulary), -1)
    drafts = [torch.multinomial(p[:1].expand(batch, -1), 3)]
    drafts += [torch.multinomial(p[i : i + 1].expand(batch, -1), 2) for i in (1, 2, 3)]
    u = torch.rand(batch, 10, dtype=torch.float64)
    ids, accepted, path = bitfuse.speculative_sample_tree(
        p.expand(batch, -1, -1), torch.cat(drafts, 1), parents, q.expand(batch, -1, -1), u, parents + 1
    )

    def check(of: torch.Tensor, row: torch.Tensor) -> None:
        expected = row * len(of)
        statistic = float(((torch.bincount(of, minlength=vocabulary) - expected).square() / expected).sum())
        assert statistic < vocabulary - 1 + 4 * math.sqrt(2 * (vocabulary - 1)), statistic

    check(ids[:, 0], q[0])
    for child in range(3):
        there = (accepted >= 1) & (path[:, 0] == child)
        check(ids[there, 1], q[child + 1])
    one = float(torch.minimum(p[0], q[0]).sum())
    assert float((accepted >= 1).float().mean()) > one + 0.1


def test_compiles_and_opcheck() -> None:
    p, ids, parents, rows, q, u, replacement = arguments = case(3, 3, 6, 50, F32)
    compiled = torch.compile(bitfuse.speculative_sample_tree, fullgraph=True, dynamic=False)
    given = (p, ids, parents, q, u, rows, replacement)
    for a, b in zip(compiled(*given), bitfuse.speculative_sample_tree(*given), strict=True):
        assert torch.equal(a, b)
    torch.library.opcheck(torch.ops.bitfuse.speculative_sample_tree.default, tuple(arguments))
    assert bitfuse.explain(bitfuse.speculative_sample_tree, *given).chosen == "cpp"


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(draft_probs=None), TypeError, "draft_probs is a NoneType"),
    (dict(draft_rows=3), TypeError, "draft_rows is a int"),
    (dict(draft_probs=torch.rand(2, 3, 10).double()), TypeError, "draft_probs has dtype torch.float64"),
    (dict(draft_probs=torch.rand(2, 10)), ValueError, r"draft_probs has shape \[2, 10\]"),
    (dict(draft_probs=torch.rand(2, 4, 10)), ValueError, "expected 3 rows, one a node"),
    (dict(draft_probs=torch.rand(2, 3, 0)), ValueError, "a vocabulary of 0, expected 1 to 1048576"),
    (
        dict(draft_probs=torch.rand(2, 0, 10), draft_rows=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "draft_probs has 0 rows",
    ),
    (dict(draft_ids=torch.rand(2, 3)), TypeError, "draft_ids has dtype torch.float32"),
    (dict(parents=torch.tensor([-1, 0])), ValueError, r"parents has shape \[2, 2\], expected \[2, 3\]"),
    (dict(parents=torch.rand(3)), TypeError, "parents has dtype torch.float32"),
    (
        dict(draft_rows=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        r"draft_rows has shape \[2, 2\], expected",
    ),
    (dict(target_probs=torch.rand(2, 3, 10)), ValueError, r"target_probs has shape \[2, 3, 10\], expected"),
    (dict(uniforms=torch.rand(2, 3)), ValueError, r"uniforms has shape \[2, 3\], expected \[2, 4\]"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD, ids=[b[2][:30] for b in BAD])
def test_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = dict(
        draft_probs=torch.rand(2, 3, 10), draft_ids=torch.zeros(2, 3, dtype=torch.int64),
        parents=torch.tensor([-1, 0, 0]), target_probs=torch.rand(2, 4, 10), uniforms=torch.rand(2, 4),
    )  # fmt: skip
    with pytest.raises(error, match=words):
        bitfuse.speculative_sample_tree(**given | changes)


def test_native_code_trusts_no_integer() -> None:
    from bitfuse import _cpu  # type: ignore[attr-defined]

    ids, more = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    good: list[Any] = [
        torch.rand(1, 2, 4), ids, torch.tensor([[-1, 0]]), ids, torch.rand(1, 3, 4),
        torch.rand(1, 3, dtype=torch.float64), False, more, torch.zeros(1, dtype=torch.int64), ids.clone(),
    ]  # fmt: skip
    _cpu.speculative_sample_tree(*good)
    wrong: list[tuple[int, dict[str, Any]]] = [
        (4, dict(shape=(-1, 3, 4))), (4, dict(shape=(2**62, 3, 4))), (4, dict(shape=(1, 2**21, 4))),
        (4, dict(shape=(1, 3, 0))), (4, dict(shape=(1, 3, 2**21))), (0, dict(dtype="INT64")),
        (0, dict(strides=(-8, 4, 1))), *((at, dict(address=0)) for at in (0, 1, 2, 3, 4, 5, 7, 8, 9)),
        (2, dict(shape=(1, 3))), (3, dict(address=4)), (4, dict(address=65)), (9, dict(shape=(1, 1))),
    ]  # fmt: skip
    for at, changes in wrong:
        with pytest.raises(ValueError, match="expected"):
            _cpu.speculative_sample_tree(*good[:at], described(_cpu, good[at], **changes), *good[at + 1 :])

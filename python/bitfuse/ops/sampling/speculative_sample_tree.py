"""speculative_sample_tree: which path of a tree of drafts a target model keeps, and the token after it."""

from __future__ import annotations

import torch

from ...core.backends import Backend
from ...core.declaration import Declaration, Make, Part, Sizes, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...core.tensors import check_tensor
from ...kernels.sampling import speculative_sample as triton
from ..linear.lowbit_linear import FLOATS
from . import speculative_sample_cpu as cpp
from .speculative_sample import MAX_VOCABULARY, _clamped, _fixed, _inverse_cdf, example_drafts

IDS = (torch.int32, torch.int64)


def _check(
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    parents: torch.Tensor,
    draft_rows: torch.Tensor | None,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    replacement: bool,
) -> None:
    if draft_probs.dim() != 3:
        raise ValueError(
            f"draft_probs has shape {list(draft_probs.shape)}, expected [batch, rows, vocabulary]"
        )
    check_tensor("draft_probs", draft_probs, FLOATS, tuple(draft_probs.shape), draft_probs.device)
    batch, rows, vocabulary = draft_probs.shape
    device = draft_probs.device
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"draft_probs has a vocabulary of {vocabulary}, expected 1 to {MAX_VOCABULARY}")
    nodes = draft_ids.shape[1] if draft_ids.dim() == 2 else 0
    check_tensor("draft_ids", draft_ids, IDS, (batch, nodes), device)
    check_tensor("parents", parents, IDS, (batch, nodes), device)
    if draft_rows is not None:
        check_tensor("draft_rows", draft_rows, IDS, (batch, nodes), device)
        if nodes and not rows:
            raise ValueError("draft_probs has 0 rows, expected one or more, for there are nodes")
    elif rows != nodes:
        raise ValueError(
            f"draft_probs has shape {list(draft_probs.shape)}, expected {nodes} rows, one a node, where "
            "draft_rows is None"
        )
    check_tensor("target_probs", target_probs, FLOATS, (batch, nodes + 1, vocabulary), device)
    check_tensor("uniforms", uniforms, (torch.float32, torch.float64), (batch, nodes + 1), device)


def _reference(
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    parents: torch.Tensor,
    draft_rows: torch.Tensor | None,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    replacement: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, nodes = draft_ids.shape
    rows, vocabulary = draft_probs.shape[1:]
    device = draft_ids.device
    each, u = torch.arange(batch, dtype=torch.int64, device=device), _clamped(uniforms)
    own = (
        torch.arange(nodes, dtype=torch.int64, device=device).expand(batch, -1)
        if draft_rows is None
        else draft_rows.long()
    )
    ids = draft_ids.long()
    exists = (ids >= 0) & (ids < vocabulary) & (own >= 0) & (own < rows)
    at = ids.clamp(0, vocabulary - 1)
    node = torch.full((batch,), -1, dtype=torch.int64, device=device)  # where the walk stands
    weights = _fixed(target_probs[:, 0].float())  # of the tokens that may follow it
    refused = torch.zeros_like(exists)  # its children that were
    left = torch.ones_like(node, dtype=torch.bool)  # something for another of them
    taken = torch.zeros_like(exists)
    for i in range(nodes):
        looked_at = exists[:, i] & (parents[:, i] == node) & left
        q, p = target_probs[each, node + 1].float(), draft_probs[each, own[:, i].clamp(0, rows - 1)].float()
        drafts = _fixed(p)
        p_total = drafts.sum(-1)
        if not replacement:
            p_total = (p_total - torch.where(refused, drafts.gather(-1, at), 0).sum(-1)).clamp(min=0)
        total, p_total = weights.sum(-1).double(), p_total.double()
        p_at, q_at, draft_at, weight_at = (
            t.gather(-1, at[:, i : i + 1]).squeeze(-1).double() for t in (p, q, drafts, weights)
        )
        first = ~refused.any(-1)
        # u p < q, each over its sum
        kept = torch.where(first, u[:, i] * p_at < q_at, u[:, i] * (draft_at * total) < weight_at * p_total)
        kept &= looked_at
        fails = looked_at & ~kept

        # relu(q - p), each over its sum
        scaled = (weights.double() * (p_total / total).unsqueeze(1)).to(torch.int64)
        rest = torch.where(first.unsqueeze(1), _fixed(q - p), (scaled - drafts).clamp(min=0))
        left = torch.where(fails, rest.sum(-1) > 0, left | kept)
        weights = torch.where((fails & left).unsqueeze(1), rest, weights)
        weights = torch.where(kept.unsqueeze(1), _fixed(target_probs[:, i + 1].float()), weights)
        refused[:, i] = fails
        refused &= ~kept.unsqueeze(1)
        taken[:, i] = kept
        node = torch.where(kept, i, node)
    accepted = taken.sum(-1)
    path = torch.where(taken, torch.arange(nodes, dtype=torch.int64, device=device), nodes).sort(-1).values
    tokens = torch.cat([at, torch.full_like(at[:, :1], -1)], 1) if nodes else at.new_full((batch, 1), -1)
    tokens = tokens.gather(1, torch.cat([path, torch.full_like(node, nodes).unsqueeze(1)], 1))
    token = _inverse_cdf(weights, uniforms[:, -1])
    tokens = tokens.scatter(1, accepted.unsqueeze(1), token.unsqueeze(1))
    return tokens, accepted, torch.where(path < nodes, path, -1)


def _fake(
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    parents: torch.Tensor,
    draft_rows: torch.Tensor | None,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    replacement: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, nodes = draft_ids.shape
    shapes: tuple[tuple[int, ...], ...] = ((batch, nodes + 1), (batch,), (batch, nodes))
    ids, accepted, path = (draft_ids.new_empty(shape, dtype=torch.int64) for shape in shapes)
    return ids, accepted, path


speculative_sample_tree_op = Op(
    "speculative_sample_tree(Tensor draft_probs, Tensor draft_ids, Tensor parents, Tensor? draft_rows, "
    "Tensor target_probs, Tensor uniforms, bool replacement) -> (Tensor, Tensor, Tensor)",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports_tree, cpp.run_tree),
        Backend("triton", ("cuda",), triton.supports_tree, triton.run_tree),
    ),
)


def _arguments(
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    parents: torch.Tensor,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    draft_rows: torch.Tensor | None,
    replacement: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, bool]:
    for name, t in (("draft_probs", draft_probs), ("draft_ids", draft_ids), ("parents", parents)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor")
    if not (draft_rows is None or isinstance(draft_rows, torch.Tensor)):
        raise TypeError(f"draft_rows is a {type(draft_rows).__name__}, expected a tensor or None")
    if parents.dim() == 1:
        parents = parents.expand(draft_ids.shape[0], -1)
    if draft_rows is not None and draft_rows.dim() == 1:
        draft_rows = draft_rows.expand(draft_ids.shape[0], -1)
    return draft_probs, draft_ids, parents, draft_rows, target_probs, uniforms, replacement


def speculative_sample_tree(
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    parents: torch.Tensor,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    draft_rows: torch.Tensor | None = None,
    replacement: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rejection sampling along a tree of drafts: the tokens come out as if the target model had sampled each
    of them (multi-step speculative sampling of SpecInfer: Miao et al., 2024; without replacement as in
    recursive rejection sampling: Jeon et al., 2024, and Sequoia: Chen et al., 2024).

    At a node, the root first, its children are looked at in their order. The first is accepted when
    uniform * p < q, as in `bitfuse.speculative_sample`; if it is not, q becomes relu(q - p), normalised, p
    loses its token, if the children are different ones, and is normalised, and the next child is looked at.
    The walk goes on at an accepted child, and ends where none is, with a token that the last uniform draws
    from what q has become. Probabilities are integers of 42 bits: every backend gives the same tokens. A tree
    without siblings gives those of `bitfuse.speculative_sample`.

    Args:
        draft_probs: [batch, rows, vocabulary], float32, float16 or bfloat16: what nodes were drawn from:
            filtered, as `bitfuse.sample` returns them with return_probs.
        draft_ids: int32 or int64 [batch, nodes]. An id outside the vocabulary (-1) is no node.
        parents: int32 or int64 [nodes] or [batch, nodes]: the node that each continues, which stands before
            it; -1 for the root, the tokens that are there already. A node whose parent is not before it is
            never reached.
        target_probs: [batch, nodes + 1, vocabulary]: the target's, after the root and after each node.
        uniforms: float32 or float64 [batch, nodes + 1], in [0, 1), independent of one another: each node's,
            and that of the last token. One outside counts as the nearest end, NaN as 0.
        draft_rows: int32 or int64 [nodes] or [batch, nodes]: the row of draft_probs that each node was drawn
            from; None: its own, of as many rows as nodes. Siblings share a row (`parents + 1` where
            draft_probs has a row for the root and one for each node), before anything was taken from it.
            A row that is not there makes no node.
        replacement: True where siblings were drawn independently of one another, from one row or from their
            own; False where each was drawn from what those before it had left.

    Returns:
        ids: int64 [batch, nodes + 1]: the accepted tokens, the one after them, then -1.
        accepted: int64 [batch]: how many nodes were.
        path: int64 [batch, nodes]: which ones, from the root on, then -1.

    Raises:
        TypeError: a dtype or a type that is not listed.
        ValueError: sizes that do not fit, tensors on two devices, a vocabulary above 2^20.
    """
    arguments = _arguments(draft_probs, draft_ids, parents, target_probs, uniforms, draft_rows, replacement)
    with torch.no_grad():
        return speculative_sample_tree_op(*arguments)


def _explain(
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    parents: torch.Tensor,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    draft_rows: torch.Tensor | None = None,
    replacement: bool = False,
) -> Explanation:
    arguments = _arguments(draft_probs, draft_ids, parents, target_probs, uniforms, draft_rows, replacement)
    return speculative_sample_tree_op.explain(*arguments)


def _example(s: Sizes, make: Make) -> tuple[torch.Tensor, ...]:
    probs, ids, target, uniforms = example_drafts(s, make)
    return probs, ids, make(s.batch, s.drafted, dtype=torch.int64), target, uniforms


declare(
    Declaration(
        speculative_sample_tree,
        "which path of a tree of drafts a target model keeps",
        place=3,
        explain=_explain,
        uses=("batch", "drafted", "vocab", "dtype"),
        arguments=_example,
        parts=(Part(speculative_sample_tree_op),),
        gradient=False,
    )
)

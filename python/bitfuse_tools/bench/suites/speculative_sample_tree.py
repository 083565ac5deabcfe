"""speculative_sample_tree: which path of a tree of drafts a target keeps, and the token after it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.sampling.speculative_sample_tree import speculative_sample_tree, speculative_sample_tree_op

from ..cases import Base, Contender, Layer, Problem, Setting, generator, named, randn, served
from ..timing import DTYPES

# three children of the root, three of the first of them, and so on: three levels
PARENTS = (-1, -1, -1, 0, 0, 0, 1, 1, 2, 3, 3, 4)
DEPTH = 3


@dataclass(frozen=True)
class SpeculativeSampleTree(Problem):
    op = "speculative_sample_tree"
    batch: int
    nodes: int
    vocab: int

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        s = setting.shape
        return [cls(batch, len(PARENTS), s.vocab, model=named(s)) for batch in setting.rows((1, 8))]

    def bounded(self) -> SpeculativeSampleTree:
        return replace(self, batch=min(self.batch, 8), vocab=min(self.vocab, 8192))

    def contenders(self, setting: Setting) -> list[Contender]:
        found = []
        for dtype in setting.of_x(("float32",)):
            make = functools.partial(self._contender, dtype, setting)
            found.append(
                make("torch, walked by the host", None, who="torch", label="torch", capturable=False)
            )
            for backend in setting.native(speculative_sample_tree_op):
                found.append(make(f"bitfuse ({backend})", backend, backend=backend))
        return found

    def _contender(self, dtype: str, setting: Setting, name: str, by: str | None, **more: Any) -> Contender:
        b, n, vocab = self.batch, self.nodes, self.vocab
        logits = functools.cache(lambda: 3 * randn(b, n + 1, vocab))
        near = functools.cache(lambda: (logits() + randn(b, n + 1, vocab, seed=1)).softmax(-1))
        draft = Base(lambda: setting.tensor(near(), dtype))
        target = Base(lambda: setting.tensor(logits().softmax(-1), dtype))
        parents = functools.cache(lambda: torch.tensor(PARENTS, dtype=torch.int64, device=setting.device))

        @functools.cache
        def drawn() -> torch.Tensor:
            rows = [PARENTS.index(p) for p in PARENTS]
            siblings = [i - row for i, row in enumerate(rows)]
            each = torch.multinomial(near().flatten(0, 1), 3, generator=generator(2)).view(b, n + 1, 3)
            ids = torch.stack([each[:, p + 1, s] for p, s in zip(PARENTS, siblings, strict=True)], 1)
            return ids.to(setting.device)

        uniforms = functools.cache(
            lambda: torch.rand(b, n + 1, generator=generator(3), dtype=torch.float32, device="cpu").to(
                setting.device
            )
        )

        def build(i: int) -> Layer:
            p, q, ids, u = draft(i, 2), target(i, 2), (drawn() + i) % vocab, uniforms()
            # a row of the draft and one of the target, for each node of the way at most
            own = 2.0 * DEPTH * b * vocab * DTYPES[dtype].itemsize
            if by is None:
                return Layer(lambda: _walked(p, ids, q, u), own)  # it draws the last token by itself

            def call() -> Any:
                return speculative_sample_tree(p, ids, parents(), q, u, parents() + 1)

            def exact() -> list[torch.Tensor]:
                tree = parents().expand(b, -1)
                return list(speculative_sample_tree_op.reference(p, ids, tree, tree + 1, q, u, False))

            return Layer(
                served(speculative_sample_tree_op, by, setting.device, call), own, exact, discrete=True
            )

        return Contender(name, dtype, build, 0.0, 8.0 * b * (n + 2), group=dtype, **more)


def _walked(p: torch.Tensor, ids: torch.Tensor, q: torch.Tensor, u: torch.Tensor) -> list[list[int]]:
    """A sequence at a time, as published code does it; siblings without replacement."""
    found = []
    for b in range(len(ids)):
        node, path, left, draft = -1, [], q[b, 0].float(), None
        for i, parent in enumerate(PARENTS):
            if parent != node:
                continue
            token = int(ids[b, i])
            draft = p[b, node + 1].float() if draft is None else draft
            if u[b, i] * draft[token] < left[token]:
                node, left, draft = i, q[b, i + 1].float(), None
                path.append(token)
            else:
                left = (left - draft).clamp(min=0)
                left, draft = left / left.sum(), draft.clone()
                draft[token] = 0
                draft /= draft.sum()
        found.append([*path, int(torch.multinomial(left, 1))])
    return found

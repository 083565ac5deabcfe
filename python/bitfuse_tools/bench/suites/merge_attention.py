"""merge_attention: attention over two sets of keys, from that over each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.attention.merge_attention import merge_attention, merge_attention_op

from ..cases import Contender, Layer, Problem, Setting, named, normal, served

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class MergeAttention(Problem):
    op = "merge_attention"
    batch: int
    seq: int
    heads: int
    head_dim: int

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        s = setting.shape
        pairs = (
            [(m, 1) for m in setting.m] if setting.m else [(64, 1), (1, 1024)][: 1 if setting.quick else 2]
        )
        return [cls(batch, seq, s.heads, s.head_dim, model=named(s)) for batch, seq in pairs]

    def bounded(self) -> MergeAttention:
        return replace(self, batch=min(self.batch, 4), seq=min(self.seq, 64))

    def contenders(self, setting: Setting) -> list[Contender]:
        found = []
        for dtype in setting.of_x(self.dtypes):
            make = functools.partial(self._contender, dtype, setting)
            found.append(make("torch", _plain, None, who="torch", label="torch"))
            if setting.gpu:
                found.append(make("flashinfer", None, None, who="flashinfer", label="flashinfer"))
            for backend in setting.native(merge_attention_op):
                found.append(make(f"bitfuse ({backend})", merge_attention, backend))
        return found

    def _contender(
        self, dtype: str, setting: Setting, name: str, way: Any, backend: str | None, **more: Any
    ) -> Contender:
        rows = (self.batch, self.seq, self.heads, self.head_dim)
        outs = [normal(setting, dtype, *rows, seed=seed) for seed in (0, 1)]
        lses = [normal(setting, None, self.batch, self.heads, self.seq, seed=seed) for seed in (2, 3)]

        def build(i: int) -> Layer:
            (o1, o2), (lse1, lse2) = (t(i, 3) for t in outs), (t(i, 1) for t in lses)

            def exact() -> list[torch.Tensor]:
                return list(_plain(o1.double(), lse1.double(), o2.double(), lse2.double()))

            nbytes = float(sum(t.nbytes for t in (o1, o2, lse1, lse2, o1, lse1)))  # one of each is written
            if way is None:
                return Layer(_flashinfer(o1, lse1, o2, lse2), nbytes, exact, self._of_flashinfer)
            call: Callable[[], Any] = functools.partial(way, o1, lse1, o2, lse2)
            if backend is not None:
                call = served(merge_attention_op, backend, setting.device, call)
            return Layer(call, nbytes, exact)

        return Contender(name, dtype, build, group=dtype, backend=backend, **more)

    def _of_flashinfer(self, found: Any) -> list[torch.Tensor]:
        out, lse = found
        shape = (self.batch, self.seq, self.heads)
        return [out.view(*shape, -1), lse.view(shape).transpose(1, 2) / LOG2_E]


def _plain(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.logaddexp(lse1, lse2)
    w1, w2 = ((t - lse).exp().transpose(1, 2).unsqueeze(-1) for t in (lse1, lse2))
    return (w1 * o1 + w2 * o2).to(o1.dtype), lse


def _flashinfer(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> Callable[[], Any]:
    """Its rows are [tokens, heads, head_dim], its lse [tokens, heads] in base 2."""
    import flashinfer

    outs = [o.flatten(0, 1) for o in (o1, o2)]
    lses = [(t.transpose(1, 2).flatten(0, 1) * LOG2_E).contiguous() for t in (lse1, lse2)]
    return lambda: flashinfer.merge_state(outs[0], lses[0], outs[1], lses[1])

"""speculative_sample: which tokens of a draft a target keeps, and the one after them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.sampling.speculative_sample import speculative_sample, speculative_sample_op

from ..cases import Base, Contender, Layer, Problem, Setting, generator, named, randn, served
from ..timing import DTYPES


@dataclass(frozen=True)
class SpeculativeSample(Problem):
    op = "speculative_sample"
    batch: int
    drafted: int
    vocab: int

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        s = setting.shape
        return [cls(batch, 4, s.vocab, model=named(s)) for batch in setting.rows((1, 8))]

    def bounded(self) -> SpeculativeSample:
        return replace(self, batch=min(self.batch, 8), vocab=min(self.vocab, 8192))

    def contenders(self, setting: Setting) -> list[Contender]:
        found = []
        for dtype in setting.of_x(("float32",)):
            make = functools.partial(self._contender, dtype, setting)
            found.append(make("torch, the reference", "reference", who="torch", label="torch"))
            for backend in setting.native(speculative_sample_op):
                found.append(make(f"bitfuse ({backend})", backend, backend=backend))
        return found

    def _contender(self, dtype: str, setting: Setting, name: str, by: str, **more: Any) -> Contender:
        b, n, vocab = self.batch, self.drafted, self.vocab
        draft = Base(lambda: setting.tensor((3 * randn(b, n, vocab)).softmax(-1), dtype))
        target = Base(lambda: setting.tensor((3 * randn(b, n + 1, vocab)).softmax(-1), dtype))
        drawn = functools.cache(
            lambda: torch.randint(
                0, vocab, (b, n), generator=generator(1), dtype=torch.int64, device="cpu"
            ).to(setting.device)
        )
        uniforms = functools.cache(
            lambda: torch.rand(b, n + 1, generator=generator(2), dtype=torch.float32, device="cpu").to(
                setting.device
            )
        )

        def build(i: int) -> Layer:
            args = (draft(i, 2), drawn(), target(i, 2), uniforms())
            call = served(speculative_sample_op, by, setting.device, lambda: speculative_sample(*args))

            def exact() -> list[torch.Tensor]:
                return list(speculative_sample_op.reference(*args))

            # of the draft and of the target one row each is read for the last token, of the others a number
            # each
            return Layer(call, 2.0 * b * vocab * DTYPES[dtype].itemsize, exact, discrete=True)

        return Contender(name, dtype, build, 0.0, 8.0 * b * (n + 2), group=dtype, **more)

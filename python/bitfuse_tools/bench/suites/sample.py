"""sample: a token a row from logits, after temperature, top-k and top-p."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.sampling.sample import sample, sample_op

from ..cases import Base, Contender, Layer, Problem, Setting, generator, named, randn, served

TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9


@dataclass(frozen=True)
class Sample(Problem):
    op = "sample"
    m: int
    vocab: int

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        s = setting.shape
        return [cls(m, s.vocab, model=named(s)) for m in setting.rows((1, 16))]

    def bounded(self) -> Sample:
        return replace(self, m=min(self.m, 16), vocab=min(self.vocab, 8192))

    def contenders(self, setting: Setting) -> list[Contender]:
        found = []
        for dtype in setting.of_x(("float32",)):
            make = functools.partial(self._contender, dtype, setting)
            found.append(make("torch, sort and multinomial", _torch, None, who="torch", label="torch"))
            if setting.gpu:
                found.append(make("flashinfer", _flashinfer, None, who="flashinfer", label="flashinfer"))
            for backend in setting.native(sample_op):
                found.append(make(f"bitfuse ({backend})", None, backend))
        return found

    def _contender(
        self, dtype: str, setting: Setting, name: str, way: Any, backend: str | None, **more: Any
    ) -> Contender:
        base = Base(lambda: setting.tensor(3 * randn(self.m, self.vocab), dtype))
        uniforms = functools.cache(
            lambda: setting.tensor(
                torch.rand(self.m, generator=generator(1), dtype=torch.float32, device="cpu")
            )
        )

        def build(i: int) -> Layer:
            logits = base(i, 1)
            if way is not None:
                return Layer(functools.partial(way, logits), logits.nbytes)  # it draws by itself

            def call() -> torch.Tensor:
                return sample(logits, uniforms(), TEMPERATURE, TOP_K, TOP_P)

            def exact() -> list[torch.Tensor]:
                top_k = torch.full((self.m,), TOP_K, dtype=torch.int64, device=logits.device)
                one = torch.ones(self.m, dtype=torch.float64, device=logits.device)
                return [
                    sample_op.reference(logits, uniforms(), TEMPERATURE * one, top_k, TOP_P * one, 0.0 * one)
                ]

            assert backend is not None
            run: Callable[[], Any] = served(sample_op, backend, setting.device, call)
            return Layer(run, logits.nbytes, exact, discrete=True)

        return Contender(name, dtype, build, 0.0, 8.0 * self.m, group=dtype, backend=backend, **more)


def _torch(logits: torch.Tensor) -> torch.Tensor:
    """As generation loops write it."""
    z = logits / TEMPERATURE
    z = z.masked_fill(z < z.topk(TOP_K, -1).values[:, -1:], -torch.inf)
    ordered, ids = z.sort(-1, descending=True)
    p = ordered.softmax(-1)
    p = torch.where(p.cumsum(-1) - p < TOP_P, p, 0.0)
    return ids.gather(-1, torch.multinomial(p, 1)).squeeze(-1)


def _flashinfer(logits: torch.Tensor) -> torch.Tensor:
    import flashinfer

    return flashinfer.sampling.top_k_top_p_sampling_from_logits(logits / TEMPERATURE, TOP_K, TOP_P)

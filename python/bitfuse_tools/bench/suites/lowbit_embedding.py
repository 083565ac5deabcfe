"""lowbit_embedding: rows of a few-bit matrix by their numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.linear.lowbit_embedding import lowbit_embedding, lowbit_embedding_op
from bitfuse.weights.formats import FORMATS as ALL

from ..cases import Contender, Layer, Problem, Setting, named, served, weights
from ..timing import DTYPES

FORMATS = ("int4", "nf4", "int8")
TOKENS = (1, 512, 4096)
VOCAB = 32_768  # rows: those of a bigger vocabulary lie no farther apart for who reads one


@dataclass(frozen=True)
class LowBitEmbedding(Problem):
    op = "lowbit_embedding"
    formats = tuple(ALL)
    tokens: int
    n: int
    k: int

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        s = setting.shape
        return [cls(m, VOCAB, s.hidden, model=named(s)) for m in setting.rows(TOKENS, (512,))]

    def bounded(self) -> LowBitEmbedding:
        return replace(self, tokens=min(self.tokens, 64), n=min(self.n, 512), k=min(self.k, 512))

    @property
    def needs_grad(self) -> bool:
        return False

    def contenders(self, setting: Setting) -> list[Contender]:
        found = []
        for dtype in setting.of_x():
            found.append(self._contender(dtype, setting, "torch", None, who="torch", label="torch"))
            for format in setting.of_weights(FORMATS):
                for backend in setting.native(lowbit_embedding_op):
                    name = f"bitfuse {format} ({backend})"
                    found.append(self._contender(dtype, setting, name, format, backend))
        return found

    def _contender(
        self,
        dtype: str,
        setting: Setting,
        name: str,
        format: str | None,
        backend: str | None = None,
        **more: Any,
    ) -> Contender:
        def build(i: int) -> Layer:
            call: Callable[[], Any]
            numbers: Callable[[], torch.Tensor]
            own = weights(self.n, self.k, setting.device)
            random = torch.Generator(device="cpu").manual_seed(i)
            indices = torch.randint(self.n, (self.tokens,), generator=random, dtype=torch.int64, device="cpu")
            indices = indices.to(setting.device)
            written = self.tokens * self.k * DTYPES[dtype].itemsize + indices.nbytes
            if format is None:
                dense = own.dense(dtype, i)
                call = functools.partial(torch.nn.functional.embedding, indices, dense)
                read = dense.nbytes
                numbers = functools.partial(own.plain, i)
            else:
                w = own.few_bit(format, i)
                run = functools.partial(lowbit_embedding, indices, w, DTYPES[dtype])
                assert backend is not None
                call = served(lowbit_embedding_op, backend, setting.device, run)
                read = w.nbytes
                numbers = w.dequantize
            nbytes = float(written + read * self.tokens / self.n)
            return Layer(call, nbytes, lambda: [numbers()[indices].double()])

        return Contender(name, dtype, build, group=dtype, backend=backend, format=format, **more)

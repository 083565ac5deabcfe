"""rope: rotary position embedding of queries, and of keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.attention.rope import rope, rope_op

from ..cases import Base, Contender, Layer, Problem, Setting, named, randn, served

TOKENS = ((64, 1), (1, 2048))
FIRST = 1000  # position: at 0 nothing turns


@dataclass(frozen=True)
class Rope(Problem):
    op = "rope"
    batch: int
    seq: int
    heads: int
    head_dim: int

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        s = setting.shape
        pairs = [(m, 1) for m in setting.m] if setting.m else TOKENS[: 1 if setting.quick else 2]
        return [cls(batch, seq, s.heads, s.head_dim, model=named(s)) for batch, seq in pairs]

    def bounded(self) -> Rope:
        return replace(self, batch=min(self.batch, 4), seq=min(self.seq, 64))

    def contenders(self, setting: Setting) -> list[Contender]:
        found = []
        for dtype in setting.of_x(self.dtypes):
            make = functools.partial(self._contender, dtype, setting)
            found.append(make("torch", self._torch, None, who="torch", label="torch"))
            if setting.gpu:
                found.append(make("flash-attn", self._flash, None, who="flash-attn", label="flash-attn"))
            for backend in setting.native(rope_op):
                found.append(make(f"bitfuse ({backend})", self._bitfuse, backend))
        return found

    def tables(self, setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each position, float32 [seq, head_dim / 2]."""
        inverse = 10000.0 ** -(
            torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        )
        angles = (
            torch.arange(FIRST, FIRST + self.seq, dtype=torch.float32, device="cpu").unsqueeze(1) * inverse
        )
        return setting.tensor(angles.cos()), setting.tensor(angles.sin())

    def _contender(
        self, dtype: str, setting: Setting, name: str, way: Any, backend: str | None, **more: Any
    ) -> Contender:
        xs = Base(lambda: setting.tensor(randn(self.batch, self.seq, self.heads, self.head_dim), dtype))
        tables = functools.cache(lambda: self.tables(setting))

        def build(i: int) -> Layer:
            x, (cos, sin) = xs(i, 3), tables()
            call: Callable[[], Any] = functools.partial(way(cos, sin, x.dtype), x)
            if backend is not None:
                call = served(rope_op, backend, setting.device, call)

            def exact() -> list[torch.Tensor]:
                a, b = x.double().chunk(2, -1)
                c, s = (t.double().unsqueeze(1) for t in (cos, sin))
                return [torch.cat((a * c - b * s, b * c + a * s), -1)]

            return Layer(call, 2.0 * x.nbytes, exact)

        tables_read = 4.0 * self.seq * self.head_dim
        return Contender(name, dtype, build, 0.0, tables_read, group=dtype, backend=backend, **more)

    def _torch(self, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> Any:
        """As models write it: tables of both halves in x's dtype, and the halves swapped."""
        wide_cos, wide_sin = (torch.cat((t, t), -1).to(dtype).unsqueeze(1) for t in (cos, sin))

        def call(x: torch.Tensor) -> torch.Tensor:
            a, b = x.chunk(2, -1)
            return x * wide_cos + torch.cat((-b, a), -1) * wide_sin

        return call

    def _flash(self, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> Any:
        from flash_attn.layers.rotary import apply_rotary_emb

        narrow = cos.to(dtype), sin.to(dtype)
        return lambda x: apply_rotary_emb(x, *narrow)

    def _bitfuse(self, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> Any:
        return lambda x: rope(x, cos, sin)

"""append_kv: one new token a sequence into a cache, its key rotated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.attention.append_kv import KVCache, append_kv, append_kv_op
from bitfuse.ops.attention.kv_cache import CACHE_FORMATS, rotate

from ..cases import Contender, Layer, Problem, Setting, named, randn, served
from ..timing import DTYPES

FORMATS = ("none", "fp8", "int8")
LENGTH = 128  # tokens that are there: the new one closes a group of codes


@dataclass(frozen=True)
class AppendKV(Problem):
    op = "append_kv"
    formats = CACHE_FORMATS
    batch: int
    kv_heads: int
    head_dim: int

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        s = setting.shape
        batches = setting.rows((1, 64), (16,))
        return [cls(batch, s.kv_heads, s.head_dim, model=named(s)) for batch in batches]

    def bounded(self) -> AppendKV:
        return replace(self, batch=min(self.batch, 8))

    def contenders(self, setting: Setting) -> list[Contender]:
        wanted = FORMATS if setting.formats is None else [f for f in CACHE_FORMATS if f in setting.formats]
        found = []
        for dtype in setting.of_x(self.dtypes):
            found.append(
                self._contender(
                    "torch, as models do", dtype, setting, "none", None, who="torch", label="torch"
                )
            )
            for backend in setting.native(append_kv_op):
                for format in wanted:
                    stored = dtype if format == "none" else format
                    name = f"bitfuse {stored} ({backend})"
                    found.append(self._contender(name, dtype, setting, format, backend, format=format))
        return found

    def _contender(
        self, name: str, dtype: str, setting: Setting, stored: str, backend: str | None, **more: Any
    ) -> Contender:
        def build(i: int) -> Layer:
            new = [
                setting.tensor(randn(self.batch, 1, self.kv_heads, self.head_dim, seed=seed), dtype).roll(
                    i, 3
                )
                for seed in (0, 1)
            ]
            k, v = new
            cache = KVCache(
                self.batch, LENGTH + 1, self.kv_heads, self.head_dim, dtype=k.dtype, format=stored,
                device=setting.device,
            )  # fmt: skip
            # the cache is as long as a group of codes and a token; only the token is written
            cache.seqlens.fill_(LENGTH)
            angles = torch.arange(LENGTH + 1, dtype=torch.float32, device="cpu").unsqueeze(1) * 10000.0 ** -(
                torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
            )
            cos, sin = setting.tensor(angles.cos()), setting.tensor(angles.sin())
            rows = torch.arange(self.batch, dtype=torch.int64, device=setting.device)
            at = cache.seqlens.long()

            def plain() -> None:
                a, b = k.chunk(2, -1)
                c, s = (torch.cat((t[at], t[at]), -1).to(k.dtype)[:, None, None] for t in (cos, sin))
                cache.tensors.k[rows, at] = (k * c + torch.cat((-b, a), -1) * s)[:, 0]
                cache.tensors.v[rows, at] = v[:, 0]

            def ours() -> None:
                append_kv(k, v, cache, cache_seqlens=cache.seqlens, rotary_cos=cos, rotary_sin=sin)

            def exact() -> list[torch.Tensor]:
                turned = rotate(k.double(), cos[LENGTH:], sin[LENGTH:], False)
                return [turned[:, 0], v.double()[:, 0]]

            def read(_: Any) -> list[torch.Tensor]:
                cache.seqlens.fill_(LENGTH + 1)
                pairs = [cache.gather(b) for b in range(self.batch)]
                cache.seqlens.fill_(LENGTH)
                return [torch.stack([t[LENGTH] for t in kind]) for kind in zip(*pairs, strict=True)]

            call: Callable[[], Any] = plain
            if backend is not None:
                call = served(append_kv_op, backend, setting.device, ours)
            return Layer(call, float(k.nbytes + v.nbytes), exact, read, held_bytes=cache.nbytes)

        written = (
            2.0
            * self.batch
            * self.kv_heads
            * self.head_dim
            * (1 if stored == "fp8" else DTYPES[dtype].itemsize)
        )
        return Contender(name, dtype, build, 0.0, written, group=dtype, backend=backend, **more)

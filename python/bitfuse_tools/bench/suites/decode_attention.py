"""decode_attention: one token a sequence against its cache, full or in few bits, contiguous or in pages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.attention.append_kv import KVCache
from bitfuse.ops.attention.decode_attention import decode_attention, decode_attention_op
from bitfuse.ops.attention.kv_cache import CACHE_FORMATS

from .. import peers
from ..cases import Contender, Layer, Problem, Setting, named, normal, randn, served
from ..timing import DTYPES

LENGTHS = (512, 4096, 16384)
BATCHES = (1, 8)
MOST = 65536  # keys of a batch; larger problems are left out
PAGES = (None, 16)


@dataclass(frozen=True)
class DecodeAttention(Problem):
    op = "decode_attention"
    formats = CACHE_FORMATS
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        s, name = setting.shape, named(setting.shape)
        most = MOST * (16 if setting.gpu else 1)
        return [
            cls(batch, length, s.heads, s.kv_heads, s.head_dim, model=name)
            for batch in setting.m or ((1,) if setting.quick else BATCHES)
            for length in ((1024,) if setting.quick else LENGTHS)
            if batch * length <= most
        ]

    def bounded(self) -> DecodeAttention:
        group = self.heads // self.kv_heads
        kv_heads = max(1, min(self.kv_heads, 8 // group))
        sizes: dict[str, Any] = {"batch": min(self.batch, 2), "heads": kv_heads * group, "kv_heads": kv_heads}
        return replace(self, length=min(self.length, 512), **sizes)

    def contenders(self, setting: Setting) -> list[Contender]:
        formats = (
            CACHE_FORMATS if setting.formats is None else [f for f in CACHE_FORMATS if f in setting.formats]
        )
        found = []
        for dtype in setting.of_x():
            parts = _Parts(self, dtype, setting)
            named_peers: list[tuple[str, str, str, Callable[[int], Layer]]] = [
                ("torch sdpa, enable_gqa", "torch", "torch sdpa", parts.sdpa),
                ("torch matmul, heads grouped", "torch", "torch matmul", parts.grouped),
            ]
            if setting.gpu and dtype != "float32":
                named_peers += [
                    ("flash-attn", "flash-attn", "flash-attn", parts.flash),
                    ("flashinfer, pages of 16", "flashinfer", "flashinfer", parts.flashinfer),
                ]
            for name, who, label, build in named_peers:
                found.append(self._contender(name, dtype, build, who=who, label=label))
            for backend in setting.native(decode_attention_op):
                plain = f"bitfuse {dtype}, contiguous ({backend})"
                for format in formats:
                    for page in PAGES if format == "none" else (None, 64) if format == "int8" else (None,):
                        where = "contiguous" if page is None else f"pages of {page}"
                        name = f"bitfuse {dtype if format == 'none' else format}, {where} ({backend})"
                        build = functools.partial(parts.bitfuse, backend, format, page)
                        base = plain if name != plain and "none" in formats else None
                        found.append(
                            self._contender(name, dtype, build, backend=backend, format=format, base=base)
                        )
        return found

    def _contender(self, name: str, dtype: str, build: Callable[[int], Layer], **more: Any) -> Contender:
        flops = 4.0 * self.batch * self.length * self.heads * self.head_dim
        q_and_out = 2.0 * self.batch * self.heads * self.head_dim * DTYPES[dtype].itemsize
        return Contender(name, dtype, build, flops, q_and_out, group=dtype, **more)

    @classmethod
    def overhead(cls) -> dict[str, Callable[[], Any]]:
        cache = KVCache(1, 2, 1, 8, dtype=torch.float32)
        k, q = randn(1, 1, 1, 8), randn(1, 1, 1, 8)
        cache.append(k, k)
        dense, length, first = cache.tensors, cache.seqlens, q.transpose(1, 2)
        return {
            "bitfuse, a KVCache": lambda: decode_attention(q, cache),
            "bitfuse, tensors": lambda: decode_attention(q, dense.k, dense.v, length),
            "torch sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(first, first, first),
        }


class _Parts:
    """Keys and values that each layer rolls, the query, and how each contender calls."""

    def __init__(self, problem: DecodeAttention, dtype: str, setting: Setting) -> None:
        p, self.problem, self.dtype, self.setting = problem, problem, dtype, setting
        place = (p.batch, p.length, p.kv_heads, p.head_dim)
        self._k, self._v = (normal(setting, dtype, *place, seed=seed) for seed in (0, 1))
        self.q = functools.cache(
            lambda: setting.tensor(randn(p.batch, 1, p.heads, p.head_dim, seed=2), dtype)
        )

    def kv(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._k(i, 1), self._v(i, 1)

    def exact(self, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        p = self.problem
        q, k, v = (t.double().transpose(1, 2) for t in (self.q(), k, v))
        k, v = (t.repeat_interleave(p.heads // p.kv_heads, 1) for t in (k, v))
        return [(torch.softmax(q @ k.transpose(-1, -2) * p.head_dim**-0.5, -1) @ v).transpose(1, 2)]

    def _dense(
        self, i: int, call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any], first: bool
    ) -> Layer:
        """A layer of a peer; `first`: heads come before tokens, as torch's own caches lie."""
        k, v = self.kv(i)
        k, v = ((t.transpose(1, 2).contiguous() if first else t) for t in (k, v))
        q = self.q()

        def exact() -> list[torch.Tensor]:
            return self.exact(*((t.transpose(1, 2) if first else t) for t in (k, v)))

        shape = q.shape
        return Layer(lambda: call(q, k, v), k.nbytes + v.nbytes, exact, lambda found: [_as(found, shape)])

    def sdpa(self, i: int) -> Layer:
        attend = torch.nn.functional.scaled_dot_product_attention
        return self._dense(i, lambda q, k, v: attend(q.transpose(1, 2), k, v, enable_gqa=True), True)

    def grouped(self, i: int) -> Layer:
        p = self.problem

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            rows = q.view(p.batch, p.kv_heads, p.heads // p.kv_heads, p.head_dim) * p.head_dim**-0.5
            weights = torch.softmax(rows @ k.transpose(-1, -2), -1, dtype=torch.float32).to(q.dtype)
            return (weights @ v).view(q.shape)

        return self._dense(i, call, True)

    def flash(self, i: int) -> Layer:
        from flash_attn import flash_attn_with_kvcache

        p = self.problem
        lengths = torch.full((p.batch,), p.length, dtype=torch.int32, device=self.setting.device)
        return self._dense(
            i, lambda q, k, v: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True), False
        )

    def flashinfer(self, i: int) -> Layer:
        k, v = self.kv(i)
        run, q = peers.flashinfer_decode(k, v, self.problem.heads, 16), self.q().squeeze(1)
        return Layer(
            lambda: run(q), k.nbytes + v.nbytes, lambda: self.exact(k, v), lambda found: [found.unsqueeze(1)]
        )

    def bitfuse(self, backend: str, format: str, page: int | None, i: int) -> Layer:
        p, (k, v), q = self.problem, self.kv(i), self.q()
        cache = KVCache(
            p.batch, p.length, p.kv_heads, p.head_dim, dtype=k.dtype, format=format, page_size=page,
            device=self.setting.device,
        )  # fmt: skip
        if cache.block_table is not None:
            order = torch.randperm(cache.block_table.numel(), dtype=torch.int32, device="cpu")
            cache.block_table.copy_(order.view_as(cache.block_table))
        cache.append(k, v)

        def exact() -> list[torch.Tensor]:
            keys, values = zip(*(cache.gather(b) for b in range(p.batch)), strict=True)
            return self.exact(torch.stack(keys), torch.stack(values))

        call = served(decode_attention_op, backend, self.setting.device, lambda: decode_attention(q, cache))
        return Layer(call, cache.nbytes, exact)


def _as(found: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[batch, 1, heads, dim] of what may be [batch, heads, 1, dim]."""
    return found if found.shape == shape else found.transpose(1, 2)

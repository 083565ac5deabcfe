"""quantize_kv: keys and values as the codes of a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.attention.append_kv import KVCache
from bitfuse.ops.attention.kv_cache import BITS, gather
from bitfuse.ops.attention.quantize_kv import QuantizedKV, quantize_kv, quantize_kv_op

from ..cases import Contender, Layer, Problem, Setting, named, normal, served

FORMATS = ("fp8", "int8", "int4")


@dataclass(frozen=True)
class QuantizeKV(Problem):
    op = "quantize_kv"
    formats = FORMATS
    batch: int
    seq: int
    kv_heads: int
    head_dim: int

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        s = setting.shape
        seq = 256 if setting.quick else 2048
        return [cls(batch, seq, s.kv_heads, s.head_dim, model=named(s)) for batch in setting.m or (1,)]

    def bounded(self) -> QuantizeKV:
        return replace(self, batch=min(self.batch, 2), seq=min(self.seq, 128))

    def contenders(self, setting: Setting) -> list[Contender]:
        formats = FORMATS if setting.formats is None else [f for f in FORMATS if f in setting.formats]
        found = []
        for dtype in setting.of_x(self.dtypes):
            for format in formats:
                name = f"torch, the reference, {format}"
                found.append(
                    self._contender(name, dtype, setting, format, "reference", who="torch", label="torch")
                )
                for backend in setting.native(quantize_kv_op):
                    name = f"bitfuse {format} ({backend})"
                    found.append(
                        self._contender(name, dtype, setting, format, backend, backend=backend, format=format)
                    )
        return found

    def _contender(
        self, name: str, dtype: str, setting: Setting, stored: str, by: str, **more: Any
    ) -> Contender:
        shape = (self.batch, self.seq, self.kv_heads, self.head_dim)
        ks, vs = (normal(setting, dtype, *shape, seed=seed) for seed in (0, 1))

        codes = 2.0 * self.batch * self.seq * self.kv_heads * self.head_dim * BITS.get(stored, 8) / 8

        def build(i: int) -> Layer:
            k, v = ks(i), vs(i)
            call = served(quantize_kv_op, by, setting.device, lambda: quantize_kv(k, v, stored))

            def read(found: QuantizedKV) -> list[torch.Tensor]:
                return _dequantized(found, k, stored)

            return Layer(call, k.nbytes + v.nbytes + codes, lambda: [k.double(), v.double()], read)

        return Contender(name, dtype, build, group=f"{stored} {dtype}", **more)


def _dequantized(found: QuantizedKV, k: torch.Tensor, format: str) -> list[torch.Tensor]:
    """What a cache that holds these codes gives."""
    batch, seq, heads, dim = k.shape
    if format == "fp8":
        scales = [t.double().view(1, 1, -1, 1) for t in (found.k_scales, found.v_scales)]
        return [t.double() * s for t, s in zip((found.k, found.v), scales, strict=True)]
    cache = KVCache(batch, seq, heads, dim, dtype=k.dtype, format=format, device=k.device)
    tensors = cache.tensors._replace(**found._asdict())
    pairs = [gather(tensors, b, seq, torch.float32) for b in range(batch)]
    return [torch.stack(kind) for kind in zip(*pairs, strict=True)]

"""attention: against torch's scaled_dot_product_attention, forward, and forward with backward ("training").

torch gets its own layout, [batch, heads, seq, dim], contiguous; the others [batch, seq, heads, dim]. A window
is a mask to torch. FLOPs are those of the pairs that are seen: 4 dim each, two and a half times as many
backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.attention.attention import attention, attention_backward, attention_op

from ..cases import Contender, Layer, Problem, Setting, named, randn, served
from ..timing import DTYPES


@dataclass(frozen=True)
class Attention(Problem):
    """`window` counts the keys that a query sees, 0 for all."""

    op = "attention"
    batch: int
    heads: int
    kv_heads: int
    seqlen: int
    dim: int
    causal: bool = True
    window: int = 0
    direction: str = "forward"

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        shape, name = setting.shape, named(setting.shape)
        long = (2048 if setting.quick else 16384) if setting.gpu else (256 if setting.quick else 1024)
        directions = setting.towards(("forward", "training"))
        both = None if setting.gpu else ("bfloat16", "float32")
        model = cls(1, shape.heads, shape.kv_heads, long, shape.head_dim, model=name, layer="gqa")
        if name is not None or setting.quick:
            found = [replace(model, layer="prefill"), replace(model, layer="training", direction="training")]
        else:
            plain = replace(model, kv_heads=shape.heads, layer="prefill", dtypes=both)
            small = cls(
                32, 12, 12, 128, 32, False, layer="embedder 128", dtypes=("float16",) if setting.gpu else both
            )
            found = [
                plain,
                replace(plain, causal=False, layer="full", dtypes=None),
                model,
                replace(model, seqlen=2 * long, window=256, layer="window"),
                cls(4, 16, 16, long // 2, 64, layer="dim64"),
                replace(plain, direction="training", layer="training"),
                replace(plain, direction="training", causal=False, layer="training full", dtypes=None),
                replace(model, direction="training", layer="training gqa"),
                replace(small, seqlen=20, layer="embedder 20"),
                small,
                replace(small, seqlen=256, layer="embedder 256"),
                replace(small, direction="training", layer="tuning"),
            ]
        found = [p for p in found if p.direction in directions]
        return [replace(p, batch=m) for m in setting.m for p in found] if setting.m else list(found)

    def bounded(self) -> Attention:
        group = self.heads // self.kv_heads
        kv_heads = max(1, min(self.kv_heads, 8 // group))
        sizes: dict[str, Any] = {"batch": min(self.batch, 2), "heads": kv_heads * group, "kv_heads": kv_heads}
        return replace(self, seqlen=min(self.seqlen, 256), window=min(self.window, 64), **sizes)

    @property
    def streamed(self) -> bool:
        return False  # arithmetic is what takes the time, and the tensors are large

    @property
    def pairs(self) -> int:
        """Of query and key, that are seen in one head."""
        if not self.causal:
            return self.seqlen**2
        seen = min(self.window or self.seqlen, self.seqlen)
        return seen * (seen + 1) // 2 + (self.seqlen - seen) * seen

    def contenders(self, setting: Setting) -> list[Contender]:
        found = []
        for dtype in setting.of_x(self.dtypes):
            parts = _Parts(self, dtype, setting)
            found.append(self._contender("torch", dtype, parts.torch, who="torch", label="torch"))
            if setting.gpu and dtype != "float32":
                found.append(
                    self._contender("flash-attn", dtype, parts.flash, who="flash-attn", label="flash-attn")
                )
                if not self.needs_grad and self.batch == 1:
                    found.append(
                        self._contender(
                            "flashinfer", dtype, parts.flashinfer, who="flashinfer", label="flashinfer"
                        )
                    )
            for backend in setting.native(attention_backward if self.needs_grad else attention_op):
                build = functools.partial(parts.bitfuse, backend)
                found.append(self._contender(f"bitfuse ({backend})", dtype, build, backend=backend))
        return found

    def _contender(self, name: str, dtype: str, build: Callable[[int], Layer], **more: Any) -> Contender:
        flops = 4.0 * self.batch * self.heads * self.pairs * self.dim * (3.5 if self.needs_grad else 1)
        return Contender(name, dtype, build, flops, group=dtype, **more)

    def nbytes(self, dtype: str) -> float:
        """q, k, v and out; backward reads them and the gradient of out, and writes three gradients."""
        rows = self.batch * self.seqlen * self.dim * DTYPES[dtype].itemsize
        return float(rows * (self.heads * 2 + self.kv_heads * 2) * (3 if self.needs_grad else 1))

    @classmethod
    def overhead(cls) -> dict[str, Callable[[], Any]]:
        q = randn(1, 1, 1, 16)
        theirs = torch.nn.functional.scaled_dot_product_attention
        return {"torch": lambda: theirs(q, q, q), "bitfuse": lambda: attention(q, q, q)}


class _Parts:
    """Tensors that the contenders of one dtype share, and how each calls."""

    def __init__(self, problem: Attention, dtype: str, setting: Setting) -> None:
        self.problem, self.dtype, self.setting = problem, dtype, setting
        self.tensors = functools.cache(self._make)

    def _make(self) -> list[torch.Tensor]:
        """q, k, v, and the gradient of out."""
        p = self.problem
        return [
            self.setting.tensor(randn(p.batch, p.seqlen, heads, p.dim, seed=i), self.dtype)
            for i, heads in enumerate((p.heads, p.kv_heads, p.kv_heads, p.heads))
        ]

    def _layer(
        self, attend: Callable[..., Any], heads_first: bool = False, backend: str | None = None
    ) -> Layer:
        p = self.problem
        tensors = [t.transpose(1, 2).contiguous() if heads_first else t for t in self.tensors()]
        given, grad = [t.detach().requires_grad_(p.needs_grad) for t in tensors[:3]], tensors[3]

        def call() -> Any:
            if not p.needs_grad:
                return attend(*given)
            out = attend(*given)
            return out, *torch.autograd.grad(out, given, grad)

        def read(found: Any) -> list[torch.Tensor]:
            several = list(found) if isinstance(found, tuple) else [found]
            return [t.transpose(1, 2) for t in several] if heads_first else several

        if backend is not None:
            op = attention_backward if p.needs_grad else attention_op
            call = served(op, backend, self.setting.device, call)
        return Layer(call, p.nbytes(self.dtype), self._exact, read)

    def _exact(self) -> list[torch.Tensor]:
        p = self.problem
        q, k, v, grad = (t.double().transpose(1, 2) for t in self.tensors())
        with torch.set_grad_enabled(p.needs_grad):
            given = [t.detach().requires_grad_(p.needs_grad) for t in (q, k, v)]
            k, v = (t.repeat_interleave(p.heads // p.kv_heads, 1) for t in given[1:])
            logits = given[0] @ k.transpose(-1, -2) * p.dim**-0.5
            if (mask := self._mask()) is not None:
                logits = logits.masked_fill(~mask, -torch.inf)
            out = torch.softmax(logits, -1) @ v
            found = [out, *(torch.autograd.grad(out, given, grad) if p.needs_grad else ())]
        return [t.detach().transpose(1, 2) for t in found]

    def _mask(self, window_only: bool = False) -> torch.Tensor | None:
        p = self.problem
        if not (p.window or (p.causal and not window_only)):
            return None
        mask = torch.ones(p.seqlen, p.seqlen, dtype=torch.bool, device=self.setting.device).tril()
        return mask.triu(1 - p.window) if p.window else mask

    def torch(self, i: int) -> Layer:
        p, mask = self.problem, self._mask(window_only=True)
        attend = functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            attn_mask=mask,
            is_causal=p.causal and mask is None,
            enable_gqa=p.heads != p.kv_heads,
        )
        return self._layer(attend, heads_first=True)

    def bitfuse(self, backend: str, i: int) -> Layer:
        p = self.problem
        attend = functools.partial(attention, causal=p.causal, window_size=self._window())
        return self._layer(attend, backend=backend)

    def _window(self) -> tuple[int, int]:
        return (self.problem.window - 1, -1) if self.problem.window else (-1, -1)

    def flash(self, i: int) -> Layer:
        from flash_attn import flash_attn_func

        left, _ = self._window()
        window = (left, 0) if left >= 0 else (-1, -1)
        return self._layer(functools.partial(flash_attn_func, causal=self.problem.causal, window_size=window))

    def flashinfer(self, i: int) -> Layer:
        import flashinfer

        p, (left, _) = self.problem, self._window()

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            found = flashinfer.single_prefill_with_kv_cache(
                q[0], k[0], v[0], causal=p.causal, window_left=left
            )
            return found.unsqueeze(0)

        return self._layer(attend)

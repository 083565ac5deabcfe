"""multi_lora_linear: many adapters in one batch, against the product without adapters and a loop.

Mixes of who asks for which adapter: "none" (no adapter is active), "identical" (all rows one), "distinct"
(each row its own, as far as there are as many), "uniform", "zipf" (the i-th with weight 1 / i) and "skewed"
(nine rows in ten have one). The loop is plain PyTorch: for each adapter in the batch, the product of its
rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.linear.lowbit_linear import lowbit_linear
from bitfuse.ops.linear.multi_lora_linear import multi_lora_add_, multi_lora_linear
from bitfuse.weights.formats import FORMATS as ALL
from bitfuse.weights.quantize import quantize
from bitfuse.weights.weight import LowBitWeight

from ..cases import Base, Contender, Layer, Problem, Setting, generator, named, randn, served, weights
from ..timing import DTYPES

MIXES = ("none", "identical", "distinct", "uniform", "zipf", "skewed")
FORMATS = ("dense", "int4")
ROWS = (1, 16, 64, 512, 2048)
PREFILL = 256  # rows from which a layer's work, not its weights, is what takes the time


def ids_of(mix: str, m: int, count: int) -> torch.Tensor:
    """Each row's adapter."""
    if mix == "none":
        return torch.full((m,), -1, dtype=torch.int64, device="cpu")
    if mix == "identical":
        return torch.zeros(m, dtype=torch.int64, device="cpu")
    if mix == "distinct":
        return torch.arange(m, dtype=torch.int64, device="cpu") % count
    random = generator()
    if mix == "zipf":
        weights = 1.0 / torch.arange(1, count + 1, dtype=torch.float32, device="cpu")
        return torch.multinomial(weights, m, replacement=True, generator=random)
    ids = torch.randint(0, count, (m,), generator=random, dtype=torch.int64, device="cpu")
    if mix != "skewed":
        return ids
    return torch.where(torch.rand(m, generator=random, dtype=torch.float32, device="cpu") < 0.9, 0, ids)


@dataclass
class Parts:
    """A weight and its adapters, stacked."""

    w: torch.Tensor | LowBitWeight
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: torch.Tensor

    def base(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.w, torch.Tensor):
            return torch.nn.functional.linear(x, self.w)
        return lowbit_linear(x, self.w)

    def bitfuse(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return multi_lora_linear(x, self.w, self.lora_A, self.lora_B, self.scaling, ids)

    def loop(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        y = self.base(x)
        for e in ids.unique().tolist():
            if e >= 0:
                rows = (ids == e).nonzero().squeeze(1)
                h = linear(x[rows], self.lora_A[e])
                y.index_add_(0, rows, linear(h, self.lora_B[e]) * self.scaling[e].to(x.dtype))
        return y

    def exact(self, x: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
        w = self.w if isinstance(self.w, torch.Tensor) else self.w.dequantize(torch.float32)
        x = x.double()
        y = x @ w.double().t()
        for row, e in enumerate(ids.tolist()):
            if e >= 0:
                y[row] += (
                    (x[row] @ self.lora_A[e].double().t()) @ self.lora_B[e].double().t() * self.scaling[e]
                )
        return [y]


@dataclass(frozen=True)
class MultiLoraLinear(Problem):
    op = "multi_lora_linear"
    formats = (*ALL, "dense")
    m: int
    n: int
    k: int
    adapters: int = 64
    rank: int = 16

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        name = named(setting.shape)
        return [
            cls(m, n, k, model=name, layer=layer)
            for layer, (n, k) in setting.shape.linears.items()
            for m in setting.rows(ROWS, (16,))
        ]

    def bounded(self) -> MultiLoraLinear:
        sizes: dict[str, Any] = {"m": min(self.m, 32), "n": min(self.n, 512), "k": min(self.k, 512)}
        return replace(self, adapters=min(self.adapters, 16), **sizes)

    @property
    def streamed(self) -> bool:
        return self.m < PREFILL

    def contenders(self, setting: Setting) -> list[Contender]:
        mixes = ("none", "distinct", "zipf") if setting.quick else MIXES
        return [
            c
            for dtype in setting.of_x()
            for format in setting.of_weights(FORMATS)
            for c in self._of_format(format, dtype, mixes, setting)
        ]

    def _of_format(
        self, format: str, dtype: str, mixes: tuple[str, ...], setting: Setting
    ) -> list[Contender]:
        size = DTYPES[dtype].itemsize
        lora_a = Base(lambda: randn(self.adapters, self.rank, self.k, seed=1) / self.k**0.5)
        lora_b = Base(lambda: randn(self.adapters, self.n, self.rank, seed=2) / self.rank**0.5)

        @functools.cache
        def parts(i: int) -> Parts:
            known = weights(self.n, self.k, setting.device)
            w = known.dense(dtype, i) if format == "dense" else known.few_bit(format, i)
            a, b = (setting.tensor(t(i, 1), dtype) for t in (lora_a, lora_b))
            return Parts(w, a, b, torch.ones(self.adapters, dtype=torch.float32, device=setting.device))

        x = functools.cache(lambda: setting.tensor(randn(self.m, self.k, seed=3), dtype))
        backends = setting.native(multi_lora_add_)
        shared, flops = float(self.m * (self.n + self.k) * size), 2.0 * self.m * self.n * self.k
        found = []
        for backend in (None,) if format == "dense" else backends:
            found.append(self._base(format, dtype, backend, parts, x, shared, flops, setting))
        for mix in mixes:
            ids = ids_of(mix, self.m, self.adapters)
            active = int((ids >= 0).sum())
            used = int(ids.unique().numel()) if active else 0
            more = used * self.rank * (self.n + self.k) * size
            work: dict[str, Any] = {
                "flops": flops + 2.0 * active * self.rank * (self.n + self.k),
                "shared_bytes": shared,
                "group": f"{format} {mix} {dtype}",
                "sizes": {"mix": mix},
            }
            placed = functools.cache(lambda ids=ids: ids.to(setting.device))

            def layer(
                i: int, loop: bool, backend: str | None, more: int = more, placed: Any = placed
            ) -> Layer:
                p, own_x, own_ids = parts(i), x(), placed()
                method = p.loop if loop else p.bitfuse
                call: Callable[[], Any] = functools.partial(method, own_x, own_ids)
                if backend is not None:
                    call = served(multi_lora_add_, backend, setting.device, call)
                return Layer(call, p.w.nbytes + more, lambda: p.exact(own_x, own_ids))

            for backend in backends:
                found.append(
                    Contender(
                        f"bitfuse {format} ({backend})", dtype,
                        functools.partial(layer, loop=False, backend=backend), backend=backend, format=format,
                        base=_base_name(format, backend), **work,
                    )
                )  # fmt: skip
            if mix != "none":
                # it waits for the device: no graph
                found.append(
                    Contender(
                        f"loop {format}", dtype, functools.partial(layer, loop=True, backend=None),
                        who="torch", label="loop", capturable=False, **work,
                    )
                )  # fmt: skip
        return found

    def _base(
        self,
        format: str,
        dtype: str,
        backend: str | None,
        parts: Callable[[int], Parts],
        x: Callable[[], torch.Tensor],
        shared: float,
        flops: float,
        setting: Setting,
    ) -> Contender:
        """The product without adapters."""

        def build(i: int) -> Layer:
            p = parts(i)
            call: Callable[[], Any] = functools.partial(p.base, x())
            if backend is not None:
                call = served(multi_lora_add_, backend, setting.device, call)
            return Layer(
                call,
                p.w.nbytes,
                lambda: p.exact(x(), torch.full((self.m,), -1, dtype=torch.int64, device="cpu")),
            )

        return Contender(
            _base_name(format, backend), dtype, build, flops, shared, backend=backend, format=format,
            group=f"{format} base {dtype}", sizes={"mix": "none"},
        )  # fmt: skip

    @classmethod
    def overhead(cls) -> dict[str, Callable[[], Any]]:
        w = quantize(randn(8, 128), "int4")
        x, a, b = randn(1, 128), randn(16, 4, 128), randn(16, 8, 4)
        scaling, none = (
            torch.ones(16, dtype=torch.float32, device="cpu"),
            torch.tensor([-1], dtype=torch.int64, device="cpu"),
        )
        lists = (list(a), list(b))
        return {
            "bitfuse.lowbit_linear": lambda: lowbit_linear(x, w),
            "16 adapters, stacked": lambda: multi_lora_linear(x, w, a, b, scaling, none),
            "16 adapters, a list": lambda: multi_lora_linear(x, w, *lists, scaling, none),
        }


def _base_name(format: str, backend: str | None) -> str:
    return "base dense" if format == "dense" else f"base {format} ({backend})"

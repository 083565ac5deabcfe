"""lowbit_linear: x W^T, and grad W, over weights in few bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitfuse.ops.linear import lowbit_linear_cpu as cpp
from bitfuse.ops.linear.lowbit_linear import forward_op, lowbit_linear, lowbit_linear_grad_x
from bitfuse.weights.formats import FORMATS as ALL
from bitfuse.weights.quantize import quantize

from .. import peers
from ..cases import Contender, Layer, Problem, Setting, Weights, named, randn, served, weights
from ..timing import DTYPES

FORMATS = ("int4", "nf4", "int8", "fp8")
ROWS = (1, 16, 128)


@dataclass(frozen=True)
class LowBitLinear(Problem):
    op = "lowbit_linear"
    formats = tuple(ALL)
    m: int
    n: int
    k: int
    direction: str = "forward"

    @classmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        rows = setting.rows(ROWS, (1, 16))
        found: list[Problem] = []
        for layer, (n, k) in setting.shape.linears.items():
            name = named(setting.shape)
            for direction in setting.towards(("forward",) if setting.quick else ("forward", "gradient")):
                # who trains has many rows
                for m in rows if direction == "forward" or setting.directions else rows[-1:]:
                    found.append(cls(m, n, k, direction, model=name, layer=layer))
        return found

    def bounded(self) -> LowBitLinear:
        return replace(self, m=min(self.m, 64), n=min(self.n, 512), k=min(self.k, 1024))

    @property
    def needs_grad(self) -> bool:
        return False

    @property
    def gradient(self) -> bool:
        return self.direction != "forward"

    def contenders(self, setting: Setting) -> list[Contender]:
        usual = ("float16", "bfloat16") if setting.gpu else ("float32", "bfloat16")
        dtypes = setting.of_x(usual)
        inputs = functools.cache(lambda dtype: setting.tensor(randn(self.m, self.inner, seed=1), dtype))
        found = [self._torch(d, inputs, setting) for d in dict.fromkeys((*usual, *dtypes))]
        if not self.gradient:
            found += [self._bitsandbytes(d, inputs, setting) for d in dtypes]
            if not setting.gpu and "float32" in dtypes:
                found += [self._onnxruntime(level, inputs, setting) for level in (1, 4)]
        op = lowbit_linear_grad_x if self.gradient else forward_op
        return found + [
            self._bitfuse(format, d, backend, inputs, setting)
            for d in dtypes
            for format in setting.of_weights(FORMATS)
            for backend in setting.native(op)
        ]

    @property
    def inner(self) -> int:
        """Columns of x."""
        return self.n if self.gradient else self.k

    def _weights(self, setting: Setting) -> Weights:
        return weights(self.n, self.k, setting.device)

    def _work(self, dtype: str) -> dict[str, Any]:
        size = DTYPES[dtype].itemsize
        return {
            "flops": 2.0 * self.m * self.n * self.k,
            "shared_bytes": float(self.m * (self.n + self.k) * size),
        }

    def _exact(self, x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        w = w.to(x.device).double()
        return [x.double() @ (w if self.gradient else w.t())]

    def _torch(self, dtype: str, inputs: Any, setting: Setting) -> Contender:
        def build(i: int) -> Layer:
            w, x = self._weights(setting).dense(dtype, i), inputs(dtype)
            if self.gradient:
                return Layer(lambda: x @ w, w.nbytes, lambda: self._exact(x, w))
            return Layer(lambda: torch.nn.functional.linear(x, w), w.nbytes, lambda: self._exact(x, w))

        return Contender(
            f"torch {dtype}", dtype, build, who="torch", label=f"torch {dtype}", **self._work(dtype)
        )

    def _bitsandbytes(self, dtype: str, inputs: Any, setting: Setting) -> Contender:
        def build(i: int) -> Layer:
            own, x = self._weights(setting).plain(i), inputs(dtype)
            layer = peers.bitsandbytes_linear(own, dtype, setting.device)
            nbytes = self.n * self.k // 2 + self.n * self.k // 64 * 4
            return Layer(
                lambda: layer(x),
                nbytes,
                lambda: self._exact(x, quantize(own, "nf4").dequantize(torch.float32)),
            )

        return Contender(
            "bitsandbytes NF4", dtype, build, who="bitsandbytes", label="bitsandbytes", group=dtype,
            **self._work(dtype),
        )  # fmt: skip

    def _onnxruntime(self, level: int, inputs: Any, setting: Setting) -> Contender:
        def build(i: int) -> Layer:
            run, w, nbytes = peers.onnxruntime_linear(self._weights(setting).plain(i), level)
            x = inputs("float32")
            return Layer(
                lambda: run(x), nbytes, lambda: self._exact(x, w), lambda found: [torch.from_numpy(found[0])],
                foreign=True,
            )  # fmt: skip

        activations = "float32" if level == 1 else "int8"
        return Contender(
            f"onnxruntime int4 ({activations} activations)", "float32", build, who="onnxruntime",
            label=f"onnxruntime {activations}", group="float32", **self._work("float32"),
        )  # fmt: skip

    def _bitfuse(self, format: str, dtype: str, backend: str, inputs: Any, setting: Setting) -> Contender:
        def build(i: int) -> Layer:
            w, x = self._weights(setting).few_bit(format, i), inputs(dtype)
            if self.gradient:
                call = served(
                    lowbit_linear_grad_x, backend, setting.device, lambda: lowbit_linear_grad_x(x, w.op_args)
                )
            else:
                call = served(forward_op, backend, setting.device, lambda: lowbit_linear(x, w))
            return Layer(call, w.nbytes, lambda: self._exact(x, w.dequantize(torch.float32)))

        return Contender(
            f"bitfuse {format} ({backend})", dtype, build, group=dtype, backend=backend, format=format,
            **self._work(dtype),
        )  # fmt: skip

    @classmethod
    def overhead(cls) -> dict[str, Callable[[], Any]]:
        w = quantize(randn(8, 128), "int4")
        x, dense = randn(1, 128), w.dequantize()
        calls: dict[str, Callable[[], Any]] = {
            "bitfuse.lowbit_linear": lambda: lowbit_linear(x, w),
            "torch.nn.functional.linear": lambda: torch.nn.functional.linear(x, dense),
        }
        if cpp._cpu is not None:
            calls["backend module"] = lambda: cpp.run(x, w.op_args, None)
        return calls

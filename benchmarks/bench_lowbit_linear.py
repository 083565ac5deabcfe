"""Time lowbit_linear against what a user would otherwise pick, with the share of the machine's limit.

How time is taken, and what a limit is: timing.py.

    python benchmarks/bench_lowbit_linear.py           # the default table; JSON goes to results/<device>/
    python benchmarks/bench_lowbit_linear.py --m 1 --formats int4 --dtype float32 --no-json
    python benchmarks/bench_lowbit_linear.py --n 384 --k 384 --m 50 2000 --no-json
    python benchmarks/bench_lowbit_linear.py --gradient --m 128 --no-json
    pytest benchmarks/bench_lowbit_linear.py           # the same cases under pytest-benchmark
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.bench import timing
from bitfuse.bench.timing import DEFAULT_DTYPES, DEVICE, DTYPES, GPU, Ceiling, Chain
from bitfuse.cpu import lowbit_linear as cpp
from bitfuse.ops.lowbit_linear import forward_op, lowbit_linear_grad_x

DEFAULT_FORMATS = ("int4", "nf4", "int8", "fp8")
Run = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Case:
    """One way to compute x W^T (or grad W), for x of a dtype.

    Attributes:
        name: who computes it, and with what.
        dtype: of x.
        weight_bytes: of one layer's weight of n x k.
        build: from a float32 weight to one layer. Raises ImportError when the peer is not installed.
    """

    name: str
    dtype: str
    weight_bytes: Callable[[int, int], int]
    build: Callable[[torch.Tensor, bool], Run]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"


def _dense(dtype: str) -> Case:
    def build(weight: torch.Tensor, gradient: bool) -> Run:
        w = weight.to(DTYPES[dtype])
        return (lambda x: x @ w) if gradient else (lambda x: torch.nn.functional.linear(x, w))

    size = DTYPES[dtype].itemsize
    return Case(f"torch {dtype}", dtype, lambda n, k: n * k * size, build)


def _bitfuse(format: str, dtype: str, backend: str) -> Case:
    def build(weight: torch.Tensor, gradient: bool) -> Run:
        w = bitfuse.quantize(weight, format)
        if reason := _unserved(w, DTYPES[dtype], backend, gradient):
            raise ImportError(reason)

        def run(x: torch.Tensor) -> Any:
            return lowbit_linear_grad_x(x, w.op_args) if gradient else bitfuse.lowbit_linear(x, w)

        if not GPU:
            return run

        def asked(x: torch.Tensor) -> Any:
            with bitfuse.use_backend(backend):
                return run(x)

        return asked

    def weight_bytes(n: int, k: int) -> int:
        fmt = bitfuse.formats.get_format(format)
        groups = 1 if fmt.group_size == -1 else k // fmt.group_size
        return n * (k * fmt.bits // 8 + groups * fmt.scale_dtype.itemsize)

    return Case(f"bitfuse {format} ({backend})", dtype, weight_bytes, build)


def _unserved(w: bitfuse.LowBitWeight, dtype: torch.dtype, backend: str, gradient: bool) -> str | None:
    x = torch.zeros(1, w.shape[0 if gradient else 1], dtype=dtype, device=DEVICE)
    for b in (lowbit_linear_grad_x if gradient else forward_op).backends:
        if b.name == backend:
            return b.supports(x, w.op_args, *(() if gradient else (None,)))
    return f"no backend {backend}"


def _bitsandbytes(dtype: str) -> Case:
    def build(weight: torch.Tensor, gradient: bool) -> Run:
        import bitsandbytes as bnb

        if gradient:
            raise ImportError("no separate gradient to time")
        layer = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=DTYPES[dtype], quant_type="nf4",
            compress_statistics=False,
        )  # fmt: skip
        layer.load_state_dict({"weight": weight.cpu()})
        layer = layer.to(DEVICE).eval()
        return lambda x: layer(x)

    return Case("bitsandbytes NF4", dtype, lambda n, k: n * k // 2 + n * k // 64 * 4, build)


def _onnxruntime(accuracy_level: int) -> Case:
    def build(weight: torch.Tensor, gradient: bool) -> Run:
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper

        n, k = weight.shape
        if gradient or k % 128:
            raise ImportError("forward with k a multiple of 128 only")
        w = bitfuse.quantize(weight.cpu(), "int4", group_size=128, scale_dtype=torch.float32)
        inits = [
            numpy_helper.from_array(w.qweight.view(n, k // 128, 64).numpy(), "B"),
            numpy_helper.from_array(w.scales.numpy(), "S"),
        ]
        node = helper.make_node(
            "MatMulNBits", ["x", "B", "S"], ["y"], domain="com.microsoft",
            K=k, N=n, bits=4, block_size=128, accuracy_level=accuracy_level,
        )  # fmt: skip
        x_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])
        y_info = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(
            helper.make_graph([node], "g", [x_info], [y_info], inits), opset_imports=opsets, ir_version=9
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # a pool for each layer of the chain would spin against the others
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"x": x.numpy()})

    activations = "float32" if accuracy_level == 1 else "int8"
    return Case(
        f"onnxruntime int4 ({activations} activations)",
        "float32",
        lambda n, k: n * k // 2 + n * k // 32,
        build,
    )


def cases(formats: list[str], dtypes: list[str]) -> list[Case]:
    """Every case, peers first: the one list that the table and pytest share."""
    backends = ("cuda", "triton") if GPU else ("cpp",)
    dense = list(dict.fromkeys([*DEFAULT_DTYPES, *dtypes]))
    found = [_dense(d) for d in dense]
    found += [_bitsandbytes(d) for d in dtypes]
    if not GPU and "float32" in dtypes:
        found += [_onnxruntime(1), _onnxruntime(4)]
    return found + [_bitfuse(f, d, b) for d in dtypes for f in formats for b in backends]


def make_chain(case: Case, m: int, n: int, k: int, cold_bytes: int, gradient: bool) -> Chain:
    """A chain for x of m rows. Every layer has a weight of its own: none is zeros, none equals another."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, k, generator=generator) / k**0.5
    depth = timing.depth_of(case.weight_bytes(n, k), cold_bytes)
    layers = [case.build(base.roll(i, 0).to(DEVICE), gradient) for i in range(depth)]
    x = torch.randn(m, n if gradient else k, generator=generator).to(DEVICE, DTYPES[case.dtype])
    nbytes = case.weight_bytes(n, k) + m * (n + k) * x.element_size()
    return Chain(
        case.name, case.dtype, [functools.partial(layer, x) for layer in layers], nbytes, 2.0 * m * n * k
    )


def call_overhead() -> dict[str, float]:
    """Microseconds of a tiny call: the public function, the backend module, the compiled function alone."""
    if cpp._cpu is None:
        return {}
    w = bitfuse.quantize(torch.randn(8, 128), "int4")
    x = torch.randn(1, 128)
    out, dense = torch.empty(1, 8), w.dequantize()
    code_kind, values, zero_point = cpp._code("int4")  # type: ignore[misc]
    args = (
        x.data_ptr(), 0, 1, 128, w.qweight.data_ptr(), w.scales.data_ptr(), 1, 0, 0, 0, 0, values, code_kind,
        zero_point, 8, 128, 128, 0, out.data_ptr(),
    )  # fmt: skip
    calls: dict[str, Callable[[], Any]] = {
        "bitfuse.lowbit_linear": lambda: bitfuse.lowbit_linear(x, w),
        "backend module": lambda: cpp.run(x, w.op_args, None),
        "compiled function": lambda: cpp._cpu.lowbit_linear(*args),
        "torch.nn.functional.linear": lambda: torch.nn.functional.linear(x, dense),
    }
    return timing.microseconds(calls)


def table(m: int, args: argparse.Namespace, ceiling: Ceiling) -> list[dict[str, Any]]:
    """Time every case at m rows, print the table, return its rows."""
    chains: list[Chain] = []
    missing: list[str] = []
    for case in cases(args.formats, args.dtype):
        try:
            chains.append(make_chain(case, m, args.n, args.k, args.cold_mb << 20, args.gradient))
        except ImportError as error:
            missing.append(f"{case}: {error}")
        gc.collect()
    for _ in range(args.rounds):
        for chain in chains:
            chain.sample(args.budget, args.patience)
    peers = {c.dtype: c for c in chains if c.name.startswith("torch ")}
    what = "grad W" if args.gradient else "x W^T"
    title = f"{what}, M={m} N={args.n} K={args.k}: milliseconds a layer; ratios over torch, higher is faster"
    rows = timing.report(title, chains, lambda chain: peers, ceiling)
    for text in missing:
        print(f"  not timed: {text}")
    direction = "gradient" if args.gradient else "forward"
    return [{**row, "direction": direction, "m": m, "n": args.n, "k": args.k} for row in rows]


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--m", type=int, nargs="+", default=[1, 16, 128], help="rows of x, a table each (1 16 128)")
    add("--n", type=int, default=4096, help="output features (4096)")
    add("--k", type=int, default=4096, help="input features (4096)")
    add("--formats", nargs="+", default=list(DEFAULT_FORMATS), metavar="NAME", help="of bitfuse.quantize")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DEFAULT_DTYPES), help="of x")
    add("--gradient", action="store_true", help="time grad W, the gradient of x, instead of x W^T")
    timing.add_options(parser, "lowbit_linear")
    args = parser.parse_args()

    peers = list(dict.fromkeys([*DEFAULT_DTYPES, *args.dtype]))
    ceiling = timing.measure_ceiling(peers, args.budget, args.patience)
    isa = cpp._cpu.isa() if cpp._cpu is not None and not GPU else None
    overhead = {} if GPU else call_overhead()
    timing.introduce(ceiling, isa, overhead, "[1, 128] x [8, 128]")
    with torch.no_grad():
        rows = [row for m in args.m for row in table(m, args, ceiling)]
    timing.record(args, "lowbit_linear", isa, ceiling, overhead, rows)


@pytest.mark.parametrize("m", [1, 16, 128])
@pytest.mark.parametrize("case", cases(list(DEFAULT_FORMATS), list(DEFAULT_DTYPES)), ids=str)
def test_lowbit_linear(benchmark: Any, case: Case, m: int) -> None:
    try:
        chain = make_chain(case, m, 4096, 4096, 128 << 20, gradient=False)
    except ImportError as error:
        pytest.skip(str(error))

    def run() -> None:
        chain()
        if GPU:
            torch.cuda.synchronize()

    benchmark.extra_info["layers"] = len(chain.layers)
    with torch.no_grad():
        benchmark(run)


if __name__ == "__main__":
    main()

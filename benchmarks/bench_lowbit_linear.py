"""Time lowbit_linear against what a user would otherwise pick, with the share of the machine's limit.

A case is a chain of layers with weights of their own, as many as it takes to exceed --cold-mb, so that each
layer streams its weight from memory as in a real decoding step. Rounds take one sample of each case in turn;
a ratio is taken within a round. On a shared CPU a sample waits for a window in which others leave the cores
alone. The limit of a case is the larger of its bytes over the read bandwidth and its multiply-adds over the
matmul rate, both measured here, now.

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
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.cpu import lowbit_linear as cpp
from bitfuse.ops.lowbit_linear import forward_op, lowbit_linear_grad_x

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_DTYPES = ("float16", "bfloat16") if GPU else ("float32", "bfloat16")
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


# ------------------------------------------------------------------------------------------ how time is taken


def _foreign_seconds() -> float:
    """CPU seconds spent so far on this machine by anyone but this process; 0 where that can't be known."""
    try:
        fields = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return 0.0
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK") - time.process_time()


def _foreign_share(since: float, started: float) -> float:
    return (
        max(0.0, _foreign_seconds() - since)
        / max(1e-9, time.perf_counter() - started)
        / (os.cpu_count() or 1)
    )


def _cpu_sample(run: Callable[[], Any], budget: float, patience: float) -> list[float]:
    """Seconds of each call in the quietest window of `budget` seconds seen within `patience`."""
    quiet, best, start = 0.1, None, time.perf_counter()
    while True:
        while time.perf_counter() - start < patience:
            since, started = _foreign_seconds(), time.perf_counter()
            time.sleep(0.05)
            if _foreign_share(since, started) <= quiet:
                break
        run()
        times: list[float] = []
        since, started = _foreign_seconds(), time.perf_counter()
        while sum(times) < budget:
            at = time.perf_counter()
            run()
            times.append(time.perf_counter() - at)
        share = _foreign_share(since, started)
        if best is None or share < best[0]:
            best = share, times
        if share <= quiet or time.perf_counter() - start > patience:
            return best[1]


def _gpu_sample(run: Callable[[], Any], budget: float, patience: float) -> list[float]:
    run()
    times: list[float] = []
    while sum(times) < budget:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


_sample = _gpu_sample if GPU else _cpu_sample


@dataclass
class Ceiling:
    """What this machine reads and multiplies, measured: bytes/s, and FLOP/s by dtype of x."""

    bytes_per_second: float
    flops: dict[str, float] = field(default_factory=dict)

    def seconds(self, nbytes: float, flops: float, dtype: str) -> float:
        return max(nbytes / self.bytes_per_second, flops / self.flops[dtype])


def measure_ceiling(dtypes: list[str], budget: float, patience: float) -> Ceiling:
    """Bandwidth of a sum or of a copy, whichever is more; rate of a matmul of 2048 (8192 on a GPU) cubed."""
    buffer = torch.randn((1 << 28) if GPU else (1 << 26), device=DEVICE)
    target = torch.empty_like(buffer)
    read = buffer.nbytes / min(_sample(lambda: buffer.sum(), budget, patience))
    copied = 2 * buffer.nbytes / min(_sample(lambda: target.copy_(buffer), budget, patience))
    ceiling = Ceiling(max(read, copied))
    size = 8192 if GPU else 2048
    for dtype in dtypes:
        a = torch.randn(size, size, device=DEVICE).to(DTYPES[dtype])
        ceiling.flops[dtype] = (
            2 * size**3 / min(_sample(functools.partial(torch.matmul, a, a), budget, patience))
        )
    return ceiling


@dataclass
class Chain:
    """Layers that run one after another on one x: no weight is still in a cache when its turn comes."""

    case: Case
    layers: list[Run]
    x: torch.Tensor
    nbytes: float
    flops: float
    times: list[list[float]] = field(default_factory=list)

    def __call__(self) -> None:
        for layer in self.layers:
            layer(self.x)

    def sample(self, budget: float, patience: float) -> None:
        self.times.append([t / len(self.layers) for t in _sample(self, budget, patience)])


def make_chain(case: Case, m: int, n: int, k: int, cold_bytes: int, gradient: bool) -> Chain:
    """A chain for x of m rows. Every layer has a weight of its own: none is zeros, none equals another."""
    depth = max(1, min(512, round(cold_bytes / case.weight_bytes(n, k))))
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, k, generator=generator) / k**0.5
    layers = [case.build(base.roll(i, 0).to(DEVICE), gradient) for i in range(depth)]
    x = torch.randn(m, n if gradient else k, generator=generator).to(DEVICE, DTYPES[case.dtype])
    nbytes = case.weight_bytes(n, k) + m * (n + k) * x.element_size()
    return Chain(case, layers, x, nbytes, 2.0 * m * n * k)


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
    found = {}
    for name, call in calls.items():
        best = float("inf")
        for _ in range(20):
            at = time.perf_counter()
            for _ in range(1000):
                call()
            best = min(best, time.perf_counter() - at)
        found[name] = best * 1e3
    return found


# ------------------------------------------------------------------------------------------- table and record


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


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

    peers = {c.case.dtype: c for c in chains if c.case.name.startswith("torch ")}
    what = "grad W" if args.gradient else "x W^T"
    print(f"\n{what}, M={m} N={args.n} K={args.k}: milliseconds a layer; ratios over torch, higher is faster")
    head = "".join(f"{'x ' + d:>11s}" for d in peers)
    columns = (
        f"{'layers':>6s} {'median':>8s} {'p20':>8s} {'p80':>8s} {'GB/s':>7s} {'TFLOP/s':>8s} {'limit':>6s}"
    )
    print(f"{'case':44s} {columns}{head}")
    rows = []
    for chain in chains:
        every = [t for sample in chain.times for t in sample]
        medians = [statistics.median(sample) for sample in chain.times]
        median = statistics.median(medians)
        row: dict[str, Any] = {
            "case": chain.case.name,
            "dtype": chain.case.dtype,
            "direction": "gradient" if args.gradient else "forward",
            "m": m,
            "n": args.n,
            "k": args.k,
            "layers": len(chain.layers),
            "median_ms": median * 1e3,
            "p20_ms": _percentile(every, 0.2) * 1e3,
            "p80_ms": _percentile(every, 0.8) * 1e3,
            "gb_per_s": chain.nbytes / median / 1e9,
            "tflop_per_s": chain.flops / median / 1e12,
            "share_of_limit": ceiling.seconds(chain.nbytes, chain.flops, chain.case.dtype) / median,
            "ratio": {
                d: statistics.median(
                    statistics.median(p) / own for p, own in zip(peer.times, medians, strict=True)
                )
                for d, peer in peers.items()
            },
        }
        rows.append(row)
        ratios = "".join(f"{row['ratio'][d]:11.2f}" for d in peers)
        print(
            f"{chain.case!s:44s} {row['layers']:6d} "
            f"{row['median_ms']:8.3f} {row['p20_ms']:8.3f} {row['p80_ms']:8.3f} "
            f"{row['gb_per_s']:7.1f} {row['tflop_per_s']:8.3f} {row['share_of_limit']:6.0%}{ratios}",
            flush=True,
        )
    for text in missing:
        print(f"  not timed: {text}")
    return rows


def device_name() -> str:
    """The GPU, or the CPU's model with its family (a hypervisor may hide the rest) and cores."""
    if GPU:
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        info = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        name = f"{info['model name']} family {info['cpu family']}"
    except (OSError, KeyError):
        pass
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "onnxruntime", "bitsandbytes"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The commit of the tree, with a + where the tree differs from it; "unknown" outside of a repository."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Written aside, then renamed: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".json.part")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(path)


def main() -> None:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    default = Path(__file__).parent / "results" / slug / "lowbit_linear.json"
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
    add("--cold-mb", type=int, default=512, help="MiB of weights in a chain, more than any cache (512)")
    add("--rounds", type=int, default=5, help="samples of each case (5)")
    add("--budget", type=float, default=0.15, help="seconds a sample (0.15)")
    add("--patience", type=float, default=4.0, help="most seconds a sample waits for quiet cores (4)")
    add("--json", type=Path, default=default, help="where figures go (benchmarks/results/<device>/)")
    add("--no-json", action="store_true", help="print only")
    args = parser.parse_args()

    peers = list(dict.fromkeys([*DEFAULT_DTYPES, *args.dtype]))
    ceiling = measure_ceiling(peers, args.budget, args.patience)
    print(f"{device_name()}; {torch.get_num_threads()} threads; torch {torch.__version__}; commit {commit()}")
    if cpp._cpu is not None and not GPU:
        print(f"instruction-set level {cpp._cpu.isa()}")
    rates = ", ".join(f"{d} {f / 1e12:.3g} TFLOP/s" for d, f in ceiling.flops.items())
    print(f"limits measured here: {ceiling.bytes_per_second / 1e9:.1f} GB/s; matmul {rates}")
    overhead = {} if GPU else call_overhead()
    for name, microseconds in overhead.items():
        print(f"a call of [1, 128] x [8, 128]: {name:28s} {microseconds:6.2f} us")
    with torch.no_grad():
        rows = [row for m in args.m for row in table(m, args, ceiling)]
    if not args.no_json:
        record = {
            "op": "lowbit_linear",
            "device": device_name(),
            "threads": torch.get_num_threads(),
            "isa": cpp._cpu.isa() if cpp._cpu is not None and not GPU else None,
            "versions": versions(),
            "commit": commit(),
            "cold_mb": args.cold_mb,
            "limits": {"bytes_per_s": ceiling.bytes_per_second, "flop_per_s": ceiling.flops},
            "overhead_us": overhead,
            "rows": rows,
        }
        write_json(args.json, record)
        print(f"\nwritten: {args.json}")


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

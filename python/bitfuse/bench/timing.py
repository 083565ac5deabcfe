"""What every benchmark shares: samples of time on a machine that others use too, its limits, tables and JSON.

A case is a chain of layers with weights of their own, as many as it takes to exceed a cache, so that each
layer streams its weight from memory as in a real decoding step. Rounds take one sample of each case in turn;
a ratio is taken within a round. On a shared CPU a sample waits for a window in which others leave the cores
alone. The limit of a case is the larger of its bytes over the read bandwidth and its multiply-adds over the
matmul rate, both measured here, now.
"""

from __future__ import annotations

import argparse
import functools
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

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_DTYPES = ("float16", "bfloat16") if GPU else ("float32", "bfloat16")


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


sample = _gpu_sample if GPU else _cpu_sample


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
    read = buffer.nbytes / min(sample(lambda: buffer.sum(), budget, patience))
    copied = 2 * buffer.nbytes / min(sample(lambda: target.copy_(buffer), budget, patience))
    ceiling = Ceiling(max(read, copied))
    size = 8192 if GPU else 2048
    for dtype in dtypes:
        a = torch.randn(size, size, device=DEVICE).to(DTYPES[dtype])
        ceiling.flops[dtype] = (
            2 * size**3 / min(sample(functools.partial(torch.matmul, a, a), budget, patience))
        )
    return ceiling


@dataclass
class Chain:
    """Layers that run one after another: no weight is still in a cache when its turn comes.

    Attributes:
        name, dtype: who computes it and with what; the dtype of x.
        layers: what runs; each call takes nothing.
        nbytes, flops: that one layer must move and do.
        times: seconds a layer, a list for each sample.
    """

    name: str
    dtype: str
    layers: list[Callable[[], Any]]
    nbytes: float
    flops: float
    times: list[list[float]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"

    def __call__(self) -> None:
        for layer in self.layers:
            layer()

    def sample(self, budget: float, patience: float) -> None:
        self.times.append([t / len(self.layers) for t in sample(self, budget, patience)])

    @property
    def medians(self) -> list[float]:
        """Of each sample."""
        return [statistics.median(times) for times in self.times]

    def ratio(self, peer: Chain) -> float:
        """How often this runs while the peer runs once."""
        return statistics.median(p / own for p, own in zip(peer.medians, self.medians, strict=True))


def report(
    title: str, chains: list[Chain], peers: Callable[[Chain], dict[str, Chain]], ceiling: Ceiling
) -> list[dict[str, Any]]:
    """Print the table of chains that were sampled, with their ratios over `peers`; return its rows."""
    heads = list(dict.fromkeys(name for chain in chains for name in peers(chain)))
    columns = (
        f"{'layers':>6s} {'median':>8s} {'p20':>8s} {'p80':>8s} {'GB/s':>7s} {'TFLOP/s':>8s} {'limit':>6s}"
    )
    print(f"\n{title}")
    print(f"{'case':44s} {columns}" + "".join(f"{'x ' + name:>11s}" for name in heads))
    rows = []
    for chain in chains:
        every = [t for times in chain.times for t in times]
        median = statistics.median(chain.medians)
        row: dict[str, Any] = {
            "case": chain.name,
            "dtype": chain.dtype,
            "layers": len(chain.layers),
            "median_ms": median * 1e3,
            "p20_ms": _percentile(every, 0.2) * 1e3,
            "p80_ms": _percentile(every, 0.8) * 1e3,
            "gb_per_s": chain.nbytes / median / 1e9,
            "tflop_per_s": chain.flops / median / 1e12,
            "share_of_limit": ceiling.seconds(chain.nbytes, chain.flops, chain.dtype) / median,
            "ratio": {name: chain.ratio(peer) for name, peer in peers(chain).items()},
        }
        rows.append(row)
        ratios = "".join(f"{row['ratio'][n]:11.2f}" if n in row["ratio"] else " " * 11 for n in heads)
        print(
            f"{chain!s:44s} {row['layers']:6d} "
            f"{row['median_ms']:8.3f} {row['p20_ms']:8.3f} {row['p80_ms']:8.3f} "
            f"{row['gb_per_s']:7.1f} {row['tflop_per_s']:8.3f} {row['share_of_limit']:6.0%}{ratios}",
            flush=True,
        )
    return rows


def depth_of(weight_bytes: int, cold_bytes: int) -> int:
    """Layers to a chain."""
    return max(1, min(512, round(cold_bytes / weight_bytes)))


def microseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Of each call, the least seen."""
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


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


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
    for package in ("triton", "onnxruntime", "bitsandbytes", "peft"):
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


def add_options(parser: argparse.ArgumentParser, op: str) -> None:
    """The options that every benchmark has."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    default = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / slug / f"{op}.json"
    add = parser.add_argument
    add("--cold-mb", type=int, default=512, help="MiB of weights in a chain, more than any cache (512)")
    add("--rounds", type=int, default=5, help="samples of each case (5)")
    add("--budget", type=float, default=0.15, help="seconds a sample (0.15)")
    add("--patience", type=float, default=4.0, help="most seconds a sample waits for quiet cores (4)")
    add("--json", type=Path, default=default, help="where figures go (benchmarks/results/<device>/)")
    add("--no-json", action="store_true", help="print only")


def introduce(ceiling: Ceiling, isa: str | None, overhead: dict[str, float], call: str) -> None:
    """Print where this runs, the limits that were measured and what a tiny call takes."""
    print(f"{device_name()}; {torch.get_num_threads()} threads; torch {torch.__version__}; commit {commit()}")
    if isa is not None:
        print(f"instruction-set level {isa}")
    rates = ", ".join(f"{d} {f / 1e12:.3g} TFLOP/s" for d, f in ceiling.flops.items())
    print(f"limits measured here: {ceiling.bytes_per_second / 1e9:.1f} GB/s; matmul {rates}")
    for name, us in overhead.items():
        print(f"a call of {call}: {name:28s} {us:6.2f} us")


def record(
    args: argparse.Namespace,
    op: str,
    isa: str | None,
    ceiling: Ceiling,
    overhead: dict[str, float],
    rows: list[dict[str, Any]],
) -> None:
    """Write the figures, unless --no-json."""
    if args.no_json:
        return
    found = {
        "op": op,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "versions": versions(),
        "commit": commit(),
        "cold_mb": args.cold_mb,
        "limits": {"bytes_per_s": ceiling.bytes_per_second, "flop_per_s": ceiling.flops},
        "overhead_us": overhead,
        "rows": rows,
    }
    write_json(args.json, found)
    print(f"\nwritten: {args.json}")

"""How time is taken: samples on a machine that others use too, its ceilings, its caches, its threads.

On a CPU a sample waits for a window in which others leave the cores alone, and each thread stays on a core
of its own. On a GPU a sample is a CUDA graph between events (the calls themselves where they can't be
captured), behind a write that is larger than the L2 cache.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Effort:
    """How long to look.

    Attributes:
        rounds: samples of each case.
        budget: seconds a sample.
        patience: most seconds a sample waits for quiet cores.
        cold_mb: MiB that a chain of layers reads, more than any cache.
    """

    rounds: int = 5
    budget: float = 0.15
    patience: float = 4.0
    cold_mb: int = 256

    @property
    def cold_bytes(self) -> int:
        return self.cold_mb << 20


# the quiet window


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


def _cpu_sample(run: Callable[[], Any], effort: Effort) -> tuple[list[float], float]:
    """Seconds of each call in the quietest window of `budget` seconds seen within `patience`, and the share
    of the cores that others took in it."""
    quiet, best, start = 0.1, None, time.perf_counter()
    while True:
        while time.perf_counter() - start < effort.patience:
            since, started = _foreign_seconds(), time.perf_counter()
            time.sleep(0.05)
            if _foreign_share(since, started) <= quiet:
                break
        run()
        times: list[float] = []
        since, started = _foreign_seconds(), time.perf_counter()
        while sum(times) < effort.budget:
            at = time.perf_counter()
            run()
            times.append(time.perf_counter() - at)
        share = _foreign_share(since, started)
        if best is None or share < best[0]:
            best = share, times
        if share <= quiet or time.perf_counter() - start > effort.patience:
            return best[1], best[0]


@functools.cache
def _flush(device: str) -> torch.Tensor:
    """What is written before each run on a GPU, so that its L2 holds nothing of the last."""
    return torch.ones(max(64 << 20, 4 * last_level_cache(device)) // 4, dtype=torch.int32, device=device)


def _gpu_sample(run: Callable[[], Any], effort: Effort, device: str) -> list[float]:
    run()
    flush = _flush(device)
    times: list[float] = []
    while sum(times) < effort.budget and len(times) < 1000:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # takes longer than the host needs to launch what comes behind it
        flush.add_(1)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def sample(run: Callable[[], Any], effort: Effort, device: str) -> tuple[list[float], float]:
    """Seconds of each call, over about `effort.budget` seconds, and the share of the cores that others took
    meanwhile; of a GPU's 0."""
    return _cpu_sample(run, effort) if device == "cpu" else (_gpu_sample(run, effort, device), 0.0)


def least(run: Callable[[], Any], effort: Effort, device: str) -> float:
    """The fewest seconds of a call."""
    return min(sample(run, effort, device)[0])


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of a call.

    Raises:
        RuntimeError: it can't be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# threads


def _tasks() -> set[int]:
    try:
        return {int(name) for name in os.listdir("/proc/self/task")}
    except OSError:
        return set()


@functools.cache
def _workers() -> tuple[int, ...]:
    """torch's own threads beside the one that calls, when they can be told from others: they start with the
    first parallel loop."""
    before = _tasks()
    torch.rand(1 << 22, dtype=torch.float32, device="cpu").exp_()
    return tuple(sorted(_tasks() - before))


def _cores() -> list[int]:
    """CPUs that this process may use, one of each physical core first."""
    first: list[int] = []
    second: list[int] = []
    seen = set()
    for cpu in sorted(os.sched_getaffinity(0)):
        try:
            core = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            core = str(cpu)
        (second if core in seen else first).append(cpu)
        seen.add(core)
    return first + second


class Threads:
    """Threads that can be held on cores of their own; made before torch's first parallel loop, or it can't
    tell which they are. Peers' threads are left alone: they are made while nothing is held."""

    def __init__(self, device: str) -> None:
        self.held: dict[int, int] = {}
        if device != "cpu" or torch.get_num_threads() == 1 or not hasattr(os, "sched_setaffinity"):
            return
        workers, cores = _workers(), _cores()
        if len(workers) == torch.get_num_threads() - 1 and len(workers) < len(cores):
            self.held = dict(zip((os.getpid(), *workers), cores, strict=False))

    @property
    def pinned(self) -> bool:
        return bool(self.held)

    @contextlib.contextmanager
    def pin(self) -> Iterator[None]:
        """Each thread stays on its core inside."""
        before = {}
        try:
            for task, core in self.held.items():
                with contextlib.suppress(OSError):  # a thread that has ended
                    before[task] = os.sched_getaffinity(task)
                    os.sched_setaffinity(task, {core})
            yield
        finally:
            for task, cores in before.items():
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(task, cores)


# what the machine can do


@dataclass
class Ceiling:
    """What a machine reads and multiplies: bytes/s, and FLOP/s by dtype of x."""

    bytes_per_second: float
    flops: dict[str, float] = field(default_factory=dict)

    def seconds(self, nbytes: float, flops: float, dtype: str) -> float:
        """The least that this takes."""
        return max(nbytes / self.bytes_per_second, flops / self.flops[dtype])

    def joined(self, other: Ceiling) -> Ceiling:
        """Of each rate the larger."""
        names = (*self.flops, *(n for n in other.flops if n not in self.flops))
        flops = {n: max(self.flops.get(n, 0.0), other.flops.get(n, 0.0)) for n in names}
        return Ceiling(max(self.bytes_per_second, other.bytes_per_second), flops)

    def as_json(self) -> dict[str, Any]:
        return {"bytes_per_s": self.bytes_per_second, "flop_per_s": dict(self.flops)}


def measure_ceiling(dtypes: list[str], effort: Effort, device: str) -> Ceiling:
    """Bandwidth of a sum, a dot product or a copy, whichever is most; the best rate of square matmuls, up to
    2048 on a CPU and 8192 on a GPU, or less where a dtype is slow."""
    gpu = device != "cpu"
    # a quick look's chains are short; a sum over as little would be half of it from the cache
    count = (1 << 28) if gpu else max(effort.cold_bytes, min(8 * effort.cold_bytes, 256 << 20)) // 4
    a, b = (torch.randn(count, dtype=torch.float32, device=device) for _ in range(2))
    runs: tuple[tuple[Callable[[], Any], int], ...] = (
        (lambda: a.sum(), a.nbytes),
        (lambda: torch.dot(a, b), 2 * a.nbytes),
        (lambda: b.copy_(a), 2 * a.nbytes),
    )
    ceiling = Ceiling(max(nbytes / least(run, effort, device) for run, nbytes in runs))
    # whoever computes in a narrow dtype may do so in float32
    for dtype in dict.fromkeys([*dtypes, *(() if gpu else ("float32",))]):
        best = 0.0
        for size in (2048, 4096, 8192) if gpu else (256, 512, 1024, 2048):
            x = torch.randn(size, size, dtype=torch.float32, device=device).to(DTYPES[dtype])
            fastest = min(
                least(functools.partial(f, x, x), effort, device)
                for f in (torch.matmul, torch.nn.functional.linear)
            )
            best = max(best, 2 * size**3 / fastest)
            if 8 * fastest > 4 * effort.budget:
                break
        ceiling.flops[dtype] = best
    if not gpu:
        ceiling.flops = {d: max(f, ceiling.flops["float32"]) for d, f in ceiling.flops.items()}
    return ceiling


@functools.cache
def last_level_cache(device: str) -> int:
    """Bytes; 0 where that can't be known."""
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, size = ((index / name).read_text().strip() for name in ("level", "size"))
            unit = {"K": 10, "M": 20, "G": 30}.get(size[-1])
            sizes[int(level)] = int(size[:-1]) << unit if unit else int(size)
        except (OSError, ValueError):
            continue
    return sizes[max(sizes)] if sizes else 0


def device_name(device: str) -> str:
    """The GPU, or the CPU's model with its family (a hypervisor may hide the rest) and cores."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        info = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        name = f"{info['model name']} family {info['cpu family']}"
    except (OSError, KeyError):
        pass
    return f"{name}, {os.cpu_count()} cores"


# memory


def peak_memory(call: Callable[[], Any], device: str) -> tuple[int | None, str]:
    """Bytes that a call takes at most, beyond what was there before it, and whose count that is. What is not
    of torch's allocator (scratch of a native kernel, tensors of another library) is not in it."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "max_memory_allocated"
    by = "torch's CPU allocator"
    try:
        # the profiler before Kineto: allocations one by one, and no lines on stderr
        from torch.autograd import (
            ProfilerConfig,
            ProfilerState,
            _disable_profiler_legacy,
            _enable_profiler_legacy,
        )

        options = torch._C._profiler._ExperimentalConfig()
        config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, options)
    except (ImportError, AttributeError, TypeError):
        return None, by
    kept = None
    _enable_profiler_legacy(config)
    try:
        kept = call()
    finally:
        events = _disable_profiler_legacy()
    del kept
    most = 0
    for thread in events:
        now = 0
        for event in thread:
            if event.kind() == "memory_alloc":
                now += event.cpu_memory_usage()
                most = max(most, now)
    return most, by


# small helpers


def microseconds(calls: dict[str, Callable[[], Any]], effort: Effort) -> dict[str, float]:
    """Of each call, the least seen."""
    found = {}
    for name, call in calls.items():
        best, spent = float("inf"), 0.0
        while spent < effort.budget:
            at = time.perf_counter()
            for _ in range(500):
                call()
            took = time.perf_counter() - at
            best, spent = min(best, took), spent + took
        found[name] = best / 500 * 1e6
    return found


def percentile(rounds: list[list[float]], share: float) -> float:
    """Of all samples, every round counting as much as another: a round that something held up has fewer."""
    ordered = sorted((t, 1 / len(times)) for times in rounds for t in times)
    reached = 0.0
    for t, weight in ordered:
        reached += weight
        if reached >= share * len(rounds) - 1e-9:
            return t
    return ordered[-1][0]

"""Measuring: chains of layers in interleaved rounds, and the rows that come of them."""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bitfuse.core.backends import asked_backend
from bitfuse.core.device import simulated
from bitfuse.ops.linear import lowbit_linear_cpu as cpp

from ..info import commit, cuda
from .cases import Contender, Layer, Problem, Setting, Unavailable, chosen, narrowed, relative_error, weights
from .suites import SUITES
from .timing import (
    Ceiling,
    Effort,
    Threads,
    captured,
    device_name,
    last_level_cache,
    measure_ceiling,
    microseconds,
    peak_memory,
    percentile,
    sample,
)

PACKAGES = (
    "bitfuse", "torch", "triton", "onnxruntime", "bitsandbytes", "peft", "flash-attn", "flashinfer-python",
    "liger-kernel",
)  # fmt: skip
MOST_LAYERS = 512
MOST_HELD = 512 << 20  # bytes of a chain: all chains of a problem are there at once
SHARE = 0.5  # of the memory that is free, for all chains together
Watch = Callable[[str, int], None]  # told what comes next, and how many steps are behind


def effort_for(device: str, quick: bool = False, **changes: Any) -> Effort:
    """How long to look on a device: chains read four times what its last-level cache holds, 256 MiB at least;
    a quick look, three times and 64."""
    cache = -(-last_level_cache(device) >> 20)
    if quick:
        effort = Effort(rounds=2, budget=0.03, patience=0.5, cold_mb=max(64, 3 * cache))
    else:
        effort = Effort(cold_mb=max(256, 4 * cache))
    return replace(effort, **{name: value for name, value in changes.items() if value is not None})


def resident() -> int:
    """Bytes of memory that this process has; 0 where nobody tells."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def free_memory(device: str) -> int:
    """Bytes that a process may still take on a device."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Chain:
    """Layers of a contender that run one after another: no weight is still in a cache when its turn comes.
    What
    a layer returns stays until its next turn, so that no two write to one place.

    Attributes:
        contender: whose.
        depth: layers.
        own_bytes: of a layer, that no other reads.
        timed_by: "wall clock", "CUDA graph" or "CUDA events".
        times: seconds a layer, a list for each sample.
        others: share of the cores that others took in each sample.
        peak_bytes, peak_by, error: of a call; see results.py.

    Raises:
        Unavailable, ImportError: the contender can't run here.
    """

    def __init__(
        self,
        problem: Problem,
        contender: Contender,
        setting: Setting,
        cold_bytes: int,
        most_held: int = MOST_HELD,
    ) -> None:
        self.contender = contender
        self.device = setting.device
        self.times: list[list[float]] = []
        self.others: list[float] = []
        self.error: float | None = None
        with torch.set_grad_enabled(problem.needs_grad):
            first = contender.build(0)
            depth = max(1, min(MOST_LAYERS, round(cold_bytes / first.own_bytes))) if problem.streamed else 1
            depth = min(depth, max(1, int(most_held / max(first.held_bytes, first.own_bytes, 1))))
            if simulated() and contender.backend in ("cuda", "triton"):
                depth = 1  # the simulator has no cache
            self._layers: list[Layer] = [first]
            if depth > 1:  # a peer may keep more than it says: a second float matrix, a session's own copy
                before = resident()
                self._layers.append(contender.build(1))
                grown = resident() - before if setting.device == "cpu" else 0
                depth = min(depth, max(2, int(SHARE / 2 * free_memory(setting.device) / max(grown, 1))))
            self._layers += [contender.build(i) for i in range(2, depth)]
            self.depth = depth
            self.own_bytes = statistics.mean(layer.own_bytes for layer in self._layers)
            first.call()
            self.peak_bytes: int | None = None
            self.peak_by: str | None = None
            if not first.foreign:
                self.peak_bytes, self.peak_by = peak_memory(first.call, self.device)
            self._kept: list[Any] = [None] * depth
            # a backward runs on the stream of its forward: of one that is there already, not the graph's
            there = problem.needs_grad and problem.direction == "gradient"
            self._run, self.timed_by = self._timed(contender.capturable and not there)

    def _timed(self, capturable: bool) -> tuple[Callable[[], Any], str]:
        if self.device == "cpu":
            return self, "wall clock"
        self()
        if capturable:
            try:
                return captured(self), "CUDA graph"
            except RuntimeError:  # whatever forbids capture: the calls themselves can be timed
                torch.cuda.synchronize()
        return self, "CUDA events"

    def __call__(self) -> None:
        for i, layer in enumerate(self._layers):
            self._kept[i] = layer.call()

    def sample(self, effort: Effort) -> None:
        times, others = sample(self._run, effort, self.device)
        self.times.append([t / self.depth for t in times])
        self.others.append(others)

    def release(self) -> None:
        """Let go of the tensors; figures stay."""
        self._layers, self._kept, self._run = [], [], lambda: None

    @property
    def medians(self) -> list[float]:
        """Of each sample."""
        return [statistics.median(times) for times in self.times]

    @property
    def median(self) -> float:
        """Of all samples, every round counting as much as another."""
        return percentile(self.times, 0.5)

    @property
    def nbytes(self) -> float:
        """That a layer must move."""
        return self.own_bytes + self.contender.shared_bytes

    @property
    def working_set(self) -> float:
        return self.own_bytes * self.depth + self.contender.shared_bytes

    def ratio(self, peer: Chain) -> float:
        """How often this runs while the peer runs once; rounds that only one of them saw are left out."""
        return statistics.median(p / own for p, own in zip(peer.medians, self.medians, strict=False))


def ratios(own: Chain, chains: list[Chain]) -> dict[str, float]:
    """Of a chain over its peers, by their labels, and over the contender that does less."""
    found = {}
    c = own.contender
    for other in chains:
        o = other.contender
        if other is own or not other.times:
            continue
        if o.name == c.base and o.dtype == c.dtype:
            found["base"] = own.ratio(other)
        if o.peer and o.group in ("", c.group):
            found[o.label] = own.ratio(other)
    return found


@functools.lru_cache(maxsize=1024)
def _error(bounded: Problem, setting: Setting, name: str) -> float | None:
    """Of the contender of this name at bounded sizes."""
    contender = next(c for c in bounded.contenders(setting) if str(c) == name)
    with torch.set_grad_enabled(bounded.needs_grad):
        layer = contender.build(0)
    return relative_error(layer, bounded.needs_grad)


def said(error: BaseException) -> str:
    """What went wrong, in a line."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else "no message"
    return text if isinstance(error, (Unavailable, ImportError)) else f"{type(error).__name__}: {text}"


def versions() -> dict[str, str | None]:
    """By package; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__
    return found


@dataclass
class Measured:
    """A problem, its chains, and what could not run."""

    problem: Problem
    chains: list[Chain]
    not_timed: list[dict[str, Any]]


class Session:
    """Measures ops one after another; what was measured is kept when Ctrl-C ends it.

    Args:
        setting, effort: what to measure, and for how long.
        watch: told what comes next, and how many of `steps` are behind.
        known: the machine's ceiling, where it was measured before; none that is lower is divided by.

    Raises:
        ValueError: BITFUSE_BACKEND is set, which would decide for every case.
    """

    def __init__(
        self, setting: Setting, effort: Effort, watch: Watch | None = None, known: Ceiling | None = None
    ) -> None:
        if asked_backend() is not None:
            raise ValueError(
                "BITFUSE_BACKEND is set, or use_backend is at work: backends are named by --backend"
            )
        self.setting = replace(setting, cold_bytes=effort.cold_bytes)
        self.effort = effort
        self.threads = Threads(setting.device)
        self.device = device_name(setting.device)
        self._watch = watch or (lambda text, done: None)
        self._done = 0
        self._ceiling: Ceiling | None = None
        self.known = known

    def cases(self, op: str) -> list[tuple[Problem, list[Contender]]]:
        """Of an op, with this setting.

        Raises:
            ValueError: it has nothing of bitfuse to measure.
        """
        setting = narrowed(SUITES[op], self.setting)
        found = [
            (p, chosen(p.contenders(setting), setting))
            for p in SUITES[op].problems(setting)
            if setting.directions is None or p.direction in setting.directions
        ]
        if not found:
            raise ValueError(f"{op} has no direction {', '.join(setting.directions or ())}")
        if all(c.peer for _, contenders in found for c in contenders):
            raise ValueError(f"{op} has no backend {', '.join(setting.backends or ())} on {setting.device}")
        return found

    def steps(self, ops: list[str]) -> int:
        """That `watch` is told of: a chain to build, a sample, a ceiling."""
        count = sum(len(contenders) for op in ops for _, contenders in self.cases(op))
        return 2 * len(ops) + (1 + self.effort.rounds) * count

    def _step(self, text: str, steps: int = 1) -> None:
        self._watch(text, self._done)
        self._done += steps

    def run(self, op: str, command: str | None = None) -> dict[str, Any]:
        """Measure an op: a run, as results.py tells it, whose `interrupted` is True when Ctrl-C ended it."""
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        cases = self.cases(op)
        dtypes = {c.dtype: None for _, contenders in cases for c in contenders}
        all_measured: list[Measured] = []
        overhead: dict[str, float] = {}
        ceilings: dict[str, Ceiling] = {}
        interrupted = False
        try:
            ceilings["before"] = self._ceiling_for(list(dtypes))
            if not self.setting.gpu:
                with torch.no_grad():
                    overhead = microseconds(SUITES[op].overhead(), self.effort)
            for problem, contenders in cases:
                all_measured.append(Measured(problem, [], []))
                try:
                    self._measure(all_measured[-1], contenders)
                finally:
                    for chain in all_measured[-1].chains:
                        chain.release()
                    gc.collect()
            self._ceiling = None
            ceilings["after"] = self._ceiling_for(list(dtypes))
        except KeyboardInterrupt:
            interrupted = True
        weights.cache_clear()
        all_chains = [chain for m in all_measured for chain in m.chains if chain.times]
        ceiling = self._joined(ceilings, all_chains)
        return {
            "date": date,
            "commit": commit(),
            "command": command,
            "driver": cuda()["driver"] if self.setting.gpu else None,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "pinned": self.threads.pinned,
            "isa": cpp._cpu.isa() if cpp._cpu is not None and not self.setting.gpu else None,
            "effort": asdict(self.effort),
            "cache_bytes": last_level_cache(self.setting.device),
            "limits": {
                **(ceiling.as_json() if ceiling else {}),
                "measured": {name: c.as_json() for name, c in ceilings.items()},
            },
            "overhead_us": overhead,
            "interrupted": interrupted,
            "rows": [
                self._row(m.problem, chain, m.chains, ceiling)
                for m in all_measured
                for chain in m.chains
                if chain.times and ceiling
            ],
            "not_timed": [line for m in all_measured for line in m.not_timed],
        }

    def _ceiling_for(self, dtypes: list[str]) -> Ceiling:
        """Measured now, or just behind the op before."""
        self._step("limits of this machine")
        known = self._ceiling
        if known is None or any(d not in known.flops for d in dtypes):
            with self.threads.pin():
                self._ceiling = measure_ceiling(dtypes, self.effort, self.setting.device)
        assert self._ceiling is not None
        return self._ceiling

    def _measure(self, into: Measured, contenders: list[Contender]) -> None:
        """Build every chain of a problem, then sample them in turn."""
        problem, setting = into.problem, narrowed(SUITES[into.problem.op], self.setting)
        most = min(MOST_HELD, int(SHARE * free_memory(setting.device) / max(len(contenders), 1)))
        for contender in contenders:
            self._step(f"{problem.op}: {contender}")
            try:
                chain = Chain(problem, contender, self.setting, self.effort.cold_bytes, most)
                chain.error = _error(problem.bounded(), replace(setting, cold_bytes=1 << 18), str(contender))
                into.chains.append(chain)
            except (
                Exception
            ) as error:  # a peer that breaks must not end the run; what of ours breaks is marked
                self._step(f"{problem.op}: {contender}", self.effort.rounds)
                into.not_timed.append(
                    {
                        "case": contender.name,
                        "dtype": contender.dtype,
                        "sizes": {**problem.sizes, **contender.sizes},
                        "reason": said(error),
                        "failed": not (contender.peer or isinstance(error, (Unavailable, ImportError))),
                    }
                )
        for i in range(self.effort.rounds):
            for chain in into.chains:
                self._step(f"{problem.op}: {chain.contender}, round {i + 1}")
                with torch.set_grad_enabled(problem.needs_grad), self.threads.pin():
                    chain.sample(self.effort)

    def _joined(self, ceilings: dict[str, Ceiling], chains: list[Chain]) -> Ceiling | None:
        """The largest of all; what a row did, this machine can do."""
        if not ceilings:
            return None
        found = functools.reduce(Ceiling.joined, ceilings.values())
        if not chains:
            return found
        rows = Ceiling(0.0)
        cache = last_level_cache(self.setting.device)
        for chain in chains:
            median = chain.median
            dtype = chain.contender.dtype
            rows.flops[dtype] = max(rows.flops.get(dtype, 0.0), chain.contender.flops / median)
            if chain.working_set >= 2 * cache:  # only its own bytes came from memory for certain
                rows.bytes_per_second = max(rows.bytes_per_second, chain.own_bytes / median)
        ceilings["rows"] = rows
        if self.known is not None:
            ceilings["known"] = self.known
        self.known = functools.reduce(Ceiling.joined, ceilings.values())
        return self.known

    def _row(self, problem: Problem, chain: Chain, chains: list[Chain], ceiling: Ceiling) -> dict[str, Any]:
        c = chain.contender
        median = chain.median
        memory = chain.nbytes / ceiling.bytes_per_second >= c.flops / ceiling.flops[c.dtype]
        in_cache = chain.working_set < 2 * last_level_cache(self.setting.device)
        least = ceiling.seconds(chain.nbytes, c.flops, c.dtype)
        return {
            "case": c.name,
            "dtype": c.dtype,
            "who": c.who,
            "backend": c.backend,
            "format": c.format,
            "sizes": {**problem.sizes, **c.sizes},
            "model": problem.model,
            "layer": problem.layer,
            "layers": chain.depth,
            "median_ms": median * 1e3,
            "p20_ms": percentile(chain.times, 0.2) * 1e3,
            "p80_ms": percentile(chain.times, 0.8) * 1e3,
            "rounds_ms": [t * 1e3 for t in chain.medians],
            "gb_per_s": chain.nbytes / median / 1e9,
            "tflop_per_s": c.flops / median / 1e12,
            "bytes": chain.nbytes,
            "flops": c.flops,
            "share_of_limit": None if memory and in_cache else least / median,
            "bound": "memory" if memory else "arithmetic",
            "in_cache": in_cache,
            "timed_by": chain.timed_by,
            "others": statistics.median(chain.others),
            "error": chain.error,
            "error_sizes": {**problem.bounded().sizes, **c.sizes},
            "peak_bytes": chain.peak_bytes,
            "peak_by": chain.peak_by,
            "ratio": ratios(chain, chains),
        }

"""`bitfuse tune`: measures, on the GPU that is here, which backend serves a call the fastest, which tiles
Triton should take for it and how CUDA C++ should cut it, and writes that into the cache of policy.py."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitfuse.core import policy
from bitfuse.core.backends import BackendError, use_backend
from bitfuse.core.cost import as_time
from bitfuse.core.device import device_of
from bitfuse.core.explain import explain
from bitfuse.kernels.core.decoding import CODES
from bitfuse.kernels.core.launch import triton as compiler
from bitfuse.kernels.linear import lowbit_linear as triton
from bitfuse.kernels.linear import lowbit_linear_tiles as tiles
from bitfuse.ops.attention.append_kv import KVCache
from bitfuse.ops.linear import lowbit_linear_cuda as native
from bitfuse.weights.formats import get_format
from bitfuse.weights.quantize import quantize
from bitfuse.weights.weight import LowBitWeight

from .bench.shapes import DEFAULT, Shape
from .bench.timing import Effort, captured, sample
from .hypothetical import EVERY, Sizes

OPS = tuple(name for name, declaration in EVERY.items() if declaration.tuned is not None)
GAIN = 0.98  # of the rule's time: for less a measured choice is not worth another compilation
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Case:
    """A call to measure."""

    op: str
    sizes: Sizes

    def __str__(self) -> str:
        s, uses = self.sizes, EVERY[self.op].uses
        if "cache" in uses:
            return f"{self.op}, batch {s.batch}, {s.kv_len} keys, cache {s.cache}"
        if "heads" in uses:
            heads = f"{s.heads}/{s.kv_heads} heads of {s.head_dim}"
            return f"{self.op}, batch {s.batch}, {heads}, {s.seqlen} tokens"
        return f"{self.op}, M={s.m} N={s.n} K={s.k} {s.format}"

    @property
    def tokens(self) -> int:
        """That a call is about: 1 in a decoding step."""
        uses = EVERY[self.op].uses
        return self.sizes.m if "m" in uses else self.sizes.seqlen if "seqlen" in uses else self.sizes.batch


def cases(
    ops: tuple[str, ...], shape: Shape = DEFAULT, formats: tuple[str, ...] = ("int4",),
    rows: tuple[int, ...] | None = None, dtype: torch.dtype = torch.bfloat16,
) -> list[Case]:  # fmt: skip
    """What a model of this shape calls, in these formats; those of a decoding step first. `rows` are of x,
    None for all that an op is tuned for."""
    heads = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    found: list[Case] = []
    for op in ops:
        declaration = EVERY[op]
        assert declaration.tuned is not None
        axes = dict(declaration.tuned.values)
        if rows is not None and "m" in axes:
            axes["m"] = tuple(m for m in axes["m"] if m in rows)
        if "format" in declaration.uses:
            axes["format"] = formats
        linear = {"n", "k"} <= set(declaration.uses)
        matrices = dict.fromkeys(shape.matrices(declaration.matrices)) if linear else [None]
        for values in itertools.product(*axes.values()):
            for matrix in matrices:
                given = dict(zip(axes, values, strict=True))
                given |= heads if matrix is None else {"n": matrix[0], "k": matrix[1]}
                found.append(Case(op, Sizes(**given, dtype=dtype)))
    return sorted(found, key=lambda case: case.tokens)


def arguments(case: Case, device: str) -> tuple[Any, ...]:
    """Random ones on a device."""
    s = case.sizes

    def make(*shape: int, dtype: torch.dtype = s.dtype) -> torch.Tensor:
        if dtype is torch.int32:  # ids of adapters
            return torch.arange(shape[0], device=device, dtype=dtype) % s.adapters
        if dtype.itemsize == 1:  # of a weight, which is made anew below
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)

    made = list(EVERY[case.op].arguments(s, make))
    for i, argument in enumerate(made):
        if isinstance(argument, LowBitWeight):
            made[i] = quantize(make(s.n, s.k), s.format, group_size=s.group_size)
        if isinstance(argument, KVCache):
            argument.append(*(make(s.batch, s.kv_len, s.kv_heads, s.head_dim) for _ in range(2)))
    return tuple(made)


def graph_seconds(call: Callable[[], Any]) -> float:
    """The median time of a call, replayed as a CUDA graph where it can be one, its L2 cold."""
    call()
    try:
        run = captured(call)
    except RuntimeError:
        run = call
    return statistics.median(sample(run, Effort(budget=0.02), "cuda")[0])


@dataclass
class Found:
    """What the measurement of a case gave: seconds by backend; Triton's tiles and the cut of CUDA C++, if
    others than the rule's are faster."""

    key: str
    seconds: dict[str, float]
    config_key: str | None = None
    config: tiles.Config | None = None
    rule_seconds: float | None = None
    cut_key: str | None = None
    cut: native.Cut | None = None
    cut_rule_seconds: float | None = None

    def __str__(self) -> str:
        said = ", ".join(
            f"{name} {as_time(t)}" for name, t in sorted(self.seconds.items(), key=lambda e: e[1])
        )
        if self.cut is not None and self.cut_rule_seconds is not None:
            rows, splits = native.WARP_ROWS << self.cut.log_warps_n, self.cut.splits
            said += (
                f" (blocks of {rows} x {splits} splits; the model's take {as_time(self.cut_rule_seconds)})"
            )
        if self.config is None or self.rule_seconds is None:
            return said
        c = self.config
        tiles = f"{c.tile_m}x{c.tile_n}x{c.tile_k}, {c.splits} splits, {c.stages} stages"
        return f"{said} (tiles {tiles}; the rule's take {as_time(self.rule_seconds)})"


def measure(case: Case, device: str, timer: Timer, until: float) -> Found | None:
    """None where only one backend serves the case and it has nothing to choose."""
    call = EVERY[case.op]
    args, options = arguments(case, device), call.options(case.sizes)

    def run() -> Any:
        return call.function(*args, **options)

    key = explain(call.function, *args, **options).policy_key
    assert key is not None
    found = Found(key, {})
    for name in ("cuda", "triton"):
        try:
            with use_backend(name):
                found.seconds[name] = timer(run)
        except BackendError:
            continue
    if call.tuned is not None and call.tuned.tiles and "cuda" in found.seconds:
        _cuts(case, device, run, timer, until, found)
    if call.tuned is not None and call.tuned.tiles and "triton" in found.seconds:
        _tiles(case, device, run, timer, until, found)
    chosen = found.config is not None or found.cut is not None
    return found if len(found.seconds) > 1 or chosen else None


def _cuts(case: Case, device: str, run: Callable[[], Any], timer: Timer, until: float, found: Found) -> None:
    """Other cuts than the model's, which compile nothing, each timed."""
    s = case.sizes
    format = get_format(s.format, group_size=s.group_size)
    gpu = device_of(torch.device(device, 0) if device == "cuda" else torch.device(device))
    best = found.cut_rule_seconds = found.seconds["cuda"]
    for cut in native.candidates(s.m, s.n, s.k, s.format, format.nested, gpu)[1:]:
        if time.monotonic() > until:
            break
        with use_backend("cuda"), native.trying(cut):
            seconds = timer(run)
        if seconds < best * GAIN:
            best, found.cut = seconds, cut
    if found.cut is not None:
        found.seconds["cuda"] = best
        found.cut_key = native.tuning_key(s.m, s.n, s.k, s.format)


def _tiles(case: Case, device: str, run: Callable[[], Any], timer: Timer, until: float, found: Found) -> None:
    """Other tiles than the rule's, each compiled and timed."""
    s = case.sizes
    group = get_format(s.format, group_size=s.group_size).group_size
    group = s.k if group == -1 else group
    gpu = device_of(torch.device(device, 0) if device == "cuda" else torch.device(device))
    best = found.rule_seconds = found.seconds["triton"]
    bits = CODES[s.format].bits
    product = tiles.Product(s.m, s.n, s.k, bits, 0 if group == s.k else group, s.dtype.itemsize)
    for config in tiles.candidates(product, gpu)[1:]:
        if time.monotonic() > until:
            break
        try:
            with use_backend("triton"), triton.trying(config):
                seconds = timer(run)
        except (
            RuntimeError,
            compiler.TritonError,
        ):  # no shared memory or registers for these tiles here
            continue
        if seconds < best * GAIN:
            best, found.config = seconds, config
    if found.config is not None:
        found.seconds["triton"] = best
        found.config_key = tiles.tuning_key(s.m, s.n, s.k, s.format, group, s.dtype)


def tune(
    device_name: str,
    todo: list[Case],
    minutes: float,
    again: bool,
    timer: Timer = graph_seconds,
    device: str = "cuda",
) -> Iterator[tuple[Case, Found | None]]:
    """Measure one case after the other until the time is up, each written down when it is done.

    Raises:
        policy.PolicyError: the cache can't be read or written.
    """
    until = time.monotonic() + 60 * minutes
    file = policy.path()
    for case in todo:
        if time.monotonic() > until:
            return
        devices = policy.read(file)
        mine = devices.get(device_name)
        if mine is None or mine.get("versions") != policy.versions():
            mine = {"versions": policy.versions(), "backends": {}, "configs": {}, "done": []}
        if str(case) in mine["done"] and not again:
            yield case, None
            continue
        found = measure(case, device, timer, until)
        mine["done"] = sorted({*mine["done"], str(case)})
        if found is not None:
            mine["backends"][found.key] = found.seconds
            if found.config is not None and found.config_key is not None:
                mine["configs"][found.config_key] = list(found.config)
            if found.cut is not None and found.cut_key is not None:
                mine["configs"][found.cut_key] = list(found.cut)
        policy.write(file, {**devices, device_name: mine})
        yield case, found

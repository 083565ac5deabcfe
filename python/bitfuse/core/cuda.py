"""bitfuse._cuda, the CUDA C++ kernels: the extension, in whose place `bitfuse.load_kernels` may put another
build, and what every launch needs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch

from . import bundle
from .device import device_of, pretended, served
from .tensors import aside

FLOATS = (torch.float16, torch.bfloat16)  # what tensor cores take here

_machine_code = functools.cache(bundle.machine_code)
_told: set[str] = set()
_F = TypeVar("_F", bound=Callable[..., Any])


class Extension:
    """The one place that holds the extension.

    Attributes:
        module: the extension; None where there is none.
        missing: why there is none.
    """

    def __init__(self) -> None:
        self._cached: list[Any] = []
        self.module: Any = None
        self.missing: str | None = None
        try:
            self.module = importlib.import_module("bitfuse._cuda")
        except ImportError as error:
            self.missing = f"the CUDA extension bitfuse._cuda is not there ({error})"

    def cached(self, function: _F) -> _F:
        """`functools.lru_cache` for what the extension answers: forgotten when another takes its place."""
        kept: Any = functools.lru_cache(maxsize=4096)(function)
        self._cached.append(kept)
        return kept

    def replace(self, module: ModuleType) -> None:
        """Put another build in the place of this one."""
        self.module, self.missing = module, None
        for kept in self._cached:
            kept.cache_clear()

    def refuses(self, device: torch.device) -> str | None:
        """Why its kernels can't run on tensors of this device; None when they can."""
        if self.missing is not None:
            return self.missing
        if not served(device):
            return "the tensors are not on a GPU"
        return refuse(self.module, device_of(device).capability)


def refuse(extension: ModuleType, capability: int) -> str | None:
    """Why an extension can't run on a card of this compute capability; None when it can.

    That it runs code of another architecture there, slower or compiled by the driver, is told once.
    """
    if capability < 80:
        return f"compute capability {capability / 10} is below 8.0"
    runs, told = _machine_code(extension.architectures(), capability)
    if runs is None:
        return told
    if told is not None and told not in _told and pretended() is None:
        _told.add(told)
        how = f"`bitfuse compile --arch sm_{capability}`, or BITFUSE_CUDA_ARCHS={capability} in a build"
        bundle.log.warning("%s. Better: %s", told, how)
    return None


cuda = Extension()
bundle.on_extension(cuda.replace)
bundle.load_from_environment()


def stream_of(t: torch.Tensor) -> int:
    """The current stream of a tensor's GPU, as native code takes it."""
    return torch._C._cuda_getCurrentRawStream(t.device.index or 0) if t.is_cuda else 0


_counters: dict[tuple[int, int], torch.Tensor] = {}
# what is left, by device, of zeroed counters for kernels in CUDA graphs
_for_graphs: dict[int, torch.Tensor] = {}
_EAGER, _GRAPHS = 1 << 13, 1 << 18


def zeroed_counters(count: int, device: torch.device, stream: int) -> torch.Tensor:
    """Counters by which blocks of a kernel know how far the others are, zero, at a multiple of 8 bytes; the
    kernel leaves them zero.

    Kept for each device and stream, within which one kernel follows the other. A kernel in a CUDA graph gets
    its own, for good: when it is replayed, and beside what, is not known here. They come from a reserve that
    the device's first call outside a graph makes; where there is none, the graph clears them each time.
    """
    index = device.index or 0
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        reserve = _for_graphs.get(index)
        if reserve is None or reserve.numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _for_graphs[index] = reserve[count + count % 2 :]
        return reserve[:count]
    kept = _counters.get((index, stream))
    if kept is None or kept.numel() < count:
        with aside():
            kept = torch.zeros(max(count, _EAGER), dtype=torch.int32, device=device)
            _counters[index, stream] = kept
            if device.type == "cuda" and index not in _for_graphs:
                _for_graphs[index] = torch.zeros(_GRAPHS, dtype=torch.int32, device=device)
    return kept

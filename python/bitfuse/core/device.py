"""The GPU that a call is planned for: a real one, the simulator's, or one that is pretended.

Whoever plans asks `device_of`; whether tensors are where a GPU's kernels can read them, `served`. Nobody else
asks torch, the simulator or Triton's driver what there is.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .gpus import Arch, Gpu, arch_of

_pretended: contextvars.ContextVar[Gpu | None] = contextvars.ContextVar("bitfuse_gpu", default=None)
# GPU that this process plans kernels for, with meta tensors: see `plan_for`
_planned: Gpu | None = None


class Device(NamedTuple):
    """A GPU as a kernel's planning sees it.

    Attributes:
        number: CUDA's; of the simulator, which may be another GPU at each call, less its capability, so that
            plans are kept apart.
        capability: compute capability, 80 for 8.0.
        multiprocessors: how many.
    """

    number: int
    capability: int
    multiprocessors: int

    @property
    def arch(self) -> Arch:
        """Its limits, and what it has instructions for."""
        return arch_of(self.capability)


@functools.cache
def simulated() -> bool:
    """True when the GPU simulator stands in for the CUDA runtime: GPU backends then take CPU tensors, when
    asked for."""
    return hasattr(ctypes.CDLL(None), "cusim_run_ptx")


def pretended() -> Gpu | None:
    """The GPU of `pretend` or `plan_for`."""
    return _pretended.get() or _planned


@contextlib.contextmanager
def pretend(gpu: Gpu | None) -> Iterator[None]:
    """Explain calls that nobody makes: tensors made inside are fake, and may be on "cuda", which is then this
    GPU; it need not be here. Nothing can run."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    token = _pretended.set(gpu)
    try:
        # a fake tensor's address reads as 0, which is aligned, with a warning each time
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield
    finally:
        _pretended.reset(token)


def plan_for(gpu: Gpu) -> None:
    """From here on meta tensors are on this GPU, which need not be here: calls plan their Triton kernels for
    it, and where those refuse, the op's fake says what comes out. Nothing can run in this process any
    more."""
    global _planned
    _planned = gpu


def planning() -> bool:
    """Whether meta tensors stand for those of a GPU: see `plan_for`."""
    return _planned is not None


def served(device: torch.device) -> bool:
    """Whether a GPU's kernels take tensors of this device: a GPU's own, or what stands for them."""
    if device.type == "cuda":
        return True
    return simulated() if _planned is None else device.type == "meta"


def device_of(device: torch.device) -> Device:
    """The GPU that kernels on these tensors run on."""
    gpu = pretended()
    if gpu is not None:
        return Device(0, gpu.capability, gpu.multiprocessors)
    if device.type == "cuda":
        return _real(torch.cuda.current_device() if device.index is None else device.index)
    major, minor, multiprocessors = (_attribute(which) for which in _ATTRIBUTES)
    capability = 10 * major + minor
    return Device(-capability, capability, multiprocessors)


@functools.lru_cache(maxsize=64)
def _real(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(index, 10 * properties.major + properties.minor, properties.multi_processor_count)


_ATTRIBUTES = (75, 76, 16)  # cudaDeviceAttr: both halves of the capability, multiprocessors


def _attribute(which: int) -> int:
    """Of the simulator's device, which may be another at each call."""
    value = ctypes.c_int()
    ctypes.CDLL(None).cudaDeviceGetAttribute(ctypes.byref(value), which, 0)
    return value.value

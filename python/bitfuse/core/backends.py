"""Backends: the implementations of an op, in which order a call tries them, and which alone is asked for."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import declaration, policy
from .cost import Prediction
from .device import planning, pretended, simulated

# the backend that alone is to serve, None for any. The environment is read once, for that costs as much as
# the checks of a call
asked: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "bitfuse_backend", default=os.environ.get("BITFUSE_BACKEND") or None
)
BACKENDS = ("cpp", "cuda", "triton", "reference")
# backends that serve nothing, "attention:cuda,rope:triton": for a kernel that hangs, crashes or is wrong here
_without = os.environ.get("BITFUSE_WITHOUT") or None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `supports` takes the op's arguments and returns None, or the reason why it can't serve them. `run` takes
    the same. So does `direct`, of the first backend for CPU tensors: it does what the op's check and `run`
    do, in one call, for arguments that are plain in every respect, and returns None for all others.
    `predicted` takes the call's cost, a GPU's rates, and the op's arguments; None: the cost says all.
    """

    name: str
    devices: tuple[str, ...]
    supports: Callable[..., str | None]
    run: Callable[..., Any]
    direct: Callable[..., Any] | None = None
    predicted: Callable[..., Prediction] | None = None


class BackendError(RuntimeError):
    """The backend that was asked for can't serve this call."""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call inside by this backend; a call that it can't serve raises `BackendError` with the
    reason.

    Raises:
        ValueError: no backend of that name.
    """
    token = asked.set(_check_backend(name, "name"))
    try:
        yield
    finally:
        asked.reset(token)


def _check_backend(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} is {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    return name


def asked_backend() -> str | None:
    """The backend that `use_backend` or BITFUSE_BACKEND asks for."""
    name = asked.get()
    return None if name is None else _check_backend(name, "BITFUSE_BACKEND")


@functools.cache
def left_out() -> frozenset[tuple[str, str]]:
    """The ops and backends that BITFUSE_WITHOUT leaves out; a public function's name stands for all ops that
    it is made of.

    Raises:
        ValueError: it names an op or a backend that there is not, or the reference, which serves what nobody
            else does.
    """
    found: set[tuple[str, str]] = set()
    if _without is None:
        return frozenset()
    functions = {each.name: each for each in declaration.declarations()}
    for word in _without.split(","):
        op, _, backend = word.strip().partition(":")
        parts = {part.op.name for part in functions[op].kernels} if op in functions else set()
        there = {b.name for each in _every if each.op in parts | {op} for b in each.backends} - {"reference"}
        if backend not in there:
            kernels = f"{op} has {', '.join(sorted(there))}" if there else f"no op {op!r} has kernels"
            raise ValueError(
                f"BITFUSE_WITHOUT is {_without!r}, expected ops and backends such as "
                f"attention:cuda,rope:triton: {kernels}"
            )
        found |= {(each, backend) for each in parts | {op}}
    return frozenset(found)


_LEFT_OUT = "BITFUSE_WITHOUT leaves it out"


def always(*args: Any) -> None:
    """`Backend.supports` of one that serves whatever the op does."""


_every: list[Candidates] = []  # of every op


class Candidates:
    """Who may serve the calls of an op.

    Args:
        op: its name.
        backends: in the order in which they are tried, the reference last.
        fake: of the op, which serves meta tensors.
        kind: of the op's arguments, what decides which backend is the fastest on a GPU; None: nothing does.
        plain: the reference serves every call, whichever backend is asked for.

    Attributes:
        op, backends: as they were given.
        quick: the order for CPU tensors; None where it takes more than their device to find it.
    """

    def __init__(
        self,
        op: str,
        backends: tuple[Backend, ...],
        fake: Callable[..., Any],
        kind: Callable[..., tuple[Any, ...]] | None,
        plain: bool,
    ) -> None:
        self.op, self.backends, self._kind, self._plain = op, backends, kind, plain
        self._fake = Backend("fake", ("meta",), always, fake)
        _every.append(self)
        # what is left out is known when all ops are
        self.quick: tuple[Backend, ...] | None = None if _without else self._on("cpu")
        # of GPUs, by their number
        self._orders: dict[int, tuple[Backend, ...]] = {}
        # by device that has measurements: its name, and the fastest backend of a kind of call, or None
        self._measured: dict[torch.device, tuple[str, dict[tuple[Any, ...], str | None]]] = {}

    def of(self, first: torch.Tensor, args: tuple[Any, ...]) -> tuple[Backend, ...]:
        """Those to try for a call, whose first tensor decides on the device."""
        order = self._orders.get(first.get_device()) if first.is_cuda else None
        if order is None:
            order = self._ordered(first.device)
        return self._preferring(first.device, order, args) if self._measured else order

    def _ordered(self, device: torch.device) -> tuple[Backend, ...]:
        order = self._on(device.type)
        if device.type == "cuda" and torch.cuda.is_available():
            name = torch.cuda.get_device_name(device)
            if self._kind is not None and device not in self._measured and policy.of(name)["backends"]:
                self.measured_as(device, name)
            self._orders[device.index] = order
        return order

    def _on(self, kind: str) -> tuple[Backend, ...]:
        """Those that run on this kind of device."""
        here = [b for b in self.backends if _without is None or (self.op, b.name) not in left_out()]
        if kind != "meta":
            return tuple(b for b in here if kind in b.devices or b.name == "reference")
        # a GPU that is planned for is Triton's: the CUDA extension asks nobody to plan
        return (*(b for b in here if b.name == "triton" and planning()), self._fake)

    def measured_as(self, device: torch.device, name: str) -> None:
        """Calls on this device are served by what `bitfuse tune` measured to be the fastest on the GPU of
        this name."""
        self._measured[device] = name, {}
        if device.type == "cpu":
            self.quick = None

    def _preferring(
        self, device: torch.device, order: tuple[Backend, ...], args: tuple[Any, ...]
    ) -> tuple[Backend, ...]:
        measured = self._measured.get(device)
        if measured is None or self._kind is None:
            return order
        name, fastest = measured
        kind = self._kind(*args)
        if kind not in fastest:
            fastest[kind] = policy.fastest(name, self.op, kind)
        first = fastest[kind]
        return tuple(sorted(order, key=lambda b: b.name != first)) if first else order

    def only(self, name: str | None, device: str, args: tuple[Any, ...]) -> Backend:
        """The one that is asked for.

        Raises:
            BackendError: it can't serve the call.
        """
        if self._plain:
            return self.backends[-1]
        for backend in self.backends:
            if backend.name != name:
                continue
            if _without is not None and (self.op, name) in left_out():
                raise BackendError(f"{self.op}: backend {name!r} was asked for, but {_LEFT_OUT}")
            if device not in backend.devices and not (simulated() and "cuda" in backend.devices):
                raise BackendError(
                    f"{self.op}: backend {name!r} was asked for, but it does not run on {device} tensors"
                )
            if reason := backend.supports(*args):
                raise BackendError(f"{self.op}: backend {name!r} was asked for, but {reason}")
            return backend
        raise BackendError(f"{self.op}: backend {name!r} was asked for, but this op has none of that name")

    def judged(self, device: torch.device, args: tuple[Any, ...]) -> tuple[str, dict[str, str], str]:
        """Who would serve a call, why those before it would not, and a note about the first."""
        name = asked_backend()
        if self._plain:
            return "reference", {}, "plain torch on every device by design"
        if name is not None:
            chosen = self.only(name, device.type, args).name
            return chosen, {b.name: f"{name} was asked for" for b in self.backends if b.name != chosen}, ""
        order = self.backends
        if pretended() is None:
            self._ordered(device)  # a GPU's measurements are looked for at its first call
            order = self._preferring(device, order, args)
        refused: dict[str, str] = {}
        for backend in order:
            if device.type not in backend.devices:
                on = " and ".join(backend.devices)
                refused[backend.name] = f"it runs on {on}, the tensors are on {device.type}"
            elif (self.op, backend.name) in left_out():
                refused[backend.name] = _LEFT_OUT
            elif reason := backend.supports(*args):
                refused[backend.name] = reason
            else:
                break
        return backend.name, refused, ""


def reference_backend(reference: Callable[..., Any], first: Callable[..., torch.Tensor]) -> Backend:
    """The reference as the last backend, in the dtypes of its arguments, as kernels compute: autocast has had
    its say before. `first` finds the tensor that decides on the device."""

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return reference(*args)
        with torch.autocast(first(*args).device.type, enabled=False):
            return reference(*args)

    return Backend("reference", ("cpu", "cuda"), always, run)

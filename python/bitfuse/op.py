"""Op: one operator with several kernels behind it, one reference that says what it means, and who runs a call
and why."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode as _dispatch_mode

log = logging.getLogger("bitfuse")
_library = torch.library.Library("bitfuse", "DEF")
_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("bitfuse_backend", default=None)
_ENVIRONMENT = os.environ.get(
    "BITFUSE_BACKEND"
)  # read once: os.environ costs as much as the checks of a call
BACKENDS = ("cpp", "cuda", "triton", "reference")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `supports` takes the op's arguments and returns None, or the reason why it can't serve them. `run` takes
    the same.
    """

    name: str
    devices: tuple[str, ...]
    supports: Callable[..., str | None]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Explanation:
    """Who serves a call, and why those before it in the order do not."""

    op: str
    device: str
    chosen: str
    refused: dict[str, str]
    note: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.chosen} runs{self.note and ', '}{self.note}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.refused.items()])


class BackendError(RuntimeError):
    """The backend that was asked for can't serve this call."""


@functools.cache
def simulated_gpu() -> bool:
    """True when the GPU simulator stands in for the CUDA runtime: GPU backends then take CPU tensors, when
    asked for."""
    return hasattr(ctypes.CDLL(None), "cusim_run_ptx")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call inside by this backend; a call that it can't serve raises `BackendError` with the
    reason.

    Raises:
        ValueError: no backend of that name.
    """
    token = _asked.set(_check_backend(name, "name"))
    try:
        yield
    finally:
        _asked.reset(token)


def _check_backend(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} is {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    return name


def asked_backend() -> str | None:
    """The backend that `use_backend` or BITFUSE_BACKEND asks for."""
    asked = _asked.get()
    if asked is None and _ENVIRONMENT:
        return _check_backend(_ENVIRONMENT, "BITFUSE_BACKEND")
    return asked


_explainers: dict[Any, Callable[..., Explanation]] = {}


def explains(
    function: Callable[..., Any],
) -> Callable[[Callable[..., Explanation]], Callable[..., Explanation]]:
    """Register what `explain` answers for a public function; it takes that function's arguments."""

    def register(explainer: Callable[..., Explanation]) -> Callable[..., Explanation]:
        _explainers[function] = explainer
        return explainer

    return register


def explain(op: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Who would serve ``op(*args)``, and why the backends before it would not. Runs nothing.

    Args:
        op: a function of bitfuse such as `bitfuse.lowbit_linear`, or a bitfuse layer.

    Raises:
        TypeError: op is neither.
    """
    explainer = getattr(op, "explain", None) or _explainers.get(op)
    if explainer is None:
        raise TypeError(f"op is {op!r}, expected a bitfuse op or layer, such as bitfuse.lowbit_linear")
    return explainer(*args, **kwargs)


class Op:
    """An operator: its torch schema, reference, fake and backends.

    It is called with objects (a weight, the projections of an input), which `check`, the reference, the fake
    and the backends see too. torch knows tensors, numbers and lists of them only: `flatten` makes them of
    the objects, `unflatten` undoes it.

    Args:
        schema: as `torch.library` takes it, "name(Tensor x, ...) -> Tensor". The first argument, or
            the first of it if it is a list, decides the device.
        check: raises TypeError or ValueError for arguments that no backend may see.
        reference: the meaning, in plain torch; serves whatever no backend does.
        fake: shapes and dtypes only, for torch.compile and torch.export.
        flatten, unflatten: from the arguments of a call to those of the schema, and back; None when they are
            the same.
        plain: the op is plain torch on every device by design, such as a few matmuls that torch already does
            well: the reference serves it, whichever backend is asked for, without a warning.
    """

    def __init__(
        self,
        schema: str,
        check: Callable[..., None],
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        backends: tuple[Backend, ...],
        flatten: Callable[..., tuple[Any, ...]] | None = None,
        unflatten: Callable[..., tuple[Any, ...]] | None = None,
        plain: bool = False,
    ) -> None:
        self.name = schema.partition("(")[0]
        if plain and backends:
            raise ValueError(f"{self.name}: plain is True, and backends has {len(backends)}, expected none")
        self.plain = plain
        self.check = check
        self.reference = reference
        self.fake = fake
        self.backends = (*backends, Backend("reference", ("cpu", "cuda"), lambda *args: None, reference))
        self._order: dict[torch.device, tuple[Backend, ...]] = {}
        self._told: set[tuple[Any, ...]] = set()
        self._flatten = flatten
        self.__doc__ = reference.__doc__

        def with_objects(function: Callable[..., Any]) -> Callable[..., Any]:
            return function if unflatten is None else lambda *flat: function(*unflatten(*flat))

        _library.define(schema)
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, with_objects(self._serve), key)
        torch.library.register_fake(f"bitfuse::{self.name}", with_objects(fake), lib=_library)
        self._torch = getattr(torch.ops.bitfuse, self.name).default

    def __call__(self, *args: Any) -> Any:
        if is_compiling() or _dispatch_mode() is not None:
            return self._torch(*(args if self._flatten is None else self._flatten(*args)))
        return self._serve(*args)

    def _serve(self, *args: Any) -> Any:
        self.check(*args)
        if _ENVIRONMENT or _asked.get() is not None:
            return self._only(asked_backend(), args).run(*args)
        device = _first(args).device
        for backend in self._order.get(device) or self._ordered(device):
            if backend.supports(*args) is None:
                if backend.name == "reference" and not self.plain:
                    self._tell(device.type, args)
                return backend.run(*args)
        raise AssertionError("the reference serves every call")

    def _ordered(self, device: torch.device) -> tuple[Backend, ...]:
        if device.type == "meta":
            order: tuple[Backend, ...] = (Backend("fake", ("meta",), lambda *args: None, self.fake),)
        else:
            order = tuple(b for b in self.backends if device.type in b.devices or b.name == "reference")
        self._order[device] = order
        return order

    def _only(self, name: str | None, args: tuple[Any, ...]) -> Backend:
        device = _first(args).device.type
        if self.plain:
            return self.backends[-1]
        for backend in self.backends:
            if backend.name != name:
                continue
            if device not in backend.devices and not (simulated_gpu() and "cuda" in backend.devices):
                raise BackendError(
                    f"{self.name}: backend {name!r} was asked for, but it does not run on {device} tensors"
                )
            if reason := backend.supports(*args):
                raise BackendError(f"{self.name}: backend {name!r} was asked for, but {reason}")
            return backend
        raise BackendError(f"{self.name}: backend {name!r} was asked for, but this op has none of that name")

    def _tell(self, device: str, args: tuple[Any, ...]) -> None:
        """Say once for each kind of call that the reference, an order of magnitude slower, serves it."""
        kind = (device, _first(args).dtype, _without_tensors(args))
        if kind not in self._told:
            self._told.add(kind)
            log.warning("bitfuse falls back to plain PyTorch, which is slow. %s", self.explain(*args))

    def explain(self, *args: Any) -> Explanation:
        """Who would serve a call with these arguments, and why the others would not. Runs nothing."""
        self.check(*args)
        device = _first(args).device.type
        asked = asked_backend()
        if self.plain:
            return Explanation(self.name, device, "reference", {}, "plain torch on every device by design")
        if asked is not None:
            backend = self._only(asked, args)
            return Explanation(
                self.name,
                device,
                backend.name,
                {b.name: f"{asked} was asked for" for b in self.backends if b is not backend},
            )
        refused: dict[str, str] = {}
        for backend in self.backends:
            if device not in backend.devices:
                refused[backend.name] = (
                    f"it runs on {' and '.join(backend.devices)}, the tensors are on {device}"
                )
            elif reason := backend.supports(*args):
                refused[backend.name] = reason
            else:
                return Explanation(self.name, device, backend.name, refused)
        return Explanation(self.name, device, "reference", refused)


def _first(args: tuple[Any, ...]) -> torch.Tensor:
    first = args[0]
    return first if isinstance(first, torch.Tensor) else first[0]


def _without_tensors(argument: Any) -> Any:
    """What of an argument says which kernel it takes: names and sizes, not tensors nor the floats (a learning
    rate) that change from call to call."""
    if isinstance(argument, (tuple, list)):
        return tuple(_without_tensors(a) for a in argument)
    return None if isinstance(argument, (torch.Tensor, float)) else argument

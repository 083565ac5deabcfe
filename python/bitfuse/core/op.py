"""Op: one operator with several kernels behind it, one reference that says what it means, and who runs a call
and why."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from . import policy
from .autograd import is_dual, no_forward_mode, tracing, transformed
from .cost import Cost, Rates, as_time, moved
from .device import pretended, simulated
from .gpus import find
from .tensors import Unread, has_no_memory

log = logging.getLogger("bitfuse")
_library = torch.library.Library("bitfuse", "DEF")
_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("bitfuse_backend", default=None)
_ENVIRONMENT = os.environ.get(
    "BITFUSE_BACKEND"
)  # read once: os.environ costs as much as the checks of a call
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_BATCHED = torch._C._dispatch_key_parse("Batched")
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
    """Who serves a call, why those before it in the order do not, and what the call costs.

    Attributes:
        refused: by backend, the reason.
        note: about `chosen`.
        cost: bytes and FLOPs.
        rates: of the device, where they are known: a GPU's data sheet; None for a CPU.
        policy_key: what `bitfuse tune` remembers such calls by; None where there is nothing to tune.
    """

    op: str
    device: str
    chosen: str
    refused: dict[str, str]
    note: str
    cost: Cost
    rates: Rates | None
    policy_key: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.chosen} runs{self.note and ', '}{self.note}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        lines.append(f"  {self.cost}")
        if self.rates is not None:
            least, by = self.cost.seconds(self.rates)
            lines[-1] += f": at least {as_time(least)} on {self.rates.name}, bound by {by}"
            if self.chosen != "reference":
                lines[-1] += f"; about {as_time(self.cost.predicted(self.rates))} to be expected"
        return "\n".join(lines)


class BackendError(RuntimeError):
    """The backend that was asked for can't serve this call."""


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


def together(name: str, parts: Sequence[tuple[str, Explanation]]) -> Explanation:
    """The explanation of a function that makes several calls, each with what it is for.

    Who serves it is who serves most of it, by bytes; where its parts differ, each is named.
    """
    several = len({part.chosen for _, part in parts}) > 1
    chosen = max((part for _, part in parts), key=lambda part: part.cost.nbytes).chosen
    refused: dict[str, str] = {}
    for what, part in parts:
        for backend, reason in part.refused.items():
            if reason not in refused.get(backend, ""):
                before = f"{refused[backend]}; " if backend in refused else ""
                refused[backend] = f"{before}{reason}" + (f" ({what})" if several else "")
    said = ", ".join(f"{what}: {part.op}" + (f" by {part.chosen}" if several else "") for what, part in parts)
    cost = functools.reduce(lambda a, b: a + b, (part.cost for _, part in parts))
    first = parts[0][1]
    return Explanation(name, first.device, chosen, refused, said, cost, first.rates)


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
        cost: what a call can't do without, of the same arguments; None: it reads its tensors and writes what
            the fake makes, and multiplies next to nothing.
        kind: of the same arguments, what decides which backend is the fastest on a GPU; asked where `bitfuse
            tune` has measured.
        rows: the leading dimensions of the first argument are rows that have nothing to do with each other:
            `torch.vmap` then adds one more, and else calls the op for each entry.
        writes: of the same arguments, the tensors that a call writes to.
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
        writes: Callable[..., tuple[torch.Tensor | None, ...]] | None = None,
        cost: Callable[..., Cost] | None = None,
        kind: Callable[..., tuple[Any, ...]] | None = None,
        rows: bool = False,
    ) -> None:
        self.name = schema.partition("(")[0]
        if plain and backends:
            raise ValueError(f"{self.name}: plain is True, and backends has {len(backends)}, expected none")
        self.plain = plain
        self.cost = cost or self._moves
        self.check = check
        self.reference = reference
        self.fake = fake
        last = Backend("reference", ("cpu", "cuda"), lambda *args: None, _without_autocast(reference))
        self.backends = (*backends, last)
        self._writes = writes
        if writes is not None:
            self._serve = self._serve_writing  # type: ignore[method-assign]
        self._order: dict[torch.device, tuple[Backend, ...]] = {}
        self._kind = kind
        # by device that has measurements, the fastest backend of a kind of call, or None
        self._tuned: dict[torch.device, dict[tuple[Any, ...], str | None]] = {}
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
        self._rows = rows
        torch.library.register_vmap(f"bitfuse::{self.name}", self._mapped, lib=_library)

    def __call__(self, *args: Any) -> Any:
        # who watches what torch does must see the op, not what its kernels allocate
        if is_compiling() or _dispatch_modes() or tracing() is not None or transformed():
            return self._torch(*(args if self._flatten is None else self._flatten(*args)))
        if forward_ad._current_level >= 0:
            self._refuse_tangents(args)
        try:
            return self._serve(*args)
        except Unread:
            return self._dispatched(args)
        except (TypeError, ValueError):  # an address of 0, perhaps; else the check has said what is wrong
            if not any(map(_dispatches, self._tensors(args, []))):
                raise
            return self._dispatched(args)
        except (AttributeError, LookupError, ArithmeticError, RuntimeError):
            wrong: list[str] = []
            tensors = self._tensors(args, wrong)
            if any(map(_dispatches, tensors)):  # its class says what an op does of it, or that it can't
                return self._dispatched(args)
            if not any(map(_batched, tensors)):
                if wrong:
                    raise TypeError(wrong[0]) from None
                raise
        return self._mapped_gradients(
            args
        )  # `is_grads_batched` has a vmap of its own, which no flag tells of

    def _mapped_gradients(self, args: tuple[Any, ...]) -> Any:
        """The op under the vmap of `torch.autograd.grad(is_grads_batched=True)`."""
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        leaves, spec = pytree.tree_flatten(list(args if self._flatten is None else self._flatten(*args)))
        dims = [0 if _batched(leaf) else None for leaf in leaves]
        dense = [
            t if d is None else torch._remove_batch_dim(t, level, 1, 0)
            for t, d in zip(leaves, dims, strict=True)
        ]
        size = next(t.shape[0] for t, d in zip(dense, dims, strict=True) if d is not None)
        unflatten = pytree.tree_unflatten
        out, _ = self._mapped(_Mapped(size), tuple(unflatten(dims, spec)), *unflatten(dense, spec))
        if out is None:
            return None
        return pytree.tree_map(lambda t: torch._add_batch_dim(t, 0, level), out)

    def _mapped(self, info: Any, in_dims: tuple[Any, ...], *flat: Any) -> tuple[Any, Any]:
        """The op under `torch.vmap`: a call for each entry, or one for all where they are rows."""
        leaves, spec = pytree.tree_flatten(list(flat))
        dims = pytree.tree_leaves(list(in_dims))
        if self._rows and in_dims[0] is not None and all(d is None for d in dims[1:]):
            out = self._torch(flat[0].movedim(in_dims[0], 0), *flat[1:])
            return out, 0
        written = [
            i for i, a in enumerate(self._torch._schema.arguments) if a.alias_info and a.alias_info.is_write
        ]
        for i in written:
            if any(
                d is None
                for d, t in zip(*map(pytree.tree_leaves, (in_dims[i], flat[i])), strict=True)
                if t is not None
            ):
                name = self._torch._schema.arguments[i].name
                raise RuntimeError(
                    f"{self.name} writes to {name}, which torch.vmap does not map over: each entry would "
                    "write to the same place"
                )
        if info.batch_size == 0:
            leaves = [
                t if d is None else t.new_zeros(_without(t.shape, d))
                for t, d in zip(leaves, dims, strict=True)
            ]
            out = self._torch(*pytree.tree_unflatten(leaves, spec))
            empty = pytree.tree_map(lambda t: t.new_empty(0, *t.shape), out)
            return empty, pytree.tree_map(lambda t: 0, out)
        outs = []
        for i in range(info.batch_size):
            entry = [t if d is None else t.select(d, i) for t, d in zip(leaves, dims, strict=True)]
            outs.append(self._torch(*pytree.tree_unflatten(entry, spec)))
        if outs[0] is None:
            return None, None
        return (
            pytree.tree_map(lambda *entries: torch.stack(entries), *outs),
            pytree.tree_map(lambda t: 0, outs[0]),
        )

    def _refuse_tangents(self, args: tuple[Any, ...]) -> None:
        """Forward-mode AD has come as far as a kernel, which knows no tangents."""
        if any(map(is_dual, pytree.tree_leaves(args))):
            raise no_forward_mode(self.name)

    def _tensors(self, args: tuple[Any, ...], wrong: list[str]) -> list[torch.Tensor]:
        """All tensors of a call; to `wrong` is added what is none, or has a layout that native code does not
        read."""
        found: list[torch.Tensor] = []
        try:
            flat = args if self._flatten is None else self._flatten(*args)
        except Exception:
            return found
        for argument, value in zip(self._torch._schema.arguments, flat, strict=False):
            kind = str(argument.type)
            if "Tensor" not in kind:
                continue
            for t in value if "List" in kind and isinstance(value, (tuple, list)) else (value,):
                if isinstance(t, torch.Tensor):
                    found.append(t)
                    if t.layout is not torch.strided or t.is_nested:
                        what = "is nested" if t.is_nested else f"has layout {t.layout}"
                        name = _field(args, t) if argument.name == "tensors" else argument.name
                        wrong.append(f"{name} {what}, expected a strided tensor")
                elif t is not None:
                    wrong.append(f"{argument.name} is a {type(t).__name__}, expected a tensor")
                elif "Optional" not in kind:
                    wrong.append(f"{argument.name} is missing, expected a tensor")
        return found

    def _dispatched(self, args: tuple[Any, ...]) -> Any:
        """A call with tensors that native code can't read: with the sign of negated views in their memory,
        through torch's dispatcher, which asks subclasses."""
        if self._writes is not None:
            held = [t for t in self._tensors(args, []) if has_no_memory(t)]
            for t in self._writes(*args):
                if t is not None and t.is_neg():
                    raise ValueError(f"{self.name} can't write to a negated view, of shape {list(t.shape)}")
                if t is not None and held and not has_no_memory(t):
                    raise TypeError(
                        f"{self.name} writes to a plain tensor, and is given a {type(held[0]).__name__} of "
                        f"shape {list(held[0].shape)}, expected both of one kind"
                    )
        flat = args if self._flatten is None else self._flatten(*args)
        return self._torch(*(_resolved(value) for value in flat))

    def _serve(self, *args: Any) -> Any:
        self.check(*args)
        if _ENVIRONMENT or _asked.get() is not None:
            return self._only(asked_backend(), args).run(*args)
        device = _first(args).device
        order = self._order.get(device) or self._ordered(device)
        if self._tuned:
            order = self._preferring(device, order, args)
        for backend in order:
            if backend.supports(*args) is None:
                if backend.name == "reference" and not self.plain:
                    self._tell(device.type, args)
                return backend.run(*args)
        raise AssertionError("the reference serves every call")

    def _serve_writing(self, *args: Any) -> Any:
        """`_serve`, and what autograd must know of a write in place, as of torch's own ops."""
        assert self._writes is not None
        every = self._writes(*args)
        if not every:
            return Op._serve(self, *args)
        written = [t for t in every if t is not None and not t.is_inference()]
        if torch.is_grad_enabled():
            for t in written:
                if t.requires_grad:
                    raise RuntimeError(
                        f"{self.name} writes in place to {'a leaf' if t.is_leaf else 'a tensor'} of shape "
                        f"{list(t.shape)} that requires grad, and has no gradient for what was there: detach "
                        "it, or call under torch.no_grad()"
                    )
        out = Op._serve(self, *args)
        torch.autograd.graph.increment_version(written)
        return out

    def _preferring(
        self, device: torch.device, order: tuple[Backend, ...], args: tuple[Any, ...]
    ) -> tuple[Backend, ...]:
        """The order with the backend first that was measured to be the fastest for such a call."""
        tuned = self._tuned.get(device)
        if tuned is None or self._kind is None:
            return order
        kind = self._kind(*args)
        if kind not in tuned:
            tuned[kind] = policy.fastest(torch.cuda.get_device_name(device), self.name, kind)
        first = tuned[kind]
        return tuple(sorted(order, key=lambda b: b.name != first)) if first else order

    def _ordered(self, device: torch.device) -> tuple[Backend, ...]:
        if device.type == "meta":
            order: tuple[Backend, ...] = (Backend("fake", ("meta",), lambda *args: None, self.fake),)
        else:
            order = tuple(b for b in self.backends if device.type in b.devices or b.name == "reference")
        real = device.type == "cuda" and torch.cuda.is_available()
        if self._kind and real and policy.of(torch.cuda.get_device_name(device))["backends"]:
            self._tuned[device] = {}
        self._order[device] = order
        return order

    def _only(self, name: str | None, args: tuple[Any, ...]) -> Backend:
        device = _first(args).device.type
        if self.plain:
            return self.backends[-1]
        for backend in self.backends:
            if backend.name != name:
                continue
            if device not in backend.devices and not (simulated() and "cuda" in backend.devices):
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
        """Who would serve a call with these arguments, why the others would not, and what it costs. Runs
        nothing."""
        self.check(*args)
        device = _first(args).device
        asked = asked_backend()
        refused: dict[str, str] = {}
        note = ""
        if self.plain:
            chosen, note = "reference", "plain torch on every device by design"
        elif asked is not None:
            chosen = self._only(asked, args).name
            refused = {b.name: f"{asked} was asked for" for b in self.backends if b.name != chosen}
        else:
            order = self.backends
            if pretended() is None and (device in self._order or self._ordered(device)):
                order = self._preferring(device, order, args)
            for backend in order:
                chosen = backend.name
                if device.type not in backend.devices:
                    on = " and ".join(backend.devices)
                    refused[chosen] = f"it runs on {on}, the tensors are on {device.type}"
                elif reason := backend.supports(*args):
                    refused[chosen] = reason
                else:
                    break
        key = None if self._kind is None else policy.key(self.name, *self._kind(*args))
        return Explanation(
            self.name, device.type, chosen, refused, note, self.cost(*args), _rates(device), key
        )

    def _moves(self, *args: Any) -> Cost:
        return Cost(moved(args) + moved(self.fake(*args)), 0, _first(args).dtype)


def _rates(device: torch.device) -> Rates | None:
    """Of a GPU that is known by its name."""
    gpu = pretended()
    if gpu is None and device.type == "cuda":
        with contextlib.suppress(ValueError):
            gpu = find(torch.cuda.get_device_name(device))
    return None if gpu is None else Rates.of(gpu)


def _without_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference in the dtypes of its arguments, as kernels compute: autocast has had its say before."""

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return reference(*args)
        with torch.autocast(_first(args).device.type, enabled=False):
            return reference(*args)

    return run


def _field(args: Any, t: torch.Tensor) -> str:
    """The field of a named tuple that holds a tensor."""
    for i, value in enumerate(args):
        if value is t and hasattr(args, "_fields"):
            return args._fields[i]
        if isinstance(value, tuple) and (found := _field(value, t)):
            return found
    return ""


def _resolved(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_resolved(v) for v in value]
    return value.resolve_neg() if isinstance(value, torch.Tensor) else value


def _first(args: tuple[Any, ...]) -> torch.Tensor:
    first = args[0]
    return first if isinstance(first, torch.Tensor) else first[0]


class _Mapped(NamedTuple):
    """What `torch.vmap` tells an op."""

    batch_size: int


def _batched(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and torch._C._dispatch_keys(leaf).has(_BATCHED)


def _dispatches(leaf: Any) -> bool:
    """Whether a tensor is of a class with torch's operators of its own (DTensor)."""
    kind = type(leaf)
    if not isinstance(leaf, torch.Tensor) or kind is torch.Tensor or kind is torch.nn.Parameter:
        return False
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def _without(shape: torch.Size, dim: int) -> list[int]:
    return [size for i, size in enumerate(shape) if i != dim % len(shape)]


def _without_tensors(argument: Any) -> Any:
    """What of an argument says which kernel it takes: names and sizes, not tensors nor the floats (a learning
    rate) that change from call to call."""
    if isinstance(argument, (tuple, list)):
        return tuple(_without_tensors(a) for a in argument)
    return None if isinstance(argument, (torch.Tensor, float)) else argument

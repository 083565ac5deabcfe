"""Op: one operator with several kernels behind it and one reference that says what it means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.utils import _pytree as pytree

from . import policy
from .autograd import is_dual, no_forward_mode, tracing, transformed
from .backends import Backend, Candidates, asked, asked_backend, reference_backend
from .cost import Cost, moved
from .explain import Explanation, rates_of
from .mapping import FAILURES, Flatten, Foreign, Writes

log = logging.getLogger("bitfuse")
_library = torch.library.Library("bitfuse", "DEF")
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


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
        flatten: Flatten | None = None,
        unflatten: Flatten | None = None,
        plain: bool = False,
        writes: Writes | None = None,
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
        self.backends = (*backends, reference_backend(reference, _first))
        self.candidates = Candidates(self.name, self.backends, fake, kind, plain)
        self._direct = next((b.direct for b in backends if b.direct is not None), None)
        self._kind = kind
        self._writes = writes
        if writes is not None:
            self._serve = self._serve_writing  # type: ignore[method-assign]
        self._told: set[tuple[Any, ...]] = set()
        self._flatten = flatten or _as_they_are
        self.__doc__ = reference.__doc__

        def with_objects(function: Callable[..., Any]) -> Callable[..., Any]:
            return function if unflatten is None else lambda *flat: function(*unflatten(*flat))

        _library.define(schema)
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, with_objects(lambda *args: self._serve(args)), key)
        torch.library.register_fake(f"bitfuse::{self.name}", with_objects(fake), lib=_library)
        self._torch = getattr(torch.ops.bitfuse, self.name).default
        self._foreign = Foreign(self._torch, self.name, self._flatten, rows, writes)
        torch.library.register_vmap(f"bitfuse::{self.name}", self._foreign.mapped, lib=_library)

    def __call__(self, *args: Any) -> Any:
        # who watches what torch does must see the op, not what its kernels allocate
        if is_dynamo_compiling() or _dispatch_modes() or transformed() or tracing() is not None:
            return self._torch(*self._flatten(*args))
        if forward_ad._current_level >= 0:
            self._refuse_tangents(args)
        try:
            return self._serve(args)
        except FAILURES as failure:
            way = self._foreign.way(args, failure)
            if way is None:
                raise
        return way(*args)

    def _refuse_tangents(self, args: tuple[Any, ...]) -> None:
        """Forward-mode AD has come as far as a kernel, which knows no tangents."""
        if any(map(is_dual, pytree.tree_leaves(args))):
            raise no_forward_mode(self.name)

    def _serve(self, args: tuple[Any, ...]) -> Any:
        if self._direct is not None and asked.get() is None and self.candidates.quick is not None:
            out = self._direct(*args)
            if out is not None:
                return out
        self.check(*args)
        first = args[0]
        if not isinstance(first, torch.Tensor):
            first = first[0]
        if asked.get() is not None:
            return self.candidates.only(asked_backend(), first.device.type, args).run(*args)
        # asking a tensor for its device, and looking that up, takes longer than all the rest here
        order = self.candidates.quick if first.is_cpu else None
        for backend in order or self.candidates.of(first, args):
            if backend.supports(*args) is None:
                if backend.name == "reference" and not self.plain:
                    self._tell(first.device.type, args)
                return backend.run(*args)
        raise AssertionError("the reference serves every call")

    def _serve_writing(self, args: tuple[Any, ...]) -> Any:
        """`_serve`, and what autograd must know of a write in place, as of torch's own ops."""
        assert self._writes is not None
        every = self._writes(*args)
        if not every:
            return Op._serve(self, args)
        written = [t for t in every if t is not None and not t.is_inference()]
        if torch.is_grad_enabled():
            for t in written:
                if t.requires_grad:
                    raise RuntimeError(
                        f"{self.name} writes in place to {'a leaf' if t.is_leaf else 'a tensor'} of shape "
                        f"{list(t.shape)} that requires grad, and has no gradient for what was there: detach "
                        "it, or call under torch.no_grad()"
                    )
        out = Op._serve(self, args)
        torch.autograd.graph.increment_version(written)
        return out

    def _tell(self, device: str, args: tuple[Any, ...]) -> None:
        """Say once for each kind of call that the reference, an order of magnitude slower, serves it."""
        kind = (device, _first(*args).dtype, _without_tensors(args))
        if kind not in self._told:
            self._told.add(kind)
            log.warning("bitfuse falls back to plain PyTorch, which is slow. %s", self.explain(*args))

    def explain(self, *args: Any) -> Explanation:
        """Who would serve a call with these arguments, why the others would not, and what it costs. Runs
        nothing."""
        self.check(*args)
        device = _first(*args).device
        chosen, refused, note = self.candidates.judged(device, args)
        key = None if self._kind is None else policy.key(self.name, *self._kind(*args))
        cost, rates, prediction = self.cost(*args), rates_of(device), None
        if rates is not None and chosen != "reference":
            backend = next(b for b in self.backends if b.name == chosen)
            known = backend.predicted
            prediction = cost.predicted(rates) if known is None else known(cost, rates, *args)
        return Explanation(self.name, device.type, chosen, refused, note, cost, rates, key, prediction)

    def _moves(self, *args: Any) -> Cost:
        return Cost(moved(args) + moved(self.fake(*args)), 0, _first(*args).dtype)


def _as_they_are(*args: Any) -> tuple[Any, ...]:
    return args


def _first(*args: Any) -> torch.Tensor:
    first = args[0]
    return first if isinstance(first, torch.Tensor) else first[0]


def _without_tensors(argument: Any) -> Any:
    """What of an argument says which kernel it takes: names and sizes, not tensors nor the floats (a learning
    rate) that change from call to call."""
    if isinstance(argument, (tuple, list)):
        return tuple(_without_tensors(a) for a in argument)
    return None if isinstance(argument, (torch.Tensor, float)) else argument

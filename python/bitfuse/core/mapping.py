"""Calls whose tensors are not what a kernel reads: mapped over by `torch.vmap`, of a class with operators of
its own, negated views, no tensors at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from .tensors import Unread, has_no_memory

_BATCHED = torch._C._dispatch_key_parse("Batched")
Flatten = Callable[..., tuple[Any, ...]]
Writes = Callable[..., tuple[torch.Tensor | None, ...]]
# what a call with foreign tensors may raise: what a check says of them, and what becomes of it without one
FAILURES = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError)


class Foreign:
    """The calls of an op with foreign tensors, which go through torch's dispatcher.

    The usual call looks for none, for that would cost it more than its checks. It fails, by a check or on its
    way to a kernel, and only then is it asked whose tensors it has.

    Args:
        op: as torch has it.
        name: in messages.
        flatten: from the arguments of a call to those of the schema.
        rows: the leading dimensions of the first argument are rows that have nothing to do with each other.
        writes: of the arguments, the tensors that a call writes to; None: to none.
    """

    def __init__(self, op: Any, name: str, flatten: Flatten, rows: bool, writes: Writes | None) -> None:
        self._op, self._name, self._flatten, self._rows, self._writes = op, name, flatten, rows, writes
        self._arguments = op._schema.arguments

    def way(self, args: tuple[Any, ...], failure: BaseException) -> Callable[..., Any] | None:
        """How to make a call that failed, from its arguments; None where the failure is the caller's.

        Raises:
            TypeError: an argument is no tensor, or has a layout that native code does not read, which the
                failure does not say.
        """
        if isinstance(failure, Unread):
            return self._dispatched
        wrong: list[str] = []
        tensors = self._tensors(args, wrong)
        if any(map(_dispatches, tensors)):  # its class says what an op does of it, or that it can't
            return self._dispatched
        if isinstance(failure, (TypeError, ValueError)):  # the check has said what is wrong
            return None
        if any(map(_batched, tensors)):
            return self._mapped_gradients  # has a vmap of its own, which no flag tells of
        if wrong:
            raise TypeError(wrong[0]) from None
        return None

    def _tensors(self, args: tuple[Any, ...], wrong: list[str]) -> list[torch.Tensor]:
        """All tensors of a call; to `wrong` is added what is none, or has a layout that native code does not
        read."""
        found: list[torch.Tensor] = []
        try:
            flat = self._flatten(*args)
        except Exception:
            return found
        for argument, value in zip(self._arguments, flat, strict=False):
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

    def _dispatched(self, *args: Any) -> Any:
        """A call with tensors that native code can't read: with the sign of negated views in their memory,
        through torch's dispatcher, which asks subclasses."""
        if self._writes is not None:
            held = [t for t in self._tensors(args, []) if has_no_memory(t)]
            for t in self._writes(*args):
                if t is not None and t.is_neg():
                    raise ValueError(f"{self._name} can't write to a negated view, of shape {list(t.shape)}")
                if t is not None and held and not has_no_memory(t):
                    raise TypeError(
                        f"{self._name} writes to a plain tensor, and is given a {type(held[0]).__name__} of "
                        f"shape {list(held[0].shape)}, expected both of one kind"
                    )
        return self._op(*(_resolved(value) for value in self._flatten(*args)))

    def _mapped_gradients(self, *args: Any) -> Any:
        """The op under the vmap of `torch.autograd.grad(is_grads_batched=True)`."""
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        leaves, spec = pytree.tree_flatten(list(self._flatten(*args)))
        dims = [0 if _batched(leaf) else None for leaf in leaves]
        dense = [
            t if d is None else torch._remove_batch_dim(t, level, 1, 0)
            for t, d in zip(leaves, dims, strict=True)
        ]
        size = next(t.shape[0] for t, d in zip(dense, dims, strict=True) if d is not None)
        unflatten = pytree.tree_unflatten
        out, _ = self.mapped(_Mapped(size), tuple(unflatten(dims, spec)), *unflatten(dense, spec))
        if out is None:
            return None
        return pytree.tree_map(lambda t: torch._add_batch_dim(t, 0, level), out)

    def mapped(self, info: Any, in_dims: tuple[Any, ...], *flat: Any) -> tuple[Any, Any]:
        """The op under `torch.vmap`: a call for each entry, or one for all where they are rows."""
        leaves, spec = pytree.tree_flatten(list(flat))
        dims = pytree.tree_leaves(list(in_dims))
        if self._rows and in_dims[0] is not None and all(d is None for d in dims[1:]):
            return self._op(flat[0].movedim(in_dims[0], 0), *flat[1:]), 0
        self._refuse_shared_writes(in_dims, flat)
        if info.batch_size == 0:
            leaves = [
                t if d is None else t.new_zeros(_without(t.shape, d))
                for t, d in zip(leaves, dims, strict=True)
            ]
            out = self._op(*pytree.tree_unflatten(leaves, spec))
            empty = pytree.tree_map(lambda t: t.new_empty(0, *t.shape), out)
            return empty, pytree.tree_map(lambda t: 0, out)
        outs = []
        for i in range(info.batch_size):
            entry = [t if d is None else t.select(d, i) for t, d in zip(leaves, dims, strict=True)]
            outs.append(self._op(*pytree.tree_unflatten(entry, spec)))
        if outs[0] is None:
            return None, None
        return (
            pytree.tree_map(lambda *entries: torch.stack(entries), *outs),
            pytree.tree_map(lambda t: 0, outs[0]),
        )

    def _refuse_shared_writes(self, in_dims: tuple[Any, ...], flat: tuple[Any, ...]) -> None:
        """Entries of a vmap that would all write to one place."""
        for argument, dims, values in zip(self._arguments, in_dims, flat, strict=False):
            if not (argument.alias_info and argument.alias_info.is_write):
                continue
            pairs = zip(*map(pytree.tree_leaves, (dims, values)), strict=True)
            if any(d is None and t is not None for d, t in pairs):
                raise RuntimeError(
                    f"{self._name} writes to {argument.name}, which torch.vmap does not map over: each entry "
                    "would write to the same place"
                )


class _Mapped(NamedTuple):
    """What `torch.vmap` tells an op."""

    batch_size: int


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

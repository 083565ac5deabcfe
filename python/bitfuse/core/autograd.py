"""What a differentiable op owes torch beside a backward: an error where a second derivative is missing, the
transforms of torch.func, forward-mode AD.

A `Function` keeps `forward` and `setup_context` apart, as `torch.func` asks, and whatever its backward reads
is an input or an output of it: what a forward makes on its way and a backward needs (h of an adapter) is an
output too. So a second derivative meets every tensor that a gradient depends on, and none is dropped without
a word.

A backward is one of two kinds. It is written in differentiable operations (what is linear in its input), or
it is `once`: then its gradients hang on all that it read, by a node that raises (the remedy that torch took
for its own attention: pytorch#92348). torch's `once_differentiable` hangs the error on the gradients alone,
and `torch.autograd.grad` walks round it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active  # inside of vmap, grad, jvp, ...
tracing: Callable[[], Any] = torch._C._get_tracing_state  # by torch.jit.trace
_Base = torch.autograd.Function


def recorded(*tensors: torch.Tensor | None) -> bool:
    """Whether somebody differentiates a call with these arguments, or maps over it: it must then go through
    its `Function`."""
    for t in tensors:
        if t is not None and t.requires_grad:
            if torch.is_grad_enabled():
                return is_compiling() or tracing() is None  # a trace has the op, which has no gradient there
            break
    return elsewhere()  # what is wrapped by a transform, or by two, does not say so


def elsewhere() -> bool:
    """Whether a transform or forward-mode AD is at work, which no tensor needs to tell of."""
    return (forward_ad._current_level >= 0 or transformed()) and not is_compiling()


def recording() -> bool:
    """Whether any call would be `recorded`, whatever its arguments."""
    return torch.is_grad_enabled() or elsewhere()


def _no_tangents(op: str) -> Callable[..., Any]:
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode(op)

    return jvp


def no_forward_mode(op: str) -> NotImplementedError:
    """The error of an op that knows no tangents."""
    return NotImplementedError(
        f"{op} has no forward-mode derivative: use reverse mode, or plain torch for this part"
    )


def is_dual(t: Any) -> bool:
    """Whether t is a tensor with a tangent that is at work."""
    if not (isinstance(t, torch.Tensor) and torch._C._is_fwd_grad_enabled()):
        return False
    return forward_ad.unpack_dual(t).tangent is not None


class Function(torch.autograd.Function):
    """A `torch.autograd.Function` with `setup_context`, for every transform of torch. Called by `call`.

    A class may have `tangents`, torch's `jvp` under another name: torch.compile refuses a class that has a
    `jvp`, and is given one without.
    """

    generate_vmap_rule = True
    eager: Any = None  # the same class, with `jvp`
    op = ""  # in messages
    tangents: Any = None  # of the outputs, from the inputs'

    def __init_subclass__(cls) -> None:
        if "jvp" not in cls.__dict__:
            cls.eager = type(
                cls.__name__, (cls,), {"jvp": staticmethod(cls.tangents or _no_tangents(cls.op))}
            )

    @classmethod
    def call(cls, *args: Any) -> Any:
        """`apply`; where no transform is at work, without its look at the signature, which takes longer than
        a small op."""
        if is_compiling():
            return cls.apply(*_apart(args))
        if forward_ad._current_level >= 0:
            inside = pytree.tree_leaves([a for a in args if isinstance(a, (tuple, list))])
            given = {id(a) for a in args}
            if any(id(t) not in given and is_dual(t) for t in inside):
                raise no_forward_mode(cls.op)  # torch sees no tangent in a tuple
        if transformed():
            return cls.eager.apply(*args)
        return super(_Base, cls.eager).apply(*args)  # type: ignore[misc]


def _apart(args: tuple[Any, ...]) -> list[Any]:
    """The arguments, a tensor that comes twice as a view of itself: torch.compile refuses it otherwise."""
    made: list[Any] = []
    for a in args:
        again = isinstance(a, torch.Tensor) and any(a is b for b in made)
        made.append(a.view_as(a) if again else a)
    return made


class _Saved:
    """The context of a backward, with other tensors in the place of the saved ones."""

    def __init__(self, ctx: Any, tensors: tuple[Any, ...]) -> None:
        self._ctx = ctx
        self.saved_tensors = tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Once(Function):
    """A backward as a function of all that it reads. Its own raises."""

    op = "the backward of a bitfuse op"

    @staticmethod
    def forward(name: str, backward: Callable[..., Any], ctx: Any, count: int, *tensors: Any) -> Any:
        return backward(_Saved(ctx, tensors[count:]), *tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise _twice(ctx.name)


def _twice(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} has no second derivative: its backward is a kernel that can't be differentiated. For a "
        "gradient penalty or a Hessian write this part in plain torch"
    )


def once(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of a backward that can't be differentiated: differentiating it raises a RuntimeError that says so,
    whoever asks: `backward`, `torch.autograd.grad`, `hvp`, `hessian`, `torch.func`."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Any) -> Any:
            if is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *grads)
            return _Once.call(name, backward, ctx, len(grads), *grads, *ctx.saved_tensors)

        return wrapper

    return decorate


def refuse_intermediate(name: str, grads: tuple[Any, ...]) -> None:
    """Raise where a gradient flows into outputs that only a backward reads: a second derivative's.
    (torch.compile, which has none, gives them zeros.)"""
    if not is_compiling() and any(g is not None for g in grads):
        raise _twice(name)


def materialized(
    grads: tuple[torch.Tensor | None, ...], shapes: list[torch.Size]
) -> tuple[torch.Tensor, ...]:
    """The gradients of outputs of these shapes, zeros for those that nobody uses. One at least is there."""
    if all(g is not None for g in grads):
        return grads  # type: ignore[return-value]
    like = next(g for g in grads if g is not None)
    return tuple(like.new_zeros(s) if g is None else g for g, s in zip(grads, shapes, strict=True))


class _NoGradient(Function):
    @staticmethod
    def forward(reason: str, count: int, *tensors: torch.Tensor | None) -> tuple[Any, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.reason = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(ctx.reason)

    @staticmethod
    def tangents(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(ctx.reason)


def without_gradient(
    reason: str, outputs: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, ...]:
    """The outputs as they are; a derivative through them to one of the inputs raises a RuntimeError (forward
    mode: NotImplementedError) with this reason."""
    if not recorded(*inputs):
        return outputs
    return _NoGradient.call(reason, len(outputs), *outputs, *inputs)

"""Tensors that are the same whoever makes them; those that native code can read; their rows."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch._C import DisableTorchFunction, _disabled_torch_dispatch_impl, _len_torch_dispatch_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Outside of every mode of torch: what is made inside is a real tensor, without history, that may be used
    anywhere and for good, whether the caller is in inference mode, in `vmap` or `grad`, under autocast, a
    default device or a mode such as FakeTensorMode. (Nothing shields from the default dtype, which is the
    process's: a dtype is always given.)

    Not in code that torch.compile traces, which has none of these contexts.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        DisableTorchFunction(),  # default devices are a mode of that kind
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),  # of torch.func
        torch.autocast("cpu", enabled=False),
    ):
        yield


def table(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Keep for the process what a function makes of hashable arguments, made `aside`. Under a mode, or in
    code that is traced, it is made anew: such code wants it fake, or as a part of its graph."""

    @functools.cache
    def kept(*args: object) -> torch.Tensor:
        with aside():
            return make(*args)

    @functools.wraps(make)
    def found(*args: object) -> torch.Tensor:
        if is_compiling() or _len_torch_dispatch_stack():
            return make(*args)
        return kept(*args)

    found.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return found


class Unread(TypeError):
    """A tensor that native code can't read by its address. torch's dispatcher knows what to do with it."""


PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))  # of two types that surely have memory


def check_read(name: str, t: torch.Tensor) -> None:
    """Raise TypeError for a sparse tensor, and `Unread` for a negated view (`torch.Tensor.is_neg`), whose
    memory has the other sign, and for a subclass that holds other tensors and has no memory of its own."""
    if is_compiling():
        return
    if t.layout is not torch.strided:
        raise TypeError(f"{name} has layout {t.layout}, expected a strided tensor")
    if t.is_neg():
        raise Unread(f"{name} is a negated view, expected {name}.resolve_neg()")
    if type(t) not in PLAIN and has_no_memory(t):
        raise Unread(f"{name} is a {type(t).__name__} without memory of its own, expected a torch.Tensor")


def has_no_memory(t: torch.Tensor) -> bool:
    """Of a subclass, outside of modes, which may have fake ones."""
    dispatches = getattr(type(t), "__torch_dispatch__", None) is not _disabled_torch_dispatch_impl
    return dispatches and not (_len_torch_dispatch_stack() or t.is_meta or t.data_ptr()) and t.numel() > 0


def as_rows(t: torch.Tensor) -> torch.Tensor:
    """[..., features] as [rows, features], whatever of it is 0 (`reshape(-1, 0)` is refused); [features] as
    one row."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def check_tensor(
    name: str,
    t: object,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
    beside: str = "",
    read: bool = True,
) -> None:
    """Raise TypeError or ValueError for what is no tensor of one of the dtypes, of the shape and on the
    device, where `beside` names another argument that is; `Unread` unless it is not for native code yet."""
    if not isinstance(t, torch.Tensor):
        found = "missing" if t is None else f"a {type(t).__name__}"
        raise TypeError(f"{name} is {found}, expected a tensor {list(shape)}")
    if t.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {t.dtype}, expected {' or '.join(map(str, dtypes))}")
    if t.shape != shape:
        raise ValueError(f"{name} has shape {list(t.shape)}, expected {list(shape)}")
    if t.device != device:
        where = f", where {beside} is" if beside else ""
        raise ValueError(f"{name} is on {t.device}, expected {device}{where}")
    if read:
        check_read(name, t)


def check_frozen(name: str, t: torch.Tensor) -> None:
    """Raise ValueError for a tensor that asks for a gradient which the op does not give."""
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which the op does not give: pass {name}.detach()")


def check_finite(name: str, t: torch.Tensor) -> None:
    finite = torch.isfinite(t)
    if not bool(finite.all()):
        at = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{name}{at} is {t[tuple(at)].item()}, expected finite numbers")

"""Tensors that are the same whoever makes them; their rows."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch._C import DisableTorchFunction, _len_torch_dispatch_stack
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


def as_rows(t: torch.Tensor) -> torch.Tensor:
    """[..., features] as [rows, features], whatever of it is 0 (`reshape(-1, 0)` is refused); [features] as
    one row."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])

"""Calls that nobody makes: an op's arguments from sizes alone, to ask who would serve them and at what cost,
on a device that need not be here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields

import bitfuse  # noqa: F401  the ops declare themselves
import torch
from bitfuse.core.backends import BackendError
from bitfuse.core.declaration import DENSE, Sizes, declarations, declared
from bitfuse.core.device import pretend
from bitfuse.core.explain import Explanation, explain
from bitfuse.core.gpus import Gpu
from bitfuse.core.json_files import brief

__all__ = ["DENSE", "EVERY", "Sizes", "explain_sizes"]

EVERY = {each.name: each for each in declarations()}
MOST = {"seqlen": 1 << 24, "kv_len": 1 << 24}  # others: what an int32 holds


@contextlib.contextmanager
def _in_a_line() -> Iterator[None]:
    """What torch says of a tensor that there can't be comes with its own stack."""
    try:
        yield
    except BackendError:
        raise
    except (RuntimeError, OverflowError, MemoryError) as why:
        said = str(why).strip().splitlines()
        raise ValueError(
            f"there is no call of these sizes: {said[0] if said else type(why).__name__}"
        ) from None


def explain_sizes(op: str, sizes: Sizes, gpu: Gpu | None) -> Explanation:
    """`bitfuse.explain` of a call of these sizes, on this GPU; None for the CPU.

    Raises:
        ValueError: no op of that name, sizes that it refuses.
    """
    call = declared(op)
    for field in fields(sizes):
        value = getattr(sizes, field.name)
        least = 0 if field.name in ("rank", "m", "batch", "seqlen", "kv_len") else 1
        if isinstance(value, bool):
            continue
        if isinstance(value, int) and value < least:
            raise ValueError(f"{field.name} is {value}, expected {least} or more")
        most = MOST.get(field.name, 2**31 - 1)
        if isinstance(value, int) and value > most:
            raise ValueError(f"{field.name} is {brief(value)}, expected at most {most}")
    with pretend(gpu), _in_a_line():

        def make(*shape: int, dtype: torch.dtype = sizes.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cpu" if gpu is None else "cuda")

        return explain(call.function, *call.arguments(sizes, make), **call.options(sizes))

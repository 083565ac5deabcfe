"""Poisoned outputs: what a kernel did not write is seen, and what it wrote beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_EMPTY = (*(getattr(torch, name) for name in ("empty", "empty_like")), torch.Tensor.new_empty)
_GUARD = 256  # bytes before and behind a tensor on a GPU: what an allocation is aligned to
_BYTE = 0xA5


class Poisoned(TorchFunctionMode):
    """Every torch.empty of a backend is NaN, and guarded: on a GPU by bytes around it, which `check` looks
    at.

    Args:
        guard: of a tensor on the CPU, the same where a store too far is a fault; None for no guard there.
    """

    def __init__(self, guard: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self._guard = guard
        self._around: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in _EMPTY:
            return out
        if out.device.type == "cuda":
            return out if torch.cuda.is_current_stream_capturing() else self._on_gpu(out)
        if out.device.type == "cpu":
            if out.is_floating_point():
                out.fill_(float("nan"))
            return out if self._guard is None else self._guard(out)
        return out

    def _on_gpu(self, out: torch.Tensor) -> torch.Tensor:
        dense = out.numel() > 0 and torch.ops.aten.is_non_overlapping_and_dense(out)
        if not dense:
            return out
        nbytes = out.numel() * out.element_size()
        with torch.no_grad():
            room = torch.full((nbytes + 2 * _GUARD,), _BYTE, dtype=torch.uint8, device=out.device)
            self._around.append((room[:_GUARD], room[_GUARD + nbytes :]))
            offset = _GUARD // out.element_size()
            made = torch.empty(0, dtype=out.dtype, device=out.device)
            made = made.set_(room.untyped_storage(), offset, out.shape, out.stride())
            if made.is_floating_point():
                # a byte of ones is a NaN of each of the floats of eight bits
                (made.view(torch.uint8).fill_(0xFF) if made.itemsize == 1 else made.fill_(float("nan")))
        return made

    def check(self) -> None:
        """
        Raises:
            AssertionError: something was written beside an output on a GPU.
        """
        around, self._around = self._around, []
        for sides in around:
            for name, side in zip(("before", "behind"), sides, strict=True):
                wrong = int((side != _BYTE).sum())
                assert wrong == 0, f"{wrong} bytes {name} an output were written"

"""The norms of a DoRA weight's rows, found without a dense weight and kept where that is safe."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_compiling

from ..core.tensors import aside
from ..ops.linear.lowbit_linear import lowbit_linear
from .adapters import float_rows
from .linear import Linear

# the bytes themselves: eight times as fast as torch.equal, which also finds a NaN to differ from itself
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or not (a.is_contiguous() and b.is_contiguous()):
        return torch.equal(a, b)
    if not (a.data_ptr() and b.data_ptr()):  # of a subclass that holds other tensors
        return torch.equal(a, b)
    return _memcmp(a.data_ptr(), b.data_ptr(), a.nbytes) == 0


class Kept:
    """A value found from tensors and perhaps a number, and what they were then."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None
        self._number: object = None
        self._seen: list[tuple[torch.Tensor, int, int, torch.Tensor | None]] = []

    def keep(
        self,
        value: torch.Tensor,
        versioned: list[torch.Tensor],
        compared: list[torch.Tensor],
        number: object = None,
    ) -> None:
        """Keep a value. Of `compared` the CPU keeps copies, small ones, because a write through `.data`
        moves no version; a GPU would have to wait for the comparison."""
        no_version = any(t.is_inference() for t in (*versioned, *compared))
        if no_version or _len_torch_dispatch_stack():  # under a mode tensors may be fake
            self.clear()
            return
        with aside():  # of inference mode: whoever keeps it next may be outside
            if (
                self.value is not None
                and self.value.shape == value.shape
                and self.value.device == value.device
            ):
                self.value.copy_(value)  # a captured graph reads it where it stands
            else:
                self.value = value.clone()
        self._number = number
        self._seen = [(t, t.data_ptr(), t._version, None) for t in versioned]
        self._seen += [
            (t, t.data_ptr(), t._version, t.detach().clone() if t.is_cpu else None) for t in compared
        ]

    def get(self, tensors: list[torch.Tensor], number: object = None) -> torch.Tensor | None:
        """The value, if the tensors, first those versioned, and the number are what they were."""
        if self.value is None or len(tensors) != len(self._seen):
            return None
        if number is not self._number and number != self._number:
            return None
        for t, (seen, address, version, copy) in zip(tensors, self._seen, strict=True):
            if t is not seen or t.data_ptr() != address or t._version != version:
                return None
            if copy is not None and not _same_bytes(t, copy):
                return None
        return self.value

    @property
    def valid(self) -> bool:
        return len(self._seen) > 0  # bool() of a list breaks the graph of torch 2.9

    def clear(self) -> None:
        """The value counts no more; its storage stays, because a captured graph may read it."""
        self._seen, self._number = [], None

    def __getstate__(self) -> dict[str, Any]:  # a copy of a layer finds its own
        return {"value": None, "_seen": [], "_number": None}


class RowNorms:
    """||W_n + scaling * (B A)_n|| of each row n of one layer, for each of its adapters.

    Over a few-bit W it is the root of ||W_n||^2 + 2 scaling (W A^T)_n . B_n + scaling^2 B_n (A A^T) B_n^T:
    the first term is kept, the second is one call of the few-bit product. A dense W is read in slices.

    Args:
        compare_scales: let the CPU compare also the content of a few-bit weight's scales, a copy of which is
            kept, so that a write to them through `.data` is seen.
    """

    _compare_scales = False  # of layers that were pickled before it was an option

    def __init__(self, compare_scales: bool = False) -> None:
        self._compare_scales = compare_scales
        self._squares = Kept()
        self._norms: dict[str, Kept] = {}

    def norm(
        self,
        name: str,
        base: torch.nn.Linear | Linear,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float | torch.Tensor,
        training: bool,
    ) -> torch.Tensor:
        """The norms, float32 [out_features], without a gradient. They are found anew in training, under grad
        mode, in compiled code and under modes such as FakeTensorMode, else only when something has
        changed."""
        if training or is_compiling() or _len_torch_dispatch_stack() or torch.is_grad_enabled():
            return self.fresh(base, lora_A, lora_B, scaling)
        kept = self._norms.get(name)
        versioned, compared = self._seen(base)
        compared += [t for t in (scaling, lora_A, lora_B) if isinstance(t, torch.Tensor)]
        found = None if kept is None else kept.get([*versioned, *compared], scaling)
        return self.renew(name, base, lora_A, lora_B, scaling) if found is None else found

    def renew(
        self,
        name: str,
        base: torch.nn.Linear | Linear,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float | torch.Tensor,
    ) -> torch.Tensor:
        """Find the norms and keep them, in the storage that held the last ones."""
        norm = self.fresh(base, lora_A, lora_B, scaling)
        kept = self._norms.setdefault(name, Kept())
        versioned, compared = self._seen(base)
        compared += [t for t in (scaling, lora_A, lora_B) if isinstance(t, torch.Tensor)]
        kept.keep(norm, versioned, compared, scaling)
        return kept.value if kept.valid and kept.value is not None else norm

    def holds(self, name: str) -> bool:
        """Whether norms are kept for an adapter."""
        return name in self._norms

    @torch.no_grad()
    def fresh(
        self,
        base: torch.nn.Linear | Linear,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float | torch.Tensor,
    ) -> torch.Tensor:
        """The norms, whatever is kept."""
        with torch.autocast(lora_A.device.type, enabled=False):
            lora_A, lora_B = lora_A.float(), lora_B.float() * scaling
            if not isinstance(base, Linear):
                rows = [(w + lora_B[at] @ lora_A).norm(dim=1) for at, w in float_rows(base)]
                return torch.cat(rows) if rows else lora_B.new_empty(0)
            # summed in float64, because the terms may cancel
            wa = lowbit_linear(lora_A, base.weight).t().double()
            b = lora_B.double()
            square = self.squares(base) + 2 * (wa * b).sum(1)
            square += ((b @ (lora_A @ lora_A.t()).double()) * b).sum(1)
            return square.clamp_min(0).sqrt().float()

    @torch.no_grad()
    def squares(self, base: torch.nn.Linear | Linear) -> torch.Tensor:
        """||W_n||^2 of each row, float64; kept while a few-bit W is what it was."""
        versioned, compared = self._seen(base)
        # compiled code can't look: what changes the base as torch knows it calls `clear`, then this
        if is_compiling():
            kept = self._squares.value if self._squares.valid else None
        elif _len_torch_dispatch_stack():
            kept = None
        else:
            kept = self._squares.get([*versioned, *compared])
        if kept is not None:
            return kept
        rows = [w.double().square().sum(1) for _, w in float_rows(base)]
        squares = torch.cat(rows) if rows else versioned[0].new_empty(0, dtype=torch.float64)
        if not is_compiling() and isinstance(base, Linear):
            self._squares.keep(squares, versioned, compared)
        return squares

    def _seen(self, base: torch.nn.Linear | Linear) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The weight's tensors whose versions are looked at, and those whose content is compared too."""
        versioned: list[torch.Tensor] = []
        compared: list[torch.Tensor] = []
        held: dict[str, Any] = base._parameters
        if "qweight" not in held and "weight" not in held:  # a replica of nn.DataParallel
            held = {name: t for name, t in base.__dict__.items() if isinstance(t, torch.Tensor)}
        for name, p in held.items():
            if p is not None and name != "bias":
                scales = self._compare_scales and name not in ("weight", "qweight")
                (compared if scales else versioned).append(p)
        return versioned, compared

    def clear(self) -> None:
        """Forget all that is kept."""
        self._squares.clear()
        for kept in self._norms.values():
            kept.clear()

    def forget(self, name: str) -> None:
        """Forget an adapter."""
        self._norms.pop(name, None)


def dora_scale(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """magnitude / norm, the norm taken for a constant (DoRA, section 4.3); a row of zeros stays one."""
    return magnitude.float() / torch.where(norm == 0, 1.0, norm)

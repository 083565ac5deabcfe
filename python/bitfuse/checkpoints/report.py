"""What a checkpoint's layers have become."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..core.text import table
from ..weights.weight import LowBitWeight
from .checkpoint import Entry, Loaded


@dataclass(frozen=True)
class LoadedLayer:
    """One weight: as the file holds it, as the model does, and what was lost between the two.

    Attributes:
        name: in the model.
        shape: [..., out_features, in_features].
        stored: how the file holds it.
        format: how the model does: a few-bit format, or a dtype.
        bytes_before, bytes_after: in the file, in memory.
        loss: what was lost and why; "" where each number is bit for bit what the file says.
        note: what one should know besides.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    format: str
    bytes_before: int
    bytes_after: int
    loss: str = ""
    note: str = ""

    @property
    def lossless(self) -> bool:
        return not self.loss


@dataclass
class LoadReport:
    """What `bitfuse.from_pretrained` did. `str()` is a table.

    Attributes:
        path, kind: of the file, and its format.
        layers: the weights of two dimensions and more, and all of which something was lost.
        other: how many others there are.
        tied: modules that read the codes of another, and that one.
    """

    path: str
    kind: str
    layers: list[LoadedLayer] = field(default_factory=list)
    other: int = 0
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def lossless(self) -> bool:
        """Whether every number of the model is bit for bit what the file says."""
        return all(layer.lossless for layer in self.layers)

    def add(self, entry: Entry, loaded: Loaded, held: LowBitWeight | torch.Tensor) -> None:
        """A weight that is now in the model, as `held`."""
        loss = loaded.loss
        if isinstance(held, LowBitWeight):
            format = str(held.format)
        else:
            format = str(held.dtype).removeprefix("torch.")
            if not loss and not _holds(held.dtype, loaded.weight):
                had = loaded.weight.dtype if isinstance(loaded.weight, torch.Tensor) else torch.float32
                loss = f"rounded from {had} to {held.dtype}".replace("torch.", "")
        if len(entry.shape) < 2 and not loss:
            self.other += 1
            return
        sizes = (entry.nbytes, held.nbytes)
        self.layers.append(
            LoadedLayer(entry.name, entry.shape, entry.stored, format, *sizes, loss, loaded.note)
        )

    def __str__(self) -> str:
        rows = [
            (
                *(r.name, " x ".join(map(str, r.shape)), r.stored, r.format),
                "; ".join(filter(None, (r.loss or "lossless", r.note))),
                *(f"{r.bytes_before / 1e6:.2f}", f"{r.bytes_after / 1e6:.2f}"),
            )
            for r in self.layers
        ]
        rows += [
            (name, "", "", f"reads the codes of {other}", "", "", "") for name, other in self.tied.items()
        ]
        before, after = (
            sum(getattr(r, f"bytes_{when}") for r in self.layers) for when in ("before", "after")
        )
        lost = sum(not r.lossless for r in self.layers)
        last = (
            *("all", f"{len(self.layers)} weights", self.kind, ""),
            f"{lost} with a loss" if lost else "lossless",
            *(f"{before / 1e6:.2f}", f"{after / 1e6:.2f}"),
        )
        headings = ("weight", "shape", "stored as", "held as", "", "MB in the file", "MB")
        return table(headings, rows, last, numbers=2)


def _holds(dtype: torch.dtype, weight: LowBitWeight | torch.Tensor) -> bool:
    """Whether a dtype holds each number of what was read."""
    if isinstance(weight, LowBitWeight):
        return dtype == torch.float32
    return dtype == weight.dtype or torch.promote_types(dtype, weight.dtype) == dtype

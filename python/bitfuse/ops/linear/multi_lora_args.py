"""What many adapters at once are to a kernel: how they are stored, and for lists on a GPU a table of their
addresses and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch

from ...core.tensors import aside

Adapters = Sequence[torch.Tensor]  # one tensor of three dimensions, or one of two for each adapter


def is_stacked(adapters: Adapters) -> bool:
    """True for one tensor [E, ...] of all adapters; False for a tensor each."""
    return len(adapters) == 1 and adapters[0].dim() == 3


def count_of(adapters: Adapters) -> int:
    """E, the number of adapters."""
    return adapters[0].shape[0] if is_stacked(adapters) else len(adapters)


def adapter(adapters: Adapters, e: int) -> torch.Tensor:
    """Adapter e, of two dimensions."""
    return adapters[0][e] if is_stacked(adapters) else adapters[e]


def transposed(adapters: Adapters) -> list[torch.Tensor]:
    """Each adapter's transpose, contiguous: [E, N, r] to [E, r, N]."""
    return [t.mT.contiguous() for t in adapters]


class AdapterTable(NamedTuple):
    """A list of adapters on a GPU, as kernels read it.

    Attributes:
        entries: int64 [3, E] on the device: addresses of lora_A, of lora_B, and ranks.
        max_rank: the largest rank.
        align: the greatest power of two, 16 at most, that divides every rank.
        aligned: True when every address is a multiple of 16.
    """

    entries: torch.Tensor
    max_rank: int
    align: int
    aligned: bool


_MOST_TABLES = 256
_tables: dict[tuple[object, ...], AdapterTable] = {}
# a graph reads a table at every replay, long after the cache has dropped it
_captured: list[torch.Tensor] = []


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph is being captured there."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep_for_graph(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which a cache may drop, kept for good if a CUDA graph in capture will read it."""
    if capturing(tensor.device) and all(tensor is not t for t in _captured):
        _captured.append(tensor)
    return tensor


def refuse_capture(what: str, device: torch.device) -> NoReturn:
    """Raise RuntimeError for what a graph would copy from the host at every replay."""
    raise RuntimeError(f"{what} is not on {device} yet: call the op once before the capture of a CUDA graph")


def table(lora_A: Adapters, lora_B: Adapters) -> AdapterTable:
    """The table of lists of adapters; built and copied to the device once, and found again as long as no
    adapter moves or changes its rank."""
    device = lora_A[0].device
    a, b = (tuple(map(torch.Tensor.data_ptr, t)) for t in (lora_A, lora_B))
    ranks = tuple(t.shape[0] for t in lora_A)
    key = (device, a, b, ranks)
    found = _tables.get(key)
    if found is None:
        if capturing(device):
            refuse_capture("the table of adapters", device)
        with aside():
            entries = torch.tensor((a, b, ranks), dtype=torch.int64, device=device)
        aligned = not any(address % 16 for address in (*a, *b))
        found = AdapterTable(entries, max(ranks), math.gcd(16, *ranks), aligned)
        if len(_tables) >= _MOST_TABLES:
            del _tables[next(iter(_tables))]
        _tables[key] = found
    keep_for_graph(found.entries)
    return found

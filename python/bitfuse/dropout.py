"""Dropout whose mask is a function of a seed and of an element's place: nothing is stored, and the backward
pass, another backend or another device draws the same mask again."""

from __future__ import annotations

import torch

# the multipliers of a 32-bit integer hash with little bias (Wellons, "Prospecting for hash functions", 2018)
FIRST, SECOND = 0x7FEB352D, 0x846CA68B
GOLDEN = 0x9E3779B9
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """An element is dropped when its 32 bits, as an unsigned number, are below this."""
    return min(round(p * 2**32), _WORD)


def keep(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    """Which elements of a matrix survive: bool [rows, columns].

    With words of 32 bits, arithmetic modulo 2**32, `low` and `high` the halves of the seed:

        mix(v): v ^= v >> 16; v *= FIRST; v ^= v >> 15; v *= SECOND; v ^= v >> 16
        a = mix(row + low); b = mix(a ^ high ^ GOLDEN)
        v = column ^ a; v ^= v >> 16; v *= FIRST; v ^= v >> 15; v ^= b; v *= SECOND; v ^= v >> 16

    and the element survives if v >= threshold(p).

    Args:
        seed: int64, one element.
        rows, columns: of the matrix; leading dimensions are flattened into rows.
        p: probability to drop, 0 <= p < 1.
    """
    return keep_rows(seed, torch.arange(rows, dtype=torch.int64, device=seed.device), columns, p)


def keep_rows(seed: torch.Tensor, rows: torch.Tensor, columns: int, p: float) -> torch.Tensor:
    """`keep` for some rows of the matrix, by their numbers, int64: bool [len(rows), columns]."""
    seed = seed.reshape(())
    low, high = seed & _WORD, (seed >> 32) & _WORD
    a = _mix((rows + low) & _WORD)
    b = _mix(a ^ high ^ GOLDEN)
    v = torch.arange(columns, dtype=torch.int64, device=seed.device) ^ a.unsqueeze(1)
    v = _times(v ^ (v >> 16), FIRST)
    v = _times(v ^ (v >> 15) ^ b.unsqueeze(1), SECOND)
    return v ^ (v >> 16) >= threshold(p)


def _times(v: torch.Tensor, factor: int) -> torch.Tensor:
    return (v * factor) & _WORD  # int64 wraps, and its low word is right


def _mix(v: torch.Tensor) -> torch.Tensor:
    v = _times(v ^ (v >> 16), FIRST)
    v = _times(v ^ (v >> 15), SECOND)
    return v ^ (v >> 16)

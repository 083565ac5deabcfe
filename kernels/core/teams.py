"""Programs that share a row: each of a team learns what the others have found, and waits until all have.

A sum over a row whose outcome decides what the row is summed for next would be a launch for each sum, and the
host must not look. So the programs of a row stay: each writes its part to memory, counts itself in, and waits
for the others. That takes a launch that has all programs on the device at once (cooperative), and about a
microsecond. Rows enough to fill the device get a program each, which waits for nobody.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core.device import device_of
from .launch import jit, tl


@jit
def exchange(
    values, room, count, phase, part, Parts: tl.constexpr, Size: tl.constexpr, Room: tl.constexpr
):  # fmt: skip
    """`values`, int64 [Size], of each program of the team: [Parts, Size].

    room: of the team, int64 [2, Parts, Room], Size at most Room: who comes late to one exchange reads it
    while the next is written. count: of the team, int32, 0 at the launch; phase: exchanges so far.
    """
    if Parts == 1:
        return values[None, :]
    else:
        at = room + (phase % 2) * (Parts * Room)
        column = tl.arange(0, Size)
        tl.store(at + part * Room + column, values)
        tl.debug_barrier()
        tl.atomic_add(count, 1, sem="release")
        while tl.atomic_add(count, 0, sem="acquire") < (phase + 1) * Parts:
            pass
        tl.debug_barrier()
        # volatile: not from a cache that the others' writes do not reach
        return tl.load(at + tl.arange(0, Parts)[:, None] * Room + column[None, :], volatile=True)


@jit
def before(every, part, Parts: tl.constexpr):
    """The sum over the programs that stand before this one."""
    return tl.sum(tl.where(tl.arange(0, Parts)[:, None] < part, every, 0), 0)


class Team(NamedTuple):
    """How a launch shares out rows.

    Attributes:
        parts: programs a row, a power of two.
        tiles: of each program.
        room, counts: what `exchange` takes, for all rows; None for programs on their own.
    """

    parts: int
    tiles: int
    room: torch.Tensor | None
    counts: torch.Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        """Of the launch."""
        return dict(launch_cooperative_grid=True) if self.parts > 1 else {}


MOST_PARTS = 64


def team(rows: int, columns: int, tile: int, size: int, device: torch.device) -> Team:
    """For `rows` rows, 1 or more, in tiles of `tile` columns, whose programs exchange `size` numbers."""
    tiles = -(-columns // tile)
    most = min(device_of(device).multiprocessors // rows, tiles, MOST_PARTS)
    if most < 2:
        return Team(1, tiles, None, None)
    parts = 1 << (most.bit_length() - 1)
    room = torch.empty(rows, 2, parts, size, dtype=torch.int64, device=device)
    return Team(parts, -(-tiles // parts), room, torch.zeros(rows, dtype=torch.int32, device=device))

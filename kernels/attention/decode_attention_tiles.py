"""Which tiles decode_attention in Triton works in, and how many programs share them."""

from __future__ import annotations

import functools
from typing import NamedTuple

from ...core.device import Device


class Config(NamedTuple):
    """What a launch fixes: tiles of rows and of keys, how they are worked, and programs that a multiprocessor
    has at a time."""

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    programs: int


@functools.lru_cache(maxsize=4096)
def choose(device: Device, rows: int, dim: int, dim_v: int, float_bytes: int, bits: int, page: int) -> Config:
    """Tiles for `rows` rows of a kv head, of padded head dims, codes of `bits` bits and pages of `page`
    tokens, 0 for none.

    - float32 runs on the FMA units.
    - 64 keys, or half as many of heads wider than 128: two tiles of K and V are 64 KB, so that two programs
      fit even Ampere's shared memory.
    - Two tiles are on their way in three stages, or where a tile's rows have pages of their own in five, for
      these come first; but 8 bits and their scales in five take 134 KB, where some cards have 99.
    - A warp has 8 channels of V or more.
    - 4 bits are bound by instructions: of 32 keys, whose scales are one group's, and two warps it takes an
      eighth less.
    """
    wide = max(dim, dim_v)
    if float_bytes == 4:
        return Config(16 if rows <= 16 else 32, 32, 4, 2 if wide <= 128 else 1, 2)
    tile_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    four = bits == 4 and tile_m == 16 and wide <= 128
    tile_n = 32 if four or wide > 128 else 64
    warps = 2 if four or dim_v <= 16 else 4
    stages = 5 if 0 < page < tile_n and not (bits == 8 and not device.arch.roomy) else 3
    return Config(tile_m, tile_n, warps, stages, 4 if four else 2)


def splits_of(heads: int, slots: int, most: int) -> int:
    """Programs of each of `heads` tiles of rows, for `slots` that run at once, `most` at most: one wave of
    them, or the fewest waves that are 90% full."""
    best = max(1, slots // heads)
    for splits in range(best, 8 * best):
        waves = -(-heads * splits // slots)
        if heads * splits >= 0.9 * waves * slots:
            best = splits
            break
    return max(1, min(best, most))

"""Which tiles the Triton kernels of multi_lora_linear work in."""

from __future__ import annotations

from typing import NamedTuple

FEW_ROWS = 64  # up to which a program has one row, whatever its adapter


class Few(NamedTuple):
    """Of the two kernels for few rows: TileR and TileK of shrink, its splits and warps; TileR, TileN and
    warps of expand."""

    shrink_r: int
    shrink_k: int
    splits: int
    shrink_warps: int
    expand_r: int
    expand_n: int
    expand_warps: int


def power(count: int, most: int) -> int:
    """The power of two that holds count, at most `most`."""
    return min(1 << (max(count, 1) - 1).bit_length(), most)


def choose_few(m: int, n: int, k: int, rank: int, float_bytes: int) -> Few:
    """A thread asks for 128 bytes of A or B at once. Programs are small where rows are few, to spread over
    the machine; where there are more rows, shrink's are large, so that there is less to hand on."""
    elements = (4096 if m <= 4 else 8192 if m <= 32 else 16384) * 2 // float_bytes
    shrink_r = power(rank, 16)
    shrink_k = power(k, min(elements // shrink_r, 2048))
    expand_r = power(rank, 64)
    expand_n = power(n, min(min(elements, 16384 // float_bytes) // expand_r, 512))
    warps = [power(tile * float_bytes // 4096, 8) for tile in (shrink_r * shrink_k, expand_r * expand_n)]
    return Few(shrink_r, shrink_k, -(-k // shrink_k), warps[0], expand_r, expand_n, warps[1])


class Many(NamedTuple):
    """Of the three kernels for many rows; `strip` tiles of TileN columns are a program's."""

    tile_m: int
    tile_r: int
    tile_k: int
    splits: int
    steps: int
    shrink_warps: int
    tile_n: int
    strip: int
    slots: int


MIN_SPLIT = 512  # columns of x that a program sums at least


def choose_many(
    m: int, n: int, k: int, count: int, rank: int, float_bytes: int, multiprocessors: int
) -> Many:
    """Slots of 32 rows where adapters have as many on average, else of 16. K is split until two programs come
    to a multiprocessor. Columns of y go in strips, so that empty slots, of which there may be one an adapter,
    are few programs."""
    tile_m = 32 if m >= 32 * count and float_bytes == 2 else 16
    tile_r = max(16, power(rank, 64))
    tile_k = 128 if float_bytes == 2 else 32
    tile_n = 128 if float_bytes == 2 else 64
    slots = m // tile_m + count
    programs = max(1, m // tile_m) * -(-rank // tile_r)
    splits = max(1, min(k // MIN_SPLIT, 2 * multiprocessors // programs))
    steps = max(1, -(-k // (tile_k * splits)))
    splits = max(1, -(-k // (tile_k * steps)))
    tiles = -(-n // tile_n)
    strip = max(1, min(tiles, slots * tiles // (8 * multiprocessors)))
    # a tensor core's instruction has 16 rows and 8 ranks: more warps would repeat one another
    warps = min(4, tile_m * tile_r // 128)
    return Many(tile_m, tile_r, tile_k, splits, steps, warps, tile_n, strip, slots)

"""Which tiles the Triton kernels of lowbit_linear work in: by rule, and as they were measured."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ...core import policy
from ...core.cost import Cost, Prediction, Rates
from ...core.device import Device, pretended


class Product(NamedTuple):
    """What tiles are chosen for: a result [m, n] contracted over k, of one W and one dtype.

    Attributes:
        m: rows of x.
        n, k: columns of the result and the contraction: for the gradient those of W, the other way round.
        bits: of a code.
        group_size: columns of W that share a scale; 0 for one scale a row.
        float_bytes: of an element of x.
        grad_x: whether it is the gradient.
    """

    m: int
    n: int
    k: int
    bits: int
    group_size: int
    float_bytes: int
    grad_x: bool = False


class Config(NamedTuple):
    """What a launch fixes at compile time, and how it divides the contraction (see `choose`).

    Attributes:
        tile_m, tile_n, tile_k: rows and columns of the result that a program has, and the contraction's step.
        sub: columns of W that share a scale in a step.
        scale_product: whether a step's product is scaled, instead of its weights.
        splits, steps: programs that share a tile's contraction, and steps of each.
        warps, registers: of a program, and of a thread at most.
        stages: steps that are on their way or being worked.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    sub: int
    scale_product: bool
    splits: int
    steps: int
    warps: int
    stages: int
    registers: int | None


MIN_SPLIT = 512  # contracted at least by a program: for less, partial sums cost more than their weights


@functools.lru_cache(maxsize=4096)
def choose(p: Product, device: Device) -> Config:
    """Tiles by rule.

    - Up to 32 tokens bytes are the bound. Programs enough that some 24 KB of W are in flight on each
      multiprocessor, by splitting the contraction; and as few instructions a weight as may be: a program
      decodes 128 rows, so that a warp reads each x fragment for 32 of them, in steps of a whole group where
      that is 64 or 128, so that products are scaled instead of weights.
    - Then decoding and tensor cores are. A decoded weight serves TileM = 64, then 128 tokens. At 128 x 128
      eight warps hold the accumulators in 64 registers each; on Hopper they are held to 128 in all, so that
      two programs fit a multiprocessor (74 to 83 KB each) and one decodes while the other multiplies. The
      contraction is split only where tiles are fewer than multiprocessors.
    - float32 runs on the FMA units: the largest tiles whose operands fit the registers.
    """
    wgmma, multiprocessors = device.arch.shared_operands, device.multiprocessors
    warps, stages = 4, 4
    if p.float_bytes == 4:
        tile_m, tile_n, tile_k, stages = (16, 32, 32, 2) if p.m <= 16 else (64, 64, 16, 2)
    elif p.m <= 32:
        tile_m, tile_n, tile_k = 16 if p.m <= 16 else 32, 128, 128
        if p.grad_x or (p.group_size % 128 and not p.group_size % 64):
            tile_k = 64
        if -(-p.n // tile_n) * max(1, p.k // MIN_SPLIT) * 2 < 3 * multiprocessors:
            tile_n = 64
    elif p.m <= 64:
        # steps of 128 take 98 KB, twice a multiprocessor, and leave registers to decode in beside the sums
        tile_m, tile_n, tile_k, stages = 64, 128, 128 if p.bits == 4 and wgmma and not p.grad_x else 64, 3
    else:
        tile_m, tile_n, tile_k, warps, stages = 128, 128, 64, 8, 3
    tiles = -(-p.m // tile_m) * -(-p.n // tile_n)
    most = max(1, p.k // MIN_SPLIT)
    if p.m <= 32:
        splits = _fewest_splits(tiles, min(most, max(1, 4 * multiprocessors // tiles)), multiprocessors)
    else:
        splits = max(1, min(most, multiprocessors // tiles))
    registers = 128 if tile_m == 128 and wgmma else None
    return _completed(p, (tile_m, tile_n, tile_k), splits, warps, stages, registers)


def _completed(
    p: Product, tile: tuple[int, int, int], splits: int, warps: int, stages: int, registers: int | None
) -> Config:
    """A Config of these tiles: the scales' runs and the steps that follow from them."""
    tile_m, tile_n, tile_k = tile
    run = tile_n if p.grad_x else tile_k
    sub = math.gcd(p.group_size, run) if p.group_size else run
    scale_product = not p.grad_x and p.group_size > 0 and sub == run and (tile_m <= 32 or p.float_bytes == 4)
    steps = -(-p.k // (tile_k * splits))
    splits = -(-p.k // (tile_k * steps))
    return Config(tile_m, tile_n, tile_k, sub, scale_product, splits, steps, warps, stages, registers)


def _fewest_splits(tiles: int, most: int, multiprocessors: int) -> int:
    """The fewest splits that fill the last wave as well as 85% of the best does, with three programs to two
    multiprocessors or as near to that as `most` splits come."""
    counts = [s for s in range(1, most + 1) if 2 * tiles * s >= 3 * multiprocessors] or [most]
    filled = [tiles * s / (multiprocessors * -(-tiles * s // multiprocessors)) for s in counts]
    return next(s for s, f in zip(counts, filled, strict=True) if f >= 0.85 * max(filled))


# as they are measured


def candidates(p: Product, device: Device) -> list[Config]:
    """The choice of `choose` for the forward, then what is worth measuring beside it: other tiles, more or
    fewer splits, copies further ahead."""
    first = choose(p, device)
    found = [first]
    tile_ks = (64, 128) if p.float_bytes == 2 else (first.tile_k,)
    for tile_n in sorted({first.tile_n, 64, 128} if p.float_bytes == 2 else {first.tile_n}):
        for tile_k in tile_ks:
            for stages in (3, 4, 5) if p.float_bytes == 2 else (first.stages,):
                # a stage holds tiles of x and of codes, and must leave room for a second program
                held = stages * (first.tile_m * tile_k * p.float_bytes + tile_n * tile_k * p.bits // 8)
                if held > 100 << 10:
                    continue
                for splits in sorted({first.splits, max(1, first.splits // 2), first.splits * 2}):
                    if splits > max(1, p.k // MIN_SPLIT):
                        continue
                    tile = (first.tile_m, tile_n, tile_k)
                    config = _completed(p, tile, splits, first.warps, stages, first.registers)
                    if config not in found:
                        found.append(config)
    return found


# clocks of a multiprocessor for a step of 128 x 128 x 64: of a program alone, and of each of two that overlap
_ALONE, _OVERLAPPED = 1474, 1150


def predicted(p: Product, device: Device, cost: Cost, rates: Rates) -> Prediction:
    """The time to expect of the forward's or the gradient's tiles: up to 32 rows bytes, beyond them steps."""
    config = choose(p, device)
    launches = rates.call_s * (2 if config.splits > 1 else 1)
    products = cost.predicted(rates).arithmetic
    if p.float_bytes == 4:
        return Prediction(launches, cost.memory_seconds(rates), arithmetic=products)
    if p.m <= 32:
        return Prediction(launches, 1.2 * cost.memory_seconds(rates), arithmetic=products)
    # half of a step is the decoding of W's tile
    step = (0.5 + config.tile_m / 256) * config.tile_n * config.tile_k / (128 * 64)
    programs = -(-p.m // config.tile_m) * -(-p.n // config.tile_n) * config.splits
    clocks = float(_ALONE) * step * config.steps
    if programs > device.multiprocessors:
        clocks = 2 * _OVERLAPPED * step * config.steps * -(-programs // (2 * device.multiprocessors))
    return Prediction(launches, cost.memory_seconds(rates), rates.clocks(clocks), products)


def tuning_key(m: int, n: int, k: int, format: str, group_size: int, dtype: torch.dtype) -> str:
    """Of a Config in the policy's cache."""
    return policy.key("lowbit_linear", policy.bucket(m), n, k, format, group_size, dtype)


def tuned(
    device: Device, m: int, n: int, k: int, format: str, group_size: int, dtype: torch.dtype
) -> Config | None:
    """What was measured to be the fastest on this GPU."""
    if pretended() is not None or not torch.cuda.is_available():
        return None
    configs = policy.of(torch.cuda.get_device_name(device.number))["configs"]
    found = configs.get(tuning_key(m, n, k, format, group_size, dtype))
    return None if found is None else Config(*found)

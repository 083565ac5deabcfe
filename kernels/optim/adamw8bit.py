"""adamw8bit in Triton: AdamW with moments in 8 bits, one pass over p, the gradient and two bytes of codes.

A program owns `Rows` blocks of `Block` numbers, TILE in all, a tile [Rows, Block] spread so that a row's
maximum stays within a warp or two. It holds both moments in registers from the moment that they are decoded
until their block's largest magnitude is known and they are encoded again: nothing goes through memory twice.

What bounds it are the bytes: 16 a parameter in float32 (p read and written, g, two codes read and written),
10 in 16 bits; with the codes in pinned host memory the four of them over the bus. To stay below that, no code
is looked up among 256 and none is searched: the nine segments of a map (`blockwise.segments`) are 16-entry
tables, one line of the first-level cache each, indexed by the exponent of the code, or of the number (see
csrc/cpu/optim/adamw8bit.cpp).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ...core.tensors import table
from ...weights.blockwise import ZERO, blocks_of, segments
from ..core.launch import constants, jit, refuse, tl

TILE = 2048  # numbers a program: with 4 warps 16 a thread, as two moments some 50 registers
ENTRIES = 16


@jit
def _decode(codes, table, Signed: tl.constexpr, Zero: tl.constexpr):
    """The values of codes, before their scale."""
    place = codes.to(tl.float32) - Zero
    # counted so that a segment begins at a power of two; a quarter on top tells 0 from 1
    y = tl.abs(place) + (0.25 if Signed else 1.25)
    bits = y.to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    at = table + ((bits >> 23) & 15)
    value = (y - power) * tl.load(at) + tl.load(at + 16)
    return tl.where(place < 0, -value, value)


@jit
def _encode(x, table, Signed: tl.constexpr, Zero: tl.constexpr):
    """The nearest codes of numbers in [-1, 1], as in `blockwise.quantize_blocks`; for a NaN, some code."""
    size = tl.abs(x)
    # floor(log10(2**exponent) + 7.4), never above the segment of size nor more than one below it
    segment = ((size.to(tl.int32, bitcast=True) >> 23) * 77 + (1894 - 127 * 77)) >> 8
    segment = tl.minimum(tl.maximum(segment, 0), 8)
    segment += (size >= tl.load(table + 32 + segment)).to(tl.int32)
    at = table + 48 + segment
    place = size * tl.load(at) + tl.load(at + 16)
    last = tl.load(at + 32)
    code = tl.where(place < last, place, last).to(tl.int32)
    if Signed:
        code = tl.maximum(Zero + tl.where(x < 0, -code, code), 0)  # there is a 1 and no -1
    else:
        code = tl.maximum(code, tl.minimum(segment, 1))
    return code.to(tl.uint8)


@jit
def _largest(x):
    """The largest magnitude of each row; as integers, a NaN is above everything."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)


@jit
def _store(x, codes, absmax, table, at, inside, rows, rows_inside, Signed: tl.constexpr, Zero: tl.constexpr):
    largest = _largest(x)
    tl.store(absmax + rows, largest, rows_inside)
    # below the smallest normal number the reciprocal may not exist: such a block is all zeros
    inverse = tl.where(largest >= 1.1754943508222875e-38, 1.0 / largest, 0.0)
    tl.store(codes + at, _encode(x * inverse[:, None], table, Signed, Zero), inside)


class Tiles(NamedTuple):
    """Blocks of a program and numbers of a block; the code of 0 in a signed map; constants."""

    Rows: int
    Block: int
    SignedZero: int


@jit
def _kernel(
    p, g, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, signed, unsigned, count, blocks, beta1,
    rest1, beta2, rest2, eps, decay, step_size, inverse_correction, Tile,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * Tile.Rows
    rows = first + tl.arange(0, Tile.Rows)
    rows_inside = rows < blocks
    at = first * Tile.Block + (
        tl.arange(0, Tile.Rows)[:, None] * Tile.Block + tl.arange(0, Tile.Block)[None, :]
    )
    inside = at < count

    grad = tl.load(g + at, inside, other=0).to(tl.float32)
    m = _decode(tl.load(exp_avg + at, inside, other=Tile.SignedZero), signed, True, Tile.SignedZero)
    m = m * tl.load(exp_avg_absmax + rows, rows_inside, other=0)[:, None]
    v = _decode(tl.load(exp_avg_sq + at, inside, other=0), unsigned, False, 0)
    v = v * tl.load(exp_avg_sq_absmax + rows, rows_inside, other=0)[:, None]
    m = beta1 * m + rest1 * grad
    v = beta2 * v + rest2 * (grad * grad)

    change = m / (tl.sqrt_rn(v) * inverse_correction + eps)
    kept = decay * tl.load(p + at, inside, other=0).to(tl.float32)
    tl.store(p + at, (kept - step_size * change).to(p.dtype.element_ty), inside)
    _store(m, exp_avg, exp_avg_absmax, signed, at, inside, rows, rows_inside, True, Tile.SignedZero)
    _store(v, exp_avg_sq, exp_avg_sq_absmax, unsigned, at, inside, rows, rows_inside, False, 0)


@table
def _table(signed: bool, device: str) -> torch.Tensor:
    """Rows of ENTRIES: step, base by the exponent of a code; top, scale, base, last code by segment."""
    rows = [[0.0] * ENTRIES for _ in range(6)]
    rows[2] = [float("inf")] * ENTRIES
    for s, segment in enumerate(segments(signed)):
        exponent = 125 if signed and s == 0 else 127 + s - signed
        scale = 1 / segment.step if segment.step else 0.0
        rows[0][exponent % ENTRIES] = segment.step
        rows[1][exponent % ENTRIES] = segment.base - segment.step / 4
        rows[2][s] = segment.top
        rows[3][s] = scale
        rows[4][s] = segment.first + 0.5 - segment.base * scale  # rounded down: the nearest
        rows[5][s] = segment.last
    return torch.tensor(rows, dtype=torch.float32, device=device)


@functools.cache
def _tiles(block_size: int) -> tuple[int, Tiles]:
    """Blocks of a program, and its constants."""
    rows = max(1, TILE // block_size)
    return rows, constants(Tiles(rows, block_size, ZERO[True]))


def supports(p: torch.Tensor, *args: Any) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return refuse(p.device)


def run(
    p: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_absmax: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_absmax: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: float,
    maximize: bool,
    block_size: int,
) -> None:
    """One step in place. The arguments have passed the op's check and `supports`."""
    if p.numel() == 0:
        return
    if p.is_cuda and p.device.index != torch.cuda.current_device():
        with torch.cuda.device(p.device):
            return run(
                p, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, lr, beta1, beta2, eps,
                weight_decay, step, maximize, block_size,
            )  # fmt: skip
    rows, tiles = _tiles(block_size)
    blocks = blocks_of(p.numel(), block_size)
    device = str(p.device)
    _kernel[(-(-blocks // rows),)](
        p, grad.contiguous(), exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, _table(True, device),
        _table(False, device), p.numel(), blocks, beta1, beta1 - 1 if maximize else 1 - beta1, beta2,
        1 - beta2, eps, 1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, tiles,
        num_warps=4,
    )  # fmt: skip

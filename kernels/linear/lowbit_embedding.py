"""lowbit_embedding in Triton: rows of W by their numbers, decoded from the canonical layout.

A program has R numbers of rows and K columns, some 4,096 weights: each thread reads up to 16 bytes of codes,
decodes them in float32 and writes what they became. Scales are one load for each run of Sub columns that
shares one. Bound by bytes: at 4 bits to bfloat16 half a byte is read and 2 are written for each number; rows
lie anywhere, so a read is a row's own 32-byte sectors. A row that there is not becomes NaN, for a kernel
can't raise.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ...core.device import Device, device_of
from ...core.limits import NESTED_BLOCK
from ...weights.formats import FORMATS
from ...weights.weight import WeightTensors
from ..core.decoding import CODES
from ..core.launch import Plan, alignment_of, dtype_of, jit, planned, tl
from .lowbit_linear import SCALES, Codes, _group, _weights, matrix_of, supports_grad_x


class Rows(NamedTuple):
    """What a program works on; constants.

    Attributes:
        R, K: rows and columns.
        Sub: columns that share a scale.
        Align: by what K is divided on its way to it.
    """

    R: int
    K: int
    Sub: int
    Align: int


@jit(do_not_specialize=["count", "N", "K"])
def _kernel(indices, weight, out, count, N, K, Code, Tile):
    """out [count, K] of W [N, K]."""
    K *= Tile.Align
    Count: tl.constexpr = Tile.K // Tile.Sub
    groups = 1 if Code.GroupSize == 0 else K // Code.GroupSize
    tiles = tl.cdiv(K, Tile.K)
    i = (tl.program_id(0) // tiles).to(tl.int64) * Tile.R + tl.arange(0, Tile.R)
    k = tl.program_id(0) % tiles * Tile.K
    column = k + tl.arange(0, Tile.K)
    byte = k // 8 * Code.Bits + tl.arange(0, Tile.K * Code.Bits // 8)
    width = K // 8 * Code.Bits
    row = tl.load(indices + i, mask=i < count, other=0).to(tl.int64)
    known = (row >= 0) & (row < N)
    row = tl.where(known, row, 0)
    scale, zero = _group(weight, row, k, groups, Code, Tile.Sub, Count)
    codes = tl.load(
        weight.qweight + row[:, None] * width + byte[None, :], mask=(byte < width)[None, :], other=0
    )
    w = _weights(codes, weight, scale, zero, Code, True, Count, tl.float32)
    w = tl.where(known[:, None], w, float("nan"))
    mask = (i < count)[:, None] & (column < K)[None, :]
    tl.store(out + i[:, None] * K + column[None, :], w.to(out.dtype.element_ty), mask=mask)


WEIGHTS, WIDEST = 4096, 1024  # of a program; columns of it


class Kind(NamedTuple):
    """What a plan depends on beside sizes."""

    format: str
    group_size: int
    scale_rows: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    offset_dtype: torch.dtype | None
    indices: torch.dtype
    given: tuple[bool, ...]


@functools.lru_cache(maxsize=1024)
def _plan(device: Device, count: int, n: int, k: int, kind: Kind) -> Plan:
    code = CODES[kind.format]
    group_size = 0 if kind.group_size == k else kind.group_size
    width = min(WIDEST, max(32, 1 << (k - 1).bit_length()))
    rows = max(1, min(WEIGHTS // width, 1 << (count - 1).bit_length()))
    sub = width if group_size == 0 else math.gcd(group_size, width)
    align = math.gcd(k, 128 // code.bits)
    codes = Codes(
        "", code.bits, code.center, SCALES[kind.scale_dtype], group_size, kind.scale_rows, NESTED_BLOCK
    )
    return planned(
        device,
        _kernel,
        (-(-count // rows) * -(-k // width), 1, 1),
        (count, n, k // align),
        (codes, Rows(rows, width, sub, align)),
        kind,
        num_warps=4,
        enable_fp_fusion=False,
    )


def supports(indices: torch.Tensor, weight: WeightTensors, dtype: torch.dtype) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if (reason := supports_grad_x(indices, weight)) is not None:
        return reason
    if indices.numel() * -(-weight.shape[1] // WIDEST) >= 2**31:
        return f"{indices.numel()} rows of {weight.shape[1]} columns are more than 2**31 tiles"
    return None


def run(indices: torch.Tensor, weight: WeightTensors, dtype: torch.dtype) -> torch.Tensor:
    """Rows of W; NaN where there is no such row."""
    if indices.is_cuda and indices.device.index != torch.cuda.current_device():
        with torch.cuda.device(indices.device):
            return run(indices, weight, dtype)
    n, k = weight.shape
    out = torch.empty((*indices.shape, k), dtype=dtype, device=indices.device)
    if out.numel() == 0 or n == 0:
        return out.fill_(float("nan"))
    indices = indices.contiguous()
    matrix = matrix_of(weight, out.new_empty(0, dtype=torch.float32))
    scale_dtype = weight.scales.dtype
    if scale_dtype is torch.uint8 and weight.scale_offset is None:
        scale_dtype = FORMATS[weight.format].scale_dtype
    given = tuple(t is not None for t in matrix)
    kind = Kind(
        weight.format, weight.group_size, weight.scale_rows, dtype, scale_dtype, dtype_of(weight.offsets),
        indices.dtype, given,
    )  # fmt: skip
    plan = _plan(device_of(indices.device), indices.numel(), n, k, kind)
    plan.launch((indices, matrix, out), alignment_of(indices, *matrix[:6], out))
    return out

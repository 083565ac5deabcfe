"""Matrices of few-bit floats, which several formats of files hold alike."""

from __future__ import annotations

import re
from typing import Any

import torch

from ..weights.formats import SCALE_DTYPES, get_format
from ..weights.weight import LowBitWeight
from .checkpoint import Loaded
from .folder import Matrix, groups_of, regrouped, sized

_SCALES = (*SCALE_DTYPES, torch.float8_e8m0fnu, torch.uint8)


def fp8(m: Matrix, part: str, n: int, k: int, blocks: Any, weight: str = ".weight") -> Loaded:
    """An e4m3 matrix with a scale a tensor, a row, a group of columns, or a block of rows and columns.

    Args:
        part: the scale's name behind the matrix's; it is a multiplier.
        blocks: what the config says of blocks, [rows, columns], "128x128" or nothing.
    """
    codes = m.need(weight, torch.float8_e4m3fn, shape=(n, k)).view(torch.uint8)
    scales = m.need(part, *_SCALES)
    note = ""
    if scales.dtype in (torch.float8_e8m0fnu, torch.uint8):  # powers of two
        scales, note = scales.view(torch.float8_e8m0fnu).float(), "scales of 8 bits held as float32"
    if scales.numel() == 1:
        scales = scales.reshape(1, 1)
        rows, group = n, k
    else:
        scales = scales.unsqueeze(1) if scales.dim() == 1 else scales
        rows, group = _blocks(m, tuple(scales.shape), n, k, blocks)
    group, (scales,) = regrouped(k, group, scales.contiguous())
    format = sized(get_format("fp8", scale_dtype=scales.dtype, scale_rows=rows), k, group)
    w = LowBitWeight(codes.clone(), scales.contiguous(), format, (n, k), dtype=torch.bfloat16)
    if bool(((codes & 0x7F) == 0x7F).any()):
        raise ValueError("weight holds a NaN, expected finite numbers")
    return Loaded(w, note=note)


def _blocks(m: Matrix, shape: tuple[int, ...], n: int, k: int, said: Any) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    if len(shape) != 2:
        raise m.refuse(f"its scales have shape {list(shape)}, expected [blocks of rows, blocks of columns]")
    if isinstance(said, str) and (found := re.fullmatch(r"(\d{1,6})x(\d{1,6})", said)):
        said = [int(found[1]), int(found[2])]
    if isinstance(said, (list, tuple)) and len(said) == 2 and all(type(i) is int and i > 0 for i in said):
        rows, group = said
        if (-(-n // rows), -(-k // group)) == shape:
            return rows, min(group, k)
    if shape[0] == n:
        return 1, groups_of(k, shape[1], k)
    raise m.refuse(f"its scales have shape {list(shape)} of {[n, k]}, and the config has blocks of {said}")


def nvfp4(
    m: Matrix,
    codes: str,
    part: str,
    n: int,
    k: int,
    scale: torch.Tensor,
    divisor: torch.Tensor | None = None,
) -> Loaded:
    """An e2m1 matrix with an e4m3 scale for each 16 columns and one of the tensor, float32 [1]; `divisor` is
    what the file has in its place, where it has one."""
    packed = m.need(codes, torch.uint8, shape=(n, k // 2)).clone()
    scales = m.need(part, torch.float8_e4m3fn, torch.uint8, shape=(n, k // 16)).clone().view(torch.uint8)
    w = LowBitWeight(packed, scales, get_format("nvfp4"), (n, k), scale_scales=scale, dtype=torch.bfloat16)
    loss = ""
    if divisor is not None:
        exact = scales.view(torch.float8_e4m3fn).float() / divisor
        if not torch.equal(exact, w.float_scales()):
            loss = "the tensor's divisor is held as its reciprocal, so scales are rounded once, to float32"
    return Loaded(w, loss)

"""Codes <-> bytes in the canonical layout: row-major, low bits first, a row shard is a shard of the
matrix."""

from __future__ import annotations

import torch


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a row of `columns` codes; columns is a multiple of 8, so a row is whole bytes at any width."""
    return columns * bits // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [rows, columns] (uint8, each < 2**bits, columns a multiple of 8) to uint8 [rows,
    columns*bits/8].

    Code k of a row takes bits [k*bits, (k+1)*bits) of the row, counted from the low bit of its first byte.
    """
    rows, columns = codes.shape
    if columns % 8:
        raise ValueError(f"codes has {columns} columns, expected a multiple of 8")
    if bits == 8:
        return codes.contiguous()
    if bits == 4:  # two codes as one word of 16 bits, whose low byte then has both: no stride is walked
        pairs = codes.contiguous().view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8)
    eight = codes.reshape(rows, columns // 8, 8).to(torch.int64)
    word = (eight << torch.arange(0, 8 * bits, bits, dtype=torch.int64, device=codes.device)).sum(
        -1, keepdim=True
    )
    octets = (word >> torch.arange(0, 8 * bits, 8, dtype=torch.int64, device=codes.device)) & 0xFF
    return octets.to(torch.uint8).view(rows, packed_width(columns, bits))


def unpack(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack uint8 [rows, columns*bits/8] to codes uint8 [rows, columns]. The inverse of `pack`."""
    rows, width = qweight.shape
    if bits == 8:
        return qweight
    if bits == 4:
        return torch.stack((qweight & 0xF, qweight >> 4), dim=-1).view(rows, 2 * width)
    octets = qweight.reshape(rows, width // bits, bits).to(torch.int64)
    word = (octets << torch.arange(0, 8 * bits, 8, dtype=torch.int64, device=qweight.device)).sum(
        -1, keepdim=True
    )
    codes = (word >> torch.arange(0, 8 * bits, bits, dtype=torch.int64, device=qweight.device)) & (
        2**bits - 1
    )
    return codes.to(torch.uint8).view(rows, width * 8 // bits)

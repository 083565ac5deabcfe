"""Blocks of llama.cpp's types as few-bit weights, bit for bit.

A block holds 32 or 256 numbers of a row: codes, a scale, and for some types an offset; the K types have a
scale for each 16 or 32 of them, themselves few-bit codes under a scale of the block. Codes are spread over
planes (the low halves of 16 bytes, then the high ones), which the canonical layout has not: they are taken
apart and packed anew, a bounded number of rows at a time. What a type computes is w = scale*code - offset:
products of a block's float16 scale and a small integer are exact in float32, so scales and offsets of the K
types are held so. Codes of 5 and 6 bits are held in 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..core.tensors import check_finite
from ..weights.formats import Format, get_format, register_format
from ..weights.packing import pack, packed_width
from ..weights.weight import CHUNK, LowBitWeight
from .checkpoint import Loaded
from .gguf_file import GGUFTensor

# quantiles, as ggml has them
IQ4_NL = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Parts(NamedTuple):
    """Of blocks [rows, blocks, bytes]: codes uint8 [rows, blocks, numbers]; scales and offsets [rows,
    blocks, groups]."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None


class _Type(NamedTuple):
    """The format that holds a type, and what reads its blocks."""

    format: Callable[[], Format]
    parts: Callable[[torch.Tensor], _Parts]
    note: str = ""


def as_weight(tensor: GGUFTensor, dtype: torch.dtype = torch.float32, heads: int = 0) -> Loaded:
    """A tensor as a few-bit weight, or as the floats that it is.

    Args:
        tensor: of two dimensions, or three (experts), where it is in few bits.
        dtype: what the weight says that it is read as.
        heads: if not 0, the rows of each of so many heads are put from the order that llama.cpp's rotation
            wants (pairs side by side) into that of transformers (halves).

    Raises:
        ValueError: scales that are not finite; heads that do not divide the rows.
    """
    if tensor.type.name in FLOATS:
        numbers = tensor.file.tensor(
            FLOATS[tensor.type.name], tensor.shape, tensor.offset, f"tensor {tensor.name!r}"
        )
        order = _row_order(tensor, heads)
        return Loaded(numbers if order is None else numbers[order])
    made, parts_of, note = TYPES[tensor.type.name]
    format, blocks = made(), tensor.blocks()
    rows, k = blocks.shape[0], tensor.shape[-1]
    groups = k // format.group_size
    qweight = torch.empty(rows, packed_width(k, format.bits), dtype=torch.uint8, device="cpu")
    fixed = format.scale_dtype if format.scale_dtype.itemsize > 1 else torch.uint8
    scales = torch.empty(rows, groups, dtype=fixed, device="cpu")
    offsets = torch.empty_like(scales) if format.offset else None
    step = max(1, CHUNK // k)
    for at in range(0, rows, step):
        part = slice(at, at + step)
        found = parts_of(blocks[part])
        qweight[part] = pack(found.codes.flatten(1), format.bits)
        scales[part] = found.scales.flatten(1)
        if offsets is not None and found.offsets is not None:
            offsets[part] = found.offsets.flatten(1)
    tensors = {"qweight": qweight, "scales": scales}
    if offsets is not None:
        tensors["offsets"] = offsets
    order = _row_order(tensor, heads)
    lead = tensor.shape[:-1]
    tensors = {
        name: (t if order is None else t[order]).view(*lead, t.shape[-1]) for name, t in tensors.items()
    }
    for name in ("scales", "offsets"):
        if name in tensors:
            t = tensors[name]
            floats = t.view(format.scale_dtype) if t.dtype == torch.uint8 else t
            check_finite(f"{tensor.where}: {name}", floats.float())
    if format.tensor_scale:
        tensors["scale_scales"] = torch.ones(*lead[:-1], 1, dtype=torch.float32, device="cpu")
    return Loaded(LowBitWeight(format=format, shape=tensor.shape, dtype=dtype, **tensors), note=note)


def _row_order(tensor: GGUFTensor, heads: int) -> torch.Tensor | None:
    if not heads:
        return None
    rows = tensor.shape[0]
    if rows % (2 * heads):
        raise ValueError(
            f"{tensor.where} has {rows} rows, expected a multiple of two for each of {heads} heads"
        )
    return torch.arange(rows, dtype=torch.int64, device="cpu").view(heads, -1, 2).transpose(1, 2).reshape(-1)


def _halves(blocks: torch.Tensor, begin: int, run: int) -> torch.Tensor:
    """4-bit codes from byte `begin` on: the low halves of each `run` bytes, then their high ones."""
    rows, count, size = blocks.shape
    b = blocks[..., begin:].reshape(rows, count, (size - begin) // run, 1, run)
    return torch.cat((b & 0xF, b >> 4), -2).view(rows, count, -1)


def _planes(b: torch.Tensor, run: int, bits: int) -> torch.Tensor:
    """Codes of 1 or 2 bits of bytes [rows, blocks, bytes]: the lowest of each `run` bytes, then the next."""
    rows, count, size = b.shape
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device="cpu").view(-1, 1)
    b = b.reshape(rows, count, size // run, 1, run) >> shifts
    return (b & (2**bits - 1)).view(rows, count, -1)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at a byte of each block, [rows, blocks, 1]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)


def _q4_0(b: torch.Tensor) -> _Parts:
    return _Parts(_halves(b, 2, 16), _half(b, 0))


def _q4_1(b: torch.Tensor) -> _Parts:
    return _Parts(_halves(b, 4, 16), _half(b, 0), -_half(b, 2))


def _fifth_bits(b: torch.Tensor, at: int) -> torch.Tensor:
    """16 where the fifth bit of a number is set: bit i of four bytes is of number i."""
    return _planes(b[..., at : at + 4].reshape(*b.shape[:2], 4), 1, 1) << 4


def _q5_0(b: torch.Tensor) -> _Parts:
    codes = _halves(b, 6, 16) | _fifth_bits(b, 2)
    return _Parts(codes + (128 - 16), _half(b, 0))


def _q5_1(b: torch.Tensor) -> _Parts:
    return _Parts(_halves(b, 8, 16) | _fifth_bits(b, 4), _half(b, 0), -_half(b, 2))


def _q8_0(b: torch.Tensor) -> _Parts:
    return _Parts(b[..., 2:] ^ 0x80, _half(b, 0))


def _iq4_nl(b: torch.Tensor) -> _Parts:
    return _Parts(_halves(b, 2, 16), _half(b, 0))


def _mxfp4(b: torch.Tensor) -> _Parts:
    return _Parts(_halves(b, 1, 16), b[..., :1])


def _nvfp4(b: torch.Tensor) -> _Parts:
    scales = b[..., :4] & 0x7F  # their sign bit says nothing
    return _Parts(_halves(b, 4, 8), torch.where(scales == 0x7F, 0, scales))


def _q2_k(b: torch.Tensor) -> _Parts:
    sub, d, least = b[..., :16], _half(b, 80).float(), _half(b, 82).float()
    return _Parts(_planes(b[..., 16:80], 32, 2), d * (sub & 0xF), least * (sub >> 4))


def _q3_k(b: torch.Tensor) -> _Parts:
    high = _planes(b[..., :32], 32, 1)
    codes = _planes(b[..., 32:96], 32, 2) | (high << 2)
    low = b[..., 96:104]
    top = _planes(b[..., 104:108], 4, 2)
    sub = torch.cat((low & 0xF, low >> 4), -1) | (top << 4)
    return _Parts(codes, _half(b, 108).float() * (sub.float() - 32))


def _six_bits(b: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes: the first four of each in the low bits of bytes
    0-3 and 4-7, the others in the halves of bytes 8-11 with their top bits above the first ones."""
    scale, least, rest = b[..., at : at + 4], b[..., at + 4 : at + 8], b[..., at + 8 : at + 12]
    scales = torch.cat((scale & 63, (rest & 0xF) | ((scale >> 2) & 0x30)), -1)
    return scales, torch.cat((least & 63, (rest >> 4) | ((least >> 2) & 0x30)), -1)


def _q4_k(b: torch.Tensor) -> _Parts:
    sub, least = _six_bits(b, 4)
    return _Parts(_halves(b, 16, 32), _half(b, 0).float() * sub, _half(b, 2).float() * least)


def _q5_k(b: torch.Tensor) -> _Parts:
    sub, least = _six_bits(b, 4)
    codes = _halves(b, 48, 32) | (_planes(b[..., 16:48], 32, 1) << 4)
    return _Parts(codes, _half(b, 0).float() * sub, _half(b, 2).float() * least)


def _q6_k(b: torch.Tensor) -> _Parts:
    codes = _halves(b[..., :128], 0, 64) | (_planes(b[..., 128:192], 32, 2) << 4)
    sub = b[..., 192:208].contiguous().view(torch.int8)
    return _Parts(codes + (128 - 32), _half(b, 208).float() * sub)


def _format(name: str, group: int, scale_dtype: torch.dtype, offset: bool = False) -> Callable[[], Format]:
    return lambda: get_format(name, group_size=group, scale_dtype=scale_dtype, offset=offset or None)


def _iq4_nl_format() -> Format:
    return register_format(Format("iq4_nl", 4, group_size=32, codebook=IQ4_NL, scale_dtype=torch.float16))


F16, F32 = torch.float16, torch.float32
_WIDE = "codes of {} bits held in 8"
_LEVELS = "scales of two levels held as float32"
TYPES: dict[str, _Type] = {
    "Q4_0": _Type(_format("int4", 32, F16), _q4_0),
    "Q4_1": _Type(_format("int4", 32, F16, True), _q4_1),
    "Q5_0": _Type(_format("int8", 32, F16), _q5_0, _WIDE.format(5)),
    "Q5_1": _Type(_format("int8", 32, F16, True), _q5_1, _WIDE.format(5)),
    "Q8_0": _Type(_format("int8", 32, F16), _q8_0),
    "Q2_K": _Type(_format("int2", 16, F32, True), _q2_k, _LEVELS),
    "Q3_K": _Type(_format("int3", 16, F32), _q3_k, _LEVELS),
    "Q4_K": _Type(_format("int4", 32, F32, True), _q4_k, _LEVELS),
    "Q5_K": _Type(_format("int8", 32, F32, True), _q5_k, f"{_WIDE.format(5)}, {_LEVELS}"),
    "Q6_K": _Type(_format("int8", 16, F32), _q6_k, f"{_WIDE.format(6)}, {_LEVELS}"),
    "IQ4_NL": _Type(_iq4_nl_format, _iq4_nl),
    "MXFP4": _Type(lambda: get_format("mxfp4"), _mxfp4),
    "NVFP4": _Type(lambda: get_format("nvfp4"), _nvfp4),
}

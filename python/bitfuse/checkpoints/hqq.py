"""HQQ (Badri and Shaji, 2023): w = (q - zero) * scale with a float zero, codes packed along the groups."""

from __future__ import annotations

from typing import Any

import torch

from ..weights.formats import SCALE_DTYPES, get_format
from ..weights.packing import pack
from ..weights.weight import LowBitWeight
from .checkpoint import Loaded, Source
from .folder import Described, Folder, Matrix

# packings: bits of a code, of a word, and how far each part of the groups is shifted
_PACKINGS: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {
    "8bit_u8": (8, torch.uint8, (0,)),
    "4bit_u8": (4, torch.uint8, (4, 0)),
    "2bit_u8": (2, torch.uint8, (6, 4, 2, 0)),
    "3bit_32": (3, torch.int32, tuple(range(27, -1, -3))),
}
_META = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip


class HQQ(Folder):
    """8, 4, 3 and 2 bits, groups along in_features (axis=1).

    A zero that is a whole number is kept as it is; others become the float offset zero*scale.
    """

    kind = "hqq"
    markers = (".W_q",)
    parts = (".W_q", ".scale", ".zero", *(f".{name}" for name in _META))

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.method == "hqq" or "hqq" in source.quantization

    def matrix(self, m: Matrix) -> Described:
        shape = tuple(m.need(".shape").flatten().tolist())
        if len(shape) != 2 or not all(0 < i < 1 << 32 for i in shape) or shape[1] % 8:
            raise m.refuse(f"shape is {list(shape)}, expected [rows, a multiple of 8]")
        n, k = map(int, shape)
        axis = _number(m, ".axis", 1)
        if axis != 1:
            raise m.refuse(f"axis is {axis}, expected 1: a scale along a column fits no group of a row")
        bits = _number(m, ".nbits", 4)
        name = f"{bits}bit_{'32' if bits == 3 else 'u8'}"
        if m.has(".packing"):
            name = bytes(m.need(".packing").to(torch.uint8).flatten()[:32].tolist()).decode("latin-1")
        if name not in _PACKINGS or _PACKINGS[name][0] != bits:
            raise m.refuse(f"packing is {name!r} of {bits} bits, expected one of {', '.join(_PACKINGS)}")
        group = _number(m, ".group_size", 0) or k
        if group < 8 or k % group or group % 8:
            raise m.refuse(f"group_size is {group}, expected a multiple of 8 that divides {k}")
        return Described(f"hqq {bits} bits g{group}", (n, k), lambda: self._read(m, n, k, group, name))

    def _read(self, m: Matrix, n: int, k: int, group: int, packing: str) -> Loaded:
        bits, dtype, shifts = _PACKINGS[packing]
        words = m.need(".W_q").view(dtype)
        groups = n * k // group
        rows = -(-groups // len(shifts))
        if words.shape != (rows, group):
            raise m.refuse(f"W_q holds {list(words.shape)} words, expected {[rows, group]}")
        mask = 2**bits - 1
        codes = torch.cat([((words >> shift) & mask).to(torch.uint8) for shift in shifts])[:groups]
        qweight = pack(codes.view(n, k), bits)
        numbers = []
        for name in (".scale", ".zero"):
            t = m.need(name, *SCALE_DTYPES)
            if t.numel() != groups:
                raise m.refuse(f"{name[1:]} has shape {list(t.shape)}, expected {[groups, 1]}")
            numbers.append(t.reshape(n, k // group).clone())
        scales, zeros = numbers
        options: dict[str, Any] = {"group_size": -1 if group == k else group}
        whole = bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= mask)).all())
        if whole:
            format = get_format(f"int{bits}", symmetric=False, scale_dtype=scales.dtype, **options)
            parts = {"zeros": zeros.to(torch.uint8)}
            loss = ""
        else:
            dtype, scales = scales.dtype, scales.float()
            format = get_format(f"int{bits}", offset=True, scale_dtype=torch.float32, **options)
            parts = {"offsets": zeros.float() * scales}
            loss = "scale*code - scale*zero in the place of (code - zero)*scale: two roundings of float32"
        w = LowBitWeight(qweight, scales, format, (n, k), dtype=numbers[0].dtype, **parts)
        return Loaded(w, loss)


def _number(m: Matrix, part: str, default: int) -> int:
    if not m.has(part):
        return default
    t = m.need(part)
    if t.numel() != 1 or t.is_floating_point():
        raise m.refuse(f"{part[1:]} has shape {list(t.shape)}, expected one integer")
    return int(t)

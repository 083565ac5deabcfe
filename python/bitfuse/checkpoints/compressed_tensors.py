"""vLLM's compressed-tensors: packed integers, int8, FP8, NVFP4, MXFP4 and MXFP8, by groups of layers."""

from __future__ import annotations

from typing import Any

import torch

from ..weights.formats import SCALE_DTYPES, get_format
from ..weights.packing import pack
from ..weights.weight import CHUNK, LowBitWeight, column_order
from .checkpoint import Loaded, Source
from .float_weights import fp8, nvfp4
from .folder import (
    Described,
    Folder,
    Matrix,
    as_bytes,
    groups_of,
    in_order,
    regrouped,
    sized,
    sorted_groups,
    unpacked,
)
from .patterns import fullmatch

_PACKED, _SCALE = ".weight_packed", ".weight_scale"


class CompressedTensors(Folder):
    """pack-quantized (2 to 8 bits, dense and padded words, act-order), int-quantized, float-quantized (a
    scale a tensor, channel, group or block), nvfp4-, mxfp4-pack-quantized, mxfp8-quantized. What a layer is
    is seen in its tensors; bits are those of the first config group whose targets name it.

    Layers that the config's `ignore` names have no such tensors, and stay as they are.
    """

    kind = "compressed-tensors"
    markers = (_PACKED, _SCALE)
    parts = (
        ".weight", _PACKED, _SCALE, ".weight_shape", ".weight_zero_point", ".weight_g_idx",
        ".weight_global_scale",
    )  # fmt: skip
    dropped = (".input_scale", ".input_zero_point", ".input_global_scale", ".k_scale", ".v_scale", ".q_scale")

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.method in ("compressed-tensors", "compressed_tensors")

    def matrix(self, m: Matrix) -> Described:
        if not m.has(_PACKED):
            return self._whole_bytes(m)
        n, width = m.shape(_PACKED, 2)
        if self.tensors[m.name + _PACKED].dtype == torch.uint8:
            k = width * 2
            if m.has(".weight_global_scale"):
                return Described("nvfp4-pack-quantized", (n, k), lambda: self._nvfp4(m, n, k))
            return Described("mxfp4-pack-quantized", (n, k), lambda: self._mxfp4(m, n, k))
        shape = tuple(m.need(".weight_shape").flatten().tolist())
        args = self._args(m)
        bits = args.get("num_bits")
        if len(shape) != 2 or shape[0] != n or shape[1] <= 0 or shape[1] % 8:
            raise m.refuse(f"weight_shape is {list(shape)}, expected [{n}, a multiple of 8]")
        if type(bits) is not int or not 2 <= bits <= 8:
            raise m.refuse(f"num_bits is {bits!r}, expected 2 to 8")
        k = shape[1]
        said = args.get("group_size")
        group = groups_of(k, m.shape(_SCALE, 2)[1], said if type(said) is int else -1)
        stored = f"pack-quantized {bits} bits g{group}"
        return Described(stored, (n, k), lambda: self._packed(m, n, k, bits, group))

    def _args(self, m: Matrix) -> dict[str, Any]:
        """The `weights` of the config group of a layer: names before classes."""
        groups = self.quantization.get("config_groups")
        found = list(groups.values()) if isinstance(groups, dict) else []
        if not found or not all(isinstance(g, dict) and isinstance(g.get("weights"), dict) for g in found):
            raise m.refuse(f"config_groups is {groups!r}, expected groups with weights")
        for group in found:
            for target in group.get("targets") or ():
                if target == m.name or (
                    str(target).startswith("re:") and fullmatch(f"({str(target)[3:]}).*", m.name)
                ):
                    return dict(group["weights"])
        of_classes = [g for g in found if not all(str(t).startswith("re:") for t in g.get("targets") or ())]
        return dict((of_classes or found)[0]["weights"])

    def _packed(self, m: Matrix, n: int, k: int, bits: int, group: int) -> Loaded:
        words = m.need(_PACKED, torch.int32)
        held = bits if bits in (2, 3, 4) else 8
        note = "" if held == bits else f"codes of {bits} bits held in 8"
        add = 0 if held == bits else 128 - (1 << (bits - 1))
        dense = words.shape[1] == -(-k * bits // 32)  # as since June 2026; before, words had whole codes
        if held == bits and dense:
            qweight = as_bytes(words, k, bits)
        else:
            rows = words.split(max(1, CHUNK // k))
            qweight = torch.cat([pack(unpacked(part, k, bits, dense) + add, held) for part in rows])
        scales = _rows(m.need(_SCALE, *SCALE_DTYPES), n)
        zeros = None
        if m.has(".weight_zero_point"):
            stored = m.need(".weight_zero_point", torch.int32, torch.int8)
            if stored.dtype == torch.int8:
                zeros = (_rows(stored, n).to(torch.int16) + (1 << (held - 1))).to(torch.uint8)
            else:
                zeros = (unpacked(stored.t().contiguous(), n, bits, dense) + add).t().contiguous()
            if zeros.shape != scales.shape:
                raise m.refuse(f"weight_zero_point holds {list(zeros.shape)}, expected {list(scales.shape)}")
        count = scales.shape[1]
        g_idx = None
        if m.has(".weight_g_idx"):
            g_idx = sorted_groups(m.need(".weight_g_idx", shape=(k,)), group, count)
            if g_idx is not None:
                qweight = in_order(qweight, held, column_order(g_idx))
        return _integers(qweight, scales, zeros, (n, k), group, held, note, g_idx)

    def _whole_bytes(self, m: Matrix) -> Described:
        n, k = m.shape(".weight", 2)
        dtype = self.tensors[m.name + ".weight"].dtype
        if dtype == torch.float8_e4m3fn:
            if self.tensors[m.name + _SCALE].dtype == torch.uint8:
                return Described("mxfp8-quantized", (n, k), lambda: self._mxfp8(m, n, k))
            blocks = self._args(m).get("block_structure")
            return Described("float-quantized", (n, k), lambda: fp8(m, _SCALE, n, k, blocks))
        if dtype != torch.int8:
            raise m.refuse(f"weight has dtype {dtype} beside weight_scale, expected int8 or float8_e4m3fn")

        def read() -> Loaded:
            scales = _rows(m.need(_SCALE, *SCALE_DTYPES), n)
            said = self._args(m).get("group_size")
            group = groups_of(k, scales.shape[1], said if type(said) is int else -1)
            zeros = None
            if m.has(".weight_zero_point"):
                zeros = (
                    _rows(m.need(".weight_zero_point", torch.int8), n).contiguous().view(torch.uint8) ^ 0x80
                )
                zeros = None if bool((zeros == 128).all()) else zeros
            qweight = m.need(".weight").view(torch.uint8) ^ 0x80
            return _integers(qweight, scales, zeros, (n, k), group, 8, "", None)

        return Described("int-quantized", (n, k), read)

    def _nvfp4(self, m: Matrix, n: int, k: int) -> Loaded:
        # a divisor here
        divisor = m.need(".weight_global_scale", torch.float32).reshape(-1)[:1].clone()
        return nvfp4(m, _PACKED, _SCALE, n, k, 1 / divisor, divisor)

    def _mxfp4(self, m: Matrix, n: int, k: int) -> Loaded:
        scales = m.need(_SCALE, torch.uint8, shape=(n, k // 32)).clone()
        codes = m.need(_PACKED).clone()
        return Loaded(LowBitWeight(codes, scales, get_format("mxfp4"), (n, k), dtype=torch.bfloat16))

    def _mxfp8(self, m: Matrix, n: int, k: int) -> Loaded:
        scales = m.need(_SCALE, torch.uint8, shape=(n, k // 32)).clone()
        codes = m.need(".weight").view(torch.uint8).clone()
        return Loaded(LowBitWeight(codes, scales, get_format("mxfp8"), (n, k), dtype=torch.bfloat16))


def _rows(t: torch.Tensor, n: int) -> torch.Tensor:
    """A number a tensor, a channel or a group, as [n, groups]."""
    t = t.reshape(1, 1) if t.numel() == 1 else t
    return (t.expand(n, t.shape[1]) if t.shape[0] == 1 else t).contiguous()


def _integers(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    shape: tuple[int, int],
    group: int,
    bits: int,
    note: str,
    g_idx: torch.Tensor | None,
) -> Loaded:
    group, (scales, zeros) = regrouped(shape[1], group, scales, zeros)
    format = get_format(f"int{bits}", symmetric=zeros is None, scale_dtype=scales.dtype)
    format = sized(format, shape[1], group)
    w = LowBitWeight(qweight, scales, format, shape, zeros=zeros, g_idx=g_idx, dtype=scales.dtype)
    return Loaded(w, note=note)

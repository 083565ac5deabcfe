"""gpt-oss: experts in MXFP4, all of a layer in one tensor."""

from __future__ import annotations

import torch

from ..weights.formats import get_format
from ..weights.weight import LowBitWeight
from .checkpoint import Loaded, Source
from .folder import Described, Folder, Matrix


class MXFP4(Folder):
    """`…_blocks` uint8 [experts, out_features, in_features/32, 16], a code pair a byte, the first in the low
    half, and `…_scales` uint8 [experts, out_features, in_features/32], powers of two: the canonical layout as
    it is. The rows of gate_up_proj take turns, gate first."""

    kind = "mxfp4"
    markers = ("_blocks",)
    parts = ("_blocks", "_scales")

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.method == "mxfp4"

    def matrix(self, m: Matrix) -> Described:
        *lead, n, groups, width = m.shape("_blocks", 4)
        if width != 16:
            raise m.refuse(f"blocks have {width} bytes, expected 16")
        shape = (*lead, n, groups * 32)

        def read() -> Loaded:
            codes = m.need("_blocks", torch.uint8).reshape(*lead, n, groups * 16).clone()
            scales = m.need("_scales", torch.uint8, shape=(*lead, n, groups)).clone()
            return Loaded(LowBitWeight(codes, scales, get_format("mxfp4"), shape, dtype=torch.bfloat16))

        return Described("mxfp4", shape, read)

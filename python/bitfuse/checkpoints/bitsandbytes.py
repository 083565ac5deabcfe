"""bitsandbytes (Dettmers et al., 2022 and 2023) as transformers saves it: NF4, FP4, nested or not, int8.

A 4-bit matrix is flattened, the first code of a byte in its high half; its scales run over the flattened
matrix in blocks, which may cross from row to row.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import torch

from ..core.limits import NESTED_BLOCK
from ..weights.bitsandbytes import format_of
from ..weights.formats import Format, nested_code
from ..weights.weight import CHUNK, LowBitWeight
from .checkpoint import Loaded, Source
from .folder import Described, Folder, Matrix

_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")


class BitsAndBytes(Folder):
    """Linear4bit and Linear8bitLt. The 8-bit layer of bitsandbytes rounds its input to 8 bits too, which a
    `bitfuse.nn.Linear` does not."""

    kind = "bitsandbytes"
    markers = (*_STATES, ".SCB")
    parts = (
        ".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
        ".SCB", ".weight_format", *_STATES,
    )  # fmt: skip

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.method in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")

    def matrix(self, m: Matrix) -> Described:
        if m.has(".SCB"):
            n, k = m.shape(".weight", 2)
            return Described("bitsandbytes int8", (n, k), lambda: self._int8(m, n, k))
        state = self._state(m)
        shape, block = state.get("shape"), state.get("blocksize")
        sizes = shape if isinstance(shape, list) and len(shape) == 2 else [0, 0]
        n, k = (i if type(i) is int and 0 < i < 1 << 32 else 0 for i in sizes)
        if not n or not k or k % 8:
            raise m.refuse(f"its quant_state has shape {shape!r}, expected [rows, a multiple of 8]")
        if type(block) is not int or block < 8 or block & (block - 1):
            raise m.refuse(f"its quant_state has blocksize {block!r}, expected a power of two")
        kind = str(state.get("quant_type"))
        stored = f"bitsandbytes {kind} g{block}" + ", nested" * m.has(".weight.nested_absmax")
        return Described(stored, (n, k), lambda: self._four_bits(m, n, k, block, kind, state))

    def _state(self, m: Matrix) -> dict[str, Any]:
        name = next(s for s in _STATES if m.has(s))
        raw = m.need(name, torch.uint8)
        try:
            found = json.loads(bytes(raw[:65536].tolist()))
        except (ValueError, RecursionError) as why:
            raise m.refuse(f"its quant_state is not JSON: {why}") from None
        if not isinstance(found, dict):
            raise m.refuse(f"its quant_state is a {type(found).__name__}, expected a JSON object")
        return found

    def _four_bits(self, m: Matrix, n: int, k: int, block: int, kind: str, state: dict[str, Any]) -> Loaded:
        raw = m.need(".weight").reshape(-1).view(torch.uint8)
        blocks = -(-n * k // block)
        if raw.numel() != n * k // 2:
            raise m.refuse(f"its weight has {raw.numel()} bytes, expected {n * k // 2} for {[n, k]}")
        found = format_of(kind, tuple(m.need(".weight.quant_map", torch.float32).flatten().tolist()))
        if isinstance(found, str):
            raise m.refuse(found)
        qweight = torch.empty_like(raw)
        for at in range(0, raw.numel(), CHUNK):
            part = raw[at : at + CHUNK]
            qweight[at : at + CHUNK] = (part << 4) | (part >> 4)
        dtype = getattr(torch, str(state.get("dtype")), None)
        parts: dict[str, Any] = {
            "dtype": dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
        }
        note = ""
        if not m.has(".weight.nested_absmax"):
            scales = m.need(".weight.absmax", torch.float32, shape=(blocks,)).clone()
            nested = False
        else:
            scales, nested, more = self._nested(m, blocks, k % block == 0, state)
            parts |= more
        group = block
        if k % block:  # blocks cross rows, or are cut off at the end: smaller ones do not
            group = math.gcd(k, block)
            if group < 8:
                raise m.refuse(f"blocks of {block} do not divide rows of {k}")
            scales = scales.repeat_interleave(block // group)[: n * k // group]
            note = f"scales of blocks of {block} repeated for groups of {group}"
        format = replace(found, group_size=group, nested=nested)
        w = LowBitWeight(qweight.view(n, k // 2), scales.reshape(n, k // group), format, (n, k), **parts)
        return Loaded(w, note=note)

    def _nested(
        self, m: Matrix, blocks: int, aligned: bool, state: dict[str, Any]
    ) -> tuple[torch.Tensor, bool, dict[str, Any]]:
        """Scales, whether they are still in 8 bits, and what these need."""
        codes = m.need(".weight.absmax", torch.uint8, shape=(blocks,))
        inner, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(inner) is not int or inner < 1 or not isinstance(offset, (int, float)):
            raise m.refuse(f"its quant_state has nested_blocksize {inner!r} and nested_offset {offset!r}")
        second = m.need(".weight.nested_absmax", torch.float32, shape=(-(-blocks // inner),))
        table = m.need(".weight.nested_quant_map", torch.float32, shape=(256,))
        shift = torch.tensor([float(offset)], dtype=torch.float32, device="cpu")
        if aligned and inner == NESTED_BLOCK and torch.equal(table, nested_code()):
            return codes.clone(), True, {"scale_scales": second.clone(), "scale_offset": shift}
        return table[codes.int()] * second.repeat_interleave(inner)[:blocks] + shift, False, {}

    def _int8(self, m: Matrix, n: int, k: int) -> Loaded:
        if m.has(".weight_format") and int(m.need(".weight_format").sum()):
            raise m.refuse("weight_format is of a GPU's own order, expected 0 (row)")
        codes = m.need(".weight", torch.int8, shape=(n, k)).view(torch.uint8) ^ 0x80
        scales = (m.need(".SCB", torch.float32, shape=(n,)) / 127).view(n, 1)
        w = LowBitWeight(codes, scales, Format("int8", 8), (n, k), dtype=torch.float16)
        return Loaded(w, "SCB/127 is rounded once, to float32")

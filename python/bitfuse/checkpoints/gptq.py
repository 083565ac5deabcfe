"""GPTQ (Frantar et al., 2023) as AutoGPTQ and GPTQModel save it.

A matrix is stored transposed: a column of `qweight`, int32 [in_features*bits/32, out_features], has the bits
of a row of codes, low bits first, which is the canonical layout; `qzeros` [groups, out_features*bits/32],
`scales` [groups, out_features], `g_idx` [in_features].
"""

from __future__ import annotations

import torch

from ..weights.formats import SCALE_DTYPES, get_format
from ..weights.weight import LowBitWeight, column_order
from .checkpoint import Loaded, Source
from .folder import (
    Described,
    Folder,
    Matrix,
    as_bytes,
    codes_of,
    groups_of,
    in_order,
    regrouped,
    sized,
    sorted_groups,
)

_WORDS = (torch.int32, torch.int64, torch.int16, torch.int8)


class GPTQ(Folder):
    """Codes of 2, 3, 4 and 8 bits, with or without act-order (`desc_act`).

    Version 1 of the format stores zero points less 1, version 2 as they are. Where all of them are the middle
    of the codes, of either version, the values say which it is, and not the config, which lies in the wild.
    """

    kind = "gptq"
    markers = (".qweight",)
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.method == "gptq"

    def matrix(self, m: Matrix) -> Described:
        words, n = m.shape(".qweight", 2)
        size = self.tensors[m.name + ".qweight"].dtype.itemsize * 8
        bits = self.number("bits", 4)
        # some layers of a model may have other bits than the config says: g_idx has an item a column
        k = m.shape(".g_idx", 1)[0] if m.has(".g_idx") else words * size // bits
        bits = words * size // k
        if bits not in (2, 3, 4, 8) or k * bits != words * size or k % 8:
            raise m.refuse(
                f"qweight has {words * size} bits a row of {k} codes, expected 2, 3, 4 or 8 a code"
            )
        version = str(self.quantization.get("checkpoint_format") or self.quantization.get("format") or "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise m.refuse(f"checkpoint_format is {version!r}, expected 'gptq' or 'gptq_v2'")
        count = m.shape(".scales", 2)[0]
        group = groups_of(k, count, self.number("group_size", -1))
        stored = f"gptq {bits} bits g{group}"
        return Described(stored, (n, k), lambda: self._read(m, n, k, bits, group, count, version))

    def _read(self, m: Matrix, n: int, k: int, bits: int, group: int, count: int, version: str) -> Loaded:
        scales = m.need(".scales", *SCALE_DTYPES, shape=(count, n)).t().contiguous()
        stored = codes_of(m.need(".qzeros", *_WORDS), bits)
        if stored.shape[0] != count or stored.shape[1] < n:
            raise m.refuse(f"qzeros holds {list(stored.shape)} codes, expected {[count, n]}")
        zeros, note = _zeros(stored[:, :n], bits, version)
        qweight = as_bytes(m.need(".qweight", *_WORDS).t(), k, bits)
        g_idx = sorted_groups(m.need(".g_idx", shape=(k,)), group, count) if m.has(".g_idx") else None
        if g_idx is not None:
            qweight = in_order(qweight, bits, column_order(g_idx))
            if note == "" and zeros is None:
                note = "act-order"
        parts = [scales, None if zeros is None else zeros.t().contiguous()]
        group, (scales, turned) = regrouped(k, group, *parts)
        changes = {"scale_dtype": scales.dtype, "symmetric": turned is None}
        format = sized(get_format(f"int{bits}", **changes), k, group)
        w = LowBitWeight(qweight, scales, format, (n, k), zeros=turned, g_idx=g_idx, dtype=scales.dtype)
        return Loaded(w, note=note)


def _zeros(stored: torch.Tensor, bits: int, version: str) -> tuple[torch.Tensor | None, str]:
    """True zero points, None where all are the middle of the codes; and what is to be said of them."""
    middle = 1 << (bits - 1)
    if bool((stored == middle - 1).all()):
        lies = "" if version == "gptq" else "zero points are those of version 1, whatever the config says"
        return None, lies
    if bool((stored == middle).all()):
        lies = "" if version == "gptq_v2" else "zero points are those of version 2, whatever the config says"
        return None, lies
    if version == "gptq_v2":
        return stored.contiguous(), ""
    # AutoGPTQ adds 1 and then cuts to the bits
    wraps = bool((stored == 2**bits - 1).any())
    note = f"stored zero points of {2**bits - 1} stand for 0, as in AutoGPTQ" if wraps else ""
    return (stored + 1) & (2**bits - 1), note

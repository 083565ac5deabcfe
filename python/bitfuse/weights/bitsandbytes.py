"""The code tables of bitsandbytes' 4-bit types, as formats."""

from __future__ import annotations

import functools

from .formats import NF4, Format, register_format

# e2m1 but for the smallest, 1/192 of the largest
_FP4 = tuple(s * v / 192 for s in (1, -1) for v in (0.0, 1.0, 128.0, 192.0, 64.0, 96.0, 32.0, 48.0))


@functools.cache
def format_of(quant_type: str, code: tuple[float, ...]) -> Format | str:
    """The format of a code table, or why there is none. Zeros may have either sign."""
    if quant_type == "nf4" and code == NF4:
        return Format("nf4", 4, group_size=64, codebook=NF4)
    if (
        quant_type == "fp4"
        and len(code) == 16
        and all(abs(a - b) < 1e-6 for a, b in zip(code, _FP4, strict=True))
    ):
        return register_format(Format("bnb_fp4", 4, group_size=64, codebook=code))
    return f"quant_type is {quant_type!r} with a code table of its own"

"""What a few-bit code means.

Every format reads the same way: ``w[n, k] = (values[code[n, k]] - zero[n, g]) * scale[n, g]`` with g the
group of input column k, or with an offset a group ``values[code[n, k]] * scale[n, g] - offset[n, g]``.
`values` is a table of 2**bits numbers, so an integer, a codebook (NF4) and a minifloat (FP8) differ in that
table and in how a scale is chosen, and in nothing else.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ..core.tensors import table

# The 16 levels of NF4 (Dettmers et al., QLoRA, 2023), the quantiles of a normal distribution, as bitsandbytes
# has them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip

NAN = float("nan")
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# what the OCP MX and NVFP4 formats fix their scales to: powers of two, and e4m3 under a scale of the tensor
FIXED_SCALE_DTYPES = (torch.float8_e8m0fnu, torch.float8_e4m3fn)


def _minifloat(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """Values of a sign-exponent-mantissa code without infinities (OCP FP8 e4m3fn, FP4 e2m1)."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        fraction = mantissa / 2**mantissa_bits
        values.append(
            2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction)
        )
    if exponent_bits + mantissa_bits == 7:
        values[-1] = NAN
    return tuple(values) + tuple(-v for v in values)


E4M3 = _minifloat(4, 3)
E2M1 = _minifloat(2, 1)
TERNARY = (-1.0, 0.0, 1.0, NAN)  # the fourth code stands for nothing
E4M3_MAX, E2M1_MAX = 448.0, 6.0


@dataclass(frozen=True)
class Format:
    """How a code of `bits` bits becomes a weight, and how a weight becomes a code.

    Args:
        name: the public name, as in ``quantize(weight, "int4")``.
        bits: bits of a code, 1 to 8.
        group_size: input columns that share a scale; -1 is the whole row. A default: each weight carries its
            own.
        codebook: the value of each code; None for integers, whose value is the code itself.
        scale_dtype: dtype of `scales`; the default for a new weight.
        symmetric: integers only. True: the zero point is 2**(bits-1) and not stored. False: `zeros` holds one
            a group.
        nested: scales are themselves 8-bit codes with a second-level scale a block of 256 (double
            quantisation).
        tensor_scale: one float32 scale for the whole tensor, on top of the groups' (NVFP4).
        scale_rule: codebooks: "absmax" puts the group's largest magnitude on the largest value; "absmean" is
            its mean magnitude (BitNet b1.58).
        offset: integers only, with symmetric=False. True: `offsets` holds a float a group, in the place of an
            integer zero point (HQQ, GGUF's Q4_1 and K-quants).
        scale_rows: rows that share scales, zero points and offsets: 128 with a group_size of 128 are FP8's
            blocks (DeepSeek-V3). The last rows may be fewer.
    """

    name: str
    bits: int
    group_size: int = -1
    codebook: tuple[float, ...] | None = None
    scale_dtype: torch.dtype = torch.float32
    symmetric: bool = True
    nested: bool = False
    tensor_scale: bool = False
    scale_rule: str = "absmax"
    offset: bool = False
    scale_rows: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}, expected 1 to 8")
        if self.group_size != -1 and (self.group_size <= 0 or self.group_size % 8):
            raise ValueError(
                f"group_size is {self.group_size}, expected -1 (the whole row) or a positive multiple of 8"
            )
        if self.codebook is not None and len(self.codebook) != 2**self.bits:
            raise ValueError(f"codebook has {len(self.codebook)} values, expected 2**bits = {2**self.bits}")
        if self.codebook is not None and not self.symmetric:
            raise ValueError(
                f"symmetric is False, but {self.name} is a codebook: only integer formats have zero points"
            )
        if self.offset and (self.codebook is not None or self.symmetric):
            found = "a codebook" if self.codebook is not None else "symmetric"
            raise ValueError(
                f"offset is True, but {self.name} is {found}: expected an integer format, symmetric=False"
            )
        if not isinstance(self.scale_rows, int) or self.scale_rows < 1:
            raise ValueError(f"scale_rows is {self.scale_rows!r}, expected a positive number of rows")
        if self.scale_dtype not in (*SCALE_DTYPES, *FIXED_SCALE_DTYPES):
            raise ValueError(f"scale_dtype is {self.scale_dtype}, expected one of {SCALE_DTYPES}")
        if self.scale_rule not in ("absmax", "absmean"):
            raise ValueError(f"scale_rule is {self.scale_rule!r}, expected 'absmax' or 'absmean'")
        if self.tensor_scale and (self.nested or self.scale_dtype != torch.float8_e4m3fn):
            raise ValueError(
                "tensor_scale is True, which goes with scales in torch.float8_e4m3fn, not nested"
            )
        if self.nested and self.scale_dtype != torch.float32:
            raise ValueError(f"scale_dtype is {self.scale_dtype}, expected torch.float32 with nested scales")

        if self.codebook is not None:  # one NaN, so that equal tables compare equal
            table = tuple(NAN if v != v else v for v in self.codebook)
            if any(a is not b for a, b in zip(table, self.codebook, strict=True)):
                object.__setattr__(self, "codebook", table)

    def __reduce__(self) -> tuple[type[Format], tuple[object, ...]]:
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    @property
    def is_integer(self) -> bool:
        return self.codebook is None

    @property
    def zero_point(self) -> int:
        """The zero point of a symmetric integer format; 0 for a codebook and beside offsets."""
        return 2 ** (self.bits - 1) if self.is_integer and not self.offset else 0

    def fitted(self, in_features: int) -> Format:
        """The format with groups that divide in_features: where the name's own size does not, the largest
        power of two below it that does. A group_size that differs from the name's own stays as it is."""
        known = FORMATS.get(self.name)
        group = self.group_size
        if group == -1 or in_features <= 0 or in_features % group == 0:
            return self
        if known is None or known.group_size != group:
            return self
        power = min(in_features & -in_features, 1 << (group.bit_length() - 1))
        return replace(self, group_size=power) if power >= 8 else self

    @property
    def levels(self) -> tuple[float, ...]:
        """`values` as numbers."""
        return self.codebook or tuple(map(float, range(2**self.bits)))

    def values(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The 2**bits values of the codes, float32, before zero point and scale."""
        return _values(self.levels, str(device))

    def __str__(self) -> str:
        parts = [self.name, "per channel" if self.group_size == -1 else f"g{self.group_size}"]
        parts[1] += f" x {self.scale_rows} rows" * (self.scale_rows > 1)
        asymmetric = ["with offsets" if self.offset else "asymmetric"] * (not self.symmetric)
        return ", ".join(parts + asymmetric + ["double quantised"] * self.nested)


@table
def _values(table: tuple[float, ...], device: str) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.float32, device=device)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("int8", 8),
        Format("int4", 4, group_size=128, scale_dtype=torch.float16),
        Format("nf4", 4, group_size=64, codebook=NF4),
        Format("fp8", 8, codebook=E4M3),
        Format("int3", 3, group_size=128, scale_dtype=torch.float16),
        Format("int2", 2, group_size=64, scale_dtype=torch.float16),
        Format(
            "ternary", 2, group_size=128, codebook=TERNARY, scale_dtype=torch.float16, scale_rule="absmean"
        ),
        Format("fp4", 4, group_size=64, codebook=E2M1),
        Format("mxfp8", 8, group_size=32, codebook=E4M3, scale_dtype=torch.float8_e8m0fnu),
        Format("mxfp4", 4, group_size=32, codebook=E2M1, scale_dtype=torch.float8_e8m0fnu),
        Format("nvfp4", 4, 16, codebook=E2M1, scale_dtype=torch.float8_e4m3fn, tensor_scale=True),
    )
}


def get_format(format: str | Format, **changes: object) -> Format:
    """The `Format` of a name, with fields replaced (None leaves a field as it is).

    Raises:
        ValueError: no such name, a field that does not fit the format, or a scale_dtype that no op reads.
    """
    if isinstance(format, str):
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}, expected one of {', '.join(map(repr, FORMATS))}")
        format = FORMATS[format]
    elif not isinstance(format, Format):
        raise TypeError(f"format is a {type(format).__name__}, expected a name or a bitfuse.Format")
    changed = {k: v for k, v in changes.items() if v is not None}
    if changed.get("offset") and format.is_integer:
        changed.setdefault("symmetric", False)
    check_scale_dtype(format, changed.get("scale_dtype", format.scale_dtype))
    return replace(format, **changed) if changed else format  # type: ignore[arg-type]


def check_scale_dtype(format: Format, scale_dtype: object) -> None:
    """Raise ValueError for scales that no op reads: the MX and NVFP4 formats have one dtype of scales, the
    others one of SCALE_DTYPES."""
    known = FORMATS.get(format.name)
    if known is None or scale_dtype == known.scale_dtype:
        return
    expected = (known.scale_dtype,) if known.scale_dtype in FIXED_SCALE_DTYPES else SCALE_DTYPES
    if scale_dtype not in expected:
        raise ValueError(
            f"scale_dtype is {scale_dtype}, expected {' or '.join(map(str, expected))} "
            f"for format {format.name!r}"
        )


def register_format(format: Format) -> Format:
    """Make a format of one's own known by its name.

    The reference serves it at once; integers or a codebook of 2 to 4 bits also C++; a codebook of 4 bits,
    or a format that differs from a known one in its groups or its scales alone, also CUDA: ask
    `bitfuse.explain`.

    Raises:
        ValueError: the name stands for other codes already; a codebook holds a NaN or an infinity.
    """
    if format.codebook is not None and format.name not in FORMATS:
        wrong = [at for at, value in enumerate(format.codebook) if not math.isfinite(value)]
        if wrong:
            value = format.codebook[wrong[0]]
            raise ValueError(f"codebook[{wrong[0]}] of {format.name!r} is {value}, expected finite numbers")
    if format.name in FORMATS and not same_codes(format, FORMATS[format.name]):
        raise ValueError(
            f"format {format.name!r} is registered already, with other codes: choose another name"
        )
    return FORMATS.setdefault(format.name, format)


def same_codes(a: Format, b: Format) -> bool:
    """Whether the codes of two formats stand for the same values, whatever their groups and scales."""
    return (a.bits, a.codebook, a.tensor_scale) == (b.bits, b.codebook, b.tensor_scale)


@functools.cache
def _dynamic_map() -> tuple[float, ...]:
    """The signed 8-bit dynamic map (Dettmers, 8-bit Approximations, 2015): 7 decades, finer near each
    decade's top.

    Its bits are those of bitsandbytes on any machine with fused multiply-add, where `torch.linspace` rounds
    once an element, from the nearer end. In NumPy, because torch's would depend on the machine.
    """
    first, last = np.float32(0.1), np.float32(1)
    positive: list[float] = []
    for decade in range(7):
        count = 2**decade
        step, i = np.float64((last - first) / np.float32(count)), np.arange(count + 1)
        edges = np.where(i < (count + 1) // 2, first + step * i, last - step * (count - i)).astype(np.float32)
        positive += (np.float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))).tolist()
    return tuple(sorted([0.0, 1.0, *positive, *(-v for v in positive)]))


def nested_code(device: torch.device | str = "cpu") -> torch.Tensor:
    """The 256 values that a nested scale's code stands for, float32, ascending, times its block's scale."""
    return _values(_dynamic_map(), str(device))

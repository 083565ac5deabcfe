"""A few-bit matrix: what it holds, and how it is read back."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch

from ..core.limits import NESTED_BLOCK
from ..core.tensors import check_finite, check_tensor
from .checks import check_g_idx, check_perm, check_shape
from .cuts import cut_multiple, shard
from .formats import (
    FIXED_SCALE_DTYPES,
    FORMATS,
    SCALE_DTYPES,
    Format,
    check_scale_dtype,
    get_format,
    same_codes,
)
from .packing import packed_width, unpack
from .scales import as_bytes, as_floats, resolve_scales, spread_rows
from .stand_in import StandIn

# weights that are quantised or read back at once: bounds the float32 temporaries to some 64 MiB
CHUNK = 1 << 22


class WeightTensors(NamedTuple):
    """A few-bit weight as kernels take it: its tensors as `LowBitWeight` names them, columns sorted by
    group, and what says how to read them. What version 0.1 did not have comes last."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    scale_scales: torch.Tensor | None
    scale_offset: torch.Tensor | None
    format: str
    group_size: int
    offsets: torch.Tensor | None = None
    scale_rows: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.qweight.shape[-2], self.qweight.shape[-1] * 8 // FORMATS[self.format].bits

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors, as `weight_tensors` takes them, TENSORS of them."""
        return (*self[:5], self.offsets)

    def how(self) -> tuple[str, int, int]:
        """What says how to read them: format, group_size, scale_rows."""
        return self.format, self.group_size, self.scale_rows

    def matrix(self, place: tuple[int, ...]) -> WeightTensors:
        """Of a weight with leading dimensions, the matrix at a place in them."""
        return weight_tensors([None if t is None else t[place] for t in self.tensors()], *self.how())

    def beyond(self) -> str | None:
        """Why a backend refuses that knows zero points, and a scale for each row, alone; None if those will
        do."""
        if self.offsets is None and self.scale_rows == 1:
            return None
        what = "float offsets" if self.offsets is not None else f"scales that {self.scale_rows} rows share"
        return f"it has no kernel for {what}"

    def dequantize(self) -> torch.Tensor:
        """Float32 [out_features, in_features] in qweight's column order."""
        format = get_format(self.format)
        scales = resolve_scales(self.scales, self.scale_scales, self.scale_offset, format.scale_dtype)
        return dequantize_rows(self.qweight, scales, self.zeros, format, self.offsets, self.scale_rows)


TENSORS = 6  # of a weight


def weight_tensors(
    tensors: Iterable[Any], format: str, group_size: int, scale_rows: int = 1
) -> WeightTensors:
    """A weight from `WeightTensors.tensors()` and `how()`."""
    qweight, scales, zeros, scale_scales, scale_offset, offsets = tensors
    return WeightTensors(
        qweight, scales, zeros, scale_scales, scale_offset, format, group_size, offsets, scale_rows
    )


@dataclass(frozen=True, eq=False)
class LowBitWeight(StandIn):
    """A matrix [out_features, in_features] in few bits, or several of one shape and format, [...,
    out_features, in_features]: those of experts.

    ``w[n, k] = (values[code[n, k]] - zeros[n, g]) * scales[n, g]``, or ``values[code[n, k]] * scales[n, g] -
    offsets[n, g]``, with g = k // group_size. Where the format has scale_rows, n // scale_rows stands for n
    in what is of a group.

    Of several, ``w[i]`` is one as a `LowBitWeight`, which shares its memory; so are slices of the leading
    dimensions. `shard` cuts a matrix at the multiples that `cut_multiple` says.

    It stands where a tensor is expected: it has the methods of `torch.Tensor`, torch's functions take it (as
    a float copy of its `dtype` that lives for the call; `torch.nn.functional.linear` reads the codes). It is
    frozen: it requires no gradient, and what would write into it raises TypeError.

    Attributes:
        qweight: codes, uint8 [..., out_features, in_features*bits/8], row-major, low bits first.
        scales: float32, float16 or bfloat16 [..., out_features, groups]; uint8 codes of the same shape when
            nested; the MX and NVFP4 formats fix the dtype to float8_e8m0fnu and float8_e4m3fn, or hold the
            same bytes as uint8. Where the format has scale_rows: [..., ceil(out_features / scale_rows),
            groups], here and below.
        format: the `Format`, its group_size and options those of this weight.
        shape: (..., out_features, in_features).
        zeros: zero points, uint8 [..., out_features, groups]; None when the format is symmetric or has
            offsets.
        g_idx: group of each input column in the original order, int32 [..., in_features]; None when columns
            are in order. With it `qweight` holds the columns sorted by group (a stable sort), so that a group
            is contiguous.
        scale_scales: nested: scale of each 256 scales of a matrix, float32 [..., ceil(out_features*groups /
            256)]; with a tensor scale: that scale of each matrix, float32 [..., 1].
        scale_offset: nested only: mean of the scales of a matrix, float32 [..., 1].
        offsets: of scale_dtype [..., out_features, groups]; None when the format has none.
        dtype: what it is read as where a tensor is expected: that of the matrix it was made from, or what its
            layer was cast to.

    Raises:
        TypeError, ValueError: a tensor that does not fit the format and the shape, or that is on another
            device; a perm that is not what g_idx says.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    format: Format
    shape: tuple[int, ...]
    zeros: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None
    scale_scales: torch.Tensor | None = None
    scale_offset: torch.Tensor | None = None
    # columns sorted by group: x[..., perm] meets qweight's columns; derived from g_idx
    perm: torch.Tensor | None = field(default=None, repr=False)
    dtype: torch.dtype = torch.float32
    offsets: torch.Tensor | None = None
    # the weight as the ops take it
    op_args: WeightTensors = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # the ops know a format by its name
        known = FORMATS.get(self.format.name)
        if known is None or not same_codes(known, self.format):
            raise ValueError(f"format {self.format.name!r} is not registered: see bitfuse.register_format")
        check_scale_dtype(self.format, self.format.scale_dtype)
        for name, dtypes, shape in self.expected(self.format, self.shape):
            check_tensor(name, getattr(self, name), dtypes, shape, self.qweight.device, "qweight", False)
        columns = (*self.shape[:-2], self.shape[-1])
        if self.perm is not None:
            check_perm(self.perm, self.g_idx, columns)
        if self.g_idx is not None:
            check_tensor("g_idx", self.g_idx, (torch.int32,), columns, self.device, "qweight", False)
            if self.perm is None:
                object.__setattr__(self, "perm", column_order(self.g_idx))
        tensors = (self.qweight, self.scales, self.zeros, self.scale_scales, self.scale_offset, self.offsets)
        how = (self.format.name, self.group_size, self.format.scale_rows)
        object.__setattr__(self, "op_args", weight_tensors(tensors, *how))

    @staticmethod
    def expected(
        format: Format, shape: tuple[int, ...]
    ) -> Iterator[tuple[str, tuple[torch.dtype, ...], tuple[int, ...]]]:
        """Name, dtypes and shape of each tensor that a weight of this format and shape holds (g_idx
        apart)."""
        n, k = check_shape(shape, format)
        lead = tuple(shape[:-2])
        groups = 1 if format.group_size == -1 else k // format.group_size
        of_groups = (*lead, -(-n // format.scale_rows), groups)
        yield "qweight", (torch.uint8,), (*lead, n, packed_width(k, format.bits))
        fixed = format.scale_dtype in FIXED_SCALE_DTYPES
        dtypes = (format.scale_dtype, torch.uint8) if fixed else SCALE_DTYPES
        yield "scales", (torch.uint8,) if format.nested else dtypes, of_groups
        if format.offset:
            yield "offsets", SCALE_DTYPES, of_groups
        elif not format.symmetric:
            yield "zeros", (torch.uint8,), of_groups
        if format.nested:
            yield "scale_scales", (torch.float32,), (*lead, -(-of_groups[-2] * of_groups[-1] // NESTED_BLOCK))
            yield "scale_offset", (torch.float32,), (*lead, 1)
        if format.tensor_scale:
            yield "scale_scales", (torch.float32,), (*lead, 1)

    @property
    def group_size(self) -> int:
        """Input columns that share a scale; in_features when a scale covers the row."""
        return self.shape[-1] if self.format.group_size == -1 else self.format.group_size

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint keeps, by name."""
        derived = ("format", "shape", "perm", "dtype", "op_args")
        names = [f.name for f in fields(self) if f.name not in derived]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points or offsets, and the group index."""
        return sum(t.nbytes for t in self.tensors().values())

    def ordered(self, g_idx: torch.Tensor, perm: torch.Tensor) -> LowBitWeight:
        """This weight, just made, with the order of its columns; perm is known to be what g_idx says."""
        object.__setattr__(self, "g_idx", g_idx)
        object.__setattr__(self, "perm", perm)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.Tensor.to`: the weight on another device, itself when it is there already; with a dtype
        (or another tensor) the matrix as floats."""
        kwargs = {k: v for k, v in kwargs.items() if k != "copy"}
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        moved = self
        if device is not None and device != self.device:
            parts: dict[str, Any] = {k: t.to(device) for k, t in self.tensors().items()}
            moved = replace(self, perm=None, **parts)
        return moved if dtype is None else moved.dequantize(dtype)

    def cpu(self) -> LowBitWeight:
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> LowBitWeight:
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def __repr__(self) -> str:
        sizes = " x ".join(map(str, self.shape))
        return f"LowBitWeight({sizes}, {self.format}, {self.device}, {self.nbytes / 1e6:.3g} MB)"

    def __reduce__(self) -> tuple[Any, ...]:
        # torch has no pickle of eight-bit floats: their bytes, then
        parts: dict[str, Any] = {name: as_bytes(t) for name, t in self.tensors().items()}
        parts |= {"format": self.format, "shape": tuple(self.shape), "dtype": self.dtype}
        return _remade, (parts, self.scales.dtype)

    def mul_(self, factor: float) -> LowBitWeight:
        """Multiply by a power of two, in place, which is exact: the scales take it. (RWKV rescales so.)

        Raises:
            TypeError: another factor, or scales that can't hold the product.
        """
        return self._scaled_(factor, f"mul_({factor!r})")

    def div_(self, divisor: float) -> LowBitWeight:
        """Divide by a power of two, in place; see `mul_`."""
        number = isinstance(divisor, (int, float)) and divisor != 0
        return self._scaled_(1 / divisor if number else divisor, f"div_({divisor!r})")

    @torch.no_grad()
    def _scaled_(self, factor: object, said: str) -> LowBitWeight:
        exact = isinstance(factor, (int, float)) and math.isfinite(factor) and math.frexp(factor)[0] == 0.5
        parts = (self.scales,) if self.scale_scales is None else (self.scale_scales, self.scale_offset)
        parts = (*parts, self.offsets)
        made = []
        for t in parts if exact else ():
            assert isinstance(factor, (int, float))
            if t is not None and t.dtype not in SCALE_DTYPES:  # powers of two: the exponent is the byte
                moved = t.view(torch.uint8).to(torch.int32) + (math.frexp(factor)[1] - 1)
                exact &= bool(((moved >= 0) & (moved < 255)).all())
                made.append((t.view(torch.uint8), moved))
            elif t is not None:
                product = t * factor
                exact &= bool((product / factor == t).all())
                made.append((t, product))
        if not exact:
            raise TypeError(
                f"{said} would write into {self!r}, which is frozen: only a factor that is a power of two, "
                "and that its scales can hold, is taken"
            )
        for t, product in made:
            t.copy_(product)
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [..., out_features, in_features] as floats: products in float32, then rounded to
        `dtype`."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        for each, part in self.matrices():
            for rows, w in part.float_rows():
                out[each][rows] = w
        return out

    def relative_error(self, weight: torch.Tensor) -> float:
        """||dequantised - weight|| / ||weight||, Frobenius norms; weight is of this shape, any float."""
        error = norm = 0.0
        for each, part in self.matrices():
            for rows, w in part.float_rows():
                exact = weight[each][rows].double()
                error += float((w - exact).square().sum())
                norm += float(exact.square().sum())
        return (error / norm) ** 0.5 if norm else float(error > 0)

    def matrices(self) -> Iterator[tuple[tuple[int, ...], LowBitWeight]]:
        """Each matrix [out_features, in_features], with its place in the leading dimensions; itself, at (),
        where there are none."""
        if len(self.shape) == 2:
            yield (), self
            return
        for each in itertools.product(*map(range, self.shape[:-2])):
            yield each, self[each]

    def __getitem__(self, at: Any) -> Any:
        """Of the leading dimensions alone, by integers and slices: a `LowBitWeight` that shares the memory.
        Else as of a tensor: the numbers, of its dtype."""
        index = at if isinstance(at, tuple) else (at,)
        if not (0 < len(index) <= len(self.shape) - 2 and all(map(_is_plain_index, index))):
            return super().__getitem__(at)  # type: ignore[misc]
        index = tuple(i if isinstance(i, slice) else operator.index(i) for i in index)
        parts: dict[str, Any] = {name: t[index] for name, t in self.tensors().items()}
        shape = (*parts["qweight"].shape[:-1], self.shape[-1])
        perm = None if self.perm is None else self.perm[index]
        w = replace(self, shape=shape, perm=None, **parts | {"g_idx": None})
        return w if perm is None else w.ordered(parts["g_idx"], perm)

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if len(self.shape) == 2 else (self[i] for i in range(self.shape[0]))

    def cut_multiple(self, dim: int) -> int:
        """At which multiples `shard` cuts a dimension, which may always end where the matrix does: rows at
        blocks that share a scale, columns at whole groups. The dimension's size where it can't be cut.

        Raises:
            IndexError: no such dimension.
        """
        return cut_multiple(self, dim)

    def shard(self, dim: int, start: int, length: int) -> LowBitWeight:
        """The weight whose numbers are ``dequantize().narrow(dim, start, length)``.

        Rows and leading dimensions share this weight's memory; a shard of columns is a copy, because kernels
        read rows that follow each other.

        Raises:
            IndexError: no such dimension.
            ValueError: a start or a length that is outside, or no multiple of `cut_multiple(dim)`.
        """
        return shard(self, dim, start, length)

    def float_rows(self, at_least: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of a matrix's rows with their float32 values in the original order of columns, a bounded
        number of weights at a time. A slice begins at a multiple of at_least."""
        scales, shared = self.float_scales(), self.format.scale_rows
        whole = math.lcm(at_least, shared)
        step = max(whole, CHUNK // self.shape[1] // whole * whole)
        for at in range(0, self.shape[0], step):
            rows, groups = slice(at, at + step), slice(at // shared, (at + step) // shared)
            zeros = None if self.zeros is None else self.zeros[groups]
            offsets = None if self.offsets is None else self.offsets[groups]
            w = dequantize_rows(self.qweight[rows], scales[groups], zeros, self.format, offsets, shared)
            yield rows, w if self.perm is None else torch.empty_like(w).index_copy_(1, self.perm, w)

    def float_scales(self) -> torch.Tensor:
        """The scales as float32 [..., out_features / scale_rows, groups], nested ones resolved."""
        return resolve_scales(self.scales, self.scale_scales, self.scale_offset, self.format.scale_dtype)

    def check_values(self) -> None:
        """Raise ValueError for a number that no quantiser writes: a scale that is not finite, a NaN code, a
        g_idx whose groups are not group_size columns each. Reads every tensor (and waits for the device)."""
        for name in ("scales", "offsets", "scale_scales", "scale_offset"):
            t = _own_shard(getattr(self, name))
            if t is not None and name == "scales" and self.scale_offset is None:
                t = as_floats(t, self.format.scale_dtype)
            if t is not None and t.is_floating_point():
                check_finite(name, t.float())
        zeros = _own_shard(self.zeros)
        if zeros is not None and zeros.numel() and int(zeros.max()) >= 2**self.format.bits:
            raise ValueError(
                f"zeros holds {int(zeros.max())}, expected codes below 2**bits = {2**self.format.bits}"
            )
        codes = _own_shard(self.qweight).flatten(0, -2)
        bad = [i for i, v in enumerate(self.format.levels) if v != v]
        if bad and any(bool((unpack(codes, self.format.bits) == c).any()) for c in bad):
            raise ValueError(
                f"qweight holds a code that is NaN in {self.format.name} ({', '.join(map(hex, bad))})"
            )
        if self.g_idx is not None:
            check_g_idx(whole(self.g_idx), self.group_size)


def _is_plain_index(i: object) -> bool:
    """Whether an index is a slice or one integer."""
    if isinstance(i, torch.Tensor):
        return i.dim() == 0 and not i.is_floating_point() and i.dtype != torch.bool
    return isinstance(i, slice) or (hasattr(i, "__index__") and not isinstance(i, bool))


def _own_shard(t: Any) -> Any:
    """What of a tensor this process holds: all of it, unless it is a DTensor."""
    return getattr(t, "_local_tensor", t)


def whole(t: torch.Tensor) -> torch.Tensor:
    """A tensor, of a DTensor all of it."""
    return t.full_tensor() if hasattr(t, "_local_tensor") else t  # type: ignore[attr-defined]


def column_order(g_idx: torch.Tensor) -> torch.Tensor:
    """`LowBitWeight.perm`; one that autograd may save, also where it is found in inference mode."""
    with torch.inference_mode(False):
        return torch.argsort(g_idx, stable=True)


def _remade(parts: dict[str, Any], scale_dtype: torch.dtype) -> LowBitWeight:
    if scale_dtype in FIXED_SCALE_DTYPES:
        parts = parts | {"scales": parts["scales"].view(scale_dtype)}
    return LowBitWeight(**parts)


def dequantize_rows(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: Format,
    offsets: torch.Tensor | None = None,
    scale_rows: int = 1,
) -> torch.Tensor:
    """Float32 [rows, columns] in qweight's column order, of codes, float32 scales and zero points or
    offsets, which scale_rows rows share."""
    values = format.values(qweight.device)[unpack(qweight, format.bits).int()]
    n = values.shape[0]
    scales = spread_rows(scales, scale_rows, n)
    grouped = values.view(*scales.shape, values.shape[1] // scales.shape[1])
    if offsets is not None:
        offset = spread_rows(offsets, scale_rows, n).float()
        return (grouped * scales.unsqueeze(-1) - offset.unsqueeze(-1)).view(values.shape)
    zero = format.zero_point if zeros is None else spread_rows(zeros, scale_rows, n).float().unsqueeze(-1)
    return ((grouped - zero) * scales.unsqueeze(-1)).view(values.shape)

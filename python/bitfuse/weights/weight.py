"""A few-bit matrix: how it is made from a float one, what it holds, and how it is read back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch

from ..core.tensors import check_read
from .formats import (
    E2M1_MAX,
    E4M3,
    E4M3_MAX,
    FIXED_SCALE_DTYPES,
    FORMATS,
    NESTED_BLOCK,
    SCALE_DTYPES,
    Format,
    check_scale_dtype,
    get_format,
    nested_code,
    same_codes,
)
from .packing import pack, packed_width, unpack
from .stand_in import StandIn

# weights that are quantised or read back at once: bounds the float32 temporaries to some 64 MiB
CHUNK = 1 << 22


class WeightTensors(NamedTuple):
    """A few-bit weight as kernels take it: its tensors as `LowBitWeight` names them, columns sorted by
    group, and what says how to read them."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    scale_scales: torch.Tensor | None
    scale_offset: torch.Tensor | None
    format: str
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.qweight.shape[0], self.qweight.shape[1] * 8 // FORMATS[self.format].bits

    def dequantize(self) -> torch.Tensor:
        """Float32 [out_features, in_features] in qweight's column order."""
        format = get_format(self.format)
        scales = resolve_scales(self.scales, self.scale_scales, self.scale_offset, format.scale_dtype)
        return dequantize_rows(self.qweight, scales, self.zeros, format)


def weight_tensors(tensors: Iterable[Any], format: str, group_size: int) -> WeightTensors:
    """A weight from its five tensors, and what says how to read them."""
    qweight, scales, zeros, scale_scales, scale_offset = tensors
    return WeightTensors(qweight, scales, zeros, scale_scales, scale_offset, format, group_size)


@dataclass(frozen=True, eq=False)
class LowBitWeight(StandIn):
    """A matrix [out_features, in_features] in few bits.

    ``w[n, k] = (values[code[n, k]] - zeros[n, g]) * scales[n, g]`` with g = k // group_size.

    It stands where a tensor is expected: it has the methods of `torch.Tensor`, torch's functions take it (as
    a float copy of its `dtype` that lives for the call; `torch.nn.functional.linear` reads the codes). It is
    frozen: it requires no gradient, and what would write into it raises TypeError.

    Attributes:
        qweight: codes, uint8 [out_features, in_features*bits/8], row-major, low bits first.
        scales: float32, float16 or bfloat16 [out_features, groups]; uint8 codes of the same shape when
            nested; the MX and NVFP4 formats fix the dtype to float8_e8m0fnu and float8_e4m3fn, or hold the
            same bytes as uint8.
        format: the `Format`, its group_size and options those of this weight.
        shape: (out_features, in_features).
        zeros: zero points, uint8 [out_features, groups]; None when the format is symmetric.
        g_idx: group of each input column in the original order, int32 [in_features]; None when columns are in
            order. With it `qweight` holds the columns sorted by group (a stable sort), so that a group is
            contiguous.
        scale_scales: nested: scale of each 256 scales, float32 [ceil(out_features*groups / 256)]; with a
            tensor scale: that scale, float32 [1].
        scale_offset: nested only: mean of the scales, float32 [1].
        dtype: what it is read as where a tensor is expected: that of the matrix it was made from, or what its
            layer was cast to.

    Raises:
        TypeError, ValueError: a tensor that does not fit the format and the shape, or that is on another
            device; a perm that is not what g_idx says.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    format: Format
    shape: tuple[int, int]
    zeros: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None
    scale_scales: torch.Tensor | None = None
    scale_offset: torch.Tensor | None = None
    # columns sorted by group: x[..., perm] meets qweight's columns; derived from g_idx
    perm: torch.Tensor | None = field(default=None, repr=False)
    dtype: torch.dtype = torch.float32
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
        if self.perm is not None:
            check_perm(self.perm, self.g_idx, self.shape[1])
        if self.g_idx is not None:
            check_tensor("g_idx", self.g_idx, (torch.int32,), (self.shape[1],), self.device, "qweight", False)
            if self.perm is None:
                object.__setattr__(self, "perm", column_order(self.g_idx))
        tensors = (self.qweight, self.scales, self.zeros, self.scale_scales, self.scale_offset)
        object.__setattr__(self, "op_args", WeightTensors(*tensors, self.format.name, self.group_size))

    @staticmethod
    def expected(
        format: Format, shape: tuple[int, int]
    ) -> Iterator[tuple[str, tuple[torch.dtype, ...], tuple[int, ...]]]:
        """Name, dtypes and shape of each tensor that a weight of this format and shape holds (g_idx
        apart)."""
        n, k = check_shape(shape, format)
        groups = k // (k if format.group_size == -1 else format.group_size)
        yield "qweight", (torch.uint8,), (n, packed_width(k, format.bits))
        fixed = format.scale_dtype in FIXED_SCALE_DTYPES
        dtypes = (format.scale_dtype, torch.uint8) if fixed else SCALE_DTYPES
        yield "scales", (torch.uint8,) if format.nested else dtypes, (n, groups)
        if not format.symmetric:
            yield "zeros", (torch.uint8,), (n, groups)
        if format.nested:
            yield "scale_scales", (torch.float32,), (-(-n * groups // NESTED_BLOCK),)
            yield "scale_offset", (torch.float32,), (1,)
        if format.tensor_scale:
            yield "scale_scales", (torch.float32,), (1,)

    @property
    def group_size(self) -> int:
        """Input columns that share a scale; in_features when a scale covers the row."""
        return self.shape[1] if self.format.group_size == -1 else self.format.group_size

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
        """Bytes of codes, scales, zero points and the group index."""
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
        n, k = self.shape
        return f"LowBitWeight({n} x {k}, {self.format}, {self.device}, {self.nbytes / 1e6:.3g} MB)"

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
        """The matrix [out_features, in_features] as floats: products in float32, then rounded to `dtype`."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        for rows, w in self._dequantized_rows():
            out[rows] = w
        return out

    def relative_error(self, weight: torch.Tensor) -> float:
        """||dequantised - weight|| / ||weight||, Frobenius norms; weight is [out_features, in_features], any
        float."""
        error = norm = 0.0
        for rows, w in self._dequantized_rows():
            exact = weight[rows].double()
            error += float((w - exact).square().sum())
            norm += float(exact.square().sum())
        return (error / norm) ** 0.5 if norm else float(error > 0)

    def _dequantized_rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of rows with their float32 values, a bounded number of weights at a time."""
        scales = self.float_scales()
        step = max(1, CHUNK // self.shape[1])
        for at in range(0, self.shape[0], step):
            rows = slice(at, at + step)
            zeros = None if self.zeros is None else self.zeros[rows]
            w = dequantize_rows(self.qweight[rows], scales[rows], zeros, self.format)
            yield rows, w if self.perm is None else torch.empty_like(w).index_copy_(1, self.perm, w)

    def float_scales(self) -> torch.Tensor:
        """The scales as float32 [out_features, groups], nested ones resolved."""
        return resolve_scales(self.scales, self.scale_scales, self.scale_offset, self.format.scale_dtype)

    def check_values(self) -> None:
        """Raise ValueError for a number that no quantiser writes: a scale that is not finite, a NaN code, a
        g_idx whose groups are not group_size columns each. Reads every tensor (and waits for the device)."""
        for name in ("scales", "scale_scales", "scale_offset"):
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
        bad = [i for i, v in enumerate(self.format.levels) if v != v]
        if bad and any(bool((unpack(_own_shard(self.qweight), self.format.bits) == c).any()) for c in bad):
            raise ValueError(
                f"qweight holds a code that is NaN in {self.format.name} ({', '.join(map(hex, bad))})"
            )
        if self.g_idx is not None:
            check_g_idx(whole(self.g_idx), self.group_size)


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


def check_shape(shape: tuple[int, int], format: Format) -> tuple[int, int]:
    n, k = shape
    if n < 0 or k <= 0 or k % 8:
        raise ValueError(
            f"shape is {(n, k)}, expected (out_features, in_features), in_features a multiple of 8"
        )
    if format.group_size != -1 and k % format.group_size:
        raise ValueError(
            f"group_size {format.group_size} does not divide in_features {k}: choose one that does, "
            "or -1 for the whole row"
        )
    return n, k


def check_frozen(name: str, t: torch.Tensor) -> None:
    """Raise ValueError for a tensor that asks for a gradient which the op does not give."""
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which the op does not give: pass {name}.detach()")


def check_tensor(
    name: str,
    t: object,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
    beside: str = "",
    read: bool = True,
) -> None:
    """Raise TypeError or ValueError for what is no tensor of one of the dtypes, of the shape and on the
    device, where `beside` names another argument that is; `Unread` unless it is not for native code yet."""
    if not isinstance(t, torch.Tensor):
        found = "missing" if t is None else f"a {type(t).__name__}"
        raise TypeError(f"{name} is {found}, expected a tensor {list(shape)}")
    if t.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {t.dtype}, expected {' or '.join(map(str, dtypes))}")
    if t.shape != shape:
        raise ValueError(f"{name} has shape {list(t.shape)}, expected {list(shape)}")
    if t.device != device:
        where = f", where {beside} is" if beside else ""
        raise ValueError(f"{name} is on {t.device}, expected {device}{where}")
    if read:
        check_read(name, t)


def check_finite(name: str, t: torch.Tensor) -> None:
    finite = torch.isfinite(t)
    if not bool(finite.all()):
        at = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{name}{at} is {t[tuple(at)].item()}, expected finite numbers")


def check_g_idx(g_idx: torch.Tensor, group_size: int) -> None:
    groups = g_idx.numel() // group_size
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(
            f"g_idx holds {int(g_idx.min())} to {int(g_idx.max())}, expected groups 0 to {groups - 1}"
        )
    counts = torch.bincount(g_idx, minlength=groups)
    if bool((counts != group_size).any()):
        at = int((counts != group_size).nonzero()[0])
        raise ValueError(
            f"g_idx puts {int(counts[at])} columns in group {at}, expected group_size = {group_size}"
        )


def check_perm(perm: object, g_idx: torch.Tensor | None, columns: int) -> None:
    """Raise ValueError for a perm that does not sort g_idx's columns."""
    if g_idx is None:
        raise ValueError("perm is given without g_idx, whose order it is")
    fits = isinstance(perm, torch.Tensor) and perm.dtype == torch.int64 and perm.shape == g_idx.shape
    if fits and not g_idx.is_meta:
        assert isinstance(perm, torch.Tensor)
        fits = perm.device == g_idx.device and torch.equal(perm, torch.argsort(g_idx, stable=True))
    if not fits:
        found = list(perm.shape) if isinstance(perm, torch.Tensor) else type(perm).__name__
        raise ValueError(f"perm is {found}, expected torch.argsort(g_idx, stable=True), int64 [{columns}]")


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    """Eight-bit floats as uint8, the same memory; other tensors as they are. torch's pickle, gloo and many
    an op take no eight-bit floats, so layers hold them so."""
    return t.view(torch.uint8) if t.dtype in FIXED_SCALE_DTYPES else t


def as_floats(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `as_bytes`, for scales of a format with this scale_dtype; not for nested ones."""
    if scales.dtype == torch.uint8 and dtype in FIXED_SCALE_DTYPES:
        return scales.view(dtype)
    return scales


def _remade(parts: dict[str, Any], scale_dtype: torch.dtype) -> LowBitWeight:
    if scale_dtype in FIXED_SCALE_DTYPES:
        parts = parts | {"scales": parts["scales"].view(scale_dtype)}
    return LowBitWeight(**parts)


def resolve_scales(
    scales: torch.Tensor,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """Scales as float32; nested ones are ``nested_code[scales] * scale_scales[block of 256] +
    scale_offset``."""
    if scale_offset is None:
        scales = as_floats(scales, scale_dtype).float()
        return scales if scale_scales is None else scales * scale_scales
    assert scale_scales is not None
    first = nested_code(scales.device)[scales.flatten().int()]
    return (first * scale_scales.repeat_interleave(NESTED_BLOCK)[: first.numel()] + scale_offset).view(
        scales.shape
    )


def dequantize_rows(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: Format
) -> torch.Tensor:
    """Float32 [rows, columns] in qweight's column order, of codes, float32 scales and zero points."""
    values = format.values(qweight.device)[unpack(qweight, format.bits).int()]
    grouped = values.view(*scales.shape, values.shape[1] // scales.shape[1])
    zero = format.zero_point if zeros is None else zeros.float().unsqueeze(-1)
    return ((grouped - zero) * scales.unsqueeze(-1)).view(values.shape)


def quantize(
    weight: torch.Tensor,
    format: str | Format = "int4",
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    nested: bool | None = None,
    scale_dtype: torch.dtype | None = None,
    g_idx: torch.Tensor | None = None,
) -> LowBitWeight:
    """Quantise a matrix to the nearest codes.

    Integers round to nearest. Symmetric ones put the group's extreme value on the lowest code, so that a
    scale may be negative (the rule of llama.cpp's Q4_0; 12% less error at 4 bits than largest magnitude / 7);
    asymmetric ones spread the codes over the group's range, widened to hold 0. NF4 codes are bit-exact with
    bitsandbytes (Dettmers et al., QLoRA, 2023); double quantisation is its scheme (offset, blocks of 256,
    dynamic map), each scale at its nearest code. FP8 scales each group's largest magnitude to 448.

    Args:
        weight: [out_features, in_features], float32, float16 or bfloat16, any strides, in_features a
            multiple of 8.
        format: a name ("int8", "int4", "int3", "int2", "ternary", "nf4", "fp4", "fp8", "mxfp4", "mxfp8",
            "nvfp4", or one of your own that `register_format` knows) or a `Format`.
        group_size: input columns that share a scale, a multiple of 8 that divides in_features; -1 is the
            whole row. By default the format's, or where that does not divide in_features the largest power of
            two below it that does.
        symmetric: integers: False stores a zero point a group.
        nested: double quantisation: the scales in 8 bits.
        scale_dtype: dtype of the scales.
        g_idx: group of each input column, int [in_features], group_size columns a group (GPTQ's act-order).

    Warns:
        UserWarning: groups that are so much smaller than the matrix's largest that their scales are rounded
            to nothing, or far off; where that is all of the matrix it is a ValueError.

    Raises:
        TypeError: a weight that is not a float tensor.
        ValueError: a NaN or Inf in it, a size or group size that does not fit, an unknown format, a
            scale_dtype that the format does not have, scales outside scale_dtype.
    """
    format = get_format(
        format, group_size=group_size, symmetric=symmetric, nested=nested, scale_dtype=scale_dtype
    )
    check_float_weight(weight)
    if group_size is None:
        format = format.fitted(weight.shape[1])
    weight = weight.detach()
    n, k = check_shape((weight.shape[0], weight.shape[1]), format)
    group = k if format.group_size == -1 else format.group_size
    perm = None
    if g_idx is not None:
        if not isinstance(g_idx, torch.Tensor) or g_idx.is_floating_point() or g_idx.shape != (k,):
            raise ValueError(
                f"g_idx is {getattr(g_idx, 'shape', g_idx)}, expected an int tensor of shape [{k}]"
            )
        g_idx = g_idx.to(weight.device, torch.int32)
        check_g_idx(g_idx, group)
        perm = torch.argsort(g_idx, stable=True)
    scales, zeros, tensor_scale, lost = find_scales(weight, format, perm)
    if lost:
        warnings.warn(f"weight: {lost}", stacklevel=2)
    qweight = torch.empty(n, packed_width(k, format.bits), dtype=torch.uint8, device=weight.device)
    for rows, w in _grouped(weight, group, perm):
        s = scales[rows].reshape(-1, 1).float() * tensor_scale
        z = torch.full_like(s, format.zero_point) if zeros is None else zeros[rows].reshape(-1, 1).float()
        qweight[rows] = pack(_codes(w, s, z, format).view(-1, k), format.bits)
    scale_scales = scale_offset = None
    if format.nested:
        scales, scale_scales, scale_offset = nest_scales(scales)
    elif format.tensor_scale:
        scale_scales = torch.full((1,), tensor_scale, dtype=torch.float32, device=weight.device)
    return LowBitWeight(
        qweight, scales, format, (n, k), zeros, g_idx, scale_scales, scale_offset, dtype=weight.dtype
    )


def check_float_weight(weight: object, or_meta: bool = False) -> None:
    """Raise TypeError or ValueError for what can't be quantised, whatever the format."""
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}, expected a tensor")
    if weight.dtype not in SCALE_DTYPES:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {' or '.join(map(str, SCALE_DTYPES))}")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [out_features, in_features]")
    if weight.is_meta and not or_meta:
        raise ValueError("weight is on the meta device: load the model before quantising it")


def _grouped(
    weight: torch.Tensor, group: int, perm: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of rows with their float32 groups [groups, group_size], a bounded number at a time."""
    step = max(1, CHUNK // weight.shape[1])
    for at in range(0, weight.shape[0], step):
        rows = slice(at, at + step)
        w = weight[rows].float().contiguous()
        yield rows, (w if perm is None else w[:, perm]).reshape(-1, group)


def find_scales(
    weight: torch.Tensor, format: Format, perm: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, float, str]:
    """What `quantize` rounds against, in one pass over a weight that fits the format.

    Returns:
        scales as they are stored (before nesting), [out_features, groups]; zero points of that shape, uint8,
        or None; the scale of the tensor; what of the weight is lost in its scales, "" when nothing is.

    Raises:
        ValueError: a NaN or Inf, scales that scale_dtype can't hold.
    """
    n, k = weight.shape
    group = k if format.group_size == -1 else format.group_size
    dtype, device = format.scale_dtype, weight.device
    tensor_scale = 1.0
    if format.tensor_scale and n:
        low, high = torch.aminmax(weight)
        absmax = max(-float(low), float(high))
        tensor_scale = absmax / (E2M1_MAX * E4M3_MAX) if math.isfinite(absmax) and absmax else 1.0
    scales = torch.empty(n, k // group, dtype=dtype, device=device)
    exact = torch.empty(n, k // group, dtype=torch.float32, device=device)
    zeros = None if format.symmetric else torch.empty_like(scales, dtype=torch.uint8)
    for rows, w in _grouped(weight, group, perm):
        check_finite(f"weight (rows from {rows.start})", weight[rows])
        found = _group_scales(w, format, tensor_scale)
        exact[rows] = found.view(-1, k // group)
        scales[rows] = exact[rows].to(dtype)
        if zeros is not None:
            # against the scale that is stored; a group of zeros has scale 0
            stored = scales[rows].float().view(-1, 1)
            zero = -w.amin(1, keepdim=True).clamp(max=0) / _divisor(stored)
            zeros[rows] = zero.round().clamp(0, 2**format.bits - 1).view(-1, k // group)
    return scales, zeros, tensor_scale, _lost_in(scales, exact, weight, format) if n else ""


def _lost_in(scales: torch.Tensor, exact: torch.Tensor, weight: torch.Tensor, format: Format) -> str:
    """What groups of a weight are lost because their scales, as they are stored, are far from the exact ones;
    ValueError when the largest are."""
    dtype = format.scale_dtype
    remedy = "" if dtype in (*FIXED_SCALE_DTYPES, torch.float32) else ": pass scale_dtype=torch.float32"
    stored, size = scales.float(), exact.abs()
    # rounding a scale may move its largest value by a quarter of a step
    error, allowed = (stored - exact).abs(), max(2.0 ** -(format.bits + 1), torch.finfo(dtype).eps)
    off = error > allowed * size
    if format.nested:
        off |= ((resolve_scales(*nest_scales(scales), dtype) - exact).abs() > 0.5 * size) & (size > 0)
    if bool((size < torch.finfo(torch.float32).tiny).any()):  # zeros, or numbers too small for any scale
        levels = (format.values() - format.zero_point).abs().nan_to_num(0)
        least = float(levels[levels > 0].min()) / 2
        for rows, w in _grouped(weight, weight.shape[1] // exact.shape[1], None):
            largest = w.abs().amax(1).view(-1, exact.shape[1])
            off[rows] |= (largest > 0) & (largest < least * size[rows]) | (largest > 0) & (size[rows] == 0)
    if not bool(torch.isfinite(stored).all()) or bool(off.flatten()[size.argmax()]):
        raise ValueError(
            f"scale_dtype {dtype} can't hold the scales of this weight (largest magnitude "
            f"{float(weight.abs().max()):.3g}){remedy}"
        )
    count = int(off.sum())
    if not count:
        return ""
    row = int(off.any(1).nonzero()[0])
    return (
        f"{count} of {off.numel()} groups, the first in row {row} (largest magnitude there "
        f"{float(weight[row].abs().max()):.3g}, of all {float(weight.abs().max()):.3g}), are too small for "
        f"their scales in {'8 bits' if format.nested else dtype}, and are lost or far off{remedy}"
    )


def _group_scales(w: torch.Tensor, format: Format, tensor_scale: float) -> torch.Tensor:
    """The scales, float32 [groups, 1], of float32 groups [groups, group_size]."""
    if not format.symmetric:
        top = 2**format.bits - 1
        low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / top
        return torch.where(torch.isfinite(scale), scale, high / top - low / top)
    if format.is_integer:
        # the extreme value, sign and all, becomes the lowest code: there is one more of them on that side
        return w.gather(1, w.abs().argmax(1, keepdim=True)) / -format.zero_point
    if format.scale_rule == "absmean":
        mean = w.abs().mean(1, keepdim=True)
        if bool(torch.isfinite(mean).all()):
            return mean
        return w.double().abs().mean(1, keepdim=True).float()  # the sum does not fit
    absmax = w.abs().amax(1, keepdim=True) / tensor_scale
    largest = format.values(w.device).nan_to_num(0).abs().max()
    if format.scale_dtype == torch.float8_e8m0fnu:  # the OCP MX rule: powers of two, the top saturates
        exponent = absmax.clamp(min=2.0**-126).log2().floor() - largest.log2().floor()
        return exponent.clamp(-127, 127).exp2()
    return absmax / largest


def _codes(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, format: Format) -> torch.Tensor:
    """The nearest codes, uint8, of float32 groups under float32 scales; ties go to even, or down."""
    if format.is_integer:
        return ((w / _divisor(scale)).round() + zero).clamp(0, 2**format.bits - 1).to(torch.uint8)
    if format.codebook == E4M3:
        return (w / _divisor(scale)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    values = format.values(w.device)
    order = values.argsort(stable=True)[
        : int(torch.isfinite(values).sum())
    ]  # NaN, a code not in use, sorts last
    ascending = values[order]
    inverse = 1.0 / scale
    ratio = w * torch.where(scale == 0, 0.0, inverse)
    if bool(torch.isinf(inverse).any()):  # of no scale, or of one too small to have an inverse
        ratio = torch.where(torch.isinf(inverse) & (scale != 0), w / _divisor(scale), ratio)
    return order[torch.bucketize(ratio, (ascending[1:] + ascending[:-1]) / 2)].to(torch.uint8)


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 1.0, scale)


def nest_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales in 8 bits, as bitsandbytes nests them: less their mean, blocks of 256, the dynamic map's nearest
    value."""
    flat = scales.flatten()
    offset = flat.mean().view(1)
    if not bool(torch.isfinite(offset)):  # the sum does not fit
        offset = flat.double().mean().float().view(1)
    centred = flat - offset
    blocks = -(-flat.numel() // NESTED_BLOCK)
    padded = torch.nn.functional.pad(centred, (0, blocks * NESTED_BLOCK - flat.numel())).view(
        blocks, NESTED_BLOCK
    )
    block_scale = padded.abs().amax(1)
    code = nested_code(scales.device)
    ratio = padded / torch.where(block_scale == 0, 1.0, block_scale).unsqueeze(1)
    codes = torch.bucketize(ratio, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    # of its own memory: a view of what is padded is refused by safetensors
    return codes.flatten()[: flat.numel()].view(scales.shape).clone(), block_scale, offset

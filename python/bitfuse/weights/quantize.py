"""From a float matrix to the nearest codes: scales, zero points, rounding."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ..core.tensors import check_finite
from .checks import check_float_weight, check_g_idx, check_shape
from .formats import E2M1_MAX, E4M3, E4M3_MAX, FIXED_SCALE_DTYPES, Format, get_format
from .packing import pack, packed_width
from .scales import nest_scales, resolve_scales, spread_rows
from .weight import CHUNK, LowBitWeight


def quantize(
    weight: torch.Tensor,
    format: str | Format = "int4",
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    nested: bool | None = None,
    scale_dtype: torch.dtype | None = None,
    g_idx: torch.Tensor | None = None,
    offset: bool | None = None,
    scale_rows: int | None = None,
) -> LowBitWeight:
    """Quantise a matrix to the nearest codes; of several, [..., out_features, in_features], each on its own.

    Integers round to nearest. Symmetric ones put the group's extreme value on the lowest code, so that a
    scale may be negative (the rule of llama.cpp's Q4_0; 12% less error at 4 bits than largest magnitude / 7);
    asymmetric ones spread the codes over the group's range, widened to hold 0 unless they have
    offsets. NF4 codes are bit-exact with
    bitsandbytes (Dettmers et al., QLoRA, 2023); double quantisation is its scheme (offset, blocks of 256,
    dynamic map), each scale at its nearest code. FP8 scales each group's largest magnitude to 448.

    Args:
        weight: [..., out_features, in_features], float32, float16 or bfloat16, any strides, in_features a
            multiple of 8.
        format: a name ("int8", "int4", "int3", "int2", "ternary", "nf4", "fp4", "fp8", "mxfp4", "mxfp8",
            "nvfp4", or one of your own that `register_format` knows) or a `Format`.
        group_size: input columns that share a scale, a multiple of 8 that divides in_features; -1 is the
            whole row. By default the format's, or where that does not divide in_features the largest power of
            two below it that does.
        symmetric: integers: False stores a zero point a group.
        nested: double quantisation: the scales in 8 bits.
        scale_dtype: dtype of the scales.
        g_idx: group of each input column, int [in_features], or one for each matrix [..., in_features],
            group_size columns a group (GPTQ's act-order).
        offset: integers: True stores a float a group in the place of the zero point, so that a group far from
            0 is as finely resolved as one around it (GGUF's Q4_1, HQQ).
        scale_rows: rows that share scales: 128 with ``group_size=128`` are FP8's blocks (DeepSeek-V3).

    Warns:
        UserWarning: groups that are so much smaller than the matrix's largest that their scales are rounded
            to nothing, or far off; where that is all of the matrix it is a ValueError.

    Raises:
        TypeError: a weight that is not a float tensor.
        ValueError: a NaN or Inf in it, a size or group size that does not fit, an unknown format, a
            scale_dtype that the format does not have, scales outside scale_dtype.
    """
    format = get_format(
        format,
        group_size=group_size,
        symmetric=symmetric,
        nested=nested,
        scale_dtype=scale_dtype,
        offset=offset,
        scale_rows=scale_rows,
    )
    check_float_weight(weight)
    if group_size is None:
        format = format.fitted(weight.shape[-1])
    weight = weight.detach()
    _, k = check_shape(weight.shape, format)
    *lead, _, _ = weight.shape
    if g_idx is not None:
        fits = isinstance(g_idx, torch.Tensor) and not g_idx.is_floating_point()
        if not fits or g_idx.shape not in ((k,), (*lead, k)):
            raise ValueError(
                f"g_idx is {getattr(g_idx, 'shape', g_idx)}, expected an int tensor of shape [{k}]"
            )
        g_idx = g_idx.to(weight.device, torch.int32)
        check_g_idx(g_idx, k if format.group_size == -1 else format.group_size)
        if lead:
            g_idx = g_idx.expand(*lead, k).contiguous()
    if not lead:
        parts, lost = _quantised(weight, format, g_idx)
        if lost:
            warnings.warn(f"weight: {lost}", stacklevel=2)
    else:
        parts = {
            name: torch.empty(shape, dtype=_dtype_of(format, dtypes), device=weight.device)
            for name, dtypes, shape in LowBitWeight.expected(format, weight.shape)
        }
        for each in itertools.product(*map(range, lead)):
            try:
                made, lost = _quantised(weight[each], format, None if g_idx is None else g_idx[each])
            except ValueError as why:
                raise ValueError(f"weight{list(each)}: {why}") from None
            if lost:
                warnings.warn(f"weight{list(each)}: {lost}", stacklevel=2)
            for name, t in made.items():
                parts[name][each].copy_(t)
    return LowBitWeight(format=format, shape=tuple(weight.shape), g_idx=g_idx, dtype=weight.dtype, **parts)


def _quantised(
    weight: torch.Tensor, format: Format, g_idx: torch.Tensor | None
) -> tuple[dict[str, Any], str]:
    """The tensors of a matrix's weight, and what of it is lost in its scales."""
    n, k = weight.shape
    perm = None if g_idx is None else torch.argsort(g_idx, stable=True)
    scales, zeros, offsets, tensor_scale, lost = find_scales(weight, format, perm)
    qweight = torch.empty(n, packed_width(k, format.bits), dtype=torch.uint8, device=weight.device)
    group = k if format.group_size == -1 else format.group_size
    step = -(-max(1, CHUNK // k) // format.scale_rows) * format.scale_rows
    for rows, w in _grouped(weight, group, perm, step):
        blocks = slice(rows.start // format.scale_rows, -(-rows.stop // format.scale_rows))

        def of_rows(t: torch.Tensor, blocks: slice = blocks, rows: slice = rows) -> torch.Tensor:
            return spread_rows(t[blocks], format.scale_rows, rows.stop - rows.start).reshape(-1, 1).float()

        s = of_rows(scales) * tensor_scale
        z = torch.full_like(s, format.zero_point) if zeros is None else of_rows(zeros)
        codes = _codes(w if offsets is None else w + of_rows(offsets), s, z, format)
        qweight[rows] = pack(codes.view(-1, k), format.bits)
    parts = {"qweight": qweight, "scales": scales}
    if zeros is not None:
        parts["zeros"] = zeros
    if offsets is not None:
        parts["offsets"] = offsets
    if format.nested:
        parts["scales"], parts["scale_scales"], parts["scale_offset"] = nest_scales(scales)
    elif format.tensor_scale:
        parts["scale_scales"] = torch.full((1,), tensor_scale, dtype=torch.float32, device=weight.device)
    return parts, lost


def _dtype_of(format: Format, dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
    """Of the dtypes that a tensor may have, the one that a new weight's has."""
    return format.scale_dtype if format.scale_dtype in dtypes else dtypes[0]


def _grouped(
    weight: torch.Tensor, group: int, perm: torch.Tensor | None, step: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of `step` rows with their float32 groups [groups, group_size]."""
    n = weight.shape[0]
    for at in range(0, n, step):
        rows = slice(at, min(at + step, n))
        w = weight[rows].float().contiguous()
        yield rows, (w if perm is None else w[:, perm]).reshape(-1, group)


def _blocks(
    weight: torch.Tensor, group: int, perm: torch.Tensor | None, scale_rows: int
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Slices of rows, of the blocks of scale_rows that they are, and those blocks' float32 weights [blocks *
    groups, weights that share a scale], a bounded number at a time."""
    n, k = weight.shape
    whole = n // scale_rows * scale_rows
    step = max(1, CHUNK // k // scale_rows) * scale_rows
    for part, height in ((slice(0, whole), scale_rows), (slice(whole, n), n - whole)):
        for rows, w in _grouped(weight[part], group, perm, step):
            rows = slice(part.start + rows.start, part.start + rows.stop)
            if height > 1:
                w = w.view(-1, height, k // group, group).transpose(1, 2).reshape(-1, height * group)
            yield rows, slice(rows.start // scale_rows, -(-rows.stop // scale_rows)), w


def find_scales(
    weight: torch.Tensor, format: Format, perm: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, float, str]:
    """What `quantize` rounds against, in one pass over a matrix that fits the format.

    Returns:
        scales as they are stored (before nesting), [out_features / scale_rows, groups]; zero points of that
        shape, uint8, or None; offsets of that shape and dtype, or None; the scale of the tensor; what of the
        weight is lost in its scales, "" when nothing is.

    Raises:
        ValueError: a NaN or Inf, scales or offsets that scale_dtype can't hold.
    """
    n, k = weight.shape
    group = k if format.group_size == -1 else format.group_size
    dtype, device = format.scale_dtype, weight.device
    tensor_scale = 1.0
    if format.tensor_scale and n:
        low, high = torch.aminmax(weight)
        absmax = max(-float(low), float(high))
        tensor_scale = absmax / (E2M1_MAX * E4M3_MAX) if math.isfinite(absmax) and absmax else 1.0
    scales = torch.empty(-(-n // format.scale_rows), k // group, dtype=dtype, device=device)
    exact = torch.empty_like(scales, dtype=torch.float32)
    offsets = torch.empty_like(scales) if format.offset else None
    least = torch.empty_like(exact)
    zeros = None if format.symmetric or format.offset else torch.empty_like(scales, dtype=torch.uint8)
    for rows, blocks, w in _blocks(weight, group, perm, format.scale_rows):
        check_finite(f"weight (rows from {rows.start})", weight[rows])
        found = _group_scales(w, format, tensor_scale)
        exact[blocks] = found.view(-1, k // group)
        scales[blocks] = exact[blocks].to(dtype)
        if offsets is not None:
            least[blocks] = w.amin(1).view(-1, k // group)
            offsets[blocks] = -least[blocks].to(dtype)
        if zeros is not None:
            # against the scale that is stored; a group of zeros has scale 0
            stored = scales[blocks].float().view(-1, 1)
            zero = -w.amin(1, keepdim=True).clamp(max=0) / _divisor(stored)
            zeros[blocks] = zero.round().clamp(0, 2**format.bits - 1).view(-1, k // group)
    if offsets is not None:
        top = scales.float() * (2**format.bits - 1)
        if not bool((torch.isfinite(offsets) & torch.isfinite(top)).all()):
            raise ValueError(
                f"scale_dtype {dtype} can't hold the scales and offsets of this weight (largest magnitude "
                f"{float(weight.abs().max()):.3g}){_remedy(dtype)}"
            )
    said = _lost_in(scales, exact, weight, format, offsets, least) if n else ""
    return scales, zeros, offsets, tensor_scale, said


def _remedy(dtype: torch.dtype) -> str:
    return "" if dtype in (*FIXED_SCALE_DTYPES, torch.float32) else ": pass scale_dtype=torch.float32"


def _lost_in(
    scales: torch.Tensor,
    exact: torch.Tensor,
    weight: torch.Tensor,
    format: Format,
    offsets: torch.Tensor | None,
    lowest: torch.Tensor,
) -> str:
    """What groups of a weight are lost because their scales or offsets, as they are stored, are far from the
    exact ones; ValueError when the largest are. `lowest`: of each group, where there are offsets."""
    dtype, remedy = format.scale_dtype, _remedy(format.scale_dtype)
    stored, size = scales.float(), exact.abs()
    # rounding a scale may move its largest value by a quarter of a step
    error, allowed = (stored - exact).abs(), max(2.0 ** -(format.bits + 1), torch.finfo(dtype).eps)
    off = error > allowed * size
    if offsets is not None:
        off |= (offsets.float() + lowest).abs() > torch.maximum(size, lowest.abs() / 2)
    if format.nested:
        off |= ((resolve_scales(*nest_scales(scales), dtype) - exact).abs() > 0.5 * size) & (size > 0)
    if bool((size < torch.finfo(torch.float32).tiny).any()):  # zeros, or numbers too small for any scale
        levels = (format.values() - format.zero_point).abs().nan_to_num(0)
        least = float(levels[levels > 0].min()) / 2
        for _, at, w in _blocks(weight, weight.shape[1] // exact.shape[1], None, format.scale_rows):
            largest = w.amax(1) - w.amin(1) if format.offset else w.abs().amax(1)
            largest = largest.view(-1, exact.shape[1])
            off[at] |= (largest > 0) & (largest < least * size[at]) | (largest > 0) & (size[at] == 0)
    if not bool(torch.isfinite(stored).all()) or bool(off.flatten()[size.argmax()]):
        raise ValueError(
            f"scale_dtype {dtype} can't hold the scales of this weight (largest magnitude "
            f"{float(weight.abs().max()):.3g}){remedy}"
        )
    count = int(off.sum())
    if not count:
        return ""
    row = int(off.any(1).nonzero()[0]) * format.scale_rows
    there = weight[row : row + format.scale_rows]
    return (
        f"{count} of {off.numel()} groups, the first in row {row} (largest magnitude there "
        f"{float(there.abs().max()):.3g}, of all {float(weight.abs().max()):.3g}), are too small for "
        f"their scales in {'8 bits' if format.nested else dtype}, and are lost or far off{remedy}"
    )


def _group_scales(w: torch.Tensor, format: Format, tensor_scale: float) -> torch.Tensor:
    """The scales, float32 [groups, 1], of float32 groups [groups, group_size]."""
    if not format.symmetric:
        top = 2**format.bits - 1
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
        if not format.offset:
            low, high = low.clamp(max=0), high.clamp(min=0)
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

"""From a float matrix to the nearest codes: scales, zero points, rounding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch

from ..core.tensors import check_finite
from .checks import check_float_weight, check_g_idx, check_shape
from .formats import E2M1_MAX, E4M3, E4M3_MAX, FIXED_SCALE_DTYPES, Format, get_format
from .packing import pack, packed_width
from .scales import nest_scales, resolve_scales
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

"""Scales as they are stored, in floats, bytes or nested, and as float32."""

from __future__ import annotations

import torch

from ..core.limits import NESTED_BLOCK
from .formats import FIXED_SCALE_DTYPES, nested_code


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    """Eight-bit floats as uint8, the same memory; other tensors as they are. torch's pickle, gloo and many
    an op take no eight-bit floats, so layers hold them so."""
    return t.view(torch.uint8) if t.dtype in FIXED_SCALE_DTYPES else t


def as_floats(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `as_bytes`, for scales of a format with this scale_dtype; not for nested ones."""
    if scales.dtype == torch.uint8 and dtype in FIXED_SCALE_DTYPES:
        return scales.view(dtype)
    return scales


def resolve_scales(
    scales: torch.Tensor,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """Scales as float32; nested ones are ``nested_code[scales] * scale_scales[block of 256] +
    scale_offset``, block by block of each matrix."""
    if scale_offset is None:
        scales = as_floats(scales, scale_dtype).float()
        return scales if scale_scales is None else scales * scale_scales.unsqueeze(-1)
    assert scale_scales is not None
    first = nested_code(scales.device)[scales.flatten(-2).int()]
    factor = scale_scales.repeat_interleave(NESTED_BLOCK, -1)[..., : first.shape[-1]]
    return (first * factor + scale_offset).view(scales.shape)


def spread_rows(t: torch.Tensor, scale_rows: int, rows: int) -> torch.Tensor:
    """What `scale_rows` rows share, [..., ceil(rows / scale_rows), groups], as [..., rows, groups]."""
    return t if scale_rows == 1 else t.repeat_interleave(scale_rows, -2)[..., :rows, :]


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

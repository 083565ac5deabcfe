"""quantize_kv: keys and values as the codes of a KV cache."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...core import autocast
from ...core.backends import Backend
from ...core.declaration import Declaration, Part, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...core.tensors import check_tensor
from ...kernels.attention import quantize_kv as triton
from ..linear.lowbit_linear import FLOATS
from . import quantize_kv_cpu as cpp
from .example import example_qkv
from .kv_cache import (
    BITS,
    CHANNEL_STEP,
    DEFAULT_GROUPS,
    default_channels,
    head_scales,
    quantize_keys,
    quantize_values,
    to_fp8,
)


class QuantizedKV(NamedTuple):
    """Keys and values in few bits; kv_cache.py says what codes mean.

    Attributes:
        k, v: int8, int4: uint8 [batch, seq, kv_heads, head_dim * bits / 8]; fp8: float8_e4m3fn.
        k_scales, k_offsets: float16 [batch, seq / group_size, kv_heads, head_dim]; fp8: float32 [kv_heads],
            and an empty tensor.
        v_scales, v_offsets: float16 [batch, seq, kv_heads, ceil(head_dim_v / channel_group)]; fp8: as of K.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor
    k_offsets: torch.Tensor
    v_scales: torch.Tensor
    v_offsets: torch.Tensor


def _check(k: torch.Tensor, v: torch.Tensor, format: str, group_size: int, channel_group: int) -> None:
    if k.dim() != 4:
        raise ValueError(f"k has shape {list(k.shape)}, expected [batch, seq, kv_heads, head_dim]")
    check_tensor("k", k, FLOATS, tuple(k.shape), k.device)
    check_tensor("v", v, (k.dtype,), (*k.shape[:-1], v.shape[-1] if v.dim() else 0), k.device)
    if format not in ("fp8", *BITS):
        raise ValueError(f"format is {format!r}, expected 'fp8', 'int8' or 'int4'")
    if format == "fp8":
        return
    if group_size < 1 or group_size & (group_size - 1) or k.shape[1] % group_size:
        raise ValueError(
            f"group_size is {group_size}, expected a power of two that divides the {k.shape[1]} tokens"
        )
    if channel_group < CHANNEL_STEP or channel_group % CHANNEL_STEP:
        raise ValueError(f"channel_group is {channel_group}, expected a multiple of {CHANNEL_STEP}")
    for name, t in (("k", k), ("v", v)):
        if t.shape[-1] % 8 or not t.shape[-1]:
            raise ValueError(f"{name} has head_dim {t.shape[-1]}, expected a multiple of 8 for {format}")


def _reference(
    k: torch.Tensor, v: torch.Tensor, format: str, group_size: int, channel_group: int
) -> list[torch.Tensor]:
    """The tensors of QuantizedKV."""
    if format == "fp8":
        of_k, of_v, none = head_scales(k), head_scales(v), k.new_empty(0, dtype=torch.float32)
        return [to_fp8(k, of_k), to_fp8(v, of_v), of_k, none, of_v, none.clone()]
    bits = BITS[format]
    batch, seq, heads, dim = k.shape
    grouped = k.reshape(batch, seq // group_size, group_size, heads, dim)
    codes, k_scales, k_offsets = quantize_keys(grouped, bits)
    v_codes, v_scales, v_offsets = quantize_values(v, bits, channel_group)
    return [codes.flatten(1, 2), v_codes, k_scales, k_offsets, v_scales, v_offsets]


def _fake(
    k: torch.Tensor, v: torch.Tensor, format: str, group_size: int, channel_group: int
) -> list[torch.Tensor]:
    batch, seq, heads, dim = k.shape
    if format == "fp8":
        scales = [k.new_empty(n, dtype=torch.float32) for n in (heads, 0, heads, 0)]
        return [k.new_empty(t.shape, dtype=torch.float8_e4m3fn) for t in (k, v)] + scales
    codes = [k.new_empty(*t.shape[:-1], t.shape[-1] * BITS[format] // 8, dtype=torch.uint8) for t in (k, v)]
    of_k = (batch, seq // group_size, heads, dim)
    of_v = (batch, seq, heads, -(-v.shape[-1] // channel_group))
    return codes + [k.new_empty(s, dtype=torch.float16) for s in (of_k, of_k, of_v, of_v)]


quantize_kv_op = Op(
    "quantize_kv(Tensor k, Tensor v, str format, int group_size, int channel_group) -> Tensor[]",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
)


def _sizes(
    v: torch.Tensor, format: str, group_size: int | None, channel_group: int | None
) -> tuple[int, int]:
    return (
        DEFAULT_GROUPS.get(format, 1) if group_size is None else group_size,
        default_channels(format, v.shape[-1] if v.dim() else 1) if channel_group is None else channel_group,
    )


def quantize_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    format: str = "int8",
    group_size: int | None = None,
    channel_group: int | None = None,
) -> QuantizedKV:
    """Keys and values of whole groups of tokens as the codes that a `KVCache` holds (KIVI: Liu et al., 2024):
    K per channel, in groups of tokens; V per token, in groups of channels; fp8 per head. No gradient.

    Args:
        k, v: [batch, seq, kv_heads, head_dim] and [..., head_dim_v], float32, float16 or bfloat16.
        format: "int8", "int4" or "fp8".
        group_size: tokens that share K's scales: a power of two that divides seq; 64 for int8 and 32 for int4
            by default. fp8 has none.
        channel_group: channels that share V's scales: a multiple of 32; by default 32 for int4, the whole
            head for int8. fp8 has none.

    Returns:
        `QuantizedKV`.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: sizes that do not fit, an unknown format.
    """
    for name, t in (("k", k), ("v", v)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor")
    sizes = _sizes(v, format, group_size, channel_group)
    k, v = autocast.of_elements(k, v)
    return QuantizedKV(*quantize_kv_op(k.detach(), v.detach(), format, *sizes))


def _explain(
    k: torch.Tensor,
    v: torch.Tensor,
    format: str = "int8",
    group_size: int | None = None,
    channel_group: int | None = None,
) -> Explanation:
    return quantize_kv_op.explain(
        *autocast.of_elements(k, v), format, *_sizes(v, format, group_size, channel_group)
    )


declare(
    Declaration(
        quantize_kv,
        "keys and values as the codes of a KV cache",
        place=6,
        explain=_explain,
        uses=("batch", "kv_len", "kv_heads", "head_dim", "dtype", "cache"),
        arguments=lambda s, make: example_qkv(s, make, s.kv_len)[1:],
        options=lambda s: {"format": "int8" if s.cache == "none" else s.cache},
        parts=(Part(quantize_kv_op),),
        classes=(QuantizedKV,),
        gradient=False,
    )
)

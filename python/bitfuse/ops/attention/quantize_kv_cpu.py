"""quantize_kv on the CPU. The kernel: csrc/cpu/attention/append_kv.cpp."""

from __future__ import annotations

import torch

from ...core.cpu import extension as _cpu
from . import append_kv_cpu as cpp
from .attention_args import MAX_HEAD_DIM
from .kv_cache import BITS, FP8, CacheTensors, head_scales
from .operands import dense_rows


def supports(
    k: torch.Tensor, v: torch.Tensor, format: str, group_size: int, channel_group: int
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    for name, t in (("k", k), ("v", v)):
        if not 1 <= t.shape[-1] <= MAX_HEAD_DIM:
            return f"{name} has head_dim {t.shape[-1]}, not 1 to {MAX_HEAD_DIM}"
    if not k.shape[2]:
        return "k has no heads"
    return cpp.supports()


def run(
    k: torch.Tensor, v: torch.Tensor, format: str, group_size: int, channel_group: int
) -> list[torch.Tensor]:
    """The tensors of QuantizedKV. The arguments have passed the op's check."""
    batch, seq, heads, dim = k.shape
    k, v = dense_rows(k), dense_rows(v)
    if format == "fp8":
        scales = head_scales(k), head_scales(v)
        codes = [t.new_empty(t.shape, dtype=FP8) for t in (k, v)]
        none = [k.new_empty(0, dtype=torch.float32) for _ in range(2)]
        to = CacheTensors(codes[0], codes[1], scales[0], None, scales[1], format=format)
        made = [*codes, scales[0], none[0], scales[1], none[1]]
    else:
        codes = [
            t.new_empty(*t.shape[:-1], t.shape[-1] * BITS[format] // 8, dtype=torch.uint8) for t in (k, v)
        ]
        of_k = (batch, seq // group_size, heads, dim)
        of_v = (batch, seq, heads, -(-v.shape[-1] // channel_group))
        halves = [k.new_empty(s, dtype=torch.float16) for s in (of_k, of_k, of_v, of_v)]
        to = CacheTensors._make((*codes, *halves, None, None, None, format, group_size, channel_group))
        made = [*codes, *halves]
    if k.numel():
        _cpu.quantize_kv(k, v, to)
    return made

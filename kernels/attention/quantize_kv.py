"""quantize_kv in Triton: append_kv's kernels into caches that are as long as what is quantised and have no
tail."""

from __future__ import annotations

import torch

from ...core.limits import MAX_HEAD_SIZE
from ...ops.attention.kv_cache import BITS, FP8, CacheTensors, Rotary, head_scales
from . import append_kv


def supports(
    k: torch.Tensor, v: torch.Tensor, format: str, group_size: int, channel_group: int
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    for name, t in (("k", k), ("v", v)):
        if not 1 <= t.shape[-1] <= MAX_HEAD_SIZE:
            return f"{name} has head_dim {t.shape[-1]}, not 1 to {MAX_HEAD_SIZE}"
    rows = CacheTensors(k, v)
    return append_kv.refused(k.device, rows, k.shape[1])


def run(
    k: torch.Tensor, v: torch.Tensor, format: str, group_size: int, channel_group: int
) -> list[torch.Tensor]:
    """The tensors of QuantizedKV. The arguments have passed the op's check."""
    batch, seq, heads, dim = k.shape
    device = k.device
    if format == "fp8":
        scales = head_scales(k), head_scales(v)
        codes = [torch.empty(t.shape, dtype=FP8, device=device) for t in (k, v)]
        none = [torch.empty(0, dtype=torch.float32, device=device) for _ in range(2)]
        to = CacheTensors(codes[0], codes[1], scales[0], None, scales[1], format=format)
        made = [*codes, scales[0], none[0], scales[1], none[1]]
    else:
        codes = [
            torch.empty(*t.shape[:-1], t.shape[-1] * BITS[format] // 8, dtype=torch.uint8, device=device)
            for t in (k, v)
        ]
        of_k = (batch, seq // group_size, heads, dim)
        of_v = (batch, seq, heads, -(-v.shape[-1] // channel_group))
        halves = [torch.empty(s, dtype=torch.float16, device=device) for s in (of_k, of_k, of_v, of_v)]
        to = CacheTensors._make((*codes, *halves, None, None, None, format, group_size, channel_group))
        made = [*codes, *halves]
    if k.numel():
        append_kv.run(k, v, to, None, Rotary())
    return made

"""lora_linear on CUDA for few tokens, over few-bit W: tensors to addresses.

The adapter rides along in the kernel of lowbit_linear: csrc/cuda/adapter.cuh.
"""

from __future__ import annotations

import torch

from ..lora_args import LoraArgs
from ..weight import WeightTensors
from . import lowbit_linear as base

# the numbers of AdapterFloat in csrc/cuda/adapter.h
_ADAPTER_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
RANK_TILE = 16
TILE_SUMS = 8 * RANK_TILE  # floats that a block hands on, of a tile of ranks and one of tokens


def supports(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if dropout_p:
        return f"dropout_p is {dropout_p}: it decodes, without dropout"
    for p in projections:
        if not isinstance(p.weight, WeightTensors):
            return "w is dense: its kernel decodes few-bit weights"
        if reason := base.supports(x, p.weight, p.bias):
            return reason
        if p.weight.qweight.shape[0] == 0:
            return "w has no rows"
    return None


def run(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> list[torch.Tensor]:
    """The outputs, then every h. The arguments have passed the op's check and `supports`."""
    pairs = [_run(x, p) for p in projections]
    return [y for y, _ in pairs] + [h for _, h in pairs]


def _run(x: torch.Tensor, p: LoraArgs) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(p.weight, WeightTensors)
    device, rank, k = x.device, p.lora_A.shape[0], x.shape[-1]
    h = torch.empty((x.numel() // k, rank), dtype=torch.float32, device=device)
    # 8 bytes that say how far the kernel is, and a counter for each tile of ranks
    counters = 2 + -(-rank // RANK_TILE) if rank else 0
    call = base.prepare(x, p.weight, p.bias, rank > 0, counters + counters % 2)
    if call.plan is None:
        return call.y, h
    lora_A, lora_B = p.lora_A.contiguous(), p.lora_B.contiguous()
    if lora_A.data_ptr() % 16:
        lora_A = lora_A.clone()
    out_scale = None if p.out_scale is None else p.out_scale.contiguous()
    plan, participants = call.plan, 0
    slices = None
    if rank:
        # as many as surely run at once make h between them
        participants = min(plan.tiles * plan.splits, base.multiprocessors(device))
        slices = torch.empty(participants * plan.token_tiles * TILE_SUMS, dtype=torch.float32, device=device)
    base._cuda.lora_linear(
        *call.arguments, 0 if out_scale is None else out_scale.data_ptr(), lora_A.data_ptr(),
        lora_B.data_ptr(), 0 if p.scale_by is None else p.scale_by.data_ptr(), p.scaling, h.data_ptr(),
        0 if slices is None else slices.data_ptr(),
        0 if call.counters is None else call.counters.data_ptr(), rank, _ADAPTER_FLOATS[lora_A.dtype],
        _ADAPTER_FLOATS[lora_B.dtype], participants,
    )  # fmt: skip
    return call.y, h

"""lora_linear on CUDA for few tokens, over few-bit W: tensors to addresses.

The adapter rides along in the kernel of lowbit_linear: csrc/cuda/linear/adapter.cuh.
"""

from __future__ import annotations

import torch

from ...core.cuda import cuda
from ...core.device import device_of
from ...weights.weight import WeightTensors
from . import lowbit_linear_cuda as base
from .lora_args import LoraArgs

# the numbers of AdapterFloat in csrc/cuda/linear/adapter.h
ADAPTER_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
RANK_TILE = 16


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
    if rank == 0 and p.out_scale is None:
        return base.run(x, p.weight, p.bias), h
    # 8 bytes that say how far the kernel is, and a counter for each tile of ranks
    counters = 2 + -(-rank // RANK_TILE)
    call = base.prepare(x, p.weight, p.bias, rank > 0, counters + counters % 2)
    if call.plan is None:
        return call.y, h
    out_scale = None if p.out_scale is None else p.out_scale.contiguous()
    adapter, kept = None, None
    if rank:
        lora_A, lora_B = p.lora_A.contiguous(), p.lora_B.contiguous()
        if lora_A.data_ptr() % 16:
            lora_A = lora_A.clone()
        # as many blocks as surely run at once make h between them
        participants = min(call.plan.tiles * call.plan.splits, device_of(device).multiprocessors)
        slices = sums_of_slices(participants, call.plan.token_tiles, device)
        assert call.counters is not None
        adapter = cuda.module.Adapters(
            lora_A.data_ptr(), lora_B.data_ptr(), 0, 0, False,
            0 if p.scale_by is None else p.scale_by.data_ptr(), p.scaling, h.data_ptr(), slices.data_ptr(),
            call.counters.data_ptr(), 1, rank, ADAPTER_FLOATS[lora_A.dtype], ADAPTER_FLOATS[lora_B.dtype],
            participants,
        )  # fmt: skip
        kept = (lora_A, lora_B, slices)
    cuda.module.lora_linear(*call.arguments, 0 if out_scale is None else out_scale.data_ptr(), adapter)
    del kept  # until here
    return call.y, h


def sums_of_slices(participants: int, token_tiles: int, device: torch.device) -> torch.Tensor:
    """What the blocks that make h pass on to one another."""
    numbers = participants * token_tiles * cuda.module.ADAPTER_TILE_SUMS
    return torch.empty(numbers, dtype=torch.float32, device=device)

"""lora_linear on CUDA for few tokens, over few-bit W.

The adapter rides along in the kernel of lowbit_linear: csrc/cuda/linear/adapter.cuh.
"""

from __future__ import annotations

import functools

import torch

from ...core.cost import Cost, Prediction, Rates
from ...core.cuda import cuda
from ...core.device import device_of
from ...weights.weight import WeightTensors
from . import lowbit_linear_cuda as base
from .lora_args import LoraArgs

RANK_TILE = 16  # ranks of a tensor-core tile


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
    adapters = None
    if rank:
        lora_A, lora_B = p.lora_A.contiguous(), p.lora_B.contiguous()
        if lora_A.data_ptr() % 16:
            lora_A = lora_A.clone()
        # as many blocks as surely run at once make h between them
        participants = min(call.plan.tiles * call.plan.splits, device_of(device).multiprocessors)
        slices = sums_of_slices(participants, call.plan.token_tiles, device)
        adapters = cuda.module.Adapters(
            lora_A, lora_B, h, slices, call.counters, participants, scaling=p.scale_by, scaling_by=p.scaling
        )
    # copies live until here
    call.launch(out_scale=out_scale, adapters=adapters)
    return call.y, h


def sums_of_slices(participants: int, token_tiles: int, device: torch.device) -> torch.Tensor:
    """What the blocks that make h pass on to one another."""
    numbers = participants * token_tiles * cuda.module.ADAPTER_TILE_SUMS
    return torch.empty(numbers, dtype=torch.float32, device=device)


# seconds that an adapter adds, and for each row
_RIDES, _ROW = 0.8e-6, 8e-9


def predicted(
    cost: Cost, rates: Rates, x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float
) -> Prediction:
    """The time to expect: a launch of lowbit_linear's kernel a projection, and what rides along."""
    share = Cost(cost.nbytes // len(projections), 0, cost.dtype)
    rows = x.numel() // max(x.shape[-1], 1)
    found = []
    for p in projections:
        assert isinstance(p.weight, WeightTensors)
        base_only = base.predicted(share, rates, x, p.weight, p.bias, True)
        found.append(base_only + Prediction(0.0, after=_RIDES + _ROW * rows))
    return functools.reduce(lambda a, b: a + b, found)

"""multi_lora_linear on CUDA for few tokens.

The kernel, its layout and what bounds it: multi_lora_linear.cu and adapter.cuh of csrc/cuda/linear.
"""

from __future__ import annotations

import torch

from ...core.cuda import FLOATS, cuda, stream_of, zeroed_counters
from ...core.device import device_of
from ...core.limits import MAX_TOKENS
from .lora_linear_cuda import RANK_TILE, sums_of_slices
from .multi_lora_args import Adapters, count_of, is_stacked, table

_BLOCKS = 2  # on a multiprocessor


def supports(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if cuda.missing is not None:
        return cuda.missing
    if x.dtype not in FLOATS:
        return f"x is {str(x.dtype)[6:]}: its tensor cores take float16 and bfloat16"
    k = x.shape[-1]
    if k == 0 or k % 8:
        return f"in_features is {k}, not a multiple of 8"
    if x.numel() > MAX_TOKENS * k:
        return f"M = {x.numel() // k} is above {MAX_TOKENS}: the Triton kernel serves it"
    if not is_stacked(lora_A) and not all(t.is_contiguous() for t in (*lora_A, *lora_B)):
        return "an adapter of the list is not contiguous"
    if any(t.data_ptr() % 16 for t in lora_A):
        return "lora_A starts at an address that is not a multiple of 16"
    return cuda.refuses(x.device)


def run(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
) -> None:
    """y[m] += scaling[e] (x[m] A_e^T) B_e^T. The arguments have passed the op's check and `supports`."""
    device, k, n, count = x.device, x.shape[-1], y.shape[-1], count_of(lora_A)
    m = x.numel() // k
    if m == 0 or n == 0 or count == 0:
        return
    if is_stacked(lora_A):
        a, b = lora_A[0].contiguous(), lora_B[0].contiguous()
        rank = a.shape[1]
        entries = None
    else:
        a, b = lora_A[0], lora_B[0]
        found = table(lora_A, lora_B)
        rank = found.max_rank
        entries = found.entries
    if rank == 0:
        return
    x = x.reshape(m, k)
    if x.stride(1) != 1 or x.data_ptr() % 16 or (m > 1 and (x.stride(0) < k or x.stride(0) % 8)):
        x = x.clone(memory_format=torch.contiguous_format)
    ids, scaling = adapter_ids.reshape(m).contiguous(), scaling.contiguous()
    stream = stream_of(x)
    participants = _BLOCKS * device_of(device).multiprocessors
    h = torch.empty((m, rank), dtype=torch.float32, device=device)
    slices = sums_of_slices(participants, 1 if m <= 8 else 2 if m <= 16 else 4 if m <= 32 else 8, device)
    counters = zeroed_counters(2 + min(m, count) * -(-rank // RANK_TILE), device, stream)
    adapters = cuda.module.Adapters(
        a, b, h, slices, counters, participants, table=entries, ids=ids, scaling=scaling
    )
    cuda.module.multi_lora_add(x, y, adapters, stream)

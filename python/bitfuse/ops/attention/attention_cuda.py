"""attention on CUDA: Hopper's kernel, forward only.

The kernel, its layout and what bounds it: csrc/cuda/attention/attention_sm90.cuh and attention_sm90.cu.
"""

from __future__ import annotations

import torch

from ...core.cuda import FLOATS, cuda, stream_of, zeroed_counters
from ...core.device import device_of, served
from .attention_args import AttentionArgs
from .operands import attention_operands

DIMS = (64, 128, 256)
LONGEST = 2**28  # rows of queries or of keys, so that a row plus a window is an int32
_FARTHEST = 2**39  # elements, which the copy engine can step over
_STEP = 8  # elements in 16 bytes: what its strides are multiples of
_TILE = 128  # queries of the smallest tile


def _strides(t: torch.Tensor) -> list[int]:
    """Of batches, rows and heads; that of a single one is never stepped over."""
    strides = [s if n > 1 else t.shape[-1] for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True)]
    return strides if t.dim() == 4 else [t.shape[-1], *strides]


def _unwalkable(name: str, t: torch.Tensor) -> str | None:
    """Why the copy engine can't walk a tensor; None when it can."""
    if t.stride(-1) != 1 or any(s % _STEP or not 0 < s < _FARTHEST for s in _strides(t)):
        return f"{name} has strides {t.stride()}, not multiples of {_STEP} above 0 between neighbours of 1"
    if t.data_ptr() % 16:
        return f"{name} starts at an address that is not a multiple of 16"
    return None


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if cuda.missing is not None:
        return cuda.missing
    if not hasattr(cuda.module, "attention_sm90"):
        return "it was built without code for sm_90a"
    if q.dtype not in FLOATS:
        return f"q is {str(q.dtype)[6:]}: its tensor cores take float16 and bfloat16"
    if q.shape[-1] not in DIMS or v.shape[-1] != q.shape[-1]:
        return f"the head dims are {q.shape[-1]} and {v.shape[-1]}, not both 64, 128 or 256"
    for name, given in (
        ("attn_bias", a.bias is not None),
        ("alibi_slopes", a.alibi_slopes is not None),
        ("prefix_k", a.prefix_k is not None),
        ("dropout_p", a.dropout_p > 0),
    ):
        if given:
            return f"it has no kernel for {name}"
    if a.softmax_scale <= 0:
        return f"softmax_scale is {a.softmax_scale}, not above 0"
    longest = max(q.shape[-3], k.shape[-3], a.max_seqlen_q, a.max_seqlen_k)
    if longest >= LONGEST:
        return f"{longest} queries or keys are more than 2**28 - 1"
    if q.numel() and k.numel():
        for name, t in (("q", q), ("k", k), ("v", v)):
            if (reason := _unwalkable(name, t)) is not None:
                return reason
    if not served(q.device):
        return "the tensors are not on a GPU"
    capability = device_of(q.device).capability
    if capability != 90:
        return f"the compute capability is {capability / 10}, not 9.0"
    batch, sq = _problem(q, a)
    if -(-sq // _TILE) * batch * q.shape[-2] >= 2**30:
        return f"{batch} sequences of {q.shape[-2]} heads and {sq} queries are too many"
    return None


def _problem(q: torch.Tensor, a: AttentionArgs) -> tuple[int, int]:
    """How many sequences, and the queries of the longest."""
    if a.cu_seqlens_q is None:
        return q.shape[0], q.shape[1]
    return a.cu_seqlens_q.shape[0] - 1, min(a.max_seqlen_q, q.shape[0])


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> list[torch.Tensor]:
    """The output, of q's shape, and lse. The arguments have passed the op's check and `supports`."""
    packed = a.cu_seqlens_q is not None
    heads = q.shape[-2]
    batch, sq = _problem(q, a)
    sk = min(a.max_seqlen_k, k.shape[0]) if packed else k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = (heads, q.shape[0]) if packed else (batch, heads, sq)
    lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    if not (lse.numel() and batch and sq):
        return [out, lse]
    if sk == 0:
        lse.fill_(float("-inf")) if a.sinks is None else lse.copy_(a.sinks.unsqueeze(1).expand(lse.shape))
        return [out.zero_(), lse]
    stream = stream_of(q)
    cuda.module.attention_sm90(
        q, k, v, attention_operands(a), out, lse, zeroed_counters(2, q.device, stream),
        device_of(q.device).multiprocessors, stream,
    )  # fmt: skip
    return [out, lse]

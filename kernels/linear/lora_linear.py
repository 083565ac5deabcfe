"""lora_linear in Triton: y = x W^T + s drop(x) A^T B^T and its gradients, rank first.

Split-fused (LoRAFusion, Zhu et al., 2025): what reads x or a gradient whole only to shrink it to R columns
is a kernel bound by those bytes; what widens R columns again rides in the product with W as R more steps of
the contraction (`lowbit_linear.LowRank`), so nothing of the size of y or of x is written but y and dX.

- forward: h = drop(x) A^T (shrink: x read once for all its projections); y = x W^T + s h B^T, written once.
- backward: one pass over dY for GB = s dY B and dB = s dY^T h together (column sums), whose partial sums are
  half the bytes of a second pass at rank 16; beyond, a pass for each. dX = dY W + drop'(GB A), written once,
  or added to where several projections share x. One pass over x for dA = GB^T drop(x) of all of them.

A dense W is cuBLAS's: the widening kernel writes the low-rank term (and bias) first, and the matrix product
adds to it in its epilogue, which overlaps its reads with arithmetic.

Bytes at M = 8192, K = N = 4096, rank 16, bfloat16: the forward's product has 275 GFLOP (0.4 to 0.6 ms on an
H100); the shrink reads 67 MB (22 us at 3 TB/s), and h is 0.5 MB. The backward's product is as large; the pass
over dY is 67 MB and 36 MB of partial sums written and read again, mostly in L2; that over x is 67 MB: 57 us.

The passes, their tiles and their precision are in lora_linear_passes.py.
"""

from __future__ import annotations

from typing import Any

import torch

from ...ops.linear.lora_args import LoraArgs
from ...weights.weight import WeightTensors
from ..core.dropout import threshold_of
from ..core.launch import as_matrix, contiguous, refuse
from . import lora_linear_passes as passes
from . import lowbit_linear
from .lowbit_linear import LowRank


def supports(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if (reason := refuse(x.device)) is not None:
        return reason
    for p in projections:
        n, k, rank = p.shape
        if isinstance(p.weight, WeightTensors):
            if (reason := lowbit_linear.supports_grad_x(x, p.weight)) is not None:
                return reason
        elif x.numel() // max(1, x.shape[-1]) >= 2**31:
            return f"{x.numel() // x.shape[-1]} rows are more than 2**31 - 1"
        if 0 in (n, k):
            return f"w has shape {[n, k]}, which leaves nothing to do"
        if x.numel() // max(1, x.shape[-1]) * rank >= 2**31:
            return f"{x.numel() // x.shape[-1]} rows of rank {rank} are more than 2**31 - 1 numbers"
    return None


def supports_backward(
    grads: tuple[torch.Tensor, ...],
    x: torch.Tensor | None,
    projections: tuple[LoraArgs, ...],
    hs: tuple[torch.Tensor | None, ...],
    dropout_p: float,
    wanted: Any,
) -> str | None:
    """None when `run_backward` can serve the call, else the reason."""
    return supports(grads[0], projections, dropout_p)


def run(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> list[torch.Tensor]:
    """The outputs, of x's dtype and leading shape, then each h = drop(x) A^T, float32 [rows, r]."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return run(x, projections, dropout_p)
    rows = as_matrix(x)
    m = rows.shape[0]
    active = [p for p in projections if p.shape[2] and m]
    found = passes.shrink(
        rows, [p.lora_A.contiguous() for p in active], [p.seed if dropout_p else None for p in active], False,
        1 / (1 - dropout_p), None, threshold_of(dropout_p),
    )  # fmt: skip
    ys, hs = [], []
    for p in projections:
        if p.shape[2] and m:
            h = found.pop(0)
            term = LowRank(h, p.lora_B.contiguous(), p.scaling, p.scale_by)
        else:
            h, term = torch.empty(m, p.shape[2], dtype=torch.float32, device=x.device), None
        hs.append(h)
        if isinstance(p.weight, WeightTensors):
            ys.append(lowbit_linear.run(x, p.weight, p.bias, p.out_scale, term))
        else:
            ys.append(_dense_forward(rows, p, term).view(*x.shape[:-1], p.shape[0]))
    return ys + hs


def _dense_forward(x: torch.Tensor, p: LoraArgs, term: LowRank | None) -> torch.Tensor:
    assert isinstance(p.weight, torch.Tensor)
    bias, out_scale = contiguous(p.bias), contiguous(p.out_scale)
    if term is None and out_scale is None:
        return torch.nn.functional.linear(x, p.weight, bias)
    y = torch.empty(x.shape[0], p.weight.shape[0], dtype=x.dtype, device=x.device)
    if out_scale is None:
        passes.widen(term, y, False, bias=bias)
        return y.addmm_(x, p.weight.t())
    torch.mm(x, p.weight.t(), out=y)
    if y.numel():
        passes.widen(term, y, False, y, out_scale, bias)
    return y


def run_backward(
    grads: tuple[torch.Tensor, ...],
    x: torch.Tensor | None,
    projections: tuple[LoraArgs, ...],
    hs: tuple[torch.Tensor | None, ...],
    dropout_p: float,
    wanted: Any,
) -> list[torch.Tensor]:
    """The gradient of x, then of each projection lora_A's and lora_B's; empty for one not wanted."""
    like = grads[0]
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            return run_backward(grads, x, projections, hs, dropout_p, wanted)
    threshold, inverse = threshold_of(dropout_p), 1 / (1 - dropout_p)
    rows = [as_matrix(g) for g in grads]
    m = rows[0].shape[0]
    seeds = [p.seed if dropout_p else None for p in projections]
    grad_x = like.new_empty(*like.shape[:-1], projections[0].shape[1]) if wanted.x and not m else None
    # zeros where there is nothing to sum; nothing, or not yet, else
    grad_a, grad_b = (
        [t.new_zeros(t.shape if w and (not m or 0 in t.shape) else 0) for t, w in zip(ts, wants, strict=True)]
        for ts, wants in (
            ([p.lora_A for p in projections], wanted.lora_A),
            ([p.lora_B for p in projections], wanted.lora_B),
        )
    )
    gbs: dict[int, torch.Tensor] = {}
    active = [i for i, p in enumerate(projections) if p.shape[2] and m]
    for i in active:
        p, lora_B = projections[i], projections[i].lora_B.contiguous()
        through = wanted.x or wanted.lora_A[i]
        # also where lora_B is not wanted: GB is the same, bit for bit, whatever is
        fused = (
            through and p.shape[2] <= passes.MOST_FUSED and not passes.in_halves(rows[i].dtype, lora_B.dtype)
        )
        if wanted.lora_B[i] or fused:
            sums, gb = passes.column_sums(
                rows[i], [contiguous(hs[i]) if wanted.lora_B[i] else None], [None], [lora_B.dtype], True,
                p.scaling, p.scale_by, 0, lora_B if fused else None,
            )  # fmt: skip
            grad_b[i : i + 1] = sums or grad_b[i : i + 1]
            if gb is not None:
                gbs[i] = gb
        if through and not fused:
            (gbs[i],) = passes.shrink(rows[i], [lora_B], [None], True, p.scaling, p.scale_by, 0)
    if learning := [i for i in active if wanted.lora_A[i]]:
        assert x is not None
        sums, _ = passes.column_sums(
            as_matrix(x), [gbs[i] for i in learning], [seeds[i] for i in learning],
            [projections[i].lora_A.dtype for i in learning], False, inverse, None, threshold,
        )  # fmt: skip
        for i, total in zip(learning, sums, strict=True):
            grad_a[i] = total
    if wanted.x and m:
        for i, p in enumerate(projections):
            term = None
            if i in gbs:
                term = LowRank(gbs[i], p.lora_A.contiguous(), inverse, None, seeds[i], threshold)
            if isinstance(p.weight, WeightTensors):
                grad_x = lowbit_linear.run_grad_x(rows[i], p.weight, term, grad_x)
            else:
                grad_x = _dense_grad_x(rows[i], p.weight, term, grad_x)
    found = [like.new_empty(0) if grad_x is None else grad_x.view(*like.shape[:-1], projections[0].shape[1])]
    for both in zip(grad_a, grad_b, strict=True):
        found += both
    return found


def _dense_grad_x(
    grad: torch.Tensor, weight: torch.Tensor, term: LowRank | None, previous: torch.Tensor | None
) -> torch.Tensor:
    """previous + grad W + term, in previous if there is one."""
    if term is None:
        return grad @ weight if previous is None else previous.addmm_(grad, weight)
    out = previous
    if out is None:
        out = torch.empty(grad.shape[0], weight.shape[1], dtype=grad.dtype, device=grad.device)
    passes.widen(term, out, True, previous)
    return out.addmm_(grad, weight)

"""lora_linear on the CPU. The kernels, and what bounds them: csrc/cpu/; they read tensors where they lie.

With a few-bit W the adapter is part of the product with W. Beside a dense one torch makes that product, and
the adapter's share is added in place, with bias and scale.
"""

from __future__ import annotations

from typing import Any

import torch

from ...core.cpu import addressable, missing
from ...core.cpu import extension as _cpu
from ...core.tensors import as_rows
from ...weights.weight import WeightTensors
from .lora_args import LoraArgs
from .lowbit_linear_cpu import readable, reason


def _unserved(projections: tuple[LoraArgs, ...]) -> str | None:
    if missing is not None:
        return missing
    for p in projections:
        weight = p.weight
        if isinstance(weight, WeightTensors) and (why := reason(weight)):
            return why
    return None


def supports(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> str | None:
    """None when `run` can serve the call, else the reason."""
    return _unserved(projections)


def supports_backward(
    grads: tuple[torch.Tensor, ...],
    x: torch.Tensor | None,
    projections: tuple[LoraArgs, ...],
    hs: tuple[torch.Tensor | None, ...],
    dropout_p: float,
    wanted: Any,
) -> str | None:
    """None when `run_backward` can serve the call, else the reason."""
    return _unserved(projections)


# the op's check, `supports` and `run` in one call, of arguments that are plain in every respect; else None
direct: Any = getattr(_cpu, "lora_linear_direct", None)


def run(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> list[torch.Tensor]:
    """The outputs [..., N], then every h. The arguments have passed the op's check and `supports`."""
    *outer, k = x.shape
    rows = x.numel() // k if k else x.shape[:-1].numel()
    x = addressable(x)
    ys, hs = [], []
    for weight, lora_A, lora_B, scale, scale_by, bias, out_scale, seed in projections:
        n, rank = lora_B.shape
        # without outputs the kernel does not write it
        h = (x.new_empty if n else x.new_zeros)(rows, rank, dtype=torch.float32)
        if scale_by is not None:
            scale *= scale_by.item()
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        if out_scale is not None and not out_scale.is_contiguous():
            out_scale = out_scale.contiguous()
        a, b = lora_A.contiguous(), lora_B.contiguous()
        adapter = _cpu.Adapter(a, h, b, scale, _dropout(dropout_p, seed)) if rank else None
        if isinstance(weight, torch.Tensor):
            y = _beside_dense(x, weight, adapter, h, b, scale, bias, out_scale)
        else:
            y = x.new_empty(*outer, n)
            _cpu.lora_linear(x, readable(weight), adapter, bias, out_scale, y)
        ys.append(y)
        hs.append(h)
    return ys + hs


def _dropout(dropout_p: float, seed: torch.Tensor | None) -> Any:
    if not dropout_p:
        return _cpu.Dropout()
    assert seed is not None
    return _cpu.Dropout(dropout_p, int(seed.item()))


def _beside_dense(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapter: Any,
    h: torch.Tensor,
    lora_B: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
) -> torch.Tensor:
    y = torch.nn.functional.linear(x, weight, bias if out_scale is None else None)
    if adapter is None:
        if out_scale is not None:
            y = (y * out_scale if bias is None else y * out_scale + bias).to(x.dtype)
        return y
    y = y.contiguous()
    _cpu.lora_shrink(x, adapter)
    _cpu.lora_expand(
        y, h, lora_B, transposed=True, scale=scale, out_scale=out_scale,
        bias=None if out_scale is None else bias,
    )  # fmt: skip
    return y


def run_backward(
    grads: tuple[torch.Tensor, ...],
    x: torch.Tensor | None,
    projections: tuple[LoraArgs, ...],
    hs: tuple[torch.Tensor | None, ...],
    dropout_p: float,
    wanted: Any,
) -> list[torch.Tensor]:
    """The gradient of x, then of each projection lora_A's and lora_B's; an empty tensor for one not wanted.

    A projection's share of the gradient of x is added to that of those before it as it is rounded.
    """
    outer = grads[0].shape[:-1]
    rows = outer.numel()
    none = grads[0].new_empty(0)
    grad_x = grads[0].new_empty(*outer, projections[0].shape[1]) if wanted.x else none
    if x is not None:
        x = addressable(x)
    found = [grad_x]
    for i, (grad, p, h) in enumerate(zip(grads, projections, hs, strict=True)):
        n, _, rank = p.shape
        grad = addressable(grad)
        grad_a = grad_b = none
        lora_A, lora_B = p.lora_A.contiguous(), p.lora_B.contiguous()
        scale = p.scaling if p.scale_by is None else p.scaling * p.scale_by.item()
        dropout = _dropout(dropout_p, p.seed)
        gb = grad.new_empty(rows, rank, dtype=torch.float32)
        if wanted.lora_B[i]:
            grad_b = torch.empty_like(lora_B)
            if rank:
                assert h is not None
                _cpu.lora_outer(h.contiguous(), grad, _cpu.Dropout(), scale, grad_b, transposed=True)
        if rank and (wanted.x or wanted.lora_A[i]):
            if n:
                _cpu.lora_times(grad, lora_B, scale, gb)
            else:
                gb.zero_()
        if wanted.lora_A[i]:
            grad_a = torch.empty_like(lora_A)
            if rank:
                assert x is not None
                _cpu.lora_outer(gb, x, dropout, 1.0, grad_a, transposed=False)
        if wanted.x:
            _grad_x(grad, rows, p.weight, lora_A, gb, dropout, grad_x, i > 0)
        found += [grad_a, grad_b]
    return found


def _grad_x(
    grad: torch.Tensor,
    rows: int,
    weight: WeightTensors | torch.Tensor,
    lora_A: torch.Tensor,
    gb: torch.Tensor,
    dropout: Any,
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    """out (+)= grad W + drop'(gb A)."""
    rank, k = lora_A.shape
    if isinstance(weight, WeightTensors):
        if weight.qweight.shape[0]:
            adapter = _cpu.Adapter(lora_A, gb, dropout=dropout) if rank else None
            _cpu.lora_linear_grad_x(grad, readable(weight), adapter, out, accumulate)
        elif not accumulate:
            out.zero_()
        return
    torch.addmm(out.view(rows, k), as_rows(grad), weight, beta=int(accumulate), out=out.view(rows, k))
    if rank and k:
        _cpu.lora_expand(out, gb, lora_A, transposed=False, dropout=dropout)

"""lora_linear on the CPU: tensors to addresses. The kernels, and what bounds them: csrc/cpu/.

With a few-bit W the adapter is part of the product with W. Beside a dense one torch makes that product, and
the adapter's share is added in place, with bias and scale.
"""

from __future__ import annotations

from typing import Any

import torch

from ...core.cpu import DTYPES, missing, strided_rows
from ...core.cpu import extension as _cpu
from ...core.tensors import as_rows
from ...weights.weight import WeightTensors
from .lora_args import LoraArgs
from .lowbit_linear_cpu import _call, _reason


def _unserved(projections: tuple[LoraArgs, ...]) -> str | None:
    if missing is not None:
        return missing
    for p in projections:
        weight = p.weight
        if isinstance(weight, WeightTensors) and (reason := _reason(weight)):
            return reason
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


def run(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> list[torch.Tensor]:
    """The outputs [..., N], then every h. The arguments have passed the op's check and `supports`."""
    *outer, k = x.shape
    rows = x.numel() // k if k else x.shape[:-1].numel()
    ys, hs = [], []
    for weight, lora_A, lora_B, scale, scale_by, bias, out_scale, seed in projections:
        n, rank = lora_B.shape
        # without outputs the kernel does not write it
        h = (x.new_empty if n else x.new_zeros)(rows, rank, dtype=torch.float32)
        if scale_by is not None:
            scale *= scale_by.item()
        if not lora_A.is_contiguous():
            lora_A = lora_A.contiguous()
        if not lora_B.is_contiguous():
            lora_B = lora_B.contiguous()
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        if out_scale is not None and not out_scale.is_contiguous():
            out_scale = out_scale.contiguous()
        shrink = (
            lora_A.data_ptr(), DTYPES[lora_A.dtype], lora_B.data_ptr(), DTYPES[lora_B.dtype], rank, scale,
            h.data_ptr(), *(_mask(dropout_p, seed) if dropout_p else (0.0, 0)),
        )  # fmt: skip
        if isinstance(weight, torch.Tensor):
            y = _beside_dense(x, rows, weight, shrink, h, bias, out_scale)
        else:
            y = x.new_empty(*outer, n)
            _call(
                _cpu.lora_linear, x, weight, n, k, 0 if bias is None else bias.data_ptr(), y.data_ptr(),
                *shrink, 0 if out_scale is None else out_scale.data_ptr(),
            )  # fmt: skip
        ys.append(y)
        hs.append(h)
    return ys + hs


def _mask(dropout_p: float, seed: torch.Tensor | None) -> tuple[float, int]:
    assert seed is not None
    return dropout_p, int(seed.item())


def _beside_dense(
    x: torch.Tensor,
    rows: int,
    weight: torch.Tensor,
    shrink: tuple[Any, ...],
    h: torch.Tensor,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
) -> torch.Tensor:
    a, a_dtype, b, b_dtype, rank, scale, h_at, *mask = shrink
    y = torch.nn.functional.linear(x, weight, bias if out_scale is None else None)
    if not rank:
        if out_scale is not None:
            y = (y * out_scale if bias is None else y * out_scale + bias).to(x.dtype)
        return y
    y = y.contiguous()
    _cpu_rows(_cpu.lora_shrink, x, rows, a, a_dtype, rank, h_at, *mask)
    epilogue = (0, 0)
    if out_scale is not None:
        epilogue = out_scale.data_ptr(), 0 if bias is None else bias.data_ptr()
    _cpu.lora_expand(
        y.data_ptr(), DTYPES[y.dtype], rows, y.shape[-1], h_at, rank, b, b_dtype, True, scale, 0.0, 0,
        *epilogue,
    )  # fmt: skip
    return y


def _cpu_rows(function: Any, x: torch.Tensor, rows: int, *rest: Any, ahead: tuple[Any, ...] = ()) -> None:
    """function(*ahead, x as address, dtype, rows, row stride, columns, *rest)."""
    columns = x.shape[-1]
    x, stride = (x, columns) if x.is_contiguous() else strided_rows(x)
    function(*ahead, x.data_ptr(), DTYPES[x.dtype], rows, stride, columns, *rest)


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
    found = [grad_x]
    for i, (grad, p, h) in enumerate(zip(grads, projections, hs, strict=True)):
        n, _, rank = p.shape
        grad_a = grad_b = none
        lora_A, lora_B = p.lora_A.contiguous(), p.lora_B.contiguous()
        scale = p.scaling if p.scale_by is None else p.scaling * p.scale_by.item()
        mask = _mask(dropout_p, p.seed) if dropout_p else (0.0, 0)
        gb = grad.new_empty(rows, rank, dtype=torch.float32)
        if wanted.lora_B[i]:
            grad_b = torch.empty_like(lora_B)
            if rank:
                assert h is not None
                h = h.contiguous()
                _cpu_rows(
                    _cpu.lora_outer, grad, rows, 0.0, 0, scale, grad_b.data_ptr(), DTYPES[grad_b.dtype],
                    True, ahead=(h.data_ptr(), rank),
                )  # fmt: skip
        if rank and (wanted.x or wanted.lora_A[i]):
            if n:
                _cpu_rows(
                    _cpu.lora_times, grad, rows, lora_B.data_ptr(), DTYPES[lora_B.dtype], rank, scale,
                    gb.data_ptr(),
                )  # fmt: skip
            else:
                gb.zero_()
        if wanted.lora_A[i]:
            grad_a = torch.empty_like(lora_A)
            if rank:
                assert x is not None
                _cpu_rows(
                    _cpu.lora_outer, x, rows, *mask, 1.0, grad_a.data_ptr(), DTYPES[grad_a.dtype], False,
                    ahead=(gb.data_ptr(), rank),
                )  # fmt: skip
        if wanted.x:
            _grad_x(grad, rows, p.weight, lora_A, gb, mask, grad_x, i > 0)
        found += [grad_a, grad_b]
    return found


def _grad_x(
    grad: torch.Tensor,
    rows: int,
    weight: WeightTensors | torch.Tensor,
    lora_A: torch.Tensor,
    gb: torch.Tensor,
    mask: tuple[float, int],
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    """out (+)= grad W + drop'(gb A)."""
    rank, k = lora_A.shape
    a = lora_A.data_ptr(), DTYPES[lora_A.dtype]
    if isinstance(weight, WeightTensors):
        n = weight.qweight.shape[0]
        if n:
            _call(
                _cpu.lora_linear_grad_x, grad, weight, n, k, out.data_ptr(), *a, rank, gb.data_ptr(), *mask,
                accumulate,
            )  # fmt: skip
        elif not accumulate:
            out.zero_()
        return
    torch.addmm(out.view(rows, k), as_rows(grad), weight, beta=int(accumulate), out=out.view(rows, k))
    if rank and k:
        _cpu.lora_expand(
            out.data_ptr(), DTYPES[out.dtype], rows, k, gb.data_ptr(), rank, *a, False, 1.0, *mask, 0, 0
        )

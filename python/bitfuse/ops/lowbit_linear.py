"""lowbit_linear: y = x W^T + b with W in few bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..cpu import lowbit_linear as cpp
from ..cuda import lowbit_linear as cuda
from ..formats import FORMATS, get_format
from ..kernels import lowbit_linear as triton
from ..op import Backend, Explanation, Op, explains
from ..weight import LowBitWeight, check_tensor, dequantize_rows, resolve_scales

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    group_size: int,
) -> None:
    dtype, device, sizes = x.dtype, x.device, x.shape
    if dtype not in FLOATS or not sizes:
        _check_float(x, "x", sizes[-1] if sizes else 0)
    _check_weight(qweight, scales, zeros, scale_scales, scale_offset, format, group_size, sizes[-1], device)
    if bias is not None and not (
        bias.dtype is dtype and bias.shape == qweight.shape[:1] and bias.device == device
    ):
        check_tensor("bias", bias, (dtype,), (qweight.shape[0],), device)


def _check_float(x: torch.Tensor, name: str, columns: int) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {' or '.join(map(str, FLOATS))}")
    if x.dim() == 0:
        raise ValueError(f"{name} has shape [], expected [..., features]")
    if x.shape[-1] != columns:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected the last dimension to be {columns}")


def _check_weight(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    format: str,
    group_size: int,
    k: int,
    device: torch.device,
) -> None:
    """What native code relies on. One cheap pass lets the common case by; the rest is told in words."""
    fmt = FORMATS.get(format) or get_format(format)
    sizes = qweight.shape
    if (
        len(sizes) == 2
        and sizes[1] * 8 == k * fmt.bits
        and not (sizes[0] & 7 or k & 7)
        and group_size > 0
        and scales.shape == (sizes[0], k // group_size)
        and k % group_size == 0
        and qweight.dtype is torch.uint8
        and scales.dtype in FLOATS
        and scale_scales is None
        and scale_offset is None
        and (
            zeros is None
            or (zeros.shape == scales.shape and zeros.dtype is torch.uint8 and zeros.device == device)
        )
        and qweight.device == device
        and scales.device == device
    ):
        return
    if len(sizes) != 2 or sizes[1] * 8 != k * fmt.bits:
        raise ValueError(
            f"x has {k} features and qweight has shape {list(sizes)}, expected in_features = "
            f"{sizes[-1] * 8 // fmt.bits if sizes else 0} at {fmt.bits} bits a code"
        )
    if group_size <= 0 or k % group_size:
        raise ValueError(f"group_size is {group_size}, expected a divisor of in_features {k}")
    nested = not fmt.tensor_scale and (scale_scales is not None or scale_offset is not None)
    scale_dtype = torch.float32 if nested else fmt.scale_dtype
    exact = replace(
        fmt, group_size=group_size, symmetric=zeros is None, nested=nested, scale_dtype=scale_dtype
    )
    given = {
        "qweight": qweight,
        "scales": scales,
        "zeros": zeros,
        "scale_scales": scale_scales,
        "scale_offset": scale_offset,
    }
    for name, dtypes, shape in LowBitWeight.expected(exact, (sizes[0], k)):
        check_tensor(name, given[name], dtypes, shape, device)


def _reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    group_size: int,
) -> torch.Tensor:
    w = dequantize_rows(
        qweight, resolve_scales(scales, scale_scales, scale_offset), zeros, get_format(format)
    )
    return torch.nn.functional.linear(x, w.to(x.dtype), bias)


def _fake(x: torch.Tensor, qweight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _check_grad_x(
    grad: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    format: str,
    group_size: int,
) -> None:
    _check_float(grad, "grad", qweight.shape[0])
    k = qweight.shape[-1] * 8 // get_format(format).bits
    _check_weight(qweight, scales, zeros, scale_scales, scale_offset, format, group_size, k, grad.device)


def _reference_grad_x(
    grad: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scale_scales: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    format: str,
    group_size: int,
) -> torch.Tensor:
    w = dequantize_rows(
        qweight, resolve_scales(scales, scale_scales, scale_offset), zeros, get_format(format)
    )
    return grad @ w.to(grad.dtype)


def _fake_grad_x(
    grad: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: Any,
    scale_scales: Any,
    scale_offset: Any,
    format: str,
    group_size: int,
) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], qweight.shape[1] * 8 // get_format(format).bits)


_WEIGHT = "Tensor qweight, Tensor scales, Tensor? zeros, Tensor? scale_scales, Tensor? scale_offset"

forward_op = Op(
    f"lowbit_linear(Tensor x, {_WEIGHT}, Tensor? bias, str format, int group_size) -> Tensor",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("cuda", ("cuda",), cuda.supports, cuda.run),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
)
lowbit_linear_grad_x = Op(
    f"lowbit_linear_grad_x(Tensor grad, {_WEIGHT}, str format, int group_size) -> Tensor",
    _check_grad_x,
    _reference_grad_x,
    _fake_grad_x,
    (
        Backend("cpp", ("cpu",), cpp.supports_grad_x, cpp.run_grad_x),
        Backend("triton", ("cuda",), triton.supports_grad_x, triton.run_grad_x),
    ),
)


class _LowBitLinear(torch.autograd.Function):
    """The weight is frozen: gradients flow to x and to bias, and the only tensors kept are the few-bit
    ones."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        weight: tuple[Any, ...],
        perm: torch.Tensor | None,
    ) -> torch.Tensor:
        *tensors, ctx.format, ctx.group_size = weight
        ctx.save_for_backward(*tensors, perm)
        return forward_op(
            x if perm is None else x.index_select(-1, perm), *tensors, bias, ctx.format, ctx.group_size
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        *tensors, perm = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = lowbit_linear_grad_x(grad, *tensors, ctx.format, ctx.group_size)
            if perm is not None:
                grad_x = torch.empty_like(grad_x).index_copy_(-1, perm, grad_x)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(tuple(range(grad.dim() - 1)), dtype=torch.float32).to(grad.dtype)
        return grad_x, grad_bias, None, None


def apply_lowbit(
    x: torch.Tensor, weight: tuple[Any, ...], perm: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """`lowbit_linear` on the parts of a weight, as `LowBitWeight.op_args` gives them: what layers call."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if perm is not None:
        _check_float(x, "x", perm.shape[0])
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _LowBitLinear.apply(x, bias, weight, perm)
    *tensors, format, group_size = weight
    return forward_op(x if perm is None else x.index_select(-1, perm), *tensors, bias, format, group_size)


def lowbit_linear(x: torch.Tensor, w: LowBitWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + b with W in few bits; the drop-in for `torch.nn.functional.linear`.

    Accumulates in float32. Deterministic: the same numbers from run to run. Under `torch.autocast` x and bias
    take the autocast dtype, as in `torch.nn.functional.linear`. Gradients flow to x and bias; W is frozen and
    is never written densely by the fused backends (QLoRA; Dettmers et al., 2023).

    Args:
        x: [..., in_features], float32, float16 or bfloat16, any strides.
        w: a `LowBitWeight` of shape (out_features, in_features), on x's device.
        bias: [out_features], of x's dtype and device, or None.

    Returns:
        [..., out_features], of x's dtype.

    Raises:
        TypeError: a dtype that is not listed, w not a LowBitWeight.
        ValueError: sizes that do not fit, tensors on two devices.
    """
    _check_types(x, w)
    return apply_lowbit(x, w.op_args, w.perm, bias)


def _check_types(x: object, w: object) -> None:
    if not isinstance(w, LowBitWeight):
        raise TypeError(f"w is a {type(w).__name__}, expected a bitfuse.LowBitWeight: see bitfuse.quantize")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a tensor")


@explains(lowbit_linear)
def _explain(x: torch.Tensor, w: LowBitWeight, bias: torch.Tensor | None = None) -> Explanation:
    _check_types(x, w)
    *tensors, format, group_size = w.op_args
    return forward_op.explain(x, *tensors, bias, format, group_size)

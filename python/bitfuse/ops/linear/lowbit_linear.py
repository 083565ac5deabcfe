"""lowbit_linear: y = x W^T + b with W in few bits."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from ...core import autocast
from ...core.autograd import Function, elsewhere, no_forward_mode, recorded
from ...core.backends import Backend
from ...core.cost import Cost, moved
from ...core.declaration import DENSE, LINEAR, ROWS, WEIGHTS, Declaration, Make, Part, Sizes, Tuned, declare
from ...core.explain import Explanation
from ...core.op import Op
from ...core.policy import bucket
from ...core.tensors import PLAIN, as_rows, check_read, check_tensor
from ...kernels.linear import lowbit_linear as triton
from ...weights.example import example_weight
from ...weights.formats import get_format
from ...weights.stand_in import fused
from ...weights.weight import LowBitWeight, WeightTensors, weight_tensors
from . import lowbit_linear_cpu as cpp
from . import lowbit_linear_cuda as cuda
from .batched import Place, batched, of_each

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> None:
    dtype, device, sizes = x.dtype, x.device, x.shape
    if dtype not in FLOATS or not sizes or x.is_neg():
        check_float(x, "x", sizes[-1] if sizes else 0)
    n = check_weight(weight, sizes[-1], device)
    if bias is not None:
        fits = bias.dtype is dtype and bias.shape == (n,) and bias.device == device
        if not fits or type(bias) not in PLAIN or bias.is_neg():
            check_tensor("bias", bias, (dtype,), (n,), device, "x")


def check_float(x: torch.Tensor, name: str, columns: int) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {' or '.join(map(str, FLOATS))}")
    if x.dim() == 0:
        raise ValueError(f"{name} has shape [], expected [..., features]")
    if x.shape[-1] != columns:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected the last dimension to be {columns}")
    check_read(name, x)


def check_weight(weight: WeightTensors, k: int, device: torch.device) -> int:
    """What native code relies on; out_features. The commonest weight, of one level of scales, takes a shorter
    way."""
    qweight, scales, zeros, scale_scales, scale_offset, format, group_size, offsets, scale_rows = weight
    sizes = qweight.shape
    if (
        scale_scales is None
        and scale_offset is None
        and zeros is None
        and offsets is None
        and scale_rows == 1
        and scales.shape == _scales_shape(format, group_size, k, sizes)
        and scales.dtype in FLOATS
        and scales.device == device
        and qweight.dtype is torch.uint8
        and qweight.device == device
    ):
        return sizes[0]
    given = (zeros is not None, scale_scales is not None, scale_offset is not None, offsets is not None)
    parts = _expected(format, group_size, scale_rows, k, sizes, given)
    for t, expected in zip(weight.tensors(), parts, strict=True):
        if expected is None:
            if t is not None:
                raise ValueError(f"scale_offset is given, which format {format!r} has no place for")
        elif t is None or t.dtype not in expected[1] or t.shape != expected[2] or t.device != device:
            check_tensor(expected[0], t, expected[1], expected[2], device, "x")
    return sizes[0]


@functools.lru_cache(maxsize=4096)
def _scales_shape(format: str, group_size: int, k: int, packed: torch.Size) -> tuple[int, ...] | None:
    """The shape of scales in floats; None for a format whose scales are none."""
    scales = _expected(format, group_size, 1, k, packed, (False,) * 4)[1]
    return scales[2] if scales is not None and scales[1] == FLOATS else None


@functools.lru_cache(maxsize=4096)
def _expected(
    format: str, group_size: int, scale_rows: int, k: int, packed: torch.Size, given: tuple[bool, ...]
) -> tuple[tuple[str, tuple[torch.dtype, ...], tuple[int, ...]] | None, ...]:
    """Name, dtypes and shape of each tensor of a weight, None for one that there is not; `given`: which of
    zeros, scale_scales, scale_offset and offsets there are."""
    fmt = get_format(format)
    if given[0] and given[3]:
        raise ValueError("zeros and offsets are given, expected one of them")
    if len(packed) != 2 or packed[1] * 8 != k * fmt.bits:
        raise ValueError(
            f"x has {k} features and qweight has shape {list(packed)}, expected in_features = "
            f"{packed[-1] * 8 // fmt.bits if packed else 0} at {fmt.bits} bits a code"
        )
    if group_size <= 0 or k % group_size:
        raise ValueError(f"group_size is {group_size}, expected a divisor of in_features {k}")
    nested = not fmt.tensor_scale and (given[1] or given[2])
    fmt = replace(
        fmt,
        group_size=group_size,
        symmetric=not (given[0] or given[3]),
        offset=given[3],
        scale_rows=scale_rows,
        nested=nested,
        scale_dtype=torch.float32 if nested else fmt.scale_dtype,
    )
    by_name = {expected[0]: expected for expected in LowBitWeight.expected(fmt, (packed[0], k))}
    names = ("qweight", "scales", "zeros", "scale_scales", "scale_offset", "offsets")
    return tuple(by_name.get(name) for name in names)


def _reference(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight.dequantize().to(x.dtype), bias)


def _fake(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _check_grad_x(grad: torch.Tensor, weight: WeightTensors) -> None:
    check_float(grad, "grad", weight.qweight.shape[0])
    check_weight(weight, weight.qweight.shape[-1] * 8 // get_format(weight.format).bits, grad.device)


def _reference_grad_x(grad: torch.Tensor, weight: WeightTensors) -> torch.Tensor:
    return grad @ weight.dequantize().to(grad.dtype)


def _fake_grad_x(grad: torch.Tensor, weight: WeightTensors) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _cost(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None = None) -> Cost:
    """Of either direction."""
    n, k = weight.shape
    rows = x.numel() // max(x.shape[-1], 1)
    out = rows * (n + k - x.shape[-1]) * x.element_size()
    return Cost(moved(x, weight, bias) + out, 2 * rows * n * k, x.dtype)


def _kind(x: torch.Tensor, weight: WeightTensors, bias: torch.Tensor | None) -> tuple[Any, ...]:
    n, k = weight.shape
    kind = bucket(x.numel() // max(k, 1)), n, k, weight.format, weight.group_size, x.dtype
    # version 0.1 has measured the others
    return kind if weight.beyond() is None else (*kind, weight.offsets is not None, weight.scale_rows)


_WEIGHT = "Tensor qweight, Tensor scales, Tensor? zeros, Tensor? scale_scales, Tensor? scale_offset"
_HOW = "str format, int group_size, Tensor? offsets=None, int scale_rows=1"

forward_op = Op(
    f"lowbit_linear(Tensor x, {_WEIGHT}, Tensor? bias, {_HOW}) -> Tensor",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run, cpp.direct),
        Backend("cuda", ("cuda",), cuda.supports, cuda.run, predicted=cuda.predicted),
        Backend("triton", ("cuda",), triton.supports, triton.run, predicted=triton.predicted),
    ),
    cost=_cost,
    kind=_kind,
    rows=True,
    flatten=lambda x, weight, bias: (x, *weight[:5], bias, *weight[5:]),
    unflatten=lambda x, *flat: (x, WeightTensors(*flat[:5], *flat[6:]), flat[5]),
)
lowbit_linear_grad_x = Op(
    f"lowbit_linear_grad_x(Tensor grad, {_WEIGHT}, {_HOW}) -> Tensor",
    _check_grad_x,
    _reference_grad_x,
    _fake_grad_x,
    (
        Backend("cpp", ("cpu",), cpp.supports_grad_x, cpp.run_grad_x),
        Backend(
            "triton", ("cuda",), triton.supports_grad_x, triton.run_grad_x, predicted=triton.predicted_grad_x
        ),
    ),
    cost=_cost,
    rows=True,
    flatten=lambda grad, weight: (grad, *weight),
    unflatten=lambda grad, *flat: (grad, WeightTensors(*flat)),
)


class _LowBitLinear(Function):
    """The weight, whose parts come last, is frozen: gradients flow to x and to bias, and the only tensors
    kept are the few-bit ones. Linear in x, so its backward is differentiable, by `_GradX`."""

    op = "lowbit_linear"

    @staticmethod
    def forward(
        x: torch.Tensor, bias: torch.Tensor | None, perm: torch.Tensor | None, *weight: Any
    ) -> torch.Tensor:
        return forward_op(x if perm is None else x.index_select(-1, perm), WeightTensors(*weight), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight = WeightTensors(*inputs[3:])
        tensors, ctx.how = (*weight.tensors(), inputs[2]), weight.how()
        ctx.save_for_backward(*tensors)
        if elsewhere():
            ctx.save_for_forward(*tensors)
            ctx.set_materialize_grads(False)
            ctx.shape = output.shape

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        *tensors, perm = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = weight_tensors(tensors, *ctx.how)
            grad_x = _grad_x(grad, weight)
            if perm is not None:
                grad_x = torch.empty_like(grad_x).index_copy_(-1, perm, grad_x)
        if ctx.needs_input_grad[1]:
            grad_bias = as_rows(grad).sum(0, dtype=torch.float32).to(grad.dtype)
        return grad_x, grad_bias, *_NONE

    @staticmethod
    def tangents(ctx: Any, *tangents: Any) -> torch.Tensor:
        x, bias, *weight = tangents
        if any(t is not None for t in weight):
            raise no_forward_mode("lowbit_linear of its weight")
        *tensors, perm = ctx.saved_tensors
        if x is None:
            return bias.expand(ctx.shape).contiguous()
        return apply_lowbit(x, weight_tensors(tensors, *ctx.how), perm, bias)


_NONE = (None,) * (1 + len(WeightTensors._fields))  # of perm and the weight


class _GradX(Function):
    """grad W, whose own gradient is the forward again."""

    op = "lowbit_linear"

    @staticmethod
    def forward(grad: torch.Tensor, *weight: Any) -> torch.Tensor:
        return lowbit_linear_grad_x(grad, WeightTensors(*weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight = WeightTensors(*inputs[1:])
        ctx.how = weight.how()
        ctx.save_for_backward(*weight.tensors())
        if elsewhere():
            ctx.save_for_forward(*weight.tensors())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight = weight_tensors(ctx.saved_tensors, *ctx.how)
        return apply_lowbit(grads[0], weight, None, None), *_NONE[1:]

    @staticmethod
    def tangents(ctx: Any, *tangents: Any) -> torch.Tensor:
        return _grad_x(tangents[0], weight_tensors(ctx.saved_tensors, *ctx.how))


def _grad_x(grad: torch.Tensor, weight: WeightTensors) -> torch.Tensor:
    if recorded(grad):
        return _GradX.call(grad, *weight)
    return lowbit_linear_grad_x(grad, weight)


def apply_lowbit(
    x: torch.Tensor, weight: WeightTensors, perm: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """`lowbit_linear` on the parts of a weight, as `LowBitWeight.op_args` gives them: what layers call."""
    if autocast.is_any_enabled() and x.dtype in FLOATS:  # as torch: integers and float64 are not cast
        dtype = autocast.dtype_of(x)
        if dtype is not None:
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if perm is not None:
        check_float(x, "x", perm.shape[0])
    if recorded(x, bias):
        return _LowBitLinear.call(x, bias, perm, *weight)
    return forward_op(x if perm is None else x.index_select(-1, perm), weight, bias)


def lowbit_linear(x: torch.Tensor, w: LowBitWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + b with W in few bits; the drop-in for `torch.nn.functional.linear`.

    Accumulates in float32. Deterministic: the same numbers from run to run. Under `torch.autocast` x and bias
    take the autocast dtype, as in `torch.nn.functional.linear`. Gradients flow to x and bias; W is frozen and
    is never written densely by the fused backends (QLoRA; Dettmers et al., 2023).

    Of a weight with leading dimensions (experts) it is `torch.matmul` of x and W^T, matrix by matrix: the
    leading dimensions of x and w broadcast, and each matrix has a bias of its own.

    Args:
        x: [..., in_features], float32, float16 or bfloat16, any strides; [..., rows, in_features] where w has
            leading dimensions.
        w: a `LowBitWeight` of shape (..., out_features, in_features), on x's device.
        bias: [..., out_features], w's shape but the last, of x's dtype and device, or None.

    Returns:
        [..., out_features], of x's dtype.

    Raises:
        TypeError: a dtype that is not listed, w not a LowBitWeight.
        ValueError: sizes that do not fit, tensors on two devices.
    """
    if not (isinstance(w, LowBitWeight) and isinstance(x, torch.Tensor)) or (
        bias is not None and type(bias) not in PLAIN and not isinstance(bias, torch.Tensor)
    ):
        _check_types(x, w, bias)
    if len(w.shape) != 2:
        return _batched(x, w, bias)
    return apply_lowbit(x, w.op_args, w.perm, bias)


def _batched(x: torch.Tensor, w: LowBitWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`lowbit_linear` of a weight with leading dimensions."""
    biases = of_each("bias", bias, w, 1)

    def call(x: torch.Tensor, place: Place, number: int) -> torch.Tensor:
        perm = None if w.perm is None else w.perm[place]
        return apply_lowbit(x, w.op_args.matrix(place), perm, biases[number])

    return batched(x, w, call)


def _functional_linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """`torch.nn.functional.linear` of a module that reads its layer's weight."""
    plain = isinstance(input, torch.Tensor) and isinstance(weight, LowBitWeight)
    if not plain or len(weight.shape) != 2 or not (bias is None or isinstance(bias, torch.Tensor)):
        return NotImplemented
    return lowbit_linear(input, weight, bias)


fused[torch.nn.functional.linear] = _functional_linear


def _check_types(x: object, w: object, bias: object) -> None:
    if not isinstance(w, LowBitWeight):
        raise TypeError(f"w is a {type(w).__name__}, expected a bitfuse.LowBitWeight: see bitfuse.quantize")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a tensor")
    if not (bias is None or isinstance(bias, torch.Tensor)):
        raise TypeError(f"bias is a {type(bias).__name__}, expected a tensor or None")


def _explain(x: torch.Tensor, w: LowBitWeight, bias: torch.Tensor | None = None) -> Explanation:
    _check_types(x, w, bias)
    if len(w.shape) != 2:  # each of its matrices: of the first, that is
        first = (0,) * (len(w.shape) - 2)
        x = x[(0,) * min(x.dim() - 2, len(first))] if x.dim() > 2 else x
        w, bias = w[first], None if bias is None else bias[first]
    return forward_op.explain(x, w.op_args, bias)


def _example(s: Sizes, make: Make) -> tuple[Any, ...]:
    if s.format == DENSE:
        raise ValueError("format is 'dense', which lowbit_linear does not take: that is torch's linear")
    return make(s.m, s.k), example_weight(s, make)


declare(
    Declaration(
        lowbit_linear,
        "x W^T, W in few bits",
        place=1,
        explain=_explain,
        uses=LINEAR,
        arguments=_example,
        parts=(
            Part(forward_op, "forward", {"cuda": "fp16, bf16; M ≤ 64"}),
            Part(lowbit_linear_grad_x, "gradient to x"),
        ),
        ops={"lowbit_linear_grad_x": lowbit_linear_grad_x},
        dense=False,
        bias=True,
        tuned=Tuned({"m": ROWS}, tiles=True),
        variants=WEIGHTS,
    )
)

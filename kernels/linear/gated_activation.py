"""gated_activation in Triton: act(gate) * up, and its gradients in one pass.

A program has Width elements of a row, contiguous tensors being one long row: each thread loads 16 bytes of
each input at a time, computes in float32 and stores as much. Bound by bytes: two tensors are read and one is
written, in the backward three and two; some 30 float32 instructions an element are half of what an H100 has
time for.

Every activation but relu is z * share(z) with a share between 0 and 1: the logistic function of z (silu) or
of 2u with u the argument of tanh (gelu_tanh), or the normal distribution function (gelu). The derivative is
share + z * the derivative of share.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ...core.device import Device, device_of
from ..core.launch import Plan, alignment_of, constexpr, jit, planned, refuse, tl

# the argument of tanh in gelu's tanh form is ROOT (z + CUBE z^3)
ROOT, CUBE = constexpr(math.sqrt(2 / math.pi)), constexpr(0.044715)


@jit
def _logistic(v, Precise: tl.constexpr):
    """The logistic function of v, and one less it, neither from the other: 1 - share has no digits left when
    v is large."""
    less = tl.exp(-tl.abs(v))
    more = tl.math.div_rn(1.0, 1.0 + less) if Precise else 1.0 / (1.0 + less)
    less *= more
    return tl.where(v < 0.0, less, more), tl.where(v < 0.0, more, less)


@jit
def _normal(z):
    """The distribution function of a normal number, to float32's last places; relatively so below -1.4."""
    x = tl.abs(z) * 0.7071067811865476
    # erf(x) / x in x^2, up to 1: relative error 2**-29.6; log2 erfc(x) from there to 4: 2**-35 of erfc.
    # Beyond it falls faster than erfc does.
    s = x * x
    p = 7.858227763790637e-05
    p = p * s - 0.0008011625614017248
    p = p * s + 0.005188508424907923
    p = p * s - 0.02685392275452614
    p = p * s + 0.11283588409423828
    p = p * s - 0.3761262595653534
    p = p * s + 1.1283791065216064
    q = -3.1287512683775276e-05
    q = q * x + 0.0006367138121277094
    q = q * x - 0.0060659004375338554
    q = q * x + 0.03636782616376877
    q = q * x - 0.1564149409532547
    q = q * x - 0.9135432243347168
    q = q * x - 1.6296372413635254
    q = q * x + 0.0002712847199290991
    tail = tl.where(x < 1.0, 0.5 - 0.5 * (x * p), 0.5 * tl.exp2(q))
    return tl.where(z < 0.0, tail, 1.0 - tail)


@jit
def value_and_slope(z, Activation: tl.constexpr, Precise: tl.constexpr):
    """The activation of float32 z, and its derivative, which is 0 or 1 far from zero: there the derivative of
    share is 0, and is multiplied with a z that leaves it so, be it infinite."""
    near = tl.minimum(tl.maximum(z, -128.0), 128.0)
    if Activation == "silu":
        share, rest = _logistic(z, Precise)
        return z * share, share + near * (share * rest)
    elif Activation == "gelu_tanh":
        share, rest = _logistic(2.0 * ROOT * (z + CUBE * z * z * z), Precise)
        return z * share, share + near * (share * rest * (2.0 * ROOT * (1.0 + 3.0 * CUBE * near * near)))
    elif Activation == "gelu":
        share = _normal(z)
        return z * share, share + near * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    else:
        return tl.where(z <= 0.0, 0.0, z), tl.where(z <= 0.0, 0.0, 1.0)


class Row(NamedTuple):
    """How a program works; constants.

    Attributes:
        Activation: which.
        Precise: whether divisions are rounded as float32's are.
        Align: by what N and the strides are divided on their way to it.
        Width: elements of a program.
    """

    Activation: str
    Precise: bool
    Align: int
    Width: int


_INTEGERS = ["N", "gate_stride", "up_stride", "grad_stride"]


@jit
def _place(N, Width: tl.constexpr):
    """Row and columns of this program."""
    tiles = tl.cdiv(N, Width)
    row = tl.program_id(0) // tiles
    return row.to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64) * Width + tl.arange(0, Width)


@jit(do_not_specialize=_INTEGERS)
def _forward_kernel(
    gate, up, out, N, gate_stride, up_stride, Fixed
):  # fmt: skip
    """out, contiguous, of gate and up [.., N] in rows that are a stride apart."""
    N = N.to(tl.int64) * Fixed.Align
    row, n = _place(N, Fixed.Width)
    z = tl.load(gate + row * gate_stride * Fixed.Align + n, mask=n < N, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride * Fixed.Align + n, mask=n < N, other=0.0).to(tl.float32)
    value, _ = value_and_slope(z, Fixed.Activation, Fixed.Precise)
    tl.store(out + row * N + n, (value * u).to(out.dtype.element_ty), mask=n < N)


@jit(do_not_specialize=_INTEGERS)
def _backward_kernel(
    grad, gate, up, d_gate, d_up, N, grad_stride, gate_stride, up_stride, Fixed
):  # fmt: skip
    """d_gate and d_up, contiguous, of grad, gate and up [.., N] in rows that are a stride apart."""
    N = N.to(tl.int64) * Fixed.Align
    row, n = _place(N, Fixed.Width)
    g = tl.load(grad + row * grad_stride * Fixed.Align + n, mask=n < N, other=0.0).to(tl.float32)
    z = tl.load(gate + row * gate_stride * Fixed.Align + n, mask=n < N, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride * Fixed.Align + n, mask=n < N, other=0.0).to(tl.float32)
    value, slope = value_and_slope(z, Fixed.Activation, Fixed.Precise)
    dtype = d_gate.dtype.element_ty
    tl.store(d_gate + row * N + n, (g * u * slope).to(dtype), mask=n < N)
    tl.store(d_up + row * N + n, (g * value).to(dtype), mask=n < N)


WIDTH = 1024


@functools.lru_cache(maxsize=1024)
def _plan(
    device: Device, rows: int, n: int, strides: tuple[int, ...], dtype: torch.dtype, activation: str
) -> Plan:
    backward = len(strides) == 3
    align = math.gcd(n, *strides, 8)
    return planned(
        device,
        _backward_kernel if backward else _forward_kernel,
        (rows * -(-n // WIDTH), 1, 1),
        (n // align, *(s // align for s in strides)),
        (Row(activation, dtype == torch.float32, align, WIDTH),),
        dtype,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _launch(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], activation: str) -> None:
    """Inputs of one shape; outputs contiguous."""
    like = inputs[0]
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            return _launch(inputs, outputs, activation)
    if like.numel() == 0:
        return None
    if all(t.is_contiguous() for t in inputs) and like.numel() < 2**31:
        rows, n, strides = 1, like.numel(), (0,) * len(inputs)
    else:
        inputs = tuple(_matrix(t) for t in inputs)
        rows, n = inputs[0].shape
        strides = tuple(t.stride(0) if rows > 1 else 0 for t in inputs)
    plan = _plan(device_of(like.device), rows, n, strides, like.dtype, activation)
    plan.launch((*inputs, *outputs), alignment_of(*inputs))


def _matrix(t: torch.Tensor) -> torch.Tensor:
    """t as rows that one stride addresses, such as half of a joint projection; a copy where it has none."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def supports(gate: torch.Tensor, up: torch.Tensor, activation: str) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if (reason := refuse(gate.device)) is not None:
        return reason
    n = gate.shape[-1] if gate.dim() else 1
    if gate.numel() // max(n, 1) * -(-n // WIDTH) >= 2**31:
        return f"{gate.numel()} elements are more than 2**31 tiles"
    return None


def supports_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> str | None:
    """None when `run_backward` can serve the call, else the reason."""
    return supports(gate, up, activation)


def run(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, of gate's dtype and shape."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch((gate, up), (out,), activation)
    return out


def run_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> list[torch.Tensor]:
    """The gradients of gate and of up."""
    outs = tuple(torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _launch((grad, gate, up), outs, activation)
    return list(outs)

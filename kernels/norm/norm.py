"""rms_norm and layer_norm in Triton, with a residual added before, and their gradients.

A program has R rows of W columns in registers, 16 elements a thread: 2,048 of them in 4 warps where rows
are short, one row of up to 8,192 in 16 warps where they are long. So each tensor is read once and written
once, and what bounds it is that: an element of 16 bits is 4 bytes forward, 8 with a residual, 6 and 8
backward; the sums over a row are some 4 instructions an element and an exchange between warps. Longer rows
are gone through in pieces, once for the sums (twice where the mean is taken off first) and once for the
result: from L2, but for the first time.

Gradients of weight and bias are sums over rows. Where they are asked for a program takes every P-th tile of
rows, P twice the multiprocessors, adds them up in registers (long rows: in its own row of memory), and
writes [P, columns] in float32, which a second kernel adds up in their order: no atomics, the same bits each
time. Multiplications are not fused with additions, so that dx has the same bits whoever else is asked for.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ...core.device import Device, device_of
from ..core.launch import (
    Plan,
    alignment_of,
    as_matrix,
    contiguous,
    dtype_of,
    jit,
    planned,
    refuse,
    tl,
)


class Rows(NamedTuple):
    """How a program works; constants.

    Attributes:
        Centered: layer_norm.
        Whole: whether W columns are a row.
        Learns: whether gradients of the weight, and of a bias, are asked for.
        Biased: whether there is a bias.
        Align: by what columns and strides are divided on their way to it.
        R, W: rows, and columns, of a tile.
    """

    Centered: bool
    Whole: bool
    Learns: bool
    Biased: bool
    Align: int
    R: int
    W: int


_INTEGERS = ["rows", "N", "programs", "x_stride", "r_stride", "grad_stride"]


@jit
def _tile(place, r, n, stride, rows, N):
    """Rows r, columns n of a tensor, in float32, 0 outside."""
    mask = (r < rows)[:, None] & (n < N)[None, :]
    return tl.load(place + r[:, None] * stride + n[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _row(place, n, N):
    """Columns n of a weight or a bias, in float32."""
    return tl.load(place + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@jit
def _sum(x, residual, r, n, rows, N, x_stride, r_stride):
    """s in float32, rounded to x's dtype where it is a sum."""
    s = _tile(x, r, n, x_stride, rows, N)
    if residual is not None:
        s += _tile(residual, r, n, r_stride, rows, N)
        s = s.to(x.dtype.element_ty).to(tl.float32)
    return s


@jit
def _less(s, mean, n, N, Centered: tl.constexpr):
    """s less its mean, 0 outside of the row."""
    if Centered:
        return tl.where((n < N)[None, :], s - mean[:, None], 0.0)
    else:
        return s


@jit
def _mean(sums, N):
    return tl.math.div_rn(sums, N.to(tl.float32))


@jit
def _scale(squares, N, eps):
    return tl.math.div_rn(1.0, tl.sqrt_rn(_mean(squares, N) + eps))


@jit(do_not_specialize=_INTEGERS)
def _forward_kernel(
    x, residual, weight, bias, out, total, eps, offset, rows, N, x_stride, r_stride, Fixed
):  # fmt: skip
    """out and total, which is s, dense [rows, N]; total is None where there is no residual."""
    N = N.to(tl.int64) * Fixed.Align
    x_stride = x_stride.to(tl.int64) * Fixed.Align
    r_stride = r_stride.to(tl.int64) * Fixed.Align
    r = tl.program_id(0).to(tl.int64) * Fixed.R + tl.arange(0, Fixed.R)
    n = tl.arange(0, Fixed.W)
    Type: tl.constexpr = x.dtype.element_ty
    mean = tl.zeros((Fixed.R,), tl.float32)
    if Fixed.Whole:
        s = _sum(x, residual, r, n, rows, N, x_stride, r_stride)
        mask = (r < rows)[:, None] & (n < N)[None, :]
        place = r[:, None] * N + n[None, :]
        if residual is not None:
            tl.store(total + place, s.to(Type), mask=mask)
        if Fixed.Centered:
            mean = _mean(tl.sum(s, 1), N)
        z = _less(s, mean, n, N, Fixed.Centered)
        z *= _scale(tl.sum(z * z, 1), N, eps)[:, None]
        y = z * (_row(weight, n, N) + offset)
        if Fixed.Biased:
            y += _row(bias, n, N)
        tl.store(out + place, y.to(Type), mask=mask)
    else:
        if Fixed.Centered:
            sums = tl.zeros((Fixed.R, Fixed.W), tl.float32)
            for at in range(0, N, Fixed.W):
                sums += _sum(x, residual, r, at + n, rows, N, x_stride, r_stride)
            mean = _mean(tl.sum(sums, 1), N)
        squares = tl.zeros((Fixed.R, Fixed.W), tl.float32)
        for at in range(0, N, Fixed.W):
            s = _sum(x, residual, r, at + n, rows, N, x_stride, r_stride)
            z = _less(s, mean, at + n, N, Fixed.Centered)
            squares += z * z
        scale = _scale(tl.sum(squares, 1), N, eps)
        for at in range(0, N, Fixed.W):
            s = _sum(x, residual, r, at + n, rows, N, x_stride, r_stride)
            mask = (r < rows)[:, None] & (at + n < N)[None, :]
            place = r[:, None] * N + (at + n)[None, :]
            if residual is not None:
                tl.store(total + place, s.to(Type), mask=mask)
            z = _less(s, mean, at + n, N, Fixed.Centered) * scale[:, None]
            y = z * (_row(weight, at + n, N) + offset)
            if Fixed.Biased:
                y += _row(bias, at + n, N)
            tl.store(out + place, y.to(Type), mask=mask)


@jit
def _along(z, g, scale, mean_g, mean_gz, Centered: tl.constexpr):
    """The gradient of s without what comes from above; z is normalised."""
    if Centered:
        g -= mean_g[:, None]
    return (g - z * (scale * mean_gz)[:, None]) * scale[:, None]


@jit(do_not_specialize=_INTEGERS)
def _backward_kernel(
    grad, above, x, weight, dx, parts, eps, offset, rows, N, programs, x_stride, grad_stride, r_stride, Fixed
):  # fmt: skip
    """dx dense [rows, N]; above: the gradient of s, in rows r_stride apart, or None; parts: float32 [1 or 2,
    programs, N], of weight and bias."""
    N = N.to(tl.int64) * Fixed.Align
    x_stride = x_stride.to(tl.int64) * Fixed.Align
    grad_stride = grad_stride.to(tl.int64) * Fixed.Align
    r_stride = r_stride.to(tl.int64) * Fixed.Align
    n = tl.arange(0, Fixed.W)
    first = tl.program_id(0).to(tl.int64)
    Type: tl.constexpr = x.dtype.element_ty
    d_weight = tl.zeros((Fixed.R, Fixed.W), tl.float32)
    d_bias = tl.zeros((Fixed.R, Fixed.W), tl.float32)
    for tile in range(first, tl.cdiv(rows, Fixed.R), programs):  # in 64 bits, as first is
        r = tile * Fixed.R + tl.arange(0, Fixed.R)
        mean = tl.zeros((Fixed.R,), tl.float32)
        mean_g = tl.zeros((Fixed.R,), tl.float32)
        if Fixed.Whole:
            z = _tile(x, r, n, x_stride, rows, N)
            dy = _tile(grad, r, n, grad_stride, rows, N)
            g = dy * (_row(weight, n, N) + offset)
            if Fixed.Centered:
                mean = _mean(tl.sum(z, 1), N)
                mean_g = _mean(tl.sum(g, 1), N)
            z = _less(z, mean, n, N, Fixed.Centered)
            scale = _scale(tl.sum(z * z, 1), N, eps)
            mean_gz = _mean(tl.sum(g * z, 1), N)
            z *= scale[:, None]
            d = _along(z, g, scale, mean_g, mean_gz, Fixed.Centered)
            if above is not None:
                d += _tile(above, r, n, r_stride, rows, N)
            mask = (r < rows)[:, None] & (n < N)[None, :]
            tl.store(dx + r[:, None] * N + n[None, :], d.to(Type), mask=mask)
            if Fixed.Learns:
                d_weight += dy * z
                if Fixed.Biased:
                    d_bias += dy
        else:
            if Fixed.Centered:
                sums = tl.zeros((Fixed.R, Fixed.W), tl.float32)
                for at in range(0, N, Fixed.W):
                    sums += _tile(x, r, at + n, x_stride, rows, N)
                mean = _mean(tl.sum(sums, 1), N)
            squares = tl.zeros((Fixed.R, Fixed.W), tl.float32)
            gs = tl.zeros((Fixed.R, Fixed.W), tl.float32)
            gzs = tl.zeros((Fixed.R, Fixed.W), tl.float32)
            for at in range(0, N, Fixed.W):
                z = _tile(x, r, at + n, x_stride, rows, N)
                z = _less(z, mean, at + n, N, Fixed.Centered)
                g = _tile(grad, r, at + n, grad_stride, rows, N) * (_row(weight, at + n, N) + offset)
                squares += z * z
                gzs += g * z
                if Fixed.Centered:
                    gs += g
            scale = _scale(tl.sum(squares, 1), N, eps)
            mean_g = _mean(tl.sum(gs, 1), N)
            mean_gz = _mean(tl.sum(gzs, 1), N)
            for at in range(0, N, Fixed.W):
                z = _tile(x, r, at + n, x_stride, rows, N)
                z = _less(z, mean, at + n, N, Fixed.Centered) * scale[:, None]
                dy = _tile(grad, r, at + n, grad_stride, rows, N)
                g = dy * (_row(weight, at + n, N) + offset)
                d = _along(z, g, scale, mean_g, mean_gz, Fixed.Centered)
                if above is not None:
                    d += _tile(above, r, at + n, r_stride, rows, N)
                mask = (r < rows)[:, None] & (at + n < N)[None, :]
                tl.store(dx + r[:, None] * N + (at + n)[None, :], d.to(Type), mask=mask)
                if Fixed.Learns:
                    here = parts + first * N + at + n
                    _accumulate(here, tl.sum(dy * z, 0), at + n < N, tile != first)
                    if Fixed.Biased:
                        _accumulate(here + programs * N, tl.sum(dy, 0), at + n < N, tile != first)
    if Fixed.Learns and Fixed.Whole:
        here = parts + first * N + n
        tl.store(here, tl.sum(d_weight, 0), mask=n < N)
        if Fixed.Biased:
            tl.store(here + programs * N, tl.sum(d_bias, 0), mask=n < N)


@jit
def _accumulate(place, values, inside, again):
    """Add to a program's own sums, which the first time are not there yet."""
    tl.debug_barrier()
    values += tl.load(place, mask=inside & again, other=0.0)
    tl.store(place, values, mask=inside)


class Columns(NamedTuple):
    """Parts at a time, and columns, of a program that adds up; constants."""

    P: int
    W: int


@jit(do_not_specialize=["programs", "N"])
def _columns_kernel(parts, out, programs, N, Fixed):
    """out [N] of float32 parts [programs, N], in their order."""
    n = tl.program_id(0).to(tl.int64) * Fixed.W + tl.arange(0, Fixed.W)
    p = tl.arange(0, Fixed.P)
    N = N.to(tl.int64)
    sums = tl.zeros((Fixed.P, Fixed.W), tl.float32)
    for at in range(0, programs, Fixed.P):
        mask = (at + p < programs)[:, None] & (n < N)[None, :]
        sums += tl.load(parts + (at + p).to(tl.int64)[:, None] * N + n[None, :], mask=mask, other=0.0)
    tl.store(out + n, tl.sum(sums, 0).to(out.dtype.element_ty), mask=n < N)


TILE, LONGEST, PIECE = 2048, 8192, 4096
COLUMNS = Columns(16, 64)


def _rows(n: int, centered: bool, learns: bool, biased: bool, align: int) -> tuple[Rows, int]:
    """The tile of a row of n, and its warps: 16 elements a thread."""
    whole = n <= LONGEST
    width = max(16, 1 << (n - 1).bit_length()) if whole else PIECE
    rows = max(1, TILE // width)
    return Rows(centered, whole, learns, biased, align, rows, width), max(4, rows * width // 512)


@functools.lru_cache(maxsize=1024)
def _forward_plan(
    device: Device,
    rows: int,
    n: int,
    strides: tuple[int, int],
    dtypes: tuple[torch.dtype | None, ...],
    centered: bool,
    kind: tuple[bool, ...],
) -> Plan:
    align = math.gcd(n, *strides, 8)
    fixed, warps = _rows(n, centered, False, dtypes[2] is not None, align)
    return planned(
        device,
        _forward_kernel,
        (-(-rows // fixed.R), 1, 1),
        (rows, n // align, *(s // align for s in strides)),
        (fixed,),
        (dtypes, kind),
        num_warps=warps,
        enable_fp_fusion=False,
    )


@functools.lru_cache(maxsize=1024)
def _backward_plan(
    device: Device,
    rows: int,
    n: int,
    strides: tuple[int, int, int],
    dtypes: tuple[torch.dtype | None, ...],
    centered: bool,
    learns: bool,
    biased: bool,
    kind: tuple[bool, ...],
) -> tuple[Plan, int]:
    """And the number of programs."""
    align = math.gcd(n, *strides, 8)
    fixed, warps = _rows(n, centered, learns, biased, align)
    tiles = -(-rows // fixed.R)
    programs = min(tiles, 2 * device.multiprocessors) if learns else tiles
    plan = planned(
        device,
        _backward_kernel,
        (programs, 1, 1),
        (rows, n // align, programs, *(s // align for s in strides)),
        (fixed,),
        (dtypes, kind),
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return plan, programs


@functools.lru_cache(maxsize=1024)
def _columns_plan(device: Device, programs: int, n: int, dtype: torch.dtype) -> Plan:
    grid = (-(-n // COLUMNS.W), 1, 1)
    return planned(device, _columns_kernel, grid, (programs, n), (COLUMNS,), dtype, num_warps=4)


def _stride(t: torch.Tensor | None) -> int:
    return 0 if t is None or t.shape[0] <= 1 else t.stride(0)


def _wide(*numbers: int) -> tuple[bool, ...]:
    """Integers that Triton passes in 64 bits."""
    return tuple(n >= 2**31 for n in numbers)


def supports(x: torch.Tensor, *arguments: object) -> str | None:
    """None when a forward can be served, else the reason."""
    if (reason := refuse(x.device)) is not None:
        return reason
    rows = x.numel() // max(x.shape[-1], 1)
    return f"{rows} rows are more than 2**31 tiles" if rows >= 2**31 else None


def supports_backward(grad: torch.Tensor, *arguments: object) -> str | None:
    """None when gradients can be served, else the reason."""
    return supports(grad)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
) -> list[torch.Tensor]:
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _forward(x, weight, bias, residual, eps, offset, centered)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        x, weight, bias = as_matrix(x), weight.contiguous(), contiguous(bias)
        residual = None if residual is None else as_matrix(residual)
        strides = _stride(x), _stride(residual)
        dtypes = x.dtype, weight.dtype, dtype_of(bias), dtype_of(residual)
        rows, n = x.shape
        plan = _forward_plan(
            device_of(x.device), rows, n, strides, dtypes, centered, _wide(rows, n, *strides)
        )
        tensors = x, residual, weight, bias, out, total
        plan.launch((*tensors, float(eps), float(offset)), alignment_of(*tensors))
    return [out] if total is None else [out, total]


def _backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    learns: bool,
    centered: bool,
) -> list[torch.Tensor]:
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _backward(grad, grad_sum, x, weight, bias, eps, offset, learns, centered)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    asked = [weight] if bias is None else [weight, bias]
    learnt = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in asked] if learns else []
    if x.numel() == 0:
        return [dx, *(t.zero_() for t in learnt)]
    x, grad, weight = as_matrix(x), as_matrix(grad), weight.contiguous()
    above = None if grad_sum is None else as_matrix(grad_sum)
    strides = _stride(x), _stride(grad), _stride(above)
    rows, n = x.shape
    dtypes = x.dtype, weight.dtype, dtype_of(above)
    device = device_of(x.device)
    plan, programs = _backward_plan(
        device, rows, n, strides, dtypes, centered, learns, bias is not None, _wide(rows, n, *strides)
    )
    parts = torch.empty(len(learnt), programs, n, dtype=torch.float32, device=x.device) if learns else None
    tensors = grad, above, x, weight, dx, parts
    plan.launch((*tensors, float(eps), float(offset)), alignment_of(*tensors))
    for i, t in enumerate(learnt):
        assert parts is not None
        pair = parts[i], t
        _columns_plan(device, programs, n, t.dtype).launch(pair, alignment_of(*pair))
    return [dx, *learnt]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float, offset: float
) -> list[torch.Tensor]:
    """y, and x + residual where there is one. The arguments have passed the op's check and `supports`."""
    return _forward(x, weight, None, residual, eps, offset, False)


def rms_norm_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    learns: bool,
) -> list[torch.Tensor]:
    """The gradient of x, and where it learns of the weight."""
    return _backward(grad, grad_sum, x, weight, None, eps, offset, learns, False)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> list[torch.Tensor]:
    """y, and x + residual where there is one. The arguments have passed the op's check and `supports`."""
    return _forward(x, weight, bias, residual, eps, 0.0, True)


def layer_norm_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    learns: bool,
) -> list[torch.Tensor]:
    """The gradient of x, and where they learn of the weight and of the bias."""
    return _backward(grad, grad_sum, x, weight, bias, eps, 0.0, learns, True)

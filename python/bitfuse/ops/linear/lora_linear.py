"""lora_linear: y = x W^T + b + s drop(x) A^T B^T with a frozen W, in few bits or dense.

The op takes several projections of one x at a time (q, k and v; gate and up): one pass over x makes all their
h = drop(x) A^T, and one gradient to x comes back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...core.autograd import Function, materialized, once, recorded, recording, refuse_intermediate
from ...core.backends import Backend
from ...core.cost import Cost, moved
from ...core.declaration import LINEAR, ROWS, WEIGHTS, Declaration, Part, Tuned, declare
from ...core.dropout import keep, new_seed
from ...core.explain import Explanation
from ...core.limits import MAX_RANK
from ...core.op import Op
from ...core.policy import bucket
from ...core.tensors import PLAIN, as_rows, check_tensor
from ...kernels.linear import lora_linear as triton
from ...weights.example import example_weight
from ...weights.weight import TENSORS, LowBitWeight, WeightTensors, weight_tensors
from . import lora_linear_cpu as cpp
from . import lora_linear_cuda as cuda
from .batched import Place, batched, check_matrix, of_each
from .lora_args import LoraArgs
from .lowbit_linear import FLOATS, check_float, check_weight

# the op


def _check(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> None:
    sizes = x.shape
    if x.dtype not in FLOATS or not sizes or x.is_neg():
        check_float(x, "x", sizes[-1] if sizes else 0)
    for p in projections:
        n = _check_projection(p, sizes[-1], x, dropout_p)
        _check_out(p, n, x)


def _check_out(p: LoraArgs, n: int, x: torch.Tensor) -> None:
    """What is added to and multiplied with the outputs."""
    if p.bias is not None:
        check_tensor("bias", p.bias, (x.dtype,), (n,), x.device)
    if p.out_scale is not None:
        check_tensor("out_scale", p.out_scale, (torch.float32,), (n,), x.device)


def _check_projection(p: LoraArgs, k: int, like: torch.Tensor, dropout_p: float) -> int:
    """What both directions rely on; out_features. `like` has the dtype and the device of activations."""
    weight, device = p.weight, like.device
    if isinstance(weight, WeightTensors):
        n = check_weight(weight, k, device)
    else:
        n = weight.shape[0] if weight.dim() == 2 else 0
        check_tensor("w", weight, (like.dtype,), (n, k), device)
    rank = p.lora_A.shape[0] if p.lora_A.dim() == 2 else 0
    if rank > MAX_RANK:
        raise ValueError(f"lora_A has shape {list(p.lora_A.shape)}, expected a rank of at most {MAX_RANK}")
    a, b = p.lora_A, p.lora_B
    if (
        a.dtype not in FLOATS
        or a.shape != (rank, k)
        or a.device != device
        or type(a) not in PLAIN
        or a.is_neg()
    ):
        check_tensor("lora_A", a, FLOATS, (rank, k), device)
    if (
        b.dtype not in FLOATS
        or b.shape != (n, rank)
        or b.device != device
        or type(b) not in PLAIN
        or b.is_neg()
    ):
        check_tensor("lora_B", b, FLOATS, (n, rank), device)
    if p.scale_by is not None:
        check_tensor("scaling", p.scale_by, (torch.float32,), (), device)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0 <= dropout_p < 1")
    if dropout_p and p.seed is None:
        raise ValueError(f"seed is None, expected one for dropout_p = {dropout_p}")
    if p.seed is not None:
        check_tensor("seed", p.seed, (torch.int64,), (), device)
    return n


def _dense(p: LoraArgs, dtype: torch.dtype) -> torch.Tensor:
    return p.weight.dequantize().to(dtype) if isinstance(p.weight, WeightTensors) else p.weight


def _scaled(t: torch.Tensor, p: LoraArgs) -> torch.Tensor:
    return t * p.scaling if p.scale_by is None else t * (p.scaling * p.scale_by)


def _dropped(x: torch.Tensor, p: LoraArgs, dropout_p: float) -> torch.Tensor:
    """x [rows, columns] with some elements 0 and the others over 1 - dropout_p."""
    if not dropout_p:
        return x
    assert p.seed is not None
    return torch.where(keep(p.seed, x.shape[0], x.shape[1], dropout_p), x / (1 - dropout_p), 0)


def _reference(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> list[torch.Tensor]:
    """The outputs [..., N], then every h = drop(x) A^T, float32 [rows, r].

    The order of operations is PEFT's, whose numbers these are, bit for bit, in float32.
    """
    linear = torch.nn.functional.linear
    ys, hs = [], []
    for p in projections:
        y = linear(x, _dense(p, x.dtype), p.bias if p.out_scale is None else None)
        h = linear(_dropped(as_rows(x).to(p.lora_A.dtype), p, dropout_p), p.lora_A)
        if p.shape[2]:
            y = y + _scaled(linear(h.to(p.lora_B.dtype), p.lora_B), p).view(y.shape)
        if p.out_scale is not None:
            y = y * p.out_scale if p.bias is None else y * p.out_scale + p.bias
        ys.append(y.to(x.dtype))
        hs.append(h.float())
    return ys + hs


def _fake(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> list[torch.Tensor]:
    rows = math.prod(x.shape[:-1])
    ys = [x.new_empty(*x.shape[:-1], p.lora_B.shape[0]) for p in projections]
    return ys + [x.new_empty(rows, p.lora_A.shape[0], dtype=torch.float32) for p in projections]


def _cost(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> Cost:
    rows = math.prod(x.shape[:-1])
    shapes = [p.shape for p in projections]
    out = sum(n * x.element_size() + r * 4 for n, _, r in shapes) * rows
    return Cost(
        moved(x, projections) + out, 2 * rows * sum(n * k + r * (n + k) for n, k, r in shapes), x.dtype
    )


def _kind(x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float) -> tuple[Any, ...]:
    first = projections[0]
    n, k, rank = first.shape
    format = first.weight.format if isinstance(first.weight, WeightTensors) else _DENSE
    return bucket(x.numel() // max(k, 1)), n, k, format, rank, len(projections), x.dtype


# no lists of what may be missing, of bool or of str: torch.jit.trace knows none
_PROJECTIONS = (
    "Tensor[] tensors, int[] given, str formats, int[] group_sizes, int[] scale_rows, float[] scaling"
)
_DENSE = "dense"  # the name of no format
# of a projection in `given`: its weight's, lora_A, lora_B, scale_by, bias, out_scale, seed
_SLOTS = TENSORS + 6


def _flatten(projections: tuple[LoraArgs, ...]) -> tuple[Any, ...]:
    slots: list[torch.Tensor | None] = []
    hows: list[tuple[str, int, int]] = []
    for p in projections:
        if isinstance(p.weight, WeightTensors):
            slots += p.weight.tensors()
            hows.append(p.weight.how())
        else:
            slots += [p.weight, *[None] * (TENSORS - 1)]
            hows.append((_DENSE, 0, 1))
        slots += [p.lora_A, p.lora_B, p.scale_by, p.bias, p.out_scale, p.seed]
    given = [int(t is not None) for t in slots]
    scaling = [p.scaling for p in projections]
    tensors = [t for t in slots if t is not None]
    formats = "\n".join([how[0] for how in hows])
    return tensors, given, formats, [how[1] for how in hows], [how[2] for how in hows], scaling


def _unflatten(
    tensors: Any, given: Any, formats: str, group_sizes: Any, scale_rows: Any, scaling: Any
) -> tuple[LoraArgs, ...]:
    left = iter(tensors)
    projections = []
    hows = zip(formats.split("\n"), group_sizes, scale_rows, strict=True)
    for i, (how, s) in enumerate(zip(hows, scaling, strict=True)):
        slots: list[Any] = [next(left) if there else None for there in given[_SLOTS * i : _SLOTS * (i + 1)]]
        weight = slots[0] if how[0] == _DENSE else weight_tensors(slots[:TENSORS], *how)
        lora_A, lora_B, *others = slots[TENSORS:]
        projections.append(LoraArgs(weight, lora_A, lora_B, s, *others))
    return tuple(projections)


lora_linear_op = Op(
    f"lora_linear(Tensor x, {_PROJECTIONS}, float dropout_p) -> Tensor[]",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run, cpp.direct),
        Backend("cuda", ("cuda",), cuda.supports, cuda.run, predicted=cuda.predicted),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
    cost=_cost,
    kind=_kind,
    flatten=lambda x, projections, dropout_p: (x, *_flatten(projections), dropout_p),
    unflatten=lambda x, *flat: (x, _unflatten(*flat[:-1]), flat[-1]),
)


# its gradients


@dataclass(frozen=True)
class Wanted:
    """Which gradients to compute: of x, and of each projection's lora_A and lora_B."""

    x: bool
    lora_A: tuple[bool, ...]
    lora_B: tuple[bool, ...]


Hs = tuple["torch.Tensor | None", ...]


def _check_backward(
    grads: tuple[torch.Tensor, ...],
    x: torch.Tensor | None,
    projections: tuple[LoraArgs, ...],
    hs: Hs,
    dropout_p: float,
    wanted: Wanted,
) -> None:
    grad = grads[0]
    for g, p, h, a, b in zip(grads, projections, hs, wanted.lora_A, wanted.lora_B, strict=True):
        n, k, rank = p.shape
        check_float(g, "grad", n)
        _check_projection(p, k, grad, dropout_p)
        if g.shape[:-1] != grad.shape[:-1] or g.dtype != grad.dtype or g.device != grad.device:
            check_tensor("grad", g, (grad.dtype,), (*grad.shape[:-1], n), grad.device)
        if a:
            check_tensor("x", x, (grad.dtype,), (*grad.shape[:-1], k), grad.device)
        if b:
            check_tensor("h", h, (torch.float32,), (math.prod(grad.shape[:-1]), rank), grad.device)


def _reference_backward(
    grads: tuple[torch.Tensor, ...],
    x: torch.Tensor | None,
    projections: tuple[LoraArgs, ...],
    hs: Hs,
    dropout_p: float,
    wanted: Wanted,
) -> list[torch.Tensor]:
    """The gradient of x, then of each projection lora_A's and lora_B's; an empty tensor for one not wanted.

    Rank first: GB = s dY B; dX = dY W + GB A; dA = GB^T x; dB = s dY^T h.
    """
    dtype = grads[0].dtype
    grad_x = None
    found = []
    for grad, p, h, a, b in zip(grads, projections, hs, wanted.lora_A, wanted.lora_B, strict=True):
        _, k, rank = p.shape
        y = as_rows(grad)
        scaled = _scaled(y.to(torch.promote_types(p.lora_A.dtype, p.lora_B.dtype)), p)
        gb = (scaled.to(p.lora_B.dtype) @ p.lora_B).to(p.lora_A.dtype)
        if wanted.x:
            through = y @ _dense(p, dtype)
            if rank:
                through = through + _dropped(gb @ p.lora_A, p, dropout_p).to(dtype)
            grad_x = through if grad_x is None else grad_x + through
        grad_a, grad_b = (y.new_empty(0, dtype=t.dtype) for t in (p.lora_A, p.lora_B))
        if a:
            assert x is not None
            grad_a = gb.t() @ _dropped(as_rows(x).to(p.lora_A.dtype), p, dropout_p)
        if b:
            assert h is not None
            grad_b = scaled.t().to(p.lora_B.dtype) @ h.to(p.lora_B.dtype)
        found += [grad_a, grad_b]
    first = grads[0]
    return [first.new_empty(0) if grad_x is None else grad_x.view(*first.shape[:-1], k), *found]


def _fake_backward(
    grads: tuple[torch.Tensor, ...],
    x: torch.Tensor | None,
    projections: tuple[LoraArgs, ...],
    hs: Hs,
    dropout_p: float,
    wanted: Wanted,
) -> list[torch.Tensor]:
    like = grads[0]
    k = projections[0].lora_A.shape[1]
    found = [like.new_empty((*like.shape[:-1], k) if wanted.x else 0)]
    for p, a, b in zip(projections, wanted.lora_A, wanted.lora_B, strict=True):
        found.append(like.new_empty(p.lora_A.shape if a else 0, dtype=p.lora_A.dtype))
        found.append(like.new_empty(p.lora_B.shape if b else 0, dtype=p.lora_B.dtype))
    return found


def _flatten_backward(
    grads: tuple[torch.Tensor, ...],
    x: torch.Tensor | None,
    projections: tuple[LoraArgs, ...],
    hs: Hs,
    dropout_p: float,
    wanted: Wanted,
) -> tuple[Any, ...]:
    flags = (wanted.x, list(wanted.lora_A), list(wanted.lora_B))
    return list(grads), x, *_flatten(projections), list(hs), dropout_p, *flags


def _unflatten_backward(grads: Any, x: Any, *flat: Any) -> tuple[Any, ...]:
    *projections, hs, dropout_p, x_wanted, a_wanted, b_wanted = flat
    wanted = Wanted(x_wanted, tuple(a_wanted), tuple(b_wanted))
    return tuple(grads), x, _unflatten(*projections), tuple(hs), dropout_p, wanted


lora_linear_backward = Op(
    f"lora_linear_backward(Tensor[] grads, Tensor? x, {_PROJECTIONS}, Tensor?[] hs, float dropout_p, "
    "bool x_wanted, bool[] lora_A_wanted, bool[] lora_B_wanted) -> Tensor[]",
    _check_backward,
    _reference_backward,
    _fake_backward,
    (
        Backend("cpp", ("cpu",), cpp.supports_backward, cpp.run_backward),
        Backend("triton", ("cuda",), triton.supports_backward, triton.run_backward),
    ),
    flatten=_flatten_backward,
    unflatten=_unflatten_backward,
)


def taken_apart(projections: tuple[LoraArgs, ...]) -> tuple[list[torch.Tensor | None], list[Any]]:
    """The tensors that the backward needs, for `save_for_backward`; and what is not a tensor."""
    tensors: list[torch.Tensor | None] = []
    rest: list[Any] = []
    for p in projections:
        tensors += p.weight.tensors() if isinstance(p.weight, WeightTensors) else [p.weight]
        tensors += [p.lora_A, p.lora_B, p.scale_by, p.seed]
        rest.append((p.scaling, p.weight.how() if isinstance(p.weight, WeightTensors) else None))
    return tensors, rest


def put_together(tensors: Iterator[Any], rest: list[Any]) -> tuple[LoraArgs, ...]:
    """What `taken_apart` took apart; takes its tensors from the iterator."""
    projections = []
    for scaling, how in rest:
        if how is None:
            weight = next(tensors)
        else:
            weight = weight_tensors([next(tensors) for _ in range(TENSORS)], *how)
        lora_A, lora_B, scale_by, seed = (next(tensors) for _ in range(4))
        projections.append(LoraArgs(weight, lora_A, lora_B, scaling, scale_by, seed=seed))
    return tuple(projections)


def learnt(projections: tuple[LoraArgs, ...]) -> list[torch.Tensor | None]:
    """The tensors that a gradient may flow to, four a projection: a dense W, lora_A, lora_B, bias."""
    found: list[torch.Tensor | None] = []
    for p in projections:
        dense = p.weight if isinstance(p.weight, torch.Tensor) else None
        found += [dense, p.lora_A, p.lora_B, p.bias]
    return found


def gradients(
    grads: tuple[torch.Tensor, ...],
    x: torch.Tensor | None,
    projections: tuple[LoraArgs, ...],
    hs: Hs,
    dropout_p: float,
    x_wanted: bool,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Of x, and of what `learnt` lists; `needs` says which."""
    wanted = Wanted(x_wanted, tuple(needs[1::4]), tuple(needs[2::4]))
    found: list[torch.Tensor] = []
    if wanted.x or any(wanted.lora_A) or any(wanted.lora_B):
        found = lora_linear_backward(grads, x, projections, hs, dropout_p, wanted)
    each: list[torch.Tensor | None] = []
    for i, grad in enumerate(grads):
        w_wanted, a_wanted, b_wanted, bias_wanted = needs[4 * i : 4 * i + 4]
        flat = as_rows(grad)
        grad_w = None
        if w_wanted:
            assert x is not None
            grad_w = flat.t() @ as_rows(x)
        each += [
            grad_w,
            found[1 + 2 * i] if a_wanted else None,
            found[2 + 2 * i] if b_wanted else None,
            flat.sum(0, dtype=torch.float32).to(grad.dtype) if bias_wanted else None,
        ]
    return found[0] if x_wanted else None, each


class _LoraLinear(Function):
    """Keeps the few-bit tensors, A and B; x only for A's (or a dense W's) gradient, h only for B's. Its
    outputs are the projections', and their h."""

    op = "lora_linear"

    @staticmethod
    def forward(
        x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float, *_learnt: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        return tuple(lora_linear_op(x, projections, dropout_p))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, projections, ctx.dropout_p, *_ = inputs
        count = len(projections)
        needs = ctx.needs_input_grad[3:]
        tensors, ctx.rest = taken_apart(projections)
        ctx.shapes = [y.shape for y in output[:count]]
        ctx.set_materialize_grads(False)
        hs = [h if needed else None for h, needed in zip(output[count:], needs[2::4], strict=True)]
        ctx.save_for_backward(x if any(needs[0::4]) or any(needs[1::4]) else None, *hs, *tensors)

    @staticmethod
    @once("lora_linear")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        count = len(ctx.shapes)
        refuse_intermediate("lora_linear", grads[count:])
        x, *kept = ctx.saved_tensors
        projections = put_together(iter(kept[count:]), ctx.rest)
        x_wanted, _, _, *needs = ctx.needs_input_grad
        grad_x, each = gradients(
            materialized(grads[:count], ctx.shapes),
            x,
            projections,
            tuple(kept[:count]),
            ctx.dropout_p,
            x_wanted,
            tuple(needs),
        )
        return grad_x, None, None, *each


def autocast(x: torch.Tensor, projections: tuple[LoraArgs, ...]) -> tuple[torch.Tensor, tuple[LoraArgs, ...]]:
    """Under `torch.autocast` x, biases and dense weights in its dtype; adapters stay in their own."""
    device = "cpu" if x.is_cpu else x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype not in FLOATS:
        return x, projections
    dtype = torch.get_autocast_dtype(device)
    cast = []
    for p in projections:
        weight = p.weight.to(dtype) if isinstance(p.weight, torch.Tensor) else p.weight
        cast.append(p._replace(weight=weight, bias=None if p.bias is None else p.bias.to(dtype)))
    return x.to(dtype), tuple(cast)


def apply_lora(
    x: torch.Tensor, projections: tuple[LoraArgs, ...], dropout_p: float
) -> tuple[torch.Tensor, ...]:
    """The projections of one x, with gradients: what the public functions and the layers call."""
    x, projections = autocast(x, projections)
    if recording():
        tensors = learnt(projections)
        scales = [p.out_scale for p in projections]
        if recorded(x, *tensors, *scales):
            if all(scale is None for scale in scales):
                return _LoraLinear.call(x, projections, dropout_p, *tensors)[: len(projections)]
            # a gradient to out_scale needs what it multiplies, so that is made, and kept, apart
            plain = tuple(
                p if p.out_scale is None else p._replace(out_scale=None, bias=None) for p in projections
            )
            for p in projections:
                _check_out(p, p.shape[0], x)
            ys = apply_lora(x, plain, dropout_p)
            return tuple(_scale_out(y, p) for y, p in zip(ys, projections, strict=True))
    return tuple(lora_linear_op(x, projections, dropout_p)[: len(projections)])


def _scale_out(y: torch.Tensor, p: LoraArgs) -> torch.Tensor:
    if p.out_scale is None:
        return y
    scaled = y * p.out_scale
    return (scaled if p.bias is None else scaled + p.bias).to(y.dtype)


# the public function


def lora_args(
    x: torch.Tensor,
    w: torch.Tensor | LowBitWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> tuple[LoraArgs, torch.Tensor | None]:
    """What the public functions take, as the op takes it; and the order in which the weight has x's columns,
    which lora_A is put in already."""
    for name, t in (("x", x), ("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor")
    if bias is not None and not isinstance(bias, torch.Tensor):
        raise TypeError(f"bias is a {type(bias).__name__}, expected a tensor or None")
    if out_scale is not None and not isinstance(out_scale, torch.Tensor):
        raise TypeError(f"out_scale is a {type(out_scale).__name__}, expected a tensor or None")
    weight: WeightTensors | torch.Tensor
    perm = None
    if isinstance(w, LowBitWeight):
        check_matrix(w)
        weight, perm = w.op_args, w.perm
    elif isinstance(w, torch.Tensor):
        weight = w
    else:
        raise TypeError(f"w is a {type(w).__name__}, expected a tensor or a bitfuse.LowBitWeight")
    scale_by = None
    if isinstance(scaling, torch.Tensor):
        if scaling.numel() != 1 or not scaling.is_floating_point():
            raise ValueError(
                f"scaling is a tensor of shape {list(scaling.shape)} and {scaling.dtype}, expected one float"
            )
        if scaling.requires_grad and torch.is_grad_enabled():
            lora_B = lora_B * scaling.reshape(()).to(lora_B.dtype)
        else:
            scale_by = scaling.detach().reshape(()).to(x.device, torch.float32)
        scaling = 1.0
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling is {scaling!r}, expected a number or a tensor of one")
    elif not math.isfinite(scaling):
        raise ValueError(f"scaling is {scaling}, expected a finite number")
    if isinstance(seed, int):
        seed = torch.tensor(seed, dtype=torch.int64, device=x.device)
    elif isinstance(seed, torch.Tensor) and seed.numel() == 1:
        seed = seed.reshape(())
    if perm is not None and lora_A.dim() == 2 and lora_A.shape[1] == perm.shape[0]:
        lora_A = lora_A.index_select(1, perm)
    if out_scale is not None:
        out_scale = out_scale.to(torch.float32)
    return LoraArgs(weight, lora_A, lora_B, float(scaling), scale_by, bias, out_scale, seed), perm


def lora_linear(
    x: torch.Tensor,
    w: torch.Tensor | LowBitWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    seed: int | torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = out_scale * (x W^T + scaling * drop(x) A^T B^T) + bias with a frozen W (LoRA: Hu et al., 2021; over
    few-bit W, QLoRA: Dettmers et al., 2023).

    The product with few-bit W and the adapter are one pass; the backward works rank first (h = x A^T is all
    that is kept beside x) and never writes a dense W. Accumulates in float32, deterministic. Where dropout is
    0 the reference backend gives PEFT's numbers, bit for bit, in float32. Dropped elements are a function of
    the seed and the place (`bitfuse.core.dropout`): no mask is stored, and it is not `torch.nn.Dropout`'s.

    A `LowBitWeight` may have leading dimensions (experts), which lora_A, lora_B, bias and out_scale then have
    too, one for each matrix; x's broadcast with them as in `torch.matmul`.

    Gradients flow to x, lora_A, lora_B, bias, a tensor scaling, out_scale, and a dense w that asks for one.
    Under `torch.autocast` x, bias and a dense w take the autocast dtype; the adapter stays in its own.

    Args:
        x: [..., in_features], float32, float16 or bfloat16, any strides.
        w: a `LowBitWeight` of shape (..., out_features, in_features), or a matrix of x's dtype; on x's
            device.
        lora_A: [r, in_features], any of the three dtypes, x's or another; r from 0 (no adapter) to 512.
        lora_B: [out_features, r], likewise.
        scaling: alpha / r, or alpha / sqrt(r) (rsLoRA: Kalajdzievski, 2023); a number, or a tensor of one,
            which the host does not wait for.
        bias: [out_features], of x's dtype, or None.
        dropout_p: probability that an element of x does not reach the adapter, 0 <= dropout_p < 1. Survivors
            are divided by 1 - dropout_p. Pass 0 when not training.
        seed: of the dropout mask, an int or an int64 tensor of one; None draws one from torch's generator.
            Matrix i of several, counted through their leading dimensions, has seed + i.
        out_scale: [out_features], of DoRA or IA3, or None.

    Returns:
        [..., out_features], of x's dtype.

    Raises:
        TypeError: a dtype or a type that is not listed.
        ValueError: sizes that do not fit, a rank above 512, dropout_p outside [0, 1), two devices.
    """
    if dropout_p and seed is None:
        seed = new_seed(x)
    if isinstance(w, LowBitWeight) and len(w.shape) != 2:
        return _batched(x, w, lora_A, lora_B, scaling, bias, dropout_p, seed, out_scale)
    args, perm = lora_args(x, w, lora_A, lora_B, scaling, bias, seed if dropout_p else None, out_scale)
    if perm is not None:
        check_float(x, "x", perm.shape[0])
        x = x.index_select(-1, perm)
    return apply_lora(x, (args,), dropout_p)[0]


def _batched(
    x: torch.Tensor,
    w: LowBitWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None,
    dropout_p: float,
    seed: int | torch.Tensor | None,
    out_scale: torch.Tensor | None,
) -> torch.Tensor:
    """`lora_linear` of a weight with leading dimensions."""
    parts = (
        of_each("lora_A", lora_A, w, 2),
        of_each("lora_B", lora_B, w, 2),
        of_each("bias", bias, w, 1),
        of_each("out_scale", out_scale, w, 1),
    )

    def call(x: torch.Tensor, place: Place, number: int) -> torch.Tensor:
        a, b, own_bias, own_scale = (part[number] for part in parts)
        assert a is not None and b is not None
        own_seed = None if seed is None else seed + number
        return lora_linear(
            x, w[place], a, b, scaling, own_bias, dropout_p, seed=own_seed, out_scale=own_scale
        )

    return batched(x, w, call)


def _explain(
    x: torch.Tensor,
    w: torch.Tensor | LowBitWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    seed: int | torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> Explanation:
    if dropout_p and seed is None:
        seed = 0
    if isinstance(w, LowBitWeight) and len(w.shape) != 2:  # each of its matrices: of the first, that is
        first = (0,) * (len(w.shape) - 2)
        x = x[(0,) * min(x.dim() - 2, len(first))] if x.dim() > 2 else x
        w, lora_A, lora_B = w[first], lora_A[first], lora_B[first]
        bias, out_scale = (None if t is None else t[first] for t in (bias, out_scale))
        assert isinstance(w, LowBitWeight)
    args, _ = lora_args(x, w, lora_A, lora_B, scaling, bias, seed if dropout_p else None, out_scale)
    return lora_linear_op.explain(x, (args,), dropout_p)


declare(
    Declaration(
        lora_linear,
        "x W^T with a LoRA adapter, W in few bits, and its gradients",
        place=2,
        explain=_explain,
        uses=(*LINEAR, "rank"),
        arguments=lambda s, make: (
            make(s.m, s.k),
            example_weight(s, make),
            make(s.rank, s.k),
            make(s.n, s.rank),
            1.0,
        ),
        parts=(
            Part(
                lora_linear_op,
                "forward",
                {
                    "cpp": "few-bit or dense W",
                    "triton": "few-bit or dense W",
                    "cuda": "few-bit W, fp16, bf16, M ≤ 64, no dropout",
                },
            ),
            Part(lora_linear_backward, "gradients to x, lora_A, lora_B, bias"),
        ),
        bias=True,
        tuned=Tuned({"m": ROWS}),
        options=lambda s: {"dropout_p": s.dropout} if s.dropout else {},
        variants=(*WEIGHTS, {"dropout": 0.1}),
    )
)

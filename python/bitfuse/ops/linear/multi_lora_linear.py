"""multi_lora_linear: y = x W^T + b, and to each row the adapter that the row asks for.

The base product is one op for all rows, `lowbit_linear` or torch's own; a second one adds the adapters' part
to it in place. So a base of any format goes with any backend of the adapters, and rows without an adapter
cost nothing beyond the base.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode as _dispatch_mode

from ...core.autograd import Function, once, recorded
from ...core.backends import Backend
from ...core.cost import SPLIT, Cost, Prediction, Rates, moved
from ...core.declaration import LINEAR, ROWS, Declaration, Make, Part, Sizes, Tuned, declare
from ...core.explain import Explanation, together
from ...core.op import Op
from ...core.policy import bucket
from ...core.tensors import PLAIN, as_rows, aside, check_tensor
from ...kernels.linear import multi_lora_linear as triton
from ...weights.example import example_weight
from ...weights.weight import LowBitWeight, WeightTensors, weight_tensors
from . import multi_lora_linear_cpu as cpp
from . import multi_lora_linear_cuda as cuda
from .batched import check_matrix
from .lora_linear import MAX_RANK
from .lowbit_linear import FLOATS, check_float, forward_op, lowbit_linear_grad_x
from .multi_lora_args import (
    Adapters,
    adapter,
    capturing,
    count_of,
    is_stacked,
    keep_for_graph,
    refuse_capture,
    transposed,
)

IDS = (torch.int32, torch.int64)
_CHECK_IDS = os.environ.get("BITFUSE_CHECK", "") not in ("", "0")  # on a GPU, where it makes the host wait


# the ops


def _check(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
) -> None:
    dtype, device, sizes, outs = x.dtype, x.device, x.shape, y.shape
    rows = sizes[:-1]
    if dtype not in FLOATS or not sizes or x.is_neg():
        check_float(x, "x", sizes[-1] if sizes else 0)
    if y.dtype is not dtype or not outs or outs[:-1] != rows or y.device != device:
        check_tensor("y", y, (dtype,), (*rows, outs[-1] if outs else 0), device)
    if not y.is_contiguous():
        raise ValueError(f"y has strides {y.stride()}, expected a contiguous tensor")
    _check_adapters(x, lora_A, lora_B, outs[-1])
    count = count_of(lora_A)
    if scaling.dtype is not torch.float32 or scaling.shape != (count,) or scaling.device != device:
        check_tensor("scaling", scaling, (torch.float32,), (count,), device)
    if adapter_ids.dtype not in IDS or adapter_ids.shape != rows or adapter_ids.device != device:
        check_tensor("adapter_ids", adapter_ids, IDS, tuple(rows), device)
    if _CHECK_IDS:
        check_ids(adapter_ids, count)


def _check_adapters(x: torch.Tensor, lora_A: Adapters, lora_B: Adapters, n: int) -> None:
    """What native code relies on."""
    k, device = x.shape[-1], x.device
    if len(lora_A) != len(lora_B) or is_stacked(lora_A) != is_stacked(lora_B):
        raise ValueError(
            f"lora_A is {_described(lora_A)} and lora_B {_described(lora_B)}, expected both stacked or both "
            "lists of one length"
        )
    if is_stacked(lora_A):
        a, b = lora_A[0], lora_B[0]
        count, rank, columns = a.shape
        plain = type(a) in PLAIN and type(b) in PLAIN
        if columns != k or a.dtype not in FLOATS or a.device != device or not plain or a.is_neg():
            check_tensor("lora_A", a, FLOATS, (count, rank, k), device)
        fits = b.shape == (count, n, rank) and b.dtype in FLOATS and b.device == device
        if not (fits and plain) or b.is_neg():
            check_tensor("lora_B", b, FLOATS, (count, n, rank), device)
        if rank > MAX_RANK:
            raise ValueError(f"lora_A has shape {list(a.shape)}, expected ranks of at most {MAX_RANK}")
        return
    if not lora_A:
        return
    # most of a call's time with many adapters: no helpers, and one test of what is nearly always so
    a_dtype, b_dtype = lora_A[0].dtype, lora_B[0].dtype
    floats = a_dtype in FLOATS and b_dtype in FLOATS and {*map(type, lora_A), *map(type, lora_B)} <= PLAIN
    for e, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        shape = a.shape
        if (
            floats
            and len(shape) == 2
            and shape[1] == k
            and b.shape == (n, shape[0])
            and shape[0] <= MAX_RANK
            and a.dtype is a_dtype
            and b.dtype is b_dtype
            and a.device == device
            and b.device == device
        ):
            continue
        rank = shape[0] if len(shape) == 2 else 0
        check_tensor(f"lora_A[{e}]", a, FLOATS, (rank, k), device)
        check_tensor(f"lora_B[{e}]", b, FLOATS, (n, rank), device)
        if rank > MAX_RANK:
            raise ValueError(f"lora_A[{e}] has shape {list(shape)}, expected a rank of at most {MAX_RANK}")
        if a.dtype is a_dtype and b.dtype is b_dtype:  # of a subclass
            continue
        raise TypeError(
            f"adapter {e} is in {a.dtype} and {b.dtype}, expected those of adapter 0, {a_dtype} and {b_dtype}"
        )


def _described(adapters: Adapters) -> str:
    return f"stacked {list(adapters[0].shape)}" if is_stacked(adapters) else f"a list of {len(adapters)}"


def check_ids(adapter_ids: torch.Tensor, count: int) -> None:
    """Raise ValueError for an id outside -1 to count - 1. Waits for the device."""
    if adapter_ids.numel():
        low, high = (int(v) for v in torch.aminmax(adapter_ids))
        if low < -1 or high >= count:
            raise ValueError(
                f"adapter_ids holds {low if low < -1 else high}, expected -1 (none) to {count - 1}, for "
                f"{count} adapters"
            )


def _active(adapter_ids: torch.Tensor, count: int) -> list[tuple[int, torch.Tensor]]:
    """Each adapter that rows ask for, and those rows."""
    if adapter_ids.device.type == "cpu":
        check_ids(adapter_ids, count)
    ids = adapter_ids.reshape(-1)
    return [(e, (ids == e).nonzero().squeeze(1)) for e in ids.unique().tolist() if 0 <= e < count]


def _reference(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
) -> None:
    """y[m] += scaling[e] (x[m] A_e^T) B_e^T with e = adapter_ids[m], which is none where it is -1."""
    linear = torch.nn.functional.linear
    y, x = as_rows(y), as_rows(x)
    for e, rows in _active(adapter_ids, count_of(lora_A)):
        a, b = adapter(lora_A, e), adapter(lora_B, e)
        h = linear(x[rows].to(a.dtype), a)
        y[rows] = (y[rows] + linear(h.to(b.dtype), b) * scaling[e]).to(y.dtype)


def _fake(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
) -> None:
    return None


def _cost(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
) -> Cost:
    """As if every row had an adapter, of its own as far as there are as many."""
    rows, e, k, n = x.numel() // max(x.shape[-1], 1), count_of(lora_A), x.shape[-1], y.shape[-1]
    adapters = moved(lora_A, lora_B)
    rank = sum(t.numel() for t in lora_A) / max(e * k, 1)
    nbytes = moved(x, y, y, adapter_ids) + adapters * min(rows, e) // max(e, 1)
    return Cost(nbytes, int(2 * rows * rank * (k + n)), x.dtype)


def _kind(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
) -> tuple[Any, ...]:
    k = x.shape[-1]
    rank = lora_A[0].shape[-2] if lora_A else 0
    return bucket(x.numel() // max(k, 1)), y.shape[-1], k, count_of(lora_A), rank, x.dtype


def _in_two_steps(cost: Cost, rates: Rates, *args: Any) -> Prediction:
    """The time to expect on CUDA: x A^T, passed on, then B."""
    return Prediction(rates.call_s, cost.memory_seconds(rates), after=SPLIT)


multi_lora_add_ = Op(
    "multi_lora_add_(Tensor(a!) y, Tensor x, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, "
    "Tensor adapter_ids) -> ()",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("cuda", ("cuda",), cuda.supports, cuda.run, predicted=_in_two_steps),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
    cost=_cost,
    kind=_kind,
    writes=lambda y, *rest: (y,),
)


def _check_grads(
    grad: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
    a_wanted: bool,
    b_wanted: bool,
) -> None:
    _check(grad, x, lora_A, lora_B, scaling, adapter_ids)


def _reference_grads(
    grad: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
    a_wanted: bool,
    b_wanted: bool,
) -> list[torch.Tensor]:
    """The gradients of lora_A's tensors, if wanted, then of lora_B's; zeros for an adapter of no row.

    Of the rows of one adapter: G = s dY, dA = (G B)^T x, dB = G^T h with h = x A^T, made anew.
    """
    grads_a = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in lora_A if a_wanted]
    grads_b = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in lora_B if b_wanted]
    grad, x = as_rows(grad), as_rows(x)
    for e, rows in _active(adapter_ids, count_of(lora_A)):
        a, b = adapter(lora_A, e), adapter(lora_B, e)
        g, own = (grad[rows].to(b.dtype) * scaling[e]).to(b.dtype), x[rows].to(a.dtype)
        if a_wanted:
            adapter(grads_a, e).copy_((g @ b).to(a.dtype).t() @ own)
        if b_wanted:
            adapter(grads_b, e).copy_(g.t() @ torch.nn.functional.linear(own, a).to(b.dtype))
    return grads_a + grads_b


def _fake_grads(
    grad: torch.Tensor,
    x: torch.Tensor,
    lora_A: Adapters,
    lora_B: Adapters,
    scaling: torch.Tensor,
    adapter_ids: torch.Tensor,
    a_wanted: bool,
    b_wanted: bool,
) -> list[torch.Tensor]:
    wanted = [*(lora_A if a_wanted else ()), *(lora_B if b_wanted else ())]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted]


multi_lora_grads = Op(
    "multi_lora_grads(Tensor grad, Tensor x, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, "
    "Tensor adapter_ids, bool a_wanted, bool b_wanted) -> Tensor[]",
    _check_grads,
    _reference_grads,
    _fake_grads,
    (),
    plain=True,  # torch's own products, an adapter at a time
)


# with the base


def _base(
    x: torch.Tensor,
    weight: WeightTensors | torch.Tensor,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x W^T + b, contiguous: what the adapters are added to."""
    if isinstance(weight, torch.Tensor):
        return torch.nn.functional.linear(x, weight, bias).contiguous()
    return forward_op(x if perm is None else x.index_select(-1, perm), weight, bias)


def _base_grad_x(
    grad: torch.Tensor, weight: WeightTensors | torch.Tensor, perm: torch.Tensor | None
) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return (grad @ weight).contiguous()
    grad_x = lowbit_linear_grad_x(grad, weight)
    return grad_x if perm is None else torch.empty_like(grad_x).index_copy_(-1, perm, grad_x)


class _MultiLoraLinear(Function):
    """Keeps x, and the weights; h = x A^T, a rank's worth of work, is made anew in the backward."""

    op = "multi_lora_linear"

    @staticmethod
    def forward(
        x: torch.Tensor,
        bias: torch.Tensor | None,
        dense: torch.Tensor | None,
        weight: WeightTensors | None,
        perm: torch.Tensor | None,
        scaling: torch.Tensor,
        adapter_ids: torch.Tensor,
        *adapters: torch.Tensor,
    ) -> torch.Tensor:
        half = len(adapters) // 2
        given = weight if dense is None else dense
        assert given is not None
        y = _base(x, given, perm, bias)
        multi_lora_add_(y, x, list(adapters[:half]), list(adapters[half:]), scaling, adapter_ids)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, _, dense, weight, perm, scaling, adapter_ids, *adapters = inputs
        ctx.half = len(adapters) // 2
        ctx.read = None if weight is None else weight.how()
        tensors = (dense,) if weight is None else weight.tensors()
        needs = ctx.needs_input_grad
        kept = x if needs[2] or any(needs[7:]) else None
        ctx.save_for_backward(kept, scaling, adapter_ids, perm, *adapters, *tensors)

    @staticmethod
    @once("multi_lora_linear")
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grads[0].contiguous()
        x, scaling, adapter_ids, perm, *kept = ctx.saved_tensors
        half = ctx.half
        lora_A, lora_B, tensors = kept[:half], kept[half : 2 * half], kept[2 * half :]
        weight = tensors[0] if ctx.read is None else weight_tensors(tensors, *ctx.read)
        needs = ctx.needs_input_grad
        a_needs, b_needs = needs[7 : 7 + half], needs[7 + half :]
        grad_x = grad_bias = grad_w = None
        if needs[0]:
            # dX = dY W + s (dY B) A: again a base and adapters, B^T in the place of A and A^T in that of B
            grad_x = _base_grad_x(grad, weight, perm)
            multi_lora_add_(grad_x, grad, transposed(lora_B), transposed(lora_A), scaling, adapter_ids)
        if needs[1] or needs[2]:
            flat = as_rows(grad)
            if needs[1]:
                grad_bias = flat.sum(0, dtype=torch.float32).to(grad.dtype)
            if needs[2]:
                grad_w = flat.t() @ as_rows(x)
        found: list[torch.Tensor | None] = [None] * (2 * half)
        if any(a_needs) or any(b_needs):
            made = multi_lora_grads(grad, x, lora_A, lora_B, scaling, adapter_ids, any(a_needs), any(b_needs))
            if any(a_needs):
                found[:half] = made[:half]
            if any(b_needs):
                found[half:] = made[-half:]
            found = [g if n else None for g, n in zip(found, needs[7:], strict=True)]
        return grad_x, grad_bias, grad_w, None, None, None, None, *found


# the public function


def multi_lora_linear(
    x: torch.Tensor,
    w: torch.Tensor | LowBitWeight,
    lora_A: torch.Tensor | Sequence[torch.Tensor],
    lora_B: torch.Tensor | Sequence[torch.Tensor],
    scaling: float | Sequence[float] | torch.Tensor,
    adapter_ids: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[m] = x[m] W^T + b + s_e (x[m] A_e^T) B_e^T with e = adapter_ids[m]: one batch, an adapter for each
    row (Punica: Chen et al., 2023; S-LoRA: Sheng et al., 2023).

    The adapters' part is added to the base product in place, by kernels that read each row's adapter through
    its id. The shapes alone decide what is launched: adapters may be copied over and ids may change without a
    new CUDA graph or a recompilation, and nothing waits for the device. Lists of adapters are found through a
    table of their addresses, which is made when a list is first seen: call the op once before a graph is
    captured. Accumulates in float32, deterministic.

    Gradients flow to x, lora_A, lora_B, bias, and a dense w that asks for one; the backward of lora_A and
    lora_B waits for the device. Under `torch.autocast` x, bias and a dense w take the autocast dtype; the
    adapters stay in theirs.

    Args:
        x: [..., in_features], float32, float16 or bfloat16, any strides.
        w: a `LowBitWeight` of shape (out_features, in_features), or a matrix of x's dtype; on x's device.
        lora_A: stacked [E, r, in_features], or a list of E matrices [r_e, in_features] of mixed ranks; any of
            the three dtypes, x's or another, one for all; ranks from 0 to 512.
        lora_B: [E, out_features, r], or a list of E matrices [out_features, r_e], likewise.
        scaling: alpha / r: a number for all, a list of E, or a tensor [E] (or of one) on x's device.
        adapter_ids: int32 or int64 of x's leading shape: which adapter each row gets, -1 for none. An id that
            is not there is refused on the CPU; on a GPU, where the host does not look, it is none, unless the
            environment has BITFUSE_CHECK=1.
        bias: [out_features], of x's dtype, or None.

    Returns:
        [..., out_features], of x's dtype.

    Raises:
        TypeError: a dtype or a type that is not listed.
        ValueError: sizes that do not fit, tensors on two devices, an id that is not there.
    """
    weight, perm = _weight_of(x, w, bias)
    a, b = _listed("lora_A", lora_A), _listed("lora_B", lora_B)
    if not isinstance(adapter_ids, torch.Tensor):
        raise TypeError(f"adapter_ids is a {type(adapter_ids).__name__}, expected a tensor")
    scales = _scales(scaling, count_of(a), x.device)
    device = "cpu" if x.is_cpu else x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype in FLOATS:
        dtype = torch.get_autocast_dtype(device)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight.to(dtype) if isinstance(weight, torch.Tensor) else weight
    dense = weight if isinstance(weight, torch.Tensor) else None
    if dense is not None:
        _check_dense(x, dense, bias)
    if recorded(x, bias, dense, *a, *b):
        few_bit = None if isinstance(weight, torch.Tensor) else weight
        return _MultiLoraLinear.call(x, bias, dense, few_bit, perm, scales, adapter_ids, *a, *b)
    y = _base(x, weight, perm, bias)
    if y.requires_grad:  # in a trace, which has the op without a gradient
        y = y.detach()
    multi_lora_add_(y, x, a, b, scales, adapter_ids)
    return y


def _weight_of(
    x: object, w: object, bias: object
) -> tuple[WeightTensors | torch.Tensor, torch.Tensor | None]:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a tensor")
    if not (bias is None or isinstance(bias, torch.Tensor)):
        raise TypeError(f"bias is a {type(bias).__name__}, expected a tensor or None")
    if isinstance(w, LowBitWeight):
        check_matrix(w)
        return w.op_args, w.perm
    if isinstance(w, torch.Tensor):
        return w, None
    raise TypeError(f"w is a {type(w).__name__}, expected a tensor or a bitfuse.LowBitWeight")


def _check_dense(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_float(x, "x", x.shape[-1] if x.dim() else 0)
    n = w.shape[0] if w.dim() == 2 else 0
    if w.dtype != x.dtype or w.shape != (n, x.shape[-1]) or w.device != x.device:
        check_tensor("w", w, (x.dtype,), (n, x.shape[-1]), x.device)
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (n,) or bias.device != x.device):
        check_tensor("bias", bias, (x.dtype,), (n,), x.device)


def _listed(name: str, adapters: object) -> list[torch.Tensor]:
    """As the op takes them: a stacked tensor is a list of one of three dimensions."""
    if isinstance(adapters, torch.Tensor):
        if adapters.dim() != 3:
            raise ValueError(f"{name} has shape {list(adapters.shape)}, expected three dimensions or a list")
        return [adapters]
    if not isinstance(adapters, Sequence):
        raise TypeError(f"{name} is a {type(adapters).__name__}, expected a tensor or a list of tensors")
    for e, t in enumerate(adapters):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}[{e}] is a {type(t).__name__}, expected a tensor")
    if len(adapters) == 1 and adapters[0].dim() != 2:  # the op would take it for stacked
        raise ValueError(f"{name}[0] has shape {list(adapters[0].shape)}, expected two dimensions")
    return list(adapters)


_MOST_SCALES = 256
_known_scales: dict[tuple[object, ...], torch.Tensor] = {}


def _scales(scaling: object, count: int, device: torch.device) -> torch.Tensor:
    """Float32 [count] on the device; of numbers it is made once."""
    if isinstance(scaling, torch.Tensor):
        if scaling.dtype is torch.float32 and scaling.shape == (count,) and scaling.device == device:
            return scaling.detach() if scaling.requires_grad else scaling
        if not scaling.is_floating_point() or scaling.device != device:
            raise TypeError(
                f"scaling is a tensor of {scaling.dtype} on {scaling.device}, expected floats on {device}"
            )
        if scaling.numel() == 1 and scaling.dim() <= 1:
            scaling = scaling.reshape(1).expand(count)
        if scaling.shape != (count,):
            raise ValueError(f"scaling has shape {list(scaling.shape)}, expected [{count}], one an adapter")
        return scaling.detach().to(torch.float32).contiguous()
    if isinstance(scaling, (bool, str)) or not isinstance(scaling, (int, float, Sequence)):
        raise TypeError(f"scaling is {scaling!r}, expected a number, a list of numbers or a tensor")
    numbers = scaling if isinstance(scaling, (int, float)) else tuple(scaling)
    if isinstance(numbers, tuple) and len(numbers) != count:
        raise ValueError(f"scaling has {len(numbers)} numbers, expected {count}, one an adapter")
    if is_compiling() or _dispatch_mode() is not None:
        return _new_scales(numbers, count, device)
    found = _known_scales.get((numbers, count, device))
    if found is None:
        for s in numbers if isinstance(numbers, tuple) else (numbers,):
            if isinstance(s, bool) or not isinstance(s, (int, float)):
                raise TypeError(f"scaling holds {s!r}, expected numbers")
            if not math.isfinite(s):
                raise ValueError(f"scaling holds {s}, expected finite numbers")
        if capturing(device):
            if isinstance(numbers, tuple):
                refuse_capture("scaling", device)
            return _new_scales(numbers, count, device)  # the graph's own, filled at each replay
        with aside():
            found = _new_scales(numbers, count, device)
        if len(_known_scales) >= _MOST_SCALES:
            del _known_scales[next(iter(_known_scales))]
        _known_scales[numbers, count, device] = found
    return keep_for_graph(found)


def _new_scales(numbers: float | tuple[float, ...], count: int, device: torch.device) -> torch.Tensor:
    if isinstance(numbers, tuple):
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    return torch.full((count,), float(numbers), dtype=torch.float32, device=device)


def _explain(
    x: torch.Tensor,
    w: torch.Tensor | LowBitWeight,
    lora_A: torch.Tensor | Sequence[torch.Tensor],
    lora_B: torch.Tensor | Sequence[torch.Tensor],
    scaling: float | Sequence[float] | torch.Tensor,
    adapter_ids: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> Explanation:
    """Of both parts: the product without adapters, and what these add to it."""
    _weight_of(x, w, bias)
    a, b = _listed("lora_A", lora_A), _listed("lora_B", lora_B)
    y = x.new_empty(*x.shape[:-1], w.shape[0])
    if isinstance(w, LowBitWeight) and not count_of(a):
        return replace(forward_op.explain(x, w.op_args, bias), op="multi_lora_linear", note="no adapters")
    adapters = multi_lora_add_.explain(y, x, a, b, _scales(scaling, count_of(a), x.device), adapter_ids)
    adapters = replace(adapters, op="their sum")
    if isinstance(w, LowBitWeight):
        base = forward_op.explain(x, w.op_args, bias)
        return together("multi_lora_linear", (("product", base), ("adapters", adapters)))
    flops = 2 * y.numel() * w.shape[1]
    cost = adapters.cost + Cost(moved(x, w, y) + (0 if bias is None else moved(bias)), flops, x.dtype)
    rates, both = adapters.rates, adapters.prediction
    if rates is not None and both is not None:
        both = Cost(cost.nbytes - adapters.cost.nbytes, flops, x.dtype).predicted(rates) + both
    return replace(
        adapters, op="multi_lora_linear", note="behind torch's own product", cost=cost, policy_key=None,
        prediction=both,
    )  # fmt: skip


def _example(s: Sizes, make: Make) -> tuple[Any, ...]:
    e = s.adapters
    a: Any
    b: Any
    if s.listed:
        a, b = ([make(*shape) for _ in range(e)] for shape in ((s.rank, s.k), (s.n, s.rank)))
    else:
        a, b = make(e, s.rank, s.k), make(e, s.n, s.rank)
    scaling, ids = make(e, dtype=torch.float32), make(s.m, dtype=torch.int32)
    return make(s.m, s.k), example_weight(s, make), a, b, scaling, ids


declare(
    Declaration(
        multi_lora_linear,
        "x W^T with an adapter for each row",
        place=3,
        explain=_explain,
        uses=(*LINEAR, "rank", "adapters"),
        arguments=_example,
        parts=(
            Part(multi_lora_add_, "forward", {"cuda": "M ≤ 64"}),
            Part(multi_lora_grads, "gradients to x, lora_A, lora_B"),
        ),
        bias=True,
        tuned=Tuned({"m": tuple(m for m in ROWS if m <= 64)}),
        variants=({"listed": True},),
    )
)

"""A call of attention as Triton's kernels take it: its tensors, their strides, and its numbers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ...core.limits import MAX_HEAD_SIZE
from ...ops.attention.attention_args import AttentionArgs
from ..core.dropout import threshold_of
from ..core.launch import Plan, alignment_of, contiguous, dtypes_of, refuse
from .attention_logits import Forms
from .layouts import FARTHEST, LONGEST, Layout, layout, padded, vector


class Bias(NamedTuple):
    """An attention bias as the kernels take it."""

    tensor: torch.Tensor | None = None
    batch: int = 0
    head: int = 0
    row: int = 0
    column: int = 0
    align: int = 1
    rows: bool = False
    columns: int = 0  # 0: one for all keys; 1: a stride of 1; 2: another


def bias_layout(bias: torch.Tensor | None) -> Bias:
    if bias is None:
        return Bias()
    if bias.dtype == torch.bool:
        bias = bias.view(torch.uint8)
    b, h, i, j = (s if n > 1 else 0 for s, n in zip(bias.stride(), bias.shape, strict=True))
    width = 16 // bias.element_size()
    fits = j == 1 and not (bias.data_ptr() % 16 or b % width or h % width or i % width)
    align = width if fits else 1
    columns = 0 if j == 0 else 1 if j == 1 else 2
    return Bias(bias, b // align, h // align, i // align, j, align, i != 0, columns)


def cap_kind(dtype: torch.dtype, softcap: float | bool) -> str:
    """Which tanh: see `tanh`."""
    return str(dtype).removeprefix("torch.") if softcap else ""


def scales(a: AttentionArgs, natural: bool) -> tuple[float, float]:
    """The scale and the cap as the kernels take them."""
    unit = 1.0 if natural else math.log2(math.e)
    return (a.softmax_scale / a.softcap, a.softcap * unit) if a.softcap else (a.softmax_scale * unit, 0.0)


def bounds(a: AttentionArgs) -> tuple[int, int, int]:
    """left, right, and 1 where the last query meets the last key."""
    left, right = (x if 0 <= x < 2 * LONGEST else 2 * LONGEST - 1 for x in (a.left, a.right))
    return left, right, int(not a.top_left)


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> str | None:
    """None when `run` can serve the call, else the reason."""
    if (reason := refuse(q.device)) is not None:
        return reason
    prefix = 0 if a.prefix_k is None else a.prefix_k.shape[1]
    longest = max(q.shape[-3], k.shape[-3] + prefix, a.max_seqlen_q, a.max_seqlen_k)
    if longest >= LONGEST:
        return f"{longest} queries or keys are more than 2**29 - 1"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_SIZE:
        return (
            f"head dims {q.shape[-1]} and {v.shape[-1]} are more than the {MAX_HEAD_SIZE} that its tiles hold"
        )
    if q.shape[-2] * max(q.shape[-1], v.shape[-1]) >= FARTHEST:
        return f"{q.shape[-2]} heads are too many"
    return None


class Layouts(NamedTuple):
    """Strides of a call's tensors, in multiples of Align elements, as the kernels take them."""

    q_batch: int
    q_row: int
    q_head: int
    k_batch: int
    k_row: int
    k_head: int
    v_batch: int
    v_row: int
    v_head: int
    pk_batch: int
    pk_row: int
    pk_head: int
    pv_batch: int
    pv_row: int
    pv_head: int


class Sizes(NamedTuple):
    """Numbers of a call, as every kernel takes them: fields are their parameters, in their order.

    Attributes:
        scale, cap, inverse, threshold: see `attention_logits.Numbers`.
        left, right, bottom: the window; 1 where the last query meets the last key, else 0.
        heads, group: of queries, and those that share a head of keys.
        SQ, SK, P: queries and keys of a sequence, the longest of packed ones; keys of the prefix.
        total_q, total_k: of packed sequences, or 0.
    """

    scale: float
    cap: float
    inverse: float
    threshold: int
    left: int
    right: int
    bottom: int
    heads: int
    group: int
    SQ: int
    SK: int
    P: int
    total_q: int
    total_k: int


# after those of its own tensors, a kernel's parameters
NUMBERS = [*Sizes._fields, *Layouts._fields, "bias_batch", "bias_head", "bias_i", "bias_j", "slope_batch"]


class Heads(NamedTuple):
    """Widths of q's and v's heads, and what strides, those of the bias too, are divided by; constants."""

    Dim: int
    DimV: int
    Align: int
    BiasAlign: int


class Tiles(NamedTuple):
    """A tile's queries and keys, and the padded widths of q's and v's heads; constants."""

    M: int
    N: int
    D: int
    DV: int


class Tensors(NamedTuple):
    """Tensors of a call, as every kernel takes them: fields are their parameters, in their order."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    prefix_k: torch.Tensor | None
    prefix_v: torch.Tensor | None
    bias: torch.Tensor | None
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    seed: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None


class Problem(NamedTuple):
    """What every kernel takes of a call, and what its plan depends on.

    Attributes:
        tensors: first.
        numbers: `NUMBERS`.
        heads, form: constants.
        kind: what else kernels are compiled for: dtypes, which tensors there are, strides beyond an int32.
        alignment: of the tensors.
        others: layouts of further tensors, in multiples of Align.
        plain: whether a logit is a scaled product, and nothing is dropped.
        batch, sq, sk: sequences, and their queries and keys at most.
    """

    tensors: Tensors
    numbers: tuple[float | int, ...]
    heads: Heads
    form: Forms
    kind: tuple[Any, ...]
    alignment: Any
    others: tuple[Layout, ...]
    plain: bool
    batch: int
    sq: int
    sk: int


def problem_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs, *others: torch.Tensor
) -> Problem:
    """`others` are of q's dtype, and walked like q."""
    packed = a.cu_seqlens_q is not None
    heads, kv_heads = q.shape[-2], k.shape[-2]
    batch = a.cu_seqlens_q.shape[0] - 1 if a.cu_seqlens_q is not None else q.shape[0]
    sq, sk = (a.max_seqlen_q, a.max_seqlen_k) if packed else (q.shape[1], k.shape[1])
    layouts = tuple(None if t is None else layout(t) for t in (q, k, v, a.prefix_k, a.prefix_v))
    walked = tuple(layout(t) for t in others)
    align = vector((*layouts, *walked))
    strides = Layouts._make([s // align for x in layouts for s in ((0, 0, 0) if x is None else x[1:])])
    bias = bias_layout(a.bias)
    natural = q.dtype == torch.float32
    scale, cap = scales(a, natural)
    sizes = Sizes(
        scale, cap, 1 / (1 - a.dropout_p), threshold_of(a.dropout_p), *bounds(a), heads, heads // kv_heads,
        sq, sk, 0 if a.prefix_k is None else a.prefix_k.shape[1], q.shape[0] if packed else 0,
        k.shape[0] if packed else 0,
    )  # fmt: skip
    bias_strides = (bias.batch, bias.head, bias.row, bias.column)
    slope_batch = heads if a.alibi_slopes is not None and a.alibi_slopes.dim() == 2 else 0
    small = (a.alibi_slopes, a.sinks, a.seed if a.dropout_p else None, a.cu_seqlens_q, a.cu_seqlens_k)
    tensors = Tensors._make(
        (*(None if x is None else x.tensor for x in layouts), bias.tensor, *(contiguous(t) for t in small))
    )
    dim, dim_v = q.shape[-1], v.shape[-1]
    positive = scale > 0 and (a.prefix_k is None or (a.bias is None and a.alibi_slopes is None))
    form = Forms(
        positive, cap_kind(q.dtype, a.softcap), bias.rows, bias.columns, dim != padded(dim),
        dim_v != padded(dim_v), natural,
    )  # fmt: skip
    kinds = dtypes_of(tensors)
    wide = tuple([n >= 2**31 for n in (*strides, *bias_strides)])
    plain = scale > 0 and not (cap or a.dropout_p) and a.bias is None and a.alibi_slopes is None
    aligned = alignment_of(*tensors[:6], *(x.tensor for x in walked))
    walked = tuple(Layout(x.tensor, x.batch // align, x.row // align, x.head // align) for x in walked)
    kind = (kinds, wide, *(x.batch >= 2**31 for x in walked))
    return Problem(
        tensors, (*sizes, *strides, *bias_strides, slope_batch), Heads(dim, dim_v, align, bias.align), form,
        kind, aligned, walked, plain, batch, sq, sk,
    )  # fmt: skip


def launch(
    plan: Plan, p: Problem, heads: int, tensors: tuple[Any, ...], numbers: tuple[float | int, ...]
) -> None:
    """A plan whose grid is the tiles of one head, for this many heads, with a kernel's own arguments."""
    inputs = (*p.tensors, *tensors, *p.numbers, *numbers)
    plan.launch(inputs, p.alignment, (plan.grid[0] * heads, 1, 1))

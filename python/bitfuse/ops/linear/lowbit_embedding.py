"""lowbit_embedding: rows of a few-bit matrix by their numbers."""

from __future__ import annotations

import torch

from ...core.backends import Backend
from ...core.cost import Cost
from ...core.declaration import WEIGHTS, Declaration, Make, Part, Sizes, declare
from ...core.explain import Explanation
from ...core.limits import NESTED_BLOCK
from ...core.op import Op
from ...core.tensors import check_tensor
from ...kernels.linear import lowbit_embedding as triton
from ...weights.example import example_weight
from ...weights.formats import get_format, nested_code
from ...weights.scales import as_bytes, as_floats
from ...weights.weight import LowBitWeight, WeightTensors, dequantize_rows
from . import lowbit_embedding_cpu as cpp
from .batched import check_matrix
from .lowbit_linear import FLOATS, check_weight

INDICES = (torch.int64, torch.int32)


def _check(indices: torch.Tensor, weight: WeightTensors, dtype: torch.dtype) -> None:
    check_tensor("indices", indices, INDICES, indices.shape, indices.device)
    if dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype}, expected {' or '.join(map(str, FLOATS))}")
    check_weight(weight, weight.shape[1], indices.device)


def _reference(indices: torch.Tensor, weight: WeightTensors, dtype: torch.dtype) -> torch.Tensor:
    rows = indices.flatten().long()
    n, k = weight.shape
    if rows.device.type == "cpu":
        for bad in rows[(rows < 0) | (rows >= n)][:1]:
            raise IndexError(f"indices holds {int(bad)}, expected 0 to {n - 1}")
    format, at = get_format(weight.format), rows // weight.scale_rows
    if weight.scale_offset is None:
        scales = as_floats(as_bytes(weight.scales)[at], format.scale_dtype).float()
        scales = scales if weight.scale_scales is None else scales * weight.scale_scales
    else:
        assert weight.scale_scales is not None
        groups = weight.scales.shape[1]
        place = at.unsqueeze(1) * groups + torch.arange(groups, dtype=torch.int64, device=at.device)
        first = nested_code(at.device)[weight.scales[at].int()]
        scales = first * weight.scale_scales[place // NESTED_BLOCK] + weight.scale_offset
    zeros = None if weight.zeros is None else weight.zeros[at]
    offsets = None if weight.offsets is None else weight.offsets[at]
    found = dequantize_rows(weight.qweight[rows], scales, zeros, format, offsets)
    return found.to(dtype).view(*indices.shape, k)


def _fake(indices: torch.Tensor, weight: WeightTensors, dtype: torch.dtype) -> torch.Tensor:
    return indices.new_empty((*indices.shape, weight.shape[1]), dtype=dtype)


def _cost(indices: torch.Tensor, weight: WeightTensors, dtype: torch.dtype) -> Cost:
    """Of the rows that are read."""
    n, k = weight.shape
    row = sum(t.nbytes for t in weight.tensors() if t is not None) / max(n, 1) + k * dtype.itemsize
    return Cost(int(indices.numel() * (row + indices.itemsize)), 0, dtype)


lowbit_embedding_op = Op(
    "lowbit_embedding(Tensor indices, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? scale_scales, "
    "Tensor? scale_offset, ScalarType dtype, str format, int group_size, Tensor? offsets=None, "
    "int scale_rows=1) -> Tensor",
    _check,
    _reference,
    _fake,
    (
        Backend("cpp", ("cpu",), cpp.supports, cpp.run),
        Backend("triton", ("cuda",), triton.supports, triton.run),
    ),
    cost=_cost,
    rows=True,
    flatten=lambda indices, weight, dtype: (indices, *weight[:5], dtype, *weight[5:]),
    unflatten=lambda indices, *flat: (indices, WeightTensors(*flat[:5], *flat[6:]), flat[5]),
)


def apply_embedding(
    indices: torch.Tensor, weight: WeightTensors, perm: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`lowbit_embedding` on the parts of a weight: what layers call."""
    out = lowbit_embedding_op(indices, weight, dtype)
    return out if perm is None else torch.empty_like(out).index_copy_(-1, perm, out)


def lowbit_embedding(
    indices: torch.Tensor, w: LowBitWeight, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Rows of W by their numbers, read from its codes: `torch.nn.functional.embedding` over few bits, as in
    QLoRA's
    frozen base has them (Dettmers et al., 2023). Each number is (value - zero) * scale in float32, rounded
    once. Gradients flow nowhere: W is frozen.

    Args:
        indices: [...], int64 or int32, any strides, each from 0 to rows - 1.
        w: a `LowBitWeight` of shape (rows, columns), on indices' device.
        dtype: of the result, float32, float16 or bfloat16; w's own where it is None.

    Returns:
        [..., columns].

    Raises:
        TypeError: a dtype that is not listed, w not a LowBitWeight.
        ValueError: a weight of another device, or with leading dimensions.
        IndexError: on the CPU, a row that there is not. On a GPU its numbers are NaN.
    """
    if not isinstance(indices, torch.Tensor):
        raise TypeError(f"indices is a {type(indices).__name__}, expected a tensor")
    if not isinstance(w, LowBitWeight):
        raise TypeError(f"w is a {type(w).__name__}, expected a LowBitWeight")
    check_matrix(w)
    return apply_embedding(indices, w.op_args, w.perm, w.dtype if dtype is None else dtype)


def _explain(indices: torch.Tensor, w: LowBitWeight, dtype: torch.dtype | None = None) -> Explanation:
    check_matrix(w)
    return lowbit_embedding_op.explain(indices, w.op_args, w.dtype if dtype is None else dtype)


def _example(s: Sizes, make: Make) -> tuple[torch.Tensor, torch.Tensor | LowBitWeight, torch.dtype]:
    return make(s.m, dtype=torch.int64), example_weight(s, make), s.dtype


declare(
    Declaration(
        lowbit_embedding,
        "rows of a few-bit matrix by their numbers",
        place=8,
        explain=_explain,
        uses=("m", "n", "k", "format", "group_size", "dtype"),
        arguments=_example,
        parts=(Part(lowbit_embedding_op),),
        dense=False,
        gradient=False,
        variants=WEIGHTS,
    )
)

"""Products with a weight of leading dimensions, matrix by matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ...weights.weight import LowBitWeight

Place = tuple[int, ...]  # of a matrix in the leading dimensions


def check_matrix(w: LowBitWeight) -> None:
    """Raise ValueError for a weight with leading dimensions."""
    if len(w.shape) != 2:
        raise ValueError(
            f"w has shape {list(w.shape)}, expected [out_features, in_features]: pick a matrix of it, w[i]"
        )


def batched(
    x: torch.Tensor, w: LowBitWeight, call: Callable[[torch.Tensor, Place, int], torch.Tensor]
) -> torch.Tensor:
    """As `torch.matmul`: the leading dimensions of x [..., rows, in_features] and of w broadcast.

    Args:
        call: of x [..., rows, in_features] and the place and number of one matrix of w, its product.

    Raises:
        ValueError: x does not fit.
    """
    *lead, n, k = w.shape
    if x.dim() < 2 or x.shape[-1] != k:
        raise ValueError(
            f"x has shape {list(x.shape)}, expected [..., rows, {k}] for w of shape {list(w.shape)}"
        )
    try:
        batch = torch.broadcast_shapes(x.shape[:-2], lead)
    except RuntimeError:
        raise ValueError(
            f"x has shape {list(x.shape)}, expected leading dimensions that broadcast with w's {lead}"
        ) from None
    if 0 in batch:
        return x.new_empty(*batch, x.shape[-2], n)

    def along(x: torch.Tensor, place: Place, number: int) -> torch.Tensor:
        dims = len(w.shape) - len(place)
        if dims == 2:
            return call(x, place, number)
        count, ys = lead[len(place)], []
        for i, part in enumerate(x.unbind(-dims)):
            at = i if count > 1 else 0
            ys.append(along(part, (*place, at), number * count + at))
        return torch.stack(ys, -dims)

    return along(x.expand(*batch, *x.shape[-2:]), (), 0)


def of_each(name: str, t: torch.Tensor | None, w: LowBitWeight, dims: int) -> list[torch.Tensor | None]:
    """What an argument is to each matrix of w, by number: t has w's leading dimensions, and `dims` more."""
    lead = w.shape[:-2]
    count = math.prod(lead)
    if t is None:
        return [None] * count
    if t.dim() != len(lead) + dims or t.shape[: len(lead)] != lead:
        expected = ", ".join((*map(str, lead), *["..."] * dims))
        raise ValueError(f"{name} has shape {list(t.shape)}, expected [{expected}], one for each matrix of w")
    return list(t.reshape(count, *t.shape[len(lead) :]).unbind())

"""What fits a few-bit weight: its shape, the groups of its columns and their order."""

from __future__ import annotations

import torch

from .formats import SCALE_DTYPES, Format


def check_shape(shape: tuple[int, ...], format: Format) -> tuple[int, int]:
    """The out_features and in_features of a shape that a weight of the format may have."""
    n, k = shape[-2:] if len(shape) > 1 else (0, 0)
    if n < 0 or k <= 0 or k % 8 or min(shape) < 0:
        raise ValueError(
            f"shape is {tuple(shape)}, expected (..., out_features, in_features), in_features a multiple of 8"
        )
    if format.group_size != -1 and k % format.group_size:
        raise ValueError(
            f"group_size {format.group_size} does not divide in_features {k}: choose one that does, "
            "or -1 for the whole row"
        )
    return n, k


def check_float_weight(weight: object, or_meta: bool = False) -> None:
    """Raise TypeError or ValueError for what can't be quantised, whatever the format."""
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}, expected a tensor")
    if weight.dtype not in SCALE_DTYPES:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {' or '.join(map(str, SCALE_DTYPES))}")
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [..., out_features, in_features]")
    if weight.is_meta and not or_meta:
        raise ValueError("weight is on the meta device: load the model before quantising it")


def check_g_idx(g_idx: torch.Tensor, group_size: int) -> None:
    """Raise ValueError for groups that are not group_size columns each; g_idx is [in_features], or one for
    each matrix."""
    if g_idx.dim() > 1:
        for each in g_idx.flatten(0, -2).unbind():
            check_g_idx(each, group_size)
        return
    groups = g_idx.numel() // group_size
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(
            f"g_idx holds {int(g_idx.min())} to {int(g_idx.max())}, expected groups 0 to {groups - 1}"
        )
    counts = torch.bincount(g_idx, minlength=groups)
    if bool((counts != group_size).any()):
        at = int((counts != group_size).nonzero()[0])
        raise ValueError(
            f"g_idx puts {int(counts[at])} columns in group {at}, expected group_size = {group_size}"
        )


def check_perm(perm: object, g_idx: torch.Tensor | None, columns: tuple[int, ...]) -> None:
    """Raise ValueError for a perm that does not sort g_idx's columns."""
    if g_idx is None:
        raise ValueError("perm is given without g_idx, whose order it is")
    fits = isinstance(perm, torch.Tensor) and perm.dtype == torch.int64 and perm.shape == g_idx.shape
    if fits and not g_idx.is_meta:
        assert isinstance(perm, torch.Tensor)
        fits = perm.device == g_idx.device and torch.equal(perm, torch.argsort(g_idx, stable=True))
    if not fits:
        found = list(perm.shape) if isinstance(perm, torch.Tensor) else type(perm).__name__
        raise ValueError(
            f"perm is {found}, expected torch.argsort(g_idx, stable=True), int64 {list(columns)}"
        )

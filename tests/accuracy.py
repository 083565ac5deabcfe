"""The one accuracy rule: against float64, at most twice the error of the same formula in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch


def assert_accurate(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, what: str = "") -> None:
    """got and plain approximate exact (float64); got may err twice as much, plus eps: half a unit in the last
    place of the largest output at got's dtype, for cases where the plain formula happens to be exact."""
    assert got.dtype == plain.dtype and got.shape == exact.shape, (got.dtype, got.shape, exact.shape)
    if exact.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{what}: {int((~torch.isfinite(got)).sum())} outputs are not finite"
    exact = exact.to(got.device)
    eps = torch.finfo(got.dtype).eps / 2 * float(exact.abs().max())
    for measure in ("largest", "mean square"):
        norm = (
            (lambda t: float(t.abs().max()))
            if measure == "largest"
            else (lambda t: float(t.square().mean().sqrt()))
        )
        error, allowed = norm(got.double() - exact), 2 * norm(plain.double() - exact) + eps
        assert error <= allowed, f"{what}: {measure} error {error:.3g}, allowed {allowed:.3g}"


def worst_order(
    dot: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    w: torch.Tensor,
    exact: torch.Tensor,
) -> torch.Tensor:
    """Of dot(x, w), which sums over the last dimension of both, in eight orders of that sum the result that
    errs most: what one order makes of a few numbers is luck, and another BLAS's."""
    found = [dot(x, w)]
    for seed in range(7):
        order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(seed))
        found.append(dot(x[..., order], w[..., order]))
    return max(found, key=lambda t: float((t.double() - exact).abs().max()) if t.numel() else 0.0)


class Errors:
    """Results of several draws, held against the accuracy rule together: a tensor of a few numbers passes or
    fails by the luck of plain PyTorch's roundings."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, torch.dtype], list[tuple[torch.Tensor, ...]]] = {}

    def add(self, name: str, got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
        assert got.dtype == plain.dtype and got.shape == exact.shape, (
            name,
            got.dtype,
            got.shape,
            exact.shape,
        )
        flat = tuple(t.cpu().flatten() for t in (got, exact, plain))
        self.results.setdefault((name, got.dtype), []).append(flat)

    def check(self, what: str) -> None:
        for (name, _), results in self.results.items():
            got, exact, plain = (torch.cat(t) for t in zip(*results, strict=True))
            assert_accurate(got, exact, plain, f"{name}, {what}")

"""Memory of a training step by kind, counted tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step.

    Attributes:
        weights: parameters and buffers of the model without the adapters: codes, scales, embeddings, norms.
        adapters: parameters of the adapters.
        gradients: their gradients, which nothing else has.
        optimizer: every tensor of the optimizer's state.
        activations: what autograd holds for the backward pass, at the end of the forward pass of a batch.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations


def measure(
    model: torch.nn.Module,
    adapters: Iterable[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    forward: Callable[[], torch.Tensor],
) -> Memory:
    """Run one forward and backward pass and count; a tensor, or memory that tensors share, counts once.

    Call it after a step, when the optimizer has its state; gradients are set to None.
    """
    adapters = list(adapters)
    own = {id(p) for p in adapters}
    every = [*model.parameters(), *model.buffers()]
    held = {t.untyped_storage().data_ptr() for t in every}
    saved: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    optimizer.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = forward()
    result.backward()
    found = Memory(
        weights=_bytes(t for t in every if id(t) not in own),
        adapters=_bytes(adapters),
        gradients=_bytes(p.grad for p in every if p.grad is not None),
        optimizer=_bytes(
            t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)
        ),
        activations=sum(saved.values()),
    )
    optimizer.zero_grad()
    return found


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())

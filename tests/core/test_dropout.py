"""Dropout's seed in compiled graphs: the backward has the mask of its forward, however little is kept."""

from __future__ import annotations

from collections.abc import Callable

import bitfuse
import pytest
import torch
import torch._functorch.config
from torch.utils.checkpoint import checkpoint


def of_attention(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return bitfuse.attention(x.sin(), x.cos(), v, dropout_p=0.5)


def of_sdpa(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return bitfuse.scaled_dot_product_attention(x.sin(), x.cos(), v, dropout_p=0.5)


def of_lora(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return bitfuse.lora_linear(v, torch.zeros(16, 16), torch.eye(16), torch.eye(16), 1.0, dropout_p=0.5)


@pytest.mark.parametrize("checkpointed", (False, True))
@pytest.mark.parametrize("budget", (1.0, 0.5, 0.0))
@pytest.mark.parametrize("drops", (of_attention, of_lora))
def test_the_backward_has_the_mask_of_the_forward(
    drops: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], budget: float, checkpointed: bool
) -> None:
    """What is linear in v: <o, g> is <dv, v>, if the masks are the same."""

    def block(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        v = w.sin().exp()
        return drops(x, v), drops(x, v)

    def step(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return checkpoint(block, x, w, use_reentrant=False) if checkpointed else block(x, w)

    torch._dynamo.reset()
    x, w = torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 16, requires_grad=True)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        first, second = torch.compile(step, fullgraph=True, backend="aot_eager_decomp_partition")(x, w)
    assert not torch.equal(first, second)  # each call draws its own
    g = torch.randn(2, *first.shape)
    (d_w,) = torch.autograd.grad((first * g[0] + second * g[1]).sum(), w)
    v = w.detach().sin().exp()
    d_v = d_w / (w.detach().cos() * v)
    wanted = (first.detach().double() * g[0] + second.detach().double() * g[1]).sum()
    torch.testing.assert_close((d_v * v).double().sum(), wanted, rtol=1e-3, atol=1e-3)


def test_a_region_that_keeps_nothing_is_refused() -> None:
    region = getattr(torch.autograd.graph, "region_activation_memory_budget", None)
    if region is None:  # an older torch has none
        return

    def step(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with region(0.0):
            return of_attention(x, v.exp())

    x, v = torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 16, requires_grad=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="would draw the seed of dropout again in the backward"):
        torch.compile(step, backend="aot_eager_decomp_partition")(x, v)


@pytest.mark.parametrize("drops", (of_attention, of_sdpa, of_lora))
def test_the_seed_is_of_torch_s_generator(
    drops: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    x, v = torch.randn(2, 2, 5, 2, 16)
    for call in (drops, torch.compile(drops, fullgraph=True, backend="aot_eager")):
        made = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            made.append(call(x, v))
        assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(("seed", "error"), ((1.5, TypeError), ("1", TypeError), (2**63, ValueError)))
def test_seeds_are_whole_numbers(seed: object, error: type[Exception]) -> None:
    x = torch.randn(1, 2, 1, 8)
    with pytest.raises(error, match="seed is"):
        bitfuse.attention(x, x, x, dropout_p=0.5, seed=seed)  # type: ignore[arg-type]

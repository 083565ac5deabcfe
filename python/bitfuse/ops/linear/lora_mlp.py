"""lora_qkv and lora_mlp: several adapted projections of one x, and the gated MLP with its own backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ...core.activations import check_activation
from ...core.autograd import Function, once, recorded, refuse_intermediate
from ...core.declaration import LINEAR, Declaration, Make, Sizes, declare
from ...core.dropout import new_seed
from ...core.explain import Explanation, together
from ...weights.example import example_weight
from ...weights.weight import LowBitWeight
from .gated_activation import gated_activation, gated_activation_backward, gated_activation_op
from .lora_args import LoraArgs
from .lora_linear import (
    apply_lora,
    autocast,
    gradients,
    learnt,
    lora_args,
    lora_linear_op,
    put_together,
    taken_apart,
)
from .lowbit_linear import check_float


class Projection(NamedTuple):
    """One linear layer with its adapter, as `bitfuse.lora_linear` takes them.

    Attributes:
        w: a `LowBitWeight` or a float matrix, (out_features, in_features).
        lora_A, lora_B: [r, in_features] and [out_features, r]; None for no adapter.
        scaling: a number or a tensor of one.
        bias: [out_features] or None.
    """

    w: torch.Tensor | LowBitWeight
    lora_A: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None
    scaling: float | torch.Tensor = 1.0
    bias: torch.Tensor | None = None


def _args(
    x: torch.Tensor, name: str, p: Projection, dropout_p: float
) -> tuple[LoraArgs, torch.Tensor | None]:
    if not isinstance(p, Projection):
        raise TypeError(f"{name} is a {type(p).__name__}, expected a bitfuse.Projection")
    if (p.lora_A is None) != (p.lora_B is None):
        raise ValueError(f"{name} has only one of lora_A and lora_B, expected both or neither")
    if not isinstance(p.w, (torch.Tensor, LowBitWeight)) or len(p.w.shape) != 2:
        found = list(p.w.shape) if hasattr(p.w, "shape") else f"a {type(p.w).__name__}"
        raise TypeError(f"w of {name} is {found}, expected a matrix or a bitfuse.LowBitWeight")
    n, k = p.w.shape
    lora_A = x.new_empty(0, k) if p.lora_A is None else p.lora_A
    lora_B = x.new_empty(n, 0) if p.lora_B is None else p.lora_B
    seed = new_seed(x) if dropout_p else None
    return lora_args(x, p.w, lora_A, lora_B, p.scaling, p.bias, seed)


def lora_qkv(
    x: torch.Tensor, projections: Sequence[Projection], dropout_p: float = 0.0
) -> tuple[torch.Tensor, ...]:
    """The query, key and value projections of one x (any number of them), each with its adapter.

    One pass over x makes every h = drop(x) A^T, and in the backward the gradients to x are added where they
    arise. What each projection computes, its gradients and its errors: `bitfuse.lora_linear`. Each has a
    dropout mask of its own.

    Args:
        x: [..., in_features], float32, float16 or bfloat16.
        projections: of x; they may differ in out_features, rank, format and dtype of the adapter.
        dropout_p: as in `bitfuse.lora_linear`.

    Returns:
        One [..., out_features] for each projection.

    Raises:
        TypeError, ValueError: as `bitfuse.lora_linear`; no projections.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a tensor")
    if not projections:
        raise ValueError("projections is empty, expected one or more")
    made = [_args(x, f"projections[{i}]", p, dropout_p) for i, p in enumerate(projections)]
    if all(perm is None for _, perm in made):
        return apply_lora(x, tuple(args for args, _ in made), dropout_p)
    # each weight has its columns in an order of its own
    return tuple(apply_lora(_ordered(x, perm), (args,), dropout_p)[0] for args, perm in made)


def _ordered(x: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
    if perm is None:
        return x
    check_float(x, "x", perm.shape[0])
    return x.index_select(-1, perm)


class _LoraMlp(Function):
    """Keeps x, gate and up; the product of the activation and up is made again in the backward. Its outputs
    are y, and what the backward reads: gate, up and each h."""

    op = "lora_mlp"

    @staticmethod
    def forward(
        x: torch.Tensor,
        wide: tuple[LoraArgs, ...],
        down: LoraArgs,
        activation: str,
        dropout_p: float,
        *_learnt: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        gate, up, *hs = lora_linear_op(x, wide, dropout_p)
        y, h = lora_linear_op(gated_activation_op(gate, up, activation), (down,), dropout_p)
        return y, gate, up, *hs, h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, wide, down, ctx.activation, ctx.dropout_p, *_ = inputs
        _, gate, up, *hs = output
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[5:]
        kept = [t if needed else None for t, needed in zip(hs, needs[2::4], strict=True)]
        of_wide, ctx.wide = taken_apart(wide)
        of_down, ctx.down = taken_apart((down,))
        x_kept = x if any(needs[:8][0::4]) or any(needs[:8][1::4]) else None
        ctx.save_for_backward(x_kept, gate, up, *kept, *of_wide, *of_down)

    @staticmethod
    @once("lora_mlp")
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_intermediate("lora_mlp", grads[1:])
        x, gate, up, *rest = ctx.saved_tensors
        h_gate, h_up, h_down, *tensors = rest
        remaining: Iterator[Any] = iter(tensors)
        wide, down = put_together(remaining, ctx.wide), put_together(remaining, ctx.down)
        x_wanted, _, _, _, _, *needs = ctx.needs_input_grad
        below = x_wanted or any(needs[:8])
        middle = gated_activation_op(gate, up, ctx.activation) if needs[8] or needs[9] else None
        grad_middle, of_down = gradients(
            grads[:1], middle, down, (h_down,), ctx.dropout_p, below, tuple(needs[8:])
        )
        grad_x: torch.Tensor | None = None
        of_wide: list[torch.Tensor | None] = [None] * 8
        if below:
            d_gate, d_up = gated_activation_backward(grad_middle, gate, up, ctx.activation)
            grad_x, of_wide = gradients(
                (d_gate, d_up), x, wide, (h_gate, h_up), ctx.dropout_p, x_wanted, tuple(needs[:8])
            )
        return grad_x, None, None, None, None, *of_wide, *of_down


def lora_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """down(act(gate(x)) * up(x)), the gated MLP of Llama (SwiGLU) and Gemma (GeGLU), each with its adapter.

    gate and up share one pass over x; activation and product are one kernel. The backward is written by
    hand: it keeps x, gate(x) and up(x), makes the product again instead of keeping it, and one kernel gives
    the gradients of both factors. (The order of work of Unsloth's MLP; no code of it.)

    Args:
        x: [..., in_features], float32, float16 or bfloat16.
        gate, up: of x; down: of their product.
        activation: "silu", "gelu" (erf), "gelu_tanh" or "relu".
        dropout_p: as in `bitfuse.lora_linear`, of the inputs of all three adapters.

    Returns:
        [..., out_features of down], of x's dtype.

    Raises:
        TypeError, ValueError: as `bitfuse.lora_linear`; gate and up of two widths, or not down's; an unknown
            activation.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a tensor")
    check_activation(activation)
    made = [_args(x, name, p, dropout_p) for name, p in (("gate", gate), ("up", up), ("down", down))]
    width = (gate.w.shape[0], up.w.shape[0], down.w.shape[1])
    if len({int(w) for w in width}) != 1:  # int: torch.jit.trace gives tensors
        raise ValueError(
            f"gate and up have {width[0]} and {width[1]} out_features and down {width[2]} in_features, "
            "expected one number"
        )
    if any(perm is not None for _, perm in made):
        g, u = lora_qkv(x, (gate, up), dropout_p)
        return lora_qkv(gated_activation(g, u, activation), (down,), dropout_p)[0]
    x, (*wide, last) = autocast(x, tuple(args for args, _ in made))
    tensors = learnt((*wide, last))
    if recorded(x, *tensors):
        return _LoraMlp.call(x, tuple(wide), last, activation, dropout_p, *tensors)[0]
    g, u, *_ = lora_linear_op(x, tuple(wide), dropout_p)
    return lora_linear_op(gated_activation_op(g, u, activation), (last,), dropout_p)[0]


def _explain_qkv(x: torch.Tensor, projections: Sequence[Projection], dropout_p: float = 0.0) -> Explanation:
    made = [_args(x, f"projections[{i}]", p, dropout_p)[0] for i, p in enumerate(projections)]
    if not made:
        raise ValueError("projections is empty, expected one or more")
    return replace(lora_linear_op.explain(x, tuple(made), dropout_p), op="lora_qkv")


def _explain_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    dropout_p: float = 0.0,
) -> Explanation:
    made = [_args(x, name, p, dropout_p)[0] for name, p in (("gate", gate), ("up", up), ("down", down))]
    g, u = (x.new_empty(*x.shape[:-1], args.shape[0]) for args in made[:2])
    return together(
        "lora_mlp",
        (
            ("gate and up", lora_linear_op.explain(x, tuple(made[:2]), dropout_p)),
            ("activation", gated_activation_op.explain(g, u, activation)),
            ("down", lora_linear_op.explain(g, (made[2],), dropout_p)),
        ),
    )


def _example(s: Sizes, make: Make, n: int, k: int) -> Projection:
    return Projection(example_weight(replace(s, n=n, k=k), make), make(s.rank, k), make(n, s.rank))


def _example_qkv(s: Sizes, make: Make) -> tuple[Any, ...]:
    widths = (s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim)
    return make(s.m, s.k), [_example(s, make, n, s.k) for n in widths]


def _example_mlp(s: Sizes, make: Make) -> tuple[Any, ...]:
    wide = [_example(s, make, s.n, s.k) for _ in range(2)]
    return make(s.m, s.k), *wide, _example(s, make, s.k, s.n)


declare(
    Declaration(
        lora_qkv,
        "several projections of one x, each with its LoRA adapter",
        place=4,
        explain=_explain_qkv,
        uses=("m", "k", "heads", "kv_heads", "head_dim", "format", "group_size", "dtype", "rank"),
        arguments=_example_qkv,
        like="lora_linear",
        classes=(Projection,),
        matrices="hidden",
    )
)
declare(
    Declaration(
        lora_mlp,
        "a gated MLP whose projections have LoRA adapters",
        place=5,
        explain=_explain_mlp,
        uses=(*LINEAR, "rank"),
        arguments=_example_mlp,
        like="lora_linear",
        matrices="mlp",
    )
)

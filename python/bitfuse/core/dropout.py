"""Dropout whose mask is a function of a seed and of an element's place: nothing is stored, and the backward
pass, another backend or another device draws the same mask again."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.compiler import is_compiling

# the multipliers of a 32-bit integer hash with little bias (Wellons, "Prospecting for hash functions", 2018)
FIRST, SECOND = 0x7FEB352D, 0x846CA68B
GOLDEN = 0x9E3779B9
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """An element is dropped when its 32 bits, as an unsigned number, are below this."""
    return min(round(p * 2**32), _WORD)


def keep(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    """Which elements of a matrix survive: bool [rows, columns].

    With words of 32 bits, arithmetic modulo 2**32, `low` and `high` the halves of the seed:

        mix(v): v ^= v >> 16; v *= FIRST; v ^= v >> 15; v *= SECOND; v ^= v >> 16
        a = mix(row + low); b = mix(a ^ high ^ GOLDEN)
        v = column ^ a; v ^= v >> 16; v *= FIRST; v ^= v >> 15; v ^= b; v *= SECOND; v ^= v >> 16

    and the element survives if v >= threshold(p).

    Args:
        seed: int64, one element.
        rows, columns: of the matrix; leading dimensions are flattened into rows.
        p: probability to drop, 0 <= p < 1.
    """
    return keep_rows(seed, torch.arange(rows, dtype=torch.int64, device=seed.device), columns, p)


def keep_rows(seed: torch.Tensor, rows: torch.Tensor, columns: int, p: float) -> torch.Tensor:
    """`keep` for some rows of the matrix, by their numbers, int64: bool [len(rows), columns]."""
    seed = seed.reshape(())
    low, high = seed & _WORD, (seed >> 32) & _WORD
    a = _mix((rows + low) & _WORD)
    b = _mix(a ^ high ^ GOLDEN)
    v = torch.arange(columns, dtype=torch.int64, device=seed.device) ^ a.unsqueeze(1)
    v = _times(v ^ (v >> 16), FIRST)
    v = _times(v ^ (v >> 15) ^ b.unsqueeze(1), SECOND)
    return v ^ (v >> 16) >= threshold(p)


def _times(v: torch.Tensor, factor: int) -> torch.Tensor:
    return (v * factor) & _WORD  # int64 wraps, and its low word is right


def _mix(v: torch.Tensor) -> torch.Tensor:
    v = _times(v ^ (v >> 16), FIRST)
    v = _times(v ^ (v >> 15), SECOND)
    return v ^ (v >> 16)


# the seed

_library = torch.library.Library("bitfuse", "FRAGMENT")


def new_seed(x: torch.Tensor) -> torch.Tensor:
    """A seed from torch's generator of x's device: `torch.manual_seed` fixes it, checkpointing repeats it."""
    if is_compiling():
        return torch.ops.bitfuse.new_seed(0, device=x.device)
    return _draw(0, device=x.device)


def _draw(number: int, *, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)


def _fake_draw(number: int, *, device: torch.device) -> torch.Tensor:
    _keep_in_graphs()
    return torch.empty((), dtype=torch.int64, device=device)


@functools.cache
def _keep_in_graphs() -> None:
    """See that a compiled backward has the seed of its forward.

    What divides the graph of both in two (torch._functorch.partitioners) may compute anything of the forward
    again to save memory, as much as `activation_memory_budget` says, and knows of few random ops that it must
    not. So the seed is marked to be saved; inside `torch.utils.checkpoint`, which marks it to be computed
    again, the state of the generator is kept instead, as for every op with the tag nondeterministic_seeded.
    Seeds are numbered, for two calls with the same arguments would count as one.
    """
    from torch._functorch import config
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
    from torch.utils.checkpoint import CheckpointPolicy

    def trace(mode: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        made = mode.__torch_dispatch__(func, types, args, kwargs or {})
        drawn = [node for node in mode.tracer.graph.nodes if node.target is func]
        node = drawn[-1]
        node.args = (len(drawn), *node.args[1:])
        node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)
        if config.activation_memory_budget == 0:
            node.meta["memory_budget"] = 1e-9  # at 0 the mark is not looked at
        annotated = node.meta.get("custom")
        for key, value in annotated.items() if isinstance(annotated, dict) else ():
            if "memory_budget" in str(key) and value == 0:
                raise RuntimeError(
                    "a region with an activation memory budget of 0 would draw the seed of dropout again in "
                    "the backward: expected a budget above 0, such as 1e-9"
                )
        return made

    torch.library.register_torch_dispatch("bitfuse::new_seed", ProxyTorchDispatchMode, trace, lib=_library)


_library.define("new_seed(int number, *, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.impl("new_seed", _draw, "CompositeExplicitAutograd")
torch.library.register_fake("bitfuse::new_seed", _fake_draw, lib=_library)

"""Explanation: who serves a call, why the others don't, and what it costs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import declaration
from .cost import Cost, Prediction, Rates, as_time
from .device import pretended
from .gpus import find


@dataclass(frozen=True)
class Explanation:
    """Who serves a call, why those before it in the order do not, and what the call costs.

    Attributes:
        refused: by backend, the reason.
        note: about `chosen`.
        cost: bytes and FLOPs.
        rates: of the device, where they are known: a GPU's data sheet; None for a CPU.
        policy_key: what `bitfuse tune` remembers such calls by; None where there is nothing to tune.
        prediction: the time to expect of `chosen`, where `rates` are known and it is no reference.
    """

    op: str
    device: str
    chosen: str
    refused: dict[str, str]
    note: str
    cost: Cost
    rates: Rates | None
    policy_key: str | None = None
    prediction: Prediction | None = None

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.chosen} runs{self.note and ', '}{self.note}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        lines.append(f"  {self.cost}")
        if self.rates is not None:
            least, by = self.cost.seconds(self.rates)
            lines[-1] += f": at least {as_time(least)} on {self.rates.name}, bound by {by}"
            if self.prediction is not None:
                lines[-1] += f"; about {as_time(self.prediction.seconds)} to be expected"
        return "\n".join(lines)


def rates_of(device: torch.device) -> Rates | None:
    """Of a GPU that is known by its name."""
    gpu = pretended()
    if gpu is None and device.type == "cuda":
        with contextlib.suppress(ValueError):
            gpu = find(torch.cuda.get_device_name(device))
    return None if gpu is None else Rates.of(gpu)


def explain(op: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Who would serve ``op(*args)``, and why the backends before it would not. Runs nothing.

    Args:
        op: a function of bitfuse such as `bitfuse.lowbit_linear`, or a bitfuse layer.

    Raises:
        TypeError: op is neither.
    """
    explainer = getattr(op, "explain", None) or declaration.explainer(op)
    if explainer is None:
        raise TypeError(f"op is {op!r}, expected a bitfuse op or layer, such as bitfuse.lowbit_linear")
    return explainer(*args, **kwargs)


def together(name: str, parts: Sequence[tuple[str, Explanation]]) -> Explanation:
    """The explanation of a function that makes several calls, each with what it is for.

    Who serves it is who serves most of it, by bytes; where its parts differ, each is named.
    """
    several = len({part.chosen for _, part in parts}) > 1
    chosen = max((part for _, part in parts), key=lambda part: part.cost.nbytes).chosen
    refused: dict[str, str] = {}
    for what, part in parts:
        for backend, reason in part.refused.items():
            if reason not in refused.get(backend, ""):
                before = f"{refused[backend]}; " if backend in refused else ""
                refused[backend] = f"{before}{reason}" + (f" ({what})" if several else "")
    said = ", ".join(f"{what}: {part.op}" + (f" by {part.chosen}" if several else "") for what, part in parts)
    cost = functools.reduce(lambda a, b: a + b, (part.cost for _, part in parts))
    first = parts[0][1]
    each = [part.prediction for _, part in parts]
    whole = None if None in each else functools.reduce(lambda a, b: a + b, (p for p in each if p))
    return Explanation(name, first.device, chosen, refused, said, cost, first.rates, prediction=whole)

"""quantize_: every linear layer of a model in few bits, in place."""

from __future__ import annotations

import fnmatch
import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from .formats import Format, get_format
from .nn import Linear
from .weight import LowBitWeight, check_shape


@dataclass(frozen=True)
class LayerReport:
    """One replaced layer: bytes of its weight, and ||W_q - W|| / ||W||."""

    name: str
    shape: tuple[int, int]
    format: str
    bytes_before: int
    bytes_after: int
    relative_error: float


@dataclass
class QuantizationReport:
    """What `quantize_` did. `str()` is a table.

    Attributes:
        layers: the layers replaced; weights that were tied count once.
        skipped: name of each linear layer left alone, and why.
        bytes_before, bytes_after: parameters and buffers of the whole model, tied ones once.
    """

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def worst_relative_error(self) -> float:
        return max((layer.relative_error for layer in self.layers), default=0.0)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("layer", "shape", "format")
        for heading in ("MB before", "MB after", "rel. error"):
            table.add_column(heading, justify="right")
        for r in self.layers:
            sizes = f"{r.bytes_before / 1e6:.2f}", f"{r.bytes_after / 1e6:.2f}"
            table.add_row(r.name, f"{r.shape[0]} x {r.shape[1]}", r.format, *sizes, f"{r.relative_error:.4f}")
        for name, reason in self.skipped.items():
            table.add_row(name, "", f"left as it is: {reason}")
        table.add_section()
        whole = f"{self.bytes_before / 1e6:.2f}", f"{self.bytes_after / 1e6:.2f}"
        table.add_row(
            "whole model", f"{len(self.layers)} layers", "", *whole, f"{self.worst_relative_error:.4f} worst"
        )
        out = io.StringIO()
        Console(file=out, width=120).print(table)
        return out.getvalue()


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers; a tensor that is shared counts once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())


def quantize_(
    model: torch.nn.Module,
    format: str | Format = "int4",
    *,
    skip: Iterable[str] = (),
    progress: bool = True,
    **options: Any,
) -> QuantizationReport:
    """Replace every `torch.nn.Linear` inside a model by a `bitfuse.nn.Linear`, in place.

    Every layer is looked at before the first is changed, so an error leaves the model as it was. Memory stays
    below the model plus one layer. Linear layers that share a weight share its codes afterwards; one that
    shares its weight with another kind of module (an embedding) keeps it, and the report says so. Hooks,
    training flags and biases are kept.

    Args:
        model: any module that holds linear layers; itself a Linear: use `bitfuse.nn.Linear.from_float`.
        format: a name or a `Format`.
        skip: layers to leave: full names, glob patterns ("*.lm_head") or one component of the name
            ("lm_head").
        progress: show a progress bar.
        **options: group_size, symmetric, nested, scale_dtype as in `bitfuse.quantize`.

    Raises:
        TypeError: model is not a module, or is a Linear itself.
        ValueError: an unknown format; a layer whose sizes do not fit it or whose weight holds a NaN or Inf
            (named).
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, torch.nn.Linear):
        raise TypeError(
            "model is itself a Linear and can't be replaced in place: use bitfuse.nn.Linear.from_float"
        )
    fmt = get_format(format, **options)
    report = QuantizationReport(bytes_before=model_bytes(model))
    chosen = _choose(model, [skip] if isinstance(skip, str) else list(skip), report)
    _check_layers(chosen, fmt)

    places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, name))
    quantised: dict[int, Linear] = {}
    # each weight stays alive in `chosen` only until its last user is replaced: that is what bounds the memory
    users = [id(linear.weight) for _, linear in chosen]
    chosen.reverse()
    users.reverse()
    bar = tqdm(
        total=len(chosen), desc=f"quantize to {fmt.name}", unit="layer", disable=not progress, leave=False
    )
    while chosen:
        name, linear = chosen.pop()
        tied = users.pop()
        if tied in quantised:
            layer = Linear.from_weight(quantised[tied].weight, linear.bias)
            for shared, t in quantised[tied]._parameters.items():
                if shared != "bias":
                    layer._parameters[shared] = t
        else:
            layer = Linear.from_float(linear, fmt)
            report.layers.append(_layer_report(name, layer.weight, linear.weight))
        if tied in users:
            quantised[tied] = layer
        _take_over(layer, linear)
        for parent, key in places[id(linear)]:
            parent._modules[key] = layer
        del linear
        bar.update()
    bar.close()
    report.bytes_after = model_bytes(model)
    return report


def _layer_report(name: str, w: LowBitWeight, weight: torch.Tensor) -> LayerReport:
    return LayerReport(
        name, w.shape, str(w.format), weight.nbytes, w.nbytes, w.relative_error(weight.detach())
    )


def _choose(
    model: torch.nn.Module, skip: list[str], report: QuantizationReport
) -> list[tuple[str, torch.nn.Linear]]:
    """The layers to replace, in order; the report takes the others with the reason."""
    elsewhere: dict[int, str] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not (type(module) is torch.nn.Linear and key == "weight"):
                elsewhere[id(parameter)] = f"{name}.{key}".lstrip(".")
    chosen, used = [], set()
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        hits = [p for p in skip if fnmatch.fnmatchcase(name, p) or p in name.split(".")]
        used.update(hits)
        if hits:
            report.skipped[name] = f"skip={hits[0]!r}"
        elif type(module) is not torch.nn.Linear:
            report.skipped[name] = f"a subclass of Linear ({type(module).__name__}), whose meaning is its own"
        elif id(module.weight) in elsewhere:
            report.skipped[name] = f"its weight is tied to {elsewhere[id(module.weight)]}"
        elif "forward" in module.__dict__:
            report.skipped[name] = "its forward is replaced on the instance"
        else:
            chosen.append((name, module))
    for pattern in skip:
        if pattern not in used:
            warnings.warn(f"skip={pattern!r} matches no linear layer of the model", stacklevel=3)
    return chosen


def _check_layers(layers: list[tuple[str, torch.nn.Linear]], format: Format) -> None:
    unfit, kinds = [], set()
    for name, linear in layers:
        kinds.add(linear.weight.device.type)
        if linear.weight.is_meta:
            raise ValueError(f"{name}.weight is on the meta device: load the model before quantising it")
        try:
            check_shape((linear.out_features, linear.in_features), format)
        except ValueError as why:
            unfit.append((name, why))
        low, high = torch.aminmax(linear.weight.detach()) if linear.weight.numel() else (torch.zeros(()),) * 2
        if not bool(torch.isfinite(low + high)):
            raise ValueError(f"{name}.weight holds a NaN or Inf, expected finite numbers")
    if unfit:
        names = ", ".join(name for name, _ in unfit[:5]) + (
            f" and {len(unfit) - 5} more" if len(unfit) > 5 else ""
        )
        raise ValueError(
            f"{names}: {unfit[0][1]}; pass another group_size, or skip={[name for name, _ in unfit[:5]]}"
        )


def _take_over(layer: Linear, linear: torch.nn.Linear) -> None:
    """Give the new layer the old one's hooks, training flag and whatever else was set on it."""
    own = layer.__dict__.keys() - torch.nn.Module().__dict__.keys()
    structure = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *own}
    layer.__dict__.update({k: v for k, v in linear.__dict__.items() if k not in structure})

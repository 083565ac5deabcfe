"""quantize_: every linear layer of a model in few bits, in place."""

from __future__ import annotations

import fnmatch
import math
import os
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.text import progress_bar, table
from ..nn import Embedding, Linear
from ..nn.adapters import AdapterLinear
from ..nn.few_bits import FewBits
from ..nn.linear import float_weight, is_conv1d
from ..weights.checks import check_float_weight, check_shape
from ..weights.formats import Format, get_format
from ..weights.quantize import find_scales
from ..weights.weight import LowBitWeight

# subclasses of torch.nn.Linear that compute what it computes
_PLAIN = {("transformers.models.falcon.modeling_falcon", "FalconLinear")}


@dataclass(frozen=True)
class LayerReport:
    """One replaced layer: bytes of its weight, and ||W_q - W|| / ||W||, NaN for one that was on meta."""

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
        skipped: name of each linear layer left alone, and of each big parameter that no linear layer holds
            (experts in one tensor), and why.
        bytes_before, bytes_after: parameters and buffers of the whole model, tied ones once.
    """

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def worst_relative_error(self) -> float:
        known = (e for layer in self.layers if not math.isnan(e := layer.relative_error))
        return max(known, default=0.0)

    def __str__(self) -> str:
        rows = [
            (
                *(r.name, f"{r.shape[0]} x {r.shape[1]}", r.format),
                *(f"{r.bytes_before / 1e6:.2f}", f"{r.bytes_after / 1e6:.2f}", f"{r.relative_error:.4f}"),
            )
            for r in self.layers
        ]
        rows += [(name, "", f"left as it is: {why}", "", "", "") for name, why in self.skipped.items()]
        last = (
            *("whole model", f"{len(self.layers)} layers", ""),
            *(f"{self.bytes_before / 1e6:.2f}", f"{self.bytes_after / 1e6:.2f}"),
            f"{self.worst_relative_error:.4f} worst",
        )
        headings = ("layer", "shape", "format", "MB before", "MB after", "rel. error")
        return table(headings, rows, last, numbers=3)


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
    skeleton: bool = False,
    embeddings: bool = False,
    **options: Any,
) -> QuantizationReport:
    """Replace every `torch.nn.Linear` inside a model by a `bitfuse.nn.Linear`, in place.

    Every layer is looked at before the first is changed, so an error leaves the model as it was. Memory stays
    below the model plus one layer. Linear layers that share a weight share its codes afterwards; one that
    shares its weight with another kind of module (an embedding) keeps it, and the report says so. Hooks,
    training flags and biases are kept. transformers' Conv1D (GPT-2) and FalconLinear are replaced too;
    adapters of PEFT stay as they are, and the layers under them are replaced.

    The state dict is saved and loaded as any other: build the model, `quantize_` it likewise,
    `load_state_dict`. `save_pretrained` of a transformers or diffusers model would write what
    `from_pretrained` can't build, and is refused from here on; a Trainer's checkpoints, which are loaded into
    the model that is there, are not.

    Args:
        model: any module that holds linear layers; itself a Linear: use `bitfuse.nn.Linear.from_float`.
        format: a name or a `Format`.
        skip: layers to leave: full names, glob patterns ("*.lm_head") or one component of the name
            ("lm_head").
        progress: show a progress bar, where tqdm is installed.
        skeleton: take layers on the meta device too, which become few-bit layers there: a checkpoint is
            loaded into them (``load_state_dict(state, assign=True)``) without the dense model in memory.
        embeddings: take every `torch.nn.Embedding` too, which becomes a `bitfuse.nn.Embedding`; a linear
            layer that shares its weight reads its codes, and the state dict has them once, at the embedding.
        **options: group_size, symmetric, nested, scale_dtype as in `bitfuse.quantize`. Without group_size
            each layer has the largest power of two up to the format's that divides its in_features.

    Warns:
        UserWarning: nothing is replaced; layers are of another few-bit format already; big parameters that no
            linear layer holds are left; groups are lost in their scales (see `bitfuse.quantize`).

    Raises:
        TypeError: model is not a module, or is a Linear itself; a layer's dtype (named).
        ValueError: an unknown format; a layer whose sizes do not fit it, whose weight holds a NaN or Inf, or
            whose scales scale_dtype can't hold (named).
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, torch.nn.Linear) or is_conv1d(model):
        raise TypeError(
            "model is itself a Linear and can't be replaced in place: use bitfuse.nn.Linear.from_float"
        )
    fmt = get_format(format, **options)
    group_size = options.get("group_size")
    report = QuantizationReport(bytes_before=model_bytes(model))
    chosen = _choose(model, [skip] if isinstance(skip, str) else list(skip), report, embeddings)
    lost = _check_layers(chosen, fmt, group_size, skeleton)
    _warn(model, chosen, fmt if group_size is None else None, report, lost)

    places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, name))
    quantised: dict[tuple[int, bool], FewBits] = {}
    # each weight stays alive in `chosen` only until its last user is replaced: that is what bounds the memory
    users = [(id(linear.weight), is_conv1d(linear)) for _, linear in chosen]
    chosen.reverse()
    users.reverse()
    bar = progress_bar(f"quantize to {fmt.name}", len(chosen), "layer", progress)
    while chosen:
        name, linear = chosen.pop()
        tied = users.pop()
        layer: FewBits
        first, bias = quantised.get(tied), linear._parameters.get("bias")
        if first is not None and isinstance(linear, torch.nn.Embedding):
            layer = Embedding.from_weight(first.weight, linear.padding_idx)
            layer._read_codes_of(first)
        elif isinstance(first, Embedding):
            layer = Linear.tied_to(first, bias)
        elif first is not None:
            layer = Linear.from_weight(first.weight, bias)
            for shared, t in first._parameters.items():
                if shared != "bias":
                    layer._parameters[shared] = t
        else:
            weight = _dense_weight(linear)
            if weight.is_meta:
                n, k = weight.shape
                options = {"device": "meta", "dtype": weight.dtype, "group_size": group_size}
                if isinstance(linear, torch.nn.Embedding):
                    layer = Embedding(n, k, linear.padding_idx, format=fmt, **options)
                else:
                    layer = Linear(k, n, False, format=fmt, **options)
                    layer.register_parameter("bias", linear.bias)
                layer.train(linear.training)
            else:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "weight: ", UserWarning)  # told, with the layers' names
                    if isinstance(linear, torch.nn.Embedding):
                        layer = Embedding.from_float(linear, fmt, group_size=group_size)
                    else:
                        layer = Linear.from_float(linear, fmt, group_size=group_size)
            report.layers.append(_layer_report(name, layer.weight, weight))
            del weight
        if tied in users:
            quantised[tied] = layer
        _take_over(layer, linear)
        for parent, key in places[id(linear)]:
            parent._modules[key] = layer
        del linear
        bar.update()
    bar.close()
    if report.layers:
        _refuse_save_pretrained(model)
        _keep_ties(model)
    report.bytes_after = model_bytes(model)
    return report


def _layer_report(name: str, w: LowBitWeight, weight: torch.Tensor) -> LayerReport:
    error = math.nan if weight.is_meta else w.relative_error(weight.detach())
    return LayerReport(name, (w.shape[0], w.shape[1]), str(w.format), weight.nbytes, w.nbytes, error)


Dense = torch.nn.Linear | torch.nn.Embedding


def _dense_weight(module: Dense) -> torch.Tensor:
    """What becomes codes."""
    weight = module.weight if isinstance(module, torch.nn.Embedding) else float_weight(module)
    assert isinstance(weight, torch.Tensor)
    return weight


def _choose(
    model: torch.nn.Module, skip: list[str], report: QuantizationReport, embeddings: bool
) -> list[tuple[str, Dense]]:
    """The layers to replace, in order; the report takes the others with the reason."""

    def plain(module: torch.nn.Module, name: str) -> bool:
        """Whether it holds its weight for what replaces it."""
        if type(module) is torch.nn.Embedding:
            return embeddings and not _hits(name, skip) and module.max_norm is None
        return _is_plain(module)

    elsewhere: dict[int, str] = {}
    apart: dict[str, str] = {}  # prefixes of names, and why nothing below is touched
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not (key == "weight" and plain(module, name)):
                elsewhere[id(parameter)] = f"{name}.{key}".lstrip(".")
        apart |= {f"{name}.{child}.".lstrip("."): why for child, why in _apart(module).items()}
    chosen, used = [], set()
    for name, module in model.named_modules():
        asked = embeddings and isinstance(module, torch.nn.Embedding)
        if not (isinstance(module, torch.nn.Linear) or is_conv1d(module) or asked):
            continue
        hits = _hits(name, skip)
        used.update(hits)
        within = next((why for prefix, why in apart.items() if f"{name}.".startswith(prefix)), None)
        if hits:
            report.skipped[name] = f"skip={hits[0]!r}"
        elif isinstance(module, FewBits):
            report.skipped[name] = f"of few bits already ({module.format})"
        elif within is not None:
            report.skipped[name] = within
        elif reason := _refusal(module, elsewhere):
            report.skipped[name] = reason
        else:
            chosen.append((name, module))
    for pattern in skip:
        if pattern not in used:
            warnings.warn(f"skip={pattern!r} matches no linear layer of the model", stacklevel=3)
    return chosen


def _hits(name: str, skip: list[str]) -> list[str]:
    """Which patterns a layer's name matches."""
    return [p for p in skip if fnmatch.fnmatchcase(name, p) or p in name.split(".")]


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a module computes x W^T + b of its parameters, no more."""
    kind = type(module)
    return kind is torch.nn.Linear or (kind.__module__, kind.__name__) in _PLAIN or is_conv1d(module)


def _apart(module: torch.nn.Module) -> dict[str, str]:
    """The children of a module that are not the model's own layers, and why."""
    if isinstance(module, AdapterLinear) and module.merged_layer is not None:
        return dict.fromkeys(("base_layer", "merged_layer"), "its adapters are merged: unmerge them first")
    kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("peft.")}
    if "BaseTunerLayer" in kinds:
        children = [name for name in module._modules if name != "base_layer"]
        return dict.fromkeys(children, "an adapter of PEFT")
    if kinds & {"ModulesToSaveWrapper", "AuxiliaryTrainingWrapper"}:
        return {"modules_to_save": "a module that PEFT trains and saves"}
    return {}


def _refusal(module: torch.nn.Module, elsewhere: dict[int, str]) -> str | None:
    """Why a linear layer is left as it is."""
    embedding = isinstance(module, torch.nn.Embedding)
    computed = [key for key in ("weight", "bias")[: 1 if embedding else 2] if key not in module._parameters]
    if embedding and type(module) is not torch.nn.Embedding:
        return f"a subclass of Embedding ({type(module).__name__}), whose meaning is its own"
    if isinstance(module, torch.nn.Embedding) and module.max_norm is not None:
        return "its max_norm writes to its rows"
    if not embedding and not _is_plain(module):
        return f"a subclass of Linear ({type(module).__name__}), whose meaning is its own"
    if computed:
        by = ", ".join(sorted({type(hook).__name__ for hook in module._forward_pre_hooks.values()}))
        return f"its {computed[0]} is computed by a hook ({by or 'none is registered'})"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    weight = module._parameters["weight"]
    if type(weight) is not torch.nn.Parameter:
        return f"its weight is a {type(weight).__name__}, no plain parameter"
    if id(weight) in elsewhere:
        return f"its weight is tied to {elsewhere[id(weight)]}"
    return None


def _check_layers(
    layers: list[tuple[str, Dense]], format: Format, group_size: int | None, skeleton: bool
) -> dict[str, str]:
    """Raise for whatever `quantize` refuses, with the layer's name; returns what is lost in the scales of the
    others, by layer."""
    unfit, lost = [], {}
    for name, linear in layers:
        weight = _dense_weight(linear).detach()
        try:
            check_float_weight(weight, skeleton)
        except (TypeError, ValueError) as why:
            hint = ", or pass skeleton=True to load a state into it" if weight.is_meta else ""
            raise type(why)(f"{name}.{why}{hint}") from None
        fmt = format.fitted(weight.shape[1]) if group_size is None else format
        try:
            check_shape((weight.shape[0], weight.shape[1]), fmt)
        except ValueError as why:
            unfit.append((name, why))
            continue
        if weight.is_meta:
            continue
        low, high = (float(v) for v in torch.aminmax(weight)) if weight.numel() else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name}.weight holds a NaN or Inf, expected finite numbers")
        largest = max(-low, high)
        # scales in float32 hold all that is not at the ends of float32's own range
        if fmt.scale_dtype != torch.float32 or fmt.nested or not 1e-30 < largest < 1e37:
            try:
                said = find_scales(weight, fmt)[-1]
            except ValueError as why:
                raise ValueError(f"{name}.weight: {why}") from None
            if said:
                lost[name] = said
    if unfit:
        names = ", ".join(name for name, _ in unfit[:5]) + (
            f" and {len(unfit) - 5} more" if len(unfit) > 5 else ""
        )
        other = "pass another group_size, or " if "group_size" in str(unfit[0][1]) else ""
        raise ValueError(f"{names}: {unfit[0][1]}; {other}skip={[name for name, _ in unfit[:5]]}")
    return lost


def _warn(
    model: torch.nn.Module,
    chosen: list[tuple[str, Dense]],
    default: Format | None,
    report: QuantizationReport,
    lost: dict[str, str],
) -> None:
    """Say what a user would not expect; big parameters that are left go into the report too."""
    big = _big_parameters(model)
    report.skipped |= {
        name: f"a parameter {list(p.shape)} of {kind}, which is no linear layer"
        for name, (p, kind) in big.items()
    }
    numbers = sum(p.numel() for p in model.parameters())
    share = sum(p.numel() for p, _ in big.values()) / max(numbers, 1)
    asked = bool(report.skipped) and all(why.startswith("skip=") for why in report.skipped.values())
    if not chosen and not asked:
        why = [f"{count} {reason}" for reason, count in Counter(report.skipped.values()).most_common(3)]
        found = "; ".join(why) or "the model has no linear layer"
        warnings.warn(f"quantize_ replaces nothing: {found}", stacklevel=3)
    elif chosen and share >= 0.1:
        some = ", ".join(list(big)[:3]) + (" ..." if len(big) > 3 else "")
        warnings.warn(
            f"{share:.0%} of the model's numbers stay as they are, in parameters that no linear layer holds "
            f"({some}): see the report's `skipped`",
            stacklevel=3,
        )
    few_bit = [(n, m) for n, m in model.named_modules() if isinstance(m, Linear)]
    other = [n for n, m in few_bit if default is not None and m.format != default.fitted(m.in_features)]
    if chosen and other:
        warnings.warn(f"of another few-bit format already, and stay so: {', '.join(other[:5])}", stacklevel=3)
    for name, said in list(lost.items())[:3]:
        warnings.warn(f"{name}.weight: {said}", stacklevel=3)


def _big_parameters(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, str]]:
    """Matrices that are parameters of their own (experts in one tensor, in_proj_weight): a hundredth of the
    model or more, or one of several dimensions; each with the kind of its module."""
    layers = (torch.nn.Linear, torch.nn.Embedding, torch.nn.EmbeddingBag, torch.nn.modules.conv._ConvNd)
    expected = (*layers, torch.nn.utils.parametrize.ParametrizationList)
    numbers = sum(p.numel() for p in model.parameters())
    found: dict[str, tuple[torch.Tensor, str]] = {}
    adapters: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            adapters = (*adapters, f"{name}.adapters")
        adapters = (*adapters, *(f"{name}.{child}".lstrip(".") for child in _apart(module)))
        if isinstance(module, expected) or is_conv1d(module) or (adapters and name.startswith(adapters)):
            continue
        for key, p in module._parameters.items():
            if p is None or p.dim() < 2 or not p.is_floating_point():
                continue
            if p.numel() * 100 >= numbers or (p.dim() > 2 and p.shape[0] > 1 and min(p.shape[-2:]) >= 8):
                found[f"{name}.{key}".lstrip(".")] = p, type(module).__name__
    return found


class _SavePretrained:
    """`save_pretrained` of a model with few-bit layers."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)  # a model that holds itself would outlive `del model`

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse to write what `from_pretrained` would read as layers that it draws at random.

        Raises:
            ValueError: the state that is to be saved holds few-bit layers.
        """
        model = self._model()
        assert isinstance(model, torch.nn.Module)
        state = kwargs.get("state_dict")
        few_bit = any(isinstance(module, Linear) for module in model.modules())
        if state is not None:
            few_bit = any(str(key).endswith("qweight") for key in state)
        # a Trainer loads its checkpoints into the model that is there
        checkpoint = re.fullmatch(
            r"checkpoint-\d+", os.path.basename(os.path.normpath(os.fspath(save_directory)))
        )
        if few_bit and not checkpoint:
            raise ValueError(
                f"save_pretrained: {type(model).__name__} holds bitfuse.nn.Linear layers, which "
                "from_pretrained would make at random. Save model.state_dict() (torch.save, or save_file of "
                "safetensors); to load: build the model, bitfuse.quantize_ it with the same options, "
                "load_state_dict. Adapters alone: bitfuse.save_peft"
            )
        return type(model).save_pretrained(model, save_directory, *args, **kwargs)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the model has one of its own
        return _SavePretrained, (self._model(),)


def _refuse_save_pretrained(model: torch.nn.Module) -> None:
    """Put `_SavePretrained` on each model inside whose package builds models from what it saved."""
    for module in model.modules():
        packages = {kind.__module__.partition(".")[0] for kind in type(module).__mro__}
        if packages & {"transformers", "diffusers"} and callable(
            getattr(type(module), "save_pretrained", None)
        ):
            module.__dict__["save_pretrained"] = _SavePretrained(module)


def _keep_ties(model: torch.nn.Module) -> None:
    """What reads the codes of an embedding is tied to it, and transformers, which would tie a `weight` that
    is no parameter, has nothing left to do."""
    for module in model.modules():
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, name, None)
            if isinstance(ties, dict):
                left = {to: of for to, of in ties.items() if not _reads_codes(module, to)}
                if len(left) < len(ties):
                    module.__dict__[name] = left


def _reads_codes(model: torch.nn.Module, weight: str) -> bool:
    """Whether the parameter of this name is codes that another layer holds, or is read by another."""
    try:
        layer = model.get_submodule(weight.rpartition(".")[0])
    except AttributeError:
        return False
    return isinstance(layer, FewBits) and bool(layer._source)


def _take_over(layer: FewBits, linear: Dense) -> None:
    """Give the new layer the old one's hooks, training flag and whatever else was set on it."""
    own = layer.__dict__.keys() - torch.nn.Module().__dict__.keys()
    structure = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *own}
    layer.__dict__.update({k: v for k, v in linear.__dict__.items() if k not in structure})

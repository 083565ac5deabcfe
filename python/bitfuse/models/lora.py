"""Adapters over a whole model: add_lora_, add_ia3_, lora_parameters, set_adapter_, merge_adapters_, ..."""

from __future__ import annotations

import contextlib
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.text import table
from ..nn import AdapterLinear, IA3Linear, Linear, LoRALinear, Merged
from ..nn.adapters import check_name, refusal
from ..nn.linear import is_conv1d
from ..nn.lora import check_dtype, check_options
from ..nn.module_copies import ModuleCopies

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer that carries an adapter: the layer's name, its weight's shape and kind, the adapter's rank
    (None for IA3) and parameters."""

    name: str
    shape: tuple[int, int]
    base: str
    r: int | None
    parameters: int


@dataclass
class AdapterReport:
    """What `add_lora_` and its kin did. `str()` is a table.

    Attributes:
        adapter_name: of the adapter.
        layers: the layers that carry it.
        skipped: name of each layer that was asked for or linear and is left alone, and why.
        trainable: parameters of the whole model that require gradients.
        parameters: of the whole model, adapters included, tied ones once; few-bit weights by their codes.
    """

    adapter_name: str
    layers: list[AdaptedLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    trainable: int = 0
    parameters: int = 0

    def __str__(self) -> str:
        rows = [
            (
                a.name,
                f"{a.shape[0]} x {a.shape[1]}",
                a.base,
                "" if a.r is None else str(a.r),
                f"{a.parameters:,}",
            )
            for a in self.layers
        ]
        rows += [(name, "", f"left as it is: {reason}", "", "") for name, reason in self.skipped.items()]
        share = f"{self.trainable / self.parameters:.4%}" if self.parameters else "none"
        last = f"trainable: {self.trainable:,} of {self.parameters:,}, {share}"
        headings = ("layer", "shape", "weight", "r", "parameters")
        return table(headings, rows, ("whole model", "", last, "", ""), numbers=2)


@dataclass
class MergeReport:
    """What `merge_adapters_` did: `Merged` by layer name. `str()` is a table."""

    layers: dict[str, Merged] = field(default_factory=dict)

    @property
    def worst_relative_error(self) -> float:
        return max((layer.relative_error for layer in self.layers.values()), default=0.0)

    @property
    def nbytes(self) -> int:
        """Memory that merging took, until `unmerge_adapters_`."""
        return sum(layer.nbytes for layer in self.layers.values())

    def __str__(self) -> str:
        rows = [
            (name, ", ".join(m.adapters), f"{m.nbytes / 1e6:.2f}", f"{m.relative_error:.2e}")
            for name, m in self.layers.items()
        ]
        last = ("whole model", "", f"{self.nbytes / 1e6:.2f}", f"{self.worst_relative_error:.2e} worst")
        return table(("layer", "adapters", "MB more", "rel. error"), rows, last, numbers=1)


def add_lora_(
    model: torch.nn.Module,
    targets: str | Iterable[str],
    r: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    *,
    adapter_name: str = "default",
    use_rslora: bool = False,
    use_dora: bool = False,
    dtype: torch.dtype = torch.float32,
    skip: Iterable[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> AdapterReport:
    """Put a `bitfuse.nn.LoRALinear` around linear layers of a model, in place, or add another adapter to
    those that are there; and freeze all that is no adapter.

    Everything is looked at before the first layer is changed, so an error leaves the model as it was. A layer
    used in several places is wrapped in all of them; layers that share a weight go on sharing it. The first
    adapter of a model is active; one of another name waits for `set_adapter_`. More layers for an adapter
    that is there already (with another rank, say) are active if it is.

    Args:
        model: any module that holds `torch.nn.Linear`, `bitfuse.nn.Linear` or transformers' Conv1D.
        targets: layers by full name, glob ("*.q_proj"), the end of the name ("self_attn.q_proj") or one
            component of it ("q_proj"); "all-linear" is every linear layer but the output embedding.
        r, alpha, dropout, use_rslora, use_dora, dtype: as of `bitfuse.nn.LoRALinear`.
        adapter_name: name of the adapter.
        skip: layers to leave, named like targets.
        rank_pattern, alpha_pattern: another r or alpha for some of the layers, which are named like targets;
            the first pattern that means a layer counts. The alpha of the others is alpha, or r, whatever
            theirs is.

    Raises:
        TypeError: model is not a module, or is a Linear itself; options of the wrong type.
        ValueError: options out of range; no layer matches; a layer has an adapter of that name or is merged;
            a rank or alpha pattern that means no target.
    """
    alpha = r if alpha is None else alpha
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    for rank in (r, *ranks.values()):
        check_options(rank, alpha, dropout)
    for value in alphas.values():
        check_options(r, value, dropout)
    check_dtype(dtype)

    def add(name: str) -> Callable[[AdapterLinear], None]:
        own_r = next((rank for pattern, rank in ranks.items() if matches(pattern, name)), r)
        own_alpha = next((value for pattern, value in alphas.items() if matches(pattern, name)), alpha)

        def to(layer: AdapterLinear) -> None:
            assert isinstance(layer, LoRALinear)
            options: dict[str, Any] = dict(use_rslora=use_rslora, use_dora=use_dora, dtype=dtype)
            layer.add_adapter(adapter_name, own_r, own_alpha, dropout, **options)

        return to

    chosen, skipped = select(model, targets, skip, LoRALinear)
    for argument, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        for pattern in _patterns(patterns, argument):
            if not any(matches(pattern, name) for name in chosen):
                raise ValueError(f"{argument} holds {pattern!r}, which names no target: {_some(chosen)}")
    return wrap_(model, chosen, skipped, adapter_name, lambda name, base: LoRALinear(base, None), add)


def add_ia3_(
    model: torch.nn.Module,
    targets: str | Iterable[str],
    feedforward: str | Iterable[str] = (),
    *,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
    skip: Iterable[str] = (),
) -> AdapterReport:
    """Put a `bitfuse.nn.IA3Linear` around linear layers of a model, in place; see `add_lora_`.

    Args:
        targets: layers whose outputs are scaled, named as in `add_lora_`.
        feedforward: those of the targets whose inputs are scaled instead.
        model, adapter_name, dtype, skip: as in `add_lora_`.

    Raises:
        TypeError, ValueError: as `add_lora_`; a feedforward pattern that names no target.
    """
    check_dtype(dtype)
    chosen, skipped = select(model, targets, skip, IA3Linear)
    inputs: set[str] = set()
    for pattern in _patterns(feedforward, "feedforward"):
        hits = {name for name in chosen if matches(pattern, name)}
        if not hits:
            raise ValueError(f"feedforward={pattern!r} names none of the targets: {_some(chosen)}")
        inputs |= hits

    def add(layer: AdapterLinear) -> None:
        assert isinstance(layer, IA3Linear)
        layer.add_adapter(adapter_name, dtype=dtype)

    for name, layer in chosen.items():
        if isinstance(layer, IA3Linear) and layer.feedforward != (name in inputs):
            raise ValueError(f"{name} has feedforward {layer.feedforward}, and {name in inputs} is asked for")
    return wrap_(
        model,
        chosen,
        skipped,
        adapter_name,
        lambda name, base: IA3Linear(base, name in inputs, adapter_name=None),
        lambda name: add,
    )


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of `add_lora_` means the layer of this name."""
    return fnmatch.fnmatchcase(name, pattern) or name.endswith("." + pattern) or pattern in name.split(".")


def _patterns(patterns: object, argument: str) -> list[str]:
    found = [patterns] if isinstance(patterns, str) else list(patterns)  # type: ignore[call-overload]
    for pattern in found:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"{argument} holds {pattern!r}, expected names or patterns")
    return found


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more if names else "none"


# what torch puts around modules: the key of the module inside
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules of a model by name, without what is inside an `AdapterLinear` or a `ModuleCopies`. What
    torch.compile, DDP, FSDP and activation checkpointing put around modules is in no name."""
    found: dict[str, torch.nn.Module] = {}
    shown: dict[str, str] = {}  # the name to show of a module's own
    inside: tuple[str, ...] = ()
    parents: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        above, _, key = name.rpartition(".")
        if not name:
            shown[name] = ""
        elif key in WRAPPED or (key == "module" and isinstance(parents[above], _PARALLEL)):
            shown[name] = shown[above]
        else:
            shown[name] = f"{shown[above]}.{key}" if shown[above] else key
        parents[name] = module
        found[shown[name]] = module
        if isinstance(module, (AdapterLinear, ModuleCopies)):
            inside = (*inside, f"{name}.")
    return found


_PARALLEL = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


def adapted_layers(model: torch.nn.Module) -> dict[str, AdapterLinear]:
    """The layers of a model that carry adapters, by name."""
    return {name: m for name, m in layers_of(model).items() if isinstance(m, AdapterLinear)}


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer, with adapters or without."""
    return isinstance(module, (torch.nn.Linear, Linear, AdapterLinear)) or is_conv1d(module)


def module_copies(model: torch.nn.Module) -> dict[str, ModuleCopies]:
    """The modules of which adapters have copies, by name."""
    return {name: m for name, m in layers_of(model).items() if isinstance(m, ModuleCopies)}


def select(
    model: torch.nn.Module, targets: str | Iterable[str], skip: Iterable[str], kind: type[AdapterLinear]
) -> tuple[dict[str, torch.nn.Module], dict[str, str]]:
    """The layers that patterns mean, and those left alone with the reason."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, (torch.nn.Linear, Linear, AdapterLinear)):
        raise TypeError(
            f"model is itself a linear layer and can't be replaced in place: use bitfuse.nn.{kind.__name__}"
        )
    wanted, unwanted = _patterns(targets, "targets"), _patterns(skip, "skip")
    every = layers_of(model)
    output, places = _output_embedding(model), places_of(model)
    chosen: dict[str, torch.nn.Module] = {}
    skipped: dict[str, str] = {}
    used: set[str] = set()
    for name, module in every.items():
        if isinstance(module, ModuleCopies) and any(matches(p, name) for p in wanted):
            used.update(p for p in wanted if matches(p, name))
            skipped[name] = f"adapters {list(module.copies)} have copies of it (modules_to_save)"
        if not is_linear(module):
            continue
        hits = [p for p in wanted if p == ALL_LINEAR or matches(p, name)]
        misses = [p for p in unwanted if matches(p, name)]
        used.update(hits, misses)
        parent = every.get(name.rpartition(".")[0])
        if not hits:
            continue
        if misses:
            skipped[name] = f"skip={misses[0]!r}"
        elif hits == [ALL_LINEAR] and module is output:
            skipped[name] = f"the output embedding, which {ALL_LINEAR!r} leaves out: name it to adapt it"
        elif isinstance(module, AdapterLinear):
            if isinstance(module, kind):
                chosen[name] = module
            else:
                skipped[name] = f"it carries other adapters ({type(module).__name__})"
        elif is_compiled(module, places):
            skipped[name] = "torch.compile has it as it is: adapt it before you compile it"
        elif isinstance(parent, torch.nn.TransformerEncoderLayer):
            skipped[name] = "torch.nn.TransformerEncoderLayer reads its weight and passes the layer by"
        elif reason := refusal(module):
            skipped[name] = reason
        else:
            chosen[name] = module
    for argument, patterns in (("targets", wanted), ("skip", unwanted)):
        for pattern in patterns:
            if pattern not in used:
                warnings.warn(f"{argument}={pattern!r} matches no linear layer of the model", stacklevel=3)
    if not chosen:
        linear = [n for n, m in every.items() if is_linear(m)]
        left = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
        raise ValueError(
            f"targets is {wanted}, which means no layer that can be adapted ({left or 'nothing matches'}); "
            f"the linear layers are {_some(linear)}"
        )
    return chosen, skipped


def _output_embedding(model: torch.nn.Module) -> torch.nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def places_of(model: torch.nn.Module) -> dict[int, list[tuple[torch.nn.Module, str]]]:
    """Where each module stands: (parent, key) by the module's id."""
    places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, key))
    return places


def is_compiled(module: torch.nn.Module, places: Mapping[int, list[tuple[torch.nn.Module, str]]]) -> bool:
    """Whether torch.compile was called on this very module: it would go on running the one that it saw."""
    return any(type(parent).__name__ == "OptimizedModule" for parent, _ in places.get(id(module), ()))


def wrap_(
    model: torch.nn.Module,
    chosen: dict[str, torch.nn.Module],
    skipped: dict[str, str],
    adapter_name: str,
    make: Callable[[str, torch.nn.Linear | Linear], AdapterLinear],
    add: Callable[[str], Callable[[AdapterLinear], None]],
    trainable: bool = True,
) -> AdapterReport:
    """Wrap the chosen layers where they are not yet, add an adapter to each, freeze the rest of the model."""
    check_name(adapter_name)
    before = adapted_layers(model)
    for name, layer in chosen.items():
        if isinstance(layer, AdapterLinear):
            if adapter_name in layer.adapters:
                raise ValueError(f"adapter_name is {adapter_name!r}, which {name} has already")
            if layer.merged_layer is not None:
                raise ValueError(f"{name} is merged: unmerge before you add an adapter")
    # as for the adapter's other layers, if it has any; else the first adapter of a model is active
    order = list(dict.fromkeys(name for layer in before.values() for name in layer.active_adapters))
    known = any(adapter_name in layer.adapters for layer in before.values())
    active = adapter_name in order if known else not order
    order = order if adapter_name in order else [*order, adapter_name]
    report = AdapterReport(adapter_name, skipped=skipped)
    with _all_or_nothing(model, chosen, adapter_name) as places:
        for name, layer in chosen.items():
            if not isinstance(layer, AdapterLinear):
                at = places[id(layer)]
                layer = make(name, layer)  # type: ignore[arg-type]
                for parent, key in at:
                    parent._modules[key] = layer
            add(name)(layer)
            others = {n for n in layer.active_adapters if n != adapter_name}
            now = others | {adapter_name} if active else others
            layer.active_adapters = tuple(n for n in order if n in now)
            layer.adapters[adapter_name].requires_grad_(active and trainable)
            report.layers.append(describe(name, layer, adapter_name))
        freeze_base_(model)
    count_(report, model)
    return report


@contextlib.contextmanager
def _all_or_nothing(
    model: torch.nn.Module, chosen: Mapping[str, torch.nn.Module], adapter_name: str
) -> Iterator[dict[int, list[tuple[torch.nn.Module, str]]]]:
    """Gives `places_of` the model; whatever is raised inside, the chosen layers are then as they were."""
    places = places_of(model)
    learning = [(p, p.requires_grad) for p in model.parameters()]
    active = {n: m.active_adapters for n, m in chosen.items() if isinstance(m, AdapterLinear)}
    try:
        yield places
    except BaseException:
        for name, layer in chosen.items():
            if isinstance(layer, AdapterLinear):
                if adapter_name in layer.adapters:
                    layer.delete_adapter(adapter_name)
                layer.active_adapters = active[name]
            else:
                for parent, key in places[id(layer)]:
                    around = parent._modules[key]
                    parent._modules[key] = around.unwrap() if isinstance(around, AdapterLinear) else layer
        for p, flag in learning:
            p.requires_grad_(flag)
        raise


def describe(name: str, layer: AdapterLinear, adapter_name: str) -> AdaptedLayer:
    """A row of the report."""
    base, adapter = layer.base_layer, layer.adapters[adapter_name]
    kind = str(base.format) if isinstance(base, Linear) else str(base.weight.dtype).removeprefix("torch.")
    r = adapter.r if isinstance(layer, LoRALinear) else None
    parameters = sum(p.numel() for p in adapter.parameters())
    return AdaptedLayer(name, (layer.out_features, layer.in_features), kind, r, parameters)  # type: ignore[arg-type]


def freeze_base_(model: torch.nn.Module) -> None:
    """Let only adapters require gradients."""
    own = {id(p) for layer in adapted_layers(model).values() for p in layer.adapters.parameters()}
    own |= {id(p) for m in module_copies(model).values() for p in m.modules_to_save.parameters()}
    for p in model.parameters():
        if id(p) not in own:
            p.requires_grad_(False)


def count_(report: AdapterReport, model: torch.nn.Module) -> None:
    """Fill in the counts of a report."""
    counted: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, AdapterLinear):
            continue
        for key, p in module._parameters.items():
            if p is None:
                continue
            if not isinstance(module, Linear) or key == "bias":
                counted[id(p)] = p.numel()
            elif key == "qweight":
                counted[id(p)] = module.out_features * module.in_features
    report.parameters = sum(counted.values())
    report.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora_parameters(model: torch.nn.Module, adapter_name: str | None = None) -> list[torch.nn.Parameter]:
    """The parameters of a model's adapters (LoRA, DoRA, IA3, and what `modules_to_save` of a loaded one
    holds), for an optimizer; of one adapter, if named.

    Raises:
        ValueError: the model has no adapter, or none of that name.
    """
    found: dict[int, torch.nn.Parameter] = {}
    for layer in _layers_with(model, adapter_name):
        names = layer.adapters if adapter_name is None else [adapter_name]
        for name in names:
            found |= {id(p): p for p in layer.adapters[name].parameters()}
    for module in module_copies(model).values():
        for name, copy in module.copies.items():
            if adapter_name in (None, name):
                found |= {id(p): p for p in copy.parameters()}
    return list(found.values())


def _layers_with(model: torch.nn.Module, names: str | Sequence[str] | None) -> list[AdapterLinear]:
    """The layers that carry any of the adapters; ValueError for a name that no layer has."""
    layers = list(adapted_layers(model).values())
    if not layers:
        raise ValueError("the model has no adapters: see bitfuse.add_lora_")
    if names is None:
        return layers
    names = [names] if isinstance(names, str) else list(names)
    known = {name for layer in layers for name in layer.adapters}
    for name in names:
        if name not in known:
            raise ValueError(f"no adapter {name!r} in this model, expected one of: {_some(sorted(known))}")
    return [layer for layer in layers if any(name in layer.adapters for name in names)]


def set_adapter_(model: torch.nn.Module, names: str | Sequence[str], trainable: bool = True) -> None:
    """Make adapters active in the whole model and the others not; several add up. Layers without them are
    the base layer, and modules of which they have no copy (a head) the base model's. Only the active ones
    require gradients, if `trainable`.

    Raises:
        ValueError: a name that no layer has; a layer is merged; two of them have a copy of one module.
    """
    names = [names] if isinstance(names, str) else list(names)
    _layers_with(model, names)
    layers = list(adapted_layers(model).values())
    _check_unmerged(model, "set adapters")
    copies = _copies_of(model, names)
    for layer in layers:
        layer.set_adapter([name for name in names if name in layer.adapters], trainable)
    for module in copies:
        module.set_adapter(tuple(names), trainable)


def _copies_of(model: torch.nn.Module, names: Sequence[str]) -> list[ModuleCopies]:
    """All modules with copies; ValueError where two of the adapters have one of the same."""
    found = module_copies(model)
    for name, module in found.items():
        try:
            module.check_adapters(tuple(names))
        except ValueError as why:
            raise ValueError(f"{name}: {why}") from None
    return list(found.values())


def _check_unmerged(model: torch.nn.Module, what: str) -> None:
    for name, layer in adapted_layers(model).items():
        if layer.merged_layer is not None:
            raise ValueError(f"{name} is merged: unmerge_adapters_ before you {what}")


@contextlib.contextmanager
def disable_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is its base, merged or not."""
    layers = [layer for layer in adapted_layers(model).values() if layer.enabled]
    copies = [module for module in module_copies(model).values() if module.enabled]
    for layer in layers:
        layer.disable_adapters()
    for module in copies:
        module.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters()
        for module in copies:
            module.enabled = True


def merge_adapters_(model: torch.nn.Module, adapters: str | Sequence[str] | None = None) -> MergeReport:
    """Merge adapters, the active ones by default, into the weights of a model; see `LoRALinear.merge`. If one
    layer can't be merged, none is.

    Raises:
        ValueError: a name that no layer has, a layer is merged already, or a merged weight is not finite.
    """
    _layers_with(model, adapters)
    _check_unmerged(model, "merge")
    given = [adapters] if isinstance(adapters, str) else adapters
    copies = _copies_of(model, () if given is None else given)
    report = MergeReport()
    done: list[AdapterLinear] = []
    try:
        for name, layer in adapted_layers(model).items():
            names = layer.active_adapters if adapters is None else adapters
            names = [names] if isinstance(names, str) else [n for n in names if n in layer.adapters]
            names = [n for n in names if n in layer.adapters]
            if names:
                report.layers[name] = layer.merge(names)
                done.append(layer)
    except ValueError as why:
        for layer in done:
            layer.unmerge()
        raise ValueError(f"{name}: {why}") from None
    for module in copies:
        module.merged_adapters = module.check_adapters(
            module.active_adapters if given is None else tuple(given)
        )
    return report


def unmerge_adapters_(model: torch.nn.Module) -> None:
    """Go back to the original weights, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unmerge()
    for module in module_copies(model).values():
        module.merged_adapters = None


def remove_adapters_(model: torch.nn.Module, adapter_name: str | None = None) -> None:
    """Take an adapter out of a model; or all, and the layers around them: a merged layer leaves its merged
    weight behind, another one its original; so do modules of which adapters have copies. What was frozen
    stays frozen.

    Raises:
        ValueError: no layer has the adapter; one that does is merged.
    """
    layers = _layers_with(model, adapter_name)
    if adapter_name is not None:
        _check_unmerged(model, "remove an adapter")
        for layer in layers:
            layer.delete_adapter(adapter_name)
        for module in module_copies(model).values():
            if adapter_name in module.copies:
                module.delete_adapter(adapter_name)
    places = places_of(model)
    gone: list[AdapterLinear | ModuleCopies] = [*layers] if adapter_name is None else []
    gone += [m for m in module_copies(model).values() if adapter_name is None or not m.copies]
    for around in gone:
        inner = around.unwrap()
        for parent, key in places[id(around)]:
            parent._modules[key] = inner

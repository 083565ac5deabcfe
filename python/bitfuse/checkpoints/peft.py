"""PEFT's adapter format: `adapter_config.json` and `adapter_model.safetensors`, with its key names.

A key is `base_model.model.<layer>.` and then `lora_A.weight`, `lora_B.weight`, `lora_magnitude_vector` (DoRA)
or `ia3_l`; the adapter's name is in none of them.
"""

from __future__ import annotations

import collections
import copy
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.lora import (
    ALL_LINEAR,
    WRAPPED,
    AdapterReport,
    adapted_layers,
    count_,
    describe,
    is_compiled,
    is_linear,
    layers_of,
    module_copies,
    places_of,
    wrap_,
)
from ..nn import AdapterLinear, IA3Linear, Linear, LoRALinear
from ..nn.adapters import check_name, float_rows, refusal, sizes_of
from ..nn.lora import check_dtype, check_options
from ..nn.module_copies import ModuleCopies
from .patterns import ends, fullmatch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = {
    "LORA": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "IA3": ("ia3_l",),
}

# fields that say nothing about what the adapter computes
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "init_ia3_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
_READ = {
    "LORA": {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
        "target_modules", "modules_to_save", "init_lora_weights", "bias", "fan_in_fan_out",
    },
    "IA3": {"target_modules", "feedforward_modules", "modules_to_save", "fan_in_fan_out"},
}  # fmt: skip
# inits that leave the base weight alone; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract from it
_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Found:
    """One layer's adapter in a file."""

    tensors: dict[str, torch.Tensor]
    r: int
    alpha: float

    def tensor(self, name: str) -> torch.Tensor | None:
        return self.tensors.get(name)


def load_peft_(
    model: torch.nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    trainable: bool = False,
    dtype: torch.dtype = torch.float32,
) -> AdapterReport:
    """Put an adapter that PEFT saved (LoRA with rsLoRA, DoRA, rank and alpha patterns; IA3) into a model, in
    place. What its `modules_to_save` hold (a head), and embeddings that were resized, become its own copies
    of those modules, in use while the adapter is active; so does an adapted output embedding with other rows
    than the model's.

    Everything is read and checked before the model is touched. A model that has an adapter of this name, of
    the same kind on the same layers, gets its content swapped in place (see `LoRALinear.load_adapter_`);
    another is wrapped as by `add_lora_`, its first adapter being active.

    Args:
        model: the base model, over `torch.nn.Linear` or `bitfuse.nn.Linear`, with PEFT's module names.
        folder: holds adapter_config.json and adapter_model.safetensors.
        adapter_name: the name to give it.
        trainable: let the adapter and modules_to_save require gradients.
        dtype: of the adapter's parameters.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors is not installed.
        TypeError, ValueError: a file that is corrupted or incomplete; a tensor that does not fit; a config
            that asks for something else than these adapters, whose fields are named.
    """
    folder = Path(folder)
    check_name(adapter_name)
    check_dtype(dtype)
    config = _read_config(folder / CONFIG)
    kind = config["peft_type"]
    tensors = {_unwrapped(key): t for key, t in _read_tensors(folder / WEIGHTS).items()}
    layers = layers_of(model)
    try:
        whole = _whole_modules(model, layers, tensors, config.get("modules_to_save") or [])
        replaced = {key for keys in whole.values() for key in keys.values()}
        bases = {k: t for k, t in tensors.items() if ".base_layer." in k}
        rest = {k: t for k, t in tensors.items() if k not in replaced and k not in bases}
        found = _by_layer(rest, config, kind)
        chosen = _check_layers(model, layers, found, config, kind, whole)
        own_bases = _own_bases(chosen, bases)
        copies = _copies(layers, whole, tensors, config.get("modules_to_save") or [])
    except (TypeError, ValueError) as why:
        raise ValueError(f"{folder}: {why}") from None
    if any(adapter_name in layer.adapters for layer in adapted_layers(model).values()):
        own = {name for name, module in module_copies(model).items() if adapter_name in module.copies}
        if own - set(copies):
            raise ValueError(
                f"adapter {adapter_name!r} has copies of other modules than the file's: "
                f"{_difference(own, set(copies))}; remove_adapters_ it first, or pass another adapter_name"
            )
        report = _swap_(model, chosen, found, config, adapter_name, trainable)
        return _put_copies_(model, copies, report, trainable)

    def make(name: str, base: torch.nn.Linear | Linear) -> AdapterLinear:
        if kind == "LORA":
            return LoRALinear(base, None)
        return IA3Linear(base, _is_feedforward(config, name, found[name]), adapter_name=None)

    def add(name: str) -> Callable[[AdapterLinear], None]:
        def to(layer: AdapterLinear) -> None:
            one = found[name]
            if isinstance(layer, LoRALinear):
                layer.add_adapter(
                    adapter_name,
                    one.r,
                    one.alpha,
                    config["lora_dropout"],
                    use_rslora=config["use_rslora"],
                    use_dora=config["use_dora"],
                    dtype=dtype,
                )
            elif isinstance(layer, IA3Linear):
                layer.add_adapter(adapter_name, dtype=dtype)
            _fill_(layer, adapter_name, one, config)

        return to

    state = torch.get_rng_state()  # the draws of adapters that are overwritten at once
    try:
        report = wrap_(model, chosen, {}, adapter_name, make, add, trainable)
    finally:
        torch.set_rng_state(state)
    layers_now = adapted_layers(model)
    for name, base in own_bases.items():
        layers_now[name].take_base(base)
    return _put_copies_(model, copies, report, trainable)


def _unwrapped(key: str) -> str:
    """A key without what torch puts around modules, which version 0.1 wrote into files."""
    return ".".join(part for part in key.split(".") if part not in WRAPPED)


def _whole_modules(
    model: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    tensors: Mapping[str, torch.Tensor],
    names: list[str],
) -> dict[str, dict[str, str]]:
    """The modules that the file brings whole, by name: the file's key of each of their tensors; ValueError
    for ones that don't fit. As in PEFT a name means the modules whose names end so, and may mean none."""
    modules = [n for n in layers if n and n.endswith(tuple(names))]
    if names and not modules:
        raise ValueError(f"modules_to_save holds {names[0]!r}, which no module of the model is called")
    modules += [n for n in _embeddings(layers) if n not in modules and f"{_PREFIX}{n}.weight" in tensors]
    modules = [n for n in modules if not any(n.startswith(f"{other}.") for other in modules)]
    replaced: set[int] = set()
    for name in modules:
        replaced |= {id(m) for m in layers[name].modules()}
    found: dict[str, dict[str, str]] = {}
    for name in modules:
        module = layers[name]
        module = module.original_module if isinstance(module, ModuleCopies) else module
        inside = {id(p) for p in module.parameters()}
        if any(isinstance(m, (Linear, AdapterLinear, ModuleCopies)) for m in module.modules()):
            raise ValueError(
                f"modules_to_save replaces {name!r}, which is quantised or adapted in this model"
            )
        if any("forward" in m.__dict__ for m in module.modules()):
            raise ValueError(f"modules_to_save replaces {name!r}, whose forward is replaced on the instance")
        for other, m in layers.items():
            if id(m) not in replaced and any(id(p) in inside for p in m._parameters.values()):
                raise ValueError(f"modules_to_save replaces {name!r}, whose weight is tied to {other!r}")
        found[name] = {}
        for key, own in module.state_dict(keep_vars=True).items():
            at = f"{_PREFIX}{name}.{key}"
            t = tensors.get(at)
            if t is None or t.shape != own.shape:
                held = "missing" if t is None else f"of shape {list(t.shape)}"
                raise ValueError(f"{at} is {held}, expected a tensor {list(own.shape)}")
            found[name][key] = at
    return found


def _embeddings(layers: Mapping[str, torch.nn.Module]) -> list[str]:
    """A transformers model's input and output embeddings, which PEFT saves whole when they were resized."""
    getters = (getattr(layers[""], f"get_{side}_embeddings", None) for side in ("input", "output"))
    both = [getter() for getter in getters if callable(getter)]
    return [name for name, m in layers.items() if name and any(m is module for module in both)]


def _copies(
    layers: Mapping[str, torch.nn.Module],
    whole: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, torch.Tensor],
    named: Iterable[str],
) -> dict[str, torch.nn.Module]:
    """What the adapter puts in the modules' places; no embedding that is as in the model."""
    made = {}
    for name, keys in whole.items():
        module = layers[name]
        module = module.original_module if isinstance(module, ModuleCopies) else module
        held = module.state_dict(keep_vars=True)
        if not name.endswith(tuple(named)) and all(_is_own(held[k], tensors[of]) for k, of in keys.items()):
            continue
        made[name] = copy.deepcopy(module)
        with torch.no_grad():
            for key, t in made[name].state_dict(keep_vars=True).items():
                t.copy_(tensors[keys[key]])
    return made


def _is_own(own: torch.Tensor, t: torch.Tensor) -> bool:
    """Whether a file's tensor is the model's, as far as the shorter of their dtypes says."""
    t = t.to(own.device)
    return torch.equal(own.to(t.dtype), t) or torch.equal(own, t.to(own.dtype))


def _put_copies_(
    model: torch.nn.Module, copies: Mapping[str, torch.nn.Module], report: AdapterReport, trainable: bool
) -> AdapterReport:
    """Give the adapter its copies, or write over those that it has."""
    name = report.adapter_name
    active = any(name in layer.active_adapters for layer in adapted_layers(model).values())
    layers, places = layers_of(model), places_of(model)
    for at, made in copies.items():
        module = layers[at]
        if not isinstance(module, ModuleCopies):
            around = ModuleCopies(module)
            for parent, key in places[id(module)]:
                parent._modules[key] = around
            module = around
        if name in module.copies:
            module.copies[name].load_state_dict(made.state_dict())
            module.copies[name].requires_grad_(active and trainable)
        else:
            module.hold(name, made, active, trainable)
    count_(report, model)
    return report


def _own_bases(
    chosen: Mapping[str, torch.nn.Module], bases: Mapping[str, torch.Tensor]
) -> dict[str, torch.nn.Linear]:
    """Base layers that the adapter brings, where they are not the model's: PEFT writes that of an output
    embedding beside its adapter, which has other rows when it was resized."""
    made: dict[str, torch.nn.Linear] = {}
    for name, module in chosen.items():
        brought = isinstance(module, AdapterLinear) and module.without_adapters is not module.base_layer
        if brought and f"{_PREFIX}{name}.base_layer.weight" not in bases:
            raise ValueError(f"{name} has a base weight that its adapter brought, and the file has none")
    for at, t in bases.items():
        name, _, key = at.removeprefix(_PREFIX).rpartition(".base_layer.")
        found = chosen.get(name)
        layer = found.base_layer if isinstance(found, AdapterLinear) else found
        if not at.startswith(_PREFIX) or layer is None or key not in ("weight", "bias"):
            raise ValueError(f"{WEIGHTS} holds {at!r}, which is no tensor of an adapter on a linear layer")
        own: Any = getattr(layer, key)
        if own is None or tuple(own.shape) != tuple(t.shape):
            shape = None if own is None else list(own.shape)
            raise ValueError(f"{at} has shape {list(t.shape)}, the model's own {shape}")
        if isinstance(layer, Linear) and key == "weight":
            # rounded to few bits, by far less than half; other rows would be off by more than all of it
            other = any(
                bool(((w - t[rows].to(w)).norm(dim=1) > 0.5 * t[rows].to(w).norm(dim=1)).any())
                for rows, w in float_rows(layer)
            )
        else:
            other = not _is_own(own, t)
        if other and type(found) is torch.nn.Linear:
            made.setdefault(name, copy.deepcopy(found))
            with torch.no_grad():
                getattr(made[name], key).copy_(t)
        elif other:
            raise ValueError(
                f"{at} is not the model's own {name}.{key}, which is quantised, adapted or a Conv1D: the "
                "adapter was trained over another one"
            )
    return made


def _fill_(layer: AdapterLinear, adapter_name: str, one: _Found, config: Mapping[str, Any]) -> None:
    if isinstance(layer, LoRALinear):
        layer.load_adapter_(
            adapter_name,
            one.tensors["lora_A.weight"],
            one.tensors["lora_B.weight"],
            alpha=one.alpha,
            magnitude=one.tensor("lora_magnitude_vector"),
            use_rslora=config["use_rslora"],
            dropout=config["lora_dropout"],
        )
    elif isinstance(layer, IA3Linear):
        with torch.no_grad():
            layer.adapter(adapter_name).ia3_l.copy_(one.tensors["ia3_l"].flatten())


def _swap_(
    model: torch.nn.Module,
    chosen: dict[str, torch.nn.Module],
    found: dict[str, _Found],
    config: Mapping[str, Any],
    adapter_name: str,
    trainable: bool,
) -> AdapterReport:
    """Write over an adapter, all layers or none."""
    own = {name for name, layer in adapted_layers(model).items() if adapter_name in layer.adapters}
    if own != set(chosen):
        raise ValueError(
            f"adapter {adapter_name!r} is on other layers than the file's: {_difference(own, set(chosen))}; "
            "remove_adapters_ it first, or pass another adapter_name"
        )
    layers: dict[str, AdapterLinear] = {n: m for n, m in chosen.items() if isinstance(m, AdapterLinear)}
    for name, layer in layers.items():
        if layer.merged_layer is not None:
            raise ValueError(f"{name} is merged: unmerge before you load an adapter")
        if isinstance(layer, LoRALinear):
            adapter, one = layer.adapter(adapter_name), found[name]
            if (adapter.r, adapter.use_dora) != (one.r, config["use_dora"]):
                raise ValueError(
                    f"{name} has an adapter {adapter_name!r} with r {adapter.r} and use_dora "
                    f"{adapter.use_dora}, the file one with {one.r} and {config['use_dora']}: "
                    "remove_adapters_ it first"
                )
    report = AdapterReport(adapter_name)
    for name, layer in layers.items():
        _fill_(layer, adapter_name, found[name], config)
        if adapter_name in layer.active_adapters:
            layer.adapters[adapter_name].requires_grad_(trainable)
        report.layers.append(describe(name, layer, adapter_name))
    count_(report, model)
    return report


# reading


def _read_config(path: Path) -> dict[str, Any]:
    """The config with defaults filled in; ValueError names what is not understood."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as why:  # ValueError also for what is no UTF-8, and for huge integers
        raise ValueError(f"{path} is not JSON: {why}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected an object")
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _READ:
        raise ValueError(f"{path}: peft_type is {kind!r}, expected 'LORA' or 'IA3'")
    for name, value in config.items():
        if name not in _READ[kind] and name not in _IGNORED and value not in (None, False, [], {}, ""):
            raise ValueError(
                f"{path}: {name} is {value!r}, which bitfuse does not support and would not ignore"
            )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {config['bias']!r}, expected 'none': biases are not loaded")
    if config.get("init_lora_weights", True) not in _KEEP_THE_BASE:
        raise ValueError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changed the base weight "
            "too: make it plain LoRA when saving it (PEFT's path_initial_model_for_weight_conversion)"
        )
    whole = config.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) and name for name in whole):
        raise ValueError(f"{path}: modules_to_save is {whole!r}, expected names")
    targets = config.get("target_modules")
    if not isinstance(targets, (str, list)) or not targets:
        raise ValueError(f"{path}: target_modules is {targets!r}, expected names or a pattern")
    if kind == "LORA":
        defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}
        config = {**defaults, "use_rslora": False, "use_dora": False, **config}
        for name in ("use_rslora", "use_dora"):
            if not isinstance(config[name], bool):
                raise ValueError(f"{path}: {name} is {config[name]!r}, expected true or false")
        try:
            for pattern in ("rank_pattern", "alpha_pattern"):
                config[pattern] = dict(config[pattern] or {})
            for r in (config["r"], *config["rank_pattern"].values()):
                check_options(r, 1, config["lora_dropout"])
            for alpha in (config["lora_alpha"], *config["alpha_pattern"].values()):
                check_options(1, alpha, 0.0)
        except (TypeError, ValueError) as why:
            raise ValueError(f"{path}: {why}") from None
    return config


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("reading PEFT's adapters needs safetensors: pip install 'bitfuse[peft]'") from None
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing (adapters in .bin files, which can run code, are not read)"
        )
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as why:
        raise ValueError(f"{path} is corrupted or cut short: {why}") from None


def _pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """What a rank or alpha pattern says of a layer: PEFT's rule, the first pattern that ends the name."""
    for pattern, value in patterns.items():
        if ends(pattern, name):
            return value
    return default


def _by_layer(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], kind: str) -> dict[str, _Found]:
    """The tensors of a file by layer, complete and of the ranks that the config says."""
    grouped: dict[str, dict[str, torch.Tensor]] = collections.defaultdict(dict)
    for key, t in tensors.items():
        suffix = next((s for s in _SUFFIXES[kind] if key.endswith("." + s)), None)
        if suffix is None or not key.startswith(_PREFIX):
            raise ValueError(
                f"{WEIGHTS} holds {key!r}, which is no tensor of a {kind} adapter on a linear layer"
            )
        if not t.is_floating_point():
            raise ValueError(f"{key} has dtype {t.dtype}, expected floats")
        grouped[key[len(_PREFIX) : -len(suffix) - 1]][suffix] = t
    wanted = set(_SUFFIXES[kind])
    if kind == "LORA" and not config["use_dora"]:
        wanted.discard("lora_magnitude_vector")
    found = {}
    for name, own in grouped.items():
        if set(own) != wanted:
            raise ValueError(f"{WEIGHTS}, layer {name!r}: {_difference(set(own), wanted)}")
        r, alpha = 0, 0.0
        if kind == "LORA":
            r = _pattern_value(config["rank_pattern"], name, config["r"])
            alpha = _pattern_value(config["alpha_pattern"], name, config["lora_alpha"])
        found[name] = _Found(own, r, alpha)
    if not found:
        raise ValueError(f"{WEIGHTS} holds no adapter")
    return found


def _difference(found: set[str], expected: set[str]) -> str:
    def listed(names: set[str]) -> str:
        shown = sorted(names)[:5]
        return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    said = [f"missing {listed(expected - found)}"] if expected - found else []
    said += [f"unexpected {listed(found - expected)}"] if found - expected else []
    return "; ".join(said)


def _is_feedforward(config: Mapping[str, Any], name: str, one: _Found) -> bool:
    """Whether IA3 scales the layer's inputs: what the config says, by PEFT's rule; else the shape."""
    said = config.get("feedforward_modules")
    if said is None:
        return one.tensors["ia3_l"].shape[0] == 1
    return fullmatch(said, name) if isinstance(said, str) else any(name.endswith(end) for end in said)


def _check_layers(
    model: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    found: Mapping[str, _Found],
    config: Mapping[str, Any],
    kind: str,
    whole: Iterable[str],
) -> dict[str, torch.nn.Module]:
    """The model's layers that the file is for, in the model's order, every tensor of the right shape."""
    want = LoRALinear if kind == "LORA" else IA3Linear
    unknown = set(found) - set(layers)
    if unknown:
        raise ValueError(f"the model has no layer {sorted(unknown)[0]!r} ({len(unknown)} such in the file)")
    for name in whole:
        if inside := [n for n in found if n == name or n.startswith(f"{name}.")]:
            raise ValueError(f"{inside[0]!r} has an adapter, and modules_to_save replaces {name!r}")
    linear = [n for n, m in layers.items() if is_linear(m)]
    targeted = _targeted(config, linear, whole)
    if targeted is not None and targeted - set(found):
        missing = sorted(targeted - set(found))
        raise ValueError(
            f"target_modules means {missing[0]!r} too ({len(missing)} such), and {WEIGHTS} has no tensors "
            "for it"
        )
    places = places_of(model)
    chosen: dict[str, torch.nn.Module] = {}
    for name, module in layers.items():
        if name not in found:
            continue
        if isinstance(module, AdapterLinear):
            if not isinstance(module, want):
                raise ValueError(f"{name} carries other adapters ({type(module).__name__})")
        elif reason := refusal(module):
            raise ValueError(f"{name} is {reason}")
        elif is_compiled(module, places):
            raise ValueError(f"{name} is compiled by torch.compile: load the adapter before you compile it")
        if len(places.get(id(module), ())) > 1:
            raise ValueError(f"{name} stands in several places of the model, which PEFT adapts in one only")
        chosen[name] = module
        n, k = sizes_of(module)
        plain = module.base_layer if isinstance(module, AdapterLinear) else module
        over_conv1d = isinstance(module, AdapterLinear) and module.over_conv1d
        if config.get("fan_in_fan_out") and type(plain) is torch.nn.Linear and not over_conv1d:
            raise ValueError(f"fan_in_fan_out is True, and {name} is a torch.nn.Linear: it is for Conv1D")
        one = found[name]
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A.weight": (one.r, k),
            "lora_B.weight": (n, one.r),
            "lora_magnitude_vector": (n,),
        }
        if kind == "IA3":
            inputs = _is_feedforward(config, name, one)
            if isinstance(module, IA3Linear) and module.feedforward != inputs:
                raise ValueError(f"{name} has feedforward {module.feedforward}, in the file {inputs}")
            shapes["ia3_l"] = (1, k) if inputs else (n, 1)
        for suffix, t in one.tensors.items():
            if t.shape != shapes[suffix]:
                raise ValueError(
                    f"{_PREFIX}{name}.{suffix} has shape {list(t.shape)}, expected {list(shapes[suffix])}"
                )
    return chosen


def _targeted(config: Mapping[str, Any], names: Iterable[str], whole: Iterable[str]) -> set[str] | None:
    """The linear layers that the config means, by PEFT's rule; None where only PEFT could tell."""
    targets, exclude = config["target_modules"], config.get("exclude_modules") or []
    if config.get("layers_to_transform") is not None or targets == ALL_LINEAR:
        return None
    inside = tuple(f"{name}." for name in whole)
    saved = [rf"(.*\.)?{name}(\..*)?" for name in config.get("modules_to_save") or []]

    def is_meant(name: str) -> bool:
        if name.startswith(inside) or any(fullmatch(pattern, name) for pattern in saved):
            return False
        return _means(targets, name) and not _means(exclude, name)

    return {name for name in names if is_meant(name)}


def _means(targets: str | list[str], name: str) -> bool:
    if isinstance(targets, str):
        return fullmatch(targets, name)
    return any(name == target or name.endswith(f".{target}") for target in targets)


# writing


def save_peft(
    model: torch.nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    modules_to_save: Iterable[str] = (),
    base_model_name_or_path: str | None = None,
) -> None:
    """Write an adapter as PEFT does, for `peft.PeftModel.from_pretrained` or `load_peft_`.

    Both files are written aside, whole, and then renamed. Ranks and alphas that differ between layers become
    patterns. Of the base model only modules_to_save are written.

    Args:
        model: holds `LoRALinear` or `IA3Linear` layers.
        folder: made if it is not there.
        adapter_name: the adapter to save.
        modules_to_save: full names of modules that were trained themselves, such as a head. Those of which
            the adapter has copies of its own are written without being named.
        base_model_name_or_path: what the config says of the base model.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no such adapter or module; layers that differ in a way that the format can't hold
            (dropout, use_rslora, use_dora, LoRA beside IA3), or one layer in several places.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise ImportError("writing PEFT's adapters needs safetensors: pip install 'bitfuse[peft]'") from None
    layers = {name: layer for name, layer in adapted_layers(model).items() if adapter_name in layer.adapters}
    if not layers:
        raise ValueError(f"adapter_name is {adapter_name!r}, which no layer of the model has")
    places = places_of(model)
    for name, layer in layers.items():
        if len(places.get(id(layer), ())) > 1:
            raise ValueError(f"{name} stands in several places of the model, which PEFT adapts in one only")
    whole = [modules_to_save] if isinstance(modules_to_save, str) else list(modules_to_save)
    every = layers_of(model)
    for name, module in module_copies(model).items():
        if adapter_name in module.copies:
            every[name] = module.copies[adapter_name]
            whole += [name] if name not in whole else []
    for name in whole:
        if name not in every:
            raise ValueError(f"modules_to_save holds {name!r}, which no module of the model is called")
        if any(isinstance(m, (Linear, AdapterLinear)) for m in every[name].modules()):
            raise ValueError(f"modules_to_save holds {name!r}, which is quantised or adapted")
        if alike := [n for n in every if n.endswith(name) and n != name]:
            raise ValueError(f"modules_to_save holds {name!r}, which in PEFT means {alike[0]!r} too")
    config: dict[str, Any] = {
        "base_model_name_or_path": base_model_name_or_path,
        "fan_in_fan_out": any(layer.over_conv1d for layer in layers.values()),
        "inference_mode": True,
        "modules_to_save": whole or None,
        "target_modules": _targets_for(set(layers), every),
        "task_type": None,
    }
    lora = {name: layer for name, layer in layers.items() if isinstance(layer, LoRALinear)}
    ia3 = {name: layer for name, layer in layers.items() if isinstance(layer, IA3Linear)}
    if lora and ia3:
        raise ValueError(
            f"adapter {adapter_name!r} is LoRA on some layers and IA3 on others, expected one kind"
        )
    tensors: dict[str, torch.Tensor] = {}
    if lora:
        config |= _lora_config(lora, adapter_name)
        for name, layer in lora.items():
            adapter = layer.adapter(adapter_name)
            if layer.without_adapters is not layer.base_layer:
                assert isinstance(layer.base_layer.weight, torch.Tensor)
                tensors[f"{_PREFIX}{name}.base_layer.weight"] = layer.base_layer.weight
            own = (adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector)
            for suffix, t in zip(_SUFFIXES["LORA"], own, strict=True):
                if t is not None:
                    tensors[f"{_PREFIX}{name}.{suffix}"] = t
    else:
        inputs = sorted(name for name, layer in ia3.items() if layer.feedforward)
        # a pattern, exact where PEFT takes a list for endings
        feedforward = "|".join(re.escape(name) for name in inputs) if inputs else []
        config |= {"peft_type": "IA3", "feedforward_modules": feedforward, "init_ia3_weights": True}
        for name, one in ia3.items():
            vector = one.adapter(adapter_name).ia3_l
            tensors[f"{_PREFIX}{name}.ia3_l"] = vector.view(1, -1) if one.feedforward else vector.view(-1, 1)
    for name in whole:
        tensors |= {f"{_PREFIX}{name}.{key}": t for key, t in every[name].state_dict().items()}
    plain = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    _write(
        Path(folder),
        {
            WEIGHTS: save(plain, metadata={"format": "pt"}),
            CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        },
    )


def _lora_config(layers: Mapping[str, LoRALinear], adapter_name: str) -> dict[str, Any]:
    adapters = {name: layer.adapter(adapter_name) for name, layer in layers.items()}
    config: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}
    for ours, theirs in (("dropout", "lora_dropout"), ("use_rslora", "use_rslora"), ("use_dora", "use_dora")):
        values = {getattr(a, ours) for a in adapters.values()}
        if len(values) > 1:
            raise ValueError(f"layers differ in {ours} ({sorted(values)}), which PEFT's format has one of")
        config[theirs] = values.pop()
    for ours, theirs, pattern in (("r", "r", "rank_pattern"), ("alpha", "lora_alpha", "alpha_pattern")):
        own = {name: getattr(a, ours) for name, a in adapters.items()}
        config[theirs] = collections.Counter(own.values()).most_common(1)[0][0]
        config[pattern] = {
            f"^{re.escape(name)}": value for name, value in own.items() if value != config[theirs]
        }
    return config


def _targets_for(own: set[str], every: Mapping[str, torch.nn.Module]) -> list[str] | str:
    """target_modules that mean these layers and no other module: their last names, if those do, as people
    write them; else a pattern."""
    short = sorted({name.rpartition(".")[2] for name in own})
    if {name for name in every if _means(short, name)} == own:
        return short
    return "|".join(re.escape(name) for name in sorted(own))


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files aside and rename them when all are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    aside: list[tuple[str, Path]] = []
    try:
        for name, content in files.items():
            with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", delete=False) as file:
                aside.append((file.name, folder / name))
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        for temporary, _ in aside:
            os.chmod(temporary, 0o666 & ~mask)
        while aside:
            os.replace(*aside[0])
            del aside[0]
    finally:
        for temporary, _ in aside:
            os.unlink(temporary)

"""fuse_peft_: the LoRA layers of a live PEFT model run as bitfuse's, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..core.text import table
from ..nn import Linear
from . import bitsandbytes as bnb

_Config = TypeVar("_Config")


@dataclass(frozen=True)
class FusedLayer:
    """One layer that `fuse_peft_` took: its name, its weight's kind, and what is different now."""

    name: str
    base: str
    note: str


@dataclass
class FuseReport:
    """What `fuse_peft_` did. `str()` is a table.

    Attributes:
        layers: the layers that run as bitfuse's now.
        left: name of each PEFT layer left alone, and why.
    """

    layers: list[FusedLayer] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [(layer.name, layer.base, layer.note) for layer in self.layers]
        rows += [(name, "", f"left as it is: {reason}") for name, reason in self.left.items()]
        last = ("whole model", f"{len(self.layers)} fused", f"{len(self.left)} left")
        return table(("layer", "weight", "note"), rows, last, numbers=0)


def _layers() -> Any:
    try:
        from . import peft_layers
    except ImportError as why:
        raise ImportError(f"fusing PEFT's layers needs peft: pip install 'bitfuse[peft]' ({why})") from None
    return peft_layers


def fuse_peft_(model: torch.nn.Module) -> FuseReport:
    """Let the LoRA and DoRA layers of a PEFT model run as `bitfuse.lora_linear`, in place.

    The layers stay the objects that PEFT made and keep its parameters: the optimizer, `set_adapter`,
    `add_adapter`, `save_pretrained` and hooks go on working. Over a dense base or a `bitfuse.nn.Linear`
    (`with_bitfuse_layers`) nothing else changes. A bitsandbytes base becomes a `bitfuse.nn.Linear` in its own
    memory (bit-equal for 4 bits; an 8-bit layer no longer rounds its activations), so PEFT's `merge` over it
    needs `unfuse_peft_` first. In training, dropout draws other masks than `torch.nn.Dropout`, and in DoRA
    it acts on the adapter's input only.

    Conv and embedding layers, other variants of LoRA, merged layers, float64 and what is hooked or replaced
    inside are left as they are and named in the report with the reason. What a fused layer meets later (a
    hook on its base, lora_A, lora_B or dropout, a replaced forward, offloading, a learnable scaling, float64,
    rank 600) makes it call PEFT's forward, as long as it is there.

    DoRA's norms are found at each call over a dense base. Over few bits they are kept in eval mode, under
    `no_grad`, while the weight, A, B and scaling are what they were: a write to the codes through `.data` is
    not seen and needs `clear_norms()` of the layer.

    Args:
        model: a `peft.PeftModel`, or any module that holds PEFT's LoRA layers.

    Raises:
        ImportError: peft is not installed.
        TypeError: model is not a module.
        ValueError: the model holds no layer of PEFT.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    layers = _layers()
    report = FuseReport()
    shared = _shared_weights(model)
    for name, module in model.named_modules():
        if not isinstance(module, layers.BaseTunerLayer):
            continue
        if reason := _refusal(module, layers, shared):
            report.left[name] = reason
            continue
        base: Any = module.base_layer
        note, kind = "", type(base).__name__
        if isinstance(base, Linear):
            kind = str(base.format)
        elif type(base) is torch.nn.Linear:
            kind = str(base.weight.dtype).removeprefix("torch.")
        else:
            made = bnb.to_bitfuse(base)
            layers.take_base(module, made)
            note = f"bitsandbytes {kind} in its own memory"
            note += "; activations are not rounded to 8 bits" if kind == "Linear8bitLt" else ""
            kind = str(made.format)
        module.__class__ = layers.FUSED[type(module)]
        report.layers.append(FusedLayer(name, kind, note))
    if not report.layers and not report.left:
        raise ValueError("model holds no layer of PEFT: see peft.get_peft_model")
    return report


def unfuse_peft_(model: torch.nn.Module) -> None:
    """Undo `fuse_peft_`: PEFT's own layers again, and bitsandbytes' weights, bit for bit.

    Raises:
        ImportError: peft is not installed.
        TypeError: model is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    layers = _layers()
    original = {fused: plain for plain, fused in layers.FUSED.items()}
    for module in list(model.modules()):
        if type(module) in original:
            layers.give_base_back(module)
            module.__class__ = original[type(module)]


def with_bitfuse_layers(config: _Config) -> _Config:
    """The config, so that `peft.get_peft_model` adapts `bitfuse.nn.Linear` too, with layers that are fused
    from the start.

    Args:
        config: a `peft.LoraConfig`; "all-linear" means `bitfuse.nn.Linear` too.

    Raises:
        ImportError: peft is not installed.
        TypeError: config is not a LoraConfig.
        ValueError: config asks for DoRA: use `bitfuse.add_lora_`.
    """
    layers = _layers()
    if not isinstance(config, layers.LoraConfig):
        raise TypeError(f"config is a {type(config).__name__}, expected a peft.LoraConfig")
    if config.use_dora:
        raise ValueError(
            "config.use_dora is True, which PEFT can't begin over a weight that it does not know"
        )
    config._register_custom_module({Linear: layers.FusedLinear})
    return config


def _shared_weights(model: torch.nn.Module) -> set[int]:
    """Storage of each weight that several modules have."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and p.numel():
                at = p.untyped_storage().data_ptr()
                seen[at] = seen.get(at, 0) + 1
    return {at for at, count in seen.items() if count > 1}


def _refusal(module: Any, kinds: Any, shared: set[int]) -> str | None:
    kind = type(module)
    if kind in kinds.FUSED.values():
        return "it is fused already"
    if kind not in kinds.FUSED:
        return f"a {kind.__module__}.{kind.__name__}, which bitfuse has no fused form of"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if module.merged_adapters:
        return f"adapters {list(module.merged_adapters)} are merged: unmerge them first"
    if module.fan_in_fan_out:
        return "fan_in_fan_out is True: its weight is transposed"
    for name in module.lora_A:
        if reason := kinds.unsupported(module, name):
            return f"adapter {name!r}: {reason}"
    if inside := _hooked(module):
        return f"{inside} has hooks, which a fused layer would not call"
    base = module.base_layer
    if isinstance(base, kinds.BaseTunerLayer):
        return f"its base is another adapter, a {type(base).__name__}"
    if "forward" in base.__dict__:
        return "the forward of its base_layer is replaced on the instance"
    if type(base) in (torch.nn.Linear, Linear):
        return kinds.unsupported_base(base)
    if isinstance(base, torch.nn.Linear) and type(base).__module__.startswith("torch."):
        return f"its base is a {type(base).__name__}, a subclass of Linear"
    if base.weight.numel() and base.weight.untyped_storage().data_ptr() in shared:
        return "its quantised weight is shared with another layer"
    return bnb.refusal(base)


def _hooked(module: torch.nn.Module) -> str | None:
    for name, inner in module.named_modules():
        hooks: Sequence[Any] = (
            inner._forward_hooks,
            inner._forward_pre_hooks,
            inner._backward_hooks,
            inner._backward_pre_hooks,
        )
        if inner is not module and any(hooks):
            return name
    return None

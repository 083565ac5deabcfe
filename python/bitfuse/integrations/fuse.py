"""fuse_: blocks of transformers' models with bitfuse's ops in them, in place; unfuse_: as it was."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.text import table
from .fused_blocks import (
    DecoderLayer,
    DroppingLayer,
    Fused,
    GatedMLP,
    JoinedMLP,
    LayerNorm,
    OffsetRMSNorm,
    PostNorm,
    RMSNorm,
    RoundedRMSNorm,
    SandwichLayer,
    fused,
    unfused,
)

# by architecture: classes of its modeling file, and what takes their place
Table = dict[str, type[Fused]]


def _llama_like(prefix: str) -> Table:
    return {
        f"{prefix}RMSNorm": RMSNorm,
        f"{prefix}MLP": GatedMLP,
        f"{prefix}DecoderLayer": DecoderLayer,
    }


def _gemma_like(prefix: str) -> Table:
    return {
        f"{prefix}RMSNorm": OffsetRMSNorm,
        f"{prefix}MLP": GatedMLP,
        f"{prefix}DecoderLayer": SandwichLayer,
    }


ARCHITECTURES: dict[str, Table] = {
    "llama": _llama_like("Llama"),  # SOLAR's too
    "mistral": _llama_like("Mistral"),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3"),
    "gemma2": _gemma_like("Gemma2"),
    "gemma3": _gemma_like("Gemma3"),
    "phi3": {"Phi3RMSNorm": RMSNorm, "Phi3MLP": JoinedMLP, "Phi3DecoderLayer": DroppingLayer},
    "gpt_oss": {"GptOssRMSNorm": RoundedRMSNorm, "GptOssDecoderLayer": DecoderLayer},
    "bert": {"BertSelfOutput": PostNorm, "BertOutput": PostNorm},
}
_OF_PARTS = {"BertLayer"}  # blocks that are their parts, no more
_BEFORE = "_bitfuse_attention_before"  # the attention that a model had


@dataclass
class BlockReport:
    """What `fuse_` did. `str()` is a table.

    Attributes:
        blocks: how many of each class run with bitfuse's ops now, by the class' name.
        left: name of each norm, MLP and layer that is left alone, and why.
        attention: whether the model's attention is bitfuse's now.
    """

    blocks: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    attention: bool = False

    def __str__(self) -> str:
        rows = [(name, str(count), "") for name, count in self.blocks.items()]
        rows += [(name, "", f"left as it is: {why}") for name, why in self.left.items()]
        rows += [("attention", "", "bitfuse.attention" if self.attention else "left as it is")]
        last = ("whole model", str(sum(self.blocks.values())), f"{len(self.left)} left")
        return table(("block", "fused", "note"), rows, last, numbers=0)


def fuse_(model: torch.nn.Module, *, attention: bool = True) -> BlockReport:
    """Let the blocks of a transformers model run with bitfuse's ops, in place: norms as `bitfuse.rms_norm`
    and `bitfuse.layer_norm`, with what is added before them in the same pass; gated MLPs as
    `bitfuse.gated_activation`; attention as `bitfuse.attention`. Llama (SOLAR's is one), Mistral, Qwen 2 and
    3, Gemma 2 and 3, Phi-3, gpt-oss and BERT.

    Modules are replaced by others of the same class, with the same children, parameters, hooks and names: the
    optimizer, `save_pretrained`, `quantize_` and adapters go on working, before and after. A hook on what is
    fused away (a norm after a sum) makes that place run as before for as long as it is there. Outputs and
    gradients are as near to the exact ones as the model's own. `unfuse_` gives the model back.

    Args:
        model: a model of transformers, or any module that holds one.
        attention: False leaves attention as it is; a model is asked for `attn_implementation="bitfuse"` else,
            which makes no attention weights.

    Returns:
        What was replaced, and what was left and why: an unknown architecture's blocks are named.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    report, made, counts = BlockReport(), {}, Counter[str]()
    bert = any(type(m).__module__ == "transformers.models.bert.modeling_bert" for m in model.modules())
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            counts[type(module).__name__] += 1
            continue
        kind = LayerNorm if bert and type(module) is torch.nn.LayerNorm else _kind(type(module))
        if kind is None:
            if (why := _unknown(module)) is not None:
                report.left[name or type(module).__name__] = why
        elif (why := _refusal(kind, module, model)) is not None:
            report.left[name or type(module).__name__] = why
        else:
            made[id(module)] = fused(kind, module)
            counts[type(module).__name__] += 1
    _replace(model, made)
    report.blocks = dict(counts)
    report.attention = attention and _attend(model)
    return report


def unfuse_(model: torch.nn.Module) -> int:
    """Undo `fuse_`: transformers' own modules again, with whatever parameters, children and hooks they have
    by now, and the attention that there was.

    Returns:
        How many blocks were replaced.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    blocks = [m for m in model.modules() if isinstance(m, Fused)]
    _replace(model, {id(m): unfused(m) for m in blocks})
    for module in model.modules():
        before = module.__dict__.pop(_BEFORE, None)
        if before is not None:
            module.set_attn_implementation(before)  # type: ignore[operator]
    return len(blocks)


def _replace(model: torch.nn.Module, made: dict[int, Any]) -> None:
    """New modules in the places of old ones, whose children they share."""
    for parent in tuple(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]


def _kind(cls: type[torch.nn.Module]) -> type[Fused] | None:
    """What takes the place of modules of a class."""
    known, _, file = cls.__module__.rpartition(".")
    architecture = known.removeprefix("transformers.models.")
    if file != f"modeling_{architecture}":
        return None
    return ARCHITECTURES.get(architecture, {}).get(cls.__name__)


def _unknown(module: torch.nn.Module) -> str | None:
    """Why a block of transformers stays what it is; None for what is no such block."""
    cls = type(module)
    if not cls.__module__.startswith("transformers.models."):
        return None
    if not cls.__name__.endswith(("Norm", "MLP", "Layer", "Experts")) or cls.__name__ in _OF_PARTS:
        return None
    architecture = cls.__module__.split(".")[2]
    if architecture in ARCHITECTURES:
        return f"no fused form of a {cls.__name__}"
    return f"a {cls.__name__} of an unknown architecture, {architecture}"


def _refusal(kind: type[Fused], module: torch.nn.Module, model: torch.nn.Module) -> str | None:
    if module is model:
        return "it is the model itself, which can't be replaced in place"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    return kind.reason(module)


def _attend(model: torch.nn.Module) -> bool:
    """Ask the outermost models for bitfuse's attention, and keep what they had."""
    outer: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") or not other for other in outer)
        if hasattr(module, "set_attn_implementation") and hasattr(module, "config") and not inside:
            outer[name] = module
    if not outer:
        return False
    from .transformers import NAME, register

    register()
    for module in outer.values():
        before = getattr(module.config, "_attn_implementation", None)
        if before != NAME:
            module.set_attn_implementation(NAME)
            module.__dict__[_BEFORE] = before
    return True

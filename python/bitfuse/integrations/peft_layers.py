"""PEFT's LoRA layers with a fused forward; importing this imports peft."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer

from ..nn import Linear
from ..nn.dora import RowNorms, dora_scale
from ..nn.lora import LowRank, adapted_linear
from .bitsandbytes import to_bitsandbytes

__all__ = [
    "FUSED",
    "BaseTunerLayer",
    "FusedLinear",
    "LoraConfig",
    "give_base_back",
    "take_base",
    "unsupported",
]

_NORMS, _ORIGINAL = "_bitfuse_norms", "_bitfuse_original"


def unsupported(module: Any, adapter_name: str) -> str | None:
    """Why an adapter of a PEFT layer can't run fused; None when it can."""
    variant = module.lora_variant.get(adapter_name)
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        return f"the variant {type(variant).__name__}"
    if module.lora_bias.get(adapter_name):
        return "lora_bias is True"
    dropout = module.lora_dropout[adapter_name]
    if type(dropout) not in (torch.nn.Dropout, torch.nn.Identity):
        return f"its dropout is a {type(dropout).__name__}"
    return None


class _Fused:
    """What a fused layer does in place of its PEFT class; a call that it can't serve goes to that class."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = not args and all(value is None for value in kwargs.values())
        if self.disable_adapters or self.merged or not plain or any(unsupported(self, n) for n in names):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        base = self.base_layer
        if not names:
            return base(x)
        adapters = [self._low_rank(name) for name in names]
        original = self.__dict__.get(_ORIGINAL)
        if original is None:
            return adapted_linear(x, base, adapters)
        compute = compute_dtype(original)
        return adapted_linear(x if compute is None else x.to(compute), base, adapters).to(x.dtype)

    def _low_rank(self: Any, name: str) -> LowRank:
        lora_A, lora_B, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        dropout = self.lora_dropout[name]
        p = dropout.p if dropout.training and isinstance(dropout, torch.nn.Dropout) else 0.0
        if name not in self.lora_variant:
            return LowRank(lora_A, lora_B, scaling, p)
        norms = self.__dict__.setdefault(_NORMS, RowNorms())
        norm = norms.norm(name, self.base_layer, lora_A, lora_B, scaling, self.training)
        return LowRank(lora_A, lora_B, scaling, p, dora_scale(self.lora_magnitude_vector[name].weight, norm))

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop(_NORMS, None)
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _get_base_layer_device_and_dtype(self: Any, base_layer: Any) -> tuple[Any, Any]:
        if isinstance(base_layer, Linear):
            return base_layer.qweight.device, None
        return super()._get_base_layer_device_and_dtype(base_layer)  # type: ignore[misc]

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.base_layer, Linear):
            raise ValueError("PEFT can't merge into a bitfuse.nn.Linear: unfuse_peft_ the model first")
        super().merge(*args, **kwargs)  # type: ignore[misc]


def compute_dtype(original: Any) -> torch.dtype | None:
    """The dtype that a bitsandbytes layer was told to compute in; None for its input's."""
    return original.compute_dtype if getattr(original, "compute_type_is_set", False) else None


class FusedLinear(_Fused, PeftLinear):
    """PEFT's LoRA over a dense or a bitfuse layer, fused."""


FUSED: dict[type, type] = {PeftLinear: FusedLinear}

if is_bnb_available():
    from peft.tuners.lora.bnb import Linear8bitLt as PeftLinear8bitLt

    class FusedLinear8bitLt(_Fused, PeftLinear8bitLt):
        """PEFT's LoRA over bitsandbytes' 8-bit layer, fused."""

    FUSED[PeftLinear8bitLt] = FusedLinear8bitLt

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

    class FusedLinear4bit(_Fused, PeftLinear4bit):
        """PEFT's LoRA over bitsandbytes' 4-bit layer, fused."""

    FUSED[PeftLinear4bit] = FusedLinear4bit


def take_base(module: Any, made: Linear) -> None:
    """Put a converted base in a PEFT layer, and keep the original, which has no memory of its own now."""
    module.__dict__[_ORIGINAL] = module.base_layer
    module.base_layer = made


def give_base_back(module: Any) -> None:
    """Undo `take_base`."""
    module.__dict__.pop(_NORMS, None)
    original = module.__dict__.pop(_ORIGINAL, None)
    if original is not None:
        to_bitsandbytes(module.base_layer, original)
        module.base_layer = original

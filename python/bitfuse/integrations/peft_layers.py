"""PEFT's LoRA layers with a fused forward; importing this imports peft."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.modules.module import _has_any_global_hook

from ..nn import Linear
from ..nn.dora import RowNorms, dora_scale
from ..nn.lora import LowRank, adapted_linear
from ..ops.linear.lora_linear import MAX_RANK
from ..ops.linear.lowbit_linear import FLOATS
from .bitsandbytes import to_bitsandbytes

__all__ = [
    "FUSED",
    "BaseTunerLayer",
    "FusedLinear",
    "LoraConfig",
    "give_base_back",
    "take_base",
    "unsupported",
    "unsupported_base",
]

_NORMS, _ORIGINAL, _DENSE = "_bitfuse_norms", "_bitfuse_original", "_bitfuse_dense"
_TENSORS = (torch.nn.Parameter, torch.Tensor)


def unsupported(module: Any, adapter_name: str) -> str | None:
    """Why an adapter of a PEFT layer can't run fused; None when it can. `_Fused._adapters` asks the same at
    each call, in a hurry."""
    variant = module.lora_variant.get(adapter_name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"the variant {type(variant).__name__}"
    if module.lora_bias.get(adapter_name):
        return "lora_bias is True"
    dropout = module.lora_dropout[adapter_name]
    if type(dropout) not in (torch.nn.Dropout, torch.nn.Identity):
        return f"its dropout is a {type(dropout).__name__}"
    if "forward" in dropout.__dict__:
        return "the forward of its dropout is replaced on the instance"
    if not _drops_as_ours(dropout):
        return f"its dropout has p {dropout.p} and inplace {dropout.inplace}"
    for key in ("lora_A", "lora_B"):
        linear = getattr(module, key)[adapter_name]
        if type(linear) is not torch.nn.Linear:
            return f"its {key} is a {type(linear).__name__}, expected a torch.nn.Linear, no subclass"
        if "forward" in linear.__dict__:
            return f"the forward of its {key} is replaced on the instance"
        if linear._parameters.get("bias") is not None:
            return f"its {key} has a bias"
        if not _plain(linear._parameters.get("weight")):
            return f"its {key} is {_described(linear)}"
    if (r := module.lora_A[adapter_name].weight.shape[0]) > MAX_RANK:
        return f"rank {r}, above {MAX_RANK}"
    scaling = module.scaling[adapter_name]
    if type(scaling) not in (float, int):
        return f"its scaling is a {type(scaling).__name__}, expected a number"
    if variant is not None:
        magnitude = module.lora_magnitude_vector[adapter_name]
        if type(magnitude) is not DoraLinearLayer or "forward" in magnitude.__dict__:
            return f"its magnitude is a {type(magnitude).__name__} with a forward of its own"
    return None


def unsupported_base(base: torch.nn.Module) -> str | None:
    """Why a linear layer can't be under fused adapters; None when it can."""
    if type(base) is torch.nn.Linear and not _plain(base._parameters.get("weight")):
        return f"its base is {_described(base)}"
    return None


def _described(linear: torch.nn.Module) -> str:
    weight = linear._parameters.get("weight")
    if weight is None:
        return "computed by a hook"
    kind = "" if type(weight) in _TENSORS else f" in a {type(weight).__name__}"
    return f"{weight.dtype}{kind}, expected {' or '.join(map(str, FLOATS))}"


def _plain(t: Any) -> bool:
    return type(t) in _TENSORS and t.dtype in FLOATS


def _drops_as_ours(dropout: Any) -> bool:
    return type(dropout) is torch.nn.Identity or (dropout.p < 1 and not dropout.inplace)


def _watched(module: Any) -> Any:
    """Whether a call of the module runs more than its class's forward."""
    return (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class _Fused:
    """What a fused layer does in place of its PEFT class. A call that it can't serve goes to that class: one
    with arguments of PEFT's, and one where the modules inside, which a fused call passes by, are no longer
    what PEFT made, have hooks, or a forward of their own."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = not args and not (kwargs and any(value is not None for value in kwargs.values()))
        adapters = self._adapters(x) if plain else None
        if adapters is None:
            return self._as_peft(x, *args, **kwargs)
        base = self._modules["base_layer"]
        if not adapters:
            return base(x)
        original = self.__dict__.get(_ORIGINAL)
        if original is None:
            return adapted_linear(x, base, adapters)
        compute = compute_dtype(original)
        return adapted_linear(x if compute is None else x.to(compute), base, adapters).to(x.dtype)

    def _adapters(self: Any, x: torch.Tensor) -> list[LowRank] | None:
        """The active adapters, or None where only PEFT's forward is right."""
        own = self.__dict__
        if (
            own["_disable_adapters"]
            or own["merged_adapters"]
            or not own.get("cast_input_dtype_enabled", True)
            or not _plain(x)
            or _has_any_global_hook()
        ):
            return None
        # the dicts, not attributes: Module.__getattr__ costs more than all of these checks
        modules = self._modules
        base = modules["base_layer"]
        if type(base) is torch.nn.Linear:
            if not _plain(base._parameters.get("weight")):
                return None
        elif type(base) is not Linear:
            return None
        if _watched(base):
            return None
        As, Bs = modules["lora_A"]._modules, modules["lora_B"]._modules
        dropouts, scalings = modules["lora_dropout"]._modules, own["scaling"]
        active = own["_active_adapter"]
        adapters = []
        for name in (active,) if isinstance(active, str) else active:
            a = As.get(name)
            if a is None:
                continue
            b, dropout, scaling = Bs[name], dropouts[name], scalings[name]
            if type(a) is not torch.nn.Linear or type(b) is not torch.nn.Linear:
                return None
            if _watched(a) or _watched(b) or _watched(dropout):
                return None
            pa, pb = a._parameters, b._parameters
            lora_A: Any = pa.get("weight")
            lora_B: Any = pb.get("weight")
            if (
                pa.get("bias") is not None
                or pb.get("bias") is not None
                or not _plain(lora_A)
                or not _plain(lora_B)
            ):
                return None
            if lora_A.shape[0] > MAX_RANK or type(scaling) not in (float, int):
                return None
            p = 0.0
            if type(dropout) is not torch.nn.Identity:
                if type(dropout) is not torch.nn.Dropout or not _drops_as_ours(dropout):
                    return None
                p = dropout.p if dropout.training else 0.0
            out_scale = None
            if variant := own["lora_variant"].get(name):
                magnitude = modules["lora_magnitude_vector"]._modules.get(name)
                if type(variant) is not DoraLinearVariant or type(magnitude) is not DoraLinearLayer:
                    return None
                if _watched(magnitude):
                    return None
                norms = own.setdefault(_NORMS, RowNorms(compare_scales=True))
                # PEFT finds them at each call: over a dense base, whose every write would have to be seen,
                # so do we
                anew = own["training"] or type(base) is torch.nn.Linear
                norm = norms.norm(name, base, lora_A, lora_B, scaling, anew)
                out_scale = dora_scale(magnitude.weight, norm)
            adapters.append(LowRank(lora_A, lora_B, scaling, p, out_scale))
        return adapters

    def _as_peft(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.lora_variant or not isinstance(self.base_layer, Linear):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        # a variant of PEFT's reads the base weight, which has to be a dense Parameter
        dense = torch.nn.Linear(self.in_features, self.out_features, device="meta")
        weight = self.base_layer.weight.dequantize(x.dtype)
        dense.weight = torch.nn.Parameter(weight, requires_grad=False)
        dense.bias = self.base_layer.bias
        self.__dict__[_DENSE] = dense
        try:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self.__dict__[_DENSE]

    def get_base_layer(self: Any) -> Any:
        return self.__dict__.get(_DENSE) or super().get_base_layer()  # type: ignore[misc]

    def clear_norms(self: Any) -> None:
        """Find DoRA's kept norms anew: for a write to few-bit codes through `.data`, which torch does not
        see."""
        self.__dict__.pop(_NORMS, None)

    def _replicate_for_data_parallel(self: Any) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica.__dict__.pop(_NORMS, None)  # its own, on its own device
        return replica

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

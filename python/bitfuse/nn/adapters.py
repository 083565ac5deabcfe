"""AdapterLinear: a frozen linear layer under named adapters; what LoRA and IA3 have in common."""

from __future__ import annotations

import abc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..ops.linear.lowbit_linear import FLOATS
from ..weights.quantize import quantize
from ..weights.scales import nest_scales
from ..weights.weight import CHUNK, LowBitWeight
from .linear import Linear, is_conv1d

# what of a module calls hooks: they move from a layer to the one around it
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_MERGED = "merged_layer."


@dataclass(frozen=True)
class Merged:
    """What `merge` did to one layer.

    Attributes:
        adapters: merged, in order.
        relative_error: ||stored - exact|| / ||exact||, Frobenius norms: what rounding to the weight's dtype
            or few-bit format costs.
        nbytes: memory of the merged weight, held beside the original until `unmerge`.
    """

    adapters: tuple[str, ...]
    relative_error: float
    nbytes: int


def sizes_of(module: torch.nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a layer that can carry adapters."""
    if is_conv1d(module):
        assert isinstance(module.weight, torch.Tensor)
        return module.weight.shape[1], module.weight.shape[0]
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def _take_conv1d(conv: Any) -> torch.nn.Linear:
    """The layer as a `torch.nn.Linear`, to which its memory goes: it is not to be called until
    `_give_conv1d_back`."""
    n, k = sizes_of(conv)
    linear = torch.nn.Linear(k, n, device="meta", dtype=conv.weight.dtype)
    linear.weight = torch.nn.Parameter(conv.weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = conv.bias
    conv.weight = torch.nn.Parameter(conv.weight.new_empty(0), requires_grad=False)
    return linear.train(conv.training)


def _give_conv1d_back(conv: Any, linear: torch.nn.Linear) -> torch.nn.Module:
    conv.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
    conv.bias = linear.bias
    made: torch.nn.Module = conv
    return made


def refusal(base: object) -> str | None:
    """Why a module can't carry adapters; None when it can."""
    if type(base) not in (torch.nn.Linear, Linear) and not is_conv1d(base):
        return f"a {type(base).__name__}, expected a torch.nn.Linear or a bitfuse.nn.Linear, no subclass"
    assert isinstance(base, torch.nn.Module)
    if "forward" in base.__dict__:
        return "its forward is replaced on the instance"
    if isinstance(base, Linear):
        return None
    weight = base._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}, expected {' or '.join(map(str, FLOATS))}"
    return None


def check_name(name: object) -> str:
    """Raise ValueError for a name that no adapter can have."""
    if (
        not isinstance(name, str)
        or not name
        or "." in name
        or name == "_extra_state"
        or hasattr(torch.nn.ModuleDict, name)
    ):
        raise ValueError(
            f"adapter_name is {name!r}, expected a name without dots that ModuleDict does not use"
        )
    return name


class AdapterLinear(torch.nn.Module, abc.ABC):
    """A frozen linear layer under named adapters, any of them active.

    The base layer is held, not copied, and its parameters are frozen. Hooks on its calls move to this layer.
    A layer with no active adapter, or a disabled one, is the base layer.

    The state dict holds `base_layer.*` and `adapters.<name>.*`. It is always that of the unmerged layer.

    Args:
        base: a `torch.nn.Linear` or a `bitfuse.nn.Linear`; or transformers' Conv1D, whose weight becomes that
            of a `torch.nn.Linear`, and is its own again when the adapters are removed.

    Raises:
        TypeError: another kind of layer.
    """

    base_layer: torch.nn.Linear | Linear
    merged_layer: torch.nn.Linear | Linear | None
    original_layer: torch.nn.Linear | Linear | None
    # transformers asks each module: what may be tied to an embedding, and is then saved once
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        key: key
        for key in ("base_layer.weight", "base_layer.bias", "original_layer.weight", "original_layer.bias")
    }

    def __init__(self, base: torch.nn.Linear | Linear) -> None:
        if reason := refusal(base):
            raise TypeError(f"base: {reason}" if reason.startswith("its") else f"base is {reason}")
        super().__init__()
        self.out_features, self.in_features = sizes_of(base)
        self.base_layer = (_take_conv1d(base) if is_conv1d(base) else base).requires_grad_(False)
        self.__dict__["_conv1d"] = base if is_conv1d(base) else None
        self.adapters = torch.nn.ModuleDict()
        self.register_module("merged_layer", None)
        self.register_module("original_layer", None)
        self.active_adapters: tuple[str, ...] = ()
        self.merged_adapters: tuple[str, ...] = ()
        self.enabled = True
        self.training = base.training
        for name in HOOKS:
            self.__dict__[name] = base.__dict__[name]
        self._is_full_backward_hook = base._is_full_backward_hook
        self.register_state_dict_post_hook(_without_merged)

    @property
    def weight(self) -> torch.Tensor | LowBitWeight:
        """The weight in use: the base layer's, or the merged one."""
        return (self.merged_layer or self.base_layer).weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias in use."""
        return (self.merged_layer or self.base_layer).bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias") and isinstance(value, torch.Tensor):  # is tied anew
            setattr(self.without_adapters, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def without_adapters(self) -> torch.nn.Linear | Linear:
        """The layer that this one is without adapters: the base, unless the adapter has brought its own."""
        original: Any = self._modules.get("original_layer")  # layers pickled by version 0.1 have none
        return self.base_layer if original is None else original

    def take_base(self, base: torch.nn.Linear) -> None:
        """Let the layer's one adapter have a base of its own, as PEFT's file of a resized output embedding
        has; the layer's is what the adapter leaves behind."""
        self.original_layer = self.base_layer
        self.base_layer = base.requires_grad_(False).train(self.training)

    def _place(self) -> torch.device:
        return next(self.base_layer.parameters()).device

    def _hold(self, name: str, adapter: torch.nn.Module) -> None:
        """Take in a new adapter; the first is active at once."""
        self.adapters[name] = adapter.train(self.training)
        if self.active_adapters:
            adapter.requires_grad_(False)
        else:
            self.active_adapters = (name,)

    def _check_new(self, name: str) -> None:
        if check_name(name) in self.adapters:
            raise ValueError(f"adapter_name is {name!r}, which this layer has already")
        self._check_unmerged("add an adapter")
        if self.without_adapters is not self.base_layer:
            raise ValueError(f"adapters {list(self.adapters)} have brought a base weight of their own")

    def _check_known(self, names: str | Sequence[str]) -> tuple[str, ...]:
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            if name not in self.adapters:
                known = ", ".join(map(repr, self.adapters)) or "none"
                raise ValueError(f"no adapter {name!r} in this layer, expected one of: {known}")
        if len(set(names)) < len(names):
            raise ValueError(f"adapters is {names}, expected each name once")
        return names

    def _check_unmerged(self, what: str) -> None:
        if self.merged_layer is not None:
            raise ValueError(
                f"adapters {list(self.merged_adapters)} are merged into the weight: unmerge() before you "
                f"{what}"
            )

    def set_adapter(self, names: str | Sequence[str], trainable: bool = True) -> None:
        """Make adapters active, the others not; several act in the order given.

        As in PEFT only the active ones require gradients, and they only if `trainable`.

        Raises:
            ValueError: an unknown name; the layer is merged.
        """
        self._check_unmerged("set adapters")
        names = self._check_known(names)
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(trainable and name in names)
        self.active_adapters = names

    def enable_adapters(self) -> None:
        """Let the active adapters act (again)."""
        self.enabled = True

    def disable_adapters(self) -> None:
        """Be the base layer until `enable_adapters`, merged or not."""
        self.enabled = False

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter. If it was the only active one, none is.

        Raises:
            ValueError: an unknown name; the layer is merged.
        """
        self._check_unmerged("delete an adapter")
        self._check_known(name)
        del self.adapters[name]
        self.base_layer = self.without_adapters
        self.register_module("original_layer", None)
        self.active_adapters = tuple(a for a in self.active_adapters if a != name)

    def merge(self, adapters: str | Sequence[str] | None = None) -> Merged:
        """Put adapters into a weight of the base's dtype or few-bit format, and use that one.

        A few-bit weight is quantised anew, which moves it: the error is returned. The original weight stays
        where it is, untouched, so that `unmerge` restores it bit for bit; the price is the memory of a second
        weight. Works in slices of rows: no dense float copy of a few-bit weight is made, NVFP4 apart, whose
        one scale needs to see all of it.

        Args:
            adapters: names; the active ones by default.

        Raises:
            ValueError: an unknown name, the layer is merged already, or the merged weight holds a NaN or Inf
                (nothing is changed).
        """
        self._check_unmerged("merge")
        names = self._check_known(self.active_adapters if adapters is None else adapters)
        base = self.base_layer
        with torch.no_grad():
            bias = None if base.bias is None else self._merge_bias(base.bias, names)
            merge = self._merger(names)
            if isinstance(base, Linear):
                w = base.weight
                layer: torch.nn.Linear | Linear = Linear.from_weight(_requantise(w, base, merge), bias)
            else:
                layer = torch.nn.Linear(
                    self.in_features,
                    self.out_features,
                    base.bias is not None,
                    device="meta",
                    dtype=base.weight.dtype,
                )
                weight = torch.empty_like(base.weight)
                for rows, exact in float_rows(base):
                    weight[rows] = merge(rows, exact)
                layer.weight = torch.nn.Parameter(weight)
                layer.bias = None if bias is None else torch.nn.Parameter(bias)
            error = norm = 0.0
            for (rows, exact), (_, stored) in zip(float_rows(base), float_rows(layer), strict=True):
                exact = merge(rows, exact).double()
                error += float((stored.double() - exact).square().sum())
                norm += float(exact.square().sum())
        if not (error + norm < float("inf")):
            raise ValueError(f"adapters {list(names)} make a weight that is not finite: nothing is merged")
        self.merged_layer = layer.requires_grad_(False).train(self.training)
        self.merged_adapters = names
        nbytes = sum(p.nbytes for p in layer.parameters())
        return Merged(names, (error / norm) ** 0.5 if norm else float(error > 0), nbytes)

    def unmerge(self) -> None:
        """Go back to the original weight, bit for bit, and to the adapters that were active; nothing to do
        when not merged."""
        self.merged_layer = None
        self.merged_adapters = ()

    @abc.abstractmethod
    def _merger(self, names: tuple[str, ...]) -> Callable[[slice, torch.Tensor], torch.Tensor]:
        """What makes of float32 rows of the base weight those of the merged one."""

    def _merge_bias(self, bias: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        return bias

    @property
    def over_conv1d(self) -> bool:
        """Whether the layer stands in the place of a transformers Conv1D."""
        return self.__dict__.get("_conv1d") is not None

    def unwrap(self) -> torch.nn.Module:
        """The layer to put in this one's place: the merged one if it is merged, else the base. It takes the
        hooks back."""
        layer: torch.nn.Module = self.merged_layer or self.without_adapters
        if self.over_conv1d and type(layer) is torch.nn.Linear:
            layer = _give_conv1d_back(self.__dict__["_conv1d"], layer)
        for name in (*HOOKS, "_is_full_backward_hook"):
            layer.__dict__[name] = self.__dict__[name]
        return layer.train(self.training)

    def extra_repr(self) -> str:
        said = f"active={list(self.active_adapters)}"
        said += "" if self.enabled else ", disabled"
        return said + (f", merged={list(self.merged_adapters)}" if self.merged_adapters else "")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            self._check_unmerged("load a state")
        for name, adapter in self.adapters.items():
            _check_adapter_state(adapter, state_dict, f"{prefix}adapters.{name}.")
        if not isinstance(self.base_layer, Linear):  # that checks its own
            for name, own in self.base_layer.named_parameters():
                found = state_dict.get(f"{prefix}base_layer.{name}", own)
                if getattr(found, "shape", None) != own.shape:
                    shape = list(getattr(found, "shape", ()))
                    raise ValueError(
                        f"{prefix}base_layer.{name} has shape {shape}, expected {list(own.shape)}"
                    )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _without_merged(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    for key in [k for k in state_dict if k.startswith(prefix + _MERGED)]:
        del state_dict[key]


def _check_adapter_state(adapter: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError, with nothing written yet, for a state that is incomplete or of another adapter."""
    if not any(key.startswith(prefix) for key in state_dict):
        return
    for name, own in adapter.named_parameters():
        found = state_dict.get(prefix + name)
        if not isinstance(found, torch.Tensor):
            raise ValueError(f"{prefix}{name} is missing from the state, expected a tensor {list(own.shape)}")
        if found.shape != own.shape:
            raise ValueError(f"{prefix}{name} has shape {list(found.shape)}, expected {list(own.shape)}")
        if not found.is_floating_point():
            raise ValueError(f"{prefix}{name} has dtype {found.dtype}, expected floats")
    extra = state_dict.get(prefix + "_extra_state")
    if extra is not None:
        adapter.check_options(options_from_bytes(extra, prefix + "_extra_state"))  # type: ignore[operator]


def options_to_bytes(options: Mapping[str, Any]) -> torch.Tensor:
    """JSON in a uint8 tensor, so that safetensors takes it."""
    return torch.frombuffer(bytearray(json.dumps(options).encode()), dtype=torch.uint8)


def options_from_bytes(state: object, name: str) -> dict[str, Any]:
    """The inverse; ValueError for what is not JSON of a dict."""
    try:
        if not isinstance(state, torch.Tensor):
            raise TypeError(f"a {type(state).__name__}")
        return dict(json.loads(bytes(state.to("cpu", torch.uint8).tolist())))
    except (ValueError, TypeError, RecursionError) as why:
        raise ValueError(f"{name} is not the JSON of an adapter's options: {why}") from None


def float_rows(base: torch.nn.Linear | Linear) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of rows of a layer's weight as float32, in the original column order, a bounded number of
    weights at a time. A slice begins at a multiple of 8."""
    if isinstance(base, Linear):
        yield from base.weight.float_rows(8)
        return
    step = max(8, CHUNK // base.in_features // 8 * 8)
    for at in range(0, base.out_features, step):
        rows = slice(at, at + step)
        yield rows, base.weight.detach()[rows].float()


def _requantise(
    w: LowBitWeight, base: Linear, merge: Callable[[slice, torch.Tensor], torch.Tensor]
) -> LowBitWeight:
    """The merged weight in the format of w."""
    plain = replace(w.format, nested=False)
    if w.format.tensor_scale:
        whole = quantize(torch.cat([merge(*part) for part in float_rows(base)]), plain, g_idx=w.g_idx)
        return replace(whole, dtype=w.dtype, perm=None)
    parts = [quantize(merge(*part), plain, g_idx=w.g_idx) for part in float_rows(base)]
    if not parts:
        return w
    scales = torch.cat([p.scales for p in parts])
    nested = nest_scales(scales) if w.format.nested else (scales, None, None)
    zeros = None if w.zeros is None else torch.cat([p.zeros for p in parts if p.zeros is not None])
    offsets = None if w.offsets is None else torch.cat([p.offsets for p in parts if p.offsets is not None])
    qweight = torch.cat([p.qweight for p in parts])
    parts_of = (qweight, nested[0], w.format, w.shape, zeros, w.g_idx, nested[1], nested[2])
    return LowBitWeight(*parts_of, dtype=w.dtype, offsets=offsets)

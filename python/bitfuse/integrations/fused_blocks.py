"""Blocks of transformers' models with bitfuse's ops in them.

Each is a class that comes before transformers' own among the bases: what it makes is still a
LlamaDecoderLayer to whoever asks (gradient checkpointing, recorded outputs, sharding by class), has the same
children, parameters and hooks under the same names, and another forward. Inputs that the ops do not take
(float64) go to the forward below.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from ..core import autocast
from ..ops.linear.gated_activation import gated_activation
from ..ops.linear.lowbit_linear import FLOATS
from ..ops.norm.layer_norm import layer_norm
from ..ops.norm.rms_norm import rms_norm

OWN = "_bitfuse_"  # attributes that a block has beside transformers'


class Fused(torch.nn.Module):
    """A block that took the place of transformers' own; `below` is that one's class."""

    below: Any

    @classmethod
    def reason(cls, module: torch.nn.Module) -> str | None:
        """Why a module is left as it is; None where it is taken."""
        return None

    @classmethod
    def own(cls, module: torch.nn.Module) -> dict[str, Any]:
        """What the block keeps beside the module's attributes."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _made, (_kind(type(self)), self.below), self.__dict__


def _kind(cls: type) -> type[Fused]:
    return next(c for c in cls.__mro__ if issubclass(c, Fused) and "below" not in c.__dict__)


@functools.cache
def _class(kind: Any, below: Any) -> type[Fused]:
    names = {"below": below, "__module__": below.__module__, "__qualname__": below.__qualname__}
    return type(below.__name__, (kind, below), names)


def _made(kind: Any, below: Any) -> Fused:
    """One without attributes."""
    made = _class(kind, below)
    return made.__new__(made)


def fused(kind: type[Fused], module: torch.nn.Module) -> Fused:
    """The block in a module's place; it shares all that the module has."""
    made = _made(kind, type(module))
    made.__dict__.update(module.__dict__ | kind.own(module))
    return made


def unfused(block: Fused) -> torch.nn.Module:
    """Transformers' own module again."""
    made: torch.nn.Module = block.below.__new__(block.below)
    made.__dict__.update({k: v for k, v in block.__dict__.items() if not k.startswith(OWN)})
    return made


def _hooked(module: torch.nn.Module) -> bool:
    """Whether somebody waits for a call of the module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class Norm(Fused):
    """A norm over the last dimension, and with a residual added before."""

    def normed(self, x: torch.Tensor, residual: torch.Tensor | None) -> Any:
        """y, or y and the sum."""
        raise NotImplementedError

    def promotes(self, x: torch.Tensor) -> bool:
        """Whether the output is wider than x."""
        return False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype not in FLOATS:
            out: torch.Tensor = super().forward(hidden_states)
            return out
        if self.promotes(hidden_states):
            hidden_states = hidden_states.float()
        made: torch.Tensor = self.normed(hidden_states, None)
        return made


def add_norm(
    norm: torch.nn.Module, x: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and that sum: in one pass where nobody waits for the norm's own call."""
    alike = x.dtype == residual.dtype or autocast.is_any_enabled()
    taken = alike and x.dtype in FLOATS and residual.dtype in FLOATS
    if isinstance(norm, Norm) and taken and not (_hooked(norm) or norm.promotes(residual)):
        y, total = norm.normed(x, residual)
        return y, total
    total = residual + x
    return norm(total), total


class RMSNorm(Norm):
    """Llama's: the weight as it is, and the product in the wider dtype of x's and the weight's."""

    weight: torch.Tensor
    variance_epsilon: float

    def normed(self, x: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return rms_norm(x, self.weight, self.variance_epsilon, residual=residual)

    def promotes(self, x: torch.Tensor) -> bool:
        return self.weight.dtype != x.dtype and torch.promote_types(self.weight.dtype, x.dtype) != x.dtype


class RoundedRMSNorm(RMSNorm):
    """gpt-oss': the product in float32, then in x's dtype."""

    def promotes(self, x: torch.Tensor) -> bool:
        return False


class OffsetRMSNorm(Norm):
    """Gemma's: 1 + weight in float32, then in x's dtype."""

    weight: torch.Tensor
    eps: float

    def normed(self, x: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return rms_norm(x, self.weight, self.eps, residual=residual, offset=1.0)


class LayerNorm(Norm):
    """torch.nn.LayerNorm over one dimension."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    @classmethod
    def reason(cls, module: torch.nn.Module) -> str | None:
        if len(module.normalized_shape) != 1 or module.weight is None:  # type: ignore[arg-type]
            return "a layer norm over several dimensions, or without a weight"
        return None

    def normed(self, x: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual)

    def promotes(self, x: torch.Tensor) -> bool:
        return False


# activations of transformers and torch by their class' name
ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
    "ReLU": "relu",
}


class _Gated(Fused):
    """A gated MLP: its activation and product in one pass."""

    function = "act_fn"  # the attribute

    @classmethod
    def reason(cls, module: torch.nn.Module) -> str | None:
        kind = type(getattr(module, cls.function)).__name__
        return None if kind in ACTIVATIONS else f"its activation is a {kind}, which gated_activation has not"

    @classmethod
    def own(cls, module: torch.nn.Module) -> dict[str, Any]:
        return {f"{OWN}activation": ACTIVATIONS[type(getattr(module, cls.function)).__name__]}

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        function = getattr(self, self.function)
        if gate.dtype not in FLOATS or _hooked(function):
            out: torch.Tensor = function(gate) * up
            return out
        return gated_activation(gate, up, self.__dict__[f"{OWN}activation"])


class GatedMLP(_Gated):
    """gate_proj, up_proj and down_proj."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class JoinedMLP(_Gated):
    """Phi-3's: gate and up in one projection."""

    gate_up_proj: Any
    down_proj: Any

    function = "activation_fn"

    def forward(self, hidden_states: torch.Tensor) -> Any:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(self.gated(gate, up))


@functools.cache
def _order(below: Any) -> tuple[str, ...]:
    """Names of a forward's arguments after self and hidden_states."""
    return tuple(inspect.signature(below.forward).parameters)[2:]


class _Layer(Fused):
    """A decoder's layer: norms with what is added before them."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def attended(self, normed: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if args:
            kwargs = dict(zip(_order(self.below), args, strict=False)) | kwargs
        out: torch.Tensor = self.self_attn(hidden_states=normed, **kwargs)[0]
        return out


class DecoderLayer(_Layer):
    """Two norms: before attention, and before the MLP, where what attention gave is added. An MLP of experts
    gives what its router said beside."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = self.attended(self.input_layernorm(hidden_states), args, kwargs)
        normed, total = add_norm(self.post_attention_layernorm, found, hidden_states)
        out = self.mlp(normed)
        return total + (out[0] if isinstance(out, tuple) else out)


class DroppingLayer(_Layer):
    """Phi-3's: dropout before each sum."""

    resid_attn_dropout: Any
    resid_mlp_dropout: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = self.resid_attn_dropout(self.attended(self.input_layernorm(hidden_states), args, kwargs))
        normed, total = add_norm(self.post_attention_layernorm, found, hidden_states)
        out: torch.Tensor = total + self.resid_mlp_dropout(self.mlp(normed))
        return out


class SandwichLayer(_Layer):
    """Gemma 2's and 3's: a norm before and after attention, and before and after the MLP."""

    pre_feedforward_layernorm: Any
    post_feedforward_layernorm: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = self.attended(self.input_layernorm(hidden_states), args, kwargs)
        found = self.post_attention_layernorm(found)
        normed, total = add_norm(self.pre_feedforward_layernorm, found, hidden_states)
        out: torch.Tensor = total + self.post_feedforward_layernorm(self.mlp(normed))
        return out


class PostNorm(Fused):
    """BERT's end of a block: a projection, dropout, and the norm of that and the block's input."""

    dense: Any
    dropout: Any
    LayerNorm: Any

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return add_norm(self.LayerNorm, self.dropout(self.dense(hidden_states)), input_tensor)[0]

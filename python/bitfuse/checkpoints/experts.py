"""The experts of gpt-oss, each of them few-bit layers."""

from __future__ import annotations

from typing import Any

import torch

from ..nn import Linear
from ..weights.weight import LowBitWeight

_CLASS = ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts")


def is_dense_experts(module: torch.nn.Module) -> bool:
    """Whether a module is the experts of transformers' gpt-oss, in one tensor a projection."""
    return (type(module).__module__, type(module).__name__) == _CLASS


class PackedExperts(torch.nn.Module):
    """What transformers' GptOssExperts computes, of few-bit matrices: an expert is two `bitfuse.nn.Linear`,
    whose codes are parts of one tensor, and only experts that are asked read theirs.

    Args:
        experts: the module that it stands for; its parameters are taken over, until `fill` gives codes.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.num_experts: int = experts.num_experts
        self.alpha, self.limit = float(experts.alpha), float(experts.limit)
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def fill(self, name: str, w: LowBitWeight) -> None:
        """Give a projection, [experts, out_features, in_features], in the place of its parameter.

        Raises:
            ValueError: its shape is not that of the parameter, which is transposed.
        """
        held = self._parameters[name]
        assert held is not None
        if tuple(w.shape) != (held.shape[0], held.shape[2], held.shape[1]):
            raise ValueError(f"shape is {list(w.shape)}, expected that of {list(held.shape)}, transposed")
        del self._parameters[name]
        setattr(self, name, torch.nn.ModuleList(Linear.from_weight(each) for each in w))

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, hidden]; router_indices and routing_weights [tokens, experts a token]."""
        gate_up_proj: Any = self.gate_up_proj
        down_proj: Any = self.down_proj
        of_both: Any = self.gate_up_proj_bias
        of_down: Any = self.down_proj_bias
        out = torch.zeros_like(hidden_states)
        for expert in router_indices.unique().tolist():
            if expert >= self.num_experts:  # stands for nobody
                continue
            tokens, places = torch.where(router_indices == expert)
            both = gate_up_proj[expert](hidden_states[tokens]) + of_both[expert]
            gate, up = both[..., 0::2].clamp(max=self.limit), both[..., 1::2].clamp(-self.limit, self.limit)
            hidden = (up + 1) * (gate * torch.sigmoid(gate * self.alpha))
            made = down_proj[expert](hidden) + of_down[expert]
            made = made * routing_weights[tokens, places, None]
            out.index_add_(0, tokens, made.to(out.dtype))
        return out

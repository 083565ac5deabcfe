"""The activations that ops apply inside, by name: values and derivatives in plain torch."""

from __future__ import annotations

import math

import torch

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715  # of gelu's tanh form


def check_activation(name: object) -> str:
    """The name back; ValueError for one that is not in ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    return str(name)


def activate(z: torch.Tensor, name: str) -> torch.Tensor:
    """silu(z) = z sigmoid(z); gelu(z) = z Phi(z), by erf or in its tanh form; relu(z) = max(z, 0)."""
    if name == "silu":
        return torch.nn.functional.silu(z)
    if name == "relu":
        return torch.relu(z)
    return torch.nn.functional.gelu(z, approximate="tanh" if name == "gelu_tanh" else "none")


def derivative(z: torch.Tensor, name: str) -> torch.Tensor:
    """d activate(z) / dz: 0 or 1 for a z that is large, or infinite."""
    if name == "relu":
        return (~(z <= 0)).to(z.dtype)
    near = z.clamp(-1000, 1000)  # what it is multiplied with is 0 from there on
    if name == "silu":
        s = torch.sigmoid(z)
        return s * (1 + near * (1 - s))
    if name == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + near * density
    t = torch.tanh(_TANH_SCALE * (z + _TANH_CUBE * z**3))
    return 0.5 * (1 + t) + 0.5 * near * (1 - t * t) * _TANH_SCALE * (1 + 3 * _TANH_CUBE * near * near)

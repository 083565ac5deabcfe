"""BottleneckAdapter: down, activation, up, and the input added."""

from __future__ import annotations

import torch

from ..core.activations import check_activation
from ..ops.linear.bottleneck_adapter import bottleneck_adapter


class BottleneckAdapter(torch.nn.Module):
    """y = x + act(x D^T + c) U^T + b, the adapter that stands after a layer (Houlsby et al., 2019); see
    `bitfuse.bottleneck_adapter`.

    U and both biases begin as zeros, so that a new adapter changes nothing; D as `torch.nn.Linear` draws it.

    Args:
        features: of x and y.
        bottleneck: features in between.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        bias: learn c and b.
        device, dtype: of the parameters; x may have another dtype.

    Raises:
        ValueError: sizes below 1, an unknown activation.
    """

    def __init__(
        self,
        features: int,
        bottleneck: int,
        activation: str = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("features", features), ("bottleneck", bottleneck)):
            if size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        check_activation(activation)
        self.activation = activation
        self.down = torch.nn.Linear(features, bottleneck, bias, device=device, dtype=dtype)
        self.up = torch.nn.Linear(bottleneck, features, bias, device=device, dtype=dtype)
        with torch.no_grad():
            for t in (self.down.bias, self.up.weight, self.up.bias):
                if t is not None:
                    t.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, up = self.down, self.up
        return bottleneck_adapter(x, down.weight, up.weight, down.bias, up.bias, self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"

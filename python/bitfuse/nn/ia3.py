"""IA3Linear: a frozen linear layer whose inputs or outputs learnt vectors scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..ops.linear.lora_linear import lora_linear
from .adapters import AdapterLinear, options_to_bytes
from .linear import Linear, on_rows
from .lora import check_dtype


class IA3Adapter(torch.nn.Module):
    """One learnt vector: ia3_l, [in_features] when feedforward, else [out_features]."""

    def __init__(self, ia3_l: torch.Tensor, feedforward: bool) -> None:
        super().__init__()
        self.feedforward = feedforward
        self.ia3_l = torch.nn.Parameter(ia3_l)

    def check_options(self, found: Mapping[str, Any]) -> None:
        """Raise ValueError for a state's options that this adapter can't take over."""
        if found.get("feedforward") != self.feedforward:
            raise ValueError(
                f"the state is of an adapter with feedforward {found.get('feedforward')!r}, this one has "
                f"{self.feedforward!r}"
            )

    def get_extra_state(self) -> torch.Tensor:
        """The options, as JSON in a uint8 tensor, so that safetensors takes it."""
        return options_to_bytes({"feedforward": self.feedforward})

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Nothing to set: the layer has found the options to be this adapter's."""


class IA3Linear(AdapterLinear):
    """y = l * (x W^T + b), or (l * x) W^T + b in the feed-forward way, with W frozen and l learnt (IA3; Liu
    et al., 2022). The scale of outputs rides in `bitfuse.lora_linear`, as its out_scale.

    l begins as ones, so that a new adapter changes nothing. Several active adapters multiply, as in PEFT.

    Args:
        base: a `torch.nn.Linear` or a `bitfuse.nn.Linear`; held and frozen.
        feedforward: scale the inputs, as the paper does in feed-forward blocks, and not the outputs.
        adapter_name: of the first adapter; None makes a layer without one.
        dtype: of the adapter, float32, float16 or bfloat16.

    Raises:
        TypeError: a base that is no linear layer.
        ValueError: another dtype, a name that no adapter can have.
    """

    def __init__(
        self,
        base: torch.nn.Linear | Linear,
        feedforward: bool = False,
        *,
        adapter_name: str | None = "default",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base)
        self.feedforward = feedforward
        if adapter_name is not None:
            self.add_adapter(adapter_name, dtype=dtype)

    def add_adapter(self, adapter_name: str, *, dtype: torch.dtype = torch.float32) -> IA3Adapter:
        """Add an adapter, active if it is the first.

        Raises:
            ValueError: a name that is taken or that no adapter can have; another dtype; the layer is merged.
        """
        check_dtype(dtype)
        self._check_new(adapter_name)
        size = self.in_features if self.feedforward else self.out_features
        adapter = IA3Adapter(torch.ones(size, dtype=dtype, device=self._place()), self.feedforward)
        self._hold(adapter_name, adapter)
        return adapter

    def adapter(self, name: str) -> IA3Adapter:
        """An adapter by name.

        Raises:
            ValueError: an unknown name.
        """
        self._check_known(name)
        adapter = self.adapters[name]
        assert isinstance(adapter, IA3Adapter)
        return adapter

    def _product(self, names: tuple[str, ...]) -> torch.Tensor:
        product: torch.Tensor = self.adapter(names[0]).ia3_l
        for name in names[1:]:
            product = product * self.adapter(name).ia3_l
        return product

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if type(input) is not torch.Tensor and input.is_nested:
            return on_rows(self.forward, input)
        x = input
        if not self.enabled or not self.active_adapters:
            return self.without_adapters.forward(x)
        if self.merged_layer is not None:
            return self.merged_layer.forward(x)
        product = self._product(self.active_adapters)
        base = self.base_layer
        if self.feedforward:
            return base.forward((x * product).to(x.dtype))
        bias = None if base.bias is None else (base.bias * product).to(x.dtype)
        lora_A, lora_B = x.new_empty(0, self.in_features), x.new_empty(self.out_features, 0)
        return lora_linear(x, base.weight, lora_A, lora_B, 1.0, bias, out_scale=product)

    def _merger(self, names: tuple[str, ...]) -> Callable[[slice, torch.Tensor], torch.Tensor]:
        if not names:
            return lambda rows, w: w
        product = self._product(names).float()
        if self.feedforward:
            return lambda rows, w: w * product
        return lambda rows, w: w * product[rows].unsqueeze(1)

    def _merge_bias(self, bias: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        if self.feedforward or not names:
            return bias
        return (bias * self._product(names)).to(bias.dtype)

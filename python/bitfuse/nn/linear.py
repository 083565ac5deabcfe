"""Linear: torch.nn.Linear with its weight in few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core.explain import Explanation, explain
from ..ops.linear.lowbit_linear import apply_lowbit, lowbit_linear
from ..weights.formats import Format
from ..weights.quantize import quantize
from ..weights.weight import LowBitWeight, WeightTensors
from .few_bits import FewBits, zeros


class Linear(FewBits, torch.nn.Linear):  # type: ignore[misc]  # weight is no tensor
    """y = x W^T + b with a frozen few-bit W; see `bitfuse.lowbit_linear`.

    The constructor makes a layer of zeros for a checkpoint to fill; `from_float` quantises a
    `torch.nn.Linear`. It is a `torch.nn.Linear` to whoever asks, and `weight` a stand-in for a tensor: see
    `LowBitWeight`.

    The state dict is plain tensors: `qweight`, `scales`, what else the format needs (`zeros`, `g_idx`,
    `scale_scales`, `scale_offset`, `offsets`), `bias`, and `_extra_state`, the format as JSON in bytes.
    Scales in eight bits are held as uint8, which pickle, gloo and averaging take; a state with them as floats
    loads too. Loading checks all of them before it writes any. `half()`, `bfloat16()` and `to(dtype)` change
    the bias, and what `weight.dtype` says, and never the few-bit tensors; FSDP2's MixedPrecisionPolicy
    likewise. An average of models (EMA, SWA) should be of what requires a gradient: torch averages integers
    by a cast, which rounds codes down at some decays (0.999 keeps them).

    Args:
        in_features, out_features: sizes, in_features a multiple of 8.
        bias: True adds a bias.
        device, dtype: of the bias, and the device of all.
        format: a name or a `Format`; `group_size`, `symmetric`, `nested`, `scale_dtype`, `offset`,
            `scale_rows` as in `bitfuse.quantize`.
        act_order: True makes room for a `g_idx`.

    Raises:
        ValueError: sizes or options that do not fit the format.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str | Format = "int4",
        group_size: int | None = None,
        symmetric: bool | None = None,
        nested: bool | None = None,
        scale_dtype: torch.dtype | None = None,
        act_order: bool = False,
        offset: bool | None = None,
        scale_rows: int | None = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        w = zeros(
            (out_features, in_features), device, dtype, format, group_size=group_size, symmetric=symmetric,
            nested=nested, scale_dtype=scale_dtype, act_order=act_order, offset=offset, scale_rows=scale_rows,
        )  # fmt: skip
        self._hold(w, torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

    def _hold(self, w: LowBitWeight, bias: torch.Tensor | None) -> None:
        self._hold_weight(w)
        self.out_features, self.in_features = w.shape
        if bias is None or isinstance(bias, torch.nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.bias = torch.nn.Parameter(bias)

    @property
    def _size(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @classmethod
    def from_weight(cls, w: LowBitWeight, bias: torch.Tensor | None = None) -> Linear:
        """A layer around a quantised weight; a bias that is a Parameter stays that very Parameter."""
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer._hold(w, bias)
        return layer

    @classmethod
    def from_float(cls, linear: torch.nn.Linear, format: str | Format = "int4", **options: Any) -> Linear:
        """Quantise the weight of a `torch.nn.Linear` (options as in `bitfuse.quantize`); its bias is shared.
        transformers' Conv1D, whose weight is stored transposed, is taken too.

        Raises:
            TypeError: not a torch.nn.Linear.
            ValueError: as `bitfuse.quantize`.
        """
        weight = float_weight(linear)
        if weight is None:
            few = " of few bits already" if isinstance(linear, Linear) else ""
            raise TypeError(f"linear is a {type(linear).__name__}{few}, expected a torch.nn.Linear")
        layer = cls.from_weight(quantize(weight, format, **options), linear.bias)
        return layer.train(linear.training)

    @classmethod
    def tied_to(cls, other: FewBits, bias: torch.Tensor | None = None) -> Linear:
        """A layer that reads the codes of another, an embedding's say: the same parameters, which the state
        dict says once, there. Whatever is loaded into the other is read here; it comes first in the model.

        Raises:
            TypeError: the other holds no few-bit matrix.
        """
        if not isinstance(other, FewBits):
            raise TypeError(f"other is a {type(other).__name__}, expected a bitfuse.nn.Embedding or Linear")
        layer = cls.from_weight(other.weight, bias)
        layer._read_codes_of(other)
        return layer.train(other.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if type(input) is not torch.Tensor and input.is_nested:
            return on_rows(self.forward, input)
        p: dict[str, Any] = self._parameters
        if "qweight" not in p:
            p = self.__dict__ | p
        bias = p["bias"]
        if bias is not None and bias.dtype is not input.dtype:
            bias = bias.to(input.dtype)
        format = self.format
        weight = WeightTensors(
            p["qweight"], p["scales"], p["zeros"], p["scale_scales"], p["scale_offset"], format.name,
            self.group_size, p.get("offsets"), format.scale_rows,
        )  # fmt: skip
        return apply_lowbit(input, weight, self._buffers["perm"], bias)

    def explain(self, x: torch.Tensor) -> Explanation:
        """Who would serve `forward(x)`, and why the others would not."""
        return explain(lowbit_linear, x, self.weight, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, format={self.format}"

    def reset_parameters(self) -> None:
        """Zeros, as the constructor leaves them: `torch.nn.Linear`'s draw would be lost in few bits.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"reset_parameters would write into {self.weight!r}, which is frozen: make a torch.nn.Linear and "
            "quantise it"
        )


def on_rows(forward: Callable[[torch.Tensor], torch.Tensor], nested: torch.Tensor) -> torch.Tensor:
    """What a linear layer makes of a nested tensor: of its rows, wherever their sequences end."""
    if nested.layout != torch.jagged:
        raise TypeError(f"input is a nested tensor of layout {nested.layout}, expected torch.jagged")
    rows: Any = nested
    made = forward(rows.values())
    return torch.nested.nested_tensor_from_jagged(
        made, rows.offsets(), rows.lengths(), rows._ragged_idx, rows._maybe_min_seqlen, rows._maybe_max_seqlen
    )


def is_conv1d(module: object) -> bool:
    """Whether a module is transformers' Conv1D: a linear layer with its weight as [in, out] (GPT-2)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def float_weight(module: torch.nn.Module) -> torch.Tensor | None:
    """The weight [out_features, in_features] of a dense linear layer; None for another module."""
    if isinstance(module, Linear) or not (isinstance(module, torch.nn.Linear) or is_conv1d(module)):
        return None
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.t() if is_conv1d(module) else weight

"""Linear: torch.nn.Linear with its weight in few bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from ..formats import Format, get_format
from ..op import Explanation, explain
from ..ops.lowbit_linear import apply_lowbit, lowbit_linear
from ..weight import LowBitWeight, WeightTensors, quantize

_TENSORS = ("qweight", "scales", "zeros", "g_idx", "scale_scales", "scale_offset")


class Linear(torch.nn.Module):
    """y = x W^T + b with a frozen few-bit W; see `bitfuse.lowbit_linear`.

    The constructor makes a layer of zeros for a checkpoint to fill; `from_float` quantises a
    `torch.nn.Linear`.

    The state dict is plain tensors: `qweight`, `scales`, what else the format needs (`zeros`, `g_idx`,
    `scale_scales`, `scale_offset`), `bias`, and `_extra_state`, the format as JSON in bytes. Loading checks
    all of them before it writes any. `half()`, `bfloat16()` and `to(dtype)` change the bias and never the
    few-bit tensors.

    Args:
        in_features, out_features: sizes, multiples of 8.
        bias: True adds a bias.
        device, dtype: of the bias, and the device of all.
        format: a name or a `Format`; `group_size`, `symmetric`, `nested`, `scale_dtype` as in
            `bitfuse.quantize`.
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
    ) -> None:
        super().__init__()
        fmt = get_format(
            format, group_size=group_size, symmetric=symmetric, nested=nested, scale_dtype=scale_dtype
        )
        tensors = {
            name: torch.zeros(shape, dtype=fmt.scale_dtype if len(dtypes) > 1 else dtypes[0], device=device)
            for name, dtypes, shape in LowBitWeight.expected(fmt, (out_features, in_features))
        }
        if act_order:
            group = in_features if fmt.group_size == -1 else fmt.group_size
            tensors["g_idx"] = torch.arange(in_features, dtype=torch.int32, device=device) // group
        made = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self._hold(LowBitWeight(format=fmt, shape=(out_features, in_features), **tensors), made)

    def _hold(self, w: LowBitWeight, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = w.shape
        self.format = w.format
        self.group_size = w.group_size
        for name in _TENSORS:
            t = getattr(w, name)
            self.register_parameter(name, None if t is None else torch.nn.Parameter(t, requires_grad=False))
        self.register_buffer("perm", w.perm, persistent=False)
        if bias is None or isinstance(bias, torch.nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.bias = torch.nn.Parameter(bias)

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

        Raises:
            TypeError: not a torch.nn.Linear.
            ValueError: as `bitfuse.quantize`.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}, expected a torch.nn.Linear")
        layer = cls.from_weight(quantize(linear.weight, format, **options), linear.bias)
        return layer.train(linear.training)

    @property
    def weight(self) -> LowBitWeight:
        """The weight as a `LowBitWeight`; it shares the layer's tensors."""
        return LowBitWeight(
            format=self.format, shape=(self.out_features, self.in_features), perm=self.perm, **self._tensors()
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: t for name in _TENSORS if (t := self._parameters[name]) is not None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # the dict, not attributes: Module.__getattr__ costs more than the checks of the op
        p = self._parameters
        bias: torch.Tensor | None = p["bias"]
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        tensors = (p["qweight"], p["scales"], p["zeros"], p["scale_scales"], p["scale_offset"])
        weight = WeightTensors._make((*tensors, self.format.name, self.group_size))
        return apply_lowbit(x, weight, self._buffers["perm"], bias)

    def explain(self, x: torch.Tensor) -> Explanation:
        """Who would serve `forward(x)`, and why the others would not."""
        return explain(lowbit_linear, x, self.weight, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, format={self.format}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear:
        # half() and the like would round float scales for good: show fn their bytes, which it moves but does
        # not round
        kept = {name: t.dtype for name, t in self._tensors().items() if t.is_floating_point()}
        for name in kept:
            t = self._parameters[name]
            assert t is not None
            t.data = t.data.view(torch.uint8)
        try:
            super()._apply(fn, recurse)
        finally:
            for name, dtype in kept.items():
                t = self._parameters[name]
                assert t is not None
                t.data = t.data.view(dtype)
        return self

    def get_extra_state(self) -> torch.Tensor:
        """The format, as JSON in a uint8 tensor, so that safetensors takes it."""
        return torch.frombuffer(bytearray(json.dumps(_describe(self.format)).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Nothing to set: `_load_from_state_dict` has found the format to be this layer's."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        present = [name for name in _TENSORS if prefix + name in state_dict]
        if present:
            self._check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if present and self.g_idx is not None:
            self.perm = torch.argsort(self._tensors()["g_idx"], stable=True)

    def _check_state(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise ValueError, with nothing written yet, for a state that is incomplete, corrupted or of another
        format."""
        extra = state_dict.get(prefix + "_extra_state")
        if extra is not None:
            try:
                found = dict(json.loads(bytes(extra.to("cpu", torch.uint8).tolist())))
            except (ValueError, TypeError, AttributeError, RecursionError) as why:
                raise ValueError(f"{prefix}_extra_state is not the JSON of a format: {why}") from None
            if found != (own := _describe(self.format)):
                differ = ", ".join(
                    f"{k} {found.get(k)!r} (layer: {own.get(k)!r})" for k in own if found.get(k) != own[k]
                )
                raise ValueError(f"{prefix}_extra_state is of another format than the layer: {differ}")
        tensors: dict[str, Any] = {name: state_dict.get(prefix + name) for name in self._tensors()}
        extra_names = [name for name in _TENSORS if prefix + name in state_dict and name not in tensors]
        if extra_names:
            raise ValueError(
                f"the state has {prefix}{extra_names[0]}, which this layer ({self.format}) has no place for"
            )
        scales, own_scales = tensors["scales"], self._tensors()["scales"]
        if isinstance(scales, torch.Tensor) and scales.dtype != own_scales.dtype:  # copying would round them
            raise ValueError(
                f"{prefix}scales has dtype {scales.dtype}, expected the layer's {own_scales.dtype}"
            )
        try:
            LowBitWeight(
                format=self.format, shape=(self.out_features, self.in_features), **tensors
            ).check_values()
        except (TypeError, ValueError) as why:
            raise ValueError(f"{prefix}{why}") from None


def _describe(format: Format) -> dict[str, Any]:
    """The format as JSON can hold it; the codebook goes without saying, by the name."""
    described = asdict(format) | {"scale_dtype": str(format.scale_dtype).removeprefix("torch.")}
    del described["codebook"]
    return described

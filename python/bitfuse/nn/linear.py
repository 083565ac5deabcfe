"""Linear: torch.nn.Linear with its weight in few bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from ..core.explain import Explanation, explain
from ..ops.linear.batched import check_matrix
from ..ops.linear.lowbit_linear import apply_lowbit, lowbit_linear
from ..weights.formats import FIXED_SCALE_DTYPES, Format, get_format
from ..weights.quantize import quantize
from ..weights.scales import as_bytes, as_floats
from ..weights.weight import LowBitWeight, WeightTensors, column_order, whole

_TENSORS = ("qweight", "scales", "zeros", "g_idx", "scale_scales", "scale_offset", "offsets")
_FLOAT_TENSORS = ("scales", "scale_scales", "scale_offset", "offsets")


class _Uncast(torch.Tensor):
    """A shard of float scales in FSDP2, whose mixed precision would round them: it is gathered as it is.

    FSDP2 asks the local tensor of a sharded parameter for these methods (its extension points)."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[torch.Tensor, ...], Any]:
        most = -(-outer_size[0] // mesh.size())  # rows of the first shard; the last ones may have fewer
        shard = self.detach()
        if len(shard) < most:
            padded = shard.new_zeros((most, *outer_size[1:]))
            padded[: len(shard)] = shard
            shard = padded
        return (shard,), None

    def fsdp_post_all_gather(
        self, outputs: Any, metadata: Any, param_dtype: Any, *, out: torch.Tensor | None = None
    ) -> Any:
        (whole,) = outputs
        return None if out is not None else (whole, (whole,))

    # what FSDP2 makes the local tensor anew by
    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().to(*args, **kwargs).as_subclass(_Uncast)

    def narrow(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().narrow(*args, **kwargs).as_subclass(_Uncast)


class Linear(torch.nn.Linear):
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

    # what the weight says its dtype is; layers pickled by 0.1 have none of their own
    _dtype = torch.float32

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
        fmt = get_format(
            format,
            group_size=group_size,
            symmetric=symmetric,
            nested=nested,
            scale_dtype=scale_dtype,
            offset=offset,
            scale_rows=scale_rows,
        )
        if group_size is None:
            fmt = fmt.fitted(in_features)
        tensors = {
            name: torch.zeros(
                shape, dtype=fmt.scale_dtype if fmt.scale_dtype in dtypes else dtypes[0], device=device
            )
            for name, dtypes, shape in LowBitWeight.expected(fmt, (out_features, in_features))
        }
        if act_order:
            group = in_features if fmt.group_size == -1 else fmt.group_size
            tensors["g_idx"] = torch.arange(in_features, dtype=torch.int32, device=device) // group
        made = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        dtype = torch.get_default_dtype() if dtype is None else dtype
        shape = (out_features, in_features)
        self._hold(LowBitWeight(format=fmt, shape=shape, dtype=dtype, **tensors), made)

    def _hold(self, w: LowBitWeight, bias: torch.Tensor | None) -> None:
        check_matrix(w)
        self.out_features, self.in_features = w.shape
        self.format = w.format
        self.group_size = w.group_size
        self._dtype = w.dtype
        for name in _TENSORS:
            t = getattr(w, name)
            if name == "scales":
                t = as_bytes(t)
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

    @property
    def weight(self) -> LowBitWeight:  # type: ignore[override]
        """The weight as a `LowBitWeight`; it shares the layer's tensors."""
        tensors = self._tensors()
        g_idx, scales = tensors.pop("g_idx", None), tensors["scales"]
        tensors["scales"] = as_floats(scales, self.format.scale_dtype)
        shape = (self.out_features, self.in_features)
        w = LowBitWeight(format=self.format, shape=shape, dtype=self._dtype, **tensors)
        return w if g_idx is None or self.perm is None else w.ordered(g_idx, self.perm)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: t for name in _TENSORS if (t := getattr(self, name, None)) is not None}

    def _device(self) -> torch.device:
        return self._tensors()["qweight"].device

    def op_args(self) -> WeightTensors:
        """The weight as the ops take it."""
        # the dict, not attributes: Module.__getattr__ costs more than the checks of the op
        p: dict[str, Any] = self._parameters
        if "qweight" not in p:  # a replica of nn.DataParallel has its tensors as plain attributes
            p = self.__dict__ | p
        tensors = (p["qweight"], p["scales"], p["zeros"], p["scale_scales"], p["scale_offset"])
        # layers pickled by 0.1 have no offsets
        more = (p.get("offsets"), self.format.scale_rows)
        return WeightTensors(*tensors, self.format.name, self.group_size, *more)

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

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FLOAT_TENSORS:
            _keep_uncast(value)
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Zeros, as the constructor leaves them: `torch.nn.Linear`'s draw would be lost in few bits.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"reset_parameters would write into {self.weight!r}, which is frozen: make a torch.nn.Linear and "
            "quantise it"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear:
        few_bit = {id(t) for t in self._tensors().values()}

        def without_rounding(t: torch.Tensor) -> torch.Tensor:
            # half() and the like would round float scales for good: they go where fn takes them, as they are
            made = fn(t)
            return made if id(t) not in few_bit or made.dtype == t.dtype else t.to(made.device)

        self._dtype = fn(torch.zeros(1, dtype=self._dtype, device=self._device())).dtype
        super()._apply(without_rounding, recurse)
        for name in _FLOAT_TENSORS:
            _keep_uncast(self._parameters.get(name))
        return self

    def get_extra_state(self) -> torch.Tensor:
        """The format, as JSON in a uint8 tensor, so that safetensors takes it."""
        return torch.frombuffer(bytearray(json.dumps(_describe(self.format)).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Nothing to set: `_load_from_state_dict` has found the format to be this layer's."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        dtype = self.format.scale_dtype
        # widened by a loop over all parameters (PEFT's prepare_model_for_kbit_training): back, which is exact
        for name in (prefix + "scales", prefix + "offsets"):
            t = destination.get(name)
            if t is not None and t.is_floating_point() and t.dtype.itemsize > dtype.itemsize:
                destination[name] = t.to(dtype)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        present = [name for name in _TENSORS if prefix + name in state_dict]
        scales = state_dict.get(prefix + "scales")
        fixed = self.format.scale_dtype in FIXED_SCALE_DTYPES
        if fixed and isinstance(scales, torch.Tensor) and scales.dtype == self.format.scale_dtype:
            state_dict = dict(state_dict) | {prefix + "scales": as_bytes(scales)}  # 0.1 held them as floats
        if present:
            self._check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in _FLOAT_TENSORS:
            _keep_uncast(self._parameters.get(name))
        if present and self.g_idx is not None:
            self.perm = column_order(whole(self._tensors()["g_idx"]))

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
                    f"{k} {found.get(k)!r} (layer: {own.get(k)!r})"
                    for k in {**own, **found}
                    if found.get(k) != own.get(k)
                )
                raise ValueError(f"{prefix}_extra_state is of another format than the layer: {differ}")
        tensors: dict[str, Any] = {name: state_dict.get(prefix + name) for name in self._tensors()}
        extra_names = [name for name in _TENSORS if prefix + name in state_dict and name not in tensors]
        if extra_names:
            raise ValueError(
                f"the state has {prefix}{extra_names[0]}, which this layer ({self.format}) has no place for"
            )
        for name in ("scales", "offsets"):
            t, own_t = tensors.get(name), self._tensors().get(name)
            if not isinstance(t, torch.Tensor) or own_t is None:
                continue
            if t.dtype not in (own_t.dtype, self.format.scale_dtype):  # copying would round them
                raise ValueError(f"{prefix}{name} has dtype {t.dtype}, expected the layer's {own_t.dtype}")
        try:
            LowBitWeight(
                format=self.format, shape=(self.out_features, self.in_features), **tensors
            ).check_values()
        except (TypeError, ValueError) as why:
            raise ValueError(f"{prefix}{why}") from None


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


def _keep_uncast(parameter: object) -> None:
    """Have FSDP2 gather the shards of a float parameter in their own dtype, whatever its mixed precision."""
    shard = getattr(parameter, "_local_tensor", None)
    if isinstance(shard, torch.Tensor) and type(shard) is torch.Tensor and shard.is_floating_point():
        parameter._local_tensor = shard.as_subclass(_Uncast)  # type: ignore[attr-defined]


def _describe(format: Format) -> dict[str, Any]:
    """The format as JSON can hold it; the codebook goes without saying, by the name, and so does what version
    0.1 had not, where it is not used."""
    described = asdict(format) | {"scale_dtype": str(format.scale_dtype).removeprefix("torch.")}
    del described["codebook"]
    for name, unused in (("offset", False), ("scale_rows", 1)):
        if described[name] == unused:
            del described[name]
    return described

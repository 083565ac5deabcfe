"""FewBits: what layers have in common that hold a few-bit matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from ..ops.linear.batched import check_matrix
from ..weights.formats import FIXED_SCALE_DTYPES, Format, get_format
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


def zeros(
    shape: tuple[int, int],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    format: str | Format,
    *,
    group_size: int | None = None,
    act_order: bool = False,
    **options: Any,
) -> LowBitWeight:
    """A matrix of zeros, with the largest group that fits it where none is given."""
    n, k = shape
    fmt = get_format(format, group_size=group_size, **options)
    if group_size is None:
        fmt = fmt.fitted(k)
    tensors = {
        name: torch.zeros(
            shape, dtype=fmt.scale_dtype if fmt.scale_dtype in dtypes else dtypes[0], device=device
        )
        for name, dtypes, shape in LowBitWeight.expected(fmt, (n, k))
    }
    if act_order:
        group = k if fmt.group_size == -1 else fmt.group_size
        tensors["g_idx"] = torch.arange(k, dtype=torch.int32, device=device) // group
    dtype = torch.get_default_dtype() if dtype is None else dtype
    return LowBitWeight(format=fmt, shape=(n, k), dtype=dtype, **tensors)


class FewBits(torch.nn.Module):
    """A layer whose weight is a frozen few-bit matrix: its tensors are parameters, and its `weight` a
    `LowBitWeight` of them. Comes before torch's layer among the bases."""

    # what the weight says its dtype is; layers pickled by 0.1 have none of their own
    _dtype = torch.float32
    format: Format
    group_size: int
    perm: torch.Tensor | None
    # the layer whose codes this one reads, in a tuple: it is no child
    _source: tuple[FewBits, ...] = ()

    @property
    def _size(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        raise NotImplementedError

    def _hold_weight(self, w: LowBitWeight) -> None:
        check_matrix(w)
        self.format = w.format
        self.group_size = w.group_size
        self._dtype = w.dtype
        for name in _TENSORS:
            t = getattr(w, name)
            if name == "scales":
                t = as_bytes(t)
            self.register_parameter(name, None if t is None else torch.nn.Parameter(t, requires_grad=False))
        self.register_buffer("perm", w.perm, persistent=False)

    def _read_codes_of(self, other: FewBits) -> None:
        """From now on this layer's weight is the other's, and the state dict says it there."""
        if self._size != other._size:
            raise ValueError(f"layers of {other._size} and {self._size} have no weight in common")
        self.__dict__["_source"] = (other,)
        self._read_again()

    def _read_again(self) -> None:
        for other in self._source:
            self.format, self.group_size = other.format, other.group_size
            for name in _TENSORS:
                self._parameters[name] = other._parameters[name]
            self._buffers["perm"] = other._buffers["perm"]

    @property
    def weight(self) -> LowBitWeight:
        """The weight as a `LowBitWeight`; it shares the layer's tensors."""
        tensors = self._tensors()
        g_idx, scales = tensors.pop("g_idx", None), tensors["scales"]
        tensors["scales"] = as_floats(scales, self.format.scale_dtype)
        w = LowBitWeight(format=self.format, shape=self._size, dtype=self._dtype, **tensors)
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

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FLOAT_TENSORS:
            _keep_uncast(value)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FewBits:
        few_bit = {id(t) for t in self._tensors().values()}

        def without_rounding(t: torch.Tensor) -> torch.Tensor:
            # half() and the like would round float scales for good: they go where fn takes them, as they are
            made = fn(t)
            return made if id(t) not in few_bit or made.dtype == t.dtype else t.to(made.device)

        self._dtype = fn(torch.zeros(1, dtype=self._dtype, device=self._device())).dtype
        super()._apply(without_rounding, recurse)
        for name in _FLOAT_TENSORS:
            _keep_uncast(self._parameters.get(name))
        self._read_again()
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
        if self._source:
            for name in (*_TENSORS, "_extra_state"):
                destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        present = [name for name in _TENSORS if prefix + name in state_dict]
        scales = state_dict.get(prefix + "scales")
        fixed = self.format.scale_dtype in FIXED_SCALE_DTYPES
        if fixed and isinstance(scales, torch.Tensor) and scales.dtype == self.format.scale_dtype:
            state_dict = dict(state_dict) | {prefix + "scales": as_bytes(scales)}  # 0.1 held them as floats
        if present:
            self._check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._source and not present:  # the layer that it reads from has them
            missing, own = args[2], {prefix + name for name in (*_TENSORS, "_extra_state")}
            missing[:] = [name for name in missing if name not in own]
        if not present:
            self._read_again()
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
            LowBitWeight(format=self.format, shape=self._size, **tensors).check_values()
        except (TypeError, ValueError) as why:
            raise ValueError(f"{prefix}{why}") from None


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

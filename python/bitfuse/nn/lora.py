"""LoRALinear: a frozen linear layer under named low-rank adapters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from ..core.cost import Cost, moved
from ..core.dropout import new_seed
from ..core.explain import Explanation, explain
from ..ops.linear.lora_args import LoraArgs
from ..ops.linear.lora_linear import MAX_RANK, apply_lora, lora_linear
from ..ops.linear.lowbit_linear import FLOATS, check_float
from .adapters import AdapterLinear, options_from_bytes, options_to_bytes
from .dora import RowNorms, dora_scale
from .linear import Linear, on_rows

_LARGEST = torch.finfo(torch.float32).max


class LoRAAdapter(torch.nn.Module):
    """One low-rank adapter: W becomes W + scaling * lora_B lora_A.

    Attributes:
        lora_A: [r, in_features].
        lora_B: [out_features, r].
        lora_magnitude_vector: [out_features] (DoRA), or None.
        scaling: alpha / r, or alpha / sqrt(r) (rsLoRA).
        scale_by: scaling as a float32 number on the adapter's device, so that a captured graph and compiled
            code see another one.
        r, alpha, dropout, use_rslora, use_dora: the options.
    """

    lora_magnitude_vector: torch.nn.Parameter | None
    scale_by: torch.Tensor

    def __init__(
        self,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        magnitude: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.lora_A = torch.nn.Parameter(lora_A)
        self.lora_B = torch.nn.Parameter(lora_B)
        self.lora_magnitude_vector = None if magnitude is None else torch.nn.Parameter(magnitude)
        self.register_buffer(
            "scale_by", torch.empty((), dtype=torch.float32, device=lora_A.device), persistent=False
        )
        self.set_scaling(alpha, use_rslora)

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @property
    def use_dora(self) -> bool:
        return self.lora_magnitude_vector is not None

    @property
    def alpha(self) -> float:
        return self._alpha

    @property
    def use_rslora(self) -> bool:
        return self._use_rslora

    def set_scaling(self, alpha: float, use_rslora: bool) -> None:
        """Take another alpha."""
        self._alpha, self._use_rslora = alpha, use_rslora
        self.scaling = scaling_of(alpha, self.r, use_rslora)
        self.scale_by.fill_(self.scaling)

    def scale(self) -> float | torch.Tensor:
        """scaling as a call takes it: a number costs a CPU less, a GPU's graph or compiled code would keep
        it."""
        return self.scaling if self.lora_A.is_cpu and not is_compiling() else self.scale_by

    def options(self) -> dict[str, Any]:
        names = ("r", "alpha", "dropout", "use_rslora", "use_dora")
        return {name: getattr(self, name) for name in names}

    def check_options(self, found: Mapping[str, Any]) -> None:
        """Raise ValueError for a state's options that this adapter can't take over."""
        for name in ("r", "use_dora"):
            if found.get(name) != getattr(self, name):
                raise ValueError(
                    f"the state is of an adapter with {name} {found.get(name)!r}, this one has "
                    f"{getattr(self, name)!r}"
                )
        check_options(self.r, found.get("alpha"), found.get("dropout"))

    def get_extra_state(self) -> torch.Tensor:
        """The options, as JSON in a uint8 tensor, so that safetensors takes it."""
        return options_to_bytes(self.options())

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take over alpha, dropout and use_rslora; the layer has checked them."""
        found = options_from_bytes(state, "_extra_state")
        self.dropout = found["dropout"]
        self.set_scaling(found["alpha"], bool(found["use_rslora"]))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LoRAAdapter:
        super()._apply(fn, recurse)
        # half() and the like must not round it, and to_empty() leaves it unwritten
        self.scale_by = self.scale_by.float().fill_(self.scaling)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options().items())


def scaling_of(alpha: float, r: int, use_rslora: bool) -> float:
    """What multiplies lora_B lora_A: alpha / r, or alpha / sqrt(r) (rsLoRA; Kalajdzievski, 2023)."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def check_options(r: object, alpha: object, dropout: object) -> None:
    """Raise TypeError or ValueError for options that no adapter can have."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r is a {type(r).__name__}, expected an int")
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"r is {r}, expected 1 to {MAX_RANK}")
    for name, value in (("alpha", alpha), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is a {type(value).__name__}, expected a number")
        if not -_LARGEST <= value <= _LARGEST:  # an int may be too large for any float
            raise ValueError(f"{name} is {str(value)[:40]}, expected a finite number that float32 holds")
    if not 0 <= dropout < 1:  # type: ignore[operator]
        raise ValueError(f"dropout is {dropout}, expected 0 <= dropout < 1")


def check_dtype(dtype: object) -> None:
    """Raise ValueError for a dtype that no adapter has."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, expected {' or '.join(map(str, FLOATS))}")


class LowRank(NamedTuple):
    """One adapter as a call of a layer takes it: dropout is 0 outside training, out_scale is DoRA's."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float | torch.Tensor
    dropout: float = 0.0
    out_scale: torch.Tensor | None = None


def adapted_linear(
    x: torch.Tensor, base: torch.nn.Linear | Linear, adapters: Sequence[LowRank]
) -> torch.Tensor:
    """A linear layer under one or several adapters; a DoRA one scales the sum of those before it too, as in
    PEFT. One adapter, or several without dropout and DoRA, are one fused call."""
    # replicas of nn.DataParallel have plain attributes for parameters
    held: dict[str, Any] = base._parameters if "bias" in base._parameters else base.__dict__
    bias = held["bias"]
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    first, *others = adapters
    if not others:
        return _fused(x, base, first, bias)
    rank = sum(a.lora_A.shape[0] for a in adapters)
    if rank <= MAX_RANK and not any(a.dropout or a.out_scale is not None for a in adapters):
        # the sum of adapters is an adapter of the sum of their ranks
        lora_A = torch.cat([a.lora_A for a in adapters])
        lora_B = torch.cat([a.lora_B * a.scaling for a in adapters], 1)
        return _fused(x, base, LowRank(lora_A, lora_B, 1.0), bias)
    y = _fused(x, base, first, None)
    x = x.to(y.dtype)  # autocast's, as in the fused call; the adapters stay in their own
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        for lora_A, lora_B, scaling, dropout, out_scale in others:
            dropped = torch.nn.functional.dropout(x, dropout)
            h = torch.nn.functional.linear(dropped.to(lora_A.dtype), lora_A).to(lora_B.dtype)
            y = y + (torch.nn.functional.linear(h, lora_B) * scaling).to(y.dtype)
            if out_scale is not None:
                y = (y * out_scale).to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _fused(
    x: torch.Tensor, base: torch.nn.Linear | Linear, a: LowRank, bias: torch.Tensor | None
) -> torch.Tensor:
    """`bitfuse.lora_linear` of a layer, whose tensors need no second look: a third of a small call's time."""
    lora_A, lora_B, scaling, dropout, out_scale = a
    p: dict[str, Any] = base._parameters
    if isinstance(base, Linear):
        perm = base._buffers["perm"]
        weight: Any = base.op_args()
        if perm is not None:
            check_float(x, "x", perm.shape[0])
            x, lora_A = x.index_select(-1, perm), lora_A.index_select(1, perm)
    else:
        weight = (p if "weight" in p else base.__dict__)["weight"]
    number, tensor = (1.0, scaling) if isinstance(scaling, torch.Tensor) else (scaling, None)
    seed = new_seed(x) if dropout else None
    args = LoraArgs(weight, lora_A, lora_B, number, tensor, bias, out_scale, seed)
    return apply_lora(x, (args,), dropout)[0]


class LoRALinear(AdapterLinear):
    """y = x W^T + b + sum over active adapters of scaling * drop(x) A^T B^T, with W frozen (LoRA; Hu et al.,
    2021); see `bitfuse.lora_linear`.

    lora_A begins as PEFT draws it (Kaiming uniform with a = sqrt(5), the same numbers for the same torch
    seed), lora_B as zeros, so that a new adapter changes nothing. Dropout acts in training only. One active
    adapter, or several without dropout and DoRA, run as one fused call.

    With `use_dora` (Liu et al., 2024) row n of the adapted weight is scaled by magnitude[n] / ||W_n + scaling
    * (B A)_n||; the norm takes no gradient, as in the paper and in PEFT. Over a few-bit W it is found without
    a dense W, and the dropped-out input goes through the adapter only (PEFT sends it through W too). The
    norm is computed anew in training, under grad mode and in compiled code. In eval mode under `no_grad` it
    is kept as long as the weight, A, B and scaling are what they were: the same storage and version, and on
    the CPU the same content of A and B. What torch does not see (a write to the base weight through `.data`;
    on a GPU also one to A and B) needs `clear_norms()`; `train()` and `eval()` clear them too.

    Args:
        base: a `torch.nn.Linear` or a `bitfuse.nn.Linear`; held and frozen.
        r: rank of the first adapter, 1 to 512; None makes a layer without one.
        alpha: scaling is alpha / r; r by default.
        dropout: probability that an input of the adapter is dropped, in training.
        adapter_name: of the first adapter.
        use_rslora: scaling is alpha / sqrt(r).
        use_dora: learn the magnitude of each row.
        dtype: of the adapter, float32, float16 or bfloat16.

    Raises:
        TypeError: a base that is no linear layer, options of the wrong type.
        ValueError: options out of range.
    """

    def __init__(
        self,
        base: torch.nn.Linear | Linear,
        r: int | None = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        adapter_name: str = "default",
        use_rslora: bool = False,
        use_dora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base)
        self._norms = RowNorms()
        self.register_load_state_dict_post_hook(_clear_norms)
        if r is not None:
            self.add_adapter(
                adapter_name, r, alpha, dropout, use_rslora=use_rslora, use_dora=use_dora, dtype=dtype
            )

    def add_adapter(
        self,
        adapter_name: str,
        r: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        use_dora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> LoRAAdapter:
        """Add an adapter, active if it is the first. Arguments as of the class.

        Raises:
            TypeError, ValueError: as the class; a name that is taken; the layer is merged.
        """
        alpha = r if alpha is None else alpha
        check_options(r, alpha, dropout)
        check_dtype(dtype)
        self._check_new(adapter_name)
        # PEFT builds two torch.nn.Linear, which draw, and draws A again: so do we, for the same numbers
        plain: dict[str, Any] = dict(bias=False, device="cpu", dtype=torch.float32)
        lora_A = torch.nn.Linear(self.in_features, r, **plain).weight.detach()
        lora_B = torch.nn.Linear(r, self.out_features, **plain).weight.detach()
        torch.nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        lora_B.zero_()
        device = self._place()
        lora_A, lora_B = lora_A.to(device, dtype), lora_B.to(device, dtype)
        # with B = 0 the norm is W's own
        magnitude = self._norms.squares(self.base_layer).sqrt().to(dtype) if use_dora else None
        adapter = LoRAAdapter(lora_A, lora_B, alpha, float(dropout), use_rslora, magnitude)
        self._hold(adapter_name, adapter)
        return adapter

    def adapter(self, name: str) -> LoRAAdapter:
        """An adapter by name.

        Raises:
            ValueError: an unknown name.
        """
        self._check_known(name)
        adapter = self.adapters[name]
        assert isinstance(adapter, LoRAAdapter)
        return adapter

    def load_adapter_(
        self,
        name: str,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        *,
        alpha: float | None = None,
        magnitude: torch.Tensor | None = None,
        use_rslora: bool | None = None,
        dropout: float | None = None,
    ) -> None:
        """Swap an adapter's content in place: the storage stays, so captured CUDA graphs and compiled code
        see the new adapter at their next run.

        Args:
            name: of an adapter of this layer.
            lora_A, lora_B: [r, in_features] and [out_features, r], of the adapter's rank, any float dtype.
            alpha, use_rslora, dropout: new options; None keeps the old.
            magnitude: [out_features], for an adapter with DoRA and only for one.

        Raises:
            TypeError, ValueError: tensors that do not fit; the layer is merged. Nothing is written then.
        """
        adapter = self.adapter(name)
        self._check_unmerged("swap an adapter")
        alpha = adapter.alpha if alpha is None else alpha
        dropout = adapter.dropout if dropout is None else dropout
        check_options(adapter.r, alpha, dropout)
        given = {"lora_A": lora_A, "lora_B": lora_B, "lora_magnitude_vector": magnitude}
        for key, t in given.items():
            own = getattr(adapter, key)
            if (t is None) != (own is None):
                raise ValueError(
                    f"magnitude is {'missing' if t is None else 'given'}, and adapter {name!r} has "
                    f"use_dora {own is not None}"
                )
            if t is None:
                continue
            if not isinstance(t, torch.Tensor) or not t.is_floating_point():
                raise TypeError(f"{key} is {getattr(t, 'dtype', type(t).__name__)}, expected a float tensor")
            if t.shape != own.shape:
                raise ValueError(f"{key} has shape {list(t.shape)}, expected {list(own.shape)}")
        with torch.no_grad():
            for key, t in given.items():
                if t is not None:
                    getattr(adapter, key).copy_(t)
        adapter.dropout = float(dropout)
        adapter.set_scaling(alpha, adapter.use_rslora if use_rslora is None else use_rslora)
        if self._norms.holds(name):  # renewed where they stand, for captured graphs
            self._norms.renew(name, self.base_layer, adapter.lora_A, adapter.lora_B, adapter.scale())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if type(input) is not torch.Tensor and input.is_nested:
            return on_rows(self.forward, input)
        if not self.enabled or not self.active_adapters:
            return self.without_adapters.forward(input)
        if self.merged_layer is not None:
            return self.merged_layer.forward(input)
        return adapted_linear(input, self.base_layer, [self._low_rank(name) for name in self.active_adapters])

    def _replicate_for_data_parallel(self) -> LoRALinear:
        replica: LoRALinear = super()._replicate_for_data_parallel()
        replica._norms = RowNorms()  # its own, on its own device
        return replica

    def _low_rank(self, name: str) -> LowRank:
        a = self.adapters._modules[name]
        assert isinstance(a, LoRAAdapter)
        dropout = a.dropout if self.training else 0.0
        lora_A, lora_B, scale = a.lora_A, a.lora_B, a.scale()
        if a.lora_magnitude_vector is None:
            return LowRank(lora_A, lora_B, scale, dropout)
        norm = self._norms.norm(name, self.base_layer, lora_A, lora_B, scale, self.training)
        return LowRank(lora_A, lora_B, scale, dropout, dora_scale(a.lora_magnitude_vector, norm))

    def explain(self, x: torch.Tensor) -> Explanation:
        """Who would serve `forward(x)`, and why the others would not; of several adapters, the first."""
        layer = self.base_layer
        if self.enabled and self.merged_layer is not None:
            layer = self.merged_layer
        elif self.enabled and self.active_adapters:
            lora_A, lora_B, scaling, dropout, out_scale = self._low_rank(self.active_adapters[0])
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            args = (x, layer.weight, lora_A, lora_B, scaling, bias, dropout)
            return explain(lora_linear, *args, out_scale=out_scale)
        if isinstance(layer, Linear):
            return layer.explain(x)
        rows, (n, k) = x.numel() // max(x.shape[-1], 1), layer.weight.shape
        cost = Cost(moved(x, *layer.parameters()) + rows * n * x.element_size(), 2 * rows * n * k, x.dtype)
        return Explanation("torch.nn.Linear", x.device.type, "torch", {}, "", cost, None)

    def clear_norms(self) -> None:
        """Find DoRA's kept norms anew: for a change that torch does not see."""
        self._norms.clear()
        base = self.base_layer
        # a shard (FSDP2's) is no whole matrix: the next forward finds them
        few_bit = isinstance(base, Linear) and not hasattr(base.qweight, "_local_tensor")
        few_bit = few_bit and self._place().type != "meta"
        if few_bit and any(a.lora_magnitude_vector is not None for a in self.adapters.children()):
            self._norms.squares(self.base_layer)  # compiled code does not find them by itself

    def train(self, mode: bool = True) -> LoRALinear:
        self.clear_norms()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)
        self.clear_norms()
        return self

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self._norms.forget(name)

    def _merger(self, names: tuple[str, ...]) -> Callable[[slice, torch.Tensor], torch.Tensor]:
        parts = []
        for name in names:
            a = self._low_rank(name)
            parts.append((a.lora_A.float(), a.lora_B.float() * a.scaling, a.out_scale))

        def merge(rows: slice, w: torch.Tensor) -> torch.Tensor:
            for lora_A, lora_B, out_scale in parts:
                w = w + lora_B[rows] @ lora_A
                if out_scale is not None:
                    w = w * out_scale[rows].unsqueeze(1)
            return w

        return merge


def _clear_norms(layer: torch.nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(layer, LoRALinear)
    layer.clear_norms()

"""LoRALinear: a frozen linear layer under named low-rank adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.compiler import is_compiling

from ..op import Explanation, explain
from ..ops.lora_linear import MAX_RANK, lora_linear
from ..ops.lowbit_linear import lowbit_linear
from .adapters import AdapterLinear, float_rows, options_from_bytes, options_to_bytes
from .linear import Linear

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class _Kept:
    """A value found from tensors, and what they were then."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None
        self._seen: list[tuple[torch.Tensor, int, int, torch.Tensor | None]] = []

    def keep(self, value: torch.Tensor, versioned: list[torch.Tensor], compared: list[torch.Tensor]) -> None:
        """Keep a value. Of `compared` the CPU keeps copies, small ones, because a write through `.data`
        moves no version; a GPU would have to wait for the comparison."""
        if any(t.is_inference() for t in (*versioned, *compared)):  # they have no version
            self.clear()
            return
        if self.value is not None and self.value.shape == value.shape and self.value.device == value.device:
            self.value.copy_(value)  # a captured graph reads it where it stands
        else:
            self.value = value.clone()
        self._seen = [(t, t.data_ptr(), t._version, None) for t in versioned]
        self._seen += [
            (t, t.data_ptr(), t._version, t.detach().clone() if t.is_cpu else None) for t in compared
        ]

    def get(self, tensors: list[torch.Tensor]) -> torch.Tensor | None:
        """The value, if the tensors, first those versioned, are what they were."""
        if self.value is None or len(tensors) != len(self._seen):
            return None
        for t, (seen, address, version, copy) in zip(tensors, self._seen, strict=True):
            if t is not seen or t.data_ptr() != address or t._version != version:
                return None
            if copy is not None and not torch.equal(t, copy):
                return None
        return self.value

    def clear(self) -> None:
        self.value, self._seen = None, []

    def __getstate__(self) -> dict[str, Any]:  # a copy of a layer finds its own
        return {"value": None, "_seen": []}


class LoRAAdapter(torch.nn.Module):
    """One low-rank adapter: W becomes W + scaling * lora_B lora_A.

    Attributes:
        lora_A: [r, in_features].
        lora_B: [out_features, r].
        lora_magnitude_vector: [out_features] (DoRA), or None.
        scaling: alpha / r, or alpha / sqrt(r) (rsLoRA), a float32 number on the adapter's device, so that a
            captured graph sees another alpha.
        r, alpha, dropout, use_rslora, use_dora: the options.
    """

    lora_magnitude_vector: torch.nn.Parameter | None
    scaling: torch.Tensor

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
        self.alpha, self.dropout, self.use_rslora = alpha, dropout, use_rslora
        self.lora_A = torch.nn.Parameter(lora_A)
        self.lora_B = torch.nn.Parameter(lora_B)
        self.lora_magnitude_vector = None if magnitude is None else torch.nn.Parameter(magnitude)
        self.register_buffer("scaling", torch.empty((), device=lora_A.device), persistent=False)
        self._write_scaling()

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @property
    def use_dora(self) -> bool:
        return self.lora_magnitude_vector is not None

    def _write_scaling(self) -> None:
        self.scaling.fill_(scaling_of(self.alpha, self.r, self.use_rslora))

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
        self.alpha, self.dropout = found["alpha"], found["dropout"]
        self.use_rslora = bool(found["use_rslora"])
        self._write_scaling()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LoRAAdapter:
        super()._apply(fn, recurse)
        if self.scaling.dtype != torch.float32:  # half() and the like must not round it
            self.scaling = self.scaling.float()
            self._write_scaling()
        return self

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """scaling * x A^T B^T."""
        h = torch.nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A)
        return torch.nn.functional.linear(h.to(self.lora_B.dtype), self.lora_B) * self.scaling

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
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, expected a finite number")
    if not 0 <= dropout < 1:  # type: ignore[operator]
        raise ValueError(f"dropout is {dropout}, expected 0 <= dropout < 1")


def check_dtype(dtype: object) -> None:
    """Raise ValueError for a dtype that no adapter has."""
    if dtype not in _FLOATS:
        raise ValueError(f"dtype is {dtype}, expected {' or '.join(map(str, _FLOATS))}")


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
        self._base_squares = _Kept()
        self._norms: dict[str, _Kept] = {}
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
        lora_A = torch.nn.Linear(self.in_features, r, bias=False).weight.detach()
        lora_B = torch.nn.Linear(r, self.out_features, bias=False).weight.detach()
        torch.nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        lora_B.zero_()
        device = self._place()
        lora_A, lora_B = lora_A.to(device, dtype), lora_B.to(device, dtype)
        # with B = 0 the norm is W's own
        magnitude = self._squares().sqrt().to(dtype) if use_dora else None
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
        adapter.alpha, adapter.dropout = alpha, float(dropout)
        adapter.use_rslora = adapter.use_rslora if use_rslora is None else use_rslora
        adapter._write_scaling()
        if name in self._norms:  # renewed where it stands, for captured graphs
            self._renew_norm(name, adapter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled or not self.active_adapters:
            return self.base_layer.forward(x)
        if self.merged_layer is not None:
            return self.merged_layer.forward(x)
        names = self.active_adapters
        active = self._active()
        bias: torch.Tensor | None = self.base_layer.bias
        if len(active) == 1:
            return self._base_with(names[0], active[0], x, bias)
        if not any(a.use_dora or (a.dropout and self.training) for a in active):
            # the sum of adapters is an adapter of the sum of their ranks
            lora_A = torch.cat([a.lora_A for a in active])
            lora_B = torch.cat([a.lora_B * a.scaling for a in active], 1)
            if lora_A.shape[0] <= MAX_RANK:
                return lora_linear(x, self.base_layer.weight, lora_A, lora_B, 1.0, _like(bias, x))
        y = self._base_with(names[0], active[0], x, None)
        for name, adapter in zip(names[1:], active[1:], strict=True):
            dropped = torch.nn.functional.dropout(x, adapter.dropout, self.training)
            y = y + adapter.delta(dropped).to(y.dtype)
            out_scale = self._out_scale(name, adapter)
            if out_scale is not None:
                y = (y * out_scale).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def _active(self) -> list[LoRAAdapter]:
        found = self.adapters._modules
        return [found[name] for name in self.active_adapters]  # type: ignore[misc]

    def _base_with(
        self, name: str, a: LoRAAdapter, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        dropout = a.dropout if self.training else 0.0
        out_scale = self._out_scale(name, a)
        return lora_linear(
            x,
            self.base_layer.weight,
            a.lora_A,
            a.lora_B,
            a.scaling,
            _like(bias, x),
            dropout,
            out_scale=out_scale,
        )

    def explain(self, x: torch.Tensor) -> Explanation:
        """Who would serve `forward(x)`, and why the others would not; of several adapters, the first."""
        base, bias = self.base_layer, _like(self.bias, x)
        if not self.enabled or not self.active_adapters or self.merged_layer is not None:
            layer = base if not self.enabled or self.merged_layer is None else self.merged_layer
            if isinstance(layer, Linear):
                return layer.explain(x)
            empty = x.new_empty(0, self.in_features), x.new_empty(self.out_features, 0)
            return explain(lora_linear, x, layer.weight, *empty, 1.0, bias)
        a = self._active()[0]
        dropout = a.dropout if self.training else 0.0
        return explain(lora_linear, x, base.weight, a.lora_A, a.lora_B, a.scaling, bias, dropout)

    # DoRA

    def _out_scale(self, name: str, a: LoRAAdapter) -> torch.Tensor | None:
        """magnitude / norm, the norm taken for a constant; a row of zeros stays one."""
        if a.lora_magnitude_vector is None:
            return None
        norm = self._norm(name, a)
        return a.lora_magnitude_vector.float() / torch.where(norm == 0, 1.0, norm)

    def _norm(self, name: str, a: LoRAAdapter) -> torch.Tensor:
        """||W_n + scaling * (B A)_n|| of each row n, float32, kept where that is safe."""
        if self.training or is_compiling() or torch.is_grad_enabled():
            return self._fresh_norm(a)
        kept = self._norms.get(name)
        found = None if kept is None else kept.get([*self._base_tensors(), a.scaling, a.lora_A, a.lora_B])
        return self._renew_norm(name, a) if found is None else found

    def _renew_norm(self, name: str, a: LoRAAdapter) -> torch.Tensor:
        norm = self._fresh_norm(a)
        kept = self._norms.setdefault(name, _Kept())
        kept.keep(norm, self._base_tensors(), [a.scaling, a.lora_A, a.lora_B])
        return norm if kept.value is None else kept.value

    def _base_tensors(self) -> list[torch.Tensor]:
        base = self.base_layer
        return [p for name, p in base._parameters.items() if p is not None and name != "bias"]

    @torch.no_grad()
    def _fresh_norm(self, a: LoRAAdapter) -> torch.Tensor:
        device = a.lora_A.device.type
        with torch.autocast(device, enabled=False):
            lora_A, lora_B = a.lora_A.float(), a.lora_B.float() * a.scaling
            base = self.base_layer
            if isinstance(base, torch.nn.Linear):
                rows = [(w + lora_B[at] @ lora_A).norm(dim=1) for at, w in float_rows(base)]
                return torch.cat(rows) if rows else lora_B.new_empty(0)
            # ||W_n||^2 + 2 (W A^T)_n . B_n + B_n (A A^T) B_n^T, B scaled; summed in float64: they may cancel
            wa = lowbit_linear(lora_A, base.weight).t().double()
            b = lora_B.double()
            square = self._squares() + 2 * (wa * b).sum(1) + ((b @ (lora_A @ lora_A.t()).double()) * b).sum(1)
            return square.clamp_min(0).sqrt().float()

    @torch.no_grad()
    def _squares(self) -> torch.Tensor:
        """||W_n||^2 of each row, float64; kept while a few-bit W is what it was."""
        tensors = self._base_tensors()
        # compiled code can't look: what changes the base as torch knows it calls `clear_norms`
        kept = self._base_squares.value if is_compiling() else self._base_squares.get(tensors)
        if kept is not None:
            return kept
        rows = [w.double().square().sum(1) for _, w in float_rows(self.base_layer)]
        squares = torch.cat(rows) if rows else torch.empty(0, dtype=torch.float64, device=self._place())
        if not is_compiling() and isinstance(self.base_layer, Linear):
            self._base_squares.keep(squares, tensors, [])
        return squares

    def clear_norms(self) -> None:
        """Find DoRA's kept norms anew: for a change that torch does not see."""
        self._norms.clear()
        self._base_squares.clear()
        few_bit = isinstance(self.base_layer, Linear) and self._place().type != "meta"
        if few_bit and any(a.lora_magnitude_vector is not None for a in self.adapters.children()):
            self._squares()

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
        self._norms.pop(name, None)

    def _merger(self, names: tuple[str, ...]) -> Callable[[slice, torch.Tensor], torch.Tensor]:
        parts = []
        for name in names:
            a = self.adapter(name)
            parts.append((a.lora_A.float(), a.lora_B.float() * a.scaling, self._out_scale(name, a)))

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


def _like(bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return bias if bias is None or bias.dtype is x.dtype else bias.to(x.dtype)

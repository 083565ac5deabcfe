"""What lets a few-bit weight stand where torch, or a module that reads a layer's weight, expects a tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

# what reads the codes as they are, by the torch function that it stands for; the ops fill it. NotImplemented
# for a call that it does not serve
fused: dict[Any, Callable[..., Any]] = {}

# what is asked about the codes, not about the numbers that they stand for
_OF_CODES = (
    "is_cpu", "is_cuda", "is_xpu", "is_mps", "is_meta", "is_sparse", "is_nested", "is_mkldnn", "layout",
    "data_ptr", "untyped_storage", "get_device", "is_shared", "is_pinned", "is_inference",
)  # fmt: skip
_OPERATORS = (
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__matmul__", "__rmatmul__",
    "__truediv__", "__rtruediv__", "__pow__", "__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__",
    "__getitem__",
)  # fmt: skip
_WRITERS = (
    "__iadd__", "__isub__", "__imul__", "__imatmul__", "__itruediv__", "__ipow__", "__setitem__",
)  # fmt: skip


class StandIn:
    """The methods of `torch.Tensor` for a frozen matrix that is held in another form.

    It says its shape, dtype and device without a copy. A torch function that is given it has the matrix as
    floats of its dtype, a copy that lives for the call; one that `fused` knows reads the codes. It requires
    no gradient, and what would write into it raises TypeError.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad = False
    is_leaf = True
    grad = None
    grad_fn = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        raise AssertionError("what stands in for a tensor says what its numbers are")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        serve = fused.get(func)
        if serve is not None:
            made = serve(*args, **kwargs)
            if made is not NotImplemented:
                return made
        _refuse_writing(func, args, kwargs)
        return func(*_dense(args), **_dense(kwargs))

    def __getattr__(self, name: str) -> Any:
        attribute = None if name.startswith("_") else getattr(torch.Tensor, name, None)
        if attribute is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in _OF_CODES:
            return getattr(self.qweight, name)
        if callable(attribute):
            return functools.partial(_method, attribute, self)
        return getattr(self.dequantize(self.dtype), name)

    def size(self, dim: int | None = None) -> Any:
        return torch.Size(self.shape) if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    ndimension = dim

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    nelement = numel

    def element_size(self) -> int:
        """Bytes of a number of its dtype, as which it is read."""
        return self.dtype.itemsize

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def stride(self, dim: int | None = None) -> Any:
        strides = tuple(math.prod(self.shape[at + 1 :]) for at in range(len(self.shape)))
        return strides if dim is None else strides[dim]

    def is_floating_point(self) -> bool:
        return True

    def is_complex(self) -> bool:
        return False

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def data(self) -> Any:
        """Itself: a copy would take what is written into `.data` for nothing."""
        return self

    def detach(self) -> Any:
        return self

    def contiguous(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise TypeError(f"requires_grad_(True) of {self!r}, which is frozen{_INSTEAD}")
        return self

    def float(self) -> torch.Tensor:
        return self.dequantize(torch.float32)

    def half(self) -> torch.Tensor:
        return self.dequantize(torch.float16)

    def bfloat16(self) -> torch.Tensor:
        return self.dequantize(torch.bfloat16)

    def clone(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The numbers as a tensor of its own."""
        return self.dequantize(self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.dequantize(self.dtype))


_INSTEAD = ": train adapters over it (bitfuse.add_lora_), or put a torch.nn.Linear in its layer's place"


def _method(attribute: Any, self: StandIn, *args: Any, **kwargs: Any) -> Any:
    return type(self).__torch_function__(attribute, (type(self),), (self, *args), kwargs)


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: StandIn, *args: Any) -> Any:
        return getattr(self.dequantize(self.dtype), name)(*_dense(args))

    return operator


def _writer(name: str) -> Callable[..., Any]:
    def writer(self: StandIn, *args: Any) -> Any:
        raise _writes(name, self)

    return writer


for _name in _OPERATORS:
    setattr(StandIn, _name, _operator(_name))
for _name in _WRITERS:
    setattr(StandIn, _name, _writer(_name))


def _dense(value: Any) -> Any:
    """The same arguments with tensors in the place of what stands in for them."""
    if isinstance(value, StandIn):
        return value.dequantize(value.dtype)
    if type(value) in (list, tuple):
        return type(value)(_dense(v) for v in value)
    if type(value) is dict:
        return {k: _dense(v) for k, v in value.items()}
    return value


def _held(value: Any) -> StandIn | None:
    """The first of a value that stands in for a tensor."""
    if isinstance(value, StandIn):
        return value
    if isinstance(value, (list, tuple)):
        return next((found for v in value if (found := _held(v)) is not None), None)
    return None


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TypeError for a call that would write into what stands in for a tensor: into a copy, then."""
    name = getattr(func, "__name__", str(func))
    target = args[0] if args else next(iter(kwargs.values()), None)
    in_place = name.endswith("_") and not name.endswith("__")
    in_place = in_place or name in _WRITERS or name == "__set__" or kwargs.get("inplace") is True
    written = _held(target) if in_place else None
    if written is None:
        written = _held(kwargs.get("out"))
    if written is not None:
        raise _writes(name, written)


def _writes(name: str, written: StandIn) -> TypeError:
    return TypeError(f"{name} would write into {written!r}, which is frozen{_INSTEAD}")

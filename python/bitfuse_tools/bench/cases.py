"""What a case is: a problem of an op, and who computes it.

A problem (an op and its sizes) has contenders: bitfuse's backends and formats, and the peers that a user
would otherwise pick. A contender makes layers; a chain of them, each with weights and inputs of its own,
reads more than a cache holds. `bitfuse bench`, `pytest benchmarks/` and the tests run the same problems.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from bitfuse.core.backends import BackendError, use_backend
from bitfuse.core.device import simulated
from bitfuse.core.op import Op
from bitfuse.weights.quantize import quantize
from bitfuse.weights.weight import LowBitWeight

from .shapes import DEFAULT, Shape
from .timing import DTYPES


class Unavailable(Exception):
    """A contender can't run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What to measure, the same for every op; None leaves it to the op.

    Attributes:
        device: "cpu" or "cuda".
        shape: whose sizes.
        dtypes: of x, by name.
        formats: of weights and of caches, by name; "int4:32" is int4 with groups of 32 columns.
        backends: of bitfuse.
        against: peers; () is none, None all that are installed.
        m: rows of x; for ops on sequences, their number.
        directions: "forward", "gradient" or "training".
        quick: fewer sizes.
        cold_bytes: that a layer of many tensors is made of: more than any cache.
    """

    device: str = "cpu"
    shape: Shape = DEFAULT
    dtypes: tuple[str, ...] | None = None
    formats: tuple[str, ...] | None = None
    backends: tuple[str, ...] | None = None
    against: tuple[str, ...] | None = None
    m: tuple[int, ...] | None = None
    directions: tuple[str, ...] | None = None
    quick: bool = False
    cold_bytes: int = 256 << 20

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def half(self) -> str:
        """The dtype that a model mostly runs in."""
        return "bfloat16"

    def rows(self, usual: tuple[int, ...], quick: tuple[int, ...] = (1,)) -> tuple[int, ...]:
        return self.m or (quick if self.quick else usual)

    def of_x(self, usual: tuple[str, ...] | None = None) -> tuple[str, ...]:
        return self.dtypes or usual or (self.half,)

    def of_weights(self, usual: tuple[str, ...]) -> tuple[str, ...]:
        return usual if self.formats is None else self.formats

    def towards(self, usual: tuple[str, ...]) -> tuple[str, ...]:
        return self.directions or usual

    def native(self, op: Op) -> list[str]:
        """The backends of an op to measure: those asked for, else all on this device but the reference (it
        stands in where there is no other)."""
        # by name also a GPU's, where the simulator stands in for one
        stands_in = simulated() and self.backends is not None
        here = (self.device, "cuda" if stands_in else self.device)
        names = [b.name for b in op.backends if not set(here).isdisjoint(b.devices)]
        if self.backends is not None:
            return [name for name in names if name in self.backends]
        return [name for name in names if name != "reference"] or ["reference"]

    def tensor(self, base: torch.Tensor, dtype: str | None = None) -> torch.Tensor:
        return base.to(self.device, DTYPES[dtype] if dtype else base.dtype)


def as_list(found: Any) -> list[torch.Tensor]:
    """A call's outputs, one or several."""
    return list(found) if isinstance(found, (list, tuple)) else [found]


@dataclass
class Layer:
    """One call, and what is its own.

    Attributes:
        call: what is timed.
        own_bytes: of what no other layer of a chain reads or writes: weights, caches, tensors of its own.
        exact: the outputs of the same call in float64, on the tensors as they are before it.
        read: the outputs of the call from what it returned.
        discrete: the outputs are choices, right or wrong.
        foreign: another library's allocator has its memory.
        held_bytes: of tensors that it keeps, where they are more than it reads or writes; 0: own_bytes.
    """

    call: Callable[[], Any]
    own_bytes: float
    exact: Callable[[], list[torch.Tensor]] | None = None
    read: Callable[[Any], list[torch.Tensor]] = as_list
    discrete: bool = False
    foreign: bool = False
    held_bytes: float = 0.0


@dataclass(frozen=True)
class Contender:
    """One way to compute a problem.

    Attributes:
        name: who computes it, and with what.
        dtype: of x.
        build: the i-th layer of a chain, unlike any other. Raises Unavailable or ImportError where it can't
            run.
        flops: of a layer.
        shared_bytes: that a layer must move beside its own: x where all layers have one, y.
        who: "bitfuse", or the peer's name, for `against`.
        label: what a column of ratios over this one is called; a peer's.
        group: ratios are over the peers of the same group, and over those of group "".
        base: the name of the contender that does less (no adapter), for a column "base".
        sizes: beside the problem's.
        backend, format: of bitfuse.
        capturable: a CUDA graph of it can be tried.
    """

    name: str
    dtype: str
    build: Callable[[int], Layer]
    flops: float = 0.0
    shared_bytes: float = 0.0
    who: str = "bitfuse"
    label: str = ""
    group: str = ""
    base: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    backend: str | None = None
    format: str | None = None
    capturable: bool = True

    def __str__(self) -> str:
        more = "".join(f" {value}" for value in self.sizes.values())
        return f"{self.name}{more} {self.dtype}"

    @property
    def peer(self) -> bool:
        return self.who != "bitfuse"


@dataclass(frozen=True)
class Problem(abc.ABC):
    """An op and its sizes: a subclass has them as fields. A problem is one table: its contenders are sampled
    in turn, and compared.

    Attributes:
        model, layer: whose sizes these are, if anyone's.
        dtypes: of x, unless asked for otherwise; None for bfloat16.
    """

    op: ClassVar[str]
    formats: ClassVar[tuple[str, ...] | None] = None  # to choose among; None: it has none
    model: str | None = dataclasses.field(default=None, kw_only=True)
    layer: str | None = dataclasses.field(default=None, kw_only=True)
    dtypes: tuple[str, ...] | None = dataclasses.field(default=None, kw_only=True)
    direction = "forward"  # a field of those that have others

    @classmethod
    @abc.abstractmethod
    def problems(cls, setting: Setting) -> list[Problem]:
        """What `bitfuse bench` measures with this setting."""

    @abc.abstractmethod
    def contenders(self, setting: Setting) -> list[Contender]:
        """Every one, whether it can run here or not: `build` tells. Makes no tensor."""

    @abc.abstractmethod
    def bounded(self) -> Problem:
        """The same at sizes that float64 takes little time for."""

    @classmethod
    def overhead(cls) -> dict[str, Callable[[], Any]]:
        """Tiny calls on the CPU, whose time is what a call costs."""
        return {}

    @property
    def streamed(self) -> bool:
        """Whether a chain has as many layers as exceed the cache, or one."""
        return True

    @property
    def sizes(self) -> dict[str, Any]:
        own = ("model", "layer", "dtypes")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own}

    @property
    def needs_grad(self) -> bool:
        return self.direction != "forward"

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes.items())
        named = " ".join(filter(None, (self.model, self.layer)))
        return f"{named}: {sizes}" if named else sizes


def chosen(contenders: list[Contender], setting: Setting) -> list[Contender]:
    """Those that a setting's `against` lets in."""
    against = setting.against
    return [c for c in contenders if not c.peer or against is None or c.who in against]


def narrowed(suite: type[Problem], setting: Setting) -> Setting:
    """A setting as an op sees it: of the formats those that it knows.

    Raises:
        ValueError: that leaves none of them.
    """
    if suite.formats is None or setting.formats is None:
        return setting
    known = tuple(f for f in setting.formats if split_format(f)[0] in suite.formats)
    if not known:
        raise ValueError(
            f"{suite.op} has none of the formats {', '.join(setting.formats)}: {', '.join(suite.formats)}"
        )
    return dataclasses.replace(setting, formats=known)


def named(shape: Shape) -> str | None:
    return None if shape is DEFAULT else shape.name


def asked(op: Op, backend: str, device: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call by this backend. Who would serve it anyway is not asked for by name, which costs a
    microsecond."""
    if backend == next(b.name for b in op.backends if device in b.devices):
        return call

    def by_name() -> Any:
        with use_backend(backend):
            return call()

    return by_name


def served(op: Op, backend: str, device: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """`asked`, and tried once.

    Raises:
        Unavailable: the backend can't serve it.
    """
    try:
        with use_backend(backend):
            call()
    except BackendError as error:
        raise Unavailable(str(error).partition("was asked for, but ")[2] or str(error)) from None
    return asked(op, backend, device, call)


def split_format(spec: str) -> tuple[str, int | None]:
    """ "int4:32" is int4 with groups of 32 columns.

    Raises:
        ValueError: a group that is no multiple of 8.
    """
    name, colon, group = spec.partition(":")
    if colon and not (group.isascii() and group.isdigit() and int(group) % 8 == 0 and int(group)):
        raise ValueError(f"format is {spec!r}, expected a multiple of 8 behind the colon, as in {name}:32")
    return name, int(group) if colon else None


def quantized(weight: torch.Tensor, spec: str) -> LowBitWeight:
    """A weight in a format such as "int4" or "int4:32"."""
    name, group_size = split_format(spec)
    try:
        return quantize(weight, name, group_size=group_size)
    except ValueError as error:
        raise Unavailable(str(error)) from None


_draw = 0


def drawn(number: int) -> None:
    """From here on random numbers are others, the same for the same number."""
    global _draw
    _draw = number << 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed + _draw)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, float32, the same on every machine."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float32, device="cpu")


def _normal(setting: Setting, dtype: str | None, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return setting.tensor(randn(*shape, seed=seed), dtype)


def normal(setting: Setting, dtype: str | None, *shape: int, seed: int = 0) -> Base:
    """Normal numbers on the device, of a dtype, made when they are first asked for."""
    return Base(functools.partial(_normal, setting, dtype, shape, seed))


class Base:
    """A tensor that every layer rolls by its own number: made once, when the first layer asks."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        self._made = functools.cache(make)

    def __call__(self, i: int, dim: int = 0) -> torch.Tensor:
        return self._made().roll(i, dim)


def relative_error(layer: Layer, needs_grad: bool) -> float | None:
    """Of one call of a layer; see results.py. None where there is nothing to compare with."""
    if layer.exact is None:
        return None
    with torch.set_grad_enabled(needs_grad):
        exact = layer.exact()
        got = layer.read(layer.call())
    worst = 0.0
    for g, e in zip(got, exact, strict=True):
        if layer.discrete:
            error = float((g.cpu() != e.cpu()).double().mean())
        else:
            norm = float(e.double().norm())
            error = float((g.detach().double().cpu() - e.double().cpu()).norm()) / (norm or 1.0)
        worst = error if not worst >= error else worst  # a NaN is kept
    return worst


class Weights:
    """Matrices [n, k] of the layers of chains: each is another's rows in another order, so that codes are
    made once a format. Contenders that read the same format share them."""

    def __init__(self, n: int, k: int, device: str) -> None:
        base = functools.cache(lambda: (randn(n, k) / k**0.5).to(device))
        codes = functools.cache(lambda spec: quantized(base(), spec))
        self.plain = functools.cache(lambda i: base().roll(i, 0))
        self.dense = functools.cache(lambda dtype, i: base().to(DTYPES[dtype]).roll(i, 0))
        self.few_bit = functools.cache(lambda spec, i: _rolled(codes(spec), i))


def _rolled(w: LowBitWeight, i: int) -> LowBitWeight:
    by_row = ("qweight", "scales", "zeros")
    rows: dict[str, Any] = {name: t.roll(i, 0) for name, t in w.tensors().items() if name in by_row}
    return dataclasses.replace(w, perm=None, **rows)


@functools.lru_cache(maxsize=1)
def weights(n: int, k: int, device: str) -> Weights:
    """Those of the tables at hand: the next matrix size lets go of them."""
    return Weights(n, k, device)

"""Declaration: everything about an op that is asked for by its name, said once, at the end of the op's file.

Whatever lists ops is made of the declarations: what `bitfuse.ops` exports, `bitfuse explain`, `compile`,
`bench`, `tune`, the order of the report, the README's table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .explain import Explanation
    from .op import Op

FAMILIES = ("linear", "attention", "norm", "sampling", "optim")  # in lists
Make = Callable[..., torch.Tensor]  # a tensor of a shape, and of a dtype that is not the sizes'


@dataclass(frozen=True)
class Sizes:
    """Of a call; an op uses some of them.

    Attributes:
        m, n, k: rows of x, out_features, in_features.
        format: of the weight, or "dense"; group_size: None for the format's own.
        dtype: of activations, and of a dense weight.
        rank, adapters: of LoRA, and how many of them there are.
        batch, seqlen, kv_len: sequences, their queries, their keys.
        heads, kv_heads, head_dim: of attention.
        causal: whether a query sees later keys.
        cache, page_size: the KV cache's format ("none" for dtype itself); None for no pages.
        vocab: tokens to choose from; drafted: those that a draft model proposes.
        zero_points: a weight of integers has them; nested: the scales of a codebook's are codes themselves.
        dropout: its probability.
        listed: adapters are lists of tensors, not stacked.
    """

    m: int = 1
    n: int = 4096
    k: int = 4096
    format: str = "int4"
    group_size: int | None = None
    dtype: torch.dtype = torch.bfloat16
    rank: int = 16
    adapters: int = 64
    batch: int = 1
    seqlen: int = 1024
    kv_len: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    causal: bool = True
    cache: str = "none"
    page_size: int | None = None
    vocab: int = 128256
    drafted: int = 4
    zero_points: bool = False
    nested: bool = False
    dropout: float = 0.0
    listed: bool = False


LINEAR = ("m", "n", "k", "format", "group_size", "dtype")
DENSE = "dense"  # a format of sizes that is none
HEADS = ("batch", "seqlen", "heads", "head_dim", "dtype")
CACHE = ("batch", "kv_len", "kv_heads", "head_dim", "cache", "page_size", "dtype")
# other weights than a format's usual ones, for `Declaration.variants`
WEIGHTS: tuple[Mapping[str, Any], ...] = (
    {"zero_points": True}, {"nested": True}, {"group_size": 32}, {"group_size": 64}, {"group_size": 128},
)  # fmt: skip
# what is tuned for: rows of x, keys
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
LENGTHS = (1024, 4096, 16384)


class Part(NamedTuple):
    """A kernel of a declaration: a line of the table of ops x backends.

    Attributes:
        op: who serves it.
        what: it does of the declared function, "forward", "gradient to x"; "" where it is the whole.
        cells: by backend, what that asks for where it is less than is usual.
    """

    op: Op
    what: str = ""
    cells: Mapping[str, str] = {}


@dataclass(frozen=True)
class Tuned:
    """What `bitfuse tune` measures: values of `Sizes` by name, beside a model's own.

    Attributes:
        tiles: Triton's tiles are tried too.
    """

    values: Mapping[str, tuple[Any, ...]]
    tiles: bool = False


@dataclass(frozen=True)
class Declaration:
    """An op as everybody who lists ops sees it.

    Attributes:
        function: the public one. Its name is the op's.
        summary: what it computes, in half a line.
        place: where it stands in lists, in its family.
        explain: what `bitfuse.explain` answers; takes the function's arguments.
        uses: of `Sizes`, what a call has.
        arguments: of a call, from sizes and from what makes a tensor; nothing reads their numbers.
        options: its keyword arguments.
        parts: its kernels; none where it calls those of `like`.
        like: another declaration, whose kernels this one calls in another way. Its benchmark is that one's.
        classes: public ones that it takes or gives.
        ops: that `bitfuse.ops` exports beside the function.
        public: whether bitfuse exports it.
        called: what people call it by.
        matrices: which of a model's matrices are its n and k: "linears", "mlp" (a gated MLP's), "hidden"
            (square).
        dense: whether the format may be "dense".
        bias: whether a call may have a `bias` of n.
        gradient: whether gradients flow.
        tuned: None where one backend serves, or nothing is to be chosen.
        variants: sizes beside the usual ones that other kernels serve, each alone: compiled ahead too.
    """

    function: Callable[..., Any]
    summary: str
    place: int
    explain: Callable[..., Explanation]
    uses: tuple[str, ...]
    arguments: Callable[[Sizes, Make], tuple[Any, ...]]
    options: Callable[[Sizes], dict[str, Any]] = lambda sizes: {}
    parts: tuple[Part, ...] = ()
    like: str | None = None
    classes: tuple[type, ...] = ()
    ops: Mapping[str, Op] = field(default_factory=dict)
    public: bool = True
    called: str | None = None
    matrices: str = "linears"
    dense: bool = True
    bias: bool = False
    gradient: bool = True
    tuned: Tuned | None = None
    variants: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def family(self) -> str:
        return self.function.__module__.split(".")[2]

    @property
    def kernels(self) -> tuple[Part, ...]:
        """Its own, or those that it calls."""
        return self.parts if self.like is None else declared(self.like).parts

    @property
    def exports(self) -> tuple[str, ...]:
        """Names of bitfuse."""
        return (self.name, *(c.__name__ for c in self.classes)) if self.public else ()


_declared: dict[str, Declaration] = {}


def declare(declaration: Declaration) -> None:
    """Register an op."""
    _declared[declaration.name] = declaration


def declarations() -> tuple[Declaration, ...]:
    """All ops that are imported, as lists have them: by family, then by place."""
    return tuple(sorted(_declared.values(), key=lambda d: (FAMILIES.index(d.family), d.place, d.name)))


def declared(name: str) -> Declaration:
    """
    Raises:
        ValueError: no op of that name.
    """
    if name not in _declared:
        raise ValueError(f"no op {name!r}: there are {', '.join(d.name for d in declarations())}")
    return _declared[name]


def explainer(function: Any) -> Callable[..., Explanation] | None:
    """Of a declared function."""
    found = _declared.get(getattr(function, "__name__", ""))
    return found.explain if found is not None and found.function is function else None

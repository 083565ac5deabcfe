"""Folders of safetensors with a config.json, whose matrices are several tensors each: what they share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch

from ..core.tensors import check_finite
from ..weights.formats import Format
from ..weights.packing import pack, packed_width, unpack
from ..weights.weight import CHUNK, LowBitWeight
from .checkpoint import Checkpoint, Entry, Loaded, Source
from .reader import Tensors


class Matrix(NamedTuple):
    """The tensors of one matrix: their names are `name` and a part's own."""

    tensors: Tensors
    name: str

    @property
    def where(self) -> str:
        return f"{self.tensors.path}: {self.name}"

    def need(self, part: str, *dtypes: torch.dtype, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """A part, in the file's memory; ValueError where it is missing or other than expected."""
        return self.tensors.need(self.name + part, *dtypes, shape=shape)

    def shape(self, part: str, dimensions: int) -> tuple[int, ...]:
        """A part's sizes; ValueError where it is missing or has other dimensions."""
        stored = self.tensors.get(self.name + part)
        if stored is None:
            raise ValueError(f"{self.tensors.path}: tensor {self.name + part!r} is missing")
        if len(stored.shape) != dimensions or not all(stored.shape):
            raise ValueError(
                f"{stored.where} has shape {list(stored.shape)}, expected {dimensions} sizes of 1 and more"
            )
        return stored.shape

    def has(self, part: str) -> bool:
        return self.name + part in self.tensors

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"{self.where}: {what}")


class Described(NamedTuple):
    """A matrix in few bits, not read yet: how people call it, its shape, and what reads it."""

    stored: str
    shape: tuple[int, ...]
    read: Callable[[], Loaded]


class Folder(Checkpoint):
    """A checkpoint of safetensors (a folder, or a file beside its config.json).

    `parts` are the ends of the names of a matrix's tensors, and where one of `markers` is there is a matrix;
    tensors that end with one of `dropped` say nothing that the model here needs. All others are the model's
    own.
    """

    markers: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    dropped: ClassVar[tuple[str, ...]] = ()

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.tensors = source.tensors
        self.quantization = source.quantization

    @abstractmethod
    def matrix(self, m: Matrix) -> Described:
        """What a matrix is."""

    def config(self) -> Any:
        from transformers import AutoConfig

        said = dict(self.source.config)
        kind = said.pop("model_type", None)
        if not isinstance(kind, str):
            raise ValueError(f"{self.source.folder / 'config.json'} has no model_type")
        for other in ("quantization_config", "auto_map", "transformers_version"):
            said.pop(other, None)
        return AutoConfig.for_model(kind, **said)

    def entries(self) -> Iterator[Entry]:
        taken: set[str] = set()
        for name in self._matrices():
            own = [name + part for part in self.parts if name + part in self.tensors]
            taken.update(own)
            m = Matrix(self.tensors, name)
            found = self.matrix(m)
            size = sum(self.tensors[each].nbytes for each in own)
            yield Entry(name, found.stored, found.shape, size, _checked(m, found.read), True)
        for name, stored in self.tensors.items():
            if name not in taken and not name.endswith(self.dropped):
                kind = str(stored.dtype).removeprefix("torch.")
                read = lambda stored=stored: Loaded(stored.read())  # noqa: E731
                yield Entry(name, kind, stored.shape, stored.nbytes, read, False)

    def _matrices(self) -> list[str]:
        found: dict[str, None] = {}
        for name in self.tensors:
            for marker in self.markers:
                if name.endswith(marker):
                    found[name.removesuffix(marker)] = None
        return list(found)

    def number(self, key: str, default: int | None = None) -> int:
        """An integer of the quantisation's config."""
        value = self.quantization.get(key, default)
        if type(value) is not int:
            raise ValueError(
                f"{self.source.folder / 'config.json'}: {key} is {value!r} in quantization_config, "
                "expected an integer"
            )
        return value


def _checked(m: Matrix, read: Callable[[], Loaded]) -> Callable[[], Loaded]:
    """What it reads, with the matrix's name in its errors and scales that are finite."""

    def checked() -> Loaded:
        try:
            loaded = read()
            if isinstance(loaded.weight, LowBitWeight):
                check_finite("scales", loaded.weight.float_scales())
                if loaded.weight.offsets is not None:
                    check_finite("offsets", loaded.weight.offsets.float())
            return loaded
        except (TypeError, ValueError, RuntimeError) as why:
            said = str(why)
            raise ValueError(said if str(m.tensors.path) in said else f"{m.where}: {said}") from None

    return checked


def as_bytes(t: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """Integers of any width whose bits are a stream of codes, low bits first, a row each: the rows of the
    canonical layout, which may be followed by padding."""
    raw = t.contiguous().view(torch.uint8)
    width = packed_width(columns, bits)
    if raw.shape[-1] < width:
        raise ValueError(f"codes have rows of {raw.shape[-1]} bytes, expected {width}")
    return raw[..., :width].contiguous()


def codes_of(t: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes uint8 [rows, columns] of integers whose bits are a stream of them."""
    raw = t.contiguous().view(torch.uint8)
    whole = raw.shape[-1] // bits * bits
    return unpack(raw[:, :whole].contiguous(), bits)


def unpacked(words: torch.Tensor, columns: int, bits: int, dense: bool) -> torch.Tensor:
    """The codes uint8 [rows, columns] of int32 words: a stream of bits (dense), or words of 32 // bits whole
    codes with nothing in their top bits.

    Raises:
        ValueError: their number is another.
    """
    count = -(-columns * bits // 32) if dense else -(-columns // (32 // bits))
    if words.shape[1] != count:
        raise ValueError(f"{columns} codes of {bits} bits are in {words.shape[1]} words, expected {count}")
    if dense:
        return codes_of(torch.nn.functional.pad(words, (0, -count % bits)), bits)[:, :columns]
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32, device="cpu")
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)[:, :columns]


def groups_of(columns: int, count: int, said: int) -> int:
    """The group size of `count` groups a row: what is said, where it is so many; ValueError otherwise."""
    if said in (-1, 0) or said >= columns:
        said = columns
    if -(-columns // said) == count:
        return said
    if columns % count == 0:
        return columns // count
    raise ValueError(f"scales have {count} groups a row of {columns}, and the config has groups of {said}")


def regrouped(columns: int, group: int, *tensors: torch.Tensor | None) -> tuple[int, list[Any]]:
    """A group size that divides the columns, and what each group has, [rows, groups], for groups of that
    size: where the last group of a row is cut off, scales are repeated for smaller groups, which changes no
    number.

    Raises:
        ValueError: no multiple of 8 will do.
    """
    if columns % group == 0:
        return group, list(tensors)
    small = math.gcd(columns, group)
    if small % 8:
        raise ValueError(
            f"groups of {group} do not divide rows of {columns}, and no multiple of 8 divides both"
        )
    times, count = group // small, columns // small
    return small, [None if t is None else t.repeat_interleave(times, -1)[..., :count] for t in tensors]


def sized(format: Format, columns: int, group: int) -> Format:
    """A format with the group size, which is -1 for the whole row."""
    return replace(format, group_size=-1 if group == columns else group)


def in_order(qweight: torch.Tensor, bits: int, order: torch.Tensor) -> torch.Tensor:
    """Packed codes with their columns in another order, some rows at a time."""
    step = max(1, CHUNK // order.numel())
    parts = [pack(unpack(rows, bits)[:, order], bits) for rows in qweight.split(step)]
    return torch.cat(parts)


def sorted_groups(g_idx: torch.Tensor, group: int, count: int) -> torch.Tensor | None:
    """Groups of columns as `LowBitWeight` takes them, int32; None where they are in order.

    Raises:
        ValueError: a group that there is not, or that has another number of columns.
    """
    g_idx = torch.where(g_idx < 0, g_idx + count, g_idx).to(torch.int32)
    if torch.equal(g_idx, torch.arange(g_idx.numel(), dtype=torch.int32, device="cpu") // group):
        return None
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= count:
        found = f"{int(g_idx.min())} to {int(g_idx.max())}"
        raise ValueError(f"g_idx holds {found}, expected groups 0 to {count - 1}")
    sizes = torch.bincount(g_idx, minlength=count)
    if bool((sizes != group).any()):
        at = int((sizes != group).nonzero()[0])
        raise ValueError(f"g_idx puts {int(sizes[at])} columns in group {at}, expected {group}")
    return g_idx

"""The container of llama.cpp's models: a header of keys and values, a list of tensors, and their bytes.

Everything is little-endian. Strings and arrays have their length before them (uint64); a tensor's dimensions
are listed with the fastest first, so that a matrix [out_features, in_features] says in_features,
out_features; its offset counts from the first multiple of the alignment after the list.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .reader import MappedFile

# of a value, by its number: a struct's letter, and numpy's name
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class BlockType:
    """How numbers are held: `block` of them in `nbytes`."""

    name: str
    block: int
    nbytes: int


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4), 1: BlockType("F16", 1, 2), 2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20), 6: BlockType("Q5_0", 32, 22), 7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34), 10: BlockType("Q2_K", 256, 84), 11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144), 13: BlockType("Q5_K", 256, 176), 14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18), 30: BlockType("BF16", 1, 2), 39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
}  # fmt: skip
# known by name, so that an error can say it
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor is, and what it is; shape as torch has it."""

    file: MappedFile
    name: str
    type: BlockType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.nbytes

    @property
    def where(self) -> str:
        """File and tensor, as errors name them."""
        return f"{self.file.path}: tensor {self.name!r}"

    def blocks(self) -> torch.Tensor:
        """The bytes, uint8 [rows, blocks a row, bytes a block], in the file's memory."""
        *lead, k = self.shape
        shape = (math.prod(lead), k // self.type.block, self.type.nbytes)
        return self.file.tensor(torch.uint8, shape, self.offset, f"tensor {self.name!r}")


class GGUFFile:
    """The header of a GGUF file, read and checked; tensors are read where they are asked for.

    Attributes:
        values: what the header says, by key; arrays of numbers are NumPy's.
        tensors: by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not GGUF of version 2 or 3, is cut off, or contradicts itself.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = MappedFile(path)
        self.path = self.file.path
        self._at = 0
        if (magic := self._take(4, "the header")) != b"GGUF":
            raise ValueError(f"{self.path} begins with {magic!r}, expected b'GGUF'")
        version = self._number("I", "the version")
        if version not in (2, 3):
            raise ValueError(
                f"{self.path} has version {version:#x}, expected 2 or 3, in little-endian numbers"
            )
        tensor_count, key_count = self._number("Q", "the header"), self._number("Q", "the header")
        self._check_count("keys", key_count, 13)
        self.values: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string("a key")
            if key in self.values:
                raise ValueError(f"{self.path} has the key {key!r} twice")
            self.values[key] = self._value(self._number("I", f"key {key!r}"), key)
        self._check_count("tensors", tensor_count, 24)
        self.tensors: dict[str, GGUFTensor] = {}
        found = [self._tensor() for _ in range(tensor_count)]
        self._place(found)

    def get(self, key: str, *kinds: type, default: Any = None) -> Any:
        """A value of one of the kinds, or the default where there is none.

        Raises:
            ValueError: it is of another kind.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{self.path}: {key} is {_short(value)}, expected {expected}")
        return value

    def _take(self, count: int, what: str) -> bytes:
        if count > self.file.size - self._at:
            raise ValueError(
                f"{self.path}: {what} takes {count} bytes from byte {self._at}, and the file has "
                f"{self.file.size}: is it cut off?"
            )
        self._at += count
        return self.file.buffer[self._at - count : self._at]

    def _number(self, kind: str, what: str) -> Any:
        (value,) = struct.unpack("<" + kind, self._take(struct.calcsize("<" + kind), what))
        return value

    def _string(self, what: str) -> str:
        raw = self._take(self._number("Q", what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {what} is {raw[:40]!r}, expected UTF-8") from None

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        what = f"key {key!r}"
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind], what)
        if kind == _STRING:
            return self._string(what)
        if kind != _ARRAY or depth > 1:
            raise ValueError(f"{self.path}: {what} has type {kind}, expected a number, a string or an array")
        inner, count = self._number("I", what), self._number("Q", what)
        if inner in _NUMBERS:
            dtype = np.dtype(_NUMBERS[inner]).newbyteorder("<")
            return np.frombuffer(self._take(count * dtype.itemsize, what), dtype=dtype)
        self._check_count(f"items of {what}", count, 8)
        return [self._value(inner, key, depth + 1) for _ in range(count)]

    def _check_count(self, what: str, count: int, least: int) -> None:
        """Raise ValueError for more of something, of so many bytes at least, than the rest of the file
        holds."""
        left = self.file.size - self._at
        if count * least > left:
            raise ValueError(f"{self.path}: {count} {what} in {left} bytes: is it cut off?")

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("the name of a tensor")
        what = f"tensor {name!r}"
        dimensions = self._number("I", what)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{self.path}: {what} has {dimensions} dimensions, expected 1 to 4")
        shape = tuple(self._number("Q", what) for _ in range(dimensions))[::-1]
        return name, shape, self._number("I", what), self._number("Q", what)

    def _place(self, found: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        """Check each tensor's type, sizes and place, and that none lies in another."""
        alignment = self.get("general.alignment", int, default=32)
        if alignment < 8 or alignment > 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment is {alignment}, expected a power of two from 8")
        begin = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in found:
            where = f"{self.path}: tensor {name!r}"
            if name in self.tensors:
                raise ValueError(f"{where} is there twice")
            if kind not in BLOCK_TYPES:
                known = ", ".join(t.name for t in BLOCK_TYPES.values())
                said = f"{_OTHER_TYPES.get(kind, 'unknown')} ({kind})"
                raise ValueError(f"{where} has type {said}, expected one of {known}")
            type = BLOCK_TYPES[kind]
            if not all(shape) or math.prod(shape) >= 1 << 48:
                raise ValueError(f"{where} has shape {list(shape)}, expected sizes of 1 and more")
            if shape[-1] % type.block:
                raise ValueError(
                    f"{where} has rows of {shape[-1]}, expected a multiple of {type.block} for {type.name}"
                )
            tensor = GGUFTensor(self.file, name, type, shape, begin + offset)
            if offset % alignment:
                raise ValueError(f"{where} has offset {offset}, expected a multiple of {alignment}")
            if tensor.offset + tensor.nbytes > self.file.size:
                raise ValueError(
                    f"{where} is {type.name} {list(shape)} from byte {tensor.offset} to "
                    f"{tensor.offset + tensor.nbytes}, and the file has {self.file.size}: is it cut off?"
                )
            self.tensors[name] = tensor
        end, last = begin, ""
        for tensor in sorted(self.tensors.values(), key=lambda t: t.offset):
            if tensor.offset < end:
                raise ValueError(f"{tensor.where} begins at byte {tensor.offset}, inside of tensor {last!r}")
            end, last = tensor.offset + tensor.nbytes, tensor.name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."

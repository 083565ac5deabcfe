"""Files of strangers, mapped into memory: sizes are checked before anything is read, no pickle, no code.

A safetensors file is a length (uint64), a JSON header, and bytes. A folder has one, or several with an index
that says which tensor is in which file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_MOST_JSON = 100 << 20  # of a header or a config; the format's own limit
_MOST_NUMBERS = 1 << 48  # of a tensor: their bytes fit an int64
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


class MappedFile:
    """The bytes of a file, mapped: nothing is read before it is asked for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or no file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder, expected a file")
        with open(self.path, "rb") as f:
            self.size = os.fstat(f.fileno()).st_size
            if not self.size:
                raise ValueError(f"{self.path} is empty")
            # private: who writes into a tensor of it writes into memory of their own
            self.buffer = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int, what: str) -> torch.Tensor:
        """A tensor in the file's own memory; `what` names it in an error.

        Raises:
            ValueError: the file ends before it does.
        """
        count = math.prod(shape)
        if not 0 <= count <= _MOST_NUMBERS or offset < 0 or offset + count * dtype.itemsize > self.size:
            raise ValueError(
                f"{self.path}: {what} is {dtype} {list(shape)} from byte {offset}, and the file has "
                f"{self.size} bytes: is it cut off?"
            )
        if not count:
            return torch.empty(shape, dtype=dtype, device="cpu")
        raw = torch.frombuffer(self.buffer, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(shape)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and what it is."""

    file: MappedFile
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def where(self) -> str:
        """File and tensor, as errors name them."""
        return f"{self.file.path}: tensor {self.name!r}"

    def read(self) -> torch.Tensor:
        """The tensor, in the file's memory."""
        return self.file.tensor(self.dtype, self.shape, self.offset, f"tensor {self.name!r}")


class Tensors(Mapping[str, StoredTensor]):
    """The tensors of a `.safetensors` file, or of a folder's, by name.

    Raises:
        FileNotFoundError: a file that is missing.
        ValueError: a file that is truncated or contradicts itself, or a folder without safetensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._tensors: dict[str, StoredTensor] = {}
        if not self.path.is_dir():
            self._tensors = read_safetensors(self.path)
        elif (self.path / INDEX).exists():
            self._tensors = _read_index(self.path)
        elif (self.path / WEIGHTS).exists():
            self._tensors = read_safetensors(self.path / WEIGHTS)
        else:
            others = sorted(p for p in self.path.glob("*.safetensors") if p.is_file())
            if len(others) != 1:
                found = sorted(p.name for p in self.path.iterdir())[:8] if self.path.exists() else "nothing"
                raise ValueError(
                    f"{self.path} holds {found}, expected {WEIGHTS}, {INDEX} or one .safetensors file "
                    "(pickled weights are not read)"
                )
            self._tensors = read_safetensors(others[0])

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def need(self, name: str, *dtypes: torch.dtype, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """A tensor that must be there, of one of the dtypes (any, if none are given) and of the shape.

        Raises:
            ValueError: it is not.
        """
        stored = self._tensors.get(name)
        if stored is None:
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        if dtypes and stored.dtype not in dtypes:
            expected = " or ".join(map(str, dtypes))
            raise ValueError(f"{stored.where} has dtype {stored.dtype}, expected {expected}")
        if shape is not None and stored.shape != shape:
            raise ValueError(f"{stored.where} has shape {list(stored.shape)}, expected {list(shape)}")
        return stored.read()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or no object.
    """
    if path.stat().st_size > _MOST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, expected a JSON file below {_MOST_JSON}")
    return _object(path.read_bytes(), str(path))


def _object(raw: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as why:
        raise ValueError(f"{what} is not JSON: {why}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} holds a {type(found).__name__}, expected a JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, none of them read yet.

    Raises:
        ValueError: a header that does not fit the file; the tensor is named.
    """
    file = MappedFile(path)
    length = int.from_bytes(file.buffer[:8], "little")
    if file.size < 8 or length > min(_MOST_JSON, file.size - 8):
        raise ValueError(
            f"{file.path} has {file.size} bytes, of which the header would be {length}: "
            "it is cut off, or no safetensors file"
        )
    header = _object(file.buffer[8 : 8 + length], f"the header of {file.path}")
    header.pop("__metadata__", None)
    begin, found = 8 + length, {}
    for name, entry in header.items():
        found[name] = _entry(file, name, entry, begin)
    end, last = begin, ""
    for t in sorted((t for t in found.values() if t.nbytes), key=lambda t: t.offset):
        if t.offset < end:
            raise ValueError(f"{t.where} begins at byte {t.offset}, inside of tensor {last!r}")
        end, last = t.offset + t.nbytes, t.name
    return found


def _entry(file: MappedFile, name: str, entry: Any, begin: int) -> StoredTensor:
    where = f"{file.path}: tensor {name!r}"
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{where} has no dtype, shape and data_offsets") from None
    numbers = (*shape, start, stop)
    if not all(type(i) is int and 0 <= i <= _MOST_NUMBERS for i in numbers):
        raise ValueError(f"{where} has shape {list(shape)} at {[start, stop]}, expected sizes of 0 and more")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    stored = StoredTensor(file, name, DTYPES[dtype], shape, begin + start)
    if stop - start != stored.nbytes:
        raise ValueError(
            f"{where} is {dtype} {list(shape)} in {stop - start} bytes, expected {stored.nbytes}"
        )
    if begin + stop > file.size:
        raise ValueError(f"{where} ends at byte {begin + stop}, and the file at {file.size}: is it cut off?")
    return stored


def _read_index(folder: Path) -> dict[str, StoredTensor]:
    path = folder / INDEX
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{path} has no weight_map")
    files: dict[str, dict[str, StoredTensor]] = {}
    found = {}
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path} has tensor {name!r} in {file!r}, expected a .safetensors file beside it"
            )
        if file not in files:
            files[file] = read_safetensors(folder / file)
        if name not in files[file]:
            raise ValueError(f"{path} has tensor {name!r} in {file}, which does not hold it")
        found[name] = files[file][name]
    return found

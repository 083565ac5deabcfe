"""What every format of checkpoints answers: is this file of it, what is in it, and what does it say as
few-bit weights."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from ..weights.weight import LowBitWeight
from .reader import CONFIG, Tensors, read_json


class Source:
    """What `recognises` looks at: a path, and what is cheap to know of it.

    Attributes:
        path: the file or folder.
        config: config.json beside the tensors, {} if there is none.
        quantization: of the config, or of the old files quantize_config.json (GPTQ) and quant_config.json
            (AWQ, HQQ), what says how the model was quantised; {} if nothing does.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: a config that is no JSON object.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: there is no such file or folder")
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.config = self._json(CONFIG)
        found = self.config.get("quantization_config") or {}
        if not found:
            hf = self._json("hf_quant_config.json").get("quantization")
            found = {"quant_method": "modelopt", **hf} if isinstance(hf, dict) else {}
        for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
            if not found and (old := self._json(name)):
                found = {"quant_method": method, **old}
        if not isinstance(found, dict):
            raise ValueError(f"{self.folder / CONFIG} has quantization_config {found!r}, expected an object")
        self.quantization: dict[str, Any] = found
        self._tensors: Tensors | None = None

    @property
    def method(self) -> str:
        """quant_method, in lower case; "" if there is none."""
        return str(self.quantization.get("quant_method") or self.quantization.get("method") or "").lower()

    @property
    def tensors(self) -> Tensors:
        if self._tensors is None:
            self._tensors = Tensors(self.path)
        return self._tensors

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path) if path.is_file() and self.path.suffix != ".gguf" else {}


class Loaded(NamedTuple):
    """A weight as it was read.

    Attributes:
        weight: in few bits, or the numbers themselves.
        loss: what of the file's numbers is lost in it, and why; "" where it is bit for bit what they are.
        note: what one should know besides, such as codes that are held wider than in the file.
    """

    weight: LowBitWeight | torch.Tensor
    loss: str = ""
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A weight of a checkpoint, not read yet.

    Attributes:
        name: the module that it is the weight of ("model.layers.0.mlp.up_proj") where it is a matrix in few
            bits; else the tensor's name in the model ("model.norm.weight").
        stored: how the file holds it, as people call it ("Q4_K", "gptq 4 bits g128").
        shape: of the matrix, as torch has it: [..., out_features, in_features].
        nbytes: in the file.
        read: reads it.
        few_bit: whether it is in few bits.
        tied_to: the module whose codes it reads too, which comes before it; "" if none.
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Loaded]
    few_bit: bool
    tied_to: str = ""


class Checkpoint(ABC):
    """A file or folder of one format. Few-bit matrices are read straight into the canonical layout, one at a
    time; nothing is dense in between.

    Args:
        source: what `recognises` said yes to.

    Raises:
        ValueError: a file that is truncated or contradicts itself: file, tensor and what was expected are
            named. Also when its entries are read.
    """

    kind: ClassVar[str]

    def __init__(self, source: Source) -> None:
        self.source = source
        self.path = source.path

    @classmethod
    @abstractmethod
    def recognises(cls, source: Source) -> bool:
        """Whether this is the format of a path."""

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """All that the file holds of the model."""

    @abstractmethod
    def config(self) -> Any:
        """The model's config, of transformers."""

    def layers(self) -> Iterator[Entry]:
        """The matrices in few bits."""
        return (entry for entry in self.entries() if entry.few_bit)

    def finish_(self, model: torch.nn.Module) -> None:  # noqa: B027  most need nothing
        """What a model that has been filled needs besides, in place."""

"""Embedding: torch.nn.Embedding with its rows in few bits."""

from __future__ import annotations

from typing import Any

import torch

from ..core.explain import Explanation, explain
from ..ops.linear.lowbit_embedding import apply_embedding, lowbit_embedding
from ..weights.formats import Format
from ..weights.quantize import quantize
from ..weights.weight import LowBitWeight
from .few_bits import FewBits, zeros


class Embedding(FewBits, torch.nn.Embedding):  # type: ignore[misc]  # weight is no tensor
    """Rows of a frozen few-bit matrix by their numbers; see `bitfuse.lowbit_embedding`.

    The constructor makes a layer of zeros for a checkpoint to fill; `from_float` quantises a
    `torch.nn.Embedding`, `from_weight` takes a `LowBitWeight`. It is a `torch.nn.Embedding` to whoever asks.
    What a state dict holds, and what `half()`, `to(dtype)` and loading do: as in `bitfuse.nn.Linear`. A head
    that reads the same codes: `bitfuse.nn.Linear.tied_to`.

    Args:
        num_embeddings, embedding_dim: rows, and their columns, a multiple of 8.
        padding_idx: a row that no gradient would flow to: here none flows to any. Negative: from the end.
        device, dtype: where, and what rows are given as.
        format: a name or a `Format`; `group_size`, `symmetric`, `nested`, `scale_dtype`, `offset`,
            `scale_rows` as in `bitfuse.quantize`.

    Raises:
        ValueError: sizes or options that do not fit the format, a padding_idx outside of the rows.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str | Format = "int4",
        **options: Any,
    ) -> None:
        torch.nn.Module.__init__(self)
        w = zeros((num_embeddings, embedding_dim), device, dtype, format, **options)
        self._hold(w, padding_idx)

    def _hold(self, w: LowBitWeight, padding_idx: int | None) -> None:
        rows = w.shape[0]
        if padding_idx is not None and not -rows <= padding_idx < rows:
            raise ValueError(f"padding_idx is {padding_idx}, expected {-rows} to {rows - 1}, or None")
        self._hold_weight(w)
        self.num_embeddings, self.embedding_dim = w.shape
        self.padding_idx = padding_idx + rows if padding_idx is not None and padding_idx < 0 else padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    @property
    def _size(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @classmethod
    def from_weight(cls, w: LowBitWeight, padding_idx: int | None = None) -> Embedding:
        """A layer around a quantised weight."""
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer._hold(w, padding_idx)
        return layer

    @classmethod
    def from_float(
        cls, embedding: torch.nn.Embedding, format: str | Format = "int4", **options: Any
    ) -> Embedding:
        """Quantise the rows of a `torch.nn.Embedding` (options as in `bitfuse.quantize`).

        Raises:
            TypeError: not a torch.nn.Embedding.
            ValueError: as `bitfuse.quantize`; one with a max_norm, which writes to its rows.
        """
        if not isinstance(embedding, torch.nn.Embedding) or isinstance(embedding, Embedding):
            few = " of few bits already" if isinstance(embedding, Embedding) else ""
            raise TypeError(f"embedding is a {type(embedding).__name__}{few}, expected a torch.nn.Embedding")
        if embedding.max_norm is not None:
            raise ValueError(f"max_norm is {embedding.max_norm}, expected None: codes are not rescaled")
        w = quantize(embedding.weight, format, **options)
        return cls.from_weight(w, embedding.padding_idx).train(embedding.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return apply_embedding(input, self.op_args(), self._buffers["perm"], self._dtype)

    def explain(self, input: torch.Tensor) -> Explanation:
        """Who would serve `forward(input)`, and why the others would not."""
        return explain(lowbit_embedding, input, self.weight, self._dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, format={self.format}"

"""Where speculative decoding has its drafts from: earlier text, a smaller model, the model's own layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from .decoder import Decoder


class Draft(Protocol):
    """Proposes what may come next in one sequence."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow all of `tokens`; none where it has no idea. Each call's
        tokens begin with the last call's, up to the first proposed token that was not taken."""
        ...


class Lookup:
    """What followed when the last few tokens stood there before, in the prompt or in what was generated:
    prompt lookup (Saxena, 2023), n-grams of llama.cpp. No model, no weights.

    Args:
        longest, shortest: tokens that must be the same; the longest match is taken, and of those the latest.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._places: dict[tuple[int, ...], int] = {}  # of n-grams: where the token after the last one stands
        self._read = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        # n-grams are known once a token follows them: one that ends the text would find itself
        for end in range(max(self._read, 1), len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._places[tuple(tokens[end - size : end])] = end
        self._read = max(self._read, len(tokens))
        for size in self._sizes:
            at = self._places.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if at is not None:
                return list(tokens[at : at + most])
        return []


class ModelDraft:
    """The most likely tokens of another decoder, one after the other.

    Args:
        decoder: of one sequence, over the same vocabulary.
        least: the probability below which a token is not proposed, nor what would follow it.
    """

    def __init__(self, decoder: Decoder, least: float = 0.4) -> None:
        self._decoder, self._least = decoder, least
        self._known: list[int] = []  # tokens that the decoder has keys of

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        decoder, known = self._decoder, self._known
        same = 0
        most = min(most, decoder.max_len - len(tokens))
        if most < 1:
            return []
        # the last token is always read anew: its logits are what is wanted
        for same in range(min(len(known), len(tokens) - 1) + 1):
            if same == len(known) or same == len(tokens) - 1 or known[same] != tokens[same]:
                break
        if same < decoder.lengths[0]:
            decoder.truncate(same)
        new = torch.tensor([list(tokens[same:])], dtype=torch.int64, device="cpu")
        logits = decoder.prefill(new)
        self._known = list(tokens)
        proposed: list[int] = []
        while True:
            row = logits[0].float()
            token = int(row.argmax())
            if float(torch.softmax(row, -1)[token]) < self._least:
                break
            proposed.append(token)
            if len(proposed) == most:
                break
            logits = decoder.step(torch.tensor([[token]], dtype=torch.int64, device="cpu"))
            self._known.append(token)
        return proposed

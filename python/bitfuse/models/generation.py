"""generate: text from a language model, one native call a token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.sampling.sample import sample
from .decoder import Decoder
from .drafts import Draft, Lookup, ModelDraft

MOST_DRAFTED = 8  # tokens that are verified at once, beside the one that is certain
TRIALS = 8  # speculative steps that are looked at before speculation is judged
PAUSE = 64  # tokens for which it is left alone after it did not pay
# Greedy: where two logits are nearer to each other than this share of the largest, the order of sums may
# decide; a plain step does, so that no token depends on speculation.
NEAR = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Generation:
    """What `generate` returns.

    Attributes:
        tokens: of each sequence, the new ones; the end-of-sequence token is among them.
        prompt_tokens: of all sequences.
        prefill_seconds, decode_seconds: wall clock of the prompt, up to the first new token, and of all
            others.
        drafted, accepted: speculative tokens that were verified, and those that were right.
        steps: of decoding.
        interrupted: by Ctrl-C, before the end.
    """

    tokens: list[list[int]]
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    interrupted: bool = False

    @property
    def new_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token of each sequence is the prompt's."""
        later = self.new_tokens - len(self.tokens)
        return later / self.decode_seconds if self.decode_seconds else 0.0

    def summary(self) -> str:
        """One line for people."""
        prefill = self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0
        line = (
            f"{self.prompt_tokens} tokens of prompt at {prefill:.0f} tokens/s, "
            f"{self.new_tokens} new ones at {self.tokens_per_second:.1f} tokens/s"
        )
        if self.drafted:
            line += (
                f"; {self.accepted} of {self.drafted} drafted tokens accepted, "
                f"{(self.new_tokens - len(self.tokens)) / max(self.steps, 1):.2f} tokens a step"
            )
        return line


class Sampler:
    """Tokens from logits; temperature 0 is the most likely one.

    Args:
        rows: sequences.
        others: as `bitfuse.sample` and `generate` have them.
    """

    def __init__(
        self, rows: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None
    ) -> None:
        for name, value, low, high in (
            ("temperature", temperature, 0.0, 1e30),
            ("top_k", top_k, 0, 2**62),
            ("top_p", top_p, 0.0, 1.0),
            ("min_p", min_p, 0.0, 1.0),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}, expected {low} to {high}")
        self.greedy = temperature == 0
        self._options = temperature, top_k, top_p, min_p
        self._random = torch.Generator(device="cpu")
        self._random.manual_seed(torch.seed() if seed is None else seed)
        self.ids = torch.zeros(rows, dtype=torch.int64, device="cpu")
        self._uniforms = torch.zeros(rows, dtype=torch.float64, device="cpu")
        full = [
            torch.full((rows,), v, dtype=torch.int64 if i == 1 else torch.float64, device="cpu")
            for i, v in enumerate(self._options)
        ]
        self._native = (self._uniforms, *full, self.ids)

    def native(self) -> tuple[torch.Tensor, ...]:
        """What `Decoder.step` takes; it writes `ids`."""
        if not self.greedy:
            self._uniforms.uniform_(generator=self._random)
        return self._native

    def draw(self, logits: torch.Tensor) -> list[int]:
        """A token a row."""
        uniforms = torch.zeros(len(logits), dtype=torch.float64, device="cpu")
        if not self.greedy:
            uniforms.uniform_(generator=self._random)
        return sample(logits, uniforms, *self._options).tolist()


def generate(
    model: Any,
    input_ids: torch.Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    cache: str = "none",
    draft: Any = None,
    max_drafted: int = MOST_DRAFTED,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> Generation:
    """New tokens of one or several sequences, on the CPU: one native call a step.

    With a `draft` decoding is speculative and lossless: proposed tokens are verified together, in one step
    that reads the weights once. Greedy tokens are those of plain decoding, token for token: where two logits
    are so near that the order of sums could decide, a plain step decides. Sampled tokens have the
    distribution of plain sampling: a token is drawn from the model's own probabilities at each place, and a
    proposal is right when it is that token (Leviathan et al., 2023, for a draft that is certain). Where
    speculation is slower than plain decoding it is left alone for a while.

    Args:
        model: a `transformers` causal language model on the CPU (see `Decoder` for which), or a `Decoder`,
            whose sequences are begun anew.
        input_ids: int64 [batch, tokens], or lists of tokens, of any lengths.
        max_new_tokens: of each sequence.
        temperature: 0 is greedy.
        top_k, top_p, min_p: as `bitfuse.sample`.
        seed: of sampling; None for another each time.
        eos_token_id: tokens that end a sequence; by default the generation config's. An empty list for none.
        cache: format of keys and values: "none", "fp8", "int8" or "int4".
        draft: "lookup" (what followed the same tokens before), "layers:a-b" (the model without those layers,
            a to b, both included), another model of the same vocabulary, a `Draft`; of one sequence. None for
            plain decoding.
        max_drafted: tokens that are proposed at once.
        on_tokens: called with a sequence's number and its new tokens, as they come.

    Raises:
        Unserved (a ValueError): a model that has no native step.
        ValueError, TypeError: an argument out of range.
    """
    prompts = _prompts(input_ids)
    for name, value in (("max_new_tokens", max_new_tokens), ("max_drafted", max_drafted)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected 1 or more")
    room = max(map(len, prompts)) + max_new_tokens + (max_drafted if draft is not None else 0)
    if isinstance(model, Decoder):
        decoder = model
        if decoder.batch < len(prompts) or decoder.max_len < room:
            raise ValueError(
                f"the decoder has room for {decoder.batch} sequences of {decoder.max_len} tokens, "
                f"{len(prompts)} of {room} are wanted"
            )
        decoder.reset()
    else:
        decoder = Decoder(model, batch=len(prompts), max_len=room, cache=cache)
    sampler = Sampler(len(prompts), temperature, top_k, top_p, min_p, seed)
    ends = _ends(model, eos_token_id)
    drafts = _draft(draft, model, len(prompts), room)
    result = Generation([[] for _ in prompts], sum(map(len, prompts)))
    run = _Run(decoder, sampler, prompts, max_new_tokens, ends, result, on_tokens)
    start = time.perf_counter()
    run.read_prompts()
    now = time.perf_counter()
    result.prefill_seconds = now - start
    try:
        if drafts is None:
            run.plain()
        else:
            run.speculative(drafts, max_drafted)
    except KeyboardInterrupt:  # what there is by then is a text too
        result.interrupted = True
    result.decode_seconds = time.perf_counter() - now
    return result


@dataclass
class _Run:
    decoder: Decoder
    sampler: Sampler
    prompts: list[list[int]]
    limit: int
    ends: frozenset[int]
    result: Generation
    on_tokens: Callable[[int, list[int]], None] | None

    def read_prompts(self) -> None:
        """Each prompt, and the first token after it."""
        rows = torch.empty(len(self.prompts), self.decoder.vocabulary, dtype=self.decoder.dtype, device="cpu")
        for b, prompt in enumerate(self.prompts):
            rows[b] = self.decoder.prefill(torch.tensor([prompt], dtype=torch.int64, device="cpu"), first=b)[
                0
            ]
        for b, token in enumerate(self.sampler.draw(rows)):
            self._take(b, [token])

    def plain(self) -> None:
        ids = torch.tensor([[t[-1]] for t in self.result.tokens], dtype=torch.int64, device="cpu")
        logits = torch.empty(len(ids), self.decoder.vocabulary, dtype=self.decoder.dtype, device="cpu")
        while not all(map(self._done, range(len(ids)))):
            self.decoder.step(ids, sampling=self.sampler.native(), out=logits)
            self.result.steps += 1
            ids = self.sampler.ids.view(-1, 1).clone()
            for b, token in enumerate(self.sampler.ids.tolist()):
                if not self._done(b):
                    self._take(b, [token])

    def speculative(self, draft: Draft, most: int) -> None:
        decoder, tokens = self.decoder, self.result.tokens[0]
        text = [*self.prompts[0], *tokens]
        pays = _Pays()
        logits = torch.empty(1, decoder.vocabulary, dtype=decoder.dtype, device="cpu")
        while not self._done(0):
            start = time.perf_counter()
            proposed: list[int] = []
            if pays.try_it():
                proposed = draft.propose(text, min(most, self.limit - len(tokens) - 1))
            if proposed:
                new = self._verified(text[-1], proposed)
            else:
                last = torch.tensor([[text[-1]]], dtype=torch.int64, device="cpu")
                decoder.step(last, sampling=self.sampler.native(), out=logits)
                new = self.sampler.ids.tolist()
            self.result.steps += 1
            pays.saw(len(proposed), len(new), time.perf_counter() - start)
            before = len(tokens)
            self._take(0, new)
            text += tokens[before:]

    def _verified(self, last: int, proposed: list[int]) -> list[int]:
        """The tokens after `last` as the model has them: proposed ones that are right, and one more."""
        decoder = self.decoder
        begin = decoder.lengths[0]
        ids = torch.tensor([[last, *proposed]], dtype=torch.int64, device="cpu")
        logits = decoder.step(ids, every=True)[0]
        sure = len(logits)
        if self.sampler.greedy:
            top = logits.float().topk(2).values
            near = top[:, 0] - top[:, 1] <= NEAR[logits.dtype] * top.abs().amax(1)
            sure = int(near.int().argmax()) if bool(near.any()) else sure
        drawn = self.sampler.draw(logits[:sure]) if sure else []
        new: list[int] = []
        for i, token in enumerate(drawn):
            new.append(token)
            if i == len(proposed) or token != proposed[i]:
                break
        right = sum(a == b for a, b in zip(new, proposed, strict=False))
        self.result.drafted += len(proposed)
        self.result.accepted += right
        decoder.truncate(begin + len(new))
        if new and (right < len(new) or len(new) > len(proposed)):
            return new
        # all that is sure was right, and what comes next is not: a plain step says
        last = new[-1] if new else last
        logits = decoder.step(
            torch.tensor([[last]], dtype=torch.int64, device="cpu"), sampling=self.sampler.native()
        )
        return [*new, *self.sampler.ids.tolist()]

    def _done(self, b: int) -> bool:
        tokens = self.result.tokens[b]
        return len(tokens) >= self.limit or tokens[-1] in self.ends

    def _take(self, b: int, new: list[int]) -> None:
        """New tokens of a sequence, up to its end."""
        tokens = self.result.tokens[b]
        new = new[: self.limit - len(tokens)]
        for i, token in enumerate(new):
            if token in self.ends:
                new = new[: i + 1]
        tokens += new
        if self.on_tokens is not None and new:
            self.on_tokens(b, new)


class _Pays:
    """Whether speculation is worth its time: tokens a second with proposals against those without."""

    def __init__(self) -> None:
        self._plain = self._drafted = 0.0  # seconds a token, averages that forget
        self._seen = 0
        self._pause = 0

    def try_it(self) -> bool:
        if self._pause:
            self._pause -= 1
            return False
        return self._plain > 0  # the first step is plain, to compare with

    def saw(self, proposed: int, new: int, seconds: float) -> None:
        each = seconds / max(new, 1)
        if not proposed:
            self._plain = each if not self._plain else 0.8 * self._plain + 0.2 * each
            return
        self._drafted = each if not self._seen else 0.8 * self._drafted + 0.2 * each
        self._seen += 1
        if self._seen >= TRIALS and self._drafted > self._plain:
            self._pause, self._seen = PAUSE, 0


def _prompts(given: Any) -> list[list[int]]:
    if isinstance(given, torch.Tensor):
        if given.dim() not in (1, 2) or given.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids is {given.dtype} of shape {list(given.shape)}, expected integers [batch, tokens]"
            )
        given = given.view(1, -1).tolist() if given.dim() == 1 else given.tolist()
    prompts = [list(p) for p in given]
    if not prompts or not all(prompts):
        raise ValueError("input_ids has no tokens, expected one or more of each sequence")
    return prompts


def _ends(model: Any, given: int | Sequence[int] | None) -> frozenset[int]:
    if given is None:
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None:
        return frozenset()
    return frozenset([given] if isinstance(given, int) else given)


def _draft(given: Any, model: Any, batch: int, room: int) -> Draft | None:
    if given is None:
        return None
    if batch > 1:
        raise ValueError(f"draft is given with {batch} sequences, expected one")
    if isinstance(given, str):
        if given == "lookup":
            return Lookup()
        kind, _, layers = given.partition(":")
        first, dash, last = layers.partition("-")
        if kind != "layers" or not dash or not first.isdecimal() or not last.isdecimal():
            raise ValueError(f"draft is {given!r}, expected 'lookup', 'layers:A-B', a model or a Draft")
        if isinstance(model, Decoder):
            raise ValueError("draft 'layers:...' wants the model, not its Decoder")
        skipped = range(int(first), int(last) + 1)
        return ModelDraft(Decoder(model, max_len=room, without_layers=skipped))
    if isinstance(given, Decoder):
        return ModelDraft(given)
    if isinstance(given, torch.nn.Module):
        return ModelDraft(Decoder(given, max_len=room))
    if not hasattr(given, "propose"):
        raise TypeError(
            f"draft is a {type(given).__name__}, expected 'lookup', 'layers:A-B', a model or a Draft"
        )
    return given

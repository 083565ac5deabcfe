"""generate: greedy text is transformers' own, speculation changes no token and no distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.models.decoder import Decoder
from bitfuse.models.drafts import Lookup, ModelDraft
from bitfuse.models.generation import PAUSE, TRIALS, Generation, _Pays, generate

transformers = pytest.importorskip("transformers")


def made(vocabulary: int = 97, layers: int = 3, few: bool = True, scale: float = 3.0) -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2,
        bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    if few:
        bitfuse.quantize_(model, "int8", group_size=32, progress=False)
    return model


def test_greedy_is_that_of_transformers() -> None:
    model = made()
    ids = torch.randint(3, 97, (1, 12))
    wanted = model.generate(ids, max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(ids))
    seen: list[int] = []
    result = generate(model, ids, max_new_tokens=40, on_tokens=lambda b, new: seen.extend(new))
    assert result.tokens[0] == wanted[0, 12:].tolist() == seen
    assert result.prompt_tokens == 12 and result.tokens_per_second > 0
    assert "12 tokens of prompt" in result.summary()


def test_sequences_of_other_lengths_are_each_their_own() -> None:
    model = made()
    prompts = [torch.randint(3, 97, (n,)).tolist() for n in (5, 1, 17)]
    together = generate(model, prompts, max_new_tokens=20, eos_token_id=[])
    for prompt, tokens in zip(prompts, together.tokens, strict=True):
        assert generate(model, [prompt], max_new_tokens=20, eos_token_id=[]).tokens == [tokens]


def test_ends() -> None:
    model = made()
    prompts = torch.randint(3, 97, (2, 6))
    free = generate(model, prompts, max_new_tokens=30, eos_token_id=[]).tokens
    end = free[0][7]
    for draft in (None, "lookup"):
        got = generate(model, prompts[:1], max_new_tokens=30, eos_token_id=end, draft=draft).tokens[0]
        assert got == free[0][: free[0].index(end) + 1]
    ended = generate(model, prompts, max_new_tokens=30, eos_token_id=end).tokens
    assert ended[0] == free[0][: free[0].index(end) + 1]
    assert ended[1] == (free[1][: free[1].index(end) + 1] if end in free[1] else free[1])


class Wrong:
    """Proposes what follows in a text, and every few tokens something else."""

    def __init__(self, text: Sequence[int], wrong: int) -> None:
        self._text, self._wrong = list(text), wrong

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        found = self._text[len(tokens) : len(tokens) + most]
        return [3 if (len(tokens) + i) % self._wrong == 0 else t for i, t in enumerate(found)]


@pytest.mark.parametrize("cache", ["none", "int8"])
def test_speculation_changes_no_greedy_token(cache: str) -> None:
    model = made()
    ids = torch.randint(3, 97, (1, 9)).repeat(1, 3)
    options: dict[str, Any] = dict(max_new_tokens=60, eos_token_id=[], cache=cache)
    plain = generate(model, ids, **options).tokens
    text = [*ids[0].tolist(), *plain[0]]
    smaller = made(layers=1)
    for draft in ("lookup", "layers:1-1", smaller, Wrong(text, 7), Wrong(text, 2), Wrong(text, 1000)):
        result = generate(model, ids, draft=draft, **options)
        assert result.tokens == plain, draft
    assert result.accepted > 20 and result.steps < 40, result.summary()
    assert "accepted" in result.summary()


def test_near_logits_are_left_to_a_plain_step() -> None:
    """Tokens with one embedding have one logit: the first of them is taken, whoever was proposed."""
    model = made(few=False)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:48].repeat(3, 1)[:97])
    ids = torch.randint(3, 97, (1, 8))
    plain = generate(model, ids, max_new_tokens=24, eos_token_id=[]).tokens
    shifted = [t + 48 for t in plain[0]]
    for text in (plain[0], shifted):
        draft = Wrong([*ids[0].tolist(), *text], 1000)
        assert generate(model, ids, max_new_tokens=24, eos_token_id=[], draft=draft).tokens == plain


@pytest.mark.parametrize("draft", [None, [1, 3], [4, 4]], ids=str)
def test_samples_have_the_models_distribution(draft: list[int] | None) -> None:
    """Chi-square of the third and fourth new token together, with and without proposals for both."""
    vocabulary, draws, prompt = 5, 1500, [4, 0, 3]
    model = made(vocabulary=vocabulary, layers=1, scale=2.0)
    decoder = Decoder(model, max_len=16)

    class Fixed:
        def propose(self, tokens: Sequence[int], most: int) -> list[int]:
            return (draft or [])[:most] if len(tokens) == 5 else []

    seen = torch.zeros(vocabulary**2, dtype=torch.float64)
    for seed in range(draws):
        result = generate(
            decoder, [prompt], max_new_tokens=5, temperature=1.0, seed=seed, eos_token_id=[],
            draft=None if draft is None else Fixed(),
        )  # fmt: skip
        seen[result.tokens[0][2] * vocabulary + result.tokens[0][3]] += 1
    every = torch.cartesian_prod(*[torch.arange(vocabulary)] * 4)
    with torch.no_grad():
        logits = model(torch.cat((torch.tensor(prompt).expand(len(every), 3), every), 1)).logits[:, 2:6]
    chances = torch.softmax(logits.double(), -1).gather(-1, every.unsqueeze(-1)).squeeze(-1).prod(-1)
    expected = chances.view(vocabulary**2, vocabulary**2).sum(0) * draws
    assert float(expected.min()) > 5
    statistic, freedom = float(((seen - expected) ** 2 / expected).sum()), vocabulary**2 - 1
    # four standard deviations of a chi-square; seeds are fixed, so this never flickers
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, statistic


def test_seeds() -> None:
    model = made()
    options: dict[str, Any] = dict(max_new_tokens=12, temperature=0.9, top_k=40, top_p=0.95, eos_token_id=[])
    first, again, other = (generate(model, [[5, 6]], seed=s, **options).tokens for s in (1, 1, 2))
    assert first == again != other


def test_lookup() -> None:
    lookup = Lookup(longest=3, shortest=2)
    text = [1, 2, 3, 4, 5, 9, 2, 3]
    assert lookup.propose(text, 3) == [4, 5, 9]
    assert lookup.propose([*text, 4], 8) == [5, 9, 2, 3, 4]
    assert lookup.propose([*text, 4, 7], 8) == []
    assert lookup.propose([*text, 4, 7, 2, 3], 2) == [4, 7]  # the latest
    assert Lookup().propose([1], 4) == [] and Lookup().propose([7, 7, 7, 7], 2) == [7]


def test_a_model_draft_keeps_up() -> None:
    """It proposes what it would say, whatever of the last proposal was taken."""
    model = made(layers=1)
    draft = ModelDraft(Decoder(model, max_len=64), least=0.0)
    text = torch.randint(3, 97, (10,)).tolist()
    for taken in (0, 2, 4, 1):
        wanted = generate(model, [text], max_new_tokens=4, eos_token_id=[]).tokens[0]
        got = draft.propose(text, 4)
        assert got == wanted
        text = [*text, *got[:taken], 50 + taken]


def test_speculation_rests_where_it_does_not_pay() -> None:
    pays = _Pays()
    assert not pays.try_it()
    pays.saw(0, 1, 1.0)
    for _ in range(TRIALS):
        assert pays.try_it()
        pays.saw(4, 1, 1.5)
    assert not any(pays.try_it() for _ in range(PAUSE))
    for _ in range(3 * TRIALS):
        assert pays.try_it()
        pays.saw(4, 3, 1.5)


def test_ctrl_c_keeps_what_there_is() -> None:
    def stop(b: int, new: list[int]) -> None:
        seen.extend(new)
        if len(seen) == 5:
            raise KeyboardInterrupt

    seen: list[int] = []
    result = generate(made(), [[5, 6]], max_new_tokens=30, eos_token_id=[], on_tokens=stop)
    assert result.interrupted and result.tokens == [seen]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(input_ids=[[]]), "input_ids has no tokens"),
        (dict(input_ids=torch.zeros(1, 2)), "input_ids is torch.float32 of shape"),
        (dict(max_new_tokens=0), "max_new_tokens is 0, expected 1 or more"),
        (dict(temperature=-1), "temperature is -1, expected 0.0 to"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(draft="ngram"), "draft is 'ngram', expected 'lookup'"),
        (dict(draft="layers:1-9"), "layer 3 is to be left out"),
        (dict(draft="lookup", input_ids=[[1], [2]]), "draft is given with 2 sequences"),
        (dict(input_ids=[[500]]), "a token of ids is 500"),
    ],
)
def test_refuses(changes: dict[str, Any], words: str) -> None:
    options: dict[str, Any] = dict(input_ids=[[5, 6]], max_new_tokens=4) | changes
    with pytest.raises(ValueError, match=words):
        generate(made(), **options)


def test_figures_of_nothing() -> None:
    assert Generation([[]]).tokens_per_second == 0.0

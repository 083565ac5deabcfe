"""Rotary tables from a model's configuration: its base, and how it reaches beyond what it was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

DEFAULT_THETA = 10_000.0


class RopeFrequencies(NamedTuple):
    """What a pair of channels turns by from one position to the next, float32 [rotary_dim / 2], and what cos
    and sin are multiplied with."""

    inv_freq: torch.Tensor
    attention_scaling: float


class _Rope(NamedTuple):
    """What of a configuration counts."""

    kind: str
    given: Mapping[str, Any]  # of this kind
    theta: float
    head_dim: int
    dim: int  # that turn
    longest: int | None  # max_position_embeddings

    def number(self, name: str) -> float:
        """A positive number that the kind needs.

        Raises:
            ValueError: none there.
        """
        value = self.given.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} of rope {self.kind!r} is {value!r}, expected a positive number")
        return value

    def numbers(self, name: str) -> torch.Tensor:
        """One for each pair."""
        value = self.given.get(name)
        if not isinstance(value, (list, tuple)) or len(value) != self.pairs:
            found = len(value) if isinstance(value, (list, tuple)) else value
            raise ValueError(f"{name} of rope {self.kind!r} is {found!r}, expected {self.pairs} numbers")
        return torch.tensor(value, dtype=torch.float32, device="cpu")

    @property
    def pairs(self) -> int:
        return -(-self.dim // 2)

    def trained(self) -> float:
        """Positions that the model was trained on, before it was stretched."""
        if self.given.get("original_max_position_embeddings") is None and self.longest is not None:
            return self.longest
        return self.number("original_max_position_embeddings")

    def stretched(self) -> int:
        if self.longest is None:
            raise ValueError(f"max_position_embeddings is missing, which rope {self.kind!r} needs")
        return self.longest

    def exponents(self, over: int | None = None) -> torch.Tensor:
        """Of theta: 0 to nearly 1, a step a pair."""
        even = torch.arange(0, self.dim, 2, dtype=torch.int64, device="cpu").float()
        return even / (self.dim if over is None else over)

    def powers(self, theta: float | torch.Tensor | None = None) -> torch.Tensor:
        power: torch.Tensor = (self.theta if theta is None else theta) ** self.exponents()
        return power


def _default(r: _Rope, length: int | None) -> RopeFrequencies:
    return RopeFrequencies(1.0 / r.powers(), 1.0)


def _linear(r: _Rope, length: int | None) -> RopeFrequencies:
    """Positions are pressed together (kaiokendev, 2023)."""
    return RopeFrequencies(1.0 / r.powers() / r.number("factor"), 1.0)


def _dynamic(r: _Rope, length: int | None) -> RopeFrequencies:
    """The base grows with the length, beyond what was trained (NTK-aware; bloc97 and emozilla, 2023)."""
    factor, longest = r.number("factor"), r.stretched()
    length = longest if length is None else max(length, longest)
    grown = r.theta * ((factor * length / longest) - (factor - 1)) ** (r.dim / (r.dim - 2))
    return RopeFrequencies(1.0 / r.powers(grown), 1.0)


def _llama3(r: _Rope, length: int | None) -> RopeFrequencies:
    """Waves longer than the training are stretched, short ones left, a slope between (Llama 3.1, 2024)."""
    factor, low, high = (r.number(n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = r.trained()
    plain = 1.0 / r.powers()
    wave = 2 * math.pi / plain
    far = wave > trained / low
    made = torch.where(far, plain / factor, plain)
    slope = (trained / wave - low) / (high - low)
    between = (1 - slope) * made / factor + slope * made
    return RopeFrequencies(torch.where(~far & ~(wave < trained / high), between, made), 1.0)


def _yarn(r: _Rope, length: int | None) -> RopeFrequencies:
    """Pairs that turn often keep their frequency, those that turn less than once are stretched, with a ramp
    between, and scores grow a little (YaRN: Peng et al., 2023)."""
    trained = r.trained()
    factor = r.stretched() / trained if r.given.get("factor") is None else r.number("factor")

    def temperature(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    scaling = r.given.get("attention_factor")
    if scaling is None:
        over, under = r.given.get("mscale"), r.given.get("mscale_all_dim")
        scaling = float(temperature(over) / temperature(under)) if over and under else temperature(1)
    fast, slow = r.given.get("beta_fast") or 32, r.given.get("beta_slow") or 1

    def pair(turns: float) -> float:
        """The pair, as a fraction, that turns so often over what was trained."""
        return (r.dim * math.log(trained / (turns * 2 * math.pi))) / (2 * math.log(r.theta))

    first, last = pair(fast), pair(slow)
    if r.given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, r.dim - 1)
    width = last - first if last != first else (last + 0.001) - first
    ramp = ((torch.arange(r.dim // 2, dtype=torch.float32, device="cpu") - first) / width).clamp(0, 1)
    kept, powers = 1 - ramp, r.powers()
    stretched = 1.0 / (factor * powers)
    return RopeFrequencies(stretched * (1 - kept) + 1.0 / powers * kept, scaling)


def _longrope(r: _Rope, length: int | None) -> RopeFrequencies:
    """Each pair has a factor of its own that was searched for, one set for lengths up to the trained and one
    beyond (LongRoPE: Ding et al., 2024)."""
    trained = r.trained()
    factor = r.stretched() / trained if r.given.get("factor") is None else r.number("factor")
    scaling = r.given.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    own = r.numbers("long_factor" if length and length > trained else "short_factor")
    return RopeFrequencies(1.0 / (own * r.powers()), scaling)


KINDS: dict[str, Callable[[_Rope, int | None], RopeFrequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _read(config: Any, layer_type: str | None) -> _Rope:
    c: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    given = c.get("rope_parameters") or c.get("rope_scaling") or {}
    nested = {name: value for name, value in given.items() if isinstance(value, Mapping)}
    if nested:  # by the type of layer
        if layer_type not in nested:
            raise ValueError(f"layer_type is {layer_type!r}, expected one of {', '.join(nested)}")
        given = nested[layer_type]
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in KINDS:
        raise ValueError(f"rope_type is {kind!r}, expected one of {', '.join(KINDS)}")
    original = c.get("original_max_position_embeddings")
    if original is not None:  # Phi-3 says it beside, and means it
        given = {**given, "original_max_position_embeddings": original}
    head_dim = c.get("head_dim") or _whole(c, "hidden_size") // _whole(c, "num_attention_heads")
    theta = given.get("rope_theta") or c.get("rope_theta") or DEFAULT_THETA
    share = given.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0
    dim = int(head_dim * share)
    if not 2 <= dim <= head_dim or not theta > 1:
        raise ValueError(
            f"{dim} of {head_dim} channels turn at a rope_theta of {theta}, expected 2 or more, and above 1"
        )
    return _Rope(kind, given, theta, head_dim, dim, c.get("max_position_embeddings"))


def _whole(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive whole number")
    return value


def rope_frequencies(
    config: Mapping[str, Any] | Any, length: int | None = None, *, layer_type: str | None = None
) -> RopeFrequencies:
    """By what each pair of channels turns from position to position, of a model's configuration: the rotary
    embedding as it was trained, or stretched to longer texts by "linear", "dynamic", "llama3", "yarn" or
    "longrope"; all of a head's channels, or the share that partial_rotary_factor says. The same bits as
    transformers' own.

    Args:
        config: a transformers configuration, or its config.json as a dict: rope_parameters, or rope_scaling
            and rope_theta of older files; head_dim, or hidden_size and num_attention_heads;
            max_position_embeddings where the kind needs it.
        length: tokens that there will be; for "dynamic" and "longrope", which change with it.
        layer_type: where layers differ ("full_attention", "sliding_attention": Gemma 3).

    Raises:
        ValueError: an unknown kind, a number that it needs and that is missing.
    """
    rope = _read(config, layer_type)
    return KINDS[rope.kind](rope, length)


def rope_tables(
    config: Mapping[str, Any] | Any,
    length: int,
    *,
    layer_type: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, rotary_dim / 2], as `bitfuse.rope` and the attention ops take them, of the
    positions 0 to length - 1. Angles are float32, as in transformers.

    Args:
        config, layer_type: as in `bitfuse.rope_frequencies`, which is asked for this length.
        length: positions.
        device, dtype: of the tables.

    Raises:
        ValueError: as `bitfuse.rope_frequencies`; a length below 0.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise ValueError(f"length is {length!r}, expected a whole number of 0 or more")
    inv_freq, scaling = rope_frequencies(config, length, layer_type=layer_type)
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = positions[:, None] * inv_freq.to(positions.device)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)

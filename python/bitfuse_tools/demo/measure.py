"""What the demo measures: bytes, time, and how far the embeddings move."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import bitfuse
import torch
from bitfuse.models.quantization import model_bytes
from bitfuse.weights.checks import check_shape
from bitfuse.weights.formats import Format, get_format

from .embedder import DemoError, Embedder
from .sentences import LANGUAGES, TRIPLES


@dataclass
class Variant:
    """One row of the table: the model in a float dtype (format is None) or with few-bit linear layers."""

    name: str
    format: str | None
    dtype: torch.dtype
    model: torch.nn.Module
    linear_names: tuple[str, ...]
    few_bit_names: tuple[str, ...] = ()
    weight_error: float = 0.0

    @property
    def model_bytes(self) -> int:
        """Parameters and buffers of the whole model, embeddings and norms too; tied ones once."""
        return model_bytes(self.model)

    @property
    def linear_bytes(self) -> int:
        """Weights and biases of the linear layers alone, with scales and zero points."""
        return model_bytes(torch.nn.ModuleList(self.model.get_submodule(name) for name in self.linear_names))


def linear_names(model: torch.nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))


def float_variant(base: torch.nn.Module, dtype: torch.dtype) -> Variant:
    """The model as it is, in a float dtype; in float32 it is the model itself."""
    model = base if dtype is torch.float32 else copy.deepcopy(base).to(dtype)
    return Variant(short(dtype), None, dtype, model, linear_names(base))


def parse_format(text: str) -> Format:
    """A format by its name, with another group size after a colon: "int4:32". Raises ValueError."""
    name, colon, group = text.partition(":")
    if colon and not group.isdecimal():
        raise ValueError(f"{text!r} has the group size {group!r}, expected a number, as in int4:32")
    return get_format(name, group_size=int(group) if colon else None)


def group_size_of(text: str, format: Format) -> int | None:
    """The group size that the text of a format asks for; None for the one that fits each layer."""
    return format.group_size if ":" in text else None


def unfit(base: torch.nn.Module, format: Format, group_size: int | None) -> tuple[list[str], str]:
    """Linear layers that a format can't have, which stay as they are, and why the last of them."""
    skip, reason = [], "there are none"
    for name in linear_names(base):
        linear = base.get_submodule(name)
        n, k = int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]
        try:
            check_shape((n, k), format.fitted(k) if group_size is None else format)
        except ValueError as error:
            skip.append(name)
            reason = str(error)
    return skip, reason


def few_bit_variant(base: torch.nn.Module, format: str, dtype: torch.dtype) -> Variant:
    """A copy with few-bit linear layers. The codes come from the float32 weights, whatever dtype runs."""
    fmt = parse_format(format)
    names = linear_names(base)
    group_size = group_size_of(format, fmt)
    skip, reason = unfit(base, fmt, group_size)
    model = copy.deepcopy(base)
    try:
        report = bitfuse.quantize_(model, fmt, skip=skip, progress=False, group_size=group_size)
    except (TypeError, ValueError) as error:
        raise DemoError(f"{format}: {str(error).splitlines()[0]}") from error
    few_bit = tuple(n for n, module in model.named_modules() if isinstance(module, bitfuse.nn.Linear))
    if not few_bit:
        raise DemoError(
            f"{format}: none of the model's {len(names)} linear layers can be quantised: {reason}"
        )
    return Variant(format, format, dtype, model.to(dtype), names, few_bit, report.worst_relative_error)


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


@dataclass
class BackendUse:
    """Who served the few-bit layers that ran: layers by backend, and why earlier backends did not serve."""

    layers: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if len(self.layers) == 1:
            return next(iter(self.layers))
        return " + ".join(f"{name} {count}" for name, count in self.layers.most_common())


def backends_used(variant: Variant, embedder: Embedder, tokens: dict[str, torch.Tensor]) -> BackendUse:
    """Ask every few-bit layer, for the very input that a pass gives it, which backend serves it."""
    use = BackendUse()

    def ask(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        explanation = bitfuse.explain(layer, inputs[0])
        use.layers[explanation.chosen] += 1
        use.refused.update(explanation.refused)

    hooks = [
        variant.model.get_submodule(name).register_forward_pre_hook(ask) for name in variant.few_bit_names
    ]
    try:
        embedder.embed(variant.model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return use


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a pass over the rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


def time_interleaved(
    passes: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    warm_up: int = 2,
    rounds: int = 25,
    at_least: int = 5,
    seconds: float = 40.0,
    tick: Callable[[float], None] = lambda done: None,
) -> list[Timing]:
    """Time every pass once a round, each round in another order: a slow moment of the machine hits all alike.

    Ends after `rounds`, or after `seconds` if `at_least` rounds are done. `tick` hears the share done.
    """

    def timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    for run in passes:
        for _ in range(warm_up):
            timed(run)
    taken: list[list[float]] = [[] for _ in passes]
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    done = 0
    try:
        while done < rounds and (done < at_least or time.perf_counter() - start < seconds):
            order = [(done + i) % len(passes) for i in range(len(passes))]
            for which in order if done % 2 == 0 else reversed(order):
                taken[which].append(timed(passes[which]))
            done += 1
            by_time = (time.perf_counter() - start) / max(seconds, 1e-9)
            tick(min(1.0, max(done / rounds, min(done / at_least, by_time))))
    finally:
        if collecting:
            gc.enable()
    return [_summary(times) for times in taken]


def _summary(times: list[float]) -> Timing:
    ordered = sorted(times)

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    return Timing(statistics.median(ordered), at(0.2), at(0.8), len(ordered))


@dataclass(frozen=True)
class Quality:
    """How the embeddings of one language compare with the float32 model's, and what they say about the pairs.

    Attributes:
        cosine_mean, cosine_worst: of each sentence's embedding to its float32 embedding.
        paraphrase, near_miss, unrelated: mean cosine of those pairs; unrelated ones are an anchor and the
            paraphrase of another.
        first: triples whose paraphrase is closer to the anchor than the near miss.
        order_kept: triples whose two pairs come in the same order as in float32.
        triples: how many there are.
        pairs: (paraphrase, near miss) cosine of each triple.
    """

    cosine_mean: float
    cosine_worst: float
    paraphrase: float
    near_miss: float
    unrelated: float
    first: int
    order_kept: int
    triples: int
    pairs: tuple[tuple[float, float], ...]


# [triples, 3, features] by language: anchor, paraphrase, near miss
Embeddings = dict[str, torch.Tensor]


def embed_triples(variant: Variant, embedder: Embedder, batch_size: int) -> Embeddings:
    """Unit vectors of every sentence."""
    out = {}
    for language in LANGUAGES:
        sentences = [
            s for t in TRIPLES if t.language == language for s in (t.anchor, t.paraphrase, t.near_miss)
        ]
        vectors = embedder.embed_all(variant.model, sentences, batch_size)
        if not bool(torch.isfinite(vectors).all()):
            raise DemoError(
                f"{variant.name}: NaN or Inf in the {language} embeddings in {short(variant.dtype)}"
            )
        out[language] = vectors.view(len(sentences) // 3, 3, -1)
    return out


def quality(own: torch.Tensor, reference: torch.Tensor) -> Quality:
    """Compare embeddings [triples, 3, features] of one language with the float32 ones."""
    own, reference = (torch.nn.functional.normalize(e.double(), dim=-1) for e in (own, reference))
    to_reference = (own * reference).sum(-1).clamp(max=1.0)
    pairs, pairs_reference = ((e[:, :1] * e[:, 1:]).sum(-1) for e in (own, reference))
    across = own[:, 0] @ own[:, 1].T
    n = len(own)
    first, first_reference = (p[:, 0] > p[:, 1] for p in (pairs, pairs_reference))
    return Quality(
        cosine_mean=float(to_reference.mean()),
        cosine_worst=float(to_reference.min()),
        paraphrase=float(pairs[:, 0].mean()),
        near_miss=float(pairs[:, 1].mean()),
        unrelated=float((across.sum() - across.trace()) / (n * n - n)),
        first=int(first.sum()),
        order_kept=int((first == first_reference).sum()),
        triples=n,
        pairs=tuple((float(p), float(m)) for p, m in pairs.tolist()),
    )

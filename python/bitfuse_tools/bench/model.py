"""`bitfuse bench model`: tokens a second of a whole language model on the CPU, beside who else runs the file.

Every contender reads the same prompt and is given the same tokens, one process, rounds interleaved, medians.
A token's bytes are those of the weights that a step reads and of the keys and values that it sees.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import bitfuse
import torch
from bitfuse.models.decoder import PARTS, Decoder, Unserved

from ..generation import DTYPES, load
from . import limits, results
from .table import columns
from .timing import Effort, device_name, measure_ceiling

FILE = "model.json"
PEERS = ("llama.cpp", "transformers", "modules")


@dataclass(frozen=True)
class ModelOptions:
    """What is measured.

    Attributes:
        model: a .gguf file or a folder.
        tokens: that are decoded, after `context` of them; prompt: tokens of the prefill.
        dtypes, caches: of bitfuse.
        against: of PEERS; None for those that are installed.
    """

    model: Path
    tokens: int = 128
    context: int = 16
    prompt: int = 512
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    caches: tuple[str, ...] = ("none",)
    rounds: int = 5
    threads: int | None = None
    against: tuple[str, ...] | None = None


@dataclass
class Contender:
    """Who runs the model.

    Attributes:
        read: takes a prompt and forgets what was before; step: takes one token.
        bytes_per_token: None where they are not known.
    """

    name: str
    read: Callable[[list[int]], None]
    step: Callable[[int], None]
    bytes_per_token: float | None = None
    decoder: Decoder | None = None
    decode: list[float] = field(default_factory=list)  # tokens a second, of each round
    prefill: list[float] = field(default_factory=list)


def contenders(options: ModelOptions) -> Iterator[Contender]:
    """Those that are here; a peer that is not installed is left out unless it was asked for.

    Raises:
        ValueError: a peer that is not known, or is asked for and is not installed.
    """
    asked = options.against
    if asked is not None and (wrong := set(asked) - {*PEERS, "none"}):
        raise ValueError(f"against is {wrong.pop()!r}, expected {', '.join(PEERS)} or none")
    room = max(options.prompt, options.context + options.tokens)
    for dtype in options.dtypes:
        model, _ = load(options.model, DTYPES[dtype])
        for cache in options.caches:
            yield _native(model, f"bitfuse, {dtype}, cache {cache}", room, cache, options)
        if dtype == options.dtypes[0] and (asked is None or "modules" in asked):
            yield _modules(model, f"bitfuse's layers in transformers, {dtype}")
    if asked is None or "transformers" in asked:
        yield _modules(_dense(options.model), "transformers, bfloat16")
    if (asked is None or "llama.cpp" in asked) and options.model.suffix == ".gguf":
        try:
            yield _llama(options.model, room)
        except ImportError:
            if asked is not None:
                raise ValueError("llama.cpp is asked for: pip install llama-cpp-python") from None


def _native(model: Any, name: str, room: int, cache: str, options: ModelOptions) -> Contender:
    decoder = Decoder(model, max_len=room, cache=cache)

    def read(ids: list[int]) -> None:
        decoder.reset()
        decoder.prefill(torch.tensor([ids], dtype=torch.int64, device="cpu"))

    def step(token: int) -> None:
        decoder.step(torch.tensor([[token]], dtype=torch.int64, device="cpu"), out=out).argmax()

    out = torch.empty(1, decoder.vocabulary, dtype=decoder.dtype, device="cpu")
    seen = options.context + options.tokens / 2
    nbytes = decoder.weight_bytes + decoder.cache_bytes * seen / room
    return Contender(name, read, step, nbytes, decoder)


def _modules(model: Any, name: str) -> Contender:
    from transformers import DynamicCache

    state: dict[str, Any] = {}

    @torch.inference_mode()
    def read(ids: list[int]) -> None:
        state["cache"] = DynamicCache(config=model.config)
        model(
            torch.tensor([ids], dtype=torch.int64, device="cpu"),
            past_key_values=state["cache"],
            use_cache=True,
            logits_to_keep=1,
        )

    @torch.inference_mode()
    def step(token: int) -> None:
        out = model(
            torch.tensor([[token]], dtype=torch.int64, device="cpu"),
            past_key_values=state["cache"],
            use_cache=True,
        )
        out.logits.argmax()

    return Contender(name, read, step)


def _dense(path: Path) -> Any:
    """The model in bfloat16."""
    model, _ = load(path, torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, bitfuse.nn.Linear):
            dense = torch.nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None, dtype=torch.bfloat16
            )
            with torch.no_grad():
                dense.weight.copy_(module.weight.dequantize())
                if module.bias is not None:
                    dense.bias.copy_(module.bias)
            model.set_submodule(name, dense)
    return model


def _llama(path: Path, room: int) -> Contender:
    import llama_cpp

    llama = llama_cpp.Llama(
        str(path), n_ctx=room, n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(),
        n_batch=512, verbose=False,
    )  # fmt: skip

    def read(ids: list[int]) -> None:
        llama.reset()
        llama.eval(ids)

    return Contender(f"llama.cpp ({llama_cpp.__version__})", read, lambda token: llama.eval([token]))


def measure(options: ModelOptions, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All contenders, a record of them.

    Raises:
        ValueError: an option out of range, no contender of bitfuse that can run.
    """
    for name in ("tokens", "context", "prompt", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}, expected 1 or more")
    for dtype in options.dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        found = list(contenders(options))
    except Unserved as error:
        raise ValueError(f"{options.model}: {error}") from error
    random = torch.Generator(device="cpu").manual_seed(0)
    vocabulary = next(c.decoder.vocabulary for c in found if c.decoder is not None)
    ids = torch.randint(
        vocabulary,
        (options.prompt + options.context + options.tokens,),
        generator=random,
        dtype=torch.int64,
        device="cpu",
    ).tolist()
    for number in range(options.rounds + 1):  # the first warms up, and its times are dropped
        for c in found:
            progress(f"round {number} of {options.rounds}: {c.name}")
            decode, prefill = _round(c, ids, options)
            if number:
                c.decode.append(decode)
                c.prefill.append(prefill)
    device = device_name("cpu")
    known = limits.of_folder(results.folder(device)).ceiling()
    measured = measure_ceiling([], Effort(rounds=2, cold_mb=128), "cpu")
    bandwidth = max(measured.bytes_per_second, known.bytes_per_second if known is not None else 0.0)
    return {
        "device": device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": options.model.name,
        "threads": torch.get_num_threads(),
        "isa": bitfuse.core.cpu.extension.isa(),
        "versions": {
            name: _version(name) for name in ("bitfuse", "torch", "transformers", "llama-cpp-python")
        },
        "tokens": options.tokens,
        "context": options.context,
        "prompt": options.prompt,
        "rounds": options.rounds,
        "bytes_per_s": bandwidth,
        "rows": [_row(c, bandwidth, ids, options) for c in found],
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _round(c: Contender, ids: list[int], options: ModelOptions) -> tuple[float, float]:
    """Tokens a second: decoding, and the prompt."""
    start = time.perf_counter()
    c.read(ids[: options.prompt])
    prefill = options.prompt / (time.perf_counter() - start)
    c.read(ids[: options.context])
    start = time.perf_counter()
    for token in ids[-options.tokens :]:
        c.step(token)
    return options.tokens / (time.perf_counter() - start), prefill


def _row(c: Contender, bandwidth: float, ids: list[int], options: ModelOptions) -> dict[str, Any]:
    decode = statistics.median(c.decode)
    row: dict[str, Any] = {
        "case": c.name,
        "decode_tokens_per_s": decode,
        "prefill_tokens_per_s": statistics.median(c.prefill),
        "decode_rounds": c.decode,
        "prefill_rounds": c.prefill,
        "bytes_per_token": c.bytes_per_token,
        "share_of_bandwidth": None if c.bytes_per_token is None else decode * c.bytes_per_token / bandwidth,
        "ms_by_part": None,
    }
    if c.decoder is not None:
        c.decoder.seconds = torch.zeros(len(PARTS), dtype=torch.float64, device="cpu")
        c.read(ids[: options.context])
        c.decoder.seconds.zero_()
        start = time.perf_counter()
        for token in ids[-options.tokens :]:
            c.step(token)
        total = time.perf_counter() - start
        parts = dict(zip(PARTS, c.decoder.seconds.tolist(), strict=True))
        parts["overhead"] = max(0.0, total - sum(parts.values()))
        row["ms_by_part"] = {name: 1e3 * s / options.tokens for name, s in parts.items()}
        c.decoder.seconds = None
    return row


def lines_of(record: dict[str, Any]) -> list[str]:
    """A table, and where the time of a token goes."""
    rows = [["", "decode, tokens/s", "prefill, tokens/s", "MB a token", "of the bandwidth"]]
    for row in record["rows"]:
        nbytes, share = row["bytes_per_token"], row["share_of_bandwidth"]
        rows.append(
            [
                row["case"],
                f"{row['decode_tokens_per_s']:.1f}",
                f"{row['prefill_tokens_per_s']:.0f}",
                "" if nbytes is None else f"{nbytes / 1e6:.1f}",
                "" if share is None else f"{share:.0%}",
            ]
        )
    found = [
        f"{record['model']} on {record['device']}, {record['threads']} threads: {record['tokens']} tokens "
        f"after {record['context']}, a prompt of {record['prompt']}; {record['bytes_per_s'] / 1e9:.1f} GB/s",
        "",
        *columns(rows),
    ]
    for row in record["rows"]:
        parts = row["ms_by_part"]
        if parts is None:
            continue
        total = sum(parts.values())
        found += ["", f"{row['case']}: {total:.2f} ms a token"]
        for name, ms in parts.items():
            found.append(f"  {name:10}{ms:8.3f} ms  {'█' * round(40 * ms / total)}")
    return found

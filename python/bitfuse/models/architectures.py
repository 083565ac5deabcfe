"""What the modules of transformers' language models are called, a row an architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """A decoder whose layers are attention and a gated MLP; names are those of a layer's modules.

    Attributes:
        before_attention, before_mlp: norms of the residual stream.
        after_attention, after_mlp: norms of what a block gives, "" for none.
        of_heads: whether queries and keys are normed by head.
        qkv, out, gate_up, down: linear layers; one name of qkv or of gate_up is all of them in one.
        norm_offset: added to the weight of a norm.
    """

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    of_heads: bool = False
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    norm_offset: float = 0.0


_GEMMA = dict(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    norm_offset=1.0,
)
# by the model_type of a config; SOLAR is a Llama
ARCHITECTURES = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(of_heads=True),
    "gemma2": Architecture(**_GEMMA),  # type: ignore[arg-type]
    "gemma3_text": Architecture(**_GEMMA, of_heads=True),  # type: ignore[arg-type]
    "phi3": Architecture(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
}

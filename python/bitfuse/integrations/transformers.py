"""bitfuse's attention in transformers' models, as the attention implementation named "bitfuse"."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from ..core.dropout import new_seed
from ..ops.attention.attention import apply_attention, varlen_attention
from ..ops.attention.attention_args import AttentionArgs

NAME = "bitfuse"
log = logging.getLogger("bitfuse")


__all__ = ["register"]


def register() -> None:
    """Make transformers know `attn_implementation="bitfuse"` and `model.set_attn_implementation("bitfuse")`.

    The attention and its mask are registered both: without the second a model hands down no mask at all. A
    causal model without padding gets no mask tensor; padding, a sliding window that is shorter than the keys,
    chunks and packed sequences are a bool mask, one for all heads; where `cu_seq_lens_q` and its kin are
    given, as a collator that flattens batches does, no mask is needed (`bitfuse.varlen_attention`). Softcaps
    (Gemma 2), sinks (gpt-oss), position biases (T5), grouped heads and dropout are served.

    A query that sees no key, as padding may be, gives 0. Attention weights are never made: models that are
    asked for them return None in their place.

    Raises:
        ImportError: transformers is not installed, or has no AttentionInterface (before 4.54).
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    # torch's own: a bool mask, or None where top-left causality, or no mask at all, says the same
    AttentionMaskInterface.register(NAME, sdpa_mask)


@functools.cache
def _tell_no_weights() -> None:
    log.warning('attn_implementation "bitfuse" makes no attention weights; "eager" does')


def _longest(given: int | torch.Tensor | None, t: torch.Tensor) -> int:
    """Of the packed sequences, or more: a tensor is not waited for."""
    return given if isinstance(given, int) else t.shape[0] * t.shape[2]


def _own_sequence(
    mask: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
) -> torch.Tensor:
    """The mask, and no key of another sequence; without a mask causality, if it is asked for."""
    sequences, places = [], []
    for cu, t in ((cu_q, query), (cu_k, key)):
        place = torch.arange(t.shape[0] * t.shape[2], dtype=cu.dtype, device=cu.device)
        sequence = torch.searchsorted(cu[1:].contiguous(), place, right=True)
        from_end = cu[1:][sequence.clamp(max=max(0, cu.shape[0] - 2))] - place  # aligned at the last of each
        sequences.append(sequence.view(t.shape[0], 1, t.shape[2]))
        places.append(from_end.view(t.shape[0], 1, t.shape[2]))
    seen = sequences[0].unsqueeze(-1) == sequences[1].unsqueeze(-2)
    if mask is None:
        return seen & (places[0].unsqueeze(-1) <= places[1].unsqueeze(-2)) if causal else seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    max_length_k: int | torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in a model's attention.

    Args:
        module: the layer; its `is_causal` holds where `is_causal` is None.
        query: [batch, heads, seqlen_q, head_dim].
        key, value: [batch, kv_heads, seqlen_k, head_dim] and [..., head_dim_v].
        attention_mask: bool or float [batch or 1, heads or 1, seqlen_q or 1, seqlen_k]; None is causal
            (top-left) for a causal layer and more than one query.
        position_bias: added to the scores, [batch or 1, heads or 1, seqlen_q or 1, seqlen_k].
        softcap: `bitfuse.attention`'s.
        s_aux: [heads]: sinks.
        cu_seq_lens_q, cu_seq_lens_k: [sequences + 1]: where each of the sequences begins that are packed one
            after
            the other, rows of the batch too: a query sees keys of its own sequence only, beside what the mask
            says. Both or neither.
        max_length_q, max_length_k: the longest of them, or None.

    Returns:
        [batch, seqlen_q, heads, head_dim_v], and None in place of the weights.

    Raises:
        ValueError: a paged cache of continuous batching is handed down, or only one of cu_seq_lens_q and
            cu_seq_lens_k.
        TypeError, ValueError: as `bitfuse.attention`.
    """
    if kwargs.get("cache") is not None:
        raise ValueError(
            f"cache is a {type(kwargs['cache']).__name__}, expected None: continuous batching is not served"
        )
    if kwargs.get("output_attentions"):
        _tell_no_weights()
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
        raise ValueError("only one of cu_seq_lens_q and cu_seq_lens_k is given, expected both or neither")
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if attention_mask is None and position_bias is None:
            q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
            out = varlen_attention(
                q, k, v, cu_seq_lens_q.int(), cu_seq_lens_k.int(),
                _longest(max_length_q, query), _longest(max_length_k, key), bool(is_causal), scaling,
                softcap=float(softcap or 0.0), sinks=s_aux, dropout_p=float(dropout),
            )  # fmt: skip
            return out.unflatten(0, (query.shape[0], query.shape[2])), None
        attention_mask = _own_sequence(
            attention_mask, cu_seq_lens_q, cu_seq_lens_k, query, key, bool(is_causal)
        )
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    bias = attention_mask
    if position_bias is not None:
        if attention_mask is None:
            bias = position_bias
        elif attention_mask.dtype == torch.bool:
            bias = position_bias.masked_fill(~attention_mask, float("-inf"))
        else:
            bias = position_bias + attention_mask
    args = AttentionArgs(
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        right=0 if causal else -1,
        top_left=causal,
        softcap=float(softcap or 0.0),
        dropout_p=float(dropout),
        seed=new_seed(query) if dropout else None,
        bias=bias,
        sinks=None if s_aux is None else s_aux.float(),
    )
    out, _ = apply_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), args, True)
    return out, None

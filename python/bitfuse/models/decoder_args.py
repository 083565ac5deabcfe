"""A decoder-only language model as its native step takes it; csrc/bind/cpu_decoder.cpp reads it by field."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..ops.attention.kv_cache import CacheTensors, Rotary
from ..weights.weight import WeightTensors


class Projection(NamedTuple):
    """y = x W^T + b.

    Attributes:
        weight: in few bits, or a dense float tensor [out_features, in_features].
        bias: [out_features] of the model's dtype, or None.
    """

    weight: WeightTensors | torch.Tensor
    bias: torch.Tensor | None = None


class RmsNorm(NamedTuple):
    """x / sqrt(mean(x^2) + eps) * (offset + weight), of any float dtype."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0


class LayerArgs(NamedTuple):
    """A layer: attention and a gated MLP, each with a norm before it.

    Attributes:
        before_attention, before_mlp: of the residual stream.
        of_queries, of_keys: of each head, before rotation; or None.
        after_attention, after_mlp: of what a block gives, before it is added; or None.
        qkv: three projections, or one whose outputs are those of q, k and v.
        gate_up: two projections, or one.
        cache: contiguous.
        rotary: of all positions that there will be.
        left: keys before a query's own that it sees; -1 for all.
        sinks: float32 [heads], or None.
    """

    before_attention: RmsNorm
    of_queries: RmsNorm | None
    of_keys: RmsNorm | None
    after_attention: RmsNorm | None
    before_mlp: RmsNorm
    after_mlp: RmsNorm | None
    qkv: tuple[Projection, ...]
    out: Projection
    gate_up: tuple[Projection, ...]
    down: Projection
    cache: CacheTensors
    rotary: Rotary
    softmax_scale: float
    softcap: float = 0.0
    left: int = -1
    sinks: torch.Tensor | None = None


class DecoderArgs(NamedTuple):
    """The model.

    Attributes:
        dtype: of activations, biases and logits.
        activation: of the extension's enum.
        sequences: that the caches have room for.
        embedding: of tokens, [vocabulary, hidden], times embedding_scale.
        norm: the last one.
        logit_softcap: 0 for none.
    """

    dtype: torch.dtype
    activation: Any
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    sequences: int
    layers: tuple[LayerArgs, ...]
    embedding: Projection
    embedding_scale: float
    norm: RmsNorm
    head: Projection
    logit_softcap: float = 0.0

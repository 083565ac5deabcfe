"""AttentionArgs: what of an attention call is not q, k and v."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch

NO_WINDOW = (-1, -1)


def window_of(window_size: tuple[int, int]) -> tuple[int, int]:
    """(left, right), each -1 or more.

    Raises:
        TypeError: not a pair of ints.
    """
    try:
        left, right = window_size
        return max(operator.index(left), -1), max(operator.index(right), -1)
    except (TypeError, ValueError):
        raise TypeError(f"window_size is {window_size!r}, expected two ints, (left, right)") from None


MAX_HEAD_DIM = 512  # of the reference and the C++ kernels


class AttentionArgs(NamedTuple):
    """How queries meet keys.

    Query i of seqlen_q and key j of seqlen_k stand at distance d = j - (i + shift), where shift is seqlen_k -
    seqlen_q (bottom-right aligned), or 0 if top_left. The key is seen when -left <= d <= right, a negative
    left or right meaning no bound; causal is right = 0. Its logit is

        z = cap(softmax_scale * q_i . k_j) - alibi_slopes * |d| + bias,   cap(z) = softcap * tanh(z / softcap)

    Keys of the prefix are seen by every query, without slope and bias; a sink is one more logit, with no
    value. The probability of a pair is then kept or dropped.

    Attributes:
        softmax_scale: of q k^T.
        left, right: the window; -1 for no bound.
        top_left: how two lengths are aligned.
        softcap: 0 for none.
        dropout_p: probability that a probability is dropped.
        seed: int64, one element; row (b * heads + h) * seqlen_q + i and column j of the mask are the pair's
            (`bitfuse.core.dropout`), b and seqlen_q being 0 and the total of queries where sequences are
            packed, and j counting the prefix first.
        bias: [batch or 1, heads or 1, seqlen_q or 1, seqlen_k or 1]: floats that are added, or bool, False
            for a key that is not seen; None with packed sequences.
        alibi_slopes: float32 [heads] or [batch, heads].
        sinks: float32 [heads].
        prefix_k, prefix_v: [batch, prefix, kv_heads, head_dim] and [..., head_dim_v], of q's dtype.
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1]: where each packed sequence begins; None: one tensor
            dimension is the batch.
        max_seqlen_q, max_seqlen_k: bounds of the packed lengths, for the launch.
    """

    softmax_scale: float
    left: int = -1
    right: int = -1
    top_left: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    prefix_k: torch.Tensor | None = None
    prefix_v: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

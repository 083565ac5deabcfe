"""Which elements dropout keeps, from a seed and a place: `bitfuse.core.dropout` in Triton."""

from __future__ import annotations

from ...core import dropout
from .launch import jit, tl

FIRST = SECOND = GOLDEN = None
if tl is not None:
    FIRST, SECOND, GOLDEN = map(tl.constexpr, (dropout.FIRST, dropout.SECOND, dropout.GOLDEN))


@jit
def _mix(v):
    v = (v ^ (v >> 16)) * FIRST
    v = (v ^ (v >> 15)) * SECOND
    return v ^ (v >> 16)


@jit
def row_keys(seed, rows):
    """The two words of each row that `keep` wants (see `bitfuse.core.dropout`); anything where nothing is
    dropped."""
    first = rows.to(tl.uint32)
    second = first
    if seed is not None:
        words = tl.load(seed)
        first = _mix(first + words.to(tl.uint32))
        second = _mix(first ^ (words >> 32).to(tl.uint32) ^ GOLDEN)
    return first, second


@jit
def keep(first, second, columns, threshold):
    """Which elements survive dropout: the words of their rows and their columns, broadcast; threshold is the
    unsigned one in an int32."""
    v = columns.to(tl.uint32) ^ first
    v = (v ^ (v >> 16)) * FIRST
    v = (v ^ (v >> 15) ^ second) * SECOND
    return (v ^ (v >> 16)) >= threshold.to(tl.uint32, bitcast=True)


def threshold_of(dropout_p: float) -> int:
    """The unsigned threshold in an int32, the one type that Triton gives it whatever its value."""
    t = dropout.threshold(dropout_p) if dropout_p else 0
    return t - 2**32 if t >= 2**31 else t

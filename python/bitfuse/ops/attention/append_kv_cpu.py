"""append_kv on the CPU: tensors to addresses. The kernel: csrc/cpu/attention/append_kv.cpp."""

from __future__ import annotations

from typing import Any

import torch

from ...core.cpu import DTYPES, missing
from ...core.cpu import extension as _cpu
from .kv_cache import CACHE_FORMATS, CacheTensors, Rotary

FORMAT_NUMBERS = {name: i for i, name in enumerate(CACHE_FORMATS)}  # CacheFormat
NO_ROWS = (0, 0, 0, 0)
_NO_ROTARY = (0, 0, 0, 0, 0, 0, 0, 0, 0)


def supports(*args: Any) -> str | None:
    """None when `run` can serve the call, which is always where it is built."""
    return missing


def dense_rows(t: torch.Tensor) -> torch.Tensor:
    """t with a dense last dimension; a copy where it has none."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def rows(t: torch.Tensor) -> tuple[int, int, int, int]:
    """Address, and strides of batch, token and head."""
    strides = t.stride()
    return t.data_ptr(), strides[0], strides[1], strides[2]


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def cache_integers(cache: CacheTensors, batch: int, dtype: torch.dtype) -> tuple[int, ...]:
    """A cache as the bindings take it."""
    k, v, k_scales, k_offsets, v_scales, v_offsets, k_tail, v_tail, table, format, group, channels = cache
    pages, page_size, kv_heads, dim = k.shape
    if k_tail is None or v_tail is None:
        dim_v = v.shape[3]
        codes = (_address(k_scales), 0, _address(v_scales), 0, 0, 0)
    else:
        dim, dim_v = k_tail.shape[3], v_tail.shape[3]
        assert k_scales is not None and v_scales is not None
        assert k_offsets is not None and v_offsets is not None
        codes = (
            k_scales.data_ptr(), k_offsets.data_ptr(), v_scales.data_ptr(), v_offsets.data_ptr(),
            k_tail.data_ptr(), v_tail.data_ptr(),
        )  # fmt: skip
    return (
        FORMAT_NUMBERS[format], DTYPES[dtype], batch, pages, page_size, kv_heads, dim, dim_v, group,
        channels, *rows(k), *rows(v), *codes, 0 if table is None else table.data_ptr(),
        -1 if table is None else table.shape[1],
    )  # fmt: skip


def rotary_integers(rotary: Rotary, inverse: bool = False) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Rotary embedding as the bindings take it, and the tensors that must outlive the call."""
    if rotary.cos is None or rotary.sin is None:
        return _NO_ROTARY, ()
    cos, sin = rotary.cos.contiguous(), rotary.sin.contiguous()
    positions = None if rotary.positions is None else rotary.positions.contiguous()
    return (
        cos.data_ptr(), sin.data_ptr(), DTYPES[cos.dtype], cos.shape[1], cos.shape[0], _address(positions),
        0 if positions is None else positions.shape[0], rotary.interleaved, inverse,
    ), (cos, sin, positions)  # fmt: skip


def run(
    k: torch.Tensor, v: torch.Tensor, cache: CacheTensors, cache_seqlens: torch.Tensor, rotary: Rotary
) -> None:
    """Write new keys and values. The arguments have passed the op's check.

    Raises:
        ValueError: a cache that is full, a page or a position that is not there; nothing has been written.
    """
    k, v, seqlens = dense_rows(k), dense_rows(v), cache_seqlens.contiguous()
    turn, _kept = rotary_integers(rotary)
    _cpu.append_kv(
        cache_integers(cache, k.shape[0], k.dtype), seqlens.data_ptr(), rows(k), rows(v), k.shape[1], turn
    )

"""Packing is exact at every width, low bits first, and a row shard is a shard."""

from __future__ import annotations

import pytest
import torch
from bitfuse.weights.packing import pack, unpack


@pytest.mark.parametrize("bits", range(1, 9))
def test_round_trip(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 40), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, 5 * bits)
    assert torch.equal(unpack(packed, bits), codes)
    assert torch.equal(pack(codes[2:4], bits), packed[2:4])


@pytest.mark.parametrize("bits", range(1, 9))
def test_low_bits_first(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 24), dtype=torch.uint8)
    for row, octets in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        stream = sum(code << (bits * k) for k, code in enumerate(row))
        assert octets == list(stream.to_bytes(len(row) * bits // 8, "little"))


def test_columns_not_a_multiple_of_8() -> None:
    with pytest.raises(ValueError, match="codes has 12 columns, expected a multiple of 8"):
        pack(torch.zeros(2, 12, dtype=torch.uint8), 4)

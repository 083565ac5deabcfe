"""Names of GPUs and architectures."""

from __future__ import annotations

import pytest
from bitfuse.core.gpus import ARCHS, GPUS, TYPICAL, find


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("h100", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("a6000", "rtxa6000"),
        ("L4", "l4"),
        ("l40s", "l40s"),
        ("sm_90a", "h100"),
        ("compute_80", "a100"),
        ("7.5", "t4"),
        ("12.0", "rtx5090"),
        ("100", "b200"),
    ],
)
def test_find(name: str, card: str) -> None:
    assert find(name).name == card


@pytest.mark.parametrize("name", ["", "gtx1080", "sm_61", "91", "mi300"])
def test_unknown(name: str) -> None:
    with pytest.raises(ValueError, match=r"architectures: sm_75, .*sm_90a.*cards: t4, a100"):
        find(name)


def test_tables_agree() -> None:
    assert set(TYPICAL) == set(ARCHS) == {gpu.capability for gpu in GPUS.values()}
    assert all(GPUS[card].capability == number for number, card in TYPICAL.items())
    assert all(find(gpu.name) is gpu for gpu in GPUS.values())

"""Without a GPU the CUDA and Triton kernels run on the simulator, which must be in place before torch is."""

from __future__ import annotations

import cusim

cusim.load_if_no_gpu()

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)

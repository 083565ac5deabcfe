"""What C++, CUDA and Python must agree on is the same in all that are here."""

from __future__ import annotations

from typing import Any

import pytest
from bitfuse.core import activations, limits
from bitfuse.core.cpu import extension
from bitfuse.core.cuda import cuda


@pytest.fixture(params=["cpu", "cuda"])
def native(request: pytest.FixtureRequest) -> Any:
    found = extension if request.param == "cpu" else cuda.module
    if found is None:
        pytest.skip("the extension is not built")
    return found


def test_limits(native: Any) -> None:
    names = [name for name in vars(limits) if name.isupper()]
    assert names
    assert {name: getattr(native, name) for name in names} == {name: getattr(limits, name) for name in names}


def test_activations(native: Any) -> None:
    assert tuple(name.lower() for name in native.Activation.__members__) == activations.ACTIVATIONS

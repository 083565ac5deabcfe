"""Poisoned outputs: a GPU's are tried on the CPU, which has the same tensors."""

from __future__ import annotations

import pytest
import torch
from bitfuse_tools.gpu.poison import Poisoned


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64]
)
def test_a_store_beside_an_output_is_found(dtype: torch.dtype) -> None:
    mode = Poisoned()
    out = torch.empty(3, 5, dtype=dtype).t()
    made = mode._on_gpu(out)
    assert (made.shape, made.stride(), made.dtype) == (out.shape, out.stride(), dtype) and made._base is None
    assert made.data_ptr() % 16 == 0
    if dtype.is_floating_point:
        assert torch.isnan(made.float()).all()
    made.copy_(torch.ones(5, 3).to(dtype))
    mode.check()
    for place, name in ((-1, "before"), (15, "behind")):
        made = mode._on_gpu(out)
        flat = torch.empty(0, dtype=dtype).set_(
            made.untyped_storage(), made.storage_offset() + place, (1,), (1,)
        )
        flat.copy_(torch.ones(1).to(dtype))
        with pytest.raises(AssertionError, match=f"bytes {name} an output"):
            mode.check()
        mode.check()  # of what was made since


def test_outputs_on_the_cpu_are_nan_and_guarded() -> None:
    guarded: list[torch.Tensor] = []

    def guard(t: torch.Tensor) -> torch.Tensor:
        guarded.append(t)
        return t

    with Poisoned(guard):
        made = [torch.empty(3), torch.empty_like(torch.zeros(2)), torch.zeros(1).new_empty(4)]
        whole = torch.zeros(3)
    assert len(guarded) == 3 and all(t.isnan().all() for t in made) and not whole.isnan().any()
    assert mode_of_no_elements().numel() == 0


def mode_of_no_elements() -> torch.Tensor:
    return Poisoned()._on_gpu(torch.empty(0, 4))

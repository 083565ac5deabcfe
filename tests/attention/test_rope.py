"""rope; and what every op that rotates says of positions."""

from __future__ import annotations

from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.ops.attention.kv_cache import Rotary, rotate
from bitfuse.ops.attention.rope import rope_op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("target", targets("cpp", "triton", "reference"), ids=str)
def test_rope(target: Target) -> None:
    for dtype in DTYPES:
        for half, interleaved, positions in ((16, False, None), (5, True, (1, 9)), (3, False, (2, 9))):
            x = target.place(torch.randn(2, 3, 9, 40).to(dtype))[0].transpose(1, 2)
            cos, sin = target.place(*torch.randn(2, 50, half))
            at = None if positions is None else torch.randint(50, positions, dtype=torch.int32)
            got = target.run(rope_op, x, Rotary(cos, sin, at, interleaved), False)
            rows = torch.arange(9).unsqueeze(0) if at is None else at.long()
            exact = rotate(x.double(), cos.double()[rows], sin.double()[rows], interleaved)
            assert_accurate(got, exact, rotate(x, cos[rows], sin[rows], interleaved))


def test_rope_is_that_of_llama_and_has_a_gradient() -> None:
    x = torch.randn(2, 5, 3, 16, requires_grad=True)
    angles = torch.outer(torch.arange(7.0), 10000 ** (-torch.arange(0, 16, 2) / 16))
    cos, sin = angles.cos(), angles.sin()
    doubled = torch.cat([cos, cos], -1)[:5, None], torch.cat([sin, sin], -1)[:5, None]
    half = torch.cat([-x[..., 8:], x[..., :8]], -1)
    wanted = x * doubled[0] + half * doubled[1]
    got = bitfuse.rope(x, cos, sin)
    torch.testing.assert_close(got, wanted)
    grad = torch.randn_like(x)
    for a, b in zip(torch.autograd.grad(got, x, grad), torch.autograd.grad(wanted, x, grad), strict=True):
        torch.testing.assert_close(a, b)
    torch.library.opcheck(torch.ops.bitfuse.rope.default, (x.detach(), cos, sin, None, True, False))
    with pytest.raises(ValueError, match="positions"):
        bitfuse.rope(x, cos, sin, torch.tensor([0, 1, 2, 3, 7]))
    with pytest.raises(ValueError, match=r"rotary_cos has shape \[7, 9\].*rotary_dim 2 to 16"):
        bitfuse.rope(x, torch.randn(7, 9), torch.randn(7, 9))
    with pytest.raises(ValueError, match="rotary_cos has 7 positions, expected 8"):
        bitfuse.rope(torch.randn(1, 8, 1, 16), cos, sin)


@pytest.mark.parametrize("backend", ("cpp", "reference"))
@pytest.mark.parametrize("bad", (2**32, 2**32 + 1, 2**31, -(2**32), 2**63 - 1, -1, 20))
def test_positions_never_wrap(bad: int, backend: str) -> None:
    cos, sin = torch.randn(2, 20, 16)
    x, at = torch.randn(2, 3, 2, 32), torch.tensor([0, bad, 1])
    cache = bitfuse.KVCache(2, 16, 2, 32, dtype=torch.float32)
    tables: dict[str, Any] = dict(rotary_cos=cos, rotary_sin=sin, positions=at)
    with bitfuse.use_backend(backend):
        for call in (
            lambda: bitfuse.rope(x, cos, sin, at),
            lambda: cache.append(x, x, **tables),
            lambda: bitfuse.append_kv(x, x, cache, **tables),
            lambda: bitfuse.decode_attention(x, cache, k=x, v=x, **tables),
        ):
            with pytest.raises(ValueError, match=f"positions (is|holds) {bad}, expected 0 to"):
                call()
    assert not cache.seqlens.any()
    if abs(bad) > 2**31:  # where nobody looks it is a row that is not there
        from torch._subclasses.fake_tensor import FakeTensorMode

        compiled = torch.compile(lambda x, at: bitfuse.rope(x, cos, sin, at), backend="eager", fullgraph=True)
        with pytest.raises(ValueError, match="positions"):
            compiled(x, at)
        with FakeTensorMode(allow_non_fake_inputs=True):
            bitfuse.rope(x, cos, sin, torch.zeros(3, dtype=torch.int64))

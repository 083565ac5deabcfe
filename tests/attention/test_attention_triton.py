"""What is the Triton backend's own: its loops over many tiles, its addresses, what it compiles, and random
draws of features on a GPU; of fewer kinds on the simulator, where every kind is minutes of compilation."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from accuracy import Errors
from backends import Target, targets
from bitfuse.core.device import Device
from bitfuse.kernels.core.launch import HANDLES
from bitfuse.ops.attention.attention import (
    Wanted,
    _reference,
    _reference_backward,
    attention_backward,
    attention_op,
)
from bitfuse.ops.attention.attention_args import AttentionArgs
from test_attention import DRAWS, KINDS, check, kind

pytest.importorskip("triton")
from bitfuse.kernels.attention import attention as backend
from bitfuse.kernels.attention import attention_backward as backward

TARGETS = pytest.mark.parametrize("target", targets("triton"), ids=str)
# on the simulator, of test_attention.py's kinds: how many draws of each; together every feature and dtype
DRAWN = {
    80: {3: 10, 5: 10, 10: 6, 13: 10, 14: 4, 15: 10},
    90: {2: 10, 8: 10, 11: 4, 17: 2, 19: 10},
}


def drawn() -> list[Any]:
    """Each target with each of its kinds, and how many draws of it."""
    return [
        pytest.param(target, of_kind, draws, id=f"{target}-{of_kind}")
        for target in targets("triton")
        for of_kind, draws in (
            DRAWN[target.sm] if target.sm else dict.fromkeys(range(KINDS), DRAWS // KINDS)
        ).items()
    ]


@pytest.mark.parametrize(("target", "of_kind", "draws"), drawn())
def test_draws(target: Target, of_kind: int, draws: int) -> None:
    """On a GPU all 500 draws of the 20 kinds. On the simulator 86 of 11 kinds: each kind is up to a minute of
    compilation."""
    errors = Errors()
    for number in range(of_kind, draws * KINDS, KINDS):
        check(target, number, True, errors)
    errors.check(str(kind(of_kind)))


# of kinds whose draws are above and have no sinks; with a prefix, dropout, packed sequences, a window
ATOMIC = {80: {10: 3}, 90: {8: 3}}


@TARGETS
def test_draws_with_atomics(target: Target) -> None:
    """The backward that is not deterministic is as exact, in any order."""
    for of_kind, draws in (ATOMIC[target.sm] if target.sm else dict.fromkeys(range(KINDS), 5)).items():
        errors = Errors()
        for number in range(of_kind, draws * KINDS, KINDS):
            check(target, number, True, errors, deterministic=False)
        errors.check(str(kind(of_kind)))


def compare(
    target: Target,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: AttentionArgs,
    what: str,
    deterministic: bool = True,
) -> None:
    """Both directions against float64."""
    errors = Errors()
    out, lse = target.run(attention_op, q, k, v, a)
    (grad,) = target.place(torch.randn(*out.shape).to(q.dtype))
    made = target.run(attention_backward, grad, None, q, k, v, out, lse, a, Wanted(), deterministic)
    in_float64 = reference([t.cpu().double() for t in (grad, q, k, v)], a)
    in_own = reference([t.cpu() for t in (grad, q, k, v)], a)
    names = ("out", "lse", "gradient of q", "gradient of k", "gradient of v")
    for name, one, e, p in zip(names, (out, lse, *made[:3]), in_float64, in_own, strict=True):
        errors.add(name, one, e, p)
    errors.check(what)


def reference(tensors: list[torch.Tensor], a: AttentionArgs) -> list[torch.Tensor]:
    """Of grad, q, k and v: the output, lse, and the gradients of q, k and v."""
    grad, q, k, v = tensors
    out, lse = _reference(q, k, v, a)
    return [out, lse, *_reference_backward(grad, None, q, k, v, out, lse, a, Wanted(), True)[:3]]


@TARGETS
def test_many_tiles(target: Target) -> None:
    """Edges of the window on both sides of tiles that are seen whole, all of one group's heads; 300 keys are
    three tiles of the widest."""
    q, k, v = target.place(*(torch.randn(1, n, h, 64).bfloat16() for n, h in ((200, 2), (300, 1), (300, 1))))
    for left, right in ((-1, -1), (-1, 0), (230, 30)):
        compare(target, q, k, v, AttentionArgs(0.125, left, right), f"window {left, right}")
    compare(target, q, k, v, AttentionArgs(0.125), "atomics", deterministic=False)


@TARGETS
def test_scale_of_zero_and_below(target: Target) -> None:
    """A maximum of scaled logits is the scaled maximum of a positive scale alone."""
    q, k, v = target.place(*(torch.randn(1, 20, 1, 16).half() for _ in range(3)))
    for scale in (0.0, -0.3):
        compare(target, q, k, v, AttentionArgs(scale, -1, 0), f"scale {scale}")


@TARGETS
def test_far_addresses(target: Target) -> None:
    """Batches, heads and rows more than 2**31 elements apart."""
    far = 2**31 + 8
    room = torch.empty(2 * far, dtype=torch.float16, device=target.device)
    for batch, strides in ((2, (far, 64, 16, 1)), (1, (0, 64, far, 1)), (1, (0, far // 8, 16, 1))):
        q, k, v = (room[begin:].as_strided((batch, 9, 2, 16), strides) for begin in (0, 1024, 2048))
        for t in (q, k, v):
            t.copy_(torch.randn(t.shape))
        compare(target, q, k, v, AttentionArgs(0.25, -1, 0), f"strides {strides}")


@TARGETS
def test_what_it_compiles(target: Target) -> None:
    """The tensor cores' own instructions, 16 bytes a copy, and nothing in local memory."""
    HANDLES.clear()
    q, k, v = target.place(*(torch.randn(1, 70, 1, 64).half() for _ in range(3)))
    a = AttentionArgs(0.125, -1, 0)
    out, lse = target.run(attention_op, q, k, v, a)
    target.run(attention_backward, out, None, q, k, v, out, lse, a, Wanted(), True)
    capability = target.sm or 10 * torch.cuda.get_device_capability()[0]
    matmul = "wgmma.mma_async" if capability == 90 else "mma.sync"
    target.run(attention_backward, out, None, q, k, v, out, lse, a, Wanted(), False)
    handles = [handle for own in HANDLES.values() for handle in own.values()]
    assert len(handles) == 5  # forward, delta, queries, keys, fused
    for handle in handles:
        ptx = handle.asm["ptx"]
        assert ".local" not in ptx
        assert bool(re.search(r"(red|atom)\.global\.gpu\.relaxed\.add", ptx)) == (handle is handles[-1])
        if "delta" not in handle.metadata.name:
            assert matmul in ptx
            wide = re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x(\w+)", ptx)
            assert wide and set(wide) <= {"10"}, set(wide)


def test_the_table_of_tiles() -> None:
    """The tiles that a program keeps in shared memory, and those on their way, fit it. A wgmma reads the last
    stage where it lies; mma.sync has it in registers by then, and needs no room for it."""
    for capability, most in ((80, 163), (86, 99), (89, 99), (90, 227), (120, 99)):
        device = Device(0, capability, 132)
        for dim in (16, 64, 128, 256):
            for plain in (True, False):
                for sq in (1, 64, 65, 4096):
                    c = backend.choose(device, sq, dim, 2, plain)
                    there = c.stages if device.arch.shared_operands else max(1, c.stages - 1)
                    assert 2 * dim * (c.tile_m + 2 * there * c.tile_n) <= most << 10
                for kernel in ("keys", "fused", "queries", "bias"):
                    c = backward.choose(device, kernel, dim, 2, plain)
                    there = c.stages if device.arch.shared_operands else max(1, c.stages - 1)
                    own, other = (c.tile_n, c.tile_m) if kernel in ("keys", "fused") else (c.tile_m, c.tile_n)
                    assert 4 * dim * (own + there * other) <= most << 10, (kernel, capability, dim, c)


def test_reasons() -> None:
    target = targets("triton")[0]
    (q,) = target.place(torch.randn(1, 2, 1, 16))
    assert backend.supports(q, q, q, AttentionArgs(1.0)) is None
    long = q.as_strided((1, 2**29, 1, 16), (0, 0, 0, 1))
    assert backend.supports(q, long, long, AttentionArgs(1.0)) == (
        "536870912 queries or keys are more than 2**29 - 1"
    )


def test_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from bitfuse.kernels.attention import attention_backward as backend\n"
        "from bitfuse.kernels.attention.attention import supports\n"
        "from bitfuse.ops.attention.attention_args import AttentionArgs\n"
        "x = torch.zeros(1, 2, 1, 8); print(supports(x, x, x, AttentionArgs(1.0)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "triton is not installed"

"""Hopper's kernel of attention: its tiles, rings and turns, lazy maxima, packed neighbours, addresses."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import bitfuse
import cusim
import pytest
import torch
from backends import Target, targets
from bitfuse.core import cuda as counters
from bitfuse.ops.attention import attention_cuda as cuda
from bitfuse.ops.attention.attention import _reference, attention_op
from bitfuse.ops.attention.attention_args import AttentionArgs
from descriptors import described
from test_attention import Errors

native = pytest.importorskip("bitfuse._cuda")
if not hasattr(native, "attention_sm90"):
    pytest.skip("bitfuse._cuda was built without code for sm_90a", allow_module_level=True)


def on_hopper(target: Target) -> bool:
    return target.sm == 90 if target.sm else torch.cuda.get_device_capability() == (9, 0)


def simulated(target: Target, **settings: int) -> contextlib.AbstractContextManager[None]:
    """The simulator with these settings; on a GPU nothing."""
    return cusim.device(sm=target.sm, **settings) if target.sm else contextlib.nullcontext()


TARGETS = pytest.mark.parametrize("target", [t for t in targets("cuda") if on_hopper(t)], ids=str)
HALVES = (torch.float16, torch.bfloat16)
# around the tiles of keys, 80, 128 and 176, and of queries, 128 and 192
LENGTHS = (0, 1, 17, 64, 79, 80, 81, 127, 128, 129, 175, 176, 177, 192, 200, 300)


def check(
    target: Target, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs, errors: Errors
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = target.run(attention_op, q, k, v, a)
    on_cpu = AttentionArgs._make(t.cpu() if isinstance(t, torch.Tensor) else t for t in a)
    exact, exact_lse = _reference(q.cpu().double(), k.cpu().double(), v.cpu().double(), on_cpu)
    plain, plain_lse = _reference(q.cpu(), k.cpu(), v.cpu(), on_cpu)
    errors.add("out", out, exact, plain)
    empty = exact_lse == -math.inf
    assert torch.equal(lse.cpu() == -math.inf, empty)
    errors.add("lse", *(t.cpu().masked_fill(empty, 0) for t in (lse, exact_lse, plain_lse)))
    return out, lse


def one(target: Target, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttentionArgs) -> None:
    errors = Errors()
    q, k, v = target.place(q, k, v)
    check(target, q, k, v, a, errors)
    errors.check(f"{list(q.shape)}, {list(k.shape)}, window {a.left, a.right}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", cuda.DIMS)
@TARGETS
def test_draws(target: Target, dim: int, dtype: torch.dtype) -> None:
    """Lengths, windows, heads, softcap and layouts at random, packed or not."""
    errors = {0.0: Errors(), 3.0: Errors()}  # a cap has errors of its own
    for number in range(12 if target.sm else 60):
        r = random.Random(number)
        torch.manual_seed(number)
        kv_heads, batch = r.choice((1, 2)), r.choice((1, 2, 3))
        heads = kv_heads * r.choice((1, 2, 3))
        cu: dict[str, Any] = {}
        if packed := number % 3 == 0:
            both = [[r.choice(LENGTHS) for _ in range(batch)] for _ in "qk"]
            sizes: list[tuple[int, ...]] = [(sum(lengths),) for lengths in both]
            edges = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in both]
            cu = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), target.place(*edges), strict=True))
            cu |= {"max_seqlen_q": max(both[0]), "max_seqlen_k": max(both[1])}
        else:
            sizes = [(batch, r.choice(LENGTHS)) for _ in "qk"]
        layout = r.choice(("dense", "heads first", "sliced"))

        def make(size: tuple[int, ...], heads: int, layout: str = layout) -> torch.Tensor:
            if layout == "sliced":
                (t,) = target.place(torch.randn(*size, heads, 2 * dim + 8).to(dtype))
                return t[..., 8 : 8 + dim]
            if layout == "heads first":
                (t,) = target.place(torch.randn(*size[:-1], heads, size[-1], dim).to(dtype))
                return t.transpose(-2, -3)
            return target.place(torch.randn(*size, heads, dim).to(dtype))[0]

        q, k, v = make(sizes[0], heads), make(sizes[1], kv_heads), make(sizes[1], kv_heads)
        window, causal = r.random() < 0.4, r.random() < 0.5
        a = AttentionArgs(
            dim**-0.5 * r.choice((1.0, 4.0)),
            r.choice((0, 3, 50, 130)) if window else -1,
            0 if causal else r.choice((0, 4, 150)) if window else -1,
            r.random() < 0.2,
            3.0 if number % 4 == 1 else 0.0,
            sinks=target.place(torch.randn(heads))[0] if r.random() < 0.3 else None,
            **cu,
        )
        assert target.reason(attention_op, q, k, v, a) is None
        check(target, q, k, v, a, errors[a.softcap])
        assert packed == (q.dim() == 3)
    for cap, found in errors.items():
        found.check(f"softcap {cap}")
    assert not any(bool(kept.any()) for kept in counters._counters.values())


@TARGETS
def test_many_tiles_a_block(target: Target) -> None:
    """Rings that go round within a tile and from one to the next; whole tiles of keys between masked ones. On
    other numbers of multiprocessors, in other orders, the same bits; no race in global memory."""
    for dim, window in itertools.product(cuda.DIMS, ((-1, -1), (-1, 0), (300, 100))):
        sizes = ((400, 2), (800, 1), (800, 1))
        q, k, v = target.place(*(torch.randn(1, n, h, dim).bfloat16() for n, h in sizes))
        a, errors = AttentionArgs(dim**-0.5, *window), Errors()
        out, lse = check(target, q, k, v, a, errors)
        errors.check(f"dim {dim}, window {window}")
        with (
            bitfuse.use_backend("cuda"),
            simulated(target, multiprocessors=2, resident=2, racecheck=2, seed=dim),
        ):
            again, lse_again = attention_op(q, k, v, a)
        assert torch.equal(again, out) and torch.equal(lse_again, lse)


@TARGETS
def test_sections_of_heads(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """More keys and values than L2 holds of all heads: sections, the last one smaller."""
    errors = Errors()
    q = target.place(torch.randn(1, 140, 6, 256).half())[0]
    k = torch.randn(1, 9000, 3, 256, device=target.device).half()
    check(target, q, k, k, AttentionArgs(0.06, -1, 0, True), errors)
    errors.check("sections")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@TARGETS
def test_maxima_that_grow(target: Target, dtype: torch.dtype) -> None:
    """Logits that rise or fall along the keys, a little and much a tile: what the sums are relative to
    follows late, in some rows and not in others."""
    q, k, v = (torch.randn(1, 640, 1, 64) for _ in range(3))
    q[..., 0], k[..., 0] = 8.0, 0.0
    for slope in (1.0, -1.0, 5.0, -5.0, 40.0, -40.0):  # in powers of two a tile of 128 keys
        k[0, :, 0, 0] = torch.arange(640) * (slope * math.log(2) / 128)
        rising = q.clone()
        rising[:, ::3, :, 0] = 0
        for t in (q, rising):
            one(target, t.to(dtype), k.to(dtype), v.to(dtype), AttentionArgs(0.125))


@TARGETS
def test_sinks_where_nothing_is_seen(target: Target) -> None:
    """lse is the sink's then, and out 0; a sink of -inf is none."""
    sinks = torch.tensor([0.7, -math.inf])
    for sk in (0, 3):
        q, k = target.place(torch.randn(1, 5, 2, 64).half(), torch.randn(1, sk, 2, 64).half())
        a = AttentionArgs(0.1, -1, 0, sinks=target.place(sinks)[0])
        out, lse = target.run(attention_op, q, k, k, a)
        alone = lse.cpu()[0, :, : 5 - sk]
        torch.testing.assert_close(alone, sinks.unsqueeze(1).expand(alone.shape))
        assert not out.cpu()[:, : 5 - sk].any()


@TARGETS
def test_packed_neighbours_do_not_matter(target: Target) -> None:
    """A tile of keys reaches into the next sequence, and probabilities of 0 meet what is there."""
    for dim in cuda.DIMS:
        lengths = ((70, 100), (130, 190), (5, 1), (60, 0), (1, 131))
        ends = [list(itertools.accumulate(n, initial=0)) for n in zip(*lengths, strict=True)]
        cu_q, cu_k = target.place(*(torch.tensor(e, dtype=torch.int32) for e in ends))
        q, k, v = target.place(*(torch.randn(e[-1], 1, dim).half() for e in (ends[0], ends[1], ends[1])))
        a = AttentionArgs(dim**-0.5, -1, 0)._replace(
            cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=130, max_seqlen_k=190
        )
        clean, clean_lse = target.run(attention_op, q, k, v, a)
        for bad in (0, 1, 3, 4):
            (q0, q1), (k0, k1) = (e[bad : bad + 2] for e in ends)
            spoilt = [t.clone() for t in (q, k, v)]
            spoilt[0][q0:q1], spoilt[1][k0:k1], spoilt[2][k0:k1] = math.nan, math.nan, math.inf
            got, got_lse = target.run(attention_op, *target.place(*spoilt), a)
            others = torch.ones(q.shape[0], dtype=torch.bool)
            others[q0:q1] = False
            assert torch.equal(got.cpu()[others], clean.cpu()[others])
            assert torch.equal(got_lse.cpu()[:, others], clean_lse.cpu()[:, others])


@TARGETS
def test_offsets_are_held_to_the_tensors(target: Target) -> None:
    """Offsets on a GPU are not read by the host: what they say past the end is not touched."""
    q, k, v = target.place(*(torch.randn(40, 1, 64).half() for _ in range(3)))
    (cu,) = target.place(torch.tensor([-5, 30, 1000], dtype=torch.int32))
    a = AttentionArgs(0.125, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=500, max_seqlen_k=500)
    out, _ = target.run(attention_op, q, k, v, a)
    (held,) = target.place(torch.tensor([0, 30, 40], dtype=torch.int32))
    wanted, _ = target.run(attention_op, q, k, v, a._replace(cu_seqlens_q=held, cu_seqlens_k=held))
    assert torch.equal(out, wanted)


@TARGETS
def test_far_addresses(target: Target) -> None:
    """Batches, heads and rows more than 2**31 elements apart."""
    far = 2**31 + 8
    room = torch.empty(2 * far, dtype=torch.float16, device=target.device)
    for batch, strides in ((2, (far, 128, 64, 1)), (1, (0, 64, far, 1)), (1, (0, 2**28 + 8, 64, 1))):
        q, k, v = (room[begin:].as_strided((batch, 9, 2, 64), strides) for begin in (0, 4096, 8192))
        for t in (q, k, v):
            t.copy_(torch.randn(t.shape))
        errors = Errors()
        check(target, q, k, v, AttentionArgs(0.25, -1, 0), errors)
        errors.check(f"strides {strides}")


@pytest.mark.parametrize("target", [t for t in targets("cuda") if t.sm == 90], ids=str)
def test_stores_are_whole_sectors(target: Target) -> None:
    """All that threads store: out, 64 bytes of a row at a time, and lse."""
    q, k, v = target.place(*(torch.randn(1, 256, 1, 128).half() for _ in range(3)))
    cusim.counts()
    with cusim.device(counts=True):
        target.run(attention_op, q, k, v, AttentionArgs(0.1))
    (counted,) = cusim.counts().values()
    assert counted["global_sectors"] == counted["global_sectors_ideal"]


def test_what_was_compiled() -> None:
    """No kernel spills a register or has a stack."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", native.__file__]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.findall(r"attention_sm90_kernel\w*:\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", report)
    assert len(used) == 14
    assert {(stack, local) for _, stack, local in used} == {("0", "0")}, used


def reached(code: list[tuple[int, str]], start: int) -> list[str]:
    """The instructions of a kernel that may follow the one at an address, by its branches."""
    at = {address: i for i, (address, _) in enumerate(code)}
    seen: set[int] = set()
    left = [at[start]]
    while left:
        i = left.pop()
        if i in seen or i >= len(code):
            continue
        seen.add(i)
        text = code[i][1]
        branch = re.match(r"(@!?U?P\w+ )?BRA(?:\.\w+)*(?: !?U?P\w+,)* (?:`\()?0x([0-9a-f]+)", text)
        assert branch or not re.match(r"(@!?U?P\w+ )?(BRX|JMX|CALL|RET)", text), text
        if branch:
            left.append(at[int(branch[2], 16)])
        ends = re.match(r"(BRA(?!.*P\d)|EXIT)", text)
        if not ends:
            left.append(i + 1)
    return [code[i][1] for i in sorted(seen)]


def test_the_producer_has_registers_enough() -> None:
    """Its warps give up all but 24 or 32 registers (setmaxnreg.dec), which the compiler does not hold them
    to: what they may run from there on names none beyond."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", native.__file__]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = dict.fromkeys(re.findall(r"Function (\w*attention_sm90_kernel\w*):", report))
    command = [str(tool), "-arch", "sm_90a", "-fun", ",".join(names), "--dump-sass", native.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.split(r"\n\s+Function : ", text)[1:]
    assert len(kernels) == 14
    for kernel in kernels:
        lines = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?) *;", kernel)
        code = [(int(address, 16), instruction) for address, instruction in lines]
        given = [(a, text) for a, text in code if "USETMAXREG.DEALLOC" in text]
        assert len(given) == 1
        (address, instruction), name = given[0], kernel.split()[0]
        budget = int(instruction.split()[-1], 16)
        producer = reached(code, address)
        highest = max(int(n) for text in producer for n in re.findall(r"\bR(\d+)\b", text))
        assert any("UTMALDG" in text for text in producer) and not any("GMMA" in text for text in producer)
        # a pair ends at the register behind the one that is named
        wide = any(f"R{highest}.64" in text for text in producer)
        assert highest + wide < budget, f"{name}: R{highest} of {budget} registers"


@TARGETS
def test_reasons(target: Target) -> None:
    (x,) = target.place(torch.randn(1, 8, 2, 64).half())
    plain = AttentionArgs(0.125)
    some = torch.zeros(2)
    strided = target.place(torch.randn(1, 8, 2, 128).half())[0][..., ::2]
    off = target.place(torch.randn(1 + x.numel()).half())[0][1:].view(x.shape)
    long = x.as_strided((1, 2**28, 1, 64), (0, 0, 0, 1))
    for tensor, a, reason in (
        (x.float(), plain, "q is float32: its tensor cores take float16 and bfloat16"),
        (x[..., :32], plain, "the head dims are 32 and 32, not both 64, 128 or 256"),
        (x, plain._replace(bias=some), "it has no kernel for attn_bias"),
        (x, plain._replace(alibi_slopes=some), "it has no kernel for alibi_slopes"),
        (x, plain._replace(prefix_k=x, prefix_v=x), "it has no kernel for prefix_k"),
        (x, plain._replace(dropout_p=0.1), "it has no kernel for dropout_p"),
        (x, plain._replace(softmax_scale=0.0), "softmax_scale is 0.0, not above 0"),
        (long, plain, "268435456 queries or keys are more than 2**28 - 1"),
        (
            strided,
            plain,
            "q has strides (2048, 256, 128, 2), not multiples of 8 above 0 between neighbours of 1",
        ),
        (x.expand(3, 8, 2, 64), plain, "q has strides (0, 128, 64, 1), not multiples of 8"),
        (off, plain, "q starts at an address that is not a multiple of 16"),
    ):
        assert (cuda.supports(tensor, tensor, tensor, a) or "").startswith(reason)
    assert cuda.supports(x, x, x[..., :32], plain) == "the head dims are 64 and 32, not both 64, 128 or 256"
    if target.sm:
        with cusim.device(sm=80):
            assert cuda.supports(x, x, x, plain) == "the compute capability is 8.0, not 9.0"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("q", dict(address=0), "q is null"),
        ("k", dict(address=8), "k is 8, expected a multiple of 16"),
        ("out", dict(address=24), "out is 24"),
        ("lse", dict(address=2), "lse is 2"),
        ("counters", dict(address=0), "counters is null"),
        ("counters", dict(shape=(1,), strides=(1,)), "counters is 1, expected 2 or more"),
        ("q", dict(strides=(1024, 0, 64, 1)), "q's stride is 0"),
        ("k", dict(strides=(1024, 128, 60, 1)), "k's stride is 60, expected a multiple of 8"),
        ("v", dict(strides=(2**40, 128, 64, 1)), "v's stride is 1099511627776"),
        ("q", dict(shape=(2, 8, 3, 64)), "heads is 3, expected a multiple of 2"),
        ("q", dict(shape=(2, 8, 2, 96)), "k is of shape [2, 8, 2, 64], expected [2, 8, 2, 96]"),
        ("q", dict(shape=(2, 0, 2, 64)), "sq is 0"),
        ("k", dict(shape=(2, 2**28, 2, 64)), "v is of shape"),
        ("q", dict(shape=(2, -1, 2, 64)), "q is -1"),
        ("q", dict(dtype="FLOAT32"), "k is of dtype float16, expected float32"),
    ],
)
def test_the_binding_trusts_no_tensor(name: str, changes: dict[str, Any], message: str) -> None:
    given = _given()
    if "shape" in changes and name != "counters":
        given["out"] = described(native, given["out"], shape=changes["shape"])
        rows = (2, changes["shape"][2], changes["shape"][1])
        given["lse"] = described(native, given["lse"], shape=rows, strides=(16, 8, 1))
    given[name] = described(native, _given()[name], **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        native.attention_sm90(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(cu_seqlens_q=torch.zeros(3, dtype=torch.int32)), "q is of shape"),
        (dict(sinks=torch.zeros(3)), "sinks is of shape [3], expected [2]"),
        (dict(bias=torch.zeros(1, 1, 8, 8)), "args is with a bias"),
        (dict(softmax_scale=0.0), "softmax_scale is 0"),
        (dict(softmax_scale=math.nan), "softmax_scale is"),
        (dict(softcap=-1.0), "softcap is -1"),
    ],
)
def test_the_binding_trusts_no_argument(changes: dict[str, Any], message: str) -> None:
    given = _given()
    given["args"] = given["args"]._replace(**changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        native.attention_sm90(**given)
    with pytest.raises(ValueError, match="multiprocessors is 0"):
        native.attention_sm90(**_given() | dict(multiprocessors=0))


def _given() -> dict[str, Any]:
    x = torch.zeros(2, 8, 2, 64, dtype=torch.float16)
    return dict(
        q=x, k=x, v=x, args=AttentionArgs(0.125), out=torch.zeros_like(x), lse=torch.zeros(2, 2, 8),
        counters=torch.zeros(2, dtype=torch.int32), multiprocessors=4, stream=0,
    )  # fmt: skip


@TARGETS
def test_the_public_function_is_served(target: Target) -> None:
    """Before Triton, with gradients by Triton's backward where there is one."""
    q, k, v = target.place(*(torch.randn(2, 50, 2, 64).half() for _ in range(3)))
    with bitfuse.use_backend("cuda"), simulated(target):
        explained = bitfuse.explain(bitfuse.attention, q, k, v, causal=True)
        assert explained.chosen == "cuda"
        out, lse = bitfuse.attention(q, k, v, causal=True, return_lse=True)
    assert [b.name for b in attention_op.backends] == ["cpp", "cuda", "triton", "reference"]
    assert out.shape == q.shape and lse.shape == (2, 2, 50)

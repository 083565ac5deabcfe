"""What every op owes whatever it is given: sizes of nothing give what torch gives, what is no tensor in
memory is refused by name or computed rightly, and a write in place is known to autograd."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.ops.optim.adamw8bit import adamw8bit
from torch.testing._internal.two_tensor import TwoTensor

BACKENDS = ("cpp", "reference")
K, N, R = 64, 16, 4


@pytest.fixture(autouse=True)
def new_tensors_hold_nan() -> Iterator[None]:
    """What a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)  # torch then fills what it makes
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape) + len(shape)))


def weight(n: int = N, k: int = K, format: str = "int4") -> bitfuse.LowBitWeight:
    return bitfuse.quantize(randn(n, k), format, group_size=32)


def probabilities(*shape: int) -> torch.Tensor:
    return randn(*shape).softmax(-1)


def heads(*shape: int) -> torch.Tensor:
    return randn(*shape, 16)


def uniforms(*shape: int) -> torch.Tensor:
    return randn(*shape).sigmoid()


def adamw_arguments() -> dict[str, Any]:
    scales = {f"{name}_absmax": torch.zeros(1) for name in ("exp_avg", "exp_avg_sq")}
    m, v = torch.full((8, 8), 127, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)
    return {
        "p": randn(8, 8),
        "grad": randn(8, 8) + 1,
        "exp_avg": m,
        "exp_avg_sq": v,
        **scales,
        "lr": 0.1,
        "step": 1.0,
    }


def cache_arguments() -> dict[str, Any]:
    return {
        "k": heads(1, 2, 1), "v": heads(1, 2, 1) + 1, "k_cache": torch.zeros(1, 8, 1, 16),
        "v_cache": torch.zeros(1, 8, 1, 16), "cache_seqlens": torch.zeros(1, dtype=torch.int32),
        "rotary_cos": randn(8, 8), "rotary_sin": randn(8, 8),
    }  # fmt: skip


CALLS: dict[Callable[..., Any], Callable[[], dict[str, Any]]] = {
    bitfuse.lowbit_linear: lambda: {"x": randn(3, K), "w": weight(), "bias": randn(N)},
    bitfuse.lowbit_embedding: lambda: {"indices": torch.tensor([2, 0]), "w": weight()},
    bitfuse.lora_linear: lambda: {
        "x": randn(3, K), "w": weight(), "lora_A": randn(R, K), "lora_B": randn(N, R), "scaling": 1.5,
        "bias": randn(N), "out_scale": randn(N) + 1,
    },
    bitfuse.multi_lora_linear: lambda: {
        "x": randn(3, K), "w": weight(), "lora_A": randn(2, R, K), "lora_B": randn(2, N, R), "scaling": 1.0,
        "adapter_ids": torch.tensor([0, -1, 1]), "bias": randn(N),
    },
    bitfuse.bottleneck_adapter: lambda: {
        "x": randn(3, K), "down": randn(R, K), "up": randn(K, R), "down_bias": randn(R), "up_bias": randn(K),
    },
    bitfuse.gated_activation: lambda: {"gate": randn(3, K), "up": randn(3, K) + 1},
    bitfuse.rms_norm: lambda: {"x": randn(3, K), "weight": randn(K), "residual": randn(3, K) + 1},
    bitfuse.layer_norm: lambda: {
        "x": randn(3, K), "weight": randn(K), "bias": randn(K) + 1, "residual": randn(3, K) + 1,
    },
    bitfuse.attention: lambda: {
        "q": heads(1, 3, 2), "k": heads(1, 4, 1), "v": heads(1, 4, 1) + 1, "attn_bias": randn(3, 4),
        "alibi_slopes": randn(2), "sinks": randn(2) + 1, "prefix_k": heads(1, 2, 1),
        "prefix_v": heads(1, 2, 1),
    },
    bitfuse.varlen_attention: lambda: {
        "q": heads(4, 2), "k": heads(5, 1), "v": heads(5, 1) + 1,
        "cu_seqlens_q": torch.tensor([0, 1, 4], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 2, 5], dtype=torch.int32), "max_seqlen_q": 3, "max_seqlen_k": 3,
        "alibi_slopes": randn(2), "sinks": randn(2) + 1,
    },
    bitfuse.scaled_dot_product_attention: lambda: {
        "query": heads(1, 2, 3), "key": heads(1, 2, 4), "value": heads(1, 2, 4) + 1, "attn_mask": randn(3, 4),
    },
    bitfuse.rope: lambda: {
        "x": heads(1, 3, 2), "cos": randn(3, 8), "sin": randn(3, 8) + 1,
        "positions": torch.tensor([[2, 0, 1]], dtype=torch.int32),
    },
    bitfuse.merge_attention: lambda: {
        "o1": heads(1, 3, 2), "lse1": randn(1, 2, 3), "o2": heads(1, 3, 2) + 1, "lse2": randn(1, 2, 3) + 1,
    },
    bitfuse.quantize_kv: lambda: {"k": heads(1, 64, 1), "v": heads(1, 64, 1) + 1},
    bitfuse.append_kv: cache_arguments,
    bitfuse.decode_attention: lambda: {"q": heads(1, 2, 2), **cache_arguments(), "sinks": randn(2)},
    bitfuse.sample: lambda: {"logits": randn(3, 9), "uniforms": uniforms(3)},
    bitfuse.speculative_sample: lambda: {
        "draft_probs": probabilities(1, 2, 9), "draft_ids": torch.tensor([[1, 2]]),
        "target_probs": probabilities(1, 3, 9), "uniforms": uniforms(1, 3),
    },
    bitfuse.speculative_sample_tree: lambda: {
        "draft_probs": probabilities(1, 2, 9), "draft_ids": torch.tensor([[1, 2]]),
        "parents": torch.tensor([[-1, 0]]), "target_probs": probabilities(1, 3, 9),
        "uniforms": uniforms(1, 3),
    },
    adamw8bit: adamw_arguments,
}  # fmt: skip
WRITTEN = ("k_cache", "v_cache", "p", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")


IN_PLACE = (bitfuse.multi_lora_linear, bitfuse.append_kv, bitfuse.decode_attention, adamw8bit)


def test_every_op_is_here() -> None:
    """Whatever of `__all__` takes a tensor first."""
    others = {bitfuse.lora_mlp, bitfuse.lora_qkv, bitfuse.quantize}  # of Projections, which have a test below
    found = {f for n in bitfuse.__all__ if inspect.isfunction(f := getattr(bitfuse, n))}
    takes = {
        f for f in found if "Tensor" in str(next(iter(inspect.signature(f).parameters.values())).annotation)
    }
    assert takes - set(CALLS) <= others


def result(function: Callable[..., Any], arguments: dict[str, Any]) -> list[torch.Tensor]:
    """What a call returns, and what it has written."""
    made = function(**arguments)
    made = [] if made is None else list(made) if isinstance(made, tuple) else [made]
    return made + [arguments[name] for name in WRITTEN if name in arguments]


def tensors(arguments: dict[str, Any]) -> list[str]:
    return [name for name, t in arguments.items() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_what_is_no_tensor_is_refused_by_name(function: Callable[..., Any]) -> None:
    arguments = CALLS[function]()
    for name in tensors(arguments):
        for bad in ([1.0], 3.0, "four", arguments[name].numpy(), arguments[name].to_sparse()):
            if (
                function is bitfuse.multi_lora_linear
                and name in ("lora_A", "lora_B")
                and isinstance(bad, list)
            ):
                continue  # a list of adapters
            with pytest.raises((TypeError, ValueError)) as error:
                function(**(CALLS[function]() | {name: bad}))
            told = str(error.value)
            assert name in told or name.removeprefix("rotary_") in told, f"{name}, {type(bad)}: {told}"
        if name in ("attn_bias", "attn_mask", "indices"):
            continue  # they broadcast; one index is one row
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:  # RuntimeError: as torch's SDPA
            function(**(CALLS[function]() | {name: arguments[name].sum()}))
        assert "dimension out of range" not in str(error.value).lower(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_negated_views_keep_their_sign(function: Callable[..., Any], backend: str) -> None:
    for name in tensors(CALLS[function]()):
        negated, plain = CALLS[function](), CALLS[function]()
        if not plain[name].is_floating_point() or name in WRITTEN:
            continue
        negated[name], plain[name] = torch._neg_view(negated[name]), -plain[name]
        with bitfuse.use_backend(backend):
            for got, right in zip(result(function, negated), result(function, plain), strict=True):
                assert torch.equal(got, right), name


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_subclasses_without_memory_are_computed(function: Callable[..., Any]) -> None:
    """Each argument for itself: none is taken for one that is not given. Who writes to a plain tensor
    refuses."""
    for name in tensors(CALLS[function]()):
        wrapped = CALLS[function]()
        if name in WRITTEN or wrapped[name].dtype in (torch.int32, torch.int64):
            continue
        right = result(function, CALLS[function]())
        wrapped[name] = TwoTensor(wrapped[name], wrapped[name].clone())
        if function in IN_PLACE and name not in ("x", "w", "bias"):
            with pytest.raises(TypeError, match="TwoTensor"):
                function(**wrapped)
            continue
        for got, expected in zip(result(function, wrapped), right, strict=True):
            assert torch.equal(got.a if isinstance(got, TwoTensor) else got, expected), name


# in place


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [bitfuse.append_kv, bitfuse.decode_attention, adamw8bit])
def test_writes_are_known_to_autograd(function: Callable[..., Any], backend: str) -> None:
    arguments = CALLS[function]()
    names = [name for name in WRITTEN if name in arguments]
    with bitfuse.use_backend(backend):
        function(**arguments)
        assert all(arguments[name]._version > 0 for name in names)
        before = [arguments[name].clone() for name in names]
        for name in names:
            if arguments[name].is_floating_point():
                leaf = arguments[name].clone().requires_grad_()
                with pytest.raises(RuntimeError, match="requires grad"):
                    function(**(arguments | {name: leaf}))
                with torch.no_grad():
                    function(**(CALLS[function]() | {name: leaf}))
        assert all(torch.equal(arguments[name], t) for name, t in zip(names, before, strict=True))


@pytest.mark.parametrize("format", ["none", "fp8", "int8", "int4"])
def test_a_cache_that_was_read_moves_on(format: str) -> None:
    cache = bitfuse.KVCache(1, 64, 1, 16, dtype=torch.float32, format=format)
    kv = heads(1, 33, 1)
    for call in (
        lambda: cache.append(kv, kv),
        lambda: bitfuse.decode_attention(kv[:, :1], cache, k=kv, v=kv),
    ):
        cache.reset()
        written = [t for t in cache.tensors[:8] if t is not None and (format != "fp8" or t.dim() == 4)]
        before = [t._version for t in written]
        call()
        assert all(t._version > v for t, v in zip(written, before, strict=True))
    before = [t._version for t in written]
    bitfuse.decode_attention(kv[:, :1], cache)
    assert [t._version for t in written] == before
    cache.reset()
    if format == "none":
        q = heads(1, 2, 1).requires_grad_()
        out = bitfuse.attention(q, cache.tensors.k[:, :4], cache.tensors.v[:, :4])
        cache.append(kv, kv)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


# sizes of nothing


LEADING = [(), (3,), (0,), (2, 0), (0, 2)]


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [randn(*shape).requires_grad_() for shape in shapes]


def same_gradients(out: torch.Tensor, plain: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """The gradients are of the inputs' shapes, and what autograd finds for plain torch."""
    assert out.shape == plain.shape and out.dtype == plain.dtype
    cotangent = randn(*out.shape)
    got = torch.autograd.grad(out, inputs, cotangent, allow_unused=True, retain_graph=True)
    right = torch.autograd.grad(plain, inputs, cotangent, allow_unused=True, retain_graph=True)
    for g, r, t in zip(got, right, inputs, strict=True):
        r = torch.zeros_like(t) if r is None else r
        assert g is not None and g.shape == t.shape
        exact = r.double()
        assert float((g.double() - exact).norm()) <= 1e-5 * float(exact.norm()) + 1e-30


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [N, 0])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("kind", ["int4", "nf4", "dense", "learnt"])
def test_linears_of_nothing(kind: str, leading: tuple[int, ...], n: int, backend: str) -> None:
    """One token without a batch, no tokens, no outputs, rank 0: over few-bit and dense W."""
    linear = torch.nn.functional.linear
    dense = kind in ("dense", "learnt")
    w: Any = randn(n, K).requires_grad_(kind == "learnt") if dense else weight(n, K, kind)
    full = w if dense else w.dequantize()
    learns = [w] if kind == "learnt" else []
    ids = torch.zeros(leading, dtype=torch.int64)
    with bitfuse.use_backend(backend):
        if not dense:
            x, bias = leaves((*leading, K), (n,))
            same_gradients(bitfuse.lowbit_linear(x, w, bias), linear(x, full, bias), [x, bias])
        for r in (R, 0):
            x, bias, a, b = inputs = leaves((*leading, K), (n,), (r, K), (n, r))
            plain = linear(x, full, bias) + linear(linear(x, a), b)
            same_gradients(bitfuse.lora_linear(x, w, a, b, 1.0, bias), plain, inputs + learns)
            multi = bitfuse.multi_lora_linear(x, w, a.unsqueeze(0), b.unsqueeze(0), 1.0, ids, bias)
            same_gradients(multi, plain, inputs + learns)
            listed = bitfuse.multi_lora_linear(x, w, [a], [b], 1.0, ids, bias)
            same_gradients(listed, plain, inputs + learns)
            none = bitfuse.multi_lora_linear(x, w, [], [], 1.0, ids - 1, bias)
            same_gradients(none, linear(x, full, bias), [x, bias, *learns])
            scale = randn(n).requires_grad_()
            scaled = bitfuse.lora_linear(x, w, a, b, 1.0, bias, out_scale=scale)
            same_gradients(scaled, (plain - bias) * scale + bias, [*inputs, scale, *learns])
            p = bitfuse.Projection(w, a, b, 1.0, bias)
            qkv = bitfuse.lora_qkv(x, (p, p))
            same_gradients(qkv[0] + qkv[1], plain + plain, inputs + learns)
            down = randn(8, n).requires_grad_(kind == "learnt")
            if dense or n:
                last = bitfuse.Projection(down if dense else bitfuse.quantize(down, "int8"))
                out = bitfuse.lora_mlp(x, p, p, last)
                made = down if dense else last.w.dequantize()
                hidden = torch.nn.functional.silu(plain) * plain
                same_gradients(out, linear(hidden, made), inputs + learns)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_adapters_and_gates_of_nothing(leading: tuple[int, ...], backend: str) -> None:
    linear, gelu = torch.nn.functional.linear, torch.nn.functional.gelu
    with bitfuse.use_backend(backend):
        for r, n in itertools.product((R, 0), (K, N, 0)):
            x, down, up, c, b = inputs = leaves((*leading, K), (r, K), (n, r), (r,), (n,))
            plain = linear(gelu(linear(x, down, c)), up, b)
            if backend == "cpp" and r == 0:
                with bitfuse.use_backend("reference"):  # the kernel has no bottleneck of 0
                    out = bitfuse.bottleneck_adapter(x, down, up, c, b, residual=n == K)
            else:
                out = bitfuse.bottleneck_adapter(x, down, up, c, b, residual=n == K)
            same_gradients(out, x + plain if n == K else plain, inputs)
        for k in (K, 0):
            gate, up = leaves((*leading, k), (*leading, k))
            out = bitfuse.gated_activation(gate, up)
            same_gradients(out, torch.nn.functional.silu(gate) * up, [gate, up])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_norms_of_nothing(leading: tuple[int, ...], backend: str) -> None:
    with bitfuse.use_backend(backend):
        for k in (K, 0):
            x, residual, w, b = inputs = leaves((*leading, k), (*leading, k), (k,), (k,))
            y, s = bitfuse.rms_norm(x, w, residual=residual)
            plain = torch.nn.functional.rms_norm(x + residual, (k,), w, 1e-6) if k else x + residual + w
            same_gradients(y + s, plain + x + residual, inputs[:3])
            y = bitfuse.layer_norm(x, w, b)
            same_gradients(y, torch.nn.functional.layer_norm(x, (k,), w, b), [x, w, b])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, sq, sk", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_attention_of_nothing(batch: int, sq: int, sk: int, backend: str) -> None:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with bitfuse.use_backend(backend):
        q, k, v = inputs = leaves((batch, 2, sq, 16), (batch, 2, sk, 16), (batch, 2, sk, 16))
        nothing = 0 * (q.sum() + k.sum() + v.sum()) + torch.zeros(batch, 2, sq, 16)
        plain = sdpa(q, k, v) if sk else nothing
        same_gradients(bitfuse.scaled_dot_product_attention(q, k, v), plain, inputs)
        turned: list[Any] = [t.transpose(1, 2) for t in (q, k, v)]
        same_gradients(bitfuse.attention(*turned).transpose(1, 2), plain, inputs)
        x, other = leaves((batch, sq, 2, 16), (batch, sq, 2, 16))
        cos, sin = randn(4, 8), randn(4, 8)
        assert bitfuse.rope(x, cos, sin).shape == x.shape
        (grad,) = torch.autograd.grad(bitfuse.rope(x, cos, sin).sum(), x)
        assert grad.shape == x.shape
        lse = torch.zeros(batch, 2, sq)
        out, _ = bitfuse.merge_attention(x, lse, other, lse)
        same_gradients(out, (x + other) / 2, [x, other])
        seq = 64 if sk else 0
        for format in ("fp8", "int8", "int4"):
            made = bitfuse.quantize_kv(heads(batch, seq, 2), heads(batch, seq, 2), format)
            width = {"fp8": 16, "int8": 16, "int4": 8}[format]
            assert made.k.shape == (batch, seq, 2, width) == made.v.shape
            assert all(t.device.type == "cpu" for t in made)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edges", [[0], [0, 0], [0, 0, 0, 0]], ids=len)
def test_packed_sequences_of_nothing(edges: list[int], backend: str) -> None:
    cu = torch.tensor(edges, dtype=torch.int32)
    q, k, v = inputs = leaves((0, 2, 16), (0, 1, 16), (0, 1, 16))
    sinks = randn(2).requires_grad_()
    with bitfuse.use_backend(backend):
        out = bitfuse.varlen_attention(q, k, v, cu, cu, 0, 0, sinks=sinks)
        grads = torch.autograd.grad(out.sum(), [*inputs, sinks])
    for g, t in zip(grads, [*inputs, sinks], strict=True):
        assert g.shape == t.shape and not g.count_nonzero()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_and_caches_of_nothing(backend: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    with bitfuse.use_backend(backend):
        assert bitfuse.sample(randn(0, 9), torch.zeros(0)).shape == (0,)
        ids, accepted = bitfuse.speculative_sample(
            randn(0, 2, 9), none.view(0, 2), randn(0, 3, 9), torch.zeros(0, 3)
        )
        assert ids.shape == (0, 3) and accepted.shape == (0,)
        ids, accepted = bitfuse.speculative_sample(
            randn(2, 0, 9), none.view(2, 0), randn(2, 1, 9).softmax(-1), torch.zeros(2, 1)
        )
        assert ids.shape == (2, 1) and accepted.tolist() == [0, 0]
        ids, *_ = bitfuse.speculative_sample_tree(
            randn(0, 2, 9), none.view(0, 2), torch.tensor([-1, 0]), randn(0, 3, 9), torch.zeros(0, 3)
        )
        assert ids.shape[0] == 0
        for format in ("none", "fp8", "int8", "int4"):
            cache = bitfuse.KVCache(0, 64, 1, 16, dtype=torch.float32, format=format)
            cache.append(heads(0, 3, 1), heads(0, 3, 1))
            assert bitfuse.decode_attention(heads(0, 1, 2), cache).shape == (0, 1, 2, 16)
            cache = bitfuse.KVCache(2, 64, 1, 16, dtype=torch.float32, format=format)
            cache.append(heads(2, 0, 1), heads(2, 0, 1))
            out = bitfuse.decode_attention(heads(2, 1, 2), cache)
            assert not out.count_nonzero() and bitfuse.decode_attention(heads(2, 0, 2), cache).numel() == 0
        p, grad = torch.zeros(0), torch.zeros(0)
        m, v = (torch.zeros(0, dtype=torch.uint8) for _ in range(2))
        adamw8bit(p, grad, m, torch.zeros(0), v, torch.zeros(0), lr=0.1, step=1.0)


def test_projections_are_checked() -> None:
    x, p = randn(3, K), bitfuse.Projection(weight(), randn(R, K), randn(N, R))
    bad: Any
    for name, bad in itertools.product(("w", "lora_A", "lora_B", "bias"), ([1.0], 3.0, "four")):
        with pytest.raises(TypeError, match=name):
            bitfuse.lora_qkv(x, [p, p._replace(**{name: bad})])


def test_bias_and_scale_are_checked_where_something_learns() -> None:
    for learns in (False, True):
        x = randn(4, K).requires_grad_(learns)
        for bias, scale, name in ((1, N, "bias"), (N, 1, "out_scale")):
            with pytest.raises(ValueError, match=f"{name} has shape"):
                bitfuse.lora_linear(
                    x, weight(), randn(R, K), randn(N, R), 1.0, randn(bias), out_scale=randn(scale)
                )


def test_explain_without_adapters() -> None:
    ids = torch.full((3,), -1)
    told = bitfuse.explain(bitfuse.multi_lora_linear, randn(3, K), weight(), [], [], 1.0, ids)
    assert told.chosen

"""Every op's output and gradients, bit for bit, against those of another version of the package.

    PYTHONPATH=OLD/python python tests/same_bits.py record bits.json
    PYTHONPATH=NEW/python python tests/same_bits.py compare bits.json

`record` runs the cases below on each backend (C++ at each instruction-set level that the machine has, CUDA
and Triton on the simulator for two compute capabilities) and writes a hash of each tensor that comes out;
`compare` runs them too and exits with 1 where anything differs, is missing or is new. With a second file it
compares the two and runs nothing. Both files must come from one machine and one torch. New kernels of Triton
take minutes to compile.

Only public names are used, so that the package may be taken apart and put together between the two. A case's
inputs are a function of its name. "unserved" stands for a case that the backend refuses.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

NO_LEVEL = 3  # exit status: the machine lacks what BITFUSE_CPU_ISA names

# before anything of a test folder is imported, and the simulator before torch
for _flag, _value in itertools.pairwise(sys.argv):
    if _flag == "--tests":
        sys.path.insert(0, str(Path(_value).resolve()))
import cusim  # noqa: E402

if sys.argv[1:2] == ["run"] and "/sm" in sys.argv[2]:
    cusim.load_if_no_gpu()

import torch  # noqa: E402

try:
    import bitfuse
except ValueError as error:
    if "BITFUSE_CPU_ISA" not in str(error):
        raise
    print(error, file=sys.stderr)
    sys.exit(NO_LEVEL)

TARGETS = (
    "reference/cpu",
    "default/cpu",  # what is chosen where none is asked for
    *(f"cpp/{level}" for level in ("portable", "avx2", "avx512", "avx512bf16")),
    *(f"{backend}/sm{sm}" for backend in ("cuda", "triton") for sm in (80, 90)),
)


class Inputs:
    """Random tensors from the name of a case, and the tensors that get a gradient."""

    def __init__(self, name: str) -> None:
        seed = zlib.crc32(name.encode())
        torch.manual_seed(seed)  # what the package itself draws
        self.generator = torch.Generator().manual_seed(seed)
        self.learnt: dict[str, torch.Tensor] = {}

    def randn(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(getattr(torch, dtype))

    def rand(self, *shape: int, dtype: str = "float32") -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, dtype=getattr(torch, dtype))

    def randint(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def leaf(self, name: str, *shape: int, dtype: str = "float32", scale: float = 1.0) -> torch.Tensor:
        self.learnt[name] = self.randn(*shape, dtype=dtype, scale=scale).requires_grad_()
        return self.learnt[name]

    def parameters(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, its parameters drawn anew; those that learn get a gradient."""
        for name, p in model.named_parameters():
            p.data = self.randn(*p.shape, scale=0.1).to(p.dtype)
            if p.requires_grad:
                self.learnt[name] = p
        return model

    def weight(self, name: str, n: int, k: int, dtype: str = "float32") -> Any:
        """A weight in few bits, or a dense one."""
        if name == "dense":
            return self.leaf("w", n, k, dtype=dtype, scale=k**-0.5)
        options = dict(WEIGHTS[name])
        if options.pop("act_order", False):
            columns = torch.randperm(k, generator=self.generator)
            options["g_idx"] = (torch.arange(k) // options["group_size"])[columns]
        return bitfuse.quantize(self.randn(n, k, scale=k**-0.5), **options)


class Case(NamedTuple):
    op: str
    name: str
    call: Callable[[Inputs], Any]


STRIDES: dict[str, tuple[int, int]] = {}
CASES: dict[str, list[Case]] = {}


def cases(cuda: int = 1, triton: int = 1, **axes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function, named as the op, is called with each combination of the axes' values. On the simulator,
    which is slow, with each `cuda`-th and `triton`-th of them, numbers that divide no axis; 0 is none."""

    def add(f: Callable[..., Any]) -> Callable[..., Any]:
        CASES[f.__name__], STRIDES[f.__name__] = [], (cuda, triton)
        for values in itertools.product(*axes.values()):
            words = (
                v if isinstance(v, str) else f"{a}{v}" for a, v in zip(axes, values, strict=True) if v != ""
            )
            call = functools.partial(f, **dict(zip(axes, values, strict=True)))
            CASES[f.__name__].append(Case(f.__name__, " ".join(words), call))
        return f

    return add


FLOATS = ("float32", "float16", "bfloat16")
M = (1, 16, 70)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
WEIGHTS: dict[str, dict[str, Any]] = {
    "int8": dict(format="int8"),
    "int8-g64": dict(format="int8", group_size=64),
    "int8-zeros": dict(format="int8", symmetric=False),
    "int4": dict(format="int4"),
    "int4-zeros": dict(format="int4", group_size=64, symmetric=False),
    "int4-row": dict(format="int4", group_size=-1, scale_dtype=torch.bfloat16),
    "int4-g_idx": dict(format="int4", group_size=32, act_order=True),
    "nf4": dict(format="nf4"),
    "nf4-nested": dict(format="nf4", nested=True),
    "fp8": dict(format="fp8"),
    "fp8-g128": dict(format="fp8", group_size=128),
    "int4-nested-zeros": dict(
        format="int4", symmetric=False, group_size=32, nested=True, scale_dtype=torch.float32
    ),
    **{name: dict(format=name) for name in ("int3", "int2", "ternary", "fp4", "mxfp8", "mxfp4", "nvfp4")},
}
ADAPTED = ("dense", "int8", "int4-zeros", "int4-g_idx", "nf4-nested", "fp8")
K = 384  # whole groups of 128, and no power of two


# weights and linear layers


@cases(cuda=0, triton=0, weight=(*WEIGHTS,), dtype=FLOATS)
def quantize(r: Inputs, weight: str, dtype: str) -> Any:
    w = r.weight(weight, 41, K)
    dense = w.dequantize(getattr(torch, dtype))
    again = bitfuse.quantize(r.randn(9, K, dtype=dtype), w.format)
    return {**w.tensors(), "dense": dense, **{f"again {k}": t for k, t in again.tensors().items()}}


@cases(cuda=5, triton=23, weight=(*WEIGHTS,), m=M, dtype=FLOATS)
def lowbit_linear(r: Inputs, weight: str, m: int, dtype: str) -> Any:
    w = r.weight(weight, 72 if m == 16 else 41, K)
    bias = None if m == 16 else r.leaf("bias", w.shape[0], dtype=dtype)
    return bitfuse.lowbit_linear(r.leaf("x", m, K, dtype=dtype), w, bias)


@cases(cuda=0, triton=7, weight=(*WEIGHTS,), dtype=FLOATS)
def lowbit_embedding(r: Inputs, weight: str, dtype: str) -> Any:
    w = r.weight(weight, 41, K)
    return bitfuse.lowbit_embedding(r.randint(0, 41, 3, 5), w, getattr(torch, dtype))


HOW_LORA = ("", "dropout", "out_scale")


@cases(cuda=5, triton=31, weight=ADAPTED, m=M, dtype=FLOATS, how=HOW_LORA)
def lora_linear(r: Inputs, weight: str, m: int, dtype: str, how: str) -> Any:
    n, rank = (72, 16) if m == 16 else (41, 5)
    adapter = dtype if how == "out_scale" else "float32"
    return bitfuse.lora_linear(
        r.leaf("x", m, K, dtype=dtype),
        r.weight(weight, n, K, dtype),
        r.leaf("lora_A", rank, K, dtype=adapter, scale=0.05),
        r.leaf("lora_B", n, rank, dtype=adapter),
        r.learnt.setdefault("scaling", torch.tensor(0.7, requires_grad=True)) if how == "out_scale" else 2.0,
        r.leaf("bias", n, dtype=dtype) if m != 16 else None,
        0.25 if how == "dropout" else 0.0,
        seed=7 if m == 16 else None,
        out_scale=r.leaf("out_scale", n, dtype=dtype) if how == "out_scale" else None,
    )


def projection(
    r: Inputs, name: str, weight: str, n: int, k: int, rank: int, dtype: str
) -> bitfuse.Projection:
    w = r.weight(weight, n, k, dtype)
    if weight == "dense":
        r.learnt[f"{name} w"] = r.learnt.pop("w")
    a, b = r.leaf(f"{name} A", rank, k, scale=0.05), r.leaf(f"{name} B", n, rank)
    bias = r.leaf(f"{name} bias", n, dtype=dtype) if name != "k" else None
    return bitfuse.Projection(w, a, b, 0.5, bias)


@cases(cuda=5, triton=19, weight=ADAPTED, m=M, dtype=FLOATS, how=("", "dropout"))
def lora_qkv(r: Inputs, weight: str, m: int, dtype: str, how: str) -> Any:
    sizes = (("q", 72, 8), ("k", 41, 5), ("v", 40, 16))
    three = [projection(r, name, weight, n, K, rank, dtype) for name, n, rank in sizes]
    return bitfuse.lora_qkv(r.leaf("x", m, K, dtype=dtype), three, 0.1 if how else 0.0)


@cases(cuda=7, triton=43, weight=ADAPTED, m=M, dtype=FLOATS, activation=ACTIVATIONS[:2], how=("", "dropout"))
def lora_mlp(r: Inputs, weight: str, m: int, dtype: str, activation: str, how: str) -> Any:
    gate, up = (projection(r, name, weight, 128, K, 8, dtype) for name in ("gate", "up"))
    down = projection(r, "down", weight, 41, 128, 5, dtype)
    x = r.leaf("x", m, K, dtype=dtype)
    return bitfuse.lora_mlp(x, gate, up, down, activation, 0.1 if how else 0.0)


@cases(cuda=5, triton=19, weight=ADAPTED, m=M, dtype=FLOATS, how=("stacked", "list"))
def multi_lora_linear(r: Inputs, weight: str, m: int, dtype: str, how: str) -> Any:
    w = r.weight(weight, 41, K, dtype)
    a: Any
    b: Any
    a, b = r.leaf("A", 4, 8, K, dtype=dtype, scale=0.05), r.leaf("B", 4, 41, 8, dtype=dtype)
    if how == "list":
        del r.learnt["A"], r.learnt["B"]
        ranks = (8, 3, 0, 16)
        a = [r.leaf(f"A{i}", rank, K, dtype=dtype, scale=0.05) for i, rank in enumerate(ranks)]
        b = [r.leaf(f"B{i}", 41, rank, dtype=dtype) for i, rank in enumerate(ranks)]
    x, bias = r.leaf("x", m, K, dtype=dtype), r.leaf("bias", 41, dtype=dtype)
    return bitfuse.multi_lora_linear(x, w, a, b, [0.5, 1.0, 2.0, 0.25], r.randint(-1, 4, m), bias)


@cases(triton=7, activation=ACTIVATIONS, size=(5, 1027), dtype=FLOATS)
def gated_activation(r: Inputs, activation: str, size: int, dtype: str) -> Any:
    gate, up = (r.leaf(name, 3, size, dtype=dtype) for name in ("gate", "up"))
    return bitfuse.gated_activation(gate, up, activation)


HOW_NORM = ("", "residual", "weight")


@cases(triton=5, size=(5, 1027), dtype=FLOATS, how=(*HOW_NORM, "offset"))
def rms_norm(r: Inputs, size: int, dtype: str, how: str) -> Any:
    weight = r.leaf("weight", size, dtype="float32" if how == "weight" else dtype)
    residual = r.leaf("residual", 37, size, dtype=dtype) if how == "residual" else None
    x = r.leaf("x", 37, size, dtype=dtype)
    return bitfuse.rms_norm(x, weight, residual=residual, offset=float(how == "offset"))


@cases(triton=5, size=(5, 1027), dtype=FLOATS, how=HOW_NORM)
def layer_norm(r: Inputs, size: int, dtype: str, how: str) -> Any:
    of = "float32" if how == "weight" else dtype
    weight, bias = r.leaf("weight", size, dtype=of), r.leaf("bias", size, dtype=of)
    residual = r.leaf("residual", 37, size, dtype=dtype) if how == "residual" else None
    return bitfuse.layer_norm(r.leaf("x", 37, size, dtype=dtype), weight, bias, residual=residual)


@cases(triton=17, activation=ACTIVATIONS, m=M, dtype=FLOATS, how=("", "wider"))
def bottleneck_adapter(r: Inputs, activation: str, m: int, dtype: str, how: str) -> Any:
    n = 72 if how else 136
    down, up = r.leaf("down", 13, 136, scale=0.1), r.leaf("up", n, 13)
    biases = dict(down_bias=r.leaf("down_bias", 13), up_bias=r.leaf("up_bias", n)) if m > 1 else {}
    x = r.leaf("x", m, 136, dtype=dtype)
    return bitfuse.bottleneck_adapter(x, down, up, activation=activation, residual=not how, **biases)


# attention


HOW_ATTENTION: dict[str, Callable[[Inputs, str], dict[str, Any]]] = {
    "": lambda r, dtype: {},
    "causal": lambda r, dtype: dict(causal=True),
    "window": lambda r, dtype: dict(causal=True, window_size=(17, 0), softmax_scale=0.3),
    "softcap": lambda r, dtype: dict(softcap=5.0, window_size=(20, 9)),
    "alibi": lambda r, dtype: dict(causal=True, alibi_slopes=r.rand(4)),
    "sinks": lambda r, dtype: dict(causal=True, sinks=r.leaf("sinks", 4)),
    "prefix": lambda r, dtype: {n: r.leaf(n, 2, 5, 2, 64, dtype=dtype) for n in ("prefix_k", "prefix_v")},
    "dropout": lambda r, dtype: dict(dropout_p=0.2, seed=11),
}
WITH_BIAS = (*HOW_ATTENTION, "bias", "mask")
SEQLENS = ("1x133", "70x70", "37x90")


def attention_inputs(r: Inputs, q: tuple[int, ...], k: tuple[int, ...], dtype: str) -> Any:
    return [r.leaf(name, *shape, dtype=dtype) for name, shape in (("q", q), ("k", k), ("v", k))]


@cases(cuda=7, triton=47, how=WITH_BIAS, seqlens=SEQLENS, dim=(40, 64, 128), dtype=FLOATS)
def attention(r: Inputs, how: str, seqlens: str, dim: int, dtype: str) -> Any:
    sq, sk = map(int, seqlens.split("x"))
    dim = 64 if how == "prefix" else dim
    if how == "bias":
        options: dict[str, Any] = dict(attn_bias=r.leaf("attn_bias", 1, 4, sq, sk))
    elif how == "mask":
        options = dict(attn_bias=r.rand(2, 1, sq, sk) < 0.7)
    else:
        options = HOW_ATTENTION[how](r, dtype)
    q, k, v = attention_inputs(r, (2, sq, 4, dim), (2, sk, 2, dim), dtype)
    return bitfuse.attention(q, k, v, return_lse=True, **options)


@cases(cuda=3, triton=13, how=(*HOW_ATTENTION,), dtype=FLOATS)
def varlen_attention(r: Inputs, how: str, dtype: str) -> Any:
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 37, 50], [0, 70, 83]))
    options = HOW_ATTENTION[how](r, dtype)
    q, k, v = attention_inputs(r, (50, 4, 64), (83, 2, 64), dtype)
    return bitfuse.varlen_attention(q, k, v, cu_q, cu_k, 37, 70, return_lse=True, **options)


@cases(cuda=5, triton=11, how=("", "causal", "mask", "float mask", "gqa"), dtype=FLOATS)
def scaled_dot_product_attention(r: Inputs, how: str, dtype: str) -> Any:
    heads = 2 if how == "gqa" else 4
    q, k, v = attention_inputs(r, (2, 4, 37, 64), (2, heads, 70, 64), dtype)
    mask = r.leaf("mask", 37, 70, dtype=dtype) if how == "float mask" else None
    mask = r.rand(2, 1, 37, 70) < 0.7 if how == "mask" else mask
    return bitfuse.scaled_dot_product_attention(q, k, v, mask, 0.0, how == "causal", enable_gqa=how == "gqa")


@cases(triton=5, how=("", "empty"), dtype=FLOATS)
def merge_attention(r: Inputs, how: str, dtype: str) -> Any:
    o1, o2 = (r.leaf(name, 2, 9, 3, 40, dtype=dtype) for name in ("o1", "o2"))
    lse1, lse2 = (r.leaf(name, 2, 3, 9) for name in ("lse1", "lse2"))
    if how == "empty":
        lse1.data[:, 0], lse1.data[0, 1], lse2.data[:, 0] = -torch.inf, -torch.inf, -torch.inf
    return bitfuse.merge_attention(o1, lse1, o2, lse2)


def rotary(r: Inputs, dim: int) -> dict[str, torch.Tensor]:
    angles = r.rand(256, dim // 2) * 6
    return dict(rotary_cos=angles.cos(), rotary_sin=angles.sin())


@cases(triton=7, how=("", "positions", "partial"), pairs=("halves", "interleaved"), dtype=FLOATS)
def rope(r: Inputs, how: str, pairs: str, dtype: str) -> Any:
    turn = rotary(r, 24 if how == "partial" else 40)
    positions = r.randint(0, 256, 2, 13) if how == "positions" else None
    x = r.leaf("x", 2, 13, 3, 40, dtype=dtype)
    return bitfuse.rope(x, turn["rotary_cos"], turn["rotary_sin"], positions, pairs == "interleaved")


# caches


CACHES = ("none", "fp8", "int8", "int4")
PAGING: dict[str, dict[str, Any]] = {
    "": {},
    "paged": dict(page_size=32),
    "pages given out": dict(page_size=16, pages=24),
}


def cache_of(r: Inputs, format: str, paging: str, dim: int, dtype: str) -> bitfuse.KVCache:
    """A cache with 77 and 70 tokens."""
    scales: dict[str, Any] = dict(k_scale=r.rand(2) + 0.5, v_scale=r.rand(2) + 0.5) if format == "fp8" else {}
    number = getattr(torch, dtype)
    cache = bitfuse.KVCache(2, 160, 2, dim, dtype=number, format=format, **PAGING[paging], **scales)
    with bitfuse.use_backend("reference"):
        for tokens in (70, 7):
            cache.append(*(r.randn(2, tokens, 2, dim, dtype=dtype) for _ in "kv"))
    cache.seqlens[1] -= 7
    return cache


def content(cache: bitfuse.KVCache) -> dict[str, Any]:
    made = {name: t for name, t in cache.tensors._asdict().items() if isinstance(t, torch.Tensor)}
    rows = {f"{name}{b}": t for b in (0, 1) for name, t in zip("kv", cache.gather(b), strict=True)}
    return {**made, **rows, "seqlens": cache.seqlens}


@cases(cuda=7, triton=31, format=CACHES, paging=(*PAGING,), how=("", "rope"), dim=(40, 64), dtype=FLOATS)
def append_kv(r: Inputs, format: str, paging: str, how: str, dim: int, dtype: str) -> Any:
    cache = cache_of(r, format, paging, dim, dtype)
    for tokens in (1, 37):
        k, v = (r.randn(2, tokens, 2, dim, dtype=dtype) for _ in "kv")
        turn: dict[str, Any] = rotary(r, dim) if how else {}
        bitfuse.append_kv(k, v, cache, **turn)
    return content(cache)


HOW_DECODE: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    "": lambda r: {},
    "window": lambda r: dict(window_size=(40, 0), softcap=8.0),
    "alibi": lambda r: dict(alibi_slopes=r.rand(4)),
    "sinks": lambda r: dict(sinks=r.randn(4)),
    "tree": lambda r: dict(tree_mask=torch.eye(3, dtype=torch.bool)[None] | (r.rand(2, 3, 3) < 0.5)),
    "new": lambda r: {},
    "new rope": lambda r: rotary(r, 64),
}


@cases(cuda=5, triton=37, format=CACHES, paging=(*PAGING,), how=(*HOW_DECODE,), queries=(1, 3), dtype=FLOATS)
def decode_attention(r: Inputs, format: str, paging: str, how: str, queries: int, dtype: str) -> Any:
    queries, dim = 3 if how == "tree" else queries, 64
    cache = cache_of(r, format, paging, dim, dtype)
    q = r.randn(2, queries, 4, dim, dtype=dtype)
    options = HOW_DECODE[how](r)
    if how.startswith("new"):
        options |= {name: r.randn(2, queries, 2, dim, dtype=dtype) for name in "kv"}
    out, lse = bitfuse.decode_attention(q, cache, return_lse=True, **options)
    return {"out": out, "lse": lse, **(content(cache) if how.startswith("new") else {})}


@cases(cuda=5, triton=7, dtype=FLOATS, dim=(40, 128), how=("", "fp8"))
def decode_attention_tensors(r: Inputs, dtype: str, dim: int, how: str) -> Any:
    number = torch.float8_e4m3fn if how else getattr(torch, dtype)
    k, v = (r.randn(2, 300, 2, dim, dtype=dtype).to(number) for _ in "kv")
    seqlens = torch.tensor([300, 129], dtype=torch.int32)
    return bitfuse.decode_attention(r.randn(2, 1, 4, dim, dtype=dtype), k, v, seqlens, return_lse=True)


@cases(cuda=0, triton=0, format=CACHES)
def cache_pages(r: Inputs, format: str) -> Any:
    cache = cache_of(r, format, "pages given out", 64, "float32")
    cache.fork(0, 1)
    cache.append(*(r.randn(2, 4, 2, 64) for _ in "kv"))
    cache.keep_path(torch.tensor([[0, 2, -1, -1], [1, 2, 3, -1]]), torch.tensor([2, 3]))
    cache.reorder([1, 0])
    cache.truncate(75, 1)
    return content(cache)


@cases(triton=5, format=CACHES[1:], dim=(40, 128), dtype=FLOATS)
def quantize_kv(r: Inputs, format: str, dim: int, dtype: str) -> Any:
    k, v = (r.randn(2, 128, 3, dim, dtype=dtype) for _ in "kv")
    return bitfuse.quantize_kv(k, v, format)


# samplers


HOW_SAMPLE: dict[str, dict[str, Any]] = {
    "": {},
    "greedy": dict(temperature=0.0),
    "top_k": dict(temperature=0.7, top_k=5),
    "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.05, temperature=1.3),
    "all": dict(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01),
}


@cases(triton=13, how=(*HOW_SAMPLE,), vocabulary=(5, 300, 5001), dtype=FLOATS)
def sample(r: Inputs, how: str, vocabulary: int, dtype: str) -> Any:
    logits = r.randn(9, vocabulary, dtype=dtype, scale=3.0)
    return bitfuse.sample(logits, r.rand(9), **HOW_SAMPLE[how], return_probs=True)


def probabilities(r: Inputs, *shape: int, dtype: str) -> torch.Tensor:
    p = r.rand(*shape) ** 4
    return (p / p.sum(-1, keepdim=True)).to(getattr(torch, dtype))


@cases(triton=7, vocabulary=(5, 300, 2049), number=("float32", "float64"), dtype=FLOATS)
def speculative_sample(r: Inputs, vocabulary: int, number: str, dtype: str) -> Any:
    p, q = probabilities(r, 7, 4, vocabulary, dtype=dtype), probabilities(r, 7, 5, vocabulary, dtype=dtype)
    return bitfuse.speculative_sample(p, r.randint(-1, vocabulary, 7, 4), q, r.rand(7, 5, dtype=number))


@cases(triton=11, vocabulary=(5, 300, 2049), how=("", "replacement", "rows"), dtype=FLOATS)
def speculative_sample_tree(r: Inputs, vocabulary: int, how: str, dtype: str) -> Any:
    parents = torch.tensor([-1, -1, 0, 0, 1, 2, 2])
    nodes = len(parents)
    p, q = (probabilities(r, 5, nodes + 1, vocabulary, dtype=dtype) for _ in "pq")
    rows = parents + 1 if how == "rows" else None
    p = p if how == "rows" else p[:, 1:]
    ids, uniforms = r.randint(0, vocabulary, 5, nodes), r.rand(5, nodes + 1, dtype="float64")
    return bitfuse.speculative_sample_tree(p, ids, parents, q, uniforms, rows, how == "replacement")


# layers, optimisers, models


@cases(triton=7, size=(5000, 8209), block=(64, 256, 4096), dtype=FLOATS)
def adamw8bit(r: Inputs, size: int, block: int, dtype: str) -> Any:
    p = torch.nn.Parameter(r.randn(size, dtype=dtype))
    small = torch.nn.Parameter(r.randn(33, dtype=dtype))
    optimizer = bitfuse.optim.AdamW8bit([p, small], 1e-2, weight_decay=0.1, block_size=block)
    for _ in range(3):
        p.grad, small.grad = r.randn(size, dtype=dtype), r.randn(33, dtype=dtype)
        optimizer.step()
    states = [optimizer.state[t] for t in (p, small)]
    every = {f"{i} {k}": s for i, state in enumerate(states) for k, s in state.items()}
    return {"p": p, "small": small, **{k: torch.as_tensor(s) for k, s in every.items()}}


LAYERS: dict[str, Callable[[torch.nn.Linear], torch.nn.Module]] = {
    "Linear": lambda base: bitfuse.nn.Linear.from_float(base, "int4"),
    "LoRALinear": lambda base: bitfuse.nn.LoRALinear(base, 8, 16, 0.1),
    "DoRA over nf4": lambda base: bitfuse.nn.LoRALinear(
        bitfuse.nn.Linear.from_float(base, "nf4"), 5, use_dora=True
    ),
    "IA3Linear": lambda base: bitfuse.nn.IA3Linear(base),
    "IA3Linear feedforward": lambda base: bitfuse.nn.IA3Linear(base, True),
    "BottleneckAdapter": lambda base: bitfuse.nn.BottleneckAdapter(K, 13, dtype=base.weight.dtype),
}


@cases(cuda=0, triton=0, layer=(*LAYERS,), dtype=FLOATS)
def nn_layer(r: Inputs, layer: str, dtype: str) -> Any:
    base: Any = r.parameters(torch.nn.Linear(K, 41, dtype=getattr(torch, dtype)))
    r.learnt.clear()
    made = r.parameters(LAYERS[layer](base)) if layer != "Linear" else LAYERS[layer](base)
    return made(r.leaf("x", 2, 7, K, dtype=dtype))


@cases(cuda=0, triton=0, how=("", "causal", "weights"), dtype=FLOATS)
def nn_multihead_attention(r: Inputs, how: str, dtype: str) -> Any:
    layer = bitfuse.nn.MultiheadAttention(80, 5, batch_first=True, dtype=getattr(torch, dtype))
    x = r.leaf("x", 2, 37, 80, dtype=dtype)
    mask = torch.ones(37, 37, dtype=torch.bool).triu(1) if how == "causal" else None
    made = r.parameters(layer)(x, x, x, attn_mask=mask, need_weights=how == "weights")
    return made if how == "weights" else made[0]


@cases(cuda=0, triton=0, format=("", "int8", "nf4"), kind=("lora", "dora", "ia3"))
def model(r: Inputs, format: str, kind: str) -> Any:
    net = torch.nn.Sequential(torch.nn.Linear(K, 128), torch.nn.SiLU(), torch.nn.Linear(128, 40))
    r.parameters(net)
    if format:
        bitfuse.quantize_(net, format, progress=False)
    if kind == "ia3":
        bitfuse.add_ia3_(net, ["0", "2"], ["2"])
    else:
        bitfuse.add_lora_(net, ["0", "2"], 8, use_dora=kind == "dora")
    r.learnt.clear()
    for name, p in net.named_parameters():
        if p.requires_grad:
            p.data = r.randn(*p.shape, scale=0.1)
            r.learnt[name] = p
    x = r.leaf("x", 7, K)
    y = net(x)
    with torch.no_grad():
        net.eval()
        bitfuse.merge_adapters_(net)
        return {"y": y, "merged": net(x)}


@cases(cuda=0, triton=0, how=("plain", "kvpacked", "qkvpacked", "varlen", "kvcache"), dtype=FLOATS)
def flash_attn(r: Inputs, how: str, dtype: str) -> Any:
    library = bitfuse.compat.flash_attn
    if how == "plain":
        q, k, v = attention_inputs(r, (2, 37, 4, 64), (2, 70, 2, 64), dtype)
        return library.flash_attn_func(q, k, v, causal=True)
    if how == "kvpacked":
        q, kv = r.leaf("q", 2, 37, 4, 64, dtype=dtype), r.leaf("kv", 2, 70, 2, 2, 64, dtype=dtype)
        return library.flash_attn_kvpacked_func(q, kv)
    if how == "qkvpacked":
        return library.flash_attn_qkvpacked_func(r.leaf("qkv", 2, 37, 3, 4, 64, dtype=dtype), causal=True)
    if how == "varlen":
        q, k, v = attention_inputs(r, (50, 4, 64), (50, 2, 64), dtype)
        lengths = torch.tensor([0, 13, 50], dtype=torch.int32)
        return library.flash_attn_varlen_func(q, k, v, lengths, lengths, 37, 37, causal=True)
    k_cache, v_cache = (r.randn(2, 90, 2, 64, dtype=dtype) for _ in "kv")
    q, (k, v) = r.randn(2, 1, 4, 64, dtype=dtype), (r.randn(2, 1, 2, 64, dtype=dtype) for _ in "kv")
    lengths = torch.tensor([80, 33], dtype=torch.int32)
    out = library.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths)
    return out, k_cache, v_cache


# running


def fingerprint(t: torch.Tensor | None) -> str:
    if t is None:
        return "none"
    data = t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{str(t.dtype)[6:]} {list(t.shape)} {hashlib.sha256(data).hexdigest()}"


def named(made: Any) -> dict[str, torch.Tensor]:
    """The tensors that a case returns."""
    if isinstance(made, torch.Tensor):
        return {"out": made}
    pairs = made.items() if isinstance(made, dict) else ((f"out{i}", t) for i, t in enumerate(made))
    return {name: t for name, t in pairs if isinstance(t, torch.Tensor)}


def outputs(case: Case) -> Iterator[tuple[str, str]]:
    """Each output's name and hash, then each gradient's."""
    stage = "outputs"
    try:
        r = Inputs(f"{case.op} {case.name}")
        made = named(case.call(r))
        yield from ((name, fingerprint(t)) for name, t in made.items())
        learning = [t for t in made.values() if t.requires_grad]
        if not learning or not r.learnt:
            return
        stage = "gradients"
        given = [r.randn(*t.shape).to(t.dtype) for t in learning]
        grads = torch.autograd.grad(learning, list(r.learnt.values()), given, allow_unused=True)
        yield from ((f"grad {name}", fingerprint(g)) for name, g in zip(r.learnt, grads, strict=True))
    except bitfuse.BackendError:
        yield stage, "unserved"
    except Exception as error:  # a fault of one case is told and kept, and hides no other
        print(f"\n{case.op} {case.name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        yield stage, f"raised {type(error).__name__}"


def chosen(target: str, ops: list[str]) -> list[Case]:
    backend, _, level = target.partition("/")
    made = []
    for op in ops or CASES:
        cuda, triton = STRIDES[op]
        stride = triton if backend == "triton" else cuda
        if not level.startswith("sm"):
            made += CASES[op]
        elif stride and backend == "triton":  # compiling takes most of the time: each capability has half
            made += CASES[op][::stride][level == "sm90" :: 2]
        elif stride:
            made += CASES[op][::stride]
    return made


def run(target: str, ops: list[str]) -> dict[str, str]:
    """Every case on one backend, in this process."""
    backend, _, level = target.partition("/")
    warnings.simplefilter("ignore")
    logging.disable()
    found: dict[str, str] = {}
    picked = chosen(target, ops)
    for i, case in enumerate(picked):
        print(f"\r{target} {i + 1} of {len(picked)} ", end="", file=sys.stderr, flush=True)
        with contextlib.ExitStack() as stack:
            if level.startswith("sm"):
                stack.enter_context(cusim.device(sm=int(level[2:]), racecheck=0, seed=1))
            if backend != "default":
                stack.enter_context(bitfuse.use_backend(backend))
            for name, value in outputs(case):
                found[f"{case.op}/{target}/{case.name or 'plain'}/{name}"] = value
    return found


def run_all(backends: list[str], ops: list[str], tests: Path) -> dict[str, str]:
    """Each target in a process of its own, for the level is read once."""
    found: dict[str, str] = {}
    for target in TARGETS:
        backend, _, level = target.partition("/")
        if backends and backend not in backends:
            continue
        begin = time.monotonic()
        environment = {k: v for k, v in os.environ.items() if k not in ("BITFUSE_BACKEND", "BITFUSE_CPU_ISA")}
        environment |= {"BITFUSE_CPU_ISA": level} if backend == "cpp" else {}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # on the simulator, GPU or not
        environment["MKL_NUM_THREADS"] = "1"  # products of torch itself depend on how many there are
        options = [word for op in ops for word in ("--op", op)]
        command = [sys.executable, __file__, "run", target, "--tests", str(tests), *options]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode == NO_LEVEL:
            print(f"{target}: left out, this machine lacks it", file=sys.stderr)
            continue
        if done.returncode:
            sys.exit(f"\n{target}: exit status {done.returncode}")
        found |= json.loads(done.stdout.splitlines()[-1])
        print(f"\r{target}: {time.monotonic() - begin:.0f} s".ljust(60), file=sys.stderr)
    return found


def summary(found: dict[str, str]) -> str:
    by_case = len({key.rsplit("/", 1)[0] for key in found})
    unserved, raised = (sum(v.startswith(word) for v in found.values()) for word in ("unserved", "raised"))
    return f"{by_case} cases, {len(found)} values, of them {unserved} unserved, {raised} raised"


def compare(before: dict[str, str], now: dict[str, str]) -> int:
    """Print what differs; the exit status."""
    wrong = 0
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, "missing"), now.get(key, "missing")
        if old != new:
            wrong += 1
            print(f"{key}\n    {old}\n    {new}")
    print(f"{summary(now)}: {f'{wrong} differ' if wrong else 'all the same'}")
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("record", "compare", "run"), help="run is one target, to stdout")
    parser.add_argument("file", help="of hashes, JSON")
    parser.add_argument("other", nargs="?", help="compare: a second file, in place of a run")
    backends = sorted({target.partition("/")[0] for target in TARGETS})
    parser.add_argument("--backend", action="append", default=[], choices=backends)
    parser.add_argument(
        "--op", action="append", default=[], choices=CASES, metavar="OP", help=", ".join(CASES)
    )
    parser.add_argument("--tests", type=Path, default=Path(__file__).resolve().parent, help="where cusim is")
    a = parser.parse_args()
    if a.command == "run":
        print(f"\n{json.dumps(run(a.file, a.op))}")
        return 0
    if a.command == "record":
        found = run_all(a.backend, a.op, a.tests)
        Path(a.file).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(summary(found))
        return 0

    def asked(key: str) -> bool:
        op, backend, _ = key.split("/", 2)
        return (not a.op or op in a.op) and (not a.backend or backend in a.backend)

    before = {key: value for key, value in json.loads(Path(a.file).read_text()).items() if asked(key)}
    if a.other is None:
        return compare(before, run_all(a.backend, a.op, a.tests))
    return compare(before, {k: v for k, v in json.loads(Path(a.other).read_text()).items() if asked(k)})


if __name__ == "__main__":
    sys.exit(main())

"""Weights with leading dimensions, float offsets and scales that rows share; where a weight can be cut."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse.nn import Linear
from bitfuse.ops.linear.lowbit_linear import forward_op
from bitfuse.weights.formats import Format, get_format
from bitfuse.weights.packing import unpack
from test_weight import EVERY, LATER, name_of

ALL = [*EVERY, *LATER]
ACT_ORDER = torch.randperm(256, generator=torch.Generator().manual_seed(1)) // 32


def test_an_offset_is_the_formula() -> None:
    weight = torch.randn(16, 64) + 1
    w = bitfuse.quantize(weight, "int4", group_size=32, offset=True)
    assert w.zeros is None and w.offsets is not None and w.offsets.dtype == torch.float16
    codes, numbers = unpack(w.qweight, 4), w.dequantize()
    for n in range(16):
        for k in range(64):
            g = k // 32
            expected = float(codes[n, k]) * float(w.scales[n, g]) - float(w.offsets[n, g])
            assert float(numbers[n, k]) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    # a group need not hold 0: far from it, offsets are as fine as around it
    far = bitfuse.quantize(weight + 9, "int4", group_size=32, offset=True, scale_dtype=torch.float32)
    near = bitfuse.quantize(weight, "int4", group_size=32, offset=True, scale_dtype=torch.float32)
    torch.testing.assert_close(far.dequantize() - 9, near.dequantize(), rtol=0, atol=1e-4)


def test_offsets_of_groups_that_are_constant() -> None:
    weight = torch.full((8, 64), 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w = bitfuse.quantize(weight, "int4", group_size=32, offset=True)
    assert torch.equal(w.dequantize(), weight.half().float())


def test_rows_that_share_scales_are_quantised_as_one_group() -> None:
    weight = torch.randn(20, 128)
    w = bitfuse.quantize(weight, "int8", group_size=64, scale_rows=8)
    assert w.scales.shape == (3, 2)
    for block in range(3):
        for g in range(2):
            part = weight[8 * block : 8 * block + 8, 64 * g : 64 * g + 64]
            alone = bitfuse.quantize(part.reshape(1, -1), "int8", group_size=part.numel())
            assert torch.equal(alone.scales.view(()), w.scales[block, g])
            numbers = w.dequantize()[8 * block : 8 * block + 8, 64 * g : 64 * g + 64]
            assert torch.equal(alone.dequantize().view(part.shape), numbers)


@pytest.mark.parametrize("options", ALL, ids=name_of)
def test_leading_dimensions(options: dict[str, Any]) -> None:
    """Each matrix is the weight that it would be alone, and is taken out without a copy."""
    dense = torch.randn(2, 3, 24, 256)
    w = bitfuse.quantize(dense, **options)
    assert w.shape == w.size() == dense.shape and w.stride() == dense.stride() and len(w) == 2
    assert w.dequantize().shape == dense.shape and "2 x 3 x 24 x 256" in repr(w)
    w.check_values()
    for a in range(2):
        assert torch.equal(w[a].dequantize(), w.dequantize()[a])
        for e in range(3):
            one, alone = w[a, e], bitfuse.quantize(dense[a, e], **options)
            assert isinstance(one, bitfuse.LowBitWeight) and one.shape == (24, 256)
            assert torch.equal(one.dequantize(), alone.dequantize())
            for name, t in one.tensors().items():
                assert torch.equal(t.view(torch.uint8), alone.tensors()[name].view(torch.uint8)), name
                assert t.data_ptr() == w.tensors()[name][a, e].data_ptr(), name
    assert w[:, 1:].shape == (2, 2, 24, 256) and torch.equal(w[:, 1:].dequantize(), w.dequantize()[:, 1:])
    assert torch.equal(w[1, torch.tensor(2)].dequantize(), w[-1][-1].dequantize())
    assert torch.equal(torch.stack(list(w)), w.dequantize())
    assert torch.equal(w[0, 0, 3], w.dequantize()[0, 0, 3])  # numbers: no weight is less than a matrix
    other = pickle.loads(pickle.dumps(w))
    assert torch.equal(other.dequantize(), w.dequantize()) and other.format == w.format
    assert torch.equal(w.to("cpu").dequantize(), w.dequantize())
    assert w.relative_error(w.dequantize()) == 0
    assert torch.equal(w.mul_(2)[1].dequantize(), other.dequantize()[1] * 2)


@pytest.mark.parametrize("options", ALL, ids=name_of)
def test_products_of_leading_dimensions(options: dict[str, Any]) -> None:
    """As torch.matmul: leading dimensions broadcast; forward, gradients and a bias for each matrix."""
    w, bias = bitfuse.quantize(torch.randn(3, 24, 256), **options), torch.randn(3, 24, requires_grad=True)
    for lead in ((3,), (2, 3), (1,), (), (2, 1)):
        x = torch.randn(*lead, 5, 256, requires_grad=True)
        y = bitfuse.lowbit_linear(x, w, bias)
        xs = x.expand(*y.shape[:-2], 5, 256).unbind(-3)
        each = [bitfuse.lowbit_linear(xe, w[e], bias[e]) for e, xe in enumerate(xs)]
        assert torch.equal(y, torch.stack(each, -3))
        torch.testing.assert_close(y, x @ w.dequantize().mT + bias.unsqueeze(-2), rtol=1e-3, atol=1e-3)
        found = torch.autograd.grad(y.square().sum(), (x, bias))
        wanted = torch.autograd.grad((x @ w.dequantize().mT + bias.unsqueeze(-2)).square().sum(), (x, bias))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-1)


def test_adapters_of_leading_dimensions() -> None:
    """An adapter, a bias and an out_scale for each matrix; forward and gradients are those of each alone."""
    w = bitfuse.quantize(torch.randn(2, 3, 24, 64), "int4", group_size=32)
    sizes = ((4, 1, 3, 5, 64), (2, 3, 4, 64), (2, 3, 24, 4), (2, 3, 24), (2, 3, 24))
    x, a, b, bias, scale = tensors = tuple(torch.randn(size, requires_grad=True) for size in sizes)
    got = bitfuse.lora_linear(x, w, a, b, 0.5, bias, 0.25, seed=7, out_scale=scale)
    assert got.shape == (4, 2, 3, 5, 24)
    rows = []
    for i in range(2):
        row = []
        for j in range(3):
            own = (x[:, 0, j], w[i, j], a[i, j], b[i, j], 0.5, bias[i, j], 0.25)
            row.append(bitfuse.lora_linear(*own, seed=7 + 3 * i + j, out_scale=scale[i, j]))
        rows.append(torch.stack(row, 1))
    wanted = torch.stack(rows, 1)
    assert torch.equal(got, wanted)
    grads = (torch.autograd.grad(y.square().sum(), tensors) for y in (got, wanted))
    torch.testing.assert_close(*grads)
    assert bitfuse.explain(bitfuse.lora_linear, x, w, a, b, 0.5, bias).chosen


def test_products_of_leading_dimensions_of_one_and_of_none() -> None:
    w = bitfuse.quantize(torch.randn(2, 1, 16, 64), "int8")
    x = torch.randn(4, 2, 3, 5, 64)
    torch.testing.assert_close(bitfuse.lowbit_linear(x, w), x @ w.dequantize().mT, rtol=1e-4, atol=1e-4)
    none = bitfuse.quantize(torch.randn(0, 16, 64), "nf4")
    assert none.shape == (0, 16, 64) and none.dequantize().shape == (0, 16, 64)
    assert bitfuse.lowbit_linear(torch.randn(0, 5, 64), none).shape == (0, 5, 16)
    compiled = torch.compile(bitfuse.lowbit_linear, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x, w), bitfuse.lowbit_linear(x, w))
    assert bitfuse.explain(bitfuse.lowbit_linear, x, w).chosen


def test_an_order_of_columns_for_each_matrix() -> None:
    dense = torch.randn(2, 16, 256)
    g_idx = torch.stack([ACT_ORDER, ACT_ORDER.flip(0)])
    w = bitfuse.quantize(dense, "int4", group_size=32, g_idx=g_idx)
    for e in range(2):
        alone = bitfuse.quantize(dense[e], "int4", group_size=32, g_idx=g_idx[e])
        assert torch.equal(w[e].dequantize(), alone.dequantize()) and torch.equal(
            w.dequantize()[e], w[e].float()
        )
    x = torch.randn(2, 3, 256)
    torch.testing.assert_close(bitfuse.lowbit_linear(x, w), x @ w.dequantize().mT, rtol=1e-4, atol=1e-3)
    shared = bitfuse.quantize(dense, "int4", group_size=32, g_idx=ACT_ORDER)
    assert torch.equal(shared[0].dequantize(), w[0].dequantize())
    w.check_values()


@pytest.mark.parametrize("options", [*ALL, dict(format="int4", group_size=32, g_idx=ACT_ORDER)], ids=name_of)
def test_a_shard_is_a_shard_of_the_matrix(options: dict[str, Any]) -> None:
    for shape in ((300, 256), (3, 40, 256)):
        w = bitfuse.quantize(torch.randn(shape), **options)
        for dim, size in enumerate(shape):
            multiple = w.cut_multiple(dim)
            assert multiple == w.cut_multiple(dim - len(shape)) and multiple >= 1
            step = max(multiple, size // 3 // multiple * multiple)
            for start in range(0, size, step):
                length = min(step, size - start)
                part = w.shard(dim, start, length)
                assert torch.equal(part.dequantize(), w.dequantize().narrow(dim, start, length))
                assert all(dim < len(shape) - 1 or t.is_contiguous() for t in part.tensors().values())
            if multiple > 1 and multiple < size:
                with pytest.raises(ValueError, match=f"start is 1, expected a multiple of {multiple} in"):
                    w.shard(dim, 1, multiple)
                with pytest.raises(ValueError, match="length is 1, expected a multiple of"):
                    w.shard(dim, 0, 1)


def test_where_a_weight_can_be_cut() -> None:
    dense = torch.randn(512, 256)
    for options, rows, columns in (
        (dict(format="int4", group_size=32), 1, 32),
        (dict(format="int8"), 1, 8),
        (dict(format="nf4"), 1, 64),
        (dict(format="nf4", nested=True), 64, 256),
        (dict(format="fp8", group_size=128, scale_rows=128), 128, 128),
        (dict(format="int4", group_size=32, g_idx=ACT_ORDER), 1, 256),
    ):
        w = bitfuse.quantize(dense, **options)
        assert (w.cut_multiple(0), w.cut_multiple(-1)) == (rows, columns), options
    w = bitfuse.quantize(dense, "int4")
    with pytest.raises(IndexError, match="dim is 2, expected -2 to 1"):
        w.cut_multiple(2)
    for start, length in ((-1, 8), (0, 513), (512, 8)):
        with pytest.raises(ValueError, match="expected a part of the 512 of dimension 0"):
            w.shard(0, start, length)
    with pytest.raises(ValueError, match="sorted by group"):
        bitfuse.quantize(dense, "int4", group_size=32, g_idx=ACT_ORDER).shard(1, 0, 32)


def test_layers_of_what_version_0_1_had_are_described_as_then() -> None:
    """A state that 0.1 can hold says nothing that it does not know."""
    import json

    def said(layer: Linear) -> dict[str, Any]:
        return dict(json.loads(bytes(layer.get_extra_state().tolist())))

    assert not {"offset", "scale_rows"} & said(Linear(128, 8)).keys()
    grown = Linear(128, 8, offset=True, scale_rows=4)
    assert said(grown)["offset"] is True and said(grown)["scale_rows"] == 4
    with pytest.raises(ValueError, match="offset True"):
        Linear(128, 8, symmetric=False).load_state_dict(grown.state_dict())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="offset is True, but int4 is symmetric"):
        bitfuse.quantize(torch.randn(8, 128), "int4", offset=True, symmetric=True)
    with pytest.raises(ValueError, match="offset is True, but nf4 is a codebook"):
        get_format("nf4", offset=True)
    with pytest.raises(ValueError, match="scale_rows is 0, expected a positive number"):
        Format("int4", 4, scale_rows=0)
    with pytest.raises(ValueError, match=r"can't hold the scales and offsets .* scale_dtype=torch.float32"):
        bitfuse.quantize(torch.randn(8, 128) + 1e5, "int4", offset=True)
    dense = torch.randn(2, 16, 128)
    dense[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"weight\[1\]: weight .*\[2, 3\] is nan"):
        bitfuse.quantize(dense)
    w = bitfuse.quantize(torch.randn(3, 16, 128), "int4", offset=True)
    assert w.offsets is not None
    with pytest.raises(TypeError, match="offsets is missing"):
        replace(w, offsets=None)
    x = torch.randn(3, 4, 128)
    for args, words in (
        ((x[0, 0], w), r"x has shape \[128\], expected \[..., rows, 128\]"),
        ((x[:2], w), "expected leading dimensions that broadcast with w's"),
        ((x, w, torch.randn(16)), r"bias has shape \[16\], expected \[3, ...\], one for each matrix of w"),
    ):
        with pytest.raises(ValueError, match=words):
            bitfuse.lowbit_linear(*args)
    a, b = torch.randn(4, 128), torch.randn(16, 4)
    for refused in (
        lambda: Linear.from_weight(w),
        lambda: bitfuse.multi_lora_linear(x, w, [a], [b], torch.ones(1), torch.zeros(3, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=r"w has shape \[3, 16, 128\], expected .* pick a matrix of it"):
            refused()
    with pytest.raises(ValueError, match=r"lora_A has shape \[4, 128\], expected \[3, ..., ...\]"):
        bitfuse.lora_linear(x, w, a, b, 1.0)
    both = w[0].op_args._replace(zeros=torch.zeros(16, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="zeros and offsets are given"):
        forward_op(x[0], both, None)
    w.offsets[0, 1, 0] = float("inf")
    with pytest.raises(ValueError, match=r"offsets\[0, 1, 0\] is inf"):
        w.check_values()

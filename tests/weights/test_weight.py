"""quantize, dequantize and what a LowBitWeight refuses."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from backends import Target, targets
from bitfuse.ops.linear.lowbit_linear import forward_op, lowbit_linear_grad_x
from bitfuse.weights.formats import FIXED_SCALE_DTYPES, FORMATS, SCALE_DTYPES, Format, get_format, nested_code
from bitfuse.weights.packing import unpack

EVERY: list[dict[str, Any]] = [
    dict(format="int8"),
    dict(format="int8", group_size=64),
    dict(format="int8", symmetric=False),
    dict(format="int4"),
    dict(format="int4", group_size=32),
    dict(format="int4", group_size=64, symmetric=False),
    dict(format="int4", group_size=-1),
    dict(format="nf4"),
    dict(format="nf4", nested=True),
    dict(format="fp8"),
    dict(format="fp8", group_size=128),
]
# formats that a backend or several lack, and say so: the same mechanism, the same tests
LATER: list[dict[str, Any]] = [
    dict(format=name) for name in ("int3", "int2", "ternary", "fp4", "mxfp8", "mxfp4", "nvfp4")
]
# float offsets, scales that rows share
GROWN: list[dict[str, Any]] = [
    dict(format="int4", group_size=32, offset=True),
    dict(format="int8", offset=True, scale_dtype=torch.float32),
    dict(format="fp8", group_size=128, scale_rows=128),
    dict(format="int4", group_size=64, symmetric=False, scale_rows=8),
    dict(format="nf4", nested=True, scale_rows=4),
]
# codes that are no dword's whole bytes, and groups of one chunk of them
FEWER_BITS: list[dict[str, Any]] = [
    dict(format="int3", group_size=16),
    dict(format="int3", group_size=32, symmetric=False),
    dict(format="int3", offset=True),
    dict(format="int2", group_size=16, offset=True),
    dict(format="int2", group_size=8, symmetric=False),
]
LATER += GROWN

BUILT_IN = tuple(FORMATS)  # before a test registers one


def name_of(options: dict[str, Any]) -> str:
    parts = {k: f"{k}={v}" if k in ("offset", "scale_rows") else str(v) for k, v in options.items()}
    return "-".join(k if isinstance(options[k], torch.Tensor) else v for k, v in parts.items())


@pytest.mark.parametrize("options", [*EVERY, *(o for o in LATER if o != dict(format="ternary"))], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_weight_is_within_half_a_step(options: dict[str, Any], dtype: torch.dtype) -> None:
    spread = 0 if options.get("nested") else 1  # nested scales are rounded against the largest of 256
    weight = (torch.randn(48, 256) * torch.logspace(-2 * spread, spread, 48).unsqueeze(1)).to(dtype)
    w = bitfuse.quantize(weight, **options)
    values = w.format.values().nan_to_num(0).sort().values
    scales = w.float_scales().abs().repeat_interleave(w.format.scale_rows, 0)[:48]
    scales = scales.repeat_interleave(w.group_size, 1)
    # the widest gap between neighbours of the table; the top of a signed integer range lacks one code, hence
    # a whole step
    widest = float(values.diff().max())
    saturates = {"mxfp4": 1.0, "mxfp8": 2.0}  # a power of two as scale cuts the largest values off
    bound = scales * widest * (1.0 if w.format.is_integer else saturates.get(w.format.name, 0.5))
    if w.format.nested:
        bound += scales * 0.06  # a scale itself is off by up to a step of the 8-bit map
    error = (w.dequantize() - weight.float()).abs()
    assert bool((error <= bound * 1.001 + 1e-6).all())
    assert w.nbytes == sum(t.nbytes for t in w.tensors().values())
    assert w.relative_error(weight) == pytest.approx(
        float(error.double().norm() / weight.double().norm()), rel=1e-5
    )


def test_ternary_rounds_to_the_mean_magnitude() -> None:
    weight = torch.randn(16, 256)
    w = bitfuse.quantize(weight, "ternary")
    scale = weight.view(-1, 128).abs().mean(1, keepdim=True).half().float()
    expected = (weight.view(-1, 128) / scale).round().clamp(-1, 1) * scale
    torch.testing.assert_close(w.dequantize(), expected.view(16, 256))
    assert not bool((unpack(w.qweight, 2) == 3).any())


def test_dequantize_is_the_formula() -> None:
    w = bitfuse.quantize(torch.randn(16, 64), "int4", group_size=32, symmetric=False)
    codes = unpack(w.qweight, 4)
    assert w.zeros is not None
    for n in range(16):
        for k in range(64):
            expected = (float(codes[n, k]) - float(w.zeros[n, k // 32])) * float(w.scales[n, k // 32])
            assert float(w.dequantize()[n, k]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options", [o for o in EVERY if not o.get("nested") and o.get("symmetric", True)], ids=name_of
)
def test_quantising_again_changes_nothing(options: dict[str, Any]) -> None:
    """Numbers that the format holds exactly come back exactly (a zero point moves with the range, a nested
    scale is rounded)."""
    once = bitfuse.quantize(torch.randn(32, 128), **options).dequantize()
    again = bitfuse.quantize(once, **options).dequantize()
    torch.testing.assert_close(again, once, rtol=1e-3, atol=1e-3)


def test_all_zero_group() -> None:
    weight = torch.randn(8, 128)
    weight[3, 64:] = 0
    for options in EVERY:
        w = bitfuse.quantize(weight, **options)
        if not w.format.nested and w.group_size <= 64:
            assert bool((w.dequantize()[3, 64:] == 0).all()), options
        assert bool((bitfuse.quantize(torch.zeros(8, 128), **options).dequantize() == 0).all()), options
    assert bool((unpack(bitfuse.quantize(torch.zeros(8, 128), "nf4").qweight, 4) == 7).all())


def nf4_edges() -> torch.Tensor:
    """Every midpoint between two NF4 levels and its neighbours, at scale 1, then random blocks."""
    levels = torch.tensor(FORMATS["nf4"].codebook)
    mid = (levels[1:] + levels[:-1]) / 2
    edges = torch.cat(
        [mid, torch.nextafter(mid, torch.tensor(9.0)), torch.nextafter(mid, torch.tensor(-9.0))]
    )
    row = torch.cat([edges, torch.ones(64 - edges.numel())])
    return torch.cat([row.expand(8, 64), row.expand(8, 64) * 0.37, torch.randn(4080, 64), torch.zeros(8, 64)])


def test_nf4_codes_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = nf4_edges()
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    w = bitfuse.quantize(weight, "nf4")
    packed = theirs.view(w.qweight.shape)
    assert torch.equal((packed >> 4) | (packed << 4), w.qweight)
    assert torch.equal(state.absmax, w.scales.flatten())
    assert torch.equal(functional.dequantize_4bit(theirs, state), w.dequantize())
    assert torch.equal(functional.create_dynamic_map(), nested_code())


def test_double_quantisation_is_the_scheme_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(512, 1024)
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    w = bitfuse.quantize(weight, "nf4", nested=True)
    assert w.scale_scales is not None and w.scale_offset is not None
    torch.testing.assert_close(state.offset.view(1), w.scale_offset)
    torch.testing.assert_close(state.state2.absmax, w.scale_scales, rtol=1e-5, atol=1e-7)
    # their search takes a neighbour of the nearest value for some 1 in 1000 scales; ours is never further off
    assert float((state.absmax.view(w.scales.shape) == w.scales).float().mean()) > 0.99
    absmax = weight.view(512, 16, 64).abs().amax(-1)
    theirs = nested_code()[state.absmax.int()] * state.state2.absmax.repeat_interleave(256) + state.offset
    assert float((w.float_scales() - absmax).norm()) <= float((theirs.view(512, 16) - absmax).norm()) * 1.0001


def test_act_order() -> None:
    weight, g_idx = torch.randn(24, 96), torch.randperm(96) // 32
    w = bitfuse.quantize(weight, "int4", group_size=32, g_idx=g_idx)
    plain = bitfuse.quantize(weight[:, torch.argsort(g_idx, stable=True)], "int4", group_size=32)
    assert torch.equal(w.qweight, plain.qweight)
    assert w.perm is not None
    assert torch.equal(w.dequantize()[:, w.perm], plain.dequantize())


def test_a_format_of_ones_own() -> None:
    """The mechanism takes any table and any width: a 3-bit codebook, unknown to the package until now."""
    table = (-4.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
    format = Format("e3m0", 3, group_size=32, codebook=table)
    with pytest.raises(ValueError, match="format 'e3m0' is not registered"):
        bitfuse.quantize(torch.randn(16, 64), format)
    try:
        bitfuse.register_format(format)
        w = bitfuse.quantize(torch.randn(16, 64), "e3m0")
        x = torch.randn(3, 64)
        torch.testing.assert_close(bitfuse.lowbit_linear(x, w), x @ w.dequantize().T)
        assert w.qweight.shape == (16, 24)
        assert w.relative_error(w.dequantize()) == 0
        with pytest.raises(ValueError, match="'e3m0' is registered already"):
            bitfuse.register_format(Format("e3m0", 3, codebook=table[::-1]))
    finally:
        FORMATS.pop("e3m0", None)
    with pytest.raises(ValueError, match="format 'nf4' is not registered"):
        bitfuse.quantize(torch.randn(16, 64), Format("nf4", 4, group_size=32))


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_survives_pickle(name: str) -> None:
    assert pickle.loads(pickle.dumps(FORMATS[name])) == copy.deepcopy(FORMATS[name]) == FORMATS[name]


def test_empty() -> None:
    w = bitfuse.quantize(torch.zeros(0, 64), "int4", group_size=32)
    assert w.dequantize().shape == (0, 64)
    w.check_values()


STRIDED = {
    "transposed": lambda: torch.randn(256, 64).t(),
    "columns": lambda: torch.randn(64, 400)[:, 5:261],
    "every second row": lambda: torch.randn(128, 256)[::2],
    "chunk": lambda: torch.randn(64, 512).chunk(2, 1)[1],
    "expanded": lambda: torch.randn(1, 256).expand(64, 256),
    "expert": lambda: torch.randn(3, 256, 64)[1].t(),
}


@pytest.mark.parametrize("options", [*EVERY, *LATER], ids=name_of)
def test_a_matrix_of_any_strides(options: dict[str, Any]) -> None:
    for name, make in STRIDED.items():
        for dtype in (torch.float32, torch.bfloat16):
            weight = make().to(dtype) if name != "expanded" else make()
            got, want = (bitfuse.quantize(w, **options).tensors() for w in (weight, weight.contiguous()))
            assert all(torch.equal(t, want[key]) for key, t in got.items()), name


def test_groups_fit_in_features_by_default() -> None:
    for name, k, group in (
        ("int4", 576, 64), ("int4", 4104, 8), ("int4", 256, 128), ("int4", 96, 32), ("nf4", 2880, 64),
        ("nf4", 24, 8), ("mxfp4", 2880, 32), ("nvfp4", 40, 8), ("int3", 192, 64), ("int8", 576, -1),
    ):  # fmt: skip
        w = bitfuse.quantize(torch.randn(8, k), name)
        assert w.format.group_size == bitfuse.nn.Linear(k, 8, format=name).format.group_size == group
        assert w.relative_error(w.dequantize()) == 0
        if group not in (FORMATS[name].group_size, -1):
            with pytest.raises(ValueError, match="does not divide"):
                bitfuse.quantize(torch.randn(8, k), name, group_size=FORMATS[name].group_size)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [*SCALE_DTYPES, *FIXED_SCALE_DTYPES], ids=str)
def test_a_scale_dtype_that_is_taken_runs(name: str, dtype: torch.dtype) -> None:
    fixed = FORMATS[name].scale_dtype in FIXED_SCALE_DTYPES
    if dtype == FORMATS[name].scale_dtype or not (fixed or dtype in FIXED_SCALE_DTYPES):
        w = bitfuse.quantize(torch.randn(8, 128), name, scale_dtype=dtype)
        assert bool(torch.isfinite(bitfuse.lowbit_linear(torch.randn(2, 128), w)).all())
        return
    for make in (
        lambda: bitfuse.quantize(torch.randn(8, 128), name, scale_dtype=dtype),
        lambda: bitfuse.nn.Linear(128, 8, format=name, scale_dtype=dtype),
        lambda: bitfuse.quantize_(torch.nn.Sequential(torch.nn.Linear(8, 8)), name, scale_dtype=dtype),
    ):
        with pytest.raises(ValueError, match=f"scale_dtype is {dtype}, expected"):
            make()


@pytest.mark.parametrize("options", [*EVERY, *LATER], ids=name_of)
def test_numbers_at_the_ends_of_their_range(options: dict[str, Any]) -> None:
    """Finite weights whose sum or sum of magnitudes is not: served, or refused by what can't hold them."""
    for weight in (
        torch.full((8, 128), 3e38), torch.full((8, 128), -3e38), torch.full((8, 128), 60000.0).half(),
        torch.cat([torch.full((8, 64), 3e38), torch.full((8, 64), -3e38)], 1), torch.full((8, 128), 1e-40),
    ):  # fmt: skip
        try:
            w = bitfuse.quantize(weight, **options)
        except ValueError as why:
            # beside an offset a code's product is as wide as the group's range
            wide = w_dtype(options) == torch.float32 and not options.get("offset")
            assert "can't hold the scales" in str(why) and not wide, why
            continue
        error = (w.dequantize().double() - weight.double()).norm() / weight.double().norm()
        assert bool(torch.isfinite(w.dequantize()).all()) and float(error) < 0.6, (weight[0, 0], error)


def w_dtype(options: dict[str, Any]) -> torch.dtype:
    return options.get("scale_dtype") or FORMATS[options["format"]].scale_dtype


WIDE = (torch.float32, torch.float8_e8m0fnu)  # their exponents reach as far as the weights'
SMALL: list[dict[str, Any]] = [
    *(
        o
        for o in (*EVERY, *LATER)
        if (o.get("nested") or w_dtype(o) not in WIDE) and "scale_rows" not in o  # where no row is alone
    ),
    *(dict(format=name, scale_dtype=torch.float16) for name in ("int8", "nf4", "fp8")),
]  # fmt: skip


@pytest.mark.parametrize("options", SMALL, ids=name_of)
def test_what_is_lost_in_the_scales_is_told(options: dict[str, Any]) -> None:
    """A row of 1e-9 in a matrix of 0.02 is nothing in float16; 1e-4 all over is held well enough."""
    weight = torch.randn(16, 256) * 0.02
    weight[3] = 1e-9
    with pytest.warns(UserWarning, match=r"the first in row 3 \(largest magnitude there 1e-09"):
        bitfuse.quantize(weight, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bitfuse.quantize(torch.randn(16, 256) * 0.02, **options)
        if FORMATS[options["format"]].bits <= 4:
            small = torch.rand(16, 256) * 1e-4 + 5e-5
            assert bitfuse.quantize(small, **options).relative_error(small) < 0.5


EIGHT_BITS = [name for name, f in FORMATS.items() if f.scale_dtype in FIXED_SCALE_DTYPES]


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("target", targets("cpp", "cuda", "triton", "reference"), ids=str)
def test_scales_of_eight_bits_are_read_from_floats_and_bytes(target: Target, name: str) -> None:
    w = target.place_weight(bitfuse.quantize(torch.randn(40, 96), name))
    held = replace(w, scales=w.scales.view(torch.uint8))
    assert torch.equal(held.dequantize(), w.dequantize())
    held.check_values()
    x, grad = target.place(torch.randn(3, 96).bfloat16(), torch.randn(3, 40).bfloat16())
    for op, t in ((forward_op, x), (lowbit_linear_grad_x, grad)):
        bias = (None,) if op is forward_op else ()
        if all(b.name != target.backend for b in op.backends) or target.reason(op, t, w.op_args, *bias):
            continue
        got = target.run(op, t, held.op_args, *bias)
        assert torch.equal(got, target.run(op, t, w.op_args, *bias))
        exact = w.dequantize().double().cpu()
        exact = t.double().cpu() @ (exact.T if op is forward_op else exact)
        plain = w.dequantize(t.dtype).cpu()
        assert_accurate(got.cpu(), exact, t.cpu() @ (plain.T if op is forward_op else plain))


@pytest.mark.parametrize("options", [*EVERY, *LATER], ids=name_of)
def test_stands_in_for_a_tensor(options: dict[str, Any]) -> None:
    dense = torch.randn(64, 128, dtype=torch.bfloat16)
    w = bitfuse.quantize(dense, **options)
    for question in (
        "dtype", "device", "ndim", "is_meta", "is_cuda", "is_cpu", "requires_grad", "is_leaf", "grad",
        "layout", "itemsize", "size()", "size(1)", "dim()", "numel()", "stride()", "is_contiguous()",
        "element_size()", "is_floating_point()",
    ):  # fmt: skip
        got, want = (eval(f"t.{question}", {"t": t}) for t in (w, dense))
        assert got == want, question
    assert w.shape == dense.shape and len(w) == 64 and "\n" not in repr(w) and len(repr(w)) < 100
    full, x = w.dequantize(torch.bfloat16), torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
    for expression in (
        "w @ x.T", "x @ w.T", "x @ w.t()", "torch.matmul(x, w.mT)", "w[3:5]", "w.abs().sum()", "2 * w + w",
        "w.to(x)", "w.clone()", "torch.cat([w, x])", "torch.mean(w, axis=0)", "w.T.contiguous()",
        "w.type_as(x)", "torch.empty_like(w).copy_(w)", "-w", "torch.stack(list(w))",
        "torch.einsum('mk,nk->mn', x, w)",
    ):  # fmt: skip
        got, want = (eval(expression, {"w": t, "x": x, "torch": torch}) for t in (w, full))
        assert torch.equal(got, want) and got.dtype == want.dtype, expression
    assert torch.equal(w.float(), w.dequantize()) and torch.equal(
        w.to(torch.float32, copy=True), w.dequantize()
    )
    got = torch.nn.functional.linear(x, w)  # type: ignore[arg-type]
    assert torch.equal(got, bitfuse.lowbit_linear(x, w))
    got.sum().backward()
    assert x.grad is not None and w.data is w and w.detach() is w and w.requires_grad_(False) is w
    assert not hasattr(w, "quant_state") and not hasattr(w, "SCB")


def test_what_would_write_into_a_weight_is_refused_by_name() -> None:
    w, dense = bitfuse.quantize(torch.randn(64, 128), "nf4"), torch.randn(64, 128)
    before = w.dequantize()
    for statement, words in (
        ("w.copy_(d)", "copy_ would write"), ("w.data.normal_()", "normal_ would write"),
        ("torch.nn.init.xavier_uniform_(w)", "uniform_ would write"), ("w.fill_(0)", "fill_ would write"),
        ("w.detach().zero_()", "zero_ would write"), ("torch.add(d, 1, out=w)", "add would write"),
        ("w.__setitem__(0, 1)", "__setitem__ would write"), ("w.__iadd__(d)", "__iadd__ would write"),
        ("w.requires_grad_()", "which is frozen"), ("w.mul_(3)", "a power of two"),
        ("w.div_(0)", "a power of two"),
        ("torch._foreach_mul_([w], 2)", "_foreach_mul_ would write"), ("w.mul_(d)", "a power of two"),
        ("torch.nn.functional.relu(w, inplace=True)", "relu would write"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=words):
            eval(statement, {"w": w, "d": dense, "torch": torch})
    for name in ("data", "requires_grad"):
        with pytest.raises(AttributeError):
            setattr(w, name, dense)
    assert torch.equal(w.dequantize(), before)


@pytest.mark.parametrize("options", [*EVERY, *LATER], ids=name_of)
def test_a_power_of_two_is_exact_in_place(options: dict[str, Any]) -> None:
    w = bitfuse.quantize(torch.randn(64, 128), **options)
    before = w.dequantize()
    w.mul_(4).div_(8)
    assert torch.equal(w.dequantize(), before / 2)
    with pytest.raises(TypeError, match="that its scales can hold"):
        w.mul_(2.0**300)
    assert torch.equal(w.dequantize(), before / 2)


@pytest.mark.parametrize("options", [*EVERY, *LATER], ids=name_of)
def test_a_weight_survives_pickle_and_copies(options: dict[str, Any]) -> None:
    w = bitfuse.quantize(torch.randn(16, 128).bfloat16(), **options)
    for other in (pickle.loads(pickle.dumps(w)), copy.deepcopy(w), copy.copy(w)):
        assert torch.equal(other.dequantize(), w.dequantize()) and other.scales.dtype == w.scales.dtype
        assert other.dtype == torch.bfloat16 and other.format == w.format


@pytest.mark.parametrize("name", ["nf4", "mxfp4"])
def test_a_pickle_of_version_0_1_is_loaded(name: str) -> None:
    """Its weights stood in other modules."""
    w = bitfuse.quantize(torch.randn(16, 128), name)
    now = pickle.dumps(w, protocol=2)
    then = now.replace(b"cbitfuse.weights.", b"cbitfuse.")
    assert then.count(b"cbitfuse.weight\n") == then.count(b"cbitfuse.formats\n") == 1
    other = pickle.loads(then)
    assert torch.equal(other.dequantize(), w.dequantize()) and other.format == w.format


def test_every_tensor_has_its_own_memory() -> None:
    """safetensors refuses a view of a larger storage."""
    for options in (*EVERY, *LATER, dict(format="int8", nested=True), dict(format="fp4", nested=True)):
        for t in bitfuse.quantize(torch.randn(24, 384), **options).tensors().values():
            assert t.untyped_storage().nbytes() == t.nbytes, options


def test_a_perm_that_is_none_is_refused() -> None:
    g_idx = torch.arange(64).flip(0).int() // 32
    w = bitfuse.quantize(torch.randn(16, 64), "int4", group_size=32, g_idx=g_idx)
    assert w.perm is not None
    for perm in (torch.zeros(64, dtype=torch.int64), torch.arange(64), w.perm[:32], w.perm.int(), [1]):
        with pytest.raises(ValueError, match=r"perm is .*expected torch.argsort"):
            replace(w, perm=perm)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="perm is given without g_idx"):
        replace(w, g_idx=None)
    assert torch.equal(replace(w, perm=w.perm.clone()).dequantize(), w.dequantize())


def test_the_device_that_is_wrong_is_named() -> None:
    w = bitfuse.quantize(torch.randn(16, 128), "int4")
    with pytest.raises(ValueError, match="qweight is on cpu, expected meta, where x is"):
        bitfuse.lowbit_linear(torch.randn(2, 128, device="meta"), w)
    with pytest.raises(ValueError, match="bias is on meta, expected cpu, where x is"):
        bitfuse.lowbit_linear(torch.randn(2, 128), w, torch.randn(16, device="meta"))
    with pytest.raises(ValueError, match=r"v is on meta, expected cpu$"):
        q = torch.randn(1, 2, 1, 8)
        bitfuse.attention(q, q, q.to("meta"))


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([[1.0]], {}, TypeError, "weight is a list, expected a tensor"),
    (torch.zeros(8, 128, dtype=torch.int32), {}, TypeError, "weight has dtype torch.int32"),
    (torch.zeros(8, dtype=torch.float32), {}, ValueError, r"weight has shape \[8\]"),
    (torch.zeros(8, 100), {}, ValueError, r"shape is \(8, 100\), expected .* in_features a multiple of 8"),
    (torch.zeros(8, 96), dict(group_size=128), ValueError, "group_size 128 does not divide in_features 96"),
    (torch.zeros(8, 96), dict(group_size=12), ValueError, "group_size is 12, expected"),
    (torch.zeros(8, 128), dict(format="int5"), ValueError, "format is 'int5', expected one of 'int8'"),
    (torch.zeros(8, 128), dict(format=4), TypeError, "format is a int"),
    (torch.zeros(8, 128), dict(format="nf4", symmetric=False), ValueError, "only integer formats"),
    (torch.zeros(8, 128), dict(scale_dtype=torch.int8), ValueError, "scale_dtype is torch.int8"),
    (torch.full((8, 128), float("nan")), {}, ValueError, "weight .* is nan, expected finite"),
    (torch.full((8, 128), float("inf")), {}, ValueError, "weight .* is inf, expected finite"),
    (torch.zeros(8, 128, device="meta"), {}, ValueError, "weight is on the meta device"),
    (torch.full((8, 128), 1e7), {}, ValueError, "can't hold the scales .* scale_dtype=torch.float32"),
    (torch.full((8, 128), 1e-7), {}, ValueError, "can't hold the scales .* scale_dtype=torch.float32"),
    (torch.zeros(8, 128), dict(g_idx=torch.zeros(128)), ValueError, "expected an int tensor"),
    (torch.zeros(8, 128), dict(group_size=64, g_idx=torch.zeros(128).int()), ValueError, "128 columns in"),
    (torch.zeros(8, 128), dict(group_size=64, g_idx=torch.full((128,), 7)), ValueError, "g_idx holds 7 to 7"),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "options", "error", "words"), BAD, ids=[b[3][:40] for b in BAD])
def test_quantize_refuses(weight: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bitfuse.quantize(weight, **options)


def test_nan_is_located() -> None:
    weight = torch.randn(16, 128)
    weight[9, 17] = float("nan")
    with pytest.raises(ValueError, match=r"\[9, 17\] is nan"):
        bitfuse.quantize(weight)


def test_weight_refuses_parts_that_do_not_fit() -> None:
    w = bitfuse.quantize(torch.randn(16, 128), "int4", group_size=64, symmetric=False)
    for changes, error, words in (
        (dict(qweight=w.qweight.int()), TypeError, "qweight has dtype torch.int32, expected torch.uint8"),
        (dict(qweight=w.qweight[:8]), ValueError, r"qweight has shape \[8, 64\], expected \[16, 64\]"),
        (dict(scales=w.scales[:, :1]), ValueError, r"scales has shape \[16, 1\], expected \[16, 2\]"),
        (dict(zeros=None), TypeError, "zeros is missing"),
        (dict(scales=w.scales.to("meta")), ValueError, "scales is on meta, expected cpu"),
    ):
        with pytest.raises(error, match=words):
            replace(w, **changes)


def test_values_that_no_quantiser_writes() -> None:
    w = bitfuse.quantize(torch.randn(16, 128), "int4")
    w.scales[2, 0] = float("inf")
    with pytest.raises(ValueError, match=r"scales\[2, 0\] is inf"):
        w.check_values()
    w = bitfuse.quantize(torch.randn(16, 128), "fp8")
    w.qweight[0, 0] = 0x7F
    with pytest.raises(ValueError, match="qweight holds a code that is NaN in fp8"):
        w.check_values()
    w = bitfuse.quantize(torch.randn(16, 128), "int4", symmetric=False)
    assert w.zeros is not None
    w.zeros[0, 0] = 16
    with pytest.raises(ValueError, match="zeros holds 16"):
        w.check_values()


def test_format_refuses() -> None:
    with pytest.raises(ValueError, match="bits is 9"):
        Format("x", 9)
    with pytest.raises(ValueError, match="codebook has 3 values, expected"):
        Format("x", 2, codebook=(0.0, 1.0, 2.0))
    with pytest.raises(ValueError, match="with nested scales"):
        get_format("int4", nested=True)


def test_what_a_format_may_be() -> None:
    """The docstring names them all; one of one's own holds numbers only."""
    assert all(f'"{name}"' in (bitfuse.quantize.__doc__ or "") for name in BUILT_IN)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"codebook\[2\] of 'mine' is (nan|inf), expected finite"):
            bitfuse.register_format(Format("mine", 2, codebook=(-1.0, 0.0, value, 1.0)))
    assert "mine" not in FORMATS

"""Each family of instructions of the simulator against numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import cusim
from cusim.ptx import elementwise, kernel, pointer, run

pytestmark = pytest.mark.skipif(cusim.has_gpu(), reason="the simulator stands in for a GPU")
Array = npt.NDArray[Any]
N = 64


def integers(dtype: npt.DTypeLike, seed: int = 0, count: int = N) -> Array:
    """Random bits, and the corners."""
    bits = np.random.default_rng(seed).integers(0, 256, count * np.dtype(dtype).itemsize, dtype=np.uint8)
    x = bits.view(dtype).copy()
    info = np.iinfo(dtype)
    corners = np.array([0, 1, info.max, info.min, info.max - 1], dtype=dtype)
    x[: corners.size] = np.roll(corners, seed)
    return x


def floats(dtype: npt.DTypeLike, seed: int = 0, count: int = N) -> Array:
    x = np.random.default_rng(seed).standard_normal(count).astype(dtype)
    corners = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0], dtype=dtype)
    x[: corners.size] = np.roll(corners, seed)
    return x


def bf16(x: Array) -> Array:
    """float32 -> the bits of bfloat16."""
    return torch.from_numpy(x.astype(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_bf16(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32)


def pairs(x: Array) -> Array:
    """16-bit values, two to a register."""
    return np.ascontiguousarray(x).view(np.uint32)


def same(a: Array, b: npt.ArrayLike) -> None:
    np.testing.assert_array_equal(a, b)


BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
}


@pytest.mark.parametrize("dtype", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("op", [*BINARY, "mul.hi", "div", "rem"])
def test_integer_arithmetic(op: str, dtype: str) -> None:
    kind = np.dtype({"u": "uint", "s": "int"}[dtype[0]] + dtype[1:])
    x, y = integers(kind, 0), integers(kind, 1)
    if op in ("div", "rem"):
        y[y == 0] = 3
    with np.errstate(all="ignore"):
        if op in BINARY:
            expected = BINARY[op](x, y)
        else:  # in Python's integers, which do not overflow
            bits = kind.itemsize * 8
            numbers = [(int(a), int(b)) for a, b in zip(x, y, strict=True)]
            if op == "mul.hi":
                exact = [(a * b) >> bits for a, b in numbers]
            else:
                exact = [abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) for a, b in numbers]
            if op == "rem":
                exact = [a - q * b for q, (a, b) in zip(exact, numbers, strict=True)]
            expected = np.array([int(v) % 2**bits for v in exact], dtype=f"uint{bits}").view(kind)
    same(elementwise(f"{op}.{dtype} d, a, b;", x, y, out=kind), expected)


def test_integer_extremes_held_to_zero() -> None:
    x, y = integers(np.int32), integers(np.int32, 1)
    for op in ("min", "max"):
        same(elementwise(f"{op}.relu.s32 d, a, b;", x, y, out=np.int32), BINARY[op](x, y).clip(0))


def test_wide_and_carry() -> None:
    x, y, z = integers(np.int32), integers(np.int32, 1), integers(np.int64, 2)
    wide = x.astype(np.int64) * y
    same(elementwise("mul.wide.s32 d, a, b;", x, y, out=np.int64), wide)
    same(elementwise("mad.wide.s32 d, a, b, c;", x, y, z, out=np.int64), wide + z)
    u, v = integers(np.uint64), integers(np.uint64, 1)
    halves = "mov.b64 {%r1, %r2}, a; mov.b64 {%r3, %r4}, b;"
    add = halves + "add.cc.u32 %r5, %r1, %r3; addc.u32 %r6, %r2, %r4; mov.b64 d, {%r5, %r6};"
    sub = halves + "sub.cc.u32 %r5, %r1, %r3; subc.u32 %r6, %r2, %r4; mov.b64 d, {%r5, %r6};"
    same(elementwise(add, u, v, out=np.uint64), u + v)
    same(elementwise(sub, u, v, out=np.uint64), u - v)


def test_saturation() -> None:
    x, y = integers(np.int32), integers(np.int32, 1)
    exact = x.astype(np.int64) + y
    same(
        elementwise("add.sat.s32 d, a, b;", x, y, out=np.int32),
        exact.clip(-(2**31), 2**31 - 1).astype(np.int32),
    )
    f = floats(np.float32)
    got = elementwise("add.sat.f32 d, a, b;", f, f, out=np.float32)
    same(got, np.where(np.isnan(f + f), 0, (f + f).clip(0, 1)))


def test_bits() -> None:
    x, y, z = (integers(np.uint32, s) for s in range(3))
    for lut in (0x96, 0xEA, 0xD8, 0x01):
        expected = np.zeros_like(x)
        for k in range(8):
            if lut >> k & 1:
                expected |= (x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z)
        same(elementwise(f"lop3.b32 d, a, b, c, {lut};", x, y, z, out=np.uint32), expected)
    both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    octets = both.view(np.uint8).reshape(N, 8)
    codes = np.stack([z >> (4 * k) & 15 for k in range(4)], 1)
    chosen = np.take_along_axis(octets, (codes & 7).astype(np.int64), 1)
    chosen = np.where(codes & 8, np.where(chosen & 0x80, 0xFF, 0), chosen).astype(np.uint8)
    same(elementwise("prmt.b32 d, a, b, c;", x, y, z, out=np.uint32), chosen.copy().view(np.uint32)[:, 0])
    amount = (z % 40).astype(np.uint32)
    for side in "lr":
        for wrap, by in (("wrap", amount % 32), ("clamp", np.minimum(amount, 32))):
            s = by.astype(np.uint64)
            wide = (both << s) >> np.uint64(32) if side == "l" else both >> s
            got = elementwise(f"shf.{side}.{wrap}.b32 d, a, b, c;", x, y, amount, out=np.uint32)
            same(got, wide.astype(np.uint32))
    big = amount.astype(np.uint64)
    same(
        elementwise("shl.b32 d, a, b;", x, amount, out=np.uint32),
        (x.astype(np.uint64) << big).astype(np.uint32),
    )
    same(
        elementwise("shr.u32 d, a, b;", x, amount, out=np.uint32),
        (x.astype(np.uint64) >> big).astype(np.uint32),
    )
    signed = x.view(np.int32)
    same(
        elementwise("shr.s32 d, a, b;", signed, amount, out=np.int32),
        signed >> np.minimum(amount, 31).astype(np.int32),
    )
    same(elementwise("popc.b32 d, a;", x, out=np.uint32), np.bitwise_count(x))
    same(elementwise("clz.b32 d, a;", x, out=np.uint32), [32 - int(v).bit_length() for v in x])
    same(elementwise("brev.b32 d, a;", x, out=np.uint32), [int(f"{v:032b}"[::-1], 2) for v in x])
    same(elementwise("bfind.u32 d, a;", x, out=np.uint32), [(int(v).bit_length() - 1) % 2**32 for v in x])
    same(elementwise("not.b32 d, a;", x, out=np.uint32), ~x)
    same(elementwise("xor.b32 d, a, b;", x, y, out=np.uint32), x ^ y)


def test_bit_fields() -> None:
    x, y = integers(np.uint32), integers(np.uint32, 1)
    position, length = (np.arange(N, dtype=np.uint32) * 7) % 36, (np.arange(N, dtype=np.uint32) * 5) % 36
    unsigned = [(int(v) >> int(p)) & ((1 << int(n)) - 1) for v, p, n in zip(x, position, length, strict=True)]
    same(elementwise("bfe.u32 d, a, b, c;", x, position, length, out=np.uint32), unsigned)
    signed = []
    for v, p, n in zip(x.view(np.int32), position, length, strict=True):
        field = (int(v) >> int(p)) & ((1 << int(n)) - 1)
        signed.append(field - (1 << int(n)) if n and field >> (int(n) - 1) else field)
    got = elementwise("bfe.s32 d, a, b, c;", x, position, length, out=np.int32)
    same(got, np.array(signed).astype(np.uint64).astype(np.uint32).view(np.int32))
    inserted = []
    for v, into, p, n in zip(x, y, position, length, strict=True):
        keep = ((1 << int(n)) - 1) << int(p)
        inserted.append((int(into) & ~keep | int(v) << int(p) & keep) & 0xFFFFFFFF)
    same(elementwise("bfi.b32 d, a, b, c, e;", x, y, position, length, out=np.uint32), inserted)


def test_byte_dot_product() -> None:
    x, y, z = integers(np.uint32), integers(np.uint32, 1), integers(np.uint32, 2)
    a, b = x.view(np.int8).reshape(N, 4).astype(np.int64), y.view(np.uint8).reshape(N, 4).astype(np.int64)
    expected = ((a * b).sum(1) + z).astype(np.uint32)
    same(elementwise("dp4a.s32.u32 d, a, b, c;", x, y, z, out=np.uint32), expected)


FLOAT_KINDS = ("f32", "f64", "f16", "bf16")
FLOAT_OPS = [(op, kind) for op in ("add", "sub", "mul", "min", "max") for kind in FLOAT_KINDS]


@pytest.mark.parametrize(("op", "kind"), [*FLOAT_OPS, ("div", "f32"), ("div", "f64")])
def test_float_arithmetic(op: str, kind: str) -> None:
    f = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}.get(op)
    f = f or {"min": np.fmin, "max": np.fmax}[op]
    mode = ".rn" if op == "div" else ""
    dtype = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": np.float32}[kind]
    x, y = floats(dtype), floats(dtype, 2)
    with np.errstate(all="ignore"):
        if kind == "bf16":
            x, y = bf16(x), bf16(y)
            got = from_bf16(elementwise(f"{op}.bf16 d, a, b;", x, y, out=np.uint16))
            expected = from_bf16(bf16(f(from_bf16(x), from_bf16(y))))
        else:
            got = elementwise(f"{op}{mode}.{kind} d, a, b;", x, y, out=dtype)
            expected = f(x, y)
    same(got, expected)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma.rn", "fma.rn.relu", "neg", "abs", "max.NaN"])
@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_pairs(op: str, kind: str) -> None:
    fs = [floats(np.float32, seed, 2 * N) for seed in range(3)]
    encode = bf16 if kind == "bf16x2" else lambda v: v.astype(np.float16).view(np.uint16)
    decode = from_bf16 if kind == "bf16x2" else lambda v: v.view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        codes = [encode(v) for v in fs]
        x, y, z = (decode(c).astype(np.float64) for c in codes)
        exact = {
            "add": x + y,
            "sub": x - y,
            "mul": x * y,
            "fma.rn": x * y + z,
            "fma.rn.relu": np.maximum(x * y + z, 0),
            "neg": -x,
            "abs": np.abs(x),
            "max.NaN": np.maximum(x, y),
        }[op]
        expected = decode(encode(exact))
    operands = ["a"] if op in ("neg", "abs") else ["a", "b", "c"] if "fma" in op else ["a", "b"]
    used = [pairs(c) for c in codes[: len(operands)]]
    got = elementwise(f"{op}.{kind} d, {', '.join(operands)};", *used, out=np.uint32)
    same(decode(got.view(np.uint16)), expected)


def test_fused_multiply_add() -> None:
    x, y, z = floats(np.float64), floats(np.float64, 2), floats(np.float64, 4)
    x32, y32, z32 = (v.astype(np.float32) for v in (x, y, z))
    with np.errstate(all="ignore"):
        exact = (x32.astype(np.float64) * y32 + z32).astype(np.float32)
    same(elementwise("fma.rn.f32 d, a, b, c;", x32, y32, z32, out=np.float32), exact)


def test_rounding_modes() -> None:
    x, y = floats(np.float32), floats(np.float32, 2)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(finite, x, 1), np.where(finite, y, 1)
    exact = x.astype(np.float64) * y
    down = elementwise("mul.rm.f32 d, a, b;", x, y, out=np.float32)
    up = elementwise("mul.rp.f32 d, a, b;", x, y, out=np.float32)
    zero = elementwise("mul.rz.f32 d, a, b;", x, y, out=np.float32)
    assert np.all(down <= exact)
    assert np.all(up >= exact)
    same(np.nextafter(down, np.inf)[down != up], up[down != up])
    same(zero, np.where(exact < 0, up, down))


@pytest.mark.parametrize(
    ("text", "f"),
    [
        ("ex2.approx.ftz.f32", np.exp2),
        ("lg2.approx.f32", np.log2),
        ("sin.approx.f32", np.sin),
        ("cos.approx.f32", np.cos),
        ("tanh.approx.f32", np.tanh),
        ("rcp.approx.f32", np.reciprocal),
        ("sqrt.rn.f32", np.sqrt),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
    ],
)
def test_functions(text: str, f: Callable[[Array], Array]) -> None:
    x = np.linspace(0.01, 9, N).astype(np.float32)
    np.testing.assert_allclose(
        elementwise(f"{text} d, a;", x, out=np.float32), f(x.astype(np.float64)), rtol=3e-7
    )


def test_comparisons() -> None:
    x, y = floats(np.float32), floats(np.float32, 2)
    x[10:20] = y[10:20]
    nan = np.isnan(x) | np.isnan(y)
    cases = {
        "eq": x == y,
        "ne": (x != y) & ~nan,
        "lt": x < y,
        "le": x <= y,
        "gt": x > y,
        "ge": x >= y,
        "equ": (x == y) | nan,
        "neu": x != y,
        "ltu": (x < y) | nan,
        "num": ~nan,
        "nan": nan,
    }
    for name, expected in cases.items():
        text = f"setp.{name}.f32 %p1, a, b; selp.u32 d, 1, 0, %p1;"
        same(elementwise(text, x, y, out=np.uint32), expected)
    i, j = integers(np.int32), integers(np.int32, 1)
    text = "setp.lt.s32 %p1, a, 0; setp.gt.and.s32 %p2|%p3, a, b, !%p1; selp.u32 d, 1, 0, %p2;"
    text += "@%p3 mov.u32 d, 2;"
    same(elementwise(text, i, j, out=np.uint32), np.where(i < 0, 0, np.where(i > j, 1, 2)))
    same(elementwise("set.lt.u32.f32 d, a, b;", x, y, out=np.uint32), np.where(x < y, 2**32 - 1, 0))


# ---- conversions ----
def test_convert_integers() -> None:
    x = integers(np.int32)
    same(elementwise("cvt.s64.s32 d, a;", x, out=np.int64), x.astype(np.int64))
    same(elementwise("cvt.u16.u32 d, a;", x, out=np.uint16), x.astype(np.uint16))
    narrow = elementwise("cvt.sat.s8.s32 %r1, a; mov.b32 d, %r1;", x, out=np.int32)
    same(narrow, x.clip(-128, 127))
    big = integers(np.uint64)
    same(elementwise("cvt.rn.f32.u64 d, a;", big, out=np.float32), big.astype(np.float32))
    same(elementwise("cvt.rn.f32.s32 d, a;", x, out=np.float32), x.astype(np.float32))
    toward_zero = elementwise("cvt.rz.f32.s32 d, a;", x, out=np.float32).astype(np.int64)
    assert np.all(np.abs(toward_zero) <= np.abs(x.astype(np.int64)))


def test_convert_floats() -> None:
    x = np.concatenate([floats(np.float32) * 1000, [70000, -70000, 1e-7, 3e38]]).astype(np.float32)
    with np.errstate(all="ignore"):
        same(elementwise("cvt.rn.f16.f32 d, a;", x, out=np.float16), x.astype(np.float16))
        finite = np.nan_to_num(x, posinf=2.0**31, neginf=-(2.0**31)).astype(np.float64)
        whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
        for mode, f in whole.items():
            got = elementwise(f"cvt.{mode}.s32.f32 d, a;", x, out=np.int32)
            same(got, f(finite).clip(-(2**31), 2**31 - 1).astype(np.int64).astype(np.int32))
    same(from_bf16(elementwise("cvt.rn.bf16.f32 d, a;", x, out=np.uint16)), from_bf16(bf16(x)))
    half = floats(np.float16)
    same(elementwise("cvt.f32.f16 d, a;", half, out=np.float32), half.astype(np.float32))
    every_half = np.arange(0, 1024, dtype=np.uint16) * 64
    same(
        elementwise("cvt.f32.f16 d, a;", every_half, out=np.float32),
        every_half.view(np.float16).astype(np.float32),
    )
    y = floats(np.float32, 2, x.size)
    with np.errstate(all="ignore"):
        packed = elementwise("cvt.rn.f16x2.f32 d, a, b;", x, y, out=np.uint32).view(np.float16)
        same(packed[1::2], x.astype(np.float16))
        same(packed[0::2], y.astype(np.float16))
    same(from_bf16(elementwise("cvt.rn.bf16x2.f32 d, a, b;", x, y, out=np.uint32).view(np.uint16)[1::2]),
         from_bf16(bf16(x)))  # fmt: skip
    tf32 = elementwise("cvt.rna.tf32.f32 d, a;", x, out=np.uint32)
    assert not np.any(tf32[np.isfinite(x)] & 0x1FFF)


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_convert_fp8(name: str, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    x = np.concatenate([floats(np.float32) * 100, np.linspace(-top, top, 64), 2.0 ** -np.arange(24)])
    x = np.where(np.isfinite(x), x, 1).astype(np.float32)
    codes = elementwise(f"cvt.rn.satfinite.{name}x2.f32 d, a, b;", x, -x, out=np.uint16).view(np.uint8)
    clipped = torch.from_numpy(x).clamp(-top, top)
    same(codes[1::2], clipped.to(dtype).view(torch.uint8).numpy())
    same(codes[0::2], (-clipped).to(dtype).view(torch.uint8).numpy())
    every = np.arange(256, dtype=np.uint8)
    back = elementwise(f"cvt.rn.f16x2.{name}x2 d, a;", every.view(np.uint16), out=np.uint32).view(np.float16)
    same(back, torch.from_numpy(every).view(dtype).half().numpy())


def test_convert_fp4() -> None:
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
    x = np.concatenate([np.linspace(-7, 7, 57), values]).astype(np.float32)
    text = "cvt.rn.satfinite.e2m1x2.f32 %b1, a, b; cvt.u32.u8 d, %b1;"
    codes = elementwise(text, x, np.zeros_like(x), out=np.uint32) >> 4
    got = np.where(codes & 8, -1, 1) * values[codes & 7]
    distance = np.abs(x[:, None] - np.concatenate([values, -values])[None, :]).min(1)
    np.testing.assert_allclose(np.abs(got - x), distance, atol=1e-7)
    same(got[x == 0.25], values[:1])  # ties go to the even code
    text = "cvt.u8.u32 %b1, a; cvt.rn.f16x2.e2m1x2 d, %b1;"
    back = elementwise(text, np.arange(256, dtype=np.uint32), out=np.uint32).view(np.float16)
    table = np.concatenate([values, -values]).astype(np.float16)
    same(back[0::2], table[np.arange(256) & 15])
    same(back[1::2], table[np.arange(256) >> 4])


# ---- memory ----
@pytest.mark.parametrize("width", [2, 4])
def test_vectors(width: int) -> None:
    x = integers(np.uint32, count=32 * width)
    out = np.zeros_like(x)
    registers = "{" + ", ".join(f"%r{k}" for k in range(width)) + "}"
    run(
        f"""mad.wide.u32 %rd1, %t, {4 * width}, %src; mad.lo.u32 %r90, %t, {4 * width}, %smem;
        mad.wide.u32 %rd2, %t, {4 * width}, %dst;
        ld.global.v{width}.u32 {registers}, [%rd1]; st.shared.v{width}.u32 [%r90], {registers};
        ld.shared.v{width}.b32 {registers}, [%r90]; st.global.v{width}.b32 [%rd2], {registers};""",
        {"src": x, "dst": out},
        shared=2048,
    )
    same(out, x)


def test_narrow_loads_extend() -> None:
    x = integers(np.uint8)
    text = "ld.global.s8 %r1, [%rd9]; mov.b32 d, %r1;"
    address = np.arange(N, dtype=np.uint64) + np.uint64(x.ctypes.data)
    same(elementwise("mov.u64 %rd9, a;" + text, address, out=np.int32), x.view(np.int8).astype(np.int32))


@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(space: str) -> None:
    x = integers(np.int32)
    total = np.array([0, -(2**31), 2**31 - 1, 0, 0, 5], dtype=np.int32)
    real = np.zeros(2, dtype=np.float32)
    old = np.zeros(N, dtype=np.int32)
    at = "%total" if space == "global" else "%rd7"
    back = ""
    if space == "shared":
        back = "bar.sync 0; setp.lt.u32 %p2, %t, 6; mad.wide.u32 %rd2, %t, 4, %total;"
        back += "mad.lo.u32 %r5, %t, 4, %smem; @%p2 ld.shared.u32 %r6, [%r5]; @%p2 st.global.u32 [%rd2], %r6;"
    run(
        f"""mad.wide.u32 %rd1, %t, 4, %src; ld.global.s32 %r1, [%rd1];
        cvt.u64.u32 %rd6, %smem; cvta.shared.u64 %rd7, %rd6;
        setp.lt.u32 %p1, %t, 6; mad.wide.u32 %rd3, %t, 4, %total; mad.lo.u32 %r5, %t, 4, %smem;
        @%p1 ld.global.u32 %r6, [%rd3]; @%p1 st.shared.u32 [%r5], %r6; bar.sync 0;
        mad.wide.u32 %rd4, %t, 4, %old;
        atom.add.u32 %r2, [{at}], 1; st.global.u32 [%rd4], %r2;
        red.max.s32 [{at}+4], %r1; red.min.s32 [{at}+8], %r1; red.or.b32 [{at}+12], %r1;
        red.xor.b32 [{at}+16], %r1;
        atom.cas.b32 %r3, [{at}+20], 5, %t;
        red.global.add.f32 [%real], 0f3F000000; {back}""",
        {"src": x, "total": total, "old": old, "real": real},
        threads=N,
        shared=64,
    )
    expected = [N, x.max(), x.min(), np.bitwise_or.reduce(x), np.bitwise_xor.reduce(x), 0]
    same(total, np.array(expected, dtype=np.int32))
    same(np.sort(old), np.arange(N))
    assert real[0] == N / 2


def test_vector_reduction() -> None:
    out = np.zeros(4, dtype=np.float32)
    run("red.global.add.v4.f32 [%out], {0f3F800000, 0f40000000, 0f40400000, 0f40800000};", {"out": out})
    same(out, np.array([1, 2, 3, 4], dtype=np.float32) * 32)


def test_vector_atomic() -> None:
    """Each lane has what the lanes before it left."""
    total, out = np.zeros(2, dtype=np.float32), np.zeros((32, 2), dtype=np.float32)
    run(
        """atom.global.relaxed.gpu.add.v2.f32 {%f1, %f2}, [%total], {0f3F800000, 0f40000000};
        mad.wide.u32 %rd1, %t, 8, %out; st.global.v2.f32 [%rd1], {%f1, %f2};""",
        {"total": total, "out": out},
    )
    same(total, np.array([32, 64], dtype=np.float32))
    same(np.sort(out[:, 0]), np.arange(32, dtype=np.float32))
    same(out[:, 1], 2 * out[:, 0])


def test_generic_addresses() -> None:
    out = np.zeros(32, dtype=np.uint32)
    run(
        """mad.lo.u32 %r1, %t, 4, %smem; cvt.u64.u32 %rd1, %r1; cvta.shared.u64 %rd2, %rd1;
        st.u32 [%rd2], %t; isspacep.shared %p1, %rd2; isspacep.global %p2, %out;
        ld.u32 %r2, [%rd2]; @%p1 add.u32 %r2, %r2, 100; @%p2 add.u32 %r2, %r2, 1000;
        mad.wide.u32 %rd3, %t, 4, %out; st.u32 [%rd3], %r2;""",
        {"out": out},
        shared=128,
    )
    same(out, np.arange(32) + 1100)


def test_a_function_defined_after_its_use() -> None:
    out = np.zeros(32, dtype=np.uint32)
    head = ".func (.param .b32 r) twice (.param .b32 v)"
    body = "{ .reg .b32 %q<2>; ld.param.b32 %q1, [v]; add.u32 %q1, %q1, %q1; st.param.b32 [r], %q1; ret; }"
    use = """{ .param .b32 v0; .param .b32 r0; st.param.b32 [v0], %t; call.uni (r0), twice, (v0);
        ld.param.b32 %r1, [r0]; } mad.wide.u32 %rd1, %t, 4, %out; st.u32 [%rd1], %r1;"""
    text = kernel(use, ["out"]).decode().replace(".visible", f"{head};\n.visible")
    code = f"{text}{head}\n{body}\n".encode()
    cusim.run_ptx(code, b"k", (1,), (32,), [pointer(out)])
    same(out, 2 * np.arange(32))


# ---- warps ----
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(mode: str, width: int) -> None:
    x = integers(np.uint32, count=32)
    lane, by = np.arange(32), 3
    within, start = lane % width, lane // width * width
    source = {"up": within - by, "down": within + by, "bfly": within ^ by, "idx": np.full(32, by)}[mode]
    inside = (source >= 0) & (source < width)
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    text = f"shfl.sync.{mode}.b32 d|%p1, a, {by}, {clamp}, -1; @!%p1 xor.b32 d, d, 1;"
    got = elementwise(text, x, out=np.uint32)
    same(got, np.where(inside, x[start + np.where(inside, source, within)], x ^ 1))


def test_votes_and_matches() -> None:
    x = integers(np.uint32, count=32) % 4
    p = "setp.eq.u32 %p1, a, 2;"
    is_two = x == 2
    mask = int((is_two.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum())
    same(elementwise(p + "vote.sync.ballot.b32 d, %p1, -1;", x, out=np.uint32), np.full(32, mask))
    vote = p + "vote.sync.{0}.pred %p2, %p1, -1; selp.u32 d, 1, 0, %p2;"
    same(elementwise(vote.format("any"), x, out=np.uint32), np.full(32, is_two.any()))
    same(elementwise(vote.format("all"), x, out=np.uint32), np.full(32, is_two.all()))
    same(elementwise("match.any.sync.b32 d, a, -1;", x, out=np.uint32),
         [int(((x == v).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum()) for v in x])  # fmt: skip
    same(
        elementwise("match.all.sync.b32 d|%p1, a, -1; @%p1 mov.u32 d, 7;", x * 0, out=np.uint32),
        np.full(32, 7),
    )
    y = integers(np.int32, count=32)
    for op, f in {"add": np.add, "min": np.minimum, "max": np.maximum}.items():
        with np.errstate(all="ignore"):
            same(
                elementwise(f"redux.sync.{op}.s32 d, a, -1;", y, out=np.int32),
                np.full(32, f.reduce(y, dtype=np.int32)),
            )
    same(elementwise("redux.sync.xor.b32 d, a, -1;", y, out=np.int32), np.full(32, np.bitwise_xor.reduce(y)))
    elected = elementwise("elect.sync %r1|%p1, -1; selp.u32 d, 1, 0, %p1;", x, out=np.uint32)
    assert elected.sum() == 1


def test_divergence() -> None:
    """Each lane leaves its loop at its own turn; afterwards all meet in a shuffle."""
    x = np.arange(32, dtype=np.uint32)
    text = """mov.u32 %r1, 0; mov.u32 %r2, a;
    $again: setp.eq.u32 %p1, %r2, 0; @%p1 bra $out; add.u32 %r1, %r1, %r2; sub.u32 %r2, %r2, 1; bra $again;
    $out: shfl.sync.bfly.b32 d, %r1, 1, 31, -1;"""
    same(elementwise(text, x, out=np.uint32), (x * (x + 1) // 2)[np.arange(32) ^ 1])


def test_named_barriers() -> None:
    """Two warps hand a value to and fro; a third one never takes part."""
    out = np.zeros(64, dtype=np.uint32)
    body = """setp.ge.u32 %p3, %t, 64; @%p3 ret; mad.lo.u32 %r1, %t, 4, %smem; xor.b32 %r2, %t, 32;
    mad.lo.u32 %r3, %r2, 4, %smem; setp.lt.u32 %p1, %t, 32; mad.wide.u32 %rd1, %t, 4, %out;
    @!%p1 bra $second;
    st.shared.u32 [%r1], %t; bar.arrive 1, 64; bar.sync 2, 64; ld.shared.u32 %r4, [%r3]; bra $end;
    $second: bar.sync 1, 64; ld.shared.u32 %r4, [%r3]; add.u32 %r5, %r4, 100; st.shared.u32 [%r1], %r5;
    bar.arrive 2, 64;
    $end: st.global.u32 [%rd1], %r4;"""
    with cusim.device(racecheck=True, seed=1):
        run(body, {"out": out}, threads=96, shared=256)
    same(out, np.concatenate([np.arange(32) + 100, np.arange(32)]))


def test_barrier_reductions() -> None:
    out = np.zeros((3, 64), dtype=np.uint32)
    body = """setp.lt.u32 %p1, %t, 40; bar.red.popc.u32 %r1, 0, %p1; bar.red.or.pred %p2, 0, %p1;
    bar.red.and.pred %p3, 0, %p1; selp.u32 %r2, 1, 0, %p2; selp.u32 %r3, 1, 0, %p3;
    mad.wide.u32 %rd1, %t, 4, %out; st.global.u32 [%rd1], %r1; st.global.u32 [%rd1+256], %r2;
    st.global.u32 [%rd1+512], %r3;"""
    run(body, {"out": out}, threads=64)
    same(out, np.array([40, 1, 0], dtype=np.uint32)[:, None].repeat(64, 1))


# ---- matrices ----
def from_shared(image: Array, body: str, registers: int, threads: int = 32, out_bytes: int = 4) -> Array:
    """Copies an image into shared memory, runs the body, and returns %r0, %r1, ... of each thread."""
    out = np.zeros((threads, registers), dtype=np.uint32)
    image = np.ascontiguousarray(image).view(np.uint8).reshape(-1)
    copy = f"""mov.u32 %r200, %t;
    $copy: mad.wide.u32 %rd50, %r200, 16, %image; mad.lo.u32 %r201, %r200, 16, %smem;
    setp.ge.u32 %p30, %r200, {image.size // 16}; @%p30 bra $copied;
    ld.global.v4.u32 {{%r202, %r203, %r204, %r205}}, [%rd50];
    st.shared.v4.u32 [%r201], {{%r202, %r203, %r204, %r205}};
    add.u32 %r200, %r200, {threads}; bra $copy;
    $copied: fence.proxy.async.shared::cta; bar.sync 0;"""
    store = f"mad.wide.u32 %rd51, %t, {4 * registers}, %out;"
    store += "".join(f"st.global.u32 [%rd51+{4 * k}], %r{k};" for k in range(registers))
    with cusim.device(racecheck=True):
        run(copy + body + store, {"image": image, "out": out}, threads=threads, shared=max(image.size, 16))
    return out


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count: int, trans: str) -> None:
    tiles = integers(np.uint16, count=count * 64).reshape(count, 8, 8)
    names = ", ".join(f"%r{k}" for k in range(count))
    body = f"""and.b32 %r90, %t, {8 * count - 1}; mad.lo.u32 %r91, %r90, 16, %smem;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r91];"""
    got = from_shared(tiles, body, count)
    seen = tiles.transpose(0, 2, 1) if trans else tiles
    expected = np.ascontiguousarray(seen).view(np.uint32).reshape(count, 32).T
    same(got, expected)


def test_stmatrix_and_movmatrix() -> None:
    tiles = integers(np.uint16, count=128).reshape(2, 8, 8)
    body = """and.b32 %r90, %t, 15; mad.lo.u32 %r91, %r90, 16, %smem;
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r0, %r1}, [%r91]; bar.warp.sync -1;
    movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r0;
    stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%r91], {%r1, %r2}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r3, %r4}, [%r91];"""
    got = from_shared(tiles, body, 5)
    words = lambda m: np.ascontiguousarray(m).view(np.uint32).reshape(32)  # noqa: E731
    same(got[:, 2], words(tiles[0].T))
    same(got[:, 3], words(tiles[1].T))
    same(got[:, 4], words(tiles[0]))


def encoded(kind: str, shape: tuple[int, ...], seed: int) -> tuple[Array, Array]:
    """Random elements of a type: their codes (one per entry) and their values."""
    rng = np.random.default_rng(seed)
    if kind in ("s8", "u8", "s4", "u4"):
        bits, signed = int(kind[1]), kind[0] == "s"
        v = rng.integers(-(2 ** (bits - 1)) if signed else 0, 2 ** (bits - 1) if signed else 2**bits, shape)
        return (v % 2**bits).astype(np.uint64), v.astype(np.float64)
    real = rng.standard_normal(shape)
    if kind == "f64":
        return real.view(np.uint64), real
    if kind == "tf32":
        codes = real.astype(np.float32).view(np.uint32) & 0xFFFFE000
        return codes.astype(np.uint64), codes.view(np.float32).astype(np.float64)
    small = torch.from_numpy(real).to(SMALL[kind])
    size = small.dtype.itemsize
    bits = small.view(torch.int16 if size == 2 else torch.uint8).numpy().astype(np.int64) % 2 ** (8 * size)
    return bits.astype(np.uint64), small.double().numpy()


SMALL = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
BITS = {
    "f16": 16,
    "bf16": 16,
    "tf32": 32,
    "f64": 64,
    "s8": 8,
    "u8": 8,
    "s4": 4,
    "u4": 4,
    "e4m3": 8,
    "e5m2": 8,
}
MMA = [
    *[
        ("m16n8k8", a, a, acc)
        for a, acc in [("f16", "f32"), ("f16", "f16"), ("bf16", "f32"), ("tf32", "f32")]
    ],
    *[("m16n8k16", a, a, acc) for a, acc in [("f16", "f32"), ("f16", "f16"), ("bf16", "f32"), ("s8", "s32")]],
    ("m16n8k4", "tf32", "tf32", "f32"),
    ("m8n8k4", "f64", "f64", "f64"),
    ("m16n8k16", "f64", "f64", "f64"),
    ("m8n8k16", "s8", "u8", "s32"),
    *[("m16n8k32", a, b, "s32") for a in ("s8", "u8") for b in ("s8", "u8")],
    *[("m16n8k32", a, b, "f32") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")],
    ("m8n8k32", "u4", "s4", "s32"),
    ("m16n8k32", "s4", "s4", "s32"),
    ("m16n8k64", "u4", "u4", "s32"),
]


@pytest.mark.parametrize(("shape", "ta", "tb", "acc"), MMA)
def test_mma(shape: str, ta: str, tb: str, acc: str) -> None:
    M, K = int(shape[1:].split("n")[0]), int(shape.split("k")[1])
    width = 8 if ta == "f64" else 4  # bytes of a register
    per = width * 8 // BITS[ta]
    ca, va = encoded(ta, (M, K), 0)
    cb, vb = encoded(tb, (K, 8), 1)
    lane = np.arange(32)
    group, inner = lane // 4, lane % 4
    halves = M // 8

    def packed(codes: Array, row: Array, column: Callable[[int], Array], by_column: bool) -> Array:
        word = np.zeros(32, dtype=np.uint64)
        for e in range(per):
            index = (row, column(e)) if by_column else (column(e), row)
            word |= codes[index] << np.uint64(e * BITS[ta])
        return word

    a = [
        packed(ca, group + 8 * (r % halves), lambda e, r=r: inner * per + e + r // halves * 4 * per, True)  # type: ignore[misc]
        for r in range(M * K // 32 // per)
    ]
    b = [
        packed(cb, group, lambda e, r=r: inner * per + e + r * 4 * per, False)  # type: ignore[misc]
        for r in range(8 * K // 32 // per)
    ]
    c = np.random.default_rng(2).integers(-50, 50, (M, 8)).astype(np.float64)
    where = [(group + 8 * (g // 2), inner * 2 + g % 2) for g in range(M // 4)]
    elements = np.stack([c[w] for w in where], 1)
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32, "f64": np.float64}[acc]
    registers = np.ascontiguousarray(elements.astype(dtype))
    out = np.zeros_like(registers)
    word = f"b{8 * width}"
    acc_word = "b64" if acc == "f64" else "b32"
    nd = registers.view(np.uint64 if acc == "f64" else np.uint32).shape[1]
    name = lambda prefix, n: ", ".join(f"{prefix}{k}" for k in range(n))  # noqa: E731
    fragments = np.stack(a + b, 1).astype(f"uint{8 * width}")
    load = f".reg .{word} x<{len(a) + len(b)}>; .reg .{acc_word} y<{nd}>;"
    load += f"mad.wide.u32 %rd1, %t, {fragments.shape[1] * width}, %ab;"
    load += f"mad.wide.u32 %rd2, %t, {out.itemsize * out.shape[1]}, %c;"
    load += "".join(f"ld.global.{word} x{k}, [%rd1+{k * width}];" for k in range(fragments.shape[1]))
    step = 8 if acc == "f64" else 4
    load += "".join(f"ld.global.{acc_word} y{k}, [%rd2+{k * step}];" for k in range(nd))
    x = [f"x{k}" for k in range(len(a) + len(b))]
    body = f"""{load} mma.sync.aligned.{shape}.row.col.{acc}.{ta}.{tb}.{acc} {{{name("y", nd)}}},
    {{{", ".join(x[: len(a)])}}}, {{{", ".join(x[len(a) :])}}}, {{{name("y", nd)}}};
    mad.wide.u32 %rd3, %t, {out.itemsize * out.shape[1]}, %out;"""
    body += "".join(f"st.global.{acc_word} [%rd3+{k * step}], y{k};" for k in range(nd))
    run(body, {"ab": fragments, "c": registers, "out": out})
    exact = c + va @ vb
    got = np.zeros((M, 8))
    for g, w in enumerate(where):
        got[w] = out[:, g]
    tolerance = {"f32": 2e-6, "f16": 2e-3, "s32": 0, "f64": 1e-14}[acc] * (
        np.abs(va) @ np.abs(vb) + np.abs(c)
    )
    assert np.all(np.abs(got - exact) <= tolerance)


def swizzled(image: Array, mode: int) -> Array:
    """16-byte chunks of rows of 128, 64 or 32 bytes change places as the row says."""
    chunks = image.view(np.uint8).reshape(-1, 16)
    index = np.arange(chunks.shape[0])
    mask = {0: 0, 1: 7, 2: 3, 3: 1}[mode]
    out = np.empty_like(chunks)
    out[index ^ (index >> 3 & mask)] = chunks
    return out.reshape(-1)


@pytest.mark.parametrize(
    ("kind", "acc", "n"),
    [
        ("f16", "f32", 8),
        ("bf16", "f32", 64),
        ("f16", "f16", 24),
        ("tf32", "f32", 16),
        ("s8", "s32", 32),
        ("e4m3", "f32", 16),
    ],
)
@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("a_in_registers", [False, True])
def test_wgmma(kind: str, acc: str, n: int, swizzle: int, a_in_registers: bool) -> None:
    size = BITS[kind] // 8
    K = 32 // size
    ca, va = encoded(kind, (64, K), 0)
    cb, vb = encoded(kind, (n, K), 1)
    width = {0: 32, 1: 128, 2: 64, 3: 32}[swizzle]  # bytes of a row in memory; K takes the first 32

    def image(codes: Array) -> Array:
        data = codes.astype(f"uint{8 * size}").view(np.uint8).reshape(codes.shape[0], 32)
        if swizzle == 0:  # core matrices of 8 rows by 16 bytes: the two along K, then those along M or N
            return np.ascontiguousarray(data.reshape(-1, 8, 2, 16).transpose(0, 2, 1, 3)).reshape(-1)
        rows = np.zeros((codes.shape[0], width), dtype=np.uint8)
        rows[:, :32] = data
        return swizzled(rows.reshape(-1), swizzle)

    a, b = image(ca), image(cb)
    a = np.concatenate([a, np.zeros(-a.size % 1024, dtype=np.uint8)])
    leading, stride = (128, 256) if swizzle == 0 else (16, 8 * width)
    fields = leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62
    nd = n // 4 if acc == "f16" else n // 2
    registers = ", ".join(f"%r{k}" for k in range(nd))
    body = f"""shr.u32 %r180, %smem, 4; cvt.u64.u32 %rd1, %r180; or.b64 %rd2, %rd1, {fields};
    add.u32 %r181, %smem, {a.size}; shr.u32 %r181, %r181, 4;
    cvt.u64.u32 %rd3, %r181; or.b64 %rd4, %rd3, {fields};"""
    operand = "%rd2"
    if a_in_registers:  # lane l of warp w has rows 16w + l / 4 and 8 below
        operand = "{%r184, %r185, %r186, %r187}"
        body += """and.b32 %r188, %t, 31; shr.u32 %r189, %t, 5; shr.u32 %r190, %r188, 2;
        mad.lo.u32 %r190, %r189, 16, %r190;
        and.b32 %r191, %r188, 3; mad.lo.u32 %r192, %r190, 32, 0; mad.lo.u32 %r192, %r191, 4, %r192;
        cvt.u64.u32 %rd10, %r192; add.u64 %rd10, %rd10, %plain;
        ld.global.u32 %r184, [%rd10]; ld.global.u32 %r185, [%rd10+256]; ld.global.u32 %r186, [%rd10+16];
        ld.global.u32 %r187, [%rd10+272];"""
    scales = "" if acc == "s32" else ", 1, 1"
    if kind in ("f16", "bf16"):
        scales += ", 0" if a_in_registers else ", 0, 0"
    body += f"""wgmma.fence.sync.aligned; setp.ne.b32 %p1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n{n}k{K}.{acc}.{kind}.{kind} {{{registers}}},
    {operand}, %rd4, %p1{scales};
    setp.eq.b32 %p1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n{n}k{K}.{acc}.{kind}.{kind} {{{registers}}},
    {operand}, %rd4, %p1{scales};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"""
    plain = np.ascontiguousarray(ca.astype(f"uint{8 * size}"))
    body = body.replace("%plain", str(plain.ctypes.data))
    got = from_shared(np.concatenate([a, b]), body, nd, threads=128)
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[acc]
    values = (
        got.view(dtype).astype(np.float64).reshape(4, 8, 4, n // 8, 2, 2)
    )  # warp, l/4, l%4, block, half, pair
    result = values.transpose(0, 4, 1, 3, 2, 5).reshape(64, n)
    expected = 2 * (va @ vb.T)
    tolerance = {"f32": 4e-6, "f16": 4e-3, "s32": 0}[acc] * (np.abs(va) @ np.abs(vb.T) + 1)
    assert np.all(np.abs(result - expected) <= tolerance)


# ---- asynchronous copies ----
def test_cp_async() -> None:
    """Copies of 4, 8 and 16 bytes; a short source is filled with zeros; the bytes arrive at the wait."""
    x = integers(np.uint32, count=32 * 4)
    out = np.zeros((32, 8), dtype=np.uint32)
    run(
        """mad.wide.u32 %rd1, %t, 16, %src; mad.lo.u32 %r1, %t, 32, %smem; mov.u32 %r8, 4;
        cp.async.cg.shared.global [%r1], [%rd1], 16; cp.async.commit_group;
        cp.async.ca.shared.global [%r1+16], [%rd1], 8; cp.async.ca.shared.global [%r1+24], [%rd1+8], 8, %r8;
        cp.async.commit_group; ld.shared.u32 %r7, [%r1]; cp.async.wait_group 1;
        ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%r1]; ld.shared.u32 %r9, [%r1+16]; cp.async.wait_all;
        ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r1+16]; mad.wide.u32 %rd2, %t, 32, %out;
        st.global.v4.u32 [%rd2], {%r7, %r5, %r9, %r2};
        st.global.v4.u32 [%rd2+16], {%r10, %r11, %r12, %r13};""",
        {"src": x, "out": out},
        shared=1024,
    )
    rows = x.reshape(32, 4)
    stale = np.full(32, 0xFFFFFFFF)
    zero = np.zeros(32)
    expected = [stale, rows[:, 3], stale, rows[:, 0], rows[:, 0], rows[:, 1], rows[:, 2], zero]
    same(out, np.stack(expected, 1).astype(np.uint32))


def wait(barrier: str, parity: str, label: str) -> str:
    poll = f"mbarrier.try_wait.parity.shared::cta.b64 %p20, [{barrier}], {parity};"
    return f"${label}: {poll} @!%p20 bra ${label};"


def test_mbarrier_and_cp_async() -> None:
    """A producer warp fills two stages in turn, a consumer warp empties them: full and empty barriers."""
    x = integers(np.uint32, count=32 * 6)
    out = np.zeros_like(x)
    body = f"""add.u32 %r1, %smem, 512; setp.eq.u32 %p1, %t, 0; setp.lt.u32 %p2, %t, 32; and.b32 %r9, %t, 31;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 32; @%p1 mbarrier.init.shared::cta.b64 [%r1+8], 32;
    @%p1 mbarrier.init.shared::cta.b64 [%r1+16], 32; @%p1 mbarrier.init.shared::cta.b64 [%r1+24], 32;
    bar.sync 0; mov.u32 %r2, 0; cvta.to.global.u64 %rd1, %src;
    $loop: and.b32 %r3, %r2, 1; shr.u32 %r4, %r2, 1; and.b32 %r4, %r4, 1; mad.lo.u32 %r5, %r3, 8, %r1;
    mad.lo.u32 %r6, %r3, 128, %smem; mad.lo.u32 %r6, %r9, 4, %r6; mad.lo.u32 %r7, %r2, 32, %r9;
    xor.b32 %r8, %r4, 1; @!%p2 bra $consume;
    {wait("%r5+16", "%r8", "empty")}
    mad.wide.u32 %rd2, %r7, 4, %rd1; cp.async.ca.shared.global [%r6], [%rd2], 4;
    cp.async.mbarrier.arrive.noinc.shared.b64 [%r5]; bra $next;
    $consume: {wait("%r5", "%r4", "full")}
    ld.shared.u32 %r10, [%r6]; mad.wide.u32 %rd3, %r7, 4, %out; st.global.u32 [%rd3], %r10;
    mbarrier.arrive.shared::cta.b64 _, [%r5+16];
    $next: add.u32 %r2, %r2, 1; setp.lt.u32 %p3, %r2, 6; @%p3 bra $loop;"""
    for seed in range(3):
        out[:] = 0
        with cusim.device(racecheck=True, seed=seed):
            run(body, {"src": x, "out": out}, threads=64, shared=1024)
        same(out, x)


def test_bulk_copies() -> None:
    x = integers(np.uint32, count=256)
    out, total = np.zeros_like(x), np.ones(256, dtype=np.float32)
    reals = np.arange(256, dtype=np.float32)
    body = f"""add.u32 %r1, %smem, 4096; setp.eq.u32 %p1, %t, 0; add.u32 %r2, %smem, 1024;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 2048;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%smem], [%src], 1024, [%r1];
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%reals], 1024, [%r1];
    {wait("%r1", "0", "w")} fence.proxy.async; bar.sync 0;
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [%out], [%smem], 1024;
    @%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%total], [%r2], 1024;
    @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;"""
    with cusim.device(racecheck=True):
        run(body, {"src": x, "out": out, "reals": reals, "total": total}, threads=64, shared=8192)
    same(out, x)
    same(total, reals + 1)


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
def test_tensor_copies(swizzle: int) -> None:
    """A box over the edge of a matrix: swizzled in shared memory, zeros outside, and cut when stored."""
    width = {0: 64, 1: 32, 2: 64, 3: 128}[swizzle]  # bytes of a row of the box
    rows, columns, box = 20, 72, (width // 2, 8)
    x = integers(np.uint16, count=rows * columns).reshape(rows, columns)
    out = np.zeros_like(x)
    image = np.zeros(8 * width, dtype=np.uint8)
    entry = ctypes.c_void_p()
    cusim.load().cudaGetDriverEntryPoint(
        b"cuTensorMapEncodeTiled", ctypes.byref(entry), ctypes.c_ulonglong(0), None
    )
    assert entry.value
    address, count = ctypes.c_void_p, ctypes.c_int
    encode = ctypes.CFUNCTYPE(count, address, count, ctypes.c_uint32, *[address] * 5, *[count] * 4)(
        entry.value
    )
    maps = []
    for array in (x, out):
        tensor_map = (ctypes.c_uint64 * 16)()
        dims, strides = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * 2)
        sizes, steps = (ctypes.c_uint32 * 2)(*box), (ctypes.c_uint32 * 2)(1, 1)
        lists = [ctypes.addressof(v) for v in (dims, strides, sizes, steps)]
        assert encode(ctypes.addressof(tensor_map), 1, 2, array.ctypes.data, *lists, 0, swizzle, 0, 0) == 0
        maps.append(tensor_map)
    x0, y0 = columns - box[0] // 2, rows - 5
    body = f"""add.u32 %r1, %smem, 4096; setp.eq.u32 %p1, %t, 0; mov.u32 %r2, {x0}; mov.u32 %r3, {y0};
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; bar.sync 0; @!%p1 bra $skip;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {8 * width};
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%smem],
    [%load, {{%r2, %r3}}], [%r1];
    $skip: {wait("%r1", "0", "w")}
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%store, {{%r2, %r3}}], [%smem];
    $copy: setp.ge.u32 %p2, %t, {8 * width // 4}; @%p2 ret;
    mad.lo.u32 %r4, %t, 4, %smem; ld.shared.u32 %r5, [%r4]; mad.wide.u32 %rd1, %t, 4, %image;
    st.global.u32 [%rd1], %r5; add.u32 %t, %t, 32; bra $copy;"""
    code = kernel(body, ["load", "store", "image"], shared=8192)
    arguments = [*[ctypes.c_uint64(ctypes.addressof(m)) for m in maps], pointer(image)]
    with cusim.device(racecheck=True):
        cusim.run_ptx(code, b"k", (1,), (32,), arguments)
    expected = np.zeros((8, box[0]), dtype=np.uint16)
    expected[:5, : box[0] // 2] = x[y0:, x0:]
    mode = {0: 0, 1: 3, 2: 2, 3: 1}[swizzle]
    same(image, swizzled(expected.reshape(-1), mode))
    stored = np.zeros_like(x)
    stored[y0:, x0:] = x[y0:, x0:]
    same(out, stored)


# ---- the device ----
def test_special_registers() -> None:
    out = np.zeros((6, 32, 4), dtype=np.uint32)
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %nctaid.x; mov.u32 %r3, %laneid; mov.u32 %r4, %ntid.x;
    mad.lo.u32 %r5, %r1, %r4, %t; mad.wide.u32 %rd1, %r5, 16, %out; mov.u32 %r6, %lanemask_lt;
    st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r6};"""
    run(body, {"out": out}, blocks=6)
    same(out[:, 0, 0], np.arange(6))
    assert np.all(out[:, :, 1] == 6)
    same(out[0, :, 2], np.arange(32))
    same(out[0, :, 3], 2 ** np.arange(32) - 1)


def test_counts() -> None:
    """A coalesced load, one with a stride, copies that in every second lane only fill with zeros, and a bank
    conflict."""
    x = np.zeros(32 * 32, dtype=np.float32)
    start = -x.ctypes.data % 128 // 4
    x = x[start:]
    body = """mad.wide.u32 %rd1, %t, 4, %x; ld.global.f32 %f1, [%rd1]; mad.wide.u32 %rd2, %t, 32, %x;
    ld.global.f32 %f2, [%rd2]; and.b32 %r2, %t, 1; mul.lo.u32 %r2, %r2, 16; mad.lo.u32 %r1, %t, 16, %smem;
    cp.async.cg.shared.global [%r1], [%rd2], 16, %r2; cp.async.wait_all; bar.sync 0;
    mad.lo.u32 %r1, %t, 128, %smem; st.shared.f32 [%r1], %f1;"""
    cusim.counts()
    with cusim.device(counts=True):
        run(body, {"x": x}, shared=4096)
    counted = cusim.counts()["k"]
    assert (counted["global_sectors"], counted["global_sectors_ideal"]) == (4 + 32 + 16, 4 + 4 + 8)
    assert (counted["shared_wavefronts"], counted["shared_wavefronts_ideal"]) == (4 + 32, 4 + 1)

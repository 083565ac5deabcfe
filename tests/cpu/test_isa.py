"""Every function of csrc/cpu/isa/contract.h at every level; and the kernels of three ops on the NEON level,
compiled with a cross compiler and run on an emulator where this machine is no ARM."""

from __future__ import annotations

import math
import platform
import re
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from accuracy import assert_accurate
from bitfuse.weights.formats import FORMATS
from bitfuse_tools.compile.toolchain import CXXFLAGS, ccache, host_compiler, levels

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ISA = CSRC / "cpu" / "isa"
MACHINES = ("x86_64", "aarch64")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tools(machine: str) -> tuple[list[str], list[str]]:
    """The compiler for a machine, and what its programs are started with."""
    if platform.machine() == machine:
        return [*ccache(), *host_compiler()], []
    compiler, emulator = f"{machine}-linux-gnu-g++", f"qemu-{machine}"
    for tool in (compiler, emulator):
        if shutil.which(tool) is None:
            package = compiler.replace(
                f"{machine}-linux-gnu-g++", f"g++-{machine.replace('_', '-')}-linux-gnu"
            )
            pytest.skip(f"no {tool} here: apt-get install {package} qemu-user")
    return [*ccache(), compiler], [emulator, "-L", f"/usr/{machine}-linux-gnu"]


def compile_(machine: str, level: str, source: Path, target: Path, *options: str) -> Path:
    """With the package's flags. -O1: what is optimised further shows in no number."""
    flags = [*CXXFLAGS, "-O1", "-Werror", "-fopenmp", f"-I{CSRC}", f"-DBITFUSE_ISA={level}"]
    command = [*tools(machine)[0], *flags, *levels(CSRC, machine)[level], *options, str(source)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def declared(pairs: bool) -> set[str]:
    """The functions that contract.h asks for."""
    text = (ISA / "contract.h").read_text().partition("#if BITFUSE_PAIRS")
    found = re.findall(r"^BITFUSE_INLINE \w+ (\w+)\(", text[0] + (text[2] if pairs else ""), re.MULTILINE)
    return {*found, "Table16", *(["E4m3Pairs"] if pairs else [])}


@pytest.mark.parametrize(
    ("machine", "level"), [(machine, level) for machine in MACHINES for level in levels(CSRC, machine)]
)
def test_every_function_of_the_contract(machine: str, level: str, tmp_path: Path) -> None:
    program = compile_(machine, level, HERE / "isa_contract.cpp", tmp_path / "isa_contract")
    done = subprocess.run([*tools(machine)[1], str(program)], capture_output=True, text=True)
    if done.returncode == -signal.SIGILL:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stderr
    called = set(done.stdout.split())
    pairs = "dot_pairs" in called
    assert called == declared(pairs)
    assert pairs == (level == "avx512bf16")


def test_levels_have_a_header_each() -> None:
    for machine in MACHINES:
        assert all((ISA / f"{level}.h").is_file() for level in levels(CSRC, machine))
    assert levels(CSRC, "x86_64")["avx2"] == ["-mavx2", "-mfma", "-mf16c"]
    wider = levels(CSRC, "AMD64")["avx512bf16"]
    assert wider[:3] == ["-mavx2", "-mfma", "-mf16c"] and wider[-1] == "-mavx512bf16"
    assert list(levels(CSRC, "arm64")) == ["portable", "neon"]
    assert list(levels(CSRC, "riscv64")) == ["portable"]


# three ops on the NEON level

Run = Callable[..., list[torch.Tensor]]


@pytest.fixture(scope="module")
def neon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """neon(op, parts, *shapes of outputs with their dtypes): what tests/cpu/run_op.cpp makes of it."""
    folder = tmp_path_factory.mktemp("neon")
    compiler, emulator = tools("aarch64")
    sources = [
        CSRC / "cpu" / "linear" / "lowbit_linear.cpp",
        CSRC / "cpu" / "linear" / "few_rows_narrow.cpp",
        CSRC / "cpu" / "linear" / "gated_activation.cpp",
        CSRC / "cpu" / "attention" / "attention.cpp",
        HERE / "run_op.cpp",
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = pool.map(lambda s: compile_("aarch64", "neon", s, folder / f"{s.stem}.o", "-c"), sources)
        program = folder / "run_op"
        link = [*compiler[-1:], "-fopenmp", *map(str, objects), "-o", str(program)]
        subprocess.run(link, check=True)

    def run(
        op: str, parts: dict[str, Any], *outputs: tuple[tuple[int, ...], torch.dtype]
    ) -> list[torch.Tensor]:
        files = [folder / f"out{i}" for i in range(len(outputs))]
        (folder / "problem").write_bytes(f"{op}\n".encode() + b"".join(map(packed, parts.items())))
        subprocess.run([*emulator, str(program), str(folder / "problem"), *map(str, files)], check=True)
        made = [
            torch.frombuffer(bytearray(f.read_bytes()), dtype=t)
            for f, (_, t) in zip(files, outputs, strict=True)
        ]
        return [t.view(shape) for t, (shape, _) in zip(made, outputs, strict=True)]

    yield run


def packed(part: tuple[str, Any]) -> bytes:
    name, value = part
    if isinstance(value, torch.Tensor):
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    else:
        data = struct.pack("<d" if isinstance(value, float) else "<q", value)
    return f"{name} {len(data)}\n".encode() + data


# of csrc/common/types.h
CODE_KINDS = {"int4": 0, "nf4": 1, "int8": 2, "fp8": 3, "int3": 4, "int2": 6, "ternary": 7}


@pytest.mark.parametrize(
    ("format", "symmetric"),
    [
        *(("int4", True), ("int4", False), ("nf4", None), ("int8", True), ("int8", False), ("fp8", None)),
        *(("int3", False), ("int2", True), ("ternary", None)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowbit_linear_on_neon(neon: Run, format: str, symmetric: bool | None, dtype: torch.dtype) -> None:
    fmt = FORMATS[format]
    for m, n, k, group in ((1, 41, 72, 24), (3, 27, 384, 64), (9, 72, 136, 136), (100, 41, 128, 32)):
        options: dict[str, Any] = {} if symmetric is None else {"symmetric": symmetric}
        w = bitfuse.quantize(torch.randn(n, k), format, group_size=group, scale_dtype=dtype, **options)
        x, grad, bias = (torch.randn(s).to(dtype) for s in ((m, k), (m, n), (n,)))
        parts: dict[str, Any] = {
            "n": n, "k": k, "group_size": group, "rows": m, "dtype": DTYPES.index(dtype),
            "scale_kind": DTYPES.index(dtype), "code_kind": CODE_KINDS[format], "zero_point": fmt.zero_point,
            "codes": w.qweight, "scales": w.scales,
        }  # fmt: skip
        if fmt.bits < 8:
            parts["values"] = fmt.values().repeat(16 >> fmt.bits)
        if w.zeros is not None:
            parts["zeros"] = w.zeros
        exact, plain = w.dequantize(torch.float64), w.dequantize(dtype)
        what = f"{format} {m} {n}x{k} group {group} {dtype}"
        (y,) = neon("lowbit_linear", parts | {"x": x, "bias": bias}, ((m, n), dtype))
        assert_accurate(y, x.double() @ exact.T + bias.double(), x @ plain.T + bias, what)
        (gx,) = neon("lowbit_linear_grad_x", parts | {"x": grad}, ((m, k), dtype))
        assert_accurate(gx, grad.double() @ exact, grad @ plain, "gradient, " + what)


def plain_gated(
    function: Callable[[torch.Tensor], torch.Tensor], tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output and gradients by the formula, in a dtype."""
    gate, up = (tensors[name].to(dtype).requires_grad_() for name in ("gate", "up"))
    out = function(gate) * up
    return [out.detach(), *torch.autograd.grad(out, (gate, up), tensors["grad"].to(dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_activation_on_neon(neon: Run, dtype: torch.dtype) -> None:
    shape = (7, 133)
    functions: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
        torch.nn.functional.silu,
        torch.nn.functional.gelu,
        lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        torch.relu,
    )
    for activation, function in enumerate(functions):
        tensors = {name: (4 * torch.randn(shape)).to(dtype) for name in ("gate", "up", "grad")}
        tensors["gate"][0, :5] = torch.tensor([0.0, -30, 30, 90, -90]).to(dtype)
        parts = {"activation": activation, "dtype": DTYPES.index(dtype), "rows": 7, "columns": 133}
        forward = parts | {name: tensors[name] for name in ("gate", "up")}
        got = neon("gated_activation", forward, (shape, dtype))
        got += neon("gated_activation", parts | tensors, (shape, dtype), (shape, dtype))
        exact, plain = (plain_gated(function, tensors, to) for to in (torch.float64, dtype))
        for i, results in enumerate(zip(got, exact, plain, strict=True)):
            assert_accurate(*results, f"{activation} {i} {dtype}")


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logsumexp by the formula, in a dtype."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    out = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    return out.transpose(1, 2), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_on_neon(neon: Run, dtype: torch.dtype) -> None:
    for batch, rows, keys, heads, kv_heads, dim, causal in (
        (2, 5, 5, 2, 2, 16, True),
        (1, 37, 70, 4, 2, 40, False),
        (1, 130, 130, 2, 1, 64, True),
    ):
        q = torch.randn(batch, rows, heads, dim).to(dtype)
        k, v = (torch.randn(batch, keys, kv_heads, dim).to(dtype) for _ in range(2))
        parts = {
            "batch": batch, "rows": rows, "keys": keys, "heads": heads, "kv_heads": kv_heads, "dim": dim,
            "dtype": DTYPES.index(dtype), "scale": dim**-0.5, "right": 0 if causal else -1,
            "q": q, "k": k, "v": v,
        }  # fmt: skip
        shapes = ((batch, rows, heads, dim), dtype), ((batch, heads, rows), torch.float32)
        out, lse = neon("attention", parts, *shapes)
        exact, exact_lse = plain_attention(q, k, v, causal, torch.float64)
        assert_accurate(out, exact, plain_attention(q, k, v, causal, dtype)[0], f"{dtype} {rows} {keys}")
        plain_lse = plain_attention(q, k, v, causal, torch.float32)[1]
        assert_accurate(lse, exact_lse, plain_lse, f"lse, {dtype}")

"""Small kernels written in PTX, for tests of single instructions."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .device import run_ptx

Array = npt.NDArray[Any]


def pointer(array: Array) -> ctypes.c_uint64:
    return ctypes.c_uint64(array.ctypes.data)


def kernel(body: str, parameters: Sequence[str] = (), shared: int = 0, target: str = "sm_90a") -> bytes:
    """A kernel named `k`: `parameters` are names of 64-bit parameters, each loaded into a register `%name`;
    `%t` is the thread's index, `%smem` the address of `shared` bytes. Registers to use: %r, %rd, %f, %fd, %h,
    %p and %b, each with a number."""
    declared = [f".param .u64 {name}_p" for name in parameters]
    names = "".join(f".reg .b64 %{name};\nld.param.u64 %{name}, [{name}_p];\n" for name in parameters)
    memory = f".shared .align 1024 .b8 smem[{shared}];\n" if shared else ""
    base = "mov.u32 %smem, smem;\n" if shared else ""
    return f""".version 8.5
.target {target}
.address_size 64
.visible .entry k({", ".join(declared)})
{{
.reg .pred %p<32>; .reg .b16 %h<64>; .reg .b32 %r<256>; .reg .b64 %rd<64>;
.reg .f32 %f<256>; .reg .f64 %fd<64>; .reg .b8 %b<32>;
.reg .b32 %t, %smem;
{memory}mov.u32 %t, %tid.x;
{base}{names}{body}
ret;
}}
""".encode()


def run(
    body: str,
    arrays: dict[str, Array] | None = None,
    *,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    target: str = "sm_90a",
) -> None:
    """Run a body; each array's address is in the register of its name."""
    arrays = arrays or {}
    code = kernel(body, list(arrays), shared, target)
    run_ptx(code, b"k", (blocks,), (threads,), [pointer(a) for a in arrays.values()])


def elementwise(instructions: str, *inputs: Array, out: npt.DTypeLike) -> Array:
    """Thread k puts element k of each input into a, b, c, ... and element k of the result is d."""
    size = inputs[0].size
    result = np.full(size, 0xA5, dtype=np.uint8).repeat(np.dtype(out).itemsize).view(out)
    body = ""
    arrays = {f"in{k}": np.ascontiguousarray(a) for k, a in enumerate(inputs)} | {"res": result}
    for name, (key, array) in zip("abcefg", list(arrays.items())[:-1], strict=False):
        width = array.dtype.itemsize
        body += f".reg .b{width * 8} {name};\nmad.wide.u32 %rd1, %t, {width}, %{key};\n"
        body += f"ld.global.b{width * 8} {name}, [%rd1];\n"
    width = result.dtype.itemsize
    body += f".reg .b{width * 8} d;\n{instructions}\n"
    body += f"mad.wide.u32 %rd1, %t, {width}, %res;\nst.global.b{width * 8} [%rd1], d;"
    run(body, arrays, threads=size)
    return result

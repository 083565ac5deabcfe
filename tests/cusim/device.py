"""The simulated device: its settings for a while, one kernel of a PTX text, and its counts."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

from .build import load


class SimulationError(RuntimeError):
    """A fault that the simulator found: a race, an access out of bounds, a deadlock, an instruction it does
    not know."""


@contextlib.contextmanager
def device(
    sm: int | None = None,
    racecheck: bool | int | None = None,
    seed: int | None = None,
    multiprocessors: int | None = None,
    resident: int | None = None,
    counts: bool | None = None,
) -> Iterator[None]:
    """Run kernels on the simulated device, with these settings; what is None stays as it is.

    They are the variables of README.md, read at each launch. `racecheck=2` checks global memory too; `counts`
    keeps the counts that `counts()` returns. Triton, if it is installed, gets its driver here.
    """
    _install_triton()
    chosen = {
        "CUSIM_SM": sm,
        "CUSIM_RACECHECK": racecheck,
        "CUSIM_SEED": seed,
        "CUSIM_SMS": multiprocessors,
        "CUSIM_RESIDENT": resident,
        "CUSIM_STATS": counts,
    }
    before = {name: os.environ.get(name) for name, value in chosen.items() if value is not None}
    os.environ.update({name: str(int(value)) for name, value in chosen.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@functools.cache
def _install_triton() -> None:
    if importlib.util.find_spec("triton") is not None:
        from . import triton_driver

        triton_driver.install()


def compute_capability() -> int:
    """Of the simulated device: 80, 90."""
    return int(os.environ.get("CUSIM_SM") or 90)


def multiprocessors() -> int:
    return int(os.environ.get("CUSIM_SMS") or 4)


def shared_memory() -> int:
    """Bytes of shared memory that one block may have."""
    sm = compute_capability()
    return (227 if sm >= 90 else 163 if sm in (80, 87) else 99) * 1024


def run_ptx(
    ptx: bytes,
    name: bytes,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Any],
    shared: int = 0,
) -> None:
    """Run one kernel. `arguments` are ctypes values; raises SimulationError with what went wrong."""
    lib = load()
    lib.cusim_run_ptx.restype = ctypes.c_void_p
    pointers = (ctypes.c_void_p * max(len(arguments), 1))(*[ctypes.addressof(a) for a in arguments])
    sizes = [(ctypes.c_uint * 3)(*size, *[1] * (3 - len(size))) for size in (grid, block)]
    message = lib.cusim_run_ptx(ptx, name, *sizes, ctypes.c_size_t(shared), pointers)
    if message:
        raise SimulationError(_taken(lib, message))


def counts(reset: bool = True) -> dict[str, dict[str, int]]:
    """Of each kernel launched with counts on: instructions, sectors and wavefronts, and their ideals."""
    lib = load()
    lib.cusim_counts.restype = ctypes.c_void_p
    header, *rows = (line.split("\t") for line in _taken(lib, lib.cusim_counts(int(reset))).splitlines())
    return {row[0]: dict(zip(header[1:], map(int, row[1:]), strict=True)) for row in rows}


def _taken(lib: ctypes.CDLL, text: int) -> str:
    out = ctypes.string_at(text).decode(errors="replace")
    lib.cusim_free(ctypes.c_void_p(text))
    return out

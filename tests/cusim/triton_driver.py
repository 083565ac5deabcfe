"""A Triton driver whose device is the simulator: `install()`, and `kernel[grid](...)` takes CPU tensors.

Triton compiles as it does for a GPU of the simulated compute capability and the PTX that comes out is run
on the CPU, so that bf16 dots, tensor-core layouts, software pipelining and barriers are those of the real
kernel, not of its interpreter. Written for Triton 3.6 to 3.9.
"""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from .build import load
from .device import SimulationError, compute_capability, device, multiprocessors, run_ptx, shared_memory

__all__ = ["CusimDriver", "SimulationError", "install"]

_scalar = {
    "i1": ctypes.c_int8,
    "u1": ctypes.c_uint8,
    "i8": ctypes.c_int8,
    "u8": ctypes.c_uint8,
    "i16": ctypes.c_int16,
    "u16": ctypes.c_uint16,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "f32": ctypes.c_float,
    "fp64": ctypes.c_double,
}
_half = {"fp16": torch.float16, "bf16": torch.bfloat16}


def _c_value(value: Any, kind: str) -> Any:
    """The C value of one kernel argument."""
    if kind.startswith("*"):
        return ctypes.c_uint64(0 if value is None else value if isinstance(value, int) else value.data_ptr())
    if kind in _half:
        return ctypes.c_uint16(
            int(torch.tensor(float(value), dtype=_half[kind], device="cpu").view(torch.int16)) & 0xFFFF
        )
    return _scalar[kind](value)


def _tensor_map(descriptor: Any, meta: dict[str, Any]) -> Any:
    """The CUtensorMap of a host-side TensorDescriptor."""
    rank = len(descriptor.shape)
    of_host = {8: 10, 9: 8, 10: 9}  # Triton numbers the types as the device does, the encoder as the driver
    kind = of_host.get(meta["elem_type"], meta["elem_type"])
    shape = list(descriptor.shape)
    if meta.get("fp4_padded"):
        shape[-1] *= 2
    entry = ctypes.c_void_p()
    load().cudaGetDriverEntryPoint(
        b"cuTensorMapEncodeTiled", ctypes.byref(entry), ctypes.c_ulonglong(0), None
    )
    address, count = ctypes.c_void_p, ctypes.c_int
    assert entry.value is not None
    encode = ctypes.CFUNCTYPE(
        count, address, count, ctypes.c_uint32, *[address] * 5, count, count, count, count
    )(entry.value)
    out = (ctypes.c_uint64 * 16)()
    dims = (ctypes.c_uint64 * rank)(*reversed(shape))
    strides = (ctypes.c_uint64 * rank)(*[s * meta["elem_size"] for s in reversed(descriptor.strides[:-1])])
    box = (ctypes.c_uint32 * rank)(*reversed(meta["block_size"]))
    steps = (ctypes.c_uint32 * rank)(*[1] * rank)
    lists = [ctypes.addressof(a) for a in (dims, strides, box, steps)]
    fill = int(descriptor.padding == "nan")
    status = encode(
        ctypes.addressof(out), kind, rank, descriptor.base.data_ptr(), *lists, 0, meta["swizzle"], 2, fill
    )
    if status:
        raise SimulationError(
            f"tensor descriptor rejected (CUresult {status}): shape {descriptor.shape}, "
            f"strides {descriptor.strides}, block {meta['block_size']}"
        )
    return out


def _descriptor_values(descriptor: Any, meta: dict[str, Any] | None) -> Iterator[Any]:
    """What Triton passes for a host-side TensorDescriptor, and shape and strides once more."""
    if meta is not None:
        yield _tensor_map(descriptor, meta)
    else:
        yield ctypes.c_uint64(descriptor.base.data_ptr())
        yield from map(ctypes.c_int64, (*descriptor.shape, *descriptor.strides))
        yield ctypes.c_int8(descriptor.padding == "nan")
        if hasattr(descriptor, "round_f32_to_tf32"):  # not in Triton 3.6
            yield ctypes.c_int8(descriptor.round_f32_to_tf32)
    yield from map(ctypes.c_int32, descriptor.shape)
    yield from map(ctypes.c_int64, descriptor.strides)


class _Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        self.signature = list(src.signature.values())
        self.descriptors = list(getattr(metadata, "tensordesc_meta", None) or [])
        self.threads = metadata.num_warps * 32
        self.shared = metadata.shared
        self.cooperative = bool(getattr(metadata, "launch_cooperative_grid", False))
        self.scratch = (metadata.global_scratch_size, metadata.global_scratch_align)

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: tuple[bytes, bytes],
        kernel_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], None] | None,
        exit_hook: Callable[[Any], None] | None,
        *args: Any,
    ) -> None:
        if not x * y * z:
            return
        metas = iter(self.descriptors)
        values = [
            v for kind, arg in zip(self.signature, args, strict=True) for v in self._flat(kind, arg, metas)
        ]
        size, align = self.scratch
        scratch = torch.empty(x * y * z * size + align if size else 0, dtype=torch.uint8, device="cpu")
        values += [
            ctypes.c_uint64(-(-scratch.data_ptr() // align) * align if size else 0),
            ctypes.c_uint64(0),
        ]
        name, ptx = function
        if enter_hook is not None:
            enter_hook(launch_metadata)
        with device(resident=x * y * z if self.cooperative else None):  # its blocks may wait for one another
            run_ptx(ptx, name, (x, y, z), (self.threads,), values, self.shared)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def _flat(self, kind: Any, arg: Any, metas: Iterator[dict[str, Any]]) -> Iterator[Any]:
        if isinstance(kind, tuple):
            for k, a in zip(kind, arg, strict=True):
                yield from self._flat(k, a, metas)
        elif kind.startswith("tensordesc"):
            yield from _descriptor_values(arg, next(metas, None))
        elif kind == "nvTmaDesc":
            yield arg
        elif kind != "constexpr":
            yield _c_value(arg, kind)


class _Utils:
    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        knobs.runtime.kernel_load_start_hook.add(self._remember)

    def _remember(
        self, module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str
    ) -> None:
        self.files = metadata_group

    def load_binary(self, name: str, kernel: bytes, shared: int, index: int) -> tuple[Any, ...]:
        path = next(p for n, p in self.files.items() if n.endswith(".ptx"))
        ptx = pathlib.Path(path).read_bytes()
        return 1, (name.encode(), ptx), 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: Any) -> None:
        pass

    def get_device_properties(self, index: int) -> dict[str, int]:
        return {
            "max_shared_mem": shared_memory(),
            "multiprocessor_count": multiprocessors(),
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1980000,
            "mem_clock_rate": 2619000,
            "mem_bus_width": 5120,
        }


class CusimDriver(DriverBase):
    def __init__(self) -> None:
        self.utils = _Utils()
        self.launcher_cls = _Launcher
        # Triton keeps what it compiled by device: one index for each capability lets a process use several
        self.get_current_device = compute_capability
        self.set_current_device = lambda index: None
        self.get_current_stream = lambda index=None: 0
        self.get_device_capability = lambda index=0: divmod(compute_capability(), 10)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", compute_capability(), 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return SimpleNamespace(current_device=lambda: 0, synchronize=lambda: None)

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def tie(call: Callable[[], None], quantiles: tuple[float, ...] = (0.5,), **_: Any) -> list[float]:
            call()  # a simulated kernel has no time: every configuration ties and the first is kept
            return [1.0] * len(quantiles)

        return tie

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device="cpu")

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


def install() -> None:
    """Make the simulator Triton's device in this process."""
    if not isinstance(triton.runtime.driver._active, CusimDriver):
        triton.runtime.driver.set_active(CusimDriver())

"""A Triton driver whose device is cusim: `install()` and `kernel[grid](...)` takes CPU tensors.

Triton compiles as it does for a GPU of compute capability CUSIM_SM (default 90) and the PTX
that comes out is run on the CPU, so that bf16 dots, tensor-core layouts, software pipelining
and barriers are those of the real kernel, not of Triton's interpreter.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
from types import SimpleNamespace

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase, expand_signature, wrap_handle_tensordesc_impl

from .build import load

_ctype = {
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


class SimulationError(RuntimeError):
    """A fault that the simulator found: a race, an access out of bounds, a deadlock, an unknown instruction."""


def _library() -> ctypes.CDLL:
    lib = load()
    lib.cusim_run_ptx.restype = ctypes.c_void_p
    return lib


def _pack(value, kind: str):
    """The C value of one kernel argument."""
    if kind == "nvTmaDesc":
        return value
    if kind.startswith("*"):
        if value is None:
            return ctypes.c_uint64(0)
        return ctypes.c_uint64(value if isinstance(value, int) else value.data_ptr())
    if kind in ("fp16", "bf16"):
        bits = torch.tensor(float(value), dtype=torch.float16 if kind == "fp16" else torch.bfloat16).view(
            torch.int16
        )
        return ctypes.c_uint16(int(bits) & 0xFFFF)
    return _ctype[kind](value)


class _Launcher:
    def __init__(self, src, metadata):
        meta = getattr(metadata, "tensordesc_meta", None)
        self.kinds = expand_signature(src.signature.values(), meta, "nvTmaDesc")
        self.threads = metadata.num_warps * 32
        self.shared = metadata.shared
        self.scratch = (metadata.global_scratch_size, metadata.global_scratch_align)
        self.launch = wrap_handle_tensordesc_impl(self._launch, src.signature, meta, _tensor_descriptor)

    def __call__(self, x, y, z, stream, function, kernel_metadata, launch_metadata, enter, leave, *args):
        if x * y * z:
            self.launch((x, y, z), function, args)

    def _launch(self, grid, function, args):
        flat_kinds, flat_args = [], []

        def visit(kind, arg):
            if isinstance(kind, tuple):
                for k, a in zip(kind, arg):
                    visit(k, a)
            elif kind != "constexpr":
                flat_kinds.append(kind)
                flat_args.append(arg)

        for kind, arg in zip(self.kinds, args):
            visit(kind, arg)
        values = [_pack(a, k) for a, k in zip(flat_args, flat_kinds)]
        scratch = None
        if self.scratch[0]:
            scratch = torch.empty(
                grid[0] * grid[1] * grid[2] * self.scratch[0] + self.scratch[1], dtype=torch.uint8
            )
        values += [ctypes.c_uint64(scratch.data_ptr() if scratch is not None else 0), ctypes.c_uint64(0)]
        pointers = (ctypes.c_void_p * len(values))(
            *[ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values]
        )
        name, ptx = function
        lib = _library()
        message = lib.cusim_run_ptx(
            ptx,
            name,
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(self.threads, 1, 1),
            ctypes.c_size_t(self.shared),
            pointers,
        )
        if message:
            text = ctypes.string_at(message).decode()
            lib.cusim_free(ctypes.c_void_p(message))
            raise SimulationError(text)


def _tensor_descriptor(arg, meta, _):
    """What Triton passes for a host-side TensorDescriptor: the map, then shape and strides."""
    if meta is None:
        return [
            arg.base,
            *arg.shape,
            *arg.strides,
            arg.padding == "nan",
            arg.round_f32_to_tf32,
            *arg.shape,
            *arg.strides,
        ]
    rank = len(arg.shape)
    type_of = {8: 10, 9: 8, 10: 9}  # Triton's device-side numbering to CUtensorMapDataType
    kind = type_of.get(meta["elem_type"], meta["elem_type"])
    box = list(meta["block_size"])
    size = meta["elem_size"]
    lib = _library()
    entry = ctypes.c_void_p()
    lib.cudaGetDriverEntryPoint(b"cuTensorMapEncodeTiled", ctypes.byref(entry), ctypes.c_ulonglong(0), None)
    encode = ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
    )(entry.value)
    out = (ctypes.c_uint64 * 16)()
    dims = (ctypes.c_uint64 * rank)(*reversed(arg.shape))
    strides = (ctypes.c_uint64 * max(rank - 1, 1))(*[s * size for s in reversed(arg.strides[:-1])])
    boxes = (ctypes.c_uint32 * rank)(*reversed(box))
    steps = (ctypes.c_uint32 * rank)(*[1] * rank)
    status = encode(
        ctypes.addressof(out),
        kind,
        rank,
        arg.base.data_ptr(),
        ctypes.addressof(dims),
        ctypes.addressof(strides),
        ctypes.addressof(boxes),
        ctypes.addressof(steps),
        0,
        meta["swizzle"],
        2,
        1 if arg.padding == "nan" else 0,
    )
    if status:
        raise SimulationError(
            f"tensor descriptor rejected (CUresult {status}): shape {arg.shape}, strides {arg.strides}, box {box}"
        )
    return [out, *arg.shape, *arg.strides]


class _Utils:
    def __init__(self):
        self.metadata_group = None
        knobs.runtime.kernel_load_start_hook = self._remember

    def _remember(self, module, function, name, metadata_group, hash):
        self.metadata_group = metadata_group

    def load_binary(self, name, kernel, shared, device):
        path = next(p for n, p in self.metadata_group.items() if n.endswith(".ptx"))
        ptx = pathlib.Path(path).read_bytes()
        return 1, (name.encode(), ptx), 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        sm = int(os.environ.get("CUSIM_SM", "90"))
        shared = 232448 if sm >= 90 else 166912 if sm == 80 else 101376
        return {
            "max_shared_mem": shared,
            "multiprocessor_count": int(os.environ.get("CUSIM_SMS", "4")),
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1980000,
            "mem_clock_rate": 2619000,
            "mem_bus_width": 5120,
        }


class CusimDriver(DriverBase):
    def __init__(self):
        self.utils = _Utils()
        self.launcher_cls = _Launcher
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device=None: 0
        self.get_device_capability = lambda device=0: divmod(int(os.environ.get("CUSIM_SM", "90")), 10)

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", int(os.environ.get("CUSIM_SM", "90")), 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return SimpleNamespace(current_device=lambda: 0, synchronize=lambda: None)

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_benchmarker(self):
        # a simulated kernel has no time: every configuration ties and the first is kept
        return lambda call, quantiles=(0.5,), **kwargs: (call(), [1.0] * len(quantiles))[1]

    def get_empty_cache_for_benchmark(self):
        return torch.empty(0)

    def clear_cache(self, cache):
        pass


def install() -> None:
    """Make cusim Triton's device in this process."""
    triton.runtime.driver.set_active(CusimDriver())

"""A library that nvcc built, for two targets, on the simulator: the CUDA runtime's entry points."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

import cusim
from cusim.build import declared

NVCC = cusim.cuda_include().parent / "bin" / "nvcc"
pytestmark = [
    pytest.mark.skipif(cusim.has_gpu(), reason="the simulator stands in for a GPU"),
    pytest.mark.skipif(not NVCC.exists(), reason="needs nvcc"),
]

SOURCE = r"""
#include <cuda_runtime.h>

__constant__ float offset[4];

__global__ void __launch_bounds__(256) scale(const float* x, float* y, int n) {
  extern __shared__ float tile[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = x[i < n ? i : 0];
  __syncthreads();
#if __CUDA_ARCH__ >= 900
  const float factor = 90;
#else
  const float factor = 80;
#endif
  if (i < n) y[i] = tile[threadIdx.x] * factor + offset[i % 4];
}

extern "C" const char* run(const float* x, float* y, int n, int past, cudaStream_t stream) {
  float values[4] = {1, 2, 3, 4};
  cudaMemcpyToSymbolAsync(offset, values, sizeof values, 0, cudaMemcpyHostToDevice, stream);
  int bytes = 60000;
  auto set = cudaFuncSetAttribute(scale, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (set) return cudaGetErrorString(set);
  scale<<<(n + 255) / 256, 256, bytes, stream>>>(x, y, n + past);
  cudaError_t e = cudaGetLastError();
  return e ? cudaGetErrorString(e) : nullptr;
}
extern "C" const char* too_much_shared(float* y) {
  scale<<<1, 256, 100000>>>(y, y, 1);
  cudaError_t e = cudaGetLastError();
  return e ? cudaGetErrorString(e) : nullptr;
}
extern "C" int facts(int* out) {
  cudaDeviceProp p;
  int count, blocks, optin;
  cudaFuncAttributes a;
  if (cudaGetDeviceCount(&count) || cudaGetDeviceProperties(&p, 0)) return 1;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, scale, 256, 40000)) return 2;
  if (cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0)) return 3;
  if (cudaFuncGetAttributes(&a, scale)) return 4;
  int values[] = {count, p.major * 10 + p.minor, p.multiProcessorCount, blocks, optin, a.maxThreadsPerBlock};
  for (int k = 0; k < 6; ++k) out[k] = values[k];
  return 0;
}
extern "C" int copies(char* host, int n) {
  char* device;
  cudaStream_t stream;
  cudaEvent_t event;
  if (cudaStreamCreate(&stream) || cudaEventCreate(&event) || cudaMalloc(&device, n)) return 1;
  if (cudaMemsetAsync(device, 7, n, stream)) return 2;
  if (cudaMemcpyAsync(host, device, n, cudaMemcpyDeviceToHost, stream)) return 2;
  if (cudaEventRecord(event, stream) || cudaStreamSynchronize(stream) || cudaDeviceSynchronize()) return 3;
  return cudaFree(device) || cudaEventDestroy(event) || cudaStreamDestroy(stream);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("extension")
    source, made = folder / "scale.cu", folder / "scale.so"
    source.write_text(SOURCE)
    targets = [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ("80", "90a")]
    flags = ["-std=c++17", "-lineinfo", "-cudart", "shared", "-Xcompiler", "-fPIC", "-shared"]
    subprocess.run([str(NVCC), *targets, *flags, str(source), "-o", str(made)], check=True)
    lib = ctypes.CDLL(str(made))
    lib.run.restype = lib.too_much_shared.restype = ctypes.c_char_p
    return lib


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def test_the_target_follows_the_device(library: ctypes.CDLL) -> None:
    x = torch.randn(300)
    expected_offset = torch.tensor([1.0, 2, 3, 4]).repeat(75)
    for sm, factor in ((80, 80), (90, 90), (86, 80), (100, 80), (80, 80)):  # sm_90a is for 90 alone
        y = cusim.guarded_empty((300,), torch.float32)
        with cusim.device(sm=sm, racecheck=2, seed=sm):
            assert library.run(address(cusim.guarded(x)), address(y), 300, 0, None) is None
        torch.testing.assert_close(y, x * factor + expected_offset)


def test_a_fault_reaches_the_caller(library: ctypes.CDLL) -> None:
    x, y = (cusim.guarded_empty((300,), torch.float32) for _ in range(2))
    message = library.run(address(x), address(y), 300, 40, None).decode()
    assert "invalid global memory access" in message
    assert "scale.cu:" in message
    assert library.run(address(x), address(y), 300, 0, None) is None


def test_limits(library: ctypes.CDLL) -> None:
    with cusim.device(sm=86):
        assert library.run(address(torch.zeros(4)), address(torch.zeros(4)), 4, 0, None) is None
        assert b"60000" in library.too_much_shared(address(torch.zeros(256)))
    with cusim.device(sm=70):
        assert b"no PTX for sm_70" in library.run(
            address(torch.zeros(4)), address(torch.zeros(4)), 4, 0, None
        )


def test_runtime_functions(library: ctypes.CDLL) -> None:
    facts = (ctypes.c_int * 6)()
    with cusim.device(sm=80, multiprocessors=12):
        assert library.facts(facts) == 0
    assert list(facts) == [1, 80, 12, 4, 163 * 1024, 256]
    host = ctypes.create_string_buffer(100)
    assert library.copies(host, 100) == 0
    assert host.raw == b"\7" * 100


def test_a_torch_for_cuda_finds_all_of_the_runtime() -> None:
    """And no GPU: with one it would begin to use it."""
    runtime = cusim.load()
    names = declared(cusim.cuda_include())
    assert len(names) > 200 and [name for name in names if not hasattr(runtime, name)] == []
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    assert (
        runtime.cudaGetErrorString(runtime.cudaGraphLaunch(None, None)) == b"cudaGraphLaunch is not simulated"
    )
    runtime.cudaGetLastError()
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0


def test_the_simulator_can_be_detected() -> None:
    assert hasattr(ctypes.CDLL(None), "cusim_run_ptx")
    assert Path(cusim.library()).name == "libcudart.so.13"

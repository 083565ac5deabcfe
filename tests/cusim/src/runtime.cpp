// The part of libcudart.so.13 that a library built with `nvcc -cudart shared` calls; build.py adds the rest.
// Memory is the host's; a launch runs to its end before it returns.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>

#include "fatbin.hpp"

using namespace cusim;

namespace {

thread_local cudaError_t t_error = cudaSuccess;
thread_local std::string t_message;  // of the last fault
cudaError_t fail(cudaError_t e, const std::string& message = "") {
  t_error = e;
  t_message = message;
  return e;
}

struct Function {
  FatBinary* binary;
  std::string name;
  size_t dynamic_limit = 48 * 1024;
};
std::map<const void*, Function>& functions() {
  static auto* f = new std::map<const void*, Function>;
  return *f;
}
std::map<const void*, std::pair<FatBinary*, std::string>>& variables() {
  static auto* v = new std::map<const void*, std::pair<FatBinary*, std::string>>;
  return *v;
}
Function* function(const void* host) {
  auto it = functions().find(host);
  return it == functions().end() ? nullptr : &it->second;
}
Module& module_of(const Function& f) { return f.binary->module_for(Settings::read().sm); }
const Kernel& kernel_of(const Function& f) {
  Module& m = module_of(f);
  auto k = m.kernels.find(f.name);
  if (k == m.kernels.end()) throw Fault("kernel " + f.name + " is not in the PTX of its library");
  return *k->second;
}

cudaError_t run(const void* host, dim3 g, dim3 b, void** args, size_t shared, bool cooperative = false) {
  Function* f = function(host);
  if (!f) return fail(cudaErrorInvalidDeviceFunction);
  try {
    const Kernel& k = kernel_of(*f);
    if (shared > f->dynamic_limit)
      return fail(cudaErrorInvalidValue,
                  f->name + " asks for " + std::to_string(shared) +
                      " bytes of dynamic shared memory; cudaFuncSetAttribute allowed " +
                      std::to_string(f->dynamic_limit));
    if (g.y > 65535 || g.z > 65535) return fail(cudaErrorInvalidConfiguration);
    unsigned grid[3] = {g.x, g.y, g.z}, block[3] = {b.x, b.y, b.z};
    launch(module_of(*f), k, grid, block, shared, args, cooperative);
    return cudaSuccess;
  } catch (const Fault& e) {
    std::cout.flush();
    fprintf(stderr, "cusim: %s\n", e.what());
    return fail(cudaErrorLaunchFailure, e.what());
  }
}

thread_local struct {
  dim3 g, b;
  size_t shared;
  cudaStream_t stream;
} t_config[8];
thread_local int t_depth = 0;

CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned width[] = {0, 32, 64, 128};
  static const unsigned bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  if (rank < 1 || rank > 5 || (uintptr_t)address % 16 || type > 12 || swizzle > 3 || interleave)
    return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * bytes[type] % 16 || (swizzle && box[0] * bytes[type] > width[swizzle]))
    return CUDA_ERROR_INVALID_VALUE;
  TensorMap t = {};
  t.magic = TensorMap::kMagic;
  t.type = uint8_t(type), t.rank = uint8_t(rank), t.swizzle = uint8_t(swizzle), t.fill = uint8_t(fill);
  t.address = (uint64_t)address;
  for (unsigned k = 0; k < rank; ++k) {
    if (box[k] > 256 || !box[k] || step[k] != 1 || !dims[k] || dims[k] > UINT32_MAX)
      return CUDA_ERROR_INVALID_VALUE;
    t.dims[k] = uint32_t(dims[k]), t.box[k] = uint16_t(box[k]);
    if (k && (strides[k - 1] % 16 || strides[k - 1] >> 40)) return CUDA_ERROR_INVALID_VALUE;
    if (k) t.strides[k - 1] = strides[k - 1];
  }
  memset(out, 0, sizeof *out);
  memcpy(out, &t, sizeof t);
  return CUDA_SUCCESS;
}

char* symbol(const void* host) {
  auto it = variables().find(host);
  if (it == variables().end()) return nullptr;
  try {
    auto& globals = it->second.first->module_for(Settings::read().sm).globals;
    auto g = globals.find(it->second.second);
    return g == globals.end() ? nullptr : g->second.first;
  } catch (const Fault& e) {
    fail(cudaErrorInvalidSymbol, e.what());
    return nullptr;
  }
}

// Blocks of a kernel that fit on a multiprocessor by threads, slots and shared memory; its registers are not
// known.
int blocks_per_multiprocessor(const void* host, int threads, size_t dynamic) {
  Function* f = function(host);
  Settings s = Settings::read();
  size_t each = dynamic + (f ? kernel_of(*f).shared_static : 0) + 1024, all = s.shared_optin() + 1024;
  int most_threads = s.sm == 86 || s.sm == 89 || s.sm >= 120 ? 1536 : 2048;
  return std::min(
      {most_threads / std::max((threads + 31) / 32 * 32, 32), int(all / each), s.sm == 86 ? 16 : 32});
}

const auto kStream = (cudaStream_t)1;

bool asked_by_torch(const void* caller) {
  Dl_info found;
  if (!dladdr(caller, &found) || !found.dli_fname) return false;
  const char* slash = strrchr(found.dli_fname, '/');
  std::string name = slash ? slash + 1 : found.dli_fname;
  return name.starts_with("libtorch") || name.starts_with("libc10");
}

}  // namespace

extern "C" {

// ---- what nvcc's generated host code calls ----
void** __cudaRegisterFatBinary(void* wrapper) {
  try {
    return (void**)new FatBinary(wrapper);
  } catch (const std::exception& e) {
    fprintf(stderr, "cusim: %s\n", e.what());
    return nullptr;
  }
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** b, const char* host, char*, const char* name, int, void*, void*, void*,
                            void*, int*) {
  if (b) functions()[host] = {(FatBinary*)b, name};
}
void __cudaRegisterVar(void** b, char* host, char*, const char* name, int, size_t, int, int) {
  if (b) variables()[host] = {(FatBinary*)b, name};
}
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t shared, struct CUstream_st* s) {
  t_config[t_depth++ & 7] = {g, b, shared, (cudaStream_t)s};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* shared, void* s) {
  auto& c = t_config[--t_depth & 7];
  *g = c.g, *b = c.b, *shared = c.shared, *(cudaStream_t*)s = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* host) {
  *k = (cudaKernel_t)host;
  return function(host) ? cudaSuccess : fail(cudaErrorInvalidDeviceFunction);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t) {
  return run(k, g, b, args, shared);
}
cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t) {
  return run(f, g, b, args, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) {
  bool cooperative = false;
  for (unsigned k = 0; k < c->numAttrs; ++k) {
    const cudaLaunchAttribute& a = c->attrs[k];
    if (a.id == cudaLaunchAttributeCooperative) cooperative = a.val.cooperative;
    if (a.id == cudaLaunchAttributeClusterDimension &&
        a.val.clusterDim.x * a.val.clusterDim.y * a.val.clusterDim.z > 1)
      return fail(cudaErrorNotSupported, "cusim knows clusters of one block only");
  }
  return run(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, cooperative);
}
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void** args, size_t shared,
                                        cudaStream_t) {
  return run(f, g, b, args, shared, true);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* data) {
  f(data);
  return cudaSuccess;
}

// ---- errors ----
cudaError_t cudaGetLastError() { return std::exchange(t_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return t_error; }
const char* cudaGetErrorName(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidSymbol:
      return "cudaErrorInvalidSymbol";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    default:
      return "cudaErrorUnknown";
  }
}
const char* cudaGetErrorString(cudaError_t e) {  // the simulator's own words where it has some
  return e != cudaSuccess && !t_message.empty() ? t_message.c_str() : cudaGetErrorName(e);
}

// ---- memory ----
cudaError_t cudaMalloc(void** p, size_t n) {
  *p = nullptr;
  if (!n) return cudaSuccess;
  *p = aligned_alloc(256, (n + 255) / 256 * 256);
  if (!*p) return fail(cudaErrorMemoryAllocation);
  memset(*p, 0xff, n);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaMallocHost(void** p, size_t n) { return cudaMalloc(p, n); }
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { return cudaMalloc(p, n); }
cudaError_t cudaMallocManaged(void** p, size_t n, unsigned) { return cudaMalloc(p, n); }
cudaError_t cudaFree(void* p) {
  free(p);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = *total = 80ull << 30;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  a->type = cudaMemoryTypeManaged;
  a->devicePointer = a->hostPointer = const_cast<void*>(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) {
  memmove(d, s, n);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t) {
  return cudaMemcpy(d, s, n, k);
}
cudaError_t cudaMemcpy2D(void* d, size_t d_pitch, const void* s, size_t s_pitch, size_t width, size_t height,
                         cudaMemcpyKind) {
  for (size_t r = 0; r < height; ++r) memmove((char*)d + r * d_pitch, (const char*)s + r * s_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* d, size_t d_pitch, const void* s, size_t s_pitch, size_t width,
                              size_t height, cudaMemcpyKind k, cudaStream_t) {
  return cudaMemcpy2D(d, d_pitch, s, s_pitch, width, height, k);
}
cudaError_t cudaMemset(void* d, int v, size_t n) {
  memset(d, v, n);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t) { return cudaMemset(d, v, n); }
cudaError_t cudaMemcpyToSymbol(const void* s, const void* from, size_t n, size_t off, cudaMemcpyKind) {
  char* p = symbol(s);
  if (!p) return fail(cudaErrorInvalidSymbol);
  memcpy(p + off, from, n);
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbolAsync(const void* s, const void* from, size_t n, size_t off, cudaMemcpyKind k,
                                    cudaStream_t) {
  return cudaMemcpyToSymbol(s, from, n, off, k);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* s, size_t n, size_t off, cudaMemcpyKind) {
  char* p = symbol(s);
  if (!p) return fail(cudaErrorInvalidSymbol);
  memcpy(to, p + off, n);
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** p, const void* s) {
  *p = symbol(s);
  return *p ? cudaSuccess : fail(cudaErrorInvalidSymbol);
}

// ---- device ----
cudaError_t cudaGetDevice(int* d) {
  *d = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
// torch, where it is one for CUDA, is to stay on the CPU: for it there is no GPU.
cudaError_t cudaGetDeviceCount(int* n) {
  *n = asked_by_torch(__builtin_return_address(0)) ? 0 : 1;
  return *n ? cudaSuccess : fail(cudaErrorNoDevice);
}
cudaError_t cudaDeviceSynchronize() { return t_error; }
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  Settings s = Settings::read();
  int optin = int(s.shared_optin());
  switch (a) {
    case cudaDevAttrMultiProcessorCount:
      *v = s.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *v = s.sm / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *v = s.sm % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *v = 48 * 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *v = optin;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *v = optin + 1024;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *v = 1024;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      *v = 1024;
      break;
    case cudaDevAttrMaxBlockDimZ:
      *v = 64;
      break;
    case cudaDevAttrMaxGridDimX:
      *v = INT32_MAX;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *v = 65535;
      break;
    case cudaDevAttrWarpSize:
      *v = 32;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *v = 2048;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *v = 65536;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *v = 32;
      break;
    case cudaDevAttrL2CacheSize:
      *v = 50 << 20;
      break;
    case cudaDevAttrClockRate:
      *v = 1000000;
      break;
    case cudaDevAttrCooperativeLaunch:
      *v = 1;
      break;
    default:
      *v = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "cusim");
  auto get = [&](cudaDeviceAttr a) {
    int v;
    cudaDeviceGetAttribute(&v, a, d);
    return v;
  };
  p->major = get(cudaDevAttrComputeCapabilityMajor);
  p->minor = get(cudaDevAttrComputeCapabilityMinor);
  p->multiProcessorCount = get(cudaDevAttrMultiProcessorCount);
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerBlock = 48 * 1024;
  p->sharedMemPerBlockOptin = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = get(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->totalGlobalMem = 80ull << 30;
  p->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute a, int v) {
  Function* f = function(host);
  if (!f) return fail(cudaErrorInvalidDeviceFunction);
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (v < 0 || size_t(v) > Settings::read().shared_optin()) return fail(cudaErrorInvalidValue);
    f->dynamic_limit = v;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* host) {
  Function* f = function(host);
  if (!f) return fail(cudaErrorInvalidDeviceFunction);
  try {
    const Kernel& k = kernel_of(*f);
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = k.max_threads;
    a->sharedSizeBytes = k.shared_static;
    a->localSizeBytes = k.local_bytes;
    a->numRegs = 64;
    a->maxDynamicSharedSizeBytes = int(f->dynamic_limit);
    a->ptxVersion = a->binaryVersion = Settings::read().sm;
    return cudaSuccess;
  } catch (const Fault& e) {
    return fail(cudaErrorInvalidDeviceFunction, e.what());
  }
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int threads,
                                                          size_t dynamic) {
  try {
    *n = blocks_per_multiprocessor(f, threads, dynamic);
    return cudaSuccess;
  } catch (const Fault& e) {
    return fail(cudaErrorInvalidDeviceFunction, e.what());
  }
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int threads,
                                                                   size_t dynamic, unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(n, f, threads, dynamic);
}
cudaError_t cudaDriverGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}

// ---- streams and events ----
cudaError_t cudaStreamCreate(cudaStream_t* s) {
  *s = kStream;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreate(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return t_error; }
cudaError_t cudaStreamQuery(cudaStream_t) { return t_error; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
  *s = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
static double now() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}
cudaError_t cudaEventCreate(cudaEvent_t* e) {
  *e = (cudaEvent_t) new double(0);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete (double*)e;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
  *(double*)e = now();
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = float(*(double*)b - *(double*)a);
  return cudaSuccess;
}

// ---- what an extension of ours does not call, but a torch built for CUDA links with: see build.py ----
int cusim_not_simulated(const char* name) {
  return fail(cudaErrorNotSupported, std::string(name) + " is not simulated");
}

// ---- the driver's tensor-map encoder ----
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* r) {
  *f = strcmp(name, "cuTensorMapEncodeTiled") == 0 ? (void*)encode_tiled : nullptr;
  if (r) *r = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** f, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* r) {
  return cudaGetDriverEntryPointByVersion(name, f, 0, flags, r);
}
}

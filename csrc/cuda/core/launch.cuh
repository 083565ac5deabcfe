// What a launch needs on the host: errors as exceptions, the device, shared memory above 48 KiB, and whether
// it may begin before the kernel ahead of it has ended.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace bitfuse {

inline void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// Makes a device current for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    changed_ = before_ != device;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Whether a device has programmatic dependent launch: asked once.
inline bool knows_early_launches(int device) {
  constexpr int MostDevices = 64;
  static std::atomic<int> known[MostDevices] = {};  // 0: not asked yet; 1 + the answer
  if (device < 0 || device >= MostDevices) return false;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "cudaDeviceGetAttribute");
    known[device].store(answer = 1 + (major >= 9), std::memory_order_relaxed);
  }
  return answer == 2;
}

// Of one kernel, the dynamic shared memory that its launches may have on each device: more than 48 KiB has to
// be allowed once. A kernel that asks for the most there is can have no static shared memory beside it.
class AllowedShared {
 public:
  void allow(const void* kernel, int device, int bytes, const std::string& name) {
    if (device >= MostDevices) throw std::runtime_error(name + ": more than 64 devices");
    std::atomic<int>& allowed = allowed_[device];
    if (allowed.load(std::memory_order_acquire) >= bytes) return;
    int most = 0;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
          name + ": " + std::to_string(most) + " bytes of shared memory");
    allowed.store(most, std::memory_order_release);
  }

 private:
  static constexpr int MostDevices = 64;
  std::atomic<int> allowed_[MostDevices] = {};
};

// Launches a kernel of one argument or more. From compute capability 9.0 on its blocks may start while those
// of the kernel before it in the stream are ending (programmatic dependent launch): it calls
// `wait_for_previous` before it reads or writes what another kernel may write or read.
template <typename... Arguments>
void launch_early(void (*kernel)(Arguments...), dim3 grid, int threads, int shared_bytes, int device,
                  cudaStream_t stream, const std::type_identity_t<Arguments>&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  config.stream = stream, config.attrs = &early;
  config.numAttrs = knows_early_launches(device) ? 1 : 0;
  void* pointers[] = {const_cast<Arguments*>(&arguments)...};
  // an error of it is also the one that cudaGetLastError gives
  cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
}

}  // namespace bitfuse

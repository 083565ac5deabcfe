// What a launch needs on the host: errors as exceptions, the device, shared memory above 48 KiB.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

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

}  // namespace bitfuse

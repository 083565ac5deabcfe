// What of DLPack 1 (https://dmlc.github.io/dlpack, dlpack.h) is needed to ask a tensor of torch where it is,
// without a header of torch: the layout of a tensor, and the table of functions that torch 2.10 and later
// have as torch.Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace bitfuse::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : uint8_t {
  kInt = 0,
  kUint = 1,
  kFloat = 2,
  kBfloat = 4,
  kBool = 6,
  kE4m3fn = 10,
  kE8m0fnu = 14
};

struct Device {
  int32_t type, number;
};

struct Type {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  Type dtype;
  int64_t *shape, *strides;  // strides in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* older;
  void *allocate, *managed_from_object, *managed_to_object;
  // a tensor object's layout, which is valid as long as the object is as it is; not 0 with a Python error set
  int (*layout_of)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace bitfuse::dlpack

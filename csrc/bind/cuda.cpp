// bitfuse._cuda: tensors and a stream in, nothing out. Each op's binding, in a file of its own, reads tensors
// where they lie, checks what a kernel could not read and raises ValueError with the argument's name. The GIL
// is released while a kernel is queued.
#include "bind/cuda.h"

#include "bind/types.h"
#include "cuda/linear/lowbit_linear.h"

PYBIND11_MODULE(_cuda, module) {
  using namespace bitfuse;
  module.doc() = "CUDA kernels of bitfuse: tensors, or descriptors of them, and a stream in, nothing out.";
  module.def(
      "architectures", [] { return BITFUSE_CUDA_ARCHITECTURES; },
      "What the kernels are compiled for: sm_ machine code, compute_ PTX for the driver to compile.");
  module.def(
      "device_info",
      [](int index) {
        const DeviceInfo info = device_info(index);
        return py::make_tuple(info.multiprocessors, info.shared_per_block, info.shared_per_multiprocessor,
                              info.capability);
      },
      py::arg("index"),
      "Multiprocessors, bytes of shared memory of a block and of a multiprocessor, compute capability as "
      "90.");
  bind_types(module);
  bind_decode_attention(module);
  bind_multi_lora_linear(module);
  bind_lowbit_linear(module);
  bind_attention(module);
}

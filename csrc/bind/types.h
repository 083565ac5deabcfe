// The types of csrc/common as Python has them, of both extensions: the enums, the limits, the descriptor of a
// tensor. Included once an extension.
#pragma once

#include <pybind11/stl.h>

#include <vector>

#include "bind/tensors.h"
#include "common/limits.h"

namespace bitfuse {

inline void bind_types(py::module_& module) {
  py::enum_<Dtype>(module, "Dtype", py::module_local(), "Of a tensor's elements.")
      .value("FLOAT32", Dtype::kFloat32)
      .value("FLOAT16", Dtype::kFloat16)
      .value("BFLOAT16", Dtype::kBfloat16)
      .value("UINT8", Dtype::kUint8)
      .value("INT8", Dtype::kInt8)
      .value("INT32", Dtype::kInt32)
      .value("INT64", Dtype::kInt64)
      .value("FLOAT64", Dtype::kFloat64)
      .value("BOOL", Dtype::kBool)
      .value("E4M3", Dtype::kE4m3)
      .value("E8M0", Dtype::kE8m0)
      .value("OTHER", Dtype::kOther);
#define BITFUSE_KIND(name, python, bits, whole) .value(#python, CodeKind::name)
  py::enum_<CodeKind>(module, "CodeKind", py::module_local(), "How a code of a few-bit matrix is read.")
      BITFUSE_CODE_KINDS(BITFUSE_KIND);
#undef BITFUSE_KIND
  py::enum_<ScaleKind>(module, "ScaleKind", py::module_local(), "How a scale is read.")
      .value("FLOAT32", ScaleKind::kFloat32)
      .value("FLOAT16", ScaleKind::kFloat16)
      .value("BFLOAT16", ScaleKind::kBfloat16)
      .value("NESTED", ScaleKind::kNested)
      .value("E8M0", ScaleKind::kE8m0)
      .value("E4M3", ScaleKind::kE4m3);
  py::enum_<Activation>(module, "Activation", py::module_local())
      .value("SILU", Activation::kSilu)
      .value("GELU", Activation::kGelu)
      .value("GELU_TANH", Activation::kGeluTanh)
      .value("RELU", Activation::kRelu);
  module.attr("MAX_DIMS") = kMaxDims;
  module.attr("MAX_RANK") = kMaxRank;
  module.attr("MAX_HEAD_SIZE") = kMaxHeadSize;
  module.attr("MAX_TOKENS") = kMaxTokens;
  module.attr("NESTED_BLOCK") = kNestedBlock;
  py::class_<Tensor>(module, "Tensor", py::module_local(),
                     "Where a tensor is and how it is laid out, of integers, in the place of a torch.Tensor. "
                     "strides, in elements, are those of a contiguous tensor unless given; device is a GPU's "
                     "number, or None for host memory. An op checks what it is given.")
      .def(py::init([](uintptr_t address, Dtype dtype, const std::vector<int64_t>& shape,
                       const std::optional<std::vector<int64_t>>& strides, std::optional<int> device) {
             if (shape.size() > size_t(kMaxDims))
               refuse("shape", "of " + std::to_string(shape.size()) + " dimensions",
                      "at most " + std::to_string(kMaxDims));
             if (strides && strides->size() != shape.size())
               refuse("strides", "of " + std::to_string(strides->size()) + " dimensions", "as many as shape");
             Tensor t;
             t.data = reinterpret_cast<void*>(address);
             t.dtype = dtype;
             t.device = device.value_or(kHost);
             t.dims = int(shape.size());
             uint64_t step = 1;  // may wrap: whoever reads it checks
             for (int i = t.dims - 1; i >= 0; --i) {
               t.shape[i] = shape[size_t(i)];
               t.strides[i] = strides ? (*strides)[size_t(i)] : int64_t(step & INT64_MAX);
               step *= uint64_t(shape[size_t(i)]);
             }
             return t;
           }),
           py::arg("address"), py::arg("dtype"), py::arg("shape"), py::arg("strides") = py::none(),
           py::arg("device") = py::none());
}

}  // namespace bitfuse

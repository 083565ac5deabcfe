#include "bind/cpu_linear.h"
#include "cpu/linear/lowbit_embedding.h"

namespace bitfuse {
namespace {

template <class Index>
void check_indices(const void* at, int64_t count, int64_t rows) {
  const auto* indices = static_cast<const Index*>(at);
  for (int64_t i = 0; i < count; ++i)
    if (indices[i] < 0 || indices[i] >= rows)
      throw py::index_error("indices holds " + std::to_string(indices[i]) + ", expected 0 to " +
                            std::to_string(rows - 1));
}

void lowbit_embedding(py::handle indices, py::handle weight, py::handle out) {
  LowbitEmbeddingArgs args{};
  args.w = read_host_matrix(weight);
  const Tensor at = read("indices", indices), to = read("out", out);
  require_device("indices", at, kHost);
  if (at.dtype != Dtype::kInt64 && at.dtype != Dtype::kInt32)
    refuse("indices", std::string("of dtype ") + name_of(at.dtype), "int64 or int32");
  if (!is_dense(at)) refuse("indices", "of strides " + text_of(at.strides, at.dims), "a contiguous tensor");
  args.indices = at.data;
  args.wide = at.dtype == Dtype::kInt64;
  args.count = count_of(at);
  require_float("out", to);
  args.dtype = to.dtype;
  check_bytes("indices", {args.count, args.w.k, 8});
  args.out = dense_rows("out", to, to.dtype, args.count, args.w.k);
  (args.wide ? check_indices<int64_t> : check_indices<int32_t>)(args.indices, args.count, args.w.n);
  if (args.count == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lowbit_embedding)(args);
}

}  // namespace

void bind_lowbit_embedding(py::module_& module) {
  module.def("lowbit_embedding", lowbit_embedding, py::arg("indices"), py::arg("weight"), py::arg("out"));
}

}  // namespace bitfuse

#include <vector>

#include "bind/cpu_linear.h"
#include "cpu/linear/multi_lora_linear.h"

namespace bitfuse {
namespace {

constexpr int64_t kMostRank = 1 << 20;

struct Adapters {
  bool stacked;  // one tensor of three dimensions; else a tensor each
  std::vector<Tensor> a, b;
  int64_t count;

  int64_t rank(int64_t e) const { return stacked ? a[0].shape[1] : a[size_t(e)].shape[0]; }
};

std::vector<Tensor> read_all(const char* name, const py::sequence& given) {
  std::vector<Tensor> tensors;
  tensors.reserve(given.size());
  for (const auto& one : given) tensors.push_back(read(name, py::object(one)));
  return tensors;
}

// Stacked [count, rank, k] and [count, n, rank], or lists of [rank_e, k] and [n, rank_e].
Adapters read_adapters(const py::sequence& lora_A, const py::sequence& lora_B, int64_t n, int64_t k) {
  Adapters made;
  made.a = read_all("a", lora_A);
  made.b = read_all("b", lora_B);
  made.stacked = made.a.size() == 1 && made.a[0].dims == 3;
  if (made.a.size() != made.b.size())
    refuse("the number of adapters", std::to_string(made.a.size()) + " and " + std::to_string(made.b.size()),
           "as many lora_A as lora_B");
  made.count = made.stacked ? made.a[0].shape[0] : int64_t(made.a.size());
  for (size_t e = 0; e < made.a.size(); ++e) {
    const Tensor &a = made.a[e], &b = made.b[e];
    require_float("a", a);
    require_float("b", b);
    require_dtype("a", a, made.a[0].dtype);
    require_dtype("b", b, made.b[0].dtype);
    require_device("a", a, kHost);
    require_device("b", b, kHost);
    const int last = made.stacked ? 2 : 1;
    if (a.dims != last + 1) refuse("a", "of shape " + shape_of(a), "a matrix");
    const int64_t rank = a.shape[last - 1];
    if (rank > kMostRank) refuse("rank", std::to_string(rank), "0 to " + std::to_string(kMostRank));
    if (made.stacked) {
      dense<void>("a", a, a.dtype, {made.count, rank, k});
      dense<void>("b", b, b.dtype, {made.count, n, rank});
    } else {
      dense<void>("a", a, a.dtype, {rank, k});
      dense<void>("b", b, b.dtype, {n, rank});
    }
  }
  return made;
}

void multi_lora_add(py::handle y, py::handle x, const py::sequence& lora_A, const py::sequence& lora_B,
                    py::handle scaling, py::handle adapter_ids) {
  const Matrix from = float_rows("x", read("x", x));
  const Tensor to = read("y", y), numbers = read("adapter_ids", adapter_ids);
  const Matrix into = rows_of("y", to);
  const int64_t rows = from.rows, n = into.columns, k = from.columns;
  MultiLoraSegments call;
  call.dtype = from.dtype;
  call.x = from.data;
  call.y = dense_rows("y", to, from.dtype, rows, n);
  call.n = n;
  call.k = k;
  call.row_stride = from.stride;
  const Adapters adapters = read_adapters(lora_A, lora_B, n, k);
  const int64_t count = adapters.count;
  call.a_dtype = adapters.a.empty() ? Dtype::kFloat32 : adapters.a[0].dtype;
  call.b_dtype = adapters.b.empty() ? Dtype::kFloat32 : adapters.b[0].dtype;
  for (int64_t e = 0; e < (adapters.stacked ? 1 : count); ++e)
    check_bytes("rows", {rows > 0 ? rows : 1, adapters.rank(e), n > k ? n : k, 4});
  const float* scales = host_floats("scaling", read("scaling", scaling), {count});
  require_device("adapter_ids", numbers, kHost);
  if (numbers.dtype != Dtype::kInt32) require_dtype("adapter_ids", numbers, Dtype::kInt64);
  if (!is_dense(numbers) || count_of(numbers) != rows)
    refuse("adapter_ids", "of shape " + shape_of(numbers), "one dense number for each row");
  const bool wide_ids = numbers.dtype == Dtype::kInt64;
  const void* id_array = numbers.data;

  // a copy: what is checked is what is used, whoever writes to the tensor meanwhile
  std::vector<int64_t> own_ids(size_t(rows), 0), begin(size_t(count) + 1, 0);
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t id =
        wide_ids ? static_cast<const int64_t*>(id_array)[m] : static_cast<const int32_t*>(id_array)[m];
    if (id < -1 || id >= count)
      throw py::value_error("adapter_ids holds " + std::to_string(id) + ", expected -1 (none) to " +
                            std::to_string(count - 1) + ", for " + std::to_string(count) + " adapters");
    own_ids[size_t(m)] = id;
    ++begin[size_t(id + 1)];
  }
  const int64_t active = rows - begin[0];
  if (active == 0 || n == 0) return;
  // begin[e] becomes the first place of adapter e's rows, and then, as they are placed, its end
  begin[0] = 0;
  for (int64_t e = 1; e <= count; ++e) begin[size_t(e)] += begin[size_t(e - 1)];
  std::vector<int64_t> order(size_t(active), 0);
  for (int64_t m = 0; m < rows; ++m)
    if (const int64_t id = own_ids[size_t(m)]; id >= 0) order[size_t(begin[size_t(id)]++)] = m;

  std::vector<LoraSegment> segments;
  call.most_rank = 0;
  for (int64_t e = 0, at = 0; e < count; ++e) {
    const int64_t end = begin[size_t(e)], rank = adapters.rank(e);
    if (end > at && rank > 0) {
      const bool stacked = adapters.stacked;
      const Tensor &own_a = adapters.a[stacked ? 0 : size_t(e)], &own_b = adapters.b[stacked ? 0 : size_t(e)];
      const int64_t nth = stacked ? e : 0;
      segments.push_back({static_cast<const char*>(own_a.data) + nth * rank * k * size_of(own_a.dtype),
                          static_cast<const char*>(own_b.data) + nth * rank * n * size_of(own_b.dtype), rank,
                          at, end, scales[e]});
      call.most_rank = rank > call.most_rank ? rank : call.most_rank;
    }
    at = end;
  }
  if (segments.empty()) return;
  call.segments = segments.data();
  call.segment_count = int64_t(segments.size());
  call.order = order.data();
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(multi_lora_add)(call);
}

}  // namespace

void bind_multi_lora_linear(py::module_& module) {
  module.def("multi_lora_add", multi_lora_add, py::arg("y"), py::arg("x"), py::arg("lora_A"),
             py::arg("lora_B"), py::arg("scaling"), py::arg("adapter_ids"),
             "y += the adapters' part. lora_A, lora_B: one stacked tensor in a list, or a tensor each.");
}

}  // namespace bitfuse

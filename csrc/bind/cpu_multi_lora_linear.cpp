#include <pybind11/stl.h>

#include <vector>

#include "bind/cpu.h"
#include "cpu/linear/multi_lora_linear.h"

namespace bitfuse {
namespace {

constexpr int64_t kMostRank = 1 << 20;

Dtype check_dtype(const char* name, int dtype) {
  if (dtype < 0 || dtype > 2) refuse(name, std::to_string(dtype), "0 (float32), 1 (float16) or 2 (bfloat16)");
  return static_cast<Dtype>(dtype);
}

// Adapters are stacked, a and b one address each and one rank for all `count`; or a, b and ranks have
// `count`.
void multi_lora_add(uintptr_t y, uintptr_t x, int dtype, int64_t rows, int64_t row_stride, int64_t n,
                    int64_t k, const std::vector<uintptr_t>& a, const std::vector<uintptr_t>& b,
                    const std::vector<int64_t>& ranks, int64_t count, bool stacked, int a_dtype, int b_dtype,
                    uintptr_t scaling, uintptr_t ids, bool wide_ids) {
  MultiLoraSegments call;
  call.dtype = check_dtype("dtype", dtype);
  call.a_dtype = check_dtype("a_dtype", a_dtype);
  call.b_dtype = check_dtype("b_dtype", b_dtype);
  require(rows >= 0, "rows", rows, "0 or more");
  require(row_stride >= 0, "row_stride", row_stride, "0 or more");
  require(n >= 0, "n", n, "0 or more");
  require(k >= 0, "k", k, "0 or more");
  require(count >= 0, "count", count, "0 or more");
  const size_t each = stacked ? 1 : size_t(count);
  require(a.size() == each && b.size() == each && ranks.size() == each, "the number of adapters",
          int64_t(ranks.size()), "that of addresses");
  for (int64_t rank : ranks) {
    require(rank >= 0 && rank <= kMostRank, "rank", rank, "0 to " + std::to_string(kMostRank));
    check_bytes("a", {stacked ? count : 1, rank, k, 4});
    check_bytes("b", {stacked ? count : 1, rank, n, 4});
    check_bytes("rows", {rows > 0 ? rows : 1, rank, n > k ? n : k, 4});
  }
  check_bytes("x", {rows, row_stride > k ? row_stride : k, 4});
  check_bytes("y", {rows, n, 4});
  const bool any = rows > 0 && n > 0;
  const int64_t a_size = a_dtype == 0 ? 4 : 2, b_size = b_dtype == 0 ? 4 : 2, size = dtype == 0 ? 4 : 2;
  call.x = address<const void>("x", x, size, any && k > 0);
  call.y = address<void>("y", y, size, any);
  call.n = n;
  call.k = k;
  call.row_stride = row_stride;
  const float* scales = address<const float>("scaling", scaling, 4, any && count > 0);
  const void* id_array = address<const void>("ids", ids, wide_ids ? 8 : 4, rows > 0);

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
    const int64_t end = begin[size_t(e)], rank = ranks[stacked ? 0 : size_t(e)];
    if (end > at && rank > 0) {
      const int64_t nth = stacked ? e : 0;
      const uintptr_t own_a = a[stacked ? 0 : size_t(e)], own_b = b[stacked ? 0 : size_t(e)];
      segments.push_back({address<const char>("a", own_a, a_size, k > 0) + nth * rank * k * a_size,
                          address<const char>("b", own_b, b_size) + nth * rank * n * b_size, rank, at, end,
                          scales[e]});
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

void bind_multi_lora_linear(py::module_& module) { module.def("multi_lora_add", multi_lora_add); }

}  // namespace bitfuse

// Adapters as the kernels take them, and multi_lora_linear.
#include "bind/cuda_linear.h"
#include "cuda/linear/multi_lora_linear.h"

namespace bitfuse {
namespace {

AdapterFloat adapter_type(const char* name, const Tensor& t) {
  require_float(name, t);
  return static_cast<AdapterFloat>(t.dtype);  // the three floats are in one order in both
}

Adapters make_adapters(py::handle lora_A, py::handle lora_B, py::handle h, py::handle slices,
                       py::handle counters, int64_t participants, py::handle table, py::handle ids,
                       py::handle scaling, double scaling_by) {
  const Tensor a = read("lora_A", lora_A), b = read("lora_B", lora_B), out = read("h", h);
  Adapters made{};
  made.device = out.device;
  made.a_type = adapter_type("lora_A", a);
  made.b_type = adapter_type("lora_B", b);
  require_device("lora_A", a, made.device);
  require_device("lora_B", b, made.device);
  require_dtype("h", out, Dtype::kFloat32);
  if (out.dims != 2) refuse("h", "of shape " + shape_of(out), "2 dimensions");
  const int64_t rank = out.shape[1];
  require(rank > 0 && rank <= kMaxRank, "rank", rank, "1 to 512");
  made.rank = static_cast<int>(rank);
  made.rows = out.shape[0];
  made.h = at_least<float>("h", out, Dtype::kFloat32, made.device, made.rows * rank, 16);
  int64_t count = 1;
  if (table.is_none()) {
    if (a.dims != 2 && a.dims != 3) refuse("lora_A", "of shape " + shape_of(a), "[adapters, rank, k] or one");
    count = a.dims == 3 ? a.shape[0] : 1;
    made.k = a.shape[a.dims - 1];
    made.n = b.dims >= 2 ? b.shape[b.dims - 2] : 0;
    require_aligned("lora_A", a, 16);
    if (a.dims == 3) {
      made.lora_a = dense<const void>("lora_A", a, a.dtype, {count, rank, made.k});
      made.lora_b = dense<const void>("lora_B", b, b.dtype, {count, made.n, rank});
    } else {
      made.lora_a = dense<const void>("lora_A", a, a.dtype, {rank, made.k});
      made.lora_b = dense<const void>("lora_B", b, b.dtype, {made.n, rank});
    }
  } else {
    const Tensor entries = read("table", table);
    if (entries.dims != 2) refuse("table", "of shape " + shape_of(entries), "[3, adapters]");
    require_device("table", entries, made.device);
    count = entries.shape[1];
    made.table = dense<const int64_t>("table", entries, Dtype::kInt64, {3, count});
  }
  made.adapters = size(count, "adapters");
  if (!ids.is_none()) {
    const Tensor numbers = read("ids", ids);
    require_device("ids", numbers, made.device);
    made.ids_are_64_bit = numbers.dtype == Dtype::kInt64;
    if (!made.ids_are_64_bit) require_dtype("ids", numbers, Dtype::kInt32);
    made.ids = dense<const void>("ids", numbers, numbers.dtype, {made.rows});
  }
  if (!scaling.is_none()) {
    const Tensor t = read("scaling", scaling);
    made.scaling = at_least<const float>("scaling", t, Dtype::kFloat32, made.device, count, 4);
  }
  made.scaling_by = static_cast<float>(scaling_by);
  made.participants = size(participants, "participants");
  const int64_t token_tiles = made.rows <= 8 ? 1 : made.rows <= 16 ? 2 : made.rows <= 32 ? 4 : 8;
  made.partial = at_least<float>("slices", read("slices", slices), Dtype::kFloat32, made.device,
                                 participants * token_tiles * AdapterTileSums, 16);
  const int64_t used = made.rows < count ? made.rows : count, tiles = (rank + RankTile - 1) / RankTile;
  made.state = at_least<unsigned long long>("counters", read("counters", counters), Dtype::kInt32,
                                            made.device, 2 + used * tiles, 8);
  made.counters = reinterpret_cast<unsigned*>(made.state + 1);
  return made;
}

void run(py::handle x, py::handle y, const Adapters& adapters, uintptr_t stream) {
  const Tensor from = read("x", x), to = read("y", y);
  const Float type = float_type("x", from.dtype);
  const Matrix rows = aligned_rows("x", from);
  MultiLoraArgs a{};
  if (rows.rows < 1 || rows.rows > kMaxTokens)
    refuse("m", std::to_string(rows.rows), "1 to " + std::to_string(kMaxTokens));
  require_dtype("y", to, from.dtype);
  const Matrix into = rows_of("y", to);
  if (!is_dense(to) || into.rows != rows.rows)
    refuse("y", "of shape " + shape_of(to), std::to_string(rows.rows) + " dense rows");
  a.m = static_cast<int>(rows.rows), a.n = size(into.columns, "n"), a.k = size(rows.columns, "k", 8);
  a.x = rows.data;
  a.x_stride = rows.stride;
  a.y = at_least<void>("y", to, from.dtype, from.device, into.rows * into.columns, 4);
  require(adapters.device == from.device && adapters.rows == a.m, "h", adapters.rows,
          "as many rows as x, on its device");
  if (!adapters.table) {
    require(adapters.k == a.k, "lora_A", adapters.k, "as many columns as x");
    require(adapters.n == a.n, "lora_B", adapters.n, "as many rows as y has columns");
  }
  const int device = device_number(from);
  py::gil_scoped_release released;
  multi_lora_add(a, adapters, type, device, stream);
}

}  // namespace

void bind_multi_lora_linear(py::module_& module) {
  module.attr("ADAPTER_TILE_SUMS") = AdapterTileSums;
  module.attr("RANK_TILE") = RankTile;
  py::class_<Adapters>(
      module, "Adapters", py::module_local(),
      "Adapters of a product: lora_A and lora_B stacked, or of one adapter; or `table`, int64 [3, adapters] "
      "of "
      "addresses and ranks, and of lora_A and lora_B the dtype alone. h, float32 [m, rank], is written; ids, "
      "[m]: None for adapter 0; scaling, float32 [adapters]: None for 1. For the kernel, `slices` has room "
      "for "
      "participants * tiles of 8 tokens * ADAPTER_TILE_SUMS floats; `counters`, int32 and zero before and "
      "after, 2, and one for each RANK_TILE ranks of each adapter in use. It does not keep its tensors.")
      .def(py::init(&make_adapters), py::arg("lora_A"), py::arg("lora_B"), py::arg("h"), py::arg("slices"),
           py::arg("counters"), py::arg("participants"), py::kw_only(), py::arg("table") = py::none(),
           py::arg("ids") = py::none(), py::arg("scaling") = py::none(), py::arg("scaling_by") = 1.0);
  module.def("multi_lora_add", &run, py::arg("x"), py::arg("y"), py::arg("adapters"), py::arg("stream"),
             "y += the adapters' part, by as many blocks as participate.");
}

}  // namespace bitfuse

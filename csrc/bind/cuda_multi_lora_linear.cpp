// Adapters as the kernels take them, and multi_lora_linear.
#include "bind/cuda.h"
#include "cuda/linear/multi_lora_linear.h"

namespace bitfuse {
namespace {

uintptr_t alignment(AdapterFloat type) { return type == AdapterFloat::Float32 ? 4 : 2; }

Adapters make_adapters(uintptr_t lora_a, uintptr_t lora_b, uintptr_t table, uintptr_t ids,
                       bool ids_are_64_bit, uintptr_t scaling, float scaling_by, uintptr_t h,
                       uintptr_t slices, uintptr_t state, int64_t adapters, int64_t rank, int a_type,
                       int b_type, int64_t participants) {
  Adapters a{};
  a.adapters = size(adapters, "adapters");
  require(rank > 0 && rank <= AdapterMaxRank, "rank", rank, "1 to 512");
  a.rank = static_cast<int>(rank);
  a.a_type = choice<AdapterFloat>(a_type, 3, "a_type");
  a.b_type = choice<AdapterFloat>(b_type, 3, "b_type");
  a.table = address<const int64_t>("table", table, 8, false);
  a.lora_a = address<const void>("lora_a", lora_a, 16, table == 0);
  a.lora_b = address<const void>("lora_b", lora_b, alignment(a.b_type), table == 0);
  a.ids_are_64_bit = ids_are_64_bit;
  a.ids = address<const void>("ids", ids, ids_are_64_bit ? 8 : 4, false);
  a.scaling = address<const float>("scaling", scaling, 4, false);
  a.scaling_by = scaling_by;
  a.h = address<float>("h", h, 16);
  a.partial = address<float>("slices", slices, 16);
  a.state = address<unsigned long long>("state", state, 8);
  a.counters = reinterpret_cast<unsigned*>(a.state + 1);
  a.participants = size(participants, "participants");
  return a;
}

void run(uintptr_t x, uintptr_t y, int64_t x_stride, int64_t m, int64_t n, int64_t k, int type, int device,
         uintptr_t stream, const Adapters& adapters) {
  MultiLoraArgs a{};
  require(m > 0 && m <= AdapterMaxTokens, "m", m, "1 to 64");
  a.m = static_cast<int>(m), a.n = size(n, "n"), a.k = size(k, "k", 8);
  a.x = address<const void>("x", x, 16);
  a.y = address<void>("y", y, 4);
  // a row's stride is not read where there is one row
  require(m == 1 || (x_stride >= k && x_stride % 8 == 0), "x_stride", x_stride, "a multiple of 8, k or more");
  a.x_stride = m == 1 ? 0 : x_stride;
  const Float float_type = choice<Float>(type, 2, "type");
  require(device >= 0, "device", device, "a device's number");
  py::gil_scoped_release released;
  multi_lora_add(a, adapters, float_type, device, stream);
}

}  // namespace

void bind_multi_lora_linear(py::module_& module) {
  module.attr("ADAPTER_TILE_SUMS") = AdapterTileSums;
  py::class_<Adapters>(
      module, "Adapters", py::module_local(),
      "Adapters of a product: `table` in the place of lora_a and lora_b for lists. For the kernel, "
      "`slices` has room for participants * tiles of 8 tokens * ADAPTER_TILE_SUMS floats; "
      "`state`, zero, has 8 bytes, and 4 for each 16 ranks of each adapter in use.")
      .def(py::init(&make_adapters), py::arg("lora_a"), py::arg("lora_b"), py::arg("table"), py::arg("ids"),
           py::arg("ids_are_64_bit"), py::arg("scaling"), py::arg("scaling_by"), py::arg("h"),
           py::arg("slices"), py::arg("state"), py::arg("adapters"), py::arg("rank"), py::arg("a_type"),
           py::arg("b_type"), py::arg("participants"));
  module.def("multi_lora_add", &run, py::arg("x"), py::arg("y"), py::arg("x_stride"), py::arg("m"),
             py::arg("n"), py::arg("k"), py::arg("type"), py::arg("device"), py::arg("stream"),
             py::arg("adapters"), "y += the adapters' part, by as many blocks as participate.");
}

}  // namespace bitfuse

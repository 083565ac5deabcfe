#include "bind/cpu.h"
#include "bind/tensors.h"
#include "cpu/sampling/sample.h"

namespace bitfuse {
namespace {

void sample(py::handle logits_, py::handle uniforms, py::handle temperature, py::handle top_k,
            py::handle top_p, py::handle min_p, py::handle ids) {
  const Tensor logits = read("logits", logits_);
  require_device("logits", logits, kHost);
  require_float("logits", logits);
  if (logits.dims != 2) refuse("logits", "of shape " + shape_of(logits), "[rows, vocabulary]");
  SampleArgs args;
  args.rows = logits.shape[0];
  args.vocabulary = logits.shape[1];
  require(args.vocabulary >= 1 && args.vocabulary <= kMaxVocabulary, "vocabulary", args.vocabulary,
          "1 to 2^20");
  args.dtype = logits.dtype;
  if (!has_dense_rows(logits))
    refuse("logits", "of strides " + text_of(logits.strides, 2), "a dense last dimension");
  args.logits = logits.data;
  args.stride = logits.strides[0];
  auto numbers = [&](const char* name, py::handle object) {
    const Tensor t = read(name, object);
    require_device(name, t, kHost);
    return dense<const double>(name, t, Dtype::kFloat64, {args.rows});
  };
  auto integers = [&](const char* name, py::handle object) {
    const Tensor t = read(name, object);
    require_device(name, t, kHost);
    return dense<int64_t>(name, t, Dtype::kInt64, {args.rows});
  };
  args.uniforms = numbers("uniforms", uniforms);
  args.temperature = numbers("temperature", temperature);
  args.top_k = integers("top_k", top_k);
  args.top_p = numbers("top_p", top_p);
  args.min_p = numbers("min_p", min_p);
  args.ids = integers("ids", ids);
  if (args.rows == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(sample)(args);
}

}  // namespace

void bind_sample(py::module_& module) {
  module.def("sample", sample, "A token a row, to ids.", py::arg("logits"), py::arg("uniforms"),
             py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("ids"));
}

}  // namespace bitfuse

#include "bind/cpu.h"
#include "bind/tensors.h"
#include "cpu/sampling/speculative_sample.h"

namespace bitfuse {
namespace {

// [batch, rows, vocabulary]
ProbabilityRows probabilities(const char* name, const Tensor& t, int64_t batch, int64_t rows,
                              int64_t vocabulary) {
  require_device(name, t, kHost);
  require_float(name, t);
  const int64_t sizes[] = {batch, rows, vocabulary};
  if (t.dims != 3 || t.shape[0] != batch || t.shape[1] != rows || t.shape[2] != vocabulary)
    refuse(name, "of shape " + shape_of(t), text_of(sizes, 3));
  if (!has_dense_rows(t)) refuse(name, "of strides " + text_of(t.strides, 3), "a dense last dimension");
  return {t.dtype, t.data, t.strides[0], t.strides[1]};
}

int64_t* integers(const char* name, py::handle object, std::initializer_list<int64_t> shape) {
  const Tensor t = read(name, object);
  require_device(name, t, kHost);
  return dense<int64_t>(name, t, Dtype::kInt64, shape);
}

// What both forms have: sizes, probabilities, the uniforms and where the results go.
SpeculativeSampleArgs read_common(py::handle draft_probs, py::handle draft_ids, py::handle target_probs,
                                  py::handle uniforms, py::handle ids, py::handle accepted) {
  const Tensor draft = read("draft_probs", draft_probs), target = read("target_probs", target_probs);
  if (draft.dims != 3) refuse("draft_probs", "of shape " + shape_of(draft), "[batch, rows, vocabulary]");
  if (target.dims != 3)
    refuse("target_probs", "of shape " + shape_of(target), "[batch, nodes + 1, vocabulary]");
  SpeculativeSampleArgs args;
  args.batch = target.shape[0];
  args.nodes = target.shape[1] - 1;
  args.rows = draft.shape[1];
  args.vocabulary = target.shape[2];
  require(args.nodes >= 0 && args.nodes <= kMaxDrafted, "drafted", args.nodes, "0 to 2^20");
  require(args.vocabulary >= 1 && args.vocabulary <= kMaxVocabulary, "vocabulary", args.vocabulary,
          "1 to 2^20");
  args.draft = probabilities("draft_probs", draft, args.batch, args.rows, args.vocabulary);
  args.target = probabilities("target_probs", target, args.batch, args.nodes + 1, args.vocabulary);
  args.draft_ids = integers("draft_ids", draft_ids, {args.batch, args.nodes});
  const Tensor u = read("uniforms", uniforms);
  require_device("uniforms", u, kHost);
  args.uniforms = dense<const double>("uniforms", u, Dtype::kFloat64, {args.batch, args.nodes + 1});
  args.ids = integers("ids", ids, {args.batch, args.nodes + 1});
  args.accepted = integers("accepted", accepted, {args.batch});
  return args;
}

void serve(const SpeculativeSampleArgs& args) {
  if (args.batch == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(speculative_sample)(args);
}

void speculative_sample(py::handle draft_probs, py::handle draft_ids, py::handle target_probs,
                        py::handle uniforms, py::handle ids, py::handle accepted) {
  const SpeculativeSampleArgs args =
      read_common(draft_probs, draft_ids, target_probs, uniforms, ids, accepted);
  require(args.rows == args.nodes, "draft_probs", args.rows, std::to_string(args.nodes) + " rows");
  serve(args);
}

void speculative_sample_tree(py::handle draft_probs, py::handle draft_ids, py::handle parents,
                             py::handle draft_rows, py::handle target_probs, py::handle uniforms,
                             bool replacement, py::handle ids, py::handle accepted, py::handle path) {
  SpeculativeSampleArgs args = read_common(draft_probs, draft_ids, target_probs, uniforms, ids, accepted);
  args.parents = integers("parents", parents, {args.batch, args.nodes});
  if (!draft_rows.is_none()) args.draft_rows = integers("draft_rows", draft_rows, {args.batch, args.nodes});
  args.path = integers("path", path, {args.batch, args.nodes});
  args.replacement = replacement;
  serve(args);
}

}  // namespace

void bind_speculative_sample(py::module_& module) {
  module.def("speculative_sample", speculative_sample, "Tokens to ids, and how many were accepted.",
             py::arg("draft_probs"), py::arg("draft_ids"), py::arg("target_probs"), py::arg("uniforms"),
             py::arg("ids"), py::arg("accepted"));
  module.def("speculative_sample_tree", speculative_sample_tree,
             "Tokens to ids, how many were accepted, and which nodes.", py::arg("draft_probs"),
             py::arg("draft_ids"), py::arg("parents"), py::arg("draft_rows"), py::arg("target_probs"),
             py::arg("uniforms"), py::arg("replacement"), py::arg("ids"), py::arg("accepted"),
             py::arg("path"));
}

}  // namespace bitfuse

#include "bind/cpu_calls.h"
#include "cpu/sampling/speculative_sample.h"

namespace bitfuse {
namespace {

constexpr int64_t kMaxNodes = int64_t(1) << 20;
constexpr int64_t kMaxVocabulary = int64_t(1) << 20;  // of which 42 bits each sum below 2^62

ProbabilityRows make_rows(const char* name, int dtype, uintptr_t data, int64_t batch_stride, int64_t stride,
                          int64_t batch, int64_t rows, int64_t vocabulary) {
  ProbabilityRows made{make_dtype(name, dtype), nullptr, batch_stride, stride};
  require(batch_stride >= 0, name, batch_stride, "a batch stride of 0 or more");
  require(stride >= 0, name, stride, "a row stride of 0 or more");
  check_bytes(name, {batch, batch_stride + 1, 4});
  check_bytes(name, {rows, stride + 1, 4});
  made.data = address<const void>(name, data, uintptr_t(size_of(made.dtype)), batch > 0 && rows > 0);
  return made;
}

// What both forms have: sizes, the target, the uniforms and where the results go.
SpeculativeCall make_call(int64_t batch, int64_t nodes, int64_t rows, int64_t vocabulary, int draft_dtype,
                          uintptr_t draft, int64_t draft_batch_stride, int64_t draft_stride,
                          uintptr_t draft_ids, int target_dtype, uintptr_t target,
                          int64_t target_batch_stride, int64_t target_stride, uintptr_t uniforms,
                          uintptr_t ids, uintptr_t accepted) {
  require(batch >= 0, "batch", batch, "0 or more");
  require(nodes >= 0 && nodes <= kMaxNodes, "drafted", nodes, "0 to 2^20");
  require(rows >= 0, "draft_probs", rows, "0 rows or more");
  require(vocabulary >= 1 && vocabulary <= kMaxVocabulary, "vocabulary", vocabulary, "1 to 2^20");
  check_bytes("ids", {batch, nodes + 1, 8});
  check_bytes("target_probs", {batch, vocabulary, 8});
  SpeculativeCall call{};
  call.batch = batch;
  call.nodes = nodes;
  call.rows = rows;
  call.vocabulary = vocabulary;
  call.draft =
      make_rows("draft_probs", draft_dtype, draft, draft_batch_stride, draft_stride, batch, rows, vocabulary);
  call.target = make_rows("target_probs", target_dtype, target, target_batch_stride, target_stride, batch,
                          nodes + 1, vocabulary);
  call.draft_ids = address<const int64_t>("draft_ids", draft_ids, 8, batch > 0 && nodes > 0);
  call.uniforms = address<const double>("uniforms", uniforms, 8, batch > 0);
  call.ids = address<int64_t>("ids", ids, 8, batch > 0);
  call.accepted = address<int64_t>("accepted", accepted, 8, batch > 0);
  return call;
}

void serve(const SpeculativeCall& call) {
  if (call.batch == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(speculative_sample)(call);
}

void speculative_sample(int64_t batch, int64_t drafted, int64_t vocabulary, int draft_dtype, uintptr_t draft,
                        int64_t draft_batch_stride, int64_t draft_stride, uintptr_t draft_ids,
                        int target_dtype, uintptr_t target, int64_t target_batch_stride,
                        int64_t target_stride, uintptr_t uniforms, uintptr_t ids, uintptr_t accepted) {
  serve(make_call(batch, drafted, drafted, vocabulary, draft_dtype, draft, draft_batch_stride, draft_stride,
                  draft_ids, target_dtype, target, target_batch_stride, target_stride, uniforms, ids,
                  accepted));
}

void speculative_sample_tree(int64_t batch, int64_t nodes, int64_t rows, int64_t vocabulary, int draft_dtype,
                             uintptr_t draft, int64_t draft_batch_stride, int64_t draft_stride,
                             uintptr_t draft_ids, uintptr_t parents, uintptr_t draft_rows, bool replacement,
                             int target_dtype, uintptr_t target, int64_t target_batch_stride,
                             int64_t target_stride, uintptr_t uniforms, uintptr_t ids, uintptr_t accepted,
                             uintptr_t path) {
  SpeculativeCall call =
      make_call(batch, nodes, rows, vocabulary, draft_dtype, draft, draft_batch_stride, draft_stride,
                draft_ids, target_dtype, target, target_batch_stride, target_stride, uniforms, ids, accepted);
  const bool any = batch > 0 && nodes > 0;
  call.parents = address<const int64_t>("parents", parents, 8, any);
  call.draft_rows = address<const int64_t>("draft_rows", draft_rows, 8, false);
  call.path = address<int64_t>("path", path, 8, any);
  call.replacement = replacement;
  serve(call);
}

}  // namespace

void bind_speculative_sample(py::module_& module) {
  module.def("speculative_sample", speculative_sample);
  module.def("speculative_sample_tree", speculative_sample_tree);
}

}  // namespace bitfuse

#include "bind_cpu_calls.h"
#include "cpu/speculative_sample.h"

namespace bitfuse {
namespace {

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

void speculative_sample(int64_t batch, int64_t drafted, int64_t vocabulary, int draft_dtype, uintptr_t draft,
                        int64_t draft_batch_stride, int64_t draft_stride, uintptr_t draft_ids,
                        int target_dtype, uintptr_t target, int64_t target_batch_stride,
                        int64_t target_stride, uintptr_t uniforms, uintptr_t ids, uintptr_t accepted) {
  require(batch >= 0, "batch", batch, "0 or more");
  require(drafted >= 0 && drafted < INT64_MAX / 64, "drafted", drafted, "0 or more");
  require(vocabulary >= 1 && vocabulary <= kMaxVocabulary, "vocabulary", vocabulary, "1 to 2^20");
  check_bytes("ids", {batch, drafted + 1, 8});
  check_bytes("target_probs", {batch, vocabulary, 8});
  SpeculativeCall call{};
  call.batch = batch;
  call.drafted = drafted;
  call.vocabulary = vocabulary;
  call.draft = make_rows("draft_probs", draft_dtype, draft, draft_batch_stride, draft_stride, batch, drafted,
                         vocabulary);
  call.target = make_rows("target_probs", target_dtype, target, target_batch_stride, target_stride, batch,
                          drafted + 1, vocabulary);
  call.draft_ids = address<const int64_t>("draft_ids", draft_ids, 8, batch > 0 && drafted > 0);
  call.uniforms = address<const double>("uniforms", uniforms, 8, batch > 0);
  call.ids = address<int64_t>("ids", ids, 8, batch > 0);
  call.accepted = address<int64_t>("accepted", accepted, 8, batch > 0);
  if (batch == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(speculative_sample)(call);
}

}  // namespace

void bind_speculative_sample(py::module_& module) { module.def("speculative_sample", speculative_sample); }

}  // namespace bitfuse

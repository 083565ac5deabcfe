// act(gate) * up and its gradients, each in one pass: two or three vectors in, one or two out, float32
// between.
//
// Bound by bytes: 3 elements moved for each output forward, 5 for each pair of gradients. The activation is
// some 25 instructions a vector (relu 1), which a core does in the time that memory takes for about 64 bytes.
// A task is kTask elements of a row; a row that is dense throughout was made one long row by the caller.
#include "cpu/linear/gated_activation.h"

#include "cpu/core/activations.h"
#include "cpu/core/elements.h"
#include "cpu/core/threads.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int64_t kTask = 8192;

template <class Elements, class Act>
void pass(const GatedActivationArgs& call, Act act, int64_t row, int64_t from, int64_t to) {
  using Type = typename Elements::Type;
  const auto* gate = static_cast<const Type*>(call.gate) + row * call.gate_stride;
  const auto* up = static_cast<const Type*>(call.up) + row * call.up_stride;
  const auto* grad = static_cast<const Type*>(call.grad) + (call.grad ? row * call.grad_stride : 0);
  const int64_t at = row * call.columns;
  auto each = [&](int64_t i, auto read, auto write) __attribute__((always_inline)) {
    const Activated a = act(read(gate + i));
    const Vf u = read(up + i);
    if (!grad) return write(static_cast<Type*>(call.out) + at + i, mul(a.value, u));
    const Vf g = read(grad + i);
    write(static_cast<Type*>(call.d_gate) + at + i, mul(mul(g, u), a.derivative));
    write(static_cast<Type*>(call.d_up) + at + i, mul(g, a.value));
  };
  int64_t i = from;
  for (; i + kLanes <= to; i += kLanes)
    each(i, [](const Type* p) { return Elements::whole(p); }, [](Type* p, Vf v) { Elements::put(p, v); });
  if (i < to) {
    const int rest = int(to - i);
    each(
        i, [&](const Type* p) { return Elements::some(p, rest); },
        [&](Type* p, Vf v) { put_some<Elements>(p, v, rest); });
  }
}

}  // namespace

void gated_activation(const GatedActivationArgs& call) {
  const int64_t parts = (call.columns + kTask - 1) / kTask;
  const int threads = int(least(threads_for(call.rows * call.columns * 16), most(call.rows * parts, 1)));
  with_elements(call.dtype, [&](auto elements) {
    using Elements = decltype(elements);
    with_activation(call.activation, [&](auto act) {
      parallel(threads, [&](int thread, int team) {
        const Range tasks = share(call.rows * parts, thread, team);
        for (int64_t task = tasks.begin; task < tasks.end; ++task) {
          const int64_t from = task % parts * kTask;
          pass<Elements>(call, act, task / parts, from, least(from + kTask, call.columns));
        }
      });
    });
  });
}

}  // namespace bitfuse::BITFUSE_ISA

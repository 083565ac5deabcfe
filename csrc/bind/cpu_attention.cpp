#include <vector>

#include "bind/attention_args.h"
#include "bind/cpu.h"
#include "cpu/attention/attention.h"

namespace bitfuse {
namespace {

void check_offsets(const char* name, const int32_t* offsets, int64_t batch, int64_t total) {
  for (int64_t b = 0; b <= batch; ++b)
    if (offsets[b] < 0 || offsets[b] > total || (b && offsets[b] < offsets[b - 1]) || (!b && offsets[0]))
      refuse(name, std::to_string(offsets[b]) + " at " + std::to_string(b),
             "0 to " + std::to_string(total) + ", not decreasing");
  require(offsets[batch] == total, name, offsets[batch], "an end at " + std::to_string(total));
}

// Where each sequence is, which `args` then points to. Of packed ones the offsets are checked.
std::vector<AttentionSequence> find_sequences(AttentionArgs& args) {
  std::vector<AttentionSequence> sequences(size_t(args.batch));
  if (args.packed) {
    // a copy: what is checked is what is used, whoever writes to the tensors meanwhile
    const std::vector<int32_t> of_q(args.cu_seqlens_q, args.cu_seqlens_q + args.batch + 1);
    const std::vector<int32_t> of_k(args.cu_seqlens_k, args.cu_seqlens_k + args.batch + 1);
    check_offsets("cu_seqlens_q", of_q.data(), args.batch, args.rows);
    check_offsets("cu_seqlens_k", of_k.data(), args.batch, args.keys);
    for (size_t b = 0; b < sequences.size(); ++b)
      sequences[b] = {of_q[b], of_q[b + 1] - of_q[b], of_k[b], of_k[b + 1] - of_k[b]};
  } else {
    for (auto& s : sequences) s = {0, args.rows, 0, args.keys};
  }
  args.sequences = sequences.data();
  return sequences;
}

void forward(py::handle q_, py::handle k_, py::handle v_, py::handle a, py::handle out_, py::handle lse_) {
  const Tensor q = read("q", q_), k = read("k", k_), v = read("v", v_);
  require_device("q", q, kHost);
  AttentionArgs args = read_attention(q, k, v, a);
  args.out = attention_out("out", read("out", out_), q, args);
  args.lse = attention_lse("lse", read("lse", lse_), q, args);
  const auto sequences = find_sequences(args);
  if (!any_rows(args)) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(attention)(args);
}

// The address of a gradient of the shape of what it is of, null where it is not wanted: None.
void* gradient(const char* name, py::handle object, const Tensor& of) {
  if (object.is_none()) return nullptr;
  const Tensor t = read(name, object);
  require_dtype(name, t, of.dtype);
  require_device(name, t, of.device);
  bool fits = t.dims == of.dims;
  for (int i = 0; fits && i < t.dims; ++i) fits = t.shape[i] == of.shape[i];
  if (!fits) refuse(name, "of shape " + shape_of(t), shape_of(of));
  if (!is_dense(t)) refuse(name, "of strides " + text_of(t.strides, t.dims), "a contiguous tensor");
  return t.data;
}

// `grads`: Gradients of python/bitfuse/ops/attention/attention_cpu.py.
void backward(py::handle grad_, py::handle grad_lse_, py::handle q_, py::handle k_, py::handle v_,
              py::handle out_, py::handle lse_, py::handle a, py::handle grads) {
  struct Names {
    Name q{"q"}, k{"k"}, v{"v"}, bias{"bias"}, sinks{"sinks"}, prefix_k{"prefix_k"}, prefix_v{"prefix_v"};
  };
  static const Names& names = *new Names;
  const Tensor q = read("q", q_), k = read("k", k_), v = read("v", v_);
  require_device("q", q, kHost);
  AttentionBackwardArgs args;
  static_cast<AttentionArgs&>(args) = read_attention(q, k, v, a);
  const int64_t outer = args.packed ? 1 : args.batch;
  auto rows_like_out = [&](const char* name, py::handle object) {
    return head_rows(name, read(name, object), q, outer, args.rows, args.heads, args.dim_v);
  };
  args.grad = rows_like_out("grad", grad_);
  args.output = rows_like_out("out", out_);
  args.lse = attention_lse("lse", read("lse", lse_), q, args);
  if (!grad_lse_.is_none()) args.grad_lse = attention_lse("grad_lse", read("grad_lse", grad_lse_), q, args);
  args.grad_q = gradient("grad_q", names.q.of(grads), q);
  args.grad_k = gradient("grad_k", names.k.of(grads), k);
  args.grad_v = gradient("grad_v", names.v.of(grads), v);
  if (const py::object wanted = names.bias.of(grads); !wanted.is_none()) {
    const std::optional<Tensor> bias = names.bias.tensor_or_none(a);
    if (!bias || args.bias.mask) refuse("grad_bias", "given", "none without a float bias");
    args.grad_bias = gradient("grad_bias", wanted, *bias);
    for (int i = 0; i < 4; ++i) args.bias_sizes[i] = bias->shape[i];
  }
  if (const py::object wanted = names.sinks.of(grads); !wanted.is_none()) {
    const std::optional<Tensor> sinks = names.sinks.tensor_or_none(a);
    if (!sinks) refuse("grad_sinks", "given", "none without sinks");
    args.grad_sinks = static_cast<float*>(gradient("grad_sinks", wanted, *sinks));
  }
  if (args.prefix) {
    args.grad_prefix_k = gradient("grad_prefix_k", names.prefix_k.of(grads), names.prefix_k.tensor(a));
    args.grad_prefix_v = gradient("grad_prefix_v", names.prefix_v.of(grads), names.prefix_v.tensor(a));
  }
  const auto sequences = find_sequences(args);
  if (!any_rows(args)) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(attention_backward)(args);
}

bool fits(py::handle q_, py::handle k_, py::handle v_) {
  Tensor q, k, v;
  if (!plain_layout(q_, q) || !plain_layout(k_, k) || !plain_layout(v_, v)) return false;
  if (q.dims != 4 || k.dims != 4 || v.dims != 4) return false;
  const bool same = is_float(q.dtype) && q.dtype == k.dtype && q.dtype == v.dtype && q.device == k.device &&
                    q.device == v.device;
  const bool sized = k.shape[0] == q.shape[0] && k.shape[3] == q.shape[3] && v.shape[0] == k.shape[0] &&
                     v.shape[1] == k.shape[1] && v.shape[2] == k.shape[2];
  auto head = [](int64_t dim) { return dim > 0 && dim <= kMaxHeadDim; };
  return same && sized && k.shape[2] > 0 && q.shape[2] % k.shape[2] == 0 && head(q.shape[3]) &&
         head(v.shape[3]);
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention", forward, "q, k, v, AttentionArgs, and where the output and lse go.", py::arg("q"),
             py::arg("k"), py::arg("v"), py::arg("args"), py::arg("out"), py::arg("lse"));
  module.def("attention_backward", backward,
             "What the forward had and gave, its gradients, and Gradients, where they go.", py::arg("grad"),
             py::arg("grad_lse"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
             py::arg("args"), py::arg("grads"));
  module.def("attention_fits", fits,
             "True of plain tensors [batch, seq, heads, head_dim] of one dtype and device that meet: what "
             "nearly every call has, and the op's check need not look at.",
             py::arg("q"), py::arg("k"), py::arg("v"));
}

}  // namespace bitfuse

// One call of a CPU kernel, from a file and to one: for a machine that has no torch.
//
//     run_op PROBLEM OUT...
//
// PROBLEM: the name of the op, then parts, each a line "name bytes" and that many bytes; whole numbers have 8
// of them, others are doubles. What has no part is null, or 0. Each output is written to a file of its own.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cpu/attention/attention.h"
#include "cpu/linear/gated_activation.h"
#include "cpu/linear/lowbit_linear.h"

using namespace bitfuse;

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(2);
}

class Problem {
 public:
  explicit Problem(const char* path) {
    std::FILE* file = std::fopen(path, "rb");
    char name[64];
    size_t bytes;
    if (!file || std::fscanf(file, "%63s", name) != 1) fail("no problem");
    op_ = name;
    while (std::fscanf(file, "%63s %zu", name, &bytes) == 2) {
      std::vector<char>& part = parts_[name];
      part.resize(bytes);
      if (std::fgetc(file) != '\n' || std::fread(part.data(), 1, bytes, file) != bytes) fail(name);
    }
    std::fclose(file);
  }
  const std::string& op() const { return op_; }
  template <class T = void>
  const T* data(const char* name) const {
    const auto found = parts_.find(name);
    return found == parts_.end() ? nullptr : reinterpret_cast<const T*>(found->second.data());
  }
  int64_t whole(const char* name) const { return number<int64_t>(name); }
  float real(const char* name) const { return float(number<double>(name)); }

 private:
  template <class T>
  T number(const char* name) const {
    T value = 0;
    if (const auto* at = data<char>(name)) std::memcpy(&value, at, sizeof value);
    return value;
  }

  std::string op_;
  std::map<std::string, std::vector<char>> parts_;
};

using Bytes = std::vector<char>;

// NaN wherever nothing is written.
void* room(Bytes& out, int64_t count, Dtype dtype) {
  out.assign(size_t(count * size_of(dtype)), char(0xff));
  return out.data();
}

LowBitMatrix matrix_of(const Problem& p) {
  LowBitMatrix w{};
  w.n = p.whole("n");
  w.k = p.whole("k");
  w.group_size = p.whole("group_size");
  w.code_kind = static_cast<CodeKind>(p.whole("code_kind"));
  w.scale_kind = static_cast<ScaleKind>(p.whole("scale_kind"));
  w.zero_point = int(p.whole("zero_point"));
  w.codes = p.data<uint8_t>("codes");
  w.scales = p.data("scales");
  w.zeros = p.data<uint8_t>("zeros");
  w.values = p.data<float>("values");
  return w;
}

void lowbit_linear(const Problem& p, bool gradient, Bytes& out) {
  LowbitLinearArgs call{};
  call.w = matrix_of(p);
  call.dtype = static_cast<Dtype>(p.whole("dtype"));
  call.rows = p.whole("rows");
  call.row_stride = gradient ? call.w.n : call.w.k;
  call.x = p.data("x");
  call.bias = p.data("bias");
  call.out = room(out, call.rows * (gradient ? call.w.k : call.w.n), call.dtype);
  (gradient ? neon::lowbit_linear_grad_x : neon::lowbit_linear)(call);
}

void gated_activation(const Problem& p, Bytes* outs) {
  GatedActivationArgs call{};
  call.activation = static_cast<Activation>(p.whole("activation"));
  call.dtype = static_cast<Dtype>(p.whole("dtype"));
  call.rows = p.whole("rows");
  call.columns = call.gate_stride = call.up_stride = call.grad_stride = p.whole("columns");
  call.gate = p.data("gate");
  call.up = p.data("up");
  call.grad = p.data("grad");
  const int64_t count = call.rows * call.columns;
  if (call.grad) {
    call.d_gate = room(outs[0], count, call.dtype);
    call.d_up = room(outs[1], count, call.dtype);
  } else {
    call.out = room(outs[0], count, call.dtype);
  }
  neon::gated_activation(call);
}

HeadRows dense(const void* data, int64_t rows, int64_t heads, int64_t dim) {
  return {data, rows * heads * dim, heads * dim, dim};
}

void attention(const Problem& p, Bytes* outs) {
  AttentionArgs call{};
  call.dtype = static_cast<Dtype>(p.whole("dtype"));
  call.batch = p.whole("batch");
  call.heads = p.whole("heads");
  call.kv_heads = p.whole("kv_heads");
  call.dim = call.dim_v = p.whole("dim");
  call.rows = p.whole("rows");
  call.keys = p.whole("keys");
  call.q = dense(p.data("q"), call.rows, call.heads, call.dim);
  call.k = dense(p.data("k"), call.keys, call.kv_heads, call.dim);
  call.v = dense(p.data("v"), call.keys, call.kv_heads, call.dim);
  const std::vector<AttentionSequence> sequences(size_t(call.batch), {0, call.rows, 0, call.keys});
  call.sequences = sequences.data();
  call.scale = p.real("scale");
  call.left = -1;
  call.right = p.whole("right");
  call.out = room(outs[0], call.batch * call.rows * call.heads * call.dim, call.dtype);
  call.lse = static_cast<float*>(room(outs[1], call.batch * call.heads * call.rows, Dtype::kFloat32));
  neon::attention(call);
}

void write(const Bytes& out, const char* path) {
  std::FILE* file = std::fopen(path, "wb");
  if (!file || std::fwrite(out.data(), 1, out.size(), file) != out.size() || std::fclose(file)) fail(path);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) fail("run_op PROBLEM OUT...");
  const Problem p(argv[1]);
  Bytes outs[2];
  if (p.op() == "lowbit_linear" || p.op() == "lowbit_linear_grad_x") {
    lowbit_linear(p, p.op() != "lowbit_linear", outs[0]);
  } else if (p.op() == "gated_activation") {
    gated_activation(p, outs);
  } else if (p.op() == "attention") {
    attention(p, outs);
  } else {
    fail("no op " + p.op());
  }
  for (int i = 2; i < argc && i < 4; ++i) write(outs[i - 2], argv[i]);
}

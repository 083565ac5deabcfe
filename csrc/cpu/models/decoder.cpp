// One step of a decoder-only language model: the embedding, all layers, the norm, the head, sampling.
//
// The step is a list of calls of the ops' own kernels, on arrays of the workspace; no bit differs from what
// the ops give one by one. What it saves is all that lies between them: a step of one token of a small model
// is some 300 calls of a few microseconds each. A crew of threads stays awake for the whole step, so that a
// call costs two ways of a cache line and no region of OpenMP; nothing is allocated once the kernels' scratch
// has grown; no lock is held that Python wants.
//
// Bound, at few tokens, by bytes: each weight is read once a step, and each key and value once. At many
// tokens (the prompt, in chunks) by multiply-adds. `h` is the residual stream, `x` what a norm made of it;
// the sum of h and what a block gave is taken where the next norm reads both.
#include "cpu/models/decoder.h"

#include "cpu/attention/kv_cache.h"
#include "cpu/core/elements.h"
#include "cpu/core/threads.h"
#include "cpu/linear/gated_activation.h"
#include "cpu/linear/lowbit_embedding.h"
#include "cpu/linear/lowbit_linear.h"
#include "cpu/linear/scales.h"
#include "cpu/norm/norm.h"
#include "cpu/sampling/sample.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int64_t kDenseRows = 4;  // of x, that meet a row of a dense matrix at once

// Arrays of a step of at most `rows` tokens, of the model's dtype.
struct Arrays {
  char *h, *x, *block, *q, *k, *v, *attended, *gate, *up, *activated, *last;
  float* lse;

  static Arrays carve(Carver& carver, const Decoder& model, int64_t rows) {
    const int64_t size = size_of(model.dtype);
    auto take = [&](int64_t columns) { return carver.take<char>(rows * columns * size); };
    const int64_t dim = model.dim, joint = (model.heads + 2 * model.kv_heads) * dim;
    Arrays a;
    a.h = take(2 * model.hidden);  // by turns, as the sum is not written where it is read
    a.x = take(model.hidden);
    a.block = take(model.hidden);
    a.q = take(joint);
    a.k = take(model.kv_heads * dim);
    a.v = take(model.kv_heads * dim);
    a.attended = take(model.heads * dim);
    a.gate = take(2 * model.intermediate);
    a.up = take(model.intermediate);
    a.activated = take(model.intermediate);
    a.last = take(model.hidden);
    a.lse = carver.take<float>(rows * model.heads);
    return a;
  }
};

class Step {
 public:
  Step(const Decoder& model, const DecoderStep& call)
      : model_(model), call_(call), rows_(call.batch * call.tokens) {
    Carver carver(call.workspace);
    a_ = Arrays::carve(carver, model, rows_);
    other_h_ = a_.h + rows_ * model.hidden * size_of(model.dtype);
  }

  void run() {
    if (call_.seconds) clock_ = omp_get_wtime();
    embed();
    const char* added = nullptr;  // what the last block gave
    for (int64_t i = 0; i < model_.layer_count; ++i) {
      const DecoderLayer& layer = model_.layers[i];
      normed(layer.before_attention, added);
      attend(layer);
      outer_norm(layer.after_attention);
      normed(layer.before_mlp, a_.block);
      feed_forward(layer);
      outer_norm(layer.after_mlp);
      added = a_.block;
    }
    normed(model_.last, added);
    head();
    if (call_.sample) sample(*call_.sample);
    took(Part::kSampling);
  }

 private:
  void embed() {
    const Projection& table = model_.embedding;
    if (table.w) {
      lowbit_embedding({*table.w, call_.ids, true, rows_, model_.dtype, a_.h});
    } else {
      for (int64_t r = 0; r < rows_; ++r) convert(table, call_.ids[r] * table.k, r * model_.hidden);
    }
    if (model_.embedding_scale != 1) {
      const float scale = model_.embedding_scale;
      change(a_.h, rows_ * model_.hidden, [&](float x) { return x * scale; });
    }
    took(Part::kNorm);
  }

  // A row of a dense embedding, from one element on, to h.
  void convert(const Projection& table, int64_t from, int64_t to) {
    alignas(64) float part[kChunk];
    for (int64_t c = 0; c < model_.hidden; c += kChunk) {
      const int64_t size = least(kChunk, model_.hidden - c);
      to_float(element(table.dense, table.dense_dtype, from + c), table.dense_dtype, part, size);
      from_float(part, element(a_.h, model_.dtype, to + c), model_.dtype, size);
    }
  }

  // Each of `count` numbers of the model's dtype becomes f of it.
  template <class F>
  void change(void* x, int64_t count, F f) {
    alignas(64) float part[kChunk];
    for (int64_t i = 0; i < count; i += kChunk) {
      const int64_t size = least(kChunk, count - i);
      to_float(element(x, model_.dtype, i), model_.dtype, part, size);
      for (int64_t j = 0; j < size; ++j) part[j] = f(part[j]);
      from_float(part, element(x, model_.dtype, i), model_.dtype, size);
    }
  }

  NormArgs norm_args(const RmsNorm& of, int64_t rows, const void* x, void* out) const {
    NormArgs args{};
    args.centered = false;
    args.dtype = model_.dtype;
    args.weight_dtype = args.bias_dtype = of.dtype;
    args.rows = rows;
    args.columns = args.x_stride = of.width;
    args.eps = of.eps, args.offset = of.offset;
    args.x = x, args.weight = of.weight, args.out = out;
    return args;
  }

  // x = norm(h), after h += added.
  void normed(const RmsNorm& of, const char* added) {
    NormArgs args = norm_args(of, rows_, a_.h, a_.x);
    if (added) {
      args.x = added;
      args.residual = a_.h;
      args.residual_stride = model_.hidden;
      args.sum = other_h_;
    }
    norm(args);
    if (added) exchange(a_.h, other_h_);
    took(Part::kNorm);
  }

  // Of a block's output, before it is added.
  void outer_norm(const RmsNorm& of) {
    if (!of.weight) return;
    norm(norm_args(of, rows_, a_.block, a_.x));
    exchange(a_.x, a_.block);
    took(Part::kNorm);
  }

  void attend(const DecoderLayer& layer) {
    const int64_t dim = model_.dim, heads = model_.heads, kv_heads = model_.kv_heads;
    DecodeArgs args;
    args.cache = of_sequences(layer.cache);
    args.seqlens = call_.seqlens;
    args.tokens = args.queries = call_.tokens;
    args.heads = heads;
    char *q = a_.q, *k = a_.k, *v = a_.v;
    int64_t q_row = heads * dim, k_row = kv_heads * dim;
    project(layer.qkv[0], a_.x, q);
    if (layer.qkv[1].n) {
      project(layer.qkv[1], a_.x, k);
      project(layer.qkv[2], a_.x, v);
    } else {
      q_row = k_row = (heads + 2 * kv_heads) * dim;
      k = q + heads * dim * size_of(model_.dtype);
      v = k + kv_heads * dim * size_of(model_.dtype);
    }
    took(Part::kLinear);
    auto rows = [&](const char* data, int64_t row) { return HeadRows{data, call_.tokens * row, row, dim}; };
    args.q = rows(q, q_row), args.k = rows(k, k_row), args.v = rows(v, k_row);
    head_norm(layer.of_queries, q, heads);
    head_norm(layer.of_keys, k, kv_heads);
    args.rotary = layer.rotary;
    args.scale = layer.scale, args.softcap = layer.softcap;
    args.left = layer.left, args.right = 0;
    args.sinks = layer.sinks;
    args.out = a_.attended;
    args.lse = a_.lse;
    append_kv(args);
    decode_attention(args);
    took(Part::kAttention);
    project(layer.out, a_.attended, a_.block);
    took(Part::kLinear);
  }

  // Each head of rows that lie one after the other, in place.
  void head_norm(const RmsNorm& of, char* x, int64_t heads) {
    if (!of.weight) return;
    norm(norm_args(of, rows_ * heads, x, x));
    took(Part::kNorm);
  }

  // The part of a contiguous cache that belongs to the step's sequences.
  KvCache of_sequences(KvCache cache) const {
    const int64_t first = call_.first, size = size_of(cache.dtype), page = cache.page_size;
    cache.batch = cache.pages = call_.batch;
    cache.k.data += first * cache.k.page;
    cache.v.data += first * cache.v.page;
    if (!has_codes(cache.format)) return cache;
    const int64_t of_k = page / cache.group_size * cache.kv_heads * cache.dim;
    const int64_t of_v = page * cache.kv_heads * cache.value_groups();
    const int64_t tail = first * 2 * cache.group_size * cache.kv_heads * size;
    cache.k_scales += first * of_k, cache.k_offsets += first * of_k;
    cache.v_scales += first * of_v, cache.v_offsets += first * of_v;
    cache.k_tail = static_cast<char*>(cache.k_tail) + tail * cache.dim;
    cache.v_tail = static_cast<char*>(cache.v_tail) + tail * cache.dim_v;
    return cache;
  }

  void feed_forward(const DecoderLayer& layer) {
    const int64_t wide = model_.intermediate;
    project(layer.gate_up[0], a_.x, a_.gate);
    if (layer.gate_up[1].n) project(layer.gate_up[1], a_.x, a_.up);
    took(Part::kLinear);
    GatedActivationArgs args{};
    args.activation = model_.activation;
    args.dtype = model_.dtype;
    args.rows = rows_, args.columns = wide;
    args.gate = a_.gate, args.gate_stride = wide;
    args.up = a_.up, args.up_stride = wide;
    if (!layer.gate_up[1].n) {
      args.up = a_.gate + wide * size_of(model_.dtype);
      args.gate_stride = args.up_stride = 2 * wide;
    }
    args.out = a_.activated;
    gated_activation(args);
    took(Part::kNorm);
    project(layer.down, a_.activated, a_.block);
    took(Part::kLinear);
  }

  void head() {
    const char* x = a_.x;
    int64_t rows = rows_;
    if (!call_.every && call_.tokens > 1) {
      const int64_t bytes = model_.hidden * size_of(model_.dtype);
      for (int64_t b = 0; b < call_.batch; ++b)
        std::memcpy(a_.last + b * bytes, a_.x + ((b + 1) * call_.tokens - 1) * bytes, size_t(bytes));
      x = a_.last;
      rows = call_.batch;
    }
    project(model_.head, x, call_.logits, rows);
    if (const float cap = model_.logit_softcap; cap > 0)
      change(call_.logits, rows * model_.vocabulary, [&](float x) { return cap * __builtin_tanhf(x / cap); });
    took(Part::kHead);
  }

  void project(const Projection& of, const void* x, void* out) { project(of, x, out, rows_); }
  void project(const Projection& of, const void* x, void* out, int64_t rows) {
    if (!of.w) return dense(of, x, out, rows);
    LowbitLinearArgs args;
    args.w = *of.w;
    args.dtype = model_.dtype;
    args.rows = rows;
    args.row_stride = of.k;
    args.x = x;
    args.bias = of.bias;
    args.out = out;
    lowbit_linear(args);
  }

  // W in floats, which is read once: bound by its bytes up to kDenseRows rows, and used for few alone.
  void dense(const Projection& of, const void* x_, void* out, int64_t rows) {
    const int64_t stride = round_up(of.k, kLanes);
    auto* x = reinterpret_cast<float*>(scratch(size_t(rows * stride) * sizeof(float)));
    for (int64_t r = 0; r < rows; ++r) {
      to_float(element(x_, model_.dtype, r * of.k), model_.dtype, x + r * stride, of.k);
      for (int64_t i = of.k; i < stride; ++i) x[r * stride + i] = 0;
    }
    with_elements(of.dense_dtype, [&](auto elements) {
      using Elements = decltype(elements);
      const auto* w = static_cast<const typename Elements::Type*>(of.dense);
      parallel(threads_for(of.n * of.k * rows), [&](int thread, int team) {
        const Range mine = share(of.n, thread, team);
        for (int64_t n = mine.begin; n < mine.end; ++n)
          for (int64_t r = 0; r < rows; r += kDenseRows) {
            const int64_t count = least(kDenseRows, rows - r);
            float y[kDenseRows];
            dots<Elements>(w + n * of.k, x + r * stride, stride, of.k, count, y);
            float bias = 0;
            if (of.bias) to_float(element(of.bias, model_.dtype, n), model_.dtype, &bias, 1);
            for (int64_t i = 0; i < count; ++i) {
              const float sum = y[i] + bias;
              from_float(&sum, element(out, model_.dtype, (r + i) * of.n + n), model_.dtype, 1);
            }
          }
      });
    });
  }

  // Two vectors of a row of W at a time, for two sums of each row of x.
  template <class Elements>
  static void dots(const typename Elements::Type* w, const float* x, int64_t stride, int64_t k, int64_t count,
                   float* y) {
    Vf sums[kDenseRows][2];
    for (auto& s : sums) s[0] = s[1] = zero();
    auto add = [&](Vf weights, int64_t at, int half) __attribute__((always_inline)) {
      for (int64_t r = 0; r < count; ++r)
        sums[r][half] = fma(weights, load(x + r * stride + at), sums[r][half]);
    };
    int64_t i = 0;
    for (; i + 2 * kLanes <= k; i += 2 * kLanes) {
      add(Elements::whole(w + i), i, 0);
      add(Elements::whole(w + i + kLanes), i + kLanes, 1);
    }
    if (i + kLanes <= k) add(Elements::whole(w + i), i, 0), i += kLanes;
    if (i < k) add(Elements::some(w + i, int(k - i)), i, 1);
    for (int64_t r = 0; r < count; ++r) y[r] = sum(bitfuse::BITFUSE_ISA::add(sums[r][0], sums[r][1]));
  }

  static void exchange(char*& a, char*& b) {
    char* const kept = a;
    a = b, b = kept;
  }

  void took(Part part) {
    if (!call_.seconds) return;
    const double now = omp_get_wtime();
    call_.seconds[int(part)] += now - clock_;
    clock_ = now;
  }

  static constexpr int64_t kChunk = 256;

  const Decoder& model_;
  const DecoderStep& call_;
  int64_t rows_;
  Arrays a_;
  char* other_h_;
  double clock_ = 0;
};

}  // namespace

void decoder_step(const Decoder& model, const DecoderStep& call) {
  Crew::work(omp_get_max_threads(), [&] { Step(model, call).run(); });
}

size_t decoder_workspace(const Decoder& model, int64_t rows) {
  Carver need;
  Arrays::carve(need, model, rows);
  return need.used();
}

}  // namespace bitfuse::BITFUSE_ISA

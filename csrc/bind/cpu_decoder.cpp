// A decoder: read once from the named tuples of python/bitfuse/models/decoder_args.py, whose tensors it keeps,
// then stepped.
#include <omp.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#include "bind/cpu.h"
#include "bind/fields.h"
#include "bind/kv_cache.h"
#include "bind/weights.h"
#include "cpu/models/decoder.h"

namespace bitfuse {
namespace {

struct ProjectionNames {
  Name weight{"weight"}, bias{"bias"};
};
struct NormNames {
  Name weight{"weight"}, eps{"eps"}, offset{"offset"};
};
struct LayerNames {
  Name before_attention{"before_attention"}, of_queries{"of_queries"}, of_keys{"of_keys"},
      after_attention{"after_attention"}, before_mlp{"before_mlp"}, after_mlp{"after_mlp"}, qkv{"qkv"},
      out{"out"}, gate_up{"gate_up"}, down{"down"}, cache{"cache"}, rotary{"rotary"},
      softmax_scale{"softmax_scale"}, softcap{"softcap"}, left{"left"}, sinks{"sinks"};
};
struct DecoderNames {
  Name dtype{"dtype"}, activation{"activation"}, hidden{"hidden"}, heads{"heads"}, kv_heads{"kv_heads"},
      head_dim{"head_dim"}, intermediate{"intermediate"}, vocabulary{"vocabulary"}, sequences{"sequences"},
      layers{"layers"}, embedding{"embedding"}, embedding_scale{"embedding_scale"}, norm{"norm"},
      head{"head"}, logit_softcap{"logit_softcap"};
};

struct Freed {
  void operator()(char* p) const { std::free(p); }
};

class HeldDecoder {
 public:
  explicit HeldDecoder(py::object args) : kept_(std::move(args)) {
    static const DecoderNames& names = *new DecoderNames;
    like_.dtype = model_.dtype = dtype_named(names.dtype.of(kept_));
    require_float("dtype", like_);
    auto size = [&](const Name& name) {
      const int64_t value = name.integer(kept_);
      require(value >= 1 && value <= int64_t(1) << 24, name.text(), value, "1 to 2^24");
      return value;
    };
    model_.activation = names.activation.of(kept_).cast<Activation>();
    model_.hidden = size(names.hidden);
    model_.heads = size(names.heads);
    model_.kv_heads = size(names.kv_heads);
    model_.dim = size(names.head_dim);
    model_.intermediate = size(names.intermediate);
    model_.vocabulary = size(names.vocabulary);
    sequences_ = size(names.sequences);
    require_head_dim("head_dim", model_.dim);
    require(model_.heads % model_.kv_heads == 0, "heads", model_.heads,
            "a multiple of " + std::to_string(model_.kv_heads));
    const py::tuple layers = names.layers.of(kept_);
    layers_.reserve(layers.size());
    for (const py::handle layer : layers) layers_.push_back(read_layer(layer));
    model_.layers = layers_.data();
    model_.layer_count = int64_t(layers_.size());
    model_.embedding = projection("embedding", names.embedding.of(kept_), model_.vocabulary, model_.hidden);
    model_.embedding_scale = float(names.embedding_scale.number(kept_));
    model_.last = norm("norm", names.norm.of(kept_), model_.hidden);
    model_.head = projection("head", names.head.of(kept_), model_.vocabulary, model_.hidden);
    model_.logit_softcap = float(names.logit_softcap.number(kept_));
  }

  void step(py::handle ids_, py::handle seqlens_, int64_t first, py::handle logits_, py::handle sampling,
            py::handle seconds) {
    const Tensor ids = read("ids", ids_), seqlens = read("seqlens", seqlens_);
    require_device("ids", ids, kHost);
    require_device("seqlens", seqlens, kHost);
    if (ids.dims != 2) refuse("ids", "of shape " + shape_of(ids), "[batch, tokens]");
    DecoderStep call;
    call.batch = ids.shape[0], call.tokens = ids.shape[1], call.first = first;
    require(first >= 0 && first < sequences_, "first", first, "0 to " + std::to_string(sequences_ - 1));
    require(call.batch <= sequences_ - first, "batch", call.batch,
            "at most " + std::to_string(sequences_ - first));
    require_tokens("tokens", call.tokens);
    check_bytes("ids",
                {call.batch, call.tokens, model_.hidden + model_.intermediate + model_.vocabulary, 64});
    if (call.batch == 0 || call.tokens == 0) return;
    const std::vector<int64_t> tokens = checked_ids(ids);
    const std::vector<int32_t> lengths = checked_lengths(seqlens, call.batch, call.tokens);
    call.ids = tokens.data();
    call.seqlens = lengths.data();
    const Tensor logits = read("logits", logits_);
    require_device("logits", logits, kHost);
    call.every = logits.dims == 3;
    call.logits =
        call.every ? dense<void>("logits", logits, model_.dtype, {call.batch, call.tokens, model_.vocabulary})
                   : dense<void>("logits", logits, model_.dtype, {call.batch, model_.vocabulary});
    SampleArgs sample;
    if (!sampling.is_none()) {
      if (call.every) refuse("sampling", "given", "none, where all logits are wanted");
      sample = read_sampling(sampling, call);
      call.sample = &sample;
    }
    if (!seconds.is_none()) {
      const Tensor t = read("seconds", seconds);
      require_device("seconds", t, kHost);
      call.seconds = dense<double>("seconds", t, Dtype::kFloat64, {int64_t(Part::kCount)});
    }
    if (busy_) throw std::runtime_error("this decoder is taking a step on another thread");
    call.workspace = workspace(call.batch * call.tokens);
    busy_ = true;
    try {
      py::gil_scoped_release release;
      BITFUSE_OF_LEVEL(decoder_step)(model_, call);
    } catch (...) {
      busy_ = false;
      throw;
    }
    busy_ = false;
  }

 private:
  Projection projection(const char* name, py::handle given, int64_t n, int64_t k) {
    static const ProjectionNames& names = *new ProjectionNames;
    Projection p;
    p.n = n, p.k = k;
    const py::object weight = names.weight.of(given), bias = names.bias.of(given);
    auto check = [&](int64_t rows, int64_t columns) {
      if (rows != n || columns != k)
        refuse(name, "of shape " + std::to_string(rows) + " x " + std::to_string(columns),
               std::to_string(n) + " x " + std::to_string(k));
    };
    if (PyTuple_Check(weight.ptr())) {
      matrices_.push_back(std::make_unique<LowBitMatrix>(read_host_matrix(weight)));
      p.w = matrices_.back().get();
      check(p.w->n, p.w->k);
    } else {
      const Tensor t = read(name, weight);
      require_device(name, t, kHost);
      require_float(name, t);
      p.dense = dense<const void>(name, t, t.dtype, {n, k});
      p.dense_dtype = t.dtype;
    }
    if (!bias.is_none()) {
      const Tensor t = read("bias", bias);
      require_device("bias", t, kHost);
      p.bias = dense<const void>("bias", t, model_.dtype, {n});
    }
    return p;
  }

  // One projection of n[0] + n[1] + ... outputs, or one for each.
  void projections(const char* name, py::handle given, std::initializer_list<int64_t> n, Projection* to) {
    const py::tuple all = py::reinterpret_borrow<py::object>(given);
    int64_t total = 0;
    for (int64_t each : n) total += each;
    require(all.size() == 1 || all.size() == n.size(), name, int64_t(all.size()),
            "1 or " + std::to_string(n.size()) + " projections");
    for (size_t i = 0; i < all.size(); ++i)
      to[i] = projection(name, all[i], all.size() == 1 ? total : n.begin()[i], model_.hidden);
  }

  RmsNorm norm(const char* name, py::handle given, int64_t width) {
    static const NormNames& names = *new NormNames;
    RmsNorm of;
    if (given.is_none()) return of;
    const Tensor t = read(name, names.weight.of(given));
    require_device(name, t, kHost);
    require_float(name, t);
    of.weight = dense<const void>(name, t, t.dtype, {width});
    of.dtype = t.dtype;
    of.width = width;
    of.eps = float(names.eps.number(given));
    of.offset = float(names.offset.number(given));
    return of;
  }

  DecoderLayer read_layer(py::handle given) {
    static const LayerNames& names = *new LayerNames;
    const int64_t hidden = model_.hidden, dim = model_.dim, q = model_.heads * dim,
                  kv = model_.kv_heads * dim;
    DecoderLayer layer;
    auto norm_of = [&](const Name& name, int64_t width) { return norm(name.text(), name.of(given), width); };
    layer.before_attention = norm_of(names.before_attention, hidden);
    layer.of_queries = norm_of(names.of_queries, dim);
    layer.of_keys = norm_of(names.of_keys, dim);
    layer.after_attention = norm_of(names.after_attention, hidden);
    layer.before_mlp = norm_of(names.before_mlp, hidden);
    layer.after_mlp = norm_of(names.after_mlp, hidden);
    for (const RmsNorm* needed : {&layer.before_attention, &layer.before_mlp})
      if (!needed->weight) refuse("a norm before a block", "none", "a weight");
    projections("qkv", names.qkv.of(given), {q, kv, kv}, layer.qkv);
    if (!layer.qkv[1].n && (layer.of_queries.weight || layer.of_keys.weight))
      refuse("qkv", "one projection", "three, where heads are normed");
    layer.out = projection("out", names.out.of(given), hidden, q);
    projections("gate_up", names.gate_up.of(given), {model_.intermediate, model_.intermediate},
                layer.gate_up);
    layer.down = projection("down", names.down.of(given), hidden, model_.intermediate);
    layer.cache = read_cache(names.cache.of(given), like_, sequences_);
    if (layer.cache.table) refuse("block_table", "given", "none: a decoder's cache is contiguous");
    if (layer.cache.pages != sequences_ || layer.cache.kv_heads != model_.kv_heads ||
        layer.cache.dim != dim || layer.cache.dim_v != dim)
      refuse("cache", "of another shape", "the model's");
    const int64_t room = layer.cache.capacity();
    capacity_ = capacity_ < 0 || room < capacity_ ? room : capacity_;
    layer.rotary = read_rotary(names.rotary.of(given), like_, sequences_, 0, dim);
    if (layer.rotary.positions) refuse("positions", "given", "none");
    if (layer.rotary.cos && layer.rotary.rows < capacity_) capacity_ = layer.rotary.rows;
    layer.scale = float(names.softmax_scale.number(given));
    layer.softcap = float(names.softcap.number(given));
    layer.left = window_bound(names.left.integer(given));
    if (const auto sinks = names.sinks.tensor_or_none(given))
      layer.sinks = floats("sinks", *sinks, like_, {model_.heads});
    return layer;
  }

  std::vector<int64_t> checked_ids(const Tensor& t) const {
    require_dtype("ids", t, Dtype::kInt64);
    if (!is_dense(t)) refuse("ids", "of strides " + text_of(t.strides, t.dims), "a contiguous tensor");
    const auto* from = static_cast<const int64_t*>(t.data);
    std::vector<int64_t> ids(from, from + t.shape[0] * t.shape[1]);
    for (int64_t id : ids)
      require(id >= 0 && id < model_.vocabulary, "a token of ids", id,
              "0 to " + std::to_string(model_.vocabulary - 1));
    return ids;
  }

  std::vector<int32_t> checked_lengths(const Tensor& t, int64_t batch, int64_t tokens) const {
    const auto* from = dense<const int32_t>("seqlens", t, Dtype::kInt32, {batch});
    std::vector<int32_t> lengths(from, from + batch);
    for (int32_t length : lengths)
      require(length >= 0 && length + tokens <= capacity_, "seqlens", length,
              "0 to " + std::to_string(capacity_ - tokens) + ": there is room for " +
                  std::to_string(capacity_) + " tokens");
    return lengths;
  }

  // (uniforms, temperature, top_k, top_p, min_p, ids), each [batch].
  SampleArgs read_sampling(py::handle given, const DecoderStep& call) const {
    const py::tuple parts = py::reinterpret_borrow<py::object>(given);
    require(parts.size() == 6, "sampling", int64_t(parts.size()), "6 tensors");
    auto part = [&](int i, const char* name, Dtype dtype) {
      const Tensor t = read(name, parts[size_t(i)]);
      require_device(name, t, kHost);
      return dense<void>(name, t, dtype, {call.batch});
    };
    SampleArgs args;
    args.rows = call.batch;
    args.vocabulary = args.stride = model_.vocabulary;
    require(args.vocabulary <= kMaxVocabulary, "vocabulary", args.vocabulary, "1 to 2^20");
    args.dtype = model_.dtype;
    args.logits = call.logits;
    args.uniforms = static_cast<double*>(part(0, "uniforms", Dtype::kFloat64));
    args.temperature = static_cast<double*>(part(1, "temperature", Dtype::kFloat64));
    args.top_k = static_cast<int64_t*>(part(2, "top_k", Dtype::kInt64));
    args.top_p = static_cast<double*>(part(3, "top_p", Dtype::kFloat64));
    args.min_p = static_cast<double*>(part(4, "min_p", Dtype::kFloat64));
    args.ids = static_cast<int64_t*>(part(5, "ids", Dtype::kInt64));
    return args;
  }

  char* workspace(int64_t rows) {
    const size_t bytes = (BITFUSE_OF_LEVEL(decoder_workspace)(model_, rows) + 4095) & ~size_t(4095);
    if (bytes > size_) {
      workspace_.reset();
      size_ = 0;
      workspace_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
      if (!workspace_) throw std::bad_alloc();
      size_ = bytes;
    }
    return workspace_.get();
  }

  py::object kept_;
  Tensor like_;  // the dtype and the device that all share
  Decoder model_;
  int64_t sequences_ = 0, capacity_ = -1;
  std::vector<DecoderLayer> layers_;
  std::vector<std::unique_ptr<LowBitMatrix>> matrices_;
  std::unique_ptr<char, Freed> workspace_;
  size_t size_ = 0;
  bool busy_ = false;
};

}  // namespace

void bind_decoder(py::module_& module) {
  py::class_<HeldDecoder>(module, "Decoder", py::module_local(),
                          "A model as DecoderArgs describe it; it keeps their tensors.")
      .def(py::init<py::object>(), py::arg("args"))
      .def("step", &HeldDecoder::step,
           "ids [batch, tokens] after seqlens tokens of the sequences from `first` on: logits of the last "
           "token [batch, vocabulary], or of all.",
           py::arg("ids"), py::arg("seqlens"), py::arg("first"), py::arg("logits"),
           py::arg("sampling") = py::none(), py::arg("seconds") = py::none());
}

}  // namespace bitfuse

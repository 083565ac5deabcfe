// A decoder-only language model, as one step of it is computed: tokens in, logits out. What the binding makes
// of python/bitfuse/models/decoder_args.py.
#pragma once

#include <cstdint>

#include "common/kv_cache.h"
#include "common/lowbit_matrix.h"
#include "common/sampling.h"
#include "common/types.h"

namespace bitfuse {

// y = x W^T + b, with W in few bits or in floats.
struct Projection {
  int64_t n = 0, k = 0;             // out_features, in_features; n 0: there is none
  const LowBitMatrix* w = nullptr;  // null: dense
  const void* dense = nullptr;      // [n, k]
  Dtype dense_dtype = Dtype::kOther;
  const void* bias = nullptr;  // [n] of the model's dtype, or null
};

// x / rms(x) * (offset + weight).
struct RmsNorm {
  const void* weight = nullptr;  // [width]; null: there is none
  Dtype dtype = Dtype::kFloat32;
  int64_t width = 0;
  float eps = 0, offset = 0;
};

struct DecoderLayer {
  RmsNorm before_attention, of_queries, of_keys, after_attention, before_mlp, after_mlp;
  Projection qkv[3];  // or one, of all three
  Projection out;
  Projection gate_up[2];  // or one, of both
  Projection down;
  KvCache cache;  // contiguous, of the most sequences
  Rotary rotary;
  float scale = 0, softcap = 0;
  int64_t left = -1;             // of the window; negative: no bound
  const float* sinks = nullptr;  // [heads], or null
};

struct Decoder {
  Dtype dtype = Dtype::kFloat32;  // of activations, biases and logits
  Activation activation = Activation::kSilu;
  int64_t hidden = 0, heads = 0, kv_heads = 0, dim = 0, intermediate = 0, vocabulary = 0;
  const DecoderLayer* layers = nullptr;
  int64_t layer_count = 0;
  Projection embedding;       // a row a token; no bias
  float embedding_scale = 1;  // of its rows
  RmsNorm last;
  Projection head;
  float logit_softcap = 0;  // 0: none
};

// What a step spends its time on.
enum class Part : int { kLinear, kAttention, kNorm, kHead, kSampling, kCount };

struct DecoderStep {
  int64_t first = 0;                 // sequence of the cache
  int64_t batch = 0, tokens = 0;     // sequences from there on, and new tokens of each
  const int64_t* ids = nullptr;      // [batch, tokens]
  const int32_t* seqlens = nullptr;  // [batch]: tokens before
  void* logits = nullptr;            // [batch, vocabulary] after the last token; every: [batch, tokens, ..]
  bool every = false;
  const SampleArgs* sample = nullptr;  // what is drawn from the logits, or null
  double* seconds = nullptr;           // [Part::kCount], to which times are added; or null
  char* workspace = nullptr;           // 64-byte aligned, as large as is said
};

}  // namespace bitfuse

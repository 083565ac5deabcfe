// What C++, CUDA and Python call the kinds of things by. Python takes the enums from the extensions and has
// no numbers of its own.
#pragma once

#include <cstdint>

// Of a function that kernels use: the CPU's are compiled for several instruction sets, and of what is not
// inlined the linker keeps one copy for all.
#define BITFUSE_CONSTEXPR constexpr __attribute__((always_inline))

namespace bitfuse {

// Of a tensor's elements. Kernels compute in the first three; kOther is one that no kernel reads.
enum class Dtype : int {
  kFloat32,
  kFloat16,
  kBfloat16,
  kUint8,
  kInt8,
  kInt32,
  kInt64,
  kFloat64,
  kBool,
  kE4m3,  // torch.float8_e4m3fn
  kE8m0,  // torch.float8_e8m0fnu
  kOther,
};

BITFUSE_CONSTEXPR bool is_float(Dtype dtype) { return dtype <= Dtype::kBfloat16; }

// Bytes of an element; 0 of kOther.
BITFUSE_CONSTEXPR int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
    case Dtype::kInt32:
      return 4;
    case Dtype::kFloat16:
    case Dtype::kBfloat16:
      return 2;
    case Dtype::kInt64:
    case Dtype::kFloat64:
      return 8;
    case Dtype::kOther:
      return 0;
    default:
      return 1;
  }
}

// How a code of a few-bit matrix is read, a row a kind: KIND(name, Python's name, bits, whether it is a whole
// number, which can have a zero point or an offset). Others name a value of a table, or are FP8 without
// infinities (kE4m3).
#define BITFUSE_CODE_KINDS(KIND)        \
  KIND(kInt4, INT4, 4, true)            \
  KIND(kCodebook4, CODEBOOK4, 4, false) \
  KIND(kInt8, INT8, 8, true)            \
  KIND(kE4m3, E4M3, 8, false)           \
  KIND(kInt3, INT3, 3, true)            \
  KIND(kCodebook3, CODEBOOK3, 3, false) \
  KIND(kInt2, INT2, 2, true)            \
  KIND(kCodebook2, CODEBOOK2, 2, false)

#define BITFUSE_KIND(name, python, bits, whole) name,
enum class CodeKind : int { BITFUSE_CODE_KINDS(BITFUSE_KIND) };
#undef BITFUSE_KIND

struct CodeFacts {
  int bits;
  bool whole;
};
BITFUSE_CONSTEXPR CodeFacts facts_of(CodeKind kind) {
#define BITFUSE_KIND(name, python, bits, whole) {bits, whole},
  constexpr CodeFacts kFacts[] = {BITFUSE_CODE_KINDS(BITFUSE_KIND)};
#undef BITFUSE_KIND
  return kFacts[int(kind)];
}
BITFUSE_CONSTEXPR int bits_of(CodeKind kind) { return facts_of(kind).bits; }

// How a scale is read. kNested: levels[byte] * scale_scales[index / kNestedBlock] + scale_offset; kE8m0,
// kE4m3: floats of a byte, times one scale of the whole matrix where there is one.
enum class ScaleKind : int { kFloat32, kFloat16, kBfloat16, kNested, kE8m0, kE4m3 };

BITFUSE_CONSTEXPR int64_t size_of(ScaleKind kind) {
  return kind == ScaleKind::kFloat32 ? 4 : kind <= ScaleKind::kBfloat16 ? 2 : 1;
}

// In the order of ACTIVATIONS of python/bitfuse/core/activations.py; kGelu is by erf.
enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu };

}  // namespace bitfuse

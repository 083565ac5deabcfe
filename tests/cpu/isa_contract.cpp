// Each function of cpu/isa/contract.h against plain C++, at the level that this is compiled for. Prints the
// functions that it called, one to a line; what is wrong goes to stderr, and ends it with 1.
#include <sys/mman.h>
#include <unistd.h>

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "cpu/isa/contract.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

std::set<std::string> called;
int wrong = 0;

uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
bool same(float a, float b) { return std::isnan(a) ? std::isnan(b) : bits_of(a) == bits_of(b); }

void check(const char* name, bool right, double in, double got, double expected) {
  called.insert(name);
  if (!right && ++wrong <= 50)
    std::fprintf(stderr, "%s: of %.9g got %.9g, expected %.9g\n", name, in, got, expected);
}

// A vector as an array.
struct Floats {
  float at[kLanes];
  explicit Floats(Vf a) { store(at, a); }
  float operator[](int i) const { return at[i]; }
};
struct Dwords {
  uint32_t at[kLanes];
  explicit Dwords(Vi a) { store_dwords(at, a); }
  uint32_t operator[](int i) const { return at[i]; }
  uint16_t word(int i) const { return uint16_t(at[i / 2] >> (16 * (i % 2))); }
  uint8_t byte(int i) const { return uint8_t(at[i / 4] >> (8 * (i % 4))); }
};

uint32_t random_dword() {
  static uint64_t state = 0x853c49e6748fea9bull;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t(state >> 32);
}

// What is hard, then whatever bits come: whole vectors of them.
std::vector<float> numbers() {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  std::vector<float> all = {0,     1,     2.5f,    1e-45f,   1e-40f,  FLT_MIN, FLT_MAX, 65504,
                            65519, 65520, 65536,   3e38f,    6.1e-5f, 6.0e-8f, 2.9e-8f, 2.98023224e-8f,
                            1e-8f, 0.1f,  8388608, 3.39e38f, inf,     nan};
  for (int i = 0; i < 64; ++i) {
    all.push_back(1 + float(i) / 512);         // ties of bfloat16
    all.push_back(1 + float(i) / 4096);        // of float16
    all.push_back(float(i) * 1.49011612e-8f);  // of float16's subnormals
  }
  for (size_t i = 0, count = all.size(); i < count; ++i) all.push_back(-all[i]);
  while (all.size() < 4096) all.push_back(float_of(random_dword()));
  return all;
}

// f(a, b, c): each function of floats, on vectors of numbers that meet in many ways.
template <class F>
void on_numbers(F f) {
  static const std::vector<float> all = numbers();
  const size_t count = all.size();
  for (size_t i = 0; i + kLanes <= count; i += kLanes)
    for (size_t turn = 0; turn < 8; ++turn) {
      float a[kLanes], b[kLanes], c[kLanes];
      for (size_t j = 0; j < kLanes; ++j) {
        a[j] = all[i + j];
        b[j] = all[(i + j + turn * 977) % count];
        c[j] = all[(i + j + turn * 313 + 11) % count];
      }
      f(a, b, c);
    }
}
template <class F>
void on_dwords(F f) {
  for (int i = 0; i < 2000; ++i) {
    uint32_t a[kLanes], b[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      a[j] = random_dword();
      b[j] = i % 3 ? random_dword() : a[j] + uint32_t(i % 2);
    }
    f(a, b);
  }
}

// got = f(a, b) lane by lane is want(a, b).
template <class Got, class Want>
void lanes(const char* name, Got got, Want want) {
  on_numbers([&](const float* a, const float* b, const float*) {
    const Floats g(got(load(a), load(b)));
    for (int i = 0; i < kLanes; ++i) {
      const float w = want(a[i], b[i]);
      check(name, same(g[i], w), a[i], g[i], w);
    }
  });
}
template <class Got, class Want>
void dword_lanes(const char* name, Got got, Want want) {
  on_dwords([&](const uint32_t* a, const uint32_t* b) {
    const Dwords g(got(load_dwords(a), load_dwords(b)));
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t w = want(a[i], b[i]);
      check(name, g[i] == w, a[i], g[i], w);
    }
  });
}

void check_floats() {
  lanes("load", [](Vf a, Vf) { return a; }, [](float a, float) { return a; });
  called.insert("store");
  lanes("zero", [](Vf, Vf) { return zero(); }, [](float, float) { return 0.0f; });
  lanes("add", [](Vf a, Vf b) { return add(a, b); }, [](float a, float b) { return a + b; });
  lanes("sub", [](Vf a, Vf b) { return sub(a, b); }, [](float a, float b) { return a - b; });
  lanes("mul", [](Vf a, Vf b) { return mul(a, b); }, [](float a, float b) { return a * b; });
  lanes("div", [](Vf a, Vf b) { return div(a, b); }, [](float a, float b) { return a / b; });
  lanes("square_root", [](Vf a, Vf) { return square_root(a); }, [](float a, float) { return std::sqrt(a); });
  lanes("minimum", [](Vf a, Vf b) { return minimum(a, b); }, [](float a, float b) { return a < b ? a : b; });
  lanes("maximum", [](Vf a, Vf b) { return maximum(a, b); }, [](float a, float b) { return a > b ? a : b; });
  lanes("absolute", [](Vf a, Vf) { return absolute(a); }, [](float a, float) { return std::fabs(a); });
  lanes(
      "by_sign", [](Vf a, Vf b) { return by_sign(a, b, set1(3)); },
      [](float a, float b) { return std::signbit(a) ? 3 : b; });
  on_numbers([](const float* a, const float* b, const float* c) {
    const Floats fused(fma(load(a), load(b), load(c))), each(set1(a[1]));
    const Floats halves(set_halves(a[0], b[0]));
    for (int i = 0; i < kLanes; ++i) {
      const float once = std::fma(a[i], b[i], c[i]);
      volatile float product = a[i] * b[i];
      check("fma", same(fused[i], once) || same(fused[i], product + c[i]), a[i], fused[i], once);
      check("set1", same(each[i], a[1]), a[1], each[i], a[1]);
      const float half = i < 8 ? a[0] : b[0];
      check("set_halves", same(halves[i], half), i, halves[i], half);
    }
    float halved[kLanes], top = -INFINITY;
    bool finite = true;
    for (int i = 0; i < kLanes; ++i) {
      halved[i] = a[i], finite &= std::isfinite(a[i] * kLanes);
      if (a[i] > top) top = a[i];
    }
    if (!finite) return;
    for (int width = kLanes / 2; width; width /= 2)
      for (int i = 0; i < width; ++i) halved[i] += halved[i + width];
    check("sum", same(sum(load(a)), halved[0]), a[0], sum(load(a)), halved[0]);
    check("largest_lane", largest_lane(load(a)) == top, a[0], largest_lane(load(a)), top);
  });
  for (int n = -400; n <= 400; ++n)
    for (float p : {0.5f, 0.70710677f, 1.0f, 1.3333334f, 1.9999999f}) {
      const float far[] = {float(n), float(n) * 10000};
      for (float power : far) {
        const float got = Floats(scale_by_power(set1(p), set1(power)))[kLanes - 1];
        const float expected = std::scalbn(p, int(power));
        check("scale_by_power", same(got, expected), power, got, expected);
      }
    }
  on_dwords([](const uint32_t* a, const uint32_t* b) {
    float values[kLanes], numbers[16];
    int32_t index[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = float(a[i]), index[i] = int32_t(b[i] % kLanes);
    for (int i = 0; i < 16; ++i) numbers[i] = float(a[0] >> i);
    const Floats moved(permute(load(values), load_dwords(index)));
    Table16 table(numbers);
    const Floats found(table[load_dwords(b)]);
    table.subtract(7.5f);
    const Floats less(table[load_dwords(b)]);
    Vf rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = load_bfloat(reinterpret_cast<const uint16_t*>(a) + i % 2);
    float small[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < kLanes; ++j) small[i][j] = float(int(a[(i + j) % kLanes] % 2048) - 1024);
      rows[i] = load(small[i]);
    }
    const Floats sums(lane_sums(rows));
    for (int i = 0; i < kLanes; ++i) {
      check("permute", moved[i] == values[index[i]], index[i], moved[i], values[index[i]]);
      const float v = numbers[b[i] & 15];
      check("Table16", found[i] == v, b[i], found[i], v);
      check("Table16", less[i] == v - 7.5f, b[i], less[i], v - 7.5f);
      float total = 0;
      for (float x : small[i]) total += x;
      check("lane_sums", sums[i] == total, i, sums[i], total);
    }
  });
}

template <int Bits>
void check_shifts() {
  dword_lanes(
      "shift_left", [](Vi a, Vi) { return shift_left<Bits>(a); },
      [](uint32_t a, uint32_t) { return a << Bits; });
  dword_lanes(
      "shift_right", [](Vi a, Vi) { return shift_right<Bits>(a); },
      [](uint32_t a, uint32_t) { return a >> Bits; });
}

void check_dwords() {
  dword_lanes("load_dwords", [](Vi a, Vi) { return a; }, [](uint32_t a, uint32_t) { return a; });
  called.insert("store_dwords");
  dword_lanes(
      "set1_dwords", [](Vi, Vi) { return set1_dwords(0xdeadbeef); },
      [](uint32_t, uint32_t) { return 0xdeadbeef; });
  dword_lanes(
      "add_dwords", [](Vi a, Vi b) { return add_dwords(a, b); },
      [](uint32_t a, uint32_t b) { return a + b; });
  dword_lanes(
      "mul_dwords", [](Vi a, Vi b) { return mul_dwords(a, b); },
      [](uint32_t a, uint32_t b) { return a * b; });
  dword_lanes(
      "and_dwords", [](Vi a, Vi b) { return and_dwords(a, b); },
      [](uint32_t a, uint32_t b) { return a & b; });
  dword_lanes(
      "xor_dwords", [](Vi a, Vi b) { return xor_dwords(a, b); },
      [](uint32_t a, uint32_t b) { return a ^ b; });
  dword_lanes(
      "as_float", [](Vi a, Vi) { return as_dwords(as_float(a)); }, [](uint32_t a, uint32_t) { return a; });
  called.insert("as_dwords");
  dword_lanes(
      "where_at_least",
      [](Vi a, Vi b) { return as_dwords(where_at_least(a, b, as_float(set1_dwords(0x40490fdb)))); },
      [](uint32_t a, uint32_t b) { return a >= b ? 0x40490fdb : 0; });
  check_shifts<0>(), check_shifts<1>(), check_shifts<4>(), check_shifts<12>(), check_shifts<15>();
  check_shifts<16>(), check_shifts<23>(), check_shifts<28>(), check_shifts<31>();
  const Dwords numbered(lane_numbers());
  for (int i = 0; i < kLanes; ++i) check("lane_numbers", int(numbered[i]) == i, i, numbered[i], i);
  on_dwords([](const uint32_t* a, const uint32_t* b) {
    Vi square[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = xor_dwords(load_dwords(a), set1_dwords(b[i]));
    transpose(square);
    for (int i = 0; i < kLanes; ++i) {
      const Dwords row(square[i]);
      for (int j = 0; j < kLanes; ++j) check("transpose", row[j] == (a[i] ^ b[j]), i, row[j], a[i] ^ b[j]);
    }
  });
}

// The end of a page behind which nothing may be read.
char* edge() {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  static char* const pages =
      static_cast<char*>(mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(pages + page, page, PROT_NONE);
  return pages + page;
}

double half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  double v = exponent == 31  ? (mantissa ? NAN : INFINITY)
             : exponent == 0 ? std::ldexp(mantissa, -24)
                             : std::ldexp(1024 + mantissa, exponent - 25);
  return h & 0x8000 ? -v : v;
}

// f with `digits` bits after its first and no exponent below `lowest`; from 2^`above` on infinity.
double rounded(float f, int digits, int lowest, int above) {
  if (!std::isfinite(f) || f == 0) return f;
  const int last = std::max(std::ilogb(f), lowest) - digits;
  const double v = std::ldexp(std::nearbyint(std::ldexp(double(f), -last)), last);
  return std::fabs(v) >= std::ldexp(1.0, above) ? std::copysign(INFINITY, v) : v;
}

void check_sixteen_bits() {
  uint16_t words[kLanes];
  for (int first = 0; first < 65536; first += kLanes) {
    for (int i = 0; i < kLanes; ++i) words[i] = uint16_t(first + i);
    const Floats halves(load_half(words)), bfloats(load_bfloat(words));
    for (int i = 0; i < kLanes; ++i) {
      const float half = float(half_value(words[i])), bfloat = float_of(uint32_t(words[i]) << 16);
      check("half_to_float", same(half_to_float(words[i]), half), words[i], half_to_float(words[i]), half);
      check("load_half", same(halves[i], half), words[i], halves[i], half);
      check("bfloat_to_float", same(bfloat_to_float(words[i]), bfloat), words[i], bfloat_to_float(words[i]),
            bfloat);
      check("load_bfloat", same(bfloats[i], bfloat), words[i], bfloats[i], bfloat);
    }
  }
  on_numbers([&](const float* a, const float*, const float*) {
    uint16_t half[kLanes], bfloat[kLanes];
    store_half(half, load(a)), store_bfloat(bfloat, load(a));
    for (int i = 0; i < kLanes; ++i) {
      float got = float(half_value(half[i])), expected = float(rounded(a[i], 10, -14, 16));
      check("store_half", same(got, expected), a[i], got, expected);
      got = float_of(uint32_t(bfloat[i]) << 16), expected = float(rounded(a[i], 7, -126, 128));
      check("store_bfloat", same(got, expected), a[i], got, expected);
    }
  });
  char* const end = edge();
  for (int count = 0; count < kLanes; ++count) {
    auto* floats = reinterpret_cast<float*>(end) - count;
    auto* sixteen = reinterpret_cast<uint16_t*>(end) - count;
    for (int i = 0; i < count; ++i) floats[i] = float(i) + 1;
    const Floats first(load_first(floats, count));
    for (int i = 0; i < count; ++i) sixteen[i] = uint16_t(0x3c00 + i);
    const Floats halves(load_half_first(sixteen, count)), bfloats(load_bfloat_first(sixteen, count));
    for (int i = 0; i < kLanes; ++i) {
      const bool there = i < count;
      check("load_first", first[i] == (there ? float(i) + 1 : 0), i, first[i], i + 1);
      const float half = there ? float(half_value(uint16_t(0x3c00 + i))) : 0;
      check("load_half_first", same(halves[i], half), i, halves[i], half);
      const float bfloat = there ? float_of(uint32_t(0x3c00 + i) << 16) : 0;
      check("load_bfloat_first", same(bfloats[i], bfloat), i, bfloats[i], bfloat);
    }
  }
  for (int count = 0; count < 4 * kLanes; ++count) {
    for (int i = 0; i < count; ++i) end[i - count] = char(i + 1);
    const Dwords got(load_bytes(end - count, count));
    for (int i = 0; i < 4 * kLanes; ++i) {
      const int expected = i < count ? i + 1 : 0;
      check("load_bytes", got.byte(i) == expected, i, got.byte(i), expected);
    }
  }
}

float e4m3_value(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double v = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return float(code & 0x80 ? -v : v);
}
bool e4m3_nan(uint8_t code) { return (code & 0x7f) == 0x7f; }

template <int J>
void check_byte(const uint32_t* a) {
  const Vi codes = load_dwords(a);
  const Dwords dwords(codes);
  const Floats less(byte_less<J>(codes, set1(37))), each(byte_e4m3<J>(codes)), any(bytes_e4m3<J>(codes));
  for (int i = 0; i < kLanes; ++i) {
    const uint8_t code = dwords.byte(4 * i + J), other = dwords.byte(J % 2 + 2 * i + J / 2 * 2 * kLanes);
    check("byte_less", less[i] == float(code) - 37, code, less[i], float(code) - 37);
    const float number = e4m3_value(code), part = e4m3_value(other) / kE4m3Unit;
    if (e4m3_nan(code)) {
      check("byte_e4m3", std::signbit(each[i]) == (code > 127), code, each[i], number);
    } else {
      check("byte_e4m3", same(each[i], number), code, each[i], number);
    }
    if (!e4m3_nan(other)) check("bytes_e4m3", same(any[i], part), other, any[i], part);
  }
}

// Codes of `Bytes` bits, eight to a chunk.
template <int Bytes>
void check_halves() {
  auto* p = reinterpret_cast<uint8_t*>(edge()) - kLanes * Bytes;
  for (int i = 0; i < kLanes * Bytes; ++i) p[i] = uint8_t(i * 89 + 41);
  const Dwords got(load_halves<Bytes>(p));
  for (int i = 0; i < kLanes * 8; ++i) {
    uint32_t wanted = 0;
    for (int bit = 0; bit < Bytes; ++bit) {
      const int at = i * Bytes + bit;
      wanted |= uint32_t(p[at / 8] >> at % 8 & 1) << bit;
    }
    const uint32_t code = got.word(i / 4) >> i % 4 * Bytes & ((1u << Bytes) - 1);
    check("load_halves", code == wanted, i, code, wanted);
  }
}

void check_codes() {
  check_halves<2>(), check_halves<3>();
  on_dwords([](const uint32_t* a, const uint32_t* b) {
    check_byte<0>(a), check_byte<1>(a), check_byte<2>(a), check_byte<3>(a);
    uint32_t few[kLanes];  // NaN codes are rare among these
    for (int i = 0; i < kLanes; ++i) few[i] = b[i] % 7 ? a[i] & 0xbfbfbfbf : a[i] | 0x7f << b[i] % 4 * 8;
    const Vi codes = load_dwords(few);
    const Dwords dwords(codes);
    const Floats nans(nan_lanes(codes));
    bool some = false;
    for (int i = 0; i < kLanes; ++i) {
      bool nan = false;
      for (int j = 0; j < 4; ++j) nan |= e4m3_nan(dwords.byte(4 * i + j));
      some |= nan;
      check("nan_lanes", nan ? std::isnan(nans[i]) : same(nans[i], 0), few[i], nans[i], nan);
    }
    check("any_nan", any_nan(codes) == some, few[0], any_nan(codes), some);
    const auto* bytes = reinterpret_cast<const uint8_t*>(a);
    const Dwords nibbles(spread_nibbles(bytes)), spread(spread_bytes(bytes));
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t nibble = bytes[i / 2] >> 4 * (i % 2) & 15;
      check("spread_nibbles", (nibbles[i] & 15) == nibble, i, nibbles[i], nibble);
      check("spread_bytes", spread[i] == bytes[i], i, spread[i], bytes[i]);
    }
  });
}

#if BITFUSE_PAIRS

template <int Byte>
void check_pair(const uint32_t* a) {
  const Dwords pairs(E4m3Pairs().pair<Byte>(load_dwords(a)));
  for (int i = 0; i < 2 * kLanes; ++i) {
    const auto code = uint8_t(a[i / 2] >> (8 * (Byte + i % 2 * 2)));
    const float got = float_of(uint32_t(pairs.word(i)) << 16), number = e4m3_value(code);
    if (!e4m3_nan(code)) check("E4m3Pairs", same(got, number), code, got, number);
  }
}

void check_pairs() {
  dword_lanes(
      "or_dwords", [](Vi a, Vi b) { return or_dwords(a, b); }, [](uint32_t a, uint32_t b) { return a | b; });
  dword_lanes(
      "set1_words", [](Vi, Vi) { return set1_words(0x8123); }, [](uint32_t, uint32_t) { return 0x81238123; });
  dword_lanes(
      "sub_words", [](Vi a, Vi b) { return sub_words(a, b); },
      [](uint32_t a, uint32_t b) {
        return uint32_t(uint16_t((a >> 16) - (b >> 16))) << 16 | uint16_t(a - b);
      });
  dword_lanes(
      "shift_right_words", [](Vi a, Vi) { return shift_right_words<5>(a); },
      [](uint32_t a, uint32_t) { return (a >> 21) << 16 | (a & 0xffff) >> 5; });
  dword_lanes(
      "to_floats", [](Vi a, Vi) { return as_dwords(to_floats(a)); },
      [](uint32_t a, uint32_t) { return bits_of(float(int32_t(a))); });
  dword_lanes(
      "dot_words", [](Vi a, Vi b) { return dot_words(xor_dwords(a, b), a, b); },
      [](uint32_t a, uint32_t b) {
        auto product = [](uint32_t x, uint32_t y) { return int64_t(int16_t(x)) * int16_t(y); };
        return uint32_t(int64_t(a ^ b) + product(a, b) + product(a >> 16, b >> 16));
      });
  on_numbers([](const float* a, const float* b, const float*) {
    float whole[kLanes], other[kLanes], first[kLanes], second[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      auto near = [](float x) { return std::isfinite(x) ? std::fmod(x, 32767.0f) : 0.5f; };
      whole[i] = near(a[i]), other[i] = near(b[i]);
      auto short_of = [](float x) { return std::isnan(x) ? 1.0f : float_of(bits_of(x) & 0xffff0000); };
      first[i] = short_of(a[i]), second[i] = short_of(b[i]);
    }
    const Floats larger(larger_magnitude(load(whole), load(other)));
    const Dwords nearest(to_nearest(load(whole))), words(words_to_nearest(load(whole), load(other)));
    const Floats less(less_nearest(load(whole)));
    const Dwords exact(pair_of_exact(load(first), load(second)));
    const Dwords pairs(pair_of_rounded(load(a), load(b))), bfloats(bfloats_of(load(a), load(b)));
    const Floats low(interleave_low(load(a), load(b))), high(interleave_high(load(a), load(b)));
    for (int i = 0; i < kLanes; ++i) {
      const float top = std::fmax(std::fabs(whole[i]), std::fabs(other[i]));
      check("larger_magnitude", same(larger[i], top), whole[i], larger[i], top);
      const float near = std::nearbyint(whole[i]);
      check("to_nearest", int32_t(nearest[i]) == int(near), whole[i], int32_t(nearest[i]), near);
      check("less_nearest", less[i] == whole[i] - near, whole[i], less[i], whole[i] - near);
      check("words_to_nearest", int16_t(words.word(i)) == int(near), whole[i], int16_t(words.word(i)), near);
      const float after = std::nearbyint(other[i]);
      check("words_to_nearest", int16_t(words.word(kLanes + i)) == int(after), other[i],
            int16_t(words.word(kLanes + i)), after);
      const uint32_t both = bits_of(first[i]) >> 16 | bits_of(second[i]);
      check("pair_of_exact", exact[i] == both, first[i], exact[i], both);
      for (int half = 0; half < 2; ++half) {
        const float x = half ? b[i] : a[i];
        // the instruction takes subnormals for 0
        const float want = std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : float(rounded(x, 7, -126, 128));
        float got = float_of(uint32_t(pairs.word(2 * i + half)) << 16);
        check("pair_of_rounded", same(got, want), x, got, want);
        got = float_of(uint32_t(bfloats.word(half * kLanes + i)) << 16);
        check("bfloats_of", same(got, want), x, got, want);
      }
      const float in_low = (i % 2 ? b : a)[i / 2], in_high = (i % 2 ? b : a)[kLanes / 2 + i / 2];
      check("interleave_low", same(low[i], in_low), i, low[i], in_low);
      check("interleave_high", same(high[i], in_high), i, high[i], in_high);
    }
  });
  on_dwords([](const uint32_t* a, const uint32_t* b) {
    check_pair<0>(a), check_pair<1>(a);
    float small[4][kLanes], whole[kLanes], groups[16 * kLanes];
    uint32_t pairs[2][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < 4; ++j) small[j][i] = float(int(a[i] >> 8 * j & 255) - 128);
      for (int j = 0; j < 2; ++j) pairs[j][i] = bits_of(small[2 * j][i]) >> 16 | bits_of(small[2 * j + 1][i]);
      whole[i] = float(b[i] % 32768);
    }
    pairs[0][0] = 0x00010001;  // subnormals
    for (int i = 0; i < 16 * kLanes; ++i) groups[i] = float(int32_t(a[i % kLanes] * uint32_t(2 * i + 1)));
    const Floats dots(dot_pairs(load(whole), load_dwords(pairs[0]), load_dwords(pairs[1])));
    const Dwords both(in_both_words(load(whole)));
    Vi square[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = xor_dwords(load_dwords(a), set1_dwords(b[i]));
    const Dwords sums(lane_sums(square)), half(set_high_half(load_dwords(a), b[0]));
    const Floats picked(permute(load(small[0]), load(small[1]), load_dwords(b)));
    const Vi x = load_dwords(a), y = load_dwords(b);
    const Dwords ax(x), moved(permute_words(x, y)), even(even_words(x, y)), odd(odd_words(x, y));
    for (int i = 0; i < kLanes; ++i) {
      const float dot = whole[i] + (i ? small[0][i] * small[2][i] + small[1][i] * small[3][i] : 0);
      check("dot_pairs", dots[i] == dot, i, dots[i], dot);
      const auto word = uint32_t(whole[i]);
      check("in_both_words", both[i] == (word << 16 | word), whole[i], both[i], word);
      uint32_t total = 0;
      for (int j = 0; j < kLanes; ++j) total += a[j] ^ b[i];
      check("lane_sums", sums[i] == total, i, sums[i], total);
      const uint32_t set = i < kLanes / 2 ? a[i] : b[0];
      check("set_high_half", half[i] == set, i, half[i], set);
      const float from = small[b[i] / kLanes % 2][b[i] % kLanes];
      check("permute", picked[i] == from, b[i], picked[i], from);
    }
    const uint16_t* words[2] = {reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint16_t*>(b)};
    for (int i = 0; i < 2 * kLanes; ++i) {
      const uint16_t to = ax.word(words[1][i] % 32), e = words[i / 16][2 * i % 32];
      const uint16_t o = words[i / 16][2 * i % 32 + 1];
      check("permute_words", moved.word(i) == to, i, moved.word(i), to);
      check("even_words", even.word(i) == e, i, even.word(i), e);
      check("odd_words", odd.word(i) == o, i, odd.word(i), o);
    }
    for (int size = 1; size <= 16; size *= 2) {
      const Floats maxima(group_maxima(groups, size));
      for (int i = 0; i < kLanes; ++i) {
        float top = groups[i * size];
        for (int j = 1; j < size; ++j) top = std::fmax(top, groups[i * size + j]);
        check("group_maxima", maxima[i] == top, i, maxima[i], top);
      }
    }
  });
  char* const end = edge();
  auto* at = reinterpret_cast<uint8_t*>(end) - 32;
  for (int i = 0; i < 32; ++i) at[i] = uint8_t(200 + i);
  const Dwords words(spread_bytes_to_words(at));
  for (int i = 0; i < 32; ++i)
    check("spread_bytes_to_words", words.word(i) == at[i], i, words.word(i), at[i]);
  for (int count = 0; count < 32; ++count) {
    const uint8_t* p = at + 32 - count;
    const Dwords some(spread_bytes_to_words_first(p, count));
    const Dwords mixed(load_interleaved_words(p, p, uint32_t((uint64_t(1) << count) - 1)));
    for (int i = 0; i < 32; ++i) {
      const int expected = i < count ? p[i] : 0;
      check("spread_bytes_to_words_first", some.word(i) == expected, i, some.word(i), expected);
      const uint8_t byte = mixed.byte(4 * (i / 2) + i % 2), copy = mixed.byte(4 * (i / 2) + i % 2 + 2);
      check("load_interleaved_words", byte == expected && copy == expected, i, byte, expected);
    }
  }
  uint16_t first[16], second[16];
  for (int i = 0; i < 16; ++i) first[i] = uint16_t(i * 257), second[i] = uint16_t(60000 - i);
  const Dwords mixed(load_interleaved_words(first, second, 0xffffffff));
  for (int i = 0; i < 16; ++i) {
    const uint32_t expected = uint32_t(second[i]) << 16 | first[i];
    check("load_interleaved_words", mixed[i] == expected, i, mixed[i], expected);
  }
}

#endif

int run() {
  check_floats();
  check_dwords();
  check_sixteen_bits();
  check_codes();
#if BITFUSE_PAIRS
  check_pairs();
#endif
  for (const std::string& name : called) std::printf("%s\n", name.c_str());
  if (wrong) std::fprintf(stderr, "%d wrong\n", wrong);
  return wrong ? 1 : 0;
}

}  // namespace
}  // namespace bitfuse::BITFUSE_ISA

int main() { return bitfuse::BITFUSE_ISA::run(); }

// wgmma: each warp computes its 16 rows when the instruction is issued, but neither its operands nor its
// result are the program's again before the wait:
//  - at the wait the reads of shared memory are checked once more, so a write that another warp made in
//    between without a barrier is found;
//  - the registers of the result are marked until then, and an instruction that reads one is a fault.
#include <algorithm>
#include <cstdio>

#include "tensor_core.hpp"

namespace cusim {
namespace {

void commit(Warp& w, const Instr&, uint32_t) {
  w.wgmma_groups.push_back(std::move(w.wgmma_open));
  w.wgmma_open.clear();
  ++w.wgmma_committed;
}
void wait(Warp& w, const Instr& i, uint32_t) {
  size_t keep = w.row(i.ops[0])[0];
  while (w.wgmma_groups.size() > keep) {
    for (uint32_t word : w.wgmma_groups.front())
      shared_at(w, 0, kSharedBase + word * 4, 4, Access::AsyncRead);
    w.wgmma_groups.pop_front();
  }
  w.wgmma_done = w.wgmma_committed - uint32_t(w.wgmma_groups.size());
  // a group not yet committed keeps its registers
  w.wgmma_any =
      std::any_of(w.in_flight.begin(), w.in_flight.end(), [&](uint32_t g) { return g > w.wgmma_done; });
}

// A matrix in shared memory, as its descriptor says.
struct Descriptor {
  uint32_t start, lbo, sbo;
  int mode, width;  // width: bytes of one swizzled row
  explicit Descriptor(uint64_t d)
      : start((d & 0x3fff) << 4),
        lbo((d >> 16 & 0x3fff) << 4),
        sbo((d >> 32 & 0x3fff) << 4),
        mode(int(d >> 62)) {
    width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
  }
  // mn: along M or N; k: both in elements of es bytes. The 16 bytes from here on are consecutive elements
  // along the major dimension.
  uint32_t at(int mn, int k, int es, bool mn_major) const {
    uint32_t at;
    if (!mn_major) {
      uint32_t kb = k * es;
      at = mode == 0 ? start + mn / 8 * sbo + kb / 16 * lbo + mn % 8 * 16 + kb % 16
                     : start + mn / 8 * sbo + mn % 8 * width + kb;
    } else {
      int per = width / es;  // elements of M or N in a row
      at = mode == 0 ? start + mn / per * sbo + k / 8 * lbo + k % 8 * 16 + mn % per * es
                     : start + mn / per * lbo + k / 8 * sbo + k % 8 * width + mn % per * es;
    }
    switch (mode) {
      case 1:
        return at ^ (at >> 3 & 0x70);
      case 2:
        return at ^ (at >> 3 & 0x30);
      case 3:
        return at ^ (at >> 3 & 0x10);
      default:
        return at;
    }
  }
};
// Puts element (mn, k) of a matrix at out[mn * mn_step + k * k_step], 16 bytes at a time.
template <Elem E, class T>
void fetch(Warp& w, uint64_t descriptor, int mn0, int mns, int ks, bool mn_major, T* out, int mn_step,
           int k_step) {
  constexpr int es = elem_bits(E) / 8, chunk = 16 / es;
  Descriptor d(descriptor);
  bool watch = w.block->launch->settings.racecheck;
  for (int mn = 0; mn < mns; mn += mn_major ? chunk : 1)
    for (int k = 0; k < ks; k += mn_major ? 1 : chunk) {
      uint32_t at = d.at(mn0 + mn, k, es, mn_major);
      T part[chunk];
      elements<E>(shared_at(w, 0, at, 16, Access::AsyncRead), chunk, part);
      if (watch)
        for (int word = 0; word < 4; ++word) w.wgmma_open.push_back((at - kSharedBase) / 4 + word);
      for (int e = 0; e < chunk; ++e)
        out[mn_major ? (mn + e) * mn_step + k * k_step : mn * mn_step + (k + e) * k_step] = part[e];
    }
}

// aux: N | K << 16. ops: d..., a (descriptor or 4 registers), b descriptor, scale-d [, scale-a, scale-b
// [, trans-a], trans-b]
template <Elem EA, Elem EB, Acc A>
void wgmma(Warp& w, const Instr& i, uint32_t) {
  using T = Sum<A>;
  constexpr bool integer = A == Acc::S32, transposable = EA == Elem::F16 || EA == Elem::BF16;
  constexpr int per = elem_per_register(EA);
  int N = int(i.aux & 0xffff), K = int(i.aux >> 16), nd = i.destinations;
  int rest = int(i.ops.size()) - nd, scales = integer ? 0 : 2;
  bool a_registers = rest == 6 + scales + (transposable ? 1 : 0);
  if (!a_registers && rest != 3 + scales + (transposable ? 2 : 0))
    fault(w, 0, "wgmma with an unexpected number of operands");
  size_t o = nd + (a_registers ? 4 : 1);
  auto immediate = [&](size_t at) { return int32_t(w.row(i.ops[at])[0]); };
  bool scale_d = truth(w, i.ops[o + 1], 0), trans_a = false, trans_b = false;
  T sign = 1;
  if (!integer) sign = T(immediate(o + 2) * immediate(o + 3));
  if (transposable) {
    trans_a = !a_registers && immediate(o + 4);
    trans_b = immediate(o + (a_registers ? 4 : 5));
  }
  T a[16 * 32];
  static thread_local T b[32][32][8];  // eight columns at a time
  if (a_registers) {
    for (int r = 0; r < 4; ++r) {
      T part[kLanes * per];
      fragment<EA>(w.row(i.ops[nd + r]), part);
      for (int row = 0; row < 8; ++row)
        memcpy(a + (row + 8 * (r & 1)) * K + (r >> 1) * 4 * per, part + row * 4 * per, 4 * per * sizeof(T));
    }
  } else {
    fetch<EA>(w, w.row(i.ops[nd])[0], w.id % 4 * 16, 16, K, trans_a, a, K, 1);
  }
  uint64_t b_descriptor = w.row(i.ops[o])[0];
  static thread_local T plain[256 * 32];
  fetch<EB>(w, b_descriptor, 0, N, K, trans_b, plain, K, 1);
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < K; ++k) b[n / 8][k][n % 8] = plain[n * K + k];

  constexpr int registers = A == Acc::F16 ? 2 : 4;  // of 8 columns
  for (int block = 0; block < N / 8; ++block) {
    uint64_t* regs[4];
    const uint64_t* from[4];
    for (int r = 0; r < registers; ++r) from[r] = regs[r] = w.row(i.ops[block * registers + r]);
    T product[16][8] = {}, sum[16][8] = {};
    multiply_add<T>(product, a, K, b[block], 16, K);
    if (scale_d) load_accumulator<A>(from, 16, sum);
    for (int r = 0; r < 16; ++r)
      for (int n = 0; n < 8; ++n) sum[r][n] += product[r][n] * sign;
    store_accumulator<A>(regs, 16, sum, i.aux2);
  }
  if (w.in_flight.empty()) w.in_flight.resize(w.kernel->registers);
  for (int r = 0; r < nd; ++r) w.in_flight[i.ops[r].index] = w.wgmma_committed + 1;
  w.wgmma_any = true;
}
template <Elem EA, Elem EB>
Execute wgmma_into(const std::string& acc) {
  if constexpr (elem_is_integer(EA)) {
    if (acc == "s32") return wgmma<EA, EB, Acc::S32>;
  } else {
    if (acc == "f32") return wgmma<EA, EB, Acc::F32>;
    if constexpr (EA != Elem::BF16 && EA != Elem::TF32)
      if (acc == "f16") return wgmma<EA, EB, Acc::F16>;
  }
  return nullptr;
}
Execute wgmma_for(Elem a, Elem b, const std::string& acc) {
  switch (a) {
    case Elem::F16:
      return b == a ? wgmma_into<Elem::F16, Elem::F16>(acc) : nullptr;
    case Elem::BF16:
      return b == a ? wgmma_into<Elem::BF16, Elem::BF16>(acc) : nullptr;
    case Elem::TF32:
      return b == a ? wgmma_into<Elem::TF32, Elem::TF32>(acc) : nullptr;
    case Elem::S8:
      return b == Elem::S8   ? wgmma_into<Elem::S8, Elem::S8>(acc)
             : b == Elem::U8 ? wgmma_into<Elem::S8, Elem::U8>(acc)
                             : nullptr;
    case Elem::U8:
      return b == Elem::S8   ? wgmma_into<Elem::U8, Elem::S8>(acc)
             : b == Elem::U8 ? wgmma_into<Elem::U8, Elem::U8>(acc)
                             : nullptr;
    case Elem::E4M3:
      return b == Elem::E4M3   ? wgmma_into<Elem::E4M3, Elem::E4M3>(acc)
             : b == Elem::E5M2 ? wgmma_into<Elem::E4M3, Elem::E5M2>(acc)
                               : nullptr;
    case Elem::E5M2:
      return b == Elem::E4M3   ? wgmma_into<Elem::E5M2, Elem::E4M3>(acc)
             : b == Elem::E5M2 ? wgmma_into<Elem::E5M2, Elem::E5M2>(acc)
                               : nullptr;
    default:
      return nullptr;
  }
}
void decode_wgmma(Instr& i, const Opcode& o) {
  i.flow = Flow::Collective;
  i.destinations = 0;
  if (!o.has("mma_async")) {
    i.fn = o.has("commit_group") ? commit : o.has("wait_group") ? wait : nop;
    return;
  }
  int M = 0, N = 0, K = 0;
  std::vector<std::string> types;
  for (auto& m : o.mods) {
    if (sscanf(m.c_str(), "m%dn%dk%d", &M, &N, &K) == 3) continue;
    if (m == "mma_async" || m == "sync" || m == "aligned" || m == "satfinite") continue;
    types.push_back(m);
  }
  if (M != 64 || N % 8 || N > 256 || types.size() != 3) unsupported(o);
  i.fn = required(wgmma_for(elem_of(types[1], o), elem_of(types[2], o), types[0]), o);
  i.aux = N | K << 16;
  i.aux2 = o.has("satfinite");
  i.destinations = types[0] == "f16" ? N / 4 : N / 2;
  i.accumulates = true;
}

}  // namespace

void add_wgmma(DecoderTable& t) { t["wgmma"] = decode_wgmma; }

}  // namespace cusim

// ldmatrix, stmatrix, movmatrix and mma.sync, with fragments as the PTX manual lays them out.
#include "tensor_core.hpp"

#include <cstdio>

namespace cusim {

Elem elem_of(const std::string& name, const Opcode& op) {
  static const std::unordered_map<std::string, Elem> elems = {
      {"f16", Elem::F16},   {"bf16", Elem::BF16}, {"tf32", Elem::TF32}, {"f64", Elem::F64},
      {"s8", Elem::S8},     {"u8", Elem::U8},     {"s4", Elem::S4},     {"u4", Elem::U4},
      {"e4m3", Elem::E4M3}, {"e5m2", Elem::E5M2}};
  auto it = elems.find(name);
  if (it == elems.end()) unsupported(op);
  return it->second;
}

namespace {

// ---- 8 x 8 matrices of 16-bit elements; aux: how many; aux2: transposed ----
struct Matrices {
  uint16_t at[4][8][8];
};
// Row r of matrix k lies where lane 8k + r says.
void row_addresses(Warp& w, const Instr& i, const uint64_t* base, uint64_t* at) {
  int n = int(i.aux);
  for (int l = 0; l < 8 * n; ++l) {
    at[l] = (base[l] + i.imm) & ~kSharedTag;
    if (at[l] % 16) fault(w, l, "misaligned " + std::string(i.name) + " row");
  }
  if (w.block->launch->settings.count)
    count_access(w, Space::Shared, n == 4 ? kAllLanes : (1u << (8 * n)) - 1, at, 16);
}
void ldmatrix(Warp& w, const Instr& i, uint32_t m) {
  uint64_t at[kLanes];
  Matrices t;
  int n = int(i.aux);
  row_addresses(w, i, w.row(i.ops[n]), at);
  for (int l = 0; l < 8 * n; ++l) memcpy(t.at[l / 8][l % 8], shared_at(w, l, at[l], 16, Access::Read), 16);
  for (int k = 0; k < n; ++k) {
    Lanes d = dst(w, i.ops[k]);
    uint32_t pairs[kLanes];  // row by row, as the lanes take them
    if (i.aux2)
      for (int l = 0; l < kLanes; ++l)
        pairs[l] = uint32_t(t.at[k][l % 4 * 2 + 1][l / 4]) << 16 | t.at[k][l % 4 * 2][l / 4];
    else
      memcpy(pairs, t.at[k], sizeof pairs);
    each_lane(m, [&](int l) { d[l] = pairs[l]; });
  }
}
void stmatrix(Warp& w, const Instr& i, uint32_t) {
  uint64_t at[kLanes];
  Matrices t;
  int n = int(i.aux);
  row_addresses(w, i, w.row(i.ops[0]), at);
  for (int k = 0; k < n; ++k) {
    const uint64_t* s = w.row(i.ops[1 + k]);
    for (int l = 0; l < kLanes; ++l) {
      int r = l / 4, c = l % 4 * 2;
      (i.aux2 ? t.at[k][c][r] : t.at[k][r][c]) = uint16_t(s[l]);
      (i.aux2 ? t.at[k][c + 1][r] : t.at[k][r][c + 1]) = uint16_t(s[l] >> 16);
    }
  }
  // as st: what lies there already is no race; Triton has every warp store a tile of which each holds a copy
  bool race = w.block->launch->settings.racecheck;
  for (int l = 0; l < 8 * n; ++l) {
    const uint16_t* row = t.at[l / 8][l % 8];
    if (!race || !holds_already(w, i, at[l], row, 16))
      memcpy(shared_at(w, l, at[l], 16, Access::Write), row, 16);
  }
}
void movmatrix(Warp& w, const Instr& i, uint32_t) {
  const uint64_t* a = w.row(i.ops[1]);
  uint16_t t[8][8];
  for (int l = 0; l < kLanes; ++l) {
    t[l / 4][l % 4 * 2] = uint16_t(a[l]);
    t[l / 4][l % 4 * 2 + 1] = uint16_t(a[l] >> 16);
  }
  Lanes d = dst(w, i.ops[0]);
  for (int l = 0; l < kLanes; ++l) d[l] = uint32_t(t[l % 4 * 2 + 1][l / 4]) << 16 | t[l % 4 * 2][l / 4];
}
void decode_matrix(Instr& i, const Opcode& o) {
  if (o.type() != "b16") unsupported(o);
  collective(i, false);
  bool load = o.base == "ldmatrix";
  i.fn = load ? ldmatrix : stmatrix;
  i.space = Space::Shared;
  i.aux = o.has("x4") ? 4 : o.has("x2") ? 2 : 1;
  i.aux2 = o.has("trans");
  i.destinations = load ? int(i.aux) : 0;
}

// ---- mma.sync: aux: K | M << 16; aux2: saturate ----
template <Elem EA, Elem EB, Acc A>
void mma(Warp& w, const Instr& i, uint32_t) {
  using T = Sum<A>;
  constexpr int per = elem_per_register(EA), columns = 4 * per;  // of one register across a quad
  int K = int(i.aux & 0xffff), M = int(i.aux >> 16), halves = M / 8;
  int na = M * K / kLanes / per, nb = 8 * K / kLanes / per, nd = i.destinations;
  T a[16 * 64], b[64][8], c[16][8];
  for (int r = 0; r < na; ++r) {
    T part[kLanes * per];
    fragment<EA>(w.row(i.ops[nd + r]), part);
    T* to = a + r % halves * 8 * K + r / halves * columns;
    for (int row = 0; row < 8; ++row) memcpy(to + row * K, part + row * columns, columns * sizeof(T));
  }
  for (int r = 0; r < nb; ++r) {
    T part[kLanes * per];
    fragment<EB>(w.row(i.ops[nd + na + r]), part);
    for (int k = 0; k < columns; ++k)
      for (int n = 0; n < 8; ++n) b[r * columns + k][n] = part[n * columns + k];
  }
  const uint64_t* from[4];
  uint64_t* to[4];
  for (int r = 0; r < nd; ++r) {
    from[r] = w.row(i.ops[nd + na + nb + r]);
    to[r] = dst(w, i.ops[r]);
  }
  load_accumulator<A>(from, M, c);
  multiply_add<T>(c, a, K, b, M, K);
  store_accumulator<A>(to, M, c, i.aux2);
}
template <Elem EA, Elem EB>
Execute mma_into(const std::string& acc) {
  if constexpr (elem_is_integer(EA)) {
    if (acc == "s32") return mma<EA, EB, Acc::S32>;
  } else if constexpr (EA == Elem::F64) {
    if (acc == "f64") return mma<EA, EB, Acc::F64>;
  } else {
    if (acc == "f32") return mma<EA, EB, Acc::F32>;
    if (acc == "f16" && EA != Elem::BF16 && EA != Elem::TF32) return mma<EA, EB, Acc::F16>;
  }
  return nullptr;
}
template <Elem EA, Elem... EBs>
Execute mma_with(Elem b, const std::string& acc) {
  Execute e = nullptr;
  ((b == EBs ? void(e = mma_into<EA, EBs>(acc)) : void()), ...);
  return e;
}
Execute mma_for(Elem a, Elem b, const std::string& acc) {
  switch (a) {
    case Elem::F16:
      return mma_with<Elem::F16, Elem::F16>(b, acc);
    case Elem::BF16:
      return mma_with<Elem::BF16, Elem::BF16>(b, acc);
    case Elem::TF32:
      return mma_with<Elem::TF32, Elem::TF32>(b, acc);
    case Elem::F64:
      return mma_with<Elem::F64, Elem::F64>(b, acc);
    case Elem::S8:
      return mma_with<Elem::S8, Elem::S8, Elem::U8>(b, acc);
    case Elem::U8:
      return mma_with<Elem::U8, Elem::S8, Elem::U8>(b, acc);
    case Elem::S4:
      return mma_with<Elem::S4, Elem::S4, Elem::U4>(b, acc);
    case Elem::U4:
      return mma_with<Elem::U4, Elem::S4, Elem::U4>(b, acc);
    case Elem::E4M3:
      return mma_with<Elem::E4M3, Elem::E4M3, Elem::E5M2>(b, acc);
    case Elem::E5M2:
      return mma_with<Elem::E5M2, Elem::E4M3, Elem::E5M2>(b, acc);
  }
  return nullptr;
}
void decode_mma(Instr& i, const Opcode& o) {
  collective(i, false);
  int M = 0, N = 0, K = 0;
  std::vector<std::string> types;
  for (auto& m : o.mods) {
    if (sscanf(m.c_str(), "m%dn%dk%d", &M, &N, &K) == 3) continue;
    if (m == "row" || m == "col" || m == "sync" || m == "aligned" || m == "satfinite") continue;
    types.push_back(m);
  }
  // the layout of m8n8k4 in f16 is one of its own, of a card before these
  if ((M != 16 && M != 8) || N != 8 || types.size() != 4 || (M == 8 && types[1] == "f16")) unsupported(o);
  i.fn = required(mma_for(elem_of(types[1], o), elem_of(types[2], o), types[0]), o);
  i.aux = K | M << 16;
  i.aux2 = o.has("satfinite");
  i.destinations = types[0] == "f16" ? M / 8 : M / 4;
}

}  // namespace

void add_tensor_core(DecoderTable& t) {
  t["ldmatrix"] = t["stmatrix"] = decode_matrix;
  t["movmatrix"] = [](Instr& i, const Opcode&) {
    collective(i, false);
    i.fn = movmatrix;
  };
  t["mma"] = decode_mma;
}

}  // namespace cusim

// Bulk copies (TMA): loads arrive at the wait on their mbarrier, stores take effect when issued.
#include <algorithm>
#include <array>

#include "instruction.hpp"

namespace cusim {
namespace {

char* map_at(Warp& w, int l, uint64_t p) {
  if (p & kLocalTag) fault(w, l, "tensor map in local memory");
  return p & kSharedTag ? shared_at(w, l, p & ~kSharedTag, 128, Access::Sync) : (char*)p;
}
const TensorMap& tensor_map(Warp& w, int l, uint64_t p, int rank) {
  const TensorMap& t = *(const TensorMap*)map_at(w, l, p);
  if (t.magic != TensorMap::kMagic) fault(w, l, "not a tensor map");
  if (t.rank != rank) fault(w, l, "tensor map of another rank");
  return t;
}

// ---- tensormap.replace: a map is made on the device, field by field. ops: map [, ordinal], value ----
enum Field { Address, Rank, BoxDim, Dim, Stride, Step, Type, Interleave, Swizzle, Fill };
const char* const kField[] = {"global_address", "rank",           "box_dim",  "global_dim",
                              "global_stride",  "element_stride", "elemtype", "interleave_layout",
                              "swizzle_mode",   "fill_mode"};
void replace(Warp& w, const Instr& i, uint32_t m) {
  const uint64_t* a = w.row(i.ops[0]);
  bool indexed = i.aux == BoxDim || i.aux == Dim || i.aux == Stride || i.aux == Step;
  for (int l : lanes_of(m)) {
    uint64_t p = a[l] + i.imm;
    TensorMap& t = *(TensorMap*)map_at(w, l, i.space == Space::Shared ? p | kSharedTag : p);
    if (t.magic != TensorMap::kMagic) t = TensorMap(), t.magic = TensorMap::kMagic;
    uint64_t n = indexed ? w.row(i.ops[1])[l] : 0, v = w.row(i.ops[indexed ? 2 : 1])[l];
    if (n > 4) fault(w, l, "tensormap.replace of a dimension that does not exist");
    switch (i.aux) {
      case Address:
        t.address = v;
        break;
      case Rank:
        t.rank = uint8_t(v + 1);
        break;
      case BoxDim:
        t.box[n] = uint16_t(v);
        break;
      case Dim:
        t.dims[n] = uint32_t(v);
        break;
      case Stride:
        t.strides[n & 3] = v;
        break;
      case Step:
        break;
      case Type:
        t.type = uint8_t(v);
        break;
      case Interleave:
        t.interleave = uint8_t(v);
        break;
      case Swizzle:
        t.swizzle = uint8_t(v);
        break;
      case Fill:
        t.fill = uint8_t(v);
        break;
    }
  }
}
void copy_map(Warp& w, const Instr& i, uint32_t m) {  // tensormap.cp_fenceproxy [global], [shared], 128
  int l = std::countr_zero(m);
  uint64_t to = w.row(i.ops[0])[l] + i.offsets[0], from = w.row(i.ops[1])[l] + i.offsets[1];
  memcpy((void*)to, shared_at(w, l, from & ~kSharedTag, 128, Access::Sync), 128);
}
void decode_tensormap(Instr& i, const Opcode& o) {
  i.destinations = 0;
  if (o.has("cp_fenceproxy")) {
    i.flow = Flow::Collective;
    i.fn = copy_map;
    return;
  }
  i.aux = which(o, kField);
  if (i.aux < 0) unsupported(o);
  i.fn = replace;
  i.space = o.has("shared::cta") ? Space::Shared : Space::Global;
}

// ---- boxes ----
int element_bytes(const TensorMap& t) {
  static const int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // of CUtensorMapDataType
  return t.type < 13 ? bytes[t.type] : 1;
}
uint32_t swizzled(uint32_t at, int mode) {  // of CUtensorMapSwizzle: 1 32B, 2 64B, 3 128B
  static const uint32_t bits[] = {0, 0x10, 0x30, 0x70};
  return mode < 4 ? at ^ (at >> 3 & bits[mode]) : at;
}
// Walks a box, 16 bytes at a time where it can: f(offset in shared memory, global address or 0 when outside,
// number of elements).
template <class F>
void walk_box(const TensorMap& t, uint32_t shared, const int32_t* origin, F f) {
  int bytes = element_bytes(t);
  uint32_t box[5] = {1, 1, 1, 1, 1}, at[5] = {};
  std::copy(t.box, t.box + t.rank, box);
  uint32_t total = box[0] * box[1] * box[2] * box[3] * box[4], chunk = box[0] * bytes % 16 ? 1 : 16 / bytes;
  for (uint32_t k = 0; k < total; k += chunk) {
    bool inside = true;
    uint64_t g = t.address + (int64_t(origin[0]) + at[0]) * bytes;
    for (int r = 1; r < t.rank; ++r) {
      int64_t x = int64_t(origin[r]) + at[r];
      inside &= x >= 0 && x < int64_t(t.dims[r]);
      g += x * t.strides[r - 1];
    }
    auto in_row = [&](uint32_t e) {
      int64_t x = int64_t(origin[0]) + at[0] + e;
      return x >= 0 && x < int64_t(t.dims[0]);
    };
    uint32_t to = shared + k * bytes;
    if (!inside || in_row(0) == in_row(chunk - 1)) {
      f(swizzled(to, t.swizzle), inside && in_row(0) ? g : 0, int(chunk));
    } else {
      for (uint32_t e = 0; e < chunk; ++e)
        f(swizzled(to + e * bytes, t.swizzle), in_row(e) ? g + e * bytes : 0, 1);
    }
    at[0] += chunk;
    for (int r = 0; r < 4 && at[r] == box[r]; ++r) at[r] = 0, ++at[r + 1];
  }
}
std::array<int32_t, 5> coordinates(Warp& w, const Instr& i, int l, size_t first) {
  std::array<int32_t, 5> c{};
  for (int k = 0; k < i.vec; ++k) c[k] = int32_t(w.row(i.ops[first + k])[l]);
  return c;
}
uint32_t in_shared(uint64_t a) { return uint32_t(a & ~kSharedTag); }

// ---- loads. ops: dst, map, {coordinates}, mbarrier  or  dst, src, bytes, mbarrier ----
// The bytes that `issuer` asked for are there: who has waited for this phase may read them.
void arrived(Warp& w, int l, uint64_t barrier, int64_t bytes, Warp& issuer) {
  MBarrier& b = mbarrier_at(w, l, barrier);
  b.tx -= bytes;
  b.clock[issuer.actor] = std::max(b.clock[issuer.actor], issuer.clock[issuer.actor]);
  tick(issuer);
  settle(w, b);
}
// What is out of the tensor becomes zero, or NaN where the map says so.
void fill(char* p, const TensorMap& t, int count) {
  static const uint32_t nan[] = {0,          0, 0,      0,          0,          0,         0x7fff,
                                 0x7fffffff, 0, 0x7fff, 0x7fffffff, 0x7fffffff, 0x7fffffff};
  uint64_t v = t.fill && t.type < 13 ? nan[t.type] : 0;
  int bytes = element_bytes(t);
  for (int k = 0; k < count; ++k) memcpy(p + k * bytes, &v, bytes);
}
void load_tensor(Warp& w, const Instr& i, uint32_t m) {
  for (int l : lanes_of(m)) {
    uint32_t to = in_shared(w.row(i.ops[0])[l]);
    uint64_t barrier = w.row(i.ops[2 + i.vec])[l];
    auto origin = coordinates(w, i, l, 2);
    TensorMap t = tensor_map(w, l, w.row(i.ops[1])[l], i.vec);
    if (to % 128) fault(w, l, "a tensor copy into shared memory that is not aligned to 128 bytes");
    int size = element_bytes(t);
    walk_box(t, to, origin.data(),
             [&](uint32_t s, uint64_t, int n) { shared_at(w, l, s, n * size, Access::Issue); });
    MBarrier& b = mbarrier_at(w, l, barrier);
    merge(b.clock, w.clock);
    Warp* issuer = &w;
    b.copies.push_back([=](Warp& waiter, int lane) {
      int64_t bytes = 0;
      tick(*issuer);
      walk_box(t, to, origin.data(), [&](uint32_t s, uint64_t g, int n) {
        char* p = shared_at(*issuer, l, s, n * size, Access::Arrive);
        if (g)
          memcpy(p, global_at(waiter, lane, g, n * size, Access::Read), n * size);
        else
          fill(p, t, n);
        bytes += n * size;
      });
      arrived(waiter, lane, barrier, bytes, *issuer);
    });
  }
  tick(w);
}
void load_bytes(Warp& w, const Instr& i, uint32_t m) {
  for (int l : lanes_of(m)) {
    uint32_t to = in_shared(w.row(i.ops[0])[l]), n = uint32_t(w.row(i.ops[2])[l]);
    uint64_t from = w.row(i.ops[1])[l], barrier = w.row(i.ops[3])[l];
    if (n % 16 || to % 16 || from % 16) fault(w, l, "bulk copy not a multiple of 16 bytes");
    shared_at(w, l, to, n, Access::Issue);
    MBarrier& b = mbarrier_at(w, l, barrier);
    merge(b.clock, w.clock);
    Warp* issuer = &w;
    b.copies.push_back([=](Warp& waiter, int lane) {
      tick(*issuer);
      memcpy(shared_at(*issuer, l, to, n, Access::Arrive), global_at(waiter, lane, from, n, Access::Read), n);
      arrived(waiter, lane, barrier, n, *issuer);
    });
  }
  tick(w);
}

// ---- stores. ops: map, {coordinates}, src  or  dst, src, bytes; aux: reduction ----
enum Reduction { None, Add, Min, Max };
template <class T>
void reduce(char* into, const char* from, int op) {
  T x, y;
  memcpy(&x, into, sizeof x);
  memcpy(&y, from, sizeof y);
  if constexpr (std::is_integral_v<T>) {
    x = op == Add ? T(x + y) : op == Min ? std::min(x, y) : std::max(x, y);
  } else {
    auto u = up(x), v = up(y);
    down(op == Add ? u + v : op == Min ? std::min(u, v) : std::max(u, v), x);
  }
  memcpy(into, &x, sizeof x);
}
using Reduce = void (*)(char*, const char*, int);
Reduce reducer(int type) {  // of CUtensorMapDataType
  static const Reduce by_type[] = {nullptr,          nullptr,         reduce<uint32_t>, reduce<int32_t>,
                                   reduce<uint64_t>, reduce<int64_t>, reduce<f16>,      reduce<float>,
                                   reduce<double>,   reduce<bf16>,    reduce<float>};
  return type < 11 ? by_type[type] : nullptr;
}
int reduced_type(const Opcode& o) {
  static const char* const names[] = {"-", "-", "u32", "s32", "u64", "s64", "f16", "f32", "f64", "bf16"};
  int type = which(o, names);
  if (type < 0) unsupported(o);
  return type;
}
void store_tensor(Warp& w, const Instr& i, uint32_t m) {
  for (int l : lanes_of(m)) {
    const TensorMap& t = tensor_map(w, l, w.row(i.ops[0])[l], i.vec);
    uint32_t from = in_shared(w.row(i.ops[1 + i.vec])[l]);
    if (from % 128) fault(w, l, "a tensor copy from shared memory that is not aligned to 128 bytes");
    Reduce into = reducer(t.type);
    int size = element_bytes(t);
    if (i.aux && !into) fault(w, l, "bulk reduction of this type is not supported");
    walk_box(t, from, coordinates(w, i, l, 1).data(), [&](uint32_t s, uint64_t g, int n) {
      if (!g) return;
      const char* p = shared_at(w, l, s, n * size, Access::AsyncRead);
      char* to = global_at(w, l, g, n * size, i.aux ? Access::Sync : Access::Write);
      if (!i.aux)
        memcpy(to, p, n * size);
      else
        for (int k = 0; k < n; ++k) into(to + k * size, p + k * size, int(i.aux));
    });
    ++w.block->launch->effects;
  }
}
void store_bytes(Warp& w, const Instr& i, uint32_t m) {  // aux2: type of a reduction
  for (int l : lanes_of(m)) {
    uint64_t to = w.row(i.ops[0])[l];
    uint32_t from = in_shared(w.row(i.ops[1])[l]), n = uint32_t(w.row(i.ops[2])[l]);
    if (n % 16 || to % 16 || from % 16) fault(w, l, "bulk copy not a multiple of 16 bytes");
    if (!n) continue;
    const char* p = shared_at(w, l, from, n, Access::AsyncRead);
    char* into = global_at(w, l, to, n, i.aux ? Access::Sync : Access::Write);
    ++w.block->launch->effects;
    if (!i.aux) {
      memcpy(into, p, n);
      continue;
    }
    TensorMap t{};
    t.type = uint8_t(i.aux2);
    for (uint32_t k = 0; k < n; k += element_bytes(t)) reducer(t.type)(into + k, p + k, int(i.aux));
  }
}

}  // namespace

void decode_bulk(Instr& i, const Opcode& o) {
  if (o.has("commit_group") || o.has("wait_group") || o.has("prefetch")) {
    i.fn = nop;
    return;
  }
  if (o.has("multicast::cluster") || o.has("im2col")) unsupported(o);
  auto position = [&](auto is) { return std::find_if(o.mods.begin(), o.mods.end(), is) - o.mods.begin(); };
  auto global = position([](auto& m) { return m == "global"; });
  auto shared = position([](auto& m) { return m.starts_with("shared"); });
  bool store = global < shared, tensor = o.has("tensor");
  for (auto& m : o.mods)
    if (m.size() == 2 && m[1] == 'd') i.vec = uint8_t(m[0] - '0');
  if (o.has("reduce") || o.base == "red") {
    i.aux = o.has("add") ? Add : o.has("min") ? Min : o.has("max") ? Max : None;
    if (!i.aux || !store) unsupported(o);
    if (!tensor) i.aux2 = reduced_type(o);
  }
  i.fn = store ? (tensor ? store_tensor : store_bytes) : (tensor ? load_tensor : load_bytes);
}
void add_bulk(DecoderTable& t) { t["tensormap"] = decode_tensormap; }

}  // namespace cusim

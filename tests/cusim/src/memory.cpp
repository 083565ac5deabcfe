// Loads, stores, atomics and cp.async.
#include <algorithm>

#include "instruction.hpp"

namespace cusim {

// ---- cp.async: the copy happens at the wait, so reading too early reads the old bytes ----
void finish_copies(Warp& w, const uint32_t* limit) {
  size_t kept = 0;
  for (const CopyAsync& c : w.copies) {
    if (c.group >= limit[c.lane]) {
      w.copies[kept++] = c;
      continue;
    }
    char* p = shared_at(w, c.lane, c.dst, c.bytes, Access::Arrive);
    memcpy(p, (const void*)c.src, c.src_bytes);
    memset(p + c.src_bytes, 0, c.bytes - c.src_bytes);
  }
  w.copies.resize(kept);
}

namespace {

bool counting(const Warp& w) { return w.block->launch->settings.count; }

// Global memory that needs no more than the obvious checks is read without a call a lane.
template <class T>
bool plain_global(const Warp& w, const Instr& i) {
  return i.space == Space::Global && w.block->launch->settings.racecheck < 2;
}
void check_plain(const Warp& w, int l, uint64_t at, int bytes, const char* what) {
  if (at % bytes) [[unlikely]]
    fault(w, l, "misaligned " + std::to_string(bytes) + "-byte " + what);
  if (at < 4096) [[unlikely]]
    fault(w, l, std::string("null pointer ") + what);
}

template <class T>
void ld(Warp& w, const Instr& i, uint32_t m) {
  int n = i.vec, bytes = n * sizeof(T);
  const uint64_t* base = w.row(i.ops[n]);
  uint64_t at[kLanes];
  each_lane(m, [&](int l) { at[l] = base[l] + i.imm; });
  if (counting(w)) count_access(w, i.space, m, at, bytes);
  Lanes d[8];
  for (int k = 0; k < n; ++k) d[k] = dst(w, i.ops[k]);
  auto take = [&](int l, const char* p) {
    for (int k = 0; k < n; ++k) {
      T v;
      memcpy(&v, p + k * sizeof(T), sizeof(T));
      wr<T>(d[k], l, v);
    }
  };
  bool sync = i.aux;
  if (sync) w.spinning = true;  // a loop that polls should let other warps run
  if (plain_global<T>(w, i)) {
    for (int l : lanes_of(m)) {
      check_plain(w, l, at[l], bytes, "read");
      take(l, (const char*)at[l]);
    }
    return;
  }
  for (int l : lanes_of(m)) take(l, memory_at(w, i, l, at[l], bytes, sync ? Access::Sync : Access::Read));
}
template <class T>
void st(Warp& w, const Instr& i, uint32_t m) {
  int n = i.vec, bytes = n * sizeof(T);
  const uint64_t* base = w.row(i.ops[0]);
  uint64_t at[kLanes];
  each_lane(m, [&](int l) { at[l] = base[l] + i.imm; });
  if (counting(w)) count_access(w, i.space, m, at, bytes);
  const uint64_t* s[8];
  for (int k = 0; k < n; ++k) s[k] = w.row(i.ops[1 + k]);
  bool plain = plain_global<T>(w, i), race = w.block->launch->settings.racecheck;
  ++w.block->launch->effects;
  for (int l : lanes_of(m)) {
    T v[8];
    for (int k = 0; k < n; ++k) v[k] = rd<T>(s[k], l);
    if (plain) {
      check_plain(w, l, at[l], bytes, "write");
      memcpy((void*)at[l], v, bytes);
    } else if (!race || !holds_already(w, i, at[l], v, bytes)) {
      memcpy(memory_at(w, i, l, at[l], bytes, i.aux ? Access::Sync : Access::Write), v, bytes);
    }
  }
}
Execute ld_for(const std::string& t) {
  if (t == "s8") return ld<int8_t>;
  if (t == "u8" || t == "b8") return ld<uint8_t>;
  if (t == "f32") return ld<uint32_t>;
  if (t == "f64") return ld<uint64_t>;
  if (t == "f16" || t == "bf16") return ld<uint16_t>;
  return for_integer(t, []<class T>() -> Execute { return ld<T>; });
}
Execute st_for(const std::string& t) {
  switch (type_bytes(t)) {
    case 1:
      return st<uint8_t>;
    case 2:
      return st<uint16_t>;
    case 4:
      return st<uint32_t>;
    case 8:
      return st<uint64_t>;
    default:
      return nullptr;
  }
}
int vector_of(const Opcode& o) { return o.has("v8") ? 8 : o.has("v4") ? 4 : o.has("v2") ? 2 : 1; }
void decode_ld(Instr& i, const Opcode& o) {
  i.space = space_of(o);
  i.fn = required(ld_for(o.type()), o);
  i.vec = uint8_t(vector_of(o));
  i.destinations = i.vec;
  i.bytes = uint8_t(type_bytes(o.type()));
  i.aux = o.has("acquire") || o.has("relaxed") || o.has("volatile");
}
void decode_st(Instr& i, const Opcode& o) {
  if (o.has("async") || o.type() == "b128") unsupported(o);
  i.space = space_of(o);
  i.fn = required(st_for(o.type()), o);
  i.vec = uint8_t(vector_of(o));
  i.destinations = 0;
  i.bytes = uint8_t(type_bytes(o.type()));
  i.aux = o.has("release") || o.has("relaxed") || o.has("volatile");
}

// ---- atomics ----
enum Atomic { Add, Min, Max, Exch, And, Or, Xor, Inc, Dec, Cas };
const char* const kAtomic[] = {"add", "min", "max", "exch", "and", "or", "xor", "inc", "dec", "cas"};

template <class T>
T add16(T a, T b) {
  T o;
  down(up(a) + up(b), o);
  return o;
}
template <class T>
T atomic_result(int op, T old, T v, T swap, const Warp& w, int l) {
  if (op == Exch) return v;
  if (op == Cas) return memcmp(&old, &v, sizeof(T)) == 0 ? swap : old;
  if constexpr (std::is_integral_v<T>) {
    switch (op) {
      case Add:
        return T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(v));
      case Min:
        return std::min(old, v);
      case Max:
        return std::max(old, v);
      case And:
        return old & v;
      case Or:
        return old | v;
      case Xor:
        return old ^ v;
      case Inc:
        return old >= v ? T(0) : T(old + 1);
      case Dec:
        return old == 0 || old > v ? v : T(old - 1);
    }
  } else if constexpr (is_pair<T>) {
    auto one = [&](auto a, auto b) {
      return op == Add ? add16(a, b) : (op == Min) == (up(b) < up(a)) ? b : a;
    };
    return both<T>(one, old, v);
  } else {
    if (op == Add) {
      T o;
      down(up(old) + up(v), o);
      return o;
    }
    if (op == Min || op == Max) return (op == Min) == (up(v) < up(old)) ? v : old;
  }
  fault(w, l, "this atomic is not supported");
}
// aux: the operation; with a destination the old value is returned
template <class T>
void atom(Warp& w, const Instr& i, uint32_t m) {
  int first = i.destinations;
  const uint64_t *base = w.row(i.ops[first]), *value = w.row(i.ops[first + 1]);
  const uint64_t* swap = i.aux == Cas ? w.row(i.ops[first + 2]) : value;
  Lanes d = first ? dst(w, i.ops[0]) : nullptr;
  for (int l : lanes_of(m)) {
    char* p = memory_at(w, i, l, base[l] + i.imm, sizeof(T), Access::Sync);
    T old, r;
    memcpy(&old, p, sizeof(T));
    r = atomic_result<T>(int(i.aux), old, rd<T>(value, l), rd<T>(swap, l), w, l);
    if (memcmp(&old, &r, sizeof(T)) != 0) ++w.block->launch->effects;
    memcpy(p, &r, sizeof(T));
    if (d) wr<T>(d, l, old);
  }
  w.spinning = true;  // a compare-and-swap loop should let other warps run
}
template <class T>
void atom_vector(Warp& w, const Instr& i,
                 uint32_t m) {  // atom.global.add.vN.T {..}, [a], {..}; red without {..}
  const int first = i.destinations;
  const uint64_t* base = w.row(i.ops[first]);
  ++w.block->launch->effects;
  for (int l : lanes_of(m))
    for (int k = 0; k < i.vec; ++k) {
      char* p = memory_at(w, i, l, base[l] + i.imm + k * sizeof(T), sizeof(T), Access::Sync);
      T old;
      memcpy(&old, p, sizeof(T));
      T r = atomic_result<T>(int(i.aux), old, rd<T>(w.row(i.ops[first + 1 + k]), l), T{}, w, l);
      memcpy(p, &r, sizeof(T));
      if (first) wr<T>(dst(w, i.ops[k]), l, old);
    }
}
template <class F>
Execute for_atomic(const std::string& t, F f) {
  if (Execute e = for_integer(t, f)) return e;
  if (Execute e = for_float(t, f)) return e;
  return for_pair(t, f);
}
void decode_atom(Instr& i, const Opcode& o) {
  bool returns = o.base == "atom";
  i.space = space_of(o);
  i.bytes = uint8_t(type_bytes(o.type()));
  i.aux = which(o, kAtomic);
  i.vec = uint8_t(vector_of(o));
  i.destinations = returns ? i.vec : 0;
  if (o.has("async") || i.aux < 0) unsupported(o);
  i.fn = i.vec > 1 ? for_atomic(o.type(), []<class T>() -> Execute { return atom_vector<T>; })
                   : for_atomic(o.type(), []<class T>() -> Execute { return atom<T>; });
  required(i.fn, o);
}

// ---- cp.async ----
// aux: bytes; ops: dst, src [, bytes to read | predicate that ignores the source]; aux2: 1 for the predicate
void cp_async(Warp& w, const Instr& i, uint32_t m) {
  const uint64_t *d = w.row(i.ops[0]), *s = w.row(i.ops[1]);
  int bytes = int(i.aux);
  uint64_t from[kLanes] = {}, to[kLanes] = {};
  for (int l : lanes_of(m)) {
    from[l] = s[l] + i.offsets[1];
    to[l] = (d[l] + i.offsets[0]) & ~kSharedTag;
  }
  int read[kLanes] = {};
  uint32_t reading = 0;  // lanes that do not only fill with zeros
  for (int l : lanes_of(m)) {
    read[l] = bytes;
    if (i.ops.size() > 2) {
      if (i.aux2)
        read[l] = truth(w, i.ops[2], l) ? 0 : bytes;
      else
        read[l] = (int)std::min<uint64_t>(uint32_t(w.row(i.ops[2])[l]), bytes);
    }
    reading |= uint32_t(read[l] > 0) << l;
  }
  if (counting(w)) {
    count_access(w, Space::Global, reading, from, bytes);
    count_access(w, Space::Shared, m, to, bytes);
  }
  for (int l : lanes_of(m)) {
    const int n = read[l];
    if (from[l] % bytes || to[l] % bytes) fault(w, l, "misaligned cp.async");
    if (n) {
      // touches the bytes now, so that a fault names this instruction and not the wait
      const volatile char* p = global_at(w, l, from[l], n, Access::Read);
      (void)p[0], (void)p[n - 1];
    }
    shared_at(w, l, to[l], bytes, Access::Issue);
    w.copies.push_back({from[l], uint32_t(to[l]), w.committed[l], uint8_t(l), uint8_t(bytes), uint8_t(n)});
  }
}
void cp_commit(Warp& w, const Instr&, uint32_t m) {
  for (int l : lanes_of(m)) ++w.committed[l];
}
void cp_wait(Warp& w, const Instr& i, uint32_t m) {
  if (w.copies.empty()) return;
  uint32_t keep = i.ops.empty() ? 0 : uint32_t(w.row(i.ops[0])[0]);
  uint32_t limit[kLanes] = {};
  for (int l : lanes_of(m))  // wait_all waits for those not committed too
    limit[l] = i.aux ? ~0u : w.committed[l] > keep ? w.committed[l] - keep : 0;
  finish_copies(w, limit);
}
void decode_cp(Instr& i, const Opcode& o) {
  i.destinations = 0;
  if (o.has("bulk")) return decode_bulk(i, o);
  if (o.has("mbarrier")) return decode_cp_async_mbarrier(i, o);
  if (o.has("commit_group")) {
    i.fn = cp_commit;
  } else if (o.has("wait_group") || o.has("wait_all")) {
    i.fn = cp_wait;
    i.aux = o.has("wait_all");
  } else {
    i.fn = cp_async;  // the parser moves the byte count from the operands to aux
    i.space = Space::Global;
  }
}

void fence(Warp& w, const Instr& i, uint32_t) {
  if (i.aux) w.proxy_fence = ++w.block->proxy_time;
}
void decode_fence(Instr& i, const Opcode& o) {
  i.destinations = 0;
  i.fn = fence;
  i.aux = o.has("async");
  for (auto& m : o.mods) i.aux |= m.starts_with("async::");
}
void decode_hint(Instr& i, const Opcode&) {
  i.fn = nop;
  i.destinations = 0;
}

}  // namespace

void add_memory(DecoderTable& t) {
  t["ld"] = t["ldu"] = decode_ld;
  t["st"] = decode_st;
  t["atom"] = t["red"] = decode_atom;
  t["cp"] = decode_cp;
  t["fence"] = t["membar"] = decode_fence;
  for (auto name : {"prefetch", "prefetchu", "discard", "applypriority"}) t[name] = decode_hint;
  t["createpolicy"] = [](Instr& i, const Opcode&) { i.fn = nop; };
}

}  // namespace cusim

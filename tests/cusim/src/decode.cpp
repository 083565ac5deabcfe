// Opcode text -> handler. Each file of instructions adds its own rows to the table.
#include <algorithm>
#include <set>

#include "instruction.hpp"

namespace cusim {

bool Opcode::has(const char* mod) const { return std::find(mods.begin(), mods.end(), mod) != mods.end(); }
std::string Opcode::text() const {
  std::string out = base;
  for (auto& m : mods) out += "." + m;
  return out;
}

int type_bytes(const std::string& t) {
  static const std::unordered_map<std::string, int> bytes = {
      {"b8", 1},  {"u8", 1},     {"s8", 1},     {"e4m3", 1},  {"e5m2", 1}, {"pred", 1}, {"b16", 2},
      {"u16", 2}, {"s16", 2},    {"f16", 2},    {"bf16", 2},  {"b64", 8},  {"u64", 8},  {"s64", 8},
      {"f64", 8}, {"e4m3x2", 2}, {"e5m2x2", 2}, {"b128", 16}, {"f32x2", 8}};
  auto it = bytes.find(t);
  return it == bytes.end() ? 4 : it->second;
}

Space space_of(const Opcode& op) {
  for (auto& m : op.mods) {
    if (m == "global") return Space::Global;
    if (m.starts_with("shared")) return Space::Shared;
    if (m == "local") return Space::Local;
    if (m.starts_with("param")) return Space::Param;
    if (m == "const") return Space::Const;
  }
  return Space::Generic;
}

void nop(Warp&, const Instr&, uint32_t) {}

namespace {

void trap(Warp& w, const Instr&, uint32_t m) { fault(w, std::countr_zero(m), "trap"); }
void assert_fail(Warp& w, const Instr& i, uint32_t m) {
  int l = std::countr_zero(m);
  fault(w, l,
        "device assert: " + std::string((const char*)w.row(i.ops[0])[l]) + " at " +
            std::string((const char*)w.row(i.ops[1])[l]) + ":" +
            std::to_string((uint32_t)w.row(i.ops[2])[l]));
}

// One lane's printf: the arguments lie in its local memory, as varargs promote them.
std::string formatted(const std::string& f, const char* args) {
  size_t off = 0;
  std::string out;
  for (size_t k = 0; k < f.size(); ++k) {
    if (f[k] != '%') {
      out += f[k];
      continue;
    }
    size_t e = f.find_first_of("diouxXeEfgGaAcsp%", k + 1);
    if (e == std::string::npos) break;
    std::string spec = f.substr(k, e - k + 1);
    k = e;
    char kind = spec.back();
    if (kind == '%') {
      out += '%';
      continue;
    }
    bool real = strchr("eEfgGaA", kind), wide = real || spec.find('l') != spec.npos || strchr("ps", kind);
    if (wide) off = (off + 7) / 8 * 8;
    uint64_t v = 0;
    memcpy(&v, args + off, wide ? 8 : 4);
    off += wide ? 8 : 4;
    char buf[256];
    if (real)
      snprintf(buf, sizeof buf, spec.c_str(), std::bit_cast<double>(v));
    else if (kind == 's')
      snprintf(buf, sizeof buf, spec.c_str(), (const char*)v);
    else if (wide)
      snprintf(buf, sizeof buf, spec.c_str(), v);
    else
      snprintf(buf, sizeof buf, spec.c_str(), (uint32_t)v);
    out += buf;
  }
  return out;
}
void print(Warp& w, const Instr& i, uint32_t m) {
  for (int l : lanes_of(m)) {
    uint64_t at = w.row(i.ops[1])[l];
    const char* args = at & kLocalTag ? w.local.data() + (at & ~kLocalTag) + size_t(l) * w.kernel->local_bytes
                                      : (const char*)at;
    fputs(formatted((const char*)w.row(i.ops[0])[l], args).c_str(), stdout);
  }
}

template <Flow flow>
void decode_flow(Instr& i, const Opcode&) {
  i.flow = flow;
  i.fn = nop;
  i.destinations = 0;
}
template <Execute fn>
void decode_plain(Instr& i, const Opcode&) {
  i.fn = fn;
  i.destinations = 0;
}

DecoderTable make_table() {
  DecoderTable t;
  add_arithmetic(t);
  add_compare(t);
  add_convert(t);
  add_memory(t);
  add_warp(t);
  add_tensor_core(t);
  add_wgmma(t);
  add_mbarrier(t);
  add_bulk(t);
  t["bra"] = decode_flow<Flow::Branch>;
  t["brx"] = decode_flow<Flow::BranchTable>;
  t["ret"] = t["exit"] = decode_flow<Flow::Exit>;
  t["trap"] = t["brkpt"] = decode_plain<trap>;
  t["__assertfail"] = decode_plain<assert_fail>;
  t["vprintf"] = decode_plain<print>;
  for (auto name : {"setmaxnreg", "griddepcontrol", "pmevent"}) t[name] = decode_plain<nop>;
  return t;
}

}  // namespace

void decode(Instr& i, const Opcode& op) {
  static const DecoderTable table = make_table();
  static std::set<std::string> names;  // keeps the text alive for messages
  i.name = names.insert(op.text()).first->c_str();
  auto it = table.find(op.base);
  if (it == table.end()) unsupported(op);
  it->second(i, op);
}

}  // namespace cusim

#include "fatbin.hpp"

#include <dlfcn.h>

namespace cusim {
namespace {

std::string inflated(const char* p, size_t n) {
  if (n < 4 || memcmp(p, "\x28\xb5\x2f\xfd", 4) != 0) return std::string(p, n);
  static void* lib = dlopen("libzstd.so.1", RTLD_NOW);
  if (!lib)
    throw Fault(
        "the PTX is compressed and libzstd.so.1 is not on this machine: build with nvcc --no-compress");
  auto size = (unsigned long long (*)(const void*, size_t))dlsym(lib, "ZSTD_getFrameContentSize");
  auto run = (size_t (*)(void*, size_t, const void*, size_t))dlsym(lib, "ZSTD_decompress");
  std::string out(size(p, n), 0);
  size_t got = run(&out[0], out.size(), p, n);
  if (got > out.size()) throw Fault("the PTX in the fat binary could not be decompressed");
  out.resize(got);
  return out;
}
template <class T>
T field(const char* p, size_t at) {
  T v;
  memcpy(&v, p + at, sizeof v);
  return v;
}

}  // namespace

FatBinary::FatBinary(const void* wrapper) : data_(field<const char*>((const char*)wrapper, 8)) {
  constexpr uint32_t kMagic = 0xBA55ED50;
  if (field<uint32_t>(data_, 0) != kMagic) throw Fault("not a fat binary");
}
void FatBinary::read() {
  constexpr uint16_t kPtx = 1;
  images_.clear();
  const char* p = data_ + field<uint16_t>(data_, 6);
  const char* end = p + field<uint64_t>(data_, 8);
  while (p < end) {
    uint32_t header = field<uint32_t>(p, 4), compressed = field<uint32_t>(p, 16);
    uint64_t size = field<uint64_t>(p, 8);
    if (field<uint16_t>(p, 0) == kPtx) {
      Image image;
      image.ptx = inflated(p + header, compressed ? compressed : size);
      size_t target = image.ptx.find(".target sm_");
      if (target == std::string::npos) throw Fault("PTX without a target");
      char* rest;
      image.arch = int(strtol(image.ptx.c_str() + target + 11, &rest, 10));
      image.suffix = *rest == 'a' || *rest == 'f' ? *rest : 0;
      images_.push_back(std::move(image));
    }
    p += header + size;
  }
  read_ = true;
}
bool FatBinary::Image::runs_on(int sm) const {
  if (suffix == 'a') return sm == arch;
  if (suffix == 'f') return sm / 10 == arch / 10 && sm >= arch;
  return sm >= arch;
}
Module& FatBinary::module_for(int sm) {
  if (!read_) read();
  Image* best = nullptr;
  for (Image& image : images_)
    if (image.runs_on(sm) &&
        (!best || std::pair(image.arch, image.suffix != 0) > std::pair(best->arch, best->suffix != 0)))
      best = &image;
  if (!best)
    throw Fault("no PTX for sm_" + std::to_string(sm) +
                " in this library: build with PTX (code=compute_XX) and link with -cudart shared");
  if (!best->module) best->module = parse_ptx(best->ptx);
  return *best->module;
}

}  // namespace cusim

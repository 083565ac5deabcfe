// The PTX that nvcc put into a library, one text for every target it was built for.
#pragma once
#include <string>
#include <vector>

#include "cusim.hpp"

namespace cusim {

class FatBinary {
 public:
  explicit FatBinary(const void* wrapper);
  // What a device of this compute capability would run, parsed when first asked for.
  Module& module_for(int sm);

 private:
  void read();  // the images, when first asked for: a torch built for CUDA registers hundreds of binaries
  struct Image {
    std::string ptx;
    int arch = 0;
    char suffix = 0;  // 'a': for this very architecture; 'f': for its family
    std::unique_ptr<Module> module;
    bool runs_on(int sm) const;
  };
  const char* data_;
  bool read_ = false;
  std::vector<Image> images_;
};

}  // namespace cusim

// Memory that the tests own, by its address, and workspaces: what the entry points take whose operators stand in for
// those of torch.
#pragma once
#include <cstdint>
#include <cstring>

#include "arrays.h"

namespace emulator {

using Address = uintptr_t;

inline void* at(Address address) { return reinterpret_cast<void*>(address); }

// A workspace of the size asked for, to the byte, that begins as NaN.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : bytes_(bytes > 0 ? new unsigned char[bytes] : nullptr) {
    if (bytes > 0) memset(bytes_, 0xff, bytes);
  }
  ~Workspace() { delete[] bytes_; }
  Workspace(const Workspace&) = delete;
  void* get() const { return bytes_; }

 private:
  unsigned char* bytes_;
};

// Calls action of the pixels' type, which may be codes, and of the output's.
template <class Action>
void with_pixels(const std::string& in, const std::string& out, const Action& action) {
  with_type(out, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    if (in == "uint8") return action(std::type_identity<uint8_t>(), tag);
    if (in == "uint16") return action(std::type_identity<uint16_t>(), tag);
    if (in != out) throw std::invalid_argument("pixels of " + in + " give no " + out);
    action(std::type_identity<Out>(), tag);
  });
}

}  // namespace emulator

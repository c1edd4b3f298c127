// A kernel's workspace, divided into arrays. Host code only.
#pragma once
#include <cstdint>

#include "common/hd.h"

namespace hdrops {

// Hands out pieces of the workspace; with a null workspace, only adds up their sizes.
struct Pieces {
  static constexpr int64_t kAlignment = 256;
  char* base;
  int64_t used;

  template <class T>
  T* take(int64_t count) {
    int64_t begin = used;
    used += round_up<int64_t>(count * int64_t(sizeof(T)), kAlignment);
    return base == nullptr ? nullptr : reinterpret_cast<T*>(base + begin);
  }
};

inline int ceil_log2(int64_t value) {
  int bits = 0;
  while ((int64_t(1) << bits) < value) ++bits;
  return bits;
}

}  // namespace hdrops

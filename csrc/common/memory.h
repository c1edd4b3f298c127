// Scratch memory of a kernel, and huge pages for large fresh outputs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace hdrops {

// Asks the kernel to back a freshly allocated block with 2 MiB pages before it is first touched: a page fault per
// 4 KiB otherwise costs more than the kernel's own work on a large output. Advice only; does nothing below 4 MiB.
void advise_huge_pages(void* data, size_t bytes);

// A 64-byte aligned array that is not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_((size_t(count) * sizeof(T) + 127) / 64 * 64) {
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes_));
    if (data_ == nullptr) throw std::bad_alloc();
    advise_huge_pages(data_, bytes_);
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  size_t bytes_;
  T* data_;
};

// The same, untyped and compiled once for every machine, so that kernels compiled per instruction set may own one
// (foreach_isa.h says why they may not own a Scratch).
class Buffer {
 public:
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const;

 private:
  Scratch<char> memory_;
};

}  // namespace hdrops

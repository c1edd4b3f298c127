// See memory.h.
#include "common/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hdrops {

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t page = 4096, least = size_t(4) << 20;
  if (bytes < least) return;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

Buffer::Buffer(int64_t bytes) : memory_(bytes) {}
Buffer::~Buffer() = default;
void* Buffer::data() const { return memory_.get(); }

}  // namespace hdrops

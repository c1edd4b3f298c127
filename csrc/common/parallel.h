// The one way kernels use several threads: torch's own pool, so that torch.set_num_threads rules here too.
// Declared without torch, so that kernels stay free of it.
#pragma once
#include <cstdint>

namespace hdrops {

using RangeBody = void (*)(void* context, int64_t begin, int64_t end);

// Runs body on disjoint ranges that cover [0, count); a range has at least `grain` elements. The split depends on the
// number of threads, so a result must not depend on it. The body must not throw.
void parallel_for_erased(int64_t count, int64_t grain, RangeBody body, void* context);

template <class F>
void parallel_for(int64_t count, int64_t grain, const F& body) {
  parallel_for_erased(
      count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&body));
}

int64_t thread_count();

// The threads that `work` is worth when each should get `grain` of it: at least one, at most thread_count(). Waking a
// thread costs tens of microseconds, and milliseconds where others use the machine.
int64_t threads_worth(int64_t work, int64_t grain);

}  // namespace hdrops

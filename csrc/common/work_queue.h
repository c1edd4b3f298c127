// Units of work handed to the threads one by one, in order, each to whichever thread is free. A unit must produce the
// same result whoever runs it; `slot` numbers the running thread, below thread_count(), and selects its scratch memory.
#pragma once
#include <cstdint>

namespace hdrops {

using UnitBody = void (*)(void* context, int64_t slot, int64_t unit);

// Runs body on every unit of [0, count). The body must not throw.
void parallel_units(int64_t count, UnitBody body, void* context);

// While it lives, parallel_units of the calling thread runs on no more than `threads`.
class ThreadLimit {
 public:
  explicit ThreadLimit(int64_t threads);
  ~ThreadLimit();
  ThreadLimit(const ThreadLimit&) = delete;
  ThreadLimit& operator=(const ThreadLimit&) = delete;

 private:
  int64_t outer_;
};

}  // namespace hdrops

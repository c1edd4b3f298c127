// See work_queue.h.
#include "common/work_queue.h"

#include <algorithm>
#include <atomic>

#include "common/parallel.h"

namespace hdrops {
namespace {

thread_local int64_t limit = INT64_MAX;

}  // namespace

ThreadLimit::ThreadLimit(int64_t threads) : outer_(limit) { limit = std::min(outer_, threads); }

ThreadLimit::~ThreadLimit() { limit = outer_; }

void parallel_units(int64_t count, UnitBody body, void* context) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min({count, thread_count(), limit}), 1, [&](int64_t slot, int64_t) {
    for (int64_t unit = next++; unit < count; unit = next++) body(context, slot, unit);
  });
}

}  // namespace hdrops

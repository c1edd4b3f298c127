// Launches the solver of few samples on as many threads as the systems are worth, one workspace each.
#include <algorithm>
#include <memory>
#include <vector>

#include "common/parallel.h"
#include "crf/debevec_workspace.h"

#define HDROPS_ISA_SOURCE "crf/debevec_kernels_cpu.h"
#include "common/foreach_isa.h"

namespace hdrops {
namespace {

constexpr int64_t kProductsPerThread = 1 << 20;

bool solve(const DebevecParams& p, int64_t system, DebevecWorkspace& ws) {
  HDROPS_ISA_CALL(solve_few_samples(p, system, ws));
}

}  // namespace

void solve_few_samples_cpu(const DebevecParams& p) {
  const int64_t products = p.samples * (4 * p.levels + p.samples * (p.frames + p.samples / 6));
  const int64_t threads = std::min(threads_worth(p.systems * products, kProductsPerThread), p.systems);
  std::vector<std::unique_ptr<DebevecWorkspace>> workspaces;
  for (int64_t k = 0; k < threads; ++k) workspaces.push_back(std::make_unique<DebevecWorkspace>(p));
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t system = k; system < p.systems; system += threads) {
        p.solved[system] = solve(p, system, *workspaces[k]);
      }
    }
  });
}

}  // namespace hdrops

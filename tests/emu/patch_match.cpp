// Entry points of the emulated patch matching kernels: what csrc/patch_match/bindings.h is for torch, on addresses of
// memory that the tests own.
#include "addresses.h"
#include "patch_match/match_backward_cuda.cuh"
#include "patch_match/match_cuda.cuh"

namespace hdrops {
namespace {

using namespace patch_match;
using emulator::Address;
using emulator::at;
using emulator::Workspace;

// n, c, then height and width of query and key.
using Sizes = std::array<int64_t, 6>;

MatchParams params_of(const Sizes& s, Address query, Address key, const std::array<bool, 2>& channels_last,
                      const std::array<bool, 2>& normalize, int64_t patch_size) {
  MatchParams p{};
  p.batch = s[0], p.channels = s[1];
  p.query = {at(query), s[2], s[3], channels_last[0], normalize[0]};
  p.key = {at(key), s[4], s[5], channels_last[1], normalize[1]};
  p.patch_size = patch_size;
  return p;
}

void match(const std::string& dtype, const Sizes& sizes, Address query, Address key,
           const std::array<bool, 2>& channels_last, const std::array<bool, 2>& normalize, int64_t patch_size,
           const std::array<int64_t, 2>& radius, Address centers, Address index, Address score) {
  MatchParams p = params_of(sizes, query, key, channels_last, normalize, patch_size);
  p.radius_y = std::min(radius[0], p.key.height - 1), p.radius_x = std::min(radius[1], p.key.width - 1);
  p.centers = static_cast<const int64_t*>(at(centers));
  p.index = static_cast<int64_t*>(at(index));
  p.score = at(score);
  emulator::with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Workspace workspace(match_workspace_bytes<T>(p));
    match_cuda<T>(p, workspace.get(), nullptr);
  });
}

void match_backward(const std::string& dtype, const Sizes& sizes, Address query, Address key,
                    const std::array<bool, 2>& channels_last, const std::array<bool, 2>& normalize, int64_t patch_size,
                    Address grad_score, Address index, Address grad_query, Address grad_key, bool deterministic) {
  MatchParams p = params_of(sizes, query, key, channels_last, normalize, patch_size);
  p.match = static_cast<const int64_t*>(at(index));
  p.grad_score = at(grad_score);
  p.grad_query = at(grad_query), p.grad_key = at(grad_key);
  p.deterministic = deterministic;
  emulator::with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Workspace workspace(match_backward_workspace_bytes<T>(p));
    match_backward_cuda<T>(p, workspace.get(), nullptr);
  });
}

REGISTER_FAMILY(module) {
  module.def("patch_match", &match);
  module.def("patch_match_backward", &match_backward);
}

}  // namespace
}  // namespace hdrops

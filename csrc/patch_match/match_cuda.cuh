// Forward pass of patch matching on the GPU, exact: products and sums in float32 (float64 for float64).
//
//   1. The inverse norms of the patches that the score is normalised by (features_cuda.cuh).
//   2. The search: around own positions with shared products (shared_window_cuda.cuh), around given centres without
//      (own_window_cuda.cuh).
//
// Workspace: the norms, 4 bytes a site (8 for float64); and where blocks share a tile, 8 (12) for each of them.
#pragma once
#include "common/pieces.h"
#include "patch_match/own_window_cuda.cuh"
#include "patch_match/shared_window_cuda.cuh"

namespace hdrops::patch_match {

// The scales of both maps' patches; null where the score is not normalised by them.
template <class Real>
struct Scales {
  Real *query, *key;

  static Scales take(const MatchParams& p, Pieces& pieces) {
    Real* query = pieces.take<Real>(p.query.normalize ? p.batch * p.sites() : 0);
    Real* key = pieces.take<Real>(p.key.normalize ? p.batch * p.key.height * p.key.width : 0);
    return {p.query.normalize ? query : nullptr, p.key.normalize ? key : nullptr};
  }
};

template <class T>
void launch_scales(const MatchParams& p, const Scales<device_acc_t<T>>& scales, cudaStream_t stream) {
  if (p.query.normalize) launch_norms<T>(p.query, p, scales.query, stream);
  if (p.key.normalize) launch_norms<T>(p.key, p, scales.key, stream);
}

template <class T>
struct Match {
  using Real = device_acc_t<T>;
  Scales<Real> scales;
  Real* part_score;
  int* part_place;
  int64_t workspace_bytes;

  Match(const MatchParams& p, void* workspace) {
    Pieces pieces{static_cast<char*>(workspace), 0};
    scales = Scales<Real>::take(p, pieces);
    const int64_t parts = p.centers == nullptr ? WindowGrid<T>::of(p).parts(p) : 0;
    part_score = pieces.take<Real>(parts);
    part_place = pieces.take<int>(parts);
    workspace_bytes = pieces.used;
  }
};

template <class T>
size_t match_workspace_bytes(const MatchParams& params) {
  return size_t(Match<T>(params, nullptr).workspace_bytes);
}

template <class T>
void match_cuda(const MatchParams& params, void* workspace, cudaStream_t stream) {
  const Match<T> pass(params, workspace);
  launch_scales<T>(params, pass.scales, stream);
  if (params.centers == nullptr) {
    launch_search_own_position<T>(params, pass.scales.key, pass.scales.query, pass.part_score, pass.part_place, stream);
  } else {
    launch_search_around_centers<T>(params, pass.scales.key, pass.scales.query, stream);
  }
}

}  // namespace hdrops::patch_match

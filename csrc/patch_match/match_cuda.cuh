// Forward pass of patch matching on the GPU, exact: products and sums in float32 (float64 for float64).
//
//   1. The inverse norms of the patches that the score is normalised by (features_cuda.cuh).
//   2. Around given centres, which tiles of the query have windows at one displacement from their sites
//      (tile_shifts_cuda.cuh).
//   3. The search of those, and around own positions of all, with shared products: by multiply-adds
//      (shared_window_cuda.cuh) or, for 16-bit data from sm_80 on, by matrix units (matrix_window_cuda.cuh).
//   4. The search of the other tiles, site by site (own_window_cuda.cuh).
//
// Nothing waits for the GPU: both searches are launched over all tiles, and pass by those that are the other's.
//
// Workspace: the norms, 4 bytes a site (8 for float64); 8 bytes a tile around given centres; where blocks share a tile,
// 8 (12) for each of them; and for the matrix units a copy of a map that does not lie channels last in whole vectors.
#pragma once
#include "common/pieces.h"
#include "patch_match/matrix_window_cuda.cuh"
#include "patch_match/own_window_cuda.cuh"
#include "patch_match/shared_window_cuda.cuh"
#include "patch_match/tile_shifts_cuda.cuh"

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

// Whether the search with shared products multiplies on matrix units.
template <class T>
bool uses_matrix_units() {
  return sizeof(T) == 2 && device_compute_capability() >= 80;
}

template <class T>
class Match {
 public:
  Match(const MatchParams& params, void* workspace) : p_(params) {
    Pieces pieces{static_cast<char*>(workspace), 0};
    scales_ = Scales<Real>::take(p_, pieces);
    matches_ = TileMatches<T>::take(p_, grid(), scales_.query, pieces);
    if (p_.centers != nullptr) matches_.shifts = shifts_ = pieces.take<TileShift>(matches_.grid.tiles(p_));
    if (uses_matrix_units<T>()) {
      query_ = FeaturePacking<T>::take(p_.query, p_, pieces);
      key_ = FeaturePacking<T>::take(p_.key, p_, pieces);
    }
    workspace_bytes_ = pieces.used;
  }

  int64_t workspace_bytes() const { return workspace_bytes_; }

  void run(cudaStream_t stream) const {
    launch_scales<T>(p_, scales_, stream);
    if (p_.centers != nullptr) launch_find_shifts(p_, matches_.grid, shifts_, stream);
    search_shared_windows(stream);
    launch_merge_splits(matches_, stream);
    if (p_.centers != nullptr) launch_search_around_centers<T>(p_, scales_.key, matches_, stream);
  }

 private:
  using Real = device_acc_t<T>;

  TileGrid grid() const {
    if constexpr (sizeof(T) == 2) {
      if (uses_matrix_units<T>()) return matrix_grid<T>(p_);
    }
    return window_grid<T>(p_);
  }

  void search_shared_windows(cudaStream_t stream) const {
    if constexpr (sizeof(T) == 2) {
      if (uses_matrix_units<T>()) {
        const MatrixSearch<T> search{query_.run(stream), key_.run(stream), scales_.key, matches_, int(p_.reach())};
        return launch_search_by_matrix_units<T>(p_, search, stream);
      }
    }
    launch_search_shared_window<T>(p_, scales_.key, matches_, stream);
  }

  const MatchParams& p_;
  Scales<Real> scales_{};
  TileMatches<T> matches_{};
  TileShift* shifts_ = nullptr;
  FeaturePacking<T> query_{}, key_{};
  int64_t workspace_bytes_ = 0;
};

template <class T>
size_t match_workspace_bytes(const MatchParams& params) {
  return size_t(Match<T>(params, nullptr).workspace_bytes());
}

template <class T>
void match_cuda(const MatchParams& params, void* workspace, cudaStream_t stream) {
  Match<T>(params, workspace).run(stream);
}

}  // namespace hdrops::patch_match

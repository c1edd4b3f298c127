// Feature maps as the matrix units' search reads them: channels last, in whole 16-byte vectors. A map that does not lie
// so (NCHW, a number of channels that is no multiple of 8, an odd address) is copied, with zeros as the channels that
// are missing.
#pragma once
#include "common/pack_runs_cuda.cuh"
#include "common/pieces.h"
#include "patch_match/params.h"

namespace hdrops::patch_match {

// A map with the channels of its padding.
template <class T>
struct PackedFeatures {
  const T* data;
  int height, width;
  int64_t channels;

  HDROPS_HD int vectors() const { return int(channels / kVector16<T>); }
};

// One map's way to PackedFeatures.
template <class T>
struct FeaturePacking {
  RunPacking packing;
  const void* data;
  T* copy;  // null: the map is read where it lies
  int64_t height, width;

  static FeaturePacking take(const Features& f, const MatchParams& p, Pieces& pieces) {
    const int64_t padded = round_up<int64_t>(p.channels, kVector16<T>);
    FeaturePacking packing{{p.batch, f.height * f.width, 1, p.channels, padded, f.channels_last}, f.data};
    packing.height = f.height, packing.width = f.width;
    if (!packing.in_place()) packing.copy = pieces.take<T>(packing.packing.elements());
    return packing;
  }
  bool in_place() const {
    const bool whole = packing.run == packing.padded && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    return packing.channels_last && whole;
  }
  // Copies the map if it must be.
  PackedFeatures<T> run(cudaStream_t stream) const {
    if (!in_place()) pack_runs(packing, data, copy, stream);
    return {in_place() ? static_cast<const T*>(data) : copy, int(height), int(width), packing.padded};
  }
};

}  // namespace hdrops::patch_match

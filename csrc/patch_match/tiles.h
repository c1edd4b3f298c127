// How the query's sites are cut into tiles for the search: by shape and, where the caller gives centres, by these.
#pragma once
#include <cstdint>
#include <vector>

#include "patch_match/params.h"

namespace hdrops::patch_match {

// Sites [top, bottom) x [left, right) of one image. Where the window's centre lies at the same displacement from every
// site, scores of neighbours share their products of pixels, and `shift` is that displacement.
struct Tile {
  int64_t image, top, left, bottom, right;
  bool shared;
  int64_t shift_y, shift_x;
};

// Tiles of at most `rows` x `columns` sites, over all images. Around given centres, a tile of several displacements is
// cut in four as long as it has more than a few rows or columns.
class TileList {
 public:
  TileList(const MatchParams& params, int64_t rows, int64_t columns);
  ~TileList();
  TileList(const TileList&) = delete;
  TileList& operator=(const TileList&) = delete;
  const Tile* begin() const { return begin_; }
  int64_t count() const { return count_; }
  bool all_shared() const { return all_shared_; }

 private:
  std::vector<Tile> tiles_;
  // What the kernels read; they may call nothing of a vector (common/foreach_isa.h).
  const Tile* begin_;
  int64_t count_;
  bool all_shared_;
};

}  // namespace hdrops::patch_match

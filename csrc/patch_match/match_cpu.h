// Forward pass of patch matching on the CPU. Compiled once per instruction set (common/foreach_isa.h).
//
// The query's sites are cut into tiles (tiles.h). A tile whose sites all see the key at the same displacement, as every
// tile does without centres, shares the products of pixels between overlapping patches (shared_window_cpu.h); at the
// sites of any other tile each candidate's patch is multiplied by itself (own_window_cpu.h). How an image is cut
// follows from its size and its centres alone, and tiles write disjoint sites, so that the result is bitwise the same
// for any number of threads.
#include "common/rows.h"
#include "patch_match/features_cpu.h"
#include "patch_match/own_window_cpu.h"
#include "patch_match/shared_window_cpu.h"

namespace hdrops {
namespace HDROPS_ISA {

using patch_match::TileList;

template <class T>
struct MatchPass {
  using Real = wide_t<T>;
  const MatchParams& p;
  const SharedWindowShape& shape;
  const TileList& tiles;
  const ScaleMap<Real>& key_scale;
  const ScaleMap<Real>& query_scale;
  PatchPair<Real> patches;
  Real* scratch;

  static void run(void* context, int64_t slot, int64_t unit) {
    auto& self = *static_cast<MatchPass*>(context);
    const Tile& tile = self.tiles.begin()[unit];
    if (tile.shared) {
      self.search_shared(tile, self.scratch + slot * self.shape.scratch());
    } else {
      self.search_own(tile);
    }
  }

  void search_shared(const Tile& tile, Real* memory) const {
    SharedWindow<T> window(p, shape, key_scale, tile, memory);
    window.search();
    for (int64_t y = tile.top; y < tile.bottom; ++y) {
      for (int64_t x = tile.left; x < tile.right; ++x) {
        const int64_t at = window.site(y, x), place = window.best_place[at];
        const int64_t key_y = y + tile.shift_y + place / p.window_x() - p.radius_y;
        const int64_t key_x = x + tile.shift_x + place % p.window_x() - p.radius_x;
        write(tile.image, y, x, {window.best_score[at], key_y * p.key.width + key_x});
      }
    }
  }

  void search_own(const Tile& tile) const {
    const int64_t last = p.key.height * p.key.width - 1;
    for (int64_t y = tile.top; y < tile.bottom; ++y) {
      const int64_t* centers = p.centers + (tile.image * p.query.height + y) * p.query.width;
      for (int64_t x = tile.left; x < tile.right; ++x) {
        const int64_t center = smaller(larger(centers[x], 0), last);
        write(tile.image, y, x, search_around(p, patches, key_scale, tile.image, y, x, center));
      }
    }
  }

  void write(int64_t image, int64_t y, int64_t x, const Match<Real>& match) const {
    const int64_t site = (image * p.query.height + y) * p.query.width + x;
    p.index[site] = match.index;
    const Real score = match.score * query_scale.row(image, y)[x];
    narrow(score == score ? score : -Real(__builtin_inf()), static_cast<T*>(p.score) + site);
  }
};

template <class T>
void match(const MatchParams& p) {
  using Real = wide_t<T>;
  const SharedWindowShape shape = SharedWindowShape::of<Real>(p, p.centers != nullptr);
  const TileList tiles(p, shape.rows, shape.columns);
  // A window is read in whole vectors, which may begin up to its radius before the key and end beyond it.
  const ScaleMemory<T> key_scale(p.key, p.batch, p.channels, p.reach(), p.radius_x, p.radius_x + kLanes<Real>);
  const ScaleMemory<T> query_scale(p.query, p.batch, p.channels, p.reach(), 0, 0);
  const PixelMemory<T> query(p.query, p.batch, p.channels, !tiles.all_shared());
  const PixelMemory<T> key(p.key, p.batch, p.channels, !tiles.all_shared());
  Buffer scratch(thread_count() * shape.scratch() * int64_t(sizeof(Real)));
  MatchPass<T> pass{p,
                    shape,
                    tiles,
                    key_scale.map(),
                    query_scale.map(),
                    {query.image(), key.image(), p.reach()},
                    static_cast<Real*>(scratch.data())};
  parallel_units(tiles.count(), MatchPass<T>::run, &pass);
}

}  // namespace HDROPS_ISA
}  // namespace hdrops

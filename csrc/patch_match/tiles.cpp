// See tiles.h.
#include "patch_match/tiles.h"

#include <algorithm>

namespace hdrops::patch_match {
namespace {

// A tile this small in both directions is not cut further.
constexpr int64_t kSmallest = 4;

int64_t center_of(const MatchParams& p, const Tile& tile, int64_t y, int64_t x) {
  int64_t center = p.centers[(tile.image * p.query.height + y) * p.query.width + x];
  return std::clamp<int64_t>(center, 0, p.key.height * p.key.width - 1);
}

// Fills in whether one displacement serves the whole tile, and which.
void find_shift(const MatchParams& p, Tile& tile) {
  tile.shared = true, tile.shift_y = tile.shift_x = 0;
  if (p.centers == nullptr) return;
  const int64_t width = p.key.width, first = center_of(p, tile, tile.top, tile.left);
  tile.shift_y = first / width - tile.top, tile.shift_x = first % width - tile.left;
  // A run of consecutive indices must not pass the end of a row.
  tile.shared = tile.right + tile.shift_x <= width;
  for (int64_t y = tile.top; tile.shared && y < tile.bottom; ++y) {
    for (int64_t x = tile.left; x < tile.right; ++x) {
      if (center_of(p, tile, y, x) != first + (y - tile.top) * width + (x - tile.left)) {
        tile.shared = false;
        break;
      }
    }
  }
}

void cut(const MatchParams& p, Tile tile, std::vector<Tile>& tiles) {
  find_shift(p, tile);
  const int64_t rows = tile.bottom - tile.top, columns = tile.right - tile.left;
  if (tile.shared || (rows <= kSmallest && columns <= kSmallest)) {
    tiles.push_back(tile);
    return;
  }
  const int64_t middle_y = rows <= kSmallest ? tile.bottom : tile.top + rows / 2;
  const int64_t middle_x = columns <= kSmallest ? tile.right : tile.left + columns / 2;
  for (int64_t part = 0; part < 4; ++part) {
    Tile quarter = tile;
    (part / 2 == 0 ? quarter.bottom : quarter.top) = middle_y;
    (part % 2 == 0 ? quarter.right : quarter.left) = middle_x;
    if (quarter.top < quarter.bottom && quarter.left < quarter.right) cut(p, quarter, tiles);
  }
}

}  // namespace

TileList::TileList(const MatchParams& p, int64_t rows, int64_t columns) {
  // All tiles of a direction have nearly the same size, or around given centres lie at multiples of it.
  const bool multiples = p.centers != nullptr;
  const int64_t bands = ceil_div(p.query.height, rows), strips = ceil_div(p.query.width, columns);
  for (int64_t image = 0; image < p.batch; ++image) {
    for (int64_t band = 0; band < bands; ++band) {
      for (int64_t strip = 0; strip < strips; ++strip) {
        Tile tile{};
        tile.image = image;
        tile.top = multiples ? band * rows : p.query.height * band / bands;
        tile.left = multiples ? strip * columns : p.query.width * strip / strips;
        tile.bottom = multiples ? std::min(tile.top + rows, p.query.height) : p.query.height * (band + 1) / bands;
        tile.right = multiples ? std::min(tile.left + columns, p.query.width) : p.query.width * (strip + 1) / strips;
        cut(p, tile, tiles_);
      }
    }
  }
  begin_ = tiles_.data(), count_ = int64_t(tiles_.size());
  all_shared_ = std::all_of(tiles_.begin(), tiles_.end(), [](const Tile& tile) { return tile.shared; });
}

TileList::~TileList() = default;

}  // namespace hdrops::patch_match

// The search of a tile whose windows all lie at the same displacement from their sites. Included inside
// foreach_isa.h's sources; no include guard.
//
// At one displacement the product of two patches is the sum over the patch of products of single pixels, and
// neighbouring patches share these: sums(y, x) = <query(y, x), key(y + dy, x + dx)> is computed once for each pixel,
// and a patch is a box sum over it. The tile is swept down in blocks of kBlockRows rows of the query. For one block,
// rows of the key pass by; each serves several rows of the query, at displacements one apart, and several dx, so that a
// vector that is loaded once meets kBlockRows others. As soon as all rows of a block have met their key row for some
// dy, the box sums of that dy are finished: the sums of the P - 1 rows above are kept from the block before (`carry`),
// and a running best is kept for every site. A window too large for the cache is searched in chunks.
//
// Everything here is one tile wide: kBlockRows rows of the query, as many rows of the key as the window has (both as
// [channel][x]), the carry. Nothing is kept for all displacements but the carry.
namespace hdrops {
namespace HDROPS_ISA {

using patch_match::MatchParams;
using patch_match::Tile;

// Rows of the query and displacements in x whose sums are in registers at once: 12 of 16, or 24 of 32.
constexpr int kBlockRows = kVectorBytes == 64 ? 4 : 3;
constexpr int kBlockSteps = kVectorBytes == 64 ? 6 : 4;
// Channels that are summed in registers before they are added to memory: as many lines of query and key stay in the
// first-level cache while all displacements pass by.
constexpr int64_t kBlockChannels = 64;

template <class Real>
struct LaneInteger {
  using type = int32_t;
};
template <>
struct LaneInteger<double> {
  using type = int64_t;
};
template <class Real>
using lane_t = typename LaneInteger<Real>::type;

// sums[i][j] (+)= sum over c of query[i][c] * key[c] shifted by j, for one vector of x.
template <int kRows, int kSteps, class Real>
HDROPS_HD void pixel_products(const Real* query, int64_t query_row, int64_t query_pitch, const Real* key,
                              int64_t key_pitch, int64_t channels, bool add, Real* const* sums, int64_t sums_pitch) {
  constexpr int lanes = kLanes<Real>;
  using Vec = vec<Real, lanes>;
  Vec sum[kRows][kSteps];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kSteps; ++j) sum[i][j] = Vec{};
  }
  for (int64_t c = 0; c < channels; ++c, query += query_pitch, key += key_pitch) {
    Vec left[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) left[i] = load<lanes>(query + i * query_row);
#pragma GCC unroll 8
    for (int j = 0; j < kSteps; ++j) {
      Vec right = load<lanes>(key + j);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i][j] += left[i] * right;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kSteps; ++j) {
      Real* target = sums[i] + j * sums_pitch;
      store<lanes>(target, add ? load<lanes>(target) + sum[i][j] : sum[i][j]);
    }
  }
}

// Sizes of the search: of scratch memory, for the largest tile, and of the chunks of a window.
struct SharedWindowShape {
  int64_t rows, columns;     // sites of the largest tile
  int64_t width;             // columns with the patch's reach, in whole vectors
  int64_t chunk_y, chunk_x;  // displacements of a chunk
  int64_t ring;              // rows of the key at once
  int64_t key_width;         // of a row of the key

  // In reals: a block of the query, the ring of the key, products, carry, box sums, best scores and their
  // displacements.
  int64_t query, key, sums, carry, vertical, best;

  template <class Real>
  static SharedWindowShape of(const MatchParams& p, bool shifted) {
    constexpr int64_t lanes = kLanes<Real>;
    constexpr int64_t kMostReals = 96 * 1024;  // of the carry: with the rest of the tile, a second-level cache
    SharedWindowShape s{};
    const int64_t around = 2 * p.reach();
    // A narrower tile where a block of the query's rows would fill half a cache.
    int64_t most = 32 * 1024 / (kBlockRows * p.channels) / lanes * lanes;
    most = most > 128 ? 128 : most < 4 * lanes ? 4 * lanes : most;
    s.columns = most - around;
    s.rows = 16 * kBlockRows - around;
    // Tiles around given centres are small, and cut where the squares are that share a displacement after a pyramid.
    if (shifted) s.rows = s.columns = s.columns < 32 ? 16 : 32;
    // The width that wastes least at the right end of the tiles.
    int64_t least = INT64_MAX, strips = ceil_div(p.query.width, s.columns);
    for (int64_t n = strips; !shifted && n < strips + 4; ++n) {
      int64_t width = round_up<int64_t>(ceil_div(p.query.width, n) + around, lanes);
      if (n * width < least) least = n * width, s.columns = ceil_div(p.query.width, n);
    }
    s.width = round_up<int64_t>(s.columns + around, lanes);
    s.chunk_x = p.window_x() < 64 ? p.window_x() : 64;
    int64_t carried = (around == 0 ? 1 : around) * s.chunk_x * s.width;
    s.chunk_y = kMostReals / carried < 1 ? 1 : kMostReals / carried;
    if (s.chunk_y > p.window_y()) s.chunk_y = p.window_y();
    s.ring = s.chunk_y + kBlockRows - 1;
    // An odd number of cache lines: consecutive channels then lie in different sets.
    s.key_width = round_up<int64_t>(s.width + s.chunk_x - 1, 64 / int64_t(sizeof(Real)));
    if (s.key_width * int64_t(sizeof(Real)) / 64 % 2 == 0) s.key_width += 64 / int64_t(sizeof(Real));
    s.query = kBlockRows * p.channels * s.width;
    s.key = s.ring * p.channels * s.key_width;
    s.sums = kBlockRows * kBlockRows * s.chunk_x * s.width;
    s.carry = s.chunk_y * around * s.chunk_x * s.width;
    s.vertical = s.chunk_x * (s.width + lanes);
    s.best = s.rows * (s.width + lanes);
    return s;
  }
  int64_t scratch() const { return query + key + sums + carry + vertical + 4 * best; }
};

template <class T>
struct SharedWindow {
  using Real = wide_t<T>;
  using Lane = lane_t<Real>;
  static constexpr int lanes = kLanes<Real>;
  static constexpr int64_t kRows = kBlockRows;

  const MatchParams& p;
  const SharedWindowShape& shape;
  const ScaleMap<Real>& key_scale;
  const Tile& tile;
  Real *query, *key, *sums, *carry, *vertical;
  Real *best_score, *chunk_score;
  Lane *best_place, *chunk_place;  // numbers of displacements, row by row of the window
  int64_t width;                   // of this tile's rows of pixels, in whole vectors

  // A chunk of the window: displacements [first_y, first_y + count_y) and likewise in x, relative to tile.shift.
  struct Chunk {
    int64_t first_y, count_y, first_x, count_x;
  };

  SharedWindow(const MatchParams& params, const SharedWindowShape& sizes, const ScaleMap<Real>& scale,
               const Tile& which, Real* scratch)
      : p(params), shape(sizes), key_scale(scale), tile(which) {
    query = scratch;
    key = query + shape.query;
    sums = key + shape.key;
    carry = sums + shape.sums;
    vertical = carry + shape.carry;
    best_score = vertical + shape.vertical;
    chunk_score = best_score + shape.best;
    best_place = reinterpret_cast<Lane*>(chunk_score + shape.best);
    chunk_place = best_place + shape.best;
    width = round_up<int64_t>(tile.right - tile.left + 2 * p.reach(), lanes);
  }

  int64_t pitch() const { return width + lanes; }  // of a row of best scores and of vertical sums
  int64_t site(int64_t y, int64_t x) const { return (y - tile.top) * pitch() + x - tile.left; }

  // Best score and displacement of every site of the tile.
  void search() {
    for (int64_t y = tile.top; y < tile.bottom; ++y) {
      int64_t dy = y + tile.shift_y < p.radius_y ? -(y + tile.shift_y) : -p.radius_y;
      for (int64_t x = tile.left; x < tile.right; ++x) {
        int64_t dx = x + tile.shift_x < p.radius_x ? -(x + tile.shift_x) : -p.radius_x;
        best_score[site(y, x)] = -Real(__builtin_inf());
        best_place[site(y, x)] = place(dy, dx);
      }
    }
    // The part of the window that some site sees on the key.
    const int64_t top = lower(-p.radius_y, -(tile.bottom - 1 + tile.shift_y));
    const int64_t bottom = upper(p.radius_y, p.key.height - 1 - (tile.top + tile.shift_y));
    const int64_t left = lower(-p.radius_x, -(tile.right - 1 + tile.shift_x));
    const int64_t right = upper(p.radius_x, p.key.width - 1 - (tile.left + tile.shift_x));
    for (int64_t y = top; y <= bottom; y += shape.chunk_y) {
      for (int64_t x = left; x <= right; x += shape.chunk_x) {
        search(Chunk{y, upper(shape.chunk_y, bottom - y + 1), x, upper(shape.chunk_x, right - x + 1)});
        merge();
      }
    }
  }

  static int64_t lower(int64_t bound, int64_t value) { return value > bound ? value : bound; }
  static int64_t upper(int64_t bound, int64_t value) { return value < bound ? value : bound; }

  Lane place(int64_t dy, int64_t dx) const { return Lane((dy + p.radius_y) * p.window_x() + dx + p.radius_x); }

  // Takes what the chunk found into the best; chunks do not come in the order of their displacements.
  void merge() {
    for (int64_t i = 0; i < (tile.bottom - tile.top) * pitch(); i += lanes) {
      auto score = load<lanes>(best_score + i), other = load<lanes>(chunk_score + i);
      auto at = load<lanes>(best_place + i), other_at = load<lanes>(chunk_place + i);
      auto better = (other > score) | ((other == score) & (other_at < at));
      store<lanes>(best_score + i, better ? other : score);
      store<lanes>(best_place + i, better ? other_at : at);
    }
  }

  void search(const Chunk& chunk) {
    const int64_t reach = p.reach();
    for (int64_t i = 0; i < (tile.bottom - tile.top) * pitch(); ++i) {
      chunk_score[i] = -Real(__builtin_inf());
      chunk_place[i] = Lane(INT32_MAX);
    }
    for (int64_t i = 0; i < chunk.count_y * 2 * reach * chunk.count_x * width; ++i) carry[i] = 0;
    const int64_t key_top = tile.top - reach + tile.shift_y + chunk.first_y;  // the first row of the key
    int64_t packed = 0;                                                       // rows of the key so far
    for (int64_t y = tile.top - reach; y < tile.bottom + reach; y += kRows) {
      for (int64_t i = 0; i < kRows; ++i) {
        pack(p.query, y + i, tile.left - reach, width, query + i * p.channels * width, width);
      }
      const int64_t begin = y - (tile.top - reach);
      for (; packed < begin + chunk.count_y + kRows - 1; ++packed) {
        pack(p.key, key_top + packed, tile.left - reach + tile.shift_x + chunk.first_x, width + chunk.count_x - 1,
             key_row(packed), shape.key_width);
      }
      for (int64_t t = 0; t < chunk.count_y + kRows - 1; ++t) {
        multiply(chunk, y, key_top + begin + t, key_row(begin + t), t);
        if (t >= kRows - 1) finish(chunk, y, t - (kRows - 1));
      }
    }
  }

  Real* key_row(int64_t number) const { return key + number % shape.ring * p.channels * shape.key_width; }

  // One row of features as [channel][x] from column `left` on; what lies outside the grid is left as it is.
  void pack(const Features& features, int64_t y, int64_t left, int64_t count, Real* target, int64_t pitch) const {
    const int64_t from = lower(0, -left), to = upper(count, features.width - left);
    if (y < 0 || y >= features.height || from >= to) return;
    const T* source = static_cast<const T*>(features.data) + row_begin(features, p.channels, tile.image, y);
    if (features.channels_last) {
      copy_transposed(source + (left + from) * p.channels, p.channels, target + from, pitch, to - from, p.channels);
    } else {
      const int64_t plane = features.height * features.width;
      source += left + from;
      for (int64_t c = 0; c < p.channels; ++c) {
        widen_row(source + c * plane, to - from, target + c * pitch + from);
      }
      // The next block's row.
      if (y + kRows < features.height) fetch_planes(source + kRows * features.width, plane, p.channels, to - from);
    }
  }

  // Sums of products at dy = number `step` of the chunk, for row i of the block; kRows values of dy are kept.
  Real* sums_of(int64_t i, int64_t step) const { return sums + (i * kRows + step % kRows) * shape.chunk_x * width; }

  // Row t of the key's rows of this block meets row i of the query at step t - i. A pixel outside either grid
  // contributes zero, whatever the other holds.
  void multiply(const Chunk& chunk, int64_t y, int64_t key_y, const Real* key_row, int64_t t) const {
    const int64_t first = lower(0, t - chunk.count_y + 1), last = upper(kRows - 1, t);
    int64_t begin = lower(first, -y), end = upper(last + 1, upper(p.query.height, tile.bottom + p.reach()) - y);
    if (key_y < 0 || key_y >= p.key.height || begin > end) begin = end = first;
    Real* targets[kBlockRows];
    for (int64_t i = first; i <= last; ++i) {
      if (i >= begin && i < end) {
        targets[i - begin] = sums_of(i, t - i);
      } else {
        __builtin_memset(sums_of(i, t - i), 0, size_t(chunk.count_x * width) * sizeof(Real));
      }
    }
    if (begin == end) return;
    multiply_rows<kBlockRows>(end - begin, chunk, query + begin * p.channels * width, key_row, targets);
    for (int64_t i = 0; i < end - begin; ++i) clear_outside(chunk, targets[i]);
  }

  template <int kCount>
  void multiply_rows(int64_t count, const Chunk& chunk, const Real* rows, const Real* key_row,
                     Real* const* targets) const {
    if constexpr (kCount > 1) {
      if (count < kCount) return multiply_rows<kCount - 1>(count, chunk, rows, key_row, targets);
    }
    const int64_t groups = ceil_div<int64_t>(chunk.count_x, kBlockSteps);
    for (int64_t c = 0; c < p.channels; c += kBlockChannels) {
      const int64_t channels = upper(kBlockChannels, p.channels - c);
      for (int64_t x = 0; x < width; x += lanes) {
        int64_t step = 0;
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t next = chunk.count_x * (group + 1) / groups;
          Real* to[kCount];
          for (int i = 0; i < kCount; ++i) to[i] = targets[i] + step * width + x;
          multiply_steps<kCount, kBlockSteps>(next - step, rows + c * width + x,
                                              key_row + c * shape.key_width + x + step, channels, c > 0, to);
          step = next;
        }
      }
    }
  }

  template <int kCount, int kSteps>
  HDROPS_HD void multiply_steps(int64_t steps, const Real* rows, const Real* key_row, int64_t channels, bool add,
                                Real* const* to) const {
    if constexpr (kSteps > 1) {
      if (steps < kSteps) return multiply_steps<kCount, kSteps - 1>(steps, rows, key_row, channels, add, to);
    }
    pixel_products<kCount, kSteps>(rows, p.channels * width, width, key_row, shape.key_width, channels, add, to, width);
  }

  // Zeroes a row's sums in the columns that lie outside the query or, at their displacement, the key.
  void clear_outside(const Chunk& chunk, Real* target) const {
    const int64_t left = tile.left - p.reach();  // the column of x = 0
    for (int64_t dx = 0; dx < chunk.count_x; ++dx, target += width) {
      const int64_t key_left = left + tile.shift_x + chunk.first_x + dx;
      const int64_t from = lower(lower(0, -left), -key_left);
      const int64_t to = upper(upper(width, p.query.width - left), p.key.width - key_left);
      for (int64_t x = 0; x < upper(from, width); ++x) target[x] = 0;
      for (int64_t x = lower(0, to); x < width; ++x) target[x] = 0;
    }
  }

  // The box sums that end in the block's rows at dy = number `step` of the chunk, and what they improve.
  void finish(const Chunk& chunk, int64_t y, int64_t step) {
    switch (p.patch_size) {
      case 1:
        return finish_patch<1>(chunk, y, step);
      case 3:
        return finish_patch<3>(chunk, y, step);
      case 5:
        return finish_patch<5>(chunk, y, step);
      default:
        return finish_patch<7>(chunk, y, step);
    }
  }

  template <int kPatch>
  void finish_patch(const Chunk& chunk, int64_t y, int64_t step) {
    constexpr int64_t kCarried = kPatch - 1;
    const int64_t slice = chunk.count_x * width;
    // Rows y - kCarried .. y + kRows - 1 of the sums.
    Real* row[kCarried + kRows];
    for (int64_t i = 0; i < kCarried; ++i) row[i] = carry + (step * kCarried + i) * slice;
    for (int64_t i = 0; i < kRows; ++i) row[kCarried + i] = sums_of(i, step);
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t site_y = y + i - p.reach(), key_y = site_y + tile.shift_y + chunk.first_y + step;
      if (site_y < tile.top || site_y >= tile.bottom || key_y < 0 || key_y >= p.key.height) continue;
      for (int64_t dx = 0; dx < chunk.count_x; ++dx) {
        for (int64_t x = 0; x < width; x += lanes) {
          auto sum = load<lanes>(row[i] + dx * width + x);
#pragma GCC unroll 8
          for (int d = 1; d < kPatch; ++d) sum += load<lanes>(row[i + d] + dx * width + x);
          store<lanes>(vertical + dx * pitch() + x, sum);
        }
      }
      improve<kPatch>(chunk, site_y, key_y, step);
    }
    for (int64_t i = 0; i < kCarried; ++i) {
      __builtin_memcpy(row[i], row[i + kRows], size_t(slice) * sizeof(Real));
    }
  }

  // A row of sites meets one row of the key: sums along x, scales, and keeps what is better.
  template <int kPatch>
  void improve(const Chunk& chunk, int64_t site_y, int64_t key_y, int64_t step) {
    const Real* scale = key_scale.row(tile.image, key_y) + tile.left + tile.shift_x + chunk.first_x;
    Real* scores = chunk_score + site(site_y, tile.left);
    Lane* places = chunk_place + site(site_y, tile.left);
    const Lane first = place(chunk.first_y + step, chunk.first_x);
    for (int64_t x = 0; x < tile.right - tile.left; x += lanes) {
      auto best = load<lanes>(scores + x);
      auto at = load<lanes>(places + x);
      for (int64_t dx = 0; dx < chunk.count_x; ++dx) {
        const Real* from = vertical + dx * pitch() + x;
        auto sum = load<lanes>(from);
#pragma GCC unroll 8
        for (int d = 1; d < kPatch; ++d) sum += load<lanes>(from + d);
        auto score = sum * load<lanes>(scale + x + dx);
        auto better = score > best;  // false for the NaN outside the key
        best = better ? score : best;
        at = better ? splat<lanes>(Lane(first + dx)) : at;
      }
      store<lanes>(scores + x, best);
      store<lanes>(places + x, at);
    }
  }
};

}  // namespace HDROPS_ISA
}  // namespace hdrops

// The search around a centre of each site's own, and the product of two patches. Included inside foreach_isa.h's
// sources; no include guard.
//
// With channels last a row of a patch is one run of reals, and the row of the candidate one pixel further to the right
// begins one pixel later in memory: several candidates are multiplied at once with a query vector that is loaded once.
namespace hdrops {
namespace HDROPS_ISA {

using patch_match::MatchParams;

// Candidates of a row whose sums are in registers at once.
constexpr int kCandidates = kVectorBytes == 64 ? 12 : 7;

// products[j] = sum over `rows` runs of `run` reals of query times key shifted by j * step.
template <int kCount, class Real>
void run_products(const Real* query, int64_t query_row, const Real* key, int64_t key_row, int64_t step, int64_t rows,
                  int64_t run, int64_t count, Real* products) {
  if constexpr (kCount > 1) {
    if (count < kCount) {
      return run_products<kCount - 1>(query, query_row, key, key_row, step, rows, run, count, products);
    }
  }
  constexpr int lanes = kLanes<Real>;
  vec<Real, lanes> sum[kCount];
#pragma GCC unroll 16
  for (int j = 0; j < kCount; ++j) sum[j] = vec<Real, lanes>{};
  for (int64_t row = 0; row < rows; ++row, query += query_row, key += key_row) {
    for (int64_t i = 0; i < run; i += lanes) {
      auto left = load<lanes>(query + i);
#pragma GCC unroll 16
      for (int j = 0; j < kCount; ++j) sum[j] += left * load<lanes>(key + j * step + i);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kCount; ++j) products[j] = reduce_add<Real, lanes>(sum[j]);
}

// The patches of a query and a key; pixels outside either grid contribute nothing.
template <class Real>
struct PatchPair {
  PixelImage<Real> query, key;
  int64_t reach;

  // Products of the patch around (y, x) with those around (key_y, key_x) and its `count` - 1 neighbours to the right,
  // all of which have the pixels `across` inside both grids.
  void products(int64_t image, int64_t y, int64_t x, int64_t key_y, int64_t key_x, const Taps& across, int64_t count,
                Real* result) const {
    const Taps down = Taps{-reach, reach}.inside(y, query.height).inside(key_y, key.height);
    run_products<kCandidates>(query.pixel(image, y + down.first, x + across.first), query.row(),
                              key.pixel(image, key_y + down.first, key_x + across.first), key.row(), key.channels,
                              down.count(), across.count() * key.channels, count, result);
  }

  Real product(int64_t image, int64_t y, int64_t x, int64_t key_y, int64_t key_x) const {
    Real result;
    const Taps across = Taps{-reach, reach}.inside(x, query.width).inside(key_x, key.width);
    products(image, y, x, key_y, key_x, across, 1, &result);
    return result;
  }
};

template <class Real>
struct Match {
  Real score;
  int64_t index;
};

// The best candidate of the site (y, x) around `center`, a valid index.
template <class Real>
Match<Real> search_around(const MatchParams& p, const PatchPair<Real>& patches, const ScaleMap<Real>& key_scale,
                          int64_t image, int64_t y, int64_t x, int64_t center) {
  const int64_t center_y = center / p.key.width, center_x = center % p.key.width;
  const int64_t top = larger(center_y - p.radius_y, 0), bottom = smaller(center_y + p.radius_y, p.key.height - 1);
  const int64_t left = larger(center_x - p.radius_x, 0), right = smaller(center_x + p.radius_x, p.key.width - 1);
  const Taps across = Taps{-patches.reach, patches.reach}.inside(x, p.query.width);
  // Candidates in this range have all these taps on the key; the others go one by one.
  const int64_t whole_left = -across.first, whole_right = p.key.width - 1 - across.last;
  Match<Real> best{-Real(__builtin_inf()), top * p.key.width + left};
  Real products[kCandidates];
  for (int64_t key_y = top; key_y <= bottom; ++key_y) {
    const Real* scale = key_scale.row(image, key_y);
    for (int64_t key_x = left; key_x <= right;) {
      const bool whole = key_x >= whole_left && key_x <= whole_right;
      const int64_t rest = whole ? smaller(right, whole_right) - key_x + 1 : 1;
      // The rest in groups of nearly the same size.
      const int64_t count = ceil_div(rest, ceil_div<int64_t>(rest, kCandidates));
      const Taps taps = whole ? across : across.inside(key_x, p.key.width);
      patches.products(image, y, x, key_y, key_x, taps, count, products);
      for (int64_t j = 0; j < count; ++j) {
        const Real score = products[j] * scale[key_x + j];
        if (score > best.score) best = {score, key_y * p.key.width + key_x + j};
      }
      key_x += count;
    }
  }
  return best;
}

}  // namespace HDROPS_ISA
}  // namespace hdrops

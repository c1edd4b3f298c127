// Backward pass of the score on the CPU, the matches given. Compiled once per instruction set (common/foreach_isa.h).
//
// With a(k) and b(j) the scales of the patches (1 where the score is not normalised) and g the score's gradient, site k
// and its match j = match(k) give
//   grad_query[k + d] += g a b key[j + d]   - g score a^2 query[k + d]
//   grad_key  [j + d] += g a b query[k + d] - g score b^2 key[j + d]
// for every place d of the patch; the second terms are the norms' and vanish where a norm is held at its smallest.
// Three factors for each site are computed first; then both gradients are gathered pixel by pixel, as in patch swap:
// the query's from the matches of its neighbours, the key's from the sites that match it or a neighbour (places.h).
// Every pixel is the sum of the same terms in the same order on any number of threads.
#include "common/rows.h"
#include "patch_match/features_cpu.h"
#include "patch_match/own_window_cpu.h"
#include "patch_match/pixel_sum_cpu.h"

namespace hdrops {
namespace HDROPS_ISA {

using patch_match::InversePlaces;
using patch_match::Place;
using patch_match::Places;
using patch_match::WayRange;

// What a site weighs in the gradients: on the other's patch, and on each one's own. All zero where the score is not
// finite.
template <class Real>
struct SiteFactors {
  Real other, query, key;
};

template <class T>
struct MatchBackward {
  using Real = wide_t<T>;
  const MatchParams& p;
  const Places& places;
  const InversePlaces* inverse;  // for the key's gradient only
  const ScaleMap<Real>& query_scale;
  const ScaleMap<Real>& key_scale;
  PatchPair<Real> patches;
  SiteFactors<Real>* factors;  // [N][Hq][Wq]
  Real* scratch;

  static bool in_grid(int64_t y, int64_t x, const Features& f) { return within(y, x, f.height, f.width); }
  SiteFactors<Real>* factors_row(int64_t image, int64_t y) const {
    return factors + (image * p.query.height + y) * p.query.width;
  }

  static Real own_factor(const Features& f, Real scale, Real score_gradient) {
    const bool held = !f.normalize || scale >= 1 / Real(patch_match::kSmallestNorm);
    return held ? 0 : -score_gradient * scale * scale;
  }

  // The factors of a row of sites.
  static void run_factors(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<MatchBackward*>(context);
    const MatchParams& p = self.p;
    const int64_t image = unit / p.query.height, y = unit % p.query.height;
    const T* gradient = static_cast<const T*>(p.grad_score) + unit * p.query.width;
    SiteFactors<Real>* factors = self.factors_row(image, y);
    for (int64_t x = 0; x < p.query.width; ++x) {
      const Place match = self.places.row(image, y)[x];
      const Real a = self.query_scale.row(image, y)[x], b = self.key_scale.row(image, match.y)[match.x];
      const Real score = self.patches.product(image, y, x, match.y, match.x) * a * b, g = widen(gradient[x]);
      const bool finite = score - score == 0;
      factors[x] = {finite ? g * a * b : 0, finite ? own_factor(p.query, a, g * score) : 0,
                    finite ? own_factor(p.key, b, g * score) : 0};
    }
  }

  static int64_t per_row(const Features& f) { return ceil_div(f.width, kTilePixels); }
  static int64_t units(const MatchParams& p, const Features& f) { return p.batch * f.height * per_row(f); }

  static void run_query(void* context, int64_t slot, int64_t unit) {
    static_cast<MatchBackward*>(context)->template run<false>(slot, unit);
  }
  static void run_key(void* context, int64_t slot, int64_t unit) {
    static_cast<MatchBackward*>(context)->template run<true>(slot, unit);
  }

  // A tile of a row of the query's or the key's gradient.
  template <bool kKey>
  void run(int64_t slot, int64_t unit) const {
    const Features& f = kKey ? p.key : p.query;
    const int64_t first = unit % per_row(f) * kTilePixels, row = unit / per_row(f);
    const int64_t image = row / f.height, y = row % f.height, channels = patches.key.channels;
    const int64_t count = smaller(kTilePixels, f.width - first);
    Real* sums = scratch + slot * kTilePixels * channels;
    const PixelTarget<T> target{static_cast<T*>(kKey ? p.grad_key : p.grad_query), p.channels, f.height, f.width,
                                f.channels_last};
    target.fetch(image, y, first, count);
    for (int64_t i = 0; i < count; ++i) {
      PixelSum<Real> sum(sums + i * channels, channels);
      if (kKey) {
        gather_key(image, y, first + i, sum);
      } else {
        gather_query(image, y, first + i, sum);
      }
      sum.finish();
    }
    target.write(image, y, first, count, sums, channels);
  }

  // A factor of zero keeps a NaN of features that the score does not see out of the gradient.
  static void add(PixelSum<Real>& sum, const Real* pixel, Real factor) {
    if (factor != 0) sum.add(pixel, factor);
  }

  void gather_query(int64_t image, int64_t y, int64_t x, PixelSum<Real>& sum) const {
    const Taps patch{-patches.reach, patches.reach};
    const Taps down = patch.inside(y, p.query.height), across = patch.inside(x, p.query.width);
    Real own = 0;
    for (int64_t dy = down.first; dy <= down.last; ++dy) {
      for (int64_t dx = across.first; dx <= across.last; ++dx) {
        const SiteFactors<Real>& site = factors_row(image, y + dy)[x + dx];
        own += site.query;
        const Place match = places.row(image, y + dy)[x + dx];
        if (in_grid(match.y - dy, match.x - dx, p.key)) {
          add(sum, patches.key.pixel(image, match.y - dy, match.x - dx), site.other);
        }
      }
    }
    add(sum, patches.query.pixel(image, y, x), own);
  }

  void gather_key(int64_t image, int64_t y, int64_t x, PixelSum<Real>& sum) const {
    const Taps patch{-patches.reach, patches.reach};
    const Taps down = patch.inside(y, p.key.height), across = patch.inside(x, p.key.width);
    Real own = 0;
    for (int64_t dy = down.first; dy <= down.last; ++dy) {
      for (int64_t dx = across.first; dx <= across.last; ++dx) {
        const WayRange ways = inverse->to(image, y + dy, x + dx, x + dx);
        for (const Place* way = ways.begin; way < ways.end; ++way) {
          const int64_t to_y = y + way->y, to_x = x + way->x;
          const SiteFactors<Real>& site = factors_row(image, to_y + dy)[to_x + dx];
          own += site.key;
          if (in_grid(to_y, to_x, p.query)) add(sum, patches.query.pixel(image, to_y, to_x), site.other);
        }
      }
    }
    add(sum, patches.key.pixel(image, y, x), own);
  }
};

template <class T>
void match_backward(const MatchParams& p) {
  using Real = wide_t<T>;
  using Pass = MatchBackward<T>;
  const ScaleMemory<T> query_scale(p.query, p.batch, p.channels, p.reach(), 0, 0);
  const ScaleMemory<T> key_scale(p.key, p.batch, p.channels, p.reach(), 0, 0);
  const PixelMemory<T> query(p.query, p.batch, p.channels, true), key(p.key, p.batch, p.channels, true);
  const Places places(p.match, p.batch, p.query.height, p.query.width, p.key.height, p.key.width);
  Buffer factors(p.batch * p.sites() * int64_t(sizeof(SiteFactors<Real>)));
  Buffer scratch(thread_count() * kTilePixels * key.image().channels * int64_t(sizeof(Real)));
  Pass pass{p,
            places,
            nullptr,
            query_scale.map(),
            key_scale.map(),
            {query.image(), key.image(), p.reach()},
            static_cast<SiteFactors<Real>*>(factors.data()),
            static_cast<Real*>(scratch.data())};
  parallel_units(p.batch * p.query.height, Pass::run_factors, &pass);
  if (p.grad_query != nullptr) parallel_units(Pass::units(p, p.query), Pass::run_query, &pass);
  if (p.grad_key == nullptr) return;
  const InversePlaces inverse(places, p.batch, p.query.height, p.query.width, p.key.height, p.key.width);
  pass.inverse = &inverse;
  parallel_units(Pass::units(p, p.key), Pass::run_key, &pass);
}

}  // namespace HDROPS_ISA
}  // namespace hdrops

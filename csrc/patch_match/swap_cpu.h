// Patch swap on the CPU, forward and backward. Compiled once per instruction set (common/foreach_isa.h).
//
// Both directions are gathers. An output pixel is the sum of what its neighbours' matches place on it; a pixel of the
// source collects the gradient from every site that matches it or a neighbour, whom the inverse of the match lists
// (places.h). With channels last, each term is a run of reals. With scale s a site is s runs of s * C reals, one in
// each of its rows of pixels; a unit of work is a square of sites. Every pixel is the sum of the same terms in the
// same order on any number of threads.
#include "common/rows.h"
#include "patch_match/features_cpu.h"
#include "patch_match/pixel_sum_cpu.h"

namespace hdrops {
namespace HDROPS_ISA {

using patch_match::InversePlaces;
using patch_match::Place;
using patch_match::Places;
using patch_match::SiteRange;
using patch_match::SwapParams;

// A grid of sites, cut into squares of a unit of work each: what neighbours match is often near, and then stays in the
// second-level cache for all of them.
struct SwapTiles {
  int64_t height, width;  // sites
  int64_t scale;

  int64_t side() const { return kTilePixels / scale; }  // of a square, in sites
  int64_t across() const { return ceil_div(width, side()); }
  int64_t down() const { return ceil_div(height, side()); }
  int64_t count(int64_t batch) const { return batch * down() * across(); }
};

// Row `line` of the pixels of the sites [left, right) in row y.
struct SwapRow {
  int64_t image, y, line, left, right;
};

template <class T>
struct Swap {
  using Real = wide_t<T>;
  const SwapParams& p;
  const Places& places;
  const InversePlaces* inverse;  // backward only
  Real* share;                   // backward only: 1 / count of every site of the query
  PixelImage<Real> input;
  PixelTarget<T> output;
  SwapTiles tiles;
  Real* scratch;

  int64_t run_length() const { return p.scale * p.channels; }
  static bool within(int64_t y, int64_t x, int64_t height, int64_t width) {
    return y >= 0 && y < height && x >= 0 && x < width;
  }
  // Row `line` of a site's pixels.
  const Real* pixels(int64_t image, int64_t y, int64_t x, int64_t line) const {
    return input.pixel(image, p.scale * y + line, p.scale * x);
  }

  static void run_forward(void* context, int64_t slot, int64_t unit) {
    static_cast<Swap*>(context)->template run<false>(slot, unit);
  }
  static void run_backward(void* context, int64_t slot, int64_t unit) {
    static_cast<Swap*>(context)->template run<true>(slot, unit);
  }

  template <bool kBackward>
  void run(int64_t slot, int64_t unit) const {
    const int64_t side = tiles.side(), column = unit % tiles.across(), band = unit / tiles.across() % tiles.down();
    SwapRow row{unit / tiles.across() / tiles.down(), band * side, 0, column * side, (column + 1) * side};
    if (row.right > tiles.width) row.right = tiles.width;
    for (; row.y < (band + 1) * side && row.y < tiles.height; ++row.y) {
      for (row.line = 0; row.line < p.scale; ++row.line) run_row<kBackward>(slot, row);
    }
  }

  template <bool kBackward>
  void run_row(int64_t slot, const SwapRow& row) const {
    Real* sums = scratch + slot * kTilePixels * p.channels;
    const int64_t y = p.scale * row.y + row.line, first = p.scale * row.left, count = p.scale * (row.right - row.left);
    output.fetch(row.image, y, first, count);
    for (int64_t x = row.left; x < row.right; ++x) {
      PixelSum<Real> sum(sums + (x - row.left) * run_length(), run_length());
      if (kBackward) {
        collect(row, x, sum);
      } else {
        place(row, x, sum);
      }
      sum.finish();
    }
    output.write(row.image, y, first, count, sums, p.channels);
  }

  // What the patches around site (at.y, x) place on it.
  void place(const SwapRow& at, int64_t x, PixelSum<Real>& sum) const {
    const int64_t reach = p.reach();
    for (int64_t dy = -reach; dy <= reach; ++dy) {
      const int64_t y = at.y - dy;
      if (y < 0 || y >= p.query_height) continue;
      const Place* row = places.row(at.image, y);
      for (int64_t dx = -reach; dx <= reach; ++dx) {
        if (x - dx < 0 || x - dx >= p.query_width) continue;
        const Place match = row[x - dx];
        if (!within(match.y + dy, match.x + dx, p.key_height, p.key_width)) continue;
        sum.add(pixels(at.image, match.y + dy, match.x + dx, at.line), 0);
      }
    }
    sum.weigh(share_of(sum.count()));
  }

  Real share_of(int64_t count) const { return 1 / Real(p.exclude_border ? count : p.patch_size * p.patch_size); }

  // What the sites that match pixel (at.y, x) of the key, or a neighbour of it, owe to it.
  void collect(const SwapRow& at, int64_t x, PixelSum<Real>& sum) const {
    const int64_t reach = p.reach();
    for (int64_t dy = -reach; dy <= reach; ++dy) {
      for (int64_t dx = -reach; dx <= reach; ++dx) {
        if (!within(at.y - dy, x - dx, p.key_height, p.key_width)) continue;
        const SiteRange sites = inverse->of(at.image, at.y - dy, x - dx);
        for (const Place* site = sites.begin; site < sites.end; ++site) {
          const int64_t to_y = site->y + dy, to_x = site->x + dx;
          if (!within(to_y, to_x, p.query_height, p.query_width)) continue;
          const Real weight = share[(at.image * p.query_height + to_y) * p.query_width + to_x];
          sum.add(pixels(at.image, to_y, to_x, at.line), weight);
        }
      }
    }
  }

  // 1 / count of a row of sites of the query.
  static void run_share(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<Swap*>(context);
    const SwapParams& p = self.p;
    const int64_t image = unit / p.query_height, at_y = unit % p.query_height, reach = p.reach();
    Real* share = self.share + unit * p.query_width;
    for (int64_t x = 0; x < p.query_width; ++x) {
      int64_t count = 0;
      for (int64_t dy = -reach; dy <= reach; ++dy) {
        for (int64_t dx = -reach; dx <= reach; ++dx) {
          if (!within(at_y - dy, x - dx, p.query_height, p.query_width)) continue;
          const Place match = self.places.row(image, at_y - dy)[x - dx];
          count += within(match.y + dy, match.x + dx, p.key_height, p.key_width);
        }
      }
      share[x] = self.share_of(count);
    }
  }
};

template <class T>
void swap_forward(const SwapParams& p) {
  using Real = wide_t<T>;
  const Features source{p.input, p.scale * p.key_height, p.scale * p.key_width, p.input_channels_last, false};
  const PixelMemory<T> input(source, p.batch, p.channels, true, 1);
  const Places places(p.index, p.batch, p.query_height, p.query_width, p.key_height, p.key_width);
  const SwapTiles tiles{p.query_height, p.query_width, p.scale};
  Buffer scratch(thread_count() * kTilePixels * p.channels * int64_t(sizeof(Real)));
  const PixelTarget<T> output{static_cast<T*>(p.output), p.channels, p.scale * p.query_height, p.scale * p.query_width,
                              p.output_channels_last};
  Swap<T> pass{p, places, nullptr, nullptr, input.image(), output, tiles, static_cast<Real*>(scratch.data())};
  parallel_units(tiles.count(p.batch), Swap<T>::run_forward, &pass);
}

template <class T>
void swap_backward(const SwapParams& p) {
  using Real = wide_t<T>;
  const Features gradient{p.input, p.scale * p.query_height, p.scale * p.query_width, p.input_channels_last, false};
  const PixelMemory<T> input(gradient, p.batch, p.channels, true, 1);
  const Places places(p.index, p.batch, p.query_height, p.query_width, p.key_height, p.key_width);
  const InversePlaces inverse(places, p.batch, p.query_height, p.query_width, p.key_height, p.key_width);
  const SwapTiles tiles{p.key_height, p.key_width, p.scale};
  Buffer share(p.batch * p.query_height * p.query_width * int64_t(sizeof(Real)));
  Buffer scratch(thread_count() * kTilePixels * p.channels * int64_t(sizeof(Real)));
  const PixelTarget<T> output{static_cast<T*>(p.output), p.channels, p.scale * p.key_height, p.scale * p.key_width,
                              p.output_channels_last};
  Swap<T> pass{p,
               places,
               &inverse,
               static_cast<Real*>(share.data()),
               input.image(),
               output,
               tiles,
               static_cast<Real*>(scratch.data())};
  parallel_units(p.batch * p.query_height, Swap<T>::run_share, &pass);
  parallel_units(tiles.count(p.batch), Swap<T>::run_backward, &pass);
}

}  // namespace HDROPS_ISA
}  // namespace hdrops

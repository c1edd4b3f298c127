// Patch swap on the CPU, forward and backward. Compiled once per instruction set (common/foreach_isa.h).
//
// Both directions are gathers. An output pixel is the sum of what its neighbours' matches place on it; a pixel of the
// source collects the gradient from every site that matches it or a neighbour, whom the inverse of the match lists
// (places.h). With channels last, each term is a run of reals. With scale s a site is s runs of s * C reals, one in
// each of its rows of pixels; a unit of work is a tile of such a row. Every pixel is the sum of the same terms in the
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

// A grid of sites whose pixels a unit of work computes.
struct SwapTiles {
  int64_t height, width;  // sites
  int64_t scale;

  int64_t sites() const { return kTilePixels / scale; }
  int64_t per_row() const { return ceil_div(width, sites()); }
  int64_t count(int64_t batch) const { return batch * height * scale * per_row(); }
};

// A tile: sites [left, right) of row y, row `line` of their pixels.
struct SwapTile {
  int64_t image, y, line, left, right;

  SwapTile(const SwapTiles& tiles, int64_t unit) {
    left = unit % tiles.per_row() * tiles.sites();
    right = left + tiles.sites() < tiles.width ? left + tiles.sites() : tiles.width;
    const int64_t row = unit / tiles.per_row();
    line = row % tiles.scale;
    y = row / tiles.scale % tiles.height;
    image = row / tiles.scale / tiles.height;
  }
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
    const SwapTile tile(tiles, unit);
    Real* sums = scratch + slot * kTilePixels * p.channels;
    for (int64_t x = tile.left; x < tile.right; ++x) {
      PixelSum<Real> sum(sums + (x - tile.left) * run_length(), run_length());
      if (kBackward) {
        collect(tile, x, sum);
      } else {
        place(tile, x, sum);
      }
      sum.finish();
    }
    output.write(tile.image, p.scale * tile.y + tile.line, p.scale * tile.left, p.scale * (tile.right - tile.left),
                 sums, p.channels);
  }

  // What the patches around site (tile.y, x) place on it.
  void place(const SwapTile& tile, int64_t x, PixelSum<Real>& sum) const {
    const int64_t reach = p.reach();
    for (int64_t dy = -reach; dy <= reach; ++dy) {
      const int64_t y = tile.y - dy;
      if (y < 0 || y >= p.query_height) continue;
      const Place* row = places.row(tile.image, y);
      for (int64_t dx = -reach; dx <= reach; ++dx) {
        if (x - dx < 0 || x - dx >= p.query_width) continue;
        const Place match = row[x - dx];
        if (!within(match.y + dy, match.x + dx, p.key_height, p.key_width)) continue;
        sum.add(pixels(tile.image, match.y + dy, match.x + dx, tile.line), 0);
      }
    }
    sum.weigh(share_of(sum.count()));
  }

  Real share_of(int64_t count) const { return 1 / Real(p.exclude_border ? count : p.patch_size * p.patch_size); }

  // What the sites that match pixel (tile.y, x) of the key, or a neighbour of it, owe to it.
  void collect(const SwapTile& tile, int64_t x, PixelSum<Real>& sum) const {
    const int64_t reach = p.reach();
    for (int64_t dy = -reach; dy <= reach; ++dy) {
      for (int64_t dx = -reach; dx <= reach; ++dx) {
        if (!within(tile.y - dy, x - dx, p.key_height, p.key_width)) continue;
        const SiteRange sites = inverse->of(tile.image, tile.y - dy, x - dx);
        for (const Place* site = sites.begin; site < sites.end; ++site) {
          const int64_t at_y = site->y + dy, at_x = site->x + dx;
          if (!within(at_y, at_x, p.query_height, p.query_width)) continue;
          const Real weight = share[(tile.image * p.query_height + at_y) * p.query_width + at_x];
          sum.add(pixels(tile.image, at_y, at_x, tile.line), weight);
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

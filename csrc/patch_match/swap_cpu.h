// Patch swap on the CPU, forward and backward. Compiled once per instruction set (common/foreach_isa.h).
//
// Both directions are gathers. An output pixel is the sum of what its neighbours' matches place on it; a pixel of the
// source collects the gradient from every site that matches it or a neighbour, whom the inverse of the match lists
// (places.h). With channels last, each term is a run of reals. With scale s a site is s runs of s * C reals, one in
// each of its rows of pixels; a unit of work is a rectangle of sites. Every pixel is the sum of the same terms in the
// same order on any number of threads.
#include "common/rows.h"
#include "patch_match/features_cpu.h"
#include "patch_match/pixel_sum_cpu.h"

namespace hdrops {
namespace HDROPS_ISA {

using patch_match::InversePlaces;
using patch_match::Place;
using patch_match::Places;
using patch_match::SwapParams;
using patch_match::WayRange;

// A grid of sites, cut into columns of pixels and these into units of work, which follow one another down the column:
// what neighbours match is often near, and what a row of pixels collects then stays in the second-level cache for the
// next ones, also across units.
struct SwapColumns {
  int64_t height, width;  // sites
  int64_t scale;

  static constexpr int64_t kWidth = 2 * kTilePixels, kHeight = kTilePixels;  // pixels of a unit
  int64_t unit_width() const { return kWidth / scale; }
  int64_t unit_height() const { return kHeight / scale; }
  int64_t across() const { return ceil_div(width, unit_width()); }
  int64_t down() const { return ceil_div(height, unit_height()); }
  int64_t count(int64_t batch) const { return batch * across() * down(); }
};

// Row `line` of the pixels of the sites [left, right) in row y.
struct SwapRow {
  int64_t image, y, line, left, right;
};

// A row of pixels of every site of an image.
template <class Real>
struct SitePixels {
  const Real* first;
  int64_t down, across;  // elements from site to site

  SitePixels(const PixelImage<Real>& input, int64_t scale, const SwapRow& at)
      : first(input.pixel(at.image, at.line, 0)), down(scale * input.row()), across(scale * input.channels) {}
  const Real* of(int64_t y, int64_t x) const { return first + y * down + x * across; }
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
  SwapColumns columns;
  Real* scratch;

  int64_t run_length() const { return p.scale * p.channels; }
  // The neighbours along an axis whose patches cover the pixel `at`.
  Taps neighbours(int64_t at, int64_t size) const { return Taps{-p.reach(), p.reach()}.inside(at, size); }
  static void run_forward(void* context, int64_t slot, int64_t unit) {
    static_cast<Swap*>(context)->template run<false>(slot, unit);
  }
  static void run_backward(void* context, int64_t slot, int64_t unit) {
    static_cast<Swap*>(context)->template run<true>(slot, unit);
  }

  template <bool kBackward>
  void run(int64_t slot, int64_t unit) const {
    const int64_t band = unit % columns.down(), column = unit / columns.down() % columns.across();
    const int64_t top = band * columns.unit_height(), left = column * columns.unit_width();
    SwapRow row{unit / columns.down() / columns.across(), top, 0, left,
                smaller(left + columns.unit_width(), columns.width)};
    const int64_t bottom = smaller(top + columns.unit_height(), columns.height);
    for (; row.y < bottom; ++row.y) {
      for (row.line = 0; row.line < p.scale; ++row.line) run_row<kBackward>(slot, row);
    }
  }

  template <bool kBackward>
  void run_row(int64_t slot, const SwapRow& row) const {
    Real* sums = scratch + slot * SwapColumns::kWidth * p.channels;
    const int64_t y = p.scale * row.y + row.line, first = p.scale * row.left, count = p.scale * (row.right - row.left);
    const SitePixels<Real> pixels(input, p.scale, row);
    output.fetch(row.image, y, first, count);
    for (int64_t x = row.left; x < row.right; ++x) {
      PixelSum<Real> sum(sums + (x - row.left) * run_length(), run_length());
      if (kBackward) {
        collect(pixels, row, x, sum);
      } else {
        place(pixels, row, x, sum);
      }
      sum.finish();
    }
    output.write(row.image, y, first, count, sums, p.channels);
  }

  // What the patches around site (at.y, x) place on it.
  void place(const SitePixels<Real>& pixels, const SwapRow& at, int64_t x, PixelSum<Real>& sum) const {
    const Taps down = neighbours(at.y, p.query_height), across = neighbours(x, p.query_width);
    const int64_t height = p.key_height, width = p.key_width;
    for (int64_t dy = down.first; dy <= down.last; ++dy) {
      const Place* matches = places.row(at.image, at.y + dy) + x;
      for (int64_t dx = across.first; dx <= across.last; ++dx) {
        const int64_t from_y = matches[dx].y - dy, from_x = matches[dx].x - dx;
        if (within(from_y, from_x, height, width)) sum.add(pixels.of(from_y, from_x), 0);
      }
    }
    sum.weigh(share_of(sum.count()));
  }

  Real share_of(int64_t count) const { return 1 / Real(p.exclude_border ? count : p.patch_size * p.patch_size); }

  // What the sites that match pixel (at.y, x) of the key, or a neighbour of it, owe to it. Neighbours in a row have
  // their sites side by side.
  void collect(const SitePixels<Real>& pixels, const SwapRow& at, int64_t x, PixelSum<Real>& sum) const {
    const Taps down = neighbours(at.y, p.key_height), across = neighbours(x, p.key_width);
    const int64_t height = p.query_height, width = p.query_width;
    const Real* weight = share + at.image * height * width;
    for (int64_t dy = down.first; dy <= down.last; ++dy) {
      const WayRange ways = inverse->to(at.image, at.y + dy, x + across.first, x + across.last);
      for (const Place* way = ways.begin; way < ways.end; ++way) {
        const int64_t to_y = at.y + way->y, to_x = x + way->x;
        if (within(to_y, to_x, height, width)) sum.add(pixels.of(to_y, to_x), weight[to_y * width + to_x]);
      }
    }
  }

  // 1 / count of a row of sites of the query.
  static void run_share(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<Swap*>(context);
    const SwapParams& p = self.p;
    const int64_t image = unit / p.query_height, at_y = unit % p.query_height, reach = p.reach();
    Real* share = self.share + unit * p.query_width;
    for (int64_t x = 0; x < p.query_width; ++x) share[x] = 0;
    const Taps down = self.neighbours(at_y, p.query_height);
    for (int64_t dy = down.first; dy <= down.last; ++dy) {
      const Place* matches = self.places.row(image, at_y + dy);
      for (int64_t dx = -reach; dx <= reach; ++dx) {
        for (int64_t x = larger(0, -dx); x < smaller(p.query_width, p.query_width - dx); ++x) {
          share[x] += within(matches[x + dx].y - dy, matches[x + dx].x - dx, p.key_height, p.key_width);
        }
      }
    }
    for (int64_t x = 0; x < p.query_width; ++x) share[x] = self.share_of(int64_t(share[x]));
  }
};

template <class T>
void swap_forward(const SwapParams& p) {
  using Real = wide_t<T>;
  const Features source{p.input, p.scale * p.key_height, p.scale * p.key_width, p.input_channels_last, false};
  const PixelMemory<T> input(source, p.batch, p.channels, true, 1);
  const Places places(p.index, p.batch, p.query_height, p.query_width, p.key_height, p.key_width);
  const SwapColumns columns{p.query_height, p.query_width, p.scale};
  Buffer scratch(thread_count() * SwapColumns::kWidth * p.channels * int64_t(sizeof(Real)));
  const PixelTarget<T> output{static_cast<T*>(p.output), p.channels, p.scale * p.query_height, p.scale * p.query_width,
                              p.output_channels_last};
  Swap<T> pass{p, places, nullptr, nullptr, input.image(), output, columns, static_cast<Real*>(scratch.data())};
  parallel_units(columns.count(p.batch), Swap<T>::run_forward, &pass);
}

template <class T>
void swap_backward(const SwapParams& p) {
  using Real = wide_t<T>;
  const Features gradient{p.input, p.scale * p.query_height, p.scale * p.query_width, p.input_channels_last, false};
  const PixelMemory<T> input(gradient, p.batch, p.channels, true, 1);
  const Places places(p.index, p.batch, p.query_height, p.query_width, p.key_height, p.key_width);
  const InversePlaces inverse(places, p.batch, p.query_height, p.query_width, p.key_height, p.key_width);
  const SwapColumns columns{p.key_height, p.key_width, p.scale};
  Buffer share(p.batch * p.query_height * p.query_width * int64_t(sizeof(Real)));
  Buffer scratch(thread_count() * SwapColumns::kWidth * p.channels * int64_t(sizeof(Real)));
  const PixelTarget<T> output{static_cast<T*>(p.output), p.channels, p.scale * p.key_height, p.scale * p.key_width,
                              p.output_channels_last};
  Swap<T> pass{p,
               places,
               &inverse,
               static_cast<Real*>(share.data()),
               input.image(),
               output,
               columns,
               static_cast<Real*>(scratch.data())};
  parallel_units(p.batch * p.query_height, Swap<T>::run_share, &pass);
  parallel_units(columns.count(p.batch), Swap<T>::run_backward, &pass);
}

}  // namespace HDROPS_ISA
}  // namespace hdrops

// Backward pass of deformable convolution on the CPU: five gradients, each only if asked for, bitwise the same for any
// number of threads. Compiled once per instruction set (common/foreach_isa.h).
//
// Work is cut by shape alone. Each image's output rows are split into bands, and a band into tiles of pixels. For a few
// taps at a time (Tiling) a tile computes the columns' gradient, grad_output * weight, in cache; then, sampling again,
// the columns themselves for the weight gradient, the corners' dot products with the columns' gradient, from which the
// offset and mask gradients follow, and the scatter to the input's gradient:
//
//   * A band may write only a window of input rows: its own and a halo on both sides. Windows of every second band are
//     disjoint, so all even bands run in parallel and then all odd ones, each adding straight to the one accumulator.
//   * A sample whose cell is not inside the window is left out and marked by one bit. A third pass, parallel over
//     images and panels of channels, recomputes the columns' gradient of the marked samples, a tile's worth of one tap
//     at a time, and scatters it in order. With moderate offsets there is nothing left to do.
//   * Weight and bias gradients collect in one partial sum per chunk of bands, added up in order at the end.
//
// The accumulator is grad_input itself if that is float or double, channels last and in whole vectors and one offset
// group. Memory of a thread: rows * (outputs + 2 * column_stride) reals, 0.2 MB for 64 channels; a partial sum is as
// large as the weight.
#include "common/gemm.h"
#include "common/rows.h"
#include "deform_conv2d/backward_samples_cpu.h"  // and plan.h with it

namespace hdrops {
namespace HDROPS_ISA {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Bands of output rows. kReach is how far an offset may move a sample before it is left to the third pass.
struct Bands {
  static constexpr int64_t kReach = 8;
  int64_t per_image, colours, halo;

  static Bands of(const Params& p) {
    int64_t halo = kReach + 1 + ((p.kernel_h - 1) * p.dilation_h + 1) / 2;
    int64_t count = p.out_height / ceil_div(2 * halo, p.stride_h) / 2 * 2;
    return count < 2 ? Bands{1, 1, halo} : Bands{count, 2, halo};
  }

  int64_t begin(const Params& p, int64_t band) const { return band * p.out_height / per_image; }

  Window window(const Params& p, int64_t band) const {
    int64_t middle = (p.kernel_h - 1) * p.dilation_h / 2 - p.pad_h;
    int64_t first = begin(p, band) * p.stride_h + middle - halo;
    int64_t last = begin(p, band + 1) * p.stride_h + middle + halo;
    if (band == 0 || first < 0) first = 0;
    if (band == per_image - 1 || last > p.height) last = p.height;
    return {first, last};
  }
};

template <class T, class Index>
struct Backward {
  using Real = real_t<T>;

  const Params& params;
  Channels channels;
  Tiling tiling;
  Bands bands;
  int64_t tiles_per_band, chunks;
  int64_t partial_rows, partial_size;  // of one partial sum: rows of the weight gradient; all elements, bias included
  int64_t colour;                      // which bands run: 0 even, 1 odd

  const T* input;    // packed
  Real* weight;      // packed [group][tap][panel of the group's range][output][kPanel]
  Real* grad_image;  // [N], each like the packed input
  Real* partial;     // per chunk [row][padded output], then [bias]
  FarSamples* far;   // [image][band][tile][offset group][tap]
  Real* scratch;     // per slot: grad_output, columns' gradient, columns
  int64_t scratch_size;

  int64_t range(int64_t group) const { return channels.end(group) - channels.begin(group); }
  int64_t widest_range() const {
    int64_t widest = 0;
    for (int64_t group = 0; group < params.groups; ++group) {
      if (range(group) > widest) widest = range(group);
    }
    return widest;
  }
  int64_t panel_size() const { return tiling.group_outputs * kPanel<Real>; }
  int64_t tap_size() const { return ceil_div<int64_t>(widest_range(), kPanel<Real>) * panel_size(); }
  const Real* weight_of(int64_t group, int64_t tap) const {
    return weight + (group * params.taps() + tap) * tap_size();
  }
  bool columns_gradient_wanted() const {
    return params.grad_input != nullptr || params.grad_offset != nullptr || params.grad_mask != nullptr;
  }
  bool far_samples_possible() const { return params.grad_input != nullptr && bands.per_image > 1; }
  int64_t bands_per_colour() const { return params.batch * bands.per_image / bands.colours; }

  // Rows of a partial sum lie like the columns of a tile, each matrix product's rows padded to whole blocks.
  int64_t group_rows() const { return round_up<int64_t>(widest_range(), kGemmRows); }
  int64_t block_rows() const { return round_up<int64_t>(tiling.taps * channels.total, kGemmRows); }
  int64_t partial_row(int64_t group, int64_t tap) const {
    if (params.groups > 1) return (group * params.taps() + tap) * group_rows();
    return tap / tiling.taps * block_rows() + tap % tiling.taps * channels.total;
  }
  int64_t count_partial_rows() const {
    if (params.groups > 1) return params.groups * params.taps() * group_rows();
    return ceil_div(params.taps(), tiling.taps) * block_rows();
  }

  Tile tile_of(int64_t image, int64_t band, int64_t index) const {
    return tile_at(params, tiling, image, bands.begin(params, band), bands.begin(params, band + 1), index);
  }
  FarSamples* far_of(int64_t image, int64_t band, int64_t index) const {
    return far + ((image * bands.per_image + band) * tiles_per_band + index) * params.offset_groups * params.taps();
  }

  // All weights of one output channel.
  static void pack_weight(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<Backward*>(context);
    const Params& p = self.params;
    const Channels& channels = self.channels;
    int64_t group = unit / self.tiling.group_outputs, output = unit % self.tiling.group_outputs;
    int64_t panels = ceil_div<int64_t>(self.range(group), kPanel<Real>);
    Real* packed = self.weight + group * p.taps() * self.tap_size() + output * kPanel<Real>;
    for (int64_t tap = 0; tap < p.taps(); ++tap) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        __builtin_memset(packed + tap * self.tap_size() + panel * self.panel_size(), 0, kPanel<Real> * sizeof(Real));
      }
    }
    const T* source = static_cast<const T*>(p.weight) + unit * channels.per_group * p.taps();
    for (int64_t c = 0; c < channels.per_group; ++c) {
      int64_t at = channels.position(group * channels.per_group + c) - channels.begin(group);
      Real* target = packed + at / kPanel<Real> * self.panel_size() + at % kPanel<Real>;
      for (int64_t tap = 0; tap < p.taps(); ++tap) target[tap * self.tap_size()] = widen(*source++);
    }
  }

  // grad[i, output] of a tile, zero in padding rows and padding outputs.
  void load_grad_output(const Tile& tile, Real* grad) const {
    const Params& p = params;
    int64_t pixels = p.out_pixels();
    const T* source = static_cast<const T*>(p.grad_output) + tile.image * p.out_channels * pixels;
    if (tile.count() < tile.rows() || tiling.padded_outputs != tiling.group_outputs) {
      __builtin_memset(grad, 0, size_t(tile.rows() * tiling.outputs) * sizeof(Real));
    }
    for (int64_t row = 0; row < tile.height; ++row) {
      for (int64_t group = 0; group < p.groups; ++group) {
        int64_t first_output = group * tiling.group_outputs;
        Real* target = grad + row * tile.width * tiling.outputs + group * tiling.padded_outputs;
        if (p.channels_last) {
          const T* pixel = source + tile.pixel(p, row) * p.out_channels + first_output;
          for (int64_t i = 0; i < tile.width; ++i) {
            widen_row(pixel + i * p.out_channels, tiling.group_outputs, target + i * tiling.outputs);
          }
        } else {
          copy_transposed(source + first_output * pixels + tile.pixel(p, row), pixels, target, tiling.outputs,
                          tiling.group_outputs, tile.width);
        }
      }
    }
  }

  void add_bias_gradient(int64_t rows, const Real* grad, Real* sums) const {
    constexpr int lanes = kLanes<Real>;
    for (int64_t o = 0; o < tiling.outputs; o += lanes) {
      vec<Real, lanes> sum{};
      for (int64_t i = 0; i < rows; ++i) sum += load<lanes>(grad + i * tiling.outputs + o);
      store<lanes>(sums + o, load<lanes>(sums + o) + sum);
    }
  }

  // columns[i, tap, c] = sum over outputs of grad[i, output] * weight[output, c, tap]. A product's overshoot is
  // overwritten by the next one, or lands in the row's slack.
  void columns_gradient(int64_t rows, const Real* grad, int64_t first_tap, int64_t taps, Real* columns) const {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t group = 0; group < params.groups; ++group) {
        GemmShape shape{};
        shape.rows = rows, shape.columns = range(group), shape.depth = tiling.group_outputs, shape.segments = 1;
        shape.a_stride = tiling.outputs;
        shape.b_stride = kPanel<Real>, shape.b_panel = panel_size();
        shape.c_stride = tiling.column_stride;
        gemm<Real, false, false>(shape, grad + group * tiling.padded_outputs, weight_of(group, first_tap + tap),
                                 columns + tap * channels.total + channels.begin(group));
      }
    }
  }

  // sums[c, tap, output] += sum over pixels of columns[i, tap, c] * grad[i, output].
  void add_weight_gradient(int64_t pixels, const Real* columns, const Real* grad, int64_t first_tap, int64_t taps,
                           Real* sums) const {
    bool whole = params.groups == 1;
    for (int64_t tap = 0; tap < (whole ? 1 : taps); ++tap) {
      for (int64_t group = 0; group < params.groups; ++group) {
        GemmShape shape{};
        shape.rows = round_up<int64_t>(whole ? taps * channels.total : range(group), kGemmRows);
        shape.columns = tiling.padded_outputs, shape.depth = pixels, shape.segments = 1;
        shape.a_stride = tiling.column_stride;
        shape.b_stride = tiling.outputs, shape.b_panel = kPanel<Real>;
        shape.c_stride = tiling.padded_outputs;
        gemm<Real, true, true>(shape, columns + tap * channels.total + channels.begin(group),
                               grad + group * tiling.padded_outputs,
                               sums + partial_row(group, first_tap + tap) * tiling.padded_outputs);
      }
    }
  }

  // Gradients of a tile's offsets and mask at one tap and offset group, from the corners' dot products.
  void store_offset_gradients(const Tile& tile, int64_t offset_group, int64_t tap, const Plan<Real, Index>& plan,
                              const Real (*dots)[kMaxTile]) const {
    constexpr int lanes = kLanes<Real>;
    using Cells = vec<cell_t<T>, lanes>;
    const Params& p = params;
    const auto height = splat<lanes>(Real(p.height)), width = splat<lanes>(Real(p.width));
    const auto rows = splat<lanes>(cell_t<T>(p.height)), columns = splat<lanes>(cell_t<T>(p.width));
    const vec<Real, lanes> zero{};
    Real grad_y[kMaxTile], grad_x[kMaxTile], grad_mask[kMaxTile];
    for (int64_t i = 0; i < tile.count(); i += lanes) {
      auto y = load<lanes>(plan.y + i), x = load<lanes>(plan.x + i), mask = load<lanes>(plan.mask + i);
      auto inside = both(inside_grid(y, height), inside_grid(x, width));
      auto v = sample_axis<vec<Real, lanes>, Cells>(inside ? y : zero, rows);
      auto h = sample_axis<vec<Real, lanes>, Cells>(inside ? x : zero, columns);
      auto d00 = load<lanes>(dots[0] + i), d01 = load<lanes>(dots[1] + i);
      auto d10 = load<lanes>(dots[2] + i), d11 = load<lanes>(dots[3] + i);
      auto low = h.weight_low * d00 + h.weight_high * d01, high = h.weight_low * d10 + h.weight_high * d11;
      auto slope_low = h.slope_low * d00 + h.slope_high * d01, slope_high = h.slope_low * d10 + h.slope_high * d11;
      auto dy = mask * (v.slope_low * low + v.slope_high * high);
      auto dx = mask * (v.weight_low * slope_low + v.weight_high * slope_high);
      auto dm = v.weight_low * low + v.weight_high * high;
      store<lanes>(grad_y + i, inside ? dy : zero);
      store<lanes>(grad_x + i, inside ? dx : zero);
      store<lanes>(grad_mask + i, inside ? dm : zero);
    }
    if (p.grad_offset != nullptr) {
      int64_t plane = offset_row(p, tile.image, offset_group, tap);
      write_tile<T>(p, tile, grad_y, p.grad_offset, p.offset_is_float, plane);
      write_tile<T>(p, tile, grad_x, p.grad_offset, p.offset_is_float, plane + p.out_pixels());
    }
    if (p.grad_mask != nullptr) {
      write_tile<T>(p, tile, grad_mask, p.grad_mask, p.mask_is_float, mask_row(p, tile.image, offset_group, tap));
    }
  }

  void run_tile(const Tile& tile, const Window& window, FarSamples* left_out, Real* memory, Real* sums) const {
    const Params& p = params;
    Real* grad = memory;
    Real* gradient = grad + tiling.rows * tiling.outputs;
    Real* columns = gradient + tiling.rows * tiling.column_stride;
    int64_t stride = tiling.column_stride;
    load_grad_output(tile, grad);
    if (p.grad_bias != nullptr) add_bias_gradient(tile.rows(), grad, sums + partial_rows * tiling.padded_outputs);
    Anchors<Real> anchors;
    anchors.set(p, tile);
    Plan<Real, Index> plan;
    Real dots[4][kMaxTile];
    for (int64_t first_tap = 0; first_tap < p.taps(); first_tap += tiling.taps) {
      int64_t taps = smaller(p.taps() - first_tap, tiling.taps);
      if (columns_gradient_wanted()) columns_gradient(tile.rows(), grad, first_tap, taps, gradient);
      for (int64_t group = 0; group < p.offset_groups; ++group) {
        const int64_t plane = tile.image * channels.image() + group * channels.plane;
        for (int64_t tap = 0; tap < taps; ++tap) {
          int64_t at = tap * channels.total + group * channels.padded;
          make_plan<T>(p, channels, tile, anchors, window, group, first_tap + tap, plan);
          if (p.grad_weight != nullptr) gather(channels, input + plane, plan, tile.rows(), columns + at, stride);
          if (p.grad_offset != nullptr || p.grad_mask != nullptr) {
            dot(channels, input + plane, plan, tile.count(), gradient + at, stride, dots);
            store_offset_gradients(tile, group, first_tap + tap, plan, dots);
          }
          if (p.grad_input != nullptr) {
            left_out[group * p.taps() + first_tap + tap] =
                scatter(channels, grad_image + plane, plan, tile.count(), gradient + at, stride);
          }
        }
      }
      if (p.grad_weight != nullptr) add_weight_gradient(tile.rows(), columns, grad, first_tap, taps, sums);
    }
  }

  // The bands of one colour in one chunk.
  static void run_chunk(void* context, int64_t slot, int64_t chunk) {
    auto& self = *static_cast<Backward*>(context);
    int64_t count = self.bands_per_colour(), per_image = self.bands.per_image / self.bands.colours;
    for (int64_t i = chunk * count / self.chunks; i < (chunk + 1) * count / self.chunks; ++i) {
      int64_t image = i / per_image, band = i % per_image * self.bands.colours + self.colour;
      Window window = self.bands.window(self.params, band);
      for (int64_t index = 0; index < self.tiles_per_band; ++index) {
        Tile tile = self.tile_of(image, band, index);
        if (tile.height == 0) break;
        self.run_tile(tile, window, self.far_of(image, band, index), self.scratch + slot * self.scratch_size,
                      self.partial + chunk * self.partial_size);
      }
    }
  }

  // Samples collected by the third pass: those of one tap and offset group, of any tile of an image.
  struct Batch {
    int64_t count;
    int64_t pixel[kMaxTile];
    Real y[kMaxTile], x[kMaxTile], mask[kMaxTile];
  };

  // Scatters a batch's share of one panel of channels, given as a range of a column's channels in one offset group.
  void scatter_batch(const Batch& batch, int64_t image, int64_t group, int64_t panel, int64_t tap, int64_t first,
                     int64_t last, Real* grad, Real* gradient) const {
    const Params& p = params;
    int64_t pixels = p.out_pixels(), first_output = group * tiling.group_outputs;
    const T* source = static_cast<const T*>(p.grad_output) + image * p.out_channels * pixels;
    int64_t pixel_step = p.channels_last ? p.out_channels : 1, output_step = p.channels_last ? 1 : pixels;
    for (int64_t i = 0; i < batch.count; ++i) {
      const T* element = source + batch.pixel[i] * pixel_step + first_output * output_step;
      for (int64_t o = 0; o < tiling.group_outputs; ++o) {
        grad[i * tiling.group_outputs + o] = widen(element[o * output_step]);
      }
    }
    GemmShape shape{};
    shape.rows = round_up<int64_t>(batch.count, kGemmRows), shape.columns = kPanel<Real>, shape.segments = 1;
    shape.depth = shape.a_stride = tiling.group_outputs;
    shape.b_stride = shape.c_stride = kPanel<Real>;
    gemm<Real, false, false>(shape, grad, weight_of(group, tap) + panel * panel_size(), gradient);
    int64_t origin = channels.begin(group) + panel * kPanel<Real>, offset_group = first / channels.padded;
    int64_t first_of_group = offset_group * channels.padded;
    Real* plane = grad_image + image * channels.image() + offset_group * channels.plane;
    for (int64_t i = 0; i < batch.count; ++i) {
      auto v = sample_axis(batch.y[i], cell_t<T>(p.height)), h = sample_axis(batch.x[i], cell_t<T>(p.width));
      int64_t rows[2] = {v.low * p.width * channels.padded, v.high * p.width * channels.padded};
      Real row_weight[2] = {batch.mask[i] * v.weight_low, batch.mask[i] * v.weight_high};
      int64_t column[2] = {h.low * channels.padded, h.high * channels.padded};
      Real column_weight[2] = {h.weight_low, h.weight_high};
      for (int corner = 0; corner < 4; ++corner) {
        Real* target = plane + rows[corner / 2] + column[corner % 2];
        Real weight = row_weight[corner / 2] * column_weight[corner % 2];
        for (int64_t c = first; c < last; ++c) {
          target[c - first_of_group] += weight * gradient[i * kPanel<Real> + c - origin];
        }
      }
    }
  }

  // The third pass for one image and one panel of channels.
  static void run_far(void* context, int64_t slot, int64_t unit) {
    auto& self = *static_cast<Backward*>(context);
    const Params& p = self.params;
    const Channels& channels = self.channels;
    int64_t panels = ceil_div<int64_t>(self.widest_range(), kPanel<Real>);
    int64_t image = unit / (p.groups * panels), group = unit / panels % p.groups, panel = unit % panels;
    int64_t begin = channels.begin(group) + panel * kPanel<Real>;
    int64_t end = smaller(begin + kPanel<Real>, channels.end(group));
    if (begin >= end) return;
    Real* grad = self.scratch + slot * self.scratch_size;
    Real* gradient = grad + kMaxTile * self.tiling.group_outputs;
    Batch batch;
    for (int64_t offset_group = begin / channels.padded; offset_group * channels.padded < end; ++offset_group) {
      int64_t first = offset_group * channels.padded, last = smaller(first + channels.padded, end);
      if (first < begin) first = begin;
      for (int64_t tap = 0; tap < p.taps(); ++tap) {
        batch.count = 0;
        for (int64_t band = 0; band < self.bands.per_image; ++band) {
          for (int64_t index = 0; index < self.tiles_per_band; ++index) {
            Tile tile = self.tile_of(image, band, index);
            if (tile.height == 0) break;
            const FarSamples& samples = self.far_of(image, band, index)[offset_group * p.taps() + tap];
            if ((samples.bits[0] | samples.bits[1]) == 0) continue;
            for (int64_t i = 0; i < tile.count(); ++i) {
              if ((samples.bits[i / 64] >> (i % 64) & 1) == 0) continue;
              self.add_to_batch(image, offset_group, tap, tile.pixel(p, i / tile.width) + i % tile.width, batch);
              if (batch.count < self.tiling.rows) continue;
              self.scatter_batch(batch, image, group, panel, tap, first, last, grad, gradient);
              batch.count = 0;
            }
          }
        }
        if (batch.count > 0) self.scatter_batch(batch, image, group, panel, tap, first, last, grad, gradient);
      }
    }
  }

  void add_to_batch(int64_t image, int64_t offset_group, int64_t tap, int64_t pixel, Batch& batch) const {
    const Params& p = params;
    int64_t i = batch.count++, at = offset_row(p, image, offset_group, tap) + pixel;
    batch.pixel[i] = pixel;
    const PlaneReader<T, Real> offsets{p.offset, p.offset_is_float}, masks{p.mask, p.mask_is_float};
    batch.y[i] = offsets.template load_at<1>(at, 1)[0];
    batch.x[i] = offsets.template load_at<1>(at + p.out_pixels(), 1)[0];
    batch.mask[i] = masks.template load_at<1>(mask_row(p, image, offset_group, tap) + pixel, 1)[0];
    batch.y[i] += Real(pixel / p.out_width * p.stride_h - p.pad_h) + Real(tap / p.kernel_w * p.dilation_h);
    batch.x[i] += Real(pixel % p.out_width * p.stride_w - p.pad_w) + Real(tap % p.kernel_w * p.dilation_w);
  }

  // grad_weight of one group and tap from the partial sums.
  static void reduce_weight(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<Backward*>(context);
    const Params& p = self.params;
    const Channels& channels = self.channels;
    int64_t group = unit / p.taps(), tap = unit % p.taps(), padded = self.tiling.padded_outputs;
    for (int64_t c = 0; c < channels.per_group; ++c) {
      int64_t at = channels.position(group * channels.per_group + c) - channels.begin(group);
      const Real* row = self.partial + (self.partial_row(group, tap) + at) * padded;
      T* target =
          static_cast<T*>(p.grad_weight) + (group * self.tiling.group_outputs * channels.per_group + c) * p.taps();
      for (int64_t o = 0; o < self.tiling.group_outputs; ++o) {
        Real sum = 0;
        for (int64_t chunk = 0; chunk < self.chunks; ++chunk) sum += row[chunk * self.partial_size + o];
        narrow(sum, target + o * channels.per_group * p.taps() + tap);
      }
    }
  }

  void reduce_bias() const {
    for (int64_t o = 0; o < params.out_channels; ++o) {
      int64_t at = o / tiling.group_outputs * tiling.padded_outputs + o % tiling.group_outputs;
      const Real* sums = partial + partial_rows * tiling.padded_outputs + at;
      Real sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * partial_size];
      narrow(sum, static_cast<T*>(params.grad_bias) + o);
    }
  }
};

// From the packed accumulator to grad_input, kBlock pixels a unit.
template <class T, class Real>
struct UnpackGradient {
  const Params& params;
  const Channels& channels;
  const Real* source;
  int64_t blocks;  // per image
  static constexpr int64_t kBlock = 64;

  static void run(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<UnpackGradient*>(context);
    const Params& p = self.params;
    const Channels& channels = self.channels;
    int64_t pixels = p.height * p.width, image = unit / self.blocks, first = unit % self.blocks * kBlock;
    int64_t count = smaller(pixels - first, kBlock), width = channels.per_offset_group;
    const Real* source = self.source + image * channels.image() + first * channels.padded;
    T* target = static_cast<T*>(p.grad_input) + image * p.in_channels * pixels;
    for (int64_t group = 0; group < p.offset_groups; ++group, source += channels.plane) {
      if (p.channels_last) {
        T* pixel = target + first * p.in_channels + group * width;
        for (int64_t i = 0; i < count; ++i) narrow_row(source + i * channels.padded, width, pixel + i * p.in_channels);
      } else {
        copy_transposed(source, channels.padded, target + group * width * pixels + first, pixels, count, width);
      }
    }
  }
};

// Sets memory to zero, kBlock bytes a unit.
struct Clear {
  char* memory;
  int64_t bytes;
  static constexpr int64_t kBlock = 1 << 20;

  static void run(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<Clear*>(context);
    __builtin_memset(self.memory + unit * kBlock, 0, size_t(smaller(self.bytes - unit * kBlock, kBlock)));
  }
};

inline void clear(void* memory, int64_t bytes) {
  Clear pass{static_cast<char*>(memory), bytes};
  parallel_units(ceil_div(bytes, Clear::kBlock), Clear::run, &pass);
}

// As many partial sums as there is parallel work, but within 32 MB; never fewer than four.
inline int64_t count_chunks(int64_t bands, int64_t partial_bytes) {
  int64_t most = (int64_t(32) << 20) / (partial_bytes + 1);
  return smaller(bands, most < 4 ? 4 : most);
}

template <class T, class Index>
void backward_with(const Params& p, const Channels& channels) {
  using Real = real_t<T>;
  constexpr int64_t real_bytes = sizeof(Real);
  Bands bands = Bands::of(p);
  Backward<T, Index> pass{p, channels, Tiling::of<Real>(p, channels), bands};
  const Tiling& tiling = pass.tiling;
  int64_t longest_band = ceil_div(p.out_height, bands.per_image);
  pass.tiles_per_band = ceil_div(longest_band, tiling.height) * tiling.across;
  bool sums_wanted = p.grad_weight != nullptr || p.grad_bias != nullptr;
  pass.partial_rows = p.grad_weight != nullptr ? pass.count_partial_rows() : 0;
  pass.partial_size = pass.partial_rows * tiling.padded_outputs + tiling.outputs;
  pass.chunks =
      sums_wanted ? count_chunks(pass.bands_per_colour(), pass.partial_size * real_bytes) : pass.bands_per_colour();
  int64_t tile_memory = tiling.rows * (tiling.outputs + 2 * tiling.column_stride);
  int64_t batch_memory = kMaxTile * (tiling.group_outputs + kPanel<Real>);
  pass.scratch_size = tile_memory > batch_memory ? tile_memory : batch_memory;

  bool in_place = sizeof(T) == sizeof(Real) && input_is_packed(p, channels);
  int64_t image_bytes = p.grad_input != nullptr ? p.batch * channels.image() * real_bytes : 0;
  int64_t partial_bytes = sums_wanted ? pass.chunks * pass.partial_size * real_bytes : 0;
  int64_t samples = p.batch * bands.per_image * pass.tiles_per_band * p.offset_groups * p.taps();
  Buffer packed_input(packed_input_bytes<T>(p, channels));
  Buffer packed_weight(p.groups * p.taps() * pass.tap_size() * real_bytes);
  Buffer accumulator(in_place ? 0 : image_bytes);
  Buffer partial(partial_bytes);
  Buffer far(p.grad_input != nullptr ? samples * int64_t(sizeof(FarSamples)) : 0);
  Buffer scratch(thread_count() * pass.scratch_size * real_bytes);
  pass.weight = static_cast<Real*>(packed_weight.data());
  pass.grad_image = static_cast<Real*>(in_place ? p.grad_input : accumulator.data());
  pass.partial = static_cast<Real*>(partial.data());
  pass.far = static_cast<FarSamples*>(far.data());
  pass.scratch = static_cast<Real*>(scratch.data());

  clear(pass.grad_image, image_bytes);
  clear(pass.partial, partial_bytes);
  pass.input = pack_input<T>(p, channels, packed_input.data());
  if (pass.columns_gradient_wanted()) parallel_units(p.out_channels, Backward<T, Index>::pack_weight, &pass);
  for (pass.colour = 0; pass.colour < bands.colours; ++pass.colour) {
    parallel_units(pass.chunks, Backward<T, Index>::run_chunk, &pass);
  }
  if (pass.far_samples_possible()) {
    int64_t panels = ceil_div<int64_t>(pass.widest_range(), kPanel<Real>);
    parallel_units(p.batch * p.groups * panels, Backward<T, Index>::run_far, &pass);
  }
  if (p.grad_input != nullptr && !in_place) {
    int64_t blocks = ceil_div<int64_t>(p.height * p.width, UnpackGradient<T, Real>::kBlock);
    UnpackGradient<T, Real> unpack{p, channels, pass.grad_image, blocks};
    parallel_units(p.batch * blocks, UnpackGradient<T, Real>::run, &unpack);
  }
  if (p.grad_weight != nullptr) parallel_units(p.groups * p.taps(), Backward<T, Index>::reduce_weight, &pass);
  if (p.grad_bias != nullptr) pass.reduce_bias();
}

template <class T>
void backward(const Params& p) {
  Channels channels = lay_out_channels<real_t<T>>(p);
  if (deform_conv2d::needs_wide_index(p.height * p.width * channels.total)) {
    backward_with<T, int64_t>(p, channels);
  } else {
    backward_with<T, int32_t>(p, channels);
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops

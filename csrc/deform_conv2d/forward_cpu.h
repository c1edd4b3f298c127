// Forward pass of deformable convolution on the CPU. Compiled once per instruction set (common/foreach_isa.h).
//
// A unit of work is a tile of output pixels. For a few taps at a time (Tiling) it plans where the pixels sample,
// gathers the columns of all channels into a block that stays in the second-level cache, and multiplies it with the
// packed weights, of which one panel stays in the first-level cache; sums collect in the tile's result, which leaves
// with the bias in the output's own layout. Units write disjoint pixels, so threads need no agreement. Memory of a
// thread: rows * (outputs + column_stride) reals, 0.1 MB for 64 channels and at most 0.4 MB up to 512; the packed
// weights and, unless the input already lies channels last in whole vectors and one offset group, one packed copy of
// the input are shared.
//
// 16-bit data are widened where they are read, interpolated and multiplied as floats. Where the machine has a bf16 dot
// product (HDROPS_BF16_DOT), the interpolated columns of bf16 data are rounded to bf16 and multiplied with the weights
// as they are, in pairs of channels and with sums in float, by tiles where the machine has them (AMX): one more
// rounding of each product, which the tolerance table of hdrops/testing.py knows as `factor`.
#include "common/gemm.h"
#include "common/gemm_amx.h"
#include "common/gemm_bf16.h"
#include "common/rows.h"
#include "deform_conv2d/plan.h"

namespace hdrops {
namespace HDROPS_ISA {

// What columns and packed weights are multiplied as.
template <class T>
struct ColumnOf {
  using type = real_t<T>;
};
#if defined(HDROPS_BF16_DOT)
template <>
struct ColumnOf<bfloat16> {
  using type = bfloat16;
};
#endif
template <class T>
using column_t = typename ColumnOf<T>::type;

template <class T, class Index>
struct Forward {
  using Real = real_t<T>;
  using Column = column_t<T>;
  // Channels that one step of the product takes; a weight group's range is padded to it among the packed weights.
  static constexpr int64_t kStep = int64_t(sizeof(Real) / sizeof(Column));

  const Params& params;
  Channels channels;
  Tiling tiling;
  const T* input;  // packed
  Column* weight;  // packed [group][panel][tap][channel of the group's range / kStep][kPanel][kStep]
  Real* scratch;   // per slot: result, columns
  int64_t scratch_size;

  int64_t panels() const { return ceil_div<int64_t>(tiling.group_outputs, kPanel<Real>); }
  int64_t packed_range(int64_t group) const {
    return round_up<int64_t>(channels.end(group) - channels.begin(group), kStep);
  }
  // Where a group's packed weights begin: padding adds less than kStep channels to each group before it.
  int64_t packed_begin(int64_t group) const {
    return panels() * (channels.begin(group) + group * (kStep - 1)) * params.taps() * kPanel<Real>;
  }
  int64_t packed_weight_size() const { return packed_begin(params.groups); }

  // One panel of one group's weights.
  static void pack_weight(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<Forward*>(context);
    const Params& p = self.params;
    const Channels& channels = self.channels;
    int64_t panels = self.panels(), group = unit / panels, panel = unit % panels, taps = p.taps();
    int64_t begin = channels.begin(group), range = self.packed_range(group);
    Column* packed = self.weight + self.packed_begin(group) + panel * range * taps * kPanel<Real>;
    __builtin_memset(packed, 0, size_t(range * taps * kPanel<Real>) * sizeof(Column));
    int64_t first = panel * kPanel<Real>, left = self.tiling.group_outputs - first;
    for (int64_t o = 0; o < (left < kPanel<Real> ? left : kPanel<Real>); ++o) {
      const T* source =
          static_cast<const T*>(p.weight) + (group * self.tiling.group_outputs + first + o) * channels.per_group * taps;
      for (int64_t c = 0; c < channels.per_group; ++c) {
        int64_t k = channels.position(group * channels.per_group + c) - begin;
        Column* target = packed + k / kStep * kStep * kPanel<Real> + o * kStep + k % kStep;
        for (int64_t tap = 0; tap < taps; ++tap) narrow(widen(*source++), target + tap * range * kPanel<Real>);
      }
    }
  }

  // columns[i, tap, c] for taps [first_tap, first_tap + taps) and all channels.
  void gather_columns(const Tile& tile, const Anchors<Real>& anchors, int64_t first_tap, int64_t taps,
                      Column* columns) const {
    const Params& p = params;
    const T* plane = input + tile.image * channels.image();
    Plan<Real, Index> plan;
    for (int64_t group = 0; group < p.offset_groups; ++group, plane += channels.plane) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        make_plan<T>(p, channels, tile, anchors, {0, p.height}, group, first_tap + tap, plan);
        gather(channels, plane, plan, tile.rows(), columns + tap * channels.total + group * channels.padded,
               tiling.column_stride);
      }
    }
  }

  // result (+)= columns * weights of those taps.
  void multiply(int64_t rows, const Column* columns, int64_t first_tap, int64_t taps, Real* result) const {
    for (int64_t group = 0; group < params.groups; ++group) {
      int64_t begin = channels.begin(group), range = channels.end(group) - begin, packed = packed_range(group);
      bool taps_follow_on = params.groups == 1 && range == packed;
      GemmShape shape{};
      shape.rows = rows, shape.columns = tiling.padded_outputs;
      shape.segments = taps_follow_on ? 1 : taps;
      shape.depth = taps_follow_on ? taps * range : range;
      shape.a_stride = tiling.column_stride, shape.a_segment = channels.total;
      shape.b_stride = kStep * kPanel<Real>, shape.b_segment = packed * kPanel<Real>;
      shape.b_panel = params.taps() * packed * kPanel<Real>;
      shape.c_stride = tiling.outputs;
      const Column* a = columns + begin;
      const Column* b = weight + packed_begin(group) + first_tap * packed * kPanel<Real>;
      Real* c = result + group * tiling.padded_outputs;
      if (first_tap == 0) {
        product<false>(shape, a, b, c);
      } else {
        product<true>(shape, a, b, c);
      }
    }
  }

  template <bool kAccumulate>
  static void product(const GemmShape& shape, const Column* a, const Column* b, Real* c) {
    if constexpr (kStep == 2) {
#if defined(HDROPS_HAVE_AVX512_BF16)
      const int64_t step = isa() == Isa::amx ? tile_depth(shape.depth) : 0;
      if (step > 0) return gemm_amx<kAccumulate>(shape, step, a, b, c);
#endif
      gemm_bf16<kAccumulate>(shape, a, b, c);
    } else {
      gemm<Real, false, kAccumulate>(shape, a, b, c);
    }
  }

  void add_bias(int64_t count, Real* result) const {
    if (params.bias == nullptr) return;
    for (int64_t group = 0; group < params.groups; ++group) {
      const T* bias = static_cast<const T*>(params.bias) + group * tiling.group_outputs;
      for (int64_t i = 0; i < count; ++i) {
        Real* row = result + i * tiling.outputs + group * tiling.padded_outputs;
        for (int64_t o = 0; o < tiling.group_outputs; ++o) row[o] += widen(bias[o]);
      }
    }
  }

  void store_result(const Tile& tile, const Real* result) const {
    const Params& p = params;
    int64_t pixels = p.out_pixels();
    T* output = static_cast<T*>(p.output) + tile.image * p.out_channels * pixels;
    for (int64_t row = 0; row < tile.height; ++row) {
      for (int64_t group = 0; group < p.groups; ++group) {
        int64_t first_output = group * tiling.group_outputs;
        const Real* source = result + row * tile.width * tiling.outputs + group * tiling.padded_outputs;
        if (p.channels_last) {
          T* target = output + tile.pixel(p, row) * p.out_channels + first_output;
          for (int64_t i = 0; i < tile.width; ++i) {
            narrow_row(source + i * tiling.outputs, tiling.group_outputs, target + i * p.out_channels);
          }
        } else {
          copy_transposed(source, tiling.outputs, output + first_output * pixels + tile.pixel(p, row), pixels,
                          tile.width, tiling.group_outputs);
        }
      }
    }
  }

  // Fetches the lines that a row of the tile will be written to in the planes of the output: short pieces far apart,
  // which no prefetcher of the processor foresees.
  void fetch_output(const Tile& tile, int64_t row) const {
    const Params& p = params;
    if (p.channels_last) return;
    const T* output = static_cast<const T*>(p.output) + tile.image * p.out_channels * p.out_pixels();
    fetch_planes(output + tile.pixel(p, row), p.out_pixels(), p.out_channels, tile.width);
  }

  int64_t tiles_per_image() const { return tiling.across * ceil_div(params.out_height, tiling.height); }

  static void run_tile(void* context, int64_t slot, int64_t unit) {
    auto& self = *static_cast<Forward*>(context);
    const Tiling& tiling = self.tiling;
    int64_t tiles = self.tiles_per_image();
    Tile tile = tile_at(self.params, tiling, unit / tiles, 0, self.params.out_height, unit % tiles);
    Real* result = self.scratch + slot * self.scratch_size;
    Column* columns = reinterpret_cast<Column*>(result + tiling.rows * tiling.outputs);
    Anchors<Real> anchors;
    anchors.set(self.params, tile);
    int64_t fetched = 0;
    for (int64_t tap = 0; tap < self.params.taps(); tap += tiling.taps) {
      int64_t taps = self.params.taps() - tap < tiling.taps ? self.params.taps() - tap : tiling.taps;
      self.gather_columns(tile, anchors, tap, taps, columns);
      for (; fetched < tile.height * (tap + taps) / self.params.taps(); ++fetched) self.fetch_output(tile, fetched);
      self.multiply(tile.rows(), columns, tap, taps, result);
    }
    self.add_bias(tile.count(), result);
    self.store_result(tile, result);
  }
};

template <class T, class Index>
void forward_with(const Params& p, const Channels& channels) {
  using Real = real_t<T>;
  Forward<T, Index> pass{p, channels, Tiling::of<Real>(p, channels), nullptr, nullptr, nullptr, 0};
  const Tiling& tiling = pass.tiling;
  Buffer packed_input(packed_input_bytes<T>(p, channels));
  Buffer packed_weight(pass.packed_weight_size() * int64_t(sizeof(column_t<T>)));
  pass.scratch_size = tiling.rows * (tiling.column_stride + tiling.outputs);
  Buffer scratch(thread_count() * pass.scratch_size * int64_t(sizeof(Real)));
  pass.weight = static_cast<column_t<T>*>(packed_weight.data());
  pass.scratch = static_cast<Real*>(scratch.data());
  pass.input = pack_input<T>(p, channels, packed_input.data());
  parallel_units(p.groups * pass.panels(), Forward<T, Index>::pack_weight, &pass);
  parallel_units(p.batch * pass.tiles_per_image(), Forward<T, Index>::run_tile, &pass);
}

template <class T>
void forward(const Params& p) {
  Channels channels = lay_out_channels<real_t<T>>(p);
  if (deform_conv2d::needs_wide_index(p.height * p.width * channels.total)) {
    forward_with<T, int64_t>(p, channels);
  } else {
    forward_with<T, int32_t>(p, channels);
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops

// Forward pass of deformable convolution on the CPU. Compiled once per instruction set (common/foreach_isa.h).
//
// A unit of work is a tile of output pixels. For a few taps at a time (Tiling) it plans where the pixels sample,
// gathers the columns of all channels into a block that stays in the second-level cache, and multiplies it with the
// packed weights, of which one panel stays in the first-level cache; sums collect in the tile's result, which leaves
// with the bias in the output's own layout. Units write disjoint pixels, so threads need no agreement. Memory of a
// thread: rows * (column_stride + outputs) reals, 0.1 MB for 64 channels and at most 0.4 MB up to 512; the packed
// weights and, unless the input already lies channels last in whole vectors, one packed copy of the input are shared.
//
// 16-bit data are widened where they are read and multiplied as floats. The bf16 dot product of AVX-512 would need the
// interpolated columns rounded to bf16, an error beyond the tolerance table of hdrops/testing.py.
#include "common/gemm.h"
#include "deform_conv2d/plan.h"

namespace hdrops {
namespace HDROPS_ISA {

template <class T, class Index>
struct Forward {
  using Real = real_t<T>;

  const Params& params;
  Channels channels;
  Tiling tiling;
  const T* input;  // packed
  Real* weight;    // packed [group][panel][tap][channel of the group's range][kPanel]
  Real* scratch;   // per slot: columns, result
  int64_t scratch_size;

  int64_t panels() const { return ceil_div<int64_t>(tiling.group_outputs, kPanel<Real>); }

  // One panel of one group's weights.
  static void pack_weight(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<Forward*>(context);
    const Params& p = self.params;
    const Channels& channels = self.channels;
    int64_t panels = self.panels(), group = unit / panels, panel = unit % panels, taps = p.taps();
    int64_t begin = channels.begin(group), range = channels.end(group) - begin;
    Real* packed = self.weight + (panels * begin + panel * range) * taps * kPanel<Real>;
    __builtin_memset(packed, 0, size_t(range * taps * kPanel<Real>) * sizeof(Real));
    int64_t first = panel * kPanel<Real>, left = self.tiling.group_outputs - first;
    for (int64_t o = 0; o < (left < kPanel<Real> ? left : kPanel<Real>); ++o) {
      const T* source =
          static_cast<const T*>(p.weight) + (group * self.tiling.group_outputs + first + o) * channels.per_group * taps;
      for (int64_t c = 0; c < channels.per_group; ++c) {
        Real* target = packed + (channels.position(group * channels.per_group + c) - begin) * kPanel<Real> + o;
        for (int64_t tap = 0; tap < taps; ++tap) target[tap * range * kPanel<Real>] = widen(*source++);
      }
    }
  }

  // columns[i, tap, c] for taps [first_tap, first_tap + taps) and all channels.
  void gather_columns(const Tile& tile, const Anchors<Real>& anchors, int64_t first_tap, int64_t taps,
                      Real* columns) const {
    const Params& p = params;
    const T* image = input + tile.image * p.height * p.width * channels.total;
    Plan<Real, Index> plan;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t group = 0; group < p.offset_groups; ++group) {
        make_plan<T>(p, channels, tile, anchors, {0, p.height}, group, first_tap + tap, tiling.rows, plan);
        gather(channels, image + group * channels.padded, plan, tiling.rows,
               columns + tap * channels.total + group * channels.padded, tiling.column_stride);
      }
    }
  }

  // result (+)= columns * weights of those taps.
  void multiply(const Real* columns, int64_t first_tap, int64_t taps, Real* result) const {
    for (int64_t group = 0; group < params.groups; ++group) {
      int64_t begin = channels.begin(group), range = channels.end(group) - begin;
      GemmShape shape{};
      shape.rows = tiling.rows, shape.columns = tiling.padded_outputs;
      shape.segments = params.groups == 1 ? 1 : taps;
      shape.depth = params.groups == 1 ? taps * range : range;
      shape.a_stride = tiling.column_stride, shape.a_segment = channels.total;
      shape.b_stride = kPanel<Real>, shape.b_segment = range * kPanel<Real>;
      shape.b_panel = params.taps() * range * kPanel<Real>;
      shape.c_stride = tiling.outputs;
      const Real* a = columns + begin;
      const Real* b = weight + (panels() * begin * params.taps() + first_tap * range) * kPanel<Real>;
      Real* c = result + group * tiling.padded_outputs;
      if (first_tap == 0) {
        gemm<Real, false, false>(shape, a, b, c);
      } else {
        gemm<Real, false, true>(shape, a, b, c);
      }
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
    for (int64_t group = 0; group < p.groups; ++group, result += tiling.padded_outputs) {
      int64_t first_output = group * tiling.group_outputs;
      if (p.channels_last) {
        T* target = output + tile.first * p.out_channels + first_output;
        for (int64_t i = 0; i < tile.count; ++i) {
          write_row(result + i * tiling.outputs, tiling.group_outputs, target + i * p.out_channels);
        }
      } else {
        transpose(result, tiling.outputs, output + first_output * pixels + tile.first, pixels, tile.count,
                  tiling.group_outputs);
      }
    }
  }

  static void run_tile(void* context, int64_t slot, int64_t unit) {
    auto& self = *static_cast<Forward*>(context);
    const Tiling& tiling = self.tiling;
    Tile tile{unit / tiling.per_image, unit % tiling.per_image * tiling.rows, tiling.rows};
    int64_t left = self.params.out_pixels() - tile.first;
    if (left < tile.count) tile.count = left;
    Real* columns = self.scratch + slot * self.scratch_size;
    Real* result = columns + tiling.rows * tiling.column_stride;
    Anchors<Real> anchors;
    anchors.set(self.params, tile);
    for (int64_t tap = 0; tap < self.params.taps(); tap += tiling.taps) {
      int64_t taps = self.params.taps() - tap < tiling.taps ? self.params.taps() - tap : tiling.taps;
      self.gather_columns(tile, anchors, tap, taps, columns);
      self.multiply(columns, tap, taps, result);
    }
    self.add_bias(tile.count, result);
    self.store_result(tile, result);
  }
};

template <class T, class Index>
void forward_with(const Params& p, const Channels& channels) {
  using Real = real_t<T>;
  Forward<T, Index> pass{p, channels, Tiling::of<Real>(p, channels, p.out_pixels()), nullptr, nullptr, nullptr, 0};
  const Tiling& tiling = pass.tiling;
  Buffer packed_input(packed_input_bytes<T>(p, channels));
  Buffer packed_weight(p.taps() * channels.total * pass.panels() * kPanel<Real> * int64_t(sizeof(Real)));
  pass.scratch_size = tiling.rows * (tiling.column_stride + tiling.outputs);
  Buffer scratch(thread_count() * pass.scratch_size * int64_t(sizeof(Real)));
  pass.weight = static_cast<Real*>(packed_weight.data());
  pass.scratch = static_cast<Real*>(scratch.data());
  pass.input = pack_input<T>(p, channels, packed_input.data());
  parallel_units(p.groups * pass.panels(), Forward<T, Index>::pack_weight, &pass);
  parallel_units(p.batch * tiling.per_image, Forward<T, Index>::run_tile, &pass);
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

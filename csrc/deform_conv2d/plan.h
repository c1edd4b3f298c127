// What forward and backward share: how channels lie in memory, how work is cut into tiles, and the sampling plan of a
// tile. Included inside foreach_isa.h's sources; no include guard.
//
// An image lies as one plane per offset group, [offset group][H][W][channel], the channels padded to whole vectors, so
// that every gather and scatter is a run of full vectors and the neighbours that one tile samples lie close together. A
// tile is a rectangle of up to kMaxTile output pixels of one image: the more nearly it is a square, the more of what
// its taps sample is the same, and what moves between the caches, not arithmetic, is what a gather costs. A tile's plan
// says, for one tap and one offset group, where each pixel samples: four corners of a cell and what each weighs, the
// mask included.
namespace hdrops {
namespace HDROPS_ISA {

using deform_conv2d::Params;

// Coordinates and sums are kept in Real, and Cell is the integer of its width.
template <class T>
using real_t = wide_t<T>;
template <class Real>
struct CellOf {
  using type = int32_t;
};
template <>
struct CellOf<double> {
  using type = int64_t;
};
template <class T>
using cell_t = typename CellOf<real_t<T>>::type;

constexpr int kMaxTile = 96;  // a multiple of kGemmRows and of every vector length

// The channels of the padded layout, and of a tile's columns. A weight group owns the range [begin(g), end(g)) of a
// column; the ranges cover everything, and padding inside a range meets zero weights.
struct Channels {
  int64_t per_offset_group, per_group;
  int lanes;              // vector length of gather and scatter: a full vector, half of one, or 1
  int64_t padded, total;  // channels of one offset group, and of all, padding included
  int64_t plane;          // elements of an image's plane of one offset group

  int64_t position(int64_t channel) const { return channel / per_offset_group * padded + channel % per_offset_group; }
  int64_t begin(int64_t group) const { return position(group * per_group); }
  int64_t end(int64_t group) const {
    int64_t next = (group + 1) * per_group;
    return next % per_offset_group == 0 ? next / per_offset_group * padded : position(next - 1) + 1;
  }
  bool has_padding() const { return padded != per_offset_group; }
  int64_t image() const { return plane / padded * total; }  // elements of an image
};

template <class Real>
Channels lay_out_channels(const Params& p) {
  Channels c{p.in_channels / p.offset_groups, p.in_channels / p.groups, kLanes<Real>, 0, 0, 0};
  int64_t full = round_up<int64_t>(c.per_offset_group, kLanes<Real>);
  int64_t half = round_up<int64_t>(c.per_offset_group, kLanes<Real> / 2);
  if (half < full) c.lanes = kLanes<Real> / 2;
  if (c.per_offset_group <= 2) c.lanes = 1;
  c.padded = round_up<int64_t>(c.per_offset_group, c.lanes);
  c.total = c.padded * p.offset_groups;
  c.plane = p.height * p.width * c.padded;
  return c;
}

// How a convolution is cut: tiles of width x height and at most `rows` pixels, columns of `taps` taps at a time. With
// few channels several taps make one matrix product deep enough; with very many the tile shrinks, so that its columns
// stay in the second-level cache. Outputs of a weight group are padded to whole vectors.
struct Tiling {
  int64_t rows, width, height;
  int64_t across;  // tiles beside one another in an image
  int64_t taps;
  int64_t group_outputs, padded_outputs, outputs;  // of a weight group, padded, and of all groups padded
  int64_t column_stride;

  template <class Real>
  static Tiling of(const Params& p, const Channels& channels) {
    Tiling t{};
    t.group_outputs = p.out_channels / p.groups;
    t.padded_outputs = round_up<int64_t>(t.group_outputs, kLanes<Real>);
    t.outputs = t.padded_outputs * p.groups;
    int64_t widest = channels.total > t.outputs ? channels.total : t.outputs;
    int64_t rows = widest <= 512 ? kMaxTile : kMaxTile * 512 / widest;
    t.rows = rows < kGemmRows ? kGemmRows : rows / kGemmRows * kGemmRows;
    int64_t widest_tile = t.rows < 64 ? 8 : 16;  // a line of floats
    t.width = ceil_div(p.out_width, ceil_div(p.out_width, widest_tile));
    if (t.width > t.rows) t.width = t.rows;
    t.across = ceil_div(p.out_width, t.width);
    t.height = t.rows / t.width;
    int64_t deepest = channels.total >= 256 ? 1 : 256 / channels.total;
    t.taps = ceil_div(p.taps(), ceil_div(p.taps(), deepest));
    // The slack takes the overshoot of a product's last panel; a stride of whole kilobytes would hit few cache sets.
    t.column_stride = round_up<int64_t>(t.taps * channels.total, kLanes<Real>) + kPanel<Real>;
    if (t.column_stride * int64_t(sizeof(Real)) % 1024 == 0) t.column_stride += kLanes<Real>;
    return t;
  }
};

// A rectangle of output pixels of an image, none if its height is 0; pixel i lies in its row i / width.
struct Tile {
  int64_t image, row, column, height, width;

  int64_t count() const { return height * width; }
  // Rows of its matrices: those beyond count() are padding, sample nothing and contribute zero.
  int64_t rows() const { return round_up<int64_t>(count(), kGemmRows); }
  // Position within the image's output plane of the first pixel of a row.
  int64_t pixel(const Params& p, int64_t tile_row) const { return (row + tile_row) * p.out_width + column; }
  // How much further the next tile's pixels lie there.
  int64_t step(const Params& p) const { return column + width < p.out_width ? width : height * p.out_width - column; }
};

// The tile numbered `index` of an image's output rows [begin, end), row by row.
inline Tile tile_at(const Params& p, const Tiling& tiling, int64_t image, int64_t begin, int64_t end, int64_t index) {
  Tile tile{image, begin + index / tiling.across * tiling.height, index % tiling.across * tiling.width, 0, 0};
  if (tile.row >= end) return tile;
  tile.height = end - tile.row < tiling.height ? end - tile.row : tiling.height;
  tile.width = p.out_width - tile.column < tiling.width ? p.out_width - tile.column : tiling.width;
  return tile;
}

// Where tap (0, 0) of an unshifted kernel lies for the rows and columns of a tile.
template <class Real>
struct Anchors {
  Real y[kMaxTile], x[kMaxTile];

  void set(const Params& p, const Tile& tile) {
    for (int64_t i = 0; i < tile.height; ++i) y[i] = Real((tile.row + i) * p.stride_h - p.pad_h);
    for (int64_t i = 0; i < tile.width; ++i) x[i] = Real((tile.column + i) * p.stride_w - p.pad_w);
    for (int64_t i = tile.width; i < round_up<int64_t>(tile.width, kLanes<Real>); ++i) x[i] = 0;
  }
};

template <class Real, class Index>
struct Plan {
  static constexpr int kSize = kMaxTile + kLanes<Real>;  // a tile row's last vector may overshoot
  Real y[kSize], x[kSize], mask[kSize];                  // positions and mask values
  Index corner[4][kSize];  // offsets into the plane of the cell's corners 00, 01, 10, 11; the first is -1 if the
                           // position samples nothing
  Index target[kSize];     // corner[0], or -1 too if the cell is not within the rows that may be written
  Real weight[4][kSize];
};

// Rows of the input that a plan's user may write.
struct Window {
  int64_t begin, end;
};

// A vector of a row of which `left` elements are left; lanes beyond them are 0.
template <int N, class Real, class S>
HDROPS_HD vec<Real, N> load_up_to(const S* source, int64_t left) {
  if (left >= N) return load_wide<N>(source);
  Real part[N] = {};
  for (int64_t i = 0; i < left; ++i) part[i] = widen(source[i]);
  return load<N>(part);
}

// Writes a tile's elements to a plane [P] that begins at `plane` of a tensor whose elements are T, or Real.
template <class T, class Real>
void write_tile(const Params& p, const Tile& tile, const Real* source, void* tensor, bool is_real, int64_t plane) {
  for (int64_t row = 0; row < tile.height; ++row, source += tile.width) {
    int64_t at = plane + tile.pixel(p, row);
    if (is_real) {
      narrow_row(source, tile.width, static_cast<Real*>(tensor) + at);
    } else {
      narrow_row(source, tile.width, static_cast<T*>(tensor) + at);
    }
  }
}

// Planes [P] of offsets or mask values, of elements that are T or Real; null reads as ones.
template <class T, class Real>
struct PlaneReader {
  const void* tensor;
  bool is_real;

  template <int N>
  HDROPS_HD vec<Real, N> load_at(int64_t at, int64_t left) const {
    if (tensor == nullptr) return splat<N>(Real(1));
    if (sizeof(T) == sizeof(Real) || is_real) return load_up_to<N, Real>(static_cast<const Real*>(tensor) + at, left);
    return load_up_to<N, Real>(static_cast<const T*>(tensor) + at, left);
  }
  // Fetches a line that the next tile reads, after a tour through all other planes.
  HDROPS_HD void prefetch(int64_t at) const {
    if (tensor == nullptr) return;
    __builtin_prefetch(static_cast<const char*>(tensor) + at * int64_t(is_real ? sizeof(Real) : sizeof(T)));
  }
};

// Position in `offset` of dy of an image's first pixel; dx lies out_pixels() further.
inline int64_t offset_row(const Params& p, int64_t image, int64_t offset_group, int64_t tap) {
  return ((image * p.offset_groups + offset_group) * p.taps() + tap) * 2 * p.out_pixels();
}

// Position in `mask` of an image's first pixel.
inline int64_t mask_row(const Params& p, int64_t image, int64_t offset_group, int64_t tap) {
  return ((image * p.offset_groups + offset_group) * p.taps() + tap) * p.out_pixels();
}

template <class T, class Index, class Real = real_t<T>>
void make_plan(const Params& p, const Channels& channels, const Tile& tile, const Anchors<Real>& anchors,
               const Window& window, int64_t offset_group, int64_t tap, Plan<Real, Index>& plan) {
  constexpr int lanes = kLanes<Real>;
  using Reals = vec<Real, lanes>;
  using Cells = vec<cell_t<T>, lanes>;
  using Indices = vec<Index, lanes>;
  const PlaneReader<T, Real> offsets{p.offset, p.offset_is_float}, masks{p.mask, p.mask_is_float};
  const int64_t offset_plane = offset_row(p, tile.image, offset_group, tap), pixels = p.out_pixels();
  const int64_t mask_plane = mask_row(p, tile.image, offset_group, tap);
  const Real tap_y = Real(tap / p.kernel_w * p.dilation_h), tap_x = Real(tap % p.kernel_w * p.dilation_w);
  const auto height = splat<lanes>(Real(p.height)), width = splat<lanes>(Real(p.width));
  const auto rows_of_input = splat<lanes>(cell_t<T>(p.height)), columns_of_input = splat<lanes>(cell_t<T>(p.width));
  const auto first = splat<lanes>(cell_t<T>(window.begin)), last = splat<lanes>(cell_t<T>(window.end - 1));
  const Index row_step = Index(p.width * channels.padded), column_step = Index(channels.padded);
  const int64_t next_tile = tile.step(p);
  const Reals zero{};
  for (int64_t row = 0; row < tile.height; ++row) {
    const int64_t pixel = tile.pixel(p, row), next = pixel + next_tile;
    offsets.prefetch(offset_plane + next);
    offsets.prefetch(offset_plane + pixels + next);
    masks.prefetch(mask_plane + next);
    const auto anchor_y = splat<lanes>(anchors.y[row] + tap_y);
    for (int64_t column = 0; column < tile.width; column += lanes) {
      const int64_t i = row * tile.width + column, at = pixel + column, left = tile.width - column;
      auto y = offsets.template load_at<lanes>(offset_plane + at, left) + anchor_y;
      auto x =
          offsets.template load_at<lanes>(offset_plane + pixels + at, left) + (load<lanes>(anchors.x + column) + tap_x);
      auto mask = masks.template load_at<lanes>(mask_plane + at, left);
      auto inside = both(inside_grid(y, height), inside_grid(x, width));
      auto vertical = sample_axis<Reals, Cells>(inside ? y : zero, rows_of_input);
      auto horizontal = sample_axis<Reals, Cells>(inside ? x : zero, columns_of_input);
      auto low = mask * vertical.weight_low, high = mask * vertical.weight_high;
      auto row_low = __builtin_convertvector(vertical.low, Indices) * row_step;
      auto row_high = __builtin_convertvector(vertical.high, Indices) * row_step;
      auto column_low = __builtin_convertvector(horizontal.low, Indices) * column_step;
      auto column_high = __builtin_convertvector(horizontal.high, Indices) * column_step;
      auto counts = __builtin_convertvector(inside, Indices);
      auto in_window = both(vertical.low >= first, vertical.high <= last);
      auto writable = counts & __builtin_convertvector(in_window, Indices);
      store<lanes>(plan.y + i, y);
      store<lanes>(plan.x + i, x);
      store<lanes>(plan.mask + i, mask);
      store<lanes>(plan.weight[0] + i, low * horizontal.weight_low);
      store<lanes>(plan.weight[1] + i, low * horizontal.weight_high);
      store<lanes>(plan.weight[2] + i, high * horizontal.weight_low);
      store<lanes>(plan.weight[3] + i, high * horizontal.weight_high);
      store<lanes>(plan.corner[0] + i, (row_low + column_low) | ~counts);
      store<lanes>(plan.corner[1] + i, row_low + column_high);
      store<lanes>(plan.corner[2] + i, row_high + column_low);
      store<lanes>(plan.corner[3] + i, row_high + column_high);
      store<lanes>(plan.target + i, (row_low + column_low) | ~writable);
    }
  }
  for (int64_t i = tile.count(); i < tile.rows(); ++i) plan.corner[0][i] = plan.target[i] = -1;
}

// columns[i, c] = sum over corners of weight * plane[corner, c], for the `width` channels of one offset group. Column
// is Real, or a narrower type that the sums are rounded to.
template <int kWidth, class T, class Index, class Real, class Column>
void gather_vectors(const T* plane, const Plan<Real, Index>& plan, int64_t rows, int64_t width, Column* columns,
                    int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, columns += stride) {
    if (plan.corner[0][i] < 0) {
      for (int64_t c = 0; c < width; c += kWidth) store_narrow<kWidth>(columns + c, vec<Real, kWidth>{});
      continue;
    }
    const T *x00 = plane + plan.corner[0][i], *x01 = plane + plan.corner[1][i];
    const T *x10 = plane + plan.corner[2][i], *x11 = plane + plan.corner[3][i];
    auto w00 = splat<kWidth>(plan.weight[0][i]), w01 = splat<kWidth>(plan.weight[1][i]);
    auto w10 = splat<kWidth>(plan.weight[2][i]), w11 = splat<kWidth>(plan.weight[3][i]);
    for (int64_t c = 0; c < width; c += kWidth) {
      auto value = w00 * load_wide<kWidth>(x00 + c) + w01 * load_wide<kWidth>(x01 + c) +
                   w10 * load_wide<kWidth>(x10 + c) + w11 * load_wide<kWidth>(x11 + c);
      store_narrow<kWidth>(columns + c, value);
    }
  }
}

template <class T, class Index, class Real, class Column>
void gather(const Channels& channels, const T* plane, const Plan<Real, Index>& plan, int64_t rows, Column* columns,
            int64_t stride) {
  constexpr int full = kLanes<Real>, half = full / 2;
  if (channels.lanes == full) {
    gather_vectors<full>(plane, plan, rows, channels.padded, columns, stride);
  } else if (channels.lanes == half) {
    gather_vectors<half>(plane, plan, rows, channels.padded, columns, stride);
  } else {
    gather_vectors<1>(plane, plan, rows, channels.padded, columns, stride);
  }
}

// The input in the layout of `channels`.
template <class T>
struct PackInput {
  const Params& params;
  const Channels& channels;
  T* target;
  int64_t blocks;  // per image, of kBlock pixels
  static constexpr int64_t kBlock = 64;

  static void run(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<PackInput*>(context);
    const Params& p = self.params;
    const Channels& channels = self.channels;
    int64_t pixels = p.height * p.width, image = unit / self.blocks, first = unit % self.blocks * kBlock;
    int64_t count = pixels - first < kBlock ? pixels - first : kBlock, width = channels.per_offset_group;
    const T* source = static_cast<const T*>(p.input) + image * p.in_channels * pixels;
    T* target = self.target + image * channels.image() + first * channels.padded;
    for (int64_t group = 0; group < p.offset_groups; ++group, target += channels.plane) {
      if (channels.has_padding()) __builtin_memset(target, 0, size_t(count * channels.padded) * sizeof(T));
      if (p.channels_last) {
        const T* pixel = source + first * p.in_channels + group * width;
        for (int64_t i = 0; i < count; ++i) {
          __builtin_memcpy(target + i * channels.padded, pixel + i * p.in_channels, size_t(width) * sizeof(T));
        }
      } else {
        copy_transposed(source + group * width * pixels + first, pixels, target, channels.padded, width, count);
      }
    }
  }
};

inline bool input_is_packed(const Params& p, const Channels& channels) {
  return p.channels_last && p.offset_groups == 1 && !channels.has_padding();
}

template <class T>
int64_t packed_input_bytes(const Params& p, const Channels& channels) {
  return input_is_packed(p, channels) ? 0 : p.batch * channels.image() * int64_t(sizeof(T));
}

// The input in the layout of `channels`: itself, or a copy in `memory` of packed_input_bytes.
template <class T>
const T* pack_input(const Params& p, const Channels& channels, void* memory) {
  if (input_is_packed(p, channels)) return static_cast<const T*>(p.input);
  T* packed = static_cast<T*>(memory);
  PackInput<T> pass{p, channels, packed, ceil_div<int64_t>(p.height * p.width, PackInput<T>::kBlock)};
  parallel_units(p.batch * pass.blocks, PackInput<T>::run, &pass);
  return packed;
}

}  // namespace HDROPS_ISA
}  // namespace hdrops

// What forward and backward share: how channels lie in memory, how work is cut into tiles, and the sampling plan of a
// tile. Included inside foreach_isa.h's sources; no include guard.
//
// Channels lie last in memory, each offset group padded to whole vectors, so that every gather and scatter is a run of
// full vectors. A tile is up to kMaxTile consecutive output pixels of one image. Its plan says, for one tap and one
// offset group, where each pixel samples: four corners of a cell and what each weighs, the mask included.
namespace hdrops {
namespace HDROPS_ISA {

using deform_conv2d::Params;

// Coordinates and sums are kept in Real, and Cell is the integer of its width.
template <class T>
struct WideOf {
  using Real = float;
  using Cell = int32_t;
};
template <>
struct WideOf<double> {
  using Real = double;
  using Cell = int64_t;
};
template <class T>
using real_t = typename WideOf<T>::Real;
template <class T>
using cell_t = typename WideOf<T>::Cell;

constexpr int kMaxTile = 96;  // a multiple of kGemmRows and of every vector length

// The channels of the padded layout. A weight group owns the range [begin(g), end(g)); the ranges cover everything, and
// padding inside a range meets zero weights.
struct Channels {
  int64_t per_offset_group, per_group;
  int lanes;              // vector length of gather and scatter: a full vector, half of one, or 1
  int64_t padded, total;  // channels of one offset group, and of all, padding included

  int64_t position(int64_t channel) const { return channel / per_offset_group * padded + channel % per_offset_group; }
  int64_t begin(int64_t group) const { return position(group * per_group); }
  int64_t end(int64_t group) const {
    int64_t next = (group + 1) * per_group;
    return next % per_offset_group == 0 ? next / per_offset_group * padded : position(next - 1) + 1;
  }
  bool has_padding() const { return padded != per_offset_group; }
};

template <class Real>
Channels lay_out_channels(const Params& p) {
  Channels c{p.in_channels / p.offset_groups, p.in_channels / p.groups, kLanes<Real>, 0, 0};
  int64_t full = round_up<int64_t>(c.per_offset_group, kLanes<Real>);
  int64_t half = round_up<int64_t>(c.per_offset_group, kLanes<Real> / 2);
  if (half < full) c.lanes = kLanes<Real> / 2;
  if (c.per_offset_group <= 2) c.lanes = 1;
  c.padded = round_up<int64_t>(c.per_offset_group, c.lanes);
  c.total = c.padded * p.offset_groups;
  return c;
}

// How a convolution is cut: tiles of `rows` pixels, columns of `taps` taps at a time. With few channels several taps
// make one matrix product deep enough; with very many the tile shrinks, so that its columns stay in the second-level
// cache. Outputs of a weight group are padded to whole vectors.
struct Tiling {
  int64_t rows, per_image;
  int64_t taps;
  int64_t group_outputs, padded_outputs, outputs;  // of a weight group, padded, and of all groups padded
  int64_t column_stride;

  template <class Real>
  static Tiling of(const Params& p, const Channels& channels, int64_t pixels) {
    Tiling t{};
    t.group_outputs = p.out_channels / p.groups;
    t.padded_outputs = round_up<int64_t>(t.group_outputs, kLanes<Real>);
    t.outputs = t.padded_outputs * p.groups;
    int64_t widest = channels.total > t.outputs ? channels.total : t.outputs;
    int64_t rows = widest <= 512 ? kMaxTile : kMaxTile * 512 / widest;
    t.rows = rows < kGemmRows ? kGemmRows : rows / kGemmRows * kGemmRows;
    t.per_image = ceil_div(pixels, t.rows);
    int64_t deepest = channels.total >= 256 ? 1 : 256 / channels.total;
    t.taps = ceil_div(p.taps(), ceil_div(p.taps(), deepest));
    // The slack takes the overshoot of a product's last panel; a stride of whole kilobytes would hit few cache sets.
    t.column_stride = round_up<int64_t>(t.taps * channels.total, kLanes<Real>) + kPanel<Real>;
    if (t.column_stride * int64_t(sizeof(Real)) % 1024 == 0) t.column_stride += kLanes<Real>;
    return t;
  }
};

// A tile: pixels [first, first + count) of an image. Rows beyond count are padding and sample nothing.
struct Tile {
  int64_t image, first, count;
};

// Where the taps of an unshifted kernel lie for each pixel of a tile: the position of tap (0, 0).
template <class Real>
struct Anchors {
  Real y[kMaxTile], x[kMaxTile];

  void set(const Params& p, const Tile& tile) {
    int64_t row = tile.first / p.out_width, column = tile.first % p.out_width;
    for (int64_t i = 0; i < tile.count; ++i) {
      y[i] = Real(row * p.stride_h - p.pad_h);
      x[i] = Real(column * p.stride_w - p.pad_w);
      if (++column == p.out_width) column = 0, ++row;
    }
  }
};

template <class Real, class Index>
struct Plan {
  Real y[kMaxTile], x[kMaxTile], mask[kMaxTile];  // positions and mask values
  Index corner[4][kMaxTile];  // offsets into the image of the cell's corners 00, 01, 10, 11; the first is -1 if the
                              // position samples nothing
  Index target[kMaxTile];     // corner[0], or -1 too if the cell is not within the rows that may be written
  Real weight[4][kMaxTile];
};

// Rows of the input that a plan's user may write.
struct Window {
  int64_t begin, end;
};

// Also fetches the row's continuation, which the next tile reads after a tour through all other rows.
template <class Real, class S>
void read_row(const S* source, int64_t count, Real* target) {
  constexpr int lanes = kLanes<Real>;
  for (int64_t ahead = 0; ahead < count; ahead += 64 / int64_t(sizeof(S))) __builtin_prefetch(source + count + ahead);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store<lanes>(target + i, load_wide<lanes>(source + i));
  for (; i < count; ++i) target[i] = widen(source[i]);
}

template <class Real, class S>
void write_row(const Real* source, int64_t count, S* target) {
  constexpr int lanes = kLanes<Real>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store_narrow<lanes>(target + i, load<lanes>(source + i));
  for (; i < count; ++i) narrow(source[i], target + i);
}

// Reads and writes of a tensor whose elements are T, or Real.
template <class T, class Real>
void read_row_of(const void* tensor, bool is_real, int64_t at, int64_t count, Real* target) {
  if (is_real) {
    read_row(static_cast<const Real*>(tensor) + at, count, target);
  } else {
    read_row(static_cast<const T*>(tensor) + at, count, target);
  }
}

template <class T, class Real>
void write_row_of(const Real* source, int64_t count, void* tensor, bool is_real, int64_t at) {
  if (is_real) {
    write_row(source, count, static_cast<Real*>(tensor) + at);
  } else {
    write_row(source, count, static_cast<T*>(tensor) + at);
  }
}

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
               const Window& window, int64_t offset_group, int64_t tap, int64_t rows, Plan<Real, Index>& plan) {
  constexpr int lanes = kLanes<Real>;
  using Cells = vec<cell_t<T>, lanes>;
  using Indices = vec<Index, lanes>;
  int64_t at = offset_row(p, tile.image, offset_group, tap) + tile.first;
  read_row_of<T>(p.offset, p.offset_is_float, at, tile.count, plan.y);
  read_row_of<T>(p.offset, p.offset_is_float, at + p.out_pixels(), tile.count, plan.x);
  if (p.mask != nullptr) {
    int64_t mask_at = mask_row(p, tile.image, offset_group, tap) + tile.first;
    read_row_of<T>(p.mask, p.mask_is_float, mask_at, tile.count, plan.mask);
  } else {
    for (int64_t i = 0; i < tile.count; ++i) plan.mask[i] = 1;
  }
  Real tap_y = Real(tap / p.kernel_w * p.dilation_h), tap_x = Real(tap % p.kernel_w * p.dilation_w);
  for (int64_t i = 0; i < tile.count; ++i) {
    plan.y[i] += anchors.y[i] + tap_y;
    plan.x[i] += anchors.x[i] + tap_x;
  }
  int64_t padded_rows = round_up<int64_t>(rows, lanes);
  for (int64_t i = tile.count; i < padded_rows; ++i) plan.y[i] = plan.x[i] = -1, plan.mask[i] = 0;

  const auto height = splat<lanes>(Real(p.height)), width = splat<lanes>(Real(p.width));
  const auto rows_of_input = splat<lanes>(cell_t<T>(p.height)), columns_of_input = splat<lanes>(cell_t<T>(p.width));
  const auto first = splat<lanes>(cell_t<T>(window.begin)), last = splat<lanes>(cell_t<T>(window.end - 1));
  const Index row_step = Index(p.width * channels.total), column_step = Index(channels.total);
  for (int64_t i = 0; i < padded_rows; i += lanes) {
    auto y = load<lanes>(plan.y + i), x = load<lanes>(plan.x + i), mask = load<lanes>(plan.mask + i);
    auto inside = inside_grid(y, height) & inside_grid(x, width);
    const vec<Real, lanes> zero{};
    auto vertical = sample_axis<vec<Real, lanes>, Cells>(inside ? y : zero, rows_of_input);
    auto horizontal = sample_axis<vec<Real, lanes>, Cells>(inside ? x : zero, columns_of_input);
    auto low = mask * vertical.weight_low, high = mask * vertical.weight_high;
    store<lanes>(plan.weight[0] + i, low * horizontal.weight_low);
    store<lanes>(plan.weight[1] + i, low * horizontal.weight_high);
    store<lanes>(plan.weight[2] + i, high * horizontal.weight_low);
    store<lanes>(plan.weight[3] + i, high * horizontal.weight_high);
    auto row_low = __builtin_convertvector(vertical.low, Indices) * row_step;
    auto row_high = __builtin_convertvector(vertical.high, Indices) * row_step;
    auto column_low = __builtin_convertvector(horizontal.low, Indices) * column_step;
    auto column_high = __builtin_convertvector(horizontal.high, Indices) * column_step;
    auto counts = __builtin_convertvector(inside, Indices);
    auto writable = counts & __builtin_convertvector((vertical.low >= first) & (vertical.high <= last), Indices);
    store<lanes>(plan.corner[0] + i, (row_low + column_low) | ~counts);
    store<lanes>(plan.corner[1] + i, row_low + column_high);
    store<lanes>(plan.corner[2] + i, row_high + column_low);
    store<lanes>(plan.corner[3] + i, row_high + column_high);
    store<lanes>(plan.target + i, (row_low + column_low) | ~writable);
  }
}

// columns[i, c] = sum over corners of weight * image[corner, c], for the `width` channels of one offset group. Column
// is Real, or a narrower type that the sums are rounded to.
template <int kWidth, class T, class Index, class Real, class Column>
void gather_vectors(const T* image, const Plan<Real, Index>& plan, int64_t rows, int64_t width, Column* columns,
                    int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, columns += stride) {
    if (plan.corner[0][i] < 0) {
      for (int64_t c = 0; c < width; c += kWidth) store_narrow<kWidth>(columns + c, vec<Real, kWidth>{});
      continue;
    }
    const T *x00 = image + plan.corner[0][i], *x01 = image + plan.corner[1][i];
    const T *x10 = image + plan.corner[2][i], *x11 = image + plan.corner[3][i];
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
void gather(const Channels& channels, const T* image, const Plan<Real, Index>& plan, int64_t rows, Column* columns,
            int64_t stride) {
  constexpr int full = kLanes<Real>, half = full / 2;
  if (channels.lanes == full) {
    gather_vectors<full>(image, plan, rows, channels.padded, columns, stride);
  } else if (channels.lanes == half) {
    gather_vectors<half>(image, plan, rows, channels.padded, columns, stride);
  } else {
    gather_vectors<1>(image, plan, rows, channels.padded, columns, stride);
  }
}

// target[j, i] = source[i, j] for four rows and columns, converted.
template <class From, class To>
HDROPS_HD void transpose_four(const From* source, int64_t source_stride, To* target, int64_t target_stride) {
  auto a = load_wide<4>(source), b = load_wide<4>(source + source_stride);
  auto c = load_wide<4>(source + 2 * source_stride), d = load_wide<4>(source + 3 * source_stride);
  auto ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  auto cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store_narrow<4>(target, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
  store_narrow<4>(target + target_stride, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
  store_narrow<4>(target + 2 * target_stride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
  store_narrow<4>(target + 3 * target_stride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
}

// target[j, i] = source[i, j], converted; rows and columns of the source. The inner loop runs along whichever side has
// the larger stride, whose lines (often one per channel plane, all in the same cache sets) would not survive otherwise.
template <class From, class To>
void transpose(const From* source, int64_t source_stride, To* target, int64_t target_stride, int64_t rows,
               int64_t columns) {
  int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  bool along_rows = source_stride > target_stride;
  int64_t outer_end = along_rows ? whole_rows : whole_columns, inner_end = along_rows ? whole_columns : whole_rows;
  for (int64_t outer = 0; outer < outer_end; outer += 4) {
    for (int64_t inner = 0; inner < inner_end; inner += 4) {
      int64_t i = along_rows ? outer : inner, j = along_rows ? inner : outer;
      transpose_four(source + i * source_stride + j, source_stride, target + j * target_stride + i, target_stride);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
      narrow(widen(source[i * source_stride + j]), target + j * target_stride + i);
    }
  }
}

// The input with channels last and padded.
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
    T* target = self.target + (image * pixels + first) * channels.total;
    if (channels.has_padding()) __builtin_memset(target, 0, size_t(count * channels.total) * sizeof(T));
    for (int64_t group = 0; group < p.offset_groups; ++group, target += channels.padded) {
      if (p.channels_last) {
        const T* pixel = source + first * p.in_channels + group * width;
        for (int64_t i = 0; i < count; ++i) {
          __builtin_memcpy(target + i * channels.total, pixel + i * p.in_channels, size_t(width) * sizeof(T));
        }
      } else {
        transpose(source + group * width * pixels + first, pixels, target, channels.total, width, count);
      }
    }
  }
};

inline bool input_is_packed(const Params& p, const Channels& channels) {
  return p.channels_last && !channels.has_padding();
}

template <class T>
int64_t packed_input_bytes(const Params& p, const Channels& channels) {
  return input_is_packed(p, channels) ? 0 : p.batch * p.height * p.width * channels.total * int64_t(sizeof(T));
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

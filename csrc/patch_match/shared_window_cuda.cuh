// Search where the windows of neighbours lie at one displacement from their sites: around own positions, and around
// given centres in the tiles of one shift (tile_shifts_cuda.cuh). The score of patches is then a box sum of the
// products of pixels, which overlapping patches share.
//
// A block of 512 threads has 32 x 16 pixels of the query, of which the inner ones are its sites: 30 x 14 with patches
// of 3. It walks the window in passes of 8 x 8 displacements. In a pass
//
//   a thread owns 8 pixels of a row and 8 displacements along it: 64 sums of products, in registers. Channels come 4
//       at a time: the query's pixels and the key's under all displacements of the pass go through registers to shared
//       memory, in two buffers, so that the loads of the next channels run under the products of these;
//   each sum of 8 pixels becomes horizontal sums over patches, with the neighbouring lanes' pixels by shuffles, and
//       these go to shared memory, one of the 8 displacements of a row after the other;
//   a thread owns a site: it adds the rows of its box, for each of the 8 rows of displacements, multiplies by the key's
//       scale and keeps the best.
//
// With doubles a block has 256 threads, 32 x 8 pixels, and a pass 4 x 4 displacements, 4 pixels and 4 displacements a
// thread. Shared memory: 54 KB (46 KB with doubles), one block on a multiprocessor by its 128 registers a thread. In a
// row of 36 or 44 floats the 16-byte reads of 4 lanes along it and of the two rows beside fall into different banks.
//
// 16-bit data comes here on GPUs before sm_80 only: later ones multiply it on matrix units (matrix_window_cuda.cuh).
#pragma once
#include "patch_match/tiled_search_cuda.cuh"

namespace hdrops::patch_match {

template <class Real>
struct WindowShape {
  static constexpr int kThreads = sizeof(Real) == 8 ? 256 : 512;
  static constexpr int kWidth = 32, kHeight = kThreads / kWidth;  // products of a block
  static constexpr int kPixels = sizeof(Real) == 8 ? 4 : 8;       // of a thread, along a row
  static constexpr int kShifts = kPixels;                         // displacements of a thread
  static constexpr int kAcross = kWidth / kPixels;                // threads of a row
  static constexpr int kRows = kThreads / (kAcross * kHeight);    // rows of displacements in a pass
  static constexpr int kVector = kVector16<Real>;                 // of shared memory
  static constexpr int kQueryPitch = kWidth + kVector;            // elements from row to row
  static constexpr int kKeyWidth = kWidth + kShifts, kKeyHeight = kHeight + kRows - 1;
  static constexpr int kKeyPitch = kKeyWidth + kVector;
  static constexpr int kQueryPlane = kHeight * kQueryPitch, kKeyPlane = kKeyHeight * kKeyPitch;
  static constexpr int kBuffer = kChannels * (kQueryPlane + kKeyPlane);
  static constexpr int kKeyLines = kThreads / kKeyWidth;             // rows of the key that all threads load at once
  static constexpr int kKeyItems = ceil_div(kKeyHeight, kKeyLines);  // pixels of the key that a thread loads
  static constexpr int kBoxes = kRows * kHeight * kQueryPitch;       // horizontal sums of a displacement
  static constexpr int kPart = kBuffer > kBoxes ? kBuffer : kBoxes;  // of shared memory, twice; then the best matches
  static constexpr size_t kSharedBytes =
      2 * sizeof(Real) * kPart + kThreads * (sizeof(Real) + sizeof(int)) + sizeof(int);
  static_assert(kWidth * kHeight == kThreads && 32 % kAcross == 0);
  static_assert(kSharedBytes <= 64 << 10);  // what sm_75 has
};

template <class T>
struct WindowSearch {
  using Real = device_acc_t<T>;
  FeatureMap<T> query, key;
  bool vectors;  // of both maps
  int64_t key_row_stride;
  const Real* key_scale;  // or null
  TileMatches<T> matches;
};

// What a thread brings to shared memory: a pixel of the query, and of the key's window up to kItems. Four channels of
// these come in as many steps, so that few values wait in registers: a channel of all pixels in a step, or, where a
// pixel's channels lie together, all channels of a pixel.
template <class T>
struct WindowLoader {
  using Real = device_acc_t<T>;
  using Shape = WindowShape<Real>;
  static constexpr int kItems = 1 + Shape::kKeyItems;
  static_assert(kItems <= kChannels);
  const T *query, *key;        // a pixel of the query; the key's first, the others follow kKeyLines rows below
  int query_place, key_place;  // of these in a buffer's first plane
  unsigned inside, exists;     // a bit for each pixel: in the image, in the tile
  Real value[kChannels];

  // The query's tile begins at (top, left), the key's at (key_top, key_left).
  __device__ __forceinline__ void begin(const WindowSearch<T>& s, int64_t image, int top, int left, int key_top,
                                        int key_left) {
    const int thread = computed_again(int(threadIdx.x));
    int y = thread / Shape::kWidth, x = thread % Shape::kWidth;
    query_place = y * Shape::kQueryPitch + x;
    query = s.query.pixel(image, top + y, left + x);
    inside = s.query.contains(top + y, left + x);
    exists = 1;
    y = thread / Shape::kKeyWidth, x = thread % Shape::kKeyWidth;
    key_place = kChannels * Shape::kQueryPlane + y * Shape::kKeyPitch + x;
    key = s.key.pixel(image, key_top + y, key_left + x);
#pragma unroll
    for (int i = 1; i < kItems; ++i, y += Shape::kKeyLines) {
      const bool in_tile = thread < Shape::kKeyLines * Shape::kKeyWidth && y < Shape::kKeyHeight;
      exists |= unsigned(in_tile) << i;
      inside |= unsigned(in_tile && s.key.contains(key_top + y, key_left + x)) << i;
    }
  }
  __device__ __forceinline__ const T* from(const WindowSearch<T>& s, int item) const {
    return item == 0 ? query : key + (item - 1) * Shape::kKeyLines * s.key_row_stride;
  }
  __device__ __forceinline__ void load(const WindowSearch<T>& s, int channel, int step) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const FeatureMap<T>& map = i == 0 ? s.query : s.key;
      if (s.vectors) {
        if (i != step) continue;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) value[c] = 0;
        if (inside >> i & 1) map.load_vectors(from(s, i), channel, value);
      } else {
        const bool there = (inside >> i & 1) != 0 && channel + step < s.query.channels;
        value[i] = there ? load_as(from(s, i)[(channel + step) * map.channel_stride]) : Real(0);
      }
    }
  }
  __device__ __forceinline__ void store(const WindowSearch<T>& s, Real* buffer, int step) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if ((exists >> i & 1) == 0) continue;
      const int plane = i == 0 ? Shape::kQueryPlane : Shape::kKeyPlane;
      Real* to = buffer + (i == 0 ? query_place : key_place + (i - 1) * Shape::kKeyLines * Shape::kKeyPitch);
      if (s.vectors) {
        if (i != step) continue;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) to[c * plane] = value[c];
      } else {
        to[step * plane] = value[i];
      }
    }
  }
};

template <class Real, int kCount>
__device__ __forceinline__ void read_vectors(const Real* from, Real (&to)[kCount]) {
  constexpr int kVector = kVector16<Real>;
#pragma unroll
  for (int i = 0; i < kCount; i += kVector) {
    const auto vector = *reinterpret_cast<const Vector<Real, kVector>*>(from + i);
#pragma unroll
    for (int k = 0; k < kVector; ++k) to[i + k] = vector.value[k];
  }
}

// A thread's place among the products: its row and first column in the tile, and its row of displacements.
template <class Real>
struct ProductThread {
  using Shape = WindowShape<Real>;
  int shift_row, row, column;

  __device__ __forceinline__ static ProductThread of(int thread) {
    const int line = thread / Shape::kAcross;
    return {line / Shape::kHeight, line % Shape::kHeight, thread % Shape::kAcross * Shape::kPixels};
  }
  // Adds the products of a channel of the buffer.
  __device__ __forceinline__ void multiply(const Real* buffer, int channel,
                                           Real (&sum)[Shape::kShifts][Shape::kPixels]) const {
    const Real* query = buffer + row * Shape::kQueryPitch + column;
    const Real* key = buffer + kChannels * Shape::kQueryPlane + (row + shift_row) * Shape::kKeyPitch + column;
    Real a[Shape::kPixels], b[Shape::kPixels + Shape::kShifts];
    read_vectors(query + channel * Shape::kQueryPlane, a);
    read_vectors(key + channel * Shape::kKeyPlane, b);
#pragma unroll
    for (int s = 0; s < Shape::kShifts; ++s) {
#pragma unroll
      for (int i = 0; i < Shape::kPixels; ++i) sum[s][i] += a[i] * b[i + s];
    }
  }
  // Horizontal sums over patches, to boxes[shift_row][row][column ..]. Those that need pixels beyond the tile are
  // wrong, and no site's.
  template <int kReach>
  __device__ __forceinline__ void add_horizontally(const Real (&product)[Shape::kPixels], Real* boxes) const {
    Real near[Shape::kPixels + 2 * kReach], box[Shape::kPixels];
#pragma unroll
    for (int i = 0; i < Shape::kPixels; ++i) near[kReach + i] = product[i];
#pragma unroll
    for (int i = 0; i < kReach; ++i) {
      near[i] = __shfl_up_sync(0xffffffffu, product[Shape::kPixels - kReach + i], 1, Shape::kAcross);
      near[kReach + Shape::kPixels + i] = __shfl_down_sync(0xffffffffu, product[i], 1, Shape::kAcross);
    }
#pragma unroll
    for (int i = 0; i < Shape::kPixels; ++i) {
      box[i] = near[i];
#pragma unroll
      for (int k = 1; k <= 2 * kReach; ++k) box[i] += near[i + k];
    }
    Real* to = boxes + (shift_row * Shape::kHeight + row) * Shape::kQueryPitch + column;
#pragma unroll
    for (int i = 0; i < Shape::kPixels; i += Shape::kVector) {
      Vector<Real, Shape::kVector> vector;
#pragma unroll
      for (int k = 0; k < Shape::kVector; ++k) vector.value[k] = box[i + k];
      *reinterpret_cast<Vector<Real, Shape::kVector>*>(to + i) = vector;
    }
  }
};

// Adds the products of a pass over all channels. The query's tile begins at (top, left).
template <class T, class Real = device_acc_t<T>, class Shape = WindowShape<Real>>
__device__ __forceinline__ void add_products(const WindowSearch<T>& s, int64_t image, int top, int left, int first_dy,
                                             int first_dx, Real* memory, Real (&sum)[Shape::kShifts][Shape::kPixels]) {
  const auto mine = ProductThread<Real>::of(computed_again(int(threadIdx.x)));
  WindowLoader<T> loader;
  loader.begin(s, image, top, left, top + first_dy, left + first_dx);
#pragma unroll
  for (int step = 0; step < kChannels; ++step) loader.load(s, 0, step), loader.store(s, memory, step);
  __syncthreads();
  int buffer = 0;
  for (int channel = 0; channel < s.query.channels; channel += kChannels) {
    const bool more = channel + kChannels < s.query.channels;
    const Real* now = memory + buffer * Shape::kPart;
    buffer = 1 - buffer;
#pragma unroll
    for (int step = 0; step < kChannels; ++step) {
      if (more) loader.load(s, channel + kChannels, step);
      mine.multiply(now, step, sum);
      if (more) loader.store(s, memory + buffer * Shape::kPart, step);
    }
    __syncthreads();
  }
}

template <class T, int kReach>
__global__ void __launch_bounds__(WindowShape<device_acc_t<T>>::kThreads, 1) search_shared_window(WindowSearch<T> s) {
  using Real = device_acc_t<T>;
  using Shape = WindowShape<Real>;
  constexpr int kSitesAcross = Shape::kWidth - 2 * kReach, kSitesDown = Shape::kHeight - 2 * kReach;
  Real* memory = shared_memory<Real>();
  const BlockTile tile = BlockTile::mine(s.matches);
  if (tile.mixed()) return;
  const int top = tile.top, left = tile.left;

  // The best match, and the place in the window of displacement (0, 0), wait in shared memory while the products need
  // all registers.
  Real* best_score = memory + 2 * Shape::kPart;
  int* best_place = reinterpret_cast<int*>(best_score + Shape::kThreads);
  unsigned* first_place = reinterpret_cast<unsigned*>(best_place + Shape::kThreads);
  best_score[threadIdx.x] = -Real(INFINITY), best_place[threadIdx.x] = Best<Real>::kNone;
  if (threadIdx.x == 0) *first_place = tile.first_place(s.matches.target);

  const Range rows = tile.rows(s.matches, s.key.height), columns = tile.columns(s.matches, s.key.width);
  const int across = columns.passes(Shape::kShifts), passes = across * rows.passes(Shape::kRows);
  const Range part = tile.part(s.matches.grid, passes);
  for (int pass = part.first; pass <= part.last; ++pass) {
    const int first_dy = rows.first + pass / across * Shape::kRows;
    const int first_dx = columns.first + pass % across * Shape::kShifts;
    Real sum[Shape::kShifts][Shape::kPixels] = {};
    __syncthreads();  // the boxes of the last pass are read
    add_products(s, tile.image, top - kReach, left - kReach, first_dy, first_dx, memory, sum);

    const int thread = computed_again(int(threadIdx.x));
    const auto mine = ProductThread<Real>::of(thread);
    const int pixel_y = top - kReach + mine.row, pixel_x = left - kReach + mine.column;
    const int key_y = pixel_y + first_dy + mine.shift_row;
    const bool row_inside = pixel_y >= 0 && pixel_y < s.query.height && key_y >= 0 && key_y < s.key.height;
    const int site_row = thread / kSitesAcross, site_column = thread % kSitesAcross;
    const int site_y = top + site_row, site_x = left + site_column;
    const bool has_site = site_row < kSitesDown && site_y < s.query.height && site_x < s.query.width;
    Best<Real> best{best_score[thread], best_place[thread]};
#pragma unroll
    for (int shift = 0; shift < Shape::kShifts; ++shift) {
      Real* boxes = memory + shift % 2 * Shape::kPart;
#pragma unroll
      for (int i = 0; i < Shape::kPixels; ++i) {
        // A pixel beyond one of the grids contributes nothing, not even where the other's is NaN.
        const int x = pixel_x + i, key_x = x + first_dx + shift;
        const bool inside = x >= 0 && x < s.query.width && key_x >= 0 && key_x < s.key.width;
        if (!(row_inside && inside)) sum[shift][i] = 0;
      }
      mine.template add_horizontally<kReach>(sum[shift], boxes);
      __syncthreads();
      const int x = site_x + first_dx + shift;
      if (!has_site || x < 0 || x >= s.key.width || first_dx + shift > columns.last) continue;
      const Real* from = boxes + site_row * Shape::kQueryPitch + site_column + kReach;
#pragma unroll 1
      for (int line = 0; line < Shape::kRows; ++line, from += Shape::kHeight * Shape::kQueryPitch) {
        const int dy = first_dy + line, y = site_y + dy;
        if (y < 0 || y >= s.key.height || dy > rows.last) continue;
        Real score = 0;
#pragma unroll
        for (int k = 0; k <= 2 * kReach; ++k) score += from[k * Shape::kQueryPitch];
        score *= scale_at(s.key_scale, (tile.image * s.key.height + y) * s.key.width + x);
        best.offer(score,
                   int(*first_place + unsigned(dy) * unsigned(s.matches.target.window_x) + unsigned(first_dx + shift)));
      }
    }
    best_score[thread] = best.score, best_place[thread] = best.place;
  }
  const BlockTile mine = BlockTile::mine(s.matches);
  const int site_y = mine.top + int(threadIdx.x) / kSitesAcross, site_x = mine.left + int(threadIdx.x) % kSitesAcross;
  if (site_y >= min(mine.top + kSitesDown, s.query.height) || site_x >= s.query.width) return;
  mine.write(s.matches, site_y, site_x, Best<Real>{best_score[threadIdx.x], best_place[threadIdx.x]});
}

template <class T>
TileGrid window_grid(const MatchParams& p) {
  using Shape = WindowShape<device_acc_t<T>>;
  const int64_t passes =
      ceil_div<int64_t>(p.window_y(), Shape::kRows) * ceil_div<int64_t>(p.window_x(), Shape::kShifts);
  return TileGrid::of(p, Shape::kWidth - 2 * p.reach(), Shape::kHeight - 2 * p.reach(), passes, 1);
}

template <class T>
void launch_search_shared_window(const MatchParams& p, const device_acc_t<T>* key_scale, const TileMatches<T>& matches,
                                 cudaStream_t stream) {
  using Shape = WindowShape<device_acc_t<T>>;
  WindowSearch<T> search{};
  search.query = FeatureMap<T>::of(p.query, p.channels), search.key = FeatureMap<T>::of(p.key, p.channels);
  search.vectors = search.query.vectors && search.key.vectors;
  search.key_row_stride = p.key.width * search.key.pixel_stride;
  search.key_scale = key_scale;
  search.matches = matches;
  const Grid grid{dim3(unsigned(matches.grid.tiles(p) * matches.grid.splits)), dim3(Shape::kThreads),
                  Shape::kSharedBytes};
  switch (p.patch_size) {
    case 1:
      launch(search_shared_window<T, 0>, grid, stream, search);
      break;
    case 3:
      launch(search_shared_window<T, 1>, grid, stream, search);
      break;
    case 5:
      launch(search_shared_window<T, 2>, grid, stream, search);
      break;
    default:
      launch(search_shared_window<T, 3>, grid, stream, search);
      break;
  }
}

}  // namespace hdrops::patch_match

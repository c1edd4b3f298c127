// Search where the windows of neighbours lie at one displacement from their sites, with float16 and bfloat16 on matrix
// units (sm_80 and later): as in shared_window_cuda.cuh, the score of patches is a box sum of the products of pixels,
// which overlapping patches share.
//
// A block of 256 threads has 16 x 16 pixels of the query, of which the inner ones are its sites: 14 x 14 with patches
// of 3. It walks the window in passes of up to 6 x 9 or 3 x 25 displacements (matrix_product_cuda.cuh), whichever reads
// less. In a pass
//
//   1. chunks of 16 channels of the query's pixels, and of the key's under all displacements of the pass, come to
//      shared memory by asynchronous copies, the next one under the products of this one;
//   2. the sums go to shared memory, over the chunks: zero where a pixel lies beyond one of the grids;
//   3. a thread owns a site: for each displacement it adds a column of its box, gets those to its right by shuffles,
//      multiplies by the key's scale and keeps the best.
//
// Products of 16-bit numbers are exact in float32, and sums are float32. Every score is the same sum in the same order,
// however the passes are split. Shared memory: 56 or 77 KB, two blocks on a multiprocessor that has twice that.
#pragma once
#include "patch_match/matrix_product_cuda.cuh"
#include "patch_match/tiled_search_cuda.cuh"

namespace hdrops::patch_match {

template <class T>
struct MatrixSearch {
  PackedFeatures<T> query, key;
  const float* key_scale;  // or null
  TileMatches<T> matches;
  int reach;
};

// A pass: the tile's image and first site; the first of its displacements, with its place in the window; and how many
// there are.
struct MatrixPass {
  int image, top, left;
  int dy, dx, place;
  int down, across;
};

// How the displacements that a tile's sites can see are cut in passes. Those in y are shared out evenly, since the rows
// that a pass does not need cost nothing; in x every pass costs the same.
template <class Product, class T>
struct MatrixPasses {
  BlockTile tile;
  Range rows, columns;
  unsigned first_place;
  int window_x;
  int down, across, length;  // passes; rows of displacements in one

  __device__ __forceinline__ explicit MatrixPasses(const MatrixSearch<T>& s)
      : tile(BlockTile::mine(s.matches)),
        rows(tile.rows(s.matches, s.key.height)),
        columns(tile.columns(s.matches, s.key.width)),
        first_place(tile.first_place(s.matches.target)),
        window_x(s.matches.target.window_x) {
    down = rows.passes(Product::kDown), across = columns.passes(Product::kAcross);
    length = ceil_div(rows.count(), down);
  }
  __device__ __forceinline__ MatrixPass at(int pass) const {
    const int dy = rows.first + pass / across * length, dx = columns.first + pass % across * Product::kAcross;
    const int place = int(first_place + unsigned(dy) * unsigned(window_x) + unsigned(dx));
    return {int(tile.image),
            tile.top,
            tile.left,
            dy,
            dx,
            place,
            min(length, rows.last - dy + 1),
            min(Product::kAcross, columns.last - dx + 1)};
  }
};

// What a block has in shared memory beside the channels and sums: the passes, of which the next is written while this
// one's matches are chosen, and the best match of every thread's site. They wait there while the products need all
// registers.
struct MatrixState {
  MatrixPass passes[2];
  Best<float> best[kMatrixThreads];
};

// Adds the products of a pass over all channels.
template <class Product, class T>
__device__ __forceinline__ void add_products(const MatrixSearch<T>& s, const MatrixPass& pass, unsigned char* stages,
                                             Product& product) {
  auto copy = [&](int chunk) {
    unsigned char* stage = stages + chunk % 2 * Product::kStageBytes;
    const int top = pass.top - s.reach, left = pass.left - s.reach;
    copy_chunk<T, kTileSide>(s.query, pass.image, top, left, kTileSide, chunk, stage);
    copy_chunk<T, Product::kKeyColumns>(s.key, pass.image, top + pass.dy, left + pass.dx, kTileSide + pass.down - 1,
                                        chunk, stage + Product::kQueryBytes);
    cp_async_commit();
  };
  const int chunks = ceil_div(s.query.vectors(), kChunkBytes / 16);
  copy(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<0>();
    __syncthreads();
    if (chunk + 1 < chunks) copy(chunk + 1);
    const unsigned char* stage = stages + chunk % 2 * Product::kStageBytes;
    product.multiply(stage, stage + Product::kQueryBytes, pass.down);
  }
}

// Stores the products of a pass for the sums over patches.
template <class Product, class T>
__device__ __forceinline__ void store_products(const MatrixSearch<T>& s, const MatrixPass& pass, const Product& product,
                                               float* memory) {
  const int top = pass.top - s.reach, left = pass.left - s.reach, first_dy = pass.dy, first_dx = pass.dx;
  // A pixel beyond one of the grids contributes nothing, not even where the other's is NaN.
  auto keep = [&](int row, int column, int dy, int dx) {
    const unsigned y = unsigned(top + row), x = unsigned(left + column);
    const unsigned key_y = y + unsigned(first_dy + dy), key_x = x + unsigned(first_dx + dx);
    const bool in_query = y < unsigned(s.query.height) && x < unsigned(s.query.width);
    return in_query && key_y < unsigned(s.key.height) && key_x < unsigned(s.key.width);
  };
  const int down = pass.down;
  if (keep(0, 0, 0, 0) && keep(kTileSide - 1, kTileSide - 1, down - 1, pass.across - 1)) {
    product.template store<false>(memory, down, keep);
  } else {
    product.template store<true>(memory, down, keep);
  }
}

// A thread's site: its place in the tile and in the image. A warp has two rows of 16 sites.
struct TileSite {
  int row, column, y, x;

  __device__ __forceinline__ static TileSite mine(int top, int left) {
    const int thread = computed_again(int(threadIdx.x)), row = thread / kTileSide, column = thread % kTileSide;
    return {row, column, top + row, left + column};
  }
};

// Sums over patches of the products in shared memory, and the best of them.
template <int kPatch, class Product, class T>
__device__ __forceinline__ void search_sums(const MatrixSearch<T>& s, const MatrixPass& pass, const float* memory,
                                            Best<float>& best) {
  using Sums = typename Product::Sums;
  const TileSite site = TileSite::mine(pass.top, pass.left);
  if (site.row > kTileSide - kPatch) return;  // whole warps: the rows of sites are an even number
  const int pixel = site.row * kTileSide + site.column, below = pixel + kTileSide;
  const int down = pass.down, across = pass.across, first_x = site.x + pass.dx;
  Best<float> found;
#pragma unroll 1
  for (int dy = 0; dy < down; ++dy) {
    const int key_y = site.y + pass.dy + dy, place = pass.place + dy * s.matches.target.window_x;
    const int64_t key_row = (int64_t(pass.image) * s.key.height + key_y) * s.key.width;
    const unsigned columns = unsigned(key_y) < unsigned(s.key.height) ? unsigned(s.key.width) : 0u;
#pragma unroll 2
    for (int dx = 0; dx < across; ++dx) {
      // Outside the key no score is better than another.
      float scale = NAN;
      if (unsigned(first_x + dx) < columns) scale = scale_at(s.key_scale, key_row + first_x + dx);
      const int swap = Sums::swap(dx);
      const float* even = memory + Sums::plane(dy, dx) + (pixel ^ swap);
      const float* odd = memory + Sums::plane(dy, dx) + (below ^ swap);
      float column = even[0];
#pragma unroll
      for (int d = 1; d < kPatch; ++d) column += d % 2 == 0 ? even[d * kTileSide] : odd[(d - 1) * kTileSide];
      float sum = column;
#pragma unroll
      for (int d = 1; d < kPatch; ++d) sum += __shfl_down_sync(~0u, column, d, kTileSide);
      // Places come in their order within a pass; a NaN is never better.
      const float score = sum * scale;
      if (score > found.score) found = {score, place + dx};
    }
  }
  best.offer(found.score, found.place);
}

// The first candidate of a site's window, which stands where no score beats minus infinity.
template <class T>
__device__ __forceinline__ Best<float> first_of_window(const MatchTarget<T>& target, const TileShift& shift,
                                                       const TileSite& site) {
  const int row = max(target.radius_y - shift.y - site.y, 0), column = max(target.radius_x - shift.x - site.x, 0);
  return {-INFINITY, row * target.window_x + column};
}

template <class T, class Product>
__global__ void __launch_bounds__(kMatrixThreads, 2) search_by_matrix_units(MatrixSearch<T> s) {
  unsigned char* stages = shared_memory<unsigned char>();
  float* memory = shared_memory<float>();
  auto* state = reinterpret_cast<MatrixState*>(stages + Product::kBytes);
  if (BlockTile::mine(s.matches).mixed()) return;  // a tile without passes
  const MatrixPasses<Product, T> passes(s);
  const BlockTile& tile = passes.tile;
  const Range part = tile.part(s.matches.grid, passes.down * passes.across);
  state->best[threadIdx.x] = first_of_window(s.matches.target, tile.shift, TileSite::mine(tile.top, tile.left));
  for (int number = part.first; number <= part.last; ++number) {
    MatrixPass& pass = state->passes[number % 2];
    if (threadIdx.x == 0) pass = MatrixPasses<Product, T>(s).at(number);
    __syncthreads();  // the sums of the last pass are read
    Product product;
    product.clear();
    add_products(s, pass, stages, product);
    __syncthreads();
    store_products(s, pass, product, memory);
    __syncthreads();
    Best<float>& best = state->best[computed_again(int(threadIdx.x))];
    if (s.reach == 0) search_sums<1, Product>(s, pass, memory, best);
    if (s.reach == 1) search_sums<3, Product>(s, pass, memory, best);
    if (s.reach == 2) search_sums<5, Product>(s, pass, memory, best);
    if (s.reach == 3) search_sums<7, Product>(s, pass, memory, best);
  }
  const BlockTile now = BlockTile::mine(s.matches);
  const TileSite site = TileSite::mine(now.top, now.left);
  if (site.row >= s.matches.grid.down || site.column >= s.matches.grid.across) return;
  if (site.y >= s.query.height || site.x >= s.query.width) return;
  now.write(s.matches, site.y, site.x, state->best[threadIdx.x]);
}

// Passes of a window that lies whole on the key.
template <class Product>
int64_t matrix_passes(const MatchParams& p) {
  return ceil_div<int64_t>(p.window_y(), Product::kDown) * ceil_div<int64_t>(p.window_x(), Product::kAcross);
}

// The product of this call, of two the one that reads fewer pixels: use.operator()<Product>().
template <class T, class Use>
auto with_matrix_product(const MatchParams& p, Use&& use) {
  using Tall = MatrixProduct<T, 6, 1>;
  using Wide = MatrixProduct<T, 3, 2>;
  auto pixels = [&]<class Product>() {
    return matrix_passes<Product>(p) * (kTilePixels + Product::kKeyRows * Product::kKeyColumns);
  };
  const bool tall = pixels.template operator()<Tall>() <= pixels.template operator()<Wide>();
  return tall ? use.template operator()<Tall>() : use.template operator()<Wide>();
}

template <class T>
TileGrid matrix_grid(const MatchParams& p) {
  const int64_t side = kTileSide - 2 * p.reach();
  return with_matrix_product<T>(
      p, [&]<class Product>() { return TileGrid::of(p, side, side, matrix_passes<Product>(p), 2); });
}

template <class T>
void launch_search_by_matrix_units(const MatchParams& p, const MatrixSearch<T>& search, cudaStream_t stream) {
  with_matrix_product<T>(p, [&]<class Product>() {
    const Grid grid{dim3(unsigned(search.matches.grid.tiles(p) * search.matches.grid.splits)), dim3(kMatrixThreads),
                    Product::kBytes + sizeof(MatrixState)};
    launch(search_by_matrix_units<T, Product>, grid, stream, search);
  });
}

}  // namespace hdrops::patch_match

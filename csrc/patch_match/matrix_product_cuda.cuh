// Products of the pixels of a tile at a block of displacements, on matrix units: 16-bit data, float32 sums, sm_80 and
// later.
//
// A tile is 16 x 16 pixels of the query. MatrixProduct holds, in registers, the sums over channels of
// <query(y, x), key(y + dy, x + dx)> for up to kDown displacements in y and kAcross in x. They are added up in chunks
// of 16 channels, one instruction's depth, which lie in shared memory for the tile and for the pixels of the key that
// it sees (ChunkMemory), and are then stored to shared memory (SumMemory), where the sums over patches are formed.
//
// An instruction multiplies 16 pixels of a row of the key and 8 of a row of the query: all pairs, of which those at
// displacements of the block are kept. 16 pixels of the key hold 8 of the query at 9 displacements, 32 at 25: 56 and
// 78 % of the products are of use. A warp has two rows of the query, which share the rows of the key in between: with
// 6 x 9 displacements 7 rows of the key serve 12 pairs of rows, with 3 x 25 displacements 4 rows serve 6.
#pragma once
#include "common/device.cuh"
#include "patch_match/packed_features_cuda.cuh"

namespace hdrops::patch_match {

constexpr int kMatrixThreads = 256, kTileSide = 16, kTilePixels = kTileSide * kTileSide;
constexpr int kChunkBytes = 32;  // of a pixel: 16 channels, in two pieces of 16 bytes

// A chunk of rows of kColumns pixels. The pieces of every other four pixels are swapped, so that any eight neighbours'
// same pieces, which ldmatrix reads at once, cover all banks, as whole pixels do, which the copies write.
template <int kColumns>
struct ChunkMemory {
  static_assert(kColumns % 8 == 0);
  static constexpr int kRowBytes = kColumns * kChunkBytes;
  HDROPS_HD static constexpr int position(int row, int column, int piece) {
    return row * kRowBytes + ((2 * column + piece) ^ (column >> 2 & 1)) * 16;
  }
};

// The products of all displacements, a plane of the tile each. The pixels of a plane are permuted within 32 neighbours
// by an exclusive or: the lanes that store at once have four pixels of a row at eight successive dx, and so meet
// different banks.
template <int kDown>
struct SumMemory {
  HDROPS_HD static constexpr int plane(int dy, int dx) { return (dx * kDown + dy) * kTilePixels; }
  HDROPS_HD static constexpr int swap(int dx) { return (dx & 1) | (dx & 6) << 2; }
};

// Starts the copy of a chunk of `rows` x kColumns pixels whose first is (top, left). What lies outside the image, and
// channels that there are not, become zero. All threads together.
template <class T, int kColumns>
__device__ __forceinline__ void copy_chunk(const PackedFeatures<T>& f, int64_t image, int top, int left, int rows,
                                           int chunk, unsigned char* target) {
  constexpr int kSpan = kColumns <= 16 ? 32 : kColumns <= 32 ? 64 : 128;  // threads of a row
  constexpr int kStep = kMatrixThreads / kSpan;                           // rows at once
  static_assert(2 * kColumns <= kSpan);
  const int thread = computed_again(int(threadIdx.x));
  const int column = thread % kSpan / 2, piece = thread % 2, vector = 2 * chunk + piece;
  if (column >= kColumns) return;
  // As unsigned numbers, coordinates take one comparison for both ends.
  const bool in_columns = unsigned(left) + unsigned(column) < unsigned(f.width) && vector < f.vectors();
  const int64_t stride = f.width * f.channels;
  int row = thread / kSpan;
  target += ChunkMemory<kColumns>::position(row, column, piece);
  // From a pixel that may lie outside the image.
  int64_t from = (image * f.height + top + row) * stride + (int64_t(left) + column) * f.channels;
  from += vector * kVector16<T>;
#pragma unroll 2
  for (; row < rows; row += kStep, from += kStep * stride, target += kStep * ChunkMemory<kColumns>::kRowBytes) {
    const bool valid = in_columns && unsigned(top) + unsigned(row) < unsigned(f.height);
    cp_async_16(target, f.data + (valid ? from : 0), valid);
  }
}

// kSpans times 16 pixels of a row of the key meet 8 of the query.
template <class T, int kDown_, int kSpans>
struct MatrixProduct {
  static constexpr int kDown = kDown_, kAcross = 16 * kSpans - 7;
  static constexpr int kKeyRows = kTileSide + kDown - 1, kKeyColumns = 16 * kSpans + 8;
  using Query = ChunkMemory<kTileSide>;
  using Key = ChunkMemory<kKeyColumns>;
  using Sums = SumMemory<kDown>;
  static constexpr int kQueryBytes = kTileSide * Query::kRowBytes;
  static constexpr int kStageBytes = kQueryBytes + kKeyRows * Key::kRowBytes;
  static constexpr int kSumBytes = kDown * kAcross * kTilePixels * int(sizeof(float));
  // Of shared memory: two stages, or the sums in their place.
  static constexpr int kBytes = 2 * kStageBytes > kSumBytes ? 2 * kStageBytes : kSumBytes;

  float sums[2][2][kDown][kSpans][4];  // [row][half of the row][dy][span]

  // A thread's place in its warp, and the first of the warp's rows.
  struct Place {
    int lane, row;
    __device__ __forceinline__ static Place mine() {
      const int thread = computed_again(int(threadIdx.x));
      return {thread % 32, thread / 32 * 2};
    }
  };

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int dy = 0; dy < kDown; ++dy) {
#pragma unroll
          for (int i = 0; i < 4 * kSpans; ++i) sums[row][half][dy][i / 4][i % 4] = 0;
        }
      }
    }
  }

  // Adds the products of a chunk at the first `down` displacements in y.
  __device__ __forceinline__ void multiply(const unsigned char* query, const unsigned char* key, int down) {
    const Place at = Place::mine();
    query += Query::position(at.row, at.lane / 16 * 8 + at.lane % 8, at.lane / 8 % 2);
    key += Key::position(at.row, at.lane % 16, at.lane / 16);
    uint32_t right[2][4];  // the fragments of both halves of a row of the query
#pragma unroll
    for (int r = 0; r < 2; ++r) ldmatrix_x4(right[r], query + r * Query::kRowBytes);
#pragma unroll
    for (int k = 0; k <= kDown; ++k) {
      if (k > down) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int span = 0; span < kSpans; ++span) {
          uint32_t left[4];
          ldmatrix_x4(left, key + k * Key::kRowBytes + (8 * half + 16 * span) * kChunkBytes);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if (k - r < 0 || k - r >= kDown) continue;
            const uint32_t fragment[2] = {right[r][2 * half], right[r][2 * half + 1]};
            mma_m16n8k16<T>(sums[r][half][k - r][span], left, fragment);
          }
        }
      }
    }
  }

  // Stores the sums at the first `down` displacements in y; with kSome, zero where keep(row, x, dy, dx) says that one
  // of the two pixels does not exist. A lane's sums have 8 pixels of the key between them, and the two of a register
  // pair a pixel of the query: dx is `first` + 8 k, of which the first and the last may be no displacement of the
  // block.
  template <bool kSome, class Keep>
  __device__ __forceinline__ void store(float* memory, int down, const Keep& keep) const {
    const Place at = Place::mine();
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int in_half = at.lane % 4 * 2 + odd, first = at.lane / 4 - in_half;
      const int pixel = (at.row * kTileSide + in_half) ^ Sums::swap(first & 7);
      float* const planes = memory + Sums::plane(0, first);
#pragma unroll
      for (int k = 0; k < 2 * kSpans; ++k) {
        if ((k == 0 && first < 0) || (k == 2 * kSpans - 1 && first > 0)) continue;
#pragma unroll
        for (int dy = 0; dy < kDown; ++dy) {
          if (dy >= down) break;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = i / 2, half = i % 2;
            const bool kept = !kSome || keep(at.row + r, 8 * half + in_half, dy, first + 8 * k);
            planes[Sums::plane(dy, 8 * k) + (pixel ^ (kTileSide * r | 8 * half))] =
                kept ? sums[r][half][dy][k / 2][2 * (k % 2) + odd] : 0.f;
          }
        }
      }
    }
  }
};

}  // namespace hdrops::patch_match

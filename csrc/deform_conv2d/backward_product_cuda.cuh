// The matrix product of a tile: C[kRows, kColumns] += A[kRows, depth] * B[depth, kColumns], all 256 threads of a block,
// operands in shared memory, C in registers. B's rows are contiguous (kColumns + padding apart); A's too, or, if
// kTransposed, those of A transposed, as for the weight's gradient, where both operands come pixel by pixel.
//
//   FmaProduct<T>  any type on any device, full accuracy of float (double): a thread has every 16th row of a 16th of
//                  the columns
//   MmaProduct<T>  16-bit data on matrix units from sm_80 on: 4 x 2 warps of 16 x 32 elements
//   Tf32Product    floats rounded to TensorFloat-32 there, as torch's switch allows
//
// The strides keep rows 16-byte aligned and the warps' accesses apart: ldmatrix reads 8 rows that lie an odd number of
// 16 bytes apart; TF32 fragments read 4 floats of 8 rows 4 floats apart modulo 32 (8 x 4 of 8 apart if by columns).
#pragma once
#include "common/device.cuh"

namespace hdrops::deform_conv2d {

constexpr int kProductThreads = 256;

// Sizes of a tile for data of type T: its rows and columns, and the depth that is in shared memory at a time.
template <class T>
struct TileShape {
  static constexpr int kRows = sizeof(T) == 8 ? 32 : 64, kColumns = kRows, kDepth = 128 / int(sizeof(T));
};

template <class T, bool kTransposed>
struct FmaProduct {
  using Real = device_acc_t<T>;
  using Shape = TileShape<T>;
  static constexpr int kVector = kVector16<T>;
  static constexpr int kStrideA = (kTransposed ? Shape::kRows : Shape::kDepth) + kVector;
  static constexpr int kStrideB = Shape::kColumns + kVector;
  static constexpr int kStep = 4;                   // depth must be a multiple
  static constexpr int kMicro = Shape::kRows / 16;  // rows and columns of a thread
  // Devices that have matrix units use those for 16-bit data.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  static constexpr bool kRunsHere = sizeof(T) != 2;
#else
  static constexpr bool kRunsHere = true;
#endif
  Real sums[kMicro][kMicro];

  // Row i and first column of this thread's elements.
  __device__ __forceinline__ static int row(int i) {
    int thread = int(threadIdx.x) / 16;
    return kTransposed ? thread * kMicro + i : thread + 16 * i;
  }
  __device__ __forceinline__ static int column() { return int(threadIdx.x) % 16 * kMicro; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
#pragma unroll
      for (int j = 0; j < kMicro; ++j) sums[i][j] = 0;
    }
  }
  __device__ __forceinline__ void multiply(const T* a, const T* b, int depth) {
#pragma unroll 1
    for (int k = 0; k < depth; k += kStep) {
      Real left[kStep][kMicro];
      load_left(a, k, left);
#pragma unroll
      for (int step = 0; step < kStep; ++step) {
        auto right = *reinterpret_cast<const Vector<T, kMicro>*>(b + (k + step) * kStrideB + column());
#pragma unroll
        for (int i = 0; i < kMicro; ++i) {
#pragma unroll
          for (int j = 0; j < kMicro; ++j) sums[i][j] += left[step][i] * load_as(right.value[j]);
        }
      }
    }
  }
  __device__ __forceinline__ void load_left(const T* a, int k, Real (&left)[kStep][kMicro]) const {
    if constexpr (kTransposed) {
#pragma unroll
      for (int step = 0; step < kStep; ++step) {
        auto values = *reinterpret_cast<const Vector<T, kMicro>*>(a + (k + step) * kStrideA + row(0));
#pragma unroll
        for (int i = 0; i < kMicro; ++i) left[step][i] = load_as(values.value[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kMicro; ++i) {
#pragma unroll
        for (int half = 0; half < kStep; half += kMicro) {
          auto values = *reinterpret_cast<const Vector<T, kMicro>*>(a + row(i) * kStrideA + k + half);
#pragma unroll
          for (int step = 0; step < kMicro; ++step) left[half + step][i] = load_as(values.value[step]);
        }
      }
    }
  }
  __device__ __forceinline__ void store(Real* target, int64_t stride, int rows, int columns) const {
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
#pragma unroll
      for (int j = 0; j < kMicro; ++j) {
        if (row(i) < rows && column() + j < columns) target[row(i) * stride + column() + j] = sums[i][j];
      }
    }
  }
};

// What the two products of matrix units have in common: where a warp's 16 x 32 elements lie, and its sums.
template <class T>
struct WarpTile {
  static constexpr int kTiles = 4;  // of 8 columns
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr bool kRunsHere = false;
#else
  static constexpr bool kRunsHere = true;
#endif
  float sums[kTiles][4];

  __device__ __forceinline__ static int lane() { return int(threadIdx.x) % 32; }
  __device__ __forceinline__ static int first_row() { return int(threadIdx.x) / 64 * 16; }
  __device__ __forceinline__ static int first_column() { return int(threadIdx.x) / 32 % 2 * 32; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[tile][i] = 0;
    }
  }
  __device__ __forceinline__ void store(float* target, int64_t stride, int rows, int columns) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int row = first_row() + lane() / 4 + i / 2 * 8, column = first_column() + tile * 8 + lane() % 4 * 2 + i % 2;
        if (row < rows && column < columns) target[row * stride + column] = sums[tile][i];
      }
    }
  }
};

template <class T, bool kTransposed>
struct MmaProduct : WarpTile<T> {
  using Real = float;
  using Shape = TileShape<T>;
  using Warp = WarpTile<T>;
  static constexpr int kStrideA = (kTransposed ? Shape::kRows : Shape::kDepth) + 8;
  static constexpr int kStrideB = Shape::kColumns + 8;
  static constexpr int kStep = 16;

  __device__ __forceinline__ void multiply(const T* a, const T* b, int depth) {
    // Of the four 8 x 8 matrices of a load, this lane addresses row `low` of the one at (8 * first, 8 * second).
    int lane = Warp::lane(), low = lane % 8, first = lane / 8 % 2 * 8, second = lane / 16 * 8;
    const T* left = kTransposed ? a + (second + low) * kStrideA + Warp::first_row() + first
                                : a + (Warp::first_row() + first + low) * kStrideA + second;
    const T* right = b + (first + low) * kStrideB + Warp::first_column() + second;
#pragma unroll 1
    for (int k = 0; k < depth; k += kStep) {
      uint32_t fragment[4];
      if constexpr (kTransposed) {
        ldmatrix_x4_transposed(fragment, left + k * kStrideA);
      } else {
        ldmatrix_x4(fragment, left + k);
      }
#pragma unroll
      for (int tile = 0; tile < Warp::kTiles; tile += 2) {
        uint32_t pair[4];
        ldmatrix_x4_transposed(pair, right + k * kStrideB + tile * 8);
        mma_m16n8k16<T>(Warp::sums[tile], fragment, {pair[0], pair[1]});
        mma_m16n8k16<T>(Warp::sums[tile + 1], fragment, {pair[2], pair[3]});
      }
    }
  }
};

template <class T, bool kTransposed>
struct Tf32Product : WarpTile<T> {
  using Real = float;
  using Shape = TileShape<T>;
  using Warp = WarpTile<T>;
  static constexpr int kStrideA = kTransposed ? Shape::kRows + 8 : Shape::kDepth + 4;
  static constexpr int kStrideB = Shape::kColumns + 8;
  static constexpr int kStep = 8;

  __device__ __forceinline__ void multiply(const T* a, const T* b, int depth) {
    int group = Warp::lane() / 4, pair = Warp::lane() % 4;
    constexpr int kRow = kTransposed ? 1 : kStrideA, kColumn = kTransposed ? kStrideA : 1;
    const T* left = a + (Warp::first_row() + group) * kRow + pair * kColumn;
    const T* right = b + pair * kStrideB + Warp::first_column() + group;
#pragma unroll 1
    for (int k = 0; k < depth; k += kStep, left += kStep * kColumn, right += kStep * kStrideB) {
      const uint32_t fragment[4] = {to_tf32(left[0]), to_tf32(left[8 * kRow]), to_tf32(left[4 * kColumn]),
                                    to_tf32(left[8 * kRow + 4 * kColumn])};
#pragma unroll
      for (int tile = 0; tile < Warp::kTiles; ++tile) {
        mma_m16n8k8_tf32(Warp::sums[tile], fragment,
                         {to_tf32(right[tile * 8]), to_tf32(right[4 * kStrideB + tile * 8])});
      }
    }
  }
};

// 16-byte vectors from global to shared memory: rows [0, rows) of the matrix, `columns` wide, into a kRows x kColumns
// one; zeros for what is missing. Asynchronous; a row's first element is aligned to 16 bytes.
template <class T, int kRows, int kColumns, int kStride>
__device__ __forceinline__ void copy_tile_async(T* to, const T* from, int64_t row_stride, int rows, int columns) {
  constexpr int kVector = kVector16<T>, kPerRow = kColumns / kVector;
  for (int i = threadIdx.x; i < kRows * kPerRow; i += kProductThreads) {
    int row = i / kPerRow, column = i % kPerRow * kVector;
    bool valid = row < rows && column < columns;
    cp_async_16(to + row * kStride + column, valid ? from + row * row_stride + column : from, valid);
  }
}

}  // namespace hdrops::deform_conv2d

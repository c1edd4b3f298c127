// Products of two tiles in shared memory, summed in registers by the whole block.
//
// An operand is a panel: rows of 64 bytes, each with a piece of the depth (the index summed over), whose four 16-byte
// pieces are permuted from row to row (panel_position), so that neither ldmatrix, nor the 16-byte loads of FMA, nor the
// stores of a gather meet a bank conflict. TileProduct<Arithmetic, kRows, kColumns> adds a * b^T to its kRows x
// kColumns sums: a has kRows rows, b kColumns. Arithmetic says what the elements are and what multiplies them:
//
//   Fma<float>, Fma<double>         multiply-adds, on every device
//   MatrixUnits<bfloat16|float16>   m16n8k16 with float sums, sm_80 and later
//   Tf32                            m16n8k8 on floats rounded to TensorFloat-32, sm_80 and later
#pragma once
#include "common/device.cuh"

namespace hdrops::deform_conv2d {

constexpr int kPanelBytes = 64;

// Elements of a panel's row.
template <class Arithmetic>
constexpr int kPanelDepth = kPanelBytes / int(sizeof(typename Arithmetic::Element));

// Byte position in a panel of a row's 16-byte piece. Any 8 successive rows of one piece, 4 of two neighbours (0 and 1,
// 2 and 3), or 2 whole rows cover all banks.
__device__ __forceinline__ int panel_position(int row, int piece) {
  int swap = (row & 2) | ((row >> 2) & 1);
  return row * kPanelBytes + ((piece ^ swap) << 4);
}

template <class Real>
struct Fma {
  using Element = Real;
  using Sum = Real;
  static constexpr bool kMatrixUnits = false;
  __device__ __forceinline__ static Element element(Sum value) { return value; }
};

template <class T>
struct MatrixUnits {
  using Element = T;
  using Sum = float;
  static constexpr bool kMatrixUnits = true;
  __device__ __forceinline__ static Element element(Sum value) { return store_as<T>(value); }
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16<T>(d, a, b);
  }
};

struct Tf32 {
  using Element = uint32_t;  // a float whose last 13 bits are zero
  using Sum = float;
  static constexpr bool kMatrixUnits = true;
  __device__ __forceinline__ static Element element(Sum value) { return to_tf32(value); }
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k8_tf32(d, a, b);
  }
};

// Writes `kCount` values, whole pieces, to a row of a panel, beginning with element `first`.
template <class Arithmetic, int kCount>
__device__ __forceinline__ void store_elements(unsigned char* panel, int row, int first,
                                               const typename Arithmetic::Sum (&values)[kCount]) {
  using Element = typename Arithmetic::Element;
  constexpr int kPiece = kVector16<Element>;
  static_assert(kCount % kPiece == 0);
#pragma unroll
  for (int begin = 0; begin < kCount; begin += kPiece) {
    Vector<Element, kPiece> piece;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) piece.value[i] = Arithmetic::element(values[begin + i]);
    *reinterpret_cast<Vector<Element, kPiece>*>(panel + panel_position(row, (first + begin) / kPiece)) = piece;
  }
}

// On matrix units: a warp owns kWarpRows x kWarpColumns sums, in fragments of 16 x 8.
template <class Arithmetic, int kRows, int kColumns, int kWarps = 8, bool kMatrixUnits = Arithmetic::kMatrixUnits>
struct TileProduct {
  using Element = typename Arithmetic::Element;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpsAcross = kColumns / 32;
  static constexpr int kWarpColumns = kColumns / kWarpsAcross, kWarpRows = kRows / (kWarps / kWarpsAcross);
  static constexpr int kDown = kWarpRows / 16, kAcross = kWarpColumns / 8;
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0);

  float sums[kDown][kAcross][4];

  __device__ __forceinline__ static int lane() { return int(threadIdx.x) % 32; }
  __device__ __forceinline__ static int warp() { return int(threadIdx.x) / 32; }
  __device__ __forceinline__ static int first_row() { return warp() / kWarpsAcross * kWarpRows; }
  __device__ __forceinline__ static int first_column() { return warp() % kWarpsAcross * kWarpColumns; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) sums[i][j][0] = sums[i][j][1] = sums[i][j][2] = sums[i][j][3] = 0;
    }
  }

  // The 32 bytes of an instruction's depth are two pieces of a row, whatever the elements: 16-bit values by ldmatrix's
  // own meaning, and 32-bit ones because a lane receives 4 successive bytes of row lane / 4.
  __device__ __forceinline__ void multiply(const unsigned char* a, const unsigned char* b) {
#pragma unroll
    for (int piece = 0; piece < kPanelBytes / 16; piece += 2) {
      uint32_t left[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        ldmatrix_x4(left[i], a + panel_position(first_row() + 16 * i + lane() % 16, piece + lane() / 16));
      }
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        uint32_t right[4];  // the fragments of two times 8 columns
        int row = first_column() + 8 * j + lane() / 16 * 8 + lane() % 8;
        ldmatrix_x4(right, b + panel_position(row, piece + lane() / 8 % 2));
        const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          Arithmetic::multiply(sums[i][j], left[i], first);
          Arithmetic::multiply(sums[i][j + 1], left[i], second);
        }
      }
    }
  }

  // use(row, column, sum) for each of this thread's sums.
  template <class Use>
  __device__ __forceinline__ void for_each(const Use& use) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          use(first_row() + 16 * i + e / 2 * 8 + lane() / 4, first_column() + 8 * j + lane() % 4 * 2 + e % 2,
              sums[i][j][e]);
        }
      }
    }
  }
};

// By multiply-adds: the threads form a grid of kThreadRows x 16; each owns kDown x kAcross sums a grid apart, so that
// neighbours read neighbouring rows.
template <class Arithmetic, int kRows, int kColumns, int kWarps>
struct TileProduct<Arithmetic, kRows, kColumns, kWarps, false> {
  using Element = typename Arithmetic::Element;
  using Sum = typename Arithmetic::Sum;
  static constexpr int kThreads = 32 * kWarps, kThreadColumns = 16, kThreadRows = kThreads / kThreadColumns;
  static constexpr int kDown = kRows / kThreadRows, kAcross = kColumns / kThreadColumns;
  static constexpr int kPiece = kVector16<Element>;
  using Piece = Vector<Element, kPiece>;

  Sum sums[kDown][kAcross];

  __device__ __forceinline__ static int row(int i) { return i * kThreadRows + int(threadIdx.x) / kThreadColumns; }
  __device__ __forceinline__ static int column(int j) { return j * kThreadColumns + int(threadIdx.x) % kThreadColumns; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) sums[i][j] = 0;
    }
  }

  __device__ __forceinline__ void multiply(const unsigned char* a, const unsigned char* b) {
#pragma unroll 1
    for (int piece = 0; piece < kPanelBytes / 16; ++piece) {
      Piece right[kAcross];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) right[j] = load(b + panel_position(column(j), piece));
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        Piece left = load(a + panel_position(row(i), piece));
#pragma unroll
        for (int e = 0; e < kPiece; ++e) {
#pragma unroll
          for (int j = 0; j < kAcross; ++j) sums[i][j] += left.value[e] * right[j].value[e];
        }
      }
    }
  }

  // use(row, column, sum) for each of this thread's sums.
  template <class Use>
  __device__ __forceinline__ void for_each(const Use& use) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) use(row(i), column(j), sums[i][j]);
    }
  }

  __device__ __forceinline__ static Piece load(const unsigned char* from) {
    return *reinterpret_cast<const Piece*>(from);
  }
};

}  // namespace hdrops::deform_conv2d

// Where the blocks of a backward kernel add up a gradient that many of them contribute to: one sum per element, added
// to by reductions in any order.
//
// FloatSum holds floats (doubles): the fastest, and different in the last bits from run to run.
//
// FixedSum holds 64-bit integers, whose sum does not depend on the order: the deterministic mode. A contribution is a
// product of two or three factors, or a sum of `terms` such products, and counts in units of 2^-shift. The shift comes
// from the largest exponents of the factors, which bound every contribution, and leaves room for as many of them as one
// element can receive, so that no sum overflows: with B the bound
//   |contribution| < B = 2^(sum of the factors' exponents) * terms,   unit = B * contributions * 2^-61.
// For 64 terms and a million contributions a unit is 2^-41 of B. That is below float's own rounding of any contribution
// above 2^-17 B; smaller ones keep an absolute error of half a unit each, which is what they lose against the large
// ones. Doubles get a second integer for the remainder, of 62 - log2(contributions) more bits: 2^-83 B in the example.
// Infinities and NaN are kept as three flags, so that the sum is what floating point would have made of them.
#pragma once
#include <cmath>

#include "common/device.cuh"

namespace hdrops {

// The largest exponents, on the device: 0 if a tensor has no finite value but zero, else frexp's exponent + kBias.
struct Exponents {
  static constexpr int kBias = 4096;
  int factor[3];
};

// Threads of a block of the small kernels here, which have no shared memory.
constexpr int kScanThreads = 256;

// *largest = max of the finite values' exponents. One value a thread and step; a block's largest by warp, then by
// an integer maximum in memory, which no order changes.
template <class T>
__global__ void __launch_bounds__(kScanThreads) scan_exponents(const T* values, int64_t count, int* largest) {
  using Real = device_acc_t<T>;
  Real magnitude = 0;
  int64_t step = int64_t(gridDim.x) * kScanThreads;
  for (int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x; i < count; i += step) {
    Real value = fabs(load_as(values[i]));
    if (value < Real(INFINITY) && value > magnitude) magnitude = value;
  }
  for (int lane = 16; lane > 0; lane /= 2) {
    Real other = __shfl_xor_sync(0xffffffffu, magnitude, lane);
    magnitude = other > magnitude ? other : magnitude;
  }
  if (threadIdx.x % 32 != 0 || magnitude == 0) return;
  int exponent;
  frexp(magnitude, &exponent);
  atomicMax(largest, exponent + Exponents::kBias);
}

template <class T>
void launch_scan(const void* values, int64_t count, int* largest, cudaStream_t stream) {
  int64_t enough = ceil_div<int64_t>(count, 8 * kScanThreads), most = 8 * device_multiprocessors();
  Grid grid{dim3(unsigned(enough < most ? enough : most)), dim3(kScanThreads)};
  launch(scan_exponents<T>, grid, stream, static_cast<const T*>(values), count, largest);
}

// Zeros, 16 bytes a thread and step; `bytes` is a multiple of 16 and the memory aligned to it.
static __global__ void __launch_bounds__(kScanThreads) fill_zero(uint4* memory, int64_t vectors) {
  int64_t step = int64_t(gridDim.x) * kScanThreads;
  for (int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x; i < vectors; i += step) {
    memory[i] = uint4{0, 0, 0, 0};
  }
}

inline void launch_fill_zero(void* memory, int64_t bytes, cudaStream_t stream) {
  int64_t enough = ceil_div<int64_t>(bytes / 16, 4 * kScanThreads), most = 16 * device_multiprocessors();
  Grid grid{dim3(unsigned(enough < most ? enough : most)), dim3(kScanThreads)};
  launch(fill_zero, grid, stream, static_cast<uint4*>(memory), bytes / 16);
}

template <class Real>
struct FloatSum {
  static constexpr bool kFixed = false;
  // Elements that one reduction takes: lanes are laid along the channels, so that narrow ones fall into few sectors.
#if defined(HDROPS_EMULATED) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static constexpr int kWidth = sizeof(Real) == 4 ? 4 : 1;
#else
  static constexpr int kWidth = 1;
#endif
  Real* sums;

  __device__ __forceinline__ void prepare() {}
  __device__ __forceinline__ void add(int64_t at, const Real (&values)[kWidth]) const {
    if constexpr (kWidth == 4) {
      reduce_add(reinterpret_cast<Vector<Real, 4>*>(sums + at),
                 Vector<Real, 4>{values[0], values[1], values[2], values[3]});
    } else {
      reduce_add(sums + at, values[0]);
    }
  }
  __device__ __forceinline__ void add_one(int64_t at, Real value) const { reduce_add(sums + at, value); }
  __device__ __forceinline__ Real value(int64_t at) const { return sums[at]; }
};

template <class Real>
struct FixedSum {
  static constexpr bool kFixed = true;
  static constexpr int kWidth = 1;
  static constexpr bool kTwoWords = sizeof(Real) == 8;
  enum Flag : unsigned { kPositiveInfinity = 1, kNegativeInfinity = 2, kNotANumber = 4 };

  int64_t *high, *low;  // low: the remainders of doubles
  unsigned* flags;      // four bits for each element
  const Exponents* exponents;
  int factors;
  int log_terms, log_contributions;  // of a contribution; that one element can receive; rounded up
  Real scale, low_scale;             // 2^shift, and 2^(bits of the remainder), once prepared

  // Every thread, before it adds or reads.
  __device__ __forceinline__ void prepare() {
    constexpr int kLargest = sizeof(Real) == 8 ? 1024 : 128;
    int bound = log_terms;
    for (int i = 0; i < factors; ++i) bound += exponents->factor[i] - Exponents::kBias;
    if (bound > kLargest) bound = kLargest;  // what is larger is infinite
    int shift = 61 - log_contributions - bound;
    if (shift > kLargest - 2) shift = kLargest - 2;
    scale = Real(ldexp(Real(1), shift));
    low_scale = Real(ldexp(Real(1), 62 - log_contributions));
  }
  __device__ __forceinline__ void add(int64_t at, const Real (&values)[kWidth]) const { add_one(at, values[0]); }
  __device__ __forceinline__ void add_one(int64_t at, Real value) const {
    if (!(fabs(value) < Real(INFINITY))) {
      unsigned flag = value > 0 ? kPositiveInfinity : value < 0 ? kNegativeInfinity : kNotANumber;
      atomicOr(flags + at / 8, flag << at % 8 * 4);
      return;
    }
    Real units = value * scale, whole = rint(units);
    reduce_add(high + at, int64_t(whole));
    if constexpr (kTwoWords) reduce_add(low + at, int64_t(rint((units - whole) * low_scale)));
  }
  __device__ __forceinline__ Real value(int64_t at) const {
    unsigned flag = flags[at / 8] >> at % 8 * 4 & 15;
    if (flag & kNotANumber || (flag & 3) == 3) return Real(NAN);
    if (flag != 0) return flag & kPositiveInfinity ? Real(INFINITY) : -Real(INFINITY);
    Real sum = Real(high[at]);
    if constexpr (kTwoWords) sum += Real(low[at]) / low_scale;
    return sum / scale;
  }
};

}  // namespace hdrops

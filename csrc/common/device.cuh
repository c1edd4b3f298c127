// What the CUDA kernels use beyond plain CUDA C++: shared memory, 16-byte vectors, conversions, the matrix units,
// asynchronous copies, vector reductions. One function each, so that the host emulator of the tests can stand in for
// it: its twins are in tests/emu/device_on_cpu.h, with the same names and meanings.
//
// Matrix fragments are laid out over a warp as PTX defines them for mma.sync (group = lane / 4, pair = lane % 4):
//   m16n8k16, 16-bit:  A row major, a[0..3] = rows group, group+8, group, group+8; columns 2*pair.. , twice, then +8
//                      B column major, b[0..1] = rows 2*pair.. and +8 of column group
//   m16n8k8, tf32:     A a[0..3] = (group, pair), (group+8, pair), (group, pair+4), (group+8, pair+4)
//                      B b[0..1] = (pair, group), (pair+4, group)
//   accumulators:      d[0..1] = row group, columns 2*pair, 2*pair+1; d[2..3] = row group+8
#pragma once
#include <cstdint>

#include "common/half.h"
#include "common/launch.h"

namespace hdrops {

// N values of type T that move together; N * sizeof(T) is 4, 8 or 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T value[N];
};

template <class T>
constexpr int kVector16 = 16 / int(sizeof(T));

// The type that sums and coordinates of data of type T are kept in.
template <class T>
struct DeviceAccumulate {
  using type = float;
};
template <>
struct DeviceAccumulate<double> {
  using type = double;
};
template <class T>
using device_acc_t = typename DeviceAccumulate<T>::type;

}  // namespace hdrops

#if defined(HDROPS_EMULATED)
#include "device_on_cpu.h"
#else

namespace hdrops {

// The block's dynamic shared memory, 128-byte aligned.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char hdrops_shared_memory[];
  return reinterpret_cast<T*>(hdrops_shared_memory);
}

// Stored value to the type of the sums, and back, rounding to nearest even.
__device__ __forceinline__ double load_as(double value) { return value; }
__device__ __forceinline__ float load_as(float value) { return value; }
__device__ __forceinline__ float load_as(bfloat16 value) { return to_float(value); }
__device__ __forceinline__ float load_as(float16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
template <class T>
__device__ __forceinline__ T store_as(device_acc_t<T> value) {
  return value;
}
template <>
__device__ __forceinline__ float16 store_as<float16>(float value) {
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
__device__ __forceinline__ bfloat16 store_as<bfloat16>(float value) {
#if __CUDA_ARCH__ >= 800
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  return to_bfloat16(value);
#endif
}

// Loads through the read-only cache: the memory must not change while the kernel runs, and be aligned to the vector.
template <class T, int N>
__device__ __forceinline__ Vector<T, N> load_global(const Vector<T, N>* from) {
  constexpr int kBytes = N * sizeof(T);
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  union {
    Vector<T, N> vector;
    uint32_t word;
    uint2 words2;
    uint4 words4;
  } loaded;
  if constexpr (kBytes == 16) loaded.words4 = __ldg(reinterpret_cast<const uint4*>(from));
  if constexpr (kBytes == 8) loaded.words2 = __ldg(reinterpret_cast<const uint2*>(from));
  if constexpr (kBytes == 4) loaded.word = __ldg(reinterpret_cast<const uint32_t*>(from));
  return loaded.vector;
}

// The value, of which the compiler no longer knows where it came from: what is computed from it is computed again,
// where registers are scarcer than time.
__device__ __forceinline__ int computed_again(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A kernel for matrix units of a later generation never runs on this one: its host function asks
// device_compute_capability() first.
__device__ __forceinline__ void needs_later_device() { __trap(); }

// d += a * b, m16n8k16; the tag T says which 16-bit format (sm_80 and later).
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  needs_later_device();
#endif
}
template <>
__device__ __forceinline__ void mma_m16n8k16<float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  needs_later_device();
#endif
}

// d += a * b, m16n8k8, on values rounded by to_tf32 (sm_80 and later).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  needs_later_device();
#endif
}

// The value in TensorFloat-32 (10 bits of mantissa), rounded to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
#if __CUDA_ARCH__ >= 800
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
#else
  needs_later_device();
  return 0;
#endif
}

// Four 8x8 matrices of 16-bit values from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}
// The same, each matrix transposed on the way.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// 16 bytes from global to shared memory, asynchronously (sm_80 and later; at once before); zeros if not `valid`, and
// then `from` is not read.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `kPending` of this thread's committed groups are still on their way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// *to += value without the old value, in any order among threads: one instruction for four floats from sm_90 on.
__device__ __forceinline__ void reduce_add(float* to, float value) { atomicAdd(to, value); }
__device__ __forceinline__ void reduce_add(double* to, double value) { atomicAdd(to, value); }
__device__ __forceinline__ void reduce_add(int64_t* to, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
__device__ __forceinline__ void reduce_add(Vector<float, 4>* to, const Vector<float, 4>& value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(value.value[0]), "f"(value.value[1]),
               "f"(value.value[2]), "f"(value.value[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i) atomicAdd(&to->value[i], value.value[i]);
#endif
}

}  // namespace hdrops
#endif

// The host's twins of what csrc/common/device.cuh has for the device, with the same names, meanings and demands: an
// address that is not aligned, a lane that is missing from a matrix product, a value that is not rounded to TF32 or an
// instruction that the set device lacks throws an emulator::Error that names block, thread and place.
//
// A matrix product takes every lane's fragments by PTX's layout, multiplies exactly and adds in float, in an order
// that is not the hardware's. An asynchronous copy happens in the cp_async_wait of its thread and not before, and
// its destination is NaN until then.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>

#include "common/half.h"

namespace hdrops {

using emulator::Place;

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::launch.shared);
}

inline double load_as(double value) { return value; }
inline float load_as(float value) { return value; }
inline float load_as(bfloat16 value) { return to_float(value); }
inline float load_as(float16 value) { return to_float(value); }
template <class T>
T store_as(device_acc_t<T> value) {
  return value;
}
template <>
inline float16 store_as<float16>(float value) {
  return to_float16(value);
}
template <>
inline bfloat16 store_as<bfloat16>(float value) {
  return to_bfloat16(value);
}

inline int computed_again(int value) { return value; }

inline void check_aligned(const void* address, size_t bytes, const char* what, const Place& place) {
  if (uintptr_t(address) % bytes == 0) return;
  emulator::fail(std::string(what) + " at an address that is not a multiple of " + std::to_string(bytes), place);
}

inline void check_shared(const void* address, size_t bytes, const char* what, const Place& place) {
  check_aligned(address, bytes, what, place);
  if (emulator::in_shared_memory(address, bytes)) return;
  emulator::fail(std::string(what) + " outside the block's dynamic shared memory", place);
}

inline void check_device(int capability, const char* what, const Place& place) {
  if (emulator::device().compute_capability >= capability) return;
  emulator::fail(std::string(what) + " needs sm_" + std::to_string(capability), place);
}

template <class T, int N>
Vector<T, N> load_global(const Vector<T, N>* from, Place place = Place::current()) {
  static_assert(N * sizeof(T) == 4 || N * sizeof(T) == 8 || N * sizeof(T) == 16);
  check_aligned(from, N * sizeof(T), "load_global", place);
  if (emulator::in_shared_memory(from, 1)) emulator::fail("load_global of shared memory", place);
  return *from;
}

// ---- matrix products

// What a lane brings to d += a * b; A and B are 32-bit registers of one or two values.
struct MatrixLane {
  float (&d)[4];
  const uint32_t (&a)[4];
  const uint32_t (&b)[2];
};

inline void check_whole_warp(uint32_t present, const char* what, const Place& place) {
  if (present == ~0u) return;
  emulator::fail(std::string(what) + " by a warp of which lanes have exited or do not exist", place);
}

// d += a * b for whole matrices, the accumulators taken from the lanes and given back.
template <int K>
void multiply_add(MatrixLane* (&lanes)[32], const float (&a)[16][K], const float (&b)[K][8]) {
  float d[16][8];
  auto accumulator = [&](int lane, int i) -> float& { return d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]; };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) accumulator(lane, i) = lanes[lane]->d[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = accumulator(lane, i);
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place = Place::current()) {
  check_device(80, "mma_m16n8k16", place);
  MatrixLane mine{d, a, b};
  auto product = [](MatrixLane*(&lanes)[32], uint32_t present, const Place& at) {
    check_whole_warp(present, "mma_m16n8k16", at);
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      int group = lane / 4, pair = lane % 4;
      for (int half = 0; half < 2; ++half) {
        auto value = [half](uint32_t packed) { return to_float(T{uint16_t(packed >> 16 * half)}); };
        for (int i = 0; i < 4; ++i) {
          left[group + i % 2 * 8][2 * pair + half + i / 2 * 8] = value(lanes[lane]->a[i]);
        }
        for (int i = 0; i < 2; ++i) right[2 * pair + half + i * 8][group] = value(lanes[lane]->b[i]);
      }
    }
    multiply_add(lanes, left, right);
  };
  emulator::together("mma_m16n8k16", ~0u, mine, product, place);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Place place = Place::current()) {
  check_device(80, "mma_m16n8k8_tf32", place);
  MatrixLane mine{d, a, b};
  auto product = [](MatrixLane*(&lanes)[32], uint32_t present, const Place& at) {
    check_whole_warp(present, "mma_m16n8k8_tf32", at);
    auto value = [&](uint32_t bits) {
      if ((bits & 0x1fff) != 0) emulator::fail("mma_m16n8k8_tf32: an operand that is not rounded by to_tf32", at);
      return bits_to_float(bits);
    };
    float left[16][8], right[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      int group = lane / 4, pair = lane % 4;
      for (int i = 0; i < 4; ++i) left[group + i % 2 * 8][pair + i / 2 * 4] = value(lanes[lane]->a[i]);
      for (int i = 0; i < 2; ++i) right[pair + i * 4][group] = value(lanes[lane]->b[i]);
    }
    multiply_add(lanes, left, right);
  };
  emulator::together("mma_m16n8k8_tf32", ~0u, mine, product, place);
}

// Half of the last kept bit's value is added to the magnitude, then the lower bits go. Infinities stay, a NaN is quiet.
inline uint32_t to_tf32(float value, Place place = Place::current()) {
  check_device(80, "to_tf32", place);
  uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffe000u;
  if (magnitude == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

// What a lane brings to ldmatrix: the address of its row, and its registers for the result.
struct LoadMatrixLane {
  uint32_t (&r)[4];
  const void* row;
};

// Element [row][column] of matrix i lies with the lane that gave the address of its row.
template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], const void* row, const char* name, const Place& place) {
  check_device(75, name, place);
  check_shared(row, 16, name, place);
  LoadMatrixLane mine{r, row};
  auto load = [](LoadMatrixLane*(&lanes)[32], uint32_t present, const Place& at) {
    check_whole_warp(present, "ldmatrix_x4", at);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        uint16_t value[2];
        for (int half = 0; half < 2; ++half) {
          int row = lane / 4, column = lane % 4 * 2 + half;
          if (kTransposed) std::swap(row, column);
          value[half] = static_cast<const uint16_t*>(lanes[8 * i + row]->row)[column];
        }
        lanes[lane]->r[i] = uint32_t(value[1]) << 16 | value[0];
      }
    }
  };
  emulator::together(name, ~0u, mine, load, place);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Place place = Place::current()) {
  load_matrices<false>(r, row, "ldmatrix_x4", place);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, Place place = Place::current()) {
  load_matrices<true>(r, row, "ldmatrix_x4_transposed", place);
}

// ---- asynchronous copies: at once on a device before sm_80

inline void cp_async_16(void* to, const void* from, bool valid = true, Place place = Place::current()) {
  check_shared(to, 16, "cp_async_16", place);
  check_aligned(from, 16, "cp_async_16", place);
  emulator::AsyncCopies& copies = emulator::current->copies;
  copies.start(to, from, valid);
  if (emulator::device().compute_capability < 80) {
    copies.commit();
    copies.wait(0);
  }
}
inline void cp_async_commit() { emulator::current->copies.commit(); }
template <int kPending>
void cp_async_wait() {
  emulator::current->copies.wait(kPending);
}

// ---- additions without the old value

inline void reduce_add(float* to, float value, Place place = Place::current()) { atomicAdd(to, value, place); }
inline void reduce_add(double* to, double value, Place place = Place::current()) { atomicAdd(to, value, place); }
inline void reduce_add(int64_t* to, int64_t value, Place place = Place::current()) {
  using Unsigned = unsigned long long;
  atomicAdd(reinterpret_cast<Unsigned*>(to), static_cast<Unsigned>(value), place);
}
inline void reduce_add(Vector<float, 4>* to, const Vector<float, 4>& value, Place place = Place::current()) {
  check_aligned(to, 16, "reduce_add", place);
  if (emulator::in_shared_memory(to, 1)) emulator::fail("reduce_add of a vector to shared memory", place);
  for (int i = 0; i < 4; ++i) atomicAdd(&to->value[i], value.value[i], place);
}

}  // namespace hdrops

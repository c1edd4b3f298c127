// CUDA C++ as g++ understands it: the language's keywords, built-in variables and functions, for kernels that run on
// the host (csrc/common/launch.h includes this in place of cuda_runtime.h where HDROPS_EMULATED is defined).
//
// Emulated: the threads of a block with their barriers (execution.h), warp shuffles, votes and matches with their
// masks, atomics, dynamic and static shared memory, the usual intrinsics with CUDA's conversions. Found: missing
// barriers (random order of threads, shared memory full of NaN), divergence, overruns, values of lanes that have none.
// Proves nothing about speed, registers, bank conflicts, the memory model (a fence does nothing: threads and blocks
// run one after another), races within a stretch between two barriers that a change of order does not show, or the
// last bits of approximate functions.
//
// A static __shared__ array keeps the last block's values, where dynamic shared memory begins as NaN: prefer the
// latter.
#pragma once
#include <math.h>
#include <stdio.h>

#include <bit>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda_types.h"
#include "execution.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define __grid_constant__

using cudaStream_t = struct EmulatedStream*;

#define threadIdx (::emulator::current->index)
#define blockIdx (::emulator::launch.block_index)
#define blockDim (::emulator::launch.block)
#define gridDim (::emulator::launch.grid)
constexpr int warpSize = 32;

// ---- barriers

inline void __syncthreads(emulator::Place place = emulator::Place::current()) {
  emulator::block_barrier("__syncthreads", 0, [](int, int) { return 0; }, place);
}
inline int __syncthreads_count(int predicate, emulator::Place place = emulator::Place::current()) {
  return emulator::block_barrier("__syncthreads_count", predicate != 0, [](int a, int b) { return a + b; }, place);
}
inline int __syncthreads_and(int predicate, emulator::Place place = emulator::Place::current()) {
  return emulator::block_barrier("__syncthreads_and", predicate != 0, [](int a, int b) { return a & b; }, place);
}
inline int __syncthreads_or(int predicate, emulator::Place place = emulator::Place::current()) {
  return emulator::block_barrier("__syncthreads_or", predicate != 0, [](int a, int b) { return a | b; }, place);
}
inline void __syncwarp(unsigned mask = ~0u, emulator::Place place = emulator::Place::current()) {
  emulator::meet("__syncwarp", mask, nullptr, [](void* const(&)[32], uint32_t, const emulator::Place&) {}, place);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { emulator::yield(); }
[[noreturn]] inline void __trap(emulator::Place place = emulator::Place::current()) {
  emulator::fail("__trap()", place);
}

// ---- what lanes of a warp do together

namespace emulator {

// Calls `operate(lanes, present, place)` once, when all lanes of the mask have come; lanes[i] is what lane i brought.
template <class Lane, class Operation>
void together(const char* name, uint32_t mask, Lane& mine, Operation, const Place& place) {
  meet(
      name, mask, &mine,
      [](void* const(&brought)[32], uint32_t present, const Place& at) {
        Lane* lanes[32];
        for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Lane*>(brought[i]);
        Operation()(lanes, present, at);
      },
      place);
}

// The 4 or 8 bytes that a shuffle moves.
template <class T>
concept WarpValue = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <WarpValue T>
T shuffle(const char* name, uint32_t mask, T value, unsigned source, const Place& place) {
  struct Lane {
    T value, result;
    unsigned source;
  } mine{value, value, source};
  auto exchange = [](Lane*(&lanes)[32], uint32_t present, const Place& at) {
    for (unsigned i = 0; i < 32; ++i) {
      if ((present >> i & 1) == 0) continue;
      unsigned from = lanes[i]->source;
      if ((present >> from & 1) == 0) {
        fail("shuffle: lane " + std::to_string(i) + " reads lane " + std::to_string(from) +
                 ", which has exited, does not exist or is not named in the mask",
             at);
      }
      lanes[i]->result = lanes[from]->value;
    }
  };
  together(name, mask, mine, exchange, place);
  return mine.result;
}

inline void check_width(int width, const Place& place) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("shuffle: width " + std::to_string(width), place);
}

// What the votes, matches and reductions have in common: every lane's result is made from all lanes' values.
template <class T, class Result>
struct VoteLane {
  T value;
  Result result;
};

template <class Result, class T, class Vote>
Result vote(const char* name, uint32_t mask, T value, Vote count, const Place& place) {
  VoteLane<T, Result> mine{value, {}};
  together(name, mask, mine, count, place);
  return mine.result;
}

// The lanes whose predicate is not zero.
inline unsigned ballot(const char* name, uint32_t mask, int predicate, const Place& place) {
  auto count = [](VoteLane<bool, unsigned>*(&lanes)[32], uint32_t present, const Place&) {
    unsigned ballot = 0;
    for (int i = 0; i < 32; ++i) {
      if (present >> i & 1) ballot |= unsigned(lanes[i]->value) << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (present >> i & 1) lanes[i]->result = ballot;
    }
  };
  return vote<unsigned>(name, mask, predicate != 0, count, place);
}

template <class T, class Operation>
T reduce(const char* name, uint32_t mask, T value, Operation, const Place& place) {
  auto count = [](VoteLane<T, T>*(&lanes)[32], uint32_t present, const Place&) {
    int first = std::countr_zero(present);
    T sum = lanes[first]->value;
    for (int i = first + 1; i < 32; ++i) {
      if (present >> i & 1) sum = Operation()(sum, lanes[i]->value);
    }
    for (int i = first; i < 32; ++i) {
      if (present >> i & 1) lanes[i]->result = sum;
    }
  };
  return vote<T>(name, mask, value, count, place);
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Place place = emulator::Place::current()) {
  emulator::check_width(width, place);
  unsigned lane = emulator::current->lane(), first = lane & ~unsigned(width - 1);
  return emulator::shuffle("__shfl_sync", mask, value, first | (unsigned(source) & unsigned(width - 1)), place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulator::Place place = emulator::Place::current()) {
  emulator::check_width(width, place);
  unsigned lane = emulator::current->lane(), in_segment = lane & unsigned(width - 1);
  return emulator::shuffle("__shfl_up_sync", mask, value, in_segment >= delta ? lane - delta : lane, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulator::Place place = emulator::Place::current()) {
  emulator::check_width(width, place);
  unsigned lane = emulator::current->lane(), in_segment = lane & unsigned(width - 1);
  bool inside = delta < unsigned(width) && in_segment + delta < unsigned(width);
  return emulator::shuffle("__shfl_down_sync", mask, value, inside ? lane + delta : lane, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  emulator::Place place = emulator::Place::current()) {
  emulator::check_width(width, place);
  unsigned lane = emulator::current->lane(), source = lane ^ unsigned(lane_mask);
  // A lane may read an earlier segment but not a later one, and no lane beyond the warp.
  bool inside = source < 32 && source < (lane & ~unsigned(width - 1)) + unsigned(width);
  return emulator::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Place place = emulator::Place::current()) {
  return emulator::ballot("__ballot_sync", mask, predicate, place);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Place place = emulator::Place::current()) {
  return emulator::ballot("__any_sync", mask, predicate, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Place place = emulator::Place::current()) {
  return emulator::ballot("__all_sync", mask, predicate == 0, place) == 0;
}

// The lanes whose value is the same bit for bit.
template <emulator::WarpValue T>
unsigned __match_any_sync(unsigned mask, T value, emulator::Place place = emulator::Place::current()) {
  auto match = [](emulator::VoteLane<T, unsigned>*(&lanes)[32], uint32_t present, const emulator::Place&) {
    for (int i = 0; i < 32; ++i) {
      for (int j = 0; j < 32; ++j) {
        if ((present >> i & present >> j & 1) == 0) continue;
        bool same = memcmp(&lanes[i]->value, &lanes[j]->value, sizeof(T)) == 0;
        lanes[i]->result |= unsigned(same) << j;
      }
    }
  };
  return emulator::vote<unsigned>("__match_any_sync", mask, value, match, place);
}
template <emulator::WarpValue T>
unsigned __match_all_sync(unsigned mask, T value, int* predicate, emulator::Place place = emulator::Place::current()) {
  unsigned same = __match_any_sync(mask, value, place);
  *predicate = same == mask;
  return *predicate ? mask : 0;
}

#define EMULATOR_REDUCE(name, T, operation)                                                                          \
  inline T __reduce_##name##_sync(unsigned mask, T value, emulator::Place place = emulator::Place::current()) {      \
    return emulator::reduce("__reduce_" #name "_sync", mask, value, [](T a, T b) -> T { return operation; }, place); \
  }
EMULATOR_REDUCE(add, unsigned, a + b)
EMULATOR_REDUCE(add, int, unsigned(a) + unsigned(b))
EMULATOR_REDUCE(min, unsigned, a < b ? a : b)
EMULATOR_REDUCE(min, int, a < b ? a : b)
EMULATOR_REDUCE(max, unsigned, a > b ? a : b)
EMULATOR_REDUCE(max, int, a > b ? a : b)
EMULATOR_REDUCE(and, unsigned, a& b)
EMULATOR_REDUCE(or, unsigned, a | b)
EMULATOR_REDUCE(xor, unsigned, a ^ b)
#undef EMULATOR_REDUCE

// ---- atomics: the overloads that CUDA has, and no others

namespace emulator {

// Stores operation(old, value) and returns the old value.
template <class T, class Operation>
T update(T* at, T value, Operation operation, const Place& place) {
  if (uintptr_t(at) % sizeof(T) != 0) fail("atomic operation at an address that is not aligned", place);
  T old = *at;
  *at = operation(old, value);
  return old;
}

}  // namespace emulator

// Integers are added as unsigned numbers, which wrap around.
#define EMULATOR_ATOMIC(name, T, operation)                                                   \
  inline T atomic##name(T* at, T value, emulator::Place place = emulator::Place::current()) { \
    return emulator::update(at, value, [](T a, T b) -> T { return operation; }, place);       \
  }
#define EMULATOR_ATOMIC_INTEGERS(name, operation) \
  EMULATOR_ATOMIC(name, int, operation)           \
  EMULATOR_ATOMIC(name, unsigned, operation)      \
  EMULATOR_ATOMIC(name, unsigned long long, operation)

EMULATOR_ATOMIC(Add, int, unsigned(a) + unsigned(b))
EMULATOR_ATOMIC(Add, unsigned, a + b)
EMULATOR_ATOMIC(Add, unsigned long long, a + b)
EMULATOR_ATOMIC(Add, float, a + b)
EMULATOR_ATOMIC(Add, double, a + b)
EMULATOR_ATOMIC(Sub, int, unsigned(a) - unsigned(b))
EMULATOR_ATOMIC(Sub, unsigned, a - b)
EMULATOR_ATOMIC_INTEGERS(Max, a > b ? a : b)
EMULATOR_ATOMIC_INTEGERS(Min, a < b ? a : b)
EMULATOR_ATOMIC(Max, long long, a > b ? a : b)
EMULATOR_ATOMIC(Min, long long, a < b ? a : b)
EMULATOR_ATOMIC_INTEGERS(And, a& b)
EMULATOR_ATOMIC_INTEGERS(Or, a | b)
EMULATOR_ATOMIC_INTEGERS(Xor, a ^ b)
EMULATOR_ATOMIC_INTEGERS(Exch, (void(a), b))
EMULATOR_ATOMIC(Exch, float, (void(a), b))
EMULATOR_ATOMIC(Inc, unsigned, a >= b ? 0 : a + 1)
EMULATOR_ATOMIC(Dec, unsigned, a == 0 || a > b ? b : a - 1)
#undef EMULATOR_ATOMIC_INTEGERS
#undef EMULATOR_ATOMIC

// One that fails lets other threads run, so that a thread may wait for another's lock.
#define EMULATOR_CAS(T)                                                                                \
  inline T atomicCAS(T* at, T expected, T value, emulator::Place place = emulator::Place::current()) { \
    T old = emulator::update(at, value, [=](T a, T b) { return a == expected ? b : a; }, place);       \
    if (old != expected) emulator::yield();                                                            \
    return old;                                                                                        \
  }
EMULATOR_CAS(int)
EMULATOR_CAS(unsigned)
EMULATOR_CAS(unsigned long long)
EMULATOR_CAS(unsigned short)
#undef EMULATOR_CAS

#include "cuda_intrinsics.h"

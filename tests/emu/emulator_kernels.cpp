// Small kernels that test the emulator itself: right ones, and wrong ones whose fault it must find
// (tests/test_emulator.py).
#include <array>
#include <string>

#include "arrays.h"
#include "common/device.cuh"

namespace hdrops {
namespace {

// ---- right kernels

// Sums a row: a warp's lanes by shuffles, the warps through static shared memory.
__global__ void row_sums(const float* x, float* sums, int columns) {
  __shared__ float warp_sums[32];
  float sum = 0;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += __ldg(x + int64_t(blockIdx.x) * columns + i);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < blockDim.x / 32 ? warp_sums[threadIdx.x] : 0.f;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// c = a b for square matrices, in tiles in dynamic shared memory. Without the barriers it is wrong.
template <bool kFirstBarrier, bool kSecondBarrier>
__global__ void __launch_bounds__(256) matmul(const float* a, const float* b, float* c, int n) {
  constexpr int kTile = 16;
  float* tile_a = shared_memory<float>();
  float* tile_b = tile_a + kTile * kTile;
  int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * kTile + y, column = blockIdx.x * kTile + x;
  float sum = 0;
  for (int k = 0; k < n; k += kTile) {
    tile_a[y * kTile + x] = a[row * n + k + x];
    tile_b[y * kTile + x] = b[(k + y) * n + column];
    if (kFirstBarrier) __syncthreads();
    for (int i = 0; i < kTile; ++i) sum += tile_a[y * kTile + i] * tile_b[i * kTile + x];
    if (kSecondBarrier) __syncthreads();
  }
  c[row * n + column] = sum;
}

void run_matmul(const std::string& without, const float* a, const float* b, float* c, int n) {
  Grid grid{dim3(n / 16, n / 16), dim3(16, 16), 2 * 16 * 16 * sizeof(float)};
  if (without == "") return launch(matmul<true, true>, grid, nullptr, a, b, c, n);
  if (without == "first") return launch(matmul<false, true>, grid, nullptr, a, b, c, n);
  if (without == "second") return launch(matmul<true, false>, grid, nullptr, a, b, c, n);
  throw std::invalid_argument(without);
}

// Every thread of a 3-D grid writes its own indices.
__global__ void write_indices(int* indices) {
  int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* mine = indices + (block * int(blockDim.x * blockDim.y * blockDim.z) + thread) * 6;
  unsigned values[6] = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z};
  for (int i = 0; i < 6; ++i) mine[i] = int(values[i]);
}

// The order in which threads take tickets, blocks one after another.
__global__ void take_tickets(int* order, int* next) {
  order[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

// What every primitive of a warp gives, a row of results a lane.
__global__ void warp_primitives(const int* x, int* results) {
  int lane = threadIdx.x % 32, value = x[threadIdx.x];
  int* mine = results + threadIdx.x * 16;
  mine[0] = __shfl_sync(~0u, value, 5);
  mine[1] = __shfl_sync(~0u, value, lane + 3, 8);
  mine[2] = __shfl_up_sync(~0u, value, 2);
  mine[3] = __shfl_up_sync(~0u, value, 3, 16);
  mine[4] = __shfl_down_sync(~0u, value, 4);
  mine[5] = __shfl_down_sync(~0u, value, 1, 4);
  mine[6] = __shfl_xor_sync(~0u, value, 9);
  mine[7] = __shfl_xor_sync(~0u, value, 12, 8);
  mine[8] = int(__ballot_sync(~0u, value > 0));
  mine[9] = __any_sync(~0u, value == 3);
  mine[10] = __all_sync(~0u, value > -100);
  mine[11] = int(__match_any_sync(~0u, value));
  mine[12] = __reduce_add_sync(~0u, value);
  mine[13] = __reduce_max_sync(~0u, value);
  mine[14] = __syncthreads_count(value > 0);
  // The two halves of a warp apart.
  if (lane < 16) {
    mine[15] = int(__ballot_sync(0xffffu, value > 0));
  } else {
    mine[15] = int(__ballot_sync(0xffff0000u, value > 0));
  }
}

__global__ void block_votes(const int* x, int* results) {
  int all = __syncthreads_and(x[threadIdx.x]), any = __syncthreads_or(x[threadIdx.x]);
  results[2 * threadIdx.x] = all;
  results[2 * threadIdx.x + 1] = any;
}

// Threads that return early take no part in barriers and votes.
__global__ void early_return(int* results, int count) {
  if (int(threadIdx.x) >= count) return;
  unsigned present = __ballot_sync(~0u, 1);
  __syncthreads();
  __syncwarp();
  results[threadIdx.x] = int(present);
}

// All threads on the same words of integers, floats and doubles.
__global__ void atomics(int* ints, unsigned* unsigneds, unsigned long long* longs, float* floats, double* doubles) {
  int i = int(threadIdx.x);
  atomicAdd(ints, -i);
  atomicMax(ints + 1, i);
  atomicMin(ints + 2, -i);
  atomicSub(ints + 3, i);
  atomicExch(ints + 4, 7);
  atomicAdd(unsigneds, i);
  atomicOr(unsigneds + 1, 1u << i % 32);
  atomicAnd(unsigneds + 2, ~(1u << i % 16));
  atomicXor(unsigneds + 3, i);
  atomicInc(unsigneds + 4, 9);
  atomicAdd(longs, 1ull << 40);
  atomicMax(longs + 1, static_cast<unsigned long long>(i) << 40);
  reduce_add(reinterpret_cast<int64_t*>(longs) + 2, int64_t(-i));
  atomicAdd(floats, 0.5f);
  reduce_add(reinterpret_cast<Vector<float, 4>*>(floats + 4), Vector<float, 4>{{1, 2, 3, float(i)}});
  atomicAdd(doubles, 0.25);
  // A lock: one thread at a time adds to a word that is not atomic.
  while (atomicCAS(ints + 5, 0, 1) != 0) {
  }
  int old = ints[6];
  __nanosleep(1);
  ints[6] = old + 1;
  atomicExch(ints + 5, 0);
}

// One warp, one product; the fragments straight from row-major a and column-major b.
template <class T>
__global__ void mma_16bit(const T* a, const T* b, float* c) {
  int lane = threadIdx.x, group = lane / 4, pair = lane % 4;
  float d[4];
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    left[i] = *reinterpret_cast<const uint32_t*>(a + (group + i % 2 * 8) * 16 + 2 * pair + i / 2 * 8);
    d[i] = c[(group + i / 2 * 8) * 8 + 2 * pair + i % 2];
  }
  for (int i = 0; i < 2; ++i) right[i] = *reinterpret_cast<const uint32_t*>(b + group * 16 + 2 * pair + i * 8);
  mma_m16n8k16<T>(d, left, right);
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + 2 * pair + i % 2] = d[i];
}

// The same through shared memory: copied asynchronously, a by ldmatrix, row-major b [16][8] by the transposing form.
template <class T>
__global__ void mma_ldmatrix(const T* a, const T* b, float* c) {
  T* shared_a = shared_memory<T>();
  T* shared_b = shared_a + 16 * 16;
  int lane = threadIdx.x, group = lane / 4, pair = lane % 4;
  cp_async_16(shared_a + lane * 8, a + lane * 8);
  cp_async_16(shared_b + lane * 8, b + (lane < 16 ? lane * 8 : 0), lane < 16);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t left[4], right[4];
  ldmatrix_x4(left, shared_a + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x4_transposed(right, shared_b + lane * 8);
  float d[4] = {};
  mma_m16n8k16<T>(d, left, {right[0], right[1]});
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + 2 * pair + i % 2] = d[i];
}

// a [16][8], b [8][8] row major.
__global__ void mma_tf32(const float* a, const float* b, float* c, bool rounded) {
  int lane = threadIdx.x, group = lane / 4, pair = lane % 4;
  auto operand = [&](float value) { return rounded ? to_tf32(value) : float_to_bits(value); };
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = operand(a[(group + i % 2 * 8) * 8 + pair + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) right[i] = operand(b[(pair + i * 4) * 8 + group]);
  float d[4] = {};
  mma_m16n8k8_tf32(d, left, right);
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + 2 * pair + i % 2] = d[i];
}

__global__ void round_tf32(const float* x, float* y) { y[threadIdx.x] = bits_to_float(to_tf32(x[threadIdx.x])); }

template <class T>
__global__ void round_to(const float* x, T* y) {
  y[threadIdx.x] = store_as<T>(x[threadIdx.x]);
}

__global__ void read_shared(float* values, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    values[i] = shared_memory<float>()[i];
    shared_memory<float>()[i] = 0;
  }
}

// Two groups of copies under way; what the second brings is read before its wait, or after.
__global__ void async_copies(const Vector<float, 4>* x, Vector<float, 4>* y, int pending) {
  Vector<float, 4>* shared = shared_memory<Vector<float, 4>>();
  int i = threadIdx.x, n = blockDim.x;
  for (int group = 0; group < 2; ++group) {
    cp_async_16(shared + group * n + i, x + group * n + i);
    cp_async_commit();
  }
  if (pending == 1) cp_async_wait<1>();
  if (pending == 0) cp_async_wait<0>();
  __syncthreads();
  int other = n - 1 - i;
  y[other] = shared[other];
  y[n + other] = shared[n + other];
}

// ---- wrong kernels

__global__ void wrong(const char* fault, float* global) {
  float* shared = shared_memory<float>();
  int lane = threadIdx.x % 32;
  auto is = [&](const char* name) { return std::string(fault) == name; };
  if (is("barrier in branches")) {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (is("warp barrier in branches")) {
    if (lane < 16) {
      __syncwarp();
    } else {
      __syncwarp();
    }
  } else if (is("shuffle and barrier")) {
    if (lane == 3) {
      __syncthreads();
    } else {
      __shfl_xor_sync(~0u, lane, 1);
    }
  } else if (is("masks overlap")) {
    __syncwarp(lane < 8 ? 0xffu : ~0u);
    __syncthreads();
  } else if (is("mask without the caller")) {
    __syncwarp(0xfffffffeu);
  } else if (is("shuffle of an exited lane")) {
    if (lane >= 24) return;
    __shfl_xor_sync(~0u, lane, 16);
  } else if (is("product of a partial warp")) {
    if (lane == 31) return;
    float d[4] = {};
    uint32_t a[4] = {}, b[2] = {};
    mma_m16n8k16<bfloat16>(d, a, b);
  } else if (is("missing thread")) {
    if (threadIdx.x == 5) {
      __syncwarp();
    } else if (threadIdx.x < 32) {
      __syncwarp(~(1u << 5));
    }
    __syncthreads();
  } else if (is("unaligned load")) {
    load_global(reinterpret_cast<const Vector<float, 4>*>(global + lane + 1));
  } else if (is("unaligned row")) {
    uint32_t r[4];
    ldmatrix_x4(r, shared + lane);
  } else if (is("unaligned copy")) {
    cp_async_16(shared + lane, global);
  } else if (is("copy to global")) {
    cp_async_16(global, global);
  } else if (is("overrun")) {
    if (threadIdx.x == 0) shared[64] = 1;
  } else if (is("far overrun")) {
    if (threadIdx.x == 0) shared[200] = 1;
  } else if (is("read overrun")) {
    if (threadIdx.x == 0) global[0] = shared[64];
  } else if (is("trap")) {
    if (threadIdx.x == 7) __trap();
  } else if (is("exception")) {
    if (threadIdx.x == 9) throw std::out_of_range("thread nine");
    __syncthreads();
  }
}

// Counts the objects that live in the threads: none may be left when an exception has ended the run.
int living = 0;
struct Counted {
  Counted() { ++living; }
  ~Counted() { --living; }
};
__global__ void exception_with_objects() {
  Counted here;
  __syncthreads();
  if (threadIdx.x == 40) throw std::out_of_range("thread forty");
  __syncwarp();
  __syncthreads();
}

// Many barriers and shuffles, for the time they take.
__global__ void waits(int rounds, int* result) {
  int value = threadIdx.x;
  for (int i = 0; i < rounds; ++i) {
    value = __shfl_xor_sync(~0u, value, 1);
    __syncthreads();
  }
  if (threadIdx.x == 0) *result = value;
}

REGISTER_FAMILY(module) {
  using emulator::pointer;
  using emulator::size;
  module.def("emulator_row_sums", [](const py::array& x, const py::array& sums, int threads) {
    launch(row_sums, {dim3(size(x, 0)), dim3(threads)}, nullptr, pointer<const float>(x), pointer<float>(sums),
           int(size(x, 1)));
  });
  module.def(
      "emulator_matmul", [](const std::string& without, const py::array& a, const py::array& b, const py::array& c) {
        run_matmul(without, pointer<const float>(a), pointer<const float>(b), pointer<float>(c), int(size(a, 0)));
      });
  module.def("emulator_indices", [](const std::array<unsigned, 3>& blocks, const std::array<unsigned, 3>& threads,
                                    const py::array& indices) {
    launch(write_indices, {dim3(blocks[0], blocks[1], blocks[2]), dim3(threads[0], threads[1], threads[2])}, nullptr,
           pointer<int>(indices));
  });
  module.def("emulator_tickets", [](int blocks, int threads, const py::array& order) {
    int next = 0;
    launch(take_tickets, {dim3(blocks), dim3(threads)}, nullptr, pointer<int>(order), &next);
  });
  module.def("emulator_warp_primitives", [](const py::array& x, const py::array& results) {
    launch(warp_primitives, {dim3(1), dim3(size(x, 0))}, nullptr, pointer<const int>(x), pointer<int>(results));
  });
  module.def("emulator_block_votes", [](const py::array& x, const py::array& results) {
    launch(block_votes, {dim3(1), dim3(size(x, 0))}, nullptr, pointer<const int>(x), pointer<int>(results));
  });
  module.def("emulator_early_return", [](const py::array& results, int count) {
    launch(early_return, {dim3(1), dim3(size(results, 0))}, nullptr, pointer<int>(results), count);
  });
  module.def("emulator_atomics", [](int threads, const py::array& ints, const py::array& unsigneds,
                                    const py::array& longs, const py::array& floats, const py::array& doubles) {
    launch(atomics, {dim3(1), dim3(threads)}, nullptr, pointer<int>(ints), pointer<unsigned>(unsigneds),
           pointer<unsigned long long>(longs), pointer<float>(floats), pointer<double>(doubles));
  });
  module.def("emulator_mma", [](const std::string& dtype, const py::array& a, const py::array& b, const py::array& c) {
    auto run = [&]<class T>() {
      launch(mma_16bit<T>, {dim3(1), dim3(32)}, nullptr, pointer<const T>(a), pointer<const T>(b), pointer<float>(c));
    };
    dtype == "bfloat16" ? run.operator()<bfloat16>() : run.operator()<float16>();
  });
  module.def("emulator_mma_ldmatrix", [](const py::array& a, const py::array& b, const py::array& c) {
    launch(mma_ldmatrix<bfloat16>, {dim3(1), dim3(32), 2 * 256 * sizeof(bfloat16)}, nullptr, pointer<const bfloat16>(a),
           pointer<const bfloat16>(b), pointer<float>(c));
  });
  module.def("emulator_mma_tf32", [](const py::array& a, const py::array& b, const py::array& c, bool rounded) {
    launch(mma_tf32, {dim3(1), dim3(32)}, nullptr, pointer<const float>(a), pointer<const float>(b), pointer<float>(c),
           rounded);
  });
  module.def("emulator_round_tf32", [](const py::array& x, const py::array& y) {
    launch(round_tf32, {dim3(1), dim3(size(x, 0))}, nullptr, pointer<const float>(x), pointer<float>(y));
  });
  module.def("emulator_round_to", [](const std::string& dtype, const py::array& x, const py::array& y) {
    emulator::with_type(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if constexpr (sizeof(T) == 2) {
        launch(round_to<T>, {dim3(1), dim3(size(x, 0))}, nullptr, pointer<const float>(x), pointer<T>(y));
      }
    });
  });
  module.def("emulator_read_shared", [](int blocks, const py::array& values) {
    size_t count = size(values, 0);
    launch(read_shared, {dim3(blocks), dim3(32), count * sizeof(float)}, nullptr, pointer<float>(values), int(count));
  });
  module.def("emulator_async_copies", [](const py::array& x, const py::array& y, int pending) {
    using Four = Vector<float, 4>;
    launch(async_copies, {dim3(1), dim3(size(x, 0) / 8), size(x, 0) * sizeof(float)}, nullptr,
           reinterpret_cast<const Four*>(pointer<const float>(x)), reinterpret_cast<Four*>(pointer<float>(y)), pending);
  });
  module.def(
      "emulator_wrong",
      [](const std::string& fault, const py::array& global, int threads) {
        launch(wrong, {dim3(2), dim3(threads), 64 * sizeof(float)}, nullptr, fault.c_str(), pointer<float>(global));
      },
      py::arg("fault"), py::arg("global"), py::arg("threads") = 64);
  module.def("emulator_objects_after_exception", [] {
    try {
      launch(exception_with_objects, {dim3(3), dim3(64)}, nullptr);
    } catch (const std::out_of_range& error) {
      return std::string(error.what()) + ", " + std::to_string(living) + " objects left";
    }
    return std::string("no exception");
  });
  module.def("emulator_launch",
             [](const std::array<unsigned, 3>& blocks, const std::array<unsigned, 3>& threads, size_t shared_bytes) {
               launch(take_tickets,
                      {dim3(blocks[0], blocks[1], blocks[2]), dim3(threads[0], threads[1], threads[2]), shared_bytes},
                      nullptr, static_cast<int*>(nullptr), static_cast<int*>(nullptr));
             });
  module.def("emulator_waits", [](int threads, int rounds) {
    int result = 0;
    launch(waits, {dim3(1), dim3(threads)}, nullptr, rounds, &result);
    return result;
  });
}

}  // namespace
}  // namespace hdrops

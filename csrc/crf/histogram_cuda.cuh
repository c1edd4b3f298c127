// tent_histogram and value_histogram on CUDA (OP-11, OP-12), forward and backward.
//
// Tents: bandwidth bound by the maps. A table of (scale, centre), one pair a tent, is written to the workspace first,
// since their number is the caller's. Planar: a thread reads V pixels once and writes V of each map. Interleaved: a
// thread writes V neighbouring maps of a pixel. Backward: a thread a pixel, two maps of each set.
//
// Value histogram: bins of one sum (bins_cuda.cuh), of the positions; backward looks a slope up per pixel, in shared
// memory where the slopes of a group fit 48 KB. Workspace of the forward pass: the blocks' rows of sums, then totals.
#pragma once
#include "crf/bins_cuda.cuh"
#include "crf/histogram_math.h"
#include "crf/kernels_cuda.h"

namespace hdrops {

// Tents

// Some of the sets of tents, as an argument of a kernel.
struct TentSets {
  static constexpr int kMost = 256;
  int32_t bins[kMost];
  int32_t count;
};

template <class A>
__global__ void tent_table_kernel(TentSets sets, Vector<A, 2>* table) {
  for (int j = 0; j < sets.count; ++j) {
    for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i <= sets.bins[j]; i += int(gridDim.x * blockDim.x)) {
      table[i] = {A(sets.bins[j]), A(i)};
    }
    table += sets.bins[j] + 1;
  }
}

template <class T>
size_t tent_workspace_bytes(const TentParams& p) {
  return size_t(p.tents) * sizeof(Vector<device_acc_t<T>, 2>);
}

// Fills the workspace: the tents of p, in order.
template <class A>
const Vector<A, 2>* tent_table(const TentParams& p, void* workspace, cudaStream_t stream) {
  auto* table = static_cast<Vector<A, 2>*>(workspace);
  for (int64_t first = 0, tent = 0; first < p.bin_count; first += TentSets::kMost) {
    TentSets sets{};
    sets.count = int32_t(p.bin_count - first < TentSets::kMost ? p.bin_count - first : TentSets::kMost);
    for (int j = 0; j < sets.count; ++j) sets.bins[j] = int32_t(p.bins[first + j]);
    launch(tent_table_kernel<A>, {dim3(4), dim3(kRunThreads)}, stream, sets, table + tent);
    for (int j = 0; j < sets.count; ++j) tent += sets.bins[j] + 1;
  }
  return table;
}

// V pixels of a plane at a time; V divides p.p and everything is aligned to it.
template <int V, class T>
__global__ __launch_bounds__(kRunThreads) void tent_planes_kernel(TentParams p,
                                                                  const Vector<device_acc_t<T>, 2>* table) {
  using A = device_acc_t<T>;
  const int64_t per_plane = p.p / V, count = p.n * p.c * per_plane;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t plane = i / per_plane, pixel = i % per_plane * V, n = plane / p.c, c = plane % p.c;
    const auto x = load_elements<V>(static_cast<const T*>(p.input) + plane * p.p + pixel, true);
    T* map = static_cast<T*>(p.output) + (n * p.tents * p.c + c) * p.p + pixel;
    for (int64_t k = 0; k < p.tents; ++k, map += p.c * p.p) {
      const Vector<A, 2> tent = table[k];
      Vector<T, V> heights;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        heights.value[e] = store_as<T>(tent_height(load_as(x.value[e]), tent.value[0], tent.value[1]));
      }
      store_elements<V>(map, heights, true);
    }
  }
}

// V maps at a time, in memory order [n, p, tents, c]; the last few one by one.
template <int V, class T>
__global__ __launch_bounds__(kRunThreads) void tent_pixels_kernel(TentParams p,
                                                                  const Vector<device_acc_t<T>, 2>* table) {
  using A = device_acc_t<T>;
  const int64_t maps = p.tents * p.c, count = p.n * p.p * maps;
  T* output = static_cast<T*>(p.output);
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V; i < count;
       i += int64_t(gridDim.x) * blockDim.x * V) {
    const T* pixel = static_cast<const T*>(p.input) + i / maps * p.c;
    int64_t tent = i % maps / p.c, channel = i % maps % p.c;
    Vector<T, V> heights{};
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if (i + e >= count) break;
      const Vector<A, 2> of = table[tent];
      heights.value[e] = store_as<T>(tent_height(load_as(pixel[channel]), of.value[0], of.value[1]));
      if (++channel == p.c) {
        channel = 0;
        if (++tent == p.tents) tent = 0, pixel += p.c;
      }
    }
    if (i + V <= count) {
      store_elements<V>(output + i, heights, true);
    } else {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (i + e < count) output[i + e] = heights.value[e];
      }
    }
  }
}

// dL/d(tent) of one pixel: its maps lie `stride` apart.
template <class T>
struct TentGradients {
  const T* first;
  int64_t stride;
  __device__ __forceinline__ device_acc_t<T> operator()(int64_t tent) const { return load_as(first[tent * stride]); }
};

template <class T>
__global__ __launch_bounds__(kRunThreads) void tent_backward_kernel(TentParams p,
                                                                    const Vector<device_acc_t<T>, 2>* table) {
  using A = device_acc_t<T>;
  const int64_t stride = p.interleaved ? p.c : p.c * p.p, count = p.n * p.c * p.p;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t outer = i / stride, inner = i % stride;  // a pixel or an image, and where in it
    TentGradients<T> grad{static_cast<const T*>(p.grad_output) + outer * p.tents * stride + inner, stride};
    const A x = load_as(static_cast<const T*>(p.input)[i]);
    A sum = 0;
    for (int64_t k = 0; k < p.tents;) {
      const int64_t scale = int64_t(table[k].value[0]);
      sum += tent_set_slope(x, scale, grad);
      grad.first += (scale + 1) * stride;
      k += scale + 1;
    }
    static_cast<T*>(p.grad_input)[i] = store_as<T>(sum);
  }
}

template <class T>
void tent_histogram_cuda(const TentParams& p, void* workspace, cudaStream_t stream) {
  constexpr int V = kRunVector<T>;
  const auto* table = tent_table<device_acc_t<T>>(p, workspace, stream);
  const int64_t count = p.n * p.c * p.p;
  if (p.interleaved) {
    launch(tent_pixels_kernel<V, T>, grid_over(ceil_div<int64_t>(count * p.tents, V)), stream, p, table);
  } else if (p.p % V == 0 && reinterpret_cast<uintptr_t>(p.input) % 16 == 0) {
    launch(tent_planes_kernel<V, T>, grid_over(count / V), stream, p, table);
  } else {
    launch(tent_planes_kernel<1, T>, grid_over(count), stream, p, table);
  }
}

template <class T>
void tent_histogram_backward_cuda(const TentParams& p, void* workspace, cudaStream_t stream) {
  const auto* table = tent_table<device_acc_t<T>>(p, workspace, stream);
  launch(tent_backward_kernel<T>, grid_over(p.n * p.c * p.p), stream, p, table);
}

// Value histogram

template <class T>
struct ValueCounts : RunTensors<T, T, false, false> {
  using Tensors = RunTensors<T, T, false, false>;
  using A = device_acc_t<T>;

  const ValueHistogramParams& p;
  BlockBins<A, 1> bins;

  __device__ __forceinline__ ValueCounts(const ValueHistogramParams& params, BinWindow window)
      : Tensors(params.input, nullptr, nullptr), p(params), bins(window, shared_memory<double>()) {
    bins.clear();
  }

  template <int V>
  __device__ __forceinline__ void finish(int i, const typename Tensors::template Item<V>& item, bool valid) {
    int begin = this->table_begin(p.layout, p.bins, i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A position = bin_position(load_as(item.pixels.value[k]), p.bins);
      bins.add(begin + int(position), {position}, valid);
      if (p.layout.width > 1) begin = this->next_table(p.layout, p.bins, begin);
    }
  }

  __device__ __forceinline__ void pause() { bins.pause(); }
};

template <class T>
__global__ __launch_bounds__(kRunThreads, 3) void value_histogram_kernel(ValueHistogramParams p, Parts parts,
                                                                         BinPlan plan, double* rows) {
  const int64_t row = blockIdx.x / plan.windows, group = row / parts.per_group, part = row % parts.per_group;
  ValueCounts<T> op(p, plan.at(int(blockIdx.x % plan.windows)));
  walk_part<kRunVector<T>, kRunInFlight<T>>(op, p.layout, parts, group, part);
  op.bins.write(rows + row * plan.row());
}

template <class T>
__global__ void value_bins_kernel(ValueHistogramParams p, const double* totals, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    static_cast<T*>(p.output)[i] = store_as<T>(device_acc_t<T>(value_bin(totals[i], i % p.bins, p.bins)));
  }
}

template <bool kShared, class T>
struct ValueSlopes : RunTensors<T, T, false, true> {
  using Tensors = RunTensors<T, T, false, true>;
  using A = device_acc_t<T>;

  const ValueHistogramParams& p;
  const T* grad;  // of the group's bins
  A* slopes;

  __device__ __forceinline__ ValueSlopes(const ValueHistogramParams& params, int64_t group)
      : Tensors(params.input, nullptr, params.grad_input), p(params), slopes(shared_memory<A>()) {
    const int entries = int(p.layout.width * p.bins);
    grad = static_cast<const T*>(p.grad_output) + group * entries;
    if constexpr (kShared) {
      for (int i = int(threadIdx.x); i < entries; i += int(blockDim.x)) slopes[i] = slope(i, i % int(p.bins));
      __syncthreads();
    }
  }

  __device__ __forceinline__ A slope(int entry, int bin) const { return value_slope(load_as(grad[entry]), bin); }

  template <int V>
  __device__ __forceinline__ void finish(int i, const typename Tensors::template Item<V>& item, bool valid) const {
    if (!valid) return;
    Vector<T, V> result;
    int begin = this->table_begin(p.layout, p.bins, i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A x = load_as(item.pixels.value[k]);
      const int bin = int(bin_position(x, p.bins));
      const A rise = kShared ? slopes[begin + bin] : slope(begin + bin, bin);
      result.value[k] = store_as<T>(x >= A(-1) && x <= A(1) ? rise : A(0));
      if (p.layout.width > 1) begin = this->next_table(p.layout, p.bins, begin);
    }
    this->store(i, result);
  }
};

template <bool kShared, class T>
__global__ __launch_bounds__(kRunThreads, kShared ? 4 : 3) void value_slopes_kernel(ValueHistogramParams p,
                                                                                    Parts parts) {
  const int64_t group = blockIdx.x / parts.per_group, part = blockIdx.x % parts.per_group;
  ValueSlopes<kShared, T> op(p, group);
  walk_part<kRunVector<T>, kRunInFlight<T>>(op, p.layout, parts, group, part);
}

// How the forward pass is cut.
template <class T>
struct ValuePass {
  BinPlan plan;
  Parts parts;

  explicit ValuePass(const ValueHistogramParams& p) {
    const int64_t entries = p.layout.width * p.bins, least = 8 * entries;
    plan = plan_bins(entries, 1, sizeof(device_acc_t<T>), 0);
    const int64_t blocks = int64_t(plan.blocks_per_multiprocessor) * device_multiprocessors();
    parts = parts_for(p.layout, ceil_div<int64_t>(blocks, plan.windows), least > 4096 ? least : 4096);
  }
  int64_t rows(const ValueHistogramParams& p) const { return p.layout.groups * parts.per_group; }
};

template <class T>
size_t value_histogram_workspace_bytes(const ValueHistogramParams& p) {
  const ValuePass<T> pass(p);
  return size_t((pass.rows(p) + p.layout.groups) * pass.plan.row()) * sizeof(double);
}

template <class T>
void value_histogram_cuda(const ValueHistogramParams& p, void* workspace, cudaStream_t stream) {
  const ValuePass<T> pass(p);
  double* rows = static_cast<double*>(workspace);
  double* totals = rows + pass.rows(p) * pass.plan.row();
  const Grid grid{dim3(unsigned(pass.rows(p) * pass.plan.windows)), dim3(kRunThreads), pass.plan.shared_bytes};
  launch(value_histogram_kernel<T>, grid, stream, p, pass.parts, pass.plan, rows);
  const int64_t per_group = pass.parts.per_group;
  const BinRows of{unsigned(per_group), unsigned(per_group), 0, 1, per_group, 0, 0};
  add_rows(rows, pass.plan.row(), of, p.layout.groups, pass.plan.row(), totals, stream);
  const int64_t count = p.layout.groups * pass.plan.row();
  launch(value_bins_kernel<T>, grid_over(count), stream, p, totals, count);
}

template <class T>
void value_histogram_backward_cuda(const ValueHistogramParams& p, cudaStream_t stream) {
  constexpr int64_t kSharedSlopes = 48 << 10;
  const Parts parts = parts_for(p.layout, 4 * int64_t(device_multiprocessors()), 4096);
  const int64_t entries = p.layout.width * p.bins, bytes = entries * int64_t(sizeof(device_acc_t<T>));
  Grid grid{dim3(unsigned(p.layout.groups * parts.per_group)), dim3(kRunThreads)};
  if (bytes <= kSharedSlopes && entries <= p.layout.length() / parts.per_group) {
    grid.shared_bytes = size_t(bytes);
    launch(value_slopes_kernel<true, T>, grid, stream, p, parts);
  } else {
    launch(value_slopes_kernel<false, T>, grid, stream, p, parts);
  }
}

}  // namespace hdrops

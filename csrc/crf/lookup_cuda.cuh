// crf_lookup on CUDA (OP-6, OP-8; codes index the curve). Bandwidth bound: one wave of blocks, each with a part of one
// group's pixels (lookup_layout.h, runs_cuda.cuh) and its group's table in shared memory:
//   forward    pairs (c, delta) where linear, so that a pixel costs one 8-byte read, else c: 2 or 1 values an entry
//   backward   the slopes, 1 value an entry, beside the bins of bins_cuda.cuh
// A table above 48 KB, or of more entries than the part has pixels, is read through the cache instead.
//
// Backward gives the pixels' gradient and the bins of the curves' gradient in one pass. Where the bins need windows, or
// the table the cache, two passes: pixels, then bins. Workspace: the blocks' rows of sums, then the curves' totals.
//
// A block keeps kRunThreads threads, four blocks a multiprocessor; a part is numbered by 32-bit integers.
#pragma once
#include "common/lut.h"
#include "crf/bins_cuda.cuh"
#include "crf/kernels_cuda.h"

namespace hdrops {

constexpr int64_t kTableBytes = 48 << 10;
constexpr int kLookupBlocks = 4;  // of a multiprocessor
constexpr int kBinBlocks = 3;     // the same where both gradients or a curve read through the cache want registers

template <class T>
__device__ __forceinline__ T curve_entry(const T* curve, int64_t entry) {
  return __ldg(curve + entry);
}

// The curves of one group [width, levels] as the forward pass reads them.
template <bool kLinear, bool kShared, class A>
struct ValueTable {
  const A* curve;
  Vector<A, 2>* pairs;  // kLinear && kShared
  A* values;            // !kLinear && kShared
  int levels;

  __device__ __forceinline__ ValueTable(const LookupParams& p, int64_t group) : levels(int(p.levels)) {
    const int entries = int(p.layout.width * p.levels);
    curve = static_cast<const A*>(p.curve) + group * entries;
    if constexpr (kShared) {
      pairs = shared_memory<Vector<A, 2>>();
      values = shared_memory<A>();
      for (int entry = int(threadIdx.x); entry < entries; entry += int(blockDim.x)) {
        if constexpr (kLinear) {
          pairs[entry] = pair(entry, entry % levels);
        } else {
          values[entry] = curve_entry(curve, entry);
        }
      }
      __syncthreads();
    }
  }

  // (c, delta) of a level whose entry is `entry`.
  __device__ __forceinline__ Vector<A, 2> pair(int entry, int level) const {
    const A value = curve_entry(curve, entry);
    return {value, level + 1 < levels ? curve_entry(curve, entry + 1) - value : A(0)};
  }

  __device__ __forceinline__ A at(CurvePosition<A> position, int begin) const {
    const int entry = begin + position.index;
    if constexpr (kLinear) {
      const Vector<A, 2> segment = kShared ? pairs[entry] : pair(entry, position.index);
      return segment.value[0] + position.fraction * segment.value[1];
    } else {
      return kShared ? values[entry] : curve_entry(curve, entry);
    }
  }
};

// Where a pixel, floating or code, lies on its curve, and whether it is a number.
template <bool kLinear, class A, class In>
__device__ __forceinline__ CurvePosition<A> locate_pixel(In pixel, A last, bool& number) {
  if constexpr (kIsCode<In>) {
    number = true;
    return {int(pixel), A(0)};
  } else {
    const A x = load_as(pixel);
    number = x == x;
    return locate_on_curve<kLinear>(x, last);
  }
}

template <bool kLinear, bool kShared, class In, class Out>
struct LookupForward : RunTensors<In, Out, false, true> {
  using Tensors = RunTensors<In, Out, false, true>;
  using A = device_acc_t<Out>;

  const LookupParams& p;
  ValueTable<kLinear, kShared, A> table;

  __device__ __forceinline__ LookupForward(const LookupParams& params, int64_t group)
      : Tensors(params.input, nullptr, params.output), p(params), table(params, group) {}

  template <int V>
  __device__ __forceinline__ void finish(int i, const typename Tensors::template Item<V>& item, bool valid) const {
    if (!valid) return;
    const A last = A(p.levels - 1);
    Vector<Out, V> result;
    int begin = this->table_begin(p.layout, p.levels, i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      bool number;
      const auto position = locate_pixel<kLinear>(item.pixels.value[k], last, number);
      const A value = table.at(position, begin);
      result.value[k] = store_as<Out>(number ? value : A(NAN));
      if (p.layout.width > 1) begin = this->next_table(p.layout, p.levels, begin);
    }
    this->store(i, result);
  }
};

template <bool kLinear, bool kShared, class In, class Out>
__global__ __launch_bounds__(kRunThreads, kLookupBlocks) void lookup_forward_kernel(LookupParams p, Parts parts) {
  const int64_t group = blockIdx.x / parts.per_group, part = blockIdx.x % parts.per_group;
  LookupForward<kLinear, kShared, In, Out> op(p, group);
  walk_part<kRunVector<In, Out>, kRunInFlight<In, Out>>(op, p.layout, parts, group, part);
}

// How much of the backward pass a kernel does.
enum class LookupGradients : int { pixels, curve, both };

template <bool kLinear, bool kShared, LookupGradients kWanted, class In, class Out>
struct LookupBackward : RunTensors<In, Out, true, kWanted != LookupGradients::curve> {
  static constexpr bool kPixels = kWanted != LookupGradients::curve, kCurve = kWanted != LookupGradients::pixels;
  static constexpr int kSums = kLinear ? 2 : 1;
  using Tensors = RunTensors<In, Out, true, kPixels>;
  using A = device_acc_t<Out>;

  const LookupParams& p;
  const A* curve;  // of the group
  A* slopes;       // kShared
  BlockBins<A, kSums> bins;

  // Shared memory: the bins, then the slopes.
  __device__ __forceinline__ LookupBackward(const LookupParams& params, int64_t group, BinWindow window,
                                            int64_t bin_bytes)
      : Tensors(params.input, params.grad_output, params.grad_input), p(params), bins(window, shared_memory<double>()) {
    const int entries = int(p.layout.width * p.levels);
    curve = static_cast<const A*>(p.curve) + group * entries;
    slopes = reinterpret_cast<A*>(shared_memory<char>() + bin_bytes);
    if constexpr (kPixels && kShared) {
      for (int entry = int(threadIdx.x); entry < entries; entry += int(blockDim.x)) {
        slopes[entry] = slope(entry, entry % int(p.levels));
      }
      __syncthreads();
    }
    if constexpr (kCurve) bins.clear();
  }

  __device__ __forceinline__ A slope(int entry, int level) const {
    const A* of_pixel = curve + (entry - level);
    return kLinear ? linear_slope(of_pixel, p.levels, level) : nearest_slope(of_pixel, level) * A(p.gradient_scale);
  }

  template <int V>
  __device__ __forceinline__ void finish(int i, const typename Tensors::template Item<V>& item, bool valid) {
    const A last = A(p.levels - 1);
    Vector<Out, V> result;
    int begin = this->table_begin(p.layout, p.levels, i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      bool number;
      const auto position = locate_pixel<kLinear>(item.pixels.value[k], last, number);
      const int entry = begin + position.index;
      const A g = load_as(item.grad.value[k]);
      if constexpr (kPixels) {
        const A x = load_as(item.pixels.value[k]), rise = kShared ? slopes[entry] : slope(entry, position.index);
        result.value[k] = store_as<Out>(x >= A(0) && x <= A(1) ? g * rise : A(0));
      }
      if constexpr (kCurve && kLinear) bins.add(entry, {g, g * position.fraction}, valid && number);
      if constexpr (kCurve && !kLinear) bins.add(entry, {g}, valid && number);
      if (p.layout.width > 1) begin = this->next_table(p.layout, p.levels, begin);
    }
    if constexpr (kPixels) {
      if (valid) this->store(i, result);
    }
  }

  __device__ __forceinline__ void pause() {
    if constexpr (kCurve) bins.pause();
  }
};

// `rows`: of all blocks' sums, [groups, parts, entries, kSums].
template <bool kLinear, bool kShared, LookupGradients kWanted, class In, class Out>
__global__ __launch_bounds__(kRunThreads, kShared&& kWanted != LookupGradients::both
                                              ? kLookupBlocks
                                              : kBinBlocks) void lookup_backward_kernel(LookupParams p, Parts parts,
                                                                                        BinPlan plan, double* rows) {
  const int64_t row = blockIdx.x / plan.windows, group = row / parts.per_group, part = row % parts.per_group;
  LookupBackward<kLinear, kShared, kWanted, In, Out> op(p, group, plan.at(int(blockIdx.x % plan.windows)),
                                                        int64_t(plan.shared_bytes));
  walk_part<kRunVector<In, Out>, kRunInFlight<In, Out> / 2>(op, p.layout, parts, group, part);
  if constexpr (kWanted != LookupGradients::pixels) op.bins.write(rows + row * plan.row());
}

// The curves' gradient from their totals.
template <bool kLinear, class A>
__global__ void lookup_curve_gradient_kernel(LookupParams p, const double* totals, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t level = i % p.levels;
    const double* of_curve = totals + (i - level) * (kLinear ? 2 : 1);
    static_cast<A*>(p.grad_curve)[i] = A(kLinear ? linear_curve_gradient(of_curve, p.levels, level) : of_curve[level]);
  }
}

// Whether a table of `entry_bytes` an entry belongs in shared memory.
inline bool table_is_shared(const LookupParams& p, const Parts& parts, size_t entry_bytes) {
  const int64_t entries = p.layout.width * p.levels;
  return entries * int64_t(entry_bytes) <= kTableBytes && entries <= p.layout.length() / parts.per_group;
}

template <bool kLinear, class In, class Out>
void launch_lookup_forward(const LookupParams& p, cudaStream_t stream) {
  using A = device_acc_t<Out>;
  const Parts parts = parts_for(p.layout, int64_t(kLookupBlocks) * device_multiprocessors(), 4096);
  const size_t entry_bytes = (kLinear ? 2 : 1) * sizeof(A);
  Grid grid{dim3(unsigned(p.layout.groups * parts.per_group)), dim3(kRunThreads)};
  if (table_is_shared(p, parts, entry_bytes)) {
    grid.shared_bytes = size_t(p.layout.width * p.levels) * entry_bytes;
    launch(lookup_forward_kernel<kLinear, true, In, Out>, grid, stream, p, parts);
  } else {
    launch(lookup_forward_kernel<kLinear, false, In, Out>, grid, stream, p, parts);
  }
}

// The pass over the pixels' gradient alone.
template <bool kLinear, class In, class Out>
void launch_pixel_gradient(const LookupParams& p, cudaStream_t stream) {
  using A = device_acc_t<Out>;
  constexpr LookupGradients kPixels = LookupGradients::pixels;
  const Parts parts = parts_for(p.layout, int64_t(kLookupBlocks) * device_multiprocessors(), 4096);
  const BinPlan none{0, 0, 0, 1, 0, 1};
  Grid grid{dim3(unsigned(p.layout.groups * parts.per_group)), dim3(kRunThreads)};
  if (table_is_shared(p, parts, sizeof(A))) {
    grid.shared_bytes = size_t(p.layout.width * p.levels) * sizeof(A);
    launch(lookup_backward_kernel<kLinear, true, kPixels, In, Out>, grid, stream, p, parts, none, nullptr);
  } else {
    launch(lookup_backward_kernel<kLinear, false, kPixels, In, Out>, grid, stream, p, parts, none, nullptr);
  }
}

// How the pass that keeps bins is cut.
template <bool kLinear, class In, class Out>
struct CurvePass {
  using A = device_acc_t<Out>;
  bool both;  // the pixels' gradient too
  BinPlan plan;
  Parts parts;

  explicit CurvePass(const LookupParams& p) {
    const int64_t entries = p.layout.width * p.levels, table = entries * int64_t(sizeof(A));
    both = !kIsCode<In> && p.grad_input != nullptr && table <= kTableBytes;
    plan = plan_bins(entries, kLinear ? 2 : 1, sizeof(A), both ? table : 0);
    if (both && plan.windows > 1) {
      both = false;
      plan = plan_bins(entries, kLinear ? 2 : 1, sizeof(A), 0);
    }
    // A part must be long beside its bins, which are cleared, written and added up.
    const int fit = both && plan.blocks_per_multiprocessor > kBinBlocks ? kBinBlocks : plan.blocks_per_multiprocessor;
    const int64_t blocks = int64_t(fit) * device_multiprocessors();
    const int64_t least = 8 * entries;
    parts = parts_for(p.layout, ceil_div<int64_t>(blocks, plan.windows), least > 4096 ? least : 4096);
  }

  int64_t rows(const LookupParams& p) const { return p.layout.groups * parts.per_group; }
  int64_t totals(const LookupParams& p) const { return p.layout.groups * plan.row(); }
};

template <bool kLinear, class In, class Out>
void launch_lookup_backward(const LookupParams& p, void* workspace, cudaStream_t stream) {
  using A = device_acc_t<Out>;
  if (p.grad_curve == nullptr) {
    if constexpr (!kIsCode<In>) launch_pixel_gradient<kLinear, In, Out>(p, stream);
    return;
  }
  const CurvePass<kLinear, In, Out> pass(p);
  double* rows = static_cast<double*>(workspace);
  double* totals = rows + pass.rows(p) * pass.plan.row();
  Grid grid{dim3(unsigned(pass.rows(p) * pass.plan.windows)), dim3(kRunThreads), pass.plan.shared_bytes};
  if constexpr (!kIsCode<In>) {
    if (pass.both) {
      grid.shared_bytes += size_t(pass.plan.entries) * sizeof(A);
      launch(lookup_backward_kernel<kLinear, true, LookupGradients::both, In, Out>, grid, stream, p, pass.parts,
             pass.plan, rows);
    } else if (p.grad_input != nullptr) {
      launch_pixel_gradient<kLinear, In, Out>(p, stream);
    }
  }
  if (!pass.both) {
    launch(lookup_backward_kernel<kLinear, false, LookupGradients::curve, In, Out>, grid, stream, p, pass.parts,
           pass.plan, rows);
  }
  const int64_t per_group = pass.parts.per_group;
  const BinRows of{unsigned(per_group), unsigned(per_group), 0, 1, per_group, 0, 0};
  add_rows(rows, pass.plan.row(), of, p.layout.groups, pass.plan.row(), totals, stream);
  const int64_t entries = p.layout.groups * pass.plan.entries;
  launch(lookup_curve_gradient_kernel<kLinear, A>, grid_over(entries), stream, p, totals, entries);
}

// In = Out for floating pixels; In = uint8_t or uint16_t with levels = 256 or 65536 for codes.
template <class In, class Out>
void crf_lookup_cuda(const LookupParams& p, cudaStream_t stream) {
  if constexpr (!kIsCode<In>) {
    if (p.linear) return launch_lookup_forward<true, In, Out>(p, stream);
  }
  launch_lookup_forward<false, In, Out>(p, stream);
}

// Computes the gradients that p has room for.
template <class In, class Out>
void crf_lookup_backward_cuda(const LookupParams& p, void* workspace, cudaStream_t stream) {
  if constexpr (!kIsCode<In>) {
    if (p.linear) return launch_lookup_backward<true, In, Out>(p, workspace, stream);
  }
  launch_lookup_backward<false, In, Out>(p, workspace, stream);
}

template <bool kLinear, class In, class Out>
size_t curve_pass_bytes(const LookupParams& p) {
  const CurvePass<kLinear, In, Out> pass(p);
  return size_t(pass.rows(p) * pass.plan.row() + pass.totals(p)) * sizeof(double);
}

template <class In, class Out>
size_t crf_lookup_backward_workspace_bytes(const LookupParams& p) {
  if (p.grad_curve == nullptr) return 0;
  if constexpr (!kIsCode<In>) {
    if (p.linear) return curve_pass_bytes<true, In, Out>(p);
  }
  return curve_pass_bytes<false, In, Out>(p);
}

}  // namespace hdrops

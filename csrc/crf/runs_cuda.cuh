// How a block of threads walks its part of an image's pixels (lookup_layout.h): run by run, and in a run 16 bytes of
// the widest tensor per thread and access, between a head and a tail of single pixels. Several vectors are loaded
// before the first is used, so that a multiprocessor has some 32 KB on their way from memory.
//
// What is done with the pixels is an Op, one object per thread. Its base RunTensors reads and writes; it adds
//   void finish<V>(i, item, valid)   works on pixels i .. i + V - 1 of the run. Where not valid, there are no such
//   pixels
//                               and item is all zero: the threads of a block go through the same calls, so that an Op
//                               may use warp collectives
//   void pause()                if wanted: after some calls of finish, all threads of the block together
#pragma once
#include "common/device.cuh"
#include "crf/lookup_layout.h"

namespace hdrops {

constexpr int kRunThreads = 256;
constexpr int64_t kLongestRun = int64_t(1) << 30;  // pixels of a part: numbered by int

// Elements per access of tensors of these types.
template <class T, class U = T>
constexpr int kRunVector = 16 / int(sizeof(T) > sizeof(U) ? sizeof(T) : sizeof(U));

// Vectors of one tensor to load before the first is used.
template <class T, class U = T>
constexpr int kRunInFlight = kRunVector<T, U> > 4 ? 2 : 4;

template <class T, int V>
__device__ __forceinline__ bool is_aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(Vector<T, V>) == 0;
}

// V elements, in one access if `aligned`.
template <int V, class T>
__device__ __forceinline__ Vector<T, V> load_elements(const T* from, bool aligned) {
  constexpr int kBytes = int(sizeof(Vector<T, V>));
  if constexpr (V > 1 && (kBytes == 4 || kBytes == 8 || kBytes == 16)) {
    if (aligned) return load_global(reinterpret_cast<const Vector<T, V>*>(from));
  }
  Vector<T, V> loaded;
#pragma unroll
  for (int k = 0; k < V; ++k) loaded.value[k] = from[k];
  return loaded;
}

// The same for stores.
template <int V, class T>
__device__ __forceinline__ void store_elements(T* to, const Vector<T, V>& vector, bool aligned) {
  if (aligned || V == 1) {
    *reinterpret_cast<Vector<T, V>*>(to) = vector;
    return;
  }
#pragma unroll
  for (int k = 0; k < V; ++k) to[k] = vector.value[k];
}

// The first `count` of V elements, wherever they lie.
template <class T, int V>
__device__ __forceinline__ void store_some(T* to, const Vector<T, V>& vector, int count) {
  if (count == V && is_aligned<T, V>(to)) return store_elements<V>(to, vector, true);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (k < count) to[k] = vector.value[k];
  }
}

// How many elements of a run come before the first that is a whole number of cache lines into the tensor: by its place,
// not its address, so that what threads add up together does not depend on where the memory lies. A tensor that torch
// allocates begins at a line; one that does not is read and written element by element.
template <class T>
__device__ __forceinline__ int until_line(const Run& run) {
  constexpr int kLine = 128 / int(sizeof(T));
  const int before = int(-run.offset & (kLine - 1));
  return before < run.count ? before : int(run.count);
}

// The tensors that an Op takes a run of: pixels of type In and, if kGradient, the output's gradient to read, and, if
// kResult, one to write, both of type Out and all of the same layout.
template <class In, class Out, bool kGradient, bool kResult>
class RunTensors {
 public:
  // What is loaded of V pixels.
  template <int V>
  struct Item {
    Vector<In, V> pixels;
    Vector<Out, V> grad;  // kGradient
  };

  __device__ __forceinline__ RunTensors(const void* input, const void* grad_output, void* result)
      : input_(static_cast<const In*>(input)),
        grad_output_(static_cast<const Out*>(grad_output)),
        result_(static_cast<Out*>(result)) {}

  // A run begins; the pixels before the first whole vector.
  __device__ __forceinline__ int start(const Run& run) {
    constexpr int V = kRunVector<In, Out>;
    const int head = until_line<Out>(run);
    channel_ = int(run.channel);
    pixels_ = input_ + run.offset;
    pixels_aligned_ = is_aligned<In, V>(pixels_ + head);
    if constexpr (kGradient) {
      grad_ = grad_output_ + run.offset;
      grad_aligned_ = is_aligned<Out, V>(grad_ + head);
    }
    if constexpr (kResult) {
      to_ = result_ + run.offset;
      to_aligned_ = is_aligned<Out, V>(to_ + head);
    }
    return head;
  }

  template <int V>
  __device__ __forceinline__ Item<V> load(int i) const {
    Item<V> item{};
    item.pixels = load_elements<V>(pixels_ + i, pixels_aligned_);
    if constexpr (kGradient) item.grad = load_elements<V>(grad_ + i, grad_aligned_);
    return item;
  }

  __device__ __forceinline__ void pause() const {}

 protected:
  template <int V>
  __device__ __forceinline__ void store(int i, const Vector<Out, V>& result) const {
    store_elements<V>(to_ + i, result, to_aligned_);
  }

  // Where the table of the run's pixel i begins among its group's, of `entries` each.
  __device__ __forceinline__ int table_begin(const CurveLayout& layout, int64_t entries, int i) const {
    if (layout.width == 1) return 0;
    return int((unsigned(channel_) + unsigned(i)) % unsigned(layout.width)) * int(entries);
  }

  // And that of the next pixel.
  __device__ __forceinline__ static int next_table(const CurveLayout& layout, int64_t entries, int begin) {
    const int next = begin + int(entries);
    return next < int(layout.width * entries) ? next : 0;
  }

 private:
  const In* input_;
  const Out* grad_output_;
  Out* result_;
  // In the run:
  const In* pixels_ = nullptr;
  const Out* grad_ = nullptr;
  Out* to_ = nullptr;
  int channel_ = 0;  // of its first pixel
  bool pixels_aligned_ = false, grad_aligned_ = false, to_aligned_ = false;
};

// Pixels [begin, end) of a run, V at a time, kInFlight vectors before the first is used. V divides their number.
template <int V, int kInFlight, class Op>
__device__ __forceinline__ void walk(Op& op, int begin, int end) {
  using Item = typename Op::template Item<V>;
  const int step = int(blockDim.x) * V;
  for (int64_t first = begin; first < end; first += kInFlight * step) {
    Item item[kInFlight];
    const int at = int(first) + int(threadIdx.x) * V;
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      item[k] = Item{};
      if (at + k * step < end) item[k] = op.template load<V>(at + k * step);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) op.template finish<V>(at + k * step, item[k], at + k * step < end);
    op.pause();
  }
}

// The block's part of its group.
template <int V, int kInFlight, class Op>
__device__ __forceinline__ void walk_part(Op& op, const CurveLayout& layout, const Parts& parts, int64_t group,
                                          int64_t part) {
  const int64_t end = parts.begin(part + 1);
  for (int64_t pixel = parts.begin(part); pixel < end;) {
    const Run run = run_at(layout, group, pixel, end);
    const int count = int(run.count), head = op.start(run), body = head + (count - head) / V * V;
    if (head > 0) walk<1, 1>(op, 0, head);
    walk<V, kInFlight>(op, head, body);
    if (body < count) walk<1, 1>(op, body, count);
    pixel += run.count;
  }
}

// A grid for a loop over `count` elements in steps of the grid.
inline Grid grid_over(int64_t count) {
  const int64_t blocks = ceil_div<int64_t>(count, kRunThreads), most = 32 * int64_t(device_multiprocessors());
  return {dim3(unsigned(blocks < most ? blocks : most)), dim3(kRunThreads)};
}

// Parts for a grid of one wave of `blocks` blocks, each of at least `least` pixels.
inline Parts parts_for(const CurveLayout& layout, int64_t blocks, int64_t least) {
  Parts parts = cut(layout, least, blocks);
  const int64_t fewest = ceil_div(layout.length(), kLongestRun);
  if (parts.per_group < fewest) parts.per_group = fewest;
  return parts;
}

}  // namespace hdrops

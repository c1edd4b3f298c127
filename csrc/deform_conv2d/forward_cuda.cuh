// Deformable convolution on the GPU: samples are gathered into shared memory and multiplied there; no columns in
// memory.
//
// A block of 256 threads owns a patch of 128 output pixels of one image (16 x 8 where the output is large enough) and
// up to 128 outputs of one weight group. Its depth, channels times taps, comes in chunks of 64 bytes of channels of one
// tap. While the product of a chunk (product_cuda.cuh) runs, the next one is on its way:
//
//   offsets and masks of the chunk after the next    to registers, then as a sampling plan to shared memory
//   corners of the next chunk                        to registers, then interpolated to shared memory
//   weights of the next chunk                        to shared memory by asynchronous copies
//
// with one barrier a chunk, since every buffer is double. A thread gathers 16-byte vectors of channels: two a chunk,
// 8 loads in flight. A plan serves all chunks of its channels.
//
// Shared memory: 16 KB of columns, 128 bytes of weights for every output (4 to 16 KB), plans of 6 KB (10 for double)
// for each run of channels that a chunk meets: 30 KB with 64 outputs and one offset group, 48 KB with a run a vector.
// The launch bound of 128 registers lets two blocks share a multiprocessor.
//
// Memory: images must be channels last in whole vectors. One that is not (NCHW, or runs that are no whole vectors) is
// copied first, run by run, so that the samples of an offset group with few channels lie together. Weights are repacked
// into the panels of the product. The columns are rounded to the data's type, as matrix units want it: in float16 a
// product of mask and input must stay below 65504. Groups of few channels or outputs waste most of a chunk or product.
#pragma once
#include "common/pack_runs_cuda.cuh"
#include "deform_conv2d/product_cuda.cuh"
#include "deform_conv2d/sample_plan_cuda.cuh"

namespace hdrops::deform_conv2d {

template <class T>
struct Forward {
  SampleSource<T> samples;
  ImageStrides strides;
  const T* image;
  const unsigned char* weight;  // panels [group][tap][chunk][padded_outputs]
  const T* bias;
  T* output;
  bool channels_last;  // of the output
  int64_t out_channels, group_outputs, padded_outputs;
  int groups, group_runs, runs_per_offset_group;
  int run_vectors, group_vectors;  // 16-byte vectors of a run and of a weight group
  int taps, chunks;                // chunks of a tap
  int plan_runs;                   // runs that a chunk may meet
  int log2_neighbours;             // vectors of a run that neighbouring threads gather, before the next pixel's
  int log2_patch_width, patches_across, patches, output_tiles;
};

// Sizes of the kernel for data of type T and kOutputs outputs. With 128 outputs a block of 256 threads would need more
// registers than two of them on a multiprocessor may have; one of 512 keeps as many threads there.
template <class T, class Arithmetic, int kOutputs>
struct ForwardShape {
  static constexpr int kThreads = kOutputs > 64 ? 512 : 256;
  static constexpr int kBlocks = sizeof(T) == 8 ? 1 : 512 / kThreads;  // on a multiprocessor
  static constexpr int kVector = kVector16<T>;
  static constexpr int kVectors = kPanelDepth<Arithmetic> / kVector;  // of a chunk
  static constexpr int kItems = kPatchPixels * kVectors / kThreads;   // that a thread gathers, and plans at most
  static constexpr int kPlanStep = kThreads / kPatchPixels;           // runs that all threads plan at once
  static constexpr int kColumnBytes = kPatchPixels * kPanelBytes, kWeightBytes = kOutputs * kPanelBytes;
  static_assert(kItems * kThreads == kPatchPixels * kVectors);
};

// A chunk of the depth, the runs of the weight group that it meets, and the buffer that has their plan.
struct DepthChunk {
  int tap, index;
  int first_run, runs;
  int plan;

  template <class T>
  __device__ __forceinline__ static DepthChunk at(const Forward<T>& f, int tap, int index, int vectors) {
    int first = index * vectors, last = min(first + vectors, f.group_vectors) - 1;
    int run = first / f.run_vectors;
    return {tap, index, run, last / f.run_vectors - run + 1, 0};
  }
  template <class T>
  __device__ __forceinline__ DepthChunk next(const Forward<T>& f, int vectors) const {
    bool same_tap = index + 1 < f.chunks;
    DepthChunk chunk = at(f, same_tap ? tap : tap + 1, same_tap ? index + 1 : 0, vectors);
    bool same_plan = same_tap && chunk.first_run == first_run && chunk.runs == runs;
    chunk.plan = same_plan ? plan : 1 - plan;
    return chunk;
  }
};

// What a block owns.
struct ForwardTile {
  PixelPatch patch;
  int group;
  int first_output;  // of the group

  template <class T>
  __device__ __forceinline__ static ForwardTile of(const Forward<T>& f, int block, int outputs) {
    int output_tile = block % f.output_tiles, rest = block / f.output_tiles;
    int group = rest % f.groups;
    rest /= f.groups;
    int patch = rest % f.patches, image = rest / f.patches;
    int row = (patch / f.patches_across) << (7 - f.log2_patch_width);
    int column = (patch % f.patches_across) << f.log2_patch_width;
    return {{image, row, column, f.log2_patch_width}, group, output_tile * outputs};
  }
};

// A vector of channels at a pixel, among those that a thread gathers in a chunk: its place in the patch, in the chunk,
// and in the image.
template <class T, class Shape>
struct GatherItem {
  int pixel, vector;
  bool exists;
  int run;        // among the chunk's
  const T* from;  // in the image's first pixel

  __device__ __forceinline__ static GatherItem of(const Forward<T>& f, const T* group_image, const DepthChunk& chunk,
                                                  int item) {
    int index = int(threadIdx.x) + item * Shape::kThreads;
    GatherItem it;
    it.pixel = (index >> f.log2_neighbours) % kPatchPixels;
    it.vector =
        (index >> f.log2_neighbours) / kPatchPixels << f.log2_neighbours | (index & ((1 << f.log2_neighbours) - 1));
    it.exists = chunk.index * Shape::kVectors + it.vector < f.group_vectors;
    int in_run = chunk.index * Shape::kVectors - chunk.first_run * f.run_vectors + it.vector;
    it.run = 0;
#pragma unroll
    for (int i = 1; i < Shape::kVectors; ++i) {
      if (in_run >= f.run_vectors) in_run -= f.run_vectors, ++it.run;
    }
    it.from = group_image + (chunk.first_run + it.run) * f.strides.run + in_run * Shape::kVector;
    return it;
  }
};

template <class T, class Arithmetic, int kOutputs>
__global__ void __launch_bounds__(ForwardShape<T, Arithmetic, kOutputs>::kThreads,
                                  ForwardShape<T, Arithmetic, kOutputs>::kBlocks) forward_kernel(Forward<T> f) {
  using Real = device_acc_t<T>;
  using Shape = ForwardShape<T, Arithmetic, kOutputs>;
  constexpr int kVector = Shape::kVector, kItems = Shape::kItems, kVectors = Shape::kVectors;
  unsigned char* columns = shared_memory<unsigned char>();
  unsigned char* weights = columns + 2 * Shape::kColumnBytes;
  unsigned char* plans = weights + 2 * Shape::kWeightBytes;
  auto plan_of = [&](const DepthChunk& chunk) {
    return SamplePlan<Real>::in(plans + chunk.plan * SamplePlan<Real>::bytes(f.plan_runs), f.plan_runs);
  };

  const ForwardTile tile = ForwardTile::of(f, int(blockIdx.x), kOutputs);
  const T* group_image =
      f.image + tile.patch.image * f.strides.image + int64_t(tile.group) * f.group_runs * f.strides.run;
  const int site_pixel = int(threadIdx.x) % kPatchPixels;
  const auto pixel = SitePixel<T>::of(f.samples, tile.patch, site_pixel);

  auto load_sites = [&](const DepthChunk& chunk, Site<Real>(&sites)[kItems]) {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      int run = int(threadIdx.x) / kPatchPixels + Shape::kPlanStep * item;
      if (run >= chunk.runs) continue;
      int offset_group = (tile.group * f.group_runs + chunk.first_run + run) / f.runs_per_offset_group;
      sites[item] = pixel.load(f.samples, tile.patch.image, offset_group, chunk.tap);
    }
  };
  auto write_plan = [&](const DepthChunk& chunk, const Site<Real>(&sites)[kItems]) {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      int run = int(threadIdx.x) / kPatchPixels + Shape::kPlanStep * item;
      if (run >= chunk.runs) continue;
      pixel.write(f.samples, f.strides, chunk.tap, sites[item], plan_of(chunk), run * kPatchPixels + site_pixel);
    }
  };
  auto load_corners = [&](const DepthChunk& chunk, Corners<T>(&corners)[kItems]) {
    SamplePlan<Real> plan = plan_of(chunk);
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      auto it = GatherItem<T, Shape>::of(f, group_image, chunk, item);
      int64_t place = it.exists ? plan.places[it.run * kPatchPixels + it.pixel] : -1;
      corners[item] = Corners<T>::load(it.from, f.strides, place);
    }
  };
  auto write_columns = [&](const DepthChunk& chunk, const Corners<T>(&corners)[kItems], unsigned char* target) {
    SamplePlan<Real> plan = plan_of(chunk);
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      auto it = GatherItem<T, Shape>::of(f, group_image, chunk, item);
      Real values[kVector];
      corners[item].interpolate(it.exists ? plan.weights[it.run * kPatchPixels + it.pixel] : Vector<Real, 4>{}, values);
      store_elements<Arithmetic>(target, it.pixel, it.vector * kVector, values);
    }
  };
  // Chunks follow each other in memory.
  const unsigned char* next_weights =
      f.weight + (int64_t(tile.group) * f.taps * f.chunks * f.padded_outputs + tile.first_output) * kPanelBytes;
  auto copy_weights = [&](unsigned char* target) {
    for (int piece = threadIdx.x; piece < kOutputs * 4; piece += Shape::kThreads) {
      cp_async_16(target + panel_position(piece / 4, piece % 4), next_weights + piece * 16);
    }
    cp_async_commit();
    next_weights += f.padded_outputs * kPanelBytes;
  };

  TileProduct<Arithmetic, kPatchPixels, kOutputs, Shape::kThreads / 32> product;
  product.clear();
  // Before the product of chunk `step` come its samples and weights, a step earlier, and its plan, one more earlier.
  const int steps = f.taps * f.chunks;
  DepthChunk next{}, planned{};
  for (int step = -2; step < steps; ++step) {
    const bool gathers = step >= -1 && step + 1 < steps;
    next = planned;
    bool plans_anew = step == -2;
    if (step == -2) {
      planned = DepthChunk::at(f, 0, 0, kVectors);
    } else if (step + 2 < steps) {
      planned = next.next(f, kVectors);
      plans_anew = planned.plan != next.plan;
    }
    const int buffer = step & 1, other = 1 - buffer;

    Site<Real> sites[kItems];
    Corners<T> corners[kItems];
    if (plans_anew) load_sites(planned, sites);
    if (gathers) {
      load_corners(next, corners);
      copy_weights(weights + other * Shape::kWeightBytes);
    }
    if (step >= 0) product.multiply(columns + buffer * Shape::kColumnBytes, weights + buffer * Shape::kWeightBytes);
    if (gathers) write_columns(next, corners, columns + other * Shape::kColumnBytes);
    if (plans_anew) write_plan(planned, sites);
    cp_async_wait<0>();
    __syncthreads();
  }

  const int outputs = int(f.group_outputs) - tile.first_output;
  product.for_each([&](int in_patch, int output, Real sum) {
    int row = tile.patch.row(in_patch), column = tile.patch.column(in_patch);
    if (output >= outputs || row >= f.samples.out_height || column >= f.samples.out_width) return;
    int64_t channel = tile.group * f.group_outputs + tile.first_output + output;
    int64_t at = int64_t(row) * f.samples.out_width + column;
    if (f.bias != nullptr) sum += load_as(f.bias[channel]);
    int64_t position = f.channels_last ? (tile.patch.image * f.samples.out_pixels + at) * f.out_channels + channel
                                       : (tile.patch.image * f.out_channels + channel) * f.samples.out_pixels + at;
    f.output[position] = store_as<T>(sum);
  });
}

// The weight [O, C / groups, K] in the panels that the product reads, zeros where channels or outputs are padding.
template <class T>
struct WeightPacking {
  const T* weight;
  unsigned char* panels;
  int64_t groups, group_outputs, padded_outputs, group_channels, run, padded_run;
  int64_t taps, chunks;
};

constexpr int kPackThreads = 256;

// A thread writes one 16-byte piece.
template <class T, class Arithmetic>
__global__ void __launch_bounds__(kPackThreads) pack_weight_kernel(WeightPacking<T> p) {
  using Element = typename Arithmetic::Element;
  constexpr int kPiece = kVector16<Element>;
  int64_t piece = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  int64_t row = piece / 4, output = row % p.padded_outputs, chunk = row / p.padded_outputs % p.chunks;
  int64_t tap = row / p.padded_outputs / p.chunks % p.taps, group = row / p.padded_outputs / p.chunks / p.taps;
  if (group >= p.groups) return;
  Vector<Element, kPiece> packed;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    int64_t position = chunk * kPanelDepth<Arithmetic> + piece % 4 * kPiece + i;
    int64_t in_run = position % p.padded_run, channel = position / p.padded_run * p.run + in_run;
    typename Arithmetic::Sum value = 0;
    if (output < p.group_outputs && in_run < p.run && channel < p.group_channels) {
      value = load_as(p.weight[((group * p.group_outputs + output) * p.group_channels + channel) * p.taps + tap]);
    }
    packed.value[i] = Arithmetic::element(value);
  }
  reinterpret_cast<Vector<Element, kPiece>*>(p.panels)[piece] = packed;
}

// How many outputs a block computes: the fewest that hold a group's, as far as there are kernels.
template <class Arithmetic>
int forward_outputs(const Params& p) {
  int64_t group_outputs = p.out_channels / p.groups;
  if (sizeof(typename Arithmetic::Sum) == 8 || group_outputs <= 32) return 32;
  return group_outputs <= 64 || !Arithmetic::kMatrixUnits ? 64 : 128;
}

// The arithmetic of this call on the current device: use.operator()<Arithmetic>().
template <class T, class Use>
void with_forward_arithmetic(const Params& p, Use&& use) {
  bool matrix_units = device_compute_capability() >= 80;
  if constexpr (sizeof(T) == 2) {
    if (matrix_units) return use.template operator()<MatrixUnits<T>>();
  }
  if constexpr (std::is_same_v<T, float>) {
    if (matrix_units && p.allow_tf32) return use.template operator()<Tf32>();
  }
  use.template operator()<Fma<device_acc_t<T>>>();
}

// How the forward pass divides its workspace: a copy of the image if it needs one, then the packed weight.
template <class T, class Arithmetic>
struct ForwardWorkspace {
  bool copies_image;
  int64_t image_bytes, weight_bytes;

  static ForwardWorkspace of(const Params& p) {
    Runs runs = input_runs<T>(p);
    bool aligned = reinterpret_cast<uintptr_t>(p.input) % 16 == 0;
    bool copies = !p.channels_last || runs.has_padding() || !aligned;
    int64_t image = p.batch * p.height * p.width * runs.total * int64_t(sizeof(T));
    int64_t chunks = ceil_div<int64_t>(runs.total / p.groups, kPanelDepth<Arithmetic>);
    int64_t outputs = round_up<int64_t>(p.out_channels / p.groups, forward_outputs<Arithmetic>(p));
    return {copies, copies ? round_up<int64_t>(image, 128) : 0, p.groups * p.taps() * chunks * outputs * kPanelBytes};
  }
};

// Depends on the current device, and on whether `input` is aligned.
template <class T>
size_t forward_workspace_bytes(const Params& params) {
  size_t bytes = 0;
  with_forward_arithmetic<T>(params, [&]<class Arithmetic>() {
    auto workspace = ForwardWorkspace<T, Arithmetic>::of(params);
    bytes = size_t(workspace.image_bytes + workspace.weight_bytes);
  });
  return bytes;
}

template <class T>
void copy_image(const Params& p, const Runs& runs, T* target, cudaStream_t stream) {
  const RunPacking packing{p.batch, p.height * p.width, runs.count(), runs.run, runs.padded, p.channels_last};
  pack_runs(packing, p.input, target, stream);
}

// Rows and columns of a patch: 8 x 16, or as much of either as the output has and more of the other.
inline int log2_patch_width(const Params& p) {
  int log2_width = 4;
  while (log2_width > 0 && (int64_t(1) << (log2_width - 1)) >= p.out_width) --log2_width;
  while (log2_width < 7 && (int64_t(1) << (6 - log2_width)) >= p.out_height) ++log2_width;
  return log2_width;
}

template <class T, class Arithmetic, int kOutputs>
void launch_forward(Forward<T> f, int64_t batch, cudaStream_t stream) {
  using Shape = ForwardShape<T, Arithmetic, kOutputs>;
  f.chunks = ceil_div(f.group_vectors, Shape::kVectors);
  bool apart = f.run_vectors % Shape::kVectors == 0;
  f.plan_runs = apart ? 1 : min(Shape::kVectors, (Shape::kVectors - 2) / f.run_vectors + 2);
  f.log2_neighbours = 0;
  while (2 << f.log2_neighbours <= min(f.run_vectors, Shape::kVectors)) ++f.log2_neighbours;
  size_t shared = 2 * (Shape::kColumnBytes + Shape::kWeightBytes);
  shared += 2 * SamplePlan<device_acc_t<T>>::bytes(f.plan_runs);
  int64_t blocks = batch * f.patches * f.groups * f.output_tiles;
  launch(forward_kernel<T, Arithmetic, kOutputs>, Grid{dim3(unsigned(blocks)), dim3(Shape::kThreads), shared}, stream,
         f);
}

template <class T, class Arithmetic>
void forward_with(const Params& p, void* workspace, cudaStream_t stream) {
  auto division = ForwardWorkspace<T, Arithmetic>::of(p);
  const Runs runs = input_runs<T>(p);
  const int outputs = forward_outputs<Arithmetic>(p);
  T* copy = static_cast<T*>(workspace);
  unsigned char* panels = static_cast<unsigned char*>(workspace) + division.image_bytes;

  Forward<T> f{};
  f.samples = SampleSource<T>::of(p);
  const int64_t pixels = p.height * p.width;
  if (division.copies_image) {
    copy_image(p, runs, copy, stream);
    f.image = copy;
    f.strides = {pixels * runs.total, pixels * runs.padded, p.width * runs.padded, runs.padded};
  } else {
    f.image = static_cast<const T*>(p.input);
    f.strides = {pixels * p.in_channels, runs.run, p.width * p.in_channels, p.in_channels};
  }
  f.weight = panels;
  f.bias = static_cast<const T*>(p.bias);
  f.output = static_cast<T*>(p.output);
  f.channels_last = p.channels_last;
  f.out_channels = p.out_channels;
  f.group_outputs = p.out_channels / p.groups;
  f.padded_outputs = round_up<int64_t>(f.group_outputs, outputs);
  f.groups = int(p.groups);
  f.group_runs = int(runs.count() / p.groups);
  f.runs_per_offset_group = int(runs.count() / p.offset_groups);
  f.run_vectors = int(runs.padded / kVector16<T>);
  f.group_vectors = f.group_runs * f.run_vectors;
  f.taps = int(p.taps());
  f.log2_patch_width = log2_patch_width(p);
  f.patches_across = int(ceil_div<int64_t>(p.out_width, int64_t(1) << f.log2_patch_width));
  f.patches = f.patches_across * int(ceil_div<int64_t>(p.out_height, kPatchPixels >> f.log2_patch_width));
  f.output_tiles = int(f.padded_outputs / outputs);

  int64_t chunks = ceil_div<int64_t>(f.group_vectors * kVector16<T>, kPanelDepth<Arithmetic>);
  WeightPacking<T> packing{static_cast<const T*>(p.weight), panels,   p.groups,    f.group_outputs, f.padded_outputs,
                           p.in_channels / p.groups,        runs.run, runs.padded, p.taps(),        chunks};
  Grid pack_grid{dim3(unsigned(ceil_div<int64_t>(division.weight_bytes / 16, kPackThreads))), dim3(kPackThreads)};
  launch(pack_weight_kernel<T, Arithmetic>, pack_grid, stream, packing);

  if (outputs == 32) launch_forward<T, Arithmetic, 32>(f, p.batch, stream);
  if constexpr (sizeof(typename Arithmetic::Sum) == 4) {
    if (outputs == 64) launch_forward<T, Arithmetic, 64>(f, p.batch, stream);
  }
  if constexpr (Arithmetic::kMatrixUnits) {
    if (outputs == 128) launch_forward<T, Arithmetic, 128>(f, p.batch, stream);
  }
}

// `workspace`: forward_workspace_bytes of the same parameters, 128-byte aligned.
template <class T>
void forward_cuda(const Params& params, void* workspace, cudaStream_t stream) {
  with_forward_arithmetic<T>(params,
                             [&]<class Arithmetic>() { forward_with<T, Arithmetic>(params, workspace, stream); });
}

}  // namespace hdrops::deform_conv2d

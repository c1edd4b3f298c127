// Backward pass of deformable convolution on the GPU: five gradients, each only if asked for.
//
//   1. input, grad_output and weight are brought into the kernels' layout (backward_layout_cuda.cuh), unless they have
//      it: channels last, whole vectors in each group, aligned to 16 bytes.
//   2. The gradients of input, offset and mask: backward_input_cuda.cuh. The input's is added up in a float (double)
//      for each element, in grad_input itself if that is float or double and in the kernels' layout; in deterministic
//      mode in 64-bit integers (gradient_sum_cuda.cuh). A last kernel brings the sums into grad_input's type and
//      layout.
//   3. The gradients of weight and bias: backward_weight_cuda.cuh, always repeatable, as are those of offset and mask.
//
// Workspace, for N images of channels C and outputs O (both in whole vectors): copies of input and grad_output where
// the layout asks for them, N * (H * W * C + P * O) * sizeof(T); sums N * H * W * C of 4 bytes (8 for double; 8.5 and
// 16.5 in deterministic mode); a copy of the weight; and the partial sums of backward_weight_cuda.cuh. The columns,
// which are never in memory, would be N * P * C * K: with a 3 x 3 kernel it is a third of them at most, in floats and
// without a layout to change it is next to nothing.
#pragma once
#include "common/pieces.h"
#include "deform_conv2d/backward_input_cuda.cuh"
#include "deform_conv2d/backward_layout_cuda.cuh"
#include "deform_conv2d/backward_weight_cuda.cuh"

namespace hdrops::deform_conv2d {

template <class T>
struct Backward {
  using Real = device_acc_t<T>;

  const Params& p;
  Runs channels, outputs;
  WeightSide<T> weight_side;
  bool offset_side_wanted, input_side_wanted;
  bool pack_input, pack_grad_output, sum_in_place;

  T *packed_input, *packed_grad_output, *packed_weight;
  Real* float_sums;
  FixedSum<Real> fixed_sum;
  Exponents* exponents;
  Real *weight_sums, *bias_sums;
  int64_t workspace_bytes;

  Backward(const Params& params, void* workspace) : p(params) {
    channels = input_runs<T>(p), outputs = output_runs<T>(p);
    offset_side_wanted = p.grad_offset != nullptr || p.grad_mask != nullptr;
    input_side_wanted = p.grad_input != nullptr || offset_side_wanted;
    weight_side = describe_weight_side();
    pack_input = !has_layout(p.input, channels) && (offset_side_wanted || p.grad_weight != nullptr);
    pack_grad_output = !has_layout(p.grad_output, outputs);
    sum_in_place = sizeof(T) == sizeof(Real) && !p.deterministic && has_layout(p.grad_input, channels);
    divide(workspace);
  }

  // Whether a tensor needs no packing.
  bool has_layout(const void* tensor, const Runs& runs) const {
    return p.channels_last && !runs.has_padding() && reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  }
  int64_t group_channels() const { return channels.total / p.groups; }
  int64_t group_outputs() const { return outputs.total / p.groups; }
  int64_t sums() const { return p.batch * p.height * p.width * channels.total; }
  int64_t packed_weights() const { return p.taps() * outputs.total * group_channels(); }

  void divide(void* workspace) {
    Pieces pieces{static_cast<char*>(workspace), 0};
    packed_input = pieces.take<T>(pack_input ? sums() : 0);
    packed_grad_output = pieces.take<T>(pack_grad_output ? p.batch * p.out_pixels() * outputs.total : 0);
    packed_weight = pieces.take<T>(input_side_wanted ? packed_weights() : 0);
    bool fixed = p.grad_input != nullptr && p.deterministic, floats = p.grad_input != nullptr && !p.deterministic;
    float_sums = pieces.take<Real>(floats && !sum_in_place ? sums() : 0);
    if (sum_in_place) float_sums = static_cast<Real*>(p.grad_input);
    // One after another, to be cleared together.
    int64_t* high = pieces.take<int64_t>(fixed ? sums() : 0);
    int64_t* low = pieces.take<int64_t>(fixed && fixed_sum.kTwoWords ? sums() : 0);
    unsigned* flags = pieces.take<unsigned>(fixed ? ceil_div<int64_t>(sums(), 8) : 0);
    exponents = pieces.take<Exponents>(fixed ? 1 : 0);
    fixed_sum = {high,
                 low,
                 flags,
                 exponents,
                 p.mask != nullptr ? 3 : 2,
                 ceil_log2(p.out_channels / p.groups),
                 ceil_log2(p.taps() * p.out_pixels()),
                 1,
                 1};
    weight_sums = pieces.take<Real>(p.grad_weight != nullptr ? weight_side.splits * weight_side.split_size() : 0);
    bias_sums = pieces.take<Real>(p.grad_bias != nullptr ? count_bias_splits(p) * outputs.total : 0);
    weight_side.sums = weight_sums;
    workspace_bytes = pieces.used;
  }

  const T* input() const { return pack_input ? packed_input : static_cast<const T*>(p.input); }
  const T* grad_output() const { return pack_grad_output ? packed_grad_output : static_cast<const T*>(p.grad_output); }

  // Offset groups that the chunks of channels meet, at most.
  int offset_groups_per_chunk() const {
    int64_t width = channels.total / p.offset_groups, most = 1;
    for (int64_t begin = 0; begin < channels.total; begin += group_channels()) {
      for (int64_t first = begin, end = begin + group_channels(); first < end; first += TileShape<T>::kColumns) {
        int64_t last = (first + TileShape<T>::kColumns < end ? first + TileShape<T>::kColumns : end) - 1;
        int64_t count = last / width - first / width + 1;
        if (count > most) most = count;
      }
    }
    return int(most);
  }

  WeightSide<T> describe_weight_side() const {
    using Shape = TileShape<T>;
    WeightSide<T> side{};
    side.samples = SampleSource<T>::of(p);
    side.batch = int(p.batch), side.image_pixels = p.height * p.width;
    side.channels = int(channels.total), side.outputs = int(outputs.total);
    side.group_channels = int(group_channels()), side.group_outputs = int(group_outputs());
    side.offset_group_channels = int(channels.total / p.offset_groups);
    side.groups = int(p.groups);
    side.chunks_per_group = int(ceil_div<int64_t>(side.group_channels, Shape::kColumns));
    side.output_tiles = int(ceil_div<int64_t>(side.group_outputs, Shape::kRows));
    side.offset_groups_per_chunk = offset_groups_per_chunk();
    side.steps_per_image = int(ceil_div<int64_t>(p.out_pixels(), Shape::kDepth));
    side.splits = count_splits(side);
    return side;
  }

  InputSide<T> describe_input_side() const {
    using Shape = TileShape<T>;
    InputSide<T> side{};
    side.samples = SampleSource<T>::of(p);
    side.image_pixels = p.height * p.width;
    side.channels = int(channels.total), side.outputs = int(outputs.total);
    side.group_channels = int(group_channels()), side.group_outputs = int(group_outputs());
    side.offset_group_channels = int(channels.total / p.offset_groups);
    side.chunks_per_group = int(ceil_div<int64_t>(side.group_channels, Shape::kColumns));
    side.chunks = side.chunks_per_group * int(p.groups);
    side.tiles_per_image = int(ceil_div<int64_t>(p.out_pixels(), Shape::kRows));
    side.offset_groups_per_chunk = offset_groups_per_chunk();
    side.input = input(), side.grad_output = grad_output(), side.weight = packed_weight;
    side.grad_offset = p.grad_offset, side.grad_mask = p.grad_mask;
    side.grad_input = p.grad_input != nullptr;
    side.float_sum = {float_sums};
    side.fixed_sum = fixed_sum;
    side.fixed = p.deterministic;
    return side;
  }

  ChannelPlanes planes(int64_t count, int64_t pixels, const Runs& runs) const {
    return {p.batch, count, pixels, p.channels_last, runs};
  }

  void pack(cudaStream_t stream) const {
    if (pack_input) {
      ChannelPlanes of_input = planes(p.in_channels, p.height * p.width, channels);
      launch(pack_channels<T>, move_grid<T>(of_input), stream, of_input, static_cast<const T*>(p.input), packed_input);
    }
    if (pack_grad_output) {
      ChannelPlanes of_output = planes(p.out_channels, p.out_pixels(), outputs);
      launch(pack_channels<T>, move_grid<T>(of_output), stream, of_output, static_cast<const T*>(p.grad_output),
             packed_grad_output);
    }
    if (input_side_wanted) {
      Grid grid{dim3(unsigned(ceil_div<int64_t>(packed_weights(), kMoveThreads))), dim3(kMoveThreads)};
      launch(pack_weight<T>, grid, stream, static_cast<const T*>(p.weight), p.groups, p.taps(),
             p.out_channels / p.groups, group_outputs(), p.in_channels / p.groups, group_channels(), channels,
             packed_weight);
    }
  }

  // Zeros the input gradient's sums, and finds the fixed point's scale.
  void prepare_sums(cudaStream_t stream) const {
    if (!p.deterministic) {
      launch_fill_zero(float_sums, sums() * int64_t(sizeof(Real)), stream);
      return;
    }
    char* begin = reinterpret_cast<char*>(fixed_sum.high);
    int64_t bytes = reinterpret_cast<char*>(exponents) - begin + Pieces::kAlignment;
    launch_fill_zero(begin, bytes, stream);
    launch_scan<T>(p.grad_output, p.batch * p.out_channels * p.out_pixels(), &exponents->factor[0], stream);
    launch_scan<T>(p.weight, p.out_channels * p.in_channels / p.groups * p.taps(), &exponents->factor[1], stream);
    if (p.mask == nullptr) return;
    int64_t masks = p.batch * p.offset_groups * p.taps() * p.out_pixels();
    if (p.mask_is_float) {
      launch_scan<float>(p.mask, masks, &exponents->factor[2], stream);
    } else {
      launch_scan<T>(p.mask, masks, &exponents->factor[2], stream);
    }
  }

  void finish_sums(cudaStream_t stream) const {
    if (sum_in_place) return;
    ChannelPlanes of_input = planes(p.in_channels, p.height * p.width, channels);
    T* target = static_cast<T*>(p.grad_input);
    if (p.deterministic) {
      launch(finish_input<T, FixedSum<Real>>, move_grid<T>(of_input), stream, of_input, fixed_sum, target);
    } else {
      launch(finish_input<T, FloatSum<Real>>, move_grid<T>(of_input), stream, of_input, FloatSum<Real>{float_sums},
             target);
    }
  }

  template <template <class, bool> class Product>
  void run_with(cudaStream_t stream) const {
    pack(stream);
    if (input_side_wanted && p.batch > 0) {
      if (p.grad_input != nullptr) prepare_sums(stream);
      launch_input_gradients<T, Product<T, false>>(describe_input_side(), p, stream);
      if (p.grad_input != nullptr) finish_sums(stream);
    }
    if (p.grad_weight != nullptr) {
      WeightSide<T> side = weight_side;
      side.input = input(), side.grad_output = grad_output();
      launch_weight_sums<T, Product<T, true>>(side, stream);
      launch_reduce_weight(side, p, channels, stream);
    }
    if (p.grad_bias != nullptr) launch_bias(p, outputs, grad_output(), bias_sums, stream);
  }
};

template <class T>
size_t backward_workspace_bytes(const Params& params) {
  return size_t(Backward<T>(params, nullptr).workspace_bytes);
}

template <class T>
void backward_cuda(const Params& params, void* workspace, cudaStream_t stream) {
  Backward<T> pass(params, workspace);
  const bool matrix_units = device_compute_capability() >= 80;
  if constexpr (sizeof(T) == 2) {
    if (matrix_units) return pass.template run_with<MmaProduct>(stream);
  }
  if constexpr (sizeof(T) == 4) {
    if (matrix_units && params.allow_tf32) return pass.template run_with<Tf32Product>(stream);
  }
  pass.template run_with<FmaProduct>(stream);
}

}  // namespace hdrops::deform_conv2d

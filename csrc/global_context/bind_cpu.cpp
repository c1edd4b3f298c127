// Binds the CPU kernels of global context: the checks memory safety rests on, allocation, layouts, dtype dispatch.
// A channels-last image is used as it is and gives that layout back; any other is made contiguous.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/layout.h"
#include "common/memory.h"
#include "global_context/params.h"

namespace hdrops::global_context {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

MemoryFormat format_of(const Tensor& tensor) {
  return is_channels_last(tensor) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

Tensor dense(const Tensor& tensor, MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::contiguous(tensor, format);
}

std::vector<int64_t> shape_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

Tensor allocate(const std::vector<int64_t>& shape, ScalarType dtype, MemoryFormat format = MemoryFormat::Contiguous) {
  Tensor tensor = torch::stable::empty(shape, dtype, std::nullopt, std::nullopt, std::nullopt, format);
  advise_huge_pages(tensor.mutable_data_ptr(), size_t(tensor.numel()) * tensor.element_size());
  return tensor;
}

// A gradient of the shape of what it belongs to, empty where it is not wanted.
Tensor gradient(bool wanted, const std::vector<int64_t>& shape, ScalarType dtype,
                MemoryFormat format = MemoryFormat::Contiguous) {
  return wanted ? allocate(shape, dtype, format) : allocate({0}, dtype);
}

void* pointer_if(bool wanted, const Tensor& tensor) { return wanted ? tensor.mutable_data_ptr() : nullptr; }

void check(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
           ScalarType dtype) {
  HDROPS_CHECK(shape_of(tensor) == shape && tensor.scalar_type() == dtype && tensor.is_cpu(), op, ": ", name,
               " must have the shape, dtype and device that follow from the input");
}

ScalarType state_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Images describe(const char* op, const Tensor& input) {
  HDROPS_CHECK(input.dim() == 4 && input.is_cpu(), op, ": input must be [N, C, H, W] on the CPU");
  HDROPS_CHECK(input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0, op,
               ": input must have at least one channel, row and column");
  return cut(input.size(0), input.size(1), input.size(2) * input.size(3), is_channels_last(input),
             int64_t(input.element_size()));
}

std::tuple<Tensor, Tensor> pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "context_pool";
  const Images images = describe(op, input);
  const ScalarType dtype = input.scalar_type();
  check(op, "weight", weight, {images.channels}, dtype);
  if (bias) check(op, "bias", *bias, {1}, dtype);
  Tensor context = allocate({images.batch, images.channels}, dtype);
  Tensor state = allocate({images.batch, State<float>::pool_size(images.channels)}, state_dtype(input));
  const Tensor pixels = dense(input, format_of(input)), key = dense(weight);
  dispatch_floating(dtype, op, [&]<class T>() {
    pool_cpu<T>(images, pixels.const_data_ptr(), key.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
                state.mutable_data_ptr(), context.mutable_data_ptr());
  });
  return {context, state};
}

std::tuple<Tensor, Tensor> pool_backward(const Tensor& grad_context, const Tensor& input, const Tensor& weight,
                                         const Tensor& state, const std::vector<bool>& output_mask) {
  const char* op = "context_pool";
  const Images images = describe(op, input);
  const ScalarType dtype = input.scalar_type();
  check(op, "grad_context", grad_context, {images.batch, images.channels}, dtype);
  check(op, "weight", weight, {images.channels}, dtype);
  check(op, "state", state, {images.batch, State<float>::pool_size(images.channels)}, state_dtype(input));
  HDROPS_CHECK(output_mask.size() == 2, op, ": output_mask must have 2 entries, got ", output_mask.size());
  Tensor grad_input = gradient(output_mask[0], shape_of(input), dtype, format_of(input));
  Tensor grad_weight = gradient(output_mask[1], {images.channels}, dtype);
  const Tensor pixels = dense(input, format_of(input)), key = dense(weight), grad = dense(grad_context);
  const Tensor rows = dense(state);
  dispatch_floating(dtype, op, [&]<class T>() {
    pool_backward_cpu<T>(images, grad.const_data_ptr(), pixels.const_data_ptr(), key.const_data_ptr(),
                         rows.const_data_ptr(), pointer_if(output_mask[0], grad_input),
                         pointer_if(output_mask[1], grad_weight));
  });
  return {grad_input, grad_weight};
}

Fusion fusion_of(const std::string& fusion) {
  HDROPS_CHECK(fusion == "add" || fusion == "mul", "global_context: fusion must be add or mul, got ", fusion);
  return fusion == "mul" ? Fusion::multiply : Fusion::add;
}

int64_t hidden_of(const Tensor& squeeze_weight) {
  HDROPS_CHECK(squeeze_weight.dim() == 2 && squeeze_weight.size(0) > 0,
               "global_context: squeeze_weight must be [P, C] with P >= 1");
  return squeeze_weight.size(0);
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& key_weight, const std::optional<Tensor>& key_bias,
                                   const Tensor& squeeze_weight, const Tensor& squeeze_bias, const Tensor& norm_weight,
                                   const Tensor& norm_bias, const Tensor& excite_weight, const Tensor& excite_bias,
                                   const std::string& fusion, double eps) {
  const char* op = "global_context";
  const Images images = describe(op, input);
  const ScalarType dtype = input.scalar_type();
  const int64_t channels = images.channels, hidden = hidden_of(squeeze_weight);
  check(op, "key_weight", key_weight, {channels}, dtype);
  if (key_bias) check(op, "key_bias", *key_bias, {1}, dtype);
  check(op, "squeeze_weight", squeeze_weight, {hidden, channels}, dtype);
  check(op, "squeeze_bias", squeeze_bias, {hidden}, dtype);
  check(op, "norm_weight", norm_weight, {hidden}, dtype);
  check(op, "norm_bias", norm_bias, {hidden}, dtype);
  check(op, "excite_weight", excite_weight, {channels, hidden}, dtype);
  check(op, "excite_bias", excite_bias, {channels}, dtype);
  Tensor output = allocate(shape_of(input), dtype, format_of(input));
  Tensor state = allocate({images.batch, State<float>::size(channels, hidden)}, state_dtype(input));
  const Tensor pixels = dense(input, format_of(input)), key = dense(key_weight);
  const Tensor squeeze = dense(squeeze_weight), squeeze_offset = dense(squeeze_bias), gamma = dense(norm_weight);
  const Tensor beta = dense(norm_bias), excite = dense(excite_weight), excite_offset = dense(excite_bias);
  const Bottleneck bottleneck{hidden,
                              eps,
                              fusion_of(fusion),
                              squeeze.const_data_ptr(),
                              squeeze_offset.const_data_ptr(),
                              gamma.const_data_ptr(),
                              beta.const_data_ptr(),
                              excite.const_data_ptr(),
                              excite_offset.const_data_ptr()};
  dispatch_floating(dtype, op, [&]<class T>() {
    forward_cpu<T>(images, bottleneck, pixels.const_data_ptr(), key.const_data_ptr(),
                   key_bias ? key_bias->const_data_ptr() : nullptr, state.mutable_data_ptr(),
                   output.mutable_data_ptr());
  });
  return {output, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& key_weight, const Tensor& squeeze_weight,
    const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& excite_weight, const Tensor& state,
    const std::string& fusion, const std::vector<bool>& output_mask) {
  const char* op = "global_context";
  const Images images = describe(op, input);
  const ScalarType dtype = input.scalar_type();
  const int64_t channels = images.channels, hidden = hidden_of(squeeze_weight);
  check(op, "grad_output", grad_output, shape_of(input), dtype);
  check(op, "key_weight", key_weight, {channels}, dtype);
  check(op, "squeeze_weight", squeeze_weight, {hidden, channels}, dtype);
  check(op, "norm_weight", norm_weight, {hidden}, dtype);
  check(op, "norm_bias", norm_bias, {hidden}, dtype);
  check(op, "excite_weight", excite_weight, {channels, hidden}, dtype);
  check(op, "state", state, {images.batch, State<float>::size(channels, hidden)}, state_dtype(input));
  HDROPS_CHECK(output_mask.size() == 8, op, ": output_mask must have 8 entries, got ", output_mask.size());
  auto wanted = [&](size_t k, const std::vector<int64_t>& shape) { return gradient(output_mask[k], shape, dtype); };
  Tensor grad_input = gradient(output_mask[0], shape_of(input), dtype, format_of(input));
  Tensor grad_key = wanted(1, {channels}), grad_squeeze = wanted(2, {hidden, channels});
  Tensor grad_squeeze_bias = wanted(3, {hidden}), grad_gamma = wanted(4, {hidden}), grad_beta = wanted(5, {hidden});
  Tensor grad_excite = wanted(6, {channels, hidden}), grad_excite_bias = wanted(7, {channels});
  const Tensor grad = dense(grad_output, format_of(input)), pixels = dense(input, format_of(input));
  const Tensor key = dense(key_weight), squeeze = dense(squeeze_weight), gamma = dense(norm_weight);
  const Tensor beta = dense(norm_bias), excite = dense(excite_weight), rows = dense(state);
  const Bottleneck bottleneck{hidden,
                              0,
                              fusion_of(fusion),
                              squeeze.const_data_ptr(),
                              nullptr,
                              gamma.const_data_ptr(),
                              beta.const_data_ptr(),
                              excite.const_data_ptr(),
                              nullptr};
  const BottleneckGradients gradients{
      pointer_if(output_mask[2], grad_squeeze), pointer_if(output_mask[3], grad_squeeze_bias),
      pointer_if(output_mask[4], grad_gamma),   pointer_if(output_mask[5], grad_beta),
      pointer_if(output_mask[6], grad_excite),  pointer_if(output_mask[7], grad_excite_bias)};
  dispatch_floating(dtype, op, [&]<class T>() {
    backward_cpu<T>(images, bottleneck, grad.const_data_ptr(), pixels.const_data_ptr(), key.const_data_ptr(),
                    rows.const_data_ptr(), pointer_if(output_mask[0], grad_input), pointer_if(output_mask[1], grad_key),
                    gradients);
  });
  return {grad_input, grad_key, grad_squeeze, grad_squeeze_bias, grad_gamma, grad_beta, grad_excite, grad_excite_bias};
}

}  // namespace
}  // namespace hdrops::global_context

STABLE_TORCH_LIBRARY_IMPL(hdrops, CPU, m) {
  m.impl("context_pool", TORCH_BOX(&hdrops::global_context::pool));
  m.impl("_context_pool_backward", TORCH_BOX(&hdrops::global_context::pool_backward));
  m.impl("global_context", TORCH_BOX(&hdrops::global_context::forward));
  m.impl("_global_context_backward", TORCH_BOX(&hdrops::global_context::backward));
}

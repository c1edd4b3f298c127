// Binds the CPU kernels of patch_match (bindings.h) and patch_swap: the checks memory safety rests on, allocation,
// layouts, dtypes.
//
// A source that is channels last and not contiguous is used in place and gets an output and gradients of that layout;
// any other tensor is made contiguous where it is not. The CPU kernels are deterministic, so `deterministic` has
// nothing to ask of them.
#include <torch/csrc/stable/library.h>

#include "common/memory.h"
#include "patch_match/bindings.h"

namespace hdrops::patch_match {
namespace {

class Cpu {
 public:
  explicit Cpu(const Tensor& like) : device_(like.device()) {
    HDROPS_CHECK(like.is_cpu(), "patch_match and patch_swap: a tensor of another device among those of the CPU");
  }

  Tensor allocate(ScalarType dtype, const std::vector<int64_t>& shape, bool channels_last) const {
    Tensor tensor = torch::stable::empty(shape, dtype, std::nullopt, device_, std::nullopt, format_of(channels_last));
    advise_huge_pages(tensor.mutable_data_ptr(), size_t(tensor.numel()) * tensor.element_size());
    return tensor;
  }

  template <class T>
  void match(const MatchParams& params) const {
    match_cpu<T>(params);
  }
  template <class T>
  void match_backward(const MatchParams& params) const {
    match_backward_cpu<T>(params);
  }

 private:
  torch::stable::Device device_;
};

// A swap of `input` (the source, or the gradient of the output) for matches in a key of height x width sites.
struct SwapInputs {
  Tensor input, index;
  SwapParams params{};

  SwapInputs(const Tensor& given, const Tensor& matches, int64_t height, int64_t width, int64_t patch_size,
             int64_t scale, const std::string& border)
      : input(torch::stable::contiguous(given, format_of(is_channels_last(given)))),
        index(torch::stable::contiguous(matches)) {
    constexpr const char* op = "patch_swap";
    HDROPS_CHECK(index.dim() == 3 && index.size(0) == input.size(0), op,
                 ": index must have 3 dimensions and the source's batch ", input.size(0));
    check_dtype(op, index, "index", ScalarType::Long, input);
    check_patch_size(op, patch_size);
    HDROPS_CHECK(scale == 1 || scale == 2 || scale == 4, op, ": scale must be 1, 2 or 4, got ", scale);
    HDROPS_CHECK(border == "exclude" || border == "zero", op, ": border must be exclude or zero, got ", border);
    HDROPS_CHECK(input.size(1) > 0 && height > 0 && width > 0 && height % scale == 0 && width % scale == 0, op,
                 ": the source must have at least one channel, row and column, in multiples of scale = ", scale,
                 ", got ", height, " x ", width);
    HDROPS_CHECK(height <= INT32_MAX && width <= INT32_MAX && index.size(1) <= INT32_MAX && index.size(2) <= INT32_MAX,
                 op, ": heights and widths must be below 2^31");
    SwapParams& p = params;
    p.batch = input.size(0), p.channels = input.size(1);
    p.query_height = index.size(1), p.query_width = index.size(2);
    p.key_height = height / scale, p.key_width = width / scale;
    p.patch_size = patch_size, p.scale = scale;
    p.exclude_border = border == "exclude";
    p.index = static_cast<const int64_t*>(index.const_data_ptr());
    p.input = input.const_data_ptr();
    p.input_channels_last = is_channels_last(input);
  }
};

Tensor swap(const Tensor& source, const Tensor& index, int64_t patch_size, int64_t scale, const std::string& border) {
  HDROPS_CHECK(source.dim() == 4, "patch_swap: source must have 4 dimensions, got ", source.dim());
  SwapInputs inputs(source, index, source.size(2), source.size(3), patch_size, scale, border);
  SwapParams& p = inputs.params;
  p.output_channels_last = p.input_channels_last;
  Tensor output =
      Cpu(source).allocate(source.scalar_type(), {p.batch, p.channels, scale * p.query_height, scale * p.query_width},
                           p.output_channels_last);
  if (output.numel() == 0) return output;
  p.output = output.mutable_data_ptr();
  dispatch_floating(source.scalar_type(), "patch_swap", [&]<class T>() { swap_cpu<T>(p); });
  return output;
}

Tensor swap_backward(const Tensor& grad_output, const Tensor& index, const std::vector<int64_t>& size,
                     int64_t patch_size, int64_t scale, const std::string& border, bool channels_last,
                     bool /*deterministic*/) {
  HDROPS_CHECK(grad_output.dim() == 4 && size.size() == 2,
               "patch_swap: grad_output must have 4 dimensions and size 2 entries, got ", grad_output.dim(), " and ",
               size.size());
  SwapInputs inputs(grad_output, index, size[0], size[1], patch_size, scale, border);
  SwapParams& p = inputs.params;
  check_shape("patch_swap", grad_output, "grad_output",
              {p.batch, p.channels, scale * p.query_height, scale * p.query_width});
  Tensor grad_source =
      Cpu(grad_output).allocate(grad_output.scalar_type(), {p.batch, p.channels, size[0], size[1]}, channels_last);
  if (grad_source.numel() == 0) return grad_source;
  p.output = grad_source.mutable_data_ptr();
  p.output_channels_last = channels_last;
  dispatch_floating(grad_output.scalar_type(), "patch_swap", [&]<class T>() { swap_backward_cpu<T>(p); });
  return grad_source;
}

}  // namespace
}  // namespace hdrops::patch_match

STABLE_TORCH_LIBRARY_IMPL(hdrops, CPU, m) {
  m.impl("patch_match", TORCH_BOX(&hdrops::patch_match::match<hdrops::patch_match::Cpu>));
  m.impl("_patch_match_backward", TORCH_BOX(&hdrops::patch_match::match_backward<hdrops::patch_match::Cpu>));
  m.impl("patch_swap", TORCH_BOX(&hdrops::patch_match::swap));
  m.impl("_patch_swap_backward", TORCH_BOX(&hdrops::patch_match::swap_backward));
}

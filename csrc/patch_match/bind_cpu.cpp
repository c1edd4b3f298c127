// Binds the CPU kernels of patch_match and patch_swap: the checks memory safety rests on, allocation, layouts, dtypes.
//
// Features that are channels last and not contiguous are used in place and get gradients (or a swapped output) of that
// layout; any other tensor is made contiguous where it is not. The CPU kernels are deterministic, so `deterministic`
// has nothing to ask of them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/layout.h"
#include "common/memory.h"
#include "patch_match/params.h"

namespace hdrops::patch_match {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

MemoryFormat format_of(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

Tensor allocate(const Tensor& like, ScalarType dtype, const std::vector<int64_t>& shape, bool channels_last = false) {
  Tensor tensor =
      torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt, format_of(channels_last));
  advise_huge_pages(tensor.mutable_data_ptr(), size_t(tensor.numel()) * tensor.element_size());
  return tensor;
}

void check_shape(const char* op, const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  bool same = tensor.dim() == int64_t(shape.size());
  for (int64_t dim = 0; same && dim < tensor.dim(); ++dim) same = tensor.size(dim) == shape[size_t(dim)];
  std::ostringstream wanted, got;
  for (int64_t size : shape) wanted << " " << size;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) got << " " << tensor.size(dim);
  HDROPS_CHECK(same, op, ": ", name, " must have shape [", wanted.str(), " ], got [", got.str(), " ]");
}

void check_dtype(const char* op, const Tensor& tensor, const char* name, ScalarType wanted) {
  HDROPS_CHECK(tensor.scalar_type() == wanted, op, ": ", name, " must have scalar type ", int(wanted), ", got ",
               int(tensor.scalar_type()));
  HDROPS_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
}

void check_patch_size(const char* op, int64_t size) {
  HDROPS_CHECK(size == 1 || size == 3 || size == 5 || size == 7, op, ": patch_size must be 1, 3, 5 or 7, got ", size);
}

// Query and key as the kernels read them: tensors that hold the memory, and the sizes.
struct MatchInputs {
  Tensor query, key;
  MatchParams params{};

  MatchInputs(const Tensor& given_query, const Tensor& given_key, int64_t patch_size, const std::string& normalize)
      : query(dense(given_query)), key(dense(given_key)) {
    constexpr const char* op = "patch_match";
    MatchParams& p = params;
    p.batch = query.size(0), p.channels = query.size(1);
    HDROPS_CHECK(key.size(0) == p.batch && key.size(1) == p.channels, op,
                 ": query and key must have the same batch and channels");
    check_dtype(op, query, "query", query.scalar_type());
    check_dtype(op, key, "key", query.scalar_type());
    check_patch_size(op, patch_size);
    HDROPS_CHECK(normalize == "key" || normalize == "query" || normalize == "both" || normalize == "none", op,
                 ": normalize must be key, query, both or none, got ", normalize);
    const bool both = normalize == "both";
    p.query = describe(query, both || normalize == "query");
    p.key = describe(key, both || normalize == "key");
    p.patch_size = patch_size;
  }

 private:
  static Tensor dense(const Tensor& tensor) {
    HDROPS_CHECK(tensor.dim() == 4, "patch_match: query and key must have 4 dimensions, got ", tensor.dim());
    return torch::stable::contiguous(tensor, format_of(is_channels_last(tensor)));
  }

  static Features describe(const Tensor& tensor, bool normalize) {
    HDROPS_CHECK(tensor.size(1) > 0 && tensor.size(2) > 0 && tensor.size(3) > 0,
                 "patch_match: query and key must have at least one channel, row and column");
    HDROPS_CHECK(tensor.size(2) <= INT32_MAX && tensor.size(3) <= INT32_MAX,
                 "patch_match: heights and widths must be below 2^31");
    return {tensor.const_data_ptr(), tensor.size(2), tensor.size(3), is_channels_last(tensor), normalize};
  }
};

std::tuple<Tensor, Tensor> match(const Tensor& query, const Tensor& key, const std::vector<int64_t>& radius,
                                 const std::optional<Tensor>& centers, int64_t patch_size,
                                 const std::string& normalize) {
  MatchInputs inputs(query, key, patch_size, normalize);
  MatchParams& p = inputs.params;
  HDROPS_CHECK(radius.size() == 2 && radius[0] >= 0 && radius[1] >= 0,
               "patch_match: radius must be two numbers that are not negative");
  p.radius_y = std::min(radius[0], p.key.height - 1), p.radius_x = std::min(radius[1], p.key.width - 1);
  HDROPS_CHECK(p.window_y() <= kLargestWindow / p.window_x(), "patch_match: a window of ", p.window_y(), " x ",
               p.window_x(), " displacements is too large");
  const std::vector<int64_t> sites{p.batch, p.query.height, p.query.width};
  std::optional<Tensor> dense_centers;
  if (centers) {
    check_shape("patch_match", *centers, "centers", sites);
    check_dtype("patch_match", *centers, "centers", ScalarType::Long);
    dense_centers = torch::stable::contiguous(*centers);
    p.centers = static_cast<const int64_t*>(dense_centers->const_data_ptr());
  } else {
    HDROPS_CHECK(p.query.height == p.key.height && p.query.width == p.key.width,
                 "patch_match: without centers query and key must have grids of equal size");
  }
  Tensor index = allocate(query, ScalarType::Long, sites), score = allocate(query, query.scalar_type(), sites);
  if (index.numel() == 0) return {score, index};
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  p.score = score.mutable_data_ptr();
  dispatch_floating(query.scalar_type(), "patch_match", [&]<class T>() { match_cpu<T>(p); });
  return {score, index};
}

std::tuple<Tensor, Tensor> match_backward(const Tensor& grad_score, const Tensor& query, const Tensor& key,
                                          const Tensor& index, int64_t patch_size, const std::string& normalize,
                                          const std::vector<bool>& output_mask, bool /*deterministic*/) {
  MatchInputs inputs(query, key, patch_size, normalize);
  MatchParams& p = inputs.params;
  const std::vector<int64_t> sites{p.batch, p.query.height, p.query.width};
  check_shape("patch_match", grad_score, "grad_score", sites);
  check_shape("patch_match", index, "index", sites);
  check_dtype("patch_match", grad_score, "grad_score", query.scalar_type());
  check_dtype("patch_match", index, "index", ScalarType::Long);
  HDROPS_CHECK(output_mask.size() == 2, "patch_match: output_mask must have 2 entries, got ", output_mask.size());
  auto gradient = [&](bool wanted, const Tensor& of, bool channels_last) {
    std::vector<int64_t> shape{0};
    if (wanted) shape.assign(of.sizes().begin(), of.sizes().end());
    return allocate(query, query.scalar_type(), shape, wanted && channels_last);
  };
  Tensor grad_query = gradient(output_mask[0], query, p.query.channels_last);
  Tensor grad_key = gradient(output_mask[1], key, p.key.channels_last);
  if (p.batch == 0) return {grad_query, grad_key};
  const Tensor dense_gradient = torch::stable::contiguous(grad_score), matches = torch::stable::contiguous(index);
  p.grad_score = dense_gradient.const_data_ptr();
  p.match = static_cast<const int64_t*>(matches.const_data_ptr());
  p.grad_query = output_mask[0] ? grad_query.mutable_data_ptr() : nullptr;
  p.grad_key = output_mask[1] ? grad_key.mutable_data_ptr() : nullptr;
  dispatch_floating(query.scalar_type(), "patch_match", [&]<class T>() { match_backward_cpu<T>(p); });
  return {grad_query, grad_key};
}

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
    check_dtype(op, input, "source", input.scalar_type());
    check_dtype(op, index, "index", ScalarType::Long);
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
      allocate(source, source.scalar_type(), {p.batch, p.channels, scale * p.query_height, scale * p.query_width},
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
      allocate(grad_output, grad_output.scalar_type(), {p.batch, p.channels, size[0], size[1]}, channels_last);
  if (grad_source.numel() == 0) return grad_source;
  p.output = grad_source.mutable_data_ptr();
  p.output_channels_last = channels_last;
  dispatch_floating(grad_output.scalar_type(), "patch_swap", [&]<class T>() { swap_backward_cpu<T>(p); });
  return grad_source;
}

}  // namespace
}  // namespace hdrops::patch_match

STABLE_TORCH_LIBRARY_IMPL(hdrops, CPU, m) {
  m.impl("patch_match", TORCH_BOX(&hdrops::patch_match::match));
  m.impl("_patch_match_backward", TORCH_BOX(&hdrops::patch_match::match_backward));
  m.impl("patch_swap", TORCH_BOX(&hdrops::patch_match::swap));
  m.impl("_patch_swap_backward", TORCH_BOX(&hdrops::patch_match::swap_backward));
}

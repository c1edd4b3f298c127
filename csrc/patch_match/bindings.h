// The two operators of patch_match as torch calls them, for any device: checks, allocation, layouts. bind_cpu.cpp and
// bind_cuda.cu say what a Device is:
//
//   Device(query)                                makes the query's device the current one as long as it lives
//   allocate(dtype, shape, channels_last)
//   match<T>(params), match_backward<T>(params)  run the kernels
//
// Features that are channels last and not contiguous are used in place and get gradients of that layout; any other
// tensor is made contiguous where it is not.
#pragma once
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
#include "patch_match/params.h"

namespace hdrops::patch_match {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

inline MemoryFormat format_of(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline void check_shape(const char* op, const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  bool same = tensor.dim() == int64_t(shape.size());
  for (int64_t dim = 0; same && dim < tensor.dim(); ++dim) same = tensor.size(dim) == shape[size_t(dim)];
  std::ostringstream wanted, got;
  for (int64_t size : shape) wanted << " " << size;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) got << " " << tensor.size(dim);
  HDROPS_CHECK(same, op, ": ", name, " must have shape [", wanted.str(), " ], got [", got.str(), " ]");
}

// A tensor of that dtype, on the device of `like`.
inline void check_dtype(const char* op, const Tensor& tensor, const char* name, ScalarType wanted, const Tensor& like) {
  HDROPS_CHECK(tensor.scalar_type() == wanted, op, ": ", name, " must have scalar type ", int(wanted), ", got ",
               int(tensor.scalar_type()));
  HDROPS_CHECK(tensor.device() == like.device(), op, ": ", name, " must be on the device of the other tensors");
}

inline void check_patch_size(const char* op, int64_t size) {
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
    check_dtype(op, key, "key", query.scalar_type(), query);
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

template <class Device>
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
    check_dtype("patch_match", *centers, "centers", ScalarType::Long, query);
    dense_centers = torch::stable::contiguous(*centers);
    p.centers = static_cast<const int64_t*>(dense_centers->const_data_ptr());
  } else {
    HDROPS_CHECK(p.query.height == p.key.height && p.query.width == p.key.width,
                 "patch_match: without centers query and key must have grids of equal size");
  }
  Device device(query);
  Tensor index = device.allocate(ScalarType::Long, sites, false);
  Tensor score = device.allocate(query.scalar_type(), sites, false);
  if (index.numel() == 0) return {score, index};
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  p.score = score.mutable_data_ptr();
  dispatch_floating(query.scalar_type(), "patch_match", [&]<class T>() { device.template match<T>(p); });
  return {score, index};
}

template <class Device>
std::tuple<Tensor, Tensor> match_backward(const Tensor& grad_score, const Tensor& query, const Tensor& key,
                                          const Tensor& index, int64_t patch_size, const std::string& normalize,
                                          const std::vector<bool>& output_mask, bool deterministic) {
  MatchInputs inputs(query, key, patch_size, normalize);
  MatchParams& p = inputs.params;
  const std::vector<int64_t> sites{p.batch, p.query.height, p.query.width};
  check_shape("patch_match", grad_score, "grad_score", sites);
  check_shape("patch_match", index, "index", sites);
  check_dtype("patch_match", grad_score, "grad_score", query.scalar_type(), query);
  check_dtype("patch_match", index, "index", ScalarType::Long, query);
  HDROPS_CHECK(output_mask.size() == 2, "patch_match: output_mask must have 2 entries, got ", output_mask.size());
  p.deterministic = deterministic;
  Device device(query);
  auto gradient = [&](bool wanted, const Tensor& of, bool channels_last) {
    std::vector<int64_t> shape{0};
    if (wanted) shape.assign(of.sizes().begin(), of.sizes().end());
    return device.allocate(query.scalar_type(), shape, wanted && channels_last);
  };
  Tensor grad_query = gradient(output_mask[0], query, p.query.channels_last);
  Tensor grad_key = gradient(output_mask[1], key, p.key.channels_last);
  if (p.batch == 0) return {grad_query, grad_key};
  const Tensor dense_gradient = torch::stable::contiguous(grad_score), matches = torch::stable::contiguous(index);
  p.grad_score = dense_gradient.const_data_ptr();
  p.match = static_cast<const int64_t*>(matches.const_data_ptr());
  p.grad_query = output_mask[0] ? grad_query.mutable_data_ptr() : nullptr;
  p.grad_key = output_mask[1] ? grad_key.mutable_data_ptr() : nullptr;
  dispatch_floating(query.scalar_type(), "patch_match", [&]<class T>() { device.template match_backward<T>(p); });
  return {grad_query, grad_key};
}

}  // namespace hdrops::patch_match

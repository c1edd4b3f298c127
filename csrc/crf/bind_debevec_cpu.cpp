// CPU binding of the solver of few samples: checks and outputs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "common/dispatch.h"
#include "crf/debevec_params.h"

namespace hdrops {
namespace {

using torch::stable::Tensor;

void check(const Tensor& tensor, const char* name, ScalarType dtype, const Tensor& like) {
  bool same = tensor.dim() == like.dim() && tensor.scalar_type() == dtype;
  for (int64_t dim = 0; same && dim < like.dim(); ++dim) same = tensor.size(dim) == like.size(dim);
  HDROPS_CHECK(same, "solve_debevec: ", name, " has a wrong shape or dtype");
}

std::tuple<Tensor, Tensor> solve_few_samples(const Tensor& lower, const std::optional<Tensor>& fraction,
                                             const Tensor& square, const Tensor& strength, const Tensor& right) {
  HDROPS_CHECK(lower.dim() == 3 && right.dim() == 2 && strength.dim() == 1 && right.size(0) == lower.size(0) &&
                   right.size(1) == strength.size(0) && strength.size(0) >= 4,
               "solve_debevec: codes must be [B, S, P], right [B, L], strength [L >= 4]");
  check(lower, "lower", ScalarType::Long, lower);
  check(square, "square", ScalarType::Double, lower);
  if (fraction) check(*fraction, "fraction", ScalarType::Double, lower);
  check(strength, "strength", ScalarType::Double, strength);
  check(right, "right", ScalarType::Double, right);
  const Tensor codes = torch::stable::contiguous(lower), squares = torch::stable::contiguous(square);
  const Tensor strengths = torch::stable::contiguous(strength), rights = torch::stable::contiguous(right);
  const Tensor fractions = fraction ? torch::stable::contiguous(*fraction) : squares;
  Tensor curve = torch::stable::empty(right.sizes(), ScalarType::Double);
  Tensor solved = torch::stable::empty({right.size(0)}, ScalarType::Bool);

  DebevecParams p{};
  p.systems = lower.size(0), p.samples = lower.size(1), p.frames = lower.size(2), p.levels = strength.size(0);
  p.lower = static_cast<const int64_t*>(codes.const_data_ptr());
  p.fraction = fraction ? static_cast<const double*>(fractions.const_data_ptr()) : nullptr;
  p.square = static_cast<const double*>(squares.const_data_ptr());
  p.strength = static_cast<const double*>(strengths.const_data_ptr());
  p.right = static_cast<const double*>(rights.const_data_ptr());
  p.curve = static_cast<double*>(curve.mutable_data_ptr());
  p.solved = static_cast<bool*>(solved.mutable_data_ptr());
  const int64_t highest = p.levels - (fraction ? 2 : 1);
  for (int64_t k = 0; k < lower.numel(); ++k) {
    HDROPS_CHECK(p.lower[k] >= 0 && p.lower[k] <= highest, "solve_debevec: codes must lie in 0..", highest, ", got ",
                 p.lower[k]);
  }
  solve_few_samples_cpu(p);
  return {curve, solved};
}

}  // namespace
}  // namespace hdrops

STABLE_TORCH_LIBRARY_IMPL(hdrops, CPU, m) { m.impl("_solve_few_samples", TORCH_BOX(&hdrops::solve_few_samples)); }

// See merge_plan.h.
#include "crf/merge_plan.h"

#include <algorithm>
#include <cmath>

#include "common/hd.h"
#include "crf/merge_math.h"

namespace hdrops {
namespace {

// A table over the codes 0 .. 255: its own entry where it has one for each, else interpolated (OP-6).
template <class A>
double at_code(const A* table, int64_t length, int code) {
  const CodePlace place = place_of_code(code, length);
  return between(table[place.lower], table[place.upper], place.fraction);
}

}  // namespace

template <class A>
MergePlan<A>::MergePlan(MergeParams<A>& params, const A* log_exposures, int64_t exposure_images, const A* curve,
                        int64_t curve_images, int64_t curve_channels, bool codes8) {
  sort_frames(params, log_exposures, exposure_images);
  if (curve != nullptr) make_positive(params, curve, curve_images, curve_channels);
  const A* w = params.weight;
  int64_t last = params.weight_length - 1;
  params.hinge[0] = w[0];
  params.hinge[1] = w[std::min<int64_t>(1, last)] - w[0];
  params.hinge[2] = w[std::min<int64_t>(2, last)] - w[std::min<int64_t>(1, last)];
  if (codes8) tabulate(params, curve_images, curve_channels);
}

template <class A>
void MergePlan<A>::sort_frames(MergeParams<A>& params, const A* log_exposures, int64_t images) {
  int64_t frames = params.frames;
  order_ = std::make_unique<Scratch<int32_t>>(images * frames);
  log_exposures_ = std::make_unique<Scratch<A>>(images * frames);
  params.tied = false;
  for (int64_t n = 0; n < images; ++n) {
    const A* given = log_exposures + n * frames;
    int32_t* order = order_->get() + n * frames;
    A* sorted = log_exposures_->get() + n * frames;
    for (int64_t j = 0; j < frames; ++j) order[j] = int32_t(j);
    std::stable_sort(order, order + frames, [given](int32_t a, int32_t b) { return given[a] < given[b]; });
    for (int64_t j = 0; j < frames; ++j) sorted[j] = given[order[j]];
    for (int64_t j = 1; j < frames; ++j) params.tied |= sorted[j] == sorted[j - 1];
  }
  params.order = order_->get();
  params.log_exposures = log_exposures_->get();
  params.exposure_stride_n = images > 1 ? frames : 0;
}

template <class A>
void MergePlan<A>::make_positive(MergeParams<A>& params, const A* curve, int64_t images, int64_t channels) {
  int64_t count = images * channels * params.curve_length;
  curve_ = std::make_unique<Scratch<A>>(count);
  for (int64_t i = 0; i < count; ++i) curve_->get()[i] = positive_response(curve[i]);
  params.curve = curve_->get();
  params.curve_stride_n = images > 1 ? channels * params.curve_length : 0;
  params.curve_stride_c = channels > 1 ? params.curve_length : 0;
}

template <class A>
void MergePlan<A>::tabulate(MergeParams<A>& params, int64_t curve_images, int64_t curve_channels) {
  code_weight_ = std::make_unique<Scratch<A>>(kCodes8);
  params.only_ends_clip = true;
  for (int z = 0; z < kCodes8; ++z) {
    code_weight_->get()[z] = A(at_code(params.weight, params.weight_length, z));
    params.only_ends_clip &= z == 0 || z == kCodes8 - 1 || code_weight_->get()[z] > A(kNoWeight);
  }

  int64_t curves = curve_images * curve_channels;
  log_curve_ = std::make_unique<Scratch<A>>(curves * kCodes8);
  for (int64_t k = 0; k < curves; ++k) {
    for (int z = 0; z < kCodes8; ++z) {
      double linear = z > 0 ? double(z) / (kCodes8 - 1) : kSmallestResponse;
      double response =
          params.curve != nullptr ? at_code(params.curve + k * params.curve_length, params.curve_length, z) : linear;
      log_curve_->get()[k * kCodes8 + z] = A(std::log(response));
    }
  }
  params.code_weight = code_weight_->get();
  params.log_curve = log_curve_->get();
  params.log_curve_stride_n = curve_images > 1 ? curve_channels * kCodes8 : 0;
  params.log_curve_stride_c = curve_channels > 1 ? kCodes8 : 0;

  const int64_t channel_size = kCodes8 * kCodeTerms;
  params.table_stride_n = curve_images > 1 ? curve_channels * channel_size : 0;
  params.table_stride_c = curve_channels > 1 ? channel_size : 0;
  table_ = std::make_unique<Scratch<A>>(curves * channel_size);
  for (int64_t at = 0; at < curves * kCodes8; ++at) {
    const A w = params.code_weight[at % kCodes8];
    A* terms = table_->get() + at * kCodeTerms;
    terms[0] = w;
    terms[1] = w != 0 ? w * params.log_curve[at] : A(0);  // a code never used may have g = inf
  }
  params.table = table_->get();
}

template class MergePlan<float>;
template class MergePlan<double>;

int64_t merge_block_length(int64_t channels, bool interleaved) {
  constexpr int64_t target = 512, lanes = 16;
  if (!interleaved) return target;
  const int64_t whole = channels * lanes;  // whole vectors too, but for so many channels that a block would be long
  return whole <= target ? whole * (target / whole) : channels * std::max<int64_t>(1, target / channels);
}

MergeTasks merge_tasks(int64_t batch, int64_t channels, int64_t pixels, bool interleaved, int64_t least) {
  MergeTasks tasks;
  tasks.streams = interleaved ? batch : batch * channels;
  tasks.stream_length = interleaved ? pixels * channels : pixels;
  tasks.task_length = round_up(least, merge_block_length(channels, interleaved));
  tasks.tasks_per_stream = ceil_div(tasks.stream_length, tasks.task_length);
  return tasks;
}

}  // namespace hdrops

// Deformable convolution on the CPU, written plainly: one output pixel, tap and channel at a time.
#include <cstring>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/sampling.h"
#include "deform_conv2d/params.h"

namespace hdrops::deform_conv2d {
namespace {

inline float get(const void* d, int64_t i, const float*) { return static_cast<const float*>(d)[i]; }
inline double get(const void* d, int64_t i, const double*) { return static_cast<const double*>(d)[i]; }
inline float get(const void* d, int64_t i, const bfloat16*) { return to_float(static_cast<const bfloat16*>(d)[i]); }
inline float get(const void* d, int64_t i, const float16*) { return to_float(static_cast<const float16*>(d)[i]); }
inline void put(void* d, int64_t i, float v, const float*) { static_cast<float*>(d)[i] = v; }
inline void put(void* d, int64_t i, double v, const double*) { static_cast<double*>(d)[i] = v; }
inline void put(void* d, int64_t i, float v, const bfloat16*) { static_cast<bfloat16*>(d)[i] = to_bfloat16(v); }
inline void put(void* d, int64_t i, float v, const float16*) { static_cast<float16*>(d)[i] = to_float16(v); }
template <class T>
auto get_as(const void* d, int64_t i, bool is_float) -> acc_t<T> {
  if constexpr (sizeof(T) == 2)
    return is_float ? get(d, i, (const float*)0) : get(d, i, (const T*)0);
  else
    return get(d, i, (const T*)0);
}
template <class T>
void put_as(void* d, int64_t i, acc_t<T> v, bool is_float) {
  if constexpr (sizeof(T) == 2) {
    if (is_float) {
      put(d, i, v, (const float*)0);
      return;
    }
  }
  put(d, i, v, (const T*)0);
}
template <class R>
struct IntOf {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

template <class T>
void run(const Params& p, bool back) {
  using R = acc_t<T>;
  using I = typename IntOf<R>::type;
  const T* tag = nullptr;
  int64_t C = p.in_channels, O = p.out_channels, HW = p.height * p.width, P = p.out_pixels(), K = p.taps();
  int64_t cg = C / p.groups, og = O / p.groups, dg = p.offset_groups, cd = C / dg;
  auto in_at = [&](int64_t n, int64_t c, int64_t q) {
    return p.channels_last ? (n * HW + q) * C + c : (n * C + c) * HW + q;
  };
  auto out_at = [&](int64_t n, int64_t o, int64_t q) {
    return p.channels_last ? (n * P + q) * O + o : (n * O + o) * P + q;
  };
  std::vector<R> gx(back && p.grad_input ? p.batch * C * HW : 0), gw(back && p.grad_weight ? O * cg * K : 0), gb(O);
  std::vector<R> acc(O);
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t q = 0; q < P; ++q) {
      for (int64_t o = 0; o < O; ++o) {
        if (back) {
          acc[o] = get(p.grad_output, out_at(n, o, q), tag);
          gb[o] += acc[o];
        } else
          acc[o] = p.bias ? get(p.bias, o, tag) : R(0);
      }
      for (int64_t d = 0; d < dg; ++d)
        for (int64_t k = 0; k < K; ++k) {
          int64_t mi = ((n * dg + d) * K + k) * P + q, yi = ((n * dg + d) * K + k) * 2 * P + q;
          R y = R(q / p.out_width * p.stride_h - p.pad_h + k / p.kernel_w * p.dilation_h) +
                get_as<T>(p.offset, yi, p.offset_is_float);
          R x = R(q % p.out_width * p.stride_w - p.pad_w + k % p.kernel_w * p.dilation_w) +
                get_as<T>(p.offset, yi + P, p.offset_is_float);
          R m = p.mask ? get_as<T>(p.mask, mi, p.mask_is_float) : R(1);
          R gy = 0, gxo = 0, gm = 0;
          if (inside_grid(y, R(p.height)) && inside_grid(x, R(p.width))) {
            auto a = sample_axis(y, I(p.height)), b = sample_axis(x, I(p.width));
            int64_t i00 = a.low * p.width + b.low, i01 = a.low * p.width + b.high, i10 = a.high * p.width + b.low,
                    i11 = a.high * p.width + b.high;
            for (int64_t c = d * cd; c < (d + 1) * cd; ++c) {
              R x00 = get(p.input, in_at(n, c, i00), tag), x01 = get(p.input, in_at(n, c, i01), tag);
              R x10 = get(p.input, in_at(n, c, i10), tag), x11 = get(p.input, in_at(n, c, i11), tag);
              R v = a.weight_low * (b.weight_low * x00 + b.weight_high * x01) +
                    a.weight_high * (b.weight_low * x10 + b.weight_high * x11);
              int64_t g = c / cg;
              R gv = 0;
              for (int64_t o = g * og; o < (g + 1) * og; ++o) {
                int64_t wi = (o * cg + c % cg) * K + k;
                if (!back)
                  acc[o] += get(p.weight, wi, tag) * v * m;
                else {
                  gv += get(p.weight, wi, tag) * acc[o];
                  if (p.grad_weight) gw[wi] += v * m * acc[o];
                }
              }
              if (back) {
                gm += gv * v;
                gy += m * gv *
                      (a.slope_low * (b.weight_low * x00 + b.weight_high * x01) +
                       a.slope_high * (b.weight_low * x10 + b.weight_high * x11));
                gxo += m * gv *
                       (a.weight_low * (b.slope_low * x00 + b.slope_high * x01) +
                        a.weight_high * (b.slope_low * x10 + b.slope_high * x11));
                if (p.grad_input) {
                  gx[in_at(n, c, i00)] += gv * m * a.weight_low * b.weight_low;
                  gx[in_at(n, c, i01)] += gv * m * a.weight_low * b.weight_high;
                  gx[in_at(n, c, i10)] += gv * m * a.weight_high * b.weight_low;
                  gx[in_at(n, c, i11)] += gv * m * a.weight_high * b.weight_high;
                }
              }
            }
          }
          if (back && p.grad_offset) {
            put_as<T>(p.grad_offset, yi, gy, p.offset_is_float);
            put_as<T>(p.grad_offset, yi + P, gxo, p.offset_is_float);
          }
          if (back && p.grad_mask) put_as<T>(p.grad_mask, mi, gm, p.mask_is_float);
        }
      if (!back)
        for (int64_t o = 0; o < O; ++o) put(p.output, out_at(n, o, q), acc[o], tag);
    }
  if (!back) return;
  for (size_t i = 0; i < gx.size(); ++i) put(p.grad_input, int64_t(i), gx[i], tag);
  for (size_t i = 0; i < gw.size(); ++i) put(p.grad_weight, int64_t(i), gw[i], tag);
  if (p.grad_bias)
    for (int64_t o = 0; o < O; ++o) put(p.grad_bias, o, gb[o], tag);
}

}  // namespace

template <class T>
void forward_cpu(const Params& p) {
  run<T>(p, false);
}
template <class T>
void backward_cpu(const Params& p) {
  run<T>(p, true);
}
template void forward_cpu<float>(const Params&);
template void forward_cpu<double>(const Params&);
template void forward_cpu<bfloat16>(const Params&);
template void forward_cpu<float16>(const Params&);
template void backward_cpu<float>(const Params&);
template void backward_cpu<double>(const Params&);
template void backward_cpu<bfloat16>(const Params&);
template void backward_cpu<float16>(const Params&);

}  // namespace hdrops::deform_conv2d

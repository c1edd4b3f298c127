// The two 16-bit float formats as plain storage; kernels compute in float. Vector forms are in simd.h.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/hd.h"

namespace hdrops {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

HDROPS_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

HDROPS_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

HDROPS_HD float to_float(bfloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

// Round to nearest even; a NaN keeps its sign and becomes quiet.
HDROPS_HD bfloat16 to_bfloat16(float value) {
  uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

HDROPS_HD float to_float(float16 value) {
  uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);  // infinity and NaN
  // Shifting the exponent into place and multiplying by 2^112 corrects its bias, subnormal numbers included.
  float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
  return bits_to_float(float_to_bits(scaled) | sign);
}

// Round to nearest even, overflow to infinity.
HDROPS_HD float16 to_float16(float value) {
  uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below the smallest normal number: let a float addition do the rounding
    uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    return {uint16_t(sign | rounded)};
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u;
  return {uint16_t(sign | rounded >> 13)};
}

}  // namespace hdrops

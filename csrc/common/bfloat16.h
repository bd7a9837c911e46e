// bfloat16 as the upper half of a float, rounded to the nearest, ties to even.
#pragma once

#include "common/common.h"

namespace fastvar {

FASTVAR_HOST_DEVICE inline float from_bfloat16(uint16_t bits) { return __builtin_bit_cast(float, uint32_t(bits) << 16); }

FASTVAR_HOST_DEVICE inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);  // NaN or a number
}

}  // namespace fastvar

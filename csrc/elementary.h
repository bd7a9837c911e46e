// exp and log(1 + x) in float32, written so that compilers vectorise them and every processor gives the same bits.
// Both are Taylor series after a reduction of the argument, with the remainder below half a rounding.
#pragma once

#include <bit>

#include "common.h"

namespace fastvar {

// e^x; infinity above 128 ln 2, the smallest normal number below -126 ln 2, NaN for NaN.
inline __attribute__((always_inline)) float exponential(float x) {
  const float bounded = x > 88.8f ? 88.8f : (x < -87.3f ? -87.3f : x);
  // Adding 1.5 2^23 rounds to a whole number, which the low bits of the sum then hold.
  const float shifted = bounded * 0x1.715476p+0f + 0x1.8p23f;
  const float power = shifted - 0x1.8p23f;
  const float r = (bounded - power * 0x1.62ep-1f) - power * 0x1.0bfbe8p-15f;  // |r| <= ln 2 / 2; ln 2 in two parts
  float sum = 1.f / 5040;
  sum = sum * r + 1.f / 720;
  sum = sum * r + 1.f / 120;
  sum = sum * r + 1.f / 24;
  sum = sum * r + 1.f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r * r + r + 1;
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0x1.8p23f) + 127;
  return sum * std::bit_cast<float>(exponent << 23);
}

// log(1 + x) for x from 0 to 1, as 2 artanh(x / (2 + x)). Below 2^-25 that is x; its square would be denormal, and
// slow.
inline __attribute__((always_inline)) float log_of_one_plus(float x) {
  const float bounded = x < 0x1p-25f ? 0x1p-25f : x;
  const float s = bounded / (2 + bounded), square = s * s;  // s <= 1/3
  float sum = 2.f / 15;
  sum = sum * square + 2.f / 13;
  sum = sum * square + 2.f / 11;
  sum = sum * square + 2.f / 9;
  sum = sum * square + 2.f / 7;
  sum = sum * square + 2.f / 5;
  sum = sum * square + 2.f / 3;
  return x < 0x1p-25f ? x : sum * square * s + 2 * s;
}

// log(1 / (1 + e^-x))
inline __attribute__((always_inline)) float log_sigmoid(float x) {
  const float size = x < 0 ? -x : x;
  return (x < 0 ? x : 0) - log_of_one_plus(exponential(-size));
}

}  // namespace fastvar

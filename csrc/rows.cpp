// float32 from and to bfloat16 and float16, by their bits: compilers vectorise that for every processor.

#include "rows.h"

namespace fastvar::rows {
namespace {

// Without branches, or loops over it would not be vectorised.
FASTVAR_HOST_DEVICE inline uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = -static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

FASTVAR_HOST_DEVICE inline float from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, bits = uint32_t(half & 0x7fff) << 13;
  const uint32_t normal = bits + (112u << 23);   // the biases of the exponents differ by 112
  const uint32_t special = bits + (224u << 23);  // infinity or NaN
  // With the exponent of the smallest normal number it has a hidden bit too many.
  const float small = std::bit_cast<float>(bits + (113u << 23)) - std::bit_cast<float>(113u << 23);
  const uint32_t finite = choose(bits < (1u << 23), std::bit_cast<uint32_t>(small), normal);
  return std::bit_cast<float>(sign | choose(bits < (31u << 23), finite, special));
}

FASTVAR_HOST_DEVICE inline uint16_t to_half(float value) {
  const uint32_t all = std::bit_cast<uint32_t>(value), sign = all >> 16 & 0x8000, bits = all & 0x7fffffff;
  // A number below 2^-14, when a half is added to it, is rounded to a multiple of the smallest float16.
  const float shifted = std::bit_cast<float>(choose(bits < (113u << 23), bits, 0)) + 0.5f;
  const uint32_t small = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  const uint32_t large = choose(bits > 0x7f800000, 0x7e00, 0x7c00);  // NaN or infinity
  const uint32_t most = choose(bits < (143u << 23), normal, large);
  return static_cast<uint16_t>(sign | choose(bits < (113u << 23), small, most));
}

FASTVAR_CLONES void widen_bfloat16(const uint16_t* from, int64_t count, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(from[i]);
}

FASTVAR_CLONES void widen_half(const uint16_t* from, int64_t count, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_half(from[i]);
}

FASTVAR_CLONES void narrow_to_bfloat16(const float* from, int64_t count, uint16_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(from[i]);
}

FASTVAR_CLONES void narrow_to_half(const float* from, int64_t count, uint16_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_half(from[i]);
}

FASTVAR_CLONES void add(const float* values, int64_t count, float* __restrict sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += values[i];
}

}  // namespace

void widen(ScalarType dtype, const void* from, int64_t stride, int64_t count, float* to) {
  const auto each = [&](const auto* elements, const auto& convert) {
    for (int64_t i = 0; i < count; ++i) to[i] = convert(elements[i * stride]);
  };
  const auto* bits = static_cast<const uint16_t*>(from);
  if (dtype == ScalarType::Double) {
    each(static_cast<const double*>(from), [](double x) { return static_cast<float>(x); });
  } else if (dtype == ScalarType::Float) {
    each(static_cast<const float*>(from), [](float x) { return x; });
  } else if (dtype == ScalarType::BFloat16) {
    stride == 1 ? widen_bfloat16(bits, count, to) : each(bits, [](uint16_t x) { return from_bfloat16(x); });
  } else {
    stride == 1 ? widen_half(bits, count, to) : each(bits, [](uint16_t x) { return from_half(x); });
  }
}

void narrow(ScalarType dtype, const float* from, int64_t count, void* to, int64_t stride) {
  const auto each = [&](auto* elements, const auto& convert) {
    for (int64_t i = 0; i < count; ++i) elements[i * stride] = convert(from[i]);
  };
  auto* bits = static_cast<uint16_t*>(to);
  if (dtype == ScalarType::Double) {
    each(static_cast<double*>(to), [](float x) { return static_cast<double>(x); });
  } else if (dtype == ScalarType::Float) {
    stride == 1 ? static_cast<void>(std::copy_n(from, count, static_cast<float*>(to)))
                : each(static_cast<float*>(to), [](float x) { return x; });
  } else if (dtype == ScalarType::BFloat16) {
    stride == 1 ? narrow_to_bfloat16(from, count, bits) : each(bits, [](float x) { return to_bfloat16(x); });
  } else {
    stride == 1 ? narrow_to_half(from, count, bits) : each(bits, [](float x) { return to_half(x); });
  }
}

void add_in_pairs(float* first, int64_t parts, int64_t count) {
  for (int64_t step = 1; step < parts; step *= 2) {
    for (int64_t i = 0; i + step < parts; i += 2 * step) add(first + (i + step) * count, count, first + i * count);
  }
}

}  // namespace fastvar::rows

// Taps and weights of one axis of an image that is brought to another size, as torch.nn.functional.interpolate has
// them in float32: "area", and "bilinear" and "bicubic" with align_corners False and no antialiasing.
//
// All sizes are at least 1. Taps lie inside the axis for any output index from 0 to out - 1.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/common.h"

namespace fastvar {

// The input cells first to end - 1. Their mean is the output of "area".
struct Bin {
  int32_t first, end;
};

// N input cells and what each counts; a cell may appear more than once.
template <int N>
struct Taps {
  int32_t index[N];
  float weight[N];
};

// Output i of "area": floor(i in / out) to ceil((i + 1) in / out). Bins overlap where out does not divide in.
FASTVAR_HOST_DEVICE inline Bin area_bin(int32_t i, int32_t in, int32_t out) {
  const int64_t start = int64_t(i) * in;
  return {int32_t(start / out), int32_t((start + in + out - 1) / out)};
}

// The place of output i in the input, in cells.
FASTVAR_HOST_DEVICE inline float source_place(int32_t i, int32_t in, int32_t out) {
  const float scale = float(in) / float(out);
  return scale * (float(i) + 0.5f) - 0.5f;
}

FASTVAR_HOST_DEVICE inline int32_t clamped(int32_t index, int32_t size) {
  return index < 0 ? 0 : index < size ? index : size - 1;
}

FASTVAR_HOST_DEVICE inline Taps<2> linear_taps(int32_t i, int32_t in, int32_t out) {
  if (in == out) return {{i, i}, {1.0f, 0.0f}};
  float place = source_place(i, in, out);
  place = place > 0.0f ? place : 0.0f;
  const int32_t first = clamped(int32_t(place), in);
  const float rest = place - float(first);
  const float weight = rest < 1.0f ? rest : 1.0f;
  return {{first, first + 1 < in ? first + 1 : first}, {1.0f - weight, weight}};
}

// Keys' kernel with a = -0.75, at a distance of at most 1, and of 1 to 2.
FASTVAR_HOST_DEVICE inline float cubic_near(float x) {
  constexpr float a = -0.75f;
  return ((a + 2.0f) * x - (a + 3.0f)) * x * x + 1.0f;
}

FASTVAR_HOST_DEVICE inline float cubic_far(float x) {
  constexpr float a = -0.75f;
  return ((a * x - 5.0f * a) * x + 8.0f * a) * x - 4.0f * a;
}

FASTVAR_HOST_DEVICE inline Taps<4> cubic_taps(int32_t i, int32_t in, int32_t out) {
  if (in == out) return {{i, i, i, i}, {0.0f, 1.0f, 0.0f, 0.0f}};
  const float place = source_place(i, in, out);
  const int32_t first = int32_t(std::floor(place));  // may be -1, whose cell is that of 0
  const float t = place - float(first);
  Taps<4> taps;
  for (int32_t j = 0; j < 4; ++j) taps.index[j] = clamped(first - 1 + j, in);
  taps.weight[0] = cubic_far(t + 1.0f);
  taps.weight[1] = cubic_near(t);
  taps.weight[2] = cubic_near(1.0f - t);
  taps.weight[3] = cubic_far(2.0f - t);
  return taps;
}

}  // namespace fastvar

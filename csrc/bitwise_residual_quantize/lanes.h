// The values of one cell of an image: of one channel (float) or of eight at a time (Eight, on a CPU).
//
// The phases of planes.h are templates over these two. A group is `channels` adjacent channels of one image, at
// most as many as there are lanes; spare lanes hold zeros on the way in and are left out on the way out.
#pragma once

#include <cstring>

#include "common/common.h"
#include "common/philox.h"

#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
#endif

namespace fastvar::bitwise {

FASTVAR_HOST_DEVICE inline bool positive(float value) { return value > 0.0f; }

FASTVAR_HOST_DEVICE inline bool below(float value, float bound) { return value < bound; }

// size where the bit is 1, -size where it is 0.
FASTVAR_HOST_DEVICE inline float signed_size(bool bit, float size) { return bit ? size : -size; }

FASTVAR_HOST_DEVICE inline void put(float value, float* out, int32_t) { *out = value; }

FASTVAR_HOST_DEVICE inline void put(bool bit, uint8_t* out, int32_t) { *out = bit; }

FASTVAR_HOST_DEVICE inline void get(const uint8_t* bits, int32_t, bool& out) { out = *bits != 0; }

// The uniform number of a counter; of eight counters in a row for eight lanes.
FASTVAR_HOST_DEVICE inline void draw(int64_t seed, int64_t stream, int64_t counter, float& out) {
  out = uniform(seed, stream, counter);
}

template <typename V>
struct BitsOf {
  using type = bool;
};

// Planes (channels, cells) to cells and back, shared out over the team.
template <typename Team>
FASTVAR_HOST_DEVICE inline void load_planes(const Team& team, const float* planes, int32_t cells, int32_t, float* out) {
  for (int32_t i = team.rank(); i < cells; i += team.size()) out[i] = planes[i];
}

template <typename Team>
FASTVAR_HOST_DEVICE inline void store_planes(const Team& team, const float* in, int32_t cells, int32_t, float* planes) {
  for (int32_t i = team.rank(); i < cells; i += team.size()) planes[i] = in[i];
}

#if defined(__GNUC__) && !defined(__CUDACC__)

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightBits __attribute__((vector_size(32)));  // each 0 or -1
typedef uint8_t EightBytes __attribute__((vector_size(8)));

template <>
struct BitsOf<Eight> {
  using type = EightBits;
};

FASTVAR_HOST_DEVICE inline EightBits positive(const Eight& value) { return value > 0.0f; }

FASTVAR_HOST_DEVICE inline EightBits below(const Eight& value, float bound) { return value < bound; }

FASTVAR_HOST_DEVICE inline Eight signed_size(const EightBits& bits, float size) {
  const Eight plus = Eight{} + size;
  return bits ? plus : -plus;
}

FASTVAR_HOST_DEVICE inline void put(const Eight& value, float* out, int32_t channels) {
  if (channels == 8) {
    std::memcpy(out, &value, sizeof value);
  } else {
    for (int32_t i = 0; i < channels; ++i) out[i] = value[i];
  }
}

FASTVAR_HOST_DEVICE inline void put(const EightBits& bits, uint8_t* out, int32_t channels) {
  const EightBytes bytes = __builtin_convertvector(bits & 1, EightBytes);
  if (channels == 8) {
    std::memcpy(out, &bytes, sizeof bytes);
  } else {
    for (int32_t i = 0; i < channels; ++i) out[i] = bytes[i];
  }
}

FASTVAR_HOST_DEVICE inline void get(const uint8_t* bits, int32_t channels, EightBits& out) {
  EightBytes bytes{};
  if (channels == 8) {
    std::memcpy(&bytes, bits, sizeof bytes);
  } else {
    for (int32_t i = 0; i < channels; ++i) bytes[i] = bits[i];
  }
  out = __builtin_convertvector(bytes, EightBits) != 0;
}

FASTVAR_HOST_DEVICE inline void draw(int64_t seed, int64_t stream, int64_t counter, Eight& out) {
  float numbers[8];
  for (int32_t i = 0; i < 8; ++i) numbers[i] = uniform(seed, stream, counter + i);
  std::memcpy(&out, numbers, sizeof out);
}

// Exchanges the off-diagonal blocks of S x S in each block of 2 S x 2 S.
template <int S>
FASTVAR_HOST_DEVICE inline void swap_blocks(Eight (&rows)[8]) {
  EightBits upper, lower;
  for (int32_t i = 0; i < 8; ++i) {
    upper[i] = i & S ? 8 + i - S : i;
    lower[i] = i & S ? 8 + i : i + S;
  }
  for (int32_t i = 0; i < 8; ++i) {
    if (i & S) continue;
    const Eight a = rows[i], b = rows[i + S];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + S] = __builtin_shuffle(a, b, lower);
  }
}

FASTVAR_HOST_DEVICE inline void transpose(Eight (&rows)[8]) {
  swap_blocks<4>(rows);
  swap_blocks<2>(rows);
  swap_blocks<1>(rows);
}

// For a team of one.
template <typename Team>
FASTVAR_HOST_DEVICE inline void load_planes(const Team&, const float* planes, int32_t cells, int32_t channels,
                                            Eight* out) {
  int32_t i = 0;
  for (; i + 8 <= cells; i += 8) {
    Eight rows[8] = {};
    for (int32_t c = 0; c < channels; ++c) std::memcpy(&rows[c], planes + int64_t(c) * cells + i, sizeof(Eight));
    transpose(rows);
    for (int32_t j = 0; j < 8; ++j) out[i + j] = rows[j];
  }
  for (; i < cells; ++i) {
    Eight value{};
    for (int32_t c = 0; c < channels; ++c) value[c] = planes[int64_t(c) * cells + i];
    out[i] = value;
  }
}

template <typename Team>
FASTVAR_HOST_DEVICE inline void store_planes(const Team&, const Eight* in, int32_t cells, int32_t channels,
                                             float* planes) {
  int32_t i = 0;
  for (; i + 8 <= cells; i += 8) {
    Eight rows[8];
    for (int32_t j = 0; j < 8; ++j) rows[j] = in[i + j];
    transpose(rows);
    for (int32_t c = 0; c < channels; ++c) std::memcpy(planes + int64_t(c) * cells + i, &rows[c], sizeof(Eight));
  }
  for (; i < cells; ++i) {
    for (int32_t c = 0; c < channels; ++c) planes[int64_t(c) * cells + i] = in[i][c];
  }
}

#endif

}  // namespace fastvar::bitwise

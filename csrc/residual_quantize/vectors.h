// Vectors of the processors that a build is for, see LEVELS in fastvar/build.py.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastvar::vectors {

// Floats of a vector; rows of the distance search and pixels of a convolution that are in registers at a time.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6, PIXELS = 8;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 3, PIXELS = 4;
#else
constexpr int LANES = 4, ROWS = 2, PIXELS = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// a b + c; whether a lane of v is not above the limit's, as no NaN is.
#if defined(__AVX512F__)
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline bool any_within(Vector v, Vector limit) { return _mm512_cmp_ps_mask(v, limit, _CMP_NGT_UQ) != 0; }
#elif defined(__AVX2__)
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline bool any_within(Vector v, Vector limit) { return _mm256_movemask_ps(_mm256_cmp_ps(v, limit, _CMP_NGT_UQ)) != 0; }
#else
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
inline bool any_within(Vector v, Vector limit) {
  const auto above = v > limit;
  return !(above[0] && above[1] && above[2] && above[3]);
}
#endif

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline Vector all(float value) { return value - Vector{}; }
inline Vector smaller(Vector a, Vector b) { return a < b ? a : b; }  // b if one is NaN

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

// Four columns of four rows, `stride` apart, to rows `apart`.
inline void transpose_four(const float* from, int64_t stride, float* to, int64_t apart) {
  const auto at = [&](int i) { return *reinterpret_cast<const Four*>(from + i * stride); };
  const Four a = __builtin_shufflevector(at(0), at(1), 0, 4, 1, 5),
             b = __builtin_shufflevector(at(2), at(3), 0, 4, 1, 5);
  const Four c = __builtin_shufflevector(at(0), at(1), 2, 6, 3, 7),
             d = __builtin_shufflevector(at(2), at(3), 2, 6, 3, 7);
  *reinterpret_cast<Four*>(to) = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to + apart) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  *reinterpret_cast<Four*>(to + 2 * apart) = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to + 3 * apart) = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// (rows, columns), rows `stride` apart, to (columns, rows), columns `apart`. In squares, so that lines of the cache are
// used whole on both sides.
inline void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to, int64_t apart) {
  constexpr int64_t SIDE = 16;
  for (int64_t r = 0; r < rows; r += SIDE)
    for (int64_t c = 0; c < columns; c += SIDE) {
      const int64_t last = std::min(r + SIDE, rows), end = std::min(c + SIDE, columns);
      const int64_t fours = r + (last - r) / 4 * 4, full = c + (end - c) / 4 * 4;
      for (int64_t y = r; y < fours; y += 4)
        for (int64_t x = c; x < full; x += 4) transpose_four(from + y * stride + x, stride, to + x * apart + y, apart);
      for (int64_t x = c; x < end; ++x)
        for (int64_t y = x < full ? fours : r; y < last; ++y) to[x * apart + y] = from[y * stride + x];
    }
}

}  // namespace fastvar::vectors

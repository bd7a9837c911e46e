// Products of tiles of bfloat16 numbers, summed in float32: by a warp on a GPU's matrix units. In tests on a CPU one
// thread does the work of a warp, with the same layout of all memory.
#pragma once

#include "common/bfloat16.h"
#include "common/team.h"

namespace fastvar {

constexpr int32_t TILE_ROWS = 16, TILE_COLUMNS = 8;
constexpr int32_t TILE_DEPTH = 32;  // numbers of each row and column that one product takes

// Where a number of a row is in a tile of rows: what a lane gives the units at a time lies side by side. Numbers 2 k and
// 2 k + 1 are neighbours.
FASTVAR_HOST_DEVICE inline int32_t row_place(int32_t row, int32_t k) {
  const int32_t lane = row % 8 * 4 + k / 8;
  return (k / 4 % 2 * 32 + lane) * 8 + k / 2 % 2 * 4 + row / 8 * 2 + k % 2;
}

#if defined(__CUDACC__)

// Of a tile of results a lane has some columns of some rows.
constexpr int32_t OWN_ROWS = 2, OWN_COLUMNS = 2;

FASTVAR_HOST_DEVICE inline int32_t own_row(int32_t lane, int32_t r) { return lane / 4 + 8 * r; }
FASTVAR_HOST_DEVICE inline int32_t own_column(int32_t lane, int32_t c) { return lane % 4 * 2 + c; }

struct alignas(16) Words {
  uint32_t at[4];
};

// Lane l has eight numbers, from 8 (l % 4) on, of the rows l / 4 and l / 4 + 8, and of the column l / 4. The units take
// these numbers in another order, the same for rows and columns: the sum is over all of them.
struct RowTile {
  Words halves[2];  // as the units take them
};
using ColumnTile = Words;

// Of rows where row_place says, and of columns (TILE_COLUMNS, TILE_DEPTH).
FASTVAR_HOST_DEVICE inline RowTile load_rows(const uint16_t* rows, int32_t lane) {
  const auto* at = reinterpret_cast<const Words*>(rows) + lane;
  return {at[0], at[WARP]};
}

// The columns lie in global memory, and nobody writes to them meanwhile.
FASTVAR_HOST_DEVICE inline ColumnTile load_columns(const uint16_t* columns, int32_t lane) {
  const uint16_t* at = columns + lane / 4 * TILE_DEPTH + lane % 4 * 8;
#if defined(__CUDA_ARCH__)
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(at));
  return {{words.x, words.y, words.z, words.w}};
#else
  return *reinterpret_cast<const Words*>(at);
#endif
}

// Numbers in float32, one for each column.
FASTVAR_HOST_DEVICE inline void load_of_columns(const float* numbers, int32_t lane, float (&own)[OWN_COLUMNS]) {
#if defined(__CUDA_ARCH__)
  const float2 both = __ldg(reinterpret_cast<const float2*>(numbers + own_column(lane, 0)));
  own[0] = both.x;
  own[1] = both.y;
#endif
}

FASTVAR_HOST_DEVICE inline void multiply(const RowTile& rows, const ColumnTile& columns,
                                         float (&sums)[OWN_ROWS][OWN_COLUMNS]) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int32_t half = 0; half < 2; ++half)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0][0]), "+f"(sums[0][1]), "+f"(sums[1][0]), "+f"(sums[1][1])
        : "r"(rows.halves[half].at[0]), "r"(rows.halves[half].at[1]), "r"(rows.halves[half].at[2]),
          "r"(rows.halves[half].at[3]), "r"(columns.at[2 * half]), "r"(columns.at[2 * half + 1]));
#endif
}

// Before a product that follows on what lanes did apart.
FASTVAR_HOST_DEVICE inline void meet() {
#if defined(__CUDA_ARCH__)
  __syncwarp();
#endif
}

// The smallest of a row's numbers that the lanes hold; every one of them gets it.
FASTVAR_HOST_DEVICE inline float lowest_of_row(float value) {
#if defined(__CUDA_ARCH__)
  value = fminf(value, __shfl_xor_sync(0xffffffff, value, 1));
  value = fminf(value, __shfl_xor_sync(0xffffffff, value, 2));
#endif
  return value;
}

#else

constexpr int32_t OWN_ROWS = TILE_ROWS, OWN_COLUMNS = TILE_COLUMNS;

inline int32_t own_row(int32_t, int32_t r) { return r; }
inline int32_t own_column(int32_t, int32_t c) { return c; }

using RowTile = const uint16_t*;
using ColumnTile = const uint16_t*;

inline RowTile load_rows(const uint16_t* rows, int32_t) { return rows; }
inline ColumnTile load_columns(const uint16_t* columns, int32_t) { return columns; }

inline void load_of_columns(const float* numbers, int32_t, float (&own)[OWN_COLUMNS]) {
  for (int32_t c = 0; c < OWN_COLUMNS; ++c) own[c] = numbers[c];
}

inline void multiply(RowTile rows, ColumnTile columns, float (&sums)[OWN_ROWS][OWN_COLUMNS]) {
  for (int32_t r = 0; r < OWN_ROWS; ++r)
    for (int32_t c = 0; c < OWN_COLUMNS; ++c)
      for (int32_t k = 0; k < TILE_DEPTH; ++k)
        sums[r][c] += from_bfloat16(rows[row_place(r, k)]) * from_bfloat16(columns[c * TILE_DEPTH + k]);
}

inline void meet() {}

inline float lowest_of_row(float value) { return value; }

#endif

}  // namespace fastvar

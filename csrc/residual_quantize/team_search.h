// The search of residual_quantize as a CUDA block does it; see team.h.
//
// Distances are |c|^2 - 2 x.c, or minus the cosine. A screen finds them from x and c in bfloat16, with a bound on its
// error; what may be the nearest by that bound is computed again in float32. Codes that are equally near there leave
// the lowest index.
#pragma once

#include <cmath>

#include "residual_quantize/matrix_tiles.h"
#include "common/team.h"
#include "residual_quantize/tokenizer.h"

#if defined(__CUDACC__)
#include <cuda_pipeline.h>
#else
#include <vector>
#endif

namespace fastvar::quantize {

constexpr int32_t GROUP = 4;                         // tiles of rows of a warp
constexpr int32_t WIDE = 4;                          // tiles of codes that a warp has at a time
constexpr int32_t BLOCK_CODES = WIDE * TILE_COLUMNS;
constexpr int32_t LEAST_QUEUE = 1024;                // candidates that there is room for at least

// Numbers in bfloat16 that are written at once.
struct alignas(16) Halves {
  static constexpr int32_t COUNT = 8;
  uint16_t at[COUNT];
};

struct alignas(4) TwoHalves {
  uint16_t at[2];
};

// Four floats that are read at once; their place is a multiple of four.
struct alignas(16) Four {
  float at[4];
};

FASTVAR_HOST_DEVICE inline Four four(const float* from) { return *reinterpret_cast<const Four*>(from); }

FASTVAR_HOST_DEVICE inline int64_t round_up(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }
FASTVAR_HOST_DEVICE inline int64_t round_to_fours(int64_t floats) { return round_up(floats, 4); }

// A copy of a float or Four that a CUDA block goes on without. On a CPU nothing is copied before somebody waits.
#if defined(__CUDACC__)

template <typename T>
FASTVAR_HOST_DEVICE inline void copy_later(T* to, const T* from) {
#if defined(__CUDA_ARCH__)
  __pipeline_memcpy_async(to, from, sizeof(T));
#endif
}

// Until this member's copies are done.
FASTVAR_HOST_DEVICE inline void finish_copies() {
#if defined(__CUDA_ARCH__)
  __pipeline_commit();
  __pipeline_wait_prior(0);
#endif
}

#else

struct Copy {
  float* to;
  const float* from;
  size_t floats;
};

inline std::vector<Copy>& copies_of_thread() {
  thread_local std::vector<Copy> copies;
  return copies;
}

template <typename T>
inline void copy_later(T* to, const T* from) {
  copies_of_thread().push_back(
      {reinterpret_cast<float*>(to), reinterpret_cast<const float*>(from), sizeof(T) / sizeof(float)});
}

inline void finish_copies() {
  for (const Copy& copy : copies_of_thread())
    for (size_t i = 0; i < copy.floats; ++i) copy.to[i] = copy.from[i];
  copies_of_thread().clear();
}

#endif

// Whether rows of so many floats that begin here can be read in fours.
FASTVAR_HOST_DEVICE inline bool in_fours(const float* rows, int32_t floats) {
  return floats % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(Four) == 0;
}

// The codes as the search takes them; `pack` makes them.
struct Codes {
  int32_t count, channels;
  bool cosine;
  int32_t packs;        // blocks that pack
  const float* exact;   // (V, C), the codebook, or its directions for cosines
  float* directions;    // the same for cosines
  uint16_t* halves;     // (chunks, V', TILE_DEPTH): those in bfloat16; zeros where there is none
  float* norms;         // (V',): what is added to x.c; NaN for a code that is never taken
  uint32_t* bounds;     // (packs, 2) floats: the longest code, and the largest distance of a code from its bfloat16

  FASTVAR_HOST_DEVICE inline int64_t padded() const { return round_up(count, BLOCK_CODES); }
  FASTVAR_HOST_DEVICE inline int32_t chunks() const { return (channels + TILE_DEPTH - 1) / TILE_DEPTH; }

  // Floats of the memory that they need, and the codes with their parts in it.
  static int64_t floats(const Tokenizer& tokenizer, bool cosine, int32_t packs) {
    const Codes codes{int32_t(tokenizer.vocabulary), int32_t(tokenizer.channels), cosine, packs};
    return codes.padded() * (codes.chunks() * (TILE_DEPTH / 2) + 1) + 2 * packs +
           (cosine ? tokenizer.vocabulary * tokenizer.channels : 0);
  }
  static Codes in(float* memory, const Tokenizer& tokenizer, bool cosine, int32_t packs) {
    Codes codes{int32_t(tokenizer.vocabulary), int32_t(tokenizer.channels), cosine, packs};
    codes.halves = reinterpret_cast<uint16_t*>(memory);
    codes.norms = memory + codes.padded() * codes.chunks() * (TILE_DEPTH / 2);
    codes.directions = codes.norms + codes.padded();
    codes.exact = cosine ? codes.directions : tokenizer.codebook;
    codes.bounds = reinterpret_cast<uint32_t*>(
        codes.directions + (cosine ? tokenizer.vocabulary * tokenizer.channels : 0));
    return codes;
  }
};

// Some of the codes, by one of `packs` blocks. `floats` is room for two.
template <typename Team>
FASTVAR_HOST_DEVICE inline void pack(const Team& team, const Tokenizer& tokenizer, const Codes& codes, int32_t block,
                                     float* floats) {
  auto* bounds = reinterpret_cast<uint32_t*>(floats);  // floats from 0 on are in the order of their bits
  for (int32_t i = team.rank(); i < 2; i += team.size()) bounds[i] = 0;
  team.sync();
  const int32_t channels = codes.channels;
  const int64_t padded = codes.padded(), step = int64_t(codes.packs) * team.size();
  for (int64_t code = int64_t(block) * team.size() + team.rank(); code < padded; code += step) {
    const float* from = tokenizer.codebook + code * channels;
    float square = 0, divisor = 1;
    if (code < codes.count) {
      for (int32_t c = 0; c < channels; ++c) square = multiply_add(from[c], from[c], square);
      const float length = std::sqrt(square);
      if (codes.cosine) divisor = length < 1e-12f ? 1e-12f : length;
    }
    // NaN where a number of the code, or its squared length, is not finite
    float norm = code < codes.count ? (codes.cosine ? 0 : square + 0 * square) : NAN;
    for (int32_t c = 0; code < codes.count && c < channels; ++c) norm += 0 * (from[c] / divisor);
    const bool there = norm == norm;
    codes.norms[code] = norm;
    float longest = 0, farthest = 0;
    for (int32_t start = 0; start < codes.chunks() * TILE_DEPTH; start += Halves::COUNT) {
      Halves halves;
#pragma unroll
      for (int32_t j = 0; j < Halves::COUNT; ++j) {
        const int32_t c = start + j;
        const bool inside = code < codes.count && c < channels;
        const float value = inside ? from[c] / divisor : 0;
        if (codes.cosine && inside) codes.directions[code * channels + c] = value;
        halves.at[j] = there ? to_bfloat16(value) : 0;
        const float wrong = value - from_bfloat16(halves.at[j]);
        longest += value * value;
        farthest += wrong * wrong;
      }
      const int64_t place = (start / TILE_DEPTH * padded + code) * TILE_DEPTH + start % TILE_DEPTH;
      *reinterpret_cast<Halves*>(codes.halves + place) = halves;
    }
    if (!there) continue;
    raise(bounds, __builtin_bit_cast(uint32_t, std::sqrt(longest)));
    raise(bounds + 1, __builtin_bit_cast(uint32_t, std::sqrt(farthest)));
  }
  team.sync();
  for (int32_t i = team.rank(); i < 2; i += team.size()) codes.bounds[2 * block + i] = bounds[i];
}

// Floats of the memory of one row of a search, in units of TILE_ROWS rows.
FASTVAR_HOST_DEVICE inline int32_t row_stride(int32_t channels) { return int32_t(round_to_fours(channels)) + 4; }

FASTVAR_HOST_DEVICE inline int32_t row_floats(int32_t channels) {
  return row_stride(channels) + int32_t(round_up(channels, TILE_DEPTH)) / 2 + 2;
}

// Rows of a search: -2 times the means, or minus their directions.
struct Rows {
  int32_t count, stride, padded;
  float* exact;        // (padded, stride)
  uint16_t* halves;    // (chunks, padded / TILE_ROWS, TILE_ROWS, TILE_DEPTH), see row_place
  float* bands;        // (padded,): what is farther than the nearest by more is not the nearest; NaN: nothing is
  uint32_t* lows;      // (padded,): the nearest of the screen, ordered
  uint64_t* keys;      // (padded,): the nearest: its distance, ordered, and its code
  uint32_t* candidates;  // how many there are

  FASTVAR_HOST_DEVICE inline Rows(const Codes& codes, int32_t count, float* memory, uint64_t* keys,
                                  uint32_t* candidates)
      : count(count),
        stride(row_stride(codes.channels)),
        padded(int32_t(round_up(count, TILE_ROWS))),
        exact(memory),
        halves(reinterpret_cast<uint16_t*>(memory + int64_t(padded) * stride)),
        bands(memory + int64_t(padded) * (stride + codes.chunks() * (TILE_DEPTH / 2))),
        lows(reinterpret_cast<uint32_t*>(bands + padded)),
        keys(keys),
        candidates(candidates) {}
};

constexpr uint32_t ALL = 0;  // among `lows`, for a row whose candidates are all codes: as a limit it is not a number

FASTVAR_HOST_DEVICE inline uint64_t key_of(float distance, int32_t code) {
  return uint64_t(to_ordered(distance)) << 32 | uint32_t(code);
}

// The longest code and the largest error, from all that packed, for `prepare`.
template <typename Team>
FASTVAR_HOST_DEVICE inline void gather_bounds(const Team& team, const Codes& codes, uint32_t* bounds) {
  for (int32_t i = team.rank(); i < 2; i += team.size()) bounds[i] = 0;
  team.sync();
  for (int32_t i = team.rank(); i < 2 * codes.packs; i += team.size()) raise(bounds + i % 2, codes.bounds[i]);
  team.sync();
}

// From -2 times the means to all else that a search has of its rows.
template <typename Team>
FASTVAR_HOST_DEVICE inline void prepare(const Team& team, const Codes& codes, const uint32_t* bounds,
                                        const Rows& rows) {
  const int32_t channels = codes.channels;
  for (int32_t i = team.rank(); i < rows.padded; i += team.size()) {
    float* x = rows.exact + int64_t(i) * rows.stride;
    float square = 0;
    for (int32_t c = 0; i < rows.count && c < channels; ++c) square = multiply_add(x[c], x[c], square);
    if (codes.cosine && i < rows.count) {
      const float length = std::sqrt(square), divisor = length < 2e-12f ? 2e-12f : length;
      square = 0;
      for (int32_t c = 0; c < channels; ++c) {
        x[c] /= divisor;
        square += x[c] * x[c];
      }
    }
    // |x.c - x'.c'| <= |x - x'| |c| + |x'| |c - c'|. All sums together, those of the matrix units with their cut ends,
    // are wrong by less than 4 C + 32 times 2^-22 of |c|^2 + |x| |c|. Squares may vanish: lengths are taken a little
    // longer than they are.
    const float margin = 1.001f, least = 1e-17f;
    const float length = std::sqrt(square) * margin + least;
    const float longest = __builtin_bit_cast(float, bounds[0]) * margin + least;
    const float farthest = __builtin_bit_cast(float, bounds[1]) * margin + least;
    // past these lengths all codes are candidates, as their distances from x' = 0 are within an infinite band
    const bool screened = i < rows.count && length < 0x1p60f && longest < 0x1p60f;
    float rounding = 0;
    for (int32_t start = 0; start < codes.chunks() * TILE_DEPTH; start += Halves::COUNT) {
      Halves halves;
#pragma unroll
      for (int32_t j = 0; j < Halves::COUNT; ++j) {
        const float value = screened && start + j < channels ? x[start + j] : 0;
        halves.at[j] = to_bfloat16(value);
        const float wrong = value - from_bfloat16(halves.at[j]);
        rounding += wrong * wrong;
      }
      const int64_t tile = (int64_t(start / TILE_DEPTH) * rows.padded + i / TILE_ROWS * TILE_ROWS) * TILE_DEPTH;
#pragma unroll
      for (int32_t j = 0; j < Halves::COUNT; j += 2)
        *reinterpret_cast<TwoHalves*>(rows.halves + tile + row_place(i % TILE_ROWS, start % TILE_DEPTH + j)) = {
            halves.at[j], halves.at[j + 1]};
    }
    const float wrong = std::sqrt(rounding) * margin + least;
    const float roundings = float(4 * codes.chunks() * TILE_DEPTH + 32) * 0x1p-22f * longest * (longest + length);
    const float band = 2 * margin * (wrong * longest + (length + wrong) * farthest + roundings);
    const bool number = i < rows.count && length == length;
    rows.bands[i] = !number ? NAN : screened ? band : INFINITY;
    rows.lows[i] = to_ordered(INFINITY);
    rows.keys[i] = key_of(INFINITY, 0);
  }
  for (int32_t i = team.rank(); i < 1; i += team.size()) *rows.candidates = 0;
  team.sync();
}

// The screen over this part's codes: state = begin(row) for each of a warp's rows, then, for all distances of a row,
// each(state, row, distances, first code of them), then end(row, state). A state that is not HELD begins anew for each
// block of codes and has no end: all tiles are then one loop, so that the code of a long `each` stays in the cache.
template <bool HELD, typename Team, typename Begin, typename Each, typename End>
FASTVAR_HOST_DEVICE inline void screen(const Team& team, const Codes& codes, const Rows& rows, const Begin& begin,
                                       const Each& each, const End& end) {
  const int32_t warps = team.size() / WARP, lane = team.rank() % WARP, chunks = codes.chunks();
  const int32_t tiles = rows.padded / TILE_ROWS, groups = (tiles + GROUP - 1) / GROUP;
  const int32_t shares = warps > groups ? warps / groups : 1;  // warps that share the codes for a group of rows
  const int64_t padded = codes.padded();
  const auto blocks = int32_t(padded / BLOCK_CODES), step = shares * team.parts();  // block i is of part i % parts
  const auto load = [&](int32_t block, int32_t chunk, ColumnTile(&columns)[WIDE]) {
#pragma unroll
    for (int32_t w = 0; w < WIDE; ++w)
      columns[w] = load_columns(
          codes.halves + (chunk * padded + int64_t(block) * BLOCK_CODES + w * TILE_COLUMNS) * TILE_DEPTH, lane);
  };
  const auto load_norms = [&](int32_t block, float (&norms)[WIDE][OWN_COLUMNS]) {
#pragma unroll
    for (int32_t w = 0; w < WIDE; ++w)
      load_of_columns(codes.norms + int64_t(block) * BLOCK_CODES + w * TILE_COLUMNS, lane, norms[w]);
  };
  for (int32_t item = team.rank() / WARP; item < groups * shares; item += warps) {
    const int32_t first_tile = item % groups * GROUP, share = item / groups;
    float states[HELD ? GROUP : 1][OWN_ROWS];
    const auto begin_tile = [&](int32_t g, float(&state)[OWN_ROWS]) {
#pragma unroll
      for (int32_t r = 0; r < OWN_ROWS; ++r) state[r] = begin((first_tile + g) * TILE_ROWS + own_row(lane, r));
    };
#pragma unroll
    for (int32_t g = 0; HELD && g < GROUP; ++g)
      if (first_tile + g < tiles) begin_tile(g, states[HELD ? g : 0]);
    int32_t block = team.part() + share * team.parts();
    ColumnTile columns[WIDE];
    float norms[WIDE][OWN_COLUMNS];
    if (block < blocks) {
      load(block, 0, columns);
      load_norms(block, norms);
    }
    for (; block < blocks; block += step) {
      const int32_t next = block + step < blocks ? block + step : block;
      ColumnTile following[WIDE];
      float following_norms[WIDE][OWN_COLUMNS];
      load(next, 0, following);
      load_norms(next, following_norms);
      const auto visit = [&](int32_t g, float(&state)[OWN_ROWS]) {
        if (first_tile + g >= tiles) return;
        if (!HELD) begin_tile(g, state);
        meet();
        float sums[WIDE][OWN_ROWS][OWN_COLUMNS];
#pragma unroll
        for (int32_t w = 0; w < WIDE; ++w)
#pragma unroll
          for (int32_t r = 0; r < OWN_ROWS; ++r)
#pragma unroll
            for (int32_t c = 0; c < OWN_COLUMNS; ++c) sums[w][r][c] = norms[w][c];
        const auto multiply_chunk = [&](int32_t chunk, const ColumnTile(&with)[WIDE]) {
          const RowTile tile =
              load_rows(rows.halves + (int64_t(chunk) * rows.padded + (first_tile + g) * TILE_ROWS) * TILE_DEPTH, lane);
#pragma unroll
          for (int32_t w = 0; w < WIDE; ++w) multiply(tile, with[w], sums[w]);
        };
        multiply_chunk(0, columns);
#pragma unroll 1
        for (int32_t chunk = 1; chunk < chunks; ++chunk) {
          ColumnTile more[WIDE];
          load(block, chunk, more);
          multiply_chunk(chunk, more);
        }
#pragma unroll
        for (int32_t r = 0; r < OWN_ROWS; ++r) {
          float distances[WIDE][OWN_COLUMNS];
#pragma unroll
          for (int32_t w = 0; w < WIDE; ++w)
#pragma unroll
            for (int32_t c = 0; c < OWN_COLUMNS; ++c) distances[w][c] = sums[w][r][c];
          each(state[r], (first_tile + g) * TILE_ROWS + own_row(lane, r), distances, block * BLOCK_CODES);
        }
      };
      if constexpr (HELD) {
#pragma unroll
        for (int32_t g = 0; g < GROUP; ++g) visit(g, states[g]);
      } else {
#pragma unroll 1
        for (int32_t g = 0; g < GROUP; ++g) visit(g, states[0]);
      }
#pragma unroll
      for (int32_t w = 0; w < WIDE; ++w) {
        columns[w] = following[w];
#pragma unroll
        for (int32_t c = 0; c < OWN_COLUMNS; ++c) norms[w][c] = following_norms[w][c];
      }
    }
#pragma unroll
    for (int32_t g = 0; HELD && g < GROUP; ++g)
#pragma unroll
      for (int32_t r = 0; r < OWN_ROWS; ++r)
        if (first_tile + g < tiles) end((first_tile + g) * TILE_ROWS + own_row(lane, r), states[HELD ? g : 0][r]);
  }
}

// x.c + norm in float32, channel by channel.
FASTVAR_HOST_DEVICE inline float distance_of(const Codes& codes, const float* x, int32_t code) {
  const float* exact = codes.exact + int64_t(code) * codes.channels;
  float sum = 0;
  if (in_fours(codes.exact, codes.channels)) {
#pragma unroll 4
    for (int32_t c = 0; c < codes.channels; c += 4) {
      const Four values = four(exact + c), own = four(x + c);
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) sum = multiply_add(own.at[j], values.at[j], sum);
    }
  } else {
    for (int32_t c = 0; c < codes.channels; ++c) sum = multiply_add(x[c], exact[c], sum);
  }
  return sum + codes.norms[code];
}

// The nearest of this part's codes to each row, in rows.keys. Without any number the code is 0. `scratch` has room for
// so many candidates of two floats; where one finds none, all codes are the row's candidates.
template <typename Team>
FASTVAR_HOST_DEVICE inline void search(const Team& team, const Codes& codes, const Rows& rows, float* scratch,
                                       uint32_t room) {
  const int32_t lane = team.rank() % WARP;
  auto* queue = reinterpret_cast<int32_t*>(scratch);
  const auto settle = [&](int32_t row, int32_t code) {
    const float distance = distance_of(codes, rows.exact + int64_t(row) * rows.stride, code) + 0.0f;  // no -0
    if (distance < INFINITY) lower(rows.keys + row, key_of(distance, code));
  };
  screen<true>(
      team, codes, rows, [](int32_t) { return float(INFINITY); },
      [](float& low, int32_t, const float(&distances)[WIDE][OWN_COLUMNS], int32_t) {
#pragma unroll
        for (int32_t w = 0; w < WIDE; ++w)
#pragma unroll
          for (int32_t c = 0; c < OWN_COLUMNS; ++c) low = std::fmin(low, distances[w][c]);  // never NaN
      },
      [&](int32_t row, float low) {
        low = lowest_of_row(low);
        if (lane % (TILE_COLUMNS / OWN_COLUMNS) == 0) lower(rows.lows + row, to_ordered(low));
      });
  team.sync();
  screen<false>(
      team, codes, rows, [&](int32_t row) { return from_ordered(glance(rows.lows + row)) + rows.bands[row]; },
      [&](float limit, int32_t row, const float(&distances)[WIDE][OWN_COLUMNS], int32_t first) {
        bool near = false;
#pragma unroll
        for (int32_t w = 0; w < WIDE; ++w)
#pragma unroll
          for (int32_t c = 0; c < OWN_COLUMNS; ++c) near |= distances[w][c] <= limit;
        if (!near) return;
        uint32_t candidates = 0;  // a bit for each distance: these stay in registers
#pragma unroll
        for (int32_t i = 0; i < WIDE * OWN_COLUMNS; ++i)
          candidates |= uint32_t(distances[i / OWN_COLUMNS][i % OWN_COLUMNS] <= limit) << i;
#pragma unroll 1
        for (; candidates; candidates &= candidates - 1) {
          const int32_t i = lowest_bit(candidates);
          const int32_t code = first + i / OWN_COLUMNS * TILE_COLUMNS + own_column(lane, i % OWN_COLUMNS);
          const uint32_t place = count_up(rows.candidates);
          if (place >= room) {
            lower(rows.lows + row, ALL);  // of this row no more are counted
            return;
          }
          queue[2 * place] = row;
          queue[2 * place + 1] = code;
        }
      },
      [](int32_t, float) {});
  team.sync();
  const auto count = int32_t(*rows.candidates < room ? *rows.candidates : room);
  for (int32_t i = team.rank(); i < count; i += team.size()) settle(queue[2 * i], queue[2 * i + 1]);
  if (*rows.candidates > room) {
    const int64_t step = int64_t(team.parts()) * BLOCK_CODES;
    for (int32_t row = 0; row < rows.count; ++row)
      for (int64_t i = team.rank(); rows.lows[row] == ALL && i < (codes.padded() + step - 1) / step * BLOCK_CODES;
           i += team.size()) {
        const int64_t code = i / BLOCK_CODES * step + team.part() * BLOCK_CODES + i % BLOCK_CODES;
        if (code < codes.count) settle(row, int32_t(code));
      }
  }
  team.sync();
}

// The nearest of what the parts of a cluster found, which all have synced: put(row, code) for each row, on every part.
template <typename Team, typename Put>
FASTVAR_HOST_DEVICE inline void agree(const Team& team, const Rows& rows, const Put& put) {
  for (int32_t i = team.rank(); i < rows.count; i += team.size()) {
    uint64_t key = rows.keys[i];
    for (int32_t p = 0; p < team.parts(); ++p) {
      const uint64_t other = team.of_part(rows.keys, p)[i];
      key = other < key ? other : key;
    }
    put(i, int32_t(uint32_t(key)));
  }
}

}  // namespace fastvar::quantize

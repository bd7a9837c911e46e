// The search of residual_quantize as a CUDA block does it; see residual_quantize_team.h.
#pragma once

#include "team.h"
#include "tokenizer.h"

#if defined(__CUDACC__)
#include <cuda_pipeline.h>
#else
#include <deque>
#include <utility>
#include <vector>
#endif

namespace fastvar::quantize {

constexpr int32_t ROWS = 8;   // rows of a member's share of the distances
constexpr int32_t CODES = 4;  // codes of it

// A copy that a CUDA block goes on without, in groups of copies that are waited for in their order. On a CPU nothing is
// copied before somebody waits.
#if defined(__CUDACC__)

FASTVAR_HOST_DEVICE inline void copy_later(float* to, const float* from) {
#if defined(__CUDA_ARCH__)
  __pipeline_memcpy_async(to, from, sizeof(float));
#endif
}

FASTVAR_HOST_DEVICE inline void end_group() {
#if defined(__CUDA_ARCH__)
  __pipeline_commit();
#endif
}

// Until at most `groups` of this member's groups, 0 or 1, are under way.
FASTVAR_HOST_DEVICE inline void wait_for_groups(int32_t groups) {
#if defined(__CUDA_ARCH__)
  if (groups == 0)
    __pipeline_wait_prior(0);
  else
    __pipeline_wait_prior(1);
#endif
}

#else

using Copies = std::vector<std::pair<float*, const float*>>;

inline std::deque<Copies>& copies_of_thread() {
  thread_local std::deque<Copies> groups(1);  // the last one is open
  return groups;
}

inline void copy_later(float* to, const float* from) { copies_of_thread().back().emplace_back(to, from); }

inline void end_group() { copies_of_thread().emplace_back(); }

inline void wait_for_groups(int32_t groups) {
  std::deque<Copies>& all = copies_of_thread();
  for (; int32_t(all.size()) - 1 > groups; all.pop_front())
    for (const auto& [to, from] : all.front()) *to = *from;
}

#endif

// Four floats that are read at once; their place is a multiple of four.
struct alignas(16) Four {
  float at[4];
};

FASTVAR_HOST_DEVICE inline Four four(const float* from) { return *reinterpret_cast<const Four*>(from); }

FASTVAR_HOST_DEVICE inline int64_t round_to_fours(int64_t floats) { return (floats + 3) / 4 * 4; }

// Whether a code is nearer than another, or as near and of a lower index.
FASTVAR_HOST_DEVICE inline bool comes_first(float distance, int32_t code, float other, int32_t other_code) {
  return distance < other || (distance == other && code < other_code);
}

// The codes `first` to first + tile - 1 to (C, tile); those past the end are zeros.
template <typename Team>
FASTVAR_HOST_DEVICE inline void load_tile(const Team& team, const Tokenizer& tokenizer, int32_t first, int32_t tile,
                                          float* to) {
  const auto channels = int32_t(tokenizer.channels);
  for (int32_t i = team.rank(); i < tile * channels; i += team.size()) {
    const int32_t code = i % tile, c = i / tile;  // members write side by side
    if (first + code < tokenizer.vocabulary)
      copy_later(to + i, tokenizer.codebook + int64_t(first + code) * channels + c);
    else
      to[i] = 0;
  }
  end_group();
}

// Of rows (C, stride), -2 times the means or minus their directions, the nearest codes of those that are this part's.
// distances and found (count); scratch see Space. Without any number the code is 0.
template <typename Team>
FASTVAR_HOST_DEVICE inline void search(const Team& team, const Tokenizer& tokenizer, bool cosine, const float* rows,
                                       int32_t stride, int32_t count, int32_t tile, float* scratch, float* distances,
                                       int32_t* found) {
  const auto channels = int32_t(tokenizer.channels), vocabulary = int32_t(tokenizer.vocabulary);
  const float infinity = INFINITY;
  // members side by side take codes of the same rows; as many as are left once all groups of rows have some
  const int32_t groups = (count + ROWS - 1) / ROWS;
  int32_t lanes = 1;
  while (2 * lanes <= tile / CODES && 2 * lanes * groups <= team.size()) lanes *= 2;
  const int32_t at_once = team.size() / lanes, lane = team.rank() % lanes, step = team.parts() * tile;
  for (int32_t pass = 0; pass < groups; pass += at_once) {
    const int32_t group = pass + team.rank() / lanes, row = group * ROWS;
    const bool active = team.rank() / lanes < at_once && group < groups;
    float low[ROWS];
    int32_t at[ROWS];
    for (int32_t r = 0; r < ROWS; ++r) {
      low[r] = infinity;
      at[r] = 0;
    }
    float* current = scratch;
    float* following = scratch + tile * channels;
    load_tile(team, tokenizer, team.part() * tile, tile, current);
    for (int32_t first = team.part() * tile; first < vocabulary; first += step) {
      if (first + step < vocabulary) {
        load_tile(team, tokenizer, first + step, tile, following);
        wait_for_groups(1);
      } else {
        wait_for_groups(0);
      }
      team.sync();
      for (int32_t chunk = lane * CODES; active && chunk < tile; chunk += lanes * CODES) {
        float sums[ROWS][CODES], squares[CODES];
        for (int32_t q = 0; q < CODES; ++q) {
          squares[q] = 0;
          for (int32_t r = 0; r < ROWS; ++r) sums[r][q] = 0;
        }
#pragma unroll 2
        for (int32_t c = 0; c < channels; ++c) {
          const Four code = four(current + c * tile + chunk);
          // stride is a multiple of ROWS
          const Four x[2] = {four(rows + c * stride + row), four(rows + c * stride + row + 4)};
          for (int32_t q = 0; q < CODES; ++q) squares[q] = multiply_add(code.at[q], code.at[q], squares[q]);
          for (int32_t r = 0; r < ROWS; ++r)
            for (int32_t q = 0; q < CODES; ++q) sums[r][q] = multiply_add(x[r / 4].at[r % 4], code.at[q], sums[r][q]);
        }
        for (int32_t q = 0; q < CODES; ++q) {
          const int32_t code = first + chunk + q;
          const float length = std::sqrt(squares[q]);
          const float factor = cosine ? 1 / (length < 1e-12f ? 1e-12f : length) : 1, shift = cosine ? 0 : squares[q];
          for (int32_t r = 0; r < ROWS; ++r) {
            const float distance = multiply_add(sums[r][q], factor, shift);
            if (code < vocabulary && distance < low[r]) {
              low[r] = distance;
              at[r] = code;
            }
          }
        }
      }
      team.sync();
      float* const last = current;
      current = following;
      following = last;
    }
    wait_for_groups(0);
    team.sync();
    // (row, lane) of this pass
    auto* codes = reinterpret_cast<int32_t*>(scratch + team.size() * ROWS);
    if (active) {
      for (int32_t r = 0; r < ROWS; ++r) {
        const int32_t place = (team.rank() / lanes * ROWS + r) * lanes + lane;
        scratch[place] = low[r];
        codes[place] = at[r];
      }
    }
    team.sync();
    for (int32_t i = team.rank(); i < at_once * ROWS && pass * ROWS + i < count; i += team.size()) {
      float nearest = infinity;
      int32_t first_code = 0;
      for (int32_t l = 0; l < lanes; ++l) {
        const int32_t place = i * lanes + l;
        if (scratch[place] < infinity && comes_first(scratch[place], codes[place], nearest, first_code)) {
          nearest = scratch[place];
          first_code = codes[place];
        }
      }
      distances[pass * ROWS + i] = nearest;
      found[pass * ROWS + i] = first_code;
    }
    team.sync();
  }
}

// The nearest of what the parts of a cluster found: put(row, code) for each row, by one member of one part.
template <typename Team, typename Put>
FASTVAR_HOST_DEVICE inline void agree(const Team& team, int32_t count, float* distances, int32_t* found,
                                      const Put& put) {
  team.sync_parts();
  for (int32_t i = team.part() * team.size() + team.rank(); i < count; i += team.parts() * team.size()) {
    float nearest = INFINITY;
    int32_t token = 0;
    for (int32_t p = 0; p < team.parts(); ++p) {
      const float distance = team.of_part(distances, p)[i];
      const int32_t code = team.of_part(found, p)[i];
      if (distance < INFINITY && comes_first(distance, code, nearest, token)) {
        nearest = distance;
        token = code;
      }
    }
    put(i, token);
  }
  team.sync_parts();
}

}  // namespace fastvar::quantize

// residual_quantize and accumulate_scale as CUDA blocks do them. On a CPU tests run this with threads that stand for
// those of a block; what is fast there is residual_quantize_lanes.h.
//
// Images are planes (C, H, W) in float32. A team's members take cells, codes or channels in turn; all that they write
// to shared memory is read after a sync.
#pragma once

#include <atomic>

#include "residual_quantize_team_image.h"
#include "residual_quantize_team_search.h"

namespace fastvar::quantize {

// A team that has the image for itself.
template <typename Team>
struct Alone : Team {
  FASTVAR_HOST_DEVICE inline explicit Alone(const Team& team) : Team(team) {}
  FASTVAR_HOST_DEVICE static inline constexpr int32_t part() { return 0; }
  FASTVAR_HOST_DEVICE static inline constexpr int32_t parts() { return 1; }
  template <typename T>
  FASTVAR_HOST_DEVICE inline T* of_part(T* own, int32_t) const {
    return own;
  }
  FASTVAR_HOST_DEVICE inline void sync_parts() const { Team::sync(); }
};

// What memory a team needs, in floats.
struct Space {
  int32_t channels;
  int32_t tile;     // codes in shared memory at a time, a multiple of CODES; there are two such tiles
  int32_t scratch;  // tiles, or the search's partial results, or codes of a grid, or weights

  FASTVAR_HOST_DEVICE inline Space(int32_t channels, int32_t members, int64_t staged)
      : channels(channels), tile(4096 / channels < 32 ? 32 : 4096 / channels / 32 * 32) {
    int64_t most = 2 * int64_t(tile) * channels;
    const int64_t partial = 2 * int64_t(members) * ROWS, weights = int64_t(DEPTH) * 9 * (channels + FILTERS);
    most = partial > most ? partial : most;
    most = weights > most ? weights : most;
    scratch = int32_t(round_to_fours(staged > most ? staged : most));
  }
};

struct Call {
  Tokenizer tokenizer;
  const float* features;     // (B, C, H, W)
  const Grid* grids;         // (K,)
  const int32_t* phi_index;  // (K,)
  int32_t scales;
  bool cosine;
  int64_t length;      // L
  int64_t* tokens;     // (B, L)
  float* feature_map;  // (B, C, H, W)
  float* inputs;       // (B, L - n_1, C)
  int64_t* usage;      // (V,), zeros before

  FASTVAR_HOST_DEVICE inline Grid finest() const { return grids[scales - 1]; }
  FASTVAR_HOST_DEVICE inline int64_t inputs_length() const { return length - grids[0].tokens(); }
};

// A token of an image, and one more use of its code: whole numbers are counted in any order.
FASTVAR_HOST_DEVICE inline void put_token(const Call& call, int64_t index, int64_t place, int32_t token) {
  call.tokens[index * call.length + place] = token;
#if defined(__CUDA_ARCH__)
  atomicAdd(reinterpret_cast<unsigned long long*>(call.usage + token), 1ull);
#elif !defined(__CUDACC__)
  std::atomic_ref<int64_t>(call.usage[token]).fetch_add(1, std::memory_order_relaxed);
#endif
}

// Floats of the scratch that a strip's codes take, at most.
FASTVAR_HOST_DEVICE inline int64_t staged_floats(int32_t channels, Grid size, Grid grid, int32_t lines) {
  int64_t most = 0;
  for (int32_t first = 0; first < size.height; first += lines) {
    const Bin staged = rows_below(first - 1, lines + 2, size, grid);
    const int64_t floats = int64_t(channels) * (staged.end - staged.first) * grid.width;
    most = floats > most ? floats : most;
  }
  return most;
}

// How the blocks of a cluster share an image: each has the planes of some channels, searches some of the codes for all
// rows, tile by tile, and convolves its channels, strip by strip.
struct Sharing {
  Space space;
  int32_t share;  // channels of a block
  int32_t lines;  // of a strip
  int32_t rows;   // of a tile at most, as many as find room in the memory of a strip

  Sharing(const Call& call, int32_t members, int32_t parts, int32_t lines)
      : space(int32_t(call.tokenizer.channels), members, staged(call, lines)),
        share((space.channels + parts - 1) / parts),
        lines(lines) {
    const int64_t room = framed(call.finest()) / ROWS, needed = (call.finest().tokens() + ROWS - 1) / ROWS;
    rows = int32_t((room < needed ? room : needed) * ROWS);
  }

  static int64_t staged(const Call& call, int32_t lines) {
    int64_t most = 0;
    for (int32_t k = 0; k < call.scales; ++k) {
      const int64_t floats = staged_floats(int32_t(call.tokenizer.channels), call.finest(), call.grids[k], lines);
      most = floats > most ? floats : most;
    }
    return most;
  }

  // cells of a strip with its frame
  FASTVAR_HOST_DEVICE inline int64_t framed(Grid size) const { return int64_t(lines + 2) * (size.width + 2); }

  // a block's memory
  FASTVAR_HOST_DEVICE inline int64_t floats(Grid size) const {
    return 2 * round_to_fours(share * size.tokens()) + round_to_fours(space.channels * framed(size)) + space.scratch +
           2 * rows;
  }
};

// All scales of an image. `floats` is the memory of this block.
template <typename Team>
FASTVAR_HOST_DEVICE inline void image(const Team& team, const Call& call, int64_t index, const Sharing& sharing,
                                      float* floats) {
  const Tokenizer& tokenizer = call.tokenizer;
  const Grid size = call.finest();
  const auto channels = int32_t(tokenizer.channels), cells = int32_t(size.tokens());
  const int32_t before = sharing.share * team.part(), low = before < channels ? before : channels;
  const int32_t high = low + sharing.share < channels ? low + sharing.share : channels;
  float* residual = floats;  // planes low to high - 1, and so the map
  float* map = residual + round_to_fours(int64_t(sharing.share) * cells);
  float* strip = map + round_to_fours(int64_t(sharing.share) * cells);  // or the rows of the search
  float* scratch = strip + round_to_fours(channels * sharing.framed(size));
  float* distances = scratch + sharing.space.scratch;
  auto* found = reinterpret_cast<int32_t*>(distances + sharing.rows);
  const auto plane = [&](int32_t channel) -> const float* {
    return team.of_part(residual, channel / sharing.share) + channel % sharing.share * cells;
  };
  const int64_t first_plane = (index * channels + low) * cells;
  for (int32_t i = team.rank(); i < (high - low) * cells; i += team.size()) {
    residual[i] = call.features[first_plane + i];
    map[i] = 0;
  }
  team.sync_parts();
  int64_t start = 0;
  for (int32_t k = 0; k < call.scales; ++k) {
    const Grid grid = call.grids[k];
    const auto count = int32_t(grid.tokens());
    // tiles of about as many rows each: where rows and members do not match, members are idle
    const int32_t tiles = (count + sharing.rows - 1) / sharing.rows, even = (count + tiles - 1) / tiles;
    const int32_t rows = (even + ROWS - 1) / ROWS * ROWS;
    for (int32_t first = 0; first < count; first += rows) {
      const int32_t taken = count - first < rows ? count - first : rows;
      const int32_t stride = (taken + ROWS - 1) / ROWS * ROWS;
      make_rows(team, tokenizer, call.cosine, plane, size, grid, first, taken, stride, strip);
      search(team, tokenizer, call.cosine, strip, stride, taken, sharing.space.tile, scratch, distances, found);
      agree(team, taken, distances, found,
            [&](int32_t row, int32_t token) { put_token(call, index, start + first + row, token); });
    }
    for (int32_t first = 0; first < size.height; first += sharing.lines) {
      const Bin staged = rows_below(first - 1, sharing.lines + 2, size, grid);
      stage_codes(team, tokenizer, call.tokens + index * call.length + start, grid, staged, scratch);
      upsample(team, channels, scratch, staged, grid, size, first, sharing.lines, strip);
      apply_phi(team, tokenizer, call.phi_index[k], strip, size, first, sharing.lines, low, high, scratch,
                [&](int32_t channel, int32_t y, int32_t x, float value) {
                  const int32_t place = (channel - low) * cells + y * size.width + x;
                  residual[place] -= value;
                  map[place] += value;
                });
      team.sync();
    }
    team.sync_parts();
    start += count;
    if (k + 1 == call.scales) break;
    const Grid next = call.grids[k + 1];
    const auto following = int32_t(next.tokens());
    float* inputs = call.inputs + (index * call.inputs_length() + start - call.grids[0].tokens()) * channels + low;
    for (int32_t i = team.rank(); i < (high - low) * following; i += team.size()) {
      const int32_t c = i / following, place = i % following;
      inputs[int64_t(place) * channels + c] = bin_mean(map + c * cells, size, next, place);
    }
  }
  for (int32_t i = team.rank(); i < (high - low) * cells; i += team.size()) call.feature_map[first_plane + i] = map[i];
}

// Images that do not fit into a cluster's memory have their state in the results: two launches a scale, a block for
// some rows of the search and one for a strip of the image.

struct TiledCall {
  Call call;
  float* residual;  // (B, C, H, W)
  int32_t scale;
  int64_t start;        // of the scale's tokens
  int32_t rows, lines;  // of a block: of the search, of the image
};

// Floats of the memory of a block of tiled_search and of tiled_add.
FASTVAR_HOST_DEVICE inline int64_t tiled_search_floats(const Space& space, int32_t rows) {
  return int64_t(space.channels) * rows + space.scratch + 2 * rows;
}

FASTVAR_HOST_DEVICE inline int64_t tiled_add_floats(const Space& space, Grid size, int32_t lines) {
  return round_to_fours(int64_t(space.channels) * (lines + 2) * (size.width + 2)) + space.scratch;
}

// The tokens of some rows of a scale, and their inputs.
template <typename Team>
FASTVAR_HOST_DEVICE inline void tiled_search(const Team& team, const TiledCall& tiled, int64_t index, int32_t block,
                                             const Space& space, float* floats) {
  const Call& call = tiled.call;
  const Grid size = call.finest(), grid = call.grids[tiled.scale];
  const int64_t channels = call.tokenizer.channels, plane = index * channels * size.tokens();
  const int32_t first = block * tiled.rows;
  const int32_t count = grid.tokens() - first < tiled.rows ? int32_t(grid.tokens() - first) : tiled.rows;
  float* scratch = floats + channels * tiled.rows;
  float* distances = scratch + space.scratch;
  auto* found = reinterpret_cast<int32_t*>(distances + tiled.rows);
  const float* residual = (tiled.scale ? tiled.residual : call.features) + plane;
  const auto plane_of = [&](int32_t channel) { return residual + channel * size.tokens(); };
  make_rows(team, call.tokenizer, call.cosine, plane_of, size, grid, first, count, tiled.rows, floats);
  search(team, call.tokenizer, call.cosine, floats, tiled.rows, count, space.tile, scratch, distances, found);
  for (int32_t i = team.rank(); i < count; i += team.size()) put_token(call, index, tiled.start + first + i, found[i]);
  if (tiled.scale == 0) return;
  float* inputs =
      call.inputs + (index * call.inputs_length() + tiled.start - call.grids[0].tokens() + first) * channels;
  for (int32_t i = team.rank(); i < channels * count; i += team.size()) {
    const int32_t c = i / count, place = i % count;
    inputs[place * channels + c] = bin_mean(call.feature_map + plane + c * size.tokens(), size, grid, first + place);
  }
}

// A strip of the image with what the scale's tokens add.
template <typename Team>
FASTVAR_HOST_DEVICE inline void tiled_add(const Team& team, const TiledCall& tiled, int64_t index, int32_t block,
                                          const Space& space, float* floats) {
  const Call& call = tiled.call;
  const Grid size = call.finest(), grid = call.grids[tiled.scale];
  const auto channels = int32_t(call.tokenizer.channels);
  const int64_t plane = index * channels * size.tokens();
  const int32_t first = block * tiled.lines;
  float* scratch = floats + round_to_fours(int64_t(channels) * (tiled.lines + 2) * (size.width + 2));
  const Bin staged = rows_below(first - 1, tiled.lines + 2, size, grid);
  stage_codes(team, call.tokenizer, call.tokens + index * call.length + tiled.start, grid, staged, scratch);
  upsample(team, channels, scratch, staged, grid, size, first, tiled.lines, floats);
  apply_phi(team, call.tokenizer, call.phi_index[tiled.scale], floats, size, first, tiled.lines, 0, channels, scratch,
            [&](int32_t channel, int32_t y, int32_t x, float value) {
              const int64_t place = plane + channel * size.tokens() + y * size.width + x;
              tiled.residual[place] = (tiled.scale ? tiled.residual : call.features)[place] - value;
              call.feature_map[place] = (tiled.scale ? call.feature_map[place] : 0) + value;
            });
}

struct AccumulateCall {
  Tokenizer tokenizer;       // with one phi
  const float* feature_map;  // (B, C, H, W)
  const int64_t* tokens;     // (B, n)
  Grid grid, next, finest;
  int32_t channels, lines;  // of a block: filters, rows of a strip
  float* accumulated;       // (B, C, H, W)
  float* inputs;            // (B, n', C), nothing if next has no tokens
};

// Some channels of one step for an image.
template <typename Team>
FASTVAR_HOST_DEVICE inline void accumulate(const Team& team, const AccumulateCall& call, int64_t index, int32_t block,
                                           const Space& space, float* floats) {
  const Grid size = call.finest, grid = call.grid;
  const auto channels = int32_t(call.tokenizer.channels);
  const int32_t low = block * call.channels;
  const int32_t high = low + call.channels < channels ? low + call.channels : channels;
  const int64_t plane = index * channels * size.tokens();
  float* scratch = floats + round_to_fours(int64_t(channels) * (call.lines + 2) * (size.width + 2));
  for (int32_t first = 0; first < size.height; first += call.lines) {
    const Bin staged = rows_below(first - 1, call.lines + 2, size, grid);
    stage_codes(team, call.tokenizer, call.tokens + index * grid.tokens(), grid, staged, scratch);
    upsample(team, channels, scratch, staged, grid, size, first, call.lines, floats);
    apply_phi(team, call.tokenizer, 0, floats, size, first, call.lines, low, high, scratch,
              [&](int32_t channel, int32_t y, int32_t x, float value) {
                const int64_t place = plane + channel * size.tokens() + y * size.width + x;
                call.accumulated[place] = call.feature_map[place] + value;
              });
    team.sync();
  }
  const auto following = int32_t(call.next.tokens());
  for (int32_t i = team.rank(); i < (high - low) * following; i += team.size()) {
    const int32_t c = low + i / following, place = i % following;
    call.inputs[(index * following + place) * channels + c] =
        bin_mean(call.accumulated + plane + c * size.tokens(), size, call.next, place);
  }
}

}  // namespace fastvar::quantize

// residual_quantize and accumulate_scale as CUDA blocks do them. On a CPU tests run this with threads that stand for
// those of a block; what is fast there is search.h and images.h.
//
// Images are planes (C, H, W) in float32. A team's members take cells, codes or channels in turn; all that they write
// to shared memory is read after a sync.
#pragma once

#include <atomic>

#include "residual_quantize/team_image.h"
#include "residual_quantize/team_search.h"

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

struct Call {
  Tokenizer tokenizer;
  Codes codes;
  const float* features;     // (B, C, H, W)
  const Grid* grids;         // (K,)
  const int32_t* phi_index;  // (K,)
  int32_t scales;
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

// Floats of the memory that a block's search needs, and its parts: rows, candidates, what is found, and the bounds.
struct SearchMemory {
  float* rows;
  float* queue;
  uint32_t room;  // candidates
  uint64_t* keys;
  uint32_t* candidates;
  uint32_t* bounds;

  FASTVAR_HOST_DEVICE inline Rows rows_of(const Codes& codes, int32_t count) const {
    return Rows(codes, count, rows, keys, candidates);
  }
  static constexpr int32_t BESIDES = 4;  // floats of the number of candidates and the bounds
};

// How the blocks of a cluster share an image: each has the planes of some channels, searches some of the codes for all
// rows, tile by tile, and convolves its channels, strip by strip.
struct Sharing {
  int32_t channels;
  int32_t share;    // channels of a block
  int32_t lines;    // of a strip
  int32_t rows;     // of a tile of the search, a multiple of TILE_ROWS
  int64_t strip;    // floats of a strip or of a tile's rows
  int64_t scratch;  // floats of staged codes, weights, candidates

  // With tiles of at most `most_rows` rows, or as many as find room in a strip's memory.
  Sharing(const Call& call, int32_t parts, int32_t lines, int32_t most_rows)
      : channels(int32_t(call.tokenizer.channels)), share((channels + parts - 1) / parts), lines(lines) {
    const Grid size = call.finest();
    const int64_t least = Strip(size, lines).floats(channels), each = row_floats(channels);
    const int64_t needed = round_up(size.tokens(), TILE_ROWS);
    int64_t tile = most_rows > least / each ? most_rows : least / each;
    tile = (tile < needed ? tile : needed) / TILE_ROWS * TILE_ROWS;
    rows = int32_t(tile < TILE_ROWS ? TILE_ROWS : tile);
    strip = round_to_fours(rows * each > least ? rows * each : least);
    scratch = 2 * LEAST_QUEUE;
    const int64_t weights = Weights(channels, share).floats();
    if (weights > scratch) scratch = weights;
    for (int32_t k = 0; k < call.scales; ++k) {
      const int64_t staged = staged_floats(channels, size, call.grids[k], lines);
      if (staged > scratch) scratch = staged;
    }
    scratch = round_to_fours(scratch);
  }

  // floats of a channel's cells: odd, so that one cell of all channels lies in different banks
  FASTVAR_HOST_DEVICE static inline int64_t plane(Grid size) { return size.tokens() | 1; }

  // a block's memory
  FASTVAR_HOST_DEVICE inline int64_t floats(Grid size) const {
    return 2 * round_to_fours(share * plane(size)) + strip + scratch + 2 * rows + SearchMemory::BESIDES +
           round_to_fours(size.tokens());
  }
};

// All scales of an image. `floats` is the memory of this block.
template <typename Team>
FASTVAR_HOST_DEVICE inline void image(const Team& team, const Call& call, int64_t index, const Sharing& sharing,
                                      float* floats) {
  const Tokenizer& tokenizer = call.tokenizer;
  const Grid size = call.finest();
  const auto channels = int32_t(tokenizer.channels), cells = int32_t(size.tokens());
  const auto plane = int32_t(Sharing::plane(size));
  const int32_t before = sharing.share * team.part(), low = before < channels ? before : channels;
  const int32_t high = low + sharing.share < channels ? low + sharing.share : channels;
  float* residual = floats;  // planes low to high - 1, and so the map
  float* map = residual + round_to_fours(int64_t(sharing.share) * plane);
  float* strip = map + round_to_fours(int64_t(sharing.share) * plane);  // or the rows of the search
  float* scratch = strip + sharing.strip;
  auto* keys = reinterpret_cast<uint64_t*>(scratch + sharing.scratch);
  auto* tokens = reinterpret_cast<int32_t*>(keys + sharing.rows + SearchMemory::BESIDES / 2);  // of a scale
  auto* bounds = reinterpret_cast<uint32_t*>(keys + sharing.rows);
  const SearchMemory memory{strip, scratch, uint32_t(sharing.scratch / 2), keys, bounds + 2, bounds};
  const int64_t first_plane = (index * channels + low) * cells;
  gather_bounds(team, call.codes, memory.bounds);
  for (int32_t i = team.rank(); i < (high - low) * cells; i += team.size()) {
    const int32_t place = i / cells * plane + i % cells;
    residual[place] = call.features[first_plane + i];
    map[place] = 0;
  }
  int64_t start = 0;
  for (int32_t k = 0; k < call.scales; ++k) {
    const Grid grid = call.grids[k];
    const auto count = int32_t(grid.tokens());
    float* inputs = call.inputs + (index * call.inputs_length() + start - call.grids[0].tokens()) * channels + low;
    // tiles of about as many rows each: where rows and warps do not match, warps are idle
    const int32_t tiles = (count + sharing.rows - 1) / sharing.rows;
    const auto step = int32_t(round_up((count + tiles - 1) / tiles, TILE_ROWS));
    team.sync_parts();  // what was a strip can hold rows
    for (int32_t first = 0; first < count; first += step) {
      const Rows rows = memory.rows_of(call.codes, count - first < step ? count - first : step);
      auto* bins = reinterpret_cast<Bins*>(rows.halves);  // until `prepare` writes there
      for (int32_t i = team.rank(); i < rows.count; i += team.size()) bins[i] = bins_of(size, grid, first + i);
      team.sync();
      // neighbours take neighbouring channels of a bin
      for (int32_t i = team.rank(); i < rows.count * (high - low); i += team.size()) {
        const int32_t place = i / (high - low), c = i % (high - low);
        const Means<2> means = bin_means({residual + c * plane, map + c * plane}, size, bins[place]);
        for (int32_t part = 0; part < team.parts(); ++part)
          team.of_part(rows.exact, part)[place * rows.stride + low + c] = -2 * means.of[0];
        if (k > 0) inputs[int64_t(first + place) * channels + c] = means.of[1];
      }
      team.sync_parts();
      prepare(team, call.codes, memory.bounds, rows);
      search(team, call.codes, rows, memory.queue, memory.room);
      team.sync_parts();
      agree(team, rows, [&](int32_t row, int32_t token) {
        tokens[first + row] = token;
        if (row % team.parts() == team.part()) put_token(call, index, start + first + row, token);
      });
    }
    team.sync();
    const Strip shape(size, sharing.lines);
    const Weights weights(channels, sharing.share);
    for (int32_t first = 0; first < size.height; first += sharing.lines) {
      upsample(team, tokenizer, tokens, grid, size, first, shape, scratch, strip);
      apply_phi(team, tokenizer, call.phi_index[k], strip, size, first, shape, low, high, weights, scratch,
                [&](int32_t channel, int32_t y, int32_t x, float value) {
                  const int32_t place = (channel - low) * plane + y * size.width + x;
                  residual[place] -= value;
                  map[place] += value;
                });
    }
    start += count;
  }
  for (int32_t i = team.rank(); i < (high - low) * cells; i += team.size())
    call.feature_map[first_plane + i] = map[i / cells * plane + i % cells];
  team.sync_parts();  // a block's memory is there as long as another may read it
}

// Images that do not fit into a cluster's memory have their state in the results: two launches a scale, a block for
// some rows of the search and one for a strip of the image.

struct TiledCall {
  Call call;
  float* residual;  // (B, C, H, W)
  int32_t scale;
  int64_t start;        // of the scale's tokens
  int32_t rows, lines;  // of a block: of the search, a multiple of TILE_ROWS; of the image
};

// Floats of the memory of a block of tiled_search, and of one that convolves a strip for so many filters.
FASTVAR_HOST_DEVICE inline int64_t tiled_search_floats(int32_t channels, int32_t rows) {
  return round_to_fours(int64_t(row_floats(channels)) * rows) + 2 * LEAST_QUEUE + 2 * rows + SearchMemory::BESIDES;
}

FASTVAR_HOST_DEVICE inline int64_t strip_floats(int32_t channels, int32_t filters, Grid size, Grid grid,
                                                int32_t lines) {
  const int64_t staged = staged_floats(channels, size, grid, lines), weights = Weights(channels, filters).floats();
  return Strip(size, lines).floats(channels) + (staged > weights ? staged : weights);
}

// The tokens of some rows of a scale, and their inputs.
template <typename Team>
FASTVAR_HOST_DEVICE inline void tiled_search(const Team& team, const TiledCall& tiled, int64_t index, int32_t block,
                                             float* floats) {
  const Call& call = tiled.call;
  const Grid size = call.finest(), grid = call.grids[tiled.scale];
  const auto channels = int32_t(call.tokenizer.channels);
  const int64_t plane = index * channels * size.tokens();
  const int32_t first = block * tiled.rows;
  const int32_t count = grid.tokens() - first < tiled.rows ? int32_t(grid.tokens() - first) : tiled.rows;
  float* queue = floats + round_to_fours(int64_t(row_floats(channels)) * tiled.rows);
  auto* keys = reinterpret_cast<uint64_t*>(queue + 2 * LEAST_QUEUE);
  auto* bounds = reinterpret_cast<uint32_t*>(keys + tiled.rows);
  const SearchMemory memory{floats, queue, LEAST_QUEUE, keys, bounds + 2, bounds};
  const Rows rows = memory.rows_of(call.codes, count);
  const float* residual = (tiled.scale ? tiled.residual : call.features) + plane;
  float* inputs =
      call.inputs + (index * call.inputs_length() + tiled.start - call.grids[0].tokens() + first) * channels;
  each_bin(team, channels, size, grid, first, count, [&](int32_t c, int32_t place, const Bins& bins) {
    rows.exact[place * rows.stride + c] = -2 * bin_mean(residual + c * size.tokens(), size, bins);
    if (tiled.scale)
      inputs[int64_t(place) * channels + c] = bin_mean(call.feature_map + plane + c * size.tokens(), size, bins);
  });
  gather_bounds(team, call.codes, memory.bounds);
  prepare(team, call.codes, memory.bounds, rows);
  search(team, call.codes, rows, memory.queue, memory.room);
  agree(team, rows, [&](int32_t row, int32_t token) { put_token(call, index, tiled.start + first + row, token); });
}

// A strip of the image with what the scale's tokens add.
template <typename Team>
FASTVAR_HOST_DEVICE inline void tiled_add(const Team& team, const TiledCall& tiled, int64_t index, int32_t block,
                                          float* floats) {
  const Call& call = tiled.call;
  const Grid size = call.finest(), grid = call.grids[tiled.scale];
  const auto channels = int32_t(call.tokenizer.channels);
  const int64_t plane = index * channels * size.tokens();
  const int32_t first = block * tiled.lines;
  const Strip strip(size, tiled.lines);
  const Weights weights(channels, channels);
  float* scratch = floats + strip.floats(channels);
  upsample(team, call.tokenizer, call.tokens + index * call.length + tiled.start, grid, size, first, strip, scratch,
           floats);
  apply_phi(team, call.tokenizer, call.phi_index[tiled.scale], floats, size, first, strip, 0, channels, weights,
            scratch, [&](int32_t channel, int32_t y, int32_t x, float value) {
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
                                           float* floats) {
  const Grid size = call.finest, grid = call.grid;
  const auto channels = int32_t(call.tokenizer.channels);
  const int32_t low = block * call.channels;
  const int32_t high = low + call.channels < channels ? low + call.channels : channels;
  const int64_t plane = index * channels * size.tokens();
  const Strip strip(size, call.lines);
  const Weights weights(channels, call.channels);
  float* scratch = floats + strip.floats(channels);
  for (int32_t first = 0; first < size.height; first += call.lines) {
    upsample(team, call.tokenizer, call.tokens + index * grid.tokens(), grid, size, first, strip, scratch, floats);
    apply_phi(team, call.tokenizer, 0, floats, size, first, strip, low, high, weights, scratch,
              [&](int32_t channel, int32_t y, int32_t x, float value) {
                const int64_t place = plane + channel * size.tokens() + y * size.width + x;
                call.accumulated[place] = call.feature_map[place] + value;
              });
  }
  const auto following = int32_t(call.next.tokens());
  if (following == 0) return;
  each_bin(team, high - low, size, call.next, 0, following, [&](int32_t c, int32_t place, const Bins& bins) {
    call.inputs[(index * following + place) * channels + low + c] =
        bin_mean(call.accumulated + plane + (low + c) * size.tokens(), size, bins);
  });
}

}  // namespace fastvar::quantize

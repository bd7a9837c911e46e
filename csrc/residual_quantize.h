// The arithmetic of residual_quantize and accumulate_scale as a CUDA block does it. On a CPU tests run it with threads
// that stand for those of a block; what is fast there is residual_quantize_lanes.h.
//
// Images are planes (C, H, W) in float32. A team's members take cells, codes or channels in turn; all that they write
// to shared memory is read after a sync. Blocks of a cluster share an image: each has all of it, searches some of the
// codes and convolves some of the channels, and hands what it found to the others.
#pragma once

#include <atomic>
#include <optional>

#include "common.h"
#include "resample.h"
#include "team.h"

#if defined(__CUDACC__)
#include <cuda_pipeline.h>
#endif

namespace fastvar {

struct Grid {
  int32_t height, width;
  FASTVAR_HOST_DEVICE inline int64_t tokens() const { return int64_t(height) * width; }
};

// The codes and convolutions of a tokenizer, in PyTorch's layout and float32.
struct Tokenizer {
  const float* codebook;  // (V, C)
  int64_t vocabulary;
  int64_t channels;
  const float* phi_weight;  // (N, C, C, 3, 3), or null
  const float* phi_bias;    // (N, C)
  int64_t phis;
  float phi_ratio;
};

// A tokenizer of tensors (V, C), (N, C, C, 3, 3) or one convolution without N, and (N, C) or (C).
inline Tokenizer tokenizer_of(const Tensor& codebook, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& bias, double ratio) {
  Tokenizer tokenizer{input<float>(codebook), codebook.size(0), codebook.size(1), nullptr, nullptr, 0, float(ratio)};
  if (weight && bias) {
    tokenizer.phi_weight = input<float>(*weight);
    tokenizer.phi_bias = input<float>(*bias);
    tokenizer.phis = weight->dim() == 5 ? weight->size(0) : 1;
  }
  return tokenizer;
}

namespace quantize {

constexpr int32_t ROWS = 8;     // rows of a member's share of the distances
constexpr int32_t CODES = 4;    // codes of it
constexpr int32_t CELLS = 4;    // cells in a row of a member's share of a convolution
constexpr int32_t FILTERS = 4;  // output channels of it
constexpr int32_t DEPTH = 8;    // input channels of a convolution's weights that are in shared memory at a time

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

// A copy that a CUDA block goes on without, in groups of copies that are waited for in their order.
FASTVAR_HOST_DEVICE inline void copy_later(float* to, const float* from) {
#if defined(__CUDA_ARCH__)
  __pipeline_memcpy_async(to, from, sizeof(float));
#else
  *to = *from;
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
  (void)groups;
}

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

// The nearest of what the parts of a cluster found, the same for all of them, to tokens (count).
template <typename Team>
FASTVAR_HOST_DEVICE inline void agree(const Team& team, int32_t count, float* distances, int32_t* found,
                                      int32_t* tokens) {
  team.sync_parts();
  for (int32_t i = team.rank(); i < count; i += team.size()) {
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
    tokens[i] = token;
  }
  team.sync_parts();
}

// The mean of a bin of a plane (H, W).
FASTVAR_HOST_DEVICE inline float bin_mean(const float* plane, Grid size, Grid grid, int32_t place) {
  const Bin rows = area_bin(place / grid.width, size.height, grid.height);
  const Bin columns = area_bin(place % grid.width, size.width, grid.width);
  float sum = 0;
  for (int32_t y = rows.first; y < rows.end; ++y)
    for (int32_t x = columns.first; x < columns.end; ++x) sum += plane[y * size.width + x];
  return sum / (float(rows.end - rows.first) * float(columns.end - columns.first));
}

// Rows for the search, (C, stride): the residual's means over the cells `first` to first + count - 1 of a grid.
template <typename Team>
FASTVAR_HOST_DEVICE inline void make_rows(const Team& team, const Tokenizer& tokenizer, bool cosine,
                                          const float* residual, Grid size, Grid grid, int32_t first, int32_t count,
                                          int32_t stride, float* rows) {
  const auto channels = int32_t(tokenizer.channels);
  for (int32_t i = team.rank(); i < channels * stride; i += team.size()) {
    const int32_t c = i / stride, place = i % stride;
    rows[i] = place < count ? -2 * bin_mean(residual + c * size.tokens(), size, grid, first + place) : 0;
  }
  team.sync();
  if (!cosine) return;
  for (int32_t i = team.rank(); i < count; i += team.size()) {
    float square = 0;
    for (int32_t c = 0; c < channels; ++c) square = multiply_add(rows[c * stride + i], rows[c * stride + i], square);
    const float length = std::sqrt(square);
    for (int32_t c = 0; c < channels; ++c) rows[c * stride + i] /= length < 2e-12f ? 2e-12f : length;
  }
  team.sync();
}

// The codes of the rows of a grid that `rows` fine rows from `first` on are interpolated from.
FASTVAR_HOST_DEVICE inline Bin rows_below(int32_t first, int32_t rows, Grid size, Grid grid) {
  const int32_t last = first + rows - 1 < size.height ? first + rows - 1 : size.height - 1;
  return {cubic_taps(first < 0 ? 0 : first, grid.height, size.height).index[0],
          cubic_taps(last, grid.height, size.height).index[3] + 1};
}

// Codes of the tokens of some rows of a grid to (C, rows, w).
template <typename Team, typename Token>
FASTVAR_HOST_DEVICE inline void stage_codes(const Team& team, const Tokenizer& tokenizer, const Token* tokens,
                                            Grid grid, Bin rows, float* codes) {
  const auto channels = int32_t(tokenizer.channels);
  const int32_t count = (rows.end - rows.first) * grid.width;
  for (int32_t i = team.rank(); i < count * channels; i += team.size()) {
    const int64_t token = tokens[rows.first * grid.width + i / channels];
    const int64_t last = tokenizer.vocabulary - 1;
    const int64_t inside = token < 0 ? 0 : token > last ? last : token;
    codes[i % channels * count + i / channels] = tokenizer.codebook[inside * channels + i % channels];
  }
  team.sync();
}

// Staged codes, upsampled, to a strip of `rows` rows from `first` on with a frame: (C, rows + 2, W + 2). Cells outside
// of the image are zeros.
template <typename Team>
FASTVAR_HOST_DEVICE inline void upsample(const Team& team, int32_t channels, const float* codes, Bin staged, Grid grid,
                                         Grid size, int32_t first, int32_t rows, float* strip) {
  const int32_t width = size.width + 2, cells = (rows + 2) * width, count = (staged.end - staged.first) * grid.width;
  // members left over take other channels of the same cells
  const int32_t shares = team.size() / cells < 1 ? 1 : team.size() / cells > channels ? channels : team.size() / cells;
  for (int32_t i = team.rank(); i < cells * shares; i += team.size()) {
    const int32_t cell = i % cells, y = first + cell / width - 1, x = cell % width - 1;
    const bool inside = y >= 0 && y < size.height && x >= 0 && x < size.width;
    const Taps<4> down = cubic_taps(inside ? y : 0, grid.height, size.height);
    const Taps<4> across = cubic_taps(inside ? x : 0, grid.width, size.width);
    for (int32_t c = i / cells; c < channels; c += shares) {
      float value = 0;
      for (int32_t a = 0; inside && a < 4; ++a) {
        const float* row = codes + c * count + (down.index[a] - staged.first) * grid.width;
        float sum = row[across.index[0]] * across.weight[0];
        for (int32_t b = 1; b < 4; ++b) sum = multiply_add(row[across.index[b]], across.weight[b], sum);
        value = multiply_add(sum, down.weight[a], value);
      }
      strip[c * cells + cell] = value;
    }
  }
  team.sync();
}

// phi of a strip for the channels low to high - 1: write(channel, y, x, value) for each cell of its rows in the image.
template <typename Team, typename Write>
FASTVAR_HOST_DEVICE inline void apply_phi(const Team& team, const Tokenizer& tokenizer, int64_t phi, const float* strip,
                                          Grid size, int32_t first, int32_t rows, int32_t low, int32_t high,
                                          float* scratch, const Write& write) {
  const auto channels = int32_t(tokenizer.channels);
  const int32_t width = size.width + 2, cells = (rows + 2) * width;
  const int32_t runs = (size.width + CELLS - 1) / CELLS, filters = (high - low + FILTERS - 1) / FILTERS;
  const int32_t items = rows * runs * filters, padded = filters * FILTERS;
  const float* weights = tokenizer.phi_weight + phi * 9 * channels * channels;
  for (int32_t pass = 0; pass < items; pass += team.size()) {
    const int32_t item = pass + team.rank();
    const bool active = item < items;
    const int32_t row = active ? item / runs % rows : 0, x = active ? item % runs * CELLS : 0;
    const int32_t filter = active ? item / runs / rows * FILTERS : 0;
    float sums[CELLS][FILTERS];
    for (int32_t i = 0; i < CELLS; ++i)
      for (int32_t f = 0; f < FILTERS; ++f) sums[i][f] = 0;
    for (int32_t start = 0; tokenizer.phis && start < channels; start += DEPTH) {
      const int32_t depth = channels - start < DEPTH ? channels - start : DEPTH;
      // (C_out, C_in, 9) to (depth, 9, filters)
      for (int32_t i = team.rank(); i < depth * 9 * padded; i += team.size()) {
        const int32_t out = low + i / (depth * 9), in = i % (depth * 9);
        scratch[in * padded + i / (depth * 9)] = out < high ? weights[(int64_t(out) * channels + start) * 9 + in] : 0;
      }
      team.sync();
      for (int32_t c = 0; active && c < depth; ++c) {
        for (int32_t dy = 0; dy < 3; ++dy) {
          const float* line = strip + (start + c) * cells + (row + dy) * width + x;
          float values[CELLS + 2];
          for (int32_t i = 0; i < CELLS + 2; ++i) values[i] = x + i < width ? line[i] : 0;
          for (int32_t dx = 0; dx < 3; ++dx) {
            const Four weight = four(scratch + (c * 9 + dy * 3 + dx) * padded + filter);
            for (int32_t f = 0; f < FILTERS; ++f)
              for (int32_t i = 0; i < CELLS; ++i) sums[i][f] = multiply_add(values[i + dx], weight.at[f], sums[i][f]);
          }
        }
      }
      team.sync();
    }
#pragma unroll
    for (int32_t f = 0; f < FILTERS; ++f) {
      const int32_t channel = low + filter + f;
#pragma unroll
      for (int32_t i = 0; i < CELLS; ++i) {
        if (!active || channel >= high || x + i >= size.width || first + row >= size.height) continue;
        float value = strip[channel * cells + (row + 1) * width + x + i + 1];
        if (tokenizer.phis) {
          const float blurred = sums[i][f] + tokenizer.phi_bias[phi * channels + channel];
          value = value * (1 - tokenizer.phi_ratio) + blurred * tokenizer.phi_ratio;
        }
        write(channel, first + row, x + i, value);
      }
    }
  }
}

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

// What a team of `image` has in its memory.
struct Memory {
  float *residual, *map;  // (C, H, W)
  float* strip;           // (C, H + 2, W + 2), and before that the rows of the search
  float* scratch;
  float* distances;  // (n)
  int32_t *found, *tokens;

  FASTVAR_HOST_DEVICE inline Memory(float* floats, const Space& space, Grid size) {
    const int64_t image = round_to_fours(space.channels * size.tokens());
    residual = floats;
    map = residual + image;
    strip = map + image;
    scratch = strip + strip_floats(space, size);
    distances = scratch + space.scratch;
    found = reinterpret_cast<int32_t*>(distances + size.tokens());
    tokens = found + size.tokens();
  }

  FASTVAR_HOST_DEVICE static inline int64_t strip_floats(const Space& space, Grid size) {
    const int64_t rows = (size.tokens() + ROWS - 1) / ROWS * ROWS, framed = (size.height + 2) * (size.width + 2);
    return round_to_fours(space.channels * (rows > framed ? rows : framed));
  }

  FASTVAR_HOST_DEVICE static inline int64_t floats(const Space& space, Grid size) {
    return 2 * round_to_fours(space.channels * size.tokens()) + strip_floats(space, size) + space.scratch +
           3 * size.tokens();
  }
};

// All scales of an image.
template <typename Team>
FASTVAR_HOST_DEVICE inline void image(const Team& team, const Call& call, int64_t index, const Space& space,
                                      const Memory& memory) {
  const Tokenizer& tokenizer = call.tokenizer;
  const Grid size = call.finest();
  const auto channels = int32_t(tokenizer.channels), cells = int32_t(size.tokens());
  // the channels that are this part's to convolve and to write
  const int32_t share = (channels + team.parts() - 1) / team.parts();
  const int32_t low = share * team.part() < channels ? share * team.part() : channels;
  const int32_t high = low + share < channels ? low + share : channels;
  for (int32_t i = team.rank(); i < channels * cells; i += team.size()) {
    memory.residual[i] = call.features[index * channels * cells + i];
    memory.map[i] = 0;
  }
  team.sync();
  int64_t start = 0;
  for (int32_t k = 0; k < call.scales; ++k) {
    const Grid grid = call.grids[k];
    const auto count = int32_t(grid.tokens());
    const int32_t stride = (count + ROWS - 1) / ROWS * ROWS;
    make_rows(team, tokenizer, call.cosine, memory.residual, size, grid, 0, count, stride, memory.strip);
    search(team, tokenizer, call.cosine, memory.strip, stride, count, space.tile, memory.scratch, memory.distances,
           memory.found);
    agree(team, count, memory.distances, memory.found, memory.tokens);
    if (team.part() == 0)
      for (int32_t i = team.rank(); i < count; i += team.size()) put_token(call, index, start + i, memory.tokens[i]);
    const Bin all{0, grid.height};
    stage_codes(team, tokenizer, memory.tokens, grid, all, memory.scratch);
    upsample(team, channels, memory.scratch, all, grid, size, 0, size.height, memory.strip);
    apply_phi(team, tokenizer, call.phi_index[k], memory.strip, size, 0, size.height, low, high, memory.scratch,
              [&](int32_t channel, int32_t y, int32_t x, float value) {
                const int32_t place = channel * cells + y * size.width + x;
                const float residual = memory.residual[place] - value, map = memory.map[place] + value;
                for (int32_t p = 0; p < team.parts(); ++p) {
                  team.of_part(memory.residual, p)[place] = residual;
                  team.of_part(memory.map, p)[place] = map;
                }
              });
    team.sync_parts();
    start += count;
    if (k + 1 == call.scales) break;
    const Grid next = call.grids[k + 1];
    const auto following = int32_t(next.tokens());
    float* inputs = call.inputs + (index * call.inputs_length() + start - call.grids[0].tokens()) * channels;
    for (int32_t i = team.rank(); i < (high - low) * following; i += team.size()) {
      const int32_t c = low + i / following, place = i % following;
      inputs[int64_t(place) * channels + c] = bin_mean(memory.map + c * cells, size, next, place);
    }
  }
  for (int32_t i = low * cells + team.rank(); i < high * cells; i += team.size())
    call.feature_map[index * channels * cells + i] = memory.map[i];
  team.sync_parts();
}

// Images that do not fit into a block's memory have their state in the results: two launches a scale, a block for some
// rows of the search and one for a strip of the image.

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
  make_rows(team, call.tokenizer, call.cosine, residual, size, grid, first, count, tiled.rows, floats);
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

}  // namespace quantize
}  // namespace fastvar

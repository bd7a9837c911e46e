// From images to rows of the search and from tokens to images, as a CUDA block does it; see team.h.
#pragma once

#include "common/resample.h"
#include "residual_quantize/team_search.h"
#include "residual_quantize/tokenizer.h"

namespace fastvar::quantize {

constexpr int32_t CELLS = 4;    // cells in a row of a member's share of a convolution
constexpr int32_t FILTERS = 4;  // output channels of it
constexpr int32_t SEGMENT = 6;  // rows of a member's share of upsampling
constexpr int32_t MOST_WEIGHTS = 32 * 9 * 36;  // of a convolution that are in shared memory at a time, if that may be

struct alignas(16) Bins {
  Bin rows, columns;
};

FASTVAR_HOST_DEVICE inline Bins bins_of(Grid size, Grid grid, int32_t place) {
  return {area_bin(place / grid.width, size.height, grid.height), area_bin(place % grid.width, size.width, grid.width)};
}

// The means of a bin of N planes (H, W).
template <int32_t N>
struct Means {
  float of[N];
};

template <int32_t N>
FASTVAR_HOST_DEVICE inline Means<N> bin_means(const float* const (&planes)[N], Grid size, const Bins& bins) {
  const Bin rows = bins.rows, columns = bins.columns;
  Means<N> means{};
  for (int32_t y = rows.first; y < rows.end; ++y)
    for (int32_t x = columns.first; x < columns.end; ++x)
#pragma unroll
      for (int32_t n = 0; n < N; ++n) means.of[n] += planes[n][y * size.width + x];
  const float cells = float(rows.end - rows.first) * float(columns.end - columns.first);
#pragma unroll
  for (int32_t n = 0; n < N; ++n) means.of[n] /= cells;
  return means;
}

FASTVAR_HOST_DEVICE inline float bin_mean(const float* plane, Grid size, const Bins& bins) {
  return bin_means({plane}, size, bins).of[0];
}

// f(channel, place, bins) for `channels` channels and the cells `first` to first + count - 1 of a grid; place is from
// `first` on.
template <typename Team, typename F>
FASTVAR_HOST_DEVICE inline void each_bin(const Team& team, int32_t channels, Grid size, Grid grid, int32_t first,
                                         int32_t count, const F& f) {
  for (int32_t i = team.rank(); i < channels * count; i += team.size())
    f(i / count, i % count, bins_of(size, grid, first + i % count));
}

// The codes of the rows of a grid that `rows` fine rows from `first` on are interpolated from.
FASTVAR_HOST_DEVICE inline Bin rows_below(int32_t first, int32_t rows, Grid size, Grid grid) {
  const int32_t last = first + rows - 1 < size.height ? first + rows - 1 : size.height - 1;
  return {cubic_taps(first < 0 ? 0 : first, grid.height, size.height).index[0],
          cubic_taps(last, grid.height, size.height).index[3] + 1};
}

// A strip of an image with a frame of one cell: planes of rows, with room behind each row and each plane, so that rows
// are read in fours, and members that write one place of neighbouring planes do not meet in one bank.
struct Strip {
  int32_t rows, width, plane;  // without and with the frame, floats of a plane

  FASTVAR_HOST_DEVICE inline Strip(Grid size, int32_t lines)
      : rows(lines), width((size.width + CELLS - 1) / CELLS * CELLS + 4), plane(0) {
    const int64_t floats = round_up(int64_t(rows + 2) * width, 32) + 4;
    plane = int32_t(floats < INT32_MAX ? floats : INT32_MAX / 4 * 4);
  }
  FASTVAR_HOST_DEVICE inline int64_t floats(int32_t channels) const { return int64_t(channels) * plane; }
};

// Taps of one row or column: where the codes are, -1 outside of the image, and what they count.
struct alignas(16) Places {
  int32_t at[4];
  float weight[4];
};

// Floats of the codes that a strip is interpolated from, at most, and of the taps.
FASTVAR_HOST_DEVICE inline int64_t staged_floats(int32_t channels, Grid size, Grid grid, int32_t lines) {
  int64_t rows = grid.height == size.height ? lines + 2 : int64_t(lines + 1) * grid.height / size.height + 5;
  if (rows > grid.height) rows = grid.height;
  const Strip strip(size, lines);
  return rows * grid.width * round_to_fours(channels) + (lines + 2 + strip.width) * int64_t(sizeof(Places) / 4);
}

// The codes of the tokens of some rows of a grid, (rows w, C) in fours of channels.
template <typename Team, typename Token>
FASTVAR_HOST_DEVICE inline void stage_codes(const Team& team, const Tokenizer& tokenizer, const Token* tokens,
                                            Grid grid, Bin rows, float* codes) {
  const auto channels = int32_t(tokenizer.channels), fours = (channels + 3) / 4;
  const bool whole = in_fours(tokenizer.codebook, channels);
  for (int32_t i = team.rank(); i < (rows.end - rows.first) * grid.width * fours; i += team.size()) {
    const int32_t place = i / fours, c = i % fours * 4;
    const int64_t token = tokens[rows.first * grid.width + place], last = tokenizer.vocabulary - 1;
    const float* from = tokenizer.codebook + (token < 0 ? 0 : token > last ? last : token) * channels + c;
    float* to = codes + 4 * i;
    if (whole) {
      copy_later(reinterpret_cast<Four*>(to), reinterpret_cast<const Four*>(from));
    } else {
      for (int32_t j = 0; j < 4 && c + j < channels; ++j) copy_later(to + j, from + j);
    }
  }
}

// Where the taps of an axis are in what is staged.
FASTVAR_HOST_DEVICE inline Places places_of(int32_t i, int32_t in, int32_t out, int32_t first, int32_t stride) {
  if (i < 0 || i >= out) return {{-1, -1, -1, -1}, {0, 0, 0, 0}};
  const Taps<4> taps = cubic_taps(i, in, out);
  Places places;
  for (int32_t j = 0; j < 4; ++j) {
    places.at[j] = (taps.index[j] - first) * stride;
    places.weight[j] = taps.weight[j];
  }
  return places;
}

// The codes of tokens, upsampled, to a strip from the fine row `first` on: (C, rows + 2, W + 2). Cells outside of the
// image are zeros. `scratch` has room for staged_floats.
template <typename Team, typename Token>
FASTVAR_HOST_DEVICE inline void upsample(const Team& team, const Tokenizer& tokenizer, const Token* tokens, Grid grid,
                                         Grid size, int32_t first, const Strip& strip, float* scratch, float* to) {
  const Bin staged = rows_below(first - 1, strip.rows + 2, size, grid);
  const auto channels = int32_t(tokenizer.channels), stride = int32_t(round_to_fours(channels));
  const int32_t rows = strip.rows + 2, runs = strip.width / 4;
  auto* down = reinterpret_cast<Places*>(scratch);
  Places* across = down + rows;
  auto* codes = reinterpret_cast<float*>(across + strip.width);
  stage_codes(team, tokenizer, tokens, grid, staged, codes);
  for (int32_t i = team.rank(); i < rows + strip.width; i += team.size())
    down[i] = i < rows ? places_of(first + i - 1, grid.height, size.height, staged.first, grid.width * stride)
                       : places_of(i - rows - 1, grid.width, size.width, 0, stride);
  finish_copies();
  team.sync();
  // Neighbours take neighbouring channels of the same cells: some columns, row by row. From row to row the taps stay or
  // move on by one row of codes, which is then all that is interpolated anew.
  const int32_t segments = (rows + SEGMENT - 1) / SEGMENT;
  for (int32_t i = team.rank(); i < channels * runs * segments; i += team.size()) {
    const int32_t c = i % channels, x = i / channels % runs * 4, low = i / channels / runs * SEGMENT;
    const int32_t high = low + SEGMENT < rows ? low + SEGMENT : rows;
    Places along[4];
    const float* columns[4][4];  // of the taps
    bool inside[4];
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) {
      along[j] = across[x + j];
      inside[j] = along[j].at[0] >= 0;
#pragma unroll
      for (int32_t b = 0; b < 4; ++b) columns[j][b] = codes + c + (inside[j] ? along[j].at[b] : 0);
    }
    int32_t held[4] = {-1, -1, -1, -1};
    float sums[4][4];  // of the codes' rows `held`, for each column
    for (int32_t y = low; y < high; ++y) {
      const Places over = down[y];
      Four values{};
      if (over.at[0] >= 0) {
        bool same = true, next = held[0] >= 0;
#pragma unroll
        for (int32_t a = 0; a < 4; ++a) {
          same &= over.at[a] == held[a];
          if (a < 3) next &= over.at[a] == held[a + 1];
        }
#pragma unroll
        for (int32_t a = 0; !same && a < 4; ++a) {
          if (a < 3 && next) {
#pragma unroll
            for (int32_t j = 0; j < 4; ++j) sums[a][j] = sums[a < 3 ? a + 1 : a][j];
          } else if (a > 0 && over.at[a] == over.at[a > 0 ? a - 1 : a]) {
#pragma unroll
            for (int32_t j = 0; j < 4; ++j) sums[a][j] = sums[a > 0 ? a - 1 : a][j];
          } else {
#pragma unroll
            for (int32_t j = 0; j < 4; ++j) {
              float sum = columns[j][0][over.at[a]] * along[j].weight[0];
#pragma unroll
              for (int32_t b = 1; b < 4; ++b) sum = multiply_add(columns[j][b][over.at[a]], along[j].weight[b], sum);
              sums[a][j] = sum;
            }
          }
          held[a] = over.at[a];
        }
#pragma unroll
        for (int32_t j = 0; j < 4; ++j) {
          float value = 0;
#pragma unroll
          for (int32_t a = 0; a < 4; ++a) value = multiply_add(sums[a][j], over.weight[a], value);
          values.at[j] = inside[j] ? value : 0;
        }
      }
      *reinterpret_cast<Four*>(to + c * strip.plane + y * strip.width + x) = values;
    }
  }
  team.sync();
}

// How the weights of some filters lie in shared memory: (depth, 9, filters), with room so that members that write one
// filter of neighbouring places do not meet in one bank.
struct Weights {
  int32_t stride, depth;  // floats of the filters; input channels at a time

  FASTVAR_HOST_DEVICE inline Weights(int32_t channels, int32_t filters)
      : stride(int32_t(round_up(filters, FILTERS)) | 4), depth(MOST_WEIGHTS / (9 * stride)) {
    depth = depth < 1 ? 1 : depth < channels ? depth : channels;
  }
  FASTVAR_HOST_DEVICE inline int64_t floats() const { return int64_t(depth) * 9 * stride; }
};

// phi of a strip for the channels low to high - 1: write(channel, y, x, value) for each cell of its rows in the image.
// `scratch` has room for the weights as `shape` lays them out. It is the layout for as many filters as any block has:
// one for fewer holds more input channels at a time, and may take more room.
template <typename Team, typename Write>
FASTVAR_HOST_DEVICE inline void apply_phi(const Team& team, const Tokenizer& tokenizer, int64_t phi, const float* from,
                                          Grid size, int32_t first, const Strip& strip, int32_t low, int32_t high,
                                          const Weights& shape, float* scratch, const Write& write) {
  const auto channels = int32_t(tokenizer.channels);
  const int32_t runs = (size.width + CELLS - 1) / CELLS, filters = (high - low + FILTERS - 1) / FILTERS;
  const int32_t items = strip.rows * runs * filters;
  const float* weights = tokenizer.phi_weight + phi * 9 * channels * channels;
  bool loaded = false;
  for (int32_t pass = 0; pass < items; pass += team.size()) {
    const int32_t item = pass + team.rank();
    const bool active = item < items;
    const int32_t row = active ? item / runs % strip.rows : 0, x = active ? item % runs * CELLS : 0;
    const int32_t filter = active ? item / runs / strip.rows * FILTERS : 0;
    float sums[CELLS][FILTERS];
    for (int32_t i = 0; i < CELLS; ++i)
      for (int32_t f = 0; f < FILTERS; ++f) sums[i][f] = 0;
    for (int32_t start = 0; tokenizer.phis && start < channels; start += shape.depth) {
      const int32_t depth = channels - start < shape.depth ? channels - start : shape.depth;
      if (!loaded) {  // (C_out, C_in, 9) to (depth, 9, filters), a warp for each filter
        for (int32_t f = team.rank() / WARP; f < filters * FILTERS; f += team.size() / WARP)
          for (int32_t i = team.rank() % WARP; i < depth * 9; i += WARP) {
            float* to = scratch + i * shape.stride + f;
            if (low + f < high)
              copy_later(to, weights + (int64_t(low + f) * channels + start) * 9 + i);
            else
              *to = 0;
          }
        finish_copies();
        team.sync();
        loaded = depth == channels;
      }
      for (int32_t c = 0; active && c < depth; ++c) {
#pragma unroll
        for (int32_t dy = 0; dy < 3; ++dy) {
          const float* line = from + (start + c) * strip.plane + (row + dy) * strip.width + x;
          const Four left = four(line), right = four(line + 4);
          const float values[CELLS + 2] = {left.at[0], left.at[1], left.at[2], left.at[3], right.at[0], right.at[1]};
#pragma unroll
          for (int32_t dx = 0; dx < 3; ++dx) {
            const Four weight = four(scratch + (c * 9 + dy * 3 + dx) * shape.stride + filter);
#pragma unroll
            for (int32_t f = 0; f < FILTERS; ++f)
#pragma unroll
              for (int32_t i = 0; i < CELLS; ++i) sums[i][f] = multiply_add(values[i + dx], weight.at[f], sums[i][f]);
          }
        }
      }
      if (!loaded) team.sync();
    }
#pragma unroll
    for (int32_t f = 0; f < FILTERS; ++f) {
      const int32_t channel = low + filter + f;
#pragma unroll
      for (int32_t i = 0; i < CELLS; ++i) {
        if (!active || channel >= high || x + i >= size.width || first + row >= size.height) continue;
        float value = from[channel * strip.plane + (row + 1) * strip.width + x + i + 1];
        if (tokenizer.phis) {
          const float blurred = sums[i][f] + tokenizer.phi_bias[phi * channels + channel];
          value = value * (1 - tokenizer.phi_ratio) + blurred * tokenizer.phi_ratio;
        }
        write(channel, first + row, x + i, value);
      }
    }
  }
  team.sync();
}

}  // namespace fastvar::quantize

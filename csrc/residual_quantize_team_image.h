// From images to rows of the search and from tokens to images, as a CUDA block does it; see residual_quantize_team.h.
#pragma once

#include "resample.h"
#include "residual_quantize_team_search.h"
#include "tokenizer.h"

namespace fastvar::quantize {

constexpr int32_t CELLS = 4;    // cells in a row of a member's share of a convolution
constexpr int32_t FILTERS = 4;  // output channels of it
constexpr int32_t DEPTH = 8;    // input channels of a convolution's weights that are in shared memory at a time

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
// plane(channel) is where the residual's plane of a channel is.
template <typename Team, typename Plane>
FASTVAR_HOST_DEVICE inline void make_rows(const Team& team, const Tokenizer& tokenizer, bool cosine,
                                          const Plane& plane, Grid size, Grid grid, int32_t first, int32_t count,
                                          int32_t stride, float* rows) {
  const auto channels = int32_t(tokenizer.channels);
  for (int32_t i = team.rank(); i < channels * stride; i += team.size()) {
    const int32_t c = i / stride, place = i % stride;
    rows[i] = place < count ? -2 * bin_mean(plane(c), size, grid, first + place) : 0;
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

}  // namespace fastvar::quantize

// All scales of a tokenizer of bits for one group of channels: channels do not depend on each other.
#pragma once

#include <cmath>
#include <vector>

#include "bitwise_residual_quantize/planes.h"
#include "common/checks.h"

namespace fastvar::bitwise {

constexpr int32_t kQuantizePlanes = 4;

struct QuantizeCall {
  const float* features;          // (B, d, H, W)
  const float* flip_probability;  // (K,), or null for no flips
  const Size* grids;              // (K,), coarse to fine; no side shrinks
  int32_t scales;
  int32_t depth;
  int64_t tokens;  // of all scales, L
  bool area;       // next inputs by "area" instead of "bilinear"
  float size;      // of a code in each channel, 1 / sqrt(d)
  int64_t seed, first_image;
  uint8_t* bits;       // (B, L, d)
  float* feature_map;  // (B, d, H, W)
  float* inputs;       // (B, L - n_1, d)

  FASTVAR_HOST_DEVICE inline Size finest() const { return grids[scales - 1]; }
};

// features (B, d, H, W), flip_probability (K,) or (0,), sides (h_1, w_1, h_2, ...); the results are written. The call's
// `grids` are left to the caller.
inline QuantizeCall quantize_call(const Tensor& features, const Tensor& flip_probability,
                                  const std::vector<int64_t>& sides, bool area, int64_t seed, int64_t first_image,
                                  const Tensor& bits, const Tensor& feature_map, const Tensor& inputs) {
  const Checks check("bitwise_residual_quantize", features);
  const int64_t tokens = check.grids(sides), height = sides[sides.size() - 2], width = sides.back();
  check.tensor("features", features, ScalarType::Float, {ANY, ANY, height, width});
  const int64_t batch = features.size(0), depth = features.size(1), scales = int64_t(sides.size() / 2);
  check.number("channels", depth, 0, MOST_CHANNELS);
  check.tensor("flip_probability", flip_probability, ScalarType::Float, {flip_probability.numel() ? scales : 0});
  check.tensor("bits", bits, ScalarType::Bool, {batch, tokens, depth});
  check.tensor("feature_map", feature_map, ScalarType::Float, {batch, depth, height, width});
  check.tensor("inputs", inputs, ScalarType::Float, {batch, tokens - sides[0] * sides[1], depth});
  QuantizeCall call{};
  call.features = input<float>(features);
  call.flip_probability = flip_probability.numel() ? input<float>(flip_probability) : nullptr;
  call.scales = int32_t(scales);
  call.depth = int32_t(depth);
  call.tokens = tokens;
  call.area = area;
  call.size = float(1.0 / std::sqrt(double(call.depth)));
  call.seed = seed;
  call.first_image = first_image;
  call.bits = output<uint8_t>(bits);
  call.feature_map = output<float>(feature_map);
  call.inputs = output<float>(inputs);
  return call;
}

// codes (h, w) and the bits of one scale, from the sums over rows in wide. The sum over a bin has the mean's sign.
template <typename V>
FASTVAR_HOST_DEVICE inline void decide(const Share& share, const QuantizeCall& call, int32_t scale, int64_t image,
                                       int64_t first_token, int32_t channel, int32_t channels, const Tables& tables,
                                       const Scratch<V>& scratch) {
  using Bits = typename BitsOf<V>::type;
  const Size grid = call.grids[scale], finest = call.finest();
  const float probability = call.flip_probability ? call.flip_probability[scale] : 0.0f;
  for (int32_t i = share.row; i < grid.height; i += share.rows) {
    for (int32_t j = share.column; j < grid.width; j += share.columns) {
      Bits bits = positive(sum_columns(scratch.wide, i, tables.bin_columns[j], finest.width));
      const int64_t place = (first_token + int64_t(i) * grid.width + j) * call.depth + channel;
      put(bits, call.bits + image * call.tokens * call.depth + place, channels);
      if (call.flip_probability) {
        V number;
        draw(call.seed, call.first_image + image, place, number);
        bits ^= below(number, probability);
      }
      scratch.codes[i * grid.width + j] = signed_size(bits, call.size);
    }
  }
}

// The channels `channel` to channel + channels - 1 of an image.
template <typename V, typename Team>
FASTVAR_HOST_DEVICE inline void quantize(const Team& team, const QuantizeCall& call, int64_t image, int32_t channel,
                                         int32_t channels, const Scratch<V>& scratch) {
  const Share share(team);
  const Size finest = call.finest();
  const Tables tables(scratch.tables, finest);
  const int32_t cells = finest.cells();
  const int64_t plane = (image * call.depth + channel) * cells;
  load_planes(team, call.features + plane, cells, channels, scratch.target);
  for (int32_t i = team.rank(); i < cells; i += team.size()) scratch.map[i] = V{};
  int64_t first_token = 0, first_input = 0;
  for (int32_t k = 0; k < call.scales; ++k) {
    const Size grid = call.grids[k];
    fill_up(team, grid, finest, tables);
    fill_down(team, grid, finest, tables);
    team.sync();
    if (k > 0) {
      const int64_t inputs = call.tokens - call.grids[0].cells();
      float* out = call.inputs + (image * inputs + first_input) * call.depth + channel;
      first_input += grid.cells();
      if (call.area) {
        sum_rows<false>(share, grid, finest, tables, scratch);
        team.sync();
        put_means(share, grid, finest, tables, scratch.wide, out, call.depth, channels);
        team.sync();
      } else {
        put_samples(share, grid, finest, tables, scratch.map, out, call.depth, channels);
      }
    }
    sum_rows<true>(share, grid, finest, tables, scratch);
    team.sync();
    decide(share, call, k, image, first_token, channel, channels, tables, scratch);
    first_token += grid.cells();
    team.sync();
    widen(share, grid, finest, tables, scratch);
    team.sync();
    add(share, finest, tables, scratch);
    team.sync();
  }
  store_planes(team, scratch.map, cells, channels, call.feature_map + plane);
}

}  // namespace fastvar::bitwise

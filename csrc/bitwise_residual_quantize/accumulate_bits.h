// The bits of one scale for one group of channels: into the feature map, and out of it the next input.
#pragma once

#include <cmath>

#include "bitwise_residual_quantize/planes.h"
#include "common/checks.h"

namespace fastvar::bitwise {

constexpr int32_t kAccumulatePlanes = 3;

struct AccumulateCall {
  const float* feature_map;  // (B, d, H, W)
  const uint8_t* bits;       // (B, h w, d)
  Size grid, next, finest;   // next without cells: no input is wanted
  int32_t depth;
  bool area;           // the next input by "area" instead of "bilinear"
  float size;          // of a code in each channel, 1 / sqrt(d)
  float* accumulated;  // (B, d, H, W)
  float* input;        // (B, h' w', d)
};

// feature_map (B, d, H, W), bits (B, h w, d) of a grid; the results are written, an input of `next_height` times
// `next_width` tokens, or of none.
inline AccumulateCall accumulate_call(const Tensor& feature_map, const Tensor& bits, int64_t height, int64_t width,
                                      int64_t next_height, int64_t next_width, bool area, const Tensor& accumulated,
                                      const Tensor& next_input) {
  const Checks check("accumulate_bits", feature_map);
  check.tensor("feature_map", feature_map, ScalarType::Float, {ANY, ANY, ANY, ANY});
  const int64_t batch = feature_map.size(0), depth = feature_map.size(1);
  const int64_t fine_height = feature_map.size(2), fine_width = feature_map.size(3);
  check.number("channels", depth, 0, MOST_CHANNELS);
  check.grid("finest grid", fine_height, fine_width, MOST_SIDE, MOST_SIDE);
  check.grid("grid", height, width, fine_height, fine_width);
  if (next_height != 0 || next_width != 0) check.grid("next grid", next_height, next_width, fine_height, fine_width);
  check.tensor("bits", bits, ScalarType::Bool, {batch, height * width, depth});
  check.tensor("accumulated", accumulated, ScalarType::Float, {batch, depth, fine_height, fine_width});
  check.tensor("next_input", next_input, ScalarType::Float, {batch, next_height * next_width, depth});
  AccumulateCall call{};
  call.feature_map = input<float>(feature_map);
  call.bits = input<uint8_t>(bits);
  call.grid = {int32_t(height), int32_t(width)};
  call.next = {int32_t(next_height), int32_t(next_width)};
  call.finest = {int32_t(fine_height), int32_t(fine_width)};
  call.depth = int32_t(depth);
  call.area = area;
  call.size = float(1.0 / std::sqrt(double(call.depth)));
  call.accumulated = output<float>(accumulated);
  call.input = output<float>(next_input);
  return call;
}

// The channels `channel` to channel + channels - 1 of an image.
template <typename V, typename Team>
FASTVAR_HOST_DEVICE inline void accumulate(const Team& team, const AccumulateCall& call, int64_t image, int32_t channel,
                                           int32_t channels, const Scratch<V>& scratch) {
  const Share share(team);
  const Tables tables(scratch.tables, call.finest);
  const int32_t cells = call.finest.cells();
  const int64_t plane = (image * call.depth + channel) * cells;
  load_planes(team, call.feature_map + plane, cells, channels, scratch.map);
  for (int32_t i = team.rank(); i < call.grid.cells(); i += team.size()) {
    typename BitsOf<V>::type bits;
    get(call.bits + (image * call.grid.cells() + i) * call.depth + channel, channels, bits);
    scratch.codes[i] = signed_size(bits, call.size);
  }
  fill_up(team, call.grid, call.finest, tables);
  fill_down(team, call.next, call.finest, tables);
  team.sync();
  widen(share, call.grid, call.finest, tables, scratch);
  team.sync();
  add(share, call.finest, tables, scratch);
  team.sync();
  store_planes(team, scratch.map, cells, channels, call.accumulated + plane);
  float* out = call.input + image * call.next.cells() * call.depth + channel;
  if (call.area) {
    sum_rows<false>(share, call.next, call.finest, tables, scratch);
    team.sync();
    put_means(share, call.next, call.finest, tables, scratch.wide, out, call.depth, channels);
  } else {
    put_samples(share, call.next, call.finest, tables, scratch.map, out, call.depth, channels);
  }
}

}  // namespace fastvar::bitwise

// The bits of one scale for one group of channels: into the feature map, and out of it the next input.
#pragma once

#include "bitwise_planes.h"

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

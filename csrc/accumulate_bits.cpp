// accumulate_bits on a CPU.
#include "accumulate_bits.h"

#include <cmath>

#include "bitwise_cpu.h"

namespace fastvar::bitwise {
namespace {

FASTVAR_CLONES void accumulate_eight(const AccumulateCall& call, int64_t image, int32_t channel, int32_t channels,
                                     const Scratch<Eight>& scratch) {
  accumulate(Solo{}, call, image, channel, channels, scratch);
}

// feature_map (B, d, H, W), bits (B, h w, d) of a grid; the results are written, an input of `next_height` times
// `next_width` tokens. `ranks` simulates blocks of so many CUDA threads, for tests; 0 does not.
void accumulate_bits(const Tensor feature_map, const Tensor bits, int64_t height, int64_t width, int64_t next_height,
                     int64_t next_width, bool area, Tensor accumulated, Tensor next_input, int64_t ranks) {
  const int64_t batch = feature_map.size(0);
  AccumulateCall call{};
  call.feature_map = input<float>(feature_map);
  call.bits = input<uint8_t>(bits);
  call.grid = {int32_t(height), int32_t(width)};
  call.next = {int32_t(next_height), int32_t(next_width)};
  call.finest = {int32_t(feature_map.size(2)), int32_t(feature_map.size(3))};
  call.depth = int32_t(feature_map.size(1));
  call.area = area;
  call.size = float(1.0 / std::sqrt(double(call.depth)));
  call.accumulated = output<float>(accumulated);
  call.input = output<float>(next_input);
  if (ranks > 0) {
    each_by_team(batch, call.depth, call.finest, kAccumulatePlanes, int32_t(ranks),
                 [&](const Rank& team, int64_t image, int32_t channel, const Scratch<float>& scratch) {
                   accumulate(team, call, image, channel, 1, scratch);
                 });
    return;
  }
  const int64_t grain = 1 + 4096 / call.finest.cells();
  each_eight(batch, call.depth, call.finest, kAccumulatePlanes, grain,
             [&](int64_t image, int32_t channel, int32_t channels, const Scratch<Eight>& scratch) {
               accumulate_eight(call, image, channel, channels, scratch);
             });
}

}  // namespace
}  // namespace fastvar::bitwise

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, m) {
  m.def(
      "accumulate_bits(Tensor feature_map, Tensor bits, int height, int width, int next_height, int next_width, "
      "bool area, Tensor(a!) accumulated, Tensor(b!) next_input, int ranks=0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, m) {
  m.impl("accumulate_bits", TORCH_BOX(&fastvar::bitwise::accumulate_bits));
}

// accumulate_bits on a CPU.
#include "bitwise_residual_quantize/accumulate_bits.h"

#include "bitwise_residual_quantize/cpu.h"

namespace fastvar::bitwise {
namespace {

// See accumulate_call. `ranks` simulates blocks of so many CUDA threads, for tests; 0 does not.
void accumulate_bits(const Tensor feature_map, const Tensor bits, int64_t height, int64_t width, int64_t next_height,
                     int64_t next_width, bool area, Tensor accumulated, Tensor next_input, int64_t ranks) {
  const AccumulateCall call =
      accumulate_call(feature_map, bits, height, width, next_height, next_width, area, accumulated, next_input);
  check_ranks("accumulate_bits", feature_map, ranks);
  const int64_t batch = feature_map.size(0);
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
               accumulate(Solo{}, call, image, channel, channels, scratch);
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

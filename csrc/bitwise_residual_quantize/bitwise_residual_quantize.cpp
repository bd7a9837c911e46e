// bitwise_residual_quantize on a CPU.
#include "bitwise_residual_quantize/bitwise_residual_quantize.h"

#include "bitwise_residual_quantize/cpu.h"

namespace fastvar::bitwise {
namespace {

// See quantize_call. `ranks` simulates blocks of so many CUDA threads, for tests; 0 does not.
void bitwise_residual_quantize(const Tensor features, const Tensor flip_probability, const std::vector<int64_t> sides,
                               bool area, int64_t seed, int64_t first_image, Tensor bits, Tensor feature_map,
                               Tensor inputs, int64_t ranks) {
  QuantizeCall call =
      quantize_call(features, flip_probability, sides, area, seed, first_image, bits, feature_map, inputs);
  check_ranks("bitwise_residual_quantize", features, ranks);
  std::vector<Size> grids;
  for (size_t k = 0; k < sides.size(); k += 2) grids.push_back({int32_t(sides[k]), int32_t(sides[k + 1])});
  call.grids = grids.data();
  const Size finest = grids.back();
  const int64_t batch = features.size(0);
  if (ranks > 0) {
    each_by_team(batch, call.depth, finest, kQuantizePlanes, int32_t(ranks),
                 [&](const Rank& team, int64_t image, int32_t channel, const Scratch<float>& scratch) {
                   quantize(team, call, image, channel, 1, scratch);
                 });
    return;
  }
  const int64_t grain = 1 + 8192 / (int64_t(finest.cells()) * call.scales);
  each_eight(batch, call.depth, finest, kQuantizePlanes, grain,
             [&](int64_t image, int32_t channel, int32_t channels, const Scratch<Eight>& scratch) {
               quantize(Solo{}, call, image, channel, channels, scratch);
             });
}

}  // namespace
}  // namespace fastvar::bitwise

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, m) {
  m.def(
      "bitwise_residual_quantize(Tensor features, Tensor flip_probability, int[] grids, bool area, int seed, "
      "int first_image, Tensor(a!) bits, Tensor(b!) feature_map, Tensor(c!) inputs, int ranks=0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, m) {
  m.impl("bitwise_residual_quantize", TORCH_BOX(&fastvar::bitwise::bitwise_residual_quantize));
}

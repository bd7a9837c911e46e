// bitwise_residual_quantize on a CPU.
#include "bitwise_residual_quantize.h"

#include <cmath>

#include "bitwise_cpu.h"

namespace fastvar::bitwise {
namespace {

FASTVAR_CLONES void quantize_eight(const QuantizeCall& call, int64_t image, int32_t channel, int32_t channels,
                                   const Scratch<Eight>& scratch) {
  quantize(Solo{}, call, image, channel, channels, scratch);
}

// features (B, d, H, W), flip_probability (K,) or (0,), grids (h_1, w_1, h_2, ...); the results are written. `ranks`
// simulates blocks of so many CUDA threads, for tests; 0 does not.
void bitwise_residual_quantize(const Tensor features, const Tensor flip_probability, std::vector<int64_t> grids,
                               bool area, int64_t seed, int64_t first_image, Tensor bits, Tensor feature_map,
                               Tensor inputs, int64_t ranks) {
  std::vector<Size> sizes;
  for (size_t k = 0; k < grids.size(); k += 2) sizes.push_back({int32_t(grids[k]), int32_t(grids[k + 1])});
  const Size finest = sizes.back();
  const int64_t batch = features.size(0);
  QuantizeCall call{};
  call.features = input<float>(features);
  call.flip_probability = flip_probability.numel() ? input<float>(flip_probability) : nullptr;
  call.grids = sizes.data();
  call.scales = int32_t(sizes.size());
  call.depth = int32_t(features.size(1));
  call.tokens = bits.size(1);
  call.area = area;
  call.size = float(1.0 / std::sqrt(double(call.depth)));
  call.seed = seed;
  call.first_image = first_image;
  call.bits = output<uint8_t>(bits);
  call.feature_map = output<float>(feature_map);
  call.inputs = output<float>(inputs);
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
               quantize_eight(call, image, channel, channels, scratch);
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

// bitwise_residual_quantize on a GPU: all scales in one launch, a block for each channel of each image, whose planes
// stay in shared memory.
#include "bitwise_residual_quantize/bitwise_residual_quantize.h"

#include "common/blocks_cuda.h"

namespace fastvar::bitwise {
namespace {

struct Grids {
  Size size[MOST_SCALES];
};

__global__ void __launch_bounds__(kThreads, 2)
    bitwise_residual_quantize_fwd_kernel(const __grid_constant__ QuantizeCall call, const __grid_constant__ Grids grids,
                                         const BlockMemory memory) {
  extern __shared__ float4 dynamic[];
  QuantizeCall own = call;
  own.grids = grids.size;
  const Scratch<float> scratch(memory.of_block(dynamic), own.finest());
  quantize(Block{}, own, blockIdx.x / own.depth, int32_t(blockIdx.x % own.depth), 1, scratch);
}

// See quantize_call.
void bitwise_residual_quantize(const Tensor features, const Tensor flip_probability, const std::vector<int64_t> sides,
                               bool area, int64_t seed, int64_t first_image, Tensor bits, Tensor feature_map,
                               Tensor inputs) {
  const QuantizeCall call =
      quantize_call(features, flip_probability, sides, area, seed, first_image, bits, feature_map, inputs);
  Checks("bitwise_residual_quantize", features).number("scales on a GPU", call.scales, 1, MOST_SCALES);
  Grids grids{};
  for (size_t k = 0; k < sides.size(); k += 2) grids.size[k / 2] = {int32_t(sides[k]), int32_t(sides[k + 1])};
  const Size finest = grids.size[call.scales - 1];
  launch_blocks(bitwise_residual_quantize_fwd_kernel, features, features.size(0) * call.depth, block_threads(finest),
                Scratch<float>::bytes(finest, kQuantizePlanes), call, grids);
}

}  // namespace
}  // namespace fastvar::bitwise

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cuda, m) {
  m.def(
      "bitwise_residual_quantize(Tensor features, Tensor flip_probability, int[] grids, bool area, int seed, "
      "int first_image, Tensor(a!) bits, Tensor(b!) feature_map, Tensor(c!) inputs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cuda, CUDA, m) {
  m.impl("bitwise_residual_quantize", TORCH_BOX(&fastvar::bitwise::bitwise_residual_quantize));
}

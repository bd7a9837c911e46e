// bitwise_residual_quantize on a GPU: all scales in one launch, a block for each channel of each image, whose planes
// stay in shared memory.
#include "bitwise_residual_quantize.h"

#include <cmath>
#include <vector>

#include "bitwise_cuda.h"

namespace fastvar::bitwise {
namespace {

constexpr size_t kMostScales = 64;

struct Grids {
  Size size[kMostScales];
};

__global__ void __launch_bounds__(kThreads, 2)
    quantize_kernel(const __grid_constant__ QuantizeCall call, const __grid_constant__ Grids grids, Memory memory) {
  extern __shared__ float4 dynamic[];
  QuantizeCall own = call;
  own.grids = grids.size;
  const Scratch<float> scratch(memory.of_block(dynamic), own.finest());
  quantize(Block{}, own, blockIdx.x / own.depth, int32_t(blockIdx.x % own.depth), 1, scratch);
}

// See bitwise_residual_quantize.cpp.
void bitwise_residual_quantize(const Tensor features, const Tensor flip_probability, std::vector<int64_t> sides,
                               bool area, int64_t seed, int64_t first_image, Tensor bits, Tensor feature_map,
                               Tensor inputs) {
  STD_TORCH_CHECK(sides.size() <= 2 * kMostScales, "bitwise_residual_quantize: grids: expected at most ", kMostScales,
                  " scales on a GPU, got ", sides.size() / 2);
  Grids grids{};
  QuantizeCall call{};
  for (size_t k = 0; k < sides.size(); k += 2) grids.size[k / 2] = {int32_t(sides[k]), int32_t(sides[k + 1])};
  call.scales = int32_t(sides.size() / 2);
  call.features = input<float>(features);
  call.flip_probability = flip_probability.numel() ? input<float>(flip_probability) : nullptr;
  call.depth = int32_t(features.size(1));
  call.tokens = bits.size(1);
  call.area = area;
  call.size = float(1.0 / std::sqrt(double(call.depth)));
  call.seed = seed;
  call.first_image = first_image;
  call.bits = output<uint8_t>(bits);
  call.feature_map = output<float>(feature_map);
  call.inputs = output<float>(inputs);
  launch_blocks(quantize_kernel, features, grids.size[call.scales - 1], kQuantizePlanes,
                [&](uint32_t blocks, uint32_t threads, const Memory& memory, cudaStream_t stream) {
                  quantize_kernel<<<blocks, threads, memory.shared, stream>>>(call, grids, memory);
                });
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

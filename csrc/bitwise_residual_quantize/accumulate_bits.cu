// accumulate_bits on a GPU in one launch, a block for each channel of each image.
#include "bitwise_residual_quantize/accumulate_bits.h"

#include "common/blocks_cuda.h"

namespace fastvar::bitwise {
namespace {

__global__ void __launch_bounds__(kThreads, 1)
    accumulate_bits_fwd_kernel(const __grid_constant__ AccumulateCall call, const BlockMemory memory) {
  extern __shared__ float4 dynamic[];
  const Scratch<float> scratch(memory.of_block(dynamic), call.finest);
  accumulate(Block{}, call, blockIdx.x / call.depth, int32_t(blockIdx.x % call.depth), 1, scratch);
}

// See accumulate_call.
void accumulate_bits(const Tensor feature_map, const Tensor bits, int64_t height, int64_t width, int64_t next_height,
                     int64_t next_width, bool area, Tensor accumulated, Tensor next_input) {
  const AccumulateCall call =
      accumulate_call(feature_map, bits, height, width, next_height, next_width, area, accumulated, next_input);
  launch_blocks(accumulate_bits_fwd_kernel, feature_map, feature_map.size(0) * call.depth, block_threads(call.finest),
                Scratch<float>::bytes(call.finest, kAccumulatePlanes), call);
}

}  // namespace
}  // namespace fastvar::bitwise

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cuda, m) {
  m.def(
      "accumulate_bits(Tensor feature_map, Tensor bits, int height, int width, int next_height, int next_width, "
      "bool area, Tensor(a!) accumulated, Tensor(b!) next_input) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cuda, CUDA, m) {
  m.impl("accumulate_bits", TORCH_BOX(&fastvar::bitwise::accumulate_bits));
}

// accumulate_bits on a GPU in one launch, a block for each channel of each image.
#include "accumulate_bits.h"

#include <cmath>

#include "bitwise_cuda.h"

namespace fastvar::bitwise {
namespace {

__global__ void __launch_bounds__(kThreads, 1)
    accumulate_kernel(const __grid_constant__ AccumulateCall call, Memory memory) {
  extern __shared__ float4 dynamic[];
  const Scratch<float> scratch(memory.of_block(dynamic), call.finest);
  accumulate(Block{}, call, blockIdx.x / call.depth, int32_t(blockIdx.x % call.depth), 1, scratch);
}

// See accumulate_bits.cpp.
void accumulate_bits(const Tensor feature_map, const Tensor bits, int64_t height, int64_t width, int64_t next_height,
                     int64_t next_width, bool area, Tensor accumulated, Tensor next_input) {
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
  launch_blocks(accumulate_kernel, feature_map, call.finest, kAccumulatePlanes,
                [&](uint32_t blocks, uint32_t threads, const Memory& memory, cudaStream_t stream) {
                  accumulate_kernel<<<blocks, threads, memory.shared, stream>>>(call, memory);
                });
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

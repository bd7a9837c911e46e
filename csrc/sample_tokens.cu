// sample_tokens on a GPU in one launch, a block for each row.
#include "sample_tokens.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "blocks_cuda.h"

namespace fastvar::sampling {
namespace {

// Of the largest blocks, on a multiprocessor: with 64 registers a thread code for older GPUs would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int32_t BLOCKS = 1;
#else
constexpr int32_t BLOCKS = 2;
#endif

template <typename T>
__global__ void __launch_bounds__(MOST_WARPS* WARP, BLOCKS)
    sample_kernel(const __grid_constant__ Call call, const BlockMemory) {
  extern __shared__ double dynamic[];
  sample<T>(Block{}, call, blockIdx.x, reinterpret_cast<Scratch*>(dynamic));
}

// See sample_call.
void sample_tokens(const Tensor logits, const Tensor others, const Tensor seeds, double gain, double guidance,
                   double temperature, int64_t top_k, double rest, double quantile, double density, int64_t position,
                   Tensor tokens, Tensor own, Tensor sampled) {
  const Call call = sample_call("sample_tokens", logits, others, seeds, gain, guidance, temperature, top_k, rest,
                                quantile, density, position, tokens, own, sampled);
  const auto launch = [&](auto* kernel) {
    launch_blocks(kernel, logits, tokens.numel(), (call.size + PART - 1) / PART * WARP, Scratch::bytes(call.size),
                  call);
  };
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return launch(sample_kernel<float>);
    case ScalarType::Half:
      return launch(sample_kernel<__half>);
    case ScalarType::BFloat16:
      return launch(sample_kernel<__nv_bfloat16>);
    default:
      STD_TORCH_CHECK(false, "sample_tokens: logits: expected float32, float16 or bfloat16");
  }
}

}  // namespace
}  // namespace fastvar::sampling

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cuda, m) {
  m.def(
      "sample_tokens(Tensor logits, Tensor others, Tensor seeds, float gain, float guidance, float temperature, "
      "int top_k, float rest, float quantile, float density, int position, Tensor(a!) tokens, Tensor(b!) own, "
      "Tensor(c!) sampled) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cuda, CUDA, m) { m.impl("sample_tokens", TORCH_BOX(&fastvar::sampling::sample_tokens)); }

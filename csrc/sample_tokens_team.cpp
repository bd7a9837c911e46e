// sample_tokens as CUDA blocks do it, by threads that stand for their warps: for tests of what cannot run here otherwise.
#include <memory>

#include "sample_tokens.h"

namespace fastvar::sampling {
namespace {

void sample_tokens(const Tensor logits, const Tensor others, const Tensor seeds, double gain, double guidance,
                   double temperature, int64_t top_k, double rest, double quantile, double density, int64_t position,
                   Tensor tokens, Tensor own, Tensor sampled) {
  const char* op = "sample_tokens_by_teams";
  STD_TORCH_CHECK(is_float(logits), op, ": logits: expected float32");
  const Call call = sample_call(op, logits, others, seeds, gain, guidance, temperature, top_k, rest, quantile, density,
                                position, tokens, own, sampled);
  const int64_t bytes = Scratch::bytes(call.size);
  const std::unique_ptr<double[]> memory(new double[bytes / 8 + 1]);
  for (int64_t row = 0; row < tokens.numel(); ++row) {
    std::fill(reinterpret_cast<char*>(memory.get()), reinterpret_cast<char*>(memory.get()) + bytes, char(-1));  // NaN
    as_team((call.size + PART - 1) / PART, [&](const Rank& rank) {
      sample<float>(rank, call, row, reinterpret_cast<Scratch*>(memory.get()));
    });
  }
}

}  // namespace
}  // namespace fastvar::sampling

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, library) {
  library.def(
      "sample_tokens_by_teams(Tensor logits, Tensor others, Tensor seeds, float gain, float guidance, "
      "float temperature, int top_k, float rest, float quantile, float density, int position, Tensor(a!) tokens, "
      "Tensor(b!) own, Tensor(c!) sampled) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, library) {
  library.impl("sample_tokens_by_teams", TORCH_BOX(&fastvar::sampling::sample_tokens));
}

// philox.h as an op, so that tests hold it to fastvar/random.py.

#include "philox.h"

namespace fastvar {
namespace {

// seed, stream, counter (N,) int64 -> (4, N) int64
FASTVAR_CLONES void fill(const int64_t* seed, const int64_t* stream, const int64_t* counter, int64_t count,
                         int64_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const Words words = philox(seed[i], stream[i], counter[i]);
    for (int word = 0; word < 4; ++word) out[word * count + i] = words.word[word];
  }
}

void philox_op(const Tensor seed, const Tensor stream, const Tensor counter, Tensor out) {
  fill(input<int64_t>(seed), input<int64_t>(stream), input<int64_t>(counter), seed.numel(), output<int64_t>(out));
}

}  // namespace
}  // namespace fastvar

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, m) {
  m.def("philox(Tensor seed, Tensor stream, Tensor counter, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, m) { m.impl("philox", TORCH_BOX(&fastvar::philox_op)); }

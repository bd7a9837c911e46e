// The taps of resample.h as tensors, for the tests that hold them to PyTorch's.
#include "common/resample.h"

namespace fastvar {
namespace {

// bins (out, 2) int32: first and end of each bin over `size` cells.
void area_bins(Tensor bins, int64_t size) {
  auto* bin = output<int32_t>(bins);
  const auto out = int32_t(bins.size(0));
  for (int32_t i = 0; i < out; ++i) {
    const Bin found = area_bin(i, int32_t(size), out);
    bin[2 * i] = found.first;
    bin[2 * i + 1] = found.end;
  }
}

template <int N>
void write(const Taps<N>& taps, int32_t* index, float* weight) {
  for (int j = 0; j < N; ++j) {
    index[j] = taps.index[j];
    weight[j] = taps.weight[j];
  }
}

// index (out, N) int32 and weight (out, N) float32 over `size` cells; N is 2 for linear, 4 for cubic.
void resample_taps(Tensor index, Tensor weight, int64_t size) {
  auto* at = output<int32_t>(index);
  auto* by = output<float>(weight);
  const auto out = int32_t(index.size(0)), in = int32_t(size);
  for (int32_t i = 0; i < out; ++i) {
    if (index.size(1) == 2) {
      write(linear_taps(i, in, out), at + 2 * i, by + 2 * i);
    } else {
      write(cubic_taps(i, in, out), at + 4 * i, by + 4 * i);
    }
  }
}

}  // namespace
}  // namespace fastvar

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, m) {
  m.def("area_bins(Tensor(a!) bins, int size) -> ()");
  m.def("resample_taps(Tensor(a!) index, Tensor(b!) weight, int size) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, m) {
  m.impl("area_bins", TORCH_BOX(&fastvar::area_bins));
  m.impl("resample_taps", TORCH_BOX(&fastvar::resample_taps));
}

// propagate_mask on GPUs: one launch, a thread block for each image and all its scales.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "propagate_mask.h"

namespace fastvar::propagate_mask {
namespace {

constexpr int MOST_SCALES = 64;
constexpr int THREADS = 256;

struct Schedule {
  int32_t grids[2 * MOST_SCALES];
  int32_t scales;
};

// mask [B, H, W], out [B, L]; scratch holds `bytes` for each image, or is null where shared memory has them.
template <typename Sum, typename Cell, typename Out>
__global__ void __launch_bounds__(THREADS) image(const Cell* mask, const Schedule schedule, bool support, char* scratch,
                                                 int64_t bytes, int64_t tokens, Out* out) {
  extern __shared__ double shared[];
  const int64_t b = blockIdx.x;
  const int32_t* grids = schedule.grids;
  const int32_t scales = schedule.scales, height = grids[2 * scales - 2], width = grids[2 * scales - 1];
  Sum* sums = scratch ? reinterpret_cast<Sum*>(scratch + b * bytes) : reinterpret_cast<Sum*>(shared);
  auto* intervals = reinterpret_cast<Interval*>(sums + static_cast<int64_t>(height + 1) * (width + 1));
  const Block block;
  fill_intervals(block, grids, scales, support, intervals);
  integrate(block, mask + b * height * width, height, width, sums);
  gather(block, sums, intervals, grids, scales, out + b * tokens);
}

template <typename Sum, typename Cell, typename Out>
void launch(const Tensor& mask, const Schedule& schedule, bool support, const Tensor& scratch, int64_t bytes,
            const Tensor& out, cudaStream_t stream) {
  const bool shared = scratch.numel() == 0;
  image<Sum, Cell, Out><<<static_cast<unsigned>(mask.size(0)), THREADS, shared ? bytes : 0, stream>>>(
      input<Cell>(mask), schedule, support, shared ? nullptr : output<char>(scratch), bytes, out.size(1),
      output<Out>(out));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// mask (B, H, W) bool or float -> out (B, L) bool or float. scratch (B, bytes) uint8, a multiple of 8 for each image,
// or empty if they fit into shared memory.
void run(const Tensor mask, const std::vector<int64_t> grids, bool support, Tensor scratch, int64_t bytes, Tensor out) {
  STD_TORCH_CHECK(grids.size() <= 2 * MOST_SCALES, "propagate_mask: schedule: expected at most ", MOST_SCALES,
                  " scales, got ", grids.size() / 2);
  if (mask.size(0) == 0) return;
  Schedule schedule{};
  schedule.scales = static_cast<int32_t>(grids.size() / 2);
  for (size_t i = 0; i < grids.size(); ++i) schedule.grids[i] = static_cast<int32_t>(grids[i]);
  const torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(mask.get_device_index(), &current));
  const auto stream = static_cast<cudaStream_t>(current);
  if (is_bool(mask)) {
    is_bool(out) ? launch<int32_t, uint8_t, uint8_t>(mask, schedule, support, scratch, bytes, out, stream)
                 : launch<double, uint8_t, float>(mask, schedule, support, scratch, bytes, out, stream);
  } else {
    is_bool(out) ? launch<int32_t, float, uint8_t>(mask, schedule, support, scratch, bytes, out, stream)
                 : launch<double, float, float>(mask, schedule, support, scratch, bytes, out, stream);
  }
}

}  // namespace
}  // namespace fastvar::propagate_mask

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cuda, m) {
  m.def("propagate_mask(Tensor mask, int[] grids, bool support, Tensor(b!) scratch, int bytes, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cuda, CUDA, m) { m.impl("propagate_mask", TORCH_BOX(&fastvar::propagate_mask::run)); }

// propagate_mask on GPUs: one launch, a thread block for each image and all its scales.

#include "propagate_mask/propagate_mask.h"

#include "common/blocks_cuda.h"

namespace fastvar::propagate_mask {
namespace {

constexpr int32_t THREADS = 256;

struct Schedule {
  int32_t grids[2 * MOST_SCALES];
  int32_t scales;
};

// mask [B, H, W], out [B, L]. A block's memory holds the integral image, then the intervals.
template <typename Sum, typename Cell, typename Out>
__global__ void __launch_bounds__(THREADS)
    propagate_mask_fwd_kernel(const Cell* mask, const Schedule schedule, bool support, int64_t tokens, Out* out,
                              const BlockMemory memory) {
  extern __shared__ double shared[];
  const int64_t b = blockIdx.x;
  const int32_t* grids = schedule.grids;
  const int32_t scales = schedule.scales, height = grids[2 * scales - 2], width = grids[2 * scales - 1];
  Sum* sums = static_cast<Sum*>(memory.of_block(shared));
  auto* intervals = reinterpret_cast<Interval*>(sums + static_cast<int64_t>(height + 1) * (width + 1));
  const Block block;
  fill_intervals(block, grids, scales, support, intervals);
  integrate(block, mask + b * height * width, height, width, sums);
  gather(block, sums, intervals, grids, scales, out + b * tokens);
}

template <typename Sum, typename Cell, typename Out>
void launch(const Tensor& mask, const Schedule& schedule, bool support, const Tensor& out) {
  int64_t bytes = sizeof(Sum) * (mask.size(1) + 1) * (mask.size(2) + 1);
  for (int32_t i = 0; i < 2 * schedule.scales; ++i) bytes += sizeof(Interval) * schedule.grids[i];
  launch_blocks(propagate_mask_fwd_kernel<Sum, Cell, Out>, mask, mask.size(0), THREADS, (bytes + 7) / 8 * 8,
                input<Cell>(mask), schedule, support, out.size(1), output<Out>(out));
}

// See checked.
void run(const Tensor mask, const std::vector<int64_t> grids, bool support, Tensor out) {
  const std::vector<int32_t> sides = checked(mask, grids, out);
  Schedule schedule{};
  schedule.scales = static_cast<int32_t>(sides.size() / 2);
  Checks("propagate_mask", mask).number("scales on a GPU", schedule.scales, 1, MOST_SCALES);
  for (size_t i = 0; i < sides.size(); ++i) schedule.grids[i] = sides[i];
  if (is_bool(mask)) {
    is_bool(out) ? launch<int32_t, uint8_t, uint8_t>(mask, schedule, support, out)
                 : launch<double, uint8_t, float>(mask, schedule, support, out);
  } else {
    is_bool(out) ? launch<int32_t, float, uint8_t>(mask, schedule, support, out)
                 : launch<double, float, float>(mask, schedule, support, out);
  }
}

}  // namespace
}  // namespace fastvar::propagate_mask

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cuda, m) {
  m.def("propagate_mask(Tensor mask, int[] grids, bool support, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cuda, CUDA, m) { m.impl("propagate_mask", TORCH_BOX(&fastvar::propagate_mask::run)); }

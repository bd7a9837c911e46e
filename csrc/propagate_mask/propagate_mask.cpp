// propagate_mask on CPUs: an image at a time, all scales at once.

#include "propagate_mask/propagate_mask.h"

#include <memory>
#include <vector>

namespace fastvar::propagate_mask {
namespace {

template <typename Sum, typename Cell, typename Out>
void images(const Tensor& mask, const std::vector<int32_t>& grids, bool support, int32_t threads, const Tensor& out) {
  const auto scales = static_cast<int32_t>(grids.size() / 2);
  const int32_t height = grids[grids.size() - 2], width = grids.back();
  int32_t sides = 0;
  for (const int32_t side : grids) sides += side;
  std::vector<Interval> intervals(sides);
  const int64_t cells = static_cast<int64_t>(height) * width, tokens = out.size(1);
  const Cell* from = input<Cell>(mask);
  Out* to = output<Out>(out);
  if (threads > 1) {
    std::vector<Sum> sums(static_cast<size_t>(height + 1) * (width + 1));
    for (int64_t b = 0; b < mask.size(0); ++b) {
      as_team(threads, [&](const Rank& team) {
        fill_intervals(team, grids.data(), scales, support, intervals.data());
        integrate(team, from + b * cells, height, width, sums.data());
        gather(team, sums.data(), intervals.data(), grids.data(), scales, to + b * tokens);
      });
    }
    return;
  }
  fill_intervals(Solo{}, grids.data(), scales, support, intervals.data());
  parallel_for(0, mask.size(0), 1 + 32768 / tokens, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Sum[]> sums(new Sum[static_cast<size_t>(height + 1) * (width + 1)]);
    for (int64_t b = begin; b < end; ++b) {
      integrate(Solo{}, from + b * cells, height, width, sums.get());
      gather(Solo{}, sums.get(), intervals.data(), grids.data(), scales, to + b * tokens);
    }
  });
}

// See checked. With more than one of `threads` they share an image as those of a CUDA block do, for tests.
void run(const Tensor mask, const std::vector<int64_t> grids, bool support, int64_t threads, Tensor out) {
  const std::vector<int32_t> sides = checked(mask, grids, out);
  Checks("propagate_mask", mask).number("threads", threads, 1, MOST_THREADS);
  const auto team = static_cast<int32_t>(threads);
  if (is_bool(mask)) {
    is_bool(out) ? images<int32_t, uint8_t, uint8_t>(mask, sides, support, team, out)
                 : images<double, uint8_t, float>(mask, sides, support, team, out);
  } else {
    is_bool(out) ? images<int32_t, float, uint8_t>(mask, sides, support, team, out)
                 : images<double, float, float>(mask, sides, support, team, out);
  }
}

}  // namespace
}  // namespace fastvar::propagate_mask

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, m) {
  m.def("propagate_mask(Tensor mask, int[] grids, bool support, int threads, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, m) { m.impl("propagate_mask", TORCH_BOX(&fastvar::propagate_mask::run)); }

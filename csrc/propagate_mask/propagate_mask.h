// A mask on the finest grid brought to the tokens of every scale, through the mask's integral image.
//
// A team (team.h) works on one image.
#pragma once

#include <vector>

#include "common/checks.h"
#include "common/team.h"

namespace fastvar::propagate_mask {

// Fine cells, `high` excluded.
struct Interval {
  int32_t low, high;
};

// mask (B, H, W) bool or float -> out (B, L): bool whether a token is on, or float how much of it is. Returns grids.
inline std::vector<int32_t> checked(const Tensor& mask, const std::vector<int64_t>& grids, const Tensor& out) {
  const Checks check("propagate_mask", mask);
  const int64_t tokens = check.grids(grids);
  check.tensor("mask", mask, is_bool(mask) ? ScalarType::Bool : ScalarType::Float,
               {ANY, grids[grids.size() - 2], grids.back()});
  check.tensor("out", out, is_bool(out) ? ScalarType::Bool : ScalarType::Float, {mask.size(0), tokens});
  return {grids.begin(), grids.end()};
}

FASTVAR_HOST_DEVICE inline int32_t ceil_div(int32_t a, int32_t b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }

// The fine cells of token i of `coarse` along one axis of `fine` >= `coarse` cells.
FASTVAR_HOST_DEVICE inline Interval interval(int32_t i, int32_t coarse, int32_t fine, bool support) {
  Interval found;
  if (!support || coarse == fine) {
    found = {i * fine / coarse, ceil_div((i + 1) * fine, coarse)};
  } else {
    // Bicubic upsampling of cell y reads the tokens s - 1 to s + 2 with s = floor((y + 1/2) coarse / fine - 1/2): token
    // i is among them from s = i - 2 to s = i + 1.
    const int32_t offset = fine - coarse;
    const int32_t low = ceil_div(2 * fine * (i - 2) + offset, 2 * coarse);
    const int32_t high = ceil_div(2 * fine * (i + 2) + offset, 2 * coarse);
    found = {low < 0 ? 0 : low, high > fine ? fine : high};
  }
  if (support) {  // phi's convolution reaches one cell further on each side
    if (found.low > 0) --found.low;
    if (found.high < fine) ++found.high;
  }
  return found;
}

// intervals: for each scale those of its h rows, then those of its w columns.
template <typename Team>
FASTVAR_HOST_DEVICE inline void fill_intervals(const Team& team, const int32_t* grids, int32_t scales, bool support,
                                               Interval* intervals) {
  const int32_t height = grids[2 * scales - 2], width = grids[2 * scales - 1];
  for (int32_t k = 0; k < scales; ++k) {
    const int32_t h = grids[2 * k], w = grids[2 * k + 1];
    for (int32_t i = team.rank(); i < h; i += team.size()) intervals[i] = interval(i, h, height, support);
    for (int32_t j = team.rank(); j < w; j += team.size()) intervals[h + j] = interval(j, w, width, support);
    intervals += h + w;
  }
  team.sync();
}

// Cells that are on (Sum int32_t), or the sum of their values (Sum double), over the rectangle above and left of each
// corner: sums[y (W + 1) + x] over the cells of rows < y and columns < x. mask [H, W].
template <typename Sum, typename Team, typename Cell>
FASTVAR_HOST_DEVICE inline void integrate(const Team& team, const Cell* mask, int32_t height, int32_t width,
                                          Sum* sums) {
  const int32_t stride = width + 1;
  for (int32_t x = team.rank(); x < stride; x += team.size()) sums[x] = 0;
  for (int32_t y = team.rank(); y < height; y += team.size()) {
    Sum total = 0;
    Sum* row = sums + static_cast<int64_t>(y + 1) * stride;
    row[0] = 0;
    for (int32_t x = 0; x < width; ++x) {
      const Cell cell = mask[static_cast<int64_t>(y) * width + x];
      if constexpr (sizeof(Sum) == sizeof(int32_t)) {
        total += cell > Cell(0);
      } else {
        total += cell;
      }
      row[x + 1] = total;
    }
  }
  team.sync();
  for (int32_t y = 1; y < height; ++y) {
    // each member has columns of its own, so that rows follow each other without waiting
    Sum* row = sums + static_cast<int64_t>(y + 1) * stride;
    for (int32_t x = team.rank(); x < stride; x += team.size()) row[x] += row[x - stride];
  }
  team.sync();
}

// out [L]: bool whether the footprint holds a cell that is on, or float the mean of its cells.
template <typename Sum, typename Team, typename Out>
FASTVAR_HOST_DEVICE inline void gather(const Team& team, const Sum* sums, const Interval* intervals,
                                       const int32_t* grids, int32_t scales, Out* out) {
  const int32_t stride = grids[2 * scales - 1] + 1;
  for (int32_t k = 0; k < scales; ++k) {
    const int32_t h = grids[2 * k], w = grids[2 * k + 1];
    const Interval* columns = intervals + h;
    const int32_t down = team.size() / w, right = team.size() % w;
    int32_t i = team.rank() / w, j = team.rank() % w;
    for (int64_t token = team.rank(); i < h; token += team.size()) {
      const Interval y = intervals[i], x = columns[j];
      const Sum* high = sums + static_cast<int64_t>(y.high) * stride;
      const Sum* low = sums + static_cast<int64_t>(y.low) * stride;
      const Sum total = (high[x.high] - high[x.low]) - (low[x.high] - low[x.low]);
      if constexpr (sizeof(Sum) == sizeof(int32_t)) {
        out[token] = total > 0;
      } else {
        const int32_t cells = (y.high - y.low) * (x.high - x.low);
        out[token] = static_cast<float>(total / cells);
      }
      i += down;
      j += right;
      if (j >= w) {
        j -= w;
        ++i;
      }
    }
    out += static_cast<int64_t>(h) * w;
    intervals += h + w;
  }
}

}  // namespace fastvar::propagate_mask

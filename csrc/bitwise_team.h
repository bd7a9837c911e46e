// Who does the work of one group of channels: a block of CUDA threads, or one thread of a CPU.
//
// A team has rank(), size() and sync(), after which all of its members see what each wrote before.
#pragma once

#include "common.h"

namespace fastvar::bitwise {

struct Solo {
  FASTVAR_HOST_DEVICE static inline constexpr int32_t rank() { return 0; }
  FASTVAR_HOST_DEVICE static inline constexpr int32_t size() { return 1; }
  FASTVAR_HOST_DEVICE static inline void sync() {}
};

#if defined(__CUDACC__)
struct Block {
  __device__ static int32_t rank() { return int32_t(threadIdx.x); }
  __device__ static int32_t size() { return int32_t(blockDim.x); }
  __device__ static void sync() { __syncthreads(); }
};
#endif

// A member's share of an image: the rows row, row + rows, ... and in them the columns column, column + columns, ... A
// team of more than 32 is a multiple of 32.
struct Share {
  int32_t row, rows, column, columns;

  template <typename Team>
  FASTVAR_HOST_DEVICE inline explicit Share(const Team& team)
      : row(team.rank() / (team.size() < 32 ? team.size() : 32)),
        rows(team.size() < 32 ? 1 : team.size() / 32),
        column(team.rank() % (team.size() < 32 ? team.size() : 32)),
        columns(team.size() < 32 ? team.size() : 32) {}
};

}  // namespace fastvar::bitwise

// Who works on one piece: a block of CUDA threads, or one thread of a CPU. After sync() every member of a team sees
// what the others wrote before.
#pragma once

#include "common.h"

#if !defined(__CUDACC__)
#include <barrier>
#include <thread>
#include <vector>
#endif

namespace fastvar {

struct Solo {
  static constexpr int32_t rank() { return 0; }
  static constexpr int32_t size() { return 1; }
  static void sync() {}
};

#if defined(__CUDACC__)

struct Block {
  __device__ static int32_t rank() { return static_cast<int32_t>(threadIdx.x); }
  __device__ static int32_t size() { return static_cast<int32_t>(blockDim.x); }
  __device__ static void sync() { __syncthreads(); }
};

#else

// One of the threads that stand for those of a block, in tests.
class Rank {
 public:
  Rank(int32_t rank, int32_t size, std::barrier<>* barrier) : rank_(rank), size_(size), barrier_(barrier) {}
  int32_t rank() const { return rank_; }
  int32_t size() const { return size_; }
  void sync() const { barrier_->arrive_and_wait(); }

 private:
  int32_t rank_, size_;
  std::barrier<>* barrier_;
};

// Runs f(team) on each of `size` threads.
template <typename F>
void as_team(int32_t size, const F& f) {
  std::barrier<> barrier(size);
  std::vector<std::thread> threads;
  for (int32_t rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] { f(Rank(rank, size, &barrier)); });
  }
  for (std::thread& thread : threads) thread.join();
}

#endif

}  // namespace fastvar

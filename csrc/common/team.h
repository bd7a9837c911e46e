// Who works on one piece: a block of CUDA threads, or one thread of a CPU. After sync() every member of a team sees
// what the others wrote before.
#pragma once

#include "common/common.h"

#if !defined(__CUDACC__)
#include <atomic>
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

// Members side by side that go in step. A thread that stands for one of a block does the work of a whole warp.
#if defined(__CUDACC__)
constexpr int32_t WARP = 32;
#else
constexpr int32_t WARP = 1;
#endif

// What several members do to one number at once; the result does not depend on their order.

template <typename T>
FASTVAR_HOST_DEVICE inline void lower(T* at, T value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 8)
    atomicMin(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
  else
    atomicMin(at, value);
#elif !defined(__CUDACC__)
  std::atomic_ref<T> number(*at);
  for (T old = number; value < old && !number.compare_exchange_weak(old, value);) {
  }
#endif
}

template <typename T>
FASTVAR_HOST_DEVICE inline void raise(T* at, T value) {
#if defined(__CUDA_ARCH__)
  atomicMax(at, value);
#elif !defined(__CUDACC__)
  std::atomic_ref<T> number(*at);
  for (T old = number; value > old && !number.compare_exchange_weak(old, value);) {
  }
#endif
}

// A number that others may lower meanwhile.
template <typename T>
FASTVAR_HOST_DEVICE inline T glance(T* at) {
#if defined(__CUDACC__)
  return *const_cast<volatile T*>(at);
#else
  return std::atomic_ref<T>(*at).load(std::memory_order_relaxed);
#endif
}

// Adds 1; returns what was there. In 32 bits, which a GPU adds to shared memory in one instruction.
FASTVAR_HOST_DEVICE inline uint32_t count_up(uint32_t* at) {
#if defined(__CUDA_ARCH__)
  return atomicAdd(at, 1u);
#elif !defined(__CUDACC__)
  return std::atomic_ref<uint32_t>(*at).fetch_add(1);
#else
  return 0;
#endif
}

// Which bit of a number that is not 0 is the lowest.
FASTVAR_HOST_DEVICE inline int32_t lowest_bit(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(int(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// Bits of floats as whole numbers that are in the order of the floats.
FASTVAR_HOST_DEVICE inline uint32_t to_ordered(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

FASTVAR_HOST_DEVICE inline float from_ordered(uint32_t bits) {
  return __builtin_bit_cast(float, bits >> 31 ? bits & 0x7fffffff : ~bits);
}

}  // namespace fastvar

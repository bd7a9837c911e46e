// residual_quantize and accumulate_scale on a CPU: their calls, memory and threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include "common/bfloat16.h"
#include "common/resample.h"
#include "residual_quantize/tokenizer.h"

namespace fastvar {

struct QuantizeCall {
  Tokenizer tokenizer;
  const float* features;     // (B, C, H, W)
  const int64_t* phi_index;  // (K,)
  const Grid* grids;         // (K,)
  int64_t batch;
  int32_t scales;
  bool cosine;
  bool screen;         // bfloat16 first, where the CPU multiplies them
  int64_t* tokens;     // (B, L)
  float* feature_map;  // (B, C, H, W)
  float* inputs;       // (B, L - n_1, C)
  int64_t* usage;      // (V,), zeros before
};

struct AccumulateCall {
  Tokenizer tokenizer;       // with one phi
  const float* feature_map;  // (B, C, H, W)
  const int64_t* tokens;     // (B, n)
  int64_t batch;
  Grid grid, next, finest;
  float* accumulated;  // (B, C, H, W)
  float* inputs;       // (B, n', C), nothing if next has no tokens
};

struct AccumulateGradients {
  Tokenizer tokenizer;
  const int64_t* tokens;  // (B, n)
  int64_t batch;
  Grid grid, next, finest;
  const float* grad;         // (B, C, H, W), or null
  const float* grad_inputs;  // (B, n', C), or null
  // what is asked for, or null
  float* feature_map;  // (B, C, H, W)
  float* codebook;     // (V, C)
  float* phi_weight;   // (C, C, 3, 3)
  float* phi_bias;     // (C)
};

// Memory that a thread keeps from call to call, as fresh pages cost more than what is computed on them. It is used as
// a stack and grows, up to a limit, to what a call needed.
class Stack {
 public:
  static Stack& of_thread() {
    thread_local Stack stack;
    return stack;
  }

  void* push(int64_t bytes) {
    if (used_ == 0 && size_ < wanted_) {
      ::operator delete(memory_, ALIGNMENT);
      memory_ = nullptr;
      size_ = 0;
      memory_ = static_cast<char*>(::operator new(wanted_, ALIGNMENT));
      size_ = wanted_;
    }
    const int64_t top = used_ + bytes;
    void* const data = top <= size_ ? memory_ + used_ : ::operator new(bytes, ALIGNMENT);
    used_ = top;  // not before: without memory nothing has changed
    wanted_ = used_ > wanted_ && used_ <= LIMIT ? used_ : wanted_;
    return data;
  }

  void pop(void* data, int64_t bytes) {
    if (used_ > size_) ::operator delete(data, ALIGNMENT);
    used_ -= bytes;
  }

  ~Stack() { ::operator delete(memory_, ALIGNMENT); }

  static constexpr auto ALIGNMENT = std::align_val_t(64);

 private:
  static constexpr int64_t LIMIT = 8 << 20;
  char* memory_ = nullptr;
  int64_t size_ = 0, used_ = 0, wanted_ = 0;
};

// Memory that is not initialised, aligned for any vector. It belongs to the thread and ends in reverse order.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : bytes_((size * int64_t(sizeof(T)) + 63) / 64 * 64), data_(static_cast<T*>(Stack::of_thread().push(bytes_))) {}
  ~Buffer() { Stack::of_thread().pop(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  const int64_t bytes_;
  T* const data_;
};

// The phases of a group of images: one after the other on the thread that called, or each over all threads.
struct Serial {
  template <typename F>
  void operator()(int64_t count, const F& phase) const {
    if (count > 0) phase(int64_t(0), count);
  }
};

struct Parallel {
  template <typename F>
  void operator()(int64_t count, const F& phase) const {
    parallel_for(0, count, 1, phase);
  }
};

// Whole images on each thread as far as they go round, and what is left over all threads.
template <typename Whole, typename Shared>
void share_out(int64_t batch, int64_t group, int threads, const Whole& whole, const Shared& shared) {
  const int64_t even = batch / threads * threads;
  parallel_for(0, even, even / threads, [&](int64_t low, int64_t high) {
    for (int64_t first = low; first < high; first += group) whole(first, high - first < group ? high - first : group);
  });
  if (even < batch) shared(even, batch - even);
}

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

}  // namespace fastvar

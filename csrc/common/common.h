// What all sources share: marks for functions, threads, access to tensors of torch's stable ABI.
//
// Products and sums are rounded one by one (-ffp-contract=off, --fmad=false), so that a function gives the same bits on
// every processor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

// Before `inline`: a function for both sides.
#if defined(__CUDACC__)
#define FASTVAR_HOST_DEVICE __host__ __device__
#else
#define FASTVAR_HOST_DEVICE __attribute__((always_inline))
#endif

namespace fastvar {

using torch::stable::Tensor;

// a b + c: one rounding on a GPU, two on a CPU.
FASTVAR_HOST_DEVICE inline float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// Calls f(low, high) for parts of [begin, end) on torch's threads. A part has at least `grain` indices, the last one
// perhaps fewer; a range of up to `grain` runs on the caller's thread. Of what f throws the caller gets one.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin < end) torch::stable::parallel_for(begin, end, grain, f);
}

// The elements of a contiguous tensor.
template <typename T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline bool is_bool(const Tensor& tensor) { return tensor.scalar_type() == torch::headeronly::ScalarType::Bool; }

}  // namespace fastvar

// What all sources share: marks for functions, threads, access to tensors of torch's stable ABI.
//
// Products and sums are rounded one by one (-ffp-contract=off, --fmad=false), so that a function gives the same bits on
// every processor and in every clone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

// Before `inline`: a function for both sides, which is always inlined, so that it follows its caller into its clones.
#if defined(__CUDACC__)
#define FASTVAR_HOST_DEVICE __host__ __device__
#else
#define FASTVAR_HOST_DEVICE __attribute__((always_inline))
#endif

// A function compiled for three levels of x86-64 (any, AVX2 with FMA, AVX-512); the loader takes the best one that the
// processor has. What it calls has to be inlined into it (FASTVAR_HOST_DEVICE), or it stays at the first level.
#if defined(FASTVAR_CLONES)  // by somebody who wants another choice, or none
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__CUDACC__)
#define FASTVAR_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FASTVAR_CLONES
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

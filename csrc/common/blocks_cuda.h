// Launches in which each block of threads works in memory of its own.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "common/checks.h"

namespace fastvar {

constexpr int64_t MOST_SCALES = 64;  // whose grids are parameters of a kernel

// Shared memory if it is large enough, otherwise parts of a tensor.
struct BlockMemory {
  int64_t apart;  // bytes between the parts of two blocks
  char* global;   // null for shared memory

  __device__ void* of_block(void* shared) const { return global ? global + int64_t(blockIdx.x) * apart : shared; }
};

// kernel(arguments..., memory) with `bytes` of memory for each block, a multiple of 8, on the tensor's device and
// current stream; no launch without blocks.
template <typename Kernel, typename... Arguments>
void launch_blocks(Kernel* kernel, const Tensor& lead, int64_t blocks, int32_t threads, int64_t bytes,
                   const Arguments&... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "expected at most ", INT32_MAX, " blocks of threads, got ", blocks);
  const int32_t device = lead.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  int available = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  BlockMemory memory{bytes, nullptr};
  int64_t shared = bytes;
  Tensor global;
  if (bytes > available) {
    shared = 0;
    global = torch::stable::new_empty(lead, {blocks * bytes}, ScalarType::Byte);
    memory.global = static_cast<char*>(global.mutable_data_ptr());
  } else {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  }
  kernel<<<uint32_t(blocks), uint32_t(threads), size_t(shared), static_cast<cudaStream_t>(stream)>>>(arguments...,
                                                                                                   memory);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace fastvar

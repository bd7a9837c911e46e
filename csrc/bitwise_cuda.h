// How the operators on bits are launched: a block of threads for each channel of each image.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "bitwise_planes.h"

namespace fastvar::bitwise {

constexpr int32_t kThreads = 512;

// Where the blocks' scratch lies: in shared memory if it fits, otherwise in a tensor.
struct Memory {
  int64_t shared;  // bytes of a block's shared memory, or 0
  int64_t apart;   // bytes between the scratch of two blocks in `global`
  char* global;

  __device__ void* of_block(void* dynamic) const { return shared ? dynamic : global + int64_t(blockIdx.x) * apart; }
};

// Calls launch(blocks, threads, memory, stream) on the tensor's device and current stream; no launch without blocks.
template <typename Kernel, typename Launch>
void launch_blocks(Kernel kernel, const Tensor& lead, Size finest, int32_t planes, const Launch& launch) {
  const int64_t blocks = lead.size(0) * lead.size(1);
  if (blocks == 0) return;
  const int32_t device = lead.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  int available = 0;
  STD_TORCH_CHECK(cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess);
  const int64_t bytes = Scratch<float>::bytes(finest, planes);
  Memory memory{bytes <= available ? bytes : 0, bytes, nullptr};
  Tensor global;
  if (memory.shared) {
    STD_TORCH_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)) ==
                    cudaSuccess);
  } else {
    global = torch::stable::new_empty(lead, {blocks * bytes / int64_t(sizeof(float))});
    memory.global = static_cast<char*>(global.mutable_data_ptr());
  }
  const int32_t threads = std::min(kThreads, (finest.cells() + 31) / 32 * 32);
  launch(uint32_t(blocks), uint32_t(threads), memory, static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error));
}

}  // namespace fastvar::bitwise

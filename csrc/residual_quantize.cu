// residual_quantize and accumulate_scale on GPUs. All scales in one launch: a block for each image, or a cluster that
// shares one where there are fewer images than multiprocessors, or an image does not fit into a block's shared memory.
// What does not fit into a cluster's takes two launches a scale. One step takes one launch.
#include "residual_quantize_team.h"

#include "residual_quantize_checks.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <vector>

namespace fastvar::quantize {
namespace {

constexpr size_t MOST_SCALES = 64;
constexpr int32_t MOST_PARTS = 8;  // of a cluster on any GPU that has them
constexpr int32_t IMAGE_THREADS = 512, TILE_THREADS = 256;
constexpr int32_t TILE_ROWS = 64;     // of the search
constexpr int32_t STEP_CHANNELS = 8;  // of a block of accumulate_scale

struct Schedule {
  Grid grids[MOST_SCALES];
  int32_t phi_index[MOST_SCALES];
};

// A block of a cluster.
struct ClusterBlock : Block {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __device__ static int32_t part() { return int32_t(cooperative_groups::this_cluster().block_rank()); }
  __device__ static int32_t parts() { return int32_t(cooperative_groups::this_cluster().num_blocks()); }
  template <typename T>
  __device__ static T* of_part(T* own, int32_t part) {
    return cooperative_groups::this_cluster().map_shared_rank(own, part);
  }
  __device__ static void sync_parts() { cooperative_groups::this_cluster().sync(); }
#else  // never launched
  __device__ static int32_t part() { return 0; }
  __device__ static int32_t parts() { return 1; }
  template <typename T>
  __device__ static T* of_part(T* own, int32_t) {
    return own;
  }
  __device__ static void sync_parts() { __syncthreads(); }
#endif
};

template <typename Team>
__device__ void image_of_block(const Team& team, const Call& call, const Schedule& schedule, const Sharing& sharing,
                               int64_t index) {
  extern __shared__ Four dynamic[];
  Call own = call;
  own.grids = schedule.grids;
  own.phi_index = schedule.phi_index;
  image(team, own, index, sharing, dynamic[0].at);
}

__global__ void __launch_bounds__(IMAGE_THREADS, 1)
    image_kernel(const __grid_constant__ Call call, const __grid_constant__ Schedule schedule, const Sharing sharing) {
  image_of_block(Alone<Block>(Block{}), call, schedule, sharing, blockIdx.x);
}

__global__ void __launch_bounds__(IMAGE_THREADS, 1)
    cluster_kernel(const __grid_constant__ Call call, const __grid_constant__ Schedule schedule,
                   const Sharing sharing) {
  image_of_block(ClusterBlock{}, call, schedule, sharing, blockIdx.x / ClusterBlock::parts());
}

__global__ void __launch_bounds__(TILE_THREADS)
    search_kernel(const __grid_constant__ TiledCall tiled, const __grid_constant__ Schedule schedule,
                  const Space space) {
  extern __shared__ Four dynamic[];
  TiledCall own = tiled;
  own.call.grids = schedule.grids;
  tiled_search(Alone<Block>(Block{}), own, blockIdx.y, int32_t(blockIdx.x), space, dynamic[0].at);
}

__global__ void __launch_bounds__(TILE_THREADS)
    add_kernel(const __grid_constant__ TiledCall tiled, const __grid_constant__ Schedule schedule, const Space space) {
  extern __shared__ Four dynamic[];
  TiledCall own = tiled;
  own.call.grids = schedule.grids;
  own.call.phi_index = schedule.phi_index;
  tiled_add(Alone<Block>(Block{}), own, blockIdx.y, int32_t(blockIdx.x), space, dynamic[0].at);
}

__global__ void __launch_bounds__(TILE_THREADS)
    step_kernel(const __grid_constant__ AccumulateCall call, const Space space) {
  extern __shared__ Four dynamic[];
  accumulate(Alone<Block>(Block{}), call, blockIdx.y, int32_t(blockIdx.x), space, dynamic[0].at);
}

// What this GPU has.
struct Device {
  int index = 0, processors = 0, shared = 0, major = 0;
  cudaStream_t stream = nullptr;

  explicit Device(const Tensor& lead) : index(lead.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  }
};

// Blocks (x, y) of so many threads with so many floats of shared memory, in clusters of `parts` blocks along x.
template <typename... Parameters>
class Launch {
 public:
  Launch(void (*kernel)(Parameters...), const Device& device, dim3 blocks, int32_t threads, int64_t floats,
         int32_t parts = 1)
      : kernel_(kernel) {
    const auto bytes = int64_t(sizeof(float)) * floats;
    STD_TORCH_CHECK(bytes <= device.shared, "expected channels and grids of which a block's part fits into ",
                    device.shared, " bytes of shared memory, got ", bytes);
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
    config_.gridDim = blocks;
    config_.blockDim = dim3(threads);
    config_.dynamicSmemBytes = size_t(bytes);
    config_.stream = device.stream;
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {unsigned(parts), 1, 1};
    config_.attrs = &cluster_;
    config_.numAttrs = parts > 1 ? 1 : 0;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  // Returns whether the GPU, or the part of it that there is, has room for a cluster; otherwise nothing is launched.
  bool operator()(Parameters... parameters) const {
    int clusters = 1;
    if (config_.numAttrs) STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel_, &config_));
    if (clusters) STD_CUDA_CHECK(cudaLaunchKernelEx(&config_, kernel_, parameters...));
    return clusters > 0;
  }

 private:
  void (*const kernel_)(Parameters...);
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute cluster_{};
};

// The most rows of a strip of which two blocks share a multiprocessor, as far as that is possible.
int32_t strip_lines(const Device& device, int32_t channels, Grid size, Grid grid) {
  int32_t lines = size.height;
  while (lines > 1) {
    const Space space(channels, TILE_THREADS, staged_floats(channels, size, grid, lines));
    if (tiled_add_floats(space, size, lines) * int64_t(sizeof(float)) <= (device.shared - 2048) / 2) break;
    lines = (lines + 1) / 2;
  }
  return lines;
}

// With strips as long as fit, of one row if none do.
Sharing longest_strips(const Device& device, const Call& call, int32_t parts) {
  int32_t lines = call.finest().height;
  for (;;) {
    const Sharing sharing(call, IMAGE_THREADS, parts, lines);
    if (lines == 1 || sharing.floats(call.finest()) * int64_t(sizeof(float)) <= device.shared) return sharing;
    lines = (lines + 1) / 2;
  }
}

void residual_quantize(const Tensor features, const Tensor codebook, const std::optional<Tensor> phi_weight,
                       const std::optional<Tensor> phi_bias, double phi_ratio, const std::vector<int64_t> phi_index,
                       const std::vector<int64_t> grids, bool cosine, Tensor tokens, Tensor feature_map, Tensor inputs,
                       Tensor usage) {
  check_quantize("residual_quantize", features, codebook, phi_weight, phi_bias, phi_index, grids, tokens, feature_map,
                 inputs, usage);
  const size_t scales = grids.size() / 2;
  STD_TORCH_CHECK(scales <= MOST_SCALES, "residual_quantize: schedule: expected at most ", MOST_SCALES, " scales, got ",
                  scales);
  const int64_t batch = features.size(0);
  if (batch == 0) return;
  Schedule schedule{};
  for (size_t k = 0; k < scales; ++k) {
    schedule.grids[k] = {int32_t(grids[2 * k]), int32_t(grids[2 * k + 1])};
    schedule.phi_index[k] = phi_index.empty() ? 0 : int32_t(phi_index[k]);
  }
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Device device(features);
  Call call{tokenizer_of(codebook, phi_weight, phi_bias, phi_ratio),
            input<float>(features),
            schedule.grids,  // for the host; the kernels have their own
            schedule.phi_index,
            int32_t(scales),
            cosine,
            tokens.size(1),
            output<int64_t>(tokens),
            output<float>(feature_map),
            output<float>(inputs),
            output<int64_t>(usage)};
  const Grid size = call.finest();
  const auto channels = int32_t(features.size(1));
  const auto fits = [&](int32_t parts) {
    return longest_strips(device, call, parts).floats(size) * int64_t(sizeof(float)) <= device.shared;
  };
  // clusters as large as leave no multiprocessor idle, or as the image needs; smaller ones where there is no room
  const int32_t most_parts = device.major >= 9 ? MOST_PARTS : 1;
  int32_t parts = most_parts;
  while (parts > 1 && batch * parts > device.processors) parts /= 2;
  while (parts < most_parts && !fits(parts)) parts *= 2;
  for (; parts > 0 && fits(parts); parts /= 2) {
    const Sharing sharing = longest_strips(device, call, parts);
    const Launch launch(parts > 1 ? cluster_kernel : image_kernel, device, dim3(unsigned(batch * parts)),
                        IMAGE_THREADS, sharing.floats(size), parts);
    if (launch(call, schedule, sharing)) return;
  }
  const Tensor residual = torch::stable::new_empty(features, {batch, channels, size.height, size.width});
  TiledCall tiled{call, output<float>(residual), 0, 0, TILE_ROWS, 0};
  for (; tiled.scale < call.scales; ++tiled.scale) {
    const Grid grid = schedule.grids[tiled.scale];
    tiled.lines = strip_lines(device, channels, size, grid);
    const Space searched(channels, TILE_THREADS, 0);
    const Space added(channels, TILE_THREADS, staged_floats(channels, size, grid, tiled.lines));
    const auto blocks = unsigned((grid.tokens() + TILE_ROWS - 1) / TILE_ROWS);
    const auto strips = unsigned((size.height + tiled.lines - 1) / tiled.lines);
    for (int64_t first = 0; first < batch; first += 65535) {  // as many blocks as fit along y
      const auto count = unsigned(std::min<int64_t>(batch - first, 65535));
      TiledCall part = tiled;
      const int64_t plane = channels * size.tokens();
      part.residual += first * plane;
      part.call.features += first * plane;
      part.call.feature_map += first * plane;
      part.call.tokens += first * call.length;
      part.call.inputs += first * call.inputs_length() * channels;
      Launch(search_kernel, device, dim3(blocks, count), TILE_THREADS,
             tiled_search_floats(searched, TILE_ROWS))(part, schedule, searched);
      Launch(add_kernel, device, dim3(strips, count), TILE_THREADS,
             tiled_add_floats(added, size, tiled.lines))(part, schedule, added);
    }
    tiled.start += grid.tokens();
  }
}

void accumulate_scale(const Tensor feature_map, const Tensor tokens, const Tensor codebook,
                      const std::optional<Tensor> phi_weight, const std::optional<Tensor> phi_bias, double phi_ratio,
                      int64_t height, int64_t width, int64_t next_height, int64_t next_width, Tensor accumulated,
                      Tensor inputs) {
  check_accumulate("accumulate_scale", feature_map, tokens, codebook, phi_weight, phi_bias, height, width, next_height,
                   next_width, accumulated, inputs);
  const int64_t batch = feature_map.size(0);
  if (batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(feature_map.get_device_index());
  const Device device(feature_map);
  AccumulateCall call{tokenizer_of(codebook, phi_weight, phi_bias, phi_ratio),
                      input<float>(feature_map),
                      input<int64_t>(tokens),
                      {int32_t(height), int32_t(width)},
                      {int32_t(next_height), int32_t(next_width)},
                      {int32_t(feature_map.size(2)), int32_t(feature_map.size(3))},
                      STEP_CHANNELS,
                      0,
                      output<float>(accumulated),
                      output<float>(inputs)};
  const auto channels = int32_t(feature_map.size(1));
  call.lines = strip_lines(device, channels, call.finest, call.grid);
  const Space space(channels, TILE_THREADS, staged_floats(channels, call.finest, call.grid, call.lines));
  const auto blocks = unsigned((channels + STEP_CHANNELS - 1) / STEP_CHANNELS);
  const int64_t plane = channels * call.finest.tokens();
  for (int64_t first = 0; first < batch; first += 65535) {
    const auto count = unsigned(std::min<int64_t>(batch - first, 65535));
    AccumulateCall part = call;
    part.feature_map += first * plane;
    part.accumulated += first * plane;
    part.tokens += first * call.grid.tokens();
    part.inputs += first * call.next.tokens() * channels;
    Launch(step_kernel, device, dim3(blocks, count), TILE_THREADS,
           tiled_add_floats(space, call.finest, call.lines))(part, space);
  }
}

}  // namespace
}  // namespace fastvar::quantize

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cuda, library) {
  library.def(
      "residual_quantize(Tensor features, Tensor codebook, Tensor? phi_weight, Tensor? phi_bias, float phi_ratio, "
      "int[] phi_index, int[] grids, bool cosine, Tensor(a!) tokens, Tensor(b!) feature_map, "
      "Tensor(c!) inputs, Tensor(d!) usage) -> ()");
  library.def(
      "accumulate_scale(Tensor feature_map, Tensor tokens, Tensor codebook, Tensor? phi_weight, Tensor? phi_bias, "
      "float phi_ratio, int height, int width, int next_height, int next_width, Tensor(a!) accumulated, "
      "Tensor(b!) inputs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cuda, CUDA, library) {
  library.impl("residual_quantize", TORCH_BOX(&fastvar::quantize::residual_quantize));
  library.impl("accumulate_scale", TORCH_BOX(&fastvar::quantize::accumulate_scale));
}

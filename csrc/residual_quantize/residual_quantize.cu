// residual_quantize and accumulate_scale on GPUs. One launch packs the codes for the search, a second one does all
// scales: a block for each image, or a cluster that shares one where there are fewer images than multiprocessors, or an
// image does not fit into a block's shared memory. What does not fit into a cluster's takes two launches a scale. One
// step takes one launch. All blocks lie along one axis of the grid, the only one that holds more than 65,535.
#include "residual_quantize/team.h"

#include "residual_quantize/arguments.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace fastvar::quantize {
namespace {

constexpr size_t MOST_SCALES = 64;
constexpr int32_t MOST_PARTS = 8;  // of a cluster on any GPU that has them
constexpr int32_t IMAGE_THREADS = 256, TILE_THREADS = 256;
constexpr int32_t PACK_THREADS = 64, MOST_PACKS = 64;
constexpr int32_t SEARCH_ROWS = 64;   // of a block of the search
constexpr int32_t WISHED_ROWS = 256;  // of a tile of the search where an image's rows are in shared memory
constexpr int32_t LEAST_LINES = 4;    // of a strip there: shorter ones are mostly frame
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

// Of a launch along x: `each` blocks for each image, from the image `first` on.
struct Images {
  int64_t first;
  int32_t each;

  __device__ int64_t index() const { return first + blockIdx.x / unsigned(each); }
  __device__ int32_t block() const { return int32_t(blockIdx.x % unsigned(each)); }
};

__global__ void __launch_bounds__(PACK_THREADS)
    residual_quantize_fwd_pack_kernel(const Tokenizer tokenizer, const __grid_constant__ Codes codes) {
  __shared__ float bounds[2];
  pack(Block{}, tokenizer, codes, int32_t(blockIdx.x), bounds);
}

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
    residual_quantize_fwd_image_kernel(const Images images, const __grid_constant__ Call call,
                                       const __grid_constant__ Schedule schedule,
                                       const __grid_constant__ Sharing sharing) {
  image_of_block(Alone<Block>(Block{}), call, schedule, sharing, images.index());
}

__global__ void __launch_bounds__(IMAGE_THREADS, 1)
    residual_quantize_fwd_cluster_kernel(const Images images, const __grid_constant__ Call call,
                                         const __grid_constant__ Schedule schedule,
                                         const __grid_constant__ Sharing sharing) {
  image_of_block(ClusterBlock{}, call, schedule, sharing, images.index());
}

__global__ void __launch_bounds__(TILE_THREADS, 1)
    residual_quantize_fwd_search_kernel(const Images images, const __grid_constant__ TiledCall tiled,
                                        const __grid_constant__ Schedule schedule) {
  extern __shared__ Four dynamic[];
  TiledCall own = tiled;
  own.call.grids = schedule.grids;
  tiled_search(Alone<Block>(Block{}), own, images.index(), images.block(), dynamic[0].at);
}

__global__ void __launch_bounds__(TILE_THREADS, 1)
    residual_quantize_fwd_add_kernel(const Images images, const __grid_constant__ TiledCall tiled,
                                     const __grid_constant__ Schedule schedule) {
  extern __shared__ Four dynamic[];
  TiledCall own = tiled;
  own.call.grids = schedule.grids;
  own.call.phi_index = schedule.phi_index;
  tiled_add(Alone<Block>(Block{}), own, images.index(), images.block(), dynamic[0].at);
}

__global__ void __launch_bounds__(TILE_THREADS, 1)
    accumulate_scale_fwd_kernel(const Images images, const __grid_constant__ AccumulateCall call) {
  extern __shared__ Four dynamic[];
  accumulate(Alone<Block>(Block{}), call, images.index(), images.block(), dynamic[0].at);
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

  // Bytes of which two blocks of a multiprocessor have as many.
  int64_t half() const { return (shared - 2048) / 2; }
};

// Kernels of which each block has so many threads and floats of shared memory, in clusters of `parts` blocks.
template <typename... Parameters>
class Launch {
 public:
  Launch(void (*kernel)(Images, Parameters...), const Device& device, int32_t threads, int64_t floats,
         int32_t parts = 1)
      : kernel_(kernel), device_(device) {
    const auto bytes = int64_t(sizeof(float)) * floats;
    STD_TORCH_CHECK(bytes <= device.shared, "expected channels and grids of which a block's part fits into ",
                    device.shared, " bytes of shared memory, got ", bytes);
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
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

  // With `each` blocks for each of the images. Returns whether the GPU, or the part of it that there is, has room for a
  // cluster; otherwise nothing is launched.
  bool operator()(int64_t images, int64_t each, const Parameters&... parameters) {
    STD_TORCH_CHECK(each <= INT32_MAX, "expected at most ", INT32_MAX, " blocks of an image, got ", each);
    if (!has_room()) return false;
    const int64_t most = INT32_MAX / each;
    for (int64_t first = 0; first < images; first += most) {
      config_.gridDim = dim3(unsigned(std::min(images - first, most) * each));
      STD_CUDA_CHECK(cudaLaunchKernelEx(&config_, kernel_, Images{first, int32_t(each)}, parameters...));
    }
    return true;
  }

 private:
  // The driver takes long to answer, and its answer stays: it is asked once.
  bool has_room() {
    if (!config_.numAttrs) return true;
    static std::mutex mutex;
    static std::map<std::tuple<int, size_t, unsigned>, bool> known;
    const std::lock_guard<std::mutex> guard(mutex);
    const auto [found, added] =
        known.try_emplace({device_.index, config_.dynamicSmemBytes, cluster_.val.clusterDim.x}, false);
    if (added) {
      int clusters = 0;
      config_.gridDim = dim3(cluster_.val.clusterDim.x);
      const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel_, &config_);
      if (error != cudaSuccess) known.erase(found);
      STD_CUDA_CHECK(error);
      found->second = clusters > 0;
    }
    return found->second;
  }

  void (*const kernel_)(Images, Parameters...);
  const Device& device_;
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute cluster_{};
};

// Lines of as few strips as fit into so many bytes, of one row if none do.
int32_t strip_lines(int64_t bytes, int32_t channels, int32_t filters, Grid size, Grid grid) {
  for (int32_t strips = 1; strips < size.height; ++strips) {
    const int32_t lines = (size.height + strips - 1) / strips;
    if (strip_floats(channels, filters, size, grid, lines) * int64_t(sizeof(float)) <= bytes) return lines;
  }
  return 1;
}

// With as few strips as fit, of one row if none do, which is then too short.
Sharing fewest_strips(const Device& device, const Call& call, int32_t parts) {
  const Grid size = call.finest();
  for (int32_t strips = 1; strips < size.height; ++strips) {
    for (const int32_t rows : {WISHED_ROWS, 0}) {
      const Sharing sharing(call, parts, (size.height + strips - 1) / strips, rows);
      if (sharing.floats(size) * int64_t(sizeof(float)) <= device.shared) return sharing;
    }
  }
  return Sharing(call, parts, 1, 0);
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
            {},
            input<float>(features),
            schedule.grids,  // for the host; the kernels have their own
            schedule.phi_index,
            int32_t(scales),
            tokens.size(1),
            output<int64_t>(tokens),
            output<float>(feature_map),
            output<float>(inputs),
            output<int64_t>(usage)};
  const Grid size = call.finest();
  const auto channels = int32_t(features.size(1));
  const auto packs = int32_t(std::min<int64_t>((codebook.size(0) + PACK_THREADS - 1) / PACK_THREADS, MOST_PACKS));
  const Tensor packed = torch::stable::new_empty(features, {Codes::floats(call.tokenizer, cosine, packs)});
  call.codes = Codes::in(output<float>(packed), call.tokenizer, cosine, packs);
  residual_quantize_fwd_pack_kernel<<<packs, PACK_THREADS, 0, device.stream>>>(call.tokenizer, call.codes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const auto fits = [&](int32_t parts) {
    const Sharing sharing = fewest_strips(device, call, parts);
    return sharing.lines >= std::min(size.height, LEAST_LINES) &&
           sharing.floats(size) * int64_t(sizeof(float)) <= device.shared;
  };
  // clusters as large as leave no multiprocessor idle, or as the image needs; smaller ones where there is no room
  const int32_t most_parts = device.major >= 9 ? MOST_PARTS : 1;
  int32_t parts = most_parts;
  while (parts > 1 && batch * parts > device.processors) parts /= 2;
  while (parts < most_parts && !fits(parts)) parts *= 2;
  for (; parts > 0 && fits(parts); parts /= 2) {
    const Sharing sharing = fewest_strips(device, call, parts);
    const auto kernel = parts > 1 ? residual_quantize_fwd_cluster_kernel : residual_quantize_fwd_image_kernel;
    Launch launch(kernel, device, IMAGE_THREADS, sharing.floats(size), parts);
    if (launch(batch, parts, call, schedule, sharing)) return;
  }
  const Tensor residual = torch::stable::new_empty(features, {batch, channels, size.height, size.width});
  TiledCall tiled{call, output<float>(residual), 0, 0, SEARCH_ROWS, 0};
  Launch search(residual_quantize_fwd_search_kernel, device, TILE_THREADS, tiled_search_floats(channels, SEARCH_ROWS));
  for (; tiled.scale < call.scales; ++tiled.scale) {
    const Grid grid = schedule.grids[tiled.scale];
    tiled.lines = strip_lines(device.half(), channels, channels, size, grid);
    search(batch, (grid.tokens() + SEARCH_ROWS - 1) / SEARCH_ROWS, tiled, schedule);
    Launch add(residual_quantize_fwd_add_kernel, device, TILE_THREADS,
               strip_floats(channels, channels, size, grid, tiled.lines));
    add(batch, (size.height + tiled.lines - 1) / tiled.lines, tiled, schedule);
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
  call.lines = strip_lines(device.half(), channels, STEP_CHANNELS, call.finest, call.grid);
  Launch step(accumulate_scale_fwd_kernel, device, TILE_THREADS,
              strip_floats(channels, STEP_CHANNELS, call.finest, call.grid, call.lines));
  step(batch, (channels + STEP_CHANNELS - 1) / STEP_CHANNELS, call);
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

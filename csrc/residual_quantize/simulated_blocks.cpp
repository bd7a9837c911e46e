// residual_quantize and accumulate_scale as CUDA blocks do them, by threads that stand for those of the blocks: for
// tests of what cannot run here otherwise.
#include <algorithm>
#include <memory>
#include <optional>

#include "residual_quantize/arguments.h"
#include "residual_quantize/team.h"

namespace fastvar::quantize {
namespace {

// A member of one of the blocks of a cluster.
class Part : public Rank {
 public:
  Part(const Rank& all, int32_t members, std::barrier<>* own, float* const* memories)
      : Rank(all.rank() % members, members, own), all_(all), memories_(memories) {}
  int32_t part() const { return all_.rank() / size(); }
  int32_t parts() const { return all_.size() / size(); }
  template <typename T>
  T* of_part(T* own, int32_t part) const {
    return reinterpret_cast<T*>(memories_[part] + (reinterpret_cast<float*>(own) - memories_[this->part()]));
  }
  void sync_parts() const { all_.sync(); }

 private:
  const Rank all_;
  float* const* const memories_;
};

// Memory of a block, aligned as shared memory is, and full of NaN.
std::unique_ptr<Four[]> block_memory(int64_t floats) {
  std::unique_ptr<Four[]> memory(new Four[round_to_fours(floats) / 4]);
  std::fill(memory[0].at, memory[0].at + floats, NAN);
  return memory;
}

// The codes as a launch of blocks packs them.
std::unique_ptr<Four[]> packed(Call* call, bool cosine, int32_t members) {
  constexpr int32_t PACKS = 3;
  auto memory = block_memory(Codes::floats(call->tokenizer, cosine, PACKS));
  call->codes = Codes::in(memory[0].at, call->tokenizer, cosine, PACKS);
  for (int32_t block = 0; block < PACKS; ++block) {
    const auto own = block_memory(2);
    as_team(members, [&](const Rank& rank) { pack(rank, call->tokenizer, call->codes, block, own[0].at); });
  }
  return memory;
}

void clusters(const Call& call, int64_t batch, int32_t members, int32_t parts, int32_t lines) {
  const Sharing sharing(call, parts, lines, parts % 2 ? 0 : 256);  // both of what a launch tries
  for (int64_t index = 0; index < batch; ++index) {
    std::vector<std::unique_ptr<Four[]>> memories;
    std::vector<float*> floats;
    std::vector<std::unique_ptr<std::barrier<>>> barriers;
    for (int32_t part = 0; part < parts; ++part) {
      memories.push_back(block_memory(sharing.floats(call.finest())));
      floats.push_back(memories.back()[0].at);
      barriers.push_back(std::make_unique<std::barrier<>>(members));
    }
    as_team(members * parts, [&](const Rank& all) {
      const Part team(all, members, barriers[all.rank() / members].get(), floats.data());
      image(team, call, index, sharing, floats[team.part()]);
    });
  }
}

void tiles(const Call& call, int64_t batch, int32_t members, int32_t rows, int32_t lines) {
  const Grid size = call.finest();
  const auto channels = int32_t(call.tokenizer.channels);
  const std::unique_ptr<float[]> residual(new float[batch * channels * size.tokens()]);
  TiledCall tiled{call, residual.get(), 0, 0, rows, lines};
  for (; tiled.scale < call.scales; ++tiled.scale) {
    const Grid grid = call.grids[tiled.scale];
    for (int64_t index = 0; index < batch; ++index) {
      for (int32_t block = 0; block * rows < grid.tokens(); ++block) {
        const auto memory = block_memory(tiled_search_floats(channels, rows));
        as_team(members, [&](const Rank& rank) { tiled_search(Alone<Rank>(rank), tiled, index, block, memory[0].at); });
      }
      for (int32_t block = 0; block * lines < size.height; ++block) {
        const auto memory = block_memory(strip_floats(channels, channels, size, grid, lines));
        as_team(members, [&](const Rank& rank) { tiled_add(Alone<Rank>(rank), tiled, index, block, memory[0].at); });
      }
    }
    tiled.start += grid.tokens();
  }
}

// With rows above 0 by tiles of so many rows of the search and lines of the image, otherwise by clusters of so many
// parts with strips of so many lines.
void residual_quantize(const Tensor features, const Tensor codebook, const std::optional<Tensor> phi_weight,
                       const std::optional<Tensor> phi_bias, double phi_ratio, const std::vector<int64_t> phi_index,
                       const std::vector<int64_t> grids, bool cosine, int64_t members, int64_t parts, int64_t rows,
                       int64_t lines, Tensor tokens, Tensor feature_map, Tensor inputs, Tensor usage) {
  check_quantize("residual_quantize_by_teams", features, codebook, phi_weight, phi_bias, phi_index, grids, tokens,
                 feature_map, inputs, usage);
  const Checks checks("residual_quantize_by_teams", features);
  checks.number("members", members, 1, MOST_THREADS);
  checks.number("parts", parts, 1, MOST_THREADS / members);
  checks.number("rows", rows % TILE_ROWS, 0, 0);
  checks.number("lines", lines, 1, MOST_SIDE);
  std::vector<Grid> sizes;
  for (size_t i = 0; i < grids.size(); i += 2) sizes.push_back({int32_t(grids[i]), int32_t(grids[i + 1])});
  std::vector<int32_t> phis(phi_index.begin(), phi_index.end());
  phis.resize(sizes.size());
  Call call{tokenizer_of(codebook, phi_weight, phi_bias, phi_ratio),
                  {},
                  input<float>(features),
                  sizes.data(),
                  phis.data(),
                  int32_t(sizes.size()),
                  tokens.size(1),
                  output<int64_t>(tokens),
                  output<float>(feature_map),
                  output<float>(inputs),
                  output<int64_t>(usage)};
  const auto memory = packed(&call, cosine, int32_t(members));
  if (rows > 0)
    tiles(call, features.size(0), int32_t(members), int32_t(rows), int32_t(lines));
  else
    clusters(call, features.size(0), int32_t(members), int32_t(parts), int32_t(lines));
}

void accumulate_scale(const Tensor feature_map, const Tensor tokens, const Tensor codebook,
                      const std::optional<Tensor> phi_weight, const std::optional<Tensor> phi_bias, double phi_ratio,
                      int64_t height, int64_t width, int64_t next_height, int64_t next_width, int64_t members,
                      int64_t channels, int64_t lines, Tensor accumulated, Tensor inputs) {
  check_accumulate("accumulate_scale_by_teams", feature_map, tokens, codebook, phi_weight, phi_bias, height, width,
                   next_height, next_width, accumulated, inputs);
  const Checks checks("accumulate_scale_by_teams", feature_map);
  checks.number("members", members, 1, MOST_THREADS);
  checks.number("channels", channels, 1, MOST_SIDE);
  checks.number("lines", lines, 1, MOST_SIDE);
  const AccumulateCall call{tokenizer_of(codebook, phi_weight, phi_bias, phi_ratio),
                            input<float>(feature_map),
                            input<int64_t>(tokens),
                            {int32_t(height), int32_t(width)},
                            {int32_t(next_height), int32_t(next_width)},
                            {int32_t(feature_map.size(2)), int32_t(feature_map.size(3))},
                            int32_t(channels),
                            int32_t(lines),
                            output<float>(accumulated),
                            output<float>(inputs)};
  const auto all = int32_t(feature_map.size(1));
  for (int64_t index = 0; index < feature_map.size(0); ++index)
    for (int32_t block = 0; block * channels < all; ++block) {
      const auto memory = block_memory(strip_floats(all, int32_t(channels), call.finest, call.grid, call.lines));
      as_team(int32_t(members),
              [&](const Rank& rank) { accumulate(Alone<Rank>(rank), call, index, block, memory[0].at); });
    }
}

}  // namespace
}  // namespace fastvar::quantize

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, library) {
  library.def(
      "residual_quantize_by_teams(Tensor features, Tensor codebook, Tensor? phi_weight, Tensor? phi_bias, "
      "float phi_ratio, int[] phi_index, int[] grids, bool cosine, int members, int parts, int rows, int lines, "
      "Tensor(a!) tokens, Tensor(b!) feature_map, Tensor(c!) inputs, Tensor(d!) usage) -> ()");
  library.def(
      "accumulate_scale_by_teams(Tensor feature_map, Tensor tokens, Tensor codebook, Tensor? phi_weight, "
      "Tensor? phi_bias, float phi_ratio, int height, int width, int next_height, int next_width, int members, "
      "int channels, int lines, Tensor(a!) accumulated, Tensor(b!) inputs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, library) {
  library.impl("residual_quantize_by_teams", TORCH_BOX(&fastvar::quantize::residual_quantize));
  library.impl("accumulate_scale_by_teams", TORCH_BOX(&fastvar::quantize::accumulate_scale));
}

// residual_quantize on a CPU.
#include "residual_quantize/arguments.h"
#include "residual_quantize/images.h"
#include "residual_quantize/search.h"

namespace fastvar::vectors {
namespace {

// All scales of images from `first` on.
template <typename Each>
void quantize_group(const QuantizeCall& call, const Codes& codes, const Convolutions* convolutions, int64_t first,
                    int64_t count, Each each, int threads) {
  const Grid size = call.grids[call.scales - 1];
  const int64_t stride = codes.stride, channels = codes.channels, cells = size.tokens();
  int64_t length = 0;
  for (int32_t k = 0; k < call.scales; ++k) length += call.grids[k].tokens();
  const int64_t inputs_length = (length - call.grids[0].tokens()) * channels;
  const Images<Each> images(call.tokenizer, count, size, true, each);
  Buffer<float> rows(count * cells * stride);
  each(count, [&](int64_t low, int64_t high) {
    for (int64_t image = low; image < high; ++image) {
      images.read(call.features + (first + image) * channels * cells, images.residual(image));
      std::fill(images.map(image), images.map(image) + cells * stride, 0.0f);
    }
  });
  int64_t start = 0;
  for (int32_t k = 0; k < call.scales; ++k) {
    const Grid grid = call.grids[k];
    const int64_t tokens = grid.tokens();
    each(count * grid.height, [&](int64_t low, int64_t high) {
      for (int64_t i = low * grid.width; i < high * grid.width; ++i)
        pool(images.residual(i / tokens), size, grid, i % tokens, stride, rows.get() + i * stride);
    });
    int64_t* found = call.tokens + first * length + start;
    search(codes, call.cosine, rows.get(), count * tokens, each, threads,
           [&](int64_t i) { return found + i / tokens * length + i % tokens; });
    images.upsample(found, length, grid);
    images.add(convolutions, convolutions ? call.phi_index[k] : 0);
    start += tokens;
    if (k + 1 < call.scales) {
      float* inputs = call.inputs + first * inputs_length + (start - call.grids[0].tokens()) * channels;
      images.next_inputs(call.grids[k + 1], inputs, inputs_length);
    }
  }
  each(count, [&](int64_t low, int64_t high) {
    for (int64_t image = low; image < high; ++image)
      images.write(images.map(image), call.feature_map + (first + image) * channels * cells);
  });
}

void quantize(const QuantizeCall& call, int threads) {
  const Codes codes(call.tokenizer, call.cosine, call.screen);
  const Convolutions convolutions(call.tokenizer);
  const Convolutions* phi = call.tokenizer.phis ? &convolutions : nullptr;
  const int64_t cells = call.grids[call.scales - 1].tokens();
  int64_t length = 0;
  for (int32_t k = 0; k < call.scales; ++k) length += call.grids[k].tokens();
  share_out(
      call.batch, cells < 2048 ? 2048 / cells : 1, threads,
      [&](int64_t first, int64_t count) { quantize_group(call, codes, phi, first, count, Serial(), 1); },
      [&](int64_t first, int64_t count) { quantize_group(call, codes, phi, first, count, Parallel(), threads); });
  for (int64_t i = 0; i < call.batch * length; ++i) ++call.usage[call.tokens[i]];
}

void residual_quantize(Tensor features, Tensor codebook, std::optional<Tensor> phi_weight,
                       std::optional<Tensor> phi_bias, double phi_ratio, std::vector<int64_t> phi_index,
                       std::vector<int64_t> grids, bool cosine, bool screen, Tensor tokens,
                       Tensor feature_map, Tensor inputs, Tensor usage) {
  check_quantize("residual_quantize", features, codebook, phi_weight, phi_bias, phi_index, grids, tokens, feature_map,
                 inputs, usage);
  std::vector<Grid> sizes;
  for (size_t i = 0; i + 1 < grids.size(); i += 2) sizes.push_back({int32_t(grids[i]), int32_t(grids[i + 1])});
  QuantizeCall call{tokenizer_of(codebook, phi_weight, phi_bias, phi_ratio),
                    input<float>(features),
                    phi_index.empty() ? nullptr : phi_index.data(),
                    sizes.data(),
                    features.size(0),
                    int32_t(sizes.size()),
                    cosine,
                    screen,
                    output<int64_t>(tokens),
                    output<float>(feature_map),
                    output<float>(inputs),
                    output<int64_t>(usage)};
  quantize(call, int(torch::stable::get_num_threads()));
}

// Floats of a vector, and one more where pairs of bfloat16 are multiplied.
int64_t vector_unit() { return LANES + multiplies_pairs(); }

}  // namespace
}  // namespace fastvar::vectors

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, m) {
  m.def("vector_unit() -> int");
  m.def(
      "residual_quantize(Tensor features, Tensor codebook, Tensor? phi_weight, Tensor? phi_bias, float phi_ratio, "
      "int[] phi_index, int[] grids, bool cosine, bool screen, Tensor(a!) tokens, Tensor(b!) feature_map, "
      "Tensor(c!) inputs, Tensor(d!) usage) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CompositeExplicitAutograd, m) {
  m.impl("vector_unit", TORCH_BOX(&fastvar::vectors::vector_unit));
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, m) {
  m.impl("residual_quantize", TORCH_BOX(&fastvar::vectors::residual_quantize));
}

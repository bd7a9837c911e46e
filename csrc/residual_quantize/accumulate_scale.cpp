// accumulate_scale and its gradients on a CPU.
#include "residual_quantize/arguments.h"
#include "residual_quantize/images.h"

namespace fastvar::vectors {
namespace {

template <typename Each>
void accumulate_group(const AccumulateCall& call, const Convolutions* convolutions, int64_t first, int64_t count,
                      Each each) {
  const int64_t channels = call.tokenizer.channels, cells = call.finest.tokens();
  const Images<Each> images(call.tokenizer, count, call.finest, false, each);
  each(count, [&](int64_t low, int64_t high) {
    for (int64_t image = low; image < high; ++image)
      images.read(call.feature_map + (first + image) * channels * cells, images.map(image));
  });
  images.upsample(call.tokens + first * call.grid.tokens(), call.grid.tokens(), call.grid);
  images.add(convolutions, 0);
  each(count, [&](int64_t low, int64_t high) {
    for (int64_t image = low; image < high; ++image)
      images.write(images.map(image), call.accumulated + (first + image) * channels * cells);
  });
  const int64_t next = call.next.tokens() * channels;
  if (next) images.next_inputs(call.next, call.inputs + first * next, next);
}

void accumulate(const AccumulateCall& call, int threads) {
  const Convolutions convolutions(call.tokenizer);
  const Convolutions* phi = call.tokenizer.phis ? &convolutions : nullptr;
  share_out(
      call.batch, 1, threads,
      [&](int64_t first, int64_t count) { accumulate_group(call, phi, first, count, Serial()); },
      [&](int64_t first, int64_t count) { accumulate_group(call, phi, first, count, Parallel()); });
}

// Sums over pixels of N channels of the codes at a tap times M vectors of the gradients' channels.
template <int N, int M, typename Each>
void correlate(const Images<Each>& codes, const Images<Each>& grads, int64_t count, Grid size, int64_t stride,
               int64_t tap, int64_t in, int64_t out, float* sums) {
  Vector total[N][M] = {};
  for (int64_t image = 0; image < count; ++image)
    for (int64_t y = 0; y < size.height; ++y) {
      const float* code = codes.inside(image, y + tap / 3 - 1) + (tap % 3 - 1) * stride + in;
      const float* grad = grads.inside(image, y) + out;
      Vector parts[N][M] = {};
      for (int64_t x = 0; x < size.width; ++x, code += stride, grad += stride)
        for (int i = 0; i < N; ++i)
          for (int v = 0; v < M; ++v) parts[i][v] = multiply_add(all(code[i]), load(grad + v * LANES), parts[i][v]);
      for (int i = 0; i < N; ++i)
        for (int v = 0; v < M; ++v) total[i][v] += parts[i][v];
    }
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < M; ++v) store(sums + i * 9 * stride + v * LANES, total[i][v]);
}

// Gradients of one step. Sums over images are taken in their order by one thread each.
void accumulate_backward(const AccumulateGradients& call) {
  const Tokenizer& tokenizer = call.tokenizer;
  const Grid size = call.finest, grid = call.grid, next = call.next;
  const int64_t channels = tokenizer.channels, stride = round_up(channels, LANES), cells = size.tokens();
  const Parallel each;
  const Images<Parallel> grads(tokenizer, call.batch, size, false, each);
  each(call.batch, [&](int64_t first, int64_t end) {
    for (int64_t image = first; image < end; ++image) {
      float* sum = grads.map(image);
      std::fill(sum, sum + cells * stride, 0.0f);
      if (call.grad) grads.read(call.grad + image * channels * cells, sum);
      if (call.grad_inputs)
        for (int64_t place = 0; place < next.tokens(); ++place)
          spread(call.grad_inputs + (image * next.tokens() + place) * channels, size, next, place, channels, stride,
                 sum);
      if (call.feature_map) grads.write(sum, call.feature_map + image * channels * cells);
      for (int64_t y = 0; y < size.height; ++y)
        std::copy(sum + y * size.width * stride, sum + (y + 1) * size.width * stride, grads.inside(image, y));
      std::fill(sum, sum + cells * stride, 0.0f);
    }
  });
  if (call.phi_weight) {
    const Images<Parallel> codes(tokenizer, call.batch, size, false, each);
    codes.upsample(call.tokens, grid.tokens(), grid);
    Buffer<float> sums(9 * stride * stride);  // (C_in, 3, 3, C_out)
    const int64_t groups = stride / 4;
    each(9 * groups, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        const int64_t tap = i / groups, in = i % groups * 4;
        for (int64_t out = 0; out < stride; out += 2 * LANES) {
          float* to = sums.get() + (in * 9 + tap) * stride + out;
          if (out + LANES < stride)
            correlate<4, 2>(codes, grads, call.batch, size, stride, tap, in, out, to);
          else
            correlate<4, 1>(codes, grads, call.batch, size, stride, tap, in, out, to);
        }
      }
    });
    for (int64_t i = 0; i < 9 * stride * stride; ++i) sums.get()[i] *= tokenizer.phi_ratio;
    transpose(sums.get(), 9 * channels, channels, stride, call.phi_weight, 9 * channels);
  }
  if (call.phi_bias) {
    std::fill(call.phi_bias, call.phi_bias + channels, 0.0f);
    Buffer<float> parts(channels);
    for (int64_t i = 0; i < call.batch * size.height; ++i) {
      const float* row = grads.inside(i / size.height, i % size.height);
      std::fill(parts.get(), parts.get() + channels, 0.0f);
      for (int64_t x = 0; x < size.width; ++x)
        for (int64_t c = 0; c < channels; ++c) parts.get()[c] += row[x * stride + c];
      for (int64_t c = 0; c < channels; ++c) call.phi_bias[c] += parts.get()[c];
    }
    for (int64_t c = 0; c < channels; ++c) call.phi_bias[c] *= tokenizer.phi_ratio;
  }
  if (!call.codebook) return;
  if (tokenizer.phis) {
    const Convolutions convolutions(tokenizer, true);
    grads.add(&convolutions, 0);
  } else {
    grads.add(nullptr, 0);
  }
  Buffer<float> rows(call.batch * grid.tokens() * stride);
  each(call.batch, [&](int64_t first, int64_t end) {
    for (int64_t image = first; image < end; ++image)
      shrink(grads.map(image), size, grid, stride, rows.get() + image * grid.tokens() * stride);
  });
  std::fill(call.codebook, call.codebook + tokenizer.vocabulary * channels, 0.0f);
  for (int64_t i = 0; i < call.batch * grid.tokens(); ++i) {
    float* to = call.codebook + call.tokens[i] * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] += rows.get()[i * stride + c];
  }
}

void check_tokens(const Tensor& tokens, const Tensor& codebook) {
  const int64_t* token = input<int64_t>(tokens);
  const uint64_t codes = codebook.size(0);
  for (int64_t i = 0; i < tokens.numel(); ++i)
    STD_TORCH_CHECK(uint64_t(token[i]) < codes, "accumulate_scale: tokens: expected 0 to ", codes - 1, ", got ",
                    token[i]);
}

void accumulate_scale(Tensor feature_map, Tensor tokens, Tensor codebook, std::optional<Tensor> phi_weight,
                      std::optional<Tensor> phi_bias, double phi_ratio, int64_t height, int64_t width,
                      int64_t next_height, int64_t next_width, Tensor accumulated, Tensor inputs) {
  check_accumulate("accumulate_scale", feature_map, tokens, codebook, phi_weight, phi_bias, height, width, next_height,
                   next_width, accumulated, inputs);
  check_tokens(tokens, codebook);
  AccumulateCall call{tokenizer_of(codebook, phi_weight, phi_bias, phi_ratio),
                      input<float>(feature_map),
                      input<int64_t>(tokens),
                      feature_map.size(0),
                      {int32_t(height), int32_t(width)},
                      {int32_t(next_height), int32_t(next_width)},
                      {int32_t(feature_map.size(2)), int32_t(feature_map.size(3))},
                      output<float>(accumulated),
                      output<float>(inputs)};
  accumulate(call, int(torch::stable::get_num_threads()));
}

const float* optional_input(const std::optional<Tensor>& tensor) { return tensor ? input<float>(*tensor) : nullptr; }
float* optional_output(const std::optional<Tensor>& tensor) { return tensor ? output<float>(*tensor) : nullptr; }

void accumulate_scale_backward(std::optional<Tensor> grad, std::optional<Tensor> grad_inputs, Tensor tokens,
                               Tensor codebook, std::optional<Tensor> phi_weight, std::optional<Tensor> phi_bias,
                               double phi_ratio, std::vector<int64_t> grids,
                               std::optional<Tensor> to_feature_map, std::optional<Tensor> to_codebook,
                               std::optional<Tensor> to_weight, std::optional<Tensor> to_bias) {
  const Checks checks("accumulate_scale_backward", tokens);
  checks.number("grids", int64_t(grids.size()), 6, 6);
  const int64_t batch = tokens.size(0), channels = codebook.dim() == 2 ? codebook.size(1) : 0;
  checks.number("codebook", channels, 1, 1 << 14);
  checks.grid("grids", grids[4], grids[5], MOST_SIDE, MOST_SIDE);
  checks.grid("grids", grids[0], grids[1], grids[4], grids[5]);
  if (grids[2] != 0 || grids[3] != 0) checks.grid("grids", grids[2], grids[3], grids[4], grids[5]);
  checks.tensor("tokens", tokens, ScalarType::Long, {batch, grids[0] * grids[1]});
  check_tokens(tokens, codebook);
  check_tokenizer(checks, channels, codebook, phi_weight, phi_bias, true);
  const auto same = [&](const char* name, const std::optional<Tensor>& tensor, const std::vector<int64_t>& shape) {
    if (tensor) checks.tensor(name, *tensor, ScalarType::Float, shape);
  };
  for (const auto& map : {grad, to_feature_map}) same("grad", map, {batch, channels, grids[4], grids[5]});
  same("grad_inputs", grad_inputs, {batch, grids[2] * grids[3], channels});
  same("to_codebook", to_codebook, {codebook.size(0), channels});
  same("to_weight", to_weight, {channels, channels, 3, 3});
  same("to_bias", to_bias, {channels});
  const auto grid = [&](int i) { return Grid{int32_t(grids[2 * i]), int32_t(grids[2 * i + 1])}; };
  const AccumulateGradients call{tokenizer_of(codebook, phi_weight, phi_bias, phi_ratio),
                                 input<int64_t>(tokens),
                                 tokens.size(0),
                                 grid(0),
                                 grid(1),
                                 grid(2),
                                 optional_input(grad),
                                 optional_input(grad_inputs),
                                 optional_output(to_feature_map),
                                 optional_output(to_codebook),
                                 optional_output(to_weight),
                                 optional_output(to_bias)};
  accumulate_backward(call);
}

}  // namespace
}  // namespace fastvar::vectors

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, m) {
  m.def(
      "accumulate_scale(Tensor feature_map, Tensor tokens, Tensor codebook, Tensor? phi_weight, Tensor? phi_bias, "
      "float phi_ratio, int height, int width, int next_height, int next_width, Tensor(a!) accumulated, "
      "Tensor(b!) inputs) -> ()");
  m.def(
      "accumulate_scale_backward(Tensor? grad, Tensor? grad_inputs, Tensor tokens, Tensor codebook, "
      "Tensor? phi_weight, Tensor? phi_bias, float phi_ratio, int[] grids, Tensor(a!)? to_feature_map, "
      "Tensor(b!)? to_codebook, Tensor(c!)? to_weight, Tensor(d!)? to_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, m) {
  m.impl("accumulate_scale", TORCH_BOX(&fastvar::vectors::accumulate_scale));
  m.impl("accumulate_scale_backward", TORCH_BOX(&fastvar::vectors::accumulate_scale_backward));
}

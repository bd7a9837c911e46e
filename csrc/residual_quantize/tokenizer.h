// What all ways of residual_quantize and accumulate_scale share: grids, and the weights of a tokenizer.
#pragma once

#include <optional>

#include "common/common.h"

namespace fastvar {

struct Grid {
  int32_t height, width;
  FASTVAR_HOST_DEVICE inline int64_t tokens() const { return int64_t(height) * width; }
};

// The codes and convolutions of a tokenizer, in PyTorch's layout and float32.
struct Tokenizer {
  const float* codebook;  // (V, C)
  int64_t vocabulary;
  int64_t channels;
  const float* phi_weight;  // (N, C, C, 3, 3), or null
  const float* phi_bias;    // (N, C)
  int64_t phis;
  float phi_ratio;
};

// A tokenizer of tensors (V, C), (N, C, C, 3, 3) or one convolution without N, and (N, C) or (C).
inline Tokenizer tokenizer_of(const Tensor& codebook, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& bias, double ratio) {
  Tokenizer tokenizer{input<float>(codebook), codebook.size(0), codebook.size(1), nullptr, nullptr, 0, float(ratio)};
  if (weight && bias) {
    tokenizer.phi_weight = input<float>(*weight);
    tokenizer.phi_bias = input<float>(*bias);
    tokenizer.phis = weight->dim() == 5 ? weight->size(0) : 1;
  }
  return tokenizer;
}

}  // namespace fastvar

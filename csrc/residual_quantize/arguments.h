// What the ops of residual_quantize and accumulate_scale demand of their arguments.
#pragma once

#include <optional>

#include "common/checks.h"

namespace fastvar {

// Codes (V, C) and, if there are any, convolutions.
inline void check_tokenizer(const Checks& checks, int64_t channels, const Tensor& codebook,
                            const std::optional<Tensor>& phi_weight, const std::optional<Tensor>& phi_bias,
                            bool one_phi) {
  checks.tensor("codebook", codebook, ScalarType::Float, {ANY, channels});
  checks.number("codebook", codebook.size(0), 1, INT32_MAX);
  STD_TORCH_CHECK(phi_weight.has_value() == phi_bias.has_value(), "phi: expected weight and bias, or neither");
  if (!phi_weight) return;
  if (one_phi) {
    checks.tensor("phi_weight", *phi_weight, ScalarType::Float, {channels, channels, 3, 3});
    checks.tensor("phi_bias", *phi_bias, ScalarType::Float, {channels});
  } else {
    checks.tensor("phi_weight", *phi_weight, ScalarType::Float, {ANY, channels, channels, 3, 3});
    checks.tensor("phi_bias", *phi_bias, ScalarType::Float, {phi_weight->size(0), channels});
  }
}

inline void check_quantize(const char* op, const Tensor& features, const Tensor& codebook,
                           const std::optional<Tensor>& phi_weight, const std::optional<Tensor>& phi_bias,
                           const std::vector<int64_t>& phi_index, const std::vector<int64_t>& grids,
                           const Tensor& tokens, const Tensor& feature_map, const Tensor& inputs, const Tensor& usage) {
  const Checks checks(op, features);
  const int64_t length = checks.grids(grids);
  checks.tensor("features", features, ScalarType::Float, {ANY, ANY, grids[grids.size() - 2], grids.back()});
  const int64_t batch = features.size(0), channels = features.size(1);
  checks.number("features", channels, 1, 1 << 14);
  check_tokenizer(checks, channels, codebook, phi_weight, phi_bias, false);
  if (phi_weight) {
    checks.number("phi_index", int64_t(phi_index.size()), int64_t(grids.size() / 2), int64_t(grids.size() / 2));
    for (const int64_t index : phi_index) checks.number("phi_index", index, 0, phi_weight->size(0) - 1);
  }
  checks.tensor("tokens", tokens, ScalarType::Long, {batch, length});
  checks.tensor("feature_map", feature_map, ScalarType::Float, {batch, channels, features.size(2), features.size(3)});
  checks.tensor("inputs", inputs, ScalarType::Float, {batch, length - grids[0] * grids[1], channels});
  checks.tensor("usage", usage, ScalarType::Long, {codebook.size(0)});
}

// `height` x `width` tokens, a next grid of 0 x 0 for none.
inline void check_accumulate(const char* op, const Tensor& feature_map, const Tensor& tokens, const Tensor& codebook,
                             const std::optional<Tensor>& phi_weight, const std::optional<Tensor>& phi_bias,
                             int64_t height, int64_t width, int64_t next_height, int64_t next_width,
                             const Tensor& accumulated, const Tensor& inputs) {
  const Checks checks(op, feature_map);
  checks.tensor("feature_map", feature_map, ScalarType::Float, {ANY, ANY, ANY, ANY});
  const int64_t batch = feature_map.size(0), channels = feature_map.size(1);
  checks.number("feature_map", channels, 1, 1 << 14);
  checks.grid("feature_map", feature_map.size(2), feature_map.size(3), MOST_SIDE, MOST_SIDE);
  checks.grid("grid", height, width, feature_map.size(2), feature_map.size(3));
  if (next_height != 0 || next_width != 0)
    checks.grid("next grid", next_height, next_width, feature_map.size(2), feature_map.size(3));
  checks.tensor("tokens", tokens, ScalarType::Long, {batch, height * width});
  check_tokenizer(checks, channels, codebook, phi_weight, phi_bias, true);
  checks.tensor("accumulated", accumulated, ScalarType::Float,
                {batch, channels, feature_map.size(2), feature_map.size(3)});
  checks.tensor("inputs", inputs, ScalarType::Float, {batch, next_height * next_width, channels});
}

}  // namespace fastvar

// residual_quantize and accumulate_scale for CPUs: the same code for the vector units that processors have.
#include <algorithm>

#include "residual_quantize_checks.h"
#include "residual_quantize_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTVAR_X86 1
#include <immintrin.h>
#endif

namespace fastvar {
namespace {

namespace four {
constexpr int LANES = 4, ROWS = 2, PIXELS = 4;
constexpr bool PAIRS = false;
typedef float Vector __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(16), aligned(4), may_alias));
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
inline bool any_within(Vector v, Vector limit) {
  const auto above = v > limit;
  return !(above[0] && above[1] && above[2] && above[3]);
}
inline Vector multiply_pairs(Vector sum, Words, Words) { return sum; }
#include "residual_quantize_lanes.h"
}  // namespace four

#ifdef FASTVAR_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace eight {
constexpr int LANES = 8, ROWS = 3, PIXELS = 4;
constexpr bool PAIRS = false;
typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(32), aligned(4), may_alias));
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline bool any_within(Vector v, Vector limit) { return _mm256_movemask_ps(_mm256_cmp_ps(v, limit, _CMP_NGT_UQ)) != 0; }
inline Vector multiply_pairs(Vector sum, Words, Words) { return sum; }
#include "residual_quantize_lanes.h"
}  // namespace eight
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
namespace sixteen {
constexpr int LANES = 16, ROWS = 6, PIXELS = 8;
constexpr bool PAIRS = false;
typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline bool any_within(Vector v, Vector limit) { return _mm512_cmp_ps_mask(v, limit, _CMP_NGT_UQ) != 0; }
inline Vector multiply_pairs(Vector sum, Words, Words) { return sum; }
#include "residual_quantize_lanes.h"
}  // namespace sixteen
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prefer-vector-width=512")
namespace pairs {
constexpr int LANES = 16, ROWS = 6, PIXELS = 8;
constexpr bool PAIRS = true;
typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline bool any_within(Vector v, Vector limit) { return _mm512_cmp_ps_mask(v, limit, _CMP_NGT_UQ) != 0; }
inline Vector multiply_pairs(Vector sum, Words a, Words b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#include "residual_quantize_lanes.h"
}  // namespace pairs
#pragma GCC pop_options
#endif

// The widest vector unit of this processor: floats of a vector, and 17 for 16 with products of bfloat16.
int64_t widest() {
#ifdef FASTVAR_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? 17 : 16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
  return 4;
}

// Calls a function of the unit that is asked for, 0 for the widest.
#ifdef FASTVAR_X86
#define FASTVAR_ON_UNIT(unit, call)                                                                        \
  do {                                                                                                     \
    const int64_t on = unit ? unit : widest();                                                             \
    STD_TORCH_CHECK(on <= widest(), "lanes: expected at most ", widest(), " on this processor, got ", on); \
    if (on == 17) return pairs::call;                                                                      \
    if (on == 16) return sixteen::call;                                                                    \
    if (on == 8) return eight::call;                                                                       \
    return four::call;                                                                                     \
  } while (false)
#else
#define FASTVAR_ON_UNIT(unit, call) return four::call
#endif

void check_tokens(const Tensor& tokens, const Tensor& codebook) {
  const int64_t* token = input<int64_t>(tokens);
  const uint64_t codes = codebook.size(0);
  for (int64_t i = 0; i < tokens.numel(); ++i)
    STD_TORCH_CHECK(uint64_t(token[i]) < codes, "accumulate_scale: tokens: expected 0 to ", codes - 1, ", got ",
                    token[i]);
}

void residual_quantize(Tensor features, Tensor codebook, std::optional<Tensor> phi_weight,
                       std::optional<Tensor> phi_bias, double phi_ratio, std::vector<int64_t> phi_index,
                       std::vector<int64_t> grids, bool cosine, bool screen, int64_t lanes, Tensor tokens,
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
  FASTVAR_ON_UNIT(lanes, quantize(call, int(torch::stable::get_num_threads())));
}

void accumulate_scale(Tensor feature_map, Tensor tokens, Tensor codebook, std::optional<Tensor> phi_weight,
                      std::optional<Tensor> phi_bias, double phi_ratio, int64_t height, int64_t width,
                      int64_t next_height, int64_t next_width, int64_t lanes, Tensor accumulated, Tensor inputs) {
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
  FASTVAR_ON_UNIT(lanes, accumulate(call, int(torch::stable::get_num_threads())));
}

const float* optional_input(const std::optional<Tensor>& tensor) { return tensor ? input<float>(*tensor) : nullptr; }
float* optional_output(const std::optional<Tensor>& tensor) { return tensor ? output<float>(*tensor) : nullptr; }

void accumulate_scale_backward(std::optional<Tensor> grad, std::optional<Tensor> grad_inputs, Tensor tokens,
                               Tensor codebook, std::optional<Tensor> phi_weight, std::optional<Tensor> phi_bias,
                               double phi_ratio, std::vector<int64_t> grids, int64_t lanes,
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
  FASTVAR_ON_UNIT(lanes, accumulate_backward(call));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, library) {
  library.def("vector_unit() -> int");
  library.def(
      "accumulate_scale_backward(Tensor? grad, Tensor? grad_inputs, Tensor tokens, Tensor codebook, Tensor? "
      "phi_weight, "
      "Tensor? phi_bias, float phi_ratio, int[] grids, int lanes, Tensor(a!)? to_feature_map, Tensor(b!)? to_codebook, "
      "Tensor(c!)? to_weight, Tensor(d!)? to_bias) -> ()");
  library.def(
      "residual_quantize(Tensor features, Tensor codebook, Tensor? phi_weight, Tensor? phi_bias, float phi_ratio, "
      "int[] phi_index, int[] grids, bool cosine, bool screen, int lanes, Tensor(a!) tokens, Tensor(b!) feature_map, "
      "Tensor(c!) inputs, Tensor(d!) usage) -> ()");
  library.def(
      "accumulate_scale(Tensor feature_map, Tensor tokens, Tensor codebook, Tensor? phi_weight, Tensor? phi_bias, "
      "float phi_ratio, int height, int width, int next_height, int next_width, int lanes, Tensor(a!) accumulated, "
      "Tensor(b!) inputs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CompositeExplicitAutograd, library) {
  library.impl("vector_unit", TORCH_BOX(&widest));
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, library) {
  library.impl("residual_quantize", TORCH_BOX(&residual_quantize));
  library.impl("accumulate_scale", TORCH_BOX(&accumulate_scale));
  library.impl("accumulate_scale_backward", TORCH_BOX(&accumulate_scale_backward));
}

}  // namespace
}  // namespace fastvar

// sample_bits on CPUs: bits, draws and log-probabilities in one pass.

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

#include "checks.h"
#include "elementary.h"
#include "philox.h"

namespace fastvar::sample_bits {
namespace {

constexpr int64_t STREAM = 0;       // of fastvar/random.py: the draws of tokens and bits
constexpr int64_t ELEMENTS = 1024;  // done at a time: their intermediate results stay in the nearest cache
constexpr int LANES = 16;
constexpr float LARGEST = 1e30f;  // stands for an infinite logit under guidance, so that differences are no NaN

struct Settings {
  float conditional, unconditional;  // weights of the two, 1 + t and t
  float temperature;
  float cutoff;  // a bit is certain from this size of the guided logit on
};

// NaN stays
inline __attribute__((always_inline)) float finite(float x) {
  return x > LARGEST ? LARGEST : (x < -LARGEST ? -LARGEST : x);
}

// z = (conditional * logits - unconditional * others) / temperature; others may be null
FASTVAR_CLONES void guide(const float* logits, const float* others, Settings s, int64_t count, float* z) {
  if (others) {
    for (int64_t i = 0; i < count; ++i) {
      z[i] = finite(logits[i]) * s.conditional - finite(others[i]) * s.unconditional;
    }
  } else {
    for (int64_t i = 0; i < count; ++i) z[i] = logits[i];
  }
  if (s.temperature != 1) {
    for (int64_t i = 0; i < count; ++i) z[i] /= s.temperature;
  }
}

// 1 for logits that leave no choice
inline __attribute__((always_inline)) int32_t is_certain(float z, float cutoff) {
  return static_cast<int32_t>((z < 0 ? -z : z) >= cutoff) & static_cast<int32_t>(z != 0);
}

// numbers: uniform ones of `count` counters from `first` on
FASTVAR_CLONES void fill(int64_t seed, int64_t first, int64_t count, float* numbers) {
  for (int64_t i = 0; i < count; ++i) numbers[i] = uniform(seed, STREAM, first + i);
}

// bits: 1 where the number is past the probability of 0; the likelier one where top-p leaves no choice
FASTVAR_CLONES void draw(const float* __restrict z, const float* __restrict numbers, float cutoff, int64_t count,
                         int32_t* __restrict bits) {
  for (int64_t i = 0; i < count; ++i) {
    const float zero = 1 / (1 + exponential(z[i]));
    const int32_t drawn = numbers[i] >= zero, likelier = z[i] > 0;
    bits[i] = is_certain(z[i], cutoff) ? likelier : drawn;
  }
}

// scores: log-probability of each bit under z; 0 where there was no choice and it is the likelier one
FASTVAR_CLONES void score(const float* __restrict z, const int32_t* __restrict bits, float cutoff, int64_t count,
                          float* __restrict scores) {
  for (int64_t i = 0; i < count; ++i) {
    const float along = bits[i] ? z[i] : -z[i], found = log_sigmoid(along);
    scores[i] = is_certain(z[i], cutoff) & static_cast<int32_t>(along > 0) ? 0.f : found;
  }
}

// The sum of `count` values in an order that depends on their number alone.
FASTVAR_CLONES float sum(const float* values, int64_t count) {
  float lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    for (int lane = 0; lane < LANES; ++lane) lanes[lane] += values[i + lane];
  }
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += values[i];
  for (int half = LANES / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// logits, unconditional (B, n, d), seeds (B) -> bits (B, n, d), and unless they are empty own and sampled (B, n).
// `first` is the counter of the first bit of each sample.
void run(const Tensor logits, const std::optional<Tensor> unconditional, const Tensor seeds, double guidance,
         double temperature, double cutoff, int64_t first, Tensor bits, Tensor own, Tensor sampled) {
  const Checks check("sample_bits", logits);
  check.tensor("logits", logits, ScalarType::Float, {ANY, ANY, ANY});
  const int64_t batch = logits.size(0), count = logits.size(1), depth = logits.size(2), rows = batch * count;
  check.number("bits of a token", depth, 1, INT32_MAX);
  if (unconditional) check.tensor("unconditional", *unconditional, ScalarType::Float, {batch, count, depth});
  check.tensor("seeds", seeds, ScalarType::Long, {batch});
  check.tensor("bits", bits, ScalarType::Bool, {batch, count, depth});
  const bool scored = own.numel() > 0;
  if (scored) {
    check.tensor("own", own, ScalarType::Float, {batch, count});
    check.tensor("sampled", sampled, ScalarType::Float, {batch, count});
  }
  const Settings settings{static_cast<float>(1 + guidance), static_cast<float>(guidance),
                          static_cast<float>(temperature), static_cast<float>(cutoff)};
  const float* from = input<float>(logits);
  const float* others = unconditional ? input<float>(*unconditional) : nullptr;
  const int64_t* seed = input<int64_t>(seeds);
  uint8_t* drawn = output<uint8_t>(bits);
  float* own_out = scored ? output<float>(own) : nullptr;
  float* sampled_out = scored ? output<float>(sampled) : nullptr;
  const int64_t together = std::max<int64_t>(1, ELEMENTS / depth);  // rows
  parallel_for(0, rows, std::max<int64_t>(1, 16384 / depth), [&](int64_t begin, int64_t end) {
    const auto scratch = [&] { return std::unique_ptr<float[]>(new float[together * depth]); };
    const auto z = scratch(), values = scratch();
    const std::unique_ptr<int32_t[]> found(new int32_t[together * depth]);
    for (int64_t row = begin; row < end;) {
      const int64_t sample = row / count, token = row % count;
      const int64_t taken = std::min({together, end - row, count - token});  // of one sample
      const int64_t at = row * depth, size = taken * depth;
      guide(from + at, others ? others + at : nullptr, settings, size, z.get());
      fill(seed[sample], first + token * depth, size, values.get());
      draw(z.get(), values.get(), settings.cutoff, size, found.get());
      std::copy_n(found.get(), size, drawn + at);
      if (scored) {
        score(z.get(), found.get(), settings.cutoff, size, values.get());
        for (int64_t i = 0; i < taken; ++i) sampled_out[row + i] = sum(values.get() + i * depth, depth);
        if (others) guide(from + at, nullptr, settings, size, z.get());
        score(z.get(), found.get(), INFINITY, size, values.get());
        for (int64_t i = 0; i < taken; ++i) own_out[row + i] = sum(values.get() + i * depth, depth);
      }
      row += taken;
    }
  });
}

}  // namespace
}  // namespace fastvar::sample_bits

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, m) {
  m.def(
      "sample_bits(Tensor logits, Tensor? unconditional, Tensor seeds, float guidance, float temperature, "
      "float cutoff, int first, Tensor(a!) bits, Tensor(b!) own, Tensor(c!) sampled) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, m) { m.impl("sample_bits", TORCH_BOX(&fastvar::sample_bits::run)); }

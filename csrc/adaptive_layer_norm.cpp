// adaptive_layer_norm and gated_residual on CPUs, and their gradients: one pass over the rows, which the second look at
// one finds in the nearest cache.

#include <cmath>
#include <optional>

#include "rows.h"

namespace fastvar::adaptive_layer_norm {
namespace {

using namespace rows;

constexpr int LANES = 64;

struct Statistics {
  float mean, rstd;  // 1 / deviation
};

// Of a row whose elements are x(0), x(1) and so on.
template <typename Row>
FASTVAR_HOST_DEVICE inline Statistics statistics(const Row& x, int64_t width, float eps) {
  const float mean = sum<LANES>(width, x) / static_cast<float>(width);
  const float squares = sum<LANES>(width, [&](int64_t i) { return (x(i) - mean) * (x(i) - mean); });
  return {mean, 1 / std::sqrt(squares / static_cast<float>(width) + eps)};
}

FASTVAR_CLONES void normalise(const float* x, const float* gain, const float* shift, int64_t width, float eps,
                              float* __restrict out) {
  const auto [mean, rstd] = statistics([&](int64_t i) { return x[i]; }, width, eps);
  for (int64_t i = 0; i < width; ++i) out[i] = (x[i] - mean) * rstd * gain[i] + shift[i];
}

// The same without buffers, which take up to twice the time.
FASTVAR_CLONES void normalise_bfloat16(const uint16_t* x, const float* gain, const float* shift, int64_t width,
                                       float eps, uint16_t* __restrict out) {
  const auto [mean, rstd] = statistics([&](int64_t i) { return from_bfloat16(x[i]); }, width, eps);
  for (int64_t i = 0; i < width; ++i) {
    out[i] = to_bfloat16((from_bfloat16(x[i]) - mean) * rstd * gain[i] + shift[i]);
  }
}

struct Sums {
  float level, along;  // over a row, of g gain and of g gain (x - mean)
};

// On the way dscale and dshift are added to, if SUMMED.
template <bool SUMMED>
FASTVAR_HOST_DEVICE inline Sums sums_of(const float* x, const float* g, const float* gain, int64_t width, Statistics s,
                                        float* __restrict dscale, float* __restrict dshift) {
  float level[LANES] = {}, along[LANES] = {};
  const auto take = [&](int64_t i, int lane) __attribute__((always_inline)) {
    const float centred = x[i] - s.mean, slope = g[i] * gain[i];
    level[lane] += slope;
    along[lane] += slope * centred;
    if (SUMMED) {
      dscale[i] += g[i] * (centred * s.rstd);
      dshift[i] += g[i];
    }
  };
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    for (int lane = 0; lane < LANES; ++lane) take(i + lane, lane);
  }
  for (int lane = 0; i + lane < width; ++lane) take(i + lane, lane);
  return {fold<LANES>(level), fold<LANES>(along)};
}

// Of one row: dx, unless it is null, and what is added to dscale and dshift, unless they are null.
FASTVAR_CLONES void differentiate(const float* x, const float* g, const float* gain, int64_t width, float eps,
                                  float* __restrict dx, float* __restrict dscale, float* __restrict dshift) {
  const Statistics s = statistics([&](int64_t i) { return x[i]; }, width, eps);
  const Sums sums = dscale ? sums_of<true>(x, g, gain, width, s, dscale, dshift)
                           : sums_of<false>(x, g, gain, width, s, dscale, dshift);
  if (!dx) return;
  const float count = static_cast<float>(width), level = sums.level / count;
  const float share = sums.along / count * s.rstd * s.rstd * s.rstd;
  for (int64_t i = 0; i < width; ++i) dx[i] = (g[i] * gain[i] - level) * s.rstd - (x[i] - s.mean) * share;
}

FASTVAR_CLONES void one_more(const float* scale, int64_t width, float* gain) {
  for (int64_t i = 0; i < width; ++i) gain[i] = 1 + scale[i];
}

FASTVAR_CLONES void add_gated(const float* x, const float* y, const float* gate, int64_t width,
                              float* __restrict out) {
  for (int64_t i = 0; i < width; ++i) out[i] = x[i] + y[i] * gate[i];
}

// The same without buffers.
FASTVAR_CLONES void add_gated_bfloat16(const uint16_t* x, const uint16_t* y, const float* gate, int64_t width,
                                       uint16_t* __restrict out) {
  for (int64_t i = 0; i < width; ++i) {
    out[i] = to_bfloat16(from_bfloat16(x[i]) + from_bfloat16(y[i]) * gate[i]);
  }
}

FASTVAR_CLONES void multiply(const float* a, const float* b, int64_t width, float* __restrict out) {
  for (int64_t i = 0; i < width; ++i) out[i] = a[i] * b[i];
}

FASTVAR_CLONES void add_products(const float* a, const float* b, int64_t width, float* __restrict sums) {
  for (int64_t i = 0; i < width; ++i) sums[i] += a[i] * b[i];
}

std::optional<Target> wanted(const char* op, const char* name, const std::optional<Tensor>& tensor,
                             std::initializer_list<int64_t> shape) {
  return tensor ? std::optional<Target>(std::in_place, op, name, *tensor, shape) : std::nullopt;
}

// x (B, L, C), scale and shift (B, C) -> out (B, L, C)
Tensor norm(const Tensor x, const Tensor scale, const Tensor shift, double eps) {
  const char* op = "adaptive_layer_norm";
  const Source from(op, "x", x, {ANY, ANY, ANY});
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  const Source scales(op, "scale", scale, {batch, width}), shifts(op, "shift", shift, {batch, width});
  const Tensor out = torch::stable::new_empty(x, {batch, length, width});
  const Target to(op, "out", out, {batch, length, width});
  parallel_for(0, batch * length, grain(width), [&](int64_t low, int64_t high) {
    const Buffer gain(width), moved(width), wide(width), result(width);
    const float* offset = nullptr;
    for (int64_t row = low; row < high; ++row) {
      const int64_t b = row / length, l = row % length;
      if (row == low || l == 0) {
        one_more(scales.read(scales.at(b), width, gain), width, gain);
        offset = shifts.read(shifts.at(b), width, moved);
      }
      if (from.bfloat16()) {
        normalise_bfloat16(from.bits(from.at(b, l)), gain, offset, width, static_cast<float>(eps),
                           to.bits(to.at(b, l)));
        continue;
      }
      float* place = to.place(to.at(b, l), result);
      normalise(from.read(from.at(b, l), width, wide), gain, offset, width, static_cast<float>(eps), place);
      to.write(to.at(b, l), place, width);
    }
  });
  return out;
}

// The parts of a sample's sums in pairs; of each sum there are `width` numbers.
void finish(const Parts& parts, float* sums, int64_t batch, int64_t width,
            std::initializer_list<const std::optional<Target>*> out) {
  const int64_t all = width * int64_t(out.size());
  parallel_for(0, batch, grain(parts.of_sample * all), [&](int64_t low, int64_t high) {
    for (int64_t b = low; b < high; ++b) {
      float* first = sums + b * parts.of_sample * all;
      add_in_pairs(first, parts.of_sample, all);
      for (const auto* each : out) {
        if (*each) (*each)->write((*each)->at(b), first, width);
        first += width;
      }
    }
  });
}

void norm_backward(const Tensor grad, const Tensor x, const Tensor scale, double eps, std::optional<Tensor> dx,
                   std::optional<Tensor> dscale, std::optional<Tensor> dshift) {
  const char* op = "adaptive_layer_norm_backward";
  const Source from(op, "x", x, {ANY, ANY, ANY});
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  const Source slopes(op, "grad", grad, {batch, length, width}), scales(op, "scale", scale, {batch, width});
  const auto to = wanted(op, "dx", dx, {batch, length, width});
  const auto to_scale = wanted(op, "dscale", dscale, {batch, width});
  const auto to_shift = wanted(op, "dshift", dshift, {batch, width});
  const Parts parts(batch, length);
  const bool summed = to_scale || to_shift;
  const Buffer sums(summed ? parts.count * 2 * width : 0);
  parallel_for(0, parts.count, parts.grain(width), [&](int64_t low, int64_t high) {
    const Buffer gain(width), wide(width), steep(width), result(width);
    for (int64_t part = low; part < high; ++part) {
      const int64_t b = parts.sample(part);
      if (part == low || parts.begin(part) == 0) one_more(scales.read(scales.at(b), width, gain), width, gain);
      float* own = summed ? sums + part * 2 * width : nullptr;
      if (own) std::fill_n(own, 2 * width, 0.f);
      for (int64_t l = parts.begin(part); l < parts.end(part); ++l) {
        const float* row = from.read(from.at(b, l), width, wide);
        const float* g = slopes.read(slopes.at(b, l), width, steep);
        float* place = to ? to->place(to->at(b, l), result) : nullptr;
        differentiate(row, g, gain, width, static_cast<float>(eps), place, own, own ? own + width : nullptr);
        if (to) to->write(to->at(b, l), place, width);
      }
    }
  });
  if (summed) finish(parts, sums, batch, width, {&to_scale, &to_shift});
}

// x, y (B, L, C), gate (B, C) -> out (B, L, C)
Tensor gate(const Tensor x, const Tensor y, const Tensor gate) {
  const char* op = "gated_residual";
  const Source from(op, "x", x, {ANY, ANY, ANY});
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  const Source branch(op, "y", y, {batch, length, width}), gates(op, "gate", gate, {batch, width});
  const Tensor out = torch::stable::new_empty(x, {batch, length, width});
  const Target to(op, "out", out, {batch, length, width});
  parallel_for(0, batch * length, grain(width), [&](int64_t low, int64_t high) {
    const Buffer open(width), wide(width), added(width), result(width);
    const float* factor = nullptr;
    for (int64_t row = low; row < high; ++row) {
      const int64_t b = row / length, l = row % length;
      if (row == low || l == 0) factor = gates.read(gates.at(b), width, open);
      if (from.bfloat16() && branch.bfloat16()) {
        add_gated_bfloat16(from.bits(from.at(b, l)), branch.bits(branch.at(b, l)), factor, width,
                           to.bits(to.at(b, l)));
        continue;
      }
      float* place = to.place(to.at(b, l), result);
      add_gated(from.read(from.at(b, l), width, wide), branch.read(branch.at(b, l), width, added), factor, width,
                place);
      to.write(to.at(b, l), place, width);
    }
  });
  return out;
}

void gate_backward(const Tensor grad, const Tensor y, const Tensor gate, std::optional<Tensor> dy,
                   std::optional<Tensor> dgate) {
  const char* op = "gated_residual_backward";
  const Source slopes(op, "grad", grad, {ANY, ANY, ANY});
  const int64_t batch = grad.size(0), length = grad.size(1), width = grad.size(2);
  const Source branch(op, "y", y, {batch, length, width}), gates(op, "gate", gate, {batch, width});
  const auto to_y = wanted(op, "dy", dy, {batch, length, width});
  const auto to_gate = wanted(op, "dgate", dgate, {batch, width});
  const Parts parts(batch, length);
  const Buffer sums(to_gate ? parts.count * width : 0);
  parallel_for(0, parts.count, parts.grain(width), [&](int64_t low, int64_t high) {
    const Buffer open(width), steep(width), added(width), result(width);
    const float* factor = nullptr;
    for (int64_t part = low; part < high; ++part) {
      const int64_t b = parts.sample(part);
      if (part == low || parts.begin(part) == 0) factor = gates.read(gates.at(b), width, open);
      float* own = sums + part * width;
      if (to_gate) std::fill_n(own, width, 0.f);
      for (int64_t l = parts.begin(part); l < parts.end(part); ++l) {
        const float* g = slopes.read(slopes.at(b, l), width, steep);
        if (to_gate) add_products(g, branch.read(branch.at(b, l), width, added), width, own);
        if (to_y) {
          float* place = to_y->place(to_y->at(b, l), result);
          multiply(g, factor, width, place);
          to_y->write(to_y->at(b, l), place, width);
        }
      }
    }
  });
  if (to_gate) finish(parts, sums, batch, width, {&to_gate});
}

}  // namespace
}  // namespace fastvar::adaptive_layer_norm

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, m) {
  m.def("adaptive_layer_norm(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor");
  m.def(
      "adaptive_layer_norm_backward(Tensor grad, Tensor x, Tensor scale, float eps, Tensor(a!)? dx, "
      "Tensor(b!)? dscale, Tensor(c!)? dshift) -> ()");
  m.def("gated_residual(Tensor x, Tensor y, Tensor gate) -> Tensor");
  m.def(
      "gated_residual_backward(Tensor grad, Tensor y, Tensor gate, Tensor(a!)? dy, Tensor(b!)? dgate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, m) {
  m.impl("adaptive_layer_norm", TORCH_BOX(&fastvar::adaptive_layer_norm::norm));
  m.impl("adaptive_layer_norm_backward", TORCH_BOX(&fastvar::adaptive_layer_norm::norm_backward));
  m.impl("gated_residual", TORCH_BOX(&fastvar::adaptive_layer_norm::gate));
  m.impl("gated_residual_backward", TORCH_BOX(&fastvar::adaptive_layer_norm::gate_backward));
}

// qk_norm_rope, with or without a cache to write to, and its gradients on CPUs: one pass over the tokens.

#include <cmath>
#include <optional>

#include "rows.h"

namespace fastvar::qk_norm_rope {
namespace {

using namespace rows;

constexpr int LANES = 16;
constexpr double MAX_LOG_SCALE = 4.605170185988092;  // log 100

// The pairs (x_2i, x_2i+1) times cos + i sin; with `side` -1 times its conjugate.
FASTVAR_HOST_DEVICE inline void turn(const float* x, float factor, const float* cos, const float* sin, float side,
                                     int64_t dim, float* __restrict out) {
  for (int64_t pair = 0; pair < dim / 2; ++pair) {
    const float even = x[2 * pair] * factor, odd = x[2 * pair + 1] * factor, s = sin[pair] * side;
    out[2 * pair] = even * cos[pair] - odd * s;
    out[2 * pair + 1] = even * s + odd * cos[pair];
  }
}

FASTVAR_HOST_DEVICE inline float norm(const float* x, int64_t dim) {
  return std::sqrt(sum<LANES>(dim, [&](int64_t i) { return x[i] * x[i]; }));
}

// The heads of one token, in x and out `stride` and `out_stride` apart. gain (heads), or null without normalisation;
// cos and sin (dim / 2), or null without rotation.
FASTVAR_CLONES void finish(const float* x, int64_t stride, const float* gain, const float* cos, const float* sin,
                           float eps, int64_t heads, int64_t dim, float* __restrict out, int64_t out_stride) {
  for (int64_t h = 0; h < heads; ++h, x += stride, out += out_stride) {
    float factor = 1;
    if (gain) {
      const float length = norm(x, dim);
      factor = gain[h] / (length < eps ? eps : length);
    }
    if (cos) {
      turn(x, factor, cos, sin, 1, dim, out);
    } else {
      for (int64_t i = 0; i < dim; ++i) out[i] = x[i] * factor;
    }
  }
}

// From the gradient g of a token's heads, dx (heads, dim), and added to dgain (heads) what the scale's logarithm gets.
// Either may be null. `turned` has room for one head.
FASTVAR_CLONES void differentiate(const float* g, int64_t g_stride, const float* x, int64_t x_stride,
                                  const float* gain, const float* cos, const float* sin, float eps, int64_t heads,
                                  int64_t dim, float* __restrict turned, float* __restrict dx,
                                  float* __restrict dgain) {
  for (int64_t h = 0; h < heads; ++h, g += g_stride, x += x_stride) {
    const float* slope = g;
    if (cos) {
      turn(g, 1, cos, sin, -1, dim, turned);
      slope = turned;
    }
    if (!gain) {
      if (dx) std::copy_n(slope, dim, dx + h * dim);
      continue;
    }
    const float length = norm(x, dim), inverse = 1 / (length < eps ? eps : length);
    const float along = sum<LANES>(dim, [&](int64_t i) { return slope[i] * x[i]; }) * inverse;
    if (dgain) dgain[h] += along * gain[h];
    const float factor = inverse * gain[h];
    const float share = length < eps ? 0 : along * inverse * factor;  // a shorter one is divided by a constant
    if (dx) {
      for (int64_t i = 0; i < dim; ++i) dx[h * dim + i] = slope[i] * factor - x[i] * share;
    }
  }
}

// exp(min(log_scale, log 100)) of the queries and 1 of the keys.
struct Gains {
  Gains(const char* op, const std::optional<Tensor>& log_scale, int64_t heads) : queries(heads), keys(heads) {
    if (!log_scale) return;
    const Source from(op, "log_scale", *log_scale, {heads});
    widen(from.dtype, from.raw(0), from.inner, heads, queries);
    for (int64_t h = 0; h < heads; ++h) {
      const double least = queries[h] > MAX_LOG_SCALE ? MAX_LOG_SCALE : double(queries[h]);
      queries[h] = static_cast<float>(std::exp(least));  // the same bits on every processor
      keys[h] = 1;
    }
  }

  const Buffer queries, keys;
};

// cos and sin (L, D / 2), or none.
struct Tables {
  Tables(const char* op, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, int64_t length,
         int64_t dim)
      : half(dim / 2) {
    STD_TORCH_CHECK(bool(cos) == bool(sin) && (!cos || dim % 2 == 0), op, ": expected cos and sin of pairs");
    if (!cos) return;
    this->cos.emplace(op, "rope_cos", *cos, std::initializer_list<int64_t>{length, half});
    this->sin.emplace(op, "rope_sin", *sin, std::initializer_list<int64_t>{length, half});
  }

  int64_t half;
  std::optional<Source> cos, sin;
};

// The tables' rows of one token.
struct Angles {
  explicit Angles(const Tables& tables) : tables(tables), cos_(tables.half), sin_(tables.half) {}

  void move_to(int64_t token) {
    if (!tables.cos) return;
    cos = tables.cos->read(tables.cos->at(token), tables.half, cos_);
    sin = tables.sin->read(tables.sin->at(token), tables.half, sin_);
  }

  const Tables& tables;
  const float *cos = nullptr, *sin = nullptr;

 private:
  Buffer cos_, sin_;
};

// Tokens (B, L, H, D) as heads in float32.
struct Heads {
  const float* first;
  int64_t stride;
};

Heads read(const Source& from, int64_t b, int64_t l, int64_t heads, int64_t dim, float* buffer) {
  const int64_t at = from.at(b, l), stride = from.strides[2];
  if (from.plain()) return {from.read(at, dim, buffer), stride};
  if (from.inner == 1 && stride == dim) return {from.read(at, heads * dim, buffer), dim};
  for (int64_t h = 0; h < heads; ++h) from.read(at + h * stride, dim, buffer + h * dim);
  return {buffer, dim};
}

// `fill(out, stride)` writes the heads: where they belong, or to the buffer.
template <typename F>
void write(const Target& to, int64_t b, int64_t l, int64_t heads, int64_t dim, float* buffer, const F& fill) {
  const int64_t at = to.at(b, l), stride = to.strides[2];
  if (to.plain()) return fill(to.place(at, buffer), stride);
  fill(buffer, dim);
  if (to.inner == 1 && stride == dim) return to.write(at, buffer, heads * dim);
  for (int64_t h = 0; h < heads; ++h) to.write(at + h * stride, buffer + h * dim, dim);
}

void copy(const Source& from, int64_t at, const Target& to, int64_t place, int64_t heads, int64_t dim, float* buffer) {
  const bool alike = from.dtype == to.dtype && from.inner == 1 && to.inner == 1;
  for (int64_t h = 0; h < heads; ++h, at += from.strides[2], place += to.strides[2]) {
    if (alike) {
      std::memcpy(to.raw(place), from.raw(at), dim * from.bytes);
    } else {
      to.write(place, from.read(at, dim, buffer), dim);
    }
  }
}

// q, k, v and q_out (B, L, H, D); k_out and v_out (B, capacity, H, D), of which rows from `position` on are written. v
// and v_out may be missing.
void run(const Tensor q, const Tensor k, const std::optional<Tensor> v, const std::optional<Tensor> log_scale,
         const std::optional<Tensor> rope_cos, const std::optional<Tensor> rope_sin, double epsilon, int64_t position,
         Tensor q_out, Tensor k_out, std::optional<Tensor> v_out) {
  const char* op = "qk_norm_rope";
  const Source queries(op, "q", q, {ANY, ANY, ANY, ANY});
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), dim = q.size(3);
  const std::initializer_list<int64_t> shape = {batch, length, heads, dim};
  const Source keys(op, "k", k, shape);
  const Target to_queries(op, "q_out", q_out, shape), to_keys(op, "k_out", k_out, {batch, ANY, heads, dim});
  const int64_t capacity = k_out.size(1);
  Checks(op, q).number("position", position, 0, capacity - length);
  std::optional<Source> values;
  std::optional<Target> to_values;
  STD_TORCH_CHECK(bool(v) == bool(v_out), op, ": expected v and v_out together");
  if (v) {
    values.emplace(op, "v", *v, shape);
    to_values.emplace(op, "v_out", *v_out, std::initializer_list<int64_t>{batch, capacity, heads, dim});
  }
  const Gains gains(op, log_scale, heads);
  const Tables tables(op, rope_cos, rope_sin, length, dim);
  const float eps = static_cast<float>(epsilon);
  parallel_for(0, batch * length, grain(2 * heads * dim), [&](int64_t low, int64_t high) {
    const Buffer wide(heads * dim), result(heads * dim);
    Angles angles(tables);
    const auto transform = [&](const Source& from, const Target& to, int64_t first, const float* gain, int64_t token) {
      const int64_t b = token / length, l = token % length, next = std::min(token + 1, high - 1);
      from.prefetch(from.at(next / length, next % length), heads * dim);
      const Heads x = read(from, b, l, heads, dim, wide);
      write(to, b, first + l, heads, dim, result, [&](float* out, int64_t stride) {
        finish(x.first, x.stride, log_scale ? gain : nullptr, angles.cos, angles.sin, eps, heads, dim, out, stride);
      });
    };
    for (int64_t token = low; token < high; ++token) {
      const int64_t b = token / length, l = token % length;
      angles.move_to(l);
      transform(queries, to_queries, 0, gains.queries, token);
      transform(keys, to_keys, position, gains.keys, token);
      if (values) {
        copy(*values, values->at(b, l), *to_values, to_values->at(b, position + l), heads, dim, wide);
      }
    }
  });
}

// From the gradient of queries or keys those of x, which they were, (B, L, H, D), and of log_scale (H). Either may be
// missing. The keys have no log_scale, but are normalised too: `is_query` tells them apart.
void run_backward(const Tensor grad, const Tensor x, const std::optional<Tensor> log_scale,
                  const std::optional<Tensor> rope_cos, const std::optional<Tensor> rope_sin, double epsilon,
                  bool is_query, std::optional<Tensor> dx, std::optional<Tensor> dlog_scale) {
  const char* op = "qk_norm_rope_backward";
  const Source from(op, "x", x, {ANY, ANY, ANY, ANY});
  const int64_t batch = x.size(0), length = x.size(1), heads = x.size(2), dim = x.size(3);
  const std::initializer_list<int64_t> shape = {batch, length, heads, dim};
  const Source slopes(op, "grad", grad, shape);
  std::optional<Target> to, to_scale;
  if (dx) to.emplace(op, "dx", *dx, shape);
  if (dlog_scale) to_scale.emplace(op, "dlog_scale", *dlog_scale, std::initializer_list<int64_t>{heads});
  STD_TORCH_CHECK(!dx || dx->is_contiguous(), op, ": dx: expected a contiguous tensor");
  STD_TORCH_CHECK(!dlog_scale || (log_scale && is_query), op, ": expected log_scale of queries for its gradient");
  const Gains gains(op, log_scale, heads);
  const float* own_gain = is_query ? gains.queries : gains.keys;
  const float* gain = log_scale ? own_gain : nullptr;
  const Tables tables(op, rope_cos, rope_sin, length, dim);
  const Parts parts(batch, length);
  const Buffer sums(to_scale ? std::max<int64_t>(1, parts.count) * heads : 0);
  const float eps = static_cast<float>(epsilon);
  parallel_for(0, parts.count, parts.grain(heads * dim), [&](int64_t low, int64_t high) {
    const Buffer wide(heads * dim), steep(heads * dim), turned(dim), result(heads * dim);
    Angles angles(tables);
    for (int64_t part = low; part < high; ++part) {
      float* own = to_scale ? sums + part * heads : nullptr;
      if (own) std::fill_n(own, heads, 0.f);
      const int64_t b = parts.sample(part);
      for (int64_t l = parts.begin(part); l < parts.end(part); ++l) {
        angles.move_to(l);
        const Heads g = read(slopes, b, l, heads, dim, steep), old = read(from, b, l, heads, dim, wide);
        const auto fill = [&](float* out, int64_t) {
          differentiate(g.first, g.stride, old.first, old.stride, gain, angles.cos, angles.sin, eps, heads, dim, turned,
                        out, own);
        };
        to ? write(*to, b, l, heads, dim, result, fill) : fill(nullptr, 0);
      }
    }
  });
  if (!to_scale) return;
  const Buffer logs(heads);
  float* total = sums;
  if (!parts.count) std::fill_n(total, heads, 0.f);
  add_in_pairs(total, parts.count, heads);
  const Source scales(op, "log_scale", *log_scale, {heads});
  widen(scales.dtype, scales.raw(0), scales.inner, heads, logs);
  for (int64_t h = 0; h < heads; ++h) total[h] = logs[h] <= MAX_LOG_SCALE ? total[h] : 0;
  to_scale->write(0, total, heads);
}

}  // namespace
}  // namespace fastvar::qk_norm_rope

STABLE_TORCH_LIBRARY_FRAGMENT(fastvar_cpu, m) {
  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor? v, Tensor? log_scale, Tensor? rope_cos, Tensor? rope_sin, float eps, "
      "int position, Tensor(a!) q_out, Tensor(b!) k_out, Tensor(c!)? v_out) -> ()");
  m.def(
      "qk_norm_rope_backward(Tensor grad, Tensor x, Tensor? log_scale, Tensor? rope_cos, Tensor? rope_sin, float eps, "
      "bool is_query, Tensor(a!)? dx, Tensor(b!)? dlog_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastvar_cpu, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&fastvar::qk_norm_rope::run));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&fastvar::qk_norm_rope::run_backward));
}

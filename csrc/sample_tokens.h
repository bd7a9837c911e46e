// Drawing the token of one row of logits by one block of threads, see fastvar/ops/sample_tokens.py.
//
// The row is read once, into registers. A search finds the smallest logit that top-k keeps: it counts the logits below a
// bound and moves the bound along a line through the last two counts, until a few candidates are left, which are then
// ranked. It starts where a normal distribution with the mean and deviation of a part of the row would have it. What
// top-k keeps is moved together in shared memory, in the order of the vocabulary, and top-p is searched there in the
// same way, by sums of weights. All sums are in a fixed order.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "checks.h"
#include "philox.h"
#include "team.h"

namespace fastvar::sampling {

constexpr int32_t GROUP = 2;                       // vectors that are read at once
constexpr int32_t VECTORS = 8 * 32 / WARP;         // of four logits, that a member holds
constexpr int32_t PART = VECTORS * WARP * 4;       // logits of a warp
constexpr int64_t MOST_LOGITS = 1 << 14;           // of a row: its list fits into shared memory
constexpr int32_t MOST_WARPS = MOST_LOGITS / PART;
constexpr int32_t MOST_CANDIDATES = 64;            // that are ranked
constexpr int32_t SECANTS = 8;                     // steps of a search before it halves what is left
constexpr float DEPTH = 87;  // so far below the largest logit weights leave the range of normal numbers
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// A tensor (B, n, V) of logits and its strides.
struct Logits {
  const void* data;
  int64_t b, n, v;

  // Whether four successive logits of a row, of so many bytes each, lie as one access wants them.
  bool fours(int64_t bytes) const {
    return v == 1 && b % 4 == 0 && n % 4 == 0 && reinterpret_cast<uintptr_t>(data) % (4 * bytes) == 0;
  }
};

inline Logits logits_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

struct Call {
  Logits logits, others;  // the latter null without guidance
  const int64_t* seeds;   // (B,)
  int64_t seeds_b;
  int64_t* tokens;      // (B, n)
  float *own, *sampled;  // (B, n), or null
  int32_t count, size;  // n, V
  int64_t position;
  float gain, guidance, temperature, inverse;  // the last is 1 / temperature
  int32_t top_k;    // 0 for all
  float rest;       // 1 - p; 0 for all
  float quantile;   // the normal distribution's for a share of 1 - k / V, and its density there
  float density;
  bool wide;        // rows are read four logits at once
};

// Checks tensors before memory is touched. `others` is empty without guidance, `own` and `sampled` without scores.
inline Call sample_call(const char* op, const Tensor& logits, const Tensor& others, const Tensor& seeds, double gain,
                        double guidance, double temperature, int64_t top_k, double rest, double quantile,
                        double density, int64_t position, const Tensor& tokens, const Tensor& own,
                        const Tensor& sampled) {
  const Checks check(op, logits);
  STD_TORCH_CHECK(logits.dim() == 3, op, ": logits: expected shape (B, n, V)");
  const int64_t batch = logits.size(0), count = logits.size(1), size = logits.size(2);
  const bool guided = others.numel() > 0, scored = own.numel() > 0;
  check.number("logits of a row", size, 1, MOST_LOGITS);
  check.number("rows of a sample", count, 0, INT32_MAX);
  check.number("top_k", top_k, 0, size - 1);
  if (guided) {
    STD_TORCH_CHECK(others.scalar_type() == logits.scalar_type() && others.device() == logits.device() &&
                        others.dim() == 3 && others.size(0) == batch && others.size(1) == count &&
                        others.size(2) == size,
                    op, ": unconditional: expected shape, dtype and device of logits");
  }
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.device() == logits.device() && seeds.dim() == 1 &&
                      seeds.size(0) == batch,
                  op, ": seeds: expected (B,) int64 on the device of logits");
  check.tensor("tokens", tokens, ScalarType::Long, {batch, count});
  if (scored) check.tensor("own", own, ScalarType::Float, {batch, count});
  if (scored) check.tensor("sampled", sampled, ScalarType::Float, {batch, count});
  Call call{};
  call.logits = logits_of(logits);
  if (guided) call.others = logits_of(others);
  call.seeds = input<int64_t>(seeds), call.seeds_b = seeds.stride(0);
  call.tokens = output<int64_t>(tokens);
  if (scored) call.own = output<float>(own), call.sampled = output<float>(sampled);
  call.count = int32_t(count), call.size = int32_t(size), call.top_k = int32_t(top_k), call.position = position;
  call.gain = float(gain), call.guidance = float(guidance), call.temperature = float(temperature);
  call.inverse = 1 / call.temperature;
  call.rest = float(rest), call.quantile = float(quantile), call.density = float(density);
  const int64_t bytes = logits.scalar_type() == ScalarType::Float ? 4 : 2;
  call.wide = size % 4 == 0 && call.logits.fours(bytes) && (!guided || call.others.fours(bytes));
  return call;
}

// In shared memory, before the list of a row: its logits and their places.
struct Scratch {
  double exchanged[2][MOST_WARPS * 2];
  uint32_t candidate_count;
  float candidates[MOST_CANDIDATES], weights[MOST_CANDIDATES];
  float bound, draw;

  FASTVAR_HOST_DEVICE static inline int64_t round_up(int64_t size) { return (size + PART - 1) / PART * PART; }
  static int64_t bytes(int64_t size) { return int64_t(sizeof(Scratch)) + round_up(size) * 6; }
  FASTVAR_HOST_DEVICE inline float* list() { return reinterpret_cast<float*>(this + 1); }
  FASTVAR_HOST_DEVICE inline uint16_t* places(int32_t size) {
    return reinterpret_cast<uint16_t*>(list() + round_up(size));
  }
};

FASTVAR_HOST_DEVICE inline float exponential(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
  return power;
#else
  return std::exp(x);
#endif
}

// a / b given 1 / b, rounded as a division is (P. Markstein, Computation of elementary functions, 1990).
FASTVAR_HOST_DEVICE inline float divide(float a, float b, float inverse) {
  const float about = a * inverse;
  return std::fabs(about) < INFINITE ? std::fma(std::fma(-about, b, a), inverse, about) : about;
}

template <typename T>
FASTVAR_HOST_DEVICE inline T warp_sum(T value) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, int32_t>) {
    value = __reduce_add_sync(~0u, value);
  } else {
#pragma unroll
    for (int32_t apart = WARP / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(~0u, value, apart);
  }
#endif
  return value;
}

FASTVAR_HOST_DEVICE inline uint32_t warp_highest(uint32_t value) {
#if defined(__CUDA_ARCH__)
  return __reduce_max_sync(~0u, value);
#else
  return value;
#endif
}

// The sum of the values of this lane and those before it.
template <typename T>
FASTVAR_HOST_DEVICE inline T warp_sum_upto(int32_t lane, T value) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int32_t apart = 1; apart < WARP; apart *= 2) {
    const T other = __shfl_up_sync(~0u, value, apart);
    if (lane >= apart) value += other;
  }
#endif
  return value;
}

template <typename T>
FASTVAR_HOST_DEVICE inline T of_lane(T value, int32_t lane) {
#if defined(__CUDA_ARCH__)
  return __shfl_sync(~0u, value, lane);
#else
  return value;
#endif
}

template <typename T>
struct Span {
  T begin, end, all;
};

// What the members of a team find out together.
template <typename Team>
class Meeting {
 public:
  FASTVAR_HOST_DEVICE inline Meeting(const Team& team, Scratch* scratch)
      : team(team),
        lane(team.rank() % WARP),
        warp(team.rank() / WARP),
        warps(team.size() / WARP),
        scratch(scratch) {}

  template <typename T, int32_t N>
  FASTVAR_HOST_DEVICE inline void sum(T (&values)[N]) {
    for (T& value : values) value = warp_sum(value);
    const T* parts = exchange(values);
    for (int32_t i = 0; i < N; ++i) {
      values[i] = 0;
#pragma unroll 1
      for (int32_t w = lane; w < warps; w += WARP) values[i] += parts[w * N + i];
      values[i] = warp_sum(values[i]);
    }
  }

  template <typename T>
  FASTVAR_HOST_DEVICE inline T sum(T value) {
    T values[] = {value};
    sum(values);
    return values[0];
  }

  template <int32_t N>
  FASTVAR_HOST_DEVICE inline void highest(uint32_t (&values)[N]) {
    for (uint32_t& value : values) value = warp_highest(value);
    const uint32_t* parts = exchange(values);
    for (int32_t i = 0; i < N; ++i) {
#pragma unroll 1
      for (int32_t w = lane; w < warps; w += WARP) values[i] = parts[w * N + i] > values[i] ? parts[w * N + i] : values[i];
      values[i] = warp_highest(values[i]);
    }
  }

  // The sum of all values up to this member's, without and with it. One's end is the next one's begin.
  template <typename T>
  FASTVAR_HOST_DEVICE inline Span<T> span(T value) {
    const T upto = warp_sum_upto(lane, value), own[] = {of_lane(upto, WARP - 1)};
    const T before = of_lane(upto, lane > 0 ? lane - 1 : 0);
    const Span<T> warp_span = span_of_warps(own);
    const T base = warp_span.begin;
    return {lane > 0 ? base + before : base, base + upto, warp_span.all};
  }

  // The same for values that warps have.
  template <typename T>
  FASTVAR_HOST_DEVICE inline Span<T> span_of_warps(const T (&own)[1]) {
    const T* parts = exchange(own);
    Span<T> found{0, 0, 0};
#pragma unroll 1
    for (int32_t w = 0; w < warps; ++w) {
      if (w == warp) found.begin = found.all;
      found.all += parts[w];
      if (w == warp) found.end = found.all;
    }
    return found;
  }

  const Team& team;
  const int32_t lane, warp, warps;
  Scratch* const scratch;

 private:
  // What is exchanged is read until the exchange after the next one.
  template <typename T, int32_t N>
  FASTVAR_HOST_DEVICE inline const T* exchange(const T (&values)[N]) {
    T* parts = reinterpret_cast<T*>(scratch->exchanged[turn_ ^= 1]);
    if (lane == 0)
      for (int32_t i = 0; i < N; ++i) parts[warp * N + i] = values[i];
    team.sync();
    return parts;
  }

  int32_t turn_ = 0;
};

// A search is for the smallest z with a weight of more than `target` in all z up to it. Below low there is a weight of
// at most that, below high of more.
template <typename T>
struct Search {
  float low, high;
  T under, upto;  // the weights below them
  T target;
  float guess;  // where to look first
  float slope;  // of the weight there, along a coordinate of the weights' choice
  bool sure;    // low and `under` are known to be right; otherwise `under` may be too small
};

// Returns a bound that leaves the same z below it as the z that is searched, or low where that is too high already.
template <typename Team, typename Weights, typename T>
FASTVAR_HOST_DEVICE inline float find(Meeting<Team>& meeting, const Weights& weights, Search<T>& search) {
  Scratch* scratch = meeting.scratch;
  float x = search.guess, last_place = 0;
  T last = 0;
  for (int32_t step = 1;; ++step) {
    if (!(x > search.low && x < search.high)) x = 0.5f * search.low + 0.5f * search.high;
    if (step > SECANTS || !(x > search.low && x < search.high)) {
      const uint32_t low = to_ordered(search.low), high = to_ordered(search.high);
      x = from_ordered(low + (high - low) / 2);
      if (!(x > search.low)) return search.low;  // neighbours: what is left is equal
    }
    const T found = meeting.sum(weights.below(x));
    const float place = weights.along(x);
    if (step > 1 && found != last && place != last_place) search.slope = float(found - last) / (place - last_place);
    last = found, last_place = place;
    const bool low_enough = found <= search.target;
    if (low_enough) {
      search.low = x, search.under = found, search.sure = true;
    } else {
      search.high = x, search.upto = found;
      if (!search.sure) {
        search.under = meeting.sum(weights.below(search.low));
        if (search.under > search.target) return search.low;
        search.sure = true;
      }
    }
    if (float(search.upto - search.under) <= MOST_CANDIDATES * weights.unit(search.low)) {
      const int32_t candidates = weights.collect(meeting, search.low, search.high);
      if (candidates <= MOST_CANDIDATES) {  // a sum of floats may have told too few
        for (int32_t i = meeting.team.rank(); i < candidates; i += meeting.team.size()) {
          const float z = scratch->candidates[i];
          T below = search.under, with = search.under;
          bool largest = true;
#pragma unroll 4
          for (int32_t j = 0; j < candidates; ++j) {
            const float other = scratch->candidates[j];
            if (other < z) below += T(scratch->weights[j]);
            if (other <= z) with += T(scratch->weights[j]);
            largest &= other <= z;
          }
          if (below <= search.target && (with > search.target || largest)) scratch->bound = z;
        }
        meeting.team.sync();
        return scratch->bound;
      }
    }
    // A little further than the line has it, so that the next bound is on the other side.
    const float lack = float(search.target - found) + 0.5f * weights.unit(x);
    const float margin = 0.15f * std::fabs(lack) + 8 * weights.unit(x);
    x = weights.from(place + (low_enough ? lack + margin : lack - margin) / search.slope);
  }
}

// The logits of a row that a member holds, each of weight 1.
struct Counts {
  const float (&z)[VECTORS][4];

  FASTVAR_HOST_DEVICE inline int32_t below(float bound) const {
    float count[4] = {};  // additions of floats are the faster ones
#pragma unroll
    for (int32_t v = 0; v < VECTORS; ++v)
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) count[i] += z[v][i] < bound ? 1.0f : 0.0f;
    return int32_t((count[0] + count[1]) + (count[2] + count[3]));
  }

  // The order in which they come does not matter to sums of whole numbers.
  template <typename Team>
  FASTVAR_HOST_DEVICE inline int32_t collect(Meeting<Team>& meeting, float low, float high) const {
    Scratch* scratch = meeting.scratch;
#pragma unroll
    for (int32_t v = 0; v < VECTORS; ++v)
#pragma unroll
      for (int32_t i = 0; i < 4; ++i)
        if (z[v][i] >= low && z[v][i] < high) {
          const uint32_t at = count_up(&scratch->candidate_count);
          scratch->candidates[at] = z[v][i];
          scratch->weights[at] = 1;
        }
    meeting.team.sync();
    return int32_t(scratch->candidate_count);
  }

  FASTVAR_HOST_DEVICE static inline float of(float) { return 1; }
  FASTVAR_HOST_DEVICE static inline float unit(float) { return 1; }
  FASTVAR_HOST_DEVICE static inline float along(float z) { return z; }
  FASTVAR_HOST_DEVICE static inline float from(float place) { return place; }
};

// Logits of the list, of weight exp(z - peak).
struct Masses {
  const float *begin, *end;
  float peak;

  FASTVAR_HOST_DEVICE inline float below(float bound) const {
    float sum = 0;
#pragma unroll 4
    for (const float* z = begin; z < end; ++z)
      if (*z < bound) sum += of(*z);
    return sum;
  }

  template <typename Team>
  FASTVAR_HOST_DEVICE inline int32_t collect(Meeting<Team>& meeting, float low, float high) const {
    int32_t own = 0;
#pragma unroll 4
    for (const float* z = begin; z < end; ++z) own += *z >= low && *z < high;
    const Span<int32_t> span = meeting.span(own);
    if (own > 0 && span.all <= MOST_CANDIDATES) {
      int32_t at = span.begin;
#pragma unroll 1
      for (const float* z = begin; z < end; ++z)
        if (*z >= low && *z < high) {
          meeting.scratch->candidates[at] = *z;
          meeting.scratch->weights[at++] = of(*z);
        }
    }
    meeting.team.sync();
    return span.all;
  }

  FASTVAR_HOST_DEVICE inline float of(float z) const { return exponential(z - peak); }
  FASTVAR_HOST_DEVICE inline float unit(float z) const { return of(z); }
  FASTVAR_HOST_DEVICE inline float along(float z) const { return of(z); }
  FASTVAR_HOST_DEVICE inline float from(float place) const { return peak + std::log(place); }
};

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// Four logits from `place` on, minus infinity past the end.
template <bool WIDE, typename T>
FASTVAR_HOST_DEVICE inline void read(const T* row, int64_t stride, int32_t place, int32_t size, float (&out)[4]) {
  if constexpr (WIDE) {
    const bool seen = place < size;
    const Four<T> four = *reinterpret_cast<const Four<T>*>(row + (seen ? place : 0));
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) out[i] = seen ? static_cast<float>(four.at[i]) : -INFINITE;
  } else {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i)
      out[i] = place + i < size ? static_cast<float>(row[(place + i) * stride]) : -INFINITE;
  }
}

// Guided logits, and of the model's own ones the largest and the sum of exp(own - largest).
struct Held {
  float z[VECTORS][4];
  float own_peak, own_total;
};

template <typename Team, typename T, bool WIDE>
FASTVAR_HOST_DEVICE inline void load(const Meeting<Team>& meeting, const Call& call, const T* logits, const T* others,
                                     Held& held) {
  held.own_peak = -3e38f, held.own_total = 0;
#pragma unroll
  for (int32_t first = 0; first < VECTORS; first += GROUP) {
    float own[GROUP][4], other[GROUP][4] = {};
#pragma unroll
    for (int32_t v = 0; v < GROUP; ++v) {
      const int32_t place = meeting.warp * PART + ((first + v) * WARP + meeting.lane) * 4;
      read<WIDE>(logits, call.logits.v, place, call.size, own[v]);
      if (others) read<WIDE>(others, call.others.v, place, call.size, other[v]);
    }
    float peak = held.own_peak;
#pragma unroll
    for (int32_t v = 0; v < GROUP; ++v) {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        float z = own[v][i];
        // what the condition makes impossible stays so, as do places past the end
        if (others) z = own[v][i] == -INFINITE ? z : z * call.gain - other[v][i] * call.guidance;
        if (call.temperature != 1) {
          z = divide(z, call.temperature, call.inverse);
          own[v][i] = divide(own[v][i], call.temperature, call.inverse);
        }
        held.z[first + v][i] = z;
        peak = std::fmax(peak, own[v][i]);
      }
    }
    if (call.own) {
      held.own_total *= exponential(held.own_peak - peak);
      held.own_peak = peak;
#pragma unroll
      for (int32_t v = 0; v < GROUP; ++v)
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) held.own_total += exponential(own[v][i] - peak);
    }
  }
}

// Moves the z that are not below the bound to the list, in the order of their places. Returns how many there are.
template <typename Team>
FASTVAR_HOST_DEVICE inline int32_t gather(Meeting<Team>& meeting, const float (&z)[VECTORS][4], float bound,
                                          int32_t size) {
  // The numbers of four vectors in a word: a warp has at most 128 in one.
  uint32_t own[VECTORS / 4] = {}, before[VECTORS / 4], all[VECTORS / 4];
  int32_t in_warp[] = {0};
#pragma unroll
  for (int32_t v = 0; v < VECTORS; ++v)
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) own[v / 4] += !(z[v][i] < bound) ? 1u << v % 4 * 8 : 0u;
#pragma unroll
  for (int32_t word = 0; word < VECTORS / 4; ++word) {
    const uint32_t upto = warp_sum_upto(meeting.lane, own[word]);
    before[word] = upto - own[word];
    all[word] = of_lane(upto, WARP - 1);
    in_warp[0] += int32_t((all[word] & 255) + (all[word] >> 8 & 255) + (all[word] >> 16 & 255) + (all[word] >> 24));
  }
  const Span<int32_t> span = meeting.span_of_warps(in_warp);
  float* list = meeting.scratch->list();
  uint16_t* places = meeting.scratch->places(size);
  int32_t vector = span.begin;
#pragma unroll
  for (int32_t v = 0; v < VECTORS; ++v) {
    const int32_t shift = v % 4 * 8;
    int32_t at = vector + int32_t(before[v / 4] >> shift & 255);
    vector += int32_t(all[v / 4] >> shift & 255);
    const int32_t place = meeting.warp * PART + (v * WARP + meeting.lane) * 4;
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      if (!(z[v][i] < bound)) {
        list[at] = z[v][i];
        places[at++] = uint16_t(place + i);
      }
    }
  }
  meeting.team.sync();
  return span.all < size ? span.all : size;
}

// One row, by a team of a warp for each `PART` of it.
template <typename T, typename Team>
FASTVAR_HOST_DEVICE inline void sample(const Team& team, const Call& call, int64_t row, Scratch* scratch) {
  Meeting<Team> meeting(team, scratch);
  const int64_t b = row / call.count, i = row % call.count;
  const T* logits = static_cast<const T*>(call.logits.data) + b * call.logits.b + i * call.logits.n;
  const T* others = static_cast<const T*>(call.others.data);
  if (others) others += b * call.others.b + i * call.others.n;
  if (meeting.warp == 0) {
    scratch->draw = uniform(call.seeds[b * call.seeds_b], 0, call.position + i);
    scratch->candidate_count = 0;
  }
  Held held;
  if (call.wide)
    load<Team, T, true>(meeting, call, logits, others, held);
  else
    load<Team, T, false>(meeting, call, logits, others, held);

  float peak = -INFINITE;
#pragma unroll
  for (int32_t v = 0; v < VECTORS; ++v)
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) peak = std::fmax(peak, held.z[v][j]);
  uint32_t peaks[] = {to_ordered(peak), to_ordered(held.own_peak)};
  meeting.highest(peaks);
  peak = from_ordered(peaks[0]);
  const float own_peak = from_ordered(peaks[1]);
  // The first vectors stand for the row.
  float sums[] = {held.own_total * exponential(held.own_peak - own_peak), 0, 0, 0};
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    const float z = held.z[0][j] - peak;
    if (z > -DEPTH) sums[1] += 1, sums[2] += z, sums[3] += z * z;
  }
  meeting.sum(sums);
  const float own_total = sums[0], mean = sums[2] / sums[1];
  const float deviation = std::sqrt(std::fmax(sums[3] / sums[1] - mean * mean, 1e-12f));

  float bound = -INFINITE;
  float slope = sums[1] / deviation;  // logits for a unit of z, about
  if (peak - DEPTH < peak && peak < INFINITE) {  // is a number
    bound = call.top_k == 1 ? peak : peak - DEPTH;
    if (call.top_k > 1) {
      const int32_t places = meeting.warps * PART;
      Search<int32_t> search{bound, from_ordered(to_ordered(peak) + 1), 0, places, places - call.top_k};
      search.guess = peak + mean + deviation * call.quantile;
      search.slope = float(call.size) * call.density / deviation;
      bound = find(meeting, Counts{held.z}, search);
      slope = search.slope;
    }
  }
  const int32_t size = gather(meeting, held.z, bound, call.size);

  // From here on a member has successive logits of the list. An odd number: different banks of shared memory.
  const int32_t each = (size + team.size() - 1) / team.size() | 1;
  const float* list = scratch->list();
  const int32_t begin = each * team.rank() < size ? each * team.rank() : size;
  const int32_t end = begin + each < size ? begin + each : size;
  const Masses masses{list + begin, list + end, peak};
  float lowest = bound;
  if (call.rest > 0 && call.top_k != 1 && bound > -INFINITE) {
    const float total = meeting.sum(masses.below(INFINITE));
    if (total < INFINITE) {
      Search<float> search{bound, from_ordered(to_ordered(peak) + 1), 0, total, call.rest * total};
      search.sure = true;
      search.slope = slope;
      search.guess = masses.from(masses.along(bound) + search.target / slope);
      lowest = find(meeting, masses, search);
    }
  }

  float mass = 0;
#pragma unroll 4
  for (int32_t at = begin; at < end; ++at)
    if (!(list[at] < lowest)) mass += masses.of(list[at]);
  const Span<double> span = meeting.span(double(mass));
  const double target = scratch->draw * span.all;  // below all
  int32_t chosen = -1;
  if (span.begin <= target && target < span.end) {
    double sum = span.begin;
#pragma unroll 1
    for (int32_t at = begin; at < end && !(sum > target); ++at) {
      const float weight = list[at] < lowest ? 0.0f : masses.of(list[at]);
      sum += double(weight);
      if (weight > 0) chosen = at;  // rounding may leave the last sum at the target
    }
  }
  const bool nonsense = !(target < span.all);  // a row that has no largest number, or NaN: any token
  if (nonsense && team.rank() == 0) chosen = 0;
  if (chosen < 0) return;
  const int32_t token = nonsense ? 0 : scratch->places(call.size)[chosen];
  call.tokens[row] = token;
  if (call.own) {
    float own = static_cast<float>(logits[token * call.logits.v]);
    if (call.temperature != 1) own /= call.temperature;
    call.own[row] = own - own_peak - std::log(own_total);
    call.sampled[row] = nonsense ? NAN
                                 : list[chosen] - peak - std::log(float(span.all));
  }
}

}  // namespace fastvar::sampling

// The search for the nearest codes with vectors: smallest distances of each block of codes first, in bfloat16 where the
// processor multiplies that, then the codes of the blocks that may hold the nearest.
#pragma once

#include "residual_quantize/cpu.h"
#include "residual_quantize/vectors.h"

namespace fastvar::vectors {

constexpr int WIDE = 4;              // vectors of a block of codes
constexpr int BLOCK = WIDE * LANES;  // codes of a block
constexpr int TILES = 4;             // row tiles that share a block of codes while it is in the first cache

// Whether the processor multiplies pairs of bfloat16.
inline bool multiplies_pairs() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// The codes, laid out for the search: blocks of BLOCK codes, a block's channels one after the other. Codes are
// normalised for cosines. What is missing in the last block has a distance of infinity.
class Codes {
 public:
  Codes(const Tokenizer& tokenizer, bool cosine, bool screen)
      : count(tokenizer.vocabulary),
        channels(tokenizer.channels),
        stride(round_up(channels, LANES)),
        blocks((count + BLOCK - 1) / BLOCK),
        pairs(screen && multiplies_pairs() ? (channels + 1) / 2 : 0),
        packed_(blocks * channels * BLOCK),
        norms_(blocks * BLOCK),
        halves_(blocks * pairs * BLOCK) {
    std::vector<float> lengths(blocks), errors(blocks);
    parallel_for(0, blocks, 8, [&](int64_t first, int64_t end) {
      for (int64_t block = first; block < end; ++block)
        pack(tokenizer.codebook, block, cosine, &lengths[block], &errors[block]);
    });
    for (int64_t block = 0; block < blocks; ++block) {
      longest = lengths[block] > longest ? lengths[block] : longest;
      farthest = errors[block] > farthest ? errors[block] : farthest;
    }
  }

  const float* block(int64_t index) const { return packed_.get() + index * channels * BLOCK; }
  const float* norms(int64_t index) const { return norms_.get() + index * BLOCK; }
  const uint32_t* halves(int64_t index) const { return halves_.get() + index * pairs * BLOCK; }

  const int64_t count, channels, stride, blocks, pairs;
  float longest = 0, farthest = 0;  // the longest code, and the largest distance of a code from its bfloat16

 private:
  void pack(const float* codebook, int64_t block, bool cosine, float* length, float* error) {
    float* packed = packed_.get() + block * channels * BLOCK;
    float* norms = norms_.get() + block * BLOCK;
    const int64_t first = block * BLOCK, there = count - first < BLOCK ? count - first : BLOCK;
    if (there < BLOCK) std::fill(packed, packed + channels * BLOCK, 0.0f);
    transpose(codebook + first * channels, there, channels, channels, packed, BLOCK);
    float squares[BLOCK] = {}, rounding[BLOCK] = {};
    for (int64_t c = 0; c < channels; ++c)
      for (int j = 0; j < BLOCK; ++j) squares[j] += packed[c * BLOCK + j] * packed[c * BLOCK + j];
    if (cosine) {
      for (int j = 0; j < BLOCK; ++j) norms[j] = normal(squares[j]);
      for (int64_t c = 0; c < channels; ++c)
        for (int j = 0; j < BLOCK; ++j) packed[c * BLOCK + j] /= norms[j];
    }
    for (int j = 0; j < BLOCK; ++j) {
      norms[j] = cosine ? 0 * squares[j] : squares[j];  // NaN for a code that is not finite: it is never taken
      if (cosine) squares[j] = 1;
    }
    for (int64_t j = there; j < BLOCK; ++j) norms[j] = std::numeric_limits<float>::infinity();
    if (pairs) {
      uint32_t* halves = halves_.get() + block * pairs * BLOCK;
      for (int64_t p = 0; p < pairs; ++p)
        for (int j = 0; j < BLOCK; ++j) {
          const float low = packed[2 * p * BLOCK + j],
                      high = 2 * p + 1 < channels ? packed[(2 * p + 1) * BLOCK + j] : 0;
          const uint32_t a = to_bfloat16(low), b = to_bfloat16(high);
          halves[p * BLOCK + j] = a | b << 16;
          const float x = low - from_bfloat16(a), y = high - from_bfloat16(b);
          rounding[j] += x * x + y * y;
        }
    }
    for (int j = 0; j < there; ++j) {
      *length = squares[j] > *length ? squares[j] : *length;
      *error = rounding[j] > *error ? rounding[j] : *error;
    }
    *length = std::sqrt(*length);
    *error = std::sqrt(*error);
  }

 public:
  // What a vector of that squared length is divided by for its direction.
  static float normal(float square) {
    const float length = std::sqrt(square);
    return length < 1e-12f ? 1e-12f : length;
  }

 private:
  Buffer<float> packed_, norms_;
  Buffer<uint32_t> halves_;
};

// Smallest |c|^2 + x.c of each lane over the codes of a block, x being -2 times the rows (N, stride).
template <int N>
void screen_floats(const Codes& codes, const float* rows, int64_t block, float* minima, int64_t minima_stride) {
  const int64_t channels = codes.channels, stride = codes.stride;
  const float* packed = codes.block(block);
  Vector sums[N][WIDE];
  for (int r = 0; r < N; ++r)
    for (int v = 0; v < WIDE; ++v) sums[r][v] = load(codes.norms(block) + v * LANES);
  for (int64_t c = 0; c < channels; ++c) {
    Vector code[WIDE];
    for (int v = 0; v < WIDE; ++v) code[v] = load(packed + c * BLOCK + v * LANES);
    for (int r = 0; r < N; ++r) {
      const Vector x = all(rows[r * stride + c]);
      for (int v = 0; v < WIDE; ++v) sums[r][v] = multiply_add(x, code[v], sums[r][v]);
    }
  }
  for (int r = 0; r < N; ++r) {
    const Vector infinity = all(std::numeric_limits<float>::infinity());
    Vector low = infinity;
    for (int v = 0; v < WIDE; ++v) low = smaller(sums[r][v], low);
    store(minima + r * minima_stride, low);
  }
}

#if defined(__AVX512F__)
// The same from rows and codes in bfloat16, rows (N, pairs).
template <int N>
__attribute__((target("avx512bf16"))) void screen_halves(const Codes& codes, const uint32_t* rows, int64_t block,
                                                         float* minima, int64_t minima_stride) {
  const int64_t pairs = codes.pairs;
  const uint32_t* packed = codes.halves(block);
  Vector sums[N][WIDE];
  for (int r = 0; r < N; ++r)
    for (int v = 0; v < WIDE; ++v) sums[r][v] = load(codes.norms(block) + v * LANES);
  for (int64_t p = 0; p < pairs; ++p) {
    Words code[WIDE];
    for (int v = 0; v < WIDE; ++v) code[v] = *reinterpret_cast<const Words*>(packed + p * BLOCK + v * LANES);
    for (int r = 0; r < N; ++r) {
      const Words x = rows[r * pairs + p] - Words{};
      for (int v = 0; v < WIDE; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)code[v], (__m512bh)x);
    }
  }
  for (int r = 0; r < N; ++r) {
    Vector low = all(std::numeric_limits<float>::infinity());
    for (int v = 0; v < WIDE; ++v) low = smaller(sums[r][v], low);
    store(minima + r * minima_stride, low);
  }
}
#endif

// The same for 1 to ROWS rows.
template <int N = ROWS>
void screen(const Codes& codes, const float* rows, const uint32_t* halves, int64_t count, int64_t block, float* minima,
            int64_t minima_stride) {
  if constexpr (N > 1) {
    if (count < N) return screen<N - 1>(codes, rows, halves, count, block, minima, minima_stride);
  }
#if defined(__AVX512F__)
  if (codes.pairs) return screen_halves<N>(codes, halves, block, minima, minima_stride);
#endif
  screen_floats<N>(codes, rows, block, minima, minima_stride);
}

// The code with the smallest |c|^2 + x.c, the first of several, from the lanes' minima over each block, which are
// wrong by at most band / 2. What is not a number is never the smallest; without any number the first code is taken.
inline int64_t settle(const Codes& codes, const float* row, const float* minima, float band) {
  const float infinity = std::numeric_limits<float>::infinity();
  Vector low = all(infinity);
  for (int64_t block = 0; block < codes.blocks; ++block) low = smaller(load(minima + block * LANES), low);
  float lowest = infinity;
  for (int lane = 0; lane < LANES; ++lane) lowest = low[lane] < lowest ? low[lane] : lowest;
  const Vector limit = all(lowest + band);

  Vector best = all(infinity);
  Words at = {}, lanes;
  for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane;
  for (int64_t block = 0; block < codes.blocks; ++block) {
    if (!any_within(load(minima + block * LANES), limit)) continue;
    // the very sums of screen_floats
    const float* packed = codes.block(block);
    Vector sums[WIDE];
    for (int v = 0; v < WIDE; ++v) sums[v] = load(codes.norms(block) + v * LANES);
    for (int64_t c = 0; c < codes.channels; ++c)
      for (int v = 0; v < WIDE; ++v) sums[v] = multiply_add(all(row[c]), load(packed + c * BLOCK + v * LANES), sums[v]);
    for (int v = 0; v < WIDE; ++v) {
      const auto closer = sums[v] < best;
      best = closer ? sums[v] : best;
      at = closer ? lanes + uint32_t(block * BLOCK + v * LANES) : at;
    }
  }
  float nearest = infinity;
  uint32_t found = 0;
  for (int lane = 0; lane < LANES; ++lane)
    if (best[lane] < nearest || (best[lane] == nearest && best[lane] < infinity && at[lane] < found)) {
      nearest = best[lane];
      found = at[lane];
    }
  return found;
}

// -2 times a row, or minus its direction, as the search takes it; in bfloat16 too if there is a screen. Returns the
// band within which the screen's minima decide nothing.
inline float prepare(const Codes& codes, bool cosine, float* row, uint32_t* halves) {
  float factor = -2;
  if (cosine) {
    float square = 0;
    for (int64_t c = 0; c < codes.channels; ++c) square += row[c] * row[c];
    factor = Codes::normal(square);
  }
  for (int64_t c = 0; c < codes.channels; ++c) row[c] = cosine ? -(row[c] / factor) : row[c] * factor;
  if (!codes.pairs) return 0;
  float square = 0, rounding = 0;
  for (int64_t p = 0; p < codes.pairs; ++p) {
    const float low = row[2 * p], high = 2 * p + 1 < codes.channels ? row[2 * p + 1] : 0;
    const uint32_t a = to_bfloat16(low), b = to_bfloat16(high);
    halves[p] = a | b << 16;
    const float x = low - from_bfloat16(a), y = high - from_bfloat16(b);
    square += low * low + high * high;
    rounding += x * x + y * y;
  }
  // |x.c - x'.c'| <= |x - x'| |c| + |x'| |c - c'|, and both sums are rounded less than 2 C + 4 times, each time by at
  // most 2^-23 of |c|^2 + |x| |c|. Squares may vanish: the lengths are taken a little longer than they are.
  const float margin = 1.001f, least = 1e-17f;
  const float length = std::sqrt(square) * margin + least, wrong = std::sqrt(rounding) * margin + least;
  const float longest = codes.longest * margin + least, farthest = codes.farthest * margin + least;
  if (!(length < 0x1p60f && longest < 0x1p60f)) return std::numeric_limits<float>::infinity();
  const float roundings = (3 * codes.channels + 8) * 0x1p-23f * longest * (longest + length);
  return 2 * margin * (wrong * longest + (length + wrong) * farthest + roundings);
}

// The tokens of rows (N, stride) of means, which are changed; token i is written to place(i).
template <typename Each, typename Place>
void search(const Codes& codes, bool cosine, float* rows, int64_t count, const Each& each, int threads,
            const Place& place) {
  const int64_t stride = codes.stride, tiles = (count + ROWS - 1) / ROWS, lows = codes.blocks * LANES;
  Buffer<uint32_t> halves(count * codes.pairs);
  Buffer<float> bands(count);
  each(count, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i)
      bands.get()[i] = prepare(codes, cosine, rows + i * stride, halves.get() + i * codes.pairs);
  });
  const auto tile = [&](int64_t t, int64_t block, float* minima) {
    const int64_t first = t * ROWS, here = count - first < ROWS ? count - first : ROWS;
    screen(codes, rows + first * stride, halves.get() + first * codes.pairs, here, block, minima + block * LANES, lows);
  };
  const auto finish = [&](int64_t i, const float* minima) {
    *place(i) = settle(codes, rows + i * stride, minima, bands.get()[i]);
  };
  if (threads == 1 || tiles >= 2 * threads) {
    each(tiles, [&](int64_t first, int64_t end) {
      Buffer<float> minima(TILES * ROWS * lows);
      for (int64_t start = first; start < end; start += TILES) {
        const int64_t stop = start + TILES < end ? start + TILES : end;
        for (int64_t block = 0; block < codes.blocks; ++block)
          for (int64_t t = start; t < stop; ++t) tile(t, block, minima.get() + (t - start) * ROWS * lows);
        for (int64_t i = start * ROWS; i < stop * ROWS && i < count; ++i)
          finish(i, minima.get() + (i - start * ROWS) * lows);
      }
    });
    return;
  }
  // few rows: the threads share the codes
  Buffer<float> minima(count * lows);
  each(tiles * codes.blocks, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i)
      tile(i / codes.blocks, i % codes.blocks, minima.get() + i / codes.blocks * ROWS * lows);
  });
  each(count, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) finish(i, minima.get() + i * lows);
  });
}

}  // namespace fastvar::vectors

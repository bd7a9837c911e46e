// The vector code of residual_quantize and accumulate_scale. residual_quantize.cpp includes it once for each
// instruction set, in a namespace of its own which has
//   LANES                     floats of a vector
//   ROWS                      rows of the distance search that are in registers at a time
//   PIXELS                    pixels of a convolution that are in registers at a time
//   multiply_add(a, b, c)     of vectors
//   any_within(v, limit)      whether a lane of v is not above the limit's; a NaN is not above
//   multiply_pairs(sum, a, b) products of pairs of bfloat16 added to a vector of sums, and PAIRS, whether there is that
//
// Images are kept with their channels last, padded with zeros to `stride`, a multiple of LANES.

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline Vector all(float value) { return value - Vector{}; }
inline Vector smaller(Vector a, Vector b) { return a < b ? a : b; }  // b if one is NaN

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

// Four columns of four rows, `stride` apart; column c goes to to(c).
template <typename Place>
inline void transpose_four(const float* from, int64_t stride, int64_t row, int64_t column, const Place& to) {
  const auto at = [&](int i) { return *reinterpret_cast<const Four*>(from + (row + i) * stride + column); };
  const Four a = __builtin_shufflevector(at(0), at(1), 0, 4, 1, 5),
             b = __builtin_shufflevector(at(2), at(3), 0, 4, 1, 5);
  const Four c = __builtin_shufflevector(at(0), at(1), 2, 6, 3, 7),
             d = __builtin_shufflevector(at(2), at(3), 2, 6, 3, 7);
  *reinterpret_cast<Four*>(to(column) + row) = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to(column + 1) + row) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  *reinterpret_cast<Four*>(to(column + 2) + row) = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to(column + 3) + row) = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// (rows, columns), rows `stride` apart, to columns at to(0), to(1) and so on. In squares, so that lines of the cache
// are used whole on both sides.
template <typename Place>
void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, const Place& to) {
  constexpr int64_t SIDE = 16;
  for (int64_t r = 0; r < rows; r += SIDE)
    for (int64_t c = 0; c < columns; c += SIDE) {
      const int64_t last = std::min(r + SIDE, rows), end = std::min(c + SIDE, columns);
      const int64_t fours = r + (last - r) / 4 * 4, full = c + (end - c) / 4 * 4;
      for (int64_t y = r; y < fours; y += 4)
        for (int64_t x = c; x < full; x += 4) transpose_four(from, stride, y, x, to);
      for (int64_t x = c; x < end; ++x)
        for (int64_t y = x < full ? fours : r; y < last; ++y) to(x)[y] = from[y * stride + x];
    }
}

#include "residual_quantize_images.h"
#include "residual_quantize_search.h"

// Whole images on each thread as far as they go round, and what is left over all threads.
template <typename Whole, typename Shared>
void share_out(int64_t batch, int64_t group, int threads, const Whole& whole, const Shared& shared) {
  const int64_t even = batch / threads * threads;
  parallel_for(0, even, even / threads, [&](int64_t low, int64_t high) {
    for (int64_t first = low; first < high; first += group) whole(first, high - first < group ? high - first : group);
  });
  if (even < batch) shared(even, batch - even);
}

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
  const Codes codes(call.tokenizer, call.cosine, call.screen && PAIRS);
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

#include "accumulate_scale_lanes.h"

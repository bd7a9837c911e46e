// What codes add to images, with vectors: resampling, convolutions, and their gradients.
//
// Images are kept with their channels last, padded with zeros to `stride`, a multiple of LANES.
#pragma once

#include "residual_quantize/cpu.h"
#include "residual_quantize/vectors.h"

namespace fastvar::vectors {

// The convolutions phi, (N, C_in, 3, 3, stride): what is not convolved is part of the centre's weights. Backward, what
// brings gradients from phi's output to its input.
class Convolutions {
 public:
  explicit Convolutions(const Tokenizer& tokenizer, bool backward = false)
      : channels_(tokenizer.channels),
        stride_(round_up(channels_, LANES)),
        weights_(tokenizer.phis * 9 * channels_ * stride_),
        bias_(tokenizer.phis * stride_) {
    const float ratio = tokenizer.phi_ratio;
    for (int64_t n = 0; n < tokenizer.phis; ++n) {
      float* weights = weights_.get() + n * 9 * channels_ * stride_;
      float* bias = bias_.get() + n * stride_;
      if (stride_ != channels_) {
        std::fill(weights, weights + 9 * channels_ * stride_, 0.0f);
        std::fill(bias, bias + stride_, 0.0f);
      }
      const float* from = tokenizer.phi_weight + n * 9 * channels_ * channels_;
      if (backward) {
        for (int64_t out = 0; out < channels_; ++out)
          transpose(from + out * 9 * channels_, channels_, 9, 9, weights + (9 * out + 8) * stride_, -stride_);
      } else {
        transpose(from, channels_, 9 * channels_, 9 * channels_, weights, stride_);
      }
      for (int64_t i = 0; i < 9 * channels_ * stride_; ++i) weights[i] *= ratio;
      for (int64_t c = 0; c < channels_; ++c) {
        weights[(9 * c + 4) * stride_ + c] += 1 - ratio;
        bias[c] = backward ? 0 : ratio * tokenizer.phi_bias[n * channels_ + c];
      }
    }
  }

  const float* weights(int64_t n) const { return weights_.get() + n * 9 * channels_ * stride_; }
  const float* bias(int64_t n) const { return bias_.get() + n * stride_; }

 private:
  const int64_t channels_, stride_;
  Buffer<float> weights_, bias_;
};

// N pixels in a row and M vectors of channels of a convolution; `window` is the upper left pixel of the first pixel's
// surroundings. The result is subtracted from the residual, if there is one, and added to the map.
template <int N, int M>
void convolve_pixels(const float* window, int64_t row, int64_t channels, int64_t stride, const float* weights,
                     const float* bias, float* residual, float* map) {
  Vector sums[N][M];
  for (int p = 0; p < N; ++p)
    for (int v = 0; v < M; ++v) sums[p][v] = load(bias + v * LANES);
  for (int64_t start = 0; start < channels; start += 4) {
    Vector parts[N][M] = {};  // sums of sums: long chains of roundings are worse
    for (int64_t c = start; c < std::min(start + 4, channels); ++c)
      for (int tap = 0; tap < 9; ++tap, weights += stride) {
        const float* pixels = window + tap / 3 * row + tap % 3 * stride + c;
        Vector weight[M];
        for (int v = 0; v < M; ++v) weight[v] = load(weights + v * LANES);
        for (int p = 0; p < N; ++p) {
          const Vector x = all(pixels[p * stride]);
          for (int v = 0; v < M; ++v) parts[p][v] = multiply_add(x, weight[v], parts[p][v]);
        }
      }
    for (int p = 0; p < N; ++p)
      for (int v = 0; v < M; ++v) sums[p][v] += parts[p][v];
  }
  for (int p = 0; p < N; ++p)
    for (int v = 0; v < M; ++v) {
      const int64_t place = p * stride + v * LANES;
      if (residual) store(residual + place, load(residual + place) - sums[p][v]);
      store(map + place, load(map + place) + sums[p][v]);
    }
}

// A row of 1 to PIXELS pixels.
template <int N = PIXELS>
void convolve(int64_t count, const float* window, int64_t row, int64_t channels, int64_t stride, const float* weights,
              const float* bias, float* residual, float* map) {
  if constexpr (N > 1) {
    if (count < N) return convolve<N - 1>(count, window, row, channels, stride, weights, bias, residual, map);
  }
  int64_t v = 0;
  for (; v + 2 * LANES <= stride; v += 2 * LANES)
    convolve_pixels<N, 2>(window, row, channels, stride, weights + v, bias + v, residual ? residual + v : nullptr,
                          map + v);
  if (v < stride)
    convolve_pixels<N, 1>(window, row, channels, stride, weights + v, bias + v, residual ? residual + v : nullptr,
                          map + v);
}

// The mean of a bin of an image (H, W, stride).
inline void pool(const float* image, Grid size, Grid grid, int64_t place, int64_t stride, float* mean) {
  const Bin rows = area_bin(int32_t(place / grid.width), size.height, grid.height);
  const Bin columns = area_bin(int32_t(place % grid.width), size.width, grid.width);
  const float count = float(rows.end - rows.first) * float(columns.end - columns.first);
  for (int64_t c = 0; c < stride; c += LANES) {
    Vector sum = {};
    for (int32_t y = rows.first; y < rows.end; ++y)
      for (int32_t x = columns.first; x < columns.end; ++x)
        sum += load(image + (int64_t(y) * size.width + x) * stride + c);
    store(mean + c, sum / all(count));
  }
}

// Of the gradient (C) of a bin's mean, what each of its cells gets.
inline void spread(const float* grad, Grid size, Grid grid, int64_t place, int64_t channels, int64_t stride,
                   float* image) {
  const Bin rows = area_bin(int32_t(place / grid.width), size.height, grid.height);
  const Bin columns = area_bin(int32_t(place % grid.width), size.width, grid.width);
  const float count = float(rows.end - rows.first) * float(columns.end - columns.first);
  for (int32_t y = rows.first; y < rows.end; ++y)
    for (int32_t x = columns.first; x < columns.end; ++x)
      for (int64_t c = 0; c < channels; ++c) image[(int64_t(y) * size.width + x) * stride + c] += grad[c] / count;
}

// The transpose of bicubic upsampling: gradients of an image (H, W, stride) to those of its grid (h, w, stride).
inline void shrink(const float* image, Grid size, Grid grid, int64_t stride, float* to) {
  std::fill(to, to + grid.tokens() * stride, 0.0f);
  for (int32_t y = 0; y < size.height; ++y) {
    const Taps<4> down = cubic_taps(y, grid.height, size.height);
    for (int32_t x = 0; x < size.width; ++x, image += stride) {
      const Taps<4> across = cubic_taps(x, grid.width, size.width);
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
          const float weight = down.weight[i] * across.weight[j];
          float* cell = to + (int64_t(down.index[i]) * grid.width + across.index[j]) * stride;
          if (weight == 0) continue;
          for (int64_t c = 0; c < stride; c += LANES)
            store(cell + c, multiply_add(all(weight), load(image + c), load(cell + c)));
        }
    }
  }
}

// A group of images at one scale: what is quantised and what is accumulated do the same from tokens on.
template <typename Each>
class Images {
 public:
  Images(const Tokenizer& tokenizer, int64_t count, Grid size, bool with_residual, Each each)
      : tokenizer_(tokenizer),
        count_(count),
        size_(size),
        cells_(size.tokens()),
        channels_(tokenizer.channels),
        stride_(round_up(channels_, LANES)),
        padded_row_((size.width + 2) * stride_),
        with_residual_(with_residual),
        map_(count * cells_ * stride_),
        residual_(with_residual ? count * cells_ * stride_ : 0),
        wide_(count * cells_ * stride_),
        padded_(count * (size.height + 2) * padded_row_),
        each_(each) {
    // the frame of zeros around each image, and the channels that are none
    each_(count_, [&](int64_t first, int64_t end) {
      for (int64_t image = first; image < end; ++image) {
        if (stride_ != channels_) {
          std::fill(inside(image, -1) - stride_, inside(image, -1) - stride_ + (size_.height + 2) * padded_row_, 0.0f);
          continue;
        }
        for (int64_t y = -1; y <= size_.height; y += size_.height + 1)
          std::fill(inside(image, y) - stride_, inside(image, y) - stride_ + padded_row_, 0.0f);
        for (int64_t y = 0; y < size_.height; ++y) {
          std::fill(inside(image, y) - stride_, inside(image, y), 0.0f);
          std::fill(inside(image, y) + padded_row_ - 2 * stride_, inside(image, y) + padded_row_ - stride_, 0.0f);
        }
      }
    });
  }

  float* map(int64_t image) const { return map_.get() + image * cells_ * stride_; }
  // null if there is none
  float* residual(int64_t image) const { return with_residual_ ? residual_.get() + image * cells_ * stride_ : nullptr; }

  // The first pixel of a row inside its frame of zeros; rows are padded_row apart, and the frame is rows -1 and H.
  float* inside(int64_t image, int64_t y) const {
    return padded_.get() + (image * (size_.height + 2) + y + 1) * padded_row_ + stride_;
  }

  int64_t padded_row() const { return padded_row_; }

  // (C, H, W) to (H, W, stride).
  void read(const float* from, float* image) const {
    if (stride_ != channels_) std::fill(image, image + cells_ * stride_, 0.0f);
    transpose(from, channels_, cells_, cells_, image, stride_);
  }

  void write(const float* image, float* to) const {
    transpose(image, cells_, channels_, stride_, to, cells_);
  }

  // The codes of tokens, `tokens_stride` from image to image, upsampled, inside the frames.
  void upsample(const int64_t* tokens, int64_t tokens_stride, Grid grid) const {
    const bool same = grid.height == size_.height && grid.width == size_.width;
    std::vector<Taps<4>> across(size_.width), down(size_.height);
    for (int32_t x = 0; x < size_.width; ++x) across[x] = cubic_taps(x, grid.width, size_.width);
    for (int32_t y = 0; y < size_.height; ++y) down[y] = cubic_taps(y, grid.height, size_.height);
    each_(count_ * grid.height, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        const int64_t image = i / grid.height, y = i % grid.height;
        const int64_t* row = tokens + image * tokens_stride + y * grid.width;
        float* to = same ? inside(image, y) : wide_.get() + (image * size_.height + y) * size_.width * stride_;
        for (int32_t x = 0; x < size_.width; ++x, to += stride_) {
          const float* codes[4];
          for (int j = 0; j < 4; ++j) codes[j] = tokenizer_.codebook + row[across[x].index[j]] * channels_;
          if (grid.width == size_.width) {
            for (int64_t c = 0; c < channels_; ++c) to[c] = codes[1][c];
          } else {
            const float* w = across[x].weight;
            for (int64_t c = 0; c < channels_; ++c)
              to[c] = w[0] * codes[0][c] + w[1] * codes[1][c] + w[2] * codes[2][c] + w[3] * codes[3][c];
          }
        }
      }
    });
    if (!same)
      each_(count_ * size_.height, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; ++i) {
          const int64_t image = i / size_.height, y = i % size_.height;
          const float* rows[4];
          for (int j = 0; j < 4; ++j)
            rows[j] = wide_.get() + (image * size_.height + down[y].index[j]) * size_.width * stride_;
          const float* w = down[y].weight;
          float* to = inside(image, y);
          for (int64_t x = 0; x < size_.width; ++x)
            for (int64_t c = 0; c < channels_; ++c) {
              const int64_t at = x * stride_ + c;
              to[at] = w[0] * rows[0][at] + w[1] * rows[1][at] + w[2] * rows[2][at] + w[3] * rows[3][at];
            }
        }
      });
  }

  // What is inside the frames through a convolution, or as it is, subtracted from the residuals and added to the maps.
  void add(const Convolutions* convolutions, int64_t phi) const {
    each_(count_ * size_.height, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        const int64_t image = i / size_.height, y = i % size_.height, row = y * size_.width * stride_;
        float* target = residual(image) ? residual(image) + row : nullptr;
        if (convolutions == nullptr) {
          const float* codes = inside(image, y);
          for (int64_t at = 0; at < size_.width * stride_; ++at) {
            if (target) target[at] -= codes[at];
            map(image)[row + at] += codes[at];
          }
          continue;
        }
        for (int64_t x = 0; x < size_.width; x += PIXELS) {
          const int64_t count = size_.width - x < PIXELS ? size_.width - x : PIXELS;
          convolve(count, inside(image, y - 1) + (x - 1) * stride_, padded_row_, channels_, stride_,
                   convolutions->weights(phi), convolutions->bias(phi), target ? target + x * stride_ : nullptr,
                   map(image) + row + x * stride_);
        }
      }
    });
  }

  // Means of the maps over a grid, `inputs_stride` from image to image.
  void next_inputs(Grid grid, float* inputs, int64_t inputs_stride) const {
    each_(count_ * grid.height, [&](int64_t first, int64_t end) {
      Buffer<float> mean(stride_);
      for (int64_t i = first * grid.width; i < end * grid.width; ++i) {
        const int64_t image = i / grid.tokens(), place = i % grid.tokens();
        pool(map(image), size_, grid, place, stride_, mean.get());
        std::copy(mean.get(), mean.get() + channels_, inputs + image * inputs_stride + place * channels_);
      }
    });
  }

 private:
  const Tokenizer& tokenizer_;
  const int64_t count_;
  const Grid size_;
  const int64_t cells_, channels_, stride_, padded_row_;
  const bool with_residual_;
  Buffer<float> map_, residual_, wide_, padded_;
  const Each each_;
};

}  // namespace fastvar::vectors

// Rows of any floating dtype and layout for operators that pass over them once, with arithmetic in float32.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <initializer_list>
#include <memory>

#include "bfloat16.h"
#include "checks.h"

namespace fastvar::rows {

constexpr int64_t GRAIN = 32768;  // elements that are worth a thread
constexpr int64_t PART = 32;      // rows

// `count` numbers of a floating dtype, `stride` apart, to float32, and back with one rounding, ties to even.
void widen(ScalarType dtype, const void* from, int64_t stride, int64_t count, float* to);
void narrow(ScalarType dtype, const float* from, int64_t count, void* to, int64_t stride);

// Of `parts` parts of `count` numbers, one after the other, the sums to the first part; the others are used up. Always
// two of about as many rows are added, so that errors grow with the logarithm of the number of parts.
void add_in_pairs(float* first, int64_t parts, int64_t count);

// Rows of so many elements that a thread should have at least.
inline int64_t grain(int64_t elements) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, elements)); }

// The rows of a batch in parts, each of one sample, for sums over rows: those of a part first, then the parts in pairs.
// How a sample is divided depends on its length alone, so that a sum depends neither on the threads nor on the batch.
class Parts {
 public:
  Parts(int64_t batch, int64_t length)
      : of_sample(std::max<int64_t>(1, (length + PART - 1) / PART)), count(batch * of_sample), length_(length) {}

  int64_t sample(int64_t part) const { return part / of_sample; }
  int64_t begin(int64_t part) const { return part % of_sample * PART; }
  int64_t end(int64_t part) const { return std::min(length_, begin(part) + PART); }
  int64_t grain(int64_t elements) const { return rows::grain(std::min(length_, PART) * elements); }

  const int64_t of_sample, count;

 private:
  int64_t length_;
};

class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(new float[size]) {}
  operator float*() const { return data_.get(); }

 private:
  std::unique_ptr<float[]> data_;
};

// Where a tensor's elements are. Offsets and strides count elements.
class Layout {
 public:
  Layout(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape)
      : dtype(tensor.scalar_type()) {
    bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    STD_TORCH_CHECK(bytes > 2 || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": ", name,
                    ": expected float32, bfloat16, float16 or float64");
    bool fits = tensor.is_cpu() && tensor.dim() == int64_t(shape.size());
    for (int64_t i = 0; fits && i < tensor.dim(); ++i) {
      const int64_t wanted = shape.begin()[i];
      fits = wanted == ANY || tensor.size(i) == wanted;
      strides[i] = tensor.stride(i);
    }
    STD_TORCH_CHECK(fits, op, ": ", name, ": expected another shape or device");
    inner = tensor.size(-1) > 1 ? tensor.stride(-1) : 1;
  }

  int64_t at(int64_t a) const { return a * strides[0]; }
  int64_t at(int64_t a, int64_t b) const { return a * strides[0] + b * strides[1]; }

  // Whether it can be used as it is.
  bool plain() const { return dtype == ScalarType::Float && inner == 1; }

  // Whether `bits` can be used.
  bool bfloat16() const { return dtype == ScalarType::BFloat16 && inner == 1; }

  ScalarType dtype;
  int64_t bytes;  // of an element
  int64_t strides[4]{};
  int64_t inner;  // stride of the last dimension
};

// Rows to read.
class Source : public Layout {
 public:
  Source(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape)
      : Layout(op, name, tensor, shape), data_(static_cast<const char*>(tensor.const_data_ptr())) {}

  const void* raw(int64_t at) const { return data_ + at * bytes; }
  const uint16_t* bits(int64_t at) const { return static_cast<const uint16_t*>(raw(at)); }

  // In float32: where they are, or in the buffer.
  const float* read(int64_t at, int64_t count, float* buffer) const {
    if (plain()) return static_cast<const float*>(raw(at));
    widen(dtype, raw(at), inner, count, buffer);
    return buffer;
  }

  // What will be read soon, where rows are too far apart for the processor to foresee it.
  void prefetch(int64_t at, int64_t count) const {
    const char* from = static_cast<const char*>(raw(at));
    for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(from + i);
  }

 private:
  const char* data_;
};

// Rows to write.
class Target : public Layout {
 public:
  Target(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape)
      : Layout(op, name, tensor, shape), data_(static_cast<char*>(tensor.mutable_data_ptr())) {
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      STD_TORCH_CHECK(strides[i] != 0 || tensor.size(i) < 2, op, ": ", name,
                      ": expected memory of its own for every element");
    }
  }

  void* raw(int64_t at) const { return data_ + at * bytes; }
  uint16_t* bits(int64_t at) const { return static_cast<uint16_t*>(raw(at)); }

  // Where to put them in float32: where they belong, or in the buffer, from which `write` brings them there.
  float* place(int64_t at, float* buffer) const { return plain() ? static_cast<float*>(raw(at)) : buffer; }

  void write(int64_t at, const float* from, int64_t count) const {
    if (from != raw(at)) narrow(dtype, from, count, raw(at), inner);
  }

 private:
  char* data_;
};

// The sum of LANES numbers, which are overwritten.
template <int LANES>
FASTVAR_HOST_DEVICE inline float fold(float* lanes) {
  if constexpr (LANES == 1) return lanes[0];
  constexpr int HALF = LANES / 2;  // a constant, so that each step is a few instructions
  for (int lane = 0; lane < HALF; ++lane) lanes[lane] += lanes[lane + HALF];
  return fold<std::max(HALF, 1)>(lanes);
}

// The sum of f(0) to f(count - 1), in an order that depends on `count` alone.
template <int LANES, typename F>
FASTVAR_HOST_DEVICE inline float sum(int64_t count, const F& f) {
  float lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    for (int lane = 0; lane < LANES; ++lane) lanes[lane] += f(i + lane);
  }
  for (int lane = 0; i + lane < count; ++lane) lanes[lane] += f(i + lane);
  return fold<LANES>(lanes);
}

}  // namespace fastvar::rows

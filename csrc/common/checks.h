// What ops demand of their arguments before they touch memory. The public functions check too, with better words; but
// an op can be called without them, and what does not fit together would be read or written past its end.
#pragma once

#include <sstream>
#include <string>
#include <vector>

#include "common/common.h"

namespace fastvar {

using torch::headeronly::ScalarType;

constexpr int64_t ANY = -1;             // size of a dimension
constexpr int64_t MOST_SIDE = 1 << 14;  // of a grid: twice the number of its cells fits into int32
constexpr int64_t MOST_THREADS = 1024;  // of a CUDA block, or a team of CPU threads that stands for one

// The checks of one call of an op, whose tensors are all on the device of `lead`.
class Checks {
 public:
  Checks(const char* op, const Tensor& lead) : op_(op), lead_(lead) {}

  // A contiguous tensor of this shape.
  void tensor(const char* name, const Tensor& tensor, ScalarType dtype, const std::vector<int64_t>& shape) const {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, op_, ": ", name, ": expected another dtype");
    bool fits = tensor.dim() == int64_t(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == ANY || tensor.size(int64_t(i)) == shape[i];
    STD_TORCH_CHECK(fits, op_, ": ", name, ": expected shape (", words(shape), "), got (", words(sizes(tensor)), ")");
    STD_TORCH_CHECK(tensor.is_contiguous(), op_, ": ", name, ": expected a contiguous tensor");
    STD_TORCH_CHECK(tensor.device() == lead_.device(), op_, ": ", name, ": expected the device of the first tensor");
  }

  // A number from `least` to `most`.
  void number(const char* name, int64_t value, int64_t least, int64_t most) const {
    STD_TORCH_CHECK(value >= least && value <= most, op_, ": ", name, ": expected ", least, " to ", most, ", got ",
                    value);
  }

  // A grid that is no larger than the finest one.
  void grid(const char* name, int64_t height, int64_t width, int64_t most_height, int64_t most_width) const {
    number(name, height, 1, most_height < MOST_SIDE ? most_height : MOST_SIDE);
    number(name, width, 1, most_width < MOST_SIDE ? most_width : MOST_SIDE);
  }

  // Grids (h_1, w_1, h_2, ...) of which none is larger than the last. Returns how many tokens they have together.
  int64_t grids(const std::vector<int64_t>& sides) const {
    STD_TORCH_CHECK(!sides.empty() && sides.size() % 2 == 0, op_, ": grids: expected height and width of each, got ",
                    sides.size(), " numbers");
    int64_t tokens = 0;
    for (size_t k = 0; k < sides.size(); k += 2) {
      grid("grids", sides[k], sides[k + 1], sides[sides.size() - 2], sides.back());
      tokens += sides[k] * sides[k + 1];
    }
    return tokens;
  }

 private:
  static std::vector<int64_t> sizes(const Tensor& tensor) {
    std::vector<int64_t> found;
    for (int64_t i = 0; i < tensor.dim(); ++i) found.push_back(tensor.size(i));
    return found;
  }

  static std::string words(const std::vector<int64_t>& shape) {
    std::ostringstream text;
    for (size_t i = 0; i < shape.size(); ++i) {
      text << (i ? ", " : "");
      shape[i] == ANY ? text << "*" : text << shape[i];
    }
    return text.str();
  }

  const char* op_;
  const Tensor& lead_;
};

}  // namespace fastvar

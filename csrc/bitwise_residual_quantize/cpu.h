// How the operators on bits are run on a CPU: eight channels a thread; or, for tests, as a GPU does it.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "bitwise_residual_quantize/planes.h"
#include "common/checks.h"

namespace fastvar::bitwise {

// `ranks` are 0 or such as a CUDA block could have.
inline void check_ranks(const char* op, const Tensor& lead, int64_t ranks) {
  Checks(op, lead).number("ranks", ranks, 0, MOST_THREADS);
  STD_TORCH_CHECK(ranks <= 32 || ranks % 32 == 0, op, ": ranks: expected up to 32 or a multiple of it, got ", ranks);
}

// Memory of a group's scratch, not initialised.
class ScratchMemory {
 public:
  explicit ScratchMemory(int64_t bytes) : memory_(::operator new(bytes, std::align_val_t(64))) {}
  void* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  std::unique_ptr<void, Free> memory_;
};

// f(image, channel, channels, scratch) for all groups of eight channels, with scratch of so many planes. A thread has
// at least `grain` groups.
template <typename F>
void each_eight(int64_t batch, int32_t depth, Size finest, int32_t planes, int64_t grain, const F& f) {
  const int64_t groups = (depth + 7) / 8;
  parallel_for(0, batch * groups, grain, [&](int64_t begin, int64_t end) {
    const ScratchMemory memory(Scratch<Eight>::bytes(finest, planes));
    const Scratch<Eight> scratch(memory.get(), finest);
    for (int64_t i = begin; i < end; ++i) {
      const int32_t channel = int32_t(i % groups) * 8;
      f(i / groups, channel, std::min(8, depth - channel), scratch);
    }
  });
}

// f(team, image, channel, scratch) for all channels, each by a team of `ranks` threads.
template <typename F>
void each_by_team(int64_t batch, int32_t depth, Size finest, int32_t planes, int32_t ranks, const F& f) {
  const ScratchMemory memory(Scratch<float>::bytes(finest, planes));
  const Scratch<float> scratch(memory.get(), finest);
  as_team(ranks, [&](const Rank& team) {
    for (int64_t i = 0; i < batch * depth; ++i) {
      f(team, i / depth, int32_t(i % depth), scratch);
      team.sync();  // before the next channel takes the memory
    }
  });
}

}  // namespace fastvar::bitwise

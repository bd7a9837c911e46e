// Counter-based random numbers, bit for bit those of fastvar/random.py.
//
// Philox-4x32-10, Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
#pragma once

#include "common/common.h"

namespace fastvar {

// The first 32 of 128 random bits. The key is the seed, the counter words are (counter low, counter high, stream low,
// stream high).
FASTVAR_HOST_DEVICE inline uint32_t philox(int64_t seed, int64_t stream, int64_t counter) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  uint32_t word0 = static_cast<uint32_t>(counter);
  uint32_t word1 = static_cast<uint32_t>(static_cast<uint64_t>(counter) >> 32);
  uint32_t word2 = static_cast<uint32_t>(stream);
  uint32_t word3 = static_cast<uint32_t>(static_cast<uint64_t>(stream) >> 32);
// unrolled before vectorisation, which takes no loop inside a loop
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(word0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(word2) * 0xCD9E8D57u;
    word0 = static_cast<uint32_t>(product1 >> 32) ^ word1 ^ key0;
    word2 = static_cast<uint32_t>(product0 >> 32) ^ word3 ^ key1;
    word1 = static_cast<uint32_t>(product1);
    word3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return word0;
}

// A multiple of 2^-24 in [0, 1).
FASTVAR_HOST_DEVICE inline float uniform(int64_t seed, int64_t stream, int64_t counter) {
  return static_cast<float>(static_cast<int32_t>(philox(seed, stream, counter) >> 8)) * 0x1p-24f;
}

}  // namespace fastvar

// Blocks that have read a request's rows together, each a cluster of its own, and go on together: they meet
// in global memory, where two that add up half of a residual each take less long than one, and where no block
// waits for all that another's threads have written.
//
// A block that waits for one which has not begun keeps a multiprocessor from it, and from whoever else has
// begun elsewhere and waits too. So nobody waits long for the first meeting; from there on all are running.
#pragma once

#include "cuda/tile_stats.cuh"

namespace foretoken::cuda {

enum class Part : int32_t {
  leaves,  // the last to come goes on alone
  alone,
  leads,  // with all others, and writes the verdict down
  helps,
};

// What a residual's sums need where they are told to other blocks, of one request. Lies where unfiltered rows
// leave `lanes` unused.
class TogetherSums {
 public:
  static constexpr int kQuarters = 4;

  __device__ __forceinline__ TogetherSums(float* lanes, uint32_t tiles)
      : words_(reinterpret_cast<uint64_t*>(lanes)), tiles_(tiles) {}

  // Exact masses of the quarters of a tile; of several that were summed together the first has it all.
  __device__ __forceinline__ uint64_t* masses(int turn, int32_t which, uint32_t index) const {
    return words_ + (place(turn, which) + index) * kQuarters;
  }
  __device__ __forceinline__ uint64_t mass_at(int turn, int32_t which, uint32_t index) const {
    const ulonglong2* const parts = reinterpret_cast<const ulonglong2*>(masses(turn, which, index));
    const ulonglong2 first = __ldcg(parts), second = __ldcg(parts + 1);
    return first.x + first.y + second.x + second.y;
  }
  // Of tiles, as the sums of weights in float32 have it.
  __device__ __forceinline__ uint64_t* sum(int turn, int32_t which, uint32_t index) const {
    return words_ + 4 * kQuarters * tiles_ + place(turn, which) + index;
  }
  // Blocks that have told all they had to, of all turns.
  __device__ __forceinline__ uint32_t* told() const {
    return reinterpret_cast<uint32_t*>(words_ + 4 * (kQuarters + 1) * tiles_);
  }

 private:
  __device__ __forceinline__ uint32_t place(int turn, int32_t which) const {
    return static_cast<uint32_t>(turn % 2 * 2 + which) * tiles_;
  }

  uint64_t* words_;
  uint32_t tiles_;
};
static_assert(sizeof(uint64_t) * 4 * (TogetherSums::kQuarters + 1) + sizeof(uint64_t) <=
              3 * kWarpSize * sizeof(float));  // of a tile; a request has room for three rows or more

// Of a request's word in `arrivals`: who has come; whether nobody waits; who has seen how it ended.
constexpr uint32_t kCome = 0x3FFu, kNobodyWaits = 0x8000u, kSeen = 0x10000u;
constexpr long long kPatience = 40000;  // cycles, some 20 us

// By one thread, behind a barrier of its block: what the others wrote before is there for it.
__device__ inline Part meet(uint32_t* word, uint32_t blocks) {
  uint32_t found = add_in_order(word, 1u) + 1;
  const bool is_last = (found & kCome) == blocks;
  const long long begin = clock64();
  while ((found & kCome) != blocks && (found & kNobodyWaits) == 0) {
    if (clock64() - begin < kPatience) {
      found = read_in_order(word);
      continue;
    }
    // Only while somebody is missing, so that all agree, and who is missing knows when it comes.
    const uint32_t before = atomicCAS(word, found, found | kNobodyWaits);
    found = before == found ? found | kNobodyWaits : before;
  }
  if ((found & kNobodyWaits) != 0) return is_last ? Part::alone : Part::leaves;
  return is_last ? Part::leads : Part::helps;
}

// By one thread of a block that has met. The last leaves the word as it was.
__device__ inline void leave_meeting(uint32_t* word, uint32_t blocks) {
  if (atomicAdd(word, kSeen) / kSeen == blocks - 1) *word = 0;
}

// By all threads of a block that has told what it had to. `wanted`: as often as all have by now; who does not
// wait has no use for it.
__device__ inline void meet_again(uint32_t* told, uint32_t wanted, bool waits) {
  __syncthreads();
  if (threadIdx.x == 0) {
    add_in_order(told, 1u);
    while (waits && read_in_order(told) < wanted) {
    }
  }
  __syncthreads();
}

}  // namespace foretoken::cuda

// Blocks that have read a request's rows together, each a cluster of its own, and go on together: they meet
// in global memory, where two that add up half of a residual each take less long than one, and where no block
// waits for all that another's threads have written.
//
// A block that waits for one which has not begun keeps a multiprocessor from it, and from whoever else has
// begun elsewhere and waits too. So nobody waits long for the first meeting; from there on all are running.
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/tile_stats.cuh"
#include "math/meeting.hpp"

namespace foretoken::cuda {

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

// A request's word in `arrivals`, for one thread of a block.
class MeetingWord {
 public:
  __device__ __forceinline__ explicit MeetingWord(uint32_t* place) : place_(place) { begin_ = clock64(); }

  __device__ __forceinline__ Part meet(uint32_t blocks) { return foretoken::meet(*this, blocks); }
  __device__ __forceinline__ void leave(uint32_t blocks) { leave_meeting(*this, blocks); }

  __device__ __forceinline__ uint32_t add(uint32_t amount) { return add_in_order(place_, amount); }
  __device__ __forceinline__ uint32_t read() { return read_in_order(place_); }
  __device__ __forceinline__ uint32_t swap(uint32_t expected, uint32_t desired) {
    return atomicCAS(place_, expected, desired);
  }
  __device__ __forceinline__ bool is_patient() const { return clock64() - begin_ < kPatience; }
  __device__ __forceinline__ uint32_t count(uint32_t amount) { return atomicAdd(place_, amount); }
  __device__ __forceinline__ void clear() { *place_ = 0; }

 private:
  static constexpr long long kPatience = 40000;  // cycles, some 20 us

  uint32_t* place_;
  long long begin_;
};

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

// What runs in front of the first round of a launch, and behind every round: one block each.
#pragma once

#include "cuda/views.cuh"
#include "math/draft_tiers.hpp"
#include "ops/commit.hpp"
#include "ops/loop_graph.hpp"

namespace foretoken::cuda {

constexpr int kEndThreads = 256, kWarp = 32;

struct LoopHandles {
  cudaGraphConditionalHandle again = 0, tier = 0;
};

// Words that the host writes while the device runs.
struct MappedWords {
  const volatile int32_t* cancelled = nullptr;
  volatile int32_t* ring = nullptr;
};

__device__ inline AcceptanceRate rate_of(const LoopGraphArgs& args, int64_t slot) {
  return AcceptanceRate{static_cast<int32_t>(read_index(args.acceptance, slot, 0)),
                        static_cast<int32_t>(read_index(args.acceptance, slot, 1))};
}

// Most tokens for what a round costs; of equals the one with fewest drafts. The whole block.
__device__ inline void choose_tier(const LoopGraphArgs& args, const LoopHandles& handles) {
  __shared__ unsigned long long tokens[kMostTiers];
  if (threadIdx.x < kMostTiers) tokens[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t b = threadIdx.x; b < args.slots.shape[0]; b += kEndThreads) {
    const int64_t slot = slot_of(args.slots, b, args.next_drafts.shape[0]);
    const int64_t budget = slot < 0 ? -1 : read_index(args.next_drafts, slot);
    if (budget < 0) continue;
    ExpectedTokens expected(rate_of(args, slot).rate());
    for (int t = 0; t < args.tier_count; ++t) {
      const int64_t drafts = args.tiers[t].drafts;
      atomicAdd(&tokens[t],
                static_cast<unsigned long long>(expected.with(drafts < budget ? drafts : budget)));
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int best = 0;
  for (int t = 1; t < args.tier_count; ++t) {
    if (tokens[t] * args.tiers[best].cost > tokens[best] * args.tiers[t].cost) best = t;
  }
  write_index(args.progress, best, kLoopTier);
  cudaGraphSetConditional(handles.tier, static_cast<unsigned>(best));
}

__global__ void __launch_bounds__(kEndThreads)
    loop_begin_kernel(const __grid_constant__ LoopGraphArgs args, LoopHandles handles) {
  if (threadIdx.x == 0) {
    write_index(args.progress, 0, kLoopRounds);
    write_index(args.progress, static_cast<int32_t>(LoopEnd::none), kLoopEnd);
  }
  if (args.tier_count > 1) choose_tier(args, handles);
}

// By threads with rows of their own, which later read what they have written.
__device__ inline void note_acceptance(const LoopGraphArgs& args, const TensorView& record) {
  for (int64_t b = threadIdx.x; b < args.slots.shape[0]; b += kEndThreads) {
    const int64_t slot = slot_of(args.slots, b, args.next_drafts.shape[0]);
    if (slot < 0 || read_index(record, b, kRecordEmitted) <= 0) continue;
    AcceptanceRate rate = rate_of(args, slot);
    rate.note(static_cast<int32_t>(read_index(record, b, kRecordDrafted)),
              static_cast<int32_t>(read_index(record, b, kRecordAccepted)));
    write_index(args.acceptance, rate.trials, slot, 0);
    write_index(args.acceptance, rate.successes, slot, 1);
  }
}

__device__ inline void write_entry(const LoopGraphArgs& args, const TensorView& record, int32_t tier,
                                   int32_t* entry) {
  const int64_t columns = record.shape[1], rows = args.slots.shape[0];
  if (threadIdx.x == 0) entry[kEntryTier] = tier;
  for (int64_t i = threadIdx.x; i < rows * columns; i += kEndThreads) {
    const int64_t b = i / columns, column = i % columns;
    entry[kEntryFields + b * args.width + column] = static_cast<int32_t>(read_index(record, b, column));
  }
}

// Where the records of this round go; null: nowhere.
__device__ inline int32_t* entry_of(const LoopGraphArgs& args, int32_t* ring, int64_t round,
                                    uint32_t written) {
  const int64_t stride = kEntryFields + args.slots.shape[0] * args.width;
  if (ring != nullptr) return ring + kRingFields + written % args.ring_rounds * stride;
  if (!args.history || round >= args.history.shape[0]) return nullptr;
  return static_cast<int32_t*>(args.history.data) + round * stride;
}

// Texts that go on; the whole block gets the number, and every thread has come so far.
__device__ inline int64_t live_rows(const LoopGraphArgs& args) {
  int64_t live = 0;
  for (int64_t first = 0; first < args.slots.shape[0]; first += kEndThreads) {
    const int64_t b = first + threadIdx.x;
    bool lives = false;
    if (b < args.slots.shape[0]) {
      const int64_t slot = slot_of(args.slots, b, args.next_drafts.shape[0]);
      lives = slot >= 0 && read_index(args.next_drafts, slot) >= 0;
    }
    live += __syncthreads_count(lives);
  }
  return live;
}

// Behind each round: keeps its record, tells whether there is another, and of which tier.
__global__ void __launch_bounds__(kEndThreads)
    loop_end_kernel(const __grid_constant__ LoopGraphArgs args, MappedWords mapped, LoopHandles handles) {
  // Words of the host are far away: others fetch them while the first warps work.
  __shared__ bool asked;
  __shared__ uint32_t taken;
  const bool first = threadIdx.x == 0, has_ring = mapped.ring != nullptr;
  if (threadIdx.x == kEndThreads - 1) asked = *mapped.cancelled != 0;
  if (threadIdx.x == kEndThreads - 1 - kWarp) {
    taken = has_ring ? static_cast<uint32_t>(mapped.ring[kRingRead]) : 0;
  }
  const int64_t round = read_index(args.progress, kLoopRounds);
  const int32_t tier = args.tier_count > 1 ? static_cast<int32_t>(read_index(args.progress, kLoopTier)) : 0;
  const uint32_t written = static_cast<uint32_t>(read_index(args.progress, kLoopWritten));
  const TensorView& record = args.tiers[tier].record;
  if (record) {
    int32_t* const entry = entry_of(args, const_cast<int32_t*>(mapped.ring), round, written);
    if (entry != nullptr) write_entry(args, record, tier, entry);
    if (args.tier_count > 1) note_acceptance(args, record);
  }
  if (has_ring) __threadfence_system();  // each thread's part of the entry is there before it is announced
  const int64_t live = live_rows(args);
  __syncthreads();  // every thread has read what the first is going to write, which knows the host's words
  if (first) {
    LoopEnd end = LoopEnd::none;
    if (live == 0) {
      end = LoopEnd::finished;
    } else if (live < read_index(args.limits, kLeastLive)) {
      end = LoopEnd::vacant;
    } else if (round + 1 >= read_index(args.limits, kMostRounds)) {
      end = LoopEnd::limit;
    } else if (asked) {
      end = LoopEnd::cancelled;
    } else if (has_ring && written + 1 - taken >= static_cast<uint64_t>(args.ring_rounds)) {
      end = LoopEnd::full;
    }
    if (has_ring) {
      __threadfence_system();
      mapped.ring[kRingWritten] = static_cast<int32_t>(written + 1);
    }
    write_index(args.progress, round + 1, kLoopRounds);
    write_index(args.progress, static_cast<int32_t>(end), kLoopEnd);
    write_index(args.progress, static_cast<int32_t>(written + 1), kLoopWritten);
    cudaGraphSetConditional(handles.again, end == LoopEnd::none ? 1u : 0u);
  }
  if (args.tier_count > 1) choose_tier(args, handles);
}

}  // namespace foretoken::cuda
